"""What the catalogue says of each sampler, held against what the sampler does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from contracts import SCHEDULES
from marginals import p_values

from fm_jax import oracles
from fm_jax.guidance import classifier_free
from fm_jax.parameterization import conversion_domain
from fm_jax.paths import source
from fm_jax.samplers import SAMPLERS, falling_noise, sample, table
from fm_jax.samplers.grids import edm
from fm_jax.schedules import VP, Linear

FIXED = [name for name, sampler in SAMPLERS.items() if sampler.nfe_per_step is not None]
HERE = [name for name in FIXED if name not in ("sea", "shark", "sra1")]  # by Diffrax: slow to compile, tested apart
CONDITIONAL, UNCONDITIONAL, SCALE = np.array([0.8, 0.3]), np.array([0.2, -0.5]), 2.0
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.3]])


def gaussian(mean):
    return oracles.gaussian_mixture(mean[None], COVARIANCE[None])


def p_value(x, mean, covariance=COVARIANCE):
    return min(p_values(x, lambda d: scipy.stats.norm(d @ mean, np.sqrt(d @ covariance @ d)).cdf))


@pytest.fixture(scope="module")
def draws():
    """1,000 samples by each sampler, 100 steps on the linear path from t = 0 to t = 1, guided, for two keys.

    Guidance between Gaussians of one covariance leads to the Gaussian at m_u + scale (m_c - m_u).
    """
    v_cond, v_uncond = (oracles.velocity(gaussian(mean), Linear()) for mean in (CONDITIONAL, UNCONDITIONAL))
    v = classifier_free(v_cond, v_uncond, SCALE)
    x0 = jax.random.normal(jax.random.key(0), (1000, 2))

    @jax.jit
    def draw(key):
        return {name: sample(name, v, key, x0, schedule=Linear(), num_steps=100) for name in HERE}

    return draw(jax.random.key(1)), draw(jax.random.key(2))


GUIDED = UNCONDITIONAL + SCALE * (CONDITIONAL - UNCONDITIONAL)


@pytest.mark.parametrize("name", HERE)
def test_samples_the_guided_law(draws, name):
    """Refused at p < 1e-4: a right sampler fails with probability below 4e-4 under a fresh key."""
    assert p_value(draws[0][name].x, GUIDED) > 1e-4


def test_the_test_has_power(draws):
    assert p_value(draws[0]["heun"].x, CONDITIONAL) < 1e-4
    assert p_value(draws[0]["heun"].x, GUIDED, 0.7 * COVARIANCE) < 1e-4


def test_nfe_per_step(draws):
    """Guidance doubles it; the start of a multistep method and the singular ends of others change it by a few."""
    for name in HERE:
        assert abs(int(draws[0][name].nfe) - 200 * SAMPLERS[name].nfe_per_step) <= 12, name


def test_stochastic_means_that_the_key_matters(draws):
    for name in HERE:
        differs = bool(jnp.abs(draws[0][name].x - draws[1][name].x).max() > 0)
        assert SAMPLERS[name].stochastic == differs, name


def test_needs_no_schedule_means_that_there_may_be_none():
    names = [name for name in HERE if not SAMPLERS[name].needs_schedule]
    x0 = jnp.ones((2, 3))
    ends = jax.jit(lambda: {name: sample(name, lambda t, x: -x, None, x0, num_steps=20).x for name in names})()
    for name in names:
        np.testing.assert_allclose(ends[name], np.exp(-1), atol=0.02)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != VP(beta_min=1.0, beta_max=1.0)], ids=str)
def test_falling_noise_keeps_the_marginals_on_every_schedule_that_starts_from_noise(schedule):
    t0, t1 = conversion_domain(schedule)
    x0 = source(schedule, jax.random.normal(jax.random.key(3), (1000, 2)), t0)
    v = oracles.velocity(gaussian(CONDITIONAL), schedule)
    draw = jax.jit(
        lambda key, x0: sample("euler_maruyama", v, key, x0, schedule=schedule, grid=edm(300, schedule, t0, t1)).x
    )
    x = draw(jax.random.key(4), x0)
    alpha, sigma = (float(c(jnp.asarray(t1))) for c in (schedule.alpha, schedule.sigma))
    assert p_value(x, alpha * CONDITIONAL, alpha**2 * COVARIANCE + sigma**2 * np.eye(2)) > 1e-4


def test_falling_noise_is_that_of_the_reverse_diffusion():
    """On the linear path -d sigma^2 / dt = 2 (1 - t)."""
    t = np.linspace(0, 1, 5)
    np.testing.assert_allclose(jax.vmap(falling_noise(Linear()))(t), np.sqrt(2 * (1 - t)), atol=1e-6)


def test_table_has_a_line_for_each():
    lines = table().splitlines()
    assert len(lines) == len(SAMPLERS)
    assert "heun: order 2, 2 NFE a step" in lines
    assert "ddpm: weak order 1, 1 NFE a step, random" in lines
    assert "tsit5: order 5, adaptive steps" in lines


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eular", {"num_steps": 2}, "name must be one of 'euler', .*, got 'eular'."),
        ("ddpm", {"num_steps": 2, "schedule": Linear()}, "key must be given: 'ddpm' draws noise on the way."),
        ("ddpm", {"num_steps": 2, "schedule": Linear(), "key": 0}, "key must be one typed key"),
        ("ddim", {"num_steps": 2}, "schedule must be given: 'ddim' works with the alpha and sigma of the path."),
        ("tsit5", {"num_steps": 2}, "'tsit5' takes t0, t1, rtol, atol, times, .*; got num_steps."),
        ("heun", {"num_steps": 2, "rtol": 1e-3}, "'heun' takes t0, t1, num_steps, grid, trajectory; got rtol."),
        ("heun", {"num_steps": 2, "eta": 0.5}, "got eta."),
        (
            "kvaerno5",
            {"per_sample": True},
            "'kvaerno5' takes t0, t1, rtol, atol, times, max_steps, adjoint; got per_sample.",
        ),
        (
            "adaptive_shark",
            {"times": [0.5], "schedule": Linear(), "key": jax.random.key(0)},
            "'adaptive_shark' takes t0, t1, rtol, atol, diffusion, tol, max_steps; got times.",
        ),
        ("ddim", {"num_steps": 2, "schedule": Linear(), "eta": 1.5}, r"eta must be in \[0, 1\], got 1.5."),
        ("heun", {"num_steps": 0}, "num_steps must be at least 1, got 0."),
        ("heun", {"grid": [0.0, 0.5, 0.2]}, "grid must be finite and strictly monotone"),
    ],
)
def test_bad_input_is_refused(name, options, message):
    key = options.pop("key", None)
    with pytest.raises(ValueError, match=message):
        sample(name, lambda t, x: x, key, X, **options)
