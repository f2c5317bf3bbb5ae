import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles, times
from fm_jax.conditions import DropCondition
from fm_jax.couplings import ExactOT, paired
from fm_jax.losses import bridge_matching, bridge_score, bridge_velocity, flow_matching, split_channels, two_heads
from fm_jax.nfe import Counted
from fm_jax.paths import (
    AffinePath,
    BrownianBridge,
    ConstantNoise,
    QuadraticNoise,
    SineNoise,
    StochasticInterpolant,
)
from fm_jax.samplers import RungeKutta, StochasticHeun, sample
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import Cosine, Linear
from fm_jax.types import Pairing

SIGMA = 0.7
MEAN0, COV0 = np.array([-1.0, 0.5]), np.array([[0.8, 0.3], [0.3, 0.5]])
MEAN1, COV1 = np.array([1.5, -0.5]), np.array([[0.3, -0.2], [-0.2, 0.9]])
PLANS = {
    "independent": lambda p: p,
    "optimal": oracles.optimal_plan,
    "entropic": lambda p: oracles.entropic_plan(p, SIGMA),
}


def plan(name):
    return PLANS[name](oracles.gaussian_pair(MEAN0, COV0, MEAN1, COV1))


def brownian(name):
    return oracles.GaussianBridge(plan(name), Linear(), lambda t: SIGMA**2 * t * (1 - t))


def heads(params, t, x, cond, *, train, rngs):
    return params * x, 2 * params * x


@pytest.mark.slow
@pytest.mark.parametrize("interpolant", [Linear(), Cosine()], ids=str)
def test_value_by_hand(interpolant, key, x64):
    """Images, coupled by the data, in numpy; z is recovered from a network that shows where it was called."""
    x0, x1 = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2))
    t = np.array([0.1, 0.45, 0.8])
    seen = {}

    def network(params, t, x, cond, *, train, rngs):
        seen["x_t"] = x
        return heads(params, t, x, cond, train=train, rngs=rngs)

    path = StochasticInterpolant(interpolant, QuadraticNoise(2.0))
    batch = {"x0": jnp.asarray(x0), "x1": jnp.asarray(x1), "t": jnp.asarray(t), "weight": jnp.array([0.5, 1.0, 2.0])}
    loss, metrics = bridge_matching(network, path, coupling=paired)(0.7, key, batch)
    s = t.reshape(3, 1, 1, 1)
    if interpolant == Linear():
        alpha, sigma, d_alpha, d_sigma = s, 1 - s, 1, -1
    else:
        alpha, sigma = np.sin(np.pi / 2 * s), np.cos(np.pi / 2 * s)
        d_alpha, d_sigma = np.pi / 2 * sigma, -np.pi / 2 * alpha
    x_t = np.asarray(seen["x_t"])
    z = (x_t - alpha * x1 - sigma * x0) / (2 * s * (1 - s))
    of_drift = np.square(0.7 * x_t - d_alpha * x1 - d_sigma * x0).mean(axis=(1, 2, 3))
    of_latent = np.square(1.4 * x_t - z).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["mse_drift"], of_drift.mean(), rtol=1e-10)
    np.testing.assert_allclose(metrics["mse_latent"], of_latent.mean(), rtol=1e-10)
    np.testing.assert_allclose(loss, ((of_drift + of_latent) * [0.5, 1, 2]).mean(), rtol=1e-10)
    assert metrics["loss"] == loss


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_minimiser_is_the_oracle(name, key):
    """Adding A x to either perfect output leaves the slope of the loss in the matrix A at zero.

    Each z-score is within 4.5: 8 in each of 3 cases, a false-alarm rate of about 2e-4. Times go from 0 to 1.
    """
    num, pair = 50_000, plan(name)
    key_pair, key_loss = jax.random.split(key)
    x0, x1 = oracles.sample_pair(pair, key_pair, num)
    slopes, metrics = slopes_of_loss(pair, key_loss, {"x0": x0, "x1": x1})
    size = jnp.mean(jnp.concatenate([x0, x1]) ** 2)
    for slope, mse in zip(slopes, (metrics["mse_drift"], metrics["mse_latent"]), strict=True):
        assert jnp.abs(slope).max() / jnp.sqrt(mse * size / num) < 4.5


