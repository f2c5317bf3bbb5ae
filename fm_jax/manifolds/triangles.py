"""What is computed of triangles: the closest of them, and the Laplacian of their surface."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.types import Array

_PAIRS = 2**22
"""How many pairs of a point and a triangle are measured at once."""


def nearest(vertices: Any, faces: Any, x: Any, pairs: int = _PAIRS) -> tuple[Array, Array]:
    """The closest triangle to each point, the first of several, and the closest point on it.

    Args:
        vertices: [V, 3], NumPy.
        faces: [F, 3], NumPy.
        x: [..., 3].
        pairs: of a point and a triangle, how many are measured at once; at least a triangle, with all points.

    Returns:
        The number of the triangle [...], and the barycentric coordinates [..., 3].
    """
    points = x.reshape(-1, 3)
    size = min(len(faces), max(1, pairs // max(1, len(points))))
    chunks = math.ceil(len(faces) / size)
    order = np.minimum(np.arange(chunks * size), len(faces) - 1)  # the last is repeated
    corners = vertices[faces[order]].reshape(chunks, size, 3, 3)
    face = _nearest(points, jnp.asarray(corners, x.dtype))
    weights = barycentric(points, jnp.asarray(vertices, x.dtype)[jnp.asarray(faces)[face]])
    return face.reshape(x.shape[:-1]), weights.reshape(x.shape)


@jax.jit
def _nearest(points: Any, corners: Any) -> Array:
    """Of points [N, 3] and chunks of triangles [chunks, size, 3, 3], the numbers [N]."""
    chunks, size = corners.shape[:2]

    def look(triangles: Any) -> tuple[Any, Any]:
        squares = _squares(points, triangles)
        least = jax.lax.argmin(squares, 1, jnp.int32)
        return jnp.take_along_axis(squares, least[:, None], axis=1)[:, 0], least

    def closer(best: Any, chunk: Any) -> tuple[Any, None]:
        start, triangles = chunk
        square, least = look(triangles)
        new = (square, start + least)
        return jax.tree.map(lambda a, b: jnp.where(square < best[0], a, b), new, best), None

    first = look(corners[0])
    if chunks == 1:
        return first[1]
    starts = jnp.arange(1, chunks, dtype=jnp.int32) * size
    return jax.lax.scan(closer, first, (starts, corners[1:]))[0][1]


def _squares(points: Any, triangles: Any) -> Array:
    """The squared distance [N, F] from each point [N, 3] to each triangle [F, 3, 3], without its closest point.

    That to the plane, where the point is above the triangle, and else that to the closest edge. Of a point at a height
    h above a fold, the two triangles differ by rounding alone within sqrt(eps) h of it: the one that it is above is
    taken to be closer by 8 eps. Coordinate by coordinate, so that it is one pass over the pairs.
    """
    a, b, c = (tuple(triangles[:, i].T) for i in range(3))
    e, f, g = _minus(b, a), _minus(c, a), _minus(c, b)
    normal = _cross(e, f)
    size = jnp.sqrt(_dot(normal, normal))
    normal = tuple(each / size for each in normal)
    x = tuple(points[:, i, None] for i in range(3))
    from_a, from_b = (_minus(x, tuple(each[None] for each in corner)) for corner in (a, b))
    above: Any = None
    edges: Any = None
    for base, edge, inward in ((from_a, e, 1), (from_a, f, -1), (from_b, g, 1)):
        within = inward * _dot(base, tuple(each[None] for each in _cross(normal, edge))) >= 0
        share = jnp.clip(_dot(base, tuple((each / _dot(edge, edge))[None] for each in edge)), 0, 1)
        off = _minus(base, tuple(share * each[None] for each in edge))
        square = _dot(off, off)
        above = within if above is None else above & within
        edges = square if edges is None else jnp.minimum(edges, square)
    height = _dot(from_a, tuple(each[None] for each in normal))
    return jnp.where(above, height * height * (1 - 8 * jnp.finfo(points.dtype).eps), edges)


def _minus(a: Any, b: Any) -> Any:
    return tuple(one - other for one, other in zip(a, b, strict=True))


def _dot(a: Any, b: Any) -> Any:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _cross(a: Any, b: Any) -> Any:
    return tuple(a[i - 2] * b[i - 1] - a[i - 1] * b[i - 2] for i in range(3))


@jax.jit
def barycentric(x: Any, triangles: Any) -> Array:
    """The barycentric coordinates of the point of a triangle that is closest to x.

    By the region of x, that of a corner, an edge or the inside, of which the signs of products tell, for obtuse
    triangles too (Ericson 2004, Real-Time Collision Detection, sec. 5.1.5).

    Args:
        x: [..., 3].
        triangles: [..., 3, 3], of corners and coordinates.

    Returns:
        [..., 3], not negative, of sum 1.
    """
    a, b, c = triangles[..., 0, :], triangles[..., 1, :], triangles[..., 2, :]
    e, f = b - a, c - a

    def along(corner: Any) -> tuple[Any, Any]:
        return (e * (x - corner)).sum(axis=-1), (f * (x - corner)).sum(axis=-1)

    (e_a, f_a), (e_b, f_b), (e_c, f_c) = along(a), along(b), along(c)
    w_a, w_b, w_c = e_b * f_c - e_c * f_b, e_c * f_a - e_a * f_c, e_a * f_b - e_b * f_a
    zero, one = jnp.zeros_like(w_a), jnp.ones_like(w_a)

    def share(part: Any, rest: Any) -> Any:
        return part / jnp.where(part + rest == 0, 1, part + rest)

    on_ab, on_ac, on_bc = share(e_a, -e_b), share(f_a, -f_c), share(f_b - e_b, e_c - f_c)
    regions = [
        ((e_a <= 0) & (f_a <= 0), (one, zero, zero)),
        ((e_b >= 0) & (f_b <= e_b), (zero, one, zero)),
        ((f_c >= 0) & (e_c <= f_c), (zero, zero, one)),
        ((w_c <= 0) & (e_a >= 0) & (e_b <= 0), (1 - on_ab, on_ab, zero)),
        ((w_b <= 0) & (f_a >= 0) & (f_c <= 0), (1 - on_ac, zero, on_ac)),
        ((w_a <= 0) & (f_b >= e_b) & (e_c >= f_c), (zero, 1 - on_bc, on_bc)),
    ]
    w_a, w_b, w_c = (jnp.maximum(each, 0) for each in (w_a, w_b, w_c))  # rounding leads nowhere outside
    total = w_a + w_b + w_c
    total = jnp.where(total == 0, 1, total)
    inside = (w_a / total, w_b / total, w_c / total)
    where = [each for each, _ in regions]
    return jnp.stack([jnp.select(where, [of[i] for _, of in regions], inside[i]) for i in range(3)], axis=-1)


@jax.jit
def coordinates(triangles: Any, u: Any) -> Array:
    """How barycentric coordinates [..., 3] change along u [..., 3], or its part in the plane of the triangle."""
    a, b, c = triangles[..., 0, :], triangles[..., 1, :], triangles[..., 2, :]
    e, f = b - a, c - a
    ee, ef, ff, eu, fu = ((p * q).sum(axis=-1) for p, q in ((e, e), (e, f), (f, f), (e, u), (f, u)))
    normal = jnp.cross(e, f)
    over = (normal * normal).sum(axis=-1)
    of_b, of_c = (ff * eu - ef * fu) / over, (ee * fu - ef * eu) / over
    return jnp.stack([-of_b - of_c, of_b, of_c], axis=-1)


def eigenpairs(vertices: Any, faces: Any, areas: Any, num: int) -> tuple[Any, Any]:
    """The least eigenvalues [num] above that of the constant, and eigenfunctions at the vertices [V, num].

    Of `L phi = l M phi`, L the cotangent Laplacian and M the lumped masses, a third of the triangles of each vertex.

    Raises:
        ValueError: if the surface is in several parts.
    """
    from scipy.sparse import coo_matrix, diags  # imported here: they would make fm_jax slow to import
    from scipy.sparse.csgraph import connected_components
    from scipy.sparse.linalg import eigsh

    count = len(vertices)
    rows, columns, values = [], [], []
    for i in range(3):  # the edge across from each corner, half the cotangent of the angle there
        here, j, k = faces[:, i], faces[:, i - 2], faces[:, i - 1]
        one, other = vertices[j] - vertices[here], vertices[k] - vertices[here]
        half = (one * other).sum(axis=1) / (4 * areas)
        for row, column, sign in ((j, k, -1), (k, j, -1), (j, j, 1), (k, k, 1)):
            rows.append(row)
            columns.append(column)
            values.append(sign * half)
    index = (np.concatenate(rows), np.concatenate(columns))
    laplacian = coo_matrix((np.concatenate(values), index), (count, count)).tocsc()
    joined = coo_matrix((np.ones(len(index[0])), index), (count, count))
    parts, _ = connected_components(joined, directed=False)
    if parts > 1:
        raise ValueError(
            f"faces must make one connected surface, got {parts} parts; corners at one place are one vertex."
        )
    masses = np.bincount(faces.ravel(), np.repeat(areas, 3), count) / 3
    start = np.random.default_rng(0).normal(size=count)  # the same eigenfunctions each time
    shift = -1 / masses.sum()
    eigenvalues, modes = eigsh(laplacian, num + 1, diags(masses).tocsc(), sigma=shift, v0=start)
    order = np.argsort(eigenvalues)[1:]
    eigenvalues, modes = eigenvalues[order], modes[:, order]
    largest = np.take_along_axis(modes, np.abs(modes).argmax(axis=0)[None], axis=0)
    return np.ascontiguousarray(eigenvalues), np.ascontiguousarray(modes * np.sign(largest))
