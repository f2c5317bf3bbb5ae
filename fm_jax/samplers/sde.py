"""Stochastic sampling by SDE extension: SDEs with the flow's marginals, by the Fokker-Planck equation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from fm_jax.checks import (
    check_diffusion,
    check_function,
    check_member,
    check_schedule,
    check_shape,
    check_state,
    check_velocity,
    is_traced,
)
from fm_jax.nfe import spent
from fm_jax.parameterization import convert
from fm_jax.samplers.grids import first_time
from fm_jax.samplers.levels import check_start, range_of
from fm_jax.samplers.loop import run_steps, step_noise
from fm_jax.samplers.runge_kutta import evaluate, path_times, step_times
from fm_jax.schedules import coefficients, stands_still, vanishes
from fm_jax.types import (
    AnyArray,
    Array,
    ArrayTree,
    Diffusion,
    Elementwise,
    Key,
    Scalar,
    Schedule,
    Solution,
    State,
    Time,
    VelocityFn,
)

ScoreFn: TypeAlias = Callable[[Time, State], State]
"""`score(t, x) -> grad log p_t(x)`."""
_METHODS = ("euler_maruyama", "heun")


def check_one_score(score: ScoreFn | None, schedule: Schedule | None) -> None:
    """Raises `ValueError` unless the score comes from exactly one place."""
    if (score is None) == (schedule is None):
        raise ValueError(
            "Exactly one of score and schedule must be given: score=None takes the score from v by schedule."
        )
    if score is not None:
        check_function("score", score, "a function score(t, x)", 2)
    if schedule is not None:
        check_schedule(schedule)


def check_sde(schedule: Schedule | None, diffusion: Diffusion | None, score: ScoreFn | None) -> None:
    """Raises `ValueError` unless these say what the SDE is."""
    check_one_score(score, schedule)
    if diffusion is not None:
        check_diffusion(diffusion)
    elif schedule is None:
        raise ValueError("diffusion must be given with a score: its default is made of a schedule.")


def falling_noise(schedule: Schedule) -> Callable[[Elementwise], Elementwise]:
    """The diffusion coefficient g with `g(t)^2 = -d sigma^2 / dt`: noise is added as fast as the path sheds it.

    On `VE` and `EDM` it is that of the reverse diffusion; it vanishes with sigma, so that the score term stays finite.
    """
    check_schedule(schedule)

    def g(t: Elementwise) -> Elementwise:
        c = coefficients(schedule, t)
        return jnp.sqrt(jnp.maximum(-2 * c.sigma * c.d_sigma, 0))

    return g


def noise_of(schedule: Schedule | None, diffusion: Diffusion | None) -> Any:
    """The noise coefficient that is meant: the one given, or that of the schedule."""
    return falling_noise(schedule) if diffusion is None and schedule is not None else diffusion


def functions(v: VelocityFn, score: ScoreFn | None) -> tuple[Callable, ...]:
    """What an SDE's drift calls."""
    return (v,) if score is None else (v, score)


def score_missing(schedule: Schedule, t: Elementwise) -> Bool[AnyArray, " *shape"]:
    """Whether the velocity gives no finite score at `t`: where sigma = 0, or where alpha and its slope are both 0."""
    return (schedule.sigma(t) == 0) | stands_still(schedule, t)


def score_known_missing(schedule: Schedule, t: Scalar | float) -> bool:
    """`score_missing` at one time, as a Python bool; False where a setting is traced."""
    with jax.ensure_compile_time_eval():
        value = score_missing(schedule, jnp.asarray(t))
        return not is_traced(value) and bool(value)


def check_score_at_start(schedule: Schedule, times: ArrayTree) -> None:
    """Raises `ValueError` if there is no finite score by `schedule` at the first time, where that time is known."""
    check_start(schedule, times)
    first = first_time(times)
    if first is not None and vanishes(schedule.sigma, first):
        raise ValueError(
            f"The score is infinite where sigma = 0, at t = {first}: start or end short of it, e.g. at t = 0.999."
        )


