"""Distributions on manifolds, their densities with respect to the Riemannian volume.

Each is a `Source` of `fm_jax.sources`: `draw(key, like)` and `log_prob(x)`, in nats, summed over the points of an
example where a state [batch, ..., *shape] has several.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_key, check_known, check_setting, shown
from fm_jax.manifolds.euclidean import Euclidean
from fm_jax.manifolds.fields import check_manifold
from fm_jax.manifolds.hyperbolic import Hyperbolic
from fm_jax.manifolds.points import TOLERANCE, check_shape_of, dot, event_sum, norm, over
from fm_jax.manifolds.product import Product
from fm_jax.manifolds.rotations import SO3
from fm_jax.manifolds.sphere import Sphere
from fm_jax.manifolds.torus import FlatTorus
from fm_jax.types import Array, Key, Like, Manifold, PerExample, State

_OPEN = (Euclidean, Hyperbolic)
"""Where no two geodesics from one point meet."""
_CLOSED: dict[type, float] = {Sphere: 2 * math.pi, SO3: 2 * math.pi}
"""The length of the closed geodesics, where all are closed and exp stretches by a |sine| of that period, over r."""


@dataclass(frozen=True)
class UniformOn:
    """The uniform distribution on a manifold of finite volume.

    Attributes:
        manifold: where.

    Raises:
        ValueError: for what is no manifold, or one of infinite volume.

    Example:
        >>> UniformOn(Sphere(2)).log_prob(jnp.array([[0.0, 0.0, 1.0]]))  # -log(4 pi)
        Array([-2.5310242], dtype=float32)
    """

    manifold: Manifold

    def __post_init__(self) -> None:
        check_manifold(self.manifold)
        if self.manifold.log_total is None:
            raise ValueError(f"manifold must have a finite volume, got {self.manifold}: take WrappedNormal(...).")

    def draw(self, key: Key, like: Like) -> State:
        """Independent points in the shape and dtype of `like`."""
        check_key(key)
        _check_batch("like", like, self.manifold)
        return self.manifold.uniform(key, like)

    def log_prob(self, x: State) -> PerExample:
        """Minus the logarithm of the volume, in nats."""
        x = _points_of(self.manifold, x)
        log_total: Any = self.manifold.log_total
        return event_sum(jnp.full(_leading(x, self.manifold), -log_total, x.dtype))


@dataclass(frozen=True)
class WrappedNormal:
    """`x = exp_mean(u)`, u normal in the tangent space at the mean, of standard deviation `scale` in the metric.

    `p(x)` is the sum of `N(u | 0, scale^2 I) / |det D exp_mean(u)|` over all u of `exp_mean(u) = x`, and `log_prob` is
    exact: one term on `Euclidean` and `Hyperbolic`, all images of each angle on `FlatTorus`, and on `Sphere` and `SO3`
    all windings `r + 2 pi k` of the geodesic, r the angle, k integers of both signs. There, where n > 1, the density is
    infinite at the mean, and at its antipode on a sphere; the value at the mean itself is that of k = 0. On a
    `Product` it is the sum over the parts. On other manifolds it has one term, the shortest u, and a scale at which
    more than 1e-6 of the draws might be of a longer one is refused.

    Attributes:
        manifold: where.
        mean: a point of it, an array or nested tuples; kept as tuples.
        scale: standard deviation of each component of u, such as an angle on a sphere.

    Raises:
        ValueError: for what is no manifold, a mean that is no point of it, a scale that is not positive and finite, or
            is too large for a density of one term.

    Example:
        >>> north = jnp.array([0.0, 0.0, 1.0])
        >>> WrappedNormal(Sphere(2), north, 0.5).log_prob(north[None])  # -log(2 pi 0.5^2)
        Array([-0.4515827], dtype=float32)
    """

    manifold: Manifold
    mean: Any
    scale: float

    def __post_init__(self) -> None:
        check_manifold(self.manifold)
        object.__setattr__(self, "mean", _point("mean", self.mean, self.manifold))
        check_setting(self, "scale", "(0, inf)")
        check_known("scale", self.scale)
        with jax.ensure_compile_time_eval():
            _check_one_term(self.manifold, jnp.asarray(self.mean), self.scale)

    def draw(self, key: Key, like: Like) -> State:
        """Independent points in the shape and dtype of `like`."""
        check_key(key)
        _check_batch("like", like, self.manifold)
        mean = self._mean(like)
        return self.manifold.exp(mean, jnp.asarray(self.scale, like.dtype) * self.manifold.normal(key, mean))

    def log_prob(self, x: State) -> PerExample:
        """The log-density in nats."""
        x = _points_of(self.manifold, x)
        return event_sum(_wrapped(self.manifold, self._mean(x), self.scale, x))

    def _mean(self, like: Like) -> Array:
        mean = self.manifold.project(jnp.asarray(self.mean, like.dtype))
        return jnp.broadcast_to(mean, like.shape)


@dataclass(frozen=True)
class VonMisesFisher:
    """The distribution of density `C exp(kappa <mean, x>)` on a sphere, the analogue of a Gaussian there.

    `C = kappa^v / ((2 pi)^(v + 1) I_v(kappa))`, `v = (n - 1) / 2`: on S^2 kappa / (4 pi sinh kappa). Draws are exact,
    in float32 too: on S^2 by the inverse distribution function of <mean, x>, on others by the rejection of Wood 1994
    (doi:10.1080/03610919408813161), both in terms of 1 - <mean, x>, in which nothing cancels.

    Attributes:
        mean: the direction of the mean, a unit vector [n + 1], an array or a tuple; kept as a tuple.
        kappa: the concentration.

    Raises:
        ValueError: for a mean that is no unit vector of two numbers or more, or a kappa that is not positive and
            finite.

    Example:
        >>> VonMisesFisher((0.0, 0.0, 1.0), 2.0).log_prob(jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
        Array([-1.1262444, -3.1262445], dtype=float32)
    """

    mean: Any
    kappa: float

    def __post_init__(self) -> None:
        num = np.shape(self.mean)[0] if np.ndim(self.mean) == 1 else 0
        if num < 2:
            raise ValueError(f"mean must be a unit vector [n + 1] with n at least 1, got {shown(self.mean)}.")
        object.__setattr__(self, "mean", _point("mean", self.mean, Sphere(num - 1)))
        check_setting(self, "kappa", "(0, inf)")
        check_known("kappa", self.kappa)

    @property
    def manifold(self) -> Sphere:
        return Sphere(len(self.mean) - 1)

    @property
    def log_peak(self) -> float:
        """The log-density at the mean, `log C + kappa`."""
        return _log_peak(len(self.mean), float(self.kappa))

    def draw(self, key: Key, like: Like) -> State:
        """Independent points in the shape and dtype of `like`."""
        check_key(key)
        _check_batch("like", like, self.manifold)
        key_height, key_way = jax.random.split(key)
        leading = _leading(like, self.manifold)
        if self.manifold.n == 2:
            v = jax.random.uniform(key_height, leading, like.dtype)
            h = -jnp.log1p(v * math.expm1(-2 * self.kappa)) / self.kappa
        else:
            h = _rejection(key_height, leading, like.dtype, self.manifold.n, self.kappa)
        h = jnp.clip(h, 0, 2)[..., None]
        mean = self._mean(like)
        way = self.manifold.normal(key_way, mean)
        return self.manifold.project((1 - h) * mean + jnp.sqrt(h * (2 - h)) * over(way, norm(way)))

    def log_prob(self, x: State) -> PerExample:
        """The log-density in nats."""
        x = _points_of(self.manifold, x)
        d = x - self._mean(x)
        return event_sum(self.log_peak - 0.5 * self.kappa * dot(d, d)[..., 0])  # 1 - <mean, x> = |x - mean|^2 / 2

    def _mean(self, like: Like) -> Array:
        return jnp.broadcast_to(self.manifold.project(jnp.asarray(self.mean, like.dtype)), like.shape)


def log_wrapped(variance: Array, angle: Array) -> Array:
    """The log-density of a normal angle modulo 2 pi, exact to rounding at all variances; broadcasts.

    Jacobi's two series: images where the variance is below 2 pi, Fourier's above. At 2 pi both fall as exp(-pi k^2).
    """
    variance, angle = jnp.broadcast_arrays(variance, angle)
    angle = (angle - 2 * math.pi * jnp.round(angle / (2 * math.pi)))[..., None]
    narrow = variance < 2 * math.pi
    below, above = jnp.where(narrow, variance, 1), jnp.where(narrow, 2 * math.pi, variance)
    k = jnp.arange(-4, 5, dtype=angle.dtype).reshape((1,) * variance.ndim + (-1,))
    images = jax.nn.logsumexp(-0.5 * (angle + 2 * math.pi * k) ** 2 / below[..., None], axis=-1)
    m = k[..., 5:]
    waves = (2 * jnp.exp(-0.5 * m**2 * above[..., None]) * jnp.cos(m * angle)).sum(axis=-1)
    return jnp.where(narrow, images - 0.5 * jnp.log(2 * math.pi * below), jnp.log1p(waves) - math.log(2 * math.pi))


def _wrapped(manifold: Manifold, mean: Array, scale: float, x: Array) -> Array:
    """The log-density of a wrapped normal, of each point."""
    if isinstance(manifold, Product):
        each = zip(manifold.parts, manifold.split(mean), manifold.split(x))
        return sum((_wrapped(part, m, scale, y) for part, m, y in each), jnp.zeros((), x.dtype))
    u = manifold.log(mean, x)
    if isinstance(manifold, FlatTorus):
        return log_wrapped(jnp.asarray(scale**2, u.dtype), u).sum(axis=-1)
    squares = manifold.squared_norm(mean, u)
    shortest = -0.5 * squares / scale**2 - 0.5 * manifold.dim * math.log(2 * math.pi * scale**2)
    shortest = shortest - manifold.log_jacobian(mean, u)
    period = _CLOSED.get(type(manifold))
    return shortest if period is None else shortest + _windings(manifold.dim, scale, period, squares)


def _windings(dim: int, scale: float, period: float, squares: Array) -> Array:
    """The logarithm of all terms in relation to the first."""
    # One winding more than 1e-12 of the draws exceed, so that what is rare has its density too.
    num = 1 + math.ceil(_reach(dim, scale, 1e-12) / period - 0.5)
    apart = squares > 0
    r = jnp.sqrt(jnp.where(apart, squares, 1))[..., None]
    steps = jnp.asarray(period * np.arange(-num, num + 1), squares.dtype).reshape((1,) * squares.ndim + (-1,))
    log_ratio = -steps * (2 * r + steps) / (2 * scale**2) + (dim - 1) * (jnp.log(jnp.abs(r + steps)) - jnp.log(r))
    return jnp.where(apart, jax.nn.logsumexp(log_ratio, axis=-1), 0)


def _leading(x: Like, manifold: Manifold) -> tuple[int, ...]:
    return tuple(x.shape[: len(x.shape) - len(manifold.shape)])


def _check_batch(name: str, x: Like, manifold: Manifold) -> None:
    check_shape_of(name, x, manifold)
    if not _leading(x, manifold):
        wanted = ", ".join(map(str, manifold.shape))
        raise ValueError(f"{name} must be [batch, ..., {wanted}], got one point, of shape {tuple(x.shape)}.")


def _points_of(manifold: Manifold, x: State) -> Array:
    """What is checked to be [batch, ..., *shape], in float32 or better."""
    _check_batch("x", x, manifold)
    manifold.check("x", x)
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _point(name: str, value: Any, manifold: Manifold) -> Any:
    """One point as nested tuples, which are hashable."""
    check_known(name, value)
    point: Any
    try:
        point = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        point = np.zeros(())
    if point.shape != manifold.shape:
        wanted = f"one point of {manifold}, of shape {manifold.shape}"
        raise ValueError(f"{name} must be {wanted}, known when it is built, got {shown(value)}.")
    manifold.check(name, point)
    return _tuples(point.tolist())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _reach(dim: int, scale: float, share: float) -> float:
    """The length that only a share of normal vectors exceed."""
    from scipy.special import gammainccinv  # imported here: fm_jax is imported without SciPy

    return scale * math.sqrt(2 * gammainccinv(dim / 2, share))


def _check_one_term(manifold: Manifold, mean: Any, scale: float) -> None:
    """Refuses a scale if `log` does not give back vectors as long as all but 1e-6 of the draws, and one has to do."""
    if isinstance(manifold, Product):
        for part, each in zip(manifold.parts, manifold.split(mean)):
            _check_one_term(part, each, scale)
    if isinstance(manifold, (*_OPEN, *_CLOSED, FlatTorus, Product)):
        return
    reach = _reach(manifold.dim, scale, 1e-6)
    with jax.enable_x64(True):
        x = manifold.project(jnp.asarray(mean, jnp.float64))
        axes = jnp.eye(math.prod(manifold.shape)).reshape(-1, *manifold.shape)
        x = jnp.broadcast_to(x, (3 * len(axes), *manifold.shape))
        noise = manifold.normal(jax.random.key(0), x[: len(axes)])
        u = manifold.tangent(x, jnp.concatenate([axes, -axes, noise]))  # along the axes, and elsewhere
        length = jnp.sqrt(manifold.squared_norm(x, u)).reshape(-1, *(1,) * len(manifold.shape))
        u = reach * jnp.where(length > TOLERANCE, u / jnp.where(length > 0, length, 1), 0)
        off = manifold.log(x, manifold.exp(x, u)) - u
        if not bool((jnp.sqrt(manifold.squared_norm(x, off)) < 0.01 * reach).all()):
            raise ValueError(
                f"scale must be so small that the shortest way is the one drawn, for all but 1e-6 of the draws, on "
                f"{manifold}, got {scale}: a vector as long as {reach:.3g} is not the shortest to where it leads."
            )


def _log_peak(num: int, kappa: float) -> float:
    """`log C + kappa` in R^num, in double precision."""
    v = num / 2 - 1
    if num == 3:
        return math.log(kappa) - math.log(2 * math.pi) - math.log(-math.expm1(-2 * kappa))
    from scipy.special import ive  # imported here: fm_jax is imported without SciPy

    scaled = float(ive(v, kappa))
    if scaled > 1e-200:
        return v * math.log(kappa) - (v + 1) * math.log(2 * math.pi) - math.log(scaled)
    # Of a high order at a small kappa: the power series of I_v, in which kappa^v cancels.
    total = term = 1.0
    m = 0
    logarithm = 0.0
    while term > 1e-17 * total:
        m += 1
        term *= (kappa / 2) ** 2 / (m * (m + v))
        total += term
        if total > 1e200:
            total, term, logarithm = total * 1e-200, term * 1e-200, logarithm + 200 * math.log(10)
    log_area = math.log(2) + (v + 1) * math.log(math.pi) - math.lgamma(v + 1)
    return kappa - log_area - logarithm - math.log(total)


def _rejection(key: Key, shape: tuple[int, ...], dtype: Any, n: int, kappa: float) -> Array:
    """Wood's draws of 1 - <mean, x>: a ratio of gammas, accepted until all are."""
    b = n / (2 * kappa + math.hypot(2 * kappa, n))
    peak = 2 * b / (1 + b)

    def proposal(key: Key) -> tuple[Array, Array]:
        keys = jax.random.split(key, 3)
        one, two = (jax.random.gamma(each, n / 2, shape, dtype) for each in keys[:2])
        h = 2 * b * one / (two + b * one)
        log_ratio = kappa * (peak - h) + n * jnp.log((2 * b + (1 - b) * h) * ((1 + b) / (4 * b)))
        return h, -jax.random.exponential(keys[2], shape, dtype) <= log_ratio

    def again(state: tuple[Key, Array, Array]) -> tuple[Key, Array, Array]:
        key, h, done = state
        key, key_proposal = jax.random.split(key)
        new, accepted = proposal(key_proposal)
        return key, jnp.where(done, h, new), done | accepted

    start = key, jnp.zeros(shape, dtype), jnp.zeros(shape, bool)
    return jax.lax.while_loop(lambda state: ~state[2].all(), again, start)[1]
