"""Riemannian manifolds: where data are points that no straight line joins.

Each is a frozen dataclass that keeps to `fm_jax.types.Manifold`. A path names its manifold; losses, samplers and
likelihoods take it from there or are given it.
"""

from fm_jax.manifolds.euclidean import Euclidean
from fm_jax.manifolds.fields import SquaredDistance, check_manifold, check_one_way, geodesic, tangent_velocity
from fm_jax.manifolds.hyperbolic import Hyperbolic, from_ball, to_ball
from fm_jax.manifolds.laws import UniformOn, VonMisesFisher, WrappedNormal
from fm_jax.manifolds.mesh import TriangleMesh
from fm_jax.manifolds.product import SE3, Product
from fm_jax.manifolds.rotations import SO3
from fm_jax.manifolds.simplex import Simplex
from fm_jax.manifolds.spd import SPD, LogEuclideanSPD
from fm_jax.manifolds.spectral import SpectralPremetric, biharmonic, commute_time, diffusion
from fm_jax.manifolds.sphere import Sphere
from fm_jax.manifolds.torus import FlatTorus

__all__ = [
    "SE3",
    "SO3",
    "SPD",
    "Euclidean",
    "FlatTorus",
    "Hyperbolic",
    "LogEuclideanSPD",
    "Product",
    "Simplex",
    "SpectralPremetric",
    "Sphere",
    "SquaredDistance",
    "TriangleMesh",
    "UniformOn",
    "VonMisesFisher",
    "WrappedNormal",
    "biharmonic",
    "check_manifold",
    "check_one_way",
    "commute_time",
    "diffusion",
    "from_ball",
    "geodesic",
    "tangent_velocity",
    "to_ball",
]
