"""Simplices with the Fisher-Rao metric, against the sphere of radius 2 in extended precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.likelihood import log_prob
from fm_jax.manifolds import Simplex, tangent_velocity
from fm_jax.paths import GeodesicPath
from fm_jax.samplers import RungeKutta, sample

KEY, SIMPLEX = jax.random.key(0), Simplex(3)


def points(num, seed=0, n=3, concentration=4.0, dtype=jnp.float64):
    p = np.random.default_rng(seed).dirichlet(np.full(n + 1, concentration), num)
    return jnp.asarray(p, dtype)


def closed_forms(p, q):
    """log and distance by the roots: half the angle has the sine |sqrt(p) - sqrt(q)| / 2."""
    s, t = (np.sqrt(np.asarray(x).astype(np.longdouble)) for x in (p, q))
    s, t = (a / np.sqrt((a**2).sum(axis=-1, keepdims=True)) for a in (s, t))
    half = np.arcsin(np.sqrt(((s - t) ** 2).sum(axis=-1, keepdims=True)) / 2)
    w = (t - s) + 2 * np.sin(half) ** 2 * s  # t - cos(angle) s
    return 2 * half / np.sin(2 * half) * w * 2 * s, 4 * half[..., 0]


def inner(p, u, v):
    return (np.asarray(u) * np.asarray(v) / np.asarray(p)).sum(axis=-1)


def frame(p):
    """Orthonormal tangent vectors at one point, [n, n + 1], by Gram and Schmidt in the metric."""
    p, vectors = np.asarray(p), []
    for u in np.random.default_rng(0).normal(size=(len(p) - 1, len(p))):
        for _ in range(2):
            u = u - u.sum() * p - sum((inner(p, b, u) * b for b in vectors), np.zeros_like(u))
        vectors.append(u / np.sqrt(inner(p, u, u)))
    return np.stack(vectors)


def test_there_and_back(x64):
    p, q = points(40), points(40, 1, concentration=0.7)
    u = SIMPLEX.log(p, q)
    wanted, distance = closed_forms(p, q)
    np.testing.assert_allclose(u, wanted.astype(float), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(SIMPLEX.distance(p, q), distance.astype(float), rtol=1e-13)
    affinity = np.sqrt(np.asarray(p * q)).sum(axis=1)
    np.testing.assert_allclose(SIMPLEX.distance(p, q), 2 * np.arccos(affinity), rtol=1e-12)
    np.testing.assert_allclose(SIMPLEX.exp(p, u), q, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(SIMPLEX.squared_norm(p, u), SIMPLEX.distance(p, q) ** 2, rtol=1e-12)
    np.testing.assert_allclose(SIMPLEX.squared_norm(p, u), inner(p, u, u), rtol=1e-13)
    np.testing.assert_allclose(u.sum(axis=1), 0, atol=1e-14)
    np.testing.assert_array_equal(SIMPLEX.log(p, p), 0)
    np.testing.assert_allclose(SIMPLEX.exp(p, 0 * p), p, rtol=1e-15)
    # The same way on the sphere.
    s, angle = np.sqrt(np.asarray(p)), np.sqrt(inner(p, u, u))[:, None] / 2
    third = (np.cos(angle / 3) * s + np.sin(angle / 3) / angle * u / (2 * s)) ** 2
    np.testing.assert_allclose(SIMPLEX.exp(p, u / 3), third, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.float64, 1e-14)])
def test_exp_never_leaves_the_simplex(dtype, tolerance, x64):
    """Beyond a face it is reflected: the coordinates on the sphere, without their signs."""
    p = points(200, dtype=dtype)
    u = 3 * SIMPLEX.normal(KEY, p)
    q = np.asarray(SIMPLEX.exp(p, u), float)
    assert np.abs(q.sum(axis=1) - 1).max() < tolerance
    assert (q >= 0).all()
    SIMPLEX.check("q", jnp.asarray(q, dtype))
    s, w = np.sqrt(np.asarray(p, float)), np.asarray(u, float) / np.sqrt(np.asarray(p, float)) / 2
    r = np.linalg.norm(w, axis=1, keepdims=True)
    beyond = np.cos(r) * s + np.sin(r) / r * w
    assert (beyond < 0).any(axis=1).mean() > 0.5
    np.testing.assert_allclose(q, beyond**2, atol=20 * tolerance)


@pytest.mark.parametrize("n", [2, 10])
def test_float32_is_right_at_all_distances(n):
    """log, in its metric, distance and exp of the float32 probabilities themselves, from 1e-6 to 3.14."""
    rng, simplex = np.random.default_rng(n), Simplex(n)
    p = rng.dirichlet(np.ones(n + 1), 60)
    u = np.sqrt(p) * rng.normal(size=p.shape)
    u = u - u.sum(axis=1, keepdims=True) * p
    u = u / np.sqrt(inner(p, u, u))[:, None] * np.geomspace(1e-6, 1.5, 60)[:, None]
    w = u / np.sqrt(p) / 2
    r = np.linalg.norm(w, axis=1, keepdims=True)
    q = (np.cos(r) * np.sqrt(p) + np.sin(r) / r * w) ** 2
    one, other, near = np.full((3, n + 1), 0.0)
    one[0], other[1], near[:] = 1, 1, 1e-8 / n
    near[1] = 1 - 1e-8
    p, q = (np.asarray(x, np.float32) for x in ([*p, near, np.full(n + 1, 1 / (n + 1))], [*q, one, other]))
    wanted, distance = closed_forms(p, q)
    assert distance.max() > 3.13
    for log, dist in ((simplex.log, simplex.distance), (jax.jit(simplex.log), jax.jit(simplex.distance))):
        found = np.asarray(log(jnp.asarray(p), jnp.asarray(q)))
        assert found.dtype == np.float32
        error = np.sqrt(inner(p.astype(float), found - wanted, found - wanted)) / distance
        assert error.max() < 1e-6, error.max()
        error = np.abs(np.asarray(dist(jnp.asarray(p), jnp.asarray(q))) - distance) / distance
        assert error.max() < 1e-6, error.max()
        moved = np.asarray(simplex.exp(jnp.asarray(p), jnp.asarray(found)))
        np.testing.assert_allclose(moved, q, atol=1e-6)


@pytest.mark.slow
def test_faces():
    """log arrives at points of a face from inside; within the face all is as in that simplex; nothing is NaN."""
    inside, face = jnp.array([0.2, 0.3, 0.5]), jnp.array([0.4, 0.6, 0.0])
    corner, simplex = jnp.array([0.0, 1.0, 0.0]), Simplex(2)
    for end in (face, corner):
        simplex.check("x", end)
        np.testing.assert_allclose(simplex.exp(inside, simplex.log(inside, end)), end, atol=1e-6)
        wanted = 2 * np.arccos(np.sqrt(inside * end).sum())
        np.testing.assert_allclose(simplex.distance(inside, end), wanted, rtol=1e-6)
        np.testing.assert_allclose(simplex.distance(end, inside), wanted, rtol=1e-6)
    np.testing.assert_allclose(simplex.distance(corner, jnp.array([1.0, 0, 0])), math.pi, rtol=1e-6)
    other = jnp.array([0.7, 0.3, 0.0])
    within = Simplex(1).log(face[:2], other[:2])
    np.testing.assert_allclose(simplex.log(face, other), [*within, 0], atol=1e-7)
    np.testing.assert_allclose(simplex.squared_norm(face, simplex.log(face, other)), simplex.distance(face, other) ** 2)
    np.testing.assert_allclose(simplex.exp(face, simplex.log(face, other)), other, atol=1e-6)
    np.testing.assert_allclose(simplex.exp(face, jnp.array([0.1, -0.2, 0.1]))[2], 0)
    assert simplex.squared_norm(face, jnp.array([0.1, -0.2, 0.1])) == jnp.inf
    assert simplex.log_volume(face) == jnp.inf
    assert simplex.normal(KEY, face)[2] == 0

    @jax.jit
    def values(a, b):
        found = []
        for function in (simplex.log, simplex.distance, lambda a, b: simplex.exp(a, simplex.log(a, b))):
            value, pull = jax.vjp(function, a, b)
            found.append((value, jax.jvp(function, (a, b), (inside, face))[1], pull(jnp.ones_like(value))))
        return found

    @jax.jit
    def at_vectors(u):
        found = []
        for function in (simplex.exp, simplex.squared_norm, simplex.log_jacobian):
            value, pull = jax.vjp(function, face, u)
            found.append((value, pull(jnp.ones_like(value))))
        return found

    found = [values(a, b) for a in (inside, face, other, corner) for b in (inside, face, other, corner)]
    way = simplex.log(face, other)
    for each in jax.tree.leaves((found, at_vectors(way), at_vectors(0 * way))):
        assert jnp.isfinite(each).all()


@pytest.mark.slow
def test_one_hot_data_are_the_ends_of_paths(x64):
    x1 = jnp.eye(4)
    found = GeodesicPath(SIMPLEX).sample(None, jnp.full(4, 1 - 1e-6), points(4), x1)
    np.testing.assert_allclose(found.x_t, x1, atol=1e-5)
    assert jnp.isfinite(found.u_t).all()
    np.testing.assert_allclose(SIMPLEX.squared_norm(found.x_t, found.u_t), closed_forms(points(4), x1)[1] ** 2)


def test_projection_and_tangent_vectors(x64):
    p, v = points(6), jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)))
    np.testing.assert_allclose(SIMPLEX.project(3 * p), p, rtol=1e-15)
    np.testing.assert_array_equal(SIMPLEX.project(jnp.array([0.5, -0.1, 1.5, 0.0])), [0.25, 0, 0.75, 0])
    assert jnp.isnan(SIMPLEX.project(jnp.zeros(4))).all()
    _, found = jax.jvp(SIMPLEX.project, (p,), (v,))
    np.testing.assert_allclose(found, v - v.sum(axis=1, keepdims=True) * p, atol=1e-15)
    u = SIMPLEX.tangent(p, v)
    np.testing.assert_allclose(found, u, atol=1e-15)
    w = SIMPLEX.normal(KEY, p)
    np.testing.assert_allclose(inner(p, v - u, w), 0, atol=1e-14)  # orthogonal, so the nearest
    # The gradient of an expectation is the covariance with it.
    g = SIMPLEX.gradient(p, v)
    np.testing.assert_allclose(inner(p, g, w), (v * w).sum(axis=1), atol=1e-14)
    np.testing.assert_allclose(g.sum(axis=1), 0, atol=1e-15)


def test_derivatives_at_coincidence(x64):
    """Of both modes: log's is the projection onto the tangent space, on a face too."""

    @jax.jit
    def slopes(p):
        of_log = [mode(SIMPLEX.log, (0, 1))(p, p) for mode in (jax.jacrev, jax.jacfwd)]
        of_distance = [mode(SIMPLEX.distance, (0, 1))(p, p) for mode in (jax.jacrev, jax.jacfwd)]
        return of_log, of_distance, jax.jacrev(SIMPLEX.exp, 1)(p, 0 * p)

    for p in (points(1)[0], jnp.array([0.3, 0.0, 0.7, 0.0])):
        projection, some = np.eye(4) - np.asarray(p)[:, None] * np.ones((1, 4)), np.asarray(p) > 0
        of_log, of_distance, of_exp = slopes(p)
        np.testing.assert_allclose(of_log, [(-projection, projection)] * 2, atol=1e-14)
        np.testing.assert_array_equal(of_distance, np.zeros((2, 2, 4)))
        np.testing.assert_allclose(of_exp[some][:, some], projection[some][:, some], atol=1e-14)