def diffusion_fn(diffusion: Diffusion) -> Callable[[Scalar], Scalar]:
    """g(t) as a function of a scalar time; refuses, when called, a g that is not a scalar."""

    def g(t: Scalar) -> Scalar:
        value = jnp.asarray(diffusion(t) if callable(diffusion) else diffusion, dtype=t.dtype)
        if value.ndim != 0:
            raise ValueError(f"diffusion(t) must be a scalar, got shape {value.shape}.")
        return value

    return g


def drift_fn(
    v: VelocityFn, score: ScoreFn | None, diffusion: Diffusion, *, schedule: Schedule | None = None
) -> Callable[[Scalar, State, Scalar], State]:
    """The drift of the SDE extension, `drift(t, x, direction) = v + direction g^2 / 2 score`; -1 is backward."""
    g = diffusion_fn(diffusion)

    def drift(t: Scalar, x: State, direction: Scalar) -> State:
        velocity = evaluate(v, t, x)
        if schedule is not None:
            value = convert("velocity", velocity, t, x, schedule).score
        elif score is not None:
            value = score(t, x)
        check_shape("score(t, x)", value, x)
        return velocity + direction * g(t) ** 2 / 2 * value

    return drift


def sde_step(
    v: VelocityFn,
    score: ScoreFn | None,
    diffusion: Diffusion,
    t: Scalar | float,
    t_next: Scalar | float,
    x: State,
    noise: State,
    *,
    schedule: Schedule | None = None,
    method: str = "euler_maruyama",
) -> State:
    """One step of the SDE, by Euler-Maruyama `x + h (v + s g^2 / 2 score) + g sqrt|h| noise` with s the sign of h.

    "heun" is the trapezoidal rule in the drift, with the Euler-Maruyama step as its predictor, and in g^2; predictor
    and corrector share the noise. A Heun step to where there is no score by `schedule`, as where sigma = 0, is an
    Euler-Maruyama step.

    The noise is an argument, so that callers can dispatch steps one by one or share a Brownian path among grids.

    Notebooks: (2.3), (4.7).

    Args:
        v: velocity function.
        score: `score(t, x)`, or `None` to take it from `v` by `schedule`.
        diffusion: g, a number or a function of a scalar time.
        t: time of `x`.
        t_next: after or before `t`.
        x: the state.
        noise: standard normal.
        schedule: of the path that `v` belongs to, where `score` is `None`.
        method: "euler_maruyama" or "heun".

    Returns:
        The state at `t_next`, in the dtype of `x`.

    Raises:
        ValueError: if an argument is not what it should be.
    """
    check_member("method", method, _METHODS)
    check_one_score(score, schedule)
    check_diffusion(diffusion)
    check_velocity(v)
    check_state(x, "x")
    check_shape("noise", noise, x)
    drift, g = drift_fn(v, score, diffusion, schedule=schedule), diffusion_fn(diffusion)
    t, t_next = (step_times if schedule is None else path_times)(t, t_next, x)
    h = t_next - t
    direction = jnp.sign(h)
    slope, scale = drift(t, x, direction), g(t)
    if method == "heun":
        trapezoidal_scale = jnp.sqrt((scale**2 + g(t_next) ** 2) / 2)

        def corrected() -> tuple[Array, Array]:
            predicted = (x + h * slope + trapezoidal_scale * jnp.sqrt(jnp.abs(h)) * noise).astype(x.dtype)
            return (slope + drift(t_next, predicted, direction)) / 2, trapezoidal_scale

        if schedule is None:
            slope, scale = corrected()
        else:
            slope, scale = jax.lax.cond(score_missing(schedule, t_next), lambda: (slope, scale), corrected)
    return (x + h * slope + scale * jnp.sqrt(jnp.abs(h)) * noise).astype(x.dtype)


