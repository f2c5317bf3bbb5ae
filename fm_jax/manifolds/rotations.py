"""Rotations of space: matrices, the angle between them their distance."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_key
from fm_jax.manifolds.points import check_points, check_shape_of, dot, norm
from fm_jax.types import AnyArray, Array, Key, Like

_STEPS = 10  # of Newton's method: singular values a factor of 1e4 apart are 1 to rounding after 9


@dataclass(frozen=True)
class SO3:
    """SO(3), the rotation matrices [3, 3] with the metric `<U, W> = tr(U^T W) / 2`, so that distances are angles.

    Tangent vectors at R are R times antisymmetric matrices. `log` takes differences of what is nearly equal before all
    else, and the angle from the sine and the cosine of its half, from the row of the matrix of the quaternion's
    products that is largest: float32 is right to 1e-6 from coincidence to half a turn. Of exactly half a turn `log` is
    the rotation by +pi about the axis whose component of largest size is positive. The uniform distribution is Haar's.

    Example:
        >>> manifold, x = SO3(), jnp.eye(3)
        >>> y = manifold.exp(x, jnp.array([[0.0, -jnp.pi / 2, 0.0], [jnp.pi / 2, 0.0, 0.0], [0.0, 0.0, 0.0]]))
        >>> y.round(6) + 0.0
        Array([[ 0., -1.,  0.],
               [ 1.,  0.,  0.],
               [ 0.,  0.,  1.]], dtype=float32)
        >>> manifold.distance(x, y).round(6)
        Array(1.570796, dtype=float32)
    """

    @property
    def dim(self) -> int:
        return 3

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 3)

    @property
    def log_total(self) -> float:
        return math.log(8 * math.pi**2)

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`x (I + sin(w) / w A + (1 - cos(w)) / w^2 A^2)`, A = x^T u and w its angle: Rodrigues."""
        w = _vee(_times(_transposed(x), u))
        a, q = _hat(w), dot(w, w)[..., None]
        return _newton(x + _times(x, _sinc(q) * a + _sinc(q / 4) ** 2 / 2 * _times(a, a)))

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """X times the antisymmetric matrix of the axis of `x^T y`, as long as the angle."""
        return _times(x, _hat(_rotation_vector(x, y)))

    def several_ways(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """Whether x and y are exactly half a turn apart."""
        return self.distance(x, y) >= jnp.asarray(math.pi, x.dtype)

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """The angle of `x^T y`."""
        return norm(_rotation_vector(x, y))[..., 0]

    def project(self, x: AnyArray) -> AnyArray:
        """The nearest rotation, by Newton's method; where the determinant is negative, that of -x; NaN where it is 0.

        `X <- (X + X^-T) / 2`, of X scaled to determinant 1, so that derivatives are those of the polar factor, finite
        where singular values coincide.
        """

        def step(_: int, x: Array) -> Array:
            return _newton(x / jnp.cbrt(dot(x[..., 0, :], _cofactors(x)[..., 0, :]))[..., None])

        return jax.lax.fori_loop(0, _STEPS, step, x)

    def tangent(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """X times the antisymmetric part of `x^T u`."""
        return _times(x, _hat(_vee(_times(_transposed(x), u))))

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """Twice the tangent part: the metric is half of the ambient one."""
        return 2 * self.tangent(x, g)

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`tr(u^T u) / 2`."""
        return (u * u).sum(axis=(-2, -1)) / 2

    def log_volume(self, x: AnyArray) -> AnyArray:
        """0."""
        return jnp.zeros(x.shape[:-2], x.dtype)

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`2 log(sin(w / 2) / (w / 2))`, w the norm of u; -inf where it is a multiple of 2 pi."""
        return 2 * jnp.log(jnp.abs(_sinc(self.squared_norm(x, u) / 4)))

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """X times the antisymmetric matrix of a standard normal vector."""
        check_key(key)
        return _times(x, _hat(jax.random.normal(key, x.shape[:-1], x.dtype)))

    def uniform(self, key: Key, like: Like) -> AnyArray:
        """Quaternions of standard normal components."""
        check_key(key)
        check_shape_of("like", like, self)
        q = jax.random.normal(key, (*like.shape[:-2], 4), like.dtype)
        q = q / norm(q)
        a = _hat(q[..., 1:])
        return _newton(jnp.broadcast_to(jnp.eye(3, dtype=q.dtype), a.shape) + 2 * (q[..., :1, None] * a + _times(a, a)))

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it."""
        check_points(name, x, self)


def _times(a: Array, b: Array) -> Array:
    """The product of matrices, in the precision of their dtype on every device."""
    return jnp.matmul(a, b, precision="highest")


def _transposed(a: Array) -> Array:
    return jnp.swapaxes(a, -1, -2)


def _hat(w: Array) -> Array:
    """The antisymmetric matrices [..., 3, 3] of vectors: `hat(w) y = w x y`."""
    x, y, z = w[..., 0], w[..., 1], w[..., 2]
    o = jnp.zeros_like(x)
    return jnp.stack([o, -z, y, z, o, -x, -y, x, o], axis=-1).reshape(*w.shape[:-1], 3, 3)


def _vee(a: Array) -> Array:
    """The vectors [..., 3] of the antisymmetric parts of matrices."""
    return jnp.stack([a[..., 2, 1] - a[..., 1, 2], a[..., 0, 2] - a[..., 2, 0], a[..., 1, 0] - a[..., 0, 1]], -1) / 2


def _cofactors(x: Array) -> Array:
    """The matrix of cofactors, `det(x) x^-T`."""
    at = lambda i, j: jnp.roll(x, (-i, -j), axis=(-2, -1))  # noqa: E731
    return at(1, 1) * at(2, 2) - at(1, 2) * at(2, 1)


def _newton(x: Array) -> Array:
    """A step of Newton's method to the nearest orthogonal matrix; from within rounding of it, all that is needed."""
    cofactors = _cofactors(x)
    return (x + cofactors / dot(x[..., 0, :], cofactors[..., 0, :])[..., None]) / 2


def _sinc(q: Array) -> Array:
    """`sin(sqrt(q)) / sqrt(q)`, by its series below 1, so that all derivatives are right at 0."""
    series = jnp.polyval(jnp.array([(-1) ** k / math.factorial(2 * k + 1) for k in range(9)][::-1], q.dtype), q)
    r = jnp.sqrt(jnp.where(q < 1, 1, q))
    return jnp.where(q < 1, series, jnp.sin(r) / r)


def _rotation_vector(x: Array, y: Array) -> Array:
    """The axis of the rotation x^T y, as long as its angle [..., 3]."""
    d = _times(_transposed(x), y - x)  # x^T y - I, exact where x and y are near
    s, c = d + _transposed(d), 2 * _vee(d)
    diagonal = jnp.diagonal(d, axis1=-2, axis2=-1)
    trace = diagonal.sum(axis=-1, keepdims=True)
    # Four times the products of the quaternion (w, v) with itself; each row is a multiple of it.
    w_row = jnp.concatenate([4 + trace, c], axis=-1)
    v_rows = jnp.where(np.eye(3, dtype=bool), (2 * diagonal - trace)[..., None], s)
    rows = jnp.concatenate([w_row[..., None, :], jnp.concatenate([c[..., None], v_rows], axis=-1)], axis=-2)
    largest = jnp.argmax(jnp.diagonal(rows, axis1=-2, axis2=-1), axis=-1)
    row = jnp.take_along_axis(rows, largest[..., None, None], axis=-2)[..., 0, :]
    row = jnp.where(row[..., :1] < 0, -row, row)
    w, v = row[..., :1], row[..., 1:]
    # 2 atan(|v| / w) / |v|, by its series where that is small.
    small = dot(v, v) < 0.01 * w * w
    z = dot(v, v) / jnp.where(small, w, 1) ** 2
    z = jnp.where(small, z, 0)
    series = jnp.polyval(jnp.array([(-1) ** k / (2 * k + 1) for k in range(9)][::-1], z.dtype), z)
    r = norm(jnp.where(small, 1, v))
    return jnp.where(small, 2 * series / jnp.where(small, w, 1), 2 * jnp.arctan2(r, w) / r) * v
