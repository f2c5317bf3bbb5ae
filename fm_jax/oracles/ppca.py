"""Probabilistic principal components: the variational autoencoder whose likelihood is known.

Latents `z ~ N(0, I)` [k] and data `x | z ~ N(mean + W z, variance I)` [d], so that `x ~ N(mean, W W' + variance I)` and
the latents given the data are Gaussian. It is a variational autoencoder with a linear decoder; if the columns of W are
orthogonal, the posterior covariance is diagonal, and the evidence lower bound of a linear encoder reaches the
likelihood (Lucas et al. 2019, arXiv:1911.02469).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Real

from fm_jax.checks import check_has, check_integer, check_number, check_same_shape, is_traced
from fm_jax.oracles.gaussian import as_numbers, check_points
from fm_jax.types import AnyArray, Array, ArrayTree, PerExample, Points, Scalar


class PPCA(NamedTuple):
    """`x = mean + weights z + sqrt(variance) noise`. Made by `ppca`.

    Attributes:
        mean: [d].
        weights: W, [d, k].
        variance: of the noise, sigma^2, a scalar.
    """

    mean: Array
    weights: Array
    variance: Array


class LinearEncoder(NamedTuple):
    """The latents given x: `z ~ N(kernel' (x - mean), covariance)`, of which `mean` is that of the model.

    Attributes:
        kernel: [d, k].
        covariance: [k, k], the same for every x.
    """

    kernel: Array
    covariance: Array


def ppca(mean: ArrayTree, cov: ArrayTree, num_latents: int, *, variance: float | None = None) -> PPCA:
    """The model of maximum likelihood for data with these moments; of all the rotations, the one without.

    With eigenvalues `l_1 >= ... >= l_d` of the covariance and eigenvectors u: `variance` is the mean of those that the
    latents do not reach, and `W = [u_i sqrt(l_i - variance)]` for the first k. Where the variance is given, directions
    with less than it get no latent: the column is 0, and the posterior of that latent is its prior.

    Args:
        mean: of the data, [d].
        cov: their covariance, [d, d], divided by their number: `np.cov(x.T, bias=True)`.
        num_latents: k, from 1 to d, without `variance` to d - 1.
        variance: of the noise, if it is given; `None` for that of maximum likelihood.

    Returns:
        `PPCA`, found in double precision.

    Raises:
        ValueError: for shapes that do not fit, a covariance that is not symmetric or has negative eigenvalues, too many
            latents, or none of the variance left for the noise.

    Example:
        >>> model = ppca([0.0, 0.0, 0.0], np.diag([5.0, 2.0, 1.0]), 1)
        >>> float(model.variance), np.abs(model.weights).round(3).T.tolist()  # (2 + 1) / 2 and sqrt(5 - 1.5)
        (1.5, [[1.871000051498413, 0.0, 0.0]])

    References:
        Tipping & Bishop 1999, "Probabilistic Principal Component Analysis", section 3; Bishop 2006, "Pattern
        Recognition and Machine Learning", equation 12.45.
    """
    mean, cov = _moments(mean, cov)
    d = mean.size
    check_integer("num_latents", num_latents, most=d - (variance is None))
    values, vectors = np.linalg.eigh(cov)
    values, vectors = values[::-1], vectors[:, ::-1]
    if values[-1] < -1e-6 * max(values[0], 1e-30):
        raise ValueError(f"cov must have no negative eigenvalue, got {values[-1]:g}.")
    if variance is None:
        variance = float(values[num_latents:].mean())
        if variance <= 1e-12 * values[0]:
            raise ValueError(
                f"cov must vary in more than num_latents={num_latents} directions, got none left for the noise: give "
                "its variance, or take fewer latents."
            )
    else:
        check_number("variance", variance, "(0, inf)")
    weights = vectors[:, :num_latents] * np.sqrt(np.maximum(values[:num_latents] - variance, 0.0))
    return _model(mean, weights, variance)


def ppca_log_prob(model: PPCA, x: Points) -> PerExample:
    """The logarithm of the density of points [batch, d], nats, [batch].

    Raises:
        ValueError: if a shape does not fit, or the model is traced: it is decomposed once, in double precision.

    Example:
        >>> model = ppca([0.0, 0.0], np.diag([2.0, 1.0]), 1)  # which is N(0, diag(2, 1))
        >>> float(ppca_log_prob(model, jnp.zeros((1, 2)))[0] + math.log(2 * math.pi) + math.log(2) / 2)
        0.0
    """
    _check_model(model)
    check_points("x", x, len(model.mean))
    mean, weights, variance = _doubles(model)
    cov = weights @ weights.T + variance * np.eye(len(mean))
    values, vectors = np.linalg.eigh(cov)
    whitened = (x - jnp.asarray(mean, x.dtype)[None]) @ jnp.asarray(vectors / np.sqrt(values), x.dtype)
    constant = len(mean) * math.log(2 * math.pi) + np.log(values).sum()
    return -0.5 * ((whitened**2).sum(axis=1) + constant)


def ppca_mean_log_prob(model: PPCA, mean: ArrayTree, cov: ArrayTree) -> Scalar:
    """The mean of log p(x), nats an example, over any data with this mean [d] and covariance [d, d].

    `-1/2 (d log(2 pi) + log |C| + tr(C^-1 S))`, where `C = W W' + variance I` and S is the covariance about the mean of
    the model.

    Raises:
        ValueError: if a shape does not fit, or the model is traced.

    References:
        Tipping & Bishop 1999, section 3; Bishop 2006, "Pattern Recognition and Machine Learning", equation 12.44.
    """
    _check_model(model)
    mean, cov = _moments(mean, cov)
    center, weights, variance = _doubles(model)
    if mean.shape != center.shape:
        raise ValueError(f"mean must be of shape {center.shape}, that of the model, got {mean.shape}.")
    about = cov + np.outer(mean - center, mean - center)
    own = weights @ weights.T + variance * np.eye(len(center))
    value = len(center) * math.log(2 * math.pi) + np.linalg.slogdet(own)[1] + np.trace(np.linalg.solve(own, about))
    return jnp.asarray(-0.5 * value, dtype=float)


def ppca_posterior(model: PPCA) -> LinearEncoder:
    """The encoder of the model: `M = W'W + variance I`, kernel `W M^-1` and covariance `variance M^-1`.

    Raises:
        ValueError: if the model is traced.

    References:
        Tipping & Bishop 1999, section 3.
    """
    _check_model(model)
    _, weights, variance = _doubles(model)
    inverse = np.linalg.inv(weights.T @ weights + variance * np.eye(weights.shape[1]))
    kernel, covariance = weights @ inverse, variance * inverse
    with jax.ensure_compile_time_eval():
        return LinearEncoder(jnp.asarray(kernel, dtype=float), jnp.asarray(covariance, dtype=float))


def ppca_elbo(
    model: PPCA, x: Points, latent_mean: Real[AnyArray, "batch k"], latent_log_variance: Real[AnyArray, "batch k"]
) -> PerExample:
    """The evidence lower bound of an encoder that says `z ~ N(latent_mean, diag(latent_variance))`, nats an example.

    `E log p(x | z) - KL`, without a draw: `E |x - mean - W z|^2 = |x - mean - W m|^2 + sum_j |w_j|^2 s_j^2`.

    Args:
        model: the decoder.
        x: points [batch, d].
        latent_mean: m, [batch, k].
        latent_log_variance: log s^2, alike.

    Returns:
        [batch]; `ppca_log_prob` less the KL of the encoder from the posterior, and so never above it.

    Raises:
        ValueError: if a shape does not fit.
    """
    _check_model(model)
    d, k = model.weights.shape
    check_points("x", x, d)
    check_points("latent_mean", latent_mean, k)
    check_same_shape(latent_mean=latent_mean, latent_log_variance=latent_log_variance)
    if len(latent_mean) != len(x):
        raise ValueError(f"latent_mean must be of as many examples as x, {len(x)}, got {len(latent_mean)}.")
    mean, weights, variance = (each.astype(x.dtype) for each in model)
    spread = jnp.exp(latent_log_variance)
    squares = ((x - mean[None] - latent_mean @ weights.T) ** 2).sum(axis=1) + spread @ (weights**2).sum(axis=0)
    kl = 0.5 * (latent_mean**2 + spread - 1 - latent_log_variance).sum(axis=1)
    return -0.5 * (squares / variance + d * jnp.log(2 * math.pi * variance)) - kl


def _moments(mean: ArrayTree, cov: ArrayTree) -> tuple[np.ndarray, np.ndarray]:
    mean, cov = as_numbers("mean", mean).astype(np.float64), as_numbers("cov", cov).astype(np.float64)
    if mean.ndim != 1 or not mean.size:
        raise ValueError(f"mean must be [d], got shape {mean.shape}.")
    if cov.shape != (mean.size, mean.size):
        raise ValueError(f"cov must be of shape {(mean.size, mean.size)}, got {cov.shape}.")
    if not np.allclose(cov, cov.T):
        raise ValueError("cov must be symmetric.")
    return mean, cov


def _model(mean: np.ndarray, weights: np.ndarray, variance: float) -> PPCA:
    with jax.ensure_compile_time_eval():  # so that one may be made while tracing
        return PPCA(*(jnp.asarray(each, dtype=float) for each in (mean, weights, variance)))


def _doubles(model: PPCA) -> tuple[np.ndarray, ...]:
    """Its numbers; raises `ValueError` where they are not known yet."""
    if any(map(is_traced, model)):
        raise ValueError("model must hold numbers, not what is traced: make it outside of the jitted function.")
    return tuple(np.asarray(each, np.float64) for each in model)


def _check_model(model: PPCA) -> None:
    check_has("model", model, ("mean", "weights", "variance"), "a PPCA, as from ppca")
