"""Adams-Bashforth methods: high order at one network evaluation a step, by remembering the velocities before."""

import jax
import jax.numpy as jnp

from fm_jax.nfe import nfe_per_call
from fm_jax.samplers.fixed import METHODS, evaluate, ode_step
from fm_jax.samplers.grids import check_state, time_grid
from fm_jax.samplers.loop import sample_on_grid
from fm_jax.types import Array, ArrayTree, Solution, VelocityFn

# The first order - 1 steps have nothing to remember. A method of one order less is enough for these few.
START = {2: "euler", 3: "heun", 4: "heun3"}


def _weights(times: Array, order: int) -> Array:
    """Weights [num_steps, order] of the velocities at t_i, t_(i-1), ...: the integral of the polynomial through them.

    On nodes c_j = (t_(i-j) - t_i) / h they solve sum_j w_j c_j^p = 1 / (p + 1) for p < order.
    """
    steps = jnp.diff(times)
    # Times before the first, which the starting steps do not use, must not coincide: the system would be singular.
    before = times[0] - steps[0] * jnp.arange(order - 1, 0, -1)
    known = jnp.concatenate([before.astype(times.dtype), times])
    nodes = jnp.stack([known[order - 1 - j : len(known) - 1 - j] for j in range(order)], axis=1)
    c = (nodes - times[:-1, None]) / steps[:, None]
    powers = jnp.arange(order)
    vandermonde = c[:, None, :] ** powers[None, :, None]
    return jnp.linalg.solve(vandermonde, jnp.broadcast_to(1.0 / (powers + 1), c.shape)[..., None])[..., 0]


def sample_adams_bashforth(
    v: VelocityFn,
    x0: Array,
    *,
    order: int = 2,
    num_steps: int | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    grid: ArrayTree | None = None,
    trajectory: bool = False,
) -> Solution:
    """The solution of dx/dt = v(t, x) by an explicit linear multistep method, on any grid.

    `x_(i+1) = x_i + h sum_j w_j v_(i-j)`, j < order, with the weights that integrate the polynomial through the known
    velocities (Hairer, Norsett & Wanner 1993, Solving Ordinary Differential Equations I, III.5). The first order - 1
    steps are Runge-Kutta steps of one order less: euler, heun, heun3.

    Args:
        v: velocity function; called with a scalar t in the dtype of `x0`.
        x0: [batch, ...] at `t0`.
        order: 2, 3 or 4.
        num_steps: for equal steps from `t0` to `t1`; either this or `grid`.
        t0: where `x0` is.
        t1: where to go. `t1 < t0` runs backward, from data to noise.
        grid: times [num_steps + 1], strictly monotone in either direction.
        trajectory: whether to keep the states at all grid times.

    Returns:
        `Solution`: x [batch, ...] at the end; nfe, one a step and 0, 2 or 6 more for the start; trajectory
        [num_steps + 1, batch, ...] if asked for.

    Raises:
        ValueError: for a bad grid, number of steps, order or state.

    Example:
        >>> solution = sample_adams_bashforth(lambda t, x: x, jnp.ones((1, 1)), num_steps=40, order=4)
        >>> float(abs(solution.x[0, 0] - jnp.e)) < 1e-5, int(solution.nfe)
        (True, 46)
    """
    if order not in START:
        raise ValueError(f"order must be one of {', '.join(map(str, START))}, got {order!r}.")
    x0 = jnp.asarray(x0)
    check_state(x0)
    times = time_grid(num_steps, grid, t0, t1, x0)
    weights, steps = _weights(times, order), jnp.diff(times)

    def step(x: Array, earlier: Array, i: Array, t: Array, t_next: Array) -> tuple[Array, Array]:
        velocities = jnp.concatenate([evaluate(v, t, x)[None], earlier])

        def start() -> Array:
            return ode_step(v, t, t_next, x, START[order], first=velocities[0])

        def multistep() -> Array:
            return (x + steps[i] * jnp.tensordot(weights[i], velocities, 1)).astype(x.dtype)

        return jax.lax.cond(i < order - 1, start, multistep), velocities[:-1]

    num, start = len(times) - 1, METHODS[START[order]]
    nfe = (num + min(num, order - 1) * (start.stages - 1)) * nfe_per_call(v)
    earlier = jnp.zeros((order - 1, *x0.shape), x0.dtype)
    return sample_on_grid(step, x0, times, nfe=nfe, memory=earlier, trajectory=trajectory)
