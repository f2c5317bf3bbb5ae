"""DPM-Solver and DPM-Solver++: exponential integrators of higher order in log-SNR, along any affine path."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_integer, check_schedule
from fm_jax.nfe import spent
from fm_jax.samplers.ddim import noise_shares
from fm_jax.samplers.grids import check_forward
from fm_jax.samplers.levels import Levels, check_start, data_and_noise, levels, phi, range_of
from fm_jax.samplers.loop import Step, run_steps, step_noise
from fm_jax.samplers.runge_kutta import evaluate
from fm_jax.shapes import time_dtype
from fm_jax.types import Array, ArrayTree, Key, Schedule, Solution, State, Time, VelocityFn


def _single_step(v: VelocityFn, schedule: Schedule, times: Array, at: Levels, order: int) -> Step:
    """DPM-Solver-2 (r1 = 1/2) and 3 (r1, r2 = 1/3, 2/3), predicting noise (arXiv:2206.00927, alg. 1 and 2)."""

    def times_inside(r: float) -> Array:
        return schedule.t_from_log_snr(2 * (at.half_log_snr[:-1] + r * at.h)).astype(times.dtype)

    r1, r2 = (1 / 2, 1) if order == 2 else (1 / 3, 2 / 3)
    times1, times2 = times_inside(r1), times_inside(r2)

    def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
        data, noise = data_and_noise(evaluate(v, t, x), schedule, t, x)
        h = at.h[i]

        def change_of_noise(t: Time, less: Array | float) -> Array:
            """From the start to `t`, where the state is that of DDIM, and there with noise `less` this."""
            x_stage = (schedule.alpha(t) * data + schedule.sigma(t) * (noise - less)).astype(x.dtype)
            return data_and_noise(evaluate(v, t, x_stage), schedule, t, x_stage)[1] - noise

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
    ends = at.alpha[:-1], at.sigma[:-1], at.alpha[1:], at.sigma[1:]
    kept, fresh = noise_shares(*ends, eta=0.0 if key is None else 1.0)
    alpha, h = at.alpha[1:], at.h
    midpoint = alpha * -jnp.expm1(-h if key is None else -2 * h) / 2
    slope = jnp.where(reached == 1, 0, jnp.where(reached == 2, midpoint, alpha * h * phi(2, -h)))
    # The second derivative is twice the divided difference; without the 2, as in the authors' code, order 3 is lost.
    bend = jnp.where(reached == 3, slope * r0 + 2 * alpha * h * phi(3, -h), 0)

    def step(
        x: State, memory: tuple[Array, Array], i: Array, t: Time, t_next: Time
    ) -> tuple[Array, tuple[Array, Array]]:
        data1, data2 = memory
        data, noise = data_and_noise(evaluate(v, t, x), schedule, t, x)
        first, first_before = (data - data1) / r0[i], (data1 - data2) / r1[i]
        second = (first - first_before) / (r0[i] + r1[i])
        if key is not None:
            noise = kept[i] * noise + fresh[i] * step_noise(key, i, x)
        x_next = at.alpha[i + 1] * data + at.sigma[i + 1] * noise + slope[i] * first + bend[i] * second
        return x_next.astype(x.dtype), (data, data1)

    return step


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver-2 and -3: single-step methods in half the log-SNR lambda, in the prediction of noise.

    The order is measured on grids whose steps in lambda are bounded. A step of infinite length, from alpha = 0 or to
    sigma = 0, is DDIM and costs one evaluation: from 0 to 1 on `Linear` or `Cosine` in equal steps the order is 2 at
    most. Steps of finite length are never lowered in order, also not the last ones. Under `jax.vmap` over times the
    infinite steps compute all evaluations; what is counted are those that were needed.

    Notebooks: (10.3).

    Attributes:
        schedule: of the affine path with a standard normal source that the velocity belongs to.
        order: 2 or 3, which is also the number of evaluations a step.

    Raises:
        ValueError: for another order; from `sample`, for a start where the velocity does not tell data from noise.

    Example:
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: (2 - x) / (1 - t)  # all data at 2
        >>> solution = sample(v, jnp.zeros((1, 1)), DPMSolver(Linear()), times=3)
        >>> solution.x, int(solution.calls)  # the first and the last step are infinite
        (Array([[2.]], dtype=float32), 4)

    References:
        Lu et al. 2022 (arXiv:2206.00927, alg. 1 and 2).
    """

    schedule: Schedule
    order: int = 2
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_integer("order", self.order, least=2, most=3)

    @property
    def nfe_per_step(self) -> int:
        return self.order

    @property
    def domain(self) -> tuple[float, float]:
        return range_of(self.schedule)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return True

    def solve(self, v: VelocityFn, key: None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        check_start(self.schedule, times)
        times = jnp.asarray(times)
        at = levels(self.schedule, times)
        step = _single_step(v, self.schedule, times, at, self.order)
        calls = jnp.where(at.regular, self.order, 1).sum()
        return run_steps(step, x0, times, spent(calls, v), trajectory=trajectory)


@dataclass(frozen=True)
class DPMSolverPlusPlus:
    """DPM-Solver++ 2M and 3M: multistep methods in half the log-SNR lambda, in the prediction of data.

    One evaluation a step. The orders are measured, on grids whose steps in lambda are bounded; 3M begins with steps of
    order 1 and 2, and reaches 3 where these are shorter than the rest. It weighs the second difference twice as much as
    its authors' code and diffusers do, whose method has order 2 for that. A step of infinite length in lambda is DDIM,
    and the method starts anew after it. As an SDE, the first-order step is ancestral sampling, and 2M has weak order 2
    on a Gaussian.

    Attributes:
        schedule: of the affine path with a standard normal source that the velocity belongs to.
        order: 2 or 3.
        sde: draws fresh noise in every step, as ancestral sampling does; for order 2. Time must run forward, and step i
            draws its noise from `fold_in(key, i)`.

    Raises:
        ValueError: for another order; from `sample`, for a start where the velocity does not tell data from noise.

    References:
        Lu et al. 2022 (arXiv:2211.01095, alg. 2 and sec. 5).
    """

    schedule: Schedule
    order: int = 2
    sde: bool = False
    nfe_per_step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_integer("order", self.order, least=2, most=3)
        check_bool("sde", self.sde)
        if self.sde and self.order != 2:
            raise ValueError(f"order must be 2 with sde=True, got {self.order}.")

    @property
    def stochastic(self) -> bool:
        return self.sde

    @property
    def domain(self) -> tuple[float, float]:
        return range_of(self.schedule)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return True

    def solve(self, v: VelocityFn, key: Key | None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        check_start(self.schedule, times)
        if key is not None:
            check_forward(times, self)
        times = jnp.asarray(times)
        step = _multistep(v, self.schedule, levels(self.schedule, times), self.order, key)
        memory = (jnp.zeros(x0.shape, dtype=time_dtype(x0)),) * 2
        return run_steps(step, x0, times, spent(len(times) - 1, v), memory=memory, trajectory=trajectory)
