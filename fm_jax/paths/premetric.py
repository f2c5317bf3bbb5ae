"""Conditional paths by a premetric: flow matching on manifolds whose geodesics are not known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import (
    check_array,
    check_function,
    check_integer,
    check_member,
    check_same_shape,
    check_source,
    is_traced,
)
from fm_jax.manifolds import check_manifold
from fm_jax.manifolds.points import over
from fm_jax.paths.mixture import check_convex
from fm_jax.schedules import Linear
from fm_jax.shapes import time_of
from fm_jax.types import Array, Key, Manifold, PathSample, Schedule, Source, State, Time


@dataclass(frozen=True)
class PremetricPath:
    """The path from x0 along the gradient of `d(x, x1)`, with `d(x_t, x1) = (1 - kappa(t)) d(x0, x1)`.

    Chen & Lipman 2023 (arXiv:2302.03660), on general geometries: of all velocities with which the premetric d falls so,
    the least in norm,

        u_t = (d/dt log(1 - kappa)) d(x_t, x1) grad d / |grad d|^2,

    gradient and norm being Riemannian, in the first argument. With the geodesic distance it is the `GeodesicPath`.
    There is no formula of x_t: it is simulated in steps of `manifold.exp`, and no derivative goes through them. As
    `d(x_t, x1)` is known, u_t is taken as `-kappa' d(x0, x1) grad d / |grad d|^2`, which is finite at t = 1. Where
    grad d is 0, as at x1, u_t is 0.

    A state is [batch, ..., *shape], one point or several for each example, each on its own way.

    Attributes:
        manifold: where the states are; of it the path takes `exp`, `gradient`, `squared_norm` and `check`.
        premetric: `d(x, y)`, a number a point, [batch] for [batch, *shape]: not negative, 0 only where x = y, with a
            gradient that is not 0 elsewhere. `manifold.distance`, or a `manifolds.SpectralPremetric`.
        schedule: of which alpha is kappa; convex, `alpha + sigma = 1`, from 0 to 1.
        source: of x0, where a batch brings none; `None` if each has to.
        num_steps: of the simulation, even in time from 0 to the t of each example.

    Raises:
        ValueError: for what is no manifold or no function of two points, a schedule that is not convex or does not go
            from 0 to 1, no source, or no number of steps.

    Example:
        >>> from fm_jax.manifolds import Sphere
        >>> x0, x1 = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> sample = PremetricPath(Sphere(1), Sphere(1).distance).sample(None, 0.5, x0, x1)
        >>> sample.x_t.round(4), sample.u_t.round(4)  # as on the geodesic
        (Array([[0.7071, 0.7071]], dtype=float32), Array([[-1.1107,  1.1107]], dtype=float32))
    """

    manifold: Manifold
    premetric: Callable[[Any, Any], Any]
    schedule: Schedule = field(default_factory=Linear)
    source: Source | None = None
    num_steps: int = 100

    def __post_init__(self) -> None:
        check_manifold(self.manifold)
        check_function("premetric", self.premetric, "a premetric d(x, y), such as manifold.distance", 2)
        check_convex(self.schedule)
        if self.source is not None:
            check_source(self.source)
        check_integer("num_steps", self.num_steps)

    @property
    def domain(self) -> tuple[float, float]:
        """The times at which the velocity is finite."""
        return self.schedule.domain

    @property
    def kinds(self) -> tuple[str, ...]:
        """The velocity alone: there is no sum of x0 and x1 by which others would convert."""
        return ("velocity",)

    def sample(self, key: Key | None, t: Time, x0: State, x1: State) -> PathSample:
        """The point at `t` on the way from `x0` to `x1`, and its velocity, as constants to differentiation.

        A step from time s to r moves by `((1 - kappa(r)) / (1 - kappa(s)) - 1) d grad d / |grad d|^2`, which is exact
        for geodesic distances, and else of first order.

        Args:
            key: not used, the path is a function of its ends; there so that every path has one signature.
            t: times.
            x0: source.
            x1: data.

        Raises:
            ValueError: if the shapes of `x0` and `x1` differ, they are known to lie off the manifold, the premetric is
                not a number a point or known to be negative or NaN, or `t` is neither a scalar nor [batch].
        """
        del key
        check_same_shape(x0=x0, x1=x1)
        for name, x in (("x0", x0), ("x1", x1)):
            self.manifold.check(name, x)
        time = time_of(t, x1)
        x0, x1 = jnp.asarray(x0), jnp.asarray(x1)
        start, end = jax.lax.stop_gradient((x0, x1))
        whole = self._check(self.premetric(start, end), x1)
        d0 = whole.reshape(whole.shape + (1,) * len(self.manifold.shape))

        def step(x: Any, i: Array) -> tuple[Any, None]:
            before, after = (1 - self.schedule.alpha(time * (k / self.num_steps)) for k in (i, i + 1))
            d, direction = self._direction(x, end)
            return self.manifold.exp(x, ((over(after, before) - 1) * d * direction).astype(x.dtype)), None

        x_t, _ = jax.lax.scan(step, start, jnp.arange(self.num_steps, dtype=time.dtype))
        _, speed = jax.jvp(self.schedule.alpha, (time,), (jnp.ones_like(time),))
        u_t = (-speed * d0 * self._direction(x_t, end)[1]).astype(x_t.dtype)
        return PathSample(jnp.asarray(t), *jax.lax.stop_gradient((x_t, u_t)), x0, x1)

    def targets(self, sample: PathSample) -> dict[str, Array]:
        """What a network should say at a point of the path, in the shape of `x1`: the velocity `u_t`."""
        return {"velocity": sample.u_t}

    def target_domain(self, kind: str) -> tuple[float, float]:
        """The range of times on which the velocity is finite."""
        check_member("kind", kind, self.kinds)
        return self.domain

    def _direction(self, x: Any, x1: Any) -> tuple[Array, Array]:
        """The premetric [batch, ..., 1, ..., 1] and `grad d / |grad d|^2`, 0 where the gradient is."""
        d, pull = jax.vjp(lambda x: self.premetric(x, x1), x)
        slope = self.manifold.gradient(x, pull(jnp.ones_like(d))[0])
        ones = (1,) * len(self.manifold.shape)
        squares = self.manifold.squared_norm(x, slope)
        return d.reshape(d.shape + ones), slope * over(jnp.ones_like(squares), squares, 0.0).reshape(d.shape + ones)

    def _check(self, d: Any, x1: Any) -> Array:
        """Refuses what is no premetric of points like `x1`."""
        check_array("premetric(x0, x1)", d)
        wanted = x1.shape[: x1.ndim - len(self.manifold.shape)]
        if d.shape != wanted:
            raise ValueError(f"premetric(x0, x1) must be a number a point, {wanted}, got shape {d.shape}.")
        if not is_traced(d) and getattr(d, "is_fully_addressable", True):
            values = np.asarray(d, np.float64)
            if not (values >= 0).all():
                wrong = values[~(values >= 0)]
                raise ValueError(f"premetric(x0, x1) must not be negative nor NaN, got {wrong[0]} among {values.size}.")
        return jnp.asarray(d)
