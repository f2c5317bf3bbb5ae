"""Learned solvers: a few steps whose times and weights are trained for one velocity field ("bespoke" solvers).

A non-stationary solver (Shaul et al. 2024, arXiv:2403.01329) with n evaluations computes, for i < n,

    x_(i+1) = a_i x_0 + sum_(j <= i) b_ij v(t_j, x_j)

with its own times t_i, a_i and b_ij in every step. Every Runge-Kutta and multistep method is of this form; from one of
them the n (n + 5) / 2 numbers are trained towards fine solutions by `loss`; `fm_jax.train.learned` has the loop.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_has, check_integer, check_number, check_real, check_same_shape
from fm_jax.nfe import spent
from fm_jax.samplers.grids import uniform
from fm_jax.samplers.runge_kutta import Tableau, evaluate, tableau
from fm_jax.samplers.sample import sample
from fm_jax.shapes import mean_over_event
from fm_jax.types import Array, ArrayTree, Elementwise, Scalar, Solution, State, VelocityFn


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LearnedSolver:
    """A solver with n evaluations at times of its own: a pytree to optimise and to save, and a sampler like the others.

    The steps are written out one by one rather than looped over: there are few, and gradients of convolutions are slow
    inside loops on CPU. Differentiable also with respect to the solver. `sample` takes it without `times`. It has no
    order: its number of steps is fixed.

    Attributes:
        log_steps: [n]; the times between evaluations are its softmax times the whole.
        a: [n].
        b: [n, n], of which the lower triangle counts.
        ends: [2], the first and the last time, which are not trained.

    Example:
        >>> sample(lambda t, x: x, jnp.ones((1, 1)), from_method("euler", 2)).x
        Array([[2.25]], dtype=float32)
    """

    log_steps: Array
    a: Array
    b: Array
    ends: Array
    order: ClassVar[None] = None
    nfe_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def __repr__(self) -> str:
        return f"LearnedSolver({len(self.a)} evaluations)"

    @property
    def own_times(self) -> Array:
        """The times [n + 1]: one for each evaluation, then the end."""
        t0, t1 = jax.lax.stop_gradient(self.ends)
        elapsed = jnp.cumsum(jax.nn.softmax(self.log_steps))
        return jnp.concatenate([t0[None], t0 + (t1 - t0) * elapsed[:-1], t1[None]])

    @property
    def domain(self) -> tuple[Any, Any]:
        t0, t1 = self.ends
        return t0, t1

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return True

    def solve(self, v: VelocityFn, key: None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        x, states, velocities = x0, [x0], list[Array]()
        for i, t in enumerate(times[:-1]):
            velocities.append(evaluate(v, t, x))
            x = self.a[i] * x0 + sum(self.b[i, j] * u for j, u in enumerate(velocities))
            x = x.astype(x0.dtype)
            states.append(x)
        return Solution(x, *spent(len(self.a), v), jnp.stack(states) if trajectory else None)


def from_method(method: str | Tableau, num_steps: int, t0: float = 0.0, t1: float = 1.0) -> LearnedSolver:
    """The learned solver that is a Runge-Kutta method on a uniform grid: where training starts.

    Args:
        method: "euler", "midpoint", "ralston", "heun3" or a tableau whose stages come one after the other in time.
        num_steps: steps of that method; evaluations are as many times its stages.
        t0: first time.
        t1: last time.

    Returns:
        `LearnedSolver` with n = `num_steps` times the number of stages.

    Raises:
        ValueError: if the method is unknown or evaluates twice at one time, as "heun" does.

    Example:
        >>> from_method("midpoint", 2).own_times
        Array([0.  , 0.25, 0.5 , 0.75, 1.  ], dtype=float32)
    """
    method = tableau(method)
    if not all(c < c_next for c, c_next in zip(method.c, (*method.c[1:], 1.0), strict=True)):
        raise ValueError(f"The stages of the method must come one after the other before the end, got c = {method.c}.")
    stages = method.stages
    uniform(num_steps, t0, t1)  # refuses what is not a grid
    n, h = num_steps * stages, (t1 - t0) / num_steps
    times = np.append((t0 + h * (np.arange(num_steps)[:, None] + np.array(method.c))).ravel(), t1)
    b = np.zeros((n, n))
    for i in range(n):
        step, stage = divmod(i + 1, stages)  # row i leads to evaluation i + 1, or to the end
        b[i, : step * stages] = h * np.tile(method.b, step)
        if stage:
            b[i, step * stages : i + 1] = h * np.array(method.a[stage])
    log_steps = np.log(np.diff(times) / (t1 - t0))
    return LearnedSolver(jnp.asarray(log_steps), jnp.ones(n), jnp.asarray(b), jnp.array([t0, t1], dtype=float))


def start_for(num_evaluations: int, t0: float = 0.0, t1: float = 1.0) -> LearnedSolver:
    """Where to start training a solver with so many evaluations: the midpoint rule, Euler's method if it is odd."""
    check_integer("num_evaluations", num_evaluations)
    if num_evaluations % 2 == 0:
        return from_method("midpoint", num_evaluations // 2, t0, t1)
    return from_method("euler", num_evaluations, t0, t1)


def log_error(x: State, x1: State) -> Scalar:
    """The mean over examples of the logarithm of the mean squared difference of two batches."""
    check_same_shape(x=x, x1=x1)
    check_real("x", x)
    check_real("x1", x1)
    error = mean_over_event((x - x1) ** 2)
    return jnp.log(jnp.maximum(error, jnp.finfo(error.dtype).tiny)).mean()


def loss(v: VelocityFn, solver: LearnedSolver, x0: State, x1: State) -> Scalar:
    """The mean over examples of the logarithm of the mean squared error, which is minus the PSNR up to a constant.

    Args:
        v: velocity function.
        solver: to be trained.
        x0: states at the first time.
        x1: where a fine solution starting from `x0` ends.

    Returns:
        Times 10 / ln 10 it is in decibels.

    References:
        Shaul et al. 2024 (arXiv:2403.01329).
    """
    check_has("solver", solver, ("own_times",), "a LearnedSolver, as from from_method")
    check_same_shape(x0=x0, x1=x1)
    return log_error(sample(v, x0, solver).x, x1)


def decibels(log_error: Elementwise, peak: float = 2.0) -> Elementwise:
    """The peak signal-to-noise ratio in dB that a `log_error` stands for, for data with values `peak` apart."""
    if not isinstance(log_error, int | float):
        check_real("log_error", log_error)
    check_number("peak", peak, "(0, inf)")
    return 10 / math.log(10) * (2 * math.log(peak) - log_error)
