import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline, make_interp_spline

from fm_jax.paths import AffinePath, SplinePath
from fm_jax.paths.spline import second_derivatives
from fm_jax.schedules import Linear

KNOTS = (0.0, 0.1, 0.45, 0.6, 1.0)
T = np.array([0.0, 0.05, 0.1, 0.3, 0.45, 0.59, 0.83, 1.0])


@pytest.fixture
def x():
    """Eight trajectories of five snapshots, images."""
    return np.random.default_rng(0).normal(size=(8, 5, 2, 3, 1))


def test_natural_is_scipys_cubic_spline(x, x64):
    sample = jax.jit(lambda t, x: SplinePath(KNOTS).sample(None, t, x))(T, x)
    for i, t in enumerate(T):
        spline = CubicSpline(KNOTS, x[i], bc_type="natural")
        np.testing.assert_allclose(sample.x_t[i], spline(t), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(sample.u_t[i], spline(t, 1), rtol=1e-10, atol=1e-12)


def test_second_derivatives_are_scipys(x):
    spline = CubicSpline(KNOTS, x[0], bc_type="natural")
    got = np.tensordot(second_derivatives(KNOTS), x[0], axes=1)
    np.testing.assert_allclose(got, spline(np.array(KNOTS), 2), atol=1e-9)


@pytest.mark.slow
def test_linear_is_scipys_linear_spline(x, x64):
    t = T + 0.01 * (T == 0.0) - 0.01 * (T == 1.0)
    sample = SplinePath(KNOTS, kind="linear").sample(None, jnp.asarray(t), jnp.asarray(x))
    for i in range(8):
        spline = make_interp_spline(KNOTS, x[i], k=1)
        np.testing.assert_allclose(sample.x_t[i], spline(t[i]), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(sample.u_t[i], spline.derivative()(t[i]), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["natural", "linear"])
def test_passes_through_its_knots_exactly(kind, x):
    """Not to rounding: to the last digit, in single precision."""
    x = jnp.asarray(x, dtype=jnp.float32)
    for k, t in enumerate(KNOTS):
        np.testing.assert_array_equal(SplinePath(KNOTS, kind=kind).sample(None, t, x).x_t, x[:, k])


@pytest.mark.parametrize("kind", ["natural", "linear"])
def test_two_knots_are_the_straight_line(kind, x):
    x = jnp.asarray(x[:, :2], dtype=jnp.float32)
    t = jnp.asarray(T, dtype=jnp.float32)
    sample, line = (
        SplinePath((0, 1), kind=kind).sample(None, t, x),
        AffinePath(Linear()).sample(None, t, x[:, 0], x[:, 1]),
    )
    np.testing.assert_allclose(sample.x_t, line.x_t, atol=1e-6)
    np.testing.assert_allclose(sample.u_t, line.u_t, atol=1e-6)
    np.testing.assert_array_equal(sample.x0, x[:, 0])
    np.testing.assert_array_equal(sample.x1, x[:, 1])
    assert sample.z is None


def test_straight_trajectories_stay_straight(x64):
    """A natural spline through points of a line is that line, whatever the knots."""
    sample = SplinePath(KNOTS).sample(None, jnp.asarray(T), jnp.asarray(3 * np.tile(KNOTS, (8, 1)) - 1))
    np.testing.assert_allclose(sample.x_t, 3 * T - 1, atol=1e-12)
    np.testing.assert_allclose(sample.u_t, 3, atol=1e-12)


def test_latent_noise(key, x):
    """z is returned, sigma z is added to the curve, and the velocity does not see it."""
    x, t = jnp.asarray(x, dtype=jnp.float32), jnp.asarray(T, dtype=jnp.float32)
    plain, noisy = SplinePath(KNOTS).sample(None, t, x), SplinePath(KNOTS, sigma=0.3).sample(key, t, x)
    np.testing.assert_allclose(noisy.x_t, plain.x_t + 0.3 * noisy.z, atol=1e-6)
    np.testing.assert_array_equal(noisy.u_t, plain.u_t)
    np.testing.assert_array_equal(noisy.z, jax.random.normal(key, plain.x_t.shape))


def test_paths_are_values():
    assert SplinePath(np.array([0, 0.5, 1])) == SplinePath([0.0, 0.5, 1.0])
    assert hash(SplinePath((0, 0.5, 1))) == hash(SplinePath((0.0, 0.5, 1.0)))
    assert SplinePath((0, 0.5, 1)) != SplinePath((0, 0.4, 1))
    assert SplinePath((0, 1)).domain == (0.0, 1.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SplinePath((0.0,)), r"times must increase from 0 to 1, got \(0.0,\)"),
        (lambda: SplinePath((0.0, 0.5)), "times must increase from 0 to 1"),
        (lambda: SplinePath((0.1, 1.0)), "times must increase from 0 to 1"),
        (lambda: SplinePath((0.0, 0.5, 0.5, 1.0)), "times must increase from 0 to 1"),
        (lambda: SplinePath((0.0, float("nan"), 1.0)), "times must increase from 0 to 1"),
        (lambda: SplinePath((0.0, 1.0), kind="cubic"), "kind must be one of 'natural', 'linear', got 'cubic'"),
        (lambda: SplinePath((0.0, 1.0), sigma=-0.1), "sigma must be finite and not negative, got -0.1"),
        (
            lambda: SplinePath((0.0, 1.0)).sample(None, 0.5, jnp.ones((4, 3, 2))),
            r"x must be \[batch, K, ...\] with K = 2 snapshots, got shape \(4, 3, 2\)",
        ),
        (lambda: SplinePath((0.0, 1.0), sigma=0.1).sample(None, 0.5, jnp.ones((4, 2))), "needs a key, got None"),
    ],
)
def test_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
