"""The loop over a fixed time grid that the samplers share."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from fm_jax.types import Array, Key, Solution

Step: TypeAlias = Callable[[Array, Any, Array, Array, Array], tuple[Array, Any]]
"""`step(x, memory, i, t, t_next) -> (x, memory)`: step number i from `t` to `t_next`, all three scalars."""


def sample_on_grid(
    step: Step, x0: Array, times: Array, *, nfe: int | Array, memory: Any = (), trajectory: bool = False
) -> Solution:
    """Takes `step` along the grid in one `lax.scan`; nothing is stacked unless the trajectory is wanted.

    Args:
        step: `step(x, memory, i, t, t_next) -> (x, memory)`.
        x0: [batch, ...] at the first time.
        times: [num_steps + 1], as from `grids.time_grid`.
        nfe: network evaluations spent on each example.
        memory: pytree that a step leaves for the next, such as earlier velocities.
        trajectory: whether to keep the states at all grid times.

    Returns:
        `Solution`: x [batch, ...] at the last time; trajectory [num_steps + 1, batch, ...] if asked for.
    """

    def body(carry: tuple[Array, Any], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], Array | None]:
        x, memory = step(*carry, *inputs)
        return (x, memory), x if trajectory else None

    (x, _), states = jax.lax.scan(body, (x0, memory), (jnp.arange(len(times) - 1), times[:-1], times[1:]))
    return Solution(x, jnp.asarray(nfe), None if states is None else jnp.concatenate([x0[None], states]))


def check_key(key: Key | None) -> None:
    """Raises `ValueError` unless `key` is one typed PRNG key."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise ValueError(f"key must be one typed key, as from jax.random.key(0), got {key!r}.")


def step_noise(key: Key, i: Array, x: Array) -> Array:
    """Standard normal noise in the shape and dtype of `x`, for step number i of a sampler."""
    return jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
