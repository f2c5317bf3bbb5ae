"""The likelihood of tokens: unbiased bounds by the rates of a chain, and a chain that writes one token at a time."""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fm_jax.checks import (
    check_array,
    check_has,
    check_integer,
    check_key,
    check_member,
    check_number,
    check_real,
)
from fm_jax.logits import logits_of
from fm_jax.losses.causal import log_probs_of_data
from fm_jax.losses.tokens import (
    MARGIN,
    Integrand,
    as_data,
    at_tokens,
    cross_entropy_of,
    generalized_kl_of,
    masked_elbo_of,
    reversal_elbo_of,
)
from fm_jax.nfe import check_denoiser
from fm_jax.paths.mixture import MixturePath, check_has_mask
from fm_jax.shapes import time_dtype
from fm_jax.types import Array, DenoiserFn, Key, PerExample, Scalar, TokenSample, TokenState

Bound = Literal["mask", "reversal", "forward"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)
_INTEGRANDS = {"mask": masked_elbo_of, "reversal": reversal_elbo_of, "forward": generalized_kl_of}


class TokenBound(NamedTuple):
    """An unbiased estimate of an upper bound of -log p(x1): `nats` [batch], of all tokens of an example together.

    `error` [batch] is its standard error, by what the draws of each stratum differ in. Both are infinite of data that
    the denoiser excludes.
    """

    nats: Array
    error: Array


def token_bound(
    denoiser: DenoiserFn,
    path: MixturePath,
    key: Key,
    x1: TokenState,
    *,
    bound: Bound = "reversal",
    num_times: int = 32,
    end: float = 1 - MARGIN,
) -> TokenBound:
    """An upper bound of `-log p(x1)` for each example, in nats: that of a chain with the rates of a denoiser.

    * "reversal", for every source, is tight: with the exact posterior it is -log p(x1) of each example.
    * "mask", for a `Masked` source, is the same number, with less to compute.
    * "forward", for every source, is what `losses.generalized_kl` integrates. It is tight for a mask; for any other
      source its average is above the entropy of the data, whatever the denoiser.

    The chain ends before t = 1, and from there each token is drawn from its posterior, at once:

        E [integral from 0 to end of the integrand + sum over the tokens of -log p(x1 | x_end)].

    So it is a bound for every denoiser, also where an integral to 1 is infinite, as for any network that has doubts
    at t = 1. Drawing at once what is left adds what these tokens tell of each other, of order (1 - end)^2.

    Times are stratified: two independent draws, of times and of tokens, in each of `num_times / 2` even strata, and two
    of the last step. Their differences give the standard error, also where the strata differ much; that of independent
    times, the deviation of all over the root of their number, would be too large. Of a source without a mask it is
    right on average alone: its draws have long tails, and a single example's error may be far too small.

    Notebooks: (14.8).

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`.
        path: that the denoiser was trained on. The range of its schedule is where the integral begins.
        key: for times and tokens.
        x1: data.
        bound: "reversal", "mask" or "forward".
        num_times: evaluations of the denoiser for the integral, even; two more are for the last step.
        end: where the chain ends; 1 for no last step.

    Returns:
        `nats` and `error`, for each example; see `bits_per_token` and `perplexity`.

    Raises:
        ValueError: for another bound, "mask" without a mask, an odd number of times, an end outside of (0, 1], a
            denoiser that does not return logits, and tokens that are known to be no data.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> even = lambda t, x: jnp.zeros((*x.shape, 3))  # two tokens and the mask: log 2 each
        >>> found = token_bound(even, MixturePath(Linear(), Masked(3, 2)), jax.random.key(0), jnp.ones((1, 99), int))
        >>> bool(abs(found.nats[0] - 99 * math.log(2)) < 4 * found.error[0])
        True
    """
    x1 = _checked(denoiser, path, key, x1)
    check_member("bound", bound, BOUNDS)
    check_integer("num_times", num_times, least=2)
    if num_times % 2:
        raise ValueError(f"num_times must be even, two draws in each stratum, got {num_times}.")
    check_number("end", end, "(0, 1]")
    if bound == "mask":
        check_has_mask(path, 'bound="reversal" is for all sources')
    first, last = path.schedule.domain
    last = min(end, last)
    key_times, key_tokens, key_last = jax.random.split(key, 3)
    num, dtype = num_times // 2, time_dtype(x1)
    within = jax.random.uniform(key_times, (2, num, len(x1)), dtype)
    t = first + (last - first) / num * (jnp.arange(num, dtype=dtype)[None, :, None] + within)
    nats, squared_error = _of_pairs(path, denoiser, key_tokens, x1, _INTEGRANDS[bound], t)
    nats, squared_error = (last - first) * nats, (last - first) ** 2 * squared_error
    if last < 1:
        t = jnp.full((2, 1, len(x1)), last, dtype)
        left, squared_error_left = _of_pairs(path, denoiser, key_last, x1, cross_entropy_of, t)
        nats, squared_error = nats + left, squared_error + squared_error_left
    return TokenBound(nats, jnp.where(jnp.isposinf(nats), jnp.inf, jnp.sqrt(squared_error)))


