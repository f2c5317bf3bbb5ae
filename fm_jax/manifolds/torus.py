"""Flat tori: angles, each modulo a whole turn."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer, check_key, is_traced
from fm_jax.manifolds.points import TOLERANCE, check_shape_of, norm
from fm_jax.types import AnyArray, Key, Like

# A turn in two parts: the first has 8 bits, so that a number of turns times it is exact, and what is left is small.
_TURN = 6.28125
_REST = 2 * math.pi - _TURN


@dataclass(frozen=True)
class FlatTorus:
    """T^n, n angles, each on a circle of circumference 2 pi.

    Angles are in [-pi, pi). `log` is the shortest difference of each, also across the seam at pi right to float32's
    last bits; of angles exactly pi apart it is the one that does not cross the seam, and has the sign of y - x. It
    jumps from pi to -pi there, the cut locus of this manifold, as a derivative does not tell.

    Attributes:
        n: the dimension.

    Raises:
        ValueError: for a dimension less than 1.

    Example:
        >>> torus, x = FlatTorus(2), jnp.array([3.0, 0.0])
        >>> torus.exp(x, jnp.array([1.0, 1.0])).round(4)
        Array([-2.2832,  1.    ], dtype=float32)
        >>> torus.log(x, jnp.array([-3.0, -1.0])).round(4)
        Array([ 0.2832, -1.    ], dtype=float32)
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
    def log_total(self) -> float:
        return self.n * math.log(2 * math.pi)

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`x + u`, wrapped."""
        return self.project(x + u)

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`y - x`, wrapped; within pi, pi and -pi themselves as they are."""
        turns = jnp.round((y - x) / (2 * math.pi))
        half = turns * (_TURN / 2)  # from each: near the seam both are exact, where y - x is not
        return (y - half) - (x + half) - turns * _REST

    def several_ways(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """Whether angles of x and y are exactly pi apart."""
        return (jnp.abs(self.log(x, y)) >= jnp.asarray(math.pi, x.dtype)).any(axis=-1)

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`|log|`."""
        return norm(self.log(x, y))[..., 0]

    def project(self, x: AnyArray) -> AnyArray:
        """The same angle in [-pi, pi)."""
        inside = (x >= -math.pi) & (x < math.pi)
        turns = jnp.where(inside, 0, jnp.floor((x + math.pi) / (2 * math.pi)))
        y = (x - turns * _TURN) - turns * _REST
        # Rounding may leave an angle beside an end on the wrong side of it.
        return jnp.where(y >= math.pi, y - 2 * math.pi, jnp.where(y < -math.pi, y + 2 * math.pi, y))

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
        """Each angle uniform in [-pi, pi)."""
        check_key(key)
        check_shape_of("like", like, self)
        return jax.random.uniform(key, like.shape, like.dtype, -math.pi, math.pi)

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it: angles further than pi from 0 are degrees, or a slip."""
        check_shape_of(name, x, self)
        if is_traced(x) or not getattr(x, "is_fully_addressable", True):
            return
        size = np.abs(np.asarray(x, np.float64))
        if num := int((~(size <= math.pi + TOLERANCE)).sum()):
            raise ValueError(
                f"{name} must be points of {self}, angles in [-pi, pi), got {num} of {size.size} outside, "
                f"up to {size.max():.3g}; manifold.project brings them there."
            )