@jax.jit
def slopes_of_loss(pair, key, batch):
    bridge = oracles.GaussianBridge(pair, Linear(), lambda t: SIGMA**2 * t * (1 - t))

    def network(shift, t, x, cond, *, train, rngs):
        value = oracles.bridge_prediction(bridge, t, x)
        return value.drift + x @ shift[0].T, value.noise + x @ shift[1].T

    loss_fn = bridge_matching(network, BrownianBridge(SIGMA), coupling=paired)
    return jax.grad(loss_fn, has_aux=True)(jnp.zeros((2, 2, 2)), key, batch)


def model(bridge):
    """What a perfect network returns."""

    def model_fn(t, x, cond):
        assert t.shape == x.shape[:1]
        value = oracles.bridge_prediction(bridge, t, x)
        return value.drift, value.noise

    return model_fn


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.2, np.array([0.1, 0.5, 0.9])], ids=["scalar", "batch"])
def test_velocity_and_score_of_a_perfect_network(t, x64):
    bridge, x = brownian("entropic"), np.array([[0.1, -0.4], [1.5, 0.3], [-1.0, 1.0]])
    expected = oracles.bridge_prediction(bridge, t, x)
    path = BrownianBridge(SIGMA)
    np.testing.assert_allclose(bridge_velocity(model(bridge), path)(t, x), expected.velocity, rtol=1e-9)
    np.testing.assert_allclose(bridge_score(model(bridge), path)(t, x), expected.score, rtol=1e-9)


def test_images_and_conditions_pass_through():
    def model_fn(t, x, cond):
        return x + cond[:, None, None, None], 2 * x

    x, cond = jnp.ones((3, 4, 4, 2)), jnp.arange(3.0)
    path, t = StochasticInterpolant(Linear(), ConstantNoise(0.5)), jnp.full(3, 0.5)
    velocity, score = bridge_velocity(model_fn, path, cond)(t, x), bridge_score(model_fn, path, cond)(t, x)
    np.testing.assert_allclose(velocity, x + cond[:, None, None, None])
    np.testing.assert_allclose(score, -4 * x)
    np.testing.assert_allclose(bridge_score(model_fn, StochasticInterpolant(gamma=lambda t: 0.5), cond)(t, x), -4 * x)


def test_conditions_are_dropped_and_nothing_else_changes(key):
    cond, seen = jnp.arange(64), []

    def network(params, t, x, cond, *, train, rngs):
        seen.append((t, x, cond, rngs["dropout"]))
        return heads(params, t, x, cond, train=train, rngs=rngs)

    for drop in (None, DropCondition(0.5, -1)):
        bridge_matching(network, BrownianBridge(SIGMA), drop=drop)(0.7, key, {"x1": jnp.ones((64, 2)), "cond": cond})
    (t, x, all_of_them, rng), (t_too, x_too, some, rng_too) = seen
    np.testing.assert_array_equal(t, t_too)
    np.testing.assert_array_equal(x, x_too)
    assert rng == rng_too
    np.testing.assert_array_equal(all_of_them, cond)
    # 64 fair coins: outside 12..52 with probability 5e-7.
    assert 12 <= (some == -1).sum() <= 52
    assert ((some == -1) | (some == cond)).all()


def test_evaluations_are_counted():
    path = BrownianBridge(1.0)

    def model_fn(t, x, cond):
        return x, x

    assert bridge_velocity(model_fn, path).nfe is bridge_score(model_fn, path).nfe is None
    for cost in (1, 2):
        v, score = (make(Counted(model_fn, cost), path) for make in (bridge_velocity, bridge_score))
        assert v.nfe == score.nfe == cost
        sampler = StochasticHeun(diffusion=1.0, score=score)
        solution = sample(v, jnp.ones((2, 1)), sampler, times=uniform(5, *path.domain), key=jax.random.key(0))
        assert int(solution.calls) == 20
        assert int(solution.nfe) == 20 * cost


def scores_of(x, mean, cov):
    """Z-scores of a sample's mean and covariance."""
    n, variances, centred = len(x), np.diag(cov), np.asarray(x, dtype=np.float64) - mean
    of_cov = (centred.T @ centred / n - cov) / np.sqrt((np.outer(variances, variances) + cov**2) / n)
    return np.concatenate([centred.mean(axis=0) / np.sqrt(variances / n), of_cov[np.triu_indices(2)]])


@jax.jit
def sampled(key, x, grid):
    """Ends of the ODE and of the SDE with g = sigma."""
    perfect, path = model(brownian("entropic")), BrownianBridge(SIGMA)
    v, score = bridge_velocity(perfect, path), bridge_score(perfect, path)
    flow = sample(v, x, RungeKutta("heun"), times=grid).x
    return flow, sample(v, x, StochasticHeun(diffusion=SIGMA, score=score), times=grid, key=key).x


