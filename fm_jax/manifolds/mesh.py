"""Surfaces of triangles: data on what was scanned or drawn, with the eigenfunctions of the Laplacian on it."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_finite, check_integer, check_key, check_known, shown
from fm_jax.manifolds.points import check_points, check_shape_of
from fm_jax.manifolds.triangles import coordinates, eigenpairs, nearest
from fm_jax.types import AnyArray, Array, Key, Like


@dataclass(frozen=True, eq=False, repr=False)
class TriangleMesh:
    """A connected surface of triangles in R^3, closed or with a boundary, the metric being that of R^3.

    Its geodesics are not known: `log` and `distance` raise, and a `paths.PremetricPath` is what trains on it, with
    `SpectralPremetric(mesh.eigenfunctions, biharmonic(mesh.eigenvalues))`. `exp` is a step in the plane of a triangle,
    brought back to the surface, of first order. All that takes points looks for the closest triangle among all, in
    chunks; on an edge it is one of those that meet there. Derivatives of `project`, `exp` and `eigenfunctions` in a
    point are those within the plane of its triangle, as if this had no end.

    `eigenfunctions` are those of the cotangent Laplacian with lumped masses, linear in each triangle, with Neumann's
    condition at a boundary, and orthonormal in the area; the constant one is left out. Arrays are held by NumPy, in
    float64, so that a mesh is a constant of the programs that use it. Meshes of the same arrays are equal.

    Attributes:
        vertices: [V, 3], in any unit of length.
        faces: [F, 3], the numbers of the vertices of each triangle, counted from 0.
        num_eigen: how many eigenfunctions there are, k, from 1 to V - 2.
        eigenvalues: [k], rising, in 1 / length^2.
        modes: [V, k], the eigenfunctions at the vertices.
        areas: [F], of the triangles.

    Raises:
        ValueError: for what are no such arrays, a face of a vertex that there is not, triangles without an area,
            vertices in no triangle, a surface in several parts, or too many eigenfunctions.

    Example:
        >>> corners = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
        >>> square = TriangleMesh(corners, np.array([[0, 1, 2], [0, 2, 3]]), num_eigen=2)
        >>> square.project(jnp.array([0.25, 2.0, 3.0]))
        Array([0.25, 1.  , 0.  ], dtype=float32)
    """

    vertices: Any
    faces: Any
    num_eigen: int
    eigenvalues: Any = field(init=False)
    modes: Any = field(init=False)
    areas: Any = field(init=False)
    _hash: int = field(init=False)

    def __post_init__(self) -> None:
        vertices, faces = _checked(self.vertices, self.faces)
        areas = _areas(vertices, faces)
        check_integer("num_eigen", self.num_eigen, 1, max(len(vertices) - 2, 1))
        eigenvalues, modes = eigenpairs(vertices, faces, areas, int(self.num_eigen))
        held = {"vertices": vertices, "faces": faces, "eigenvalues": eigenvalues, "modes": modes, "areas": areas}
        for name, value in held.items():
            value.setflags(write=False)
            object.__setattr__(self, name, value)

        content = (vertices.tobytes(), faces.tobytes(), int(self.num_eigen))
        object.__setattr__(self, "_hash", hash(content))  # once, as jit asks at each call

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, TriangleMesh):
            return self is other
        same = np.array_equal(self.vertices, other.vertices) and np.array_equal(self.faces, other.faces)
        return same and self.num_eigen == other.num_eigen

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"TriangleMesh({len(self.vertices)} vertices, {len(self.faces)} faces, num_eigen={self.num_eigen})"

    @property
    def dim(self) -> int:
        return 2

    @property
    def shape(self) -> tuple[int, ...]:
        return (3,)

    @property
    def log_total(self) -> float:
        return math.log(self.areas.sum())

    def eigenfunctions(self, x: AnyArray) -> Array:
        """The eigenfunctions [..., k] at the closest point, by barycentric interpolation."""
        face, weights = self._nearest(x)
        modes = jnp.asarray(self.modes, x.dtype)[jnp.asarray(self.faces)[face]]
        return (weights[..., None] * modes).sum(axis=-2)

    def exp(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`project(x + u)`: the geodesic within a triangle, and to first order in u beyond it."""
        return self.project(x + u)

    def log(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """Raises `ValueError`: it is not known."""
        raise ValueError(_refusal(self, "log"))

    def distance(self, x: AnyArray, y: AnyArray) -> AnyArray:
        """Raises `ValueError`: it is not known."""
        raise ValueError(_refusal(self, "distance"))

    def project(self, x: AnyArray) -> AnyArray:
        """The closest point of the surface."""
        face, weights = self._nearest(x)
        return (weights[..., None] * self._corners(face, x.dtype)).sum(axis=-2)

    def tangent(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """The part of u in the plane of the triangle of x."""
        face, _ = nearest(self.vertices, self.faces, jax.lax.stop_gradient(x))
        normal = _normals(self.vertices, self.faces)
        normal = jnp.asarray(normal / np.linalg.norm(normal, axis=1, keepdims=True), x.dtype)[face]
        return u - (normal * u).sum(axis=-1, keepdims=True) * normal

    def gradient(self, x: AnyArray, g: AnyArray) -> AnyArray:
        """The tangent part."""
        return self.tangent(x, g)

    def squared_norm(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """`|u|^2`."""
        return (u * u).sum(axis=-1)

    def log_volume(self, x: AnyArray) -> AnyArray:
        """0."""
        return jnp.zeros(x.shape[:-1], x.dtype)

    def log_jacobian(self, x: AnyArray, u: AnyArray) -> AnyArray:
        """Raises `ValueError`: it is not known."""
        raise ValueError(_refusal(self, "log_jacobian"))

    def normal(self, key: Key, x: AnyArray) -> AnyArray:
        """The tangent part of standard normal noise."""
        check_key(key)
        return self.tangent(x, jax.random.normal(key, x.shape, x.dtype))

    def uniform(self, key: Key, like: Like) -> AnyArray:
        """A triangle by its area, in steps of 2^-32, and a point of it."""
        check_key(key)
        check_shape_of("like", like, self)
        key_face, key_point = jax.random.split(key)
        share = np.cumsum(self.areas)[:-1] / self.areas.sum()
        ends = jnp.asarray(np.minimum(np.round(share * 2.0**32), 2.0**32 - 1).astype(np.uint32))
        bits = jax.random.bits(key_face, like.shape[:-1], jnp.uint32)
        face = jnp.searchsorted(ends, bits, side="right")
        a, b = jax.random.uniform(key_point, (2, *like.shape[:-1]), like.dtype)
        a = jnp.sqrt(a)
        weights = jnp.stack([1 - a, a * (1 - b), a * b], axis=-1)
        return (weights[..., None] * self._corners(face, like.dtype)).sum(axis=-2)

    def check(self, name: str, x: AnyArray) -> None:
        """Raises `ValueError` for what is no points of it."""
        check_points(name, x, self)

    def _corners(self, face: Any, dtype: Any) -> Array:
        """[..., 3, 3], the vertices of each face."""
        return jnp.asarray(self.vertices, dtype)[jnp.asarray(self.faces)[face]]

    def _nearest(self, x: Any) -> tuple[Array, Array]:
        """The closest triangle, and the barycentric coordinates of the closest point [..., 3], linear in x."""
        face, weights = nearest(self.vertices, self.faces, jax.lax.stop_gradient(x))
        move = x - jax.lax.stop_gradient(x)  # 0, with a derivative
        return face, weights + coordinates(self._corners(face, x.dtype), move)


def _refusal(mesh: TriangleMesh, what: str) -> str:
    return (
        f"{mesh} has no {what}, its geodesics are not known: take PremetricPath(mesh, SpectralPremetric("
        "mesh.eigenfunctions, biharmonic(mesh.eigenvalues))) to train, and RungeKutta('euler', mesh) or "
        "Ambient(mesh, ...) to sample."
    )


def _normals(vertices: Any, faces: Any) -> Any:
    """[F, 3], twice as long as the areas."""
    a, b, c = vertices[faces].swapaxes(0, 1)
    return np.cross(b - a, c - a)


def _areas(vertices: Any, faces: Any) -> Any:
    """[F]; refuses triangles that have none."""
    areas = np.linalg.norm(_normals(vertices, faces), axis=1) / 2
    edges = vertices[faces] - vertices[np.roll(faces, 1, axis=1)]
    longest = (edges**2).sum(axis=2).max(axis=1)
    if num := int((~(areas > 1e-10 * longest)).sum()):
        first = int(np.argmin(areas > 1e-10 * longest))
        raise ValueError(
            f"faces must be triangles with an area, got {num} of {len(faces)} without, such as {first}: "
            f"{faces[first].tolist()}."
        )
    return areas


def _checked(vertices: Any, faces: Any) -> tuple[Any, Any]:
    """In float64 and int32; refuses what are no triangles."""
    for name, value in (("vertices", vertices), ("faces", faces)):
        check_known(name, value)
        check_finite(name, value)
    vertices, found = np.array(vertices, np.float64), np.array(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or len(vertices) < 3:
        raise ValueError(f"vertices must be [V, 3], at least 3 points of R^3, got shape {vertices.shape}.")
    if found.ndim != 2 or found.shape[1] != 3 or not len(found) or found.dtype.kind not in "iu":
        raise ValueError(f"faces must be [F, 3], integers, the vertices of triangles, got {shown(found)}.")
    if found.min() < 0 or found.max() >= len(vertices):
        raise ValueError(
            f"faces must be of vertices from 0 to {len(vertices) - 1}, got from {found.min()} to {found.max()}."
        )
    if unused := len(vertices) - len(np.unique(found)):
        raise ValueError(f"vertices must each be of a triangle, got {unused} of {len(vertices)} that are of none.")
    return vertices, found.astype(np.int32)
