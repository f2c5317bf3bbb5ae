"""Functions on manifolds: velocities in the ambient space made tangent, and what transport costs."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_has, check_shape, check_velocity, is_traced
from fm_jax.manifolds.points import check_shape_of, event_sum
from fm_jax.nfe import Counted, cost, domain_of, reach_of
from fm_jax.types import AnyArray, Array, Manifold, State, Time, VelocityFn

_METHODS = ("dim", "shape", "exp", "log", "project", "tangent", "squared_norm", "distance", "log_volume", "check")


def check_manifold(manifold: Manifold) -> None:
    """Raises `ValueError` for what is not a manifold."""
    check_has("manifold", manifold, _METHODS, "a manifold, such as Sphere(2)")


def check_one_way(manifold: Manifold, x0: State, x1: State) -> None:
    """Raises `ValueError` for pairs that are known to have several shortest ways, as opposite points of a sphere."""
    several = getattr(manifold, "several_ways", None)
    if several is None or is_traced(x0) or is_traced(x1) or not getattr(x1, "is_fully_addressable", True):
        return
    with jax.ensure_compile_time_eval():
        bad = np.asarray(several(jnp.asarray(x0), jnp.asarray(x1)))
    if bad.any():
        raise ValueError(
            f"x0 and x1 must have one shortest way between them on {manifold}, got {bad.sum()} of {bad.size} pairs "
            "with several, as opposite points have: move one of each by any little."
        )


def tangent_velocity(manifold: Manifold, v: VelocityFn) -> VelocityFn:
    """The velocity `P_x v(t, x)` at x, the projection of the argument: tangent, and constant along the fibres.

    It is a field of the whole ambient space that leaves the manifold as it is, so that solvers and divergences of R^n
    serve: the trace of its Jacobian is the Riemannian divergence, but for the change of `log_volume`.

    Notebooks: (15.6).

    Args:
        manifold: where the states are.
        v: `v(t, x)`, of any vectors of the ambient space.

    Returns:
        `v(t, x)`; a call of it costs one of `v`.

    Raises:
        ValueError: for what is no manifold or no velocity; when called, for states of another shape.

    Example:
        >>> from fm_jax.manifolds import Sphere
        >>> v = tangent_velocity(Sphere(2), lambda t, x: jnp.ones_like(x))
        >>> v(0.0, jnp.array([[2.0, 0.0, 0.0]]))
        Array([[0., 1., 1.]], dtype=float32)
    """
    check_manifold(manifold)
    check_velocity(v)

    def velocity(t: Time, x: State) -> State:
        check_shape_of("x", x, manifold)
        y = manifold.project(x)
        u = v(t, y)
        check_shape("v(t, x)", u, x)
        return manifold.tangent(y, u)

    return Counted(velocity, cost(v), domain_of(v), reach_of(v))


def geodesic(manifold: Manifold, x0: State, x1: State, share: float) -> Array:
    """The point after a `share` of the shortest way from `x0` to `x1`, `exp_x0(share log_x0(x1))`.

    Args:
        manifold: where they are.
        x0: start.
        x1: end.
        share: 0 is the start, 1 the end.

    Example:
        >>> from fm_jax.manifolds import Sphere
        >>> [f"{each:.3f}" for each in geodesic(Sphere(1), jnp.array([[1.0, 0]]), jnp.array([[0, 1.0]]), 1 / 3)[0]]
        ['0.866', '0.500']
    """
    check_manifold(manifold)
    return manifold.exp(x0, share * manifold.log(x0, x1))


@dataclass(frozen=True)
class SquaredDistance:
    """The cost `d(x0, x1)^2` of transport on a manifold, as in `ExactOT(cost=SquaredDistance(manifold))`.

    Summed over the points of an example.

    Attributes:
        manifold: where the points are.

    Raises:
        ValueError: for what is no manifold; when called, for what are no points of its shape.

    Example:
        >>> from fm_jax.manifolds import Sphere
        >>> north, others = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> SquaredDistance(Sphere(1))(north, others)
        Array([[2.4674013, 0.       ]], dtype=float32)
    """

    manifold: Manifold

    def __post_init__(self) -> None:
        check_manifold(self.manifold)

    def __call__(self, x0: AnyArray, x1: AnyArray) -> Array:
        """[n, m], of every pair."""
        check_shape_of("x0", x0, self.manifold)
        check_shape_of("x1", x1, self.manifold)
        if x0.shape[1:] != x1.shape[1:]:
            raise ValueError(f"x0 and x1 must have the same event shape, got {x0.shape} and {x1.shape}.")
        x0, x1 = jnp.asarray(x0), jnp.asarray(x1)

        def from_one(x: Array) -> Array:
            return event_sum(self.manifold.distance(jnp.broadcast_to(x[None], x1.shape), x1) ** 2)

        return jax.vmap(from_one)(x0)
