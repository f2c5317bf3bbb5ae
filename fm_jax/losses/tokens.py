"""Losses of a denoiser of tokens: cross entropy, and what bounds on the likelihood integrate over time.

All train the same network, logits of x1, and with the exact posterior all are at their minimum. They differ in what a
time counts for, and in what the minimum is: see `likelihood.token_bound`, which evaluates the bounds for each example.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_coupling, check_has, check_holds, check_key, check_logits, check_network, check_tokens
from fm_jax.conditions import Drop
from fm_jax.couplings import independent
from fm_jax.losses.matching import Pairs, Times, check_drop, draw_pairs, times_within
from fm_jax.paths.mixture import MixturePath, check_has_mask, check_mixture, check_own_mask
from fm_jax.schedules import coefficients
from fm_jax.shapes import mean_over_event, time_of
from fm_jax.times import Stratified
from fm_jax.types import (
    AnyArray,
    ApplyFn,
    Array,
    Batch,
    Coupling,
    Key,
    Logits,
    LossFn,
    Metrics,
    Params,
    Scalar,
    Time,
    TimeSampler,
    TokenPath,
    TokenSample,
    TokenState,
)

Integrand = Callable[[Any, TokenSample, Logits], Array]
"""`integrand(path, sample, log_posterior) -> [batch, ...]`, in nats for each token."""
MARGIN = 1e-3
"""How long before t = 1 the times of a bound end where its integrand grows as 1 / (1 - kappa)."""


def cross_entropy(
    apply_fn: ApplyFn,
    path: TokenPath,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    drop: Drop | None = None,
) -> LossFn:
    """`E_t,x0,x1 -log p(x1 | x_t)`, averaged over the tokens: the data, as a classifier would tell them from x_t.

    Campbell et al. 2024 (arXiv:2402.04997, eq. 10), Gat et al. 2024 (arXiv:2407.15595, eq. 28). It is no bound on the
    likelihood, for any source; all times count alike. Tokens that are known to be the data's, as those beside the masks
    of a `Masked` source, cost nothing.

    Args:
        apply_fn: the network, `apply_fn(params, t, x, cond, train=, rngs=) -> logits` [batch, ..., K] of x1.
        path: path of tokens, such as `MixturePath(Linear(), Masked(28, 27))`; this loss, not the bounds, takes any.
        coupling: pairs x0 with x1 within the batch; its weights of pairs, if it has any, multiply the loss.
        time_sampler: training times; `None` is `Stratified` over the range where the loss is finite.
        drop: takes conditions away from some examples, as in `flow_matching`.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)`, in nats a token, as of `flow_matching`: `x1` [batch, ...] of
        the batch are tokens, integers from 0 to K - 1. A key is needed, as x_t is drawn. Metrics are `loss`; and
        `cross_entropy` and `accuracy`, those of the tokens of x_t that are not the data's, each of which counts alike;
        0 where there is none.

    Raises:
        ValueError: if `path` is none of tokens, or `time_sampler` leaves the range where the loss is finite; when the
            loss is traced, if the network returns anything but real numbers [batch, ..., K], and what `flow_matching`
            raises of a batch; without a key; if the tokens are known to be none, or to be the mask where they should be
            data.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> zeros = lambda params, t, x, cond, **_: jnp.zeros((*x.shape, 3))
        >>> loss_fn = cross_entropy(zeros, MixturePath(Linear(), Masked(3, 2)))
        >>> loss, _ = loss_fn({}, jax.random.key(0), {"x1": jnp.array([[0, 1, 1]]), "t": jnp.zeros(1)})
        >>> float(loss)  # log 2: the mask is no data
        0.6931471824645996
    """
    _check_path(path)
    times = _times(path, time_sampler, (0.0, 1.0), (0.0, 1.0))
    return _token_loss(apply_fn, path, cross_entropy_of, times, coupling, drop)


def masked_elbo(
    apply_fn: ApplyFn,
    path: MixturePath,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    drop: Drop | None = None,
) -> LossFn:
    """`E_t kappa' / (1 - kappa) -log p(x1 | x_t)` of the tokens that are masked, averaged over all.

    Shi et al. 2024 (arXiv:2406.04329, eq. 4-5). For a `Masked` source, and no other, it is an upper bound of
    -log p(x1) a token, and tight: with the exact posterior it is -log p(x1) of each example. It is the same for every
    schedule, and an average over all orders in which the tokens could be written (Zheng et al. 2024, arXiv:2409.02908,
    eq. 7). With other times than uniform ones it has the same minimiser, and is no bound.

    Arguments, returns and errors are those of `cross_entropy`; a source without a mask is refused too.
    """
    check_mixture(path)
    check_has_mask(path, "reversal_elbo is for all sources")
    times = _times(path, time_sampler, path.schedule.domain, path.schedule.domain)
    return _token_loss(apply_fn, path, masked_elbo_of, times, coupling, drop)


def generalized_kl(
    apply_fn: ApplyFn,
    path: MixturePath,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    drop: Drop | None = None,
) -> LossFn:
    """`E_t sum over y != x_t of u_th - u + u log(u / u_th)`, u the rates of `forward_rates`, averaged over the tokens.

    The generalised Kullback-Leibler divergence of the rates given x1 from those of the network: for the paths of Gat et
    al. 2024 (arXiv:2407.15595) the `MixturePathGeneralizedKL` of the package flow_matching. For a `Masked` source it is
    `masked_elbo`, and tight. For any other it is an upper bound that is not tight, whatever the network: the chains
    given x1, mixed over the data, are no Markov chain. Of one token with probabilities (.55, .25, .15, .05), 1.1097
    nats, and a uniform source, the least that it can be is 1.4408.

    Arguments, returns and errors are those of `cross_entropy`. But for a mask, the times of `None` end at 0.999: the
    integrand grows as 1 / (1 - kappa), unless the network leaves no doubt there. At t = 1, x_t is x1 and the loss 0.
    """
    check_mixture(path)
    times = _times(path, time_sampler, path.schedule.domain, _before_the_end(path))
    return _token_loss(apply_fn, path, generalized_kl_of, times, coupling, drop)


def reversal_elbo(
    apply_fn: ApplyFn,
    path: MixturePath,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    drop: Drop | None = None,
) -> LossFn:
    """`E_t sum over y != x_t of u_th - u + u log(u / u_th)`, u the rates of `reversal_rates`, averaged over the tokens.

    What uniform diffusion minimises (Schiff et al. 2024, arXiv:2412.10193), here for any source. An upper bound of
    -log p(x1) a token, and tight for every source: with the exact posterior it is -log p(x1) of each example, so that
    its average over the data is their entropy. For a `Masked` source it is `masked_elbo`.

    Arguments, returns and errors are those of `cross_entropy`; times are as in `generalized_kl`.
    """
    check_mixture(path)
    times = _times(path, time_sampler, path.schedule.domain, _before_the_end(path))
    return _token_loss(apply_fn, path, reversal_elbo_of, times, coupling, drop)


def cross_entropy_of(path: TokenPath, sample: TokenSample, log_posterior: Logits) -> Array:
    """`-log p(x1 | x_t)`."""
    del path
    return -at_tokens(log_posterior, sample.x1)


def masked_elbo_of(path: MixturePath, sample: TokenSample, log_posterior: Logits) -> Array:
    """`kappa' / (1 - kappa) (-log p(x1 | x_t))` where a mask is, else 0."""
    masked = sample.x_t == path.source.mask
    return jnp.where(masked, _speed(path, sample.t, sample.x1) * -at_tokens(log_posterior, sample.x1), 0)


def generalized_kl_of(path: MixturePath, sample: TokenSample, log_posterior: Logits) -> Array:
    """`-kappa' / (1 - kappa) [p(x_t) - d + (1 - d) log p(x1)]`, with p of x1 given x_t, and d = 1 where x_t = x1."""
    there = sample.x_t == sample.x1
    log_here = at_tokens(log_posterior, sample.x_t)
    each = jnp.where(there, -jnp.expm1(log_here), -jnp.exp(log_here) - at_tokens(log_posterior, sample.x1))
    return _speed(path, sample.t, sample.x1) * each


def reversal_elbo_of(path: MixturePath, sample: TokenSample, log_posterior: Logits) -> Array:
    """`sum over y != x_t of u_th - u + u log(u / u_th)` of the rates of `log_reversal`, given x1 and given x_t."""
    known = jax.nn.one_hot(sample.x1, path.num_tokens, dtype=bool)
    log_known = jnp.where(known, 0, jnp.asarray(-jnp.inf, log_posterior.dtype))
    log_u, log_network = (log_reversal(path, each, sample.t, sample.x_t) for each in (log_known, log_posterior))
    u = jnp.exp(log_u)
    # u e^-r - u + u r with r = log(u / u_th): at small times both are large, and close to each other.
    r = jnp.where(u > 0, log_u - log_network, 0)
    each = jnp.where(u > 0, u * (jnp.expm1(-r) + r), jnp.exp(log_network))
    here = jax.nn.one_hot(sample.x_t, path.num_tokens, dtype=bool)
    _, sigma, d_alpha, _ = coefficients(path.schedule, time_of(sample.t, sample.x_t))
    return jnp.where(sigma > 0, d_alpha * jnp.where(here, 0, each).sum(axis=-1), 0)


def log_reversal(path: MixturePath, log_posterior: Logits, t: Time, x: TokenState) -> Logits:
    """The logarithms of the rates `reversal` to all y, by kappa instead of t; of that to y = x it means nothing.

    With the sum over the data done,

        u(y, x) / kappa' = p(y) / (1 - kappa) + p_0(y) / kappa [1 - c p(x)],
        1 - c = (1 - kappa) p_0(x) / [kappa + (1 - kappa) p_0(x)],

    p being that of x1 given x. At both ends it is that of a small kappa, or 1 - kappa.
    """
    alpha, sigma, _, _ = coefficients(path.schedule, time_of(t, log_posterior))
    alpha, sigma = (jnp.maximum(each, jnp.finfo(each.dtype).eps) for each in (alpha, sigma))
    p0 = path.source_probs(log_posterior)
    p0_x = p0.ravel()[x][..., None]
    stays = sigma * p0_x / (alpha + sigma * p0_x)  # 1 - c
    leaves = (
        stays + (1 - stays) * -jnp.expm1(at_tokens(log_posterior, x))[..., None]
    )  # 1 - c p(x), of two positive numbers
    return jnp.logaddexp(log_posterior - jnp.log(sigma), jnp.log(p0 / alpha) + jnp.log(leaves))


def as_data(path: TokenPath, x1: AnyArray) -> TokenState:
    """Data of a path as int32, which has room for a mask; raises `ValueError` for what is no data, or none at all."""
    path.check_data(x1)
    if 0 in x1.shape:
        raise ValueError(f"x1 must be [batch, ...], not empty, got shape {tuple(x1.shape)}.")
    return jnp.asarray(x1, jnp.int32)


def draw_token_pairs(
    path: TokenPath, key: Key | None, batch: Batch, coupling: Coupling, times: Times, drop: Drop | None
) -> Pairs:
    """`draw_pairs` of tokens, the data as int32; raises `ValueError` without a key, and for what are no data."""
    check_key(key)
    check_holds(batch, "x1")
    batch = {**batch, "x1": as_data(path, batch["x1"])}
    check = functools.partial(check_tokens, num_tokens=path.num_tokens)
    return draw_pairs(key, batch, path.source, coupling, times, drop, check=check)


def _token_loss(
    apply_fn: ApplyFn, path: TokenPath, integrand: Integrand, times: Times, coupling: Coupling, drop: Drop | None
) -> LossFn:
    check_network("apply_fn", apply_fn)
    check_own_mask("apply_fn", apply_fn, path)
    check_coupling(coupling)
    check_drop(drop)

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params
        pairs = draw_token_pairs(path, key, batch, coupling, times, drop)
        key_path: Any = pairs.key_path
        sample = path.sample(key_path, pairs.t, pairs.x0, pairs.x1)
        logits = apply_fn(params, sample.t, sample.x_t, pairs.cond, train=True, rngs=pairs.rngs)
        check_logits("what the network returns", logits, sample.x_t, path.num_tokens)
        log_posterior = path.log_posterior(logits, sample.x_t)
        each = mean_over_event(integrand(path, sample, log_posterior))
        loss = (each if pairs.weight is None else pairs.weight * each).mean()
        to_say = sample.x_t != sample.x1
        right = log_posterior.argmax(axis=-1) == sample.x1
        found = {"cross_entropy": -at_tokens(log_posterior, sample.x1), "accuracy": right}
        share = jnp.maximum(to_say.sum(), 1)
        return loss, {"loss": loss, **{name: jnp.where(to_say, of, 0).sum() / share for name, of in found.items()}}

    return loss_fn


def at_tokens(values: Logits, x: Array) -> Array:
    """The one of K values [batch, ..., K] at each token."""
    return jnp.take_along_axis(values, x[..., None], axis=-1)[..., 0]


def _speed(path: MixturePath, t: Time, x: TokenState) -> Array:
    """`kappa' / (1 - kappa)`, a scalar or [batch, 1, ..., 1]; 0 at t = 1, where every token has arrived."""
    _, sigma, d_alpha, _ = coefficients(path.schedule, time_of(t, x))
    return jnp.where(sigma > 0, d_alpha / jnp.where(sigma > 0, sigma, 1), 0)


def _before_the_end(path: MixturePath) -> tuple[float, float]:
    """The times of a bound: of masked tokens as far as the schedule goes, of others a little less."""
    low, high = path.schedule.domain
    return low, high if path.source.mask is not None else min(high, 1 - MARGIN)


def _times(
    path: TokenPath, sampler: TimeSampler | None, domain: tuple[float, float], usual: tuple[float, float]
) -> Times:
    return times_within(Stratified(*usual) if sampler is None else sampler, domain, f"the loss on {path}")


def _check_path(path: Any) -> None:
    wanted = ("source", "num_tokens", "sample", "check_data", "log_posterior")
    check_has("path", path, wanted, "a path of tokens, such as MixturePath(Linear(), Masked(28, 27))")
