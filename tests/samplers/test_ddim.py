import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SCHEDULES
from exponential import (
    KEY,
    end_to_end,
    field,
    gaussian_moments,
    one_draw_an_example,
    orders,
    p_values,
    point_errors,
    point_velocity,
    run,
    single_and_double,
    slope,
)

from fm_jax import oracles
from fm_jax.samplers import DDIM, RungeKutta, ddim, sample
from fm_jax.samplers.ddim import ddim_step, noise_shares
from fm_jax.samplers.levels import levels, phi
from fm_jax.schedules import DDPM, VE, VP, Cosine, Linear, Polynomial, linear_betas


@pytest.mark.slow
def test_order_one_without_noise(x64):
    for case, order in orders({"ddim": DDIM}, ["linear"]).items():
        np.testing.assert_allclose(order, 1, atol=0.1, err_msg=str(case))


@pytest.mark.slow
def test_exact_where_all_data_is_one_point(x64):
    assert point_errors([DDIM(schedule) for schedule in SCHEDULES]).max() < 1e-10


def test_on_a_gaussian_every_step_multiplies_the_exact_solution_by_a_cosine(x64):
    """With tan(a) = alpha w / sigma; so it is exact for one point, w = 0, and for nothing else."""
    mean, width, grid = np.array([[0.5, -1.0]]), 0.6, np.array([0.0, 0.3, 0.35, 0.8, 0.95])
    mixture = oracles.gaussian_mixture(mean, width)
    x0 = jax.random.normal(KEY, (4, 2), dtype=float)

    def distances(schedule):
        x = sample(oracles.velocity(mixture, schedule), x0, DDIM(schedule), times=grid).x
        alpha, sigma = schedule.alpha(jnp.asarray(grid)), schedule.sigma(jnp.asarray(grid))
        exact, mean_there = oracles.flow_map(mixture, schedule, 0.0, 0.95, x0), alpha[-1] * mean
        cosines = jnp.cos(jnp.diff(jnp.arctan2(width * alpha, sigma)))
        expected = mean_there + cosines.prod() * (exact - mean_there)
        return jnp.abs(x - expected).max(), jnp.abs(x - exact).max()

    for from_formula, from_exact in jax.jit(lambda: [distances(s) for s in (Linear(), VP(), VE(0.1, 5.0))])():
        assert from_formula < 1e-11
        assert from_exact > 1e-2


def test_on_straight_lines_it_is_the_euler_method():
    @jax.jit
    def both(x0):
        return [sample(field, x0, sampler, times=7).x for sampler in (DDIM(Linear()), RungeKutta("euler"))]

    np.testing.assert_allclose(*both(jax.random.normal(KEY, (4, 2))), rtol=1e-5, atol=1e-6)


def test_with_all_noise_it_is_ancestral_sampling_of_ddpm(x64):
    """Mean and variance of the posterior, Ho et al. 2020, eq. 7, from entry n of the table to n - 1."""
    x, x1, betas = np.array([[1.0, -2.0]]), np.array([[0.3, 0.8]]), np.array(linear_betas())
    v = point_velocity(DDPM(), x1)
    end = jax.jit(lambda times: run(DDIM(DDPM(), eta=1.0), v, x, times).x)
    z = jax.random.normal(jax.random.fold_in(KEY, 0), x.shape)
    for n in (1000, 500, 2):
        bar, bar_before, beta = np.prod(1 - betas[:n]), np.prod(1 - betas[: n - 1]), betas[n - 1]
        mean = (np.sqrt(bar_before) * beta * x1 + np.sqrt(1 - beta) * (1 - bar_before) * x) / (1 - bar)
        variance = (1 - bar_before) / (1 - bar) * beta
        ours = end(np.array([1 - n / 1000, 1 - (n - 1) / 1000]))
        np.testing.assert_allclose(ours, mean + np.sqrt(variance) * z, rtol=1e-8)


def test_a_noisy_step_has_the_law_of_the_posterior(x64):
    """By Bayes: x_n | x1 is N(alpha_n x1, sigma_n^2), x | x_n is N(a x_n, sigma^2 - a^2 sigma_n^2), a = alpha/alpha_n.

    For eta below 1 there is less noise, and x_n | x1 keeps its variance sigma_n^2.
    """
    x, x1, grid = np.array([[1.0, -2.0]]), np.array([[0.3, 0.8]]), np.array([0.4, 0.55])
    cases = [(schedule, eta) for schedule in (Linear(), VE(), Cosine()) for eta in (1.0, 0.6)]

    def end(schedule, eta):
        return run(DDIM(schedule, eta), point_velocity(schedule, x1), jnp.asarray(x), grid).x

    z = jax.random.normal(jax.random.fold_in(KEY, 0), x.shape)
    for (schedule, eta), ours in zip(cases, jax.jit(lambda: [end(*case) for case in cases])(), strict=True):
        (alpha, alpha_n), (sigma, sigma_n) = schedule.alpha(grid), schedule.sigma(grid)
        a = alpha / alpha_n
        likelihood = sigma**2 - a**2 * sigma_n**2
        variance = 1 / (1 / sigma_n**2 + a**2 / likelihood)
        mean = variance * (alpha_n * x1 / sigma_n**2 + a * x / likelihood)
        if eta < 1:
            variance = eta**2 * variance
            mean = alpha_n * x1 + np.sqrt(sigma_n**2 - variance) / sigma * (x - alpha * x1)
        np.testing.assert_allclose(ours, mean + np.sqrt(variance) * z, rtol=1e-9)


