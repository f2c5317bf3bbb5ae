"""DPM-Solver and DPM-Solver++: exponential integrators of higher order in log-SNR, along any affine path."""

import jax
import jax.numpy as jnp

from fm_jax.nfe import nfe_per_call
from fm_jax.samplers.ddim import noise_shares
from fm_jax.samplers.grids import check_state, time_dtype, time_grid
from fm_jax.samplers.levels import Levels, check_key_is_for, check_start, data_and_noise, levels, phi
from fm_jax.samplers.loop import Step, sample_on_grid, step_noise
from fm_jax.types import Array, ArrayTree, Key, Schedule, Solution, VelocityFn, check_member

STAGES = {
    "dpm_solver_2": 2,
    "dpm_solver_3": 3,
    "dpm_solver++_2m": 1,
    "dpm_solver++_3m": 1,
    "dpm_solver++_2m_sde": 1,
}
"""Evaluations a step; the first two methods take one alone in a step of infinite length in lambda."""
METHODS = tuple(STAGES)


def _single_step(v: VelocityFn, schedule: Schedule, times: Array, at: Levels, order: int) -> Step:
    """DPM-Solver-2 (r1 = 1/2) and 3 (r1, r2 = 1/3, 2/3), predicting noise (arXiv:2206.00927, alg. 1 and 2)."""

    def times_inside(r: float) -> Array:
        return schedule.t_from_log_snr(2 * (at.half_log_snr[:-1] + r * at.h)).astype(times.dtype)

    r1, r2 = (1 / 2, 1) if order == 2 else (1 / 3, 2 / 3)
    times1, times2 = times_inside(r1), times_inside(r2)

    def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
        data, noise = data_and_noise(v, schedule, t, x)
        h = at.h[i]

        def change_of_noise(t: Array, less: Array | float) -> Array:
            """From the start to `t`, where the state is that of DDIM, and there with noise `less` this."""
            x_stage = schedule.alpha(t) * data + schedule.sigma(t) * (noise - less)
            return data_and_noise(v, schedule, t, x_stage.astype(x.dtype))[1] - noise

        def second_order() -> Array:
            return jnp.expm1(h) / (2 * r1) * change_of_noise(times1[i], 0.0)

        def third_order() -> Array:
            # The paper's (e^z - 1) / z - 1 is z phi_2(z).
            less = r2 / r1 * (r2 * h * phi(2, r2 * h)) * change_of_noise(times1[i], 0.0)
            return 1 / r2 * (h * phi(2, h)) * change_of_noise(times2[i], less)

        # Only one branch runs: a step of infinite length costs the one evaluation of DDIM.
        less = jax.lax.cond(at.regular[i], second_order if order == 2 else third_order, lambda: jnp.zeros_like(noise))
        return (at.alpha[i + 1] * data + at.sigma[i + 1] * (noise - less)).astype(x.dtype), memory

    return step


