"""Rates: how often tokens jump, for chains what a velocity is for flows.

A denoiser says how likely each token of the data is, given the tokens at t. With a path it gives several rates of jumps
with the same marginals p_t, as a flow has SDEs with its own: `forward_rates` jumps as rarely as it can,
`reversal_rates` undoes the noising process, `with_corrector` jumps back and forth more often. `kinetic_rates` are those
of any path of tokens, one with a metric among them.

All are `u(t, x) -> [batch, ..., K]`, the rates of each token of x to every other, with 0 at the one that is there. They
carry (`nfe.Counted`) the times at which they are finite, to which samplers keep.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_has, check_logits, check_number, check_tokens, is_traced
from fm_jax.nfe import Counted, check_denoiser, check_rates, cost, domain_of, overlap, reach_of
from fm_jax.paths.mixture import MixturePath, check_mixture
from fm_jax.schedules import coefficients
from fm_jax.shapes import batch_time, time_dtype, time_of
from fm_jax.types import Array, DenoiserFn, Logits, RateFn, Time, TokenPath, TokenState

_START = 1e-5
"""How far from an end rates are asked for that are infinite there."""


def forward_rates(denoiser: DenoiserFn, path: MixturePath) -> RateFn:
    """`u(y, x) = kappa' / (1 - kappa) p(x1 = y | x_t = x)`: the average over the data of a jump to it, and no other.

    Gat et al. 2024 (arXiv:2407.15595, eq. 24). Of all rates of the conditional path these jump least often.

    Notebooks: (14.3), (14.4).

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`.
        path: that the denoiser was trained on.

    Returns:
        `u(t, x)`, finite for t < 1.

    Raises:
        ValueError: for what is no denoiser or no `MixturePath`; when called, for what are no tokens of the path, or if
            the denoiser returns another shape than [batch, ..., K].

    Example:
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> path = MixturePath(Linear(), Masked(3, 2))
        >>> u = forward_rates(lambda t, x: jnp.zeros((*x.shape, 3)), path)
        >>> u(0.5, jnp.array([[2, 0]]))
        Array([[[1., 1., 0.],
                [0., 0., 0.]]], dtype=float32)
    """
    _check(denoiser, path)

    def rates(t: Time, x: TokenState) -> Logits:
        posterior = _posterior(denoiser, path, t, x)
        _, sigma, d_alpha, _ = coefficients(path.schedule, time_of(t, posterior))
        return _to_others(d_alpha / sigma * posterior, x)

    return _carrying(rates, denoiser, path)


def reversal_rates(denoiser: DenoiserFn, path: MixturePath) -> RateFn:
    """The rates of the process that noises the data, reversed in time: D3PM's and SEDD's, uniform diffusion's.

    `u(y, x) = kappa' / kappa p_0(x) sum_a p(x1 = a | x) [kappa d_a(y) + (1 - kappa) p_0(y)] / [kappa d_a(x) +
    (1 - kappa) p_0(x)]`, in which the bracket is `p_t(y | a) / p_t(x | a)`. For a mask it is `forward_rates`.

    Notebooks: (14.5).

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`.
        path: that the denoiser was trained on.

    Returns:
        `u(t, x)`, finite for t < 1, and for t > 0 unless the source is a mask.

    Raises:
        ValueError: as `forward_rates`.
    """
    _check(denoiser, path)

    def rates(t: Time, x: TokenState) -> Logits:
        return reversal(path, _posterior(denoiser, path, t, x), t, x)

    return _carrying(rates, denoiser, path, _start(path))


def reversal(path: MixturePath, posterior: Logits, t: Time, x: TokenState) -> Logits:
    """The rates of `reversal_rates` under given probabilities of x1, [batch, ..., K]; of one x1, its one-hot.

    Args:
        path: any mixture path.
        posterior: `p(x1 | x_t = x)`, [batch, ..., K].
        t: times.
        x: tokens.
    """
    check_mixture(path)
    check_tokens("x", x, path.num_tokens)
    check_logits("posterior", posterior, x, path.num_tokens)
    posterior = jnp.asarray(posterior, time_dtype(posterior))
    alpha, sigma, d_alpha, _ = coefficients(path.schedule, time_of(t, posterior))
    p0 = path.source_probs(posterior)
    p0_x = p0.ravel()[x][..., None]
    # Of the sum over a, all but a = x share the denominator (1 - kappa) p_0(x).
    at_x = jnp.take_along_axis(posterior, x[..., None], axis=-1)
    # p_0(x) / [(1 - kappa) p_0(x)] is 1 / (1 - kappa) where the source draws x; where not, x is data and stays.
    inverse = jnp.where(p0_x > 0, 1 / sigma, 0)
    to_data = d_alpha * inverse * posterior
    to_noise = sigma * p0 * ((1 - at_x) * inverse + at_x * p0_x / (alpha + sigma * p0_x))
    return _to_others(to_data + jnp.where(to_noise > 0, d_alpha / alpha * to_noise, 0), x)


def kinetic_rates(denoiser: DenoiserFn, path: TokenPath) -> RateFn:
    """`u(y, x) = sum_a p(x1 = a | x) p_t(y | a) [d/dt log p_t(y | a) - d/dt log p_t(x | a)]_+`, of any path of tokens.

    Of all rates of a conditional path those with the least kinetic energy (Shaul et al. 2024, arXiv:2412.03487): to
    where the law grows faster than where the token is, and in proportion. The slopes come from one `jax.jvp` of the
    path. On a `MixturePath` they are `forward_rates`, at K times the cost: a step needs memory of K^2 numbers a token.

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`.
        path: that the denoiser was trained on, such as `MetricPath`.

    Returns:
        `u(t, x)`, finite inside of `path.domain` for t < 1. Of an x1 from which a token at t cannot come, nothing is
        added, whatever the denoiser says.

    Raises:
        ValueError: for what is no denoiser or no path of tokens; when called, as `forward_rates`.
    """
    check_denoiser("denoiser", denoiser)
    check_has("path", path, ("log_probs", "posterior", "source"), "a path of tokens, such as MetricPath or MixturePath")
    data = jnp.asarray([a for a in range(path.num_tokens) if a != path.source.mask])

    def laws(t: Array) -> tuple[Array, Array]:
        return path.probs(t, data), path.log_probs(t, data)

    def rates(t: Time, x: TokenState) -> Logits:
        posterior = _posterior(denoiser, path, t, x)
        shape = len(x), math.prod(x.shape[1:])
        posterior = posterior.reshape(*shape, path.num_tokens)[..., data]
        flat, time = jnp.asarray(x).reshape(shape), batch_time(t, posterior)
        (p, log_p), (d_p, d_log_p) = jax.vmap(lambda t: jax.jvp(laws, (t,), (jnp.ones_like(t),)))(time)  # [batch, a, y]
        at_x = flat[:, None]
        possible = jnp.isfinite(jnp.take_along_axis(log_p, at_x, axis=2))  # [batch, a, token]
        slope = jnp.where(possible, jnp.take_along_axis(d_log_p, at_x, axis=2), 0)[..., None]
        # [batch, a, token, y]; p d(log p) is d(p), also where p = 0 has no logarithm.
        p, d_p, d_log_p = p[:, :, None], d_p[:, :, None], d_log_p[:, :, None]
        gain = jnp.where(jnp.isfinite(log_p)[:, :, None], p * (d_log_p - slope), d_p)
        gain = jnp.where(possible[..., None], jnp.maximum(gain, 0), 0)
        found = jnp.einsum("bia,baiy->biy", posterior, gain, precision="highest")
        return _to_others(found.reshape(*x.shape, path.num_tokens), x)

    return _carrying(rates, denoiser, path)


def backward_rates(path: MixturePath) -> RateFn:
    """The rates of the noising process itself, data to source: `kappa' / kappa p_0(y)`, whatever x is.

    Gat et al. 2024 (arXiv:2407.15595, eq. 27), of a token to the others. It runs from t = 1 to 0.

    Args:
        path: any mixture path.

    Returns:
        `u(t, x)`, finite for t > 0.

    Raises:
        ValueError: for what is no `MixturePath`.
    """
    check_mixture(path)

    def rates(t: Time, x: TokenState) -> Logits:
        check_tokens("x", x, path.num_tokens)
        like = jnp.zeros((*x.shape, path.num_tokens), time_dtype(x))
        alpha, _, d_alpha, _ = coefficients(path.schedule, time_of(t, like))
        p0 = path.source_probs(like)
        return _to_others(jnp.where(p0 > 0, d_alpha / alpha * p0, 0) + like, x)

    return Counted(rates, 0, (_START, 1.0), returns="rates")


def with_corrector(rates: RateFn, path: MixturePath, strength: float | Callable[[Any], Any]) -> RateFn:
    """`(1 + c) u + c backward`: `c` more jumps forward and as many back, which keeps every p_t.

    Gat et al. 2024 (arXiv:2407.15595, eq. 26) with alpha = 1 + c and beta = c. What was decided too early can be taken
    back: a mask is put again, or a token drawn anew.

    Notebooks: (14.6).

    Args:
        rates: of the path, as from `forward_rates`.
        path: of the rates.
        strength: c, not negative, or a function of t [...] of such.

    Returns:
        `u(t, x)`, finite for 0 < t < 1 where c is not 0; at t = 0 too if all tokens are a mask.

    Raises:
        ValueError: for what is no rates or no `MixturePath`, or a `strength` that is negative;
            one that is traced gives NaN.
    """
    check_rates("rates", rates)
    back = backward_rates(path)
    if not callable(strength):
        check_number("strength", strength, "[0, inf)")

    def corrected(t: Time, x: TokenState) -> Logits:
        forth = rates(t, x)
        check_logits("rates(t, x)", forth, x, path.num_tokens)
        c = jnp.asarray(strength(time_of(t, forth)) if callable(strength) else strength, forth.dtype)
        if not is_traced(c) and not bool((c >= 0).all()):
            raise ValueError(f"strength must not be negative, got {np.asarray(c).min()} at t = {t}.")
        c = jnp.where(c >= 0, c, jnp.nan)  # of which no token comes, where it is traced
        return (1 + c) * forth + jnp.where(c > 0, c * back(t, x), 0)

    low = 0.0 if callable(strength) else _start(path)
    domain, reach = (overlap(found, (low, 1.0)) for found in (domain_of(rates), reach_of(rates)))
    return Counted(corrected, cost(rates), domain, reach, "rates")


def _to_others(rates: Array, x: TokenState) -> Array:
    """The rates with 0 at the token that is there."""
    return jnp.where(jax.nn.one_hot(x, rates.shape[-1], dtype=bool), 0, rates)


def _posterior(denoiser: DenoiserFn, path: TokenPath, t: Time, x: TokenState) -> Logits:
    """`p(x1 | x_t = x)`, by the network."""
    check_tokens("x", x, path.num_tokens)
    logits = denoiser(t, x)
    check_logits("denoiser(t, x)", logits, x, path.num_tokens)
    return path.posterior(logits, x)


def _start(path: MixturePath) -> float:
    """The first time at which jumps back to the source are of a finite rate: to a mask there are none at t = 0."""
    return _START if path.source.mask is None else 0.0


def _carrying(rates: RateFn, denoiser: DenoiserFn, path: TokenPath, start: float = 0.0) -> RateFn:
    """The rates with what they cost, and the times at which they are finite."""
    low, high = max(path.domain[0], start), min(path.domain[1], 1 - _START)
    return Counted(rates, cost(denoiser), overlap((low, high), domain_of(denoiser)), (low, 1.0), "rates")


def _check(denoiser: DenoiserFn, path: MixturePath) -> None:
    check_denoiser("denoiser", denoiser)
    check_mixture(path)
