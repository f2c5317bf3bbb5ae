"""Rates: how often tokens jump, for chains what a velocity is for flows.

A denoiser says how likely each token of the data is, given the tokens at t. With a path it gives several rates of jumps
with the same marginals p_t, as a flow has SDEs with its own: `forward_rates` jumps as rarely as it can,
`reversal_rates` undoes the noising process, `with_corrector` jumps back and forth more often.

All are `u(t, x) -> [batch, ..., K]`, the rates of each token of x to every other, with 0 at the one that is there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_function, check_has, check_logits, check_number, check_tokens
from fm_jax.paths.mixture import MixturePath
from fm_jax.schedules import coefficients
from fm_jax.shapes import time_dtype, time_of
from fm_jax.types import Array, DenoiserFn, Logits, RateFn, Time, TokenPath, Tokens


def forward_rates(denoiser: DenoiserFn, path: MixturePath) -> RateFn:
    """`u(y, x) = kappa' / (1 - kappa) p(x1 = y | x_t = x)`: the average over the data of a jump to it, and no other.

    Gat et al. 2024 (arXiv:2407.15595, eq. 24). Of all rates of the conditional path these jump least often.

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`.
        path: that the denoiser was trained on.

    Returns:
        `u(t, x)`, finite for t < 1.
    """
    _check(denoiser, path)

    def rates(t: Time, x: Tokens) -> Logits:
        posterior = _posterior(denoiser, path, t, x)
        _, sigma, d_alpha, _ = coefficients(path.schedule, time_of(t, posterior))
        return _to_others(d_alpha / sigma * posterior, x)

    return rates


def reversal_rates(denoiser: DenoiserFn, path: MixturePath) -> RateFn:
    """The rates of the process that noises the data, reversed in time: D3PM's and SEDD's, uniform diffusion's.

    `u(y, x) = kappa' / kappa p_0(x) sum_a p(x1 = a | x) [kappa d_a(y) + (1 - kappa) p_0(y)] / [kappa d_a(x) +
    (1 - kappa) p_0(x)]`, in which the bracket is `p_t(y | a) / p_t(x | a)`. For a mask it is `forward_rates`.

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`.
        path: that the denoiser was trained on.

    Returns:
        `u(t, x)`, finite for t < 1, and for t > 0 unless the source is a mask.
    """
    _check(denoiser, path)

    return lambda t, x: reversal(path, _posterior(denoiser, path, t, x), t, x)


def reversal(path: MixturePath, posterior: Logits, t: Time, x: Tokens) -> Logits:
    """The rates of `reversal_rates` under given probabilities of x1, [batch, ..., K]; of one x1, its one-hot."""
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


def backward_rates(path: MixturePath) -> RateFn:
    """The rates of the noising process itself, data to source: `kappa' / kappa p_0(y)`, whatever x is.

    Gat et al. 2024 (arXiv:2407.15595, eq. 27), of a token to the others. It runs from t = 1 to 0.

    Args:
        path: any mixture path.

    Returns:
        `u(t, x)`, finite for t > 0.
    """
    check_has("path", path, ("schedule", "source", "posterior"), "a MixturePath")

    def rates(t: Time, x: Tokens) -> Logits:
        check_tokens("x", x, path.num_tokens)
        like = jnp.zeros((*x.shape, path.num_tokens), time_dtype(x))
        alpha, _, d_alpha, _ = coefficients(path.schedule, time_of(t, like))
        return _to_others(d_alpha / alpha * path.source_probs(like) + like, x)

    return rates


def with_corrector(rates: RateFn, path: MixturePath, strength: float | Callable[[Any], Any]) -> RateFn:
    """`(1 + c) u + c backward`: `c` more jumps forward and as many back, which keeps every p_t.

    Gat et al. 2024 (arXiv:2407.15595, eq. 26) with alpha = 1 + c and beta = c. What was decided too early can be taken
    back: a mask is put again, or a token drawn anew.

    Args:
        rates: of the path, as from `forward_rates`.
        path: of the rates.
        strength: c, not negative, or a function of t [...] of such.

    Returns:
        `u(t, x)`, finite for 0 < t < 1 where c is not 0.
    """
    check_function("rates", rates, "rates u(t, x), such as forward_rates(denoiser, path)", 2)
    back = backward_rates(path)
    if not callable(strength):
        check_number("strength", strength, "[0, inf)")

    def corrected(t: Time, x: Tokens) -> Logits:
        forth = rates(t, x)
        check_logits("rates(t, x)", forth, x, path.num_tokens)
        c = strength(time_of(t, forth)) if callable(strength) else strength
        return (1 + c) * forth + jnp.where(c > 0, c * back(t, x), 0)

    return corrected


def _to_others(rates: Array, x: Tokens) -> Array:
    """The rates with 0 at the token that is there."""
    return jnp.where(jax.nn.one_hot(x, rates.shape[-1], dtype=bool), 0, rates)


def _posterior(denoiser: DenoiserFn, path: TokenPath, t: Time, x: Tokens) -> Logits:
    """`p(x1 | x_t = x)`, by the network."""
    check_tokens("x", x, path.num_tokens)
    logits = denoiser(t, x)
    check_logits("denoiser(t, x)", logits, x, path.num_tokens)
    return path.posterior(logits, x)


def _check(denoiser: DenoiserFn, path: MixturePath) -> None:
    check_function("denoiser", denoiser, "a denoiser f(t, x) -> logits [batch, ..., K]", 2)
    check_has("path", path, ("schedule", "source", "posterior"), "a MixturePath")
