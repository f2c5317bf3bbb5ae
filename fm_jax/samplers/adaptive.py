"""Adaptive step sizes, by Diffrax, with exact counts of network evaluations."""

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.nfe import nfe_per_call
from fm_jax.samplers.grids import check_ends, check_state
from fm_jax.types import Array, ArrayTree, Solution, VelocityFn, check_member

if TYPE_CHECKING:
    import diffrax

EXPLICIT = {"tsit5": "Tsit5", "dopri5": "Dopri5", "dopri8": "Dopri8", "bosh3": "Bosh3", "heun": "Heun"}
IMPLICIT = {"kvaerno3": "Kvaerno3", "kvaerno5": "Kvaerno5"}
SOLVERS = EXPLICIT | IMPLICIT
_EXAMPLE_AXIS = "fm_jax_example"
_FIRST_STEP_NFE = 2


def import_diffrax(caller: str) -> Any:
    """Diffrax, which is slow to import and so waits until it is needed; `ImportError` names the caller."""
    try:
        import diffrax
    except ImportError as error:
        raise ImportError(f"{caller} needs Diffrax: pip install diffrax.") from error
    return diffrax


def check_tolerances(rtol: float | None, atol: float | None, max_steps: int) -> None:
    """Raises `ValueError` unless adaptive steps can be taken with these."""
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is None or not (math.isfinite(tolerance) and tolerance >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {tolerance}.")
    if rtol == 0 and atol == 0:
        raise ValueError("rtol and atol must not both be 0.")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps}.")


@functools.cache
def _counting_controller() -> type:
    """A PID controller that counts network evaluations; a class made on demand, since importing Diffrax is slow."""
    import diffrax
    import equinox as eqx

    class CountingController(diffrax.AbstractAdaptiveStepSizeController):
        rtol: float
        atol: float
        norm: Any
        pid: diffrax.PIDController
        tableau: diffrax.ButcherTableau = eqx.field(static=True)

        def wrap(self, direction):
            return self

        def init(self, *args):
            t_next, state = self.pid.init(*args)
            return t_next, (state, jnp.asarray(_FIRST_STEP_NFE), jnp.asarray(False))

        def adapt_step_size(self, t0, t1, y0, y1, args, y_error, error_order, controller_state):
            state, nfe, started = controller_state
            keep, *rest, state, result = self.pid.adapt_step_size(t0, t1, y0, y1, args, y_error, error_order, state)
            # "First same as last" saves one stage a step, but only once a step has been accepted.
            saved = started if self.tableau.fsal else 0
            return keep, *rest, (state, nfe + self.tableau.num_stages - saved, started | keep), result

    return CountingController


def _solver(solver: "str | diffrax.AbstractRungeKutta | None") -> "diffrax.AbstractRungeKutta":
    if isinstance(solver, str):
        check_member("solver", solver, tuple(SOLVERS))
    diffrax = import_diffrax("sample_adaptive")
    if solver is None or isinstance(solver, str):
        return getattr(diffrax, SOLVERS[solver or "tsit5"])()
    if not isinstance(solver, diffrax.AbstractRungeKutta):
        raise ValueError(f"solver must be a name or a Runge-Kutta solver of Diffrax, got {solver!r}.")
    return solver


def _check_times(times: ArrayTree, t0: float, t1: float) -> None:
    if np.ndim(times) != 1 or np.shape(times)[0] < 1:
        raise ValueError(f"times must be [num_times], got shape {np.shape(times)}.")
    if isinstance(times, jax.core.Tracer):
        return
    elapsed = (np.asarray(times, dtype=float) - t0) * np.sign(t1 - t0)
    if not ((elapsed >= 0).all() and (elapsed <= abs(t1 - t0)).all() and (np.diff(elapsed) >= 0).all()):
        raise ValueError(f"times must run from t0 = {t0} towards t1 = {t1}, got {times}.")


def _rms(x: Array) -> Array:
    return jnp.sqrt(jnp.mean(x**2))


def _first_step(v: VelocityFn, t0: Array, t1: Array, x0: Array, rtol: float, atol: float, order: int) -> Array:
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


