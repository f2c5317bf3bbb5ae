"""Angles, against differences in extended precision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.manifolds import FlatTorus

KEY, TORUS = jax.random.key(0), FlatTorus(3)
PI = np.longdouble("3.14159265358979323846264338327950288")
TOP = np.nextafter(np.float32(math.pi), np.float32(0))
"""The last float32 below pi."""


def wrapped(x):
    """In [-pi, pi), in extended precision."""
    x = np.asarray(x).astype(np.longdouble)
    return x - 2 * PI * np.floor((x + PI) / (2 * PI))


def points(num, seed=0, dtype=jnp.float64):
    return TORUS.uniform(jax.random.key(seed), jnp.zeros((num, 3), dtype))


def test_there_and_back(x64):
    x, y = points(50), points(50, 1)
    u = TORUS.log(x, y)
    np.testing.assert_allclose(u, wrapped(wrapped(y) - wrapped(x)).astype(float), atol=1e-15)
    back = TORUS.exp(x, u)
    np.testing.assert_allclose(TORUS.log(y, back), 0, atol=2e-15)  # as angles: an end of the range is the other
    assert ((back >= -math.pi) & (back < math.pi)).all()
    np.testing.assert_allclose(TORUS.distance(x, y), np.linalg.norm(u, axis=1), rtol=1e-15)
    np.testing.assert_allclose(TORUS.squared_norm(x, u), TORUS.distance(x, y) ** 2, rtol=1e-14)
    np.testing.assert_array_equal(TORUS.exp(x, 0 * x), x)
    np.testing.assert_array_equal(TORUS.log(x, x), 0)
    assert float(jnp.abs(u).max()) > 3


@pytest.mark.parametrize("near", [0.0, 1.5, 3.14159, -3.1415])
def test_float32_is_right_at_all_distances_and_across_the_seam(near):
    """To 1e-7 of each difference, from 1e-6 to pi, of the float32 angles themselves."""
    rng = np.random.default_rng(0)
    size = np.geomspace(1e-6, 3.14159, 60)
    x = wrapped(near + 1e-3 * rng.normal(size=60)).astype(np.float32)
    y = wrapped(x.astype(float) + size * rng.choice([-1, 1], 60)).astype(np.float32)
    torus = FlatTorus(60)
    wanted = wrapped(y.astype(np.longdouble) - x.astype(np.longdouble))
    for log in (torus.log, jax.jit(torus.log)):
        found = np.asarray(log(jnp.asarray(x), jnp.asarray(y)))
        assert found.dtype == np.float32
        some = wanted != 0
        error = np.abs(found[some] - wanted[some]) / np.abs(wanted[some])
        assert some.sum() > 55
        assert error.max() < 1.3e-7, error.max()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_angles_exactly_pi_apart_keep_the_sign_of_their_difference(dtype, x64):
    half = jnp.asarray(math.pi / 2, dtype)
    x, y = jnp.array([-half, half, 0]), jnp.array([half, -half, -2 * half])
    np.testing.assert_array_equal(TORUS.log(x, y), jnp.array([2 * half, -2 * half, -2 * half]))
    np.testing.assert_array_equal(TORUS.log(y, x), -TORUS.log(x, y))
    _, slope = jax.jvp(lambda y: TORUS.log(x, y), (y,), (jnp.ones_like(y),))
    np.testing.assert_array_equal(slope, 1)
    # A little further, it is the other way round.
    assert float(TORUS.log(x, y + 1e-3)[0]) < -3.14


def test_project_is_the_same_angle_within_the_range():
    rng = np.random.default_rng(0)
    ends = np.float32(math.pi) * np.arange(-9, 10, dtype=np.float32)
    x = np.concatenate([rng.uniform(-1000, 1000, 3000).astype(np.float32), ends, ends * np.float32(1 + 1e-6)])
    x = np.concatenate([x, [TOP, -TOP, np.float32(math.pi), -np.float32(math.pi)]]).astype(np.float32)
    torus = FlatTorus(len(x))
    for project in (torus.project, jax.jit(torus.project)):
        y = np.asarray(project(jnp.asarray(x)))
        assert ((y >= -np.float32(math.pi)) & (y < np.float32(math.pi))).all()
        assert np.abs(wrapped(y.astype(np.longdouble) - x.astype(np.longdouble))).max() < 3e-7
        np.testing.assert_array_equal(project(jnp.asarray(y)), y)
    np.testing.assert_array_equal(y[-4:], [TOP, -TOP, -TOP, -np.float32(math.pi)])


def test_derivatives(x64):
    """At coincidence too, of both modes, and across the seam: plus and minus the identity."""
    x, u = points(4), jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
    back = jax.jit(jax.grad(lambda x, y: (u * TORUS.log(x, y)).sum(), (0, 1)))
    for y in (x, points(4, 1), TORUS.project(x + 3)):
        _, found = jax.jvp(jax.jit(TORUS.log), (x, y), (u, 3 * u))
        np.testing.assert_allclose(found, 2 * u, rtol=1e-14)
        slope = back(x, y)
        np.testing.assert_allclose(slope, (-u, u), rtol=1e-14)
    _, found = jax.jvp(TORUS.exp, (x, 5 * u), (u, u))
    np.testing.assert_allclose(found, 2 * u, rtol=1e-14)
    np.testing.assert_array_equal(jax.grad(lambda y: TORUS.distance(x, y).sum())(x), 0)
    y = points(4, 1)
    slope = jax.grad(lambda y: TORUS.distance(x, y).sum())(y)
    np.testing.assert_allclose(slope, TORUS.log(x, y) / TORUS.distance(x, y)[:, None], rtol=1e-12)


def test_it_is_flat(x64):
    x, u = points(4), points(4, 1)
    for zero in (TORUS.log_volume(x), TORUS.log_jacobian(x, u)):
        np.testing.assert_array_equal(zero, np.zeros(4))
    for same in (TORUS.tangent(x, u), TORUS.gradient(x, u)):
        np.testing.assert_array_equal(same, u)
    assert TORUS.log_total == pytest.approx(3 * math.log(2 * math.pi))
    assert TORUS.dim == 3
    assert TORUS.shape == (3,)


def test_draws():
    """Moments of uniform angles and normal vectors, within 5 standard errors."""
    x = TORUS.uniform(KEY, jnp.zeros((20_000, 3)))
    assert ((x >= -math.pi) & (x < math.pi)).all()
    for k in (1, 2):
        np.testing.assert_allclose(jnp.cos(k * x).mean(axis=0), 0, atol=5 * (0.5 / 20_000) ** 0.5)
        np.testing.assert_allclose(jnp.sin(k * x).mean(axis=0), 0, atol=5 * (0.5 / 20_000) ** 0.5)
    u = TORUS.normal(KEY, x)
    np.testing.assert_allclose(u.mean(axis=0), 0, atol=5 / 20_000**0.5)
    np.testing.assert_allclose(np.cov(np.asarray(u).T), np.eye(3), atol=5 * (2 / 20_000) ** 0.5)


def test_bad_input_is_refused():
    TORUS.check("x", jnp.array([[math.pi, -math.pi, 0.0]]))
    for wrong, message in (
        (jnp.array([[0.0, 180.0, -90.0]]), r"in \[-pi, pi\), got 2 of 3 outside, up to 180; manifold.project brings"),
        (jnp.array([[0.0, jnp.nan, 0.0]]), "got 1 of 3 outside"),
        (jnp.zeros((4, 2)), r"x must be points of FlatTorus\(n=3\), \[..., 3\], got shape \(4, 2\)"),
        (jnp.zeros((4, 3), int), "in floating point, got int32"),
        (3.0, "x must be"),
    ):
        with pytest.raises(ValueError, match=message):
            TORUS.check("x", wrong)
    jax.jit(lambda x: TORUS.check("x", x))(jnp.full((2, 3), 7.0))  # traced values pass
    TORUS.check("x", jnp.zeros((0, 3)))
    for n in (0, 1.5, True):
        with pytest.raises(ValueError, match="n must be"):
            FlatTorus(n)
    with pytest.raises(ValueError, match="key must be"):
        TORUS.uniform(None, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="key must be"):
        TORUS.normal(None, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"like must be points of FlatTorus\(n=3\)"):
        TORUS.uniform(KEY, jnp.zeros((2, 4)))
