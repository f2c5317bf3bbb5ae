"""Symmetric positive definite matrices: against SciPy's functions of matrices, and where eigenvalues coincide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from fm_jax.manifolds import SPD, LogEuclideanSPD, tangent_velocity

KEY = jax.random.key(0)
AFFINE, FLAT = SPD(3), LogEuclideanSPD(3)
BOTH = pytest.mark.parametrize("manifold", [AFFINE, FLAT], ids=repr)
COINCIDENT = [np.eye(3), np.diag([1.0, 2.0, 2.0])]
ROWS, COLUMNS = np.triu_indices(3)
jitted = functools.cache(lambda manifold, name: jax.jit(getattr(manifold, name)))


def drawn(num, seed=0, scale=1.0, n=3):
    noise = scale * np.random.default_rng(seed).normal(size=(num, n, n))
    return np.stack([linalg.expm(each) for each in (noise + noise.swapaxes(1, 2)) / 2])


def symmetric(num, seed=1, n=3):
    noise = np.random.default_rng(seed).normal(size=(num, n, n))
    return jnp.asarray(noise + noise.swapaxes(1, 2)) / 2


def upper(n=3):
    """[dim, n, n], what changes the entries of the upper triangle."""
    i, j = np.triu_indices(n)
    basis = np.zeros((len(i), n, n))
    basis[np.arange(len(i)), i, j] = basis[np.arange(len(i)), j, i] = 1
    return jnp.asarray(basis)


def gram(manifold, x):
    """[dim, dim], of the metric at one point in the entries of the upper triangle, by polarisation."""
    e = upper(manifold.n)
    plus, minus = e[:, None] + e[None], e[:, None] - e[None]
    at = jnp.broadcast_to(x, plus.shape)
    squared_norm = jitted(manifold, "squared_norm")
    return np.asarray(squared_norm(at, plus) - squared_norm(at, minus)) / 4


# ---- Points and vectors.


def test_the_affine_invariant_maps_are_those_of_scipy(x64):
    x, y, u = drawn(10), drawn(10, 1), np.asarray(symmetric(10))
    roots = [linalg.sqrtm(each) for each in x]
    inverses = [linalg.inv(root) for root in roots]
    wanted = [r @ linalg.expm(s @ w @ s) @ r for r, s, w in zip(roots, inverses, u)]
    np.testing.assert_allclose(jitted(AFFINE, "exp")(x, u), wanted, rtol=1e-11, atol=1e-11)
    wanted = [r @ linalg.logm(s @ w @ s) @ r for r, s, w in zip(roots, inverses, y)]
    np.testing.assert_allclose(jitted(AFFINE, "log")(x, y), wanted, atol=1e-12)
    wanted = [np.linalg.norm(np.log(linalg.eigvalsh(b, a))) for a, b in zip(x, y)]
    np.testing.assert_allclose(jitted(AFFINE, "distance")(x, y), wanted, rtol=1e-13)


def test_the_log_euclidean_maps_are_those_of_scipy(x64):
    x, y, u = drawn(10), drawn(10, 1), np.asarray(symmetric(10))
    wanted = [np.linalg.norm(linalg.logm(b) - linalg.logm(a)) for a, b in zip(x, y)]
    np.testing.assert_allclose(jitted(FLAT, "distance")(x, y), wanted, rtol=1e-12)
    wanted = [linalg.expm_frechet(linalg.logm(a), linalg.logm(b) - linalg.logm(a))[1] for a, b in zip(x, y)]
    np.testing.assert_allclose(jitted(FLAT, "log")(x, y), wanted, atol=1e-11)
    of_logarithm = np.asarray(u)
    u = np.stack([linalg.expm_frechet(linalg.logm(a), w)[1] for a, w in zip(x, of_logarithm)])
    np.testing.assert_allclose(jitted(FLAT, "squared_norm")(x, u), (of_logarithm**2).sum(axis=(1, 2)), rtol=1e-11)
    wanted = [linalg.expm(linalg.logm(a) + w) for a, w in zip(x, of_logarithm)]
    np.testing.assert_allclose(jitted(FLAT, "exp")(x, u), wanted, rtol=1e-10, atol=1e-10)


@BOTH
@pytest.mark.parametrize("near", [1e-9, 1e-3, 1.0])
def test_there_and_back(manifold, near, x64):
    x = drawn(20)
    y = x + near * (drawn(20, 1) - x)  # in between, as the set is convex
    u = jitted(manifold, "log")(x, y)
    np.testing.assert_allclose(jitted(manifold, "exp")(x, u), y, rtol=1e-12, atol=1e-13)
    distance = jitted(manifold, "distance")(x, y)
    rtol = 1e-12 if manifold == AFFINE else 1e-13 / near  # the difference of the logarithms is rounded
    np.testing.assert_allclose(jitted(manifold, "squared_norm")(x, u), distance**2, rtol=max(rtol, 1e-12))
    np.testing.assert_allclose(u, np.asarray(u).swapaxes(1, 2), atol=1e-15)
    np.testing.assert_allclose(jitted(manifold, "exp")(x, 0 * u), x, rtol=1e-13, atol=1e-14)
    np.testing.assert_array_equal(jitted(manifold, "distance")(x, x), 0)


@pytest.mark.parametrize("near", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("ratio", [1.0, 1e3])
def test_single_precision_is_right_to_the_condition_number(near, ratio, x64):
    spread = np.diag([1.0, ratio**0.5, ratio**0.5])
    x = (spread @ drawn(20, scale=0.3) @ spread).astype(np.float32)
    y = (x * (1 + near * np.abs(np.asarray(symmetric(20)))) + near * x).astype(np.float32)
    y = (y + y.swapaxes(1, 2)) / 2
    keep = np.linalg.eigvalsh(y.astype(float)).min(axis=1) > 1e-2
    x, y = x[keep], y[keep]
    exact = x.astype(np.float64), y.astype(np.float64)
    condition = np.linalg.cond(exact[0]) * np.linalg.cond(np.linalg.solve(*exact))
    found, wanted = jitted(AFFINE, "distance")(x, y), jitted(AFFINE, "distance")(*exact)
    assert found.dtype == jnp.float32
    assert np.max(np.abs(found - wanted) / wanted / condition) < 1e-6
    back = jitted(AFFINE, "exp")(x, jitted(AFFINE, "log")(x, y))
    assert np.max(np.abs(back - y).max((1, 2)) / np.abs(y).max((1, 2)) / condition) < 1e-6


def test_the_metric_is_affine_invariant_and_the_inverse_an_isometry(x64):
    x, y, g = drawn(10), drawn(10, 1), np.random.default_rng(2).normal(size=(3, 3))
    distance = jitted(AFFINE, "distance")
    np.testing.assert_allclose(distance(g @ x @ g.T, g @ y @ g.T), distance(x, y), rtol=1e-10)
    np.testing.assert_allclose(distance(np.linalg.inv(x), np.linalg.inv(y)), distance(x, y), rtol=1e-11)
    far = 1e-8 * np.eye(3) + 0 * x  # where y - x is all but -x
    np.testing.assert_allclose(distance(x * 0 + np.eye(3), far), 8 * np.log(10) * 3**0.5, rtol=1e-14)
    assert (np.linalg.eigvalsh(jitted(AFFINE, "exp")(x, -30 * x)) > 0).all()


# ---- Derivatives.


@BOTH
@pytest.mark.parametrize("x", COINCIDENT, ids=["unit", "two"])
def test_derivatives_at_coincidence_are_the_symmetric_part(manifold, x, x64):
    x = jnp.asarray(x)
    wanted = np.zeros((3, 3, 3, 3))
    for i, j in np.ndindex(3, 3):
        wanted[i, j, i, j] += 0.5
        wanted[j, i, i, j] += 0.5
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(manifold.log, 1))(x, x), wanted, atol=1e-14)
        np.testing.assert_allclose(jax.jit(jacobian(manifold.exp, 1))(x, 0 * x), wanted, atol=1e-14)
    slopes = jax.jit(jax.grad(lambda x, y: manifold.distance(x, y) + manifold.log_jacobian(x, y), (0, 1)))(x, x)
    assert all(np.isfinite(slope).all() for slope in slopes)


@pytest.mark.slow
@pytest.mark.parametrize("x", [np.eye(2), np.array([[2.0, 0.5], [0.5, 1.0]])], ids=["unit", "other"])
def test_first_and_second_derivatives_are_those_by_differences(x, x64):
    """Along a line, the second those of gradients."""
    manifold, step = LogEuclideanSPD(2), 1e-3
    w, c = symmetric(2, n=2)

    def f(y):
        return jnp.sum(c * manifold.log(jnp.eye(2), y)) + manifold.log_volume(y)

    along = jax.jit(lambda s: f(jnp.asarray(x) + s * w))
    a = [along(k * step) for k in (-2, -1, 0, 1, 2)]
    first = (a[0] - 8 * a[1] + 8 * a[3] - a[4]) / (12 * step)
    second = (-a[0] + 16 * a[1] - 30 * a[2] + 16 * a[3] - a[4]) / (12 * step**2)
    gradient = jax.jit(jax.grad(f))(jnp.asarray(x))
    np.testing.assert_allclose(jnp.sum(gradient * w), first, atol=1e-8)
    found = jax.jit(lambda s: jax.jvp(jax.grad(along), (s,), (1.0,))[1])(0.0)
    np.testing.assert_allclose(found, second, atol=1e-6)


# ---- The metric.


@BOTH
def test_log_volume_is_that_of_the_gram_matrix(manifold, x64):
    x = drawn(100)
    wanted = [np.linalg.slogdet(gram(manifold, each))[1] / 2 for each in x]
    np.testing.assert_allclose(jitted(manifold, "log_volume")(x), wanted, atol=1e-12)


@BOTH
def test_the_jacobian_of_exp_is_what_it_stretches_volumes_by(manifold, x64):
    x, u = jnp.asarray(drawn(1)[0]), symmetric(1)[0]
    slope = jax.vmap(lambda e: jax.jvp(functools.partial(manifold.exp, x), (u,), (e,))[1])
    moved = np.asarray(jax.jit(slope)(upper()))[:, ROWS, COLUMNS]
    wanted = np.linalg.slogdet(moved)[1]  # in coordinates; then in relation to the volumes at both ends
    wanted += manifold.log_volume(jitted(manifold, "exp")(x, u)) - manifold.log_volume(x)
    np.testing.assert_allclose(jitted(manifold, "log_jacobian")(x, u), wanted, atol=1e-11)


@BOTH
def test_the_gradient_is_that_of_the_metric(manifold, x64):
    x, g = jnp.asarray(drawn(1)[0]), jnp.asarray(np.random.default_rng(3).normal(size=(3, 3)))
    gradient = np.asarray(jitted(manifold, "gradient")(x, g))
    slopes = np.einsum("kij,ij->k", upper(), g)
    np.testing.assert_allclose(gram(manifold, x) @ gradient[ROWS, COLUMNS], slopes, rtol=1e-10)


@BOTH
def test_normal_vectors_have_unit_covariance(manifold, x64):
    x = jnp.asarray(drawn(1)[0])
    u = np.asarray(jitted(manifold, "normal")(KEY, jnp.broadcast_to(x, (20_000, 3, 3))))[:, ROWS, COLUMNS]
    root = np.linalg.cholesky(gram(manifold, x))
    np.testing.assert_allclose(np.cov((u @ root).T), np.eye(6), atol=0.05)


def test_the_divergence_is_the_trace_of_the_ambient_jacobian_and_the_change_of_volume(x64):
    """Of `x -> B x + x B^T`, an isometry's, it is 0."""
    b, x = jnp.asarray(np.random.default_rng(4).normal(size=(3, 3))), jnp.asarray(drawn(1)[0])
    v = tangent_velocity(AFFINE, lambda t, x: jnp.matmul(b, x) + jnp.matmul(x, b.T))
    velocity = lambda z: v(0.0, z[None])[0]  # noqa: E731
    trace = jnp.trace(jax.jit(jax.jacfwd(velocity))(x).reshape(9, 9))
    change = jax.jvp(jitted(AFFINE, "log_volume"), (x,), (velocity(x),))[1]
    np.testing.assert_allclose(trace + change, 0, atol=1e-12)