def test_derivatives_elsewhere(x64):
    """The gradient of half the squared distance to q is -log_p(q)."""
    p, q = points(5), points(5, 1, concentration=0.7)
    slope = jax.jit(jax.grad(lambda p: (SIMPLEX.distance(p, q) ** 2).sum() / 2))(p)
    np.testing.assert_allclose(SIMPLEX.gradient(p, slope), -SIMPLEX.log(p, q), rtol=1e-10, atol=1e-12)
    u, h = SIMPLEX.normal(KEY, p), 1e-6
    found = jax.jit(lambda p, u: jax.jvp(lambda p: SIMPLEX.log(p, q), (p,), (u,))[1])(p, u)
    ahead, behind = (closed_forms(SIMPLEX.exp(p, s * u), q)[0] for s in (h, -h))
    np.testing.assert_allclose(found, ((ahead - behind) / (2 * h)).astype(float), atol=1e-8)


def test_volumes(x64):
    """log_volume is half the log-determinant of the metric in the coordinates p_1, ..., p_n, log_total its integral."""
    p = points(20)
    for each in np.asarray(p):
        basis = np.concatenate([-np.ones((3, 1)), np.eye(3)], axis=1)
        gram = (basis / each) @ basis.T
        np.testing.assert_allclose(SIMPLEX.log_volume(each), np.linalg.slogdet(gram)[1] / 2, rtol=1e-12)
    for n, wanted in ((1, math.pi), (2, 2 * math.pi), (3, math.pi**2)):  # parts 1/2^(n + 1) of the sphere of radius 2
        assert Simplex(n).log_total == pytest.approx(math.log(wanted))
    # On one coordinate, by the midpoint rule in the angle: p = sin^2.
    angle = (np.arange(100) + 0.5) * math.pi / 200
    p = np.stack([np.sin(angle) ** 2, np.cos(angle) ** 2], axis=1)
    steps = 2 * np.sin(angle) * np.cos(angle) * math.pi / 200
    found = (np.exp(Simplex(1).log_volume(jnp.asarray(p))) * steps).sum()
    np.testing.assert_allclose(found, math.pi, rtol=1e-12)


