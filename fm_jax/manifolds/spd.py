"""Symmetric positive definite matrices: covariances, diffusion tensors; affine-invariant, or flat by the logarithm."""

import functools
import itertools
import math
import string
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular

from fm_jax.checks import check_integer, check_key, is_traced
from fm_jax.manifolds.points import check_points, norm, over, refuse_uniform
from fm_jax.types import AnyArray, Array, Key, Like, Manifold


@dataclass(frozen=True)
class _SPD:
    """What the metrics share: the points, the ambient space."""

    n: int

    def __post_init__(self) -> None:
        check_integer("n", self.n)

    @property
    def dim(self) -> int:
        return self.n * (self.n + 1) // 2

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n, self.n)

    @property
    def log_total(self) -> None:
        return None

    def project(self, x: AnyArray) -> AnyArray:
        """The symmetric part; it is no point where that is not positive definite."""
        return _symmetric(x)

    def tangent(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """The symmetric part."""
        return _symmetric(u)

    def uniform(self, key: Key, like: Like) -> AnyArray:
        """Raises `ValueError`: the volume is infinite."""
        return refuse_uniform(self)

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it."""
        check_points(name, x, cast(Manifold, self))
        if is_traced(x) or not getattr(x, "is_fully_addressable", True):
            return
        with jax.ensure_compile_time_eval():
            least = np.linalg.eigvalsh(np.asarray(x, np.float64)).min(axis=-1, initial=np.inf).reshape(-1)
        if num := int((~(least > 0)).sum()):
            raise ValueError(
                f"{name} must be points of {self}, got {num} of {len(least)} that are not positive definite, with "
                f"eigenvalues down to {least.min():.3g}."
            )


@dataclass(frozen=True)
class SPD(_SPD):
    """The symmetric positive definite matrices [n, n] with the metric `<U, W>_A = tr(A^-1 U A^-1 W)`.

    It is affine-invariant: `A -> G A G^T` is an isometry for every invertible G, the inverse one too. Curvature is not
    positive, so that there is one geodesic between any two, and none reaches a singular matrix. With `A = C C^T` all is
    done on `C^-1 U C^-T`, by its eigenvalues; derivatives, the first and the second, are by divided differences, right
    where eigenvalues coincide. In float32, errors in relation to the distance are at most 1e-6 times the condition
    numbers of A and of `A^-1 B`.

    References: Pennec, Fillard and Ayache, "A Riemannian framework for tensor computing" (2006); the derivatives,
    Daleckii and Krein (1965).

    Attributes:
        n: the number of rows.

    Raises:
        ValueError: for a number less than 1.

    Example:
        >>> manifold, x = SPD(2), jnp.eye(2)
        >>> y = manifold.exp(x, jnp.diag(jnp.array([0.0, 1.0])))
        >>> y.round(1)
        Array([[1. , 0. ],
               [0. , 2.7]], dtype=float32)
        >>> manifold.distance(3 * x, 3 * y).round(3)
        Array(1., dtype=float32)
    """

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`C expm(C^-1 u C^-T) C^T`, `x = C C^T`."""
        c = jnp.linalg.cholesky(x)
        grown, small = _exp_of(_whitened(c, u))
        return _symmetric(jnp.where(small, x, 0) + _colored(c, grown))

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`C logm(C^-1 y C^-T) C^T`, `x = C C^T`."""
        c = jnp.linalg.cholesky(x)
        return _colored(c, self._whitened_log(c, x, y))

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`|logm(C^-1 y C^-T)|`, `x = C C^T`: the root of the sum of squares of logarithms of eigenvalues of x^-1 y."""
        return _frobenius(self._whitened_log(jnp.linalg.cholesky(x), x, y))

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """`x sym(g) x`."""
        return _symmetric(_times(x, _symmetric(g), x))

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`tr(x^-1 u x^-1 u)`."""
        return (_whitened(jnp.linalg.cholesky(x), u) ** 2).sum(axis=(-2, -1))

    def log_volume(self, x: AnyArray) -> AnyArray:
        """`n (n - 1) / 4 log(2) - (n + 1) / 2 log(det(x))`, in the entries of the upper triangle."""
        roots = jnp.diagonal(jnp.linalg.cholesky(x), axis1=-2, axis2=-1)
        return self.n * (self.n - 1) / 4 * math.log(2) - (self.n + 1) * jnp.log(roots).sum(axis=-1)

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """The sum of `log(sinh(d / 2) / (d / 2))`, d the differences between all pairs of eigenvalues of `x^-1 u`."""
        whitened = _whitened(jnp.linalg.cholesky(x), u)
        return _pairs(whitened, *_eigh(whitened))

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """`C z C^T`, `x = C C^T`, z the symmetric part of standard normal noise."""
        check_key(key)
        return _colored(jnp.linalg.cholesky(x), _symmetric(jax.random.normal(key, x.shape, x.dtype)))

    def _whitened_log(self, c: Array, x: Array, y: Array) -> Array:
        return _log_of(_whitened(c, y), _whitened(c, y - x))[0]


@dataclass(frozen=True)
class LogEuclideanSPD(_SPD):
    """The symmetric positive definite matrices [n, n], flat: their logarithms are the space of symmetric matrices.

    `<U, W>_A` is the product of the derivatives of the logarithm at A along U and W, and the distance
    `|logm(B) - logm(A)|`. It is invariant under rotations, scaling and inversion. Means and geodesics are those of the
    logarithms, and `log_jacobian` is 0. Errors, the unit of rounding times the condition number, are in relation to the
    size of the logarithms: not to the distance, where points are near to each other.

    References: Arsigny, Fillard, Pennec and Ayache, "Geometric means in a novel vector space structure on symmetric
    positive-definite matrices" (2007).

    Attributes:
        n: the number of rows.

    Raises:
        ValueError: for a number less than 1.

    Example:
        >>> manifold, x = LogEuclideanSPD(2), jnp.diag(jnp.array([1.0, 4.0]))
        >>> manifold.distance(x, x @ x).round(3)
        Array(1.386, dtype=float32)
    """

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`expm(logm(x) + dlogm_x(u))`."""
        logarithm, values, vectors = self._log(x)
        grown, small = _exp_of(logarithm + _dlog(logarithm, values, vectors, _symmetric(u)))
        return _symmetric(jnp.where(small, _eye(x), 0) + grown)

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`dexpm_logm(x)(logm(y) - logm(x))`."""
        logarithm, values, vectors = self._log(x)
        return _dexp(logarithm, values, vectors, self._log(y)[0] - logarithm)

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """`|logm(y) - logm(x)|`."""
        return _frobenius(self._log(y)[0] - self._log(x)[0])

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """dexpm_logm(x), twice, of `sym(g)`."""
        logarithm, values, vectors = self._log(x)
        return _dexp(logarithm, values, vectors, _dexp(logarithm, values, vectors, _symmetric(g)))

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`|dlogm_x(u)|^2`."""
        return (_dlog(*self._log(x), _symmetric(u)) ** 2).sum(axis=(-2, -1))

    def log_volume(self, x: AnyArray) -> AnyArray:
        """`n (n - 1) / 4 log(2) - sum_(i <= j) log((a_i - a_j) / (log a_i - log a_j))`, a the eigenvalues of x.

        In the entries of the upper triangle.
        """
        logarithm, values, vectors = self._log(x)
        trace = jnp.trace(logarithm, axis1=-2, axis2=-1)
        return self.n * (self.n - 1) / 4 * math.log(2) - (self.n + 1) / 2 * trace - _pairs(logarithm, values, vectors)

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """0."""
        return jnp.zeros(u.shape[:-2], u.dtype)

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """dexpm_logm(x) of the symmetric part of standard normal noise."""
        check_key(key)
        return _dexp(*self._log(x), _symmetric(jax.random.normal(key, x.shape, x.dtype)))

    def _log(self, x: Array) -> tuple[Array, Array, Array]:
        """The logarithm, its eigenvalues and their vectors."""
        return _log_of(_symmetric(x), _symmetric(x - _eye(x)))


# ---- Matrices.


def _eye(x: Array) -> Array:
    return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _symmetric(x: Array) -> Array:
    return (x + _transposed(x)) / 2


def _times(*matrices: Array) -> Array:
    """The product, in the precision of their dtype on every device."""
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), matrices)


