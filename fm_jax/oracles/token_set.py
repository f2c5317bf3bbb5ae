"""Points around tokens: a mixture whose means are the condition, and whose exact velocity is a cross-attention.

Each example is told a set of tokens, and its points are drawn around them. What a perfect network does with such a
condition, a set with a mask, has a closed form: by a softmax over the tokens it finds the one that a point comes from.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Real

from fm_jax.checks import (
    check_array,
    check_has,
    check_integer,
    check_key,
    check_number,
    check_schedule,
    check_state,
    is_traced,
    shown,
)
from fm_jax.schedules import coefficients
from fm_jax.shapes import time_of
from fm_jax.types import AnyArray, Array, Cond, Key, ModelFn, Prediction, Scalar, Schedule, State, Time


class TokenMixture(NamedTuple):
    """For each example the law `mean over its tokens k of N(token_k, std^2 I)`; made by `token_mixture`.

    `tokens` is [batch, m, d], `mask` [batch, m] says which of them there are.
    """

    tokens: Array
    mask: Array
    std: Array


def token_mixture(
    tokens: Real[AnyArray, "batch m d"], std: Scalar | float, mask: Bool[AnyArray, "batch m"] | None = None
) -> TokenMixture:
    """A mixture of equal weights and widths around the tokens of each example.

    Args:
        tokens: the means, a set: their order does not matter.
        std: standard deviation around a token, positive.
        mask: which tokens there are; `None` for all. What the others hold does not matter, NaN neither.

    Returns:
        `TokenMixture`.

    Raises:
        ValueError: for shapes that do not fit, a `std` that is not positive, or an example without a token.

    Example:
        >>> mixture = token_mixture(jnp.array([[[-1.0], [1.0], [9.0]]]), 0.5, jnp.array([[True, True, False]]))
        >>> mixture.tokens[0, :, 0]
        Array([-1.,  1.,  0.], dtype=float32)
    """
    check_array("tokens", tokens)
    check_state(tokens, "tokens")
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [batch, m, d], not empty, got shape {tokens.shape}.")
    check_number("std", std, "(0, inf)")
    if mask is None:
        mask = jnp.ones(tokens.shape[:2], bool)
    check_array("mask", mask)
    if mask.dtype != bool or mask.shape != tokens.shape[:2]:
        raise ValueError(f"mask must be bool [batch, m] = {tokens.shape[:2]}, got {shown(mask)}.")
    if not is_traced(mask) and not np.asarray(mask).any(axis=1).all():
        raise ValueError("mask must leave each example a token, got an example without one: a mixture of nothing.")
    tokens = jnp.where(mask[:, :, None], tokens, 0)
    return TokenMixture(tokens, jnp.asarray(mask), jnp.asarray(std, tokens.dtype))


def _check(mixture: TokenMixture, x: State | None = None) -> None:
    check_has("mixture", mixture, ("tokens", "mask", "std"), "a TokenMixture, as from token_mixture")
    if x is None:
        return
    check_state(x, "x")
    batch_size, _, d = mixture.tokens.shape
    if x.ndim not in (2, 3) or x.shape[0] != batch_size or x.shape[-1] != d:
        raise ValueError(
            f"x must be {[batch_size, d]} or [{batch_size}, points, {d}] of the tokens, got shape {x.shape}."
        )


def sample_points(mixture: TokenMixture, key: Key, num: int) -> Real[AnyArray, "batch num d"]:
    """Draws x1: `num` points around the tokens of each example, independent of each other."""
    _check(mixture)
    check_key(key)
    check_integer("num", num)
    key_token, key_noise = jax.random.split(key)
    batch_size = len(mixture.tokens)
    logits = jnp.where(mixture.mask, 0.0, -jnp.inf)
    k = jax.random.categorical(key_token, logits[:, None, :], shape=(batch_size, num))
    means = jnp.take_along_axis(mixture.tokens, k[:, :, None], axis=1)
    return means + mixture.std * jax.random.normal(key_noise, means.shape, means.dtype)


def attention_of(mixture: TokenMixture, schedule: Schedule, t: Time, x: State) -> Array:
    """How likely each point is to come from each token: the attention of points to tokens, exactly.

    `r_k = softmax_k(-|x - alpha token_k|^2 / (2 S))` with `S = alpha^2 std^2 + sigma^2`. The square of x is the same
    for all k, and what is left is `softmax_k(scale x . token_k + bias_k)` over the tokens that there are: x asks, the
    tokens are the keys, `scale = alpha / S` grows as noise falls, and `bias_k = -alpha^2 |token_k|^2 / (2 S)` is the
    same for keys of one length. `models.attend` computes it with these.

    Notebooks: (13.6).

    Args:
        mixture: the tokens.
        schedule: of the path.
        t: times.
        x: points, [batch, d] or [batch, points, d].

    Returns:
        [batch, m] or [batch, points, m], of sum 1 over m; 0 for masked tokens.
    """
    _check(mixture, x)
    check_schedule(schedule)
    alpha, sigma, _, _ = coefficients(schedule, time_of(t, x))
    variance = alpha**2 * mixture.std**2 + sigma**2
    tokens, mask = (each if x.ndim == 2 else each[:, None] for each in (mixture.tokens, mixture.mask))
    means = (alpha[..., None] if alpha.ndim else alpha) * tokens
    squares = jnp.square(x[..., None, :] - means).sum(axis=-1)
    return jax.nn.softmax(jnp.where(mask, -squares / (2 * variance), -jnp.inf), axis=-1)


def token_prediction(mixture: TokenMixture, schedule: Schedule, t: Time, x: State) -> Prediction:
    """What perfect networks of all four kinds say at (t, x): conditional means, by one attention.

    With `c = sum_k r_k token_k`, r as in `attention_of` and `S = alpha^2 std^2 + sigma^2`, the mean token,
    `E[x1 | x] = c + alpha std^2 / S (x - alpha c)`, `score = -(x - alpha c) / S`, `E[x0 | x] = -sigma score` and
    `velocity = alpha' E[x1 | x] + sigma' E[x0 | x]`. All are linear in x and c: values are the tokens too.

    Notebooks: (13.7).

    Args:
        mixture: the tokens.
        schedule: of the path.
        t: times.
        x: points, [batch, d] or [batch, points, d].

    Returns:
        `Prediction`, each in the shape of `x`.
    """
    r = attention_of(mixture, schedule, t, x)
    mean = jnp.einsum("b...k,bkd->b...d", r, mixture.tokens)
    alpha, sigma, d_alpha, d_sigma = coefficients(schedule, time_of(t, x))
    rest = (x - alpha * mean) / (alpha**2 * mixture.std**2 + sigma**2)
    data, noise = mean + alpha * mixture.std**2 * rest, sigma * rest
    return Prediction(d_alpha * data + d_sigma * noise, data, noise, -rest)


def token_velocity(std: Scalar | float, schedule: Schedule) -> ModelFn:
    """The exact velocity as a network sees it, `v(t, x, cond)`, under whatever tokens it is told.

    Args:
        std: standard deviation around a token, positive.
        schedule: of the path.

    Returns:
        `v(t, x, cond)` with `cond.tokens` [batch, m, d] and `cond.mask` [batch, m] or `None`, as `models.Conditions`.
    """
    check_number("std", std, "(0, inf)")
    check_schedule(schedule)

    def velocity(t: Time, x: State, cond: Cond = None) -> State:
        check_has("cond", cond, ("tokens", "mask"), "conditions with tokens and their mask")
        return token_prediction(token_mixture(cond.tokens, std, cond.mask), schedule, t, x).velocity

    return velocity
