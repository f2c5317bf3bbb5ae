"""Closed-form marginals: a Gaussian mixture carried along any affine path.

With data `x1 ~ sum_k w_k N(m_k, C_k)` and a standard normal source, the marginal at t is the mixture of
`N(alpha m_k, S_k)`, `S_k = alpha^2 C_k + sigma^2 I`. Density, score, velocity and the conditional means of data and
noise follow in closed form. Every loss, sampler and conversion of the library is checked against these.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Real

from fm_jax.checks import check_has, check_integer, check_key, check_number, check_schedule
from fm_jax.oracles.gaussian import as_numbers, check_points
from fm_jax.schedules import coefficients
from fm_jax.shapes import batch_time
from fm_jax.types import (
    AnyArray,
    Array,
    ArrayTree,
    Key,
    PerExample,
    Points,
    Prediction,
    Scalar,
    Schedule,
    State,
    Time,
    VelocityFn,
)


class GaussianMixture(NamedTuple):
    """Weights [k], means [k, d] and the eigen-decomposition of the covariances, [k, d] and [k, d, d]."""

    weights: Array
    means: Array
    eigenvalues: Array
    eigenvectors: Array

    @property
    def dim(self) -> int:
        return self.means.shape[1]


def gaussian_mixture(means: ArrayTree, scales: ArrayTree, weights: ArrayTree | None = None) -> GaussianMixture:
    """A mixture of k Gaussians in d dimensions.

    Args:
        means: [k, d].
        scales: standard deviations, a scalar or [k], or covariance matrices [k, d, d].
        weights: [k], normalised here; equal if `None`.

    Returns:
        `GaussianMixture`.

    Raises:
        ValueError: for shapes that do not fit, negative scales or weights, or a covariance that is not positive
            semi-definite and symmetric.

    Example:
        >>> gaussian_mixture([[-1.0, 0.0], [1.0, 0.0]], 0.5).dim
        2
    """
    means, scales = as_numbers("means", means), as_numbers("scales", scales)
    if means.ndim != 2:
        raise ValueError(f"means must be [k, d], got shape {means.shape}.")
    k, d = means.shape
    if scales.ndim <= 1:
        if scales.shape not in ((), (k,)):
            raise ValueError(f"scales must be a scalar, [k] = [{k}] or [k, d, d], got shape {scales.shape}.")
        if (scales < 0).any():
            raise ValueError("scales must not be negative.")
        eigenvalues = np.broadcast_to(scales.reshape(-1, 1) ** 2, (k, d))
        eigenvectors = np.broadcast_to(np.eye(d), (k, d, d))
    else:
        if scales.shape != (k, d, d):
            raise ValueError(f"scales, as covariances, must be [k, d, d] = {(k, d, d)}, got shape {scales.shape}.")
        if not np.allclose(scales, scales.transpose(0, 2, 1)):
            raise ValueError("scales, as covariances, must be symmetric.")
        eigenvalues, eigenvectors = np.linalg.eigh(scales)
        if (eigenvalues < -1e-6).any():
            raise ValueError("scales, as covariances, must be positive semi-definite.")
        eigenvalues = np.maximum(eigenvalues, 0)
    weights = np.ones(k) if weights is None else as_numbers("weights", weights)
    if weights.shape != (k,) or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"weights must be [k] = [{k}], not negative, with a positive sum.")
    arrays = weights / weights.sum(), means, eigenvalues, eigenvectors
    return GaussianMixture(*(jnp.asarray(a, dtype=float) for a in arrays))


def sample(mixture: GaussianMixture, key: Key, num: int) -> Real[AnyArray, "num d"]:
    """Draws data x1."""
    _check_mixture(mixture)
    check_key(key)
    check_integer("num", num)
    key_component, key_noise = jax.random.split(key)
    k = jax.random.categorical(key_component, jnp.log(mixture.weights), shape=(num,))
    noise = jax.random.normal(key_noise, (num, mixture.dim), dtype=mixture.means.dtype)
    scaled = jnp.sqrt(mixture.eigenvalues[k]) * noise
    return mixture.means[k] + jnp.einsum("nij,nj->ni", mixture.eigenvectors[k], scaled)


def _log_joint(mixture: GaussianMixture, schedule: Schedule, t: Array, x: Array) -> tuple[Array, Array, Array]:
    """log(w_k N(x | alpha m_k, S_k)) [k], Q_k' (x - alpha m_k) [k, d] and the eigenvalues of S_k [k, d]; x is [d]."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    variances = alpha**2 * mixture.eigenvalues + sigma**2
    # Sums of products, no matrix products: fused with what follows, XLA's on CPU crash under jvp (jaxlib 0.10.2).
    rotated = (mixture.eigenvectors * (x[None, :] - alpha * mixture.means)[:, :, None]).sum(axis=1)
    log_density = -0.5 * (rotated**2 / variances + jnp.log(2 * jnp.pi * variances)).sum(axis=1)
    return jnp.log(mixture.weights) + log_density, rotated, variances


def _check_mixture(mixture: GaussianMixture) -> None:
    check_has("mixture", mixture, ("weights", "means", "eigenvalues"), "a GaussianMixture, as from gaussian_mixture")


def _check(mixture: GaussianMixture, schedule: Schedule, x: Points) -> None:
    _check_mixture(mixture)
    check_schedule(schedule)
    check_points("x", x, mixture.dim)


