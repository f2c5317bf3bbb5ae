"""Closed forms between two Gaussians: optimal transport, Schroedinger bridges, any stochastic interpolant.

With (x0, x1) jointly Gaussian and z standard normal, `x_t = alpha x1 + sigma x0 + gamma z` is linear in Gaussians, so
that the marginals and all conditional means follow by conditioning. The coupling of x0 with x1 is what tells the
methods apart: independent, optimal or entropic.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Real

from fm_jax.checks import check_finite, check_has, check_integer, check_key, check_number, check_state, is_traced, shown
from fm_jax.schedules import Linear, coefficients
from fm_jax.shapes import time_of
from fm_jax.types import AnyArray, Array, ArrayTree, Key, Points, Scalar, Schedule, State, Time, VelocityFn

Moments: TypeAlias = tuple[Real[AnyArray, " d"], Real[AnyArray, "d d"]]


class GaussianPair(NamedTuple):
    """A joint Gaussian law of (x0, x1): means [d], covariances [d, d] and `cross` = Cov(x0, x1) [d, d].

    `factor` [2 d, 2 d] is a square root of the joint covariance, found in double precision. Made by `gaussian_pair`.
    """

    mean0: Array
    mean1: Array
    cov0: Array
    cov1: Array
    cross: Array
    factor: Array


class GaussianBridge(NamedTuple):
    """The process `x_t = alpha x1 + sigma x0 + gamma z` between the ends of a Gaussian pair.

    `variance(t)` is gamma^2: unlike gamma it has a finite slope at the ends of a Brownian bridge.
    """

    pair: GaussianPair
    interpolant: Schedule
    variance: Callable[[Scalar], Scalar]


class BridgePrediction(NamedTuple):
    """Conditional means given x_t, each [batch, d].

    `drift` E[alpha' x1 + sigma' x0 | x_t], `noise` E[z | x_t], `velocity` drift + gamma' noise, and the `score`.
    """

    drift: Array
    noise: Array
    velocity: Array
    score: Array


def gaussian_pair(
    mean0: ArrayTree, cov0: ArrayTree, mean1: ArrayTree, cov1: ArrayTree, *, cross: ArrayTree | None = None
) -> GaussianPair:
    """A coupling of N(mean0, cov0) and N(mean1, cov1).

    Args:
        mean0: [d].
        cov0: [d, d], positive definite.
        mean1: [d].
        cov1: [d, d], positive definite.
        cross: Cov(x0, x1) [d, d]; `None` is 0, the independent coupling.

    Returns:
        `GaussianPair`.

    Raises:
        ValueError: for shapes that do not fit, a covariance that is not symmetric and positive definite, or a `cross`
            that no joint law has.

    Example:
        >>> gaussian_pair([0.0], [[1.0]], [2.0], [[4.0]], cross=[[1.5]]).cross
        Array([[1.5]], dtype=float32)
    """
    given = {"mean0": mean0, "cov0": cov0, "mean1": mean1, "cov1": cov1}
    mean0, cov0, mean1, cov1 = (as_numbers(name, each) for name, each in given.items())
    d = mean0.size
    cross = np.zeros((d, d)) if cross is None else as_numbers("cross", cross)
    for name, array, shape in (
        ("mean0", mean0, (d,)),
        ("mean1", mean1, (d,)),
        ("cov0", cov0, (d, d)),
        ("cov1", cov1, (d, d)),
        ("cross", cross, (d, d)),
    ):
        if array.shape != shape or not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite and of shape {shape}, got {array.tolist()}.")
    for name, cov in (("cov0", cov0), ("cov1", cov1)):
        if not np.allclose(cov, cov.T) or not np.linalg.eigvalsh(cov)[0] > 0:
            raise ValueError(f"{name} must be symmetric and positive definite, got {cov.tolist()}.")
    joint = np.block([[cov0, cross], [cross.T, cov1]])
    eigenvalues = np.linalg.eigvalsh(joint)
    if eigenvalues[0] < -1e-6 * eigenvalues[-1]:
        raise ValueError(f"cross must be that of a joint law of cov0 and cov1, got {cross.tolist()}.")
    arrays = mean0, mean1, cov0, cov1, cross, _sqrtm(joint)
    with jax.ensure_compile_time_eval():  # so that a pair may be made, and made into another, while tracing
        return GaussianPair(*(jnp.asarray(array, dtype=float) for array in arrays))


def as_numbers(name: str, value: ArrayTree) -> np.ndarray:
    """An array or nested lists as NumPy's array of floats; raises `ValueError` unless they are real and finite."""
    try:
        check_finite(name, value)
        return np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be real and finite numbers, got {shown(value)}.") from None


