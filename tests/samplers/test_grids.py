import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from contracts import SCHEDULES, TIME_SAMPLERS
from scipy.special import expit

from fm_jax import schedules, times
from fm_jax.samplers.grids import (
    cosine,
    edm,
    flux_shift,
    linear_quadratic,
    quantiles,
    shifted,
    stable_diffusion_3,
    time_grid,
    uniform,
)

X = jnp.zeros((2, 3))


@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_uniform_is_equally_spaced_between_exact_ends(num_steps):
    times = np.asarray(uniform(num_steps, 0.1, 0.9))
    assert times.shape == (num_steps + 1,)
    assert times[0] == np.float32(0.1)
    assert times[-1] == np.float32(0.9)
    np.testing.assert_allclose(np.diff(times), 0.8 / num_steps, atol=2e-7)


def test_uniform_is_correctly_rounded():
    # A running sum of float32 steps would be off by many units in the last place after 1000 steps.
    np.testing.assert_array_equal(uniform(1000), (np.arange(1001) / 1000).astype(np.float32))


def test_backward_is_the_mirror_image():
    np.testing.assert_allclose(uniform(5, 1.0, 0.0), uniform(5)[::-1], atol=1e-7)


RANGE = (0.2, 0.9)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (7, np.linspace(*RANGE, 8)),
        (np.int64(2), [0.2, 0.55, 0.9]),
        ([0.0, 0.25, 1.0], [0.0, 0.25, 1.0]),
        ((1.0, 0.5), [1.0, 0.5]),
        (jnp.array([0.0, 3.0]), [0.0, 3.0]),
    ],
)
def test_times_are_a_number_of_even_steps_over_the_domain_or_themselves(times, expected):
    np.testing.assert_array_equal(time_grid(times, RANGE, X), np.asarray(expected, dtype=np.float32))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_times_are_in_the_dtype_of_the_state_but_at_least_float32(dtype):
    assert time_grid(1000, (0.0, 1.0), X.astype(dtype)).dtype == jnp.float32
    assert time_grid([0.0, 1.0], (0.0, 1.0), X.astype(dtype)).dtype == jnp.float32


def test_float64(x64):
    times = time_grid(3, (0.0, 1.0), jnp.zeros((1, 1)))
    assert times.dtype == jnp.float64
    np.testing.assert_array_equal(times, np.arange(4) / 3)


def test_traced_times_pass_unchecked():
    traced = jax.jit(lambda times: time_grid(times, RANGE, X))
    np.testing.assert_array_equal(traced(jnp.array([0.0, 0.25, 0.25])), [0.0, 0.25, 0.25])
    assert traced(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (0, "times must be at least 1, got 0."),
        (-3, "times must be at least 1, got -3."),
        (2.0, "times must be an integer, got 2.0."),
        (np.float32(2.0), "times must be an integer, got "),
        (True, "times must be an integer, got True."),
        ("2", r"times must be a number of steps or \[num \+ 1\] numbers, at least two, got '2'."),
        ([0.0], r"times must be a number of steps or \[num \+ 1\] numbers, at least two, got \[0.0\]."),
        ([[0.0, 1.0]], r"times must be a number of steps or .*, got \[\[0.0, 1.0\]\]."),
        ([[0.0], [0.0, 1.0]], r"times must be a number of steps or .*, got \[\[0.0\], \[0.0, 1.0\]\]."),
        (np.zeros((2, 2)), r"times must be a number of steps or .*, got float64 of shape \(2, 2\)."),
        (["0", "1"], r"times must be a number of steps or .*, got \['0', '1'\]."),
        ([1.0, 1.0 + 1e-9], "times must be finite and strictly monotone in float32"),
        ([0.0, 0.5, 0.5, 1.0], "times must be finite and strictly monotone"),
        ([0.0, 0.7, 0.5, 1.0], "times must be finite and strictly monotone"),
        ([0.0, float("nan"), 1.0], "times must be finite and strictly monotone"),
        ([0.0, float("inf")], "times must be finite and strictly monotone"),
    ],
)
def test_bad_times_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        time_grid(times, (0.0, 1.0), X)


