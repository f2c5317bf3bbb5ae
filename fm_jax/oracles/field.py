"""Gaussian fields under a local condition: `x1 ~ N(0, K)` stationary, and `y = A x1 + noise` is told.

Filling a hole, sharpening, colouring: with Gaussian data each is exact. `p(x1 | y)` is `N(G y, S)` with one S for all
y, so that the conditional velocity is linear in (x_t, y), its error does not depend on y, and the least loss that any
network can reach under a condition, or without it, is a mean over the eigenvalues of S, or of K.
"""

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_has, check_integer, check_key, check_number, check_schedule, check_state, shown
from fm_jax.oracles.gaussian import as_numbers
from fm_jax.oracles.observation import check_grid
from fm_jax.schedules import coefficients
from fm_jax.shapes import batch_time
from fm_jax.types import Array, ArrayTree, Cond, Elementwise, Key, ModelFn, Prediction, Schedule, State, Time


class GaussianField(NamedTuple):
    """N(0, K) on [*grid, c], by the eigen-decomposition of K: d eigenvalues, and eigenvectors [*grid, c, d].

    Made by `stationary_field`.
    """

    eigenvalues: Array
    eigenvectors: Array


class FieldPosterior(NamedTuple):
    """The law N(G y, S) of a field, given `y = A x1 + noise z`: S by its eigen-decomposition, as in `GaussianField`.

    `operator` A is [*grid_y, c_y, *grid, c], `gain` G is [*grid, c, *grid_y, c_y], and `noise` a standard deviation.
    Made by `field_posterior`.
    """

    eigenvalues: Array
    eigenvectors: Array
    operator: Array
    gain: Array
    noise: Array


Law: TypeAlias = GaussianField | FieldPosterior
_LAW = "a GaussianField or a FieldPosterior, as from stationary_field or field_posterior"


def power_law_spectrum(grid: tuple[int, ...], exponent: float = 3.0) -> np.ndarray:
    """A spectrum for `stationary_field`, `(1 + |k|^2)^(-exponent / 2)` scaled to mean 1: each place has variance 1.

    Args:
        grid: points along each axis.
        exponent: 0 is white noise; the larger, the smoother.

    Returns:
        [*grid], with k the whole numbers of waves along each axis, in the order of `numpy.fft.fftfreq`.

    Raises:
        ValueError: unless the sizes are positive integers and `exponent` is finite and not negative.

    Example:
        >>> power_law_spectrum((4,), 2.0).round(3)
        array([1.818, 0.909, 0.364, 0.909])
    """
    check_grid(grid)
    check_number("exponent", exponent, "[0, inf)")
    waves = np.meshgrid(*(np.fft.fftfreq(size, 1 / size) for size in grid), indexing="ij")
    spectrum = (1 + sum(each**2 for each in waves)) ** (-exponent / 2)
    return spectrum / spectrum.mean()


def stationary_field(spectrum: ArrayTree, channels: ArrayTree = ((1.0,),)) -> GaussianField:
    """A field on a periodic grid with `Cov(x[i, a], x[j, b]) = r(i - j) channels[a, b]`.

    By the theorem of Wiener and Khinchin r is the inverse Fourier transform of the spectrum. In space K is circulant:
    the modes are waves, and the spectrum has their variances.

    Args:
        spectrum: variance of each wave, [*grid], in the order of `numpy.fft.fftfreq`, the same at k and -k since x is
            real. Its mean is r(0).
        channels: covariance of the channels at one place, [c, c].

    Returns:
        `GaussianField`, on [*grid, c].

    Raises:
        ValueError: for a spectrum that is empty, negative or not symmetric, and for a `channels` that is no covariance.

    Example:
        >>> field = stationary_field(power_law_spectrum((8, 8)), [[1.0, 0.5], [0.5, 1.0]])
        >>> field_covariance(field)[0, 0, 0, 0, 0].round(3)
        Array([1. , 0.5], dtype=float32)
    """
    spectrum, channels = as_numbers("spectrum", spectrum), as_numbers("channels", channels)
    if not spectrum.ndim or not spectrum.size:
        raise ValueError(f"spectrum must be [*grid], with an axis and not empty, got shape {spectrum.shape}.")
    if (spectrum < 0).any():
        raise ValueError(f"spectrum must be variances, not negative, got {spectrum.min():g}.")
    mirrored = spectrum[np.ix_(*(-np.arange(size) % size for size in spectrum.shape))]
    if not np.allclose(mirrored, spectrum, atol=1e-6 * spectrum.max()):
        raise ValueError(
            "spectrum must be that of a real field, the same at k and -k, in the order of numpy.fft.fftfreq."
        )
    if channels.ndim != 2 or channels.shape[0] != channels.shape[1] or not channels.size:
        raise ValueError(f"channels must be a covariance [c, c], got shape {channels.shape}.")
    if not np.allclose(channels, channels.T) or np.linalg.eigvalsh(channels)[0] < -1e-6 * abs(channels).max():
        raise ValueError(f"channels must be symmetric and positive semi-definite, got {channels.tolist()}.")
    places = np.indices(spectrum.shape).reshape(spectrum.ndim, -1)
    sizes = np.array(spectrum.shape)[:, None, None]
    covariance = np.fft.ifftn(spectrum).real[tuple((places[:, :, None] - places[:, None, :]) % sizes)]
    in_space, in_channels = np.linalg.eigh(covariance), np.linalg.eigh(channels)
    eigenvalues = np.kron(in_space.eigenvalues, in_channels.eigenvalues)
    eigenvalues = np.where(eigenvalues > 1e-12 * eigenvalues.max(), eigenvalues, 0)  # a rounding error is no variance
    eigenvectors = np.kron(in_space.eigenvectors, in_channels.eigenvectors)
    return GaussianField(*_arrays(eigenvalues, eigenvectors.reshape(*spectrum.shape, len(channels), -1)))