@pytest.mark.slow
@pytest.mark.parametrize("direction", [1, -1])
def test_perfect_networks_sample_the_bridge(direction, key):
    """From one end of the domain of a Brownian bridge to the other by the ODE and the SDE: the marginal's moments.

    Each z-score is within 4.5: 5 for each of 4, a false-alarm rate of 1.4e-4. The steps are short near the ends, where
    the slope of gamma is steep.
    """
    bridge, (low, high) = brownian("entropic"), BrownianBridge(SIGMA).domain
    # Equal steps in the angle of t = sin^2: gamma is smooth in it.
    grid = np.sin(np.linspace(np.arcsin(low**0.5), np.arcsin(high**0.5), 49)) ** 2
    grid = np.clip(grid, low, high)[::direction]
    mean, cov = oracles.bridge_moments(bridge, grid[0])
    key_x, key_sde = jax.random.split(key)
    x = mean[None] + jax.random.normal(key_x, (5_000, 2)) @ jnp.linalg.cholesky(cov).T
    end = [np.asarray(moment) for moment in oracles.bridge_moments(bridge, grid[-1])]
    for y in sampled(key_sde, x, jnp.asarray(grid)):
        assert np.abs(scores_of(y, *end)).max() < 4.5


def test_one_network_of_twice_the_channels(key):
    """`split_channels` and `two_heads` give the loss of the pair that they make."""
    batch = {"x0": jnp.zeros((4, 2, 2, 3)), "x1": jnp.ones((4, 2, 2, 3)), "t": jnp.linspace(0.1, 0.9, 4)}
    path = StochasticInterpolant(Linear(), SineNoise(0.3))

    def wide(params, t, x, cond, *, train, rngs):
        return jnp.concatenate([params * x, 2 * params * x], axis=-1)

    def single(params, t, x, cond, *, train, rngs):
        return params * x

    expected = bridge_matching(heads, path)(0.7, key, batch)[0]
    np.testing.assert_array_equal(bridge_matching(split_channels(wide), path)(0.7, key, batch)[0], expected)
    params = {"drift": 0.7, "latent": 1.4}
    np.testing.assert_allclose(bridge_matching(two_heads(single, single), path)(params, key, batch)[0], expected)


def test_two_heads_draw_different_dropout(key):
    def noisy(params, t, x, cond, *, train, rngs):
        return jax.random.normal(rngs["dropout"], x.shape)

    both = two_heads(noisy, noisy)
    drift, latent = both({"drift": 0, "latent": 0}, None, jnp.ones((4, 2)), None, train=True, rngs={"dropout": key})
    assert (drift != latent).all()
    plain = two_heads(*[lambda params, t, x, cond, *, train, rngs: x] * 2)
    np.testing.assert_array_equal(
        plain({"drift": 0, "latent": 0}, None, jnp.ones(2), None, train=False, rngs=None), 1.0
    )


@pytest.mark.slow
def test_couplings_and_their_weights(key):
    """A permuting coupling reaches the path, and the weights of its pairs multiply the loss."""
    x0, x1 = jax.random.normal(key, (2, 16, 2))
    batch = {"x0": x0, "x1": x1, "t": jnp.linspace(0.1, 0.9, 16)}
    path = BrownianBridge(0.5)
    loss = jax.jit(bridge_matching(heads, path, coupling=ExactOT()))(0.3, key, batch)[0]
    index0 = ExactOT()(None, x0, x1).index0
    again = bridge_matching(heads, path)(0.3, key, {**batch, "x0": x0[index0]})[0]
    np.testing.assert_allclose(loss, again, rtol=1e-6)

    def weighing(key, x0, x1, cond=None):
        return Pairing(x0, x1, cond, jnp.arange(16), jnp.linspace(0, 2, 16))

    weighted = bridge_matching(heads, path, coupling=weighing)(0.3, key, batch)
    as_batch = bridge_matching(heads, path)(0.3, key, {**batch, "weight": jnp.linspace(0, 2, 16)})
    np.testing.assert_allclose(weighted[0], as_batch[0], rtol=1e-6)
    np.testing.assert_allclose(weighted[1]["mse_latent"], as_batch[1]["mse_latent"], rtol=1e-6)


