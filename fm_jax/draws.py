"""Random tokens whose rare ones are as rare as they should be.

`jax.random.uniform` in float32 has 2^23 values: an event of probability 1e-7 happens with 1.2e-7, and the Gumbel
numbers of `jax.random.categorical`, cut at 15.94, draw such a token 0.3 times as often. Zheng et al. 2024
(arXiv:2409.02908, sec. 5) saw what that does to texts. Here 32 random bits stand behind each number.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Integer, Real

from fm_jax.types import AnyArray, Array, Key


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

    The first of k exponential clocks, which run at rates `probs`, to ring.

    Args:
        key: typed key.
        probs: not negative, not all 0.

    Returns:
        int32, from 0 to k - 1.
    """
    # From a small number u, which has all its digits: of 1 - u there would be 24 bits.
    waits = -jnp.log1p(-uniform(key, probs.shape, probs.dtype))
    longest = jnp.finfo(waits.dtype).max  # of those that ring at all, also where u is rounded to 1
    waits = jnp.where(probs > 0, jnp.minimum(waits / jnp.where(probs > 0, probs, 1), longest), jnp.inf)
    return jnp.argmin(waits, axis=-1).astype(jnp.int32)


def uniform(key: Key, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Uniform numbers in (0, 1] in float32 or better, odd multiples of 2^-33 before they are rounded."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    return (jax.random.bits(key, shape, jnp.uint32).astype(dtype) + 0.5) * 2.0**-32