def _arrays(*values: np.ndarray | float) -> tuple[Array, ...]:
    with jax.ensure_compile_time_eval():  # so that they may be made while tracing
        return tuple(jnp.asarray(value, dtype=float) for value in values)


def field_posterior(field: GaussianField, operator: ArrayTree, noise: float = 0.0) -> FieldPosterior:
    """The law of `x1 ~ field` given `y = A x1 + noise z`, z standard normal: the oracle of every local condition.

    With `K = L L'` and the singular values s of `A L = U diag(s) V'`,
    `G = L V diag(s / (s^2 + noise^2)) U'` and `S = L V diag(noise^2 / (s^2 + noise^2)) V' L'`: the Kalman update
    `G = K A' (A K A' + noise^2)^-1`, `S = K - G A K`, in a form that cannot lose the sign of S.

    Notebooks: (13.2).

    Args:
        field: law of x1, on [*grid, c].
        operator: A [*grid_y, c_y, *grid, c], as `known_values`, `block_means`, `channel_means` and `blur` make it; y
            has as many axes as x.
        noise: standard deviation of the noise on y; 0 for an exact observation.

    Returns:
        `FieldPosterior`.

    Raises:
        ValueError: if `operator` does not fit the field, sees nothing at all, or sees something so weakly that without
            noise float32 would not tell it from nothing; if `noise` is negative.

    Example:
        >>> from fm_jax.oracles.observation import known_values
        >>> field = stationary_field(power_law_spectrum((8,)))
        >>> half = field_posterior(field, known_values(np.arange(8) < 4))
        >>> int((half.eigenvalues > 0).sum())
        4
    """
    check_has("field", field, ("eigenvalues", "eigenvectors"), "a GaussianField, as from stationary_field")
    check_number("noise", noise, "[0, inf)")
    event, matrix = field.eigenvectors.shape[:-1], as_numbers("operator", operator)
    if matrix.ndim != 2 * len(event) or matrix.shape[len(event) :] != event or not matrix.size:
        wanted = f"[*grid_y, c_y, *grid, c] of {2 * len(event)} axes, the last ones {event}"
        raise ValueError(f"operator must be {wanted}, got shape {matrix.shape}.")
    seen, d = matrix.shape[: len(event)], math.prod(event)
    eigenvalues, eigenvectors = (np.asarray(each, dtype=np.float64) for each in field[:2])
    root = eigenvectors.reshape(d, d) * np.sqrt(eigenvalues)
    u, s, v = np.linalg.svd(matrix.reshape(-1, d) @ root)
    if not s[0] > 0:
        raise ValueError("operator must see something of the field, got one whose every observation is 0.")
    s = np.where(s > 1e-10 * s[0], s, 0)
    if noise == 0 and s[s > 0][-1] < 1e-4 * s[0]:
        raise ValueError(
            f"noise must be positive where an operator sees some of the field {s[s > 0][-1] / s[0]:.0e} times as well "
            "as the rest: float32 would not tell that from nothing."
        )
    variance = s**2 + float(noise) ** 2
    told = np.divide(s, variance, out=np.zeros_like(s), where=variance > 0)
    gain = root @ v[: len(s)].T * told @ u[:, : len(s)].T
    left = np.ones(d)
    left[: len(s)] = np.divide(float(noise) ** 2, variance, out=np.ones_like(s), where=variance > 0)
    axes, scales, _ = np.linalg.svd(root @ v.T * np.sqrt(left))
    scales = np.where(scales > 1e-7 * np.sqrt(eigenvalues.max()), scales, 0)
    arrays = _arrays(scales**2, axes.reshape(*event, d), matrix, gain.reshape(*event, *seen), noise)
    return FieldPosterior(*arrays)


