"""Time grids: the times [num_steps + 1] between which a sampler steps, strictly monotone, in either direction.

A sampler takes any such array as its `grid`. Here are the usual ones; all are computed on the host.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.schedules import log_snr
from fm_jax.types import Array, ArrayTree, Schedule, TimeSampler

_DRAWS = 2**17


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


def cosine(num_steps: int, t0: float = 0.0, t1: float = 1.0) -> Array:
    """Times `t0 + (t1 - t0) sin^2(pi i / (2 num_steps))`, dense at both ends.

    Args:
        num_steps: number of steps.
        t0: first time.
        t1: last time; `t1 < t0` runs backward.

    Returns:
        [num_steps + 1].

    Raises:
        ValueError: as `uniform`.

    Example:
        >>> cosine(4)
        Array([0.        , 0.14644662, 0.5       , 0.8535534 , 1.        ], dtype=float32)
    """
    u = _uniform(num_steps, 0, 1)
    check_ends(t0, t1)
    return jnp.asarray(t0 + (t1 - t0) * np.sin(np.pi / 2 * u) ** 2)


def edm(
    num_steps: int,
    schedule: Schedule,
    t0: float = 0.0,
    t1: float = 1.0,
    *,
    rho: float = 7.0,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Array:
    """The noise levels of EDM on any schedule: equal steps in `(sigma / alpha)^(1 / rho)` (arXiv:2206.00364, eq. 5).

    The grid starts at `t0` and ends at `t1` exactly, so that what starts as pure noise is pure noise. Where these lie
    outside [sigma_min, sigma_max], the first step covers everything above the second level, the last one what is left
    below `sigma_min`, as EDM's own last step to 0.

    Args:
        num_steps: number of steps.
        schedule: whose noise-to-signal ratio sigma / alpha is meant.
        t0: first time.
        t1: last time; `t1 < t0` gives the reversed grid.
        rho: 1 spaces the levels equally, `math.inf` their logarithms, which is the grid uniform in log-SNR.
        sigma_min: smallest noise-to-signal ratio before 0.
        sigma_max: largest noise-to-signal ratio.

    Returns:
        [num_steps + 1].

    Raises:
        ValueError: as `uniform`; unless 0 < sigma_min < sigma_max and rho > 0; if the levels do not lie between the
            times.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> [round(float(t), 3) for t in edm(4, Linear())]
        [0.0, 0.093, 0.68, 0.998, 1.0]

    References:
        Karras et al. 2022 (arXiv:2206.00364).
    """
    _uniform(num_steps, t0, t1)
    if not (0 < sigma_min < sigma_max < math.inf):
        raise ValueError(f"0 < sigma_min < sigma_max must hold, got {sigma_min} and {sigma_max}.")
    if not rho > 0:
        raise ValueError(f"rho must be positive, got {rho}.")
    first, last = min(t0, t1), max(t0, t1)
    with jax.ensure_compile_time_eval():
        highest, lowest = (float(-log_snr(schedule, jnp.asarray(t)) / 2) for t in (first, last))
    # Equal steps in level^(1 / rho), of the logarithms of levels.
    high, low = min(highest, math.log(sigma_max)), max(lowest, math.log(sigma_min))
    u = np.linspace(0, 1, num_steps + (lowest == low))
    if math.isinf(rho):
        levels = high + u * (low - high)
    else:
        levels = rho * np.log(np.exp(high / rho) + u * (np.exp(low / rho) - np.exp(high / rho)))
    with jax.ensure_compile_time_eval():
        times = np.asarray(schedule.t_from_log_snr(jnp.asarray(-2 * levels)), dtype=float)
    return _with_ends(times[1:num_steps], t0, t1)


def quantiles(num_steps: int, time_sampler: TimeSampler, t0: float = 0.0, t1: float = 1.0) -> Array:
    """The quantiles i / num_steps of a distribution of training times: steps are short where training looked most.

    They are taken from 131,072 draws with a fixed key, so that any time sampler will do; an error of about 0.003
    standard deviations is left. Draws outside (t0, t1) do not count.

    Args:
        num_steps: number of steps.
        time_sampler: see `fm_jax.times`.
        t0: first time.
        t1: last time; `t1 < t0` gives the reversed grid.

    Returns:
        [num_steps + 1], from `t0` to `t1`.

    Raises:
        ValueError: as `uniform`; if hardly any draw lies between `t0` and `t1`.

    Example:
        >>> from fm_jax.times import LogitNormal
        >>> [round(float(t), 2) for t in quantiles(4, LogitNormal())]
        [0.0, 0.34, 0.5, 0.66, 1.0]
    """
    u = _uniform(num_steps, 0, 1)
    check_ends(t0, t1)
    with jax.ensure_compile_time_eval():
        draws = np.asarray(time_sampler(jax.random.key(0), _DRAWS), dtype=float)
    draws = draws[(draws > min(t0, t1)) & (draws < max(t0, t1))]
    if len(draws) < _DRAWS / 100:
        raise ValueError(f"{time_sampler} has hardly any mass between t0 = {t0} and t1 = {t1}.")
    return _with_ends(np.quantile(draws, u[1:-1]), t0, t1)


def _with_ends(interior: np.ndarray, t0: float, t1: float) -> Array:
    """The grid from `t0` through increasing interior times, or through their reverse, to `t1`."""
    times = np.array([min(t0, t1), *interior, max(t0, t1)])
    if not (np.diff(times) > 0).all():
        raise ValueError(f"The inner times must increase strictly between t0 = {t0} and t1 = {t1}, got {interior}.")
    return jnp.asarray(times if t0 < t1 else times[::-1])


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


def first_time(t0: float, grid: ArrayTree | None) -> float | None:
    """The first time that a sampler's arguments ask for; `None` where it is not known, in a grid that is traced."""
    if isinstance(grid, jax.core.Tracer):
        return None
    return t0 if grid is None else float(np.ravel(np.asarray(grid))[0])


def check_state(x: Array, name: str = "x0") -> None:
    """Raises `ValueError`, with the name of the argument, unless a state is real floating point with a batch axis."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {x.dtype}.")
    if x.ndim == 0:
        raise ValueError(f"{name} must be [batch, ...], got a scalar.")


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
