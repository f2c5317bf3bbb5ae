"""Affine conditional paths `x_t = alpha x1 + sigma x0`, for any source and any pairing of x0 with x1."""

from dataclasses import dataclass, field

import jax.numpy as jnp

from fm_jax.schedules import Linear, coefficients
from fm_jax.shapes import expand_time
from fm_jax.types import Array, Key, PathSample, Prediction, Schedule


@dataclass(frozen=True)
class AffinePath:
    """The path `x_t = alpha(t) x1 + sigma(t) x0` with velocity `u_t = alpha'(t) x1 + sigma'(t) x0`.

    Lipman et al. 2022 (arXiv:2210.02747, eq. 10 and 15) for a Gaussian source; Albergo & Vanden-Eijnden 2022
    (arXiv:2209.15571, eq. 4) for any two distributions.

    Example:
        >>> x0, x1 = jnp.zeros((4, 2)), jnp.ones((4, 2))
        >>> sample = AffinePath(Linear()).sample(None, jnp.full(4, 0.25), x0, x1)
        >>> sample.x_t[0], sample.u_t[0]
        (Array([0.25, 0.25], dtype=float32), Array([1., 1.], dtype=float32))
    """

    schedule: Schedule = field(default_factory=Linear)

    @property
    def domain(self) -> tuple[float, float]:
        return self.schedule.domain

    def sample(self, key: Key | None, t: Array, x0: Array, x1: Array) -> PathSample:
        """The point at `t` between `x0` and `x1`, and its velocity.

        Args:
            key: not used, an affine path is a function of its ends; there so that every path has one signature.
            t: [batch] or a scalar.
            x0: source [batch, ...].
            x1: data [batch, ...].

        Raises:
            ValueError: if the shapes of `x0` and `x1` differ, or `t` is neither a scalar nor [batch].
        """
        del key
        if x0.shape != x1.shape:
            raise ValueError(f"x0 and x1 must have the same shape, got {x0.shape} and {x1.shape}.")
        alpha, sigma, d_alpha, d_sigma = coefficients(self.schedule, expand_time(t, x1))
        return PathSample(t, alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0, x0, x1)


def targets(sample: PathSample, schedule: Schedule) -> Prediction:
    """What a network of each kind should say at a point of the path.

    velocity `u_t`; data `x1`; noise `x0`; score `grad log p(x_t | x1) = -x0 / sigma`, which holds for a standard normal
    source (Vincent 2011; Song et al. 2021, arXiv:2011.13456, eq. 7) and is infinite where sigma = 0.

    Args:
        sample: from `path.sample`.
        schedule: of that path.

    Returns:
        `Prediction`, each [batch, ...].
    """
    sigma = schedule.sigma(expand_time(sample.t, sample.x0))
    return Prediction(velocity=sample.u_t, data=sample.x1, noise=sample.x0, score=-sample.x0 / sigma)


def source(schedule: Schedule, x0: Array, t0: float = 0.0) -> Array:
    """Where sampling starts: `sigma(t0) x0`, the noise at the level that the path has at `t0`.

    For schedules with sigma(0) = 1 this is `x0` itself; VE needs `sigma_max x0`. Starting later than 0 without this
    scaling is a common mistake. The signal `alpha(t0) x1` is left out, so alpha(t0) / sigma(t0) has to be small.

    Args:
        schedule: any schedule.
        x0: noise [batch, ...].
        t0: the time at which the sampler starts.
    """
    return schedule.sigma(jnp.asarray(t0, dtype=x0.dtype)) * x0
