"""Simplices with the Fisher-Rao metric: probabilities, as parts of a sphere by their roots."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_key
from fm_jax.manifolds.points import check_points, check_shape_of, dot, norm, over
from fm_jax.types import AnyArray, Array, Key, Like


@dataclass(frozen=True)
class Simplex:
    """Probabilities of n + 1 categories, with the Fisher-Rao metric `<u, v>_p = sum_i u_i v_i / p_i`.

    `2 sqrt(p)` maps it, with distances, to where no coordinate is negative on the sphere of radius 2, whose geodesics
    these are. One that reaches a face, where a probability is 0, is reflected there: `exp` never leaves the simplex,
    and `log` is its inverse up to the first reflection. (Davis et al. 2024, arXiv:2405.14664.)

    On a face the metric is infinite across it. `log` arrives at points of it from inside, and one-hot data are such
    points; `exp` from there stays in the face, whatever u is across it, and derivatives that are infinite are 0.

    Attributes:
        n: the dimension, one less than the number of categories.

    Raises:
        ValueError: for a dimension less than 1.

    Example:
        >>> simplex, p = Simplex(2), jnp.array([1 / 3, 1 / 3, 1 / 3])
        >>> simplex.distance(p, jnp.array([1.0, 0.0, 0.0])).round(4)  # 2 arccos(1 / sqrt(3))
        Array(1.9106, dtype=float32)
        >>> simplex.exp(p, simplex.log(p, jnp.array([0.5, 0.5, 0.0]))).round(4)
        Array([0.5, 0.5, 0. ], dtype=float32)
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
        return half * math.log(math.pi) - math.lgamma(half)

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`x (cos r + sin r / r u / 2x)^2`, r half the length of u."""
        rate = over(u, x, 0.0) / 2
        r = norm(_root(x) * rate)
        return self.project(x * (jnp.cos(r) + over(jnp.sin(r), r) * rate) ** 2)

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """The tangent part at `sqrt(x)` of `sqrt(y)`, as long as the angle, times `2 sqrt(x)`."""
        u = self.tangent(x, over(2 * _root(x), _root(x) + _root(y)) * (y - x))
        sine, angle = _angle(x, y)
        return over(angle, sine) * u

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """Twice the angle between the roots."""
        return 2 * _angle(x, y)[1][..., 0]

    def project(self, x: AnyArray) -> AnyArray:
        """`x / sum(x)`, what is negative being 0; NaN where nothing is positive."""
        x = jnp.where(x >= 0, x, jnp.where(x < 0, 0, jnp.nan))
        return x / x.sum(axis=-1, keepdims=True)

    def tangent(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`u - sum(u) x`, nearest in the metric."""
        return u - u.sum(axis=-1, keepdims=True) * x

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """`x (g - <x, g>)`."""
        return x * (g - dot(x, g))

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`sum u^2 / x`; infinite for u across a face."""
        some = u != 0
        each = u * (u / jnp.where(some, x, 1))
        return jnp.where(some, each, 0).sum(axis=-1)

    def log_volume(self, x: AnyArray) -> AnyArray:
        """`-1/2 sum log x`."""
        return -jnp.log(x).sum(axis=-1) / 2

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`(n - 1) log(sin r / r)`, r half the length of u; -inf where r is a multiple of pi."""
        r = norm(over(u, _root(x), 0.0))[..., 0] / 2
        return (self.n - 1) * jnp.log(jnp.abs(over(jnp.sin(r), r)))

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """The tangent part of standard normal noise times `sqrt(x)`."""
        check_key(key)
        return self.tangent(x, _root(x) * jax.random.normal(key, x.shape, x.dtype))

    def uniform(self, key: Key, like: Like) -> AnyArray:
        """Dirichlet of parameters 1/2, Jeffreys' prior: squares of normal noise, projected."""
        check_key(key)
        check_shape_of("like", like, self)
        return self.project(jax.random.normal(key, like.shape, like.dtype) ** 2)

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it."""
        check_points(name, x, self)


def _root(x: Array) -> Array:
    """`sqrt(x)`, of derivative 0 where x is 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def _angle(x: Array, y: Array) -> tuple[Array, Array]:
    """The length of the part of `sqrt(y)` orthogonal to `sqrt(x)`, and the angle between them."""
    a, b = _root(x), _root(y)
    d = over(y - x, a + b, 0.0)  # b - a without cancellation
    sine = norm(d - dot(a, d) * a)
    return sine, jnp.arctan2(sine, jnp.where(sine == 0, 1, dot(a, b)))
