"""Time grids: the times [num_steps + 1] between which a sampler steps, strictly monotone, in either direction.

`sample` takes any such array as its `times`. Here are the usual ones; all are computed on the host.
"""

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fm_jax.checks import (
    check_ends,
    check_has,
    check_increasing,
    check_integer,
    check_number,
    check_schedule,
    is_real,
    is_traced,
    shown,
)
from fm_jax.schedules import log_snr
from fm_jax.shapes import time_dtype
from fm_jax.types import Array, ArrayTree, Schedule, TimeSampler

_DRAWS = 2**17
Grid: TypeAlias = Float[Array, " {num_steps}+1"]


def uniform(num_steps: int, t0: float = 0.0, t1: float = 1.0) -> Grid:
    """Equally spaced times, `t0 + (t1 - t0) i / num_steps`.

    Computed on the host in double precision, so that both ends are exact and no error adds up.

    Args:
        num_steps: number of steps.
        t0: first time.
        t1: last time; `t1 < t0` runs backward.

    Raises:
        ValueError: if `num_steps` is less than 1, or the ends are equal or not finite.

    Example:
        >>> uniform(4, 1.0, 0.0)
        Array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """
    return jnp.asarray(_uniform(num_steps, t0, t1))


def cosine(num_steps: int, t0: float = 0.0, t1: float = 1.0) -> Grid:
    """Times `t0 + (t1 - t0) sin^2(pi i / (2 num_steps))`, dense at both ends.

    Args:
        num_steps: number of steps.
        t0: first time.
        t1: last time; `t1 < t0` runs backward.

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
) -> Grid:
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
    check_schedule(schedule)
    _uniform(num_steps, t0, t1)
    check_increasing("(0, inf)", sigma_min=sigma_min, sigma_max=sigma_max)
    check_number("rho", rho, "[0.1, inf]")
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


def quantiles(num_steps: int, time_sampler: TimeSampler, t0: float = 0.0, t1: float = 1.0) -> Grid:
    """The quantiles i / num_steps of a distribution of training times: steps are short where training looked most.

    They are taken from 131,072 draws with a fixed key, so that any time sampler will do; an error of about 0.003
    standard deviations is left. Draws outside (t0, t1) do not count.

    Args:
        num_steps: number of steps.
        time_sampler: see `fm_jax.times`.
        t0: first time.
        t1: last time; `t1 < t0` gives the reversed grid.

    Returns:
        From `t0` to `t1`.

    Raises:
        ValueError: as `uniform`; if hardly any draw lies between `t0` and `t1`.

    Example:
        >>> from fm_jax.times import LogitNormal
        >>> [round(float(t), 2) for t in quantiles(4, LogitNormal())]
        [0.0, 0.34, 0.5, 0.66, 1.0]
    """
    u = _uniform(num_steps, 0, 1)
    check_ends(t0, t1)
    check_has("time_sampler", time_sampler, ("domain", "__call__"), "a time sampler, such as LogitNormal()")
    with jax.ensure_compile_time_eval():
        draws = np.asarray(time_sampler(jax.random.key(0), _DRAWS), dtype=float)
    draws = draws[(draws > min(t0, t1)) & (draws < max(t0, t1))]
    if len(draws) < _DRAWS / 100:
        raise ValueError(f"{time_sampler} has hardly any mass between t0 = {t0} and t1 = {t1}.")
    return _with_ends(np.quantile(draws, u[1:-1]), t0, t1)


def shifted(num_steps: int, shift: float, t0: float = 0.0, t1: float = 1.0) -> Grid:
    """Equally spaced times, shifted towards the noise: sigma -> s sigma / (1 + (s - 1) sigma), with sigma = 1 - t.

    A larger picture needs more noise to hide it as well: `s` is the square root of how many times as many pixels it
    has. FLUX takes `s = flux_shift(num_tokens)`, for any number of steps.

    Notebooks: (12.6), (12.7).

    Args:
        num_steps: number of steps.
        shift: s; 1 shifts nothing.
        t0: first time before the shift.
        t1: last time before the shift; `t1 < t0` runs backward.

    Raises:
        ValueError: as `uniform`; if `shift` is not positive, or the ends lie outside [0, 1].

    Example:
        >>> shifted(4, 3.0)
        Array([0.  , 0.1 , 0.25, 0.5 , 1.  ], dtype=float32)

    References:
        Esser et al. 2024 (arXiv:2403.03206, eq. 23), in our direction of time.
    """
    check_number("shift", shift, "(0, inf)")
    for name, value in (("t0", t0), ("t1", t1)):
        check_number(name, value, "[0, 1]")
    return jnp.asarray(_shift(_uniform(num_steps, t0, t1), shift))


def stable_diffusion_3(num_steps: int, shift: float = 3.0) -> Grid:
    """The times that Stable Diffusion 3 and 3.5 were published with, by their authors and in diffusers.

    The last step before the data starts from a noise of 0.001 that is shifted twice: its first shift is in the ends of
    the even grid already. 28 steps with shift 3 so begin their last at sigma = 0.0089, not 0.0030.

    Notebooks: (12.7).

    Args:
        num_steps: number of steps.
        shift: of `shifted`; 3 for pictures of 1024 pixels.

    Raises:
        ValueError: if `num_steps` is less than 1 or `shift` not positive.

    Example:
        >>> [round(1 - float(t), 6) for t in stable_diffusion_3(28)[-3:]]
        [0.110906, 0.008929, 0.0]
    """
    check_integer("num_steps", num_steps)
    check_number("shift", shift, "(0, inf)")
    last = _shift(1 - 0.001, shift)
    return jnp.asarray(np.append(_shift(np.linspace(0, last, num_steps), shift), 1.0))


def flux_shift(num_tokens: int) -> float:
    """The shift of FLUX.1 for a picture of so many tokens, 16x16 pixels each: exponential in their number.

    `log s` is 0.5 at 256 tokens (256x256 pixels) and 1.15 at 4096 (1024x1024), and linear in the number of tokens.

    Raises:
        ValueError: if `num_tokens` is less than 1.

    Example:
        >>> [round(flux_shift(tokens), 2) for tokens in (256, 1024, 4096)]
        [1.65, 1.88, 3.16]
    """
    check_integer("num_tokens", num_tokens)
    return math.exp(0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256))


def linear_quadratic(num_steps: int, *, linear_steps: int | None = None, resolution: int = 1000) -> Grid:
    """The steps of Movie Gen: the first ones are those of a fine even grid, the others grow evenly.

    `t_i = i / resolution` for the first `linear_steps`; from there the parabola that goes on with the same slope and
    ends in 1.

    Args:
        num_steps: number of steps.
        linear_steps: how many are of the fine grid; half of them by default.
        resolution: number of steps of the fine grid, more than `num_steps`.

    Raises:
        ValueError: unless 0 <= linear_steps < num_steps < resolution.

    Example:
        >>> [round(float(t), 4) for t in linear_quadratic(50)[24:29]]
        [0.024, 0.025, 0.0275, 0.0331, 0.0417]

    References:
        Polyak et al. 2024, "Movie Gen: A Cast of Media Foundation Models" (arXiv:2410.13720), section 3.
    """
    check_integer("num_steps", num_steps)
    linear_steps = num_steps // 2 if linear_steps is None else linear_steps
    check_integer("linear_steps", linear_steps, least=0)
    check_integer("resolution", resolution)
    if not linear_steps < num_steps < resolution:
        raise ValueError(
            f"linear_steps < num_steps < resolution must hold, got {linear_steps}, {num_steps} and {resolution}."
        )
    i = np.arange(num_steps + 1)
    u = np.clip((i - linear_steps) / (num_steps - linear_steps), 0, None)
    return jnp.asarray(i / resolution + (1 - num_steps / resolution) * u**2)


def _shift(t: np.ndarray | float, shift: float) -> Any:
    """The shift sigma -> s sigma / (1 + (s - 1) sigma) for t = 1 - sigma; exact at both ends."""
    return t / (t + shift * (1 - t))


def _with_ends(interior: np.ndarray, t0: float, t1: float) -> Array:
    """The grid from `t0` through increasing interior times, or through their reverse, to `t1`."""
    times = np.array([min(t0, t1), *interior, max(t0, t1)])
    if not (np.diff(times) > 0).all():
        raise ValueError(f"The inner times must increase strictly between t0 = {t0} and t1 = {t1}, got {interior}.")
    return jnp.asarray(times if t0 < t1 else times[::-1])


def _uniform(num_steps: Any, t0: float, t1: float) -> np.ndarray:
    check_integer("num_steps", num_steps)
    check_ends(t0, t1)
    return np.linspace(t0, t1, num_steps + 1)


def first_time(times: ArrayTree) -> float | None:
    """The first of the times; `None` where it is not known, in a grid that is traced."""
    return None if is_traced(times) else float(np.asarray(times)[0])


def check_forward(times: ArrayTree, sampler: Any) -> None:
    """Raises `ValueError` if the times, where they are known, run backward."""
    if not is_traced(times) and times[0] > times[-1]:
        raise ValueError(f"Time must run forward for {sampler}, got times from {times[0]} to {times[-1]}.")


def time_grid(times: int | ArrayTree, domain: tuple[float, float], x: ArrayTree) -> ArrayTree:
    """The times that a caller of `sample` means.

    Args:
        times: a number of even steps over `domain`; or the times [num + 1], checked unless they are traced.
        domain: first and last time of even steps.
        x: the state, whose dtype decides that of the times.

    Returns:
        [num + 1], in `time_dtype(x)`; a NumPy array unless it is traced.

    Raises:
        ValueError: for anything other than a number of at least 1 or one strictly monotone array.
    """
    if isinstance(times, int | float | np.number):
        check_integer("times", times)
        times = _uniform(times, *domain)
    given = times
    if isinstance(times, list | tuple) and any(map(is_traced, times)):
        times = jnp.asarray(times)
    if not is_traced(times):
        try:
            times = np.asarray(times)
        except ValueError:  # a ragged list
            times = np.zeros(())
    if times.ndim != 1 or len(times) < 2 or not is_real(times.dtype):
        raise ValueError(f"times must be a number of steps or [num + 1] numbers, at least two, got {shown(given)}.")
    if is_traced(times):
        return times.astype(time_dtype(x))
    # Checked after rounding, which is where times too close together become equal.
    times = np.asarray(times, dtype=time_dtype(x))
    steps = np.diff(times)
    if not (np.isfinite(times).all() and ((steps > 0).all() or (steps < 0).all())):
        raise ValueError(f"times must be finite and strictly monotone in {times.dtype}, got {times}.")
    return times