def _whitened(c: Array, u: Array) -> Array:
    """`C^-1 u C^-T`, of the symmetric part of u; C is lower triangular."""
    half = _transposed(solve_triangular(c, _symmetric(u), lower=True))
    return _symmetric(solve_triangular(c, half, lower=True))


def _colored(c: Array, u: Array) -> Array:
    """`C u C^T`."""
    return _symmetric(_times(c, u, _transposed(c)))


def _frobenius(x: Array) -> Array:
    return norm(x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]))[..., 0]


# ---- The exponential and the logarithm of symmetric matrices. What follows takes the eigenvalues and eigenvectors
# along with the matrix, as constants: derivatives are by rules of their own, in terms of the matrix, since those of
# eigenvectors are infinite where eigenvalues coincide. They are right up to the second.


def _eigh(s: Array) -> tuple[Array, Array]:
    """Eigenvalues, ascending, and eigenvectors, as constants."""
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(s))
    return values, vectors


def _exp_of(s: Array) -> tuple[Array, Array]:
    """`expm(s)`, but `expm(s) - 1` where s is small, and whether it is."""
    values, vectors = _eigh(s)
    small = (jnp.abs(values).max(axis=-1) < 0.5)[..., None, None]
    return _derivative(s, values, vectors), small


def _log_of(s: Array, less: Array) -> tuple[Array, Array, Array]:
    """`logm(s)`, its eigenvalues and their vectors; by `less = s - 1` where that is small, to rounding of it."""
    small = jnp.abs(less).max(axis=(-2, -1), keepdims=True) < 0.5
    s = jnp.where(small, less, s)
    values, vectors = _eigh(s)
    positive = jnp.where(small[..., 0], 1, values)
    values = jnp.where(small[..., 0], jnp.log1p(jnp.where(small[..., 0], values, 0)), jnp.log(positive))
    return _log_by(s, values, vectors), values, vectors


