"""Hyperbolic spaces: a sheet of the hyperboloid in Minkowski space, and its picture in the Poincare ball."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, check_integer, check_key, is_traced
from fm_jax.manifolds.points import check_points, dot, norm, over, refuse_uniform
from fm_jax.types import AnyArray, Array, Key, Like


@dataclass(frozen=True)
class Hyperbolic:
    """H^n, of curvature -1: the x of R^(n+1) with `<x, x>_L = -1`, x_0 > 0, in the metric of the Lorentz product.

    `<x, y>_L = -x_0 y_0 + x_1 y_1 + ... + x_n y_n`. This is the Lorentz model; `to_ball` and `from_ball` are for
    pictures (Nickel & Kiela 2018, arXiv:1806.03417).

    x_0 follows from the others, and `log` and `distance` take it from there: they boost y by what brings x to the
    origin, from differences of what is nearly equal, and find the distance by its hyperbolic sine, right in float32
    from 1e-6 to 5. Rounding grows with the distance R of x from the origin (1, 0, ..., 0) as cosh R.

    Attributes:
        n: the dimension.

    Raises:
        ValueError: for a dimension less than 1.

    Example:
        >>> space, x = Hyperbolic(2), jnp.array([1.0, 0.0, 0.0])
        >>> y = space.exp(x, jnp.array([0.0, 1.0, 0.0]))
        >>> y.round(4), space.distance(x, y).round(4)
        (Array([1.5431, 1.1752, 0.    ], dtype=float32), Array(1., dtype=float32))
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
    def log_total(self) -> None:
        return None

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`cosh|u| x + sinh|u| u / |u|`."""
        r = norm(_from_tangent(x, u))
        return _lift(jnp.cosh(r) * x[..., 1:] + over(jnp.sinh(r), r) * u[..., 1:])

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """The tangent part of y, as long as the distance."""
        x = self.project(x)
        z = _boosted(x, self.project(y))
        sine = norm(z)
        return _to_tangent(x, over(jnp.arcsinh(sine), sine) * z)

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`arccosh(-<x, y>_L)`."""
        return jnp.arcsinh(norm(_boosted(self.project(x), self.project(y))))[..., 0]

    def project(self, x: AnyArray) -> AnyArray:
        """`x / sqrt(-<x, x>_L)`, along the ray; NaN outside of the cone of what has one.

        Where `<x, x>_L` is -1 but for rounding, the coordinates after the first stay as they are.
        """
        square = -_lorentz(x, x)
        slack = 16 * float(jnp.finfo(x.dtype).eps) * x[..., :1] ** 2
        on_it = jnp.abs(square - 1) <= slack  # derivatives remain those along the ray
        square = jnp.where(on_it, 1 + (square - jax.lax.stop_gradient(square)), square)
        return _lift(x[..., 1:] / jnp.sqrt(square))

    def tangent(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`u + <x, u>_L x`."""
        return u + _lorentz(x, u) * x

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """The tangent part of `(-g_0, g_1, ..., g_n)`."""
        return self.tangent(x, jnp.concatenate([-g[..., :1], g[..., 1:]], axis=-1))

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`<u, u>_L`, of a tangent vector, without cancellation."""
        return (_from_tangent(x, u) ** 2).sum(axis=-1)

    def log_volume(self, x: AnyArray) -> AnyArray:
        """0."""
        return jnp.zeros(x.shape[:-1], x.dtype)

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`(n - 1) log(sinh|u| / |u|)`."""
        r = norm(_from_tangent(x, u))[..., 0]
        return (self.n - 1) * jnp.log(over(jnp.sinh(r), r))

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """Standard normal noise at the origin, transported to x."""
        check_key(key)
        return _to_tangent(x, jax.random.normal(key, (*x.shape[:-1], self.n), x.dtype))

    def uniform(self, key: Key, like: Like) -> AnyArray:
        """Raises `ValueError`: the volume is infinite."""
        return refuse_uniform(self)

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it."""
        check_points(name, x, self)


def to_ball(x: AnyArray) -> AnyArray:
    """Points of the Lorentz model in the Poincare ball, `(x_1, ..., x_n) / (1 + x_0)`.

    Args:
        x: points of `Hyperbolic(n)`, [..., n + 1].

    Returns:
        [..., n], of length less than 1.

    Raises:
        ValueError: for what is no points of a hyperbolic space.

    Example:
        >>> to_ball(jnp.array([jnp.cosh(1.0), jnp.sinh(1.0), 0.0])).round(4)  # tanh(1 / 2)
        Array([0.4621, 0.    ], dtype=float32)
    """
    check_array("x", x)
    Hyperbolic(max(1, x.shape[-1] - 1) if x.shape else 1).check("x", x)
    return x[..., 1:] / (1 + x[..., :1])


def from_ball(y: AnyArray) -> AnyArray:
    """Points of the Poincare ball in the Lorentz model, `(1 + |y|^2, 2 y) / (1 - |y|^2)`.

    Args:
        y: of length less than 1, [..., n] in floating point.

    Returns:
        Points of `Hyperbolic(n)`, [..., n + 1].

    Raises:
        ValueError: for what is not floating point [..., n], or known to lie outside of the ball; NaN does.

    Example:
        >>> from_ball(jnp.array([0.5, 0.0])).round(4)
        Array([1.6667, 1.3333, 0.    ], dtype=float32)
    """
    check_array("y", y)
    if not y.shape or y.shape[-1] < 1 or not jnp.issubdtype(y.dtype, jnp.floating):
        raise ValueError(f"y must be points of a ball, [..., n] in floating point, got {y.dtype} {tuple(y.shape)}.")
    if not is_traced(y) and getattr(y, "is_fully_addressable", True):
        length = np.linalg.norm(np.asarray(y, np.float64), axis=-1)
        if not (length < 1).all():
            raise ValueError(f"y must lie in the ball, |y| < 1, got a length of {length.max():.6g}.")
    r = norm(y)
    return _lift(2 * y / ((1 - r) * (1 + r)))


def _lorentz(x: Array, y: Array) -> Array:
    """`<x, y>_L`, over the last axis, which stays."""
    return dot(x[..., 1:], y[..., 1:]) - x[..., :1] * y[..., :1]


def _lift(x: Array) -> Array:
    """The point with coordinates x after the first."""
    return jnp.concatenate([jnp.sqrt(1 + dot(x, x)), x], axis=-1)


def _boosted(x: Array, y: Array) -> Array:
    """Where the boost that brings x to the origin brings y, without the first coordinate: sinh of the distance long."""
    d, one, both = y[..., 1:] - x[..., 1:], 1 + x[..., :1], x[..., :1] + y[..., :1]
    first = dot(d, x[..., 1:] + y[..., 1:]) / both  # y_0 - x_0
    # <x, d> / (1 + x_0) - first, of which the large parts cancel.
    share = ((first - 2) * dot(x[..., 1:], d) - one * dot(d, d)) / (one * both)
    return d + share * x[..., 1:]


def _to_tangent(x: Array, a: Array) -> Array:
    """The tangent vector at x that a in R^n, one at the origin, becomes by that boost back: an isometry."""
    first = dot(x[..., 1:], a)
    return jnp.concatenate([first, a + first / (1 + x[..., :1]) * x[..., 1:]], axis=-1)


def _from_tangent(x: Array, u: Array) -> Array:
    """The inverse of `_to_tangent`; u_0 follows from the rest."""
    share = dot(x[..., 1:], u[..., 1:]) / (x[..., :1] * (1 + x[..., :1]))
    return u[..., 1:] - share * x[..., 1:]
