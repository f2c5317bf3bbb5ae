"""Rotations: against SciPy's in double precision, in single precision at all angles, and their derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fm_jax.manifolds import SO3, tangent_velocity

MANIFOLD, KEY = SO3(), jax.random.key(0)
ANGLES = [1e-6, 1e-4, 1e-2, 0.19, 0.21, 1.0, 2.0, 3.0, 3.1415]
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 3, 3))
log, exp, distance, project = (jax.jit(f) for f in (MANIFOLD.log, MANIFOLD.exp, MANIFOLD.distance, MANIFOLD.project))


def hat(w):
    return np.cross(np.asarray(w)[..., None, :], np.eye(3)).swapaxes(-1, -2)


def pairs(angle, num=20):
    """x, y and the tangent vector from one to the other, by SciPy."""
    rng = np.random.default_rng(1)
    x, axes = Rotation.random(num, rng=rng), rng.normal(size=(num, 3))
    w = angle * axes / np.linalg.norm(axes, axis=1, keepdims=True)
    y = x * Rotation.from_rotvec(w)
    return jnp.array(x.as_matrix()), jnp.array(y.as_matrix()), x.as_matrix() @ hat(w)


def frame(x):
    """[3, 3, 3], orthonormal tangent vectors at x."""
    return np.asarray(x) @ hat(np.eye(3))


def coordinates(x, u):
    """[..., 3], of tangent vectors in the frame: <u, e> = tr(u^T e) / 2."""
    return jnp.einsum("...ij,kij->...k", u, frame(x), precision="highest") / 2


def projection(x):
    """[9, 9], the orthogonal one onto the tangent space."""
    e = frame(x).reshape(3, 9)
    return e.T @ e / 2


# ---- Points and vectors.


@pytest.mark.parametrize("angle", ANGLES)
def test_exp_log_and_distance_are_those_of_scipy(x64, angle):
    x, y, u = pairs(angle)
    np.testing.assert_allclose(exp(x, u), y, atol=4e-15)
    np.testing.assert_allclose(log(x, y), u, atol=4e-15)  # the matrices themselves are rounded to 1e-16
    np.testing.assert_allclose(exp(x, log(x, y)), y, atol=4e-15)
    np.testing.assert_allclose(distance(x, y), angle, atol=4e-15)
    np.testing.assert_allclose(MANIFOLD.squared_norm(x, log(x, y)), distance(x, y) ** 2, rtol=1e-13)


@pytest.mark.parametrize("angle", ANGLES)
def test_single_precision_is_right_to_1e_6(x64, angle):
    x, y, u = (jnp.asarray(a, jnp.float32) for a in pairs(angle))
    exact = [jnp.asarray(a, jnp.float64) for a in (x, y, u)]
    found, wanted = log(x, y), log(*exact[:2])
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * angle)
    np.testing.assert_allclose(distance(x, y), distance(*exact[:2]), rtol=1e-6)
    np.testing.assert_allclose(exp(x, u), exp(exact[0], exact[2]), rtol=0, atol=1e-6)
    np.testing.assert_allclose(exp(x, log(x, y)), y, rtol=0, atol=1e-6)


def test_turns_of_more_than_half_are_of_the_angle_that_they_are(x64):
    x, _, u = pairs(1.0)
    w = 5.0 * u
    np.testing.assert_allclose(exp(x, w), x @ jnp.array(Rotation.from_rotvec(5.0 * vee(x, u)).as_matrix()), atol=4e-15)
    np.testing.assert_allclose(distance(x, exp(x, w)), 2 * np.pi - 5.0, rtol=1e-13)


def vee(x, u):
    a = np.asarray(x).swapaxes(-1, -2) @ np.asarray(u)
    return np.stack([a[..., 2, 1], a[..., 0, 2], a[..., 1, 0]], -1)


def test_points_stay_rotations(x64):
    x, _, u = pairs(0.7)
    for _ in range(30):
        x = exp(x, u @ x.mT @ x)  # of any ambient vectors the tangent part
    np.testing.assert_allclose(x.mT @ x, np.broadcast_to(np.eye(3), x.shape), atol=1e-14)
    np.testing.assert_allclose(np.linalg.det(x), 1, atol=1e-14)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_half_a_turn_is_about_the_axis_whose_largest_component_is_positive(x64, dtype):
    axes = np.array([[1.0, 0, 0], [0, -1, 0], [0.6, 0, -0.8], [0, 0.8, 0.6]])
    y = jnp.array(2 * axes[:, :, None] * axes[:, None, :] - np.eye(3), dtype)
    x = jnp.broadcast_to(jnp.eye(3, dtype=dtype), y.shape)
    signs = np.sign(axes[np.arange(4), np.abs(axes).argmax(axis=1)])[:, None]
    np.testing.assert_allclose(log(x, y), hat(np.pi * axes * signs), atol=1e-6 if dtype == jnp.float32 else 1e-15)
    slopes = jax.jit(jax.jacrev(log, argnums=(0, 1)))(x[2], y[2])
    assert all(np.isfinite(s).all() for s in slopes)


@pytest.mark.slow
def test_coincidence_is_zero_and_its_derivatives_are_the_projection(x64):
    x = pairs(1.0)[0][0]
    assert (log(x, x) == 0).all()
    assert distance(x, x) == 0
    np.testing.assert_allclose(exp(x, jnp.zeros_like(x)), x, atol=4e-16)
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(log, 1))(x, x).reshape(9, 9), projection(x), atol=1e-15)
        np.testing.assert_allclose(jax.jit(jacobian(exp, 1))(x, 0 * x).reshape(9, 9), projection(x), atol=1e-15)
        assert np.isfinite(jax.jit(jacobian(distance, 1))(x, x)).all()
    # Of exp along a geodesic, the second derivative at its start is x A^2.
    u = jnp.asarray(frame(x)[0])
    speed = lambda s: jax.jvp(lambda s: exp(x, s * u), (s,), (1.0,))[1]  # noqa: E731
    np.testing.assert_allclose(jax.jit(lambda s: jax.jvp(speed, (s,), (1.0,))[1])(0.0), u @ x.T @ u, atol=1e-14)


@pytest.mark.parametrize("angle", [1e-4, 1.0, 3.0])
def test_derivatives_are_those_by_differences(x64, angle):
    x, y, _ = (a[0] for a in pairs(angle))
    v = jnp.asarray(frame(y)[0] + 0.3 * frame(y)[1])
    step = 1e-3 * min(angle, 0.1)
    ways = [log(x, exp(y, s * step * v)) for s in (-2, -1, 1, 2)]
    by_difference = (ways[0] - 8 * ways[1] + 8 * ways[2] - ways[3]) / (12 * step)
    found = jax.jit(lambda y: jax.jvp(functools.partial(log, x), (y,), (v,))[1])(y)
    np.testing.assert_allclose(found, by_difference, atol=1e-8)


# ---- The metric.


def test_the_gradient_and_the_tangent_part_are_those_of_the_metric(x64):
    x = pairs(1.0)[0][0]
    np.testing.assert_allclose(MANIFOLD.tangent(x, A).reshape(9), projection(x) @ A.reshape(9), atol=1e-14)
    g = jax.grad(lambda x: jnp.sum(A * jnp.sin(x)))(x)
    for e in frame(x):
        slope = jnp.sum(g * e)
        np.testing.assert_allclose(jnp.sum(MANIFOLD.gradient(x, g) * e) / 2, slope, rtol=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 3.0, 5.0])
def test_the_jacobian_of_exp_is_what_it_stretches_volumes_by(x64, size):
    x, w = pairs(1.0)[0][0], size * np.array([0.6, 0.0, 0.8])
    u = jnp.asarray(x @ hat(w))
    y = exp(x, u)
    moved = jax.vmap(lambda e: jax.jvp(functools.partial(exp, x), (u,), (e,))[1])(jnp.asarray(frame(x)))
    wanted = np.log(abs(np.linalg.det(coordinates(y, moved))))
    np.testing.assert_allclose(MANIFOLD.log_jacobian(x, u), wanted, atol=1e-13)
    assert MANIFOLD.log_jacobian(x, 0 * u) == 0


def test_the_volume_is_that_of_exp_over_the_ball_of_radius_pi(x64):
    nodes, weights = np.polynomial.legendre.leggauss(40)
    r = np.pi * (nodes + 1) / 2
    u = jnp.asarray(hat(r[:, None] * np.array([[0.0, 0.6, 0.8]])))
    jacobian = np.exp(MANIFOLD.log_jacobian(jnp.broadcast_to(jnp.eye(3), u.shape), u))
    volume = np.pi / 2 * np.sum(weights * 4 * np.pi * r**2 * jacobian)
    np.testing.assert_allclose(np.log(volume), MANIFOLD.log_total, rtol=1e-12)
    assert MANIFOLD.log_volume(u).shape == (40,)


def test_the_divergence_is_the_trace_of_the_ambient_jacobian(x64):
    x = pairs(1.0)[0][0]

    def divergence(field):
        v = tangent_velocity(MANIFOLD, lambda t, x: field(x))
        return jnp.trace(jax.jit(jax.jacfwd(lambda z: v(0.0, z[None])[0]))(x).reshape(9, 9))

    np.testing.assert_allclose(divergence(lambda x: x @ hat([1.0, 2.0, 3.0])), 0, atol=1e-13)  # Killing
    np.testing.assert_allclose(divergence(lambda x: jnp.asarray(hat([1.0, 2.0, 3.0])) @ x), 0, atol=1e-13)
    # The entries of a rotation are eigenfunctions of the Laplacian, of eigenvalue -l (l + 1), l = 1.
    slope = lambda x: MANIFOLD.gradient(x, jnp.broadcast_to(A, x.shape))  # noqa: E731
    np.testing.assert_allclose(divergence(slope), -2 * np.sum(A * np.asarray(x)), rtol=1e-12)


# ---- The projection.


@pytest.mark.parametrize("ratio", [1.0, 10.0, 1e4])
def test_the_projection_is_the_polar_factor(x64, ratio):
    u, v = Rotation.random(10, rng=2).as_matrix(), Rotation.random(10, rng=3).as_matrix()
    found = project(jnp.asarray(u * np.array([ratio, 1.0, 1.0]) @ v))
    np.testing.assert_allclose(found, u @ v, atol=1e-16 * ratio + 2e-15)


def test_the_derivative_of_the_projection_is_the_projection_onto_the_tangent_space(x64):
    x = pairs(1.0)[0][0]
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(project))(x).reshape(9, 9), projection(x), atol=2e-15)


# ---- Draws.


def test_normal_vectors_have_unit_covariance_and_are_tangent(x64):
    x = pairs(1.0)[0][0]
    u = MANIFOLD.normal(KEY, jnp.broadcast_to(x, (20_000, 3, 3)))
    np.testing.assert_allclose(MANIFOLD.tangent(x[None] + 0 * u, u), u, atol=1e-14)
    np.testing.assert_allclose(np.cov(coordinates(x, u).T), np.eye(3), atol=0.04)


def test_uniform_draws_are_haars():
    x = MANIFOLD.uniform(KEY, jnp.zeros((20_000, 3, 3)))
    MANIFOLD.check("x", x)
    angle = distance(jnp.broadcast_to(project(jnp.asarray(B * np.sign(np.linalg.det(B)), x.dtype)), x.shape), x)
    # The density of the angle is (1 - cos w) / pi from anywhere.
    w = np.sort(angle)
    cumulative = (w - np.sin(w)) / np.pi
    assert np.abs(cumulative - (np.arange(20_000) + 0.5) / 20_000).max() < 1.95 / np.sqrt(20_000)  # 0.1%, Kolmogorov


# ---- Arrays and refusals.


@pytest.mark.slow
def test_any_leading_axes_and_no_points():
    x = MANIFOLD.uniform(KEY, jax.ShapeDtypeStruct((2, 5, 3, 3), jnp.float32))
    y = x[::-1]
    assert MANIFOLD.log(x, y).shape == x.shape
    assert MANIFOLD.distance(x, y).shape == MANIFOLD.log_jacobian(x, MANIFOLD.log(x, y)).shape == (2, 5)
    alone = jax.vmap(jax.vmap(log))(x, y)
    np.testing.assert_allclose(MANIFOLD.log(x, y), alone, atol=1e-6)
    assert MANIFOLD.exp(x[:0], x[:0]).shape == (0, 5, 3, 3)


REFLECTION = np.diag([1.0, 1.0, -1.0])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (REFLECTION, r"x must be points of SO3\(\), got 1 of 1 off it, by up to 2"),
        (2 * np.eye(3), "got 1 of 1 off it, by up to 1"),
        (np.zeros((3, 3)), "off it"),
        (np.full((2, 3, 3), np.nan), "2 of 2 off it"),
        (np.eye(3, dtype=int), "in floating point, got int64"),
        (np.eye(4), r"\[..., 3, 3\], got shape \(4, 4\)"),
        (np.ones(3), r"got shape \(3,\)"),
        ([[1.0]], "got a list"),
    ],
)
def test_what_is_no_rotation_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        MANIFOLD.check("x", x)


def test_draws_need_keys_and_shapes():
    with pytest.raises(ValueError, match="key must be one typed key"):
        MANIFOLD.normal(0, jnp.eye(3))
    with pytest.raises(ValueError, match="like must be points of SO3"):
        MANIFOLD.uniform(KEY, jnp.zeros((4, 3)))