@jax.custom_jvp
def _derivative(s: Array, values: Array, vectors: Array, *directions: Array) -> Array:
    """The derivative of expm at s, values and vectors being its own, of the order of the number of directions.

    In the basis of the eigenvectors, the sum over all orders of the directions and all indices between the first and
    the last of the divided differences of exp times the products of entries, [i, j] [j, k] ... The function itself is
    what `_exp_of` says.
    """
    num, n = len(directions), values.shape[-1]
    if num == 0:
        small = jnp.abs(values).max(axis=-1, keepdims=True) < 0.5
        of_values = jnp.where(small, jnp.expm1(values), jnp.exp(values))
        return _symmetric(_times(vectors * of_values[..., None, :], _transposed(vectors)))
    ascending = np.sort(np.indices((n,) * (num + 1)), axis=0)  # divided differences are symmetric
    differences = _divided([values[..., each] for each in ascending])
    inside = [_times(_transposed(vectors), each, vectors) for each in directions]
    letters = string.ascii_lowercase[: num + 1]
    entries = ",".join(f"...{a}{b}" for a, b in itertools.pairwise(letters))
    equation = f"...{letters},{entries}->...{letters[0]}{letters[-1]}"
    ordered = itertools.permutations(inside)
    terms = [jnp.einsum(equation, differences, *each, precision="highest") for each in ordered]
    return _times(vectors, functools.reduce(jnp.add, terms), _transposed(vectors))


@_derivative.defjvp
def _derivative_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    at, directions = primals[:3], primals[3:]
    if not directions:
        return _derivative(*primals), _dexp(at[0], at[1], at[2], tangents[0])
    change = _derivative(*primals, tangents[0])
    for i, tangent in enumerate(tangents[3:]):
        change = change + _derivative(*at, *directions[:i], tangent, *directions[i + 1 :])
    return _derivative(*primals), change


@jax.custom_jvp
def _inverse(s: Array, values: Array, vectors: Array, direction: Array) -> Array:
    """The x whose image under the derivative of expm at s is the direction: the derivative of logm at expm(s)."""
    n = values.shape[-1]
    low, high = np.sort(np.indices((n, n)), axis=0)
    inside = _times(_transposed(vectors), direction, vectors) / _divided([values[..., low], values[..., high]])
    return _times(vectors, inside, _transposed(vectors))


