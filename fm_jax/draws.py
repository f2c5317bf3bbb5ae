"""Random tokens whose rare ones are as rare as they should be.

`jax.random.uniform` in float32 has 2^23 values: an event of probability 1e-7 happens with 1.2e-7, and the Gumbel
numbers of `jax.random.categorical`, cut at 15.94, draw such a token 0.3 times as often. Zheng et al. 2024
(arXiv:2409.02908, sec. 5) saw what that does to texts. Here 32 random bits stand behind each number.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Integer, Real

from fm_jax.types import AnyArray, Array, Key

NONE = -1
"""What is drawn where nothing can be, of NaN above all: no token, so that whatever checks tokens refuses it. The
samplers never change one. As an unsigned integer it is the largest."""
_ONE_RACE = 16


def bernoulli(key: Key, p: Real[AnyArray, " *shape"]) -> Bool[AnyArray, " *shape"]:
    """True with probability `p`, of any shape, in steps of 2^-32: never at 0, always at 1.

    Example:
        >>> bernoulli(jax.random.key(0), jnp.array([0.0, 1.0]))
        Array([False,  True], dtype=bool)
    """
    p = jnp.asarray(p).astype(jnp.promote_types(p.dtype, jnp.float32))
    # Compared as integers: in float32 the upper half of all numbers would be multiples of 2^-24, and some of them 1.
    below = jnp.minimum(jnp.round(jnp.where(p < 1, p, 0) * 2.0**32), 2.0**32 - 1).astype(jnp.uint32)
    return (jax.random.bits(key, p.shape, jnp.uint32) < below) | (p >= 1)


def categorical(key: Key, probs: Real[AnyArray, " *shape k"]) -> Integer[AnyArray, " *shape"]:
    """Which of k, by probabilities or by numbers in their proportion; one of probability 0 never.

    The first of k exponential clocks, which run at rates `probs`, to ring. Of more than 16 the first of about sqrt(k)
    blocks, whose clock runs at the sum of their rates, and then the first within it: the law is the same, at
    2 sqrt(k) clocks, of which each costs random bits and a logarithm.

    Args:
        key: typed key.
        probs: finite, not negative, not all 0; their sum may be anything.

    Returns:
        int32, from 0 to k - 1; `NONE`, -1, where nothing can be drawn, as the probabilities are all 0, or one of them
        is NaN, infinite or negative.

    Example:
        >>> categorical(jax.random.key(0), jnp.array([[0.0, 7.0], [jnp.nan, 1.0]]))
        Array([ 1, -1], dtype=int32)
    """
    probs = jnp.asarray(probs).astype(jnp.promote_types(probs.dtype, jnp.float32))
    k, lowest, highest = probs.shape[-1], probs.min(axis=-1), probs.max(axis=-1)
    # In parts of the highest, so that no sum or wait is too large or too small, as 1 / highest itself may be.
    near = jnp.where(highest > 1, 2.0**-32, 2.0**32)
    rates = probs * near[..., None] / (highest * near)[..., None]
    if k <= _ONE_RACE:
        first = _race(key, rates)
    else:
        size = math.isqrt(k - 1) + 1
        padded = jnp.pad(rates, [(0, 0)] * (rates.ndim - 1) + [(0, -k % size)])
        blocks = padded.reshape(*rates.shape[:-1], -1, size)
        key_block, key_within = jax.random.split(key)
        block = _race(key_block, blocks.sum(axis=-1))
        within = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
        first = block * size + _race(key_within, within)
    return jnp.where((lowest >= 0) & (highest > 0) & (highest < jnp.inf), first, NONE)


def none_of(dtype: Any) -> Array:
    """`NONE` as an integer of that dtype.

    Example:
        >>> int(none_of(jnp.int32)), int(none_of(jnp.uint8))
        (-1, 255)
    """
    return jnp.asarray(NONE).astype(dtype)


def _race(key: Key, rates: Array) -> Array:
    """The first of the clocks on the last axis to ring; one of rate 0 never does."""
    # From a small number u, which has all its digits: of 1 - u there would be 24 bits.
    waits = -jnp.log1p(-uniform(key, rates.shape, rates.dtype))
    longest = jnp.finfo(waits.dtype).max  # of those that ring at all, also where u is rounded to 1
    waits = jnp.where(rates > 0, jnp.minimum(waits / jnp.where(rates > 0, rates, 1), longest), jnp.inf)
    return jnp.argmin(waits, axis=-1).astype(jnp.int32)


def uniform(key: Key, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Uniform numbers in (0, 1] in float32 or better, odd multiples of 2^-33 before they are rounded."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    return (jax.random.bits(key, shape, jnp.uint32).astype(dtype) + 0.5) * 2.0**-32
