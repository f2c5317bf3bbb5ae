import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marginals import p_values, two_gaussians

from fm_jax import oracles
from fm_jax.parameterization import score_fn
from fm_jax.samplers import EulerMaruyama, PredictorCorrector, RungeKutta, langevin_step, sample, sde_step
from fm_jax.samplers.grids import uniform
from fm_jax.samplers.loop import step_noise
from fm_jax.schedules import Cosine, Linear

X = np.ones((2, 3), dtype=np.float32)


def swing(t, x):
    return jnp.sin(3 * t) * x - t


def test_a_step_is_the_formula():
    x, noise = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.5, -1.0], [0.0, 1.0]])
    t, eps = jnp.array([0.5, 1.0]), jnp.array([0.1, 0.4])
    expected = x + eps[:, None] * -x * t[:, None] + jnp.sqrt(2 * eps)[:, None] * noise
    np.testing.assert_allclose(langevin_step(lambda t, x: -x * t[:, None], t, x, noise, eps), expected, rtol=1e-6)


def test_a_gaussian_is_kept_with_an_error_of_order_one_in_the_step_size(x64):
    """The variance that steps settle at, from the step itself, which is affine: V = a^2 V + b^2."""
    variance, sizes = 0.3, np.array([0.04, 0.02, 0.01, 0.005])
    settled = []
    for eps in sizes:
        a, b = langevin_step(lambda t, x: -x / variance, 0.5, jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), eps)
        settled.append(b**2 / (1 - a**2))
    np.testing.assert_allclose(settled, variance / (1 - sizes / (2 * variance)), rtol=1e-12)
    errors = np.array(settled) - variance
    np.testing.assert_allclose(np.polyfit(np.log(sizes), np.log(errors), 1)[0], 1, atol=0.05)


@pytest.mark.slow
def test_a_step_size_from_an_examples_own_norms_would_bias_the_law():
    """eps(x) proportional to 1 / |score|^2 settles at p_t |score|^2: twice the variance for a Gaussian in 2-D."""

    @jax.jit
    def settle(own_norms):
        def step(i, x):
            noise = step_noise(jax.random.key(1), i, x)
            norms = (x**2).sum(axis=1) / 2  # the mean of |score|^2 is 2
            eps = 0.01 * jnp.where(own_norms, 1 / jnp.maximum(norms, 0.05), 1)
            return langevin_step(lambda t, x: -x, 0.5, x, noise, eps)

        return jax.lax.fori_loop(0, 1000, step, jax.random.normal(jax.random.key(0), (4000, 2))).var()

    np.testing.assert_allclose(settle(False), 1, atol=0.05)
    assert settle(True) > 1.5


def test_the_step_size_is_at_most_the_one_from_the_norms_of_the_score():
    """The mean of |score|^2 is at most d / sigma^2, on which the sampler's step size is built."""
    mixture = two_gaussians()

    @jax.jit
    def mean_square(t):
        x1, x0 = oracles.sample(mixture, jax.random.key(0), 4000), jax.random.normal(jax.random.key(1), (4000, 2))
        return (oracles.prediction(mixture, Linear(), t, t * x1 + (1 - t) * x0).score ** 2).sum(axis=1).mean()

    for t in (0.1, 0.5, 0.9):
        assert 0 < mean_square(t) < 2 / (1 - t) ** 2