def test_targets_and_gradients_are_finite_up_to_the_ends(key):
    """At t = 0 and t = 1 themselves, where the velocity and the score of a Brownian bridge are infinite."""
    batch = {"x0": jnp.zeros((2, 3)), "x1": jnp.ones((2, 3)), "t": jnp.array([0.0, 1.0])}
    loss_fn = bridge_matching(heads, BrownianBridge(1.0), coupling=paired)
    (loss, _), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(0.5, key, batch)
    assert np.isfinite([loss, gradient]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bridge_matching(heads, AffinePath()), "the path must be a StochasticInterpolant.*got AffinePath"),
        (lambda: bridge_velocity(lambda t, x, cond: (x, x), AffinePath()), "the path must be a StochasticInterpolant"),
        (lambda: bridge_score(lambda t, x, cond: (x, x), AffinePath()), "the path must be a StochasticInterpolant"),
        (
            lambda: bridge_matching(heads, BrownianBridge(1.0))(1.0, None, {"x1": jnp.ones((2, 2))}),
            "without a key the batch must hold 'x0' and 't'",
        ),
        (
            lambda: bridge_matching(heads, BrownianBridge(1.0))(
                1.0, None, {"x1": jnp.ones((2, 2)), "x0": jnp.ones((2, 2)), "t": jnp.ones(2)}
            ),
            "key must be a typed key, got None",
        ),
        (
            lambda: bridge_matching(lambda p, t, x, c, **_: x, BrownianBridge(1.0))(
                1.0, jax.random.key(0), {"x1": jnp.ones((2, 2))}
            ),
            r"network must return \(drift, latent\), both of the shape of x, \(2, 2\), got float32 of shape \(2, 2\)",
        ),
        (
            lambda: bridge_matching(lambda p, t, x, c, **_: (x, x[:, :1]), BrownianBridge(1.0))(
                1.0, jax.random.key(0), {"x1": jnp.ones((2, 2))}
            ),
            r"the latent that the network returns must have the shape of x, \(2, 2\), got \(2, 1\)",
        ),
        (
            lambda: split_channels(lambda p, t, x, c, **_: x)(0, None, jnp.ones((2, 2)), None, train=True, rngs=None),
            r"the network must return twice the channels of x, \(2, 2\), got float32 of shape \(2, 2\)",
        ),
        (
            lambda: bridge_score(lambda t, x, c: (x, x), BrownianBridge(1.0))(jnp.array([0.5, 1.0]), jnp.ones((2, 2))),
            r"the score is infinite where gamma = 0, at t = \[1.0\]",
        ),
        (
            lambda: bridge_matching(heads, StochasticInterpolant(Narrow()), time_sampler=times.Uniform()),
            "finite only on",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Narrow(Linear):
    @property
    def domain(self):
        return 0.1, 0.9


@pytest.mark.slow
def test_denoiser_alone(key):
    """`flow_matching(kind="latent")` regresses z: the value by hand."""
    path = BrownianBridge(0.7)
    x0, x1 = jax.random.normal(key, (2, 6, 3))
    batch = {"x0": x0, "x1": x1, "t": jnp.linspace(0.1, 0.9, 6)}
    seen = {}

    def network(params, t, x, cond, *, train, rngs):
        seen["x_t"] = x
        return params * x

    loss, _ = flow_matching(network, path, kind="latent")(0.5, jax.random.key(3), batch)
    t, gamma = np.asarray(batch["t"])[:, None], 0.7 * np.sqrt(batch["t"] * (1 - batch["t"]))[:, None]
    z = (np.asarray(seen["x_t"]) - (1 - t) * np.asarray(x0) - t * np.asarray(x1)) / gamma
    np.testing.assert_allclose(loss, ((0.5 * np.asarray(seen["x_t"]) - z) ** 2).mean(), rtol=1e-5)


def test_one_kind_at_a_time_is_both_together(key):
    """The two errors of `bridge_matching` are the losses of kinds "drift" and "latent" with the same key."""
    batch = {"x0": jnp.zeros((8, 2)), "x1": jnp.ones((8, 2))}
    path = StochasticInterpolant(Linear(), QuadraticNoise())
    metrics = bridge_matching(heads, path)(0.7, key, batch)[1]
    for kind, params in (("drift", 0.7), ("latent", 1.4)):
        loss, _ = flow_matching(lambda params, t, x, c, **_: params * x, path, kind=kind)(params, key, batch)
        np.testing.assert_allclose(loss, metrics["mse_drift" if kind == "drift" else "mse_latent"], rtol=1e-5)