def any_order_log_prob(denoiser: DenoiserFn, path: MixturePath, key: Key, x1: TokenState) -> PerExample:
    """The log-probability of each example when its tokens are written one after the other in a random order, in nats.

    `sum_i log p(x1_i | those before i)`, from masks alone, in one order for each example, drawn evenly. With the exact
    posterior it is log p(x1), whatever the order. On average over the orders it is minus the "mask" bound of
    `token_bound` (Zheng et al. 2024, arXiv:2409.02908, eq. 7), whose integral over time is done here: of a network that
    sees the time too, since each token appears at a time of its own, as in the chain.

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`. It is asked once for each token.
        path: that the denoiser was trained on, with a `Masked` source.
        key: for the orders and times.
        x1: data.

    Raises:
        ValueError: for a source without a mask, a denoiser that does not return logits, and tokens that are known to be
            no data.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> path, even = MixturePath(Linear(), Masked(3, 2)), lambda t, x: jnp.zeros((*x.shape, 3))
        >>> log_prob = any_order_log_prob(even, path, jax.random.key(0), jnp.ones((1, 4), int))
        >>> bool(abs(log_prob[0] + 4 * math.log(2)) < 1e-5)
        True
    """
    x1 = _checked(denoiser, path, key, x1)
    check_has_mask(path, "an order needs masks to write over")
    dtype, num = time_dtype(x1), math.prod(x1.shape[1:])
    eps = float(jnp.finfo(dtype).eps)
    kappa = jax.random.uniform(key, (len(x1), num), dtype, eps, 1 - eps)  # at which each token appears
    times = path.schedule.t_from_log_snr(2 * (jnp.log(kappa) - jnp.log1p(-kappa)))
    rank, masks = kappa.argsort(axis=1).argsort(axis=1).reshape(x1.shape), path.source.draw(key, x1)

    def of(i: Array) -> PerExample:
        x = jnp.where(rank < i, x1, masks)
        t = jnp.sort(times, axis=1)[:, i]
        log_posterior = path.log_posterior(denoiser(t, x), x)
        return _sum(jnp.where(rank == i, cross_entropy_of(path, TokenSample(t, x, x, x1), log_posterior), 0))

    return -jax.lax.map(of, jnp.arange(num)).sum(axis=0)