def _check_law(law: Law, x: State | None = None, name: str = "x") -> tuple[int, ...]:
    """The event's shape; raises `ValueError` for what is no law, and for an `x` that is not of it."""
    check_has("law", law, ("eigenvalues", "eigenvectors"), _LAW)
    event = tuple(law.eigenvectors.shape[:-1])
    if x is not None:
        check_state(x, name)
        if tuple(x.shape[1:]) != event:
            raise ValueError(f"{name} must be [batch, *grid, c] with {event} of the field, got shape {x.shape}.")
    return event


def _check_posterior(posterior: FieldPosterior, y: State | None = None) -> int:
    """How many axes an example of y has; raises `ValueError` for what is no posterior, or a `y` that is not of it."""
    names = ("operator", "gain", "noise", "eigenvalues")
    check_has("posterior", posterior, names, "a FieldPosterior, as from field_posterior")
    axes = posterior.operator.ndim // 2
    if y is not None:
        check_state(y, "y")
        seen = posterior.operator.shape[:axes]
        if y.shape[1:] != seen:
            raise ValueError(f"y must be [batch, *grid_y, c_y] with {seen} of the operator, got shape {y.shape}.")
    return axes


def field_covariance(law: Law) -> Array:
    """The covariance of x1, K of a field or S of a posterior, [*grid, c, *grid, c]."""
    event = _check_law(law)
    axes = law.eigenvectors.reshape(-1, len(law.eigenvalues))
    return ((axes * law.eigenvalues[None]) @ axes.T).reshape(*event, *event)


def sample_field(field: GaussianField, key: Key, num: int) -> State:
    """Draws x1 [num, *grid, c] from N(0, K)."""
    check_has("field", field, ("eigenvalues", "eigenvectors"), "a GaussianField, as from stationary_field")
    check_key(key)
    check_integer("num", num)
    return _draw(field, key, num)


def _draw(law: Law, key: Key, num: int) -> State:
    noise = jax.random.normal(key, (num, len(law.eigenvalues)), dtype=law.eigenvalues.dtype)
    return jnp.tensordot(noise * jnp.sqrt(law.eigenvalues)[None], law.eigenvectors, (1, law.eigenvectors.ndim - 1))