@_inverse.defjvp
def _inverse_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    at, x = primals[:3], _inverse(*primals)
    return x, _inverse(*at, tangents[3] - _derivative(*at, x, tangents[0]))


# What is linear in a tangent is transposed as it is written, its rule forgotten: the dependence on s would be lost to
# derivatives of gradients. Solutions of linear equations keep it.


def _dexp(s: Array, values: Array, vectors: Array, u: Array) -> Array:
    """The derivative of expm at s along u."""
    solve = lambda _, b: _derivative(s, values, vectors, b)  # noqa: E731
    return jax.lax.custom_linear_solve(lambda x: _inverse(s, values, vectors, x), u, solve, symmetric=True)


def _dlog(s: Array, values: Array, vectors: Array, u: Array) -> Array:
    """The derivative of logm at expm(s) along u."""
    solve = lambda _, b: _inverse(s, values, vectors, b)  # noqa: E731
    return jax.lax.custom_linear_solve(lambda x: _derivative(s, values, vectors, x), u, solve, symmetric=True)


@jax.custom_jvp
def _log_by(s: Array, values: Array, vectors: Array) -> Array:
    """logm, of s or of s + 1, from its eigenvalues."""
    return _symmetric(_times(vectors * values[..., None, :], _transposed(vectors)))


@_log_by.defjvp
def _log_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    logarithm = _log_by(*primals)
    return logarithm, _dlog(logarithm, primals[1], primals[2], tangents[0])


@jax.custom_jvp
def _pairs(s: Array, values: Array, vectors: Array) -> Array:
    """The sum of `log(sinh(d / 2) / (d / 2))`, d the differences between the pairs of eigenvalues."""
    i, j = np.triu_indices(values.shape[-1], 1)
    d = values[..., j] - values[..., i]
    return (d / 2 + jnp.log(over(-jnp.expm1(-d), d))).sum(axis=-1)


@_pairs.defjvp
def _pairs_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """It is `log(det(D)) - (n + 1) / 2 tr(s)`, D the derivative of expm at s on the symmetric matrices."""
    s, change = primals[0], tangents[0]
    n = s.shape[-1]
    i, j = np.triu_indices(n)
    basis = np.zeros((len(i), n, n))
    basis[np.arange(len(i)), i, j] = basis[np.arange(len(i)), j, i] = np.where(i == j, 1, math.sqrt(0.5))

    def of(b: Array) -> Array:
        b = jnp.broadcast_to(b.reshape((1,) * (s.ndim - 2) + b.shape), s.shape)
        return _derivative(*primals, b, _inverse(*primals, b))

    gradient = jax.vmap(of)(jnp.asarray(basis, s.dtype)).sum(axis=0) - (n + 1) / 2 * _eye(s)
    return _pairs(*primals), (gradient * change).sum(axis=(-2, -1))


def _divided(points: list[Array]) -> Array:
    """The divided differences of exp, of arrays in ascending order: by their series where the points are near."""
    order = len(points) - 1
    if order == 0:
        return jnp.exp(points[0])
    mean = sum(points) / len(points)
    # Elementary symmetric polynomials of the distances to the mean, and from them the complete ones.
    elementary = [jnp.ones_like(mean)] + [jnp.zeros_like(mean)] * len(points)
    for z in (each - mean for each in points):
        elementary = [elementary[0]] + [elementary[k] + z * elementary[k - 1] for k in range(1, len(elementary))]
    complete, series = [elementary[0]], elementary[0] / math.factorial(order)
    for m in range(1, 15):
        terms = [(-1) ** (k + 1) * elementary[k] * complete[m - k] for k in range(1, min(m, len(points)) + 1)]
        complete.append(sum(terms))
        series = series + complete[m] / float(math.factorial(m + order))
    gap = points[-1] - points[0]
    far = gap > 1
    direct = (_divided(points[1:]) - _divided(points[:-1])) / jnp.where(far, gap, 1)
    return jnp.where(far, direct, jnp.exp(mean) * series)
