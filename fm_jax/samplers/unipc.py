"""UniPC: a predictor and a corrector in log-SNR that share their evaluations, along any affine path."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from fm_jax.checks import check_integer, check_member, check_schedule
from fm_jax.nfe import spent
from fm_jax.samplers.levels import Levels, check_start, data_and_noise, levels, phi, range_of
from fm_jax.samplers.loop import run_steps
from fm_jax.samplers.runge_kutta import evaluate
from fm_jax.shapes import time_dtype
from fm_jax.types import Array, ArrayTree, Schedule, Solution, State, VelocityFn

VARIANTS = ("bh1", "bh2")


def _weights(at: Levels, nodes: list[Array], variant: str) -> Array:
    """Weights w_m of the changes `d(lambda + r_m h) - d(lambda)` in the integral of d over each step: [num_steps, m].

    They integrate polynomials through the nodes exactly, `sum_m r_m^k w_m = alpha_n k! h phi_k+1(-h)` for k = 1..m. A
    single one is simplified to `B(h) / (2 r)`, and only there does B matter: h in "bh1" and 1 - e^-h in "bh2".
    """
    alpha, h = at.alpha[1:], at.h
    if len(nodes) == 1:
        b = h if variant == "bh1" else -jnp.expm1(-h)
        return (alpha * b / (2 * nodes[0]))[:, None]
    powers = range(1, len(nodes) + 1)
    matrix = jnp.stack([jnp.stack([r**k for r in nodes], axis=1) for k in powers], axis=1)
    moments = jnp.stack([alpha * math.factorial(k) * h * phi(k + 1, -h) for k in powers], axis=1)
    return jnp.linalg.solve(matrix, moments[..., None])[..., 0]


def _predictor_and_corrector(at: Levels, order: int, variant: str) -> tuple[Array, Array]:
    """Weights of the predictor [num_steps, order - 1] and the corrector [num_steps, order], 0 where d is not known yet.

    Those of the corrector begin with the change over the step itself; then both have the earlier points, last first.
    """
    reached = at.order(order)
    nodes, length = [], jnp.zeros_like(at.h)
    for steps in range(1, order):
        length = length + at.h_before(steps)
        nodes.append(-length / at.h)
    rows, dtype = len(at.h), at.h.dtype
    predictor, corrector = jnp.zeros((rows, order - 1), dtype), jnp.zeros((rows, order), dtype)
    for p in range(1, order + 1):
        use = (at.regular & (reached == p))[:, None]
        if p > 1:
            w = jnp.pad(_weights(at, nodes[: p - 1], variant), ((0, 0), (0, order - p)))
            predictor = jnp.where(use, w, predictor)
        w = jnp.pad(_weights(at, [jnp.ones_like(at.h), *nodes[: p - 1]], variant), ((0, 0), (0, order - p)))
        corrector = jnp.where(use, w, corrector)
    return predictor, corrector


@dataclass(frozen=True)
class UniPC:
    """UniPC-p: a multistep predictor of order p and a corrector that uses the next evaluation, for free.

    In half the log-SNR lambda and the prediction of data d, both add weighted changes of d to DDIM. The evaluation at
    the predicted state serves three times: it corrects that state, starts the next step and is history for later ones.
    The last state is the predictor's: nothing is evaluated there. One evaluation a step.

    The order is p + 1, measured, where the steps in lambda are bounded. The method starts with order 1, 2, ..., so that
    order 3 begins with a step of local error h^3: UniPC-3 has order 4 only where the first steps are shorter than the
    rest, and 3 in the limit, with a small constant, from equal steps. "bh1" and "bh2" differ where there is a single
    weight: in the predictor of order 2, the corrector of order 1, and the start of the others.

    A step of infinite length in lambda, from alpha = 0 or to sigma = 0, is DDIM without correction, and the method
    starts anew after it. From 0 to 1 on `Linear` or `Cosine` in equal steps every p has order 2. Where the paper's code
    and diffusers (`lower_order_final`) lower the order of the last steps, here it is lowered in infinite steps only:
    the same for p <= 2 where sigma ends at 0; for p = 3 they also take the last step but one with order 2.

    A trajectory has the states at which the velocity is evaluated, before correction.

    Attributes:
        schedule: of the affine path with a standard normal source that the velocity belongs to.
        p: order of the predictor: 1, 2 or 3.
        variant: "bh1", B(h) = h, or "bh2", B(h) = 1 - e^-h.

    Raises:
        ValueError: for another p or variant; from `sample`, for a start where the velocity does not tell data from
            noise.

    Example:
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: (2 - x) / (1 - t)  # all data at 2
        >>> solution = sample(v, jnp.zeros((1, 1)), UniPC(Linear()), times=4)
        >>> solution.x, int(solution.calls)
        (Array([[2.]], dtype=float32), 4)

    References:
        Zhao et al. 2023 (arXiv:2302.04867).
    """

    schedule: Schedule
    p: int = 2
    variant: str = "bh2"
    nfe_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_integer("p", self.p, most=3)
        check_member("variant", self.variant, VARIANTS)

    @property
    def order(self) -> int:
        return self.p + 1

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
        at = levels(schedule, times)
        predictor, corrector = _predictor_and_corrector(at, self.p, self.variant)
        # Step 0 has nothing to correct.
        corrector = jnp.concatenate([jnp.zeros_like(corrector[:1]), corrector[:-1]])
        # A correction of x is one of the noise. Where sigma is 0, the state is the data and nothing was corrected.
        by_sigma = jnp.where(at.sigma > 0, 1 / jnp.where(at.sigma > 0, at.sigma, 1), 0)

        def changes(weights: Array, points: list[Array], origin: Array) -> Array:
            return sum((w * (point - origin) for w, point in zip(weights, points, strict=True)), jnp.zeros_like(origin))

        def step(x: Array, memory: Any, i: Array, t: Array, t_next: Array) -> tuple[Array, Any]:
            ddim, earlier = memory
            data, noise = data_and_noise(evaluate(v, t, x), schedule, t, x)
            corrected = ddim + changes(corrector[i], [data, *earlier[1:]], earlier[0])
            noise = noise + by_sigma[i] * (corrected - x)
            ddim = at.alpha[i + 1] * data + at.sigma[i + 1] * noise
            x_next = ddim + changes(predictor[i], earlier[: self.p - 1], data)
            return x_next.astype(x.dtype), (ddim, [data, *earlier[:-1]])

        zeros = jnp.zeros(x0.shape, dtype=time_dtype(x0))
        memory = x0.astype(zeros.dtype), [zeros] * self.p
        return run_steps(step, x0, times, spent(len(times) - 1, v), memory=memory, trajectory=trajectory)
