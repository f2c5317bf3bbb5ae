"""Stochastic sampling: the SDEs that share their marginals with the flow."""

import math
from collections.abc import Callable

import jax.numpy as jnp

from fm_jax.nfe import nfe_per_call
from fm_jax.parameterization import convert
from fm_jax.samplers.grids import check_state, time_dtype, time_grid
from fm_jax.samplers.loop import check_key, sample_on_grid, step_noise
from fm_jax.types import Array, ArrayTree, Diffusion, Key, Schedule, Solution, VelocityFn, check_member

ScoreFn = Callable[[Array, Array], Array]
METHODS = ("euler_maruyama",)


def _check(score: ScoreFn | None, schedule: Schedule | None, diffusion: Diffusion) -> None:
    if (score is None) == (schedule is None):
        raise ValueError(
            "Exactly one of score and schedule must be given: score=None takes the score from v by schedule."
        )
    if not callable(diffusion) and not (math.isfinite(diffusion) and diffusion >= 0):
        raise ValueError(f"diffusion must be finite and not negative, got {diffusion}.")


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
) -> Array:
    """One Euler-Maruyama step, `x + h (v + g^2 / 2 score) + g sqrt(h) noise`, with everything evaluated at `t`.

    The noise is an argument, so that callers can dispatch steps one by one or share a Brownian path among grids.

    Args:
        v: velocity function.
        score: `score(t, x)`, or `None` to take it from `v` by `schedule`.
        diffusion: g, a number or a function of a scalar time.
        t: scalar.
        t_next: scalar, after `t`.
        x: [batch, ...] at `t`.
        noise: standard normal [batch, ...].
        schedule: of the path that `v` belongs to, where `score` is `None`.

    Returns:
        [batch, ...] at `t_next`, in the dtype of `x`.
    """
    _check(score, schedule, diffusion)
    t, t_next = jnp.asarray(t, dtype=time_dtype(x)), jnp.asarray(t_next, dtype=time_dtype(x))
    h, t = t_next - t, t.astype(x.dtype)
    velocity = v(t, x)
    if schedule is not None:
        value = convert("velocity", velocity, t, x, schedule).score
    elif score is not None:
        value = score(t, x)
    if velocity.shape != x.shape or value.shape != x.shape:
        raise ValueError(f"v and score must have the shape of x, {x.shape}, got {velocity.shape} and {value.shape}.")
    g = jnp.asarray(diffusion(t) if callable(diffusion) else diffusion, dtype=h.dtype)
    if g.ndim != 0:
        raise ValueError(f"diffusion(t) must be a scalar, got shape {g.shape}.")
    return (x + h * (velocity + g**2 / 2 * value) + g * jnp.sqrt(h) * noise).astype(x.dtype)


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

    Coefficients are evaluated at the left end of each step, so never at `t1`, where the score may be infinite. Near a
    time with sigma = 0 the score grows as 1 / sigma: a g that vanishes there, such as sqrt(sigma(t)), keeps the steps
    stable. Euler-Maruyama has weak order 1, and strong order 1 too, since g does not depend on X.

    Args:
        v: velocity function; called with a scalar t in the dtype of `x0`.
        score: `score(t, x)`, one more evaluation a step; or `None`, which takes it from the same evaluation of `v`.
        diffusion: g, a number or a function of a scalar time. 0 is the Euler method for the flow.
        key: typed key; step i draws its noise from `fold_in(key, i)`.
        x0: [batch, ...] at `t0`.
        schedule: of the affine path with a standard normal source that `v` belongs to; needed where `score` is `None`.
        num_steps: for equal steps from `t0` to `t1`; either this or `grid`.
        method: "euler_maruyama".
        t0: where `x0` is.
        t1: where to go, after `t0`.
        grid: times [num_steps + 1], strictly increasing.
        trajectory: whether to keep the states at all grid times.

    Returns:
        `Solution`: x [batch, ...] at the end; nfe, a scalar, the calls of `v` and of `score`; trajectory
        [num_steps + 1, batch, ...] if asked for.

    Raises:
        ValueError: for a bad grid, method, state, diffusion or key, or unless exactly one of `score` and `schedule` is
            given.

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
    _check(score, schedule, diffusion)
    check_key(key)
    x0 = jnp.asarray(x0)
    check_state(x0)
    times = time_grid(num_steps, grid, t0, t1, x0, forward=True)

    def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
        return sde_step(v, score, diffusion, t, t_next, x, step_noise(key, i, x), schedule=schedule), memory

    nfe = (len(times) - 1) * (nfe_per_call(v) + (0 if score is None else nfe_per_call(score)))
    return sample_on_grid(step, x0, times, nfe=nfe, trajectory=trajectory)
