"""Explicit Runge-Kutta methods on a fixed time grid."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from fm_jax.checks import check_finite, check_integer, check_member, check_shape, check_state, check_velocity, shown
from fm_jax.manifolds import check_manifold
from fm_jax.nfe import spent
from fm_jax.samplers.loop import run_steps
from fm_jax.shapes import check_not_steps, expand_time, time_dtype
from fm_jax.types import Array, ArrayTree, Manifold, Solution, State, Time, VelocityFn


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method, as its Butcher tableau.

    k_i = v(t + c_i h, x + h sum_{j < i} a_ij k_j), and the step is x + h sum_i b_i k_i (Hairer, Norsett & Wanner 1993,
    Solving Ordinary Differential Equations I, II.1).

    Raises:
        ValueError: if the sizes do not fit, `b` does not sum to 1 or a row of `a` does not sum to its `c`.
    """

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __post_init__(self) -> None:
        check_integer("order", self.order)
        if not isinstance(self.a, tuple) or not all(isinstance(row, tuple) for row in (*self.a, self.b, self.c)):
            raise ValueError(f"a, b and c must be tuples, a of rows, got {shown((self.a, self.b, self.c))}.")
        check_finite("a", [each for row in self.a for each in row])
        check_finite("b", self.b)
        check_finite("c", self.c)
        rows = [len(row) for row in self.a]
        if not rows or rows != list(range(len(self.b))) or len(self.c) != len(self.b):
            raise ValueError(f"a must have rows of 0, 1, 2, ... entries, as many as b and c, got {rows}.")
        sums = [*(sum(row) - c for row, c in zip(self.a, self.c, strict=True)), sum(self.b) - 1]
        if max(map(abs, sums)) > 1e-12:
            raise ValueError("b must sum to 1 and each row of a to its c.")

    @property
    def stages(self) -> int:
        return len(self.b)


TABLEAUX = {
    "euler": Tableau(order=1, a=((),), b=(1.0,), c=(0.0,)),
    "midpoint": Tableau(order=2, a=((), (0.5,)), b=(0.0, 1.0), c=(0.0, 0.5)),
    "heun": Tableau(order=2, a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0)),
    "ralston": Tableau(order=2, a=((), (2 / 3,)), b=(1 / 4, 3 / 4), c=(0.0, 2 / 3)),
    "heun3": Tableau(order=3, a=((), (1 / 3,), (0.0, 2 / 3)), b=(1 / 4, 0.0, 3 / 4), c=(0.0, 1 / 3, 2 / 3)),
    "rk4": Tableau(
        order=4,
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0.0, 0.5, 0.5, 1.0),
    ),
}


def tableau(method: str | Tableau) -> Tableau:
    """The tableau of that name, or the tableau itself; raises `ValueError` for an unknown name."""
    if isinstance(method, Tableau):
        return method
    check_member("method", method, tuple(TABLEAUX))
    return TABLEAUX[method]


def _weighted(weights: tuple[float, ...], values: list[Array]) -> Array:
    first, *rest = (w * k for w, k in zip(weights, values, strict=True) if w != 0)
    return sum(rest, first)


def evaluate(v: VelocityFn, t: Time, x: State) -> State:
    """`v(t, x)`; raises `ValueError` if it has another shape than `x`."""
    velocity = v(t, x)
    check_shape("v(t, x)", velocity, x)
    return velocity


