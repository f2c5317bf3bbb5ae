import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles, times
from fm_jax.couplings import ExactOT, independent, paired
from fm_jax.losses import flow_matching
from fm_jax.paths import (
    AffinePath,
    BrownianBridge,
    BrownianNoise,
    ConstantNoise,
    QuadraticNoise,
    SineNoise,
    StochasticInterpolant,
)
from fm_jax.schedules import VP, Cosine, Linear
from fm_jax.types import PathSample

# Each gamma with its value and slope, by hand and in numpy.
GAMMAS = {
    "brownian": (
        BrownianNoise(0.7),
        lambda t: 0.7 * np.sqrt(t * (1 - t)),
        lambda t: 0.7 * (1 - 2 * t) / (2 * np.sqrt(t * (1 - t))),
    ),
    "constant": (ConstantNoise(0.3), lambda t: 0.3 + 0 * t, lambda t: 0 * t),
    "quadratic": (QuadraticNoise(2.0), lambda t: 2 * t * (1 - t), lambda t: 2 - 4 * t),
    "sine": (SineNoise(0.6), lambda t: 0.6 * np.sin(np.pi * t) ** 2, lambda t: 0.6 * np.pi * np.sin(2 * np.pi * t)),
    "a function": (lambda t: jnp.exp(-t), lambda t: np.exp(-t), lambda t: -np.exp(-t)),
    "a number": (lambda t: 0.2, lambda t: 0.2 + 0 * t, lambda t: 0 * t),
}
SHAPE = (4, 2, 3, 1)
T = np.array([0.15, 0.35, 0.6, 0.9])


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", GAMMAS)
def test_value_by_hand(name, key, x64):
    """x_t and u_t in numpy for images, on the linear interpolant; the z in the sample is the one that was drawn."""
    gamma, value, slope = GAMMAS[name]
    x0, x1 = np.random.default_rng(0).normal(size=(2, *SHAPE))
    sample = StochasticInterpolant(Linear(), gamma).sample(key, jnp.asarray(T), jnp.asarray(x0), jnp.asarray(x1))
    t = T.reshape(4, 1, 1, 1)
    np.testing.assert_allclose(sample.x_t, (1 - t) * x0 + t * x1 + value(t) * sample.z, rtol=1e-12)
    np.testing.assert_allclose(sample.u_t, x1 - x0 + slope(t) * sample.z, rtol=1e-12)
    assert sample.z.shape == SHAPE
    np.testing.assert_array_equal(sample.z, jax.random.normal(key, SHAPE))


@pytest.mark.parametrize("name", GAMMAS)
def test_targets_by_hand(name, key, x64):
    gamma, value, _ = GAMMAS[name]
    x0, x1 = np.random.default_rng(0).normal(size=(2, *SHAPE))
    path, t = StochasticInterpolant(Cosine(), gamma), T.reshape(4, 1, 1, 1)
    sample = path.sample(key, jnp.asarray(T), jnp.asarray(x0), jnp.asarray(x1))
    targets = path.targets(sample)
    assert targets["velocity"] is sample.u_t
    assert targets["latent"] is sample.z
    drift = np.pi / 2 * (np.cos(np.pi / 2 * t) * x1 - np.sin(np.pi / 2 * t) * x0)
    np.testing.assert_allclose(targets["drift"], drift, rtol=1e-10)
    np.testing.assert_allclose(targets["score"], -sample.z / value(t), rtol=1e-10)


def test_velocity_is_the_time_derivative_on_a_curved_interpolant(x64):
    x0, x1, z = jnp.asarray(np.random.default_rng(1).normal(size=(3, *SHAPE)))
    path, h = StochasticInterpolant(Cosine(), BrownianNoise(1.3)), 1e-5
    difference = (path.at(T + h, x0, x1, z).x_t - path.at(T - h, x0, x1, z).x_t) / (2 * h)
    np.testing.assert_allclose(path.at(T, x0, x1, z).u_t, difference, rtol=1e-7, atol=1e-8)


def test_scalar_time_is_that_time_for_all(key):
    x0, x1 = jnp.zeros(SHAPE), jnp.ones(SHAPE)
    one = BrownianBridge(0.5).sample(key, 0.25, x0, x1)
    many = BrownianBridge(0.5).sample(key, jnp.full(4, 0.25), x0, x1)
    np.testing.assert_array_equal(one.x_t, many.x_t)
    np.testing.assert_array_equal(one.u_t, many.u_t)


def test_without_noise_it_is_the_affine_path(key):
    x0, x1 = jax.random.normal(key, (2, *SHAPE))
    sample = StochasticInterpolant(Cosine(), lambda t: 0.0).sample(key, jnp.asarray(T), x0, x1)
    affine = AffinePath(Cosine()).sample(None, jnp.asarray(T), x0, x1)
    np.testing.assert_array_equal(sample.x_t, affine.x_t)
    np.testing.assert_array_equal(sample.u_t, affine.u_t)