@pytest.mark.slow
def test_weak_order_one_with_noise(x64, monkeypatch):
    monkeypatch.setattr(ddim, "step_noise", one_draw_an_example)
    samplers = {eta: lambda schedule, eta=eta: DDIM(schedule, eta) for eta in (0.5, 1.0)}
    for case, (means, variances) in gaussian_moments(samplers, ["linear", "vp"]).items():
        assert means.max() < 1e-12, case  # the mean of a Gaussian is carried exactly
        assert variances[-1] < 0.01, case
        np.testing.assert_allclose(slope(variances), 1, atol=0.1, err_msg=str(case))


@pytest.mark.slow_but_one
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_eta_reaches_the_same_marginal(eta):
    """Refused at p < 1e-4 on any of four projections: a right sampler fails with probability below 4e-4."""
    assert min(p_values(DDIM(Linear(), eta))) > 1e-4


def test_the_marginal_test_refuses_noise_that_is_only_added(monkeypatch):
    def unbalanced(*levels_and_eta):
        kept, fresh = noise_shares(*levels_and_eta)
        return jnp.ones_like(kept), fresh

    monkeypatch.setattr(ddim, "noise_shares", unbalanced)
    assert min(p_values(DDIM(Linear(), 0.5))) < 1e-6


def test_from_end_to_end_and_back(x64):
    errors, (by_start, by_time) = end_to_end({"ddim": DDIM})["ddim"]
    assert errors[1] < 0.05
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 1, atol=0.1)
    assert np.isfinite(by_start).all()
    assert np.isfinite(by_time)


def test_gradients_of_ancestral_sampling_from_end_to_end():
    def end(x0, middle):
        return run(DDIM(Linear(), eta=1.0), field, x0, jnp.stack([0 * middle, middle, 0 * middle + 1])).x.sum()

    by_start, by_time = jax.jit(jax.grad(end, argnums=(0, 1)))(jnp.ones((2, 1)), 0.4)
    assert np.isfinite(by_start).all()
    assert np.isfinite(by_time)
    assert by_time != 0


def test_single_precision_loses_little(x64):
    single, double = single_and_double({"ddim": DDIM})["ddim"]
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, atol=3e-5)


def test_low_precision_states_keep_exact_levels():
    # All data at 2 from a start at 0: the path is 2 t, and 512 steps of 1/512 stay on it.
    def v(t, x):
        return ((2 - x) / (1 - t)).astype(x.dtype)

    x0 = jnp.zeros((1, 1), dtype=jnp.bfloat16)
    solution = jax.jit(lambda x: sample(v, x, DDIM(Linear()), times=512, trajectory=True))(x0)
    np.testing.assert_allclose(solution.trajectory[256, 0, 0], 1.0, atol=0.05)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_stepping_one_by_one_is_the_same(eta):
    x, times = jax.random.normal(KEY, (2, 4)), jnp.array([0.0, 0.3, 0.7, 1.0])
    solution = run(DDIM(Cosine(), eta), field, x, times)
    for i in range(3):
        noise = jax.random.normal(jax.random.fold_in(KEY, i), x.shape)
        x = ddim_step(field, times[i], times[i + 1], x, schedule=Cosine(), eta=eta, noise=noise)
    np.testing.assert_allclose(solution.x, x, rtol=2e-5, atol=1e-5)


def test_vmap_over_a_further_axis():
    x0 = jax.random.normal(KEY, (3, 2, 4))
    end = lambda x: sample(lambda t, x: -x, x, DDIM(Linear()), times=[0.0, 0.3, 1.0]).x  # noqa: E731
    one, batched = jax.jit(lambda x: (end(x[1]), jax.vmap(end)(x)))(x0)
    np.testing.assert_allclose(batched[1], one, rtol=1e-6)


def test_levels_where_the_log_snr_is_infinite():
    @jax.jit
    def described(times):
        at = levels(Linear(), times)
        return at, at.order(2), at.order(3), at.h_before(2)

    at, order2, order3, before = described(jnp.array([0.0, 0.2, 0.2, 0.5, 0.6, 0.9, 1.0]))
    np.testing.assert_array_equal(at.regular, [False, False, True, True, True, False])
    np.testing.assert_array_equal(order2, [1, 1, 1, 2, 2, 1])
    np.testing.assert_array_equal(order3, [1, 1, 1, 2, 3, 1])
    np.testing.assert_allclose(at.h, [1, 1, np.log(4), np.log(1.5), np.log(6), 1], rtol=1e-5)
    np.testing.assert_array_equal(before, np.asarray(at.h)[[0, 0, 0, 1, 2, 3]])


def test_phi_functions(x64):
    """Against their integral, by Gauss-Legendre quadrature with 40 nodes."""
    z = np.array([-20.0, -1.0, -0.999, -1e-3, 0.0, 1e-9, 0.5, 1.0, 1.001, 12.0])
    s, w = np.polynomial.legendre.leggauss(40)
    s, w = (s + 1) / 2, w / 2
    values = jax.jit(lambda z: [phi(k, z) for k in range(1, 5)])(z)
    for k, value in enumerate(values, start=1):
        expected = (w * np.exp(np.outer(z, 1 - s)) * s ** (k - 1)).sum(axis=1) / math.factorial(k - 1)
        np.testing.assert_allclose(value, expected, rtol=1e-13)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_a_bad_eta_is_refused(eta):
    with pytest.raises(ValueError, match=rf"eta must be in \[0, 1\], got {eta}."):
        DDIM(Linear(), eta)


def test_a_start_where_the_log_snr_stands_still_is_refused():
    message = "The velocity says nothing of data and noise where the log-SNR stands still, at t = 0.0"
    with pytest.raises(ValueError, match=message):
        sample(field, jnp.ones((2, 2)), DDIM(Polynomial(2.0)), times=[0.0, 0.5])
