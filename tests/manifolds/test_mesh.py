"""TriangleMesh against the sphere and the square that it approximates, and against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from fm_jax.losses import flow_matching
from fm_jax.manifolds import SpectralPremetric, TriangleMesh, biharmonic
from fm_jax.manifolds.triangles import barycentric, nearest
from fm_jax.paths import GeodesicPath, PremetricPath
from fm_jax.samplers import Ambient, RungeKutta, sample

KEY = jax.random.key(0)


def icosphere(level):
    """The icosahedron, each triangle split in four `level` times, with its corners on the sphere."""
    golden = (1 + 5**0.5) / 2
    vertices = [(s, t * golden, 0.0) for s in (-1, 1) for t in (-1, 1)]
    vertices = np.array([np.roll(each, shift) for shift in range(3) for each in vertices])
    near = (np.linalg.norm(vertices[:, None] - vertices[None], axis=2) < 2.1) & ~np.eye(12, dtype=bool)
    faces = np.array(
        [(i, j, k) for i in range(12) for j in range(i) for k in range(j) if near[i, j] and near[j, k] and near[k, i]]
    )
    vertices = vertices / np.linalg.norm(vertices, axis=1, keepdims=True)
    for _ in range(level):
        edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2), axis=1)
        edges, which = np.unique(edges, axis=0, return_inverse=True)
        middle = vertices[edges].mean(axis=1)
        (a, b, c), (ab, bc, ca) = faces.T, which.reshape(-1, 3).T + len(vertices)
        vertices = np.concatenate([vertices, middle / np.linalg.norm(middle, axis=1, keepdims=True)])
        faces = np.concatenate(
            [np.stack(each, axis=1) for each in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))]
        )
    return vertices, faces


def square(num):
    """[0, 1]^2 of num x num cells, in the plane z = 0."""
    side = np.linspace(0, 1, num + 1)
    x, y = np.meshgrid(side, side, indexing="ij")
    number = np.arange((num + 1) ** 2).reshape(num + 1, num + 1)
    a, b, c, d = (each.ravel() for each in (number[:-1, :-1], number[1:, :-1], number[1:, 1:], number[:-1, 1:]))
    faces = np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)])
    return np.stack([x.ravel(), y.ravel(), 0 * x.ravel()], axis=1), faces


SPHERES = [TriangleMesh(*icosphere(level), num_eigen=15) for level in (2, 3)]
SPHERE, SQUARE = SPHERES[1], TriangleMesh(*square(24), num_eigen=8)
DEGREES = np.repeat([1, 2, 3], [3, 5, 7])


def test_the_sphere():
    """642 vertices: eigenvalues l (l + 1) of multiplicity 2 l + 1, the area 4 pi, both to second order."""
    assert [len(each.vertices) for each in SPHERES] == [162, 642]
    exact = DEGREES * (DEGREES + 1)
    off = [np.abs(each.eigenvalues / exact - 1).max() for each in SPHERES]
    assert off[1] < 0.02
    assert 3.5 < off[0] / off[1] < 4.5
    short = [1 - np.exp(each.log_total) / (4 * np.pi) for each in SPHERES]
    assert 0 < short[1] < 0.01
    assert 3.9 < short[0] / short[1] < 4.1
    # The first three are the coordinates, turned, with mean square 1 / (4 pi).
    x = SPHERE.vertices
    turn, rest, *_ = np.linalg.lstsq(x, SPHERE.modes[:, :3], rcond=None)
    assert (rest < 1e-4).all()
    np.testing.assert_allclose(turn.T @ turn, 3 / (4 * np.pi) * np.eye(3), rtol=0.01, atol=1e-3)


def test_the_square_has_neumanns_condition():
    exact = np.pi**2 * np.array([1, 1, 2, 4, 4, 5, 5, 8])
    np.testing.assert_allclose(SQUARE.eigenvalues, exact, rtol=0.01)
    coarse = TriangleMesh(*square(12), num_eigen=8)
    ratio = np.abs(coarse.eigenvalues / exact - 1) / np.abs(SQUARE.eigenvalues / exact - 1)
    np.testing.assert_allclose(ratio, 4, atol=0.3)
    x, y = SQUARE.vertices[:, 0], SQUARE.vertices[:, 1]
    third = 2 * np.cos(np.pi * x) * np.cos(np.pi * y)
    assert min(np.abs(SQUARE.modes[:, 2] - sign * third).max() for sign in (-1, 1)) < 0.02
    assert abs(np.exp(SQUARE.log_total) - 1) < 1e-12


def test_eigenfunctions_are_orthonormal_in_the_area_and_the_same_each_time():
    masses = np.bincount(SPHERE.faces.ravel(), np.repeat(SPHERE.areas / 3, 3))
    np.testing.assert_allclose(SPHERE.modes.T * masses[None] @ SPHERE.modes, np.eye(15), atol=1e-10)
    np.testing.assert_allclose(masses @ SPHERE.modes, 0, atol=1e-8)
    np.testing.assert_array_equal(SPHERES[0].modes, TriangleMesh(*icosphere(2), num_eigen=15).modes)


def lattice(num):
    """Barycentric coordinates [n, 3] all over a triangle."""
    found = [(i, j, num - i - j) for i in range(num + 1) for j in range(num + 1 - i)]
    return np.array(found) / num


def test_the_closest_point_of_triangles_of_all_kinds(x64):
    """Against a dense lattice of each triangle: never farther, and by no more than its spacing nearer."""
    rng, weights = np.random.default_rng(0), lattice(60)
    triangles = rng.normal(size=(200, 3, 3))
    triangles[100:, 2] = triangles[100:, 0] + 0.3 * (triangles[100:, 1] - triangles[100:, 0])  # obtuse, at the third
    triangles[100:, 2] += 0.1 * rng.normal(size=(100, 3))
    x = 1.5 * rng.normal(size=(200, 3))
    found = np.asarray(barycentric(jnp.asarray(x), jnp.asarray(triangles)))
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-12)
    ours = np.linalg.norm((found[:, :, None] * triangles).sum(axis=1) - x, axis=1)
    every = np.einsum("nw,twc->tnc", weights, triangles)
    theirs = np.linalg.norm(every - x[:, None], axis=2).min(axis=1)
    spacing = np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=2).max(axis=1) / 60
    assert (ours <= theirs + 1e-12).all()
    assert (theirs - ours <= spacing).all()
    # And of all triangles at once, which is another computation.
    face, weights = nearest(triangles.reshape(-1, 3), np.arange(600).reshape(200, 3), jnp.asarray(x))
    least = np.linalg.norm((np.asarray(weights)[..., None] * triangles[face]).sum(axis=1) - x, axis=1)
    each = barycentric(jnp.asarray(x)[:, None], jnp.asarray(triangles)[None])
    off = np.linalg.norm((np.asarray(each)[..., None] * triangles[None]).sum(axis=2) - x[:, None], axis=2)
    np.testing.assert_allclose(least, off.min(axis=1), atol=1e-12)
    # All seven regions are there: three corners, three edges, the inside; and triangles with an obtuse angle.
    kinds = np.unique((found > 0) @ np.array([1, 2, 4]), return_counts=True)
    assert kinds[0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert kinds[1].min() >= 3
    single = np.asarray(barycentric(jnp.asarray(x, jnp.float32), jnp.asarray(triangles, jnp.float32)))
    near = np.linalg.norm((single[:, :, None] * triangles).sum(axis=1) - x, axis=1)
    np.testing.assert_allclose(near, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_the_closest_point_of_a_mesh(x64):
    """Over all faces, in chunks of 7, the last not full: against every face by itself, and against a lattice."""
    mesh = TriangleMesh(*icosphere(1), num_eigen=3)
    x = np.random.default_rng(1).normal(size=(2, 15, 3))
    found = np.asarray(mesh.project(jnp.asarray(x)))
    face, weights = nearest(mesh.vertices, mesh.faces, jnp.asarray(x), pairs=30 * 7)
    corners = mesh.vertices[mesh.faces[face]]
    np.testing.assert_allclose((np.asarray(weights)[..., None] * corners).sum(axis=-2), found, atol=1e-14)
    every = np.einsum("nw,twc->tnc", lattice(40), mesh.vertices[mesh.faces]).reshape(-1, 3)
    lattice_off = np.linalg.norm(every[None, None] - x[:, :, None], axis=3).min(axis=2)
    off = np.linalg.norm(found - x, axis=2)
    assert (off <= lattice_off + 1e-12).all()
    assert (lattice_off - off < 0.02).all()
    np.testing.assert_allclose(mesh.project(jnp.asarray(found)), found, atol=1e-14)
    assert jnp.isnan(mesh.project(jnp.full((1, 3), jnp.nan))).all()


def test_single_precision_off_the_surface(x64):
    """Above folds too, where the distances to two triangles differ by less than rounding."""
    corners = SPHERE.vertices[SPHERE.faces]
    near = np.random.default_rng(0).uniform(0, 0.01, len(corners))[:, None]  # to the edge of the first two
    x = 0.5 * corners[:, 0] + (0.5 - near) * corners[:, 1] + near * corners[:, 2]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normal *= np.sign((normal * x).sum(axis=1, keepdims=True)) / np.linalg.norm(normal, axis=1, keepdims=True)
    x = jnp.asarray(x + 0.3 * normal, jnp.float32)
    both = jax.jit(lambda x: (SPHERE.project(x), SPHERE.eigenfunctions(x)))
    for ours, exact in zip(both(x), both(x.astype(jnp.float64)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, exact, atol=1e-6)


@pytest.mark.slow
def test_points_and_tangents():
    x = jax.jit(SPHERE.uniform)(KEY, jnp.zeros((50, 3)))
    SPHERE.check("x", x)
    np.testing.assert_allclose(SPHERE.exp(x, 0 * x), x, atol=1e-6)
    u = SPHERE.normal(jax.random.key(1), x)
    np.testing.assert_allclose(SPHERE.tangent(x, u), u, atol=1e-6)
    assert float(jnp.abs((u * x).sum(axis=1)).max()) < 0.2 * float(jnp.linalg.norm(u, axis=1).max())
    np.testing.assert_allclose(SPHERE.squared_norm(x, u), jnp.linalg.norm(u, axis=1) ** 2, rtol=1e-6)
    # Derivatives of both modes: the projection onto the plane of the triangle, at a corner of it too.
    for at in (x[0], jnp.asarray(SPHERE.vertices[5], jnp.float32)):
        g = jnp.array([0.3, -1.0, 0.7])
        wanted = SPHERE.tangent(at, g)
        forward = jax.jit(lambda z: jax.jvp(SPHERE.project, (z,), (g,))[1])(at)  # noqa: B023
        backward = jax.jit(jax.grad(lambda u: SPHERE.exp(at, u) @ g))(0 * at)  # noqa: B023
        np.testing.assert_allclose(forward, wanted, atol=1e-6)
        np.testing.assert_allclose(backward, wanted, atol=1e-6)
    np.testing.assert_array_equal(SPHERE.log_volume(x), jnp.zeros(50))
    assert hash(SPHERE) == hash(TriangleMesh(*icosphere(3), num_eigen=15))
    assert TriangleMesh(*icosphere(3), num_eigen=15) == SPHERE != TriangleMesh(*icosphere(3), num_eigen=14)
    assert SPHERES[0] != SPHERES[1]
    assert repr(SPHERE) == "TriangleMesh(642 vertices, 1280 faces, num_eigen=15)"


def test_the_gradient_of_eigenfunctions_is_within_the_triangle(x64):
    x = SQUARE.uniform(KEY, jnp.zeros((20, 3), jnp.float64))
    slopes = np.asarray(jax.jit(jax.vmap(jax.jacrev(SQUARE.eigenfunctions)))(x))
    h = 1e-7
    for i in range(2):
        ahead = SQUARE.eigenfunctions(x + h * jnp.eye(3)[None, i])
        np.testing.assert_allclose(slopes[:, :, i], (ahead - SQUARE.eigenfunctions(x)) / h, atol=1e-5)
    np.testing.assert_allclose(slopes[:, :, 2], 0, atol=1e-12)
    third = 2 * np.cos(np.pi * x[:, 0]) * np.cos(np.pi * x[:, 1])
    assert min(np.abs(SQUARE.eigenfunctions(x)[:, 2] - sign * third).max() for sign in (-1, 1)) < 0.02
    at_corners = SQUARE.eigenfunctions(jnp.asarray(SQUARE.vertices))
    np.testing.assert_allclose(at_corners, SQUARE.modes, atol=1e-12)


def test_uniform_draws_are_by_area():
    """Of triangles of areas from 0.5 to 14.5, and within one of them; p-values of 1e-4."""
    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [5, 5, 0], [6, -1, 0]])
    mesh = TriangleMesh(corners, np.array([[0, 1, 2], [1, 3, 2], [1, 4, 3]]), num_eigen=1)
    x = np.asarray(jax.jit(mesh.uniform)(KEY, jnp.zeros((20_000, 3))), np.float64)
    first = x[:, 0] + x[:, 1] < 1
    third = ~first & ((x[:, 0] - 1) * 5 - x[:, 1] * 4 > 0)  # right of the edge from 1 to 3
    counts = [first.sum(), (~first & ~third).sum(), third.sum()]
    np.testing.assert_allclose(mesh.areas, [0.5, 4.5, 14.5])
    assert chisquare(counts, 20_000 * mesh.areas / mesh.areas.sum()).pvalue > 1e-4
    # Within a square of 24 x 24 cells, against 10 x 10 others.
    x = np.asarray(jax.jit(SQUARE.uniform)(KEY, jnp.zeros((20_000, 3))))
    cells = np.histogram2d(x[:, 0], x[:, 1], bins=10, range=[[0, 1], [0, 1]])[0]
    assert chisquare(cells.ravel()).pvalue > 1e-4
    assert SPHERE.uniform(KEY, jnp.zeros((4, 2, 3))).shape == (4, 2, 3)


def paths_of(mesh, num_steps=100):
    return PremetricPath(
        mesh, SpectralPremetric(mesh.eigenfunctions, biharmonic(mesh.eigenvalues)), num_steps=num_steps
    )


@pytest.mark.slow
def test_a_premetric_path_on_it():
    """Falls as 1 - kappa, within 2% of the start."""
    x0, x1 = jax.jit(SPHERE.uniform)(KEY, jnp.zeros((2, 16, 3)))
    t = jnp.tile(jnp.array([0.25, 0.5, 0.75, 0.95]), 4)
    path = PremetricPath(SPHERE, SpectralPremetric(SPHERE.eigenfunctions, biharmonic(SPHERE.eigenvalues)))
    found = jax.jit(path.sample)(None, t, x0, x1)
    share = np.asarray(path.premetric(found.x_t, x1) / path.premetric(x0, x1))
    np.testing.assert_allclose(share, 1 - t, atol=0.02)
    SPHERE.check("x_t", found.x_t)
    np.testing.assert_allclose(SPHERE.tangent(found.x_t, found.u_t), found.u_t, atol=1e-5)
    loss_fn = jax.jit(flow_matching(lambda params, t, x, cond, **_: found.u_t + 0.0 * x, path))
    assert float(loss_fn({}, None, {"x0": x0, "x1": x1, "t": t})[0]) < 1e-6


@pytest.mark.slow
def test_sampling_stays_on_it():
    x0 = SPHERES[0].uniform(KEY, jnp.zeros((4, 3)))
    turn = jnp.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    field = lambda t, x: x @ turn  # noqa: E731
    for sampler in (RungeKutta("euler", SPHERES[0]), Ambient(SPHERES[0], RungeKutta("heun"))):
        found = jax.jit(lambda x0: sample(field, x0, sampler, times=20).x)(x0)  # noqa: B023
        SPHERES[0].check("x", found)
        wanted = x0 @ jax.scipy.linalg.expm(turn)
        assert float(jnp.linalg.norm(found - wanted, axis=1).max()) < 0.1


V, F = icosphere(0)


def changed(array, index, value):
    array = np.array(array)
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TriangleMesh(V, changed(F, (0, 0), 12), 3),
            "vertices from 0 to 11, got from 0 to 12",
        ),
        (lambda: TriangleMesh(V, F - 1, 3), "faces must be of vertices from 0 to 11, got from -1"),
        (lambda: TriangleMesh(V, F[:, :2], 3), r"faces must be \[F, 3\], integers.*\(20, 2\)"),
        (lambda: TriangleMesh(V, np.concatenate([F, F[:, :1]], axis=1), 3), r"faces must be \[F, 3\]"),
        (lambda: TriangleMesh(V, F.astype(float), 3), r"faces must be \[F, 3\], integers.*float64"),
        (lambda: TriangleMesh(V, F[:0], 3), r"faces must be \[F, 3\]"),
        (lambda: TriangleMesh(V, [[0, 1, 2], [3]], 3), "faces must be real numbers"),
        (lambda: TriangleMesh(V[:, :2], F, 3), r"vertices must be \[V, 3\].*\(12, 2\)"),
        (lambda: TriangleMesh(changed(V, (0, 0), np.nan), F, 3), "vertices must be finite"),
        (lambda: TriangleMesh(V, changed(F, 3, [1, 1, 2]), 3), "got 1 of 20 without, such as 3"),
        (lambda: TriangleMesh([[0, 0, 0], [1, 0, 0], [2, 0, 0.0]], [[0, 1, 2]], 1), "triangles with an area"),
        (lambda: TriangleMesh(np.concatenate([V, V[:1]]), F, 3), "got 1 of 13 that are of none"),
        (lambda: TriangleMesh(np.concatenate([V, V + 5]), np.concatenate([F, F + 12]), 3), "got 2 parts"),
        (lambda: TriangleMesh(V, F, 11), "num_eigen must be from 1 to 10, got 11"),
        (lambda: TriangleMesh(V, F, 0), "num_eigen must be from 1 to 10, got 0"),
        (lambda: TriangleMesh(V, F, 2.0), "num_eigen must be an integer"),
        (lambda: jax.jit(lambda v: TriangleMesh(v, F, 3).areas)(V), "vertices must be known when it is built"),
        (lambda: SPHERE.log(V, V), "no log, its geodesics are not known: take PremetricPath"),
        (lambda: SPHERE.distance(V, V), "no distance, its geodesics are not known"),
        (lambda: SPHERE.log_jacobian(V, V), "no log_jacobian"),
        (lambda: SPHERE.check("x", 1.1 * V), "x must be points of TriangleMesh.642 vertices.*, got 12 of 12 off it"),
        (lambda: SPHERE.uniform(KEY, jnp.zeros((3, 2))), r"like must be points of"),
        (lambda: GeodesicPath(SPHERE).sample(None, 0.5, V, V), "no log, its geodesics are not known"),
        (lambda: sample(lambda t, x: x, V, RungeKutta("heun", SPHERE)), "no log, its geodesics are not known"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