def _multistep(v: VelocityFn, schedule: Schedule, at: Levels, order: int, key: Key | None) -> Step:
    """DPM-Solver++ 2M and 3M, in the prediction of data (arXiv:2211.01095, alg. 2), and 2M as an SDE (sec. 5).

    With `first` and `second` the divided differences of the data prediction in lambda, in units of h, a step adds
    `slope first + bend second` to DDIM.
    """
    reached = at.order(order)
    r0, r1 = at.h_before(1) / at.h, at.h_before(2) / at.h
    kept, fresh = noise_shares(at, 0.0 if key is None else 1.0)
    alpha, h = at.alpha[1:], at.h
    midpoint = alpha * -jnp.expm1(-h if key is None else -2 * h) / 2
    slope = jnp.where(reached == 1, 0, jnp.where(reached == 2, midpoint, alpha * h * phi(2, -h)))
    # The second derivative is twice the divided difference; without the 2, as in the authors' code, order 3 is lost.
    bend = jnp.where(reached == 3, slope * r0 + 2 * alpha * h * phi(3, -h), 0)

    def step(
        x: Array, memory: tuple[Array, Array], i: Array, t: Array, t_next: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        data1, data2 = memory
        data, noise = data_and_noise(v, schedule, t, x)
        first, first_before = (data - data1) / r0[i], (data1 - data2) / r1[i]
        second = (first - first_before) / (r0[i] + r1[i])
        if key is not None:
            noise = kept[i] * noise + fresh[i] * step_noise(key, i, x)
        x_next = at.alpha[i + 1] * data + at.sigma[i + 1] * noise + slope[i] * first + bend[i] * second
        return x_next.astype(x.dtype), (data, data1)

    return step


def sample_dpm_solver(
    v: VelocityFn,
    x0: Array,
    *,
    schedule: Schedule,
    method: str = "dpm_solver++_2m",
    key: Key | None = None,
    num_steps: int | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    grid: ArrayTree | None = None,
    trajectory: bool = False,
) -> Solution:
    """A sample by DPM-Solver or DPM-Solver++, in half the log-SNR lambda.

    | method | evaluations a step | order | |
    |---|---|---|---|
    | `dpm_solver_2` | 2 | 2 | single-step, prediction of noise |
    | `dpm_solver_3` | 3 | 3 | single-step, prediction of noise |
    | `dpm_solver++_2m` | 1 | 2 | multistep, prediction of data |
    | `dpm_solver++_3m` | 1 | 3 | multistep, prediction of data |
    | `dpm_solver++_2m_sde` | 1 | weak 2 on a Gaussian | the SDE whose first-order step is ancestral sampling |

    These orders are measured, on grids whose steps in lambda are bounded; `dpm_solver++_3m` begins with steps of order
    1 and 2, and reaches 3 where these are shorter than the rest. It weighs the second difference twice as much as its
    authors' code and diffusers do, whose method has order 2 for that.

    A step of infinite length in lambda, from alpha = 0 or to sigma = 0, is DDIM: it costs one evaluation with every
    method, and multistep methods start anew after it, with order 1. From 0 to 1 on `Linear` or `Cosine` in equal steps
    every method has order 2 at most. Steps of finite length are never lowered in order, also not the last ones.

    Args:
        v: velocity function of an affine path with a standard normal source; called with a scalar t.
        x0: [batch, ...] at `t0`.
        schedule: of that path.
        method: one of the table.
        key: typed key, for the SDE only; step i draws its noise from `fold_in(key, i)`.
        num_steps: for equal steps from `t0` to `t1`; either this or `grid`.
        t0: where `x0` is.
        t1: where to go. `t1 < t0` runs backward, from data to noise; not with the SDE.
        grid: times [num_steps + 1], strictly monotone.
        trajectory: whether to keep the states at all grid times.

    Returns:
        `Solution`: x [batch, ...] at the end; nfe, a scalar; trajectory [num_steps + 1, batch, ...] if asked for. Under
        `jax.vmap` over grids the infinite steps compute all evaluations, and nfe counts those that were needed.

    Raises:
        ValueError: for a bad grid, method or state, or unless a key is given exactly for the SDE.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: (2 - x) / (1 - t)  # all data at 2
        >>> solution = sample_dpm_solver(v, jnp.zeros((1, 1)), schedule=Linear(), method="dpm_solver_2", num_steps=3)
        >>> solution.x, int(solution.nfe)  # the first and the last step are infinite
        (Array([[2.]], dtype=float32), 4)

    References:
        Lu et al. 2022 (arXiv:2206.00927, alg. 1 and 2); Lu et al. 2022 (arXiv:2211.01095, alg. 2 and sec. 5).
    """
    check_member("method", method, METHODS)
    check_key_is_for(method.endswith("sde"), key, f"method {method!r}")
    x0 = jnp.asarray(x0)
    check_state(x0)
    times = time_grid(num_steps, grid, t0, t1, x0, forward=key is not None)
    check_start(schedule, t0, grid)
    at = levels(schedule, times)
    step: Step
    memory: tuple[Array, ...] = ()
    if STAGES[method] > 1:
        step = _single_step(v, schedule, times, at, STAGES[method])
    else:
        step = _multistep(v, schedule, at, 3 if method.endswith("3m") else 2, key)
        memory = (jnp.zeros(x0.shape, dtype=time_dtype(x0)),) * 2
    nfe = jnp.where(at.regular, STAGES[method], 1).sum() * nfe_per_call(v)
    return sample_on_grid(step, x0, times, nfe=nfe, memory=memory, trajectory=trajectory)
