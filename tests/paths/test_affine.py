import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SCHEDULES

from fm_jax.paths import AffinePath, source, targets
from fm_jax.schedules import VE, Linear, coefficients

SHAPE = (4, 2, 3, 1)


@pytest.fixture
def pair(key):
    return [jax.random.normal(k, SHAPE) for k in jax.random.split(key)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_velocity_is_the_time_derivative(schedule, pair, x64):
    x0, x1 = (jnp.asarray(x, dtype=float) for x in pair)
    t = jnp.array([0.1501, 0.3501, 0.6001, 0.9001])
    path = AffinePath(schedule)
    x_t, dx_dt = jax.jvp(lambda t: path.sample(None, t, x0, x1).x_t, (t,), (jnp.ones(4),))
    sample = path.sample(None, t, x0, x1)
    np.testing.assert_allclose(sample.u_t, dx_dt, rtol=1e-9)
    np.testing.assert_array_equal(sample.x_t, x_t)
    assert sample.x0 is x0
    assert sample.x1 is x1


def test_ends(pair):
    x0, x1 = pair
    path = AffinePath(Linear())
    np.testing.assert_array_equal(path.sample(None, jnp.zeros(4), x0, x1).x_t, x0)
    np.testing.assert_array_equal(path.sample(None, jnp.ones(4), x0, x1).x_t, x1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_targets(schedule, pair, x64):
    """The conditional score is the gradient of log N(x_t | alpha x1, sigma^2)."""
    x0, x1 = (jnp.asarray(x, dtype=float) for x in pair)
    t = jnp.array([0.15, 0.35, 0.6, 0.9])
    sample = AffinePath(schedule).sample(None, t, x0, x1)
    got = targets(sample, schedule)
    for i in range(4):
        alpha, sigma, _, _ = coefficients(schedule, t[i])
        log_density = lambda x: -0.5 * jnp.square((x - alpha * x1[i]) / sigma).sum()  # noqa: E731, B023
        np.testing.assert_allclose(got.score[i], jax.grad(log_density)(sample.x_t[i]), rtol=1e-6, atol=1e-9)
    assert got.velocity is sample.u_t
    assert got.data is sample.x1
    assert got.noise is sample.x0


def test_source_has_the_noise_level_of_the_start():
    x0 = jnp.ones((2, 3))
    np.testing.assert_array_equal(source(Linear(), x0), x0)
    np.testing.assert_allclose(source(Linear(), x0, t0=0.25), 0.75 * x0)
    np.testing.assert_allclose(source(VE(0.01, 80.0), x0), 80.0 * x0, rtol=1e-6)


def test_bad_input(pair):
    x0, x1 = pair
    with pytest.raises(ValueError, match="x0 and x1 must have the same shape"):
        AffinePath().sample(None, jnp.zeros(4), x0[:2], x1)
    with pytest.raises(ValueError, match=r"t must be a scalar or \[batch\]"):
        AffinePath().sample(None, jnp.zeros((4, 1)), x0, x1)
