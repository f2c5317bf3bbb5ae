"""Spheres: unit vectors, the angle between them their distance."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_key
from fm_jax.manifolds.points import check_points, check_shape_of, dot, norm, over
from fm_jax.types import AnyArray, Key, Like


@dataclass(frozen=True)
class Sphere:
    """S^n, the unit vectors of R^(n+1) with the metric of that space.

    `log` takes the angle from both its sine and its cosine, and differences of what is nearly equal before all else, so
    that float32 is right to 1e-6 from coincidence to the antipode. Opposite points are pi apart along any direction: of
    exactly opposite ones `log` is pi times the direction, of those orthogonal to x, of the axis of the ambient space
    in which x is least.

    Notebooks: (15.1).

    Attributes:
        n: the dimension.

    Raises:
        ValueError: for a dimension less than 1.

    Example:
        >>> sphere, x = Sphere(2), jnp.array([1.0, 0.0, 0.0])
        >>> jnp.abs(sphere.exp(x, jnp.array([0.0, jnp.pi / 2, 0.0]))).round(6)
        Array([0., 1., 0.], dtype=float32)
        >>> sphere.log(x, -x)
        Array([0.       , 3.1415927, 0.       ], dtype=float32)
    """

    n: int

    def __post_init__(self) -> None:
        check_integer("n", self.n)

    @property
    def dim(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n + 1,)

    @property
    def log_total(self) -> float:
        half = (self.n + 1) / 2
        return math.log(2) + half * math.log(math.pi) - math.lgamma(half)

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`cos|u| x + sin|u| u / |u|`."""
        r = norm(u)
        return self.project(jnp.cos(r) * x + over(jnp.sin(r), r) * u)

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """The tangent part of y, as long as the angle."""
        cosine = dot(x, y)
        # With y from x, or from -x, whichever is nearer, what is left is small without cancellation.
        d = jnp.where(cosine > 0, y - x, y + x)
        w = d - dot(x, d) * x
        sine = norm(w)
        opposite = (sine == 0) & (cosine < 0)
        away = jax.nn.one_hot(jnp.argmin(jnp.abs(x), axis=-1), self.n + 1, dtype=x.dtype)
        away = away - dot(x, away) * x
        angle = jnp.arctan2(sine, jnp.where(sine == 0, 1, cosine))
        return jnp.where(opposite, math.pi * away / norm(away), over(angle, sine) * w)

    def several_ways(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """Whether y is opposite to x, exactly."""
        return ((norm(self.tangent(x, x + y)) == 0) & (dot(x, y) < 0))[..., 0]

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """The angle."""
        return norm(self.log(x, y))[..., 0]

    def project(self, x: AnyArray) -> AnyArray:
        """`x / |x|`; NaN at 0, which is as near to all points."""
        return x / jnp.sqrt(dot(x, x))

    def tangent(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`u - <x, u> x`."""
        return u - dot(x, u) * x

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """The tangent part."""
        return self.tangent(x, g)

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`|u|^2`."""
        return (u * u).sum(axis=-1)

    def log_volume(self, x: AnyArray) -> AnyArray:
        """0."""
        return jnp.zeros(x.shape[:-1], x.dtype)

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`(n - 1) log(sin|u| / |u|)`; -inf where |u| is a multiple of pi."""
        r = norm(u)[..., 0]
        return (self.n - 1) * jnp.log(jnp.abs(over(jnp.sin(r), r)))

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """The tangent part of standard normal noise."""
        check_key(key)
        return self.tangent(x, jax.random.normal(key, x.shape, x.dtype))

    def uniform(self, key: Key, like: Like) -> AnyArray:
        """Normal noise, projected."""
        check_key(key)
        check_shape_of("like", like, self)
        return self.project(jax.random.normal(key, like.shape, like.dtype))

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it."""
        check_points(name, x, self)
