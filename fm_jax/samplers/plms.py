"""PLMS, the pseudo linear multistep method: DDIM with a noise that is extrapolated from earlier steps."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_schedule
from fm_jax.nfe import spent
from fm_jax.samplers.levels import check_start, data_and_noise, levels, range_of
from fm_jax.samplers.loop import run_steps
from fm_jax.samplers.runge_kutta import evaluate
from fm_jax.shapes import time_dtype
from fm_jax.types import Array, ArrayTree, Schedule, Solution, State, VelocityFn

# Of Adams and Bashforth, for equal steps: rows by how many earlier noises are known, the last noise first.
_WEIGHTS = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23, -16, 5, 0], [55, -59, 37, -9]])
_WEIGHTS[2:] /= [[12], [24]]


@dataclass(frozen=True)
class PLMS:
    """PNDM's linear multistep method, as Stable Diffusion 1 was published with.

    Each step is DDIM's, with the noise `sum_j w_j n_(i-j)` of Adams and Bashforth in place of the predicted one. The
    first step is done twice: DDIM to its end, then once more with the mean of the noises at both ends. That is one
    evaluation more than there are steps. A single step is DDIM.

    Order 2: the weights are those of equal steps, but the noise counts unequally over a step.

    Attributes:
        schedule: of the affine path with a standard normal source that the velocity belongs to.

    Raises:
        ValueError: from `sample`, for a start where the velocity does not tell data from noise.

    Example:
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: (2 - x) / (1 - t)  # all data at 2
        >>> solution = sample(v, jnp.zeros((1, 1)), PLMS(Linear()), times=[0.0, 0.25, 0.5, 0.75])
        >>> solution.x, int(solution.calls)
        (Array([[1.5]], dtype=float32), 4)

    References:
        Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds" (arXiv:2202.09778, eq. 9 to 13).
    """

    schedule: Schedule
    order: ClassVar[int] = 2
    nfe_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_schedule(self.schedule)

    @property
    def domain(self) -> tuple[float, float]:
        return range_of(self.schedule)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return True

    def solve(self, v: VelocityFn, key: None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        check_start(self.schedule, times)
        times, schedule = jnp.asarray(times), self.schedule
        at, single = levels(schedule, times), len(times) == 2

        def step(x: Array, earlier: Array, i: Array, t: Array, t_next: Array) -> tuple[Array, Array]:
            data, noise = data_and_noise(evaluate(v, t, x), schedule, t, x)

            def mixed(better: Array) -> Array:
                # What the state is made of stays as it is: data that goes with another noise.
                moved = data + jnp.where(at.alpha[i] > 0, at.sigma[i] / at.alpha[i], 0) * (noise - better)
                return (at.alpha[i + 1] * moved + at.sigma[i + 1] * better).astype(x.dtype)

            def twice() -> Array:
                _, end = data_and_noise(evaluate(v, t_next, mixed(noise)), schedule, t_next, mixed(noise))
                return mixed((noise + end) / 2)

            noises = jnp.concatenate([noise[None], earlier])
            weights = jnp.asarray(_WEIGHTS, noise.dtype)[jnp.minimum(i, 3)]
            if single:
                return mixed(noise), noises[:-1]
            x_next = jax.lax.cond(i == 0, twice, lambda: mixed(jnp.tensordot(weights, noises, 1)))
            return x_next, noises[:-1]

        memory: Any = jnp.zeros((3, *x0.shape), time_dtype(x0))
        return run_steps(step, x0, times, spent(len(times) - single, v), memory=memory, trajectory=trajectory)
