import math
from functools import partial

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marginals import p_values, two_gaussians

from fm_jax import oracles
from fm_jax.samplers import Churn, RungeKutta, churn_step, ode_step, renoise, sample
from fm_jax.schedules import VE, VP, Linear

NUM_STEPS = [32, 64, 128, 256]
ORDERS = {"euler": 1, "heun": 2}


def swing(t, x):
    return jnp.sin(3 * t) * x - t


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", [Linear(), VP()])
@pytest.mark.parametrize("options", [{"churn": 0.0}, {"churn_range": (1e5, 1e6)}])
def test_no_churn_is_the_ode_sampler_to_the_last_bit(schedule, options):
    x0 = jax.random.normal(jax.random.key(0), (5, 2))
    grid = np.array([0.0, 0.1, 0.35, 0.5, 0.9, 0.99])
    churn = Churn(schedule, **options)
    churned = sample(swing, x0, churn, times=grid, key=jax.random.key(1), trajectory=True)
    solution = sample(swing, x0, RungeKutta("heun"), times=grid, trajectory=True)
    np.testing.assert_array_equal(churned.trajectory, solution.trajectory)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", contracts.SCHEDULES, ids=str)
def test_renoising_carries_each_marginal_to_an_earlier_one(x64, schedule):
    """a alpha = alpha_n and a^2 sigma^2 + s^2 = sigma_n^2, whatever the data."""
    start, end = schedule.domain
    for t, t_next in [(0.5, 0.3), (0.9, 0.899), (0.4, start), (end, 0.7), (0.6, 0.6), (start, start)]:
        t, t_next = jnp.asarray(t), jnp.asarray(t_next)
        kept, added = renoise(t, t_next, jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), schedule=schedule)
        np.testing.assert_allclose(kept * schedule.alpha(t), schedule.alpha(t_next), rtol=1e-12)
        variance = kept**2 * schedule.sigma(t) ** 2 + added**2
        np.testing.assert_allclose(variance, schedule.sigma(t_next) ** 2, rtol=1e-12)
        assert (t_next < t) == (added > 0)


@pytest.mark.slow
def test_sampling_is_the_algorithm_of_the_paper(x64):
    """Karras et al. 2022, algorithm 2, in its own terms: alpha = 1, steps from sigma to sigma."""
    schedule, key = VE(sigma_min=0.1, sigma_max=100.0), jax.random.key(3)
    sigmas = np.array([100.0, 90.0, 30.0, 3.0, 1.0, 0.3])

    def time(sigma):
        return math.log(sigma / 100) / math.log(0.1 / 100)

    for churn, most in [(1.2, 1.2 / 5), (40.0, math.sqrt(2) - 1)]:
        x, raised = jnp.ones((3, 2)), []
        for i in range(5):
            gamma = most if 0.5 <= sigmas[i] <= 95 else 0.0
            sigma_hat = min(sigmas[i] * (1 + gamma), sigmas[0])  # not before the first time
            noise = jax.random.normal(jax.random.fold_in(key, i), x.shape)
            x = x + math.sqrt(sigma_hat**2 - sigmas[i] ** 2) * 1.003 * noise
            x = ode_step(swing, time(sigma_hat), time(sigmas[i + 1]), x, "ralston")
            raised.append(sigma_hat / sigmas[i])
        assert raised[0] == 1
        assert raised[1] == 100 / 90
        assert raised[2] == 1 + most
        sampler = Churn(schedule, churn, churn_range=(0.5, 95.0), noise_scale=1.003, method="ralston")
        solution = sample(swing, jnp.ones((3, 2)), sampler, times=[time(sigma) for sigma in sigmas], key=key)
        np.testing.assert_allclose(solution.x, x, rtol=1e-9)


@pytest.fixture(scope="module")
def moments():
    """Errors of mean and covariance at t = 1, by exact propagation: on a single Gaussian a step is affine."""
    with jax.enable_x64(True):
        mean, cov = np.array([0.5, -1.0]), np.array([[0.5, 0.2], [0.2, 0.3]])
        v = oracles.velocity(oracles.gaussian_mixture(mean[None], cov[None]), Linear())
        units = np.concatenate([np.zeros((1, 4)), np.eye(4)])

        def law(method, grid, gamma):
            def step(carry, times):
                mean, cov = carry
                # Unit steps in the state and in the noise show both Jacobians of the affine map.
                x, noise = mean[None] + units[:, :2], jnp.asarray(units[:, 2:])
                moved = churn_step(v, *times, x, noise, schedule=Linear(), gamma=gamma, method=method)
                by_x, by_noise = jnp.split((moved[1:] - moved[:1]).T, 2, axis=1)
                return (moved[0], by_x @ cov @ by_x.T + by_noise @ by_noise.T), None

            return jax.lax.scan(step, (jnp.zeros(2), jnp.eye(2)), (grid[:-1], grid[1:]))[0]

        # Steps of length 0 at the start, where there is no signal and no churn, pad the grids to one length.
        grids = jnp.stack([jnp.pad(jnp.linspace(0, 1, n + 1), (NUM_STEPS[-1] - n, 0), mode="edge") for n in NUM_STEPS])
        laws = jax.jit(lambda grids, gammas: {name: jax.vmap(partial(law, name))(grids, gammas) for name in ORDERS})(
            grids, 5 / np.array(NUM_STEPS)
        )
        return {
            name: np.linalg.norm(m - mean[None], axis=1) + np.linalg.norm(c - cov[None], axis=(1, 2))
            for name, (m, c) in laws.items()
        }


@pytest.mark.parametrize("method", ORDERS)
def test_weak_order_is_the_order_of_the_method(moments, method):
    errors = moments[method]
    assert errors[-1] < 0.05
    np.testing.assert_allclose(-np.polyfit(np.log(NUM_STEPS), np.log(errors), 1)[0], ORDERS[method], atol=0.15)


@pytest.mark.slow
def test_marginal_and_the_power_of_the_test():
    """Kolmogorov-Smirnov on four projections, 4,000 samples, each p-value refused below 1e-4.

    A right sampler fails with probability below 4e-4 under a fresh key. Noise too large by a quarter is refused.
    """
    v = oracles.velocity(two_gaussians(), Linear())

    def end(sampler):
        x0 = jax.random.normal(jax.random.key(5), (4000, 2))
        return jax.jit(lambda x: sample(v, x, sampler, times=60, key=jax.random.key(6)).x)(x0)

    assert min(p_values(end(Churn(Linear())))) > 1e-4
    assert min(p_values(end(Churn(Linear(), noise_scale=1.25)))) < 1e-6


RANGE = r"churn_range must be a pair \(low, high\)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sde"}, "method must be one of 'euler', 'midpoint', 'heun', 'ralston', 'heun3', 'rk4', got 'sde'."),
        ({"churn": -1.0}, "churn must be finite and not negative, got -1.0."),
        ({"churn": float("inf")}, "churn must be finite and not negative, got inf."),
        ({"noise_scale": -0.5}, "noise_scale must be finite and not negative, got -0.5."),
        ({"churn_range": (2.0, 1.0)}, rf"{RANGE}: 0 <= low < high <= inf must hold, got low=2.0 and high=1.0."),
        ({"churn_range": (-1.0, 1.0)}, rf"{RANGE}: .* got low=-1.0 and high=1.0."),
        ({"churn_range": (0.0, float("nan"))}, rf"{RANGE}: .* got low=0.0 and high=nan."),
        ({"churn_range": 1.0}, rf"{RANGE}, got 1.0."),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Churn(Linear(), **options)