@dataclass(frozen=True)
class EulerMaruyama:
    """The Euler-Maruyama method for the SDE extension of the flow: the SDE of any noise that has the flow's marginals.

    dX = [v(t, X) + g(t)^2 / 2 score(t, X)] dt + g(t) dW keeps the marginals by the Fokker-Planck equation, for every g.
    Where time runs backward, from data to noise, it is dX = [v - g^2 / 2 score] dt + g dW with W a Brownian motion in
    backward time; it has the same marginals.

    Strong order 1, since g does not depend on X, and weak order 1. It evaluates at the left end of each step, so never
    at the last time, where the score may be infinite. Near a time with sigma = 0 the score grows as 1 / sigma: a g that
    vanishes there, such as `falling_noise(schedule)`, keeps the steps stable.

    Notebooks: (2.2), (2.3), (4.7).

    Attributes:
        schedule: of the affine path with a standard normal source that the velocity belongs to, by which the score is
            taken from the same evaluation of the velocity. Going backward, start where sigma is not 0.
        diffusion: g, a number or a function of a scalar time; by default `falling_noise(schedule)`. 0 is Euler's
            method.
        score: `score(t, x)` in place of a schedule, one more evaluation each time.

    Step i draws its noise from `fold_in(key, i)`.

    Raises:
        ValueError: unless exactly one of `schedule` and `score` is given, and `diffusion` with a `score`; for a bad
            `diffusion`; from `sample`, for a start where the score by `schedule` is infinite.

    Example:
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: -x / (1 - t)  # all data at 0
        >>> x0 = jax.random.normal(jax.random.key(0), (4, 2))
        >>> sample(v, x0, EulerMaruyama(Linear()), times=10, key=jax.random.key(1)).x.shape
        (4, 2)

    References:
        Song et al. 2021 (arXiv:2011.13456, eq. 6 and 13, for the g of the diffusion); Albergo et al. 2023
        (arXiv:2303.08797, for any g); Ma et al. 2024 (arXiv:2401.08740, eq. 4).
    """

    schedule: Schedule | None = None
    diffusion: Diffusion | None = None
    score: ScoreFn | None = None
    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sde(self.schedule, self.diffusion, self.score)

    @property
    def nfe_per_step(self) -> int:
        return 1 if self.score is None else 2

    @property
    def domain(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.schedule is None else range_of(self.schedule)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return True

    def solve(self, v: VelocityFn, key: Key, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        return _solve(self, v, key, times, x0, trajectory, method="euler_maruyama")


@dataclass(frozen=True)
class StochasticHeun:
    """The stochastic Heun method for the SDE of `EulerMaruyama`, with its attributes.

    Strong order 1 and weak order 2. It evaluates at both ends of a step; with a `schedule` a step into sigma = 0 is an
    Euler-Maruyama step, which costs no order, while a `score` has to be finite at the last time.

    Raises:
        ValueError: as `EulerMaruyama`.
    """

    schedule: Schedule | None = None
    diffusion: Diffusion | None = None
    score: ScoreFn | None = None
    order: ClassVar[int] = 2
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sde(self.schedule, self.diffusion, self.score)

    @property
    def nfe_per_step(self) -> int:
        return 2 if self.score is None else 4

    @property
    def domain(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.schedule is None else range_of(self.schedule)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times: where it gives no score."""
        return self.schedule is not None and score_known_missing(self.schedule, times[-1])

    def solve(self, v: VelocityFn, key: Key, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        return _solve(self, v, key, times, x0, trajectory, method="heun")


def _solve(
    sampler: EulerMaruyama | StochasticHeun,
    v: VelocityFn,
    key: Key,
    times: ArrayTree,
    x0: State,
    trajectory: bool,
    *,
    method: str,
) -> Solution:
    schedule, score = sampler.schedule, sampler.score
    diffusion = noise_of(schedule, sampler.diffusion)
    if schedule is not None:
        check_score_at_start(schedule, times)

    def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
        noise = step_noise(key, i, x)
        return sde_step(v, score, diffusion, t, t_next, x, noise, schedule=schedule, method=method), memory

    evaluations: int | Array = len(times) - 1
    if method == "heun":
        plain = 0 if schedule is None else jnp.sum(score_missing(schedule, jnp.asarray(times)[1:]))
        evaluations = 2 * (len(times) - 1) - plain
    return run_steps(step, x0, times, spent(evaluations, *functions(v, score)), trajectory=trajectory)
