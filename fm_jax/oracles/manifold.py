"""Closed forms on manifolds: marginals of geodesic paths to a mixture of points, flows, and heat kernels.

What `mixture` is to affine paths: density and velocity of the marginals, one formula for all manifolds. Densities are
with respect to the Riemannian volume.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Real

from fm_jax.checks import check_integer, check_key, check_known, check_number, check_state, shown
from fm_jax.draws import categorical
from fm_jax.manifolds import Sphere
from fm_jax.manifolds.laws import log_wrapped
from fm_jax.manifolds.points import check_shape_of, dot, event_sum
from fm_jax.oracles.gaussian import as_numbers
from fm_jax.paths.geodesic import GeodesicPath
from fm_jax.schedules import coefficients
from fm_jax.shapes import batch_time, time_of
from fm_jax.types import (
    AnyArray,
    Array,
    ArrayTree,
    Elementwise,
    Key,
    Manifold,
    PerExample,
    Schedule,
    Source,
    State,
    Time,
    VelocityFn,
)


@dataclass(frozen=True, eq=False)
class PointMixture:
    """Points [k, ..., *shape] with weights [k], and the geodesic path to them. Made by `point_mixture`."""

    path: GeodesicPath
    points: np.ndarray
    weights: np.ndarray

    def log_prob(self, t: Time, x: State) -> PerExample:
        """The log-density of the marginal at t, before 1, in nats; -inf where no shortest way passes."""
        self._check(x)

        def single(t: Array, x: Array) -> Array:
            log_joint, reached = _log_joint(self, t, x)
            total = jax.nn.logsumexp(jnp.where(reached.any(), log_joint, 0))
            return jnp.where(reached.any(), total, -jnp.inf)

        return jax.vmap(single)(batch_time(t, x), x)

    def velocity(self, t: Time, x: State) -> State:
        """The marginal velocity `E[u_t | x_t = x]` at t, before 1; to the nearest point where the density is 0."""
        self._check(x)

        def single(t: Array, x: Array) -> Array:
            log_joint, reached = _log_joint(self, t, x)
            points, manifold = _points(self, x), self.path.manifold
            ways = manifold.log(jnp.broadcast_to(x[None], points.shape), points)
            lengths = event_sum(jax.lax.stop_gradient(manifold.squared_norm(points, ways)))
            nearest = jax.nn.one_hot(jnp.argmin(lengths), len(lengths), dtype=x.dtype)
            posterior = jax.nn.softmax(jnp.where(reached.any(), log_joint, 0))
            posterior = jnp.where(reached.any(), posterior, nearest)
            _, sigma, d_alpha, _ = coefficients(self.path.schedule, t)
            return (d_alpha / sigma).astype(x.dtype) * jnp.tensordot(posterior, ways, 1)

        return jax.vmap(single)(batch_time(t, x), x)

    def sample(self, key: Key, t: Time, num: int) -> State:
        """Draws x_t [num, ..., *shape], at times from 0 to 1."""
        check_key(key)
        check_integer("num", num)
        key_source, key_point = jax.random.split(key)
        like = jax.ShapeDtypeStruct((num, *self.points.shape[1:]), jnp.zeros(()).dtype)
        x0 = self._source.draw(key_source, like)
        weights = jnp.broadcast_to(jnp.asarray(self.weights, x0.dtype)[None], (num, len(self.weights)))
        x1 = _points(self, x0)[categorical(key_point, weights)]
        sigma = self.path.schedule.sigma(time_of(t, x0))
        return self.path.manifold.exp(x1, (sigma * self.path.manifold.log(x1, x0)).astype(x0.dtype))

    @property
    def _source(self) -> Any:
        return self.path.source

    def _check(self, x: State) -> None:
        check_state(x, "x")
        check_shape_of("x", x, self.path.manifold)
        if x.shape[1:] != self.points.shape[1:]:
            raise ValueError(f"x must be [batch, ...] with events {self.points.shape[1:]}, got shape {x.shape}.")


def point_mixture(
    manifold: Manifold, points: ArrayTree, weights: ArrayTree | None, schedule: Schedule, source: Source
) -> PointMixture:
    """The exact marginals of `x_t = exp_x0(kappa log_x0(x1))`, x0 from a source, x1 one of k points.

    With `w = log_x1(x)`, and J the `log_jacobian` of the manifold, a geodesic through x began at
    `x0 = exp_x1(w / (1 - kappa))`, so that `log p_t(x | x1) = log p_0(x0) + J(x1, w / (1 - kappa)) - J(x1, w) -
    dim log(1 - kappa)`, where that is the shortest way, and -inf elsewhere. The velocity is the posterior average of
    `kappa' / (1 - kappa) log_x(x1)`. Follows from Chen & Lipman 2023 (arXiv:2302.03660) by a change of variables.

    Notebooks: (15.4).

    The velocity has kinks, and the density kinks or jumps, where ways stop being the shortest.

    Args:
        manifold: where the points are.
        points: [k, ..., *shape], one point or several for each example.
        weights: [k], normalised here; equal if `None`.
        schedule: of which alpha is kappa, convex.
        source: of x0, on the manifold, with a density.

    Returns:
        `PointMixture`, with `log_prob(t, x)`, `velocity(t, x)` and `sample(key, t, num)`.

    Raises:
        ValueError: for points off the manifold, weights that do not fit, and what `GeodesicPath` refuses.

    Example:
        >>> from fm_jax.manifolds import UniformOn
        >>> from fm_jax.schedules import Linear
        >>> north = jnp.array([[0.0, 0.0, 1.0]])
        >>> mixture = point_mixture(Sphere(2), north, None, Linear(), UniformOn(Sphere(2)))
        >>> round(float(mixture.log_prob(0.5, north)[0]), 4)  # -log(4 pi) + 2 log 2: the area shrinks by 2^2
        -1.1447
        >>> v = mixture.velocity(0.5, jnp.array([[1.0, 0.0, 0.0]]))[0]
        >>> [round(float(each), 4) for each in v]  # pi / 2 in half a unit of time
        [0.0, 0.0, 3.1416]
    """
    path = GeodesicPath(manifold, schedule, source)
    if source is None:
        raise ValueError("source must be a source, such as UniformOn(manifold), got None.")
    check_known("points", points)
    array: Any = as_numbers("points", points).astype(np.float64)
    num = len(manifold.shape)
    if array.ndim <= num or not len(array):
        wanted = ", ".join(map(str, manifold.shape))
        raise ValueError(f"points must be [k, ..., {wanted}], got shape {array.shape}.")
    manifold.check("points", array)
    shares = np.ones(len(array)) if weights is None else as_numbers("weights", weights)
    if shares.shape != (len(array),) or (shares < 0).any() or not shares.sum() > 0:
        raise ValueError(f"weights must be [k] = [{len(array)}], not negative, with a positive sum.")
    return PointMixture(path, array, shares / shares.sum())


def _points(mixture: PointMixture, x: State) -> Array:
    return mixture.path.manifold.project(jnp.asarray(mixture.points, x.dtype))


def _log_joint(mixture: PointMixture, t: Array, x: Array) -> tuple[Array, Array]:
    """log(w_k p_t(x | x1_k)) [k], and to which points the way from x goes on as the shortest [k]; x is one state."""
    manifold, points = mixture.path.manifold, _points(mixture, x)
    sigma = mixture.path.schedule.sigma(t).astype(x.dtype)
    near = manifold.log(points, jnp.broadcast_to(x[None], points.shape))
    far = near / sigma
    back = manifold.log(points, manifold.exp(points, far)) - far
    # Beyond the cut locus log gives another vector, off by a finite length: any tolerance tells.
    short = manifold.squared_norm(points, back) <= 0.05**2 * manifold.squared_norm(points, far)
    reached = jax.lax.stop_gradient(short.reshape(len(points), -1).all(axis=1))
    mask = reached.reshape(-1, *(1,) * (far.ndim - 1))
    near, far = jnp.where(mask, near, 0), jnp.where(mask, far, 0)  # no infinities, whose derivatives would be NaN
    stretch = event_sum(manifold.log_jacobian(points, far) - manifold.log_jacobian(points, near))
    dim = manifold.dim * short[0].size
    log_p0: Array = mixture._source.log_prob(manifold.exp(points, far))
    log_weights = jnp.log(jnp.asarray(mixture.weights, x.dtype))
    log_joint = log_weights + log_p0.astype(x.dtype) + stretch - dim * jnp.log(sigma)
    return jnp.where(reached, log_joint, -jnp.inf), reached


class MoebiusFlow(NamedTuple):
    """The flow of `v(x) = a - <a, x> x` on S^n from the uniform distribution. Made by `moebius`.

    Attributes:
        a: the point that all flows to [n + 1].
    """

    a: Array

    def velocity(self, t: Time, x: State) -> State:
        """`a - <a, x> x` at all times."""
        del t
        a = self._axis(x)
        return a - dot(a, x) * x

    def log_prob(self, t: Time, x: State) -> PerExample:
        """The log-density at t in nats, `-log |S^n| - n log(cosh t - <a, x> sinh t)`."""
        sphere = Sphere(len(self.a) - 1)
        z, time = dot(self._axis(x), x)[..., 0], time_of(t, x[..., 0])
        return event_sum(-sphere.log_total - sphere.n * jnp.log(jnp.cosh(time) - z * jnp.sinh(time)))

    def flow_map(self, t: Time, x0: State) -> State:
        """Where what was at `x0` is after a time t, before if negative."""
        a, time = self._axis(x0), time_of(t, x0)
        z = dot(a, x0)
        moved = x0 + ((jnp.cosh(time) - 1) * z + jnp.sinh(time)) * a
        return moved / (jnp.cosh(time) + z * jnp.sinh(time))

    def _axis(self, x: State) -> Array:
        check_state(x, "x")
        check_shape_of("x", x, Sphere(len(self.a) - 1))
        return jnp.broadcast_to(jnp.asarray(self.a, x.dtype), x.shape)


def moebius(a: ArrayTree) -> MoebiusFlow:
    """A smooth flow on S^n that is known in full: conformal, towards `a`, the sphere of the Lorentz group.

    Along it `artanh <a, x>` grows at unit speed and the divergence is `-n <a, x>`, so that
    `log p_t = log p_0 + n [log cosh s - log cosh(s - t)]`, `s = artanh <a, x>`.

    Args:
        a: a unit vector [n + 1].

    Returns:
        `MoebiusFlow`, with `velocity(t, x)`, `log_prob(t, x)` and `flow_map(t, x0)`.

    Raises:
        ValueError: for what is no unit vector of two numbers or more.

    Example:
        >>> flow = moebius([0.0, 0.0, 1.0])
        >>> round(float(flow.log_prob(1.0, jnp.array([[0.0, 0.0, 1.0]]))[0]), 4)  # -log(4 pi) + 2
        -0.531
    """
    axis = as_numbers("a", a)
    if axis.ndim != 1 or len(axis) < 2 or not math.isclose(np.linalg.norm(axis), 1, abs_tol=1e-5):
        raise ValueError(f"a must be a unit vector [n + 1] with n at least 1, got {shown(a)}.")
    return MoebiusFlow(axis / np.linalg.norm(axis))


def killing(matrix: ArrayTree) -> VelocityFn:
    """The field of a rotation, `v(x) = W x` with W antisymmetric: an isometry of the sphere, of divergence 0.

    Args:
        matrix: W [n + 1, n + 1].

    Returns:
        `v(t, x)` for x [..., n + 1]. Its flow map is `x -> expm(t W) x`, and keeps the uniform distribution.

    Raises:
        ValueError: for what is no antisymmetric matrix.

    Example:
        >>> killing([[0.0, -1.0], [1.0, 0.0]])(0.0, jnp.array([[1.0, 0.0]]))
        Array([[0., 1.]], dtype=float32)
    """
    turn = as_numbers("matrix", matrix)
    if turn.ndim != 2 or turn.shape[0] != turn.shape[1] or not np.allclose(turn, -turn.T, atol=1e-6):
        raise ValueError(f"matrix must be antisymmetric, [n + 1, n + 1], got {shown(matrix)}.")
    turn = (turn - turn.T) / 2

    def velocity(t: Time, x: State) -> State:
        del t
        check_shape_of("x", x, Sphere(len(turn) - 1))
        return x @ jnp.asarray(turn.T, x.dtype)

    return velocity


def heat_kernel_circle(t: Elementwise, angle: Elementwise) -> Real[AnyArray, " *shape"]:
    """The log-density of Brownian motion on the circle, of generator d^2 / 2, at an angle from its start.

    A normal angle of variance t modulo 2 pi, by images where t < 2 pi and by Fourier's series above.

    Args:
        t: times, positive; broadcasts with `angle`.
        angle: in radians.

    Returns:
        In nats, with respect to arc length.

    Raises:
        ValueError: for a time that is not positive and finite.

    Example:
        >>> heat_kernel_circle(100.0, 1.0)  # -log(2 pi)
        Array(-1.837877, dtype=float32)
    """
    _check_positive(t)
    time, angle = _as_floats(t, angle)
    return log_wrapped(time, angle)


def heat_kernel_sphere(t: Elementwise, angle: Elementwise) -> Real[AnyArray, " *shape"]:
    """The log-density of Brownian motion on S^2, of generator Laplacian / 2, at an angle from its start.

    `sum_l (2 l + 1) / (4 pi) exp(-l (l + 1) t / 2) P_l(cos angle)`, with as many terms as rounding lets count. The sum
    has the rounding error of its largest terms: where the density is less than that, in relation to its value at the
    start, so is what is right of the logarithm, and it is -inf where the sum is not positive.

    Args:
        t: times, positive and known when it is called; the smallest sets the number of terms, about 9 / sqrt(t).
        angle: in radians; broadcasts with `t`.

    Returns:
        In nats, with respect to area.

    Raises:
        ValueError: for a time that is traced, or not positive and finite.

    Example:
        >>> heat_kernel_sphere(100.0, 1.0)  # -log(4 pi)
        Array(-2.5310242, dtype=float32)
    """
    check_known("t", t)
    _check_positive(t)
    least = float(np.min(np.asarray(t)))
    num = 1
    while math.log(2 * num + 1) - num * (num + 1) * least / 2 > -40:
        num += 1
    time, angle = jnp.broadcast_arrays(*_as_floats(t, angle))
    z = jnp.cos(angle)

    def add(state: tuple[Array, Array, Array], l: Array) -> tuple[tuple[Array, Array, Array], None]:  # noqa: E741
        before, now, total = state
        total = total + (2 * l + 1) * jnp.exp(-l * (l + 1) * time / 2) * now
        return (now, ((2 * l + 1) * z * now - l * before) / (l + 1), total), None

    start = jnp.zeros_like(z), jnp.ones_like(z), jnp.zeros_like(z)
    (_, _, total), _ = jax.lax.scan(add, start, jnp.arange(num, dtype=z.dtype))
    there = total > 0
    return jnp.where(there, jnp.log(jnp.where(there, total, 1)), -jnp.inf) - math.log(4 * math.pi)


def _check_positive(t: Any) -> None:
    for each in (t,) if np.ndim(t) == 0 else np.ravel(np.asarray(t)) if not isinstance(t, jax.core.Tracer) else ():
        check_number("t", each, "(0, inf)")


def _as_floats(*values: Any) -> list[Array]:
    dtype = jnp.result_type(float, *values)
    return [jnp.asarray(value, dtype) for value in values]
