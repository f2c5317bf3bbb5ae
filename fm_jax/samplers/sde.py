"""Stochastic sampling: the SDEs that share their marginals with the flow, in either direction of time."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from fm_jax.nfe import nfe_per_call
from fm_jax.parameterization import convert
from fm_jax.samplers import levels
from fm_jax.samplers.fixed import evaluate
from fm_jax.samplers.grids import check_state, first_time, time_dtype, time_grid
from fm_jax.samplers.loop import check_key, sample_on_grid, step_noise
from fm_jax.schedules import stands_still, vanishes
from fm_jax.types import Array, ArrayTree, Diffusion, Key, Schedule, Solution, VelocityFn, check_member

ScoreFn = Callable[[Array, Array], Array]
METHODS = ("euler_maruyama", "heun")


def check_diffusion(diffusion: Diffusion) -> None:
    """Raises `ValueError` unless `diffusion` is a function or a finite number, not negative."""
    if not callable(diffusion) and not (math.isfinite(diffusion) and diffusion >= 0):
        raise ValueError(f"diffusion must be finite and not negative, got {diffusion}.")


def check_one_score(score: ScoreFn | None, schedule: Schedule | None) -> None:
    """Raises `ValueError` unless the score comes from exactly one place."""
    if (score is None) == (schedule is None):
        raise ValueError(
            "Exactly one of score and schedule must be given: score=None takes the score from v by schedule."
        )


def score_missing(schedule: Schedule, t: Array) -> Array:
    """Whether the velocity gives no finite score at `t`: where sigma = 0, or where alpha and its slope are both 0."""
    return (schedule.sigma(t) == 0) | stands_still(schedule, t)


def check_start(schedule: Schedule, t0: float, grid: ArrayTree | None) -> None:
    """Raises `ValueError` if there is no finite score by `schedule` at the first time, where that time is known."""
    levels.check_start(schedule, t0, grid)
    first = first_time(t0, grid)
    if first is not None and vanishes(schedule.sigma, first):
        raise ValueError(
            f"The score is infinite where sigma = 0, at t = {first}: start or end short of it, e.g. at t = 0.999."
        )


def diffusion_fn(diffusion: Diffusion) -> Callable[[Array], Array]:
    """g(t) as a function of a scalar time; refuses, when called, a g that is not a scalar."""

    def g(t: Array) -> Array:
        value = jnp.asarray(diffusion(t) if callable(diffusion) else diffusion, dtype=t.dtype)
        if value.ndim != 0:
            raise ValueError(f"diffusion(t) must be a scalar, got shape {value.shape}.")
        return value

    return g


def drift_fn(
    v: VelocityFn, score: ScoreFn | None, diffusion: Diffusion, *, schedule: Schedule | None = None
) -> Callable[[Array, Array, Array], Array]:
    """The SDE's drift, `drift(t, x, direction) = v + direction g^2 / 2 score`; direction 1 is forward, -1 backward."""
    g = diffusion_fn(diffusion)

    def drift(t: Array, x: Array, direction: Array) -> Array:
        velocity = evaluate(v, t, x)
        if schedule is not None:
            # At t itself: in bfloat16 all times from 0.999 on are 1, where sigma may be 0.
            value = convert("velocity", velocity, t, x, schedule).score
        elif score is not None:
            value = score(t.astype(x.dtype), x)
        if value.shape != x.shape:
            raise ValueError(f"score(t, x) must have the shape of x, {x.shape}, got {value.shape}.")
        return velocity + direction * g(t) ** 2 / 2 * value

    return drift


def sde_step(
    v: VelocityFn,
    score: ScoreFn | None,
    diffusion: Diffusion,
    t: Array,
    t_next: Array,
    x: Array,
    noise: Array,
    *,
    schedule: Schedule | None = None,
    method: str = "euler_maruyama",
) -> Array:
    """One step of the SDE, by Euler-Maruyama `x + h (v + s g^2 / 2 score) + g sqrt|h| noise` with s the sign of h.

    "heun" is the trapezoidal rule in the drift, with the Euler-Maruyama step as its predictor, and in g^2; predictor
    and corrector share the noise. A Heun step to where there is no score by `schedule`, as where sigma = 0, is an
    Euler-Maruyama step.

    The noise is an argument, so that callers can dispatch steps one by one or share a Brownian path among grids.

    Args:
        v: velocity function.
        score: `score(t, x)`, or `None` to take it from `v` by `schedule`.
        diffusion: g, a number or a function of a scalar time.
        t: scalar.
        t_next: scalar, after or before `t`.
        x: [batch, ...] at `t`.
        noise: standard normal [batch, ...].
        schedule: of the path that `v` belongs to, where `score` is `None`.
        method: "euler_maruyama" or "heun".

    Returns:
        [batch, ...] at `t_next`, in the dtype of `x`.
    """
    check_member("method", method, METHODS)
    check_one_score(score, schedule)
    check_diffusion(diffusion)
    drift, g = drift_fn(v, score, diffusion, schedule=schedule), diffusion_fn(diffusion)
    t, t_next = jnp.asarray(t, dtype=time_dtype(x)), jnp.asarray(t_next, dtype=time_dtype(x))
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


