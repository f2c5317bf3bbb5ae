"""The guidance scale: a number or one for each example, in force within an interval of times.

Guidance in an interval is due to Kynkaanniemi et al. 2024 (arXiv:2404.07724). The velocity jumps at the ends of the
interval: put them on the time grid.
"""

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_finite, check_pair, is_traced, shown
from fm_jax.shapes import time_dtype
from fm_jax.types import ArrayTree, PerExample, Scalar, State, Time

ALWAYS = (0.0, 1.0)


def check_scale(scale: ArrayTree) -> None:
    """Raises `ValueError` unless `scale` is a number or [batch], and finite where its values are known."""
    if isinstance(scale, list | tuple) or np.ndim(scale) > 1:
        raise ValueError(f"scale must be a number or [batch], got {shown(scale)}.")
    check_finite("scale", scale)


def check_interval(interval: tuple[float, float]) -> None:
    """Raises `ValueError` unless `interval` is (start, end) with 0 <= start < end <= 1."""
    check_pair("interval", interval, "[0, 1]")


def is_number(scale: ArrayTree, value: float) -> bool:
    """Whether `scale` is that Python number, known when the velocity function is built."""
    return isinstance(scale, (int, float)) and scale == value


def scale_at(
    scale: ArrayTree, t: Time, x: State, *, interval: tuple[float, float], outside: ArrayTree
) -> Scalar | PerExample:
    """The scale at time `t`.

    Args:
        scale: a number, or [batch].
        t: times.
        x: the state.
        interval: the times at which `scale` holds, ends included.
        outside: what holds at other times, in the shape of `scale` or a number.

    Returns:
        A scalar or [batch], in the dtype of times beside `x`.

    Raises:
        ValueError: if `scale` is of another batch than `x`.
    """
    scale = jnp.asarray(scale, dtype=time_dtype(x))
    if scale.ndim and scale.shape != x.shape[:1]:
        raise ValueError(f"scale must be a number or [batch] = {x.shape[:1]}, got shape {scale.shape}.")
    if not any(map(is_traced, interval)) and interval == ALWAYS:
        return scale
    return jnp.where((interval[0] <= t) & (t <= interval[1]), scale, outside)
