"""Training of learned solvers: minutes, against fine solutions of one velocity field."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from fm_jax.checks import (
    check_condition,
    check_data,
    check_function,
    check_has,
    check_integer,
    check_key,
    check_number,
    check_same_shape,
)
from fm_jax.samplers import learned
from fm_jax.types import Array, Cond, Key, VelocityFn


def fit_solver(
    v_of: Callable[[Cond], VelocityFn],
    solver: learned.LearnedSolver,
    key: Key,
    x0: Array,
    x1: Array,
    cond: Cond = None,
    *,
    num_iterations: int = 500,
    batch_size: int = 64,
    learning_rate: float = 5e-3,
) -> tuple[learned.LearnedSolver, Array]:
    """Fits a learned solver to pairs of starting points and fine solutions by Adam with a decaying learning rate.

    Args:
        v_of: `v_of(cond)`, the velocity function for a batch of conditions; guidance belongs in here.
        solver: where to start, from `learned.from_method`.
        key: draws the batches.
        x0: starting points [num, ...].
        x1: where fine solutions from there end [num, ...].
        cond: conditions with a leading axis [num], or `None`.
        num_iterations: steps of Adam.
        batch_size: pairs a step, drawn without replacement.
        learning_rate: at the start; it falls to 0 along a cosine.

    Returns:
        The trained solver, and the losses [num_iterations], each on its batch before the step.

    Raises:
        ValueError: if `x0` and `x1` differ in shape, there are fewer pairs than `batch_size`, or `num_iterations` is
            less than 1.

    References:
        Shaul et al. 2024 (arXiv:2403.01329).
    """
    check_function("v_of", v_of, "a function v_of(cond) -> v", 1)
    check_has("solver", solver, ("log_steps", "a", "b", "ends"), "a LearnedSolver, as from learned.from_method")
    check_key(key)
    check_same_shape(x0=x0, x1=x1)
    check_data("x0", x0)
    check_data("x1", x1)
    check_condition(x0, cond)
    check_integer("batch_size", batch_size, most=len(x0))
    check_integer("num_iterations", num_iterations)
    check_number("learning_rate", learning_rate, "(0, inf)")
    x0, x1, cond = jax.tree.map(jnp.asarray, (x0, x1, cond))
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_iterations))

    # Steps are dispatched one by one: gradients of convolutions are slow inside loops on CPU.
    @jax.jit
    def step(
        solver: learned.LearnedSolver, state: optax.OptState, key: Key
    ) -> tuple[learned.LearnedSolver, optax.OptState, Array]:
        index = jax.random.choice(key, len(x0), (batch_size,), replace=False)
        v = v_of(jax.tree.map(lambda c: c[index], cond))
        value, gradient = jax.value_and_grad(lambda s: learned.loss(v, s, x0[index], x1[index]))(solver)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(solver, updates), state, value

    state, losses = optimizer.init(solver), []
    for i in range(num_iterations):
        solver, state, value = step(solver, state, jax.random.fold_in(key, i))
        losses.append(value)
    return solver, jnp.stack(losses)
