"""Time grids: the times [num_steps + 1] between which a sampler steps, strictly monotone, in either direction."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.types import Array, ArrayTree


def uniform(num_steps: int, t0: float = 0.0, t1: float = 1.0) -> Array:
    """Equally spaced times, `t0 + (t1 - t0) i / num_steps`.

    Computed on the host in double precision, so that both ends are exact and no error adds up.

    Args:
        num_steps: number of steps.
        t0: first time.
        t1: last time; `t1 < t0` runs backward.

    Returns:
        [num_steps + 1].

    Raises:
        ValueError: if `num_steps` is less than 1, or the ends are equal or not finite.

    Example:
        >>> uniform(4, 1.0, 0.0)
        Array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    return jnp.asarray(_uniform(num_steps, t0, t1))


def _uniform(num_steps: int, t0: float, t1: float) -> np.ndarray:
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)):
        raise ValueError(f"num_steps must be an integer, got {num_steps!r}.")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    check_ends(t0, t1)
    return np.linspace(t0, t1, num_steps + 1)


def check_ends(t0: float, t1: float) -> None:
    """Raises `ValueError` unless the two times are finite and differ."""
    if not (math.isfinite(t0) and math.isfinite(t1)):
        raise ValueError(f"t0 and t1 must be finite, got {t0} and {t1}.")
    if t0 == t1:
        raise ValueError(f"t0 and t1 must differ, both are {t0}.")


def check_state(x0: Array) -> None:
    """Raises `ValueError` unless the initial state is real floating point with a batch axis."""
    if not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(f"x0 must be floating point, got {x0.dtype}.")
    if x0.ndim == 0:
        raise ValueError("x0 must be [batch, ...], got a scalar.")


def time_dtype(x: Array) -> jnp.dtype:
    """The dtype of times beside a state `x`: its own, but at least float32: bfloat16 has 128 times in [0.5, 1)."""
    return jnp.promote_types(x.dtype, jnp.float32)


def time_grid(
    num_steps: int | None, grid: ArrayTree | None, t0: float, t1: float, x: Array, *, forward: bool = False
) -> Array:
    """The grid that a sampler's arguments ask for.

    Args:
        num_steps: for a uniform grid from `t0` to `t1`; exclusive with `grid`.
        grid: [num_steps + 1]. Checked where its values are known, that is unless it is traced.
        t0: first time of a uniform grid.
        t1: last time of a uniform grid.
        x: the state, whose dtype decides that of the grid.
        forward: whether only increasing grids are allowed.

    Returns:
        [num_steps + 1], in `time_dtype(x)`.

    Raises:
        ValueError: for anything other than one strictly monotone grid.
    """
    times: ArrayTree
    if (num_steps is None) == (grid is None):
        raise ValueError("Exactly one of num_steps and grid must be given.")
    if num_steps is not None:
        times = _uniform(num_steps, t0, t1)
    elif (t0, t1) != (0.0, 1.0):
        raise ValueError(f"t0 and t1 go with num_steps, a grid has its own ends; got grid, t0 = {t0} and t1 = {t1}.")
    else:
        times = grid
        if np.ndim(times) != 1 or np.shape(times)[0] < 2:
            raise ValueError(f"grid must be [num_steps + 1] with at least two times, got shape {np.shape(times)}.")
    if isinstance(times, jax.core.Tracer):
        return times.astype(time_dtype(x))
    # Checked after rounding, which is where times too close together become equal.
    times = np.asarray(times, dtype=time_dtype(x))
    steps = np.diff(times)
    if not (np.isfinite(times).all() and ((steps > 0).all() or (steps < 0).all())):
        raise ValueError(f"grid must be finite and strictly monotone in {times.dtype}, got {times}.")
    if forward and steps[0] < 0:
        raise ValueError(f"Time must run forward, got a grid from {times[0]} to {times[-1]}.")
    return jnp.asarray(times)
