"""Adams-Bashforth methods: high order at one network evaluation a step, by remembering the velocities before."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer
from fm_jax.nfe import spent
from fm_jax.samplers.loop import run_steps
from fm_jax.samplers.runge_kutta import TABLEAUX, evaluate, ode_step
from fm_jax.shapes import time_dtype
from fm_jax.types import Array, ArrayTree, Solution, State, VelocityFn

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


@dataclass(frozen=True)
class AdamsBashforth:
    """An explicit linear multistep method for the flow, on any grid.

    `x_(i+1) = x_i + h sum_j w_j v_(i-j)`, j < order, with the weights that integrate the polynomial through the known
    velocities (Hairer, Norsett & Wanner 1993, Solving Ordinary Differential Equations I, III.5). The first order - 1
    steps are Runge-Kutta steps of one order less: euler, heun, heun3; they cost 0, 2 or 6 evaluations more.

    Attributes:
        order: 2, 3 or 4.

    Raises:
        ValueError: for another order.

    Example:
        >>> from fm_jax.samplers import sample
        >>> solution = sample(lambda t, x: x, jnp.ones((1, 1)), AdamsBashforth(4), times=40)
        >>> float(abs(solution.x[0, 0] - jnp.e)) < 1e-5, int(solution.calls)
        (True, 46)
    """

    order: int = 2
    nfe_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_integer("order", self.order, least=min(START), most=max(START))

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times: "heun" does so, where it starts order 3."""
        return self.order != 3 or len(times) > self.order

    def solve(self, v: VelocityFn, key: None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        times, order = jnp.asarray(times), self.order
        weights, steps = _weights(times, order), jnp.diff(times)

        def step(x: Array, earlier: Array, i: Array, t: Array, t_next: Array) -> tuple[Array, Array]:
            velocity = evaluate(v, t, x)
            velocities = jnp.concatenate([velocity[None].astype(earlier.dtype), earlier])

            def start() -> Array:
                return ode_step(v, t, t_next, x, START[order], first=velocity)

            def multistep() -> Array:
                return (x + steps[i] * jnp.tensordot(weights[i], velocities, 1)).astype(x.dtype)

            return jax.lax.cond(i < order - 1, start, multistep), velocities[:-1]

        num = len(times) - 1
        calls = num + min(num, order - 1) * (TABLEAUX[START[order]].stages - 1)
        earlier = jnp.zeros((order - 1, *x0.shape), time_dtype(x0))
        return run_steps(step, x0, times, spent(calls, v), memory=earlier, trajectory=trajectory)