def next_token_log_prob(denoiser: DenoiserFn, path: MixturePath, x1: TokenState) -> PerExample:
    """The log-probability of each example, `sum_i log p(x1_i | x1_<i)`, in nats: exact, by one call of the denoiser.

    Args:
        denoiser: a causal network one place late, `bind(losses.one_late(apply_fn, path), params)`. Of any other the
            number is none: a network that sees the token it is to say seems to know all.
        path: with a `Masked` source.
        x1: data [batch, n].

    Raises:
        ValueError: for a source without a mask, a denoiser that does not return logits, and tokens that are known to be
            no data.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> path, even = MixturePath(Linear(), Masked(3, 2)), lambda t, x: jnp.zeros((*x.shape, 3))
        >>> next_token_log_prob(even, path, jnp.ones((1, 4), int)) / math.log(2)
        Array([-4.], dtype=float32)
    """
    x1 = _as_data_of(denoiser, path, x1, causal=True)
    check_has_mask(path, "it stands where the first token is to be said")
    logits = logits_of(denoiser, jnp.ones((), time_dtype(x1)), x1, path.num_tokens)
    return _sum(at_tokens(log_probs_of_data(logits, path, x1), x1))


def bits_per_token(nats: PerExample, num_tokens: int) -> PerExample:
    """`nats / (num_tokens log 2)` of each example, nats being -log p(x1) or a bound of it, of `num_tokens` tokens.

    Raises:
        ValueError: for nats that are no numbers [batch], or less than one token.

    Example:
        >>> bits_per_token(jnp.log(jnp.array([4.0, 16.0])), 2)
        Array([1., 2.], dtype=float32)
    """
    _check_nats(nats, num_tokens)
    return jnp.asarray(nats) / (num_tokens * math.log(2))


def perplexity(nats: PerExample, num_tokens: int) -> Scalar:
    """`exp(mean of nats / num_tokens)`: among how many tokens, each as likely, the model would have to choose.

    Over all examples together, of `num_tokens` tokens each; nats are -log p(x1) or a bound of it.

    Raises:
        ValueError: for nats that are no numbers [batch], or less than one token.

    Example:
        >>> perplexity(2 * jnp.log(jnp.array([4.0, 9.0])), 2)  # the geometric mean
        Array(6., dtype=float32)
    """
    _check_nats(nats, num_tokens)
    return jnp.exp(jnp.asarray(nats).mean() / num_tokens)


def _of_pairs(
    path: MixturePath, denoiser: DenoiserFn, key: Key, x1: TokenState, integrand: Integrand, t: Array
) -> tuple[PerExample, PerExample]:
    """The mean over times [2, n, batch], each with tokens of its own, and its squared error by the n differences."""

    def at(i: Array) -> PerExample:
        key_x0, key_path = jax.random.split(jax.random.fold_in(key, i))
        sample = path.sample(key_path, t.reshape(-1, len(x1))[i], path.source.draw(key_x0, x1), x1)
        log_posterior = path.log_posterior(denoiser(sample.t, sample.x_t), sample.x_t)
        return _sum(integrand(path, sample, log_posterior))

    one, other = jax.lax.map(at, jnp.arange(2 * t.shape[1])).reshape(t.shape)
    return (one + other).mean(axis=0) / 2, ((one - other) ** 2).sum(axis=0) / (2 * t.shape[1]) ** 2


def _sum(each: Array) -> PerExample:
    return each.reshape(len(each), -1).sum(axis=1)


def _checked(denoiser: DenoiserFn, path: MixturePath, key: Key, x1: TokenState) -> TokenState:
    """The data as int32."""
    check_key(key)
    return _as_data_of(denoiser, path, x1)


def _as_data_of(denoiser: DenoiserFn, path: MixturePath, x1: TokenState, *, causal: bool = False) -> TokenState:
    check_denoiser("denoiser", denoiser, causal=causal)
    check_has("path", path, ("schedule", "source", "source_probs", "log_posterior", "check_data"), "a MixturePath")
    return as_data(path, x1)


def _check_nats(nats: PerExample, num_tokens: int) -> None:
    check_array("nats", nats)
    check_real("nats", nats)
    if len(nats.shape) != 1 or not nats.shape[0]:
        raise ValueError(f"nats must be [batch], not empty, got shape {tuple(nats.shape)}.")
    check_integer("num_tokens", num_tokens)
