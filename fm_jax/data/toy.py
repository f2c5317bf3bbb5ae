"""Two-dimensional toy distributions as pure functions `(key, num) -> [num, 2]`, float32.

Every example is drawn independently, halves and modes included, so batches may be concatenated freely. `num` is static
under `jit`; the options may be traced, except `num_classes`. The defaults are those of TorchCFM's published 2-D
experiments (its `runner`) wherever it has the distribution, else FFJORD's.

References:
    Tong et al., "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport", 2024.
    Grathwohl et al., "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models", 2019.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_key, check_member, check_number
from fm_jax.types import Array, ArrayTree, Key

ToySampler: TypeAlias = Callable[[Key, int], Array]
"""`(key, num) -> [num, 2]`, float32."""


def eight_gaussians(key: Key, num: int, *, radius: float = 5.0, std: float = 1.0) -> Array:
    """Draws from eight equal Gaussians evenly spaced on a circle.

    `x = radius (cos(pi k / 4), sin(pi k / 4)) + std eps`, with k uniform on 0..7. Mean 0, covariance
    `(radius^2 / 2 + std^2) I`.

    Two variants share this name in TorchCFM and their numbers cannot be compared: the experiments of the paper have
    `std=1` (the default here); the tutorials pass `var=0.1` as the covariance `sqrt(0.1) I`, so `std=0.1**0.25`, 0.562.

    Args:
        key: PRNG key.
        num: how many points to draw.
        radius: distance of the centres from the origin.
        std: standard deviation of each Gaussian, along each axis.

    Returns:
        [num, 2].

    Example:
        >>> eight_gaussians(jax.random.key(0), 5).shape
        (5, 2)
    """
    _check(key, num, radius=radius, std=std)
    key_mode, key_noise = jax.random.split(key)
    angle = jax.random.randint(key_mode, (num,), 0, 8).astype(jnp.float32) * (jnp.pi / 4)
    return radius * _on_circle(angle) + std * _normal(key_noise, num)


def moons(key: Key, num: int, *, noise: float = 0.05) -> Array:
    """Draws from two interleaved half circles.

    With theta uniform on [0, pi], half of the points are `(cos theta, sin theta)` and half
    `(1 - cos theta, 1/2 - sin theta)`; then `x = 2 (point + noise eps) - (1, 0)`. Mean (0, 1/2). This is scikit-learn's
    `make_moons`, scaled as in TorchCFM's experiments. TorchCFM's tutorials have another: `3 point - 1`, noise 0.2.

    Args:
        key: PRNG key.
        num: how many points to draw.
        noise: standard deviation added to the unit-radius moons, before scaling.

    Returns:
        [num, 2].
    """
    _check(key, num, noise=noise)
    key_angle, key_moon, key_noise = jax.random.split(key, 3)
    outer = _on_circle(_uniform(key_angle, num, 0.0, jnp.pi))
    inner = jnp.stack([1.0 - outer[:, 0], 0.5 - outer[:, 1]], axis=-1)
    point = jnp.where(jax.random.bernoulli(key_moon, shape=(num, 1)), outer, inner) + noise * _normal(key_noise, num)
    return jnp.stack([2.0 * point[:, 0] - 1.0, 2.0 * point[:, 1]], axis=-1)


def checkerboard(key: Key, num: int, *, scale: float = 2.0) -> Array:
    """Draws uniformly from the black fields of a 4 x 4 checkerboard on [-2 scale, 2 scale]^2.

    A point is black where `floor(x / scale) + floor(y / scale)` is even: density `1 / (8 scale^2)` there, else 0.
    Both marginals are uniform, with mean 0 and variance `4 scale^2 / 3`; their covariance is `scale^2 / 4`.

    Args:
        key: PRNG key.
        num: how many points to draw.
        scale: side of a field.

    Returns:
        [num, 2].
    """
    _check(key, num, scale=scale)
    key_x, key_y, key_row = jax.random.split(key, 3)
    x = _uniform(key_x, num, -2.0, 2.0)
    row = 2.0 * jax.random.randint(key_row, (num,), -1, 1).astype(jnp.float32)
    y = _uniform(key_y, num, 0.0, 1.0) + row + jnp.floor(x) % 2
    return scale * jnp.stack([x, y], axis=-1)


def s_curve(key: Key, num: int, *, noise: float = 0.05, scale: float = 1.5) -> Array:
    """Draws from an S made of two three-quarter circles.

    With theta uniform on [-3 pi / 2, 3 pi / 2], `x = scale ((sin theta, sign(theta) (cos theta - 1)) + noise eps)`:
    the first and third coordinates of scikit-learn's `make_s_curve`. Mean 0.

    Args:
        key: PRNG key.
        num: how many points to draw.
        noise: standard deviation added before scaling.
        scale: radius of the two circles.

    Returns:
        [num, 2].
    """
    _check(key, num, noise=noise, scale=scale)
    key_angle, key_noise = jax.random.split(key)
    angle = _uniform(key_angle, num, -1.5 * jnp.pi, 1.5 * jnp.pi)
    point = jnp.stack([jnp.sin(angle), jnp.sign(angle) * (jnp.cos(angle) - 1.0)], axis=-1)
    return scale * (point + noise * _normal(key_noise, num))


def circles(key: Key, num: int, *, noise: float = 0.05, factor: float = 0.5, scale: float = 3.5) -> Array:
    """Draws from two concentric circles, equally likely.

    `x = scale (r (cos theta, sin theta) + noise eps)`, r being 1 or `factor`: scikit-learn's `make_circles`. Mean 0,
    covariance `scale^2 ((1 + factor^2) / 4 + noise^2) I`.

    Args:
        key: PRNG key.
        num: how many points to draw.
        noise: standard deviation added before scaling.
        factor: radius of the inner circle relative to the outer.
        scale: radius of the outer circle.

    Returns:
        [num, 2].
    """
    _check(key, num, noise=noise, factor=factor, scale=scale)
    key_angle, key_circle, key_noise = jax.random.split(key, 3)
    point = _on_circle(_uniform(key_angle, num, 0.0, 2.0 * jnp.pi))
    radius = jnp.where(jax.random.bernoulli(key_circle, shape=(num, 1)), 1.0, factor)
    return scale * (radius * point + noise * _normal(key_noise, num))


def pinwheel(
    key: Key,
    num: int,
    *,
    num_classes: int = 5,
    radial_std: float = 0.3,
    tangential_std: float = 0.1,
    rate: float = 0.25,
    scale: float = 2.0,
) -> Array:
    """Draws from the spiral arms of a pinwheel.

    Each arm is a Gaussian `(r, s) = (1 + radial_std eps_1, tangential_std eps_2)`, turned by
    `2 pi k / num_classes + rate exp(r)`, with k uniform, and scaled. Mean 0 and
    `E |x|^2 = scale^2 (1 + radial_std^2 + tangential_std^2)`.

    Args:
        key: PRNG key.
        num: how many points to draw.
        num_classes: number of arms.
        radial_std: spread along an arm.
        tangential_std: spread across an arm.
        rate: how much the arms bend.
        scale: distance of the middle of an arm from the origin.

    Returns:
        [num, 2].

    References:
        Johnson et al., "Composing graphical models with neural networks for structured representations and fast
        inference", 2016, section 2.
    """
    _check(key, num, radial_std=radial_std, tangential_std=tangential_std, rate=rate, scale=scale)
    check_integer("num_classes", num_classes)
    key_arm, key_noise = jax.random.split(key)
    noise = _normal(key_noise, num)
    radial, tangential = 1.0 + radial_std * noise[:, 0], tangential_std * noise[:, 1]
    arm = jax.random.randint(key_arm, (num,), 0, num_classes).astype(jnp.float32)
    angle = arm * (2.0 * jnp.pi / num_classes) + rate * jnp.exp(radial)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return scale * jnp.stack([radial * cos - tangential * sin, radial * sin + tangential * cos], axis=-1)


TOYS: dict[str, ToySampler] = {
    "eight_gaussians": eight_gaussians,
    "moons": moons,
    "checkerboard": checkerboard,
    "s_curve": s_curve,
    "circles": circles,
    "pinwheel": pinwheel,
}
"""Every toy distribution, by name."""


def make_toy(name: str) -> ToySampler:
    """Looks up a toy distribution for a command line.

    Args:
        name: a key of `TOYS`.

    Returns:
        The function `(key, num) -> [num, 2]`.

    Raises:
        ValueError: if there is no such distribution; lists those there are.

    Example:
        >>> make_toy("moons")(jax.random.key(0), 3).shape
        (3, 2)
    """
    check_member("name", name, tuple(TOYS))
    return TOYS[name]


def _check(key: Key, num: int, **options: ArrayTree) -> None:
    """Raises `ValueError` unless there is a key, a number of points, and finite options."""
    check_key(key)
    check_integer("num", num, least=0)
    for name, value in options.items():
        check_number(name, value, "[0, inf)" if "std" in name or name == "noise" else "(-inf, inf)")


def _on_circle(angle: Array) -> Array:
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _normal(key: Key, num: int) -> Array:
    return jax.random.normal(key, (num, 2), dtype=jnp.float32)


def _uniform(key: Key, num: int, low: float, high: float) -> Array:
    return jax.random.uniform(key, (num,), dtype=jnp.float32, minval=low, maxval=high)
