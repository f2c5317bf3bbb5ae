"""Adaptive step sizes, by Diffrax, with exact counts of network evaluations."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_has, check_member, check_shape, check_tolerances, imported
from fm_jax.nfe import spent
from fm_jax.types import Array, ArrayTree, Solution, State, Time, VelocityFn

if TYPE_CHECKING:
    import diffrax


class Solver(NamedTuple):
    """A solver of Diffrax: its class, its order, and whether its steps solve an equation by Newton's method."""

    name: str
    order: int
    implicit: bool = False


SOLVERS = {
    "tsit5": Solver("Tsit5", 5),
    "dopri5": Solver("Dopri5", 5),
    "dopri8": Solver("Dopri8", 8),
    "bosh3": Solver("Bosh3", 3),
    "heun": Solver("Heun", 2),
    "kvaerno3": Solver("Kvaerno3", 3, implicit=True),
    "kvaerno5": Solver("Kvaerno5", 5, implicit=True),
}
_EXAMPLE_AXIS = "fm_jax_example"
_FIRST_STEP_NFE = 2
NOT_FINITE = (
    "The velocity v(t, x) is not finite, or x0 is not: the error of the last step refused is NaN or infinite. Other "
    "tolerances and more steps change nothing. Look at the parameters of the network, and whether v is singular at "
    "one of the times."
)


@functools.cache
def watching_controller() -> type:
    """A PID controller that counts network evaluations, and knows whether the last refused step had a finite error.

    A class made on demand, since importing Diffrax is slow.
    """
    import diffrax
    import equinox as eqx

    class WatchingController(diffrax.AbstractAdaptiveStepSizeController):
        rtol: float
        atol: float
        norm: Any
        pid: diffrax.PIDController
        stages: int = eqx.field(static=True)
        fsal: bool = eqx.field(static=True)
        probe: Any = eqx.field(static=True, default=None)  # v, where Newton's method may fail and its error be infinite

        def wrap(self, direction):
            return self

        def init(self, *args):
            t_next, state = self.pid.init(*args)
            return t_next, (state, jnp.asarray(_FIRST_STEP_NFE), jnp.asarray(False), jnp.asarray(True))

        def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, controller_state):
            state, nfe, started, finite = controller_state
            keep, *rest, state, result = self.pid.adapt_step_size(t0, t1, y0, y1, args, y_error, error_order, state)
            # "First same as last" saves one stage a step, but only once a step has been accepted.
            saved = started if self.fsal else 0
            # Steps up to where the velocity ends are accepted, ever shorter ones: of the refused ones it is the last.
            asked = y_error if self.probe is None else self.probe(jnp.asarray(t1), y0)
            finite = jnp.where(keep, finite, jnp.isfinite(asked).all())
            return keep, *rest, (state, nfe + self.stages - saved, started | keep, finite), result

    return WatchingController


def or_raise(states: Array, solution: Any) -> Array:
    """The states of a solve by `watching_controller`; where it has failed, an error when run that says why."""
    diffrax, equinox = imported("diffrax", "Adaptive"), imported("equinox", "Adaptive")
    failed, finite = ~diffrax.is_okay(solution.result), solution.controller_state[3]
    states = equinox.error_if(states, failed & ~finite, NOT_FINITE)
    return solution.result.error_if(states, failed & finite)


def _rms(x: State) -> Array:
    return jnp.sqrt(jnp.mean(x**2))


def _first_step(v: VelocityFn, t0: Array, t1: Array, x0: State, rtol: float, atol: float, order: int) -> Array:
    """A guess of the first step size (Hairer, Norsett & Wanner 1993, Solving Ordinary Differential Equations I, II.4).

    Done here since Diffrax 0.7.2, asked for it, takes 0.01 whatever the equation.
    """
    span, scale = t1 - t0, atol + jnp.abs(x0) * rtol
    v0 = v(t0, x0)
    size, slope = _rms(x0 / scale), _rms(v0 / scale)
    tiny = (size < 1e-5) | (slope < 1e-5)
    h0 = jnp.where(tiny, 1e-6, 0.01 * size / jnp.where(tiny, 1, slope))
    h0 = jnp.minimum(h0, jnp.abs(span))
    v1 = v(t0 + jnp.sign(span) * h0, x0 + jnp.sign(span) * h0 * v0)
    steepest = jnp.maximum(slope, _rms((v1 - v0) / scale) / h0)
    flat = steepest <= 1e-15
    h1 = jnp.where(flat, jnp.maximum(1e-6, 1e-3 * h0), (0.01 / jnp.where(flat, 1, steepest)) ** (1 / order))
    return jax.lax.stop_gradient(jnp.sign(span) * jnp.minimum(jnp.minimum(100 * h0, h1), jnp.abs(span)))


