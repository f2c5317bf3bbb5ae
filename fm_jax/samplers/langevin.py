"""Langevin steps, and the predictor-corrector sampler that takes them after each step along the path."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fm_jax.checks import (
    check_diffusion,
    check_function,
    check_integer,
    check_schedule,
    check_setting,
    check_shape,
    check_state,
    check_times,
    is_traced,
)
from fm_jax.nfe import spent
from fm_jax.parameterization import convert
from fm_jax.samplers.levels import range_of
from fm_jax.samplers.loop import run_steps, step_noise
from fm_jax.samplers.runge_kutta import evaluate, ode_step
from fm_jax.samplers.sde import ScoreFn, check_score_at_start, score_known_missing, score_missing, sde_step
from fm_jax.shapes import expand_time, time_dtype, time_of
from fm_jax.types import Array, ArrayTree, Diffusion, Key, Schedule, Solution, State, Time, VelocityFn


def langevin_step(score: ScoreFn, t: Time, x: State, noise: State, step_size: Time) -> State:
    """One step of Langevin dynamics at a fixed time, `x + eps score(t, x) + sqrt(2 eps) noise`.

    It leaves p_t as it is, up to an error of order 1 in eps: on a Gaussian of variance S the variance it settles at is
    `S / (1 - eps / (2 S))`. `eps` must not depend on x: dynamics with eps(x) settle at p_t / eps, however small it is.

    Args:
        score: `score(t, x)`.
        t: times.
        x: the state.
        noise: standard normal.
        step_size: eps, a scalar or [batch].

    Returns:
        The state, in the dtype of `x`.

    Raises:
        ValueError: if an argument, or what `score` returns, is not what it should be.

    Example:
        >>> langevin_step(lambda t, x: -x, 0.5, jnp.ones((1, 2)), jnp.zeros((1, 2)), 0.25)
        Array([[0.75, 0.75]], dtype=float32)
    """
    check_function("score", score, "a function score(t, x)", 2)
    check_state(x, "x")
    check_shape("noise", noise, x)
    time_of(t, x)  # refuses what is no time
    eps = expand_time(step_size, x, "step_size").astype(time_dtype(x))
    value = score(t, x)
    check_shape("score(t, x)", value, x)
    return (x + eps * value + jnp.sqrt(2 * eps) * noise).astype(x.dtype)


@dataclass(frozen=True)
class PredictorCorrector:
    """Steps along the path, each followed by Langevin steps at the time it has reached.

    The predictor is an Euler step of the flow, or with a `diffusion` an Euler-Maruyama step of its SDE. The corrector
    moves the law of the sample towards p_t, whatever it was, and so takes back a part of the predictor's error.

    The corrector's step size is `eps = 2 (snr |z| / |score|)^2`, with root mean squares for the norms: sqrt(d) for the
    noise z and sqrt(d) / sigma for the score, that is `eps = 2 (snr sigma)^2`. (The score is -E[x0 | x] / sigma, whose
    mean square is at most d / sigma^2, and close to that where the data has far fewer dimensions.) Song et al. take
    the mean of the norms over the batch, and advise sqrt(d) for |z| in small ones. Those means make what an example
    gets depend on its company, and an example's own norms would bias the law (see `langevin_step`); this eps is a
    function of t, at most theirs with sqrt(d), and always stable, since the score falls no faster than x / sigma^2.

    It has no order in the step size: as the steps along the path become short, the error of Langevin steps of their
    fixed size is left.

    Step i draws from `fold_in(key, i (corrector_steps + 1) + j)`, j = 0 in the predictor. An evaluation for the
    predictor and one for each Langevin step.

    Attributes:
        schedule: of the affine path with a standard normal source that the velocity belongs to.
        diffusion: g of the predictor, a number or a function of a scalar time.
        corrector_steps: Langevin steps at each time but the first; none where sigma = 0, where the score is infinite.
        snr: the paper's signal-to-noise ratio r, which sets the corrector's step size. In (0, 1).

    Raises:
        ValueError: for a bad diffusion, a negative number of corrector steps, or an snr outside (0, 1); from `sample`,
            with a diffusion, for a start where the score is infinite.

    Example:
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: -x / (1 - t)  # all data at 0
        >>> x0 = jax.random.normal(jax.random.key(0), (4, 2))
        >>> solution = sample(v, x0, PredictorCorrector(Linear()), times=10, key=jax.random.key(1))
        >>> int(solution.calls)  # no corrector at t = 1
        19

    References:
        Song et al. 2021 (arXiv:2011.13456, algorithm 1, and algorithm 4 for the corrector).
    """

    schedule: Schedule
    diffusion: Diffusion = 0.0
    corrector_steps: int = 1
    snr: float = 0.1
    order: ClassVar[None] = None
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_integer("corrector_steps", self.corrector_steps, least=0)
        check_setting(self, "snr", "(0, 1)")
        check_diffusion(self.diffusion)

    @property
    def nfe_per_step(self) -> int:
        return 1 + self.corrector_steps

    @property
    def domain(self) -> tuple[float, float]:
        return range_of(self.schedule)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times: without a corrector there."""
        predictor_alone = self.corrector_steps == 0
        return predictor_alone or score_known_missing(self.schedule, times[-1])

    def solve(self, v: VelocityFn, key: Key, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        schedule, diffusion, corrector_steps = self.schedule, self.diffusion, self.corrector_steps
        random = callable(diffusion) or is_traced(diffusion) or diffusion > 0
        if random:
            check_score_at_start(schedule, times)
        elif not is_traced(times):
            check_times("the first of times", times[0], schedule.domain, f"the domain of {schedule}")
        times = jnp.asarray(times)

        def score(t: Time, x: State) -> State:
            return convert("velocity", evaluate(v, t, x), t, x, schedule).score

        def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
            number = i * (corrector_steps + 1)
            if random:
                x = sde_step(v, None, diffusion, t, t_next, x, step_noise(key, number, x), schedule=schedule)
            else:
                x = ode_step(v, t, t_next, x, "euler")
            step_size = 2 * (self.snr * schedule.sigma(t_next)) ** 2

            def correct(j: Array, x: Array) -> Array:
                noise = step_noise(key, number + j, x)
                return langevin_step(score, t_next, x, noise, step_size)

            def correct_all(x: Array) -> Array:
                return jax.lax.fori_loop(1, corrector_steps + 1, correct, x)

            if corrector_steps > 0:
                x = jax.lax.cond(score_missing(schedule, t_next), lambda x: x, correct_all, x)
            return x, memory

        corrected = jnp.sum(~score_missing(schedule, times[1:]))
        calls = len(times) - 1 + corrector_steps * corrected
        return run_steps(step, x0, times, spent(calls, v), trajectory=trajectory)