def test_a_bridge_is_pinned_at_its_ends(key):
    x0, x1 = jax.random.normal(key, (2, *SHAPE))
    for gamma in (BrownianNoise(), QuadraticNoise(), SineNoise()):
        path = StochasticInterpolant(Linear(), gamma)
        np.testing.assert_array_equal(path.sample(key, 0.0, x0, x1).x_t, x0)
        np.testing.assert_array_equal(path.sample(key, 1.0, x0, x1).x_t, x1)


def test_domain_is_where_the_velocity_is_finite():
    assert BrownianBridge(1.0).domain == (1e-3, 1 - 1e-3)
    assert BrownianBridge(1.0, margin=0.1).domain == (0.1, 0.9)
    assert StochasticInterpolant(Linear(), QuadraticNoise()).domain == (0.0, 1.0)
    assert StochasticInterpolant(VP(), SineNoise()).domain == VP().domain
    assert StochasticInterpolant(VP(), BrownianNoise()).domain == (1e-3, 1 - 1e-3)


@pytest.mark.parametrize("gamma", [BrownianNoise(), QuadraticNoise(), SineNoise(), ConstantNoise(0.1)], ids=str)
def test_finite_at_the_ends_of_the_domain(gamma, key):
    path = StochasticInterpolant(Linear(), gamma)
    for t in path.domain:
        sample = path.sample(key, t, jnp.zeros((8, 2)), jnp.ones((8, 2)))
        assert np.isfinite(sample.u_t).all()


def test_paths_are_values():
    assert BrownianBridge(0.5) == StochasticInterpolant(Linear(), BrownianNoise(0.5))
    assert hash(BrownianBridge(0.5)) == hash(BrownianBridge(0.5))
    assert BrownianBridge(0.5) != BrownianBridge(0.6)
    assert dataclasses.replace(BrownianBridge(0.5), gamma=SineNoise()) == StochasticInterpolant(Linear(), SineNoise())


def test_built_inside_jit(key):
    x = jnp.ones((4, 2))
    inside = jax.jit(lambda x: BrownianBridge(0.5).sample(key, 0.25, x, x).x_t)(x)
    np.testing.assert_allclose(inside, BrownianBridge(0.5).sample(key, 0.25, x, x).x_t, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BrownianBridge(0.0), "sigma must be positive and finite, got 0.0"),
        (lambda: BrownianBridge(-1.0), "sigma must be positive and finite, got -1.0"),
        (lambda: BrownianBridge(float("nan")), "sigma must be positive and finite, got nan"),
        (lambda: BrownianBridge(1.0, margin=0.0), r"margin must be in \(0, 0.5\), got 0.0"),
        (lambda: BrownianBridge(1.0, margin=0.5), r"margin must be in \(0, 0.5\), got 0.5"),
        (lambda: ConstantNoise(0.0), "sigma must be positive and finite, got 0.0"),
        (lambda: QuadraticNoise(-1.0), "a must be positive and finite, got -1.0"),
        (lambda: SineNoise(float("inf")), "a must be positive and finite, got inf"),
        (
            lambda: StochasticInterpolant(Linear(), jnp.sqrt),
            r"gamma and its slope must be finite on the domain, got \[0.0, inf\] at t = 0.0; an attribute domain",
        ),
        (lambda: BrownianBridge(1.0).sample(None, 0.5, jnp.ones((2, 1)), jnp.ones((2, 1))), "key must be a typed key"),
        (
            lambda: BrownianBridge(1.0).sample(jax.random.key(0), 0.5, jnp.ones((2, 1)), jnp.ones((2, 2))),
            "x0 and x1 must have the same shape",
        ),
        (
            lambda: BrownianBridge(1.0).sample(jax.random.key(0), jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.ones((2, 1))),
            r"t must be a scalar or \[batch\]",
        ),
        (
            lambda: flow_matching(lambda *_, **__: 0, BrownianBridge(1.0), time_sampler=times.Uniform()),
            r"is finite only on \[0.001, 0.999\]",
        ),
        (
            lambda: flow_matching(lambda *_, **__: 0, BrownianBridge(1.0), kind="data"),
            "kind must be one of 'velocity', 'latent', 'drift', 'score', got 'data'",
        ),
        (
            lambda: flow_matching(lambda *_, **__: 0, BrownianBridge(1.0), weight=lambda *_: 1),
            r"weight needs a path with a schedule, by which kinds convert; StochasticInterpolant.* has none",
        ),
        (
            lambda: BrownianBridge(1.0).targets(PathSample(0.5, *[jnp.ones((2, 1))] * 4)),
            "the sample must have a latent z, as this path's own samples do, got None",
        ),
    ],
)
def test_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


MEAN0, COV0 = np.array([-1.0, 0.5]), np.array([[0.8, 0.3], [0.3, 0.5]])
MEAN1, COV1 = np.array([1.5, -0.5]), np.array([[0.3, -0.2], [-0.2, 0.9]])
PLANS = {
    "independent": lambda p: p,
    "optimal": oracles.optimal_plan,
    "entropic": lambda p: oracles.entropic_plan(p, 0.7),
}


def plan(name):
    return PLANS[name](oracles.gaussian_pair(MEAN0, COV0, MEAN1, COV1))