# ---- Arrays and refusals.


@pytest.mark.slow
@BOTH
def test_any_leading_axes_and_sizes(manifold):
    x, y = (jnp.asarray(drawn(6, seed), jnp.float32).reshape(2, 3, 3, 3) for seed in (0, 1))
    u = jitted(manifold, "log")(x, y)
    assert u.shape == x.shape
    assert u.dtype == jnp.float32
    assert manifold.distance(x, y).shape == manifold.log_jacobian(x, u).shape == manifold.log_volume(x).shape == (2, 3)
    np.testing.assert_allclose(jax.vmap(manifold.log)(x, y), u, atol=1e-5)
    one = type(manifold)(1)
    np.testing.assert_allclose(one.distance(jnp.full((1, 1), 2.0), jnp.full((1, 1), 6.0)), np.log(3), rtol=1e-6)
    assert manifold.dim == 6
    assert manifold.log_total is None


@BOTH
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.diag([1.0, 1.0, -0.5]), "got 1 of 1 that are not positive definite, with eigenvalues down to -0.5"),
        (np.zeros((3, 3)), "not positive definite"),
        (np.eye(3) + np.array([[0, 1.0, 0], [0, 0, 0], [0, 0, 0]]), "got 1 of 1 off it, by up to 0.5"),
        (np.full((2, 3, 3), np.nan), "2 of 2 off it"),
        (np.eye(3, dtype=int), "in floating point, got int64"),
        (np.eye(2), r"\[..., 3, 3\], got shape \(2, 2\)"),
    ],
)
def test_what_is_no_point_is_refused(manifold, x, message):
    manifold.check("x", drawn(4))
    with pytest.raises(ValueError, match=message):
        manifold.check("x", x)


@BOTH
def test_what_is_no_size_and_no_key_is_refused(manifold):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        type(manifold)(0)
    with pytest.raises(ValueError, match="key must be one typed key"):
        manifold.normal(0, jnp.eye(3))
    with pytest.raises(ValueError, match=r"SPD\(n=3\) has no uniform distribution"):
        manifold.uniform(KEY, jnp.zeros((1, 3, 3)))
