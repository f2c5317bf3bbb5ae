"""Riemannian manifolds: where data are points that no straight line joins.

Each is a frozen dataclass that keeps to `fm_jax.types.Manifold`. A path names its manifold; losses, samplers and
likelihoods take it from there or are given it.
"""

from fm_jax.manifolds.euclidean import Euclidean
from fm_jax.manifolds.fields import SquaredDistance, check_manifold, geodesic, tangent_velocity
from fm_jax.manifolds.sphere import Sphere

__all__ = ["Euclidean", "Sphere", "SquaredDistance", "check_manifold", "geodesic", "tangent_velocity"]