def _sqrtm(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a positive semi-definite matrix."""
    eigenvalues, eigenvectors = np.linalg.eigh(matrix)
    return (eigenvectors * np.sqrt(np.maximum(eigenvalues, 0))) @ eigenvectors.T


def _with_regularisation(pair: GaussianPair, sigma: float) -> GaussianPair:
    mean0, mean1, cov0, cov1 = (np.asarray(each, dtype=np.float64) for each in pair[:4])
    eye = np.eye(len(mean0))
    root = _sqrtm(cov0)
    cross = root @ _sqrtm(root @ cov1 @ root + sigma**4 / 4 * eye) @ np.linalg.inv(root) - sigma**2 / 2 * eye
    return gaussian_pair(mean0, cov0, mean1, cov1, cross=cross)


def check_pair_of_gaussians(pair: GaussianPair) -> None:
    """Raises `ValueError` for what is no `GaussianPair`."""
    check_has(
        "pair", pair, ("mean0", "mean1", "cov0", "cov1", "cross", "factor"), "a GaussianPair, as from gaussian_pair"
    )


def check_points(name: str, x: Points, dim: int) -> None:
    """Raises `ValueError` unless `x` is floating point [batch, dim]."""
    check_state(x, name)
    if x.shape[1:] != (dim,):
        raise ValueError(f"{name} must be [batch, d] with d = {dim}, got shape {x.shape}.")


def optimal_plan(pair: GaussianPair) -> GaussianPair:
    """The ends of `pair` under the coupling of least E|x0 - x1|^2, where x1 = `monge_map(pair, x0)`.

    `cross = C0^1/2 (C0^1/2 C1 C0^1/2)^1/2 C0^-1/2`; whatever `pair.cross` was is replaced.

    Notebooks: (8.5).
    """
    check_pair_of_gaussians(pair)
    return _with_regularisation(pair, 0.0)


def entropic_plan(pair: GaussianPair, sigma: float) -> GaussianPair:
    """The ends of `pair` under the coupling of the Schroedinger bridge with Brownian reference of variance sigma^2 t.

    It minimises `E|x0 - x1|^2 / 2 + sigma^2 KL(plan | independent)`, so its density is
    `exp(-|x0 - x1|^2 / (2 sigma^2)) f(x0) g(x1)`, by which
    `cross = C0^1/2 (C0^1/2 C1 C0^1/2 + sigma^4/4 I)^1/2 C0^-1/2 - sigma^2/2 I`.

    Notebooks: (8.7).

    Args:
        pair: the two ends; its own coupling is replaced.
        sigma: positive. Small is `optimal_plan`, large is independent.

    Returns:
        `GaussianPair`.

    Raises:
        ValueError: unless `sigma` is positive and finite.

    References:
        Janati et al. 2020 (arXiv:2006.02572, theorem 1); Mallasto et al. 2020 (arXiv:2006.03416); Bunne et al. 2022
        (arXiv:2202.05722).
    """
    check_pair_of_gaussians(pair)
    check_number("sigma", sigma, "(0, inf)")
    return _with_regularisation(pair, sigma)


def sample_pair(pair: GaussianPair, key: Key, num: int) -> tuple[Real[AnyArray, "num d"], Real[AnyArray, "num d"]]:
    """Draws coupled (x0, x1)."""
    check_pair_of_gaussians(pair)
    check_key(key)
    check_integer("num", num)
    noise = jax.random.normal(key, (num, len(pair.factor)), dtype=pair.factor.dtype)
    shift0, shift1 = jnp.split(noise @ pair.factor, 2, axis=1)
    return pair.mean0[None] + shift0, pair.mean1[None] + shift1


def bures_distance(pair: GaussianPair) -> Scalar:
    """The 2-Wasserstein distance W2 of the two ends, of Bures and Wasserstein.

    `W2^2 = |m0 - m1|^2 + tr(C0 + C1 - 2 (C0^1/2 C1 C0^1/2)^1/2)`, in the units of x.

    Notebooks: (8.5).

    Example:
        >>> float(bures_distance(gaussian_pair([0.0], [[1.0]], [3.0], [[25.0]])))  # sqrt(3^2 + (5 - 1)^2)
        5.0
    """
    check_pair_of_gaussians(pair)
    mean0, mean1, cov0, cov1 = (np.asarray(each, dtype=np.float64) for each in pair[:4])
    root = _sqrtm(cov0)
    spread = np.trace(cov0 + cov1 - 2 * _sqrtm(root @ cov1 @ root))
    return jnp.sqrt(jnp.asarray(((mean0 - mean1) ** 2).sum() + max(spread, 0.0), dtype=float))


def _monge_matrix(pair: GaussianPair) -> tuple[Array, Array]:
    """Eigenvalues [d] and eigenvectors [d, d] of `T = C0^-1/2 (C0^1/2 C1 C0^1/2)^1/2 C0^-1/2`."""
    check_pair_of_gaussians(pair)
    cov0, cov1 = (np.asarray(each, dtype=np.float64) for each in (pair.cov0, pair.cov1))
    root = _sqrtm(cov0)
    inverse = np.linalg.inv(root)
    eigenvalues, eigenvectors = np.linalg.eigh(inverse @ _sqrtm(root @ cov1 @ root) @ inverse)
    return jnp.asarray(eigenvalues, dtype=float), jnp.asarray(eigenvectors, dtype=float)


def monge_map(pair: GaussianPair, x0: Points) -> Points:
    """The optimal transport map of x0, `m1 + T (x0 - m0)`, `T = C0^-1/2 (C0^1/2 C1 C0^1/2)^1/2 C0^-1/2`.

    Notebooks: (8.5).
    """
    eigenvalues, eigenvectors = _monge_matrix(pair)
    check_points("x0", x0, len(pair.mean0))
    return pair.mean1[None] + (x0 - pair.mean0[None]) @ (eigenvectors * eigenvalues[None]) @ eigenvectors.T


def displacement_moments(pair: GaussianPair, t: Scalar | float) -> Moments:
    """Mean and covariance of McCann's displacement interpolation at one time.

    `(1 - t) m0 + t m1` and `A C0 A` with `A = (1 - t) I + t T`: a geodesic of the 2-Wasserstein distance.
    """
    eigenvalues, eigenvectors = _monge_matrix(pair)
    check_number("t", t, "[0, 1]")
    stretch = (eigenvectors * (1 - t + t * eigenvalues)[None]) @ eigenvectors.T
    return (1 - t) * pair.mean0 + t * pair.mean1, stretch @ pair.cov0 @ stretch


def displacement_velocity(pair: GaussianPair) -> VelocityFn:
    """The velocity of the displacement interpolation: the marginal velocity of straight paths under the optimal plan.

    `v(t, x) = m1 - m0 + (T - I) A^-1 (x - m_t)` with `A = (1 - t) I + t T` (Benamou & Brenier 2000).

    Notebooks: (8.1).

    Returns:
        `v(t, x)`, x [batch, d].
    """
    eigenvalues, eigenvectors = _monge_matrix(pair)

    def single(t: Array, x: Array) -> Array:
        centred = x - (1 - t) * pair.mean0 - t * pair.mean1
        rates = (eigenvalues - 1) / (1 - t + t * eigenvalues)
        return pair.mean1 - pair.mean0 + eigenvectors @ (rates * (eigenvectors.T @ centred))

    def velocity(t: Time, x: Points) -> Points:
        check_points("x", x, len(pair.mean0))
        return _over_batch(single, t, x)

    return velocity


def _over_batch(f: Callable[[Array, Array], ArrayTree], t: Time, x: State) -> ArrayTree:
    """`f` of each example; what depends on a scalar t alone is computed once."""
    time_of(t, x)  # refuses what is no time
    return jax.vmap(f, in_axes=(0 if jnp.ndim(t) else None, 0))(jnp.asarray(t, dtype=x.dtype), x)


def schroedinger_bridge(pair: GaussianPair, sigma: float) -> GaussianBridge:
    """The Schroedinger bridge between the ends of `pair`, with Brownian reference of variance sigma^2 t.

    The entropic plan, with a Brownian bridge between its ends: `gamma^2 = sigma^2 t (1 - t)` (Leonard 2014; Bunne et
    al. 2022, arXiv:2202.05722). `bridge_drift` with diffusion sigma has its forward and its backward drift.

    Notebooks: (8.7), (8.8).
    """
    return GaussianBridge(entropic_plan(pair, sigma), Linear(), lambda t: sigma**2 * t * (1 - t))


def _check_bridge(bridge: GaussianBridge) -> None:
    check_has("bridge", bridge, ("pair", "interpolant", "variance"), "a GaussianBridge, as from schroedinger_bridge")


def bridge_moments(bridge: GaussianBridge, t: Scalar | float) -> Moments:
    """Mean and covariance of x_t at one time.

    `alpha m1 + sigma m0` and `alpha^2 C1 + sigma^2 C0 + alpha sigma (K + K') + gamma^2 I` with K the cross-covariance.
    """
    _check_bridge(bridge)
    check_number("t", t, "[0, 1]")
    t = jnp.asarray(t)
    pair, alpha, sigma = bridge.pair, bridge.interpolant.alpha(t), bridge.interpolant.sigma(t)
    mixed = alpha * sigma * (pair.cross + pair.cross.T) + bridge.variance(t) * jnp.eye(len(pair.mean0))
    return alpha * pair.mean1 + sigma * pair.mean0, alpha**2 * pair.cov1 + sigma**2 * pair.cov0 + mixed


def bridge_prediction(bridge: GaussianBridge, t: Time, x: Points) -> BridgePrediction:
    """What perfect networks say at (t, x): the conditional means given x_t = x.

    `E[y | x] = E[y] + Cov(y, x_t) S^-1 (x - m)`, m and S from `bridge_moments`, for `y = alpha' x1 + sigma' x0` and
    `y = z`; the score is `-S^-1 (x - m)`, and `gamma' E[z | x] = -(gamma^2)' / 2 score`.

    Notebooks: (8.1).

    Args:
        bridge: the process.
        t: times.
        x: points.

    Returns:
        `BridgePrediction`.
    """
    _check_bridge(bridge)
    pair = bridge.pair
    check_points("x", x, len(pair.mean0))

    def single(t: Array, x: Array) -> BridgePrediction:
        alpha, sigma, d_alpha, d_sigma = coefficients(bridge.interpolant, t)
        variance, d_variance = jax.jvp(bridge.variance, (t,), (jnp.ones_like(t),))
        mean, cov = bridge_moments(bridge, t)
        score = -jnp.linalg.solve(cov, x - mean)
        with_x1, with_x0 = alpha * pair.cov1 + sigma * pair.cross.T, alpha * pair.cross + sigma * pair.cov0
        drift = d_alpha * (pair.mean1 - with_x1 @ score) + d_sigma * (pair.mean0 - with_x0 @ score)
        return BridgePrediction(drift, -jnp.sqrt(variance) * score, drift - d_variance / 2 * score, score)

    return _over_batch(single, t, x)


def bridge_drift(bridge: GaussianBridge, diffusion: float, direction: int = 1) -> VelocityFn:
    """The drift `v + direction g^2 / 2 score` of the SDE with noise g that has the bridge's marginals.

    Notebooks: (8.8).

    Args:
        bridge: the process.
        diffusion: g, a number; sigma makes the SDE of `schroedinger_bridge(pair, sigma)` the bridge itself.
        direction: 1 for the SDE forward in time, -1 for the one that runs backward.

    Returns:
        `drift(t, x)`, as a dx/dt in either direction.
    """
    _check_bridge(bridge)
    check_number("diffusion", diffusion, "[0, inf)")
    if not is_traced(direction) and (isinstance(direction, bool) or direction not in (1, -1)):
        raise ValueError(f"direction must be 1 or -1, got {shown(direction)}.")

    def drift(t: Time, x: Points) -> Points:
        value = bridge_prediction(bridge, t, x)
        return value.velocity + direction * diffusion**2 / 2 * value.score

    return drift