@pytest.mark.slow
@pytest.mark.parametrize(("diffusion", "grid"), [(0.5, [0.0, 0.2, 0.7]), (0.0, [0.9, 0.5, 0.0])])
def test_sampling_is_steps_with_the_documented_noise(diffusion, grid):
    schedule, key, x = Cosine(), jax.random.key(2), jnp.asarray(X)
    sampler = PredictorCorrector(schedule, diffusion, corrector_steps=2, snr=0.3)
    solution = sample(swing, x, sampler, times=grid, key=key, trajectory=True)
    for i in range(2):
        noises = [jax.random.normal(jax.random.fold_in(key, 3 * i + j), x.shape) for j in range(3)]
        x = sde_step(swing, None, diffusion, grid[i], grid[i + 1], x, noises[0], schedule=schedule)
        eps = 2 * (0.3 * schedule.sigma(jnp.asarray(grid[i + 1]))) ** 2
        for noise in noises[1:]:
            x = langevin_step(score_fn(swing, schedule), jnp.asarray(grid[i + 1]), x, noise, eps)
        np.testing.assert_allclose(solution.trajectory[i + 1], x, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
def test_without_corrector_it_is_the_predictor():
    key, times = jax.random.key(0), uniform(5, 0.0, 0.9)
    ode = sample(swing, X, PredictorCorrector(Linear(), corrector_steps=0), times=times, key=key)
    np.testing.assert_array_equal(ode.x, sample(swing, X, RungeKutta("euler"), times=times).x)
    sde = sample(swing, X, PredictorCorrector(Linear(), 0.7, corrector_steps=0), times=times, key=key)
    alone = sample(swing, X, EulerMaruyama(Linear(), 0.7), times=times, key=key)
    np.testing.assert_allclose(sde.x, alone.x, rtol=1e-5)
    assert int(ode.calls) == int(sde.calls) == 5


@pytest.mark.parametrize(
    ("diffusion", "t0", "t1", "calls"),
    [
        (0.0, 0.0, 1.0, [0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75]),
        (
            0.7,
            0.0,
            0.5,
            [0, 0.125, 0.125, 0.125, 0.125, 0.25, 0.25, 0.25, 0.25, 0.375, 0.375, 0.375, 0.375, *[0.5] * 3],
        ),
        (0.0, 1.0, 0.5, [0.5, 0.5, 0.5, *[0.625] * 4, *[0.75] * 4, *[0.875] * 4, 1.0]),
    ],
)
def test_calls_are_those_that_happen_and_none_for_the_score_at_sigma_zero(diffusion, t0, t1, calls):
    times = []

    def v(t, x):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return x

    sampler = PredictorCorrector(Linear(), diffusion, corrector_steps=3)
    solution = sample(v, X, sampler, times=uniform(4, t0, t1), key=jax.random.key(0))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(times), calls, atol=1e-6)
    assert int(solution.calls) == len(calls)
    assert np.isfinite(solution.x).all()


@pytest.mark.slow
def test_marginal_and_the_way_back_to_it_from_a_wrong_start():
    """Kolmogorov-Smirnov on four projections, 4,000 samples, each p-value refused below 1e-4.

    A right sampler fails with probability below 4e-4 under a fresh key. From a start too wide by half the predictor
    alone ends elsewhere, and is refused; the corrector brings the law back.
    """
    v = oracles.velocity(two_gaussians(), Linear())
    x0 = jax.random.normal(jax.random.key(5), (4000, 2))

    def end(**options):
        sampler = PredictorCorrector(Linear(), **options)
        return jax.jit(lambda x: sample(v, x, sampler, times=100, key=jax.random.key(6)).x)

    corrected, predicted = end(corrector_steps=4, snr=0.15), end(corrector_steps=0)
    assert min(p_values(corrected(x0))) > 1e-4
    assert min(p_values(predicted(1.5 * x0))) < 1e-6
    assert min(p_values(corrected(1.5 * x0))) > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corrector_steps": -1}, "corrector_steps must be at least 0, got -1."),
        ({"corrector_steps": 1.5}, "corrector_steps must be an integer, got 1.5."),
        ({"snr": 0.0}, r"snr must be in \(0, 1\), got 0.0."),
        ({"snr": float("nan")}, r"snr must be in \(0, 1\), got nan."),
        ({"diffusion": -1.0}, "diffusion must be finite and not negative, got -1.0."),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PredictorCorrector(Linear(), **options)


def test_noise_from_where_the_score_is_infinite_is_refused():
    with pytest.raises(ValueError, match=r"The score is infinite where sigma = 0, at t = 1\.0"):
        sample(swing, X, PredictorCorrector(Linear(), 0.5), times=[1.0, 0.0], key=jax.random.key(0))
