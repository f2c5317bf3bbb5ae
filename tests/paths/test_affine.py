import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SCHEDULES

from fm_jax.losses import EDMWeight, MinSNRWeight, SNRWeight
from fm_jax.paths import AffinePath, start
from fm_jax.schedules import EDM, VE, VP, Cosine, Linear, coefficients
from fm_jax.sources import Normal, Uniform

SHAPE = (4, 2, 3, 1)


@pytest.fixture
def pair(key):
    return [jax.random.normal(k, SHAPE) for k in jax.random.split(key)]


@pytest.mark.slow_but_one
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


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_targets(schedule, pair, x64):
    """The conditional score is the gradient of log N(x_t | alpha x1, sigma^2)."""
    x0, x1 = (jnp.asarray(x, dtype=float) for x in pair)
    t = jnp.array([0.15, 0.35, 0.6, 0.9])
    path = AffinePath(schedule)
    sample = path.sample(None, t, x0, x1)
    got = path.targets(sample)
    assert set(got) == set(path.kinds)
    for i in range(4):
        alpha, sigma, _, _ = coefficients(schedule, t[i])
        log_density = lambda x: -0.5 * jnp.square((x - alpha * x1[i]) / sigma).sum()  # noqa: E731, B023
        np.testing.assert_allclose(got["score"][i], jax.grad(log_density)(sample.x_t[i]), rtol=1e-6, atol=1e-9)
    assert got["velocity"] is sample.u_t
    assert got["data"] is sample.x1
    assert got["noise"] is sample.x0


@pytest.mark.parametrize("source", [Uniform(-1.0, 1.0), Normal(2.0)])
def test_the_score_is_a_kind_for_the_standard_normal_alone(source, pair):
    """By `-x0 / sigma` only there; the other targets hold for any source."""
    assert AffinePath(source=Normal(1.0)).kinds == ("velocity", "data", "noise", "score")
    path = AffinePath(source=source)
    assert path.kinds == ("velocity", "data", "noise")
    assert set(path.targets(path.sample(None, 0.5, *pair))) == set(path.kinds)
    with pytest.raises(ValueError, match="kind must be one of 'velocity', 'data', 'noise', got 'score'"):
        path.target_domain("score")


def inverse_alpha(t, kind, schedule):
    return 1 / schedule.alpha(t)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("schedule", "kind", "weight", "expected"),
    [
        (Linear(), "noise", EDMWeight(), (1e-3, 1.0)),  # with alpha = 0 an error of the noise says all of the data
        (Linear(), "noise", SNRWeight(0.0), (1e-3, 1.0)),
        (Linear(), "noise", SNRWeight(), (0.0, 1.0)),
        (Linear(), "noise", MinSNRWeight(), (0.0, 1.0)),
        (Linear(), "score", EDMWeight(), (1e-3, 1 - 1e-3)),
        (Linear(), "data", SNRWeight(), (0.0, 1 - 1e-3)),  # with sigma = 0 the SNR is infinite
        (Linear(), "data", EDMWeight(), (0.0, 1 - 1e-3)),
        (Linear(), "data", SNRWeight(0.0), (0.0, 1.0)),
        (Linear(), "data", SNRWeight(-1.0), (1e-3, 1.0)),
        (Linear(), "velocity", EDMWeight(), (0.0, 1.0)),
        (Linear(0.1), "data", SNRWeight(), (0.0, 1.0)),
        (Cosine(), "data", SNRWeight(), (0.0, 1 - 1e-3)),
        (EDM(), "data", SNRWeight(), (0.0, 1 - 1e-3)),
        (EDM(), "noise", EDMWeight(), (0.0, 1.0)),
        (VP(), "noise", EDMWeight(), (0.0, 1.0)),
        (VP(), "data", SNRWeight(), VP().domain),
        (Linear(), "data", inverse_alpha, (1e-3, 1.0)),
    ],
)
def test_the_weight_is_finite_on_the_target_domain(schedule, kind, weight, expected):
    path = AffinePath(schedule)
    domain = path.target_domain(kind, weight=weight)
    np.testing.assert_allclose(domain, expected, rtol=1e-9)
    assert np.isfinite(weight(jnp.linspace(*domain, 9), kind, schedule)).all()
    without = path.target_domain(kind)
    assert without[0] <= domain[0] < domain[1] <= without[1]
    assert jax.jit(lambda x: x * path.target_domain(kind, weight=weight)[1])(1.0) == np.float32(domain[1])


def test_the_margin_of_the_target_domain():
    assert AffinePath().target_domain("noise", weight=EDMWeight(), margin=0.1) == (0.1, 1.0)
    assert AffinePath().target_domain("score", margin=0.25) == (0.0, 0.75)
    for margin in (0.0, 0.5, np.nan):
        with pytest.raises(ValueError, match=rf"margin must be in \(0, 0.5\), got {margin}"):
            AffinePath().target_domain("score", margin=margin)


def test_start_has_the_noise_level_of_its_time():
    assert start(Linear()) == Normal(1.0)
    assert start(Linear(), 0.25) == Normal(0.75)
    np.testing.assert_allclose(start(VE(0.01, 80.0)).scale, 80.0, rtol=1e-6)
    assert jax.jit(lambda x: start(Linear(), 0.25).scale * x)(1.0) == 0.75


def test_bad_input(pair):
    x0, x1 = pair
    with pytest.raises(ValueError, match="x0 and x1 must have the same shape"):
        AffinePath().sample(None, jnp.zeros(4), x0[:2], x1)
    with pytest.raises(ValueError, match=r"t must be a scalar or \[batch\]"):
        AffinePath().sample(None, jnp.zeros((4, 1)), x0, x1)
