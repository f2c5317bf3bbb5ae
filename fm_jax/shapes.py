"""The one place where time [batch] meets data [batch, ...]."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from fm_jax.checks import check_array, check_number, check_real, is_real, is_traced, shown
from fm_jax.types import AnyArray, ArrayTree, PerExample, State, Time


def expand_time(t: Time | Bool[AnyArray, " batch"], x: Shaped[AnyArray, " batch *event"], name: str = "t") -> AnyArray:
    """Appends axes to `t` so that it multiplies `x`.

    Args:
        t: times, or whatever else is one number for all examples or one for each.
        x: [batch, ...].
        name: of `t`, for the error.

    Returns:
        `t` as a scalar, or as [batch, 1, ..., 1] with the rank of `x`.

    Raises:
        ValueError: if `t` is neither a finite number nor [batch].

    Example:
        >>> expand_time(jnp.zeros(4), jnp.zeros((4, 8, 8, 3))).shape
        (4, 1, 1, 1)
    """
    checked = _scalar_or_batch(t, x, name)
    return checked if checked.ndim == 0 else checked.reshape(checked.shape + (1,) * (len(x.shape) - 1))


def time_of(t: Time, x: State) -> AnyArray:
    """Times in `time_dtype(x)`, a scalar or [batch, 1, ..., 1], so that no other precision comes into what `x` is in.

    Example:
        >>> time_of(0.5, jnp.zeros((3, 2), jnp.bfloat16)).dtype
        dtype('float32')
    """
    _check_real(t)
    return expand_time(t, x).astype(time_dtype(x))


def batch_time(t: Time, x: State) -> PerExample:
    """A time for every example, in `time_dtype(x)`.

    Example:
        >>> batch_time(0.5, jnp.zeros((3, 2)))
        Array([0.5, 0.5, 0.5], dtype=float32)
    """
    _check_real(t)
    return jnp.broadcast_to(_scalar_or_batch(t, x, "t").astype(time_dtype(x)), x.shape[:1])


def check_not_steps(name: str, t: Any) -> None:
    """Refuses integers in place of times, as the steps 0 to 999 of DDPM: all that are traced, and any but 0 and 1.

    Example:
        >>> check_not_steps("t", np.arange(2))
        >>> check_not_steps("t", np.arange(1000))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: t must be real numbers from 0, the source, to 1, the data, got int64 of shape (1000,): divide ...
    """
    if not hasattr(t, "dtype"):
        if is_traced(t) or not isinstance(t, int | list | tuple):
            return
        try:
            t = np.asarray(t)
        except (TypeError, ValueError):  # told elsewhere: a ragged list, or one with traced numbers
            return
    if not jnp.issubdtype(t.dtype, jnp.integer):
        return
    if is_traced(t) or isinstance(t, jax.ShapeDtypeStruct) or not np.isin(np.asarray(t), (0, 1)).all():
        raise ValueError(
            f"{name} must be real numbers from 0, the source, to 1, the data, got {shown(t)}: divide numbers of steps "
            "by how many there are. Step n of DDPM's 1000, counted from the data, is t = 1 - n / 1000."
        )


def _check_real(t: Time) -> None:
    if hasattr(t, "dtype") and not is_real(t.dtype):
        raise ValueError(f"t must be real numbers, got {t.dtype}.")
    check_not_steps("t", t)


def _scalar_or_batch(t: Time | Bool[AnyArray, " batch"], x: Shaped[AnyArray, " batch *event"], name: str) -> AnyArray:
    check_array("x", x)
    if not is_traced(t) and np.shape(t) == ():
        check_number(name, t, "(-inf, inf)")
        return jnp.asarray(t)
    if isinstance(t, list | tuple) or t.shape not in ((), x.shape[:1]):
        raise ValueError(f"{name} must be a scalar or [batch] = {x.shape[:1]}, got {shown(t)}.")
    return jnp.asarray(t)


def time_dtype(x: ArrayTree) -> jnp.dtype:
    """The dtype of times beside a state `x`: its own if it is float32 or better, else float32; of tokens, JAX's own.

    In bfloat16 there are 128 times in [0.5, 1), and in integers none.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.result_type(float)
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(x.dtype, jnp.float32))


def mean_over_event(x: State) -> PerExample:
    """Averages over every axis but the first."""
    check_real("x", x)
    if not x.shape:
        raise ValueError("x must be [batch, ...], got a scalar.")
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).mean(axis=1)
