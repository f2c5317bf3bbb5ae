"""The SDEs that share their marginals with the flow, by Diffrax's solvers for additive noise, fixed or adaptive."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_member, check_setting, check_times, check_tolerances, imported
from fm_jax.nfe import spent
from fm_jax.samplers.adaptive import or_raise, watching_controller
from fm_jax.samplers.levels import range_of
from fm_jax.samplers.sde import (
    ScoreFn,
    check_score_at_start,
    check_sde,
    diffusion_fn,
    drift_fn,
    functions,
    noise_of,
)
from fm_jax.types import Array, ArrayTree, Diffusion, Key, Schedule, Solution, State, VelocityFn


class Solver(NamedTuple):
    """A Diffrax solver: its class, weak order, drift evaluations a step, and whether it estimates its error."""

    name: str
    order: int
    stages: int
    adaptive: bool


SOLVERS = {
    "sea": Solver("SEA", order=1, stages=1, adaptive=False),
    "shark": Solver("ShARK", order=2, stages=2, adaptive=True),
    "sra1": Solver("SRA1", order=2, stages=2, adaptive=True),
}
"""Those for additive noise; they never evaluate the drift at the end of a step, where the score may be infinite."""

FIRST_STEP, FINEST_STEP = 1e-2, 2.0**-14
"""Of adaptive steps, as fractions of the time span: the first one tried, and the resolution of the Brownian path."""


@dataclass(frozen=True)
class DiffraxSDE:
    """The SDE of `EulerMaruyama` by Diffrax's solvers for additive noise: with fixed steps, or with adaptive ones.

    | solver | evaluations a step | strong order | weak order | adaptive |
    |---|---|---|---|---|
    | "sea" | 1 | 1 | 1 | no |
    | "shark", "sra1" | 2 | 1.5 | 2 | yes |

    Adaptive steps, the same for the whole batch, keep the root mean square over the batch of the local error below
    `atol + rtol |x|`; what an example gets then depends a little on its company, and there is no trajectory.

    The Brownian path is a function of the key alone, down to a resolution in time of `tol`: solves with different steps
    or solvers and the same `tol` follow the same path.

    The drift is never evaluated at the last time, where the score may be infinite. Near a time with sigma = 0 it grows
    as 1 / sigma, unless g vanishes there, and adaptive steps become very short: end at 0.999, say. g must be finite
    also at the last time, and the state float32 or float64.

    Notebooks: (2.2), (4.7).

    Attributes:
        schedule: as in `EulerMaruyama`, as the next two.
        diffusion: g.
        score: in place of a schedule.
        solver: "sea", "shark" or "sra1". Diffrax's others are for noise that depends on X: for this SDE Euler,
            EulerHeun and ItoMilstein are the Euler-Maruyama method, less accurate than SEA at its price, and SPaRK and
            GeneralShARK are dearer than ShARK.
        rtol: relative tolerance of adaptive steps, `None` for fixed ones; goes with `atol`. 1e-2 or 1e-3 is usual.
        atol: absolute tolerance.
        tol: resolution in time of the Brownian path: below all steps. By default half the shortest fixed step, or 2^-14
            of the time span for adaptive steps.
        max_steps: most adaptive steps, accepted and rejected together.

    Raises:
        ValueError: for bad coefficients or tolerances, or tolerances for a solver without an error estimate; from
            `sample`, for a state in low precision, or a start where the score by `schedule` is infinite.
        ImportError: from `sample`, if Diffrax is missing.
        RuntimeError: from Diffrax, when run, if `max_steps` is not enough; of a velocity that is not finite, adaptive
            steps say so.

    References:
        Foster et al. 2023 (arXiv:2210.17543, eq. 5.8 for SEA and 6.1 for ShARK); Roessler 2010 (SIAM J. Numer. Anal.
        48(3)) for SRA1; Jelincic et al. 2024 (arXiv:2405.06464) for the Brownian path.
    """

    schedule: Schedule | None = None
    diffusion: Diffusion | None = None
    score: ScoreFn | None = None
    solver: str = "shark"
    rtol: float | None = None
    atol: float | None = None
    tol: float | None = None
    max_steps: int = 4096
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_member("solver", self.solver, tuple(SOLVERS))
        check_sde(self.schedule, self.diffusion, self.score)
        if self.tol is not None:
            check_setting(self, "tol", "(0, inf)")
        check_integer("max_steps", self.max_steps)
        if self.adaptive:
            check_tolerances(self.rtol, self.atol, self.max_steps)
            if not SOLVERS[self.solver].adaptive:
                able = ", ".join(repr(name) for name, each in SOLVERS.items() if each.adaptive)
                raise ValueError(
                    f"Adaptive steps need a solver with an error estimate, {able}; {self.solver!r} has none."
                )

    @property
    def adaptive(self) -> bool:
        """Whether the steps are chosen by tolerances."""
        return self.rtol is not None or self.atol is not None

    @property
    def order(self) -> int:
        return SOLVERS[self.solver].order

    @property
    def nfe_per_step(self) -> int | None:
        return None if self.adaptive else SOLVERS[self.solver].stages * (1 if self.score is None else 2)

    @property
    def domain(self) -> tuple[float, float]:
        if self.schedule is None:
            return 0.0, 1.0
        first, last = range_of(self.schedule)
        return first, last if self.diffusion is not None else min(last, self.schedule.domain[1])

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return True

    def solve(self, v: VelocityFn, key: Key, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        if x0.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(f"x0 must be float32 or float64, as Diffrax's Brownian path, got {x0.dtype}.")
        if self.adaptive and trajectory:
            raise ValueError("trajectory needs fixed steps: adaptive ones are not known beforehand.")
        if self.schedule is not None:
            check_score_at_start(self.schedule, times)
            if self.diffusion is None:  # Diffrax asks for g at the last time too
                check_times("times", times, self.schedule.domain, f"the domain of {self.schedule}, where g is finite")
        diffrax, lineax = imported("diffrax", "DiffraxSDE"), imported("lineax", "DiffraxSDE")
        times = jnp.asarray(times)
        if self.adaptive:
            times = times[jnp.array([0, -1])]

        # In the time since the start, in which a Brownian path always runs forward.
        direction = jnp.sign(times[-1] - times[0])
        elapsed = jnp.abs(times - times[0])
        diffusion = noise_of(self.schedule, self.diffusion)
        drift, g = drift_fn(v, self.score, diffusion, schedule=self.schedule), diffusion_fn(diffusion)
        # Of the increments of the path: under pmap their structure says so, and lineax compares all of it.
        increment = jax.eval_shape(lambda: jax.random.normal(key, x0.shape, x0.dtype))
        identity = lineax.IdentityLinearOperator(increment)

        def time(since: Array) -> Array:
            # Rounding must not go past the end: g may not exist there.
            return jnp.clip(times[0] + direction * since, times.min(), times.max())

        if self.adaptive:
            # PI coefficients that Diffrax's documentation recommends for SDEs.
            pid = diffrax.PIDController(self.rtol, self.atol, pcoeff=0.1, icoeff=0.3)
            stages = SOLVERS[self.solver].stages
            controller = watching_controller()(self.rtol, self.atol, pid.norm, pid, stages, False)
            dt0, finest, max_steps = FIRST_STEP * elapsed[-1], FINEST_STEP * elapsed[-1], self.max_steps
        else:
            controller, max_steps = diffrax.StepTo(elapsed), len(times) - 1
            dt0, finest = None, jnp.min(jnp.diff(elapsed)) / 2
        brownian = diffrax.VirtualBrownianTree(
            jnp.zeros_like(elapsed[-1]),
            elapsed[-1],
            finest if self.tol is None else self.tol,
            jax.ShapeDtypeStruct(x0.shape, x0.dtype),
            key,
            diffrax.SpaceTimeLevyArea,
        )
        solution = diffrax.diffeqsolve(
            diffrax.MultiTerm(
                diffrax.ODETerm(lambda s, x, _: (direction * drift(time(s), x, direction)).astype(x.dtype)),
                diffrax.ControlTerm(lambda s, x, _: g(time(s)) * identity, brownian),
            ),
            getattr(diffrax, SOLVERS[self.solver].name)(),
            t0=jnp.zeros_like(elapsed[-1]),
            t1=elapsed[-1],
            dt0=dt0,
            y0=x0,
            saveat=diffrax.SaveAt(t0=trajectory, t1=not trajectory, steps=trajectory, controller_state=self.adaptive),
            stepsize_controller=controller,
            max_steps=max_steps,
            throw=not self.adaptive,
        )
        states = or_raise(solution.ys, solution) if self.adaptive else solution.ys
        counts = spent(solution.stats["num_steps"] * SOLVERS[self.solver].stages, *functions(v, self.score))
        return Solution(states[-1], *counts, states if trajectory else None)