def sample_sde(
    v: VelocityFn,
    score: ScoreFn | None,
    diffusion: Diffusion,
    key: Key,
    x0: Array,
    *,
    schedule: Schedule | None = None,
    num_steps: int | None = None,
    method: str = "euler_maruyama",
    t0: float = 0.0,
    t1: float = 1.0,
    grid: ArrayTree | None = None,
    trajectory: bool = False,
) -> Solution:
    """A sample of dX = [v(t, X) + g(t)^2 / 2 score(t, X)] dt + g(t) dW, which has the flow's marginals for every g.

    Where time runs backward, from data to noise, it is dX = [v - g^2 / 2 score] dt + g dW with W a Brownian motion in
    backward time; it has the same marginals.

    Both methods have strong order 1, since g does not depend on X; "euler_maruyama" has weak order 1, "heun" 2.
    Euler-Maruyama evaluates at the left end of each step, so never at `t1`, where the score may be infinite. Heun
    evaluates at both; with `schedule`, its last step into sigma = 0 is an Euler-Maruyama step, which costs no order,
    while a `score` has to be finite at `t1`. Near a time with sigma = 0 the score grows as 1 / sigma: a g that vanishes
    there, such as sqrt(sigma(t)), keeps the steps stable.

    Args:
        v: velocity function; called with a scalar t in the dtype of `x0`.
        score: `score(t, x)`, one more evaluation each time; or `None`, which takes it from the same evaluation of `v`.
        diffusion: g, a number or a function of a scalar time. 0 is the Euler or Heun method for the flow.
        key: typed key; step i draws its noise from `fold_in(key, i)`.
        x0: [batch, ...] at `t0`.
        schedule: of the affine path with a standard normal source that `v` belongs to; needed where `score` is `None`.
        num_steps: for equal steps from `t0` to `t1`; either this or `grid`.
        method: "euler_maruyama", one evaluation a step, or "heun", two.
        t0: where `x0` is. Going backward with `schedule`, where sigma is not 0.
        t1: where to go. `t1 < t0` runs backward.
        grid: times [num_steps + 1], strictly monotone in either direction.
        trajectory: whether to keep the states at all grid times.

    Returns:
        `Solution`: x [batch, ...] at the end; nfe, a scalar, the calls of `v` and of `score`; trajectory
        [num_steps + 1, batch, ...] if asked for.

    Raises:
        ValueError: for a bad grid, method, state, diffusion or key, unless exactly one of `score` and `schedule` is
            given, or for a start where the score by `schedule` is infinite.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: -x / (1 - t)  # all data at 0
        >>> x0 = jax.random.normal(jax.random.key(0), (4, 2))
        >>> g = lambda t: jnp.sqrt(1 - t)
        >>> sample_sde(v, None, g, jax.random.key(1), x0, schedule=Linear(), num_steps=10).x.shape
        (4, 2)

    References:
        Song et al. 2021 (arXiv:2011.13456, eq. 6 and 13, for the g of the diffusion); Albergo et al. 2023
        (arXiv:2303.08797, for any g); Ma et al. 2024 (arXiv:2401.08740, eq. 4).
    """
    check_member("method", method, METHODS)
    check_one_score(score, schedule)
    check_diffusion(diffusion)
    check_key(key)
    x0 = jnp.asarray(x0)
    check_state(x0)
    times = time_grid(num_steps, grid, t0, t1, x0)
    if schedule is not None:
        check_start(schedule, t0, grid)

    def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
        noise = step_noise(key, i, x)
        return sde_step(v, score, diffusion, t, t_next, x, noise, schedule=schedule, method=method), memory

    evaluations: int | Array = len(times) - 1
    if method == "heun":
        plain = 0 if schedule is None else jnp.sum(score_missing(schedule, times[1:]))
        evaluations = 2 * (len(times) - 1) - plain
    nfe = evaluations * (nfe_per_call(v) + (0 if score is None else nfe_per_call(score)))
    return sample_on_grid(step, x0, times, nfe=nfe, trajectory=trajectory)