def test_cosine_is_dense_at_both_ends():
    np.testing.assert_allclose(cosine(6, 0.2, 0.8), 0.5 - 0.3 * np.cos(np.pi * np.arange(7) / 6), atol=1e-7)
    np.testing.assert_allclose(cosine(6, 0.8, 0.2), cosine(6, 0.2, 0.8)[::-1], atol=1e-7)


def test_edm_levels_are_those_of_the_paper():
    """Karras et al. 2022, eq. 5, with noise-to-signal ratio (1 - t) / t on the linear path."""
    i = np.arange(18)
    sigma = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    expected = np.array([0, *(1 / (1 + sigma[1:])), 1])
    np.testing.assert_allclose(edm(18, schedules.Linear()), expected, rtol=1e-6)
    np.testing.assert_allclose(edm(18, schedules.Linear(), 1.0, 0.0), expected[::-1], rtol=1e-6)


def test_edm_with_a_finite_range_of_levels_uses_all_of_it(x64):
    """rho = 1 is uniform in sigma / alpha, rho = inf in its logarithm, from the first to the last level."""
    schedule = schedules.VE(sigma_min=0.01, sigma_max=50.0)
    np.testing.assert_allclose(schedule.sigma(edm(5, schedule, rho=1.0)), np.linspace(50, 0.01, 6), rtol=1e-9)
    np.testing.assert_allclose(edm(5, schedule, rho=np.inf), np.linspace(0, 1, 6), atol=1e-12)
    ratio = 2 * np.log(np.array([0.1, 0.9]) / np.array([0.9, 0.1]))
    inner = schedules.log_snr(schedules.Linear(), edm(4, schedules.Linear(), 0.1, 0.9, rho=np.inf))
    np.testing.assert_allclose(inner, np.linspace(*ratio, 5), rtol=1e-9)


@pytest.mark.slow
def test_quantiles_of_closed_forms():
    u = np.arange(9) / 8
    np.testing.assert_allclose(quantiles(8, times.Stratified()), u, atol=1e-4)
    np.testing.assert_allclose(quantiles(8, times.Beta(2.0, 1.0)), np.sqrt(u), atol=0.005)
    normal = scipy.stats.norm.ppf(u)
    np.testing.assert_allclose(
        quantiles(8, times.LogitNormal(0.5, 0.8), 1.0, 0.0)[::-1], expit(0.5 + 0.8 * normal), atol=0.005
    )
    # Between t0 and t1 they are those of the distribution cut off there.
    np.testing.assert_allclose(quantiles(8, times.Beta(2.0, 1.0), 0.6, 0.8), np.sqrt(0.36 + 0.28 * u), atol=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", TIME_SAMPLERS, ids=str)
def test_quantiles_of_every_time_sampler(sampler):
    grid = np.asarray(quantiles(10, sampler))
    assert (grid[0], grid[-1]) == (0, 1)
    assert (np.diff(grid) > 0).all()


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_edm_on_every_schedule(schedule):
    t0, t1 = schedule.domain
    grid = np.asarray(jax.jit(lambda: edm(10, schedule, t0, t1))())  # concrete also while tracing
    assert (grid[0], grid[-1]) == (np.float32(t0), np.float32(t1))
    assert (np.diff(grid) > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: uniform(2, 0.0, float("nan")), "t1 must be a finite number, got nan."),
        (lambda: uniform(2, 1.0, 1.0), "t0 and t1 must differ, both are 1.0."),
        (lambda: uniform(2.0), "num_steps must be an integer, got 2.0."),
        (lambda: cosine(0), "num_steps must be at least 1, got 0."),
        (lambda: cosine(4, 0.5, 0.5), "t0 and t1 must differ, both are 0.5."),
        (lambda: edm(0, schedules.Linear()), "num_steps must be at least 1, got 0."),
        (lambda: edm(4, schedules.Linear(), rho=0.0), r"rho must be in \[0.1, inf\], got 0.0."),
        (
            lambda: edm(4, schedules.Linear(), sigma_min=1.0, sigma_max=0.5),
            "0 < sigma_min < sigma_max < inf must hold, got sigma_min=1.0 and sigma_max=0.5.",
        ),
        (lambda: edm(4, schedules.Linear(), 0.999, 1.0), "The inner times must increase strictly"),
        (lambda: quantiles(0, times.Uniform()), "num_steps must be at least 1, got 0."),
        (lambda: quantiles(4, times.Uniform(0.2, 0.7), 0.8, 0.9), "hardly any mass between t0 = 0.8 and t1 = 0.9."),
    ],
)
def test_impossible_grids_are_not_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shifted_in_closed_form():
    t = np.linspace(0, 1, 8)
    sigma = 3 * (1 - t) / (1 + 2 * (1 - t))
    np.testing.assert_allclose(shifted(7, 3.0), 1 - sigma, atol=1e-7)
    np.testing.assert_array_equal(shifted(7, 1.0), uniform(7))
    np.testing.assert_allclose(shifted(7, 3.0, 1.0, 0.0), shifted(7, 3.0)[::-1], atol=1e-7)
    assert shifted(7, 3.0)[0] == 0
    assert shifted(7, 3.0)[-1] == 1