def ode_step(
    v: VelocityFn,
    t: Time,
    t_next: Time,
    x: State,
    method: str | Tableau = "midpoint",
    *,
    first: State | None = None,
    manifold: Manifold | None = None,
) -> State:
    """One step of dx/dt = v(t, x) from `t` to `t_next`.

    On a manifold it is the step of the method in normal coordinates at x, `x_next = exp_x(h sum_i b_i k_i)` with
    `k_i = d log_x(v_i)` at the point of the stage: of the same order, and it stays on the manifold.

    For callers that dispatch steps one by one: on CPU, XLA runs convolutions 1.5 times slower inside a loop.

    Notebooks: (1.4), (15.5).

    Args:
        v: velocity function.
        t: time of `x`.
        t_next: in the shape of `t`, after or before it.
        x: the state.
        method: "euler", "midpoint", "heun", "ralston", "heun3", "rk4" or a tableau.
        first: `v(t, x)`, the first stage of every method, where it is already known.
        manifold: where x is; the velocities are projected onto its tangent spaces.

    Returns:
        The state at `t_next`, in the dtype of `x`.

    Raises:
        ValueError: if the method is unknown, or `v` returns another shape than that of `x`.

    Example:
        >>> ode_step(lambda t, x: x, 0.0, 1.0, jnp.ones((1, 1)), "rk4")
        Array([[2.7083335]], dtype=float32)
    """
    check_velocity(v)
    check_state(x, "x")
    method = tableau(method)
    t, t_next = step_times(t, t_next, x)
    h = expand_time(t_next - t, x)
    if first is not None:
        check_shape("first", first, x)
    stages = [evaluate(v, t, x) if first is None else first]
    if manifold is None:
        moved = lambda by: (x + by).astype(x.dtype)  # noqa: E731
    else:
        stages = [manifold.tangent(x, stages[0])]
        moved = lambda by: manifold.exp(x, by.astype(x.dtype))  # noqa: E731
    for a, c in zip(method.a[1:], method.c[1:], strict=True):
        y = moved(h * _weighted(a, stages))
        # In this form c = 1 is exactly t_next, so that rounding never goes past the end.
        k = evaluate(v, (1 - c) * t + c * t_next, y)
        if manifold is not None:
            k = jax.jvp(functools.partial(manifold.log, x), (y,), (manifold.tangent(y, k.astype(x.dtype)),))[1]
        stages.append(k)
    return moved(h * _weighted(method.b, stages))


def step_times(t: Time | float, t_next: Time | float, x: State) -> tuple[Array, Array]:
    """Both ends of a step in `time_dtype(x)`; raises `ValueError` unless each is a scalar or [batch]."""
    ends: dict[str, Any] = {"t": t, "t_next": t_next}
    for name, each in ends.items():
        expand_time(each, x, name)
    return jnp.asarray(t, dtype=time_dtype(x)), jnp.asarray(t_next, dtype=time_dtype(x))


def path_times(t: Time | float, t_next: Time | float, x: State) -> tuple[Array, Array]:
    """`step_times` of a step along a path; raises `ValueError` for numbers of steps too."""
    check_not_steps("t", t)
    check_not_steps("t_next", t_next)
    return step_times(t, t_next, x)


@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method for the flow dx/dt = v(t, x), the probability flow of a diffusion.

    Notebooks: (1.1), (1.4).

    Attributes:
        method: "euler", "midpoint", "heun", "ralston", "heun3", "rk4" or a tableau. They cost 1, 2, 2, 2, 3 and 4
            evaluations a step.
        manifold: where the state is, and stays; `None` is R^n, for states of any shape. `manifolds.Sphere(2)` and the
            like follow the projection of the velocity onto their tangent spaces.

    Raises:
        ValueError: if the method is unknown, or for what is no manifold; from `sample`, for states off it.

    Example:
        >>> from fm_jax.samplers import sample
        >>> solution = sample(lambda t, x: x, jnp.ones((1, 1)), RungeKutta("rk4"), times=10)
        >>> float(abs(solution.x[0, 0] - jnp.e)) < 1e-5, int(solution.calls)
        (True, 40)
    """

    method: str | Tableau = "midpoint"
    manifold: Manifold | None = None
    stochastic: ClassVar[bool] = False
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        tableau(self.method)
        if self.manifold is not None:
            check_manifold(self.manifold)

    @property
    def order(self) -> int:
        return tableau(self.method).order

    @property
    def nfe_per_step(self) -> int:
        return tableau(self.method).stages

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return max(tableau(self.method).c) < 1

    def solve(self, v: VelocityFn, key: None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        if self.manifold is not None:
            self.manifold.check("x0", x0)

        def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
            return ode_step(v, t, t_next, x, self.method, manifold=self.manifold), memory

        return run_steps(step, x0, times, spent((len(times) - 1) * self.nfe_per_step, v), trajectory=trajectory)