@pytest.mark.slow_but_one
@pytest.mark.parametrize("coupling", PLANS)
def test_marginals(coupling, key):
    """Mean and covariance of x_t for four gammas at three times, against the oracle.

    Each z-score is within 4.8; there are 60 for each coupling, a false-alarm rate of 3e-4 for all three.
    """
    num, pair = 40_000, plan(coupling)
    key_pair, key_path = jax.random.split(key)
    x0, x1 = oracles.sample_pair(pair, key_pair, num)
    for number, name in enumerate(["brownian", "constant", "quadratic", "sine"]):
        gamma, value, _ = GAMMAS[name]
        for t in (0.1, 0.5, 0.8):
            x_t = StochasticInterpolant(Linear(), gamma).sample(jax.random.fold_in(key_path, number), t, x0, x1).x_t
            bridge = oracles.GaussianBridge(pair, Linear(), lambda t, value=value: value(t) ** 2)
            mean, cov = map(np.asarray, oracles.bridge_moments(bridge, t))
            centred, variances = np.asarray(x_t, dtype=np.float64) - mean, np.diag(cov)
            of_mean = centred.mean(axis=0) / np.sqrt(variances / num)
            of_cov = (centred.T @ centred / num - cov) / np.sqrt((np.outer(variances, variances) + cov**2) / num)
            assert np.abs([*of_mean, *of_cov[np.triu_indices(2)]]).max() < 4.8


@functools.cache
def predicting(interpolant, sigma):
    """The oracle's conditional means for any plan, compiled once."""
    variance = lambda t: sigma**2 * t * (1 - t)  # noqa: E731
    return jax.jit(lambda p, t, x: oracles.bridge_prediction(oracles.GaussianBridge(p, interpolant, variance), t, x))


@pytest.mark.slow
@pytest.mark.parametrize("coupling", PLANS)
@pytest.mark.parametrize("interpolant", [Linear(), Cosine()], ids=str)
def test_conditional_means(coupling, interpolant, key):
    """E[u_t | x_t] and E[z | x_t] are the oracle's: the error times f(x_t) has mean zero for f = 1, x and sin 3x.

    Each z-score is within 4.5: 12 in each of 6 cases, a false-alarm rate of 5e-4.
    """
    num, pair, sigma = 50_000, plan(coupling), 0.7
    key_pair, key_path, key_t = jax.random.split(key, 3)
    x0, x1 = oracles.sample_pair(pair, key_pair, num)
    # Near the ends gamma' makes a heavy tail, which would break the normal approximation.
    t = jax.random.uniform(key_t, (num,), minval=0.02, maxval=0.98)
    sample = StochasticInterpolant(interpolant, BrownianNoise(sigma)).sample(key_path, t, x0, x1)
    expected = predicting(interpolant, sigma)(pair, t, sample.x_t)
    for error in (sample.u_t - expected.velocity, sample.z - expected.noise):
        for f in (jnp.ones_like, lambda x: x, lambda x: jnp.sin(3 * x)):
            product = error * f(sample.x_t)
            z = product.mean(axis=0) / (product.std(axis=0) / num**0.5)
            assert jnp.abs(z).max() < 4.5


def test_flow_matching_learns_the_marginal_velocity(key):
    """Adding A x to the perfect network leaves the slope of the loss in the matrix A at zero.

    Its four z-scores are within 4.5, a false-alarm rate of about 3e-5; those of the velocity of independent ends not.
    """
    num = 50_000
    key_pair, key_loss = jax.random.split(key)
    x0, x1 = oracles.sample_pair(plan("entropic"), key_pair, num)

    @jax.jit
    def z_score(pair):
        def network(shift, t, x, cond, *, train, rngs):
            return predicting(Linear(), 0.7)(pair, t, x).velocity + x @ shift.T

        loss = flow_matching(network, BrownianBridge(0.7), coupling=paired, time_sampler=times.Uniform(0.02, 0.98))
        batch = {"x0": x0, "x1": x1}
        mse, gradient = jax.value_and_grad(lambda shift: loss(shift, key_loss, batch)[0])(jnp.zeros((2, 2)))
        return jnp.abs(gradient).max() / jnp.sqrt(mse * jnp.mean(x1**2) / num)

    assert z_score(plan("entropic")) < 4.5
    assert z_score(plan("independent")) > 10


def test_flow_matching_with_a_transport_coupling(key):
    """The loss on a Brownian bridge under minibatch transport, by hand on the pairs that it makes."""
    x0, x1 = jax.random.normal(key, (2, 16, 2))
    batch = {"x0": x0, "x1": x1, "t": jnp.linspace(0.1, 0.9, 16)}
    loss_fn = flow_matching(lambda p, t, x, c, **_: p * x, BrownianBridge(0.5), coupling=ExactOT())
    loss = jax.jit(loss_fn)(0.3, key, batch)[0]
    index0 = ExactOT()(None, x0, x1).index0
    again = flow_matching(lambda p, t, x, c, **_: p * x, BrownianBridge(0.5), coupling=independent)
    np.testing.assert_allclose(loss, again(0.3, key, {**batch, "x0": x0[index0]})[0], rtol=1e-6)
    assert abs(loss - again(0.3, key, batch)[0]) > 0.1