def test_what_exp_does_to_volumes(x64):
    """log_jacobian is the log-determinant of the derivative of exp in orthonormal frames, after a reflection too."""
    for n in (1, 3):
        simplex, p = Simplex(n), points(1, n=n)[0]
        slope = jax.jit(jax.jacfwd(simplex.exp, 1))
        for size in (1e-3, 0.4, 2.5):
            u = size * frame(p)[0]
            moved = frame(p) @ slope(p, u).T
            q = np.asarray(simplex.exp(p, u))
            matrix = inner(q, frame(q)[None], np.asarray(moved)[:, None])
            found = simplex.log_jacobian(p, u)
            np.testing.assert_allclose(found, np.linalg.slogdet(matrix)[1], atol=1e-9)
            np.testing.assert_allclose(found, (n - 1) * np.log(np.sin(size / 2) / (size / 2)), atol=1e-12)


class Uniform:
    def draw(self, key, like):
        return SIMPLEX.uniform(key, like)

    def log_prob(self, x):
        return jnp.full(len(x), -SIMPLEX.log_total)


@pytest.mark.slow
def test_likelihoods_by_the_replicator_equation(x64):
    """The flow p e^(t a) / Z of `p (a - <a, p>)`: its density in p_1, ..., p_n is that of p times prod p0 / prod p1."""
    a = jnp.array([0.5, -1.0, 0.3, 0.0])
    v = lambda t, x: x * a[None]  # noqa: E731
    p1 = points(5)
    p0 = p1 * jnp.exp(-a)[None]
    p0 = p0 / p0.sum(axis=1, keepdims=True)
    forth = sample(v, p0, RungeKutta("rk4", SIMPLEX), times=20).x
    np.testing.assert_allclose(forth, p1, atol=1e-7)
    # The logarithms of p_i / p_0 are translated, of which the volume is that of p by prod p.
    change = jnp.log(p0).sum(axis=1) - jnp.log(p1).sum(axis=1)
    wanted = -SIMPLEX.log_total + change + SIMPLEX.log_volume(p0) - SIMPLEX.log_volume(p1)
    found = log_prob(v, p1, manifold=SIMPLEX, source=Uniform(), sampler=RungeKutta("rk4"), times=40)
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    field = tangent_velocity(SIMPLEX, v)
    trace = jax.jit(jax.vmap(lambda p: jnp.trace(jax.jacfwd(lambda p: field(0.0, p[None])[0])(p))))(p1)
    np.testing.assert_allclose(trace, a.sum() - 4 * (p1 @ a), rtol=1e-12)


