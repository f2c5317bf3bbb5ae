"""The loop over a fixed time grid that the samplers share."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fm_jax.types import Array, ArrayTree, Key, Like, Scalar, Solution, State

Step: TypeAlias = Callable[[Array, Any, Array, Array, Array], tuple[Array, Any]]
"""`step(x, memory, i, t, t_next) -> (x, memory)`: step number i from `t` to `t_next`, all three scalars."""


def run_steps(
    step: Step,
    x0: State,
    times: ArrayTree,
    spent: tuple[Array | None, Array | None],
    *,
    memory: Any = (),
    trajectory: bool = False,
) -> Solution:
    """Takes `step` along the times in one `lax.scan`; nothing is stacked unless the trajectory is wanted.

    Args:
        step: `step(x, memory, i, t, t_next) -> (x, memory)`.
        x0: the state at the first time.
        times: [num_steps + 1].
        spent: calls of the velocity and network evaluations on each example, as from `nfe.spent`.
        memory: pytree that a step leaves for the next, such as earlier velocities.
        trajectory: whether to keep the states at all times.

    Returns:
        `Solution`: x [batch, ...] at the last time; trajectory [num_steps + 1, batch, ...] if asked for.
    """
    times = jnp.asarray(times)

    def body(carry: tuple[Array, Any], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array | None]:
        x, memory = step(*carry, *inputs)
        return (x, memory), x if trajectory else None

    (x, _), states = jax.lax.scan(body, (x0, memory), (jnp.arange(len(times) - 1), times[:-1], times[1:]))
    return Solution(x, *spent, None if states is None else jnp.concatenate([x0[None], states]))


def step_noise(key: Key, i: Scalar, x: Like) -> State:
    """Standard normal noise in the shape and dtype of `x`, for step number i of a sampler."""
    return jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
