"""Conditional paths along geodesics: flow matching where straight lines are not straight."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_member, check_same_shape, check_source
from fm_jax.manifolds import check_manifold, check_one_way
from fm_jax.paths.mixture import check_convex
from fm_jax.schedules import Linear
from fm_jax.shapes import time_of
from fm_jax.types import Array, Key, Manifold, PathSample, Schedule, Source, State, Time


@dataclass(frozen=True)
class GeodesicPath:
    """The path `x_t = exp_x0(kappa(t) log_x0(x1))` along the shortest way from x0 to x1, at the speed of a schedule.

    Chen & Lipman 2023 (arXiv:2302.03660), on manifolds whose geodesics are known. On `Euclidean` it is the `AffinePath`
    of the same convex schedule. A state is [batch, ..., *shape], one point or several for each example.

    Notebooks: (15.2), (15.3).

    Attributes:
        manifold: where the states are.
        schedule: of which alpha is kappa; convex, `alpha + sigma = 1`, from 0 to 1.
        source: of x0, where a batch brings none, such as `manifolds.UniformOn(manifold)`; `None` if each has to.

    Raises:
        ValueError: for what is no manifold, a schedule that is not convex or does not go from 0 to 1, or no source.

    Example:
        >>> from fm_jax.manifolds import Sphere
        >>> x0, x1 = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])
        >>> sample = GeodesicPath(Sphere(1)).sample(None, 0.5, x0, x1)
        >>> sample.x_t.round(4), sample.u_t.round(4)  # the speed is the distance, pi / 2
        (Array([[0.7071, 0.7071]], dtype=float32), Array([[-1.1107,  1.1107]], dtype=float32))
    """

    manifold: Manifold
    schedule: Schedule = field(default_factory=Linear)
    source: Source | None = None

    def __post_init__(self) -> None:
        check_manifold(self.manifold)
        check_convex(self.schedule)
        if self.source is not None:
            check_source(self.source)

    @property
    def domain(self) -> tuple[float, float]:
        """The times at which the velocity is finite."""
        return self.schedule.domain

    @property
    def kinds(self) -> tuple[str, ...]:
        """The velocity alone: there is no sum of x0 and x1 by which others would convert."""
        return ("velocity",)

    def sample(self, key: Key | None, t: Time, x0: State, x1: State) -> PathSample:
        """The point at `t` on the way from `x0` to `x1`, and its velocity, by one `jax.jvp` in time.

        Args:
            key: not used, a geodesic is a function of its ends; there so that every path has one signature.
            t: times.
            x0: source.
            x1: data.

        Raises:
            ValueError: if the shapes of `x0` and `x1` differ, they are known to lie off the manifold, or to be as far
                apart as that there are several shortest ways, or `t` is neither a scalar nor [batch].
        """
        del key
        check_same_shape(x0=x0, x1=x1)
        for name, x in (("x0", x0), ("x1", x1)):
            self.manifold.check(name, x)
        check_one_way(self.manifold, x0, x1)
        time = time_of(t, x1)
        way = self.manifold.log(x0, x1)

        def point(time: Array) -> Any:
            return self.manifold.exp(x0, (self.schedule.alpha(time) * way).astype(way.dtype))

        x_t, u_t = jax.jvp(point, (time,), (jnp.ones_like(time),))
        return PathSample(jnp.asarray(t), x_t, u_t, jnp.asarray(x0), jnp.asarray(x1))

    def targets(self, sample: PathSample) -> dict[str, Array]:
        """What a network should say at a point of the path, in the shape of `x1`: the velocity `u_t`."""
        return {"velocity": sample.u_t}

    def target_domain(self, kind: str) -> tuple[float, float]:
        """The range of times on which the velocity is finite."""
        check_member("kind", kind, self.kinds)
        return self.domain