def test_draws():
    """Moments of Jeffreys' prior, Dirichlet(1/2), and unit covariance in the metric, within 5 standard errors."""
    num, n = 20_000, 3
    p = np.asarray(SIMPLEX.uniform(KEY, jnp.zeros((num, n + 1))), float)
    np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-6)
    mean, total = 1 / 4, 4 / 2
    variance = mean * (1 - mean) / (total + 1)
    np.testing.assert_allclose(p.mean(axis=0), mean, atol=5 * (variance / num) ** 0.5)
    np.testing.assert_allclose(p.var(axis=0), variance, rtol=0.05)
    np.testing.assert_allclose(np.cov(p.T)[0, 1:], -mean * mean / (total + 1), atol=0.002)
    x = jnp.broadcast_to(points(1, dtype=jnp.float32), (num, n + 1))
    u = np.asarray(SIMPLEX.normal(KEY, x), float)
    np.testing.assert_allclose(u.sum(axis=1), 0, atol=1e-6)
    at = np.asarray(x[0], float)
    found = inner(at, u[:, None], frame(at / at.sum())[None])
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=5 / num**0.5)
    np.testing.assert_allclose(np.cov(found.T), np.eye(n), atol=5 * (2 / num) ** 0.5)


def test_bad_input_is_refused():
    good = points(4, dtype=jnp.float32)
    SIMPLEX.check("x", good)
    SIMPLEX.check("x", jnp.eye(4))
    for wrong, message in (
        (2 * good, "got 4 of 4 off it, by up to .*; manifold.project brings them there"),
        (jnp.array([[0.6, 0.6, -0.2, 0.0]]), "got 1 of 1 off it, by up to 0.2"),
        (jnp.zeros((2, 4)), "got 2 of 2 off it"),
        (good.at[1, 2].set(jnp.nan), "got 1 of 4 off it"),
        (jnp.log(good), "got 4 of 4 off it"),
        (good[:, 1:], r"x must be points of Simplex\(n=3\), \[..., 4\], got shape \(4, 3\)"),
        (jnp.eye(4, dtype=int), "in floating point, got int32"),
        ("one", "x must be"),
    ):
        with pytest.raises(ValueError, match=message):
            SIMPLEX.check("x", wrong)
    for n in (0, 2.0, True):
        with pytest.raises(ValueError, match="n must be"):
            Simplex(n)
    with pytest.raises(ValueError, match="key must be"):
        SIMPLEX.uniform(None, good)
    with pytest.raises(ValueError, match="key must be"):
        SIMPLEX.normal(None, good)
    with pytest.raises(ValueError, match=r"like must be points of Simplex\(n=3\)"):
        SIMPLEX.uniform(KEY, jnp.zeros((2, 3)))
