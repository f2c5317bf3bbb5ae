"""The one place where time [batch] meets data [batch, ...]."""

import jax.numpy as jnp
from jaxtyping import Bool, Shaped

from fm_jax.types import AnyArray, ArrayTree, PerExample, State, Time


def expand_time(t: Time | Bool[AnyArray, " batch"], x: Shaped[AnyArray, " batch *event"]) -> AnyArray:
    """Appends axes to `t` so that it multiplies `x`.

    Args:
        t: times, or whatever else is one number for all examples or one for each.
        x: [batch, ...].

    Returns:
        `t` as a scalar, or as [batch, 1, ..., 1] with the rank of `x`.

    Raises:
        ValueError: if `t` is neither a scalar nor [batch].

    Example:
        >>> expand_time(jnp.zeros(4), jnp.zeros((4, 8, 8, 3))).shape
        (4, 1, 1, 1)
    """
    if jnp.ndim(t) == 0:
        return jnp.asarray(t)
    if t.shape != x.shape[:1]:
        raise ValueError(f"t must be a scalar or [batch] = {x.shape[:1]}, got shape {t.shape}.")
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def batch_time(t: Time, x: State) -> PerExample:
    """A time for every example, in `time_dtype(x)`.

    Example:
        >>> batch_time(0.5, jnp.zeros((3, 2)))
        Array([0.5, 0.5, 0.5], dtype=float32)
    """
    return jnp.broadcast_to(jnp.asarray(t, dtype=time_dtype(x)), x.shape[:1])


def time_dtype(x: ArrayTree) -> jnp.dtype:
    """The dtype of times beside a state `x`: its own if it is float32 or better, else float32.

    In bfloat16 there are 128 times in [0.5, 1), and in integers none.
    """
    return jnp.promote_types(x.dtype, jnp.float32)


def mean_over_event(x: State) -> PerExample:
    """Averages over every axis but the first."""
    return x.reshape(x.shape[0], -1).mean(axis=1)