def _over_batch(f: Callable[[Array, Array], ArrayTree], t: Time, x: State) -> ArrayTree:
    return jax.vmap(f)(batch_time(t, x), x)


def log_prob(mixture: GaussianMixture, schedule: Schedule, t: Time, x: Points) -> PerExample:
    """The log-density of the marginal, log p_t(x), in nats.

    Notebooks: (3.1), (3.3).

    Args:
        mixture: the data distribution (its own density is that at alpha = 1, sigma = 0).
        schedule: of the path.
        t: times.
        x: points.
    """
    _check(mixture, schedule, x)
    return _over_batch(lambda t, x: jax.nn.logsumexp(_log_joint(mixture, schedule, t, x)[0]), t, x)


def cdf(mixture: GaussianMixture, schedule: Schedule, t: Time, x: Points) -> PerExample:
    """The distribution function of the marginal in one dimension, P(x_t <= x), for tests of Kolmogorov and Smirnov.

    Args:
        mixture: the data distribution, on the line.
        schedule: of the path.
        t: times.
        x: points, of d = 1.

    Returns:
        Between 0 and 1.

    Raises:
        ValueError: if the mixture has more than one dimension.
    """
    _check(mixture, schedule, x)
    if mixture.dim != 1:
        raise ValueError(f"cdf needs a mixture in one dimension, got {mixture.dim}.")

    def single(t: Array, x: Array) -> Array:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        std = jnp.sqrt(alpha**2 * mixture.eigenvalues[:, 0] + sigma**2)
        return mixture.weights @ jax.scipy.stats.norm.cdf(x, alpha * mixture.means[:, 0], std)

    return _over_batch(single, t, x)


def prediction(mixture: GaussianMixture, schedule: Schedule, t: Time, x: Points) -> Prediction:
    """What perfect networks of all four kinds say at (t, x): the conditional means, finite also at t = 0 and t = 1.

    With posterior weights r_k(x): E[x1 | x] = sum_k r_k (m_k + alpha C_k S_k^-1 (x - alpha m_k)),
    score = -sum_k r_k S_k^-1 (x - alpha m_k), E[x0 | x] = -sigma score, velocity = alpha' E[x1 | x] + sigma' E[x0 | x].

    Notebooks: (4.4), (4.8).

    Args:
        mixture: the data distribution.
        schedule: of the path.
        t: times.
        x: points.

    Returns:
        `Prediction`.
    """
    _check(mixture, schedule, x)

    def single(t: Array, x: Array) -> Prediction:
        alpha, sigma, d_alpha, d_sigma = coefficients(schedule, t)
        log_joint, rotated, variances = _log_joint(mixture, schedule, t, x)
        responsibilities = jax.nn.softmax(log_joint)[:, None]
        whitened = (rotated / variances)[:, None, :]
        score = -(responsibilities * (mixture.eigenvectors * whitened).sum(axis=2)).sum(axis=0)
        shift = (mixture.eigenvectors * mixture.eigenvalues[:, None, :] * whitened).sum(axis=2)
        data = (responsibilities * (mixture.means + alpha * shift)).sum(axis=0)
        noise = -sigma * score
        return Prediction(d_alpha * data + d_sigma * noise, data, noise, score)

    return _over_batch(single, t, x)


def velocity(mixture: GaussianMixture, schedule: Schedule) -> VelocityFn:
    """The exact marginal velocity function, by the marginalisation trick `v(t, x) = E[u_t | x_t = x]`: for samplers.

    Notebooks: (4.4).
    """
    _check_mixture(mixture)
    check_schedule(schedule)
    return lambda t, x: prediction(mixture, schedule, t, x).velocity


def flow_map(mixture: GaussianMixture, schedule: Schedule, t0: Scalar | float, t1: Scalar | float, x: Points) -> Points:
    """The exact solution at `t1` of dx/dt = v(t, x) from x at `t0`, for a single Gaussian.

    x(t1) = alpha_1 m + S_1^(1/2) S_0^(-1/2) (x - alpha_0 m), since S_0 and S_1 share their eigenvectors.

    Notebooks: (1.2).

    Args:
        mixture: with k = 1.
        schedule: of the path.
        t0: where x is.
        t1: where to go, before or after.
        x: points.

    Raises:
        ValueError: if the mixture has more than one component (its flow map has no closed form).
    """
    _check(mixture, schedule, x)
    for name, time in (("t0", t0), ("t1", t1)):
        check_number(name, time, "[0, 1]")
    if mixture.means.shape[0] != 1:
        raise ValueError(f"flow_map needs a single Gaussian, got {mixture.means.shape[0]} components.")
    mean, eigenvalues, eigenvectors = mixture.means, mixture.eigenvalues[0], mixture.eigenvectors[0]

    def location_and_scale(time: Scalar | float) -> tuple[Array, Array]:
        t = jnp.asarray(time, dtype=x.dtype)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * mean, jnp.sqrt(alpha**2 * eigenvalues + sigma**2)

    (mean0, scale0), (mean1, scale1) = location_and_scale(t0), location_and_scale(t1)
    return mean1 + ((x - mean0) @ eigenvectors * (scale1 / scale0)[None]) @ eigenvectors.T