@dataclass(frozen=True)
class Adaptive:
    """Step sizes that keep the local error of the flow below `atol + rtol |x|`, by Diffrax's Runge-Kutta solvers.

    By default the whole batch takes the same steps, chosen by the root mean square of the error over the batch; what an
    example gets then depends a little on its company. With `per_sample` each example has its own steps, and `v` is
    still called once for the whole batch, with t [batch], until the last example is done; calls are then [batch]. They
    count rejected steps and the choice of the first step size too, but not the Newton iterations of an implicit solver,
    which Diffrax does not report: `None`.

    Reverse mode works by default; forward mode needs `adjoint=diffrax.ForwardMode()`. The state must be float32 or
    float64, and the times have its precision: steps near 1e-7 need float64. A trajectory is interpolated.

    Attributes:
        solver: explicit, "tsit5", "dopri5", "dopri8", "bosh3" or "heun"; implicit, for stiff fields in few dimensions,
            "kvaerno3" or "kvaerno5", which need `per_sample` and do not run under `pmap`; or such a solver of Diffrax.
        rtol: relative tolerance.
        atol: absolute tolerance.
        per_sample: one step size an example instead of one for the batch.
        max_steps: most steps, accepted and rejected together.
        adjoint: how to differentiate, see Diffrax; by default `RecursiveCheckpointAdjoint`, and `DirectAdjoint` with
            `per_sample`.

    Raises:
        ValueError: for bad tolerances or an unknown solver; from `sample`, for a state in low precision.
        ImportError: from `sample`, if Diffrax is missing.
        RuntimeError: from Diffrax, when run, if `max_steps` is not enough. Raise it or loosen the tolerances; if steps
            become tiny near one end, the velocity is singular there: stop short of it. Of a velocity that is not finite
            it says so.

    Example:
        >>> from fm_jax.samplers import sample
        >>> solution = sample(lambda t, x: x, jnp.ones((1, 1)), Adaptive())
        >>> float(abs(solution.x[0, 0] - jnp.e)) < 1e-4, int(solution.calls)
        (True, 27)
    """

    solver: "str | diffrax.AbstractRungeKutta" = "tsit5"
    rtol: float = 1e-5
    atol: float = 1e-5
    per_sample: bool = False
    max_steps: int = 4096
    adjoint: "diffrax.AbstractAdjoint | None" = None
    nfe_per_step: ClassVar[None] = None
    stochastic: ClassVar[bool] = False
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if isinstance(self.solver, str):
            check_member("solver", self.solver, tuple(SOLVERS))
        elif not isinstance(self.solver, imported("diffrax", "Adaptive").AbstractRungeKutta):
            raise ValueError(f"solver must be a name or a Runge-Kutta solver of Diffrax, got {self.solver!r}.")
        check_tolerances(self.rtol, self.atol, self.max_steps)
        check_bool("per_sample", self.per_sample)
        if self.adjoint is not None:
            check_has("adjoint", self.adjoint, ("loop",), "an adjoint of Diffrax, such as DirectAdjoint()")
        if self.implicit and not self.per_sample:
            raise ValueError(
                "An implicit solver needs per_sample=True: a Jacobian over the whole batch would be too large."
            )

    @property
    def order(self) -> int | None:
        return SOLVERS[self.solver].order if isinstance(self.solver, str) else self.solver.order(None)  # type: ignore

    @property
    def implicit(self) -> bool:
        """Whether a step solves an equation."""
        if isinstance(self.solver, str):
            return SOLVERS[self.solver].implicit
        return not isinstance(self.solver, imported("diffrax", "Adaptive").AbstractERK)

    def loosened(self, factor: float) -> "Adaptive":
        """The same with both tolerances larger by a factor."""
        return dataclasses.replace(self, rtol=factor * self.rtol, atol=factor * self.atol)

    def solve(self, v: VelocityFn, key: None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        diffrax = imported("diffrax", "Adaptive")
        if x0.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"x0 must be float32 or float64, whose rounding an error estimate can see through, got {x0.dtype}."
            )
        solver: Any = getattr(diffrax, SOLVERS[self.solver].name)() if isinstance(self.solver, str) else self.solver
        pid = diffrax.PIDController(self.rtol, self.atol)
        tableau = solver.tableau
        times = jnp.asarray(times)
        saveat = diffrax.SaveAt(t1=True, ts=times if trajectory else None, controller_state=True)
        # Recursive checkpointing is a custom_vjp, whose backward pass does not know the axis gathered over below.
        default_adjoint = diffrax.DirectAdjoint() if self.per_sample else diffrax.RecursiveCheckpointAdjoint()

        def velocity(t: Time, x: State) -> Array:
            value = v(t, x)
            check_shape("v(t, x)", value, x)
            return value.astype(x.dtype)

        def velocity_of_one(t: Array, x: Array) -> Array:
            # Gathering under vmap hands `v` the true batch, in order, so that a condition it has closed over lines up.
            batch_t, batch_x = jax.lax.all_gather((t, x), _EXAMPLE_AXIS)
            return velocity(batch_t, batch_x)[jax.lax.axis_index(_EXAMPLE_AXIS)]

        def solve(x: Array) -> tuple[Array, Array]:
            field = velocity_of_one if self.per_sample else velocity
            controller = watching_controller()(
                self.rtol,
                self.atol,
                pid.norm,
                pid,
                tableau.num_stages,
                tableau.fsal,
                field if self.implicit else None,
            )
            start, end = times[0], times[-1]
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, x, _: field(jnp.asarray(t), x)),
                solver,
                t0=start,
                t1=end,
                dt0=_first_step(field, start, end, x, self.rtol, self.atol, solver.order(None) or 1),
                y0=x,
                saveat=saveat,
                stepsize_controller=controller,
                adjoint=default_adjoint if self.adjoint is None else self.adjoint,
                max_steps=self.max_steps,
                throw=False,
            )
            return or_raise(solution.ys, solution), solution.controller_state[1]

        if self.per_sample:
            solve = jax.vmap(solve, axis_name=_EXAMPLE_AXIS, out_axes=(1, 0))
        states, calls = solve(x0)
        counts: tuple[Array | None, Array | None] = (None, None) if self.implicit else spent(calls, v)
        return Solution(states[-1], *counts, states[:-1] if trajectory else None)