def _over(axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of an example, and the last ones of an operator on it."""
    return tuple(range(1, axes + 1)), tuple(range(axes, 2 * axes))


def observe(posterior: FieldPosterior, key: Key, x1: State) -> State:
    """Draws the condition `y = A x1 + noise z` [batch, *grid_y, c_y]; where A sees nothing, y is 0 without noise."""
    axes = _check_posterior(posterior)
    check_state(x1, "x1")
    _check_law(posterior, x1, "x1")
    check_key(key)
    operator = posterior.operator
    y = jnp.tensordot(x1, operator, _over(axes))
    sees = (operator != 0).any(tuple(range(axes, 2 * axes)))
    return y + jnp.where(sees, posterior.noise, 0)[None] * jax.random.normal(key, y.shape, dtype=y.dtype)


def posterior_mean(posterior: FieldPosterior, y: State) -> State:
    """E[x1 | y] = G y, [batch, *grid, c]."""
    check_state(y, "y")
    axes = _check_posterior(posterior, y)
    return jnp.tensordot(y, posterior.gain, _over(axes))


def sample_posterior(posterior: FieldPosterior, key: Key, y: State) -> State:
    """Draws x1 from N(G y, S), one for each example of `y`."""
    mean = posterior_mean(posterior, y)
    check_key(key)
    return mean + _draw(posterior, key, len(y))


def field_prediction(law: Law, schedule: Schedule, t: Time, x: State, y: State | None = None) -> Prediction:
    """What perfect networks of all four kinds say at (t, x) under the condition y: the conditional means.

    `E[x1 | x, y] = m + alpha C M^-1 (x - alpha m)` with `M = alpha^2 C + sigma^2`, `score = -M^-1 (x - alpha m)`,
    `E[x0 | x, y] = -sigma score` and `velocity = alpha' E[x1 | x, y] + sigma' E[x0 | x, y]`; under a condition
    (m, C) = (G y, S), without one (0, K).

    Args:
        law: `GaussianField`, or `FieldPosterior`.
        schedule: of the path.
        t: times. Where sigma = 0 what is known exactly has no velocity: t < 1 where noise is 0.
        x: points, [batch, *grid, c].
        y: condition, [batch, *grid_y, c_y], for a posterior; `None` for a field.

    Returns:
        `Prediction`.

    Raises:
        ValueError: for shapes that do not fit the law, a condition that is missing, or one that a field has no use for.
    """
    check_state(x, "x")
    _check_law(law, x)
    check_schedule(schedule)
    conditional = hasattr(law, "gain")
    if conditional != (y is not None):
        wanted = "given to a FieldPosterior" if conditional else "None for a GaussianField, which has no condition"
        raise ValueError(f"y must be {wanted}, got {shown(y)}.")
    d = len(law.eigenvalues)
    axes = law.eigenvectors.reshape(d, d)
    mean = jnp.zeros((len(x), d), law.eigenvalues.dtype) if y is None else posterior_mean(law, y).reshape(-1, d)  # type: ignore[arg-type]
    if len(mean) != len(x):
        raise ValueError(f"y must be of the batch of x, {len(x)}, got {len(mean)}.")
    alpha, sigma, d_alpha, d_sigma = coefficients(schedule, batch_time(t, x)[:, None])
    variances = alpha**2 * law.eigenvalues[None] + sigma**2
    whitened = (x.reshape(-1, d) - alpha * mean) @ axes / variances
    data = mean + alpha * ((law.eigenvalues[None] * whitened) @ axes.T)
    score = -whitened @ axes.T
    noise = -sigma * score
    return Prediction(*(each.reshape(x.shape) for each in (d_alpha * data + d_sigma * noise, data, noise, score)))


def field_velocity(law: Law, schedule: Schedule) -> ModelFn:
    """The exact velocity as a network sees it, `v(t, x, y)`, or `v(t, x)` of a field: for samplers and guidance."""
    _check_law(law)
    check_schedule(schedule)

    def velocity(t: Time, x: State, cond: Cond = None) -> State:
        return field_prediction(law, schedule, t, x, cond).velocity

    return velocity


def loss_floor(law: Law, schedule: Schedule, t: Elementwise) -> Elementwise:
    """The least conditional flow matching loss at t: `E|u_t - v(t, x_t, y)|^2` of the exact velocity, over everything.

    Given x_t and y, u_t has the variance `(alpha' sigma - alpha sigma')^2 c / (alpha^2 c + sigma^2)` in the direction
    of an eigenvector, with c its eigenvalue in S, or in K without a condition: the difference of the two floors is what
    the condition is worth. `losses.flow_matching` can go no lower. Over t ~ U(0, 1) on straight lines the floor is
    `pi / 2` times the mean of sqrt(c); for others it is `loss_floor(law, schedule, time_sampler(key, num)).mean()`.

    Notebooks: (13.1), (13.3).

    Args:
        law: `GaussianField`, or `FieldPosterior`.
        schedule: of the path.
        t: times, of any shape.

    Returns:
        In the shape of `t`, a mean over the numbers of x as the losses are.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> field = stationary_field(power_law_spectrum((8, 8)))
        >>> loss_floor(field, Linear(), jnp.array([0.0, 1.0])).round(4)
        Array([1., 1.], dtype=float32)
    """
    _check_law(law)
    alpha, sigma, d_alpha, d_sigma = (each[..., None] for each in coefficients(schedule, t))
    c = law.eigenvalues.reshape((1,) * (alpha.ndim - 1) + (-1,))
    variances = jnp.where(c > 0, alpha**2 * c + sigma**2, 1)  # where all is known there is nothing to lose, up to t = 1
    return (c * (d_alpha * sigma - alpha * d_sigma) ** 2 / variances).mean(axis=-1)
