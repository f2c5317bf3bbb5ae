"""R^n as a manifold among the others, for products with them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_key
from fm_jax.manifolds.points import check_points, norm, refuse_uniform
from fm_jax.types import AnyArray, Key, Like


@dataclass(frozen=True)
class Euclidean:
    """R^n: geodesics are straight, and a `GeodesicPath` on it is the `AffinePath` of the same convex schedule.

    Attributes:
        n: the dimension.

    Raises:
        ValueError: for a dimension less than 1.

    Example:
        >>> Euclidean(2).distance(jnp.zeros(2), jnp.array([3.0, 4.0]))
        Array(5., dtype=float32)
    """

    n: int

    def __post_init__(self) -> None:
        check_integer("n", self.n)

    @property
    def dim(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n,)

    @property
    def log_total(self) -> None:
        return None

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`x + u`."""
        return x + u

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`y - x`."""
        return y - x

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`|y - x|`."""
        return norm(y - x)[..., 0]

    def project(self, x: AnyArray) -> AnyArray:
        """The point itself."""
        return x

    def tangent(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """The vector itself."""
        return u

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """The gradient itself."""
        return g

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`|u|^2`."""
        return (u * u).sum(axis=-1)

    def log_volume(self, x: AnyArray) -> AnyArray:
        """0."""
        return jnp.zeros(x.shape[:-1], x.dtype)

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """0."""
        return jnp.zeros(u.shape[:-1], u.dtype)

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """Standard normal noise."""
        check_key(key)
        return jax.random.normal(key, x.shape, x.dtype)

    def uniform(self, key: Key, like: Like) -> AnyArray:
        """Raises `ValueError`: the volume is infinite."""
        return refuse_uniform(self)

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it."""
        check_points(name, x, self)