def sample_adaptive(
    v: VelocityFn,
    x0: Array,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    solver: "str | diffrax.AbstractRungeKutta | None" = None,
    t0: float = 0.0,
    t1: float = 1.0,
    per_sample: bool = False,
    max_steps: int = 4096,
    times: ArrayTree | None = None,
    adjoint: "diffrax.AbstractAdjoint | None" = None,
) -> Solution:
    """The solution of dx/dt = v(t, x) with step sizes that keep the local error below `atol + rtol |x|`.

    By default the whole batch takes the same steps, chosen by the root mean square of the error over the batch; what
    an example gets then depends a little on its company. With `per_sample` each example has its own steps, and `v` is
    still called once for the whole batch, with t [batch], until the last example is done.

    Reverse mode works by default; forward mode needs `adjoint=diffrax.ForwardMode()`. The times have the precision of
    `x0`: steps near 1e-7 need float64. Wrap calls in `jax.jit`.

    Args:
        v: velocity function; t is a scalar, or [batch] with `per_sample`.
        x0: [batch, ...] at `t0`, float32 or float64.
        rtol: relative tolerance.
        atol: absolute tolerance.
        solver: explicit, "tsit5" (the same as `None`), "dopri5", "dopri8", "bosh3" or "heun"; implicit, for stiff
            fields in few dimensions, "kvaerno3" or "kvaerno5", which need `per_sample`; or such a solver of Diffrax.
        t0: where `x0` is.
        t1: where to go. `t1 < t0` runs backward, from data to noise.
        per_sample: one step size an example instead of one for the batch.
        max_steps: most steps, accepted and rejected together.
        times: [num_times], from `t0` towards `t1`, at which the trajectory is wanted, by interpolation.
        adjoint: how to differentiate, see Diffrax; by default `RecursiveCheckpointAdjoint`, and `DirectAdjoint` with
            `per_sample`.

    Returns:
        `Solution`: x [batch, ...] at `t1`; nfe, all evaluations including those for rejected steps and for the first
        step size, a scalar or [batch] with `per_sample`; NaN for an implicit solver, whose Newton iterations Diffrax
        does not report; trajectory [num_times, batch, ...] if `times` is given.

    Raises:
        ValueError: for bad tolerances, solver, times or state.
        ImportError: if Diffrax is missing.
        RuntimeError: from Diffrax, when run, if `max_steps` is not enough. Raise it or loosen the tolerances; if steps
            become tiny near one end, the velocity is singular there: stop short of it.

    Example:
        >>> solution = sample_adaptive(lambda t, x: x, jnp.ones((1, 1)))
        >>> float(abs(solution.x[0, 0] - jnp.e)) < 1e-4, int(solution.nfe)
        (True, 27)
    """
    check_tolerances(rtol, atol, max_steps)
    check_ends(t0, t1)
    x0 = jnp.asarray(x0)
    check_state(x0)
    if x0.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"x0 must be float32 or float64, whose rounding an error estimate can see through, got {x0.dtype}."
        )
    if times is not None:
        _check_times(times, t0, t1)
    solver = _solver(solver)
    import diffrax

    implicit = not isinstance(solver, diffrax.AbstractERK)
    if implicit and not per_sample:
        raise ValueError(
            "An implicit solver needs per_sample=True: a Jacobian over the whole batch would be too large."
        )

    pid = diffrax.PIDController(rtol, atol)
    controller = _counting_controller()(rtol, atol, pid.norm, pid, solver.tableau)
    saveat = diffrax.SaveAt(
        t1=True, ts=None if times is None else jnp.asarray(times, dtype=x0.dtype), controller_state=True
    )

    # Recursive checkpointing is a custom_vjp, whose backward pass does not know the axis that is gathered over below.
    default_adjoint = diffrax.DirectAdjoint() if per_sample else diffrax.RecursiveCheckpointAdjoint()

    def velocity(t: Array, x: Array) -> Array:
        value = v(t, x)
        if value.shape != x.shape:
            raise ValueError(f"v(t, x) must have the shape of x, {x.shape}, got {value.shape}.")
        return value.astype(x.dtype)

    def velocity_of_one(t: Array, x: Array) -> Array:
        # Gathering under vmap hands `v` the true batch, in order, so that a condition it has closed over lines up.
        batch_t, batch_x = jax.lax.all_gather((t, x), _EXAMPLE_AXIS)
        return velocity(batch_t, batch_x)[jax.lax.axis_index(_EXAMPLE_AXIS)]

    def solve(x: Array) -> tuple[Array, Array]:
        field = velocity_of_one if per_sample else velocity
        start, end = jnp.asarray(t0, dtype=x.dtype), jnp.asarray(t1, dtype=x.dtype)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, _: field(jnp.asarray(t), x)),
            solver,
            t0=start,
            t1=end,
            dt0=_first_step(field, start, end, x, rtol, atol, solver.order(None) or 1),
            y0=x,
            saveat=saveat,
            stepsize_controller=controller,
            adjoint=default_adjoint if adjoint is None else adjoint,
            max_steps=max_steps,
        )
        return solution.ys, solution.controller_state[1]

    if per_sample:
        solve = jax.vmap(solve, axis_name=_EXAMPLE_AXIS, out_axes=(1, 0))
    states, nfe = solve(x0)
    nfe = jnp.full(nfe.shape, jnp.nan) if implicit else nfe * nfe_per_call(v)
    return Solution(states[-1], nfe, None if times is None else states[:-1])