def test_stable_diffusion_3_as_published():
    # What diffusers' scheduler gives for 28 steps: its third value, and the last three.
    sigma = 1 - np.asarray(stable_diffusion_3(28), np.float64)
    np.testing.assert_allclose(sigma[-3:], [0.110906, 0.008929, 0.0], atol=1e-6)
    assert len(sigma) == 29
    assert sigma[0] == 1
    once = 3 * 0.001 / (1 + 2 * 0.001)
    np.testing.assert_allclose(sigma[-2], 3 * once / (1 + 2 * once), rtol=1e-5)


@pytest.mark.parametrize(("pixels", "shift"), [(256, 1.6487), (1024, 3.1582)])
def test_flux_shift_at_its_two_ends(pixels, shift):
    assert flux_shift((pixels // 16) ** 2) == pytest.approx(shift, abs=1e-4)


def test_linear_quadratic_is_linear_and_then_a_parabola():
    times = np.asarray(linear_quadratic(50), np.float64)
    np.testing.assert_allclose(times[:26], np.arange(26) / 1000, atol=1e-7)
    np.testing.assert_allclose(times[[26, 27, 48, 49, 50]], [0.02752, 0.03308, 0.85208, 0.92452, 1], atol=1e-6)
    np.testing.assert_allclose(np.diff(times[25:], 3), 0, atol=1e-6)
    np.testing.assert_allclose(
        linear_quadratic(3, linear_steps=0, resolution=10), [0, 0.1 + 0.7 / 9, 0.2 + 2.8 / 9, 1], atol=1e-7
    )


def test_shifted_times_have_the_density_pushed_forward():
    shift = 3.0
    draws = np.asarray(times.Shifted(times.Beta(2.0, 3.0), shift)(jax.random.key(0), 20_000), np.float64)
    back = shift * draws / (1 + (shift - 1) * draws)  # sigma -> sigma / (s - (s - 1) sigma), in t
    assert scipy.stats.kstest(back, scipy.stats.beta(2.0, 3.0).cdf).pvalue > 0.01
    assert scipy.stats.kstest(draws, scipy.stats.beta(2.0, 3.0).cdf).pvalue < 1e-6


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: shifted(4, 0.0), "shift must be positive and finite"),
        (lambda: shifted(4, 3.0, 0.0, 1.5), r"t1 must be in \[0, 1\]"),
        (lambda: stable_diffusion_3(0), "num_steps must be at least 1, got 0."),
        (lambda: flux_shift(0), "num_tokens must be at least 1, got 0."),
        (lambda: linear_quadratic(4, linear_steps=4), "linear_steps < num_steps < resolution must hold, got 4, 4"),
        (lambda: linear_quadratic(1000), "linear_steps < num_steps < resolution must hold"),
    ],
)
def test_published_grids_that_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
