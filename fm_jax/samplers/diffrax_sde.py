"""The SDEs that share their marginals with the flow, by Diffrax's solvers for additive noise, fixed or adaptive."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.nfe import nfe_per_call
from fm_jax.samplers.adaptive import check_tolerances, import_diffrax
from fm_jax.samplers.grids import check_ends, check_state, time_dtype, time_grid
from fm_jax.samplers.loop import check_key
from fm_jax.samplers.sde import (
    ScoreFn,
    check_diffusion,
    check_one_score,
    check_start,
    diffusion_fn,
    drift_fn,
)
from fm_jax.types import Array, ArrayTree, Diffusion, Key, Schedule, Solution, VelocityFn, check_member


class Solver(NamedTuple):
    """A Diffrax solver: its class, the evaluations of the drift in a step, and whether it estimates its error."""

    name: str
    stages: int
    adaptive: bool


SOLVERS = {
    "sea": Solver("SEA", stages=1, adaptive=False),
    "shark": Solver("ShARK", stages=2, adaptive=True),
    "sra1": Solver("SRA1", stages=2, adaptive=True),
}
"""Those for additive noise; they never evaluate the drift at the end of a step, where the score may be infinite."""

FIRST_STEP, FINEST_STEP = 1e-2, 2.0**-14
"""Of adaptive steps, as fractions of the time span: the first one tried, and the resolution of the Brownian path."""


def sample_sde_diffrax(
    v: VelocityFn,
    score: ScoreFn | None,
    diffusion: Diffusion,
    key: Key,
    x0: Array,
    *,
    schedule: Schedule | None = None,
    solver: str = "shark",
    num_steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    grid: ArrayTree | None = None,
    trajectory: bool = False,
    max_steps: int = 4096,
    tol: float | None = None,
) -> Solution:
    """A sample of the SDE of `sample_sde` by Diffrax: on a fixed grid, or with adaptive step sizes.

    | solver | evaluations a step | strong order | adaptive |
    |---|---|---|---|
    | "sea" | 1 | 1 | no |
    | "shark", "sra1" | 2 | 1.5 | yes |

    Adaptive steps, the same for the whole batch, keep the root mean square over the batch of the local error below
    `atol + rtol |x|`; what an example gets then depends a little on its company.

    The Brownian path is a function of `key` alone, down to a resolution in time of `tol`: solves with different steps
    or solvers and the same `tol` follow the same path.

    The drift is never evaluated at `t1`, where the score may be infinite. Near a time with sigma = 0 it grows as
    1 / sigma, unless g vanishes there, and adaptive steps become very short: end at t1 = 0.999, say.

    Args:
        v: velocity function; called with a scalar t in the dtype of `x0`.
        score: `score(t, x)`, one more evaluation each time; or `None`, which takes it from the same evaluation of `v`.
        diffusion: g, a number or a function of a scalar time, finite also at `t1`.
        key: typed key.
        x0: [batch, ...] at `t0`, float32 or float64.
        schedule: of the affine path with a standard normal source that `v` belongs to; needed where `score` is `None`.
        solver: "sea", "shark" or "sra1". Diffrax's others are for noise that depends on X: for this SDE Euler,
            EulerHeun and ItoMilstein are the Euler-Maruyama method of `sample_sde`, less accurate than SEA at its
            price, and SPaRK and GeneralShARK are dearer than ShARK.
        num_steps: for equal steps from `t0` to `t1`; either this, or `grid`, or tolerances.
        rtol: relative tolerance of adaptive steps; goes with `atol`. 1e-2 or 1e-3 is usual for an SDE.
        atol: absolute tolerance.
        t0: where `x0` is. Where sigma is not 0, if the score is taken by `schedule`.
        t1: where to go. `t1 < t0` runs backward, from data to noise.
        grid: times [num_steps + 1], strictly monotone in either direction.
        trajectory: whether to keep the states at all times of a fixed grid.
        max_steps: most adaptive steps, accepted and rejected together.
        tol: resolution in time of the Brownian path: below all steps. By default half the shortest step of the grid, or
            2^-14 of the time span for adaptive steps.

    Returns:
        `Solution`: x [batch, ...] at the end; nfe, a scalar, with the evaluations of rejected steps; trajectory
        [num_steps + 1, batch, ...] if asked for.

    Raises:
        ValueError: for bad coefficients, times, tolerances, state or key; a solver without an error estimate and
            tolerances; or a start where the score by `schedule` is infinite.
        ImportError: if Diffrax is missing.
        RuntimeError: from Diffrax, when run, if `max_steps` is not enough.

    References:
        Foster et al. 2023 (arXiv:2210.17543, eq. 5.8 for SEA and 6.1 for ShARK); Roessler 2010 (SIAM J. Numer. Anal.
        48(3)) for SRA1; Jelincic et al. 2024 (arXiv:2405.06464) for the Brownian path.
    """
    check_member("solver", solver, tuple(SOLVERS))
    check_one_score(score, schedule)
    check_diffusion(diffusion)
    check_key(key)
    x0 = jnp.asarray(x0)
    check_state(x0)
    if x0.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"x0 must be float32 or float64, as Diffrax's Brownian path, got {x0.dtype}.")
    if tol is not None and not (math.isfinite(tol) and tol > 0):
        raise ValueError(f"tol must be finite and positive, got {tol}.")
    adaptive = _check_steps(solver, num_steps, grid, rtol, atol, trajectory, max_steps)
    if adaptive:
        check_ends(t0, t1)
        times = jnp.asarray([t0, t1], dtype=time_dtype(x0))
    else:
        times = time_grid(num_steps, grid, t0, t1, x0)
    if schedule is not None:
        check_start(schedule, t0, grid)
    diffrax = import_diffrax("sample_sde_diffrax")
    import lineax

    # In the time since the start, in which a Brownian path always runs forward.
    direction = jnp.sign(times[-1] - times[0])
    elapsed = jnp.abs(times - times[0])
    drift, g = drift_fn(v, score, diffusion, schedule=schedule), diffusion_fn(diffusion)
    identity = lineax.IdentityLinearOperator(jax.ShapeDtypeStruct(x0.shape, x0.dtype))

    def time(since: Array) -> Array:
        # Rounding must not go past the end: g may not exist there.
        return jnp.clip(times[0] + direction * since, times.min(), times.max())

    if adaptive:
        # PI coefficients that Diffrax's documentation recommends for SDEs.
        controller = diffrax.PIDController(rtol, atol, pcoeff=0.1, icoeff=0.3)
        dt0, finest = FIRST_STEP * elapsed[-1], FINEST_STEP * elapsed[-1]
    else:
        controller, max_steps = diffrax.StepTo(elapsed), len(times) - 1
        dt0, finest = None, jnp.min(jnp.diff(elapsed)) / 2
    brownian = diffrax.VirtualBrownianTree(
        jnp.zeros_like(elapsed[-1]),
        elapsed[-1],
        finest if tol is None else tol,
        jax.ShapeDtypeStruct(x0.shape, x0.dtype),
        key,
        diffrax.SpaceTimeLevyArea,
    )
    solution = diffrax.diffeqsolve(
        diffrax.MultiTerm(
            diffrax.ODETerm(lambda s, x, _: (direction * drift(time(s), x, direction)).astype(x.dtype)),
            diffrax.ControlTerm(lambda s, x, _: g(time(s)) * identity, brownian),
        ),
        getattr(diffrax, SOLVERS[solver].name)(),
        t0=jnp.zeros_like(elapsed[-1]),
        t1=elapsed[-1],
        dt0=dt0,
        y0=x0,
        saveat=diffrax.SaveAt(t0=True, steps=True) if trajectory else diffrax.SaveAt(t1=True),
        stepsize_controller=controller,
        max_steps=max_steps,
    )
    nfe_each = SOLVERS[solver].stages * (nfe_per_call(v) + (0 if score is None else nfe_per_call(score)))
    nfe = solution.stats["num_steps"] * nfe_each
    return Solution(solution.ys[-1], nfe, solution.ys if trajectory else None)


def _check_steps(
    solver: str,
    num_steps: int | None,
    grid: ArrayTree | None,
    rtol: float | None,
    atol: float | None,
    trajectory: bool,
    max_steps: int,
) -> bool:
    """Whether steps are adaptive; raises `ValueError` unless the arguments agree on that."""
    adaptive = rtol is not None or atol is not None
    if adaptive == (num_steps is not None or grid is not None):
        raise ValueError("Either num_steps or grid must be given (fixed steps), or rtol and atol (adaptive steps).")
    if not adaptive:
        return False
    check_tolerances(rtol, atol, max_steps)
    if not SOLVERS[solver].adaptive:
        able = ", ".join(repr(name) for name, each in SOLVERS.items() if each.adaptive)
        raise ValueError(f"Adaptive steps need a solver with an error estimate, {able}; {solver!r} has none.")
    if trajectory:
        raise ValueError("trajectory needs a fixed grid: adaptive steps are not known beforehand.")
    return True
