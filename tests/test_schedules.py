import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SCHEDULES

from fm_jax import schedules
from fm_jax.schedules import coefficients, log_snr


def interior(schedule, num=41):
    low, high = schedule.domain
    t = np.linspace(low, high, num + 2)[1:-1]
    # A kink of the beta table has no derivative: stay off the table's times.
    return jnp.asarray(t + 1e-4 if isinstance(schedule, schedules.DDPM) else t)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
class TestEverySchedule:
    @pytest.mark.slow_but_one
    def test_derivatives_equal_central_differences(self, schedule, x64):
        t, h = interior(schedule), 1e-6
        alpha, sigma, d_alpha, d_sigma = coefficients(schedule, t)
        np.testing.assert_allclose(
            d_alpha, (schedule.alpha(t + h) - schedule.alpha(t - h)) / (2 * h), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(
            d_sigma, (schedule.sigma(t + h) - schedule.sigma(t - h)) / (2 * h), rtol=1e-5, atol=1e-7
        )
        np.testing.assert_array_equal(alpha, schedule.alpha(t))
        np.testing.assert_array_equal(sigma, schedule.sigma(t))

    def test_keeps_shape_and_traces(self, schedule):
        t = jnp.full((2, 3, 1), 0.3)
        for value in jax.jit(lambda t: coefficients(schedule, t))(t):
            assert value.shape == t.shape
            np.testing.assert_allclose(value, value[0, 0, 0])
        assert coefficients(schedule, 0.3).alpha.shape == ()


CLOSED_FORMS = {  # alpha and sigma at t = 0.3, by hand
    schedules.Linear(): (0.3, 0.7),
    schedules.Linear(sigma_min=0.1): (0.3, 0.73),
    schedules.Cosine(): (np.sin(0.15 * np.pi), np.cos(0.15 * np.pi)),
    schedules.Polynomial(3.0): (0.027, 0.973),
    schedules.MaskCosine(): (1 - np.cos(0.15 * np.pi), np.cos(0.15 * np.pi)),
    schedules.SineSquared(): (np.sin(0.15 * np.pi) ** 2, np.cos(0.15 * np.pi) ** 2),
    schedules.SineSquared(0.25): (1 - np.sin(0.7 * np.pi / 3) ** 2 / 0.75, np.sin(0.7 * np.pi / 3) ** 2 / 0.75),
    schedules.LinearVP(): (0.3, np.sqrt(0.91)),
    schedules.VP(): (np.exp(-0.5 * (0.07 + 0.245 * 19.9)), np.sqrt(1 - np.exp(-(0.07 + 0.245 * 19.9)))),
    schedules.VE(0.01, 100.0): (1.0, 100.0 * 1e-4**0.3),
}


@pytest.mark.parametrize(("schedule", "expected"), CLOSED_FORMS.items(), ids=str)
def test_values(schedule, expected, x64):
    t = jnp.asarray(0.3)
    np.testing.assert_allclose((schedule.alpha(t), schedule.sigma(t)), expected, rtol=1e-12)


TO_THE_ENDS = [schedules.Linear(), schedules.Cosine(), schedules.Polynomial(2.0), schedules.MaskCosine()]
TO_THE_ENDS += [schedules.SineSquared(), schedules.SineSquared(0.25)]
CONVEX = [schedules.Linear(), schedules.Polynomial(3.0), schedules.MaskCosine(), schedules.SineSquared(0.1)]


@pytest.mark.parametrize("schedule", TO_THE_ENDS, ids=str)
def test_ends_are_exact_in_float32(schedule):
    """Source at 0 and data at 1, with no rounding left over; and the infinite log-SNR maps back."""
    assert [float(f(jnp.float32(t))) for t in (0, 1) for f in (schedule.alpha, schedule.sigma)] == [0, 1, 1, 0]
    ends = schedule.t_from_log_snr(log_snr(schedule, jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(ends, [0, 1], atol=1e-7)


@pytest.mark.parametrize("sigma_min", [1e-2, 1e-5, 1e-8])
def test_linear_has_its_smallest_noise_in_float32(sigma_min):
    """Also one that float32 cannot add to 1."""
    schedule, t = schedules.Linear(sigma_min=sigma_min), jnp.array([0.0, 0.25, 1.0])
    np.testing.assert_allclose(schedule.sigma(t), [1, 0.75 + 0.25 * sigma_min, sigma_min], rtol=1e-6)
    np.testing.assert_allclose(float(schedule.sigma(1.0)), sigma_min, rtol=1e-6)
    np.testing.assert_allclose(coefficients(schedule, t).d_sigma, sigma_min - 1, rtol=1e-6)
    np.testing.assert_allclose(log_snr(schedule, t)[2], -2 * np.log(sigma_min), rtol=1e-6)
    np.testing.assert_allclose(schedule.t_from_log_snr(log_snr(schedule, t)), t, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_plain_numbers_are_times(schedule):
    t = sum(schedule.domain) / 2
    for coefficient in (schedule.alpha, schedule.sigma):
        np.testing.assert_allclose(coefficient(t), coefficient(jnp.asarray(t)), rtol=1e-6)


@pytest.mark.parametrize(
    "schedule", [schedules.VP(), schedules.LinearVP(), schedules.DDPM(), schedules.Cosine()], ids=str
)
def test_variance_preserving(schedule, x64):
    t = interior(schedule)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, atol=1e-12)


@pytest.mark.parametrize("schedule", CONVEX, ids=str)
def test_convex(schedule, x64):
    t = jnp.linspace(0, 1, 101)
    np.testing.assert_allclose(schedule.alpha(t) + schedule.sigma(t), 1, atol=1e-14)


NEAR_THE_ENDS = {  # alpha ~ a t^n near 0 and sigma ~ b (1 - t)^m near 1
    schedules.MaskCosine(): (np.pi**2 / 8, 2, np.pi / 2, 1),
    schedules.SineSquared(): (np.pi**2 / 4, 2, np.pi**2 / 4, 2),
    schedules.SineSquared(0.25): (np.pi / 3 * np.sin(np.pi / 3) / 0.75, 1, (np.pi / 3) ** 2 / 0.75, 2),
}


@pytest.mark.parametrize(("schedule", "expected"), NEAR_THE_ENDS.items(), ids=str)
def test_small_coefficients_have_all_their_digits_in_float32(schedule, expected):
    """Also those that float32 cannot tell from 0 beside 1, and their slopes."""
    a, n, b, m = expected
    t, left = jnp.array([1e-7, 1e-5, 1e-4]), jnp.array([2.0**-20, 2.0**-16, 2.0**-13])
    start, end = coefficients(schedule, t), coefficients(schedule, 1 - left)
    np.testing.assert_allclose(start.alpha, a * np.asarray(t, float) ** n, rtol=4e-4)
    np.testing.assert_allclose(start.d_alpha, n * a * np.asarray(t, float) ** (n - 1), rtol=4e-4)
    np.testing.assert_allclose(end.sigma, b * np.asarray(left, float) ** m, rtol=4e-4)
    np.testing.assert_allclose(end.d_alpha, m * b * np.asarray(left, float) ** (m - 1), rtol=4e-4)
    np.testing.assert_allclose(schedule.t_from_log_snr(log_snr(schedule, t)), t, rtol=1e-5, atol=3e-8)


@pytest.mark.parametrize("p0", [0.0, 0.25, 0.7])
def test_sine_squared_goes_along_a_great_circle_at_constant_speed(p0, x64):
    """By the angle between sqrt(p_0) and sqrt(p_t), W t; p0 of the data's token, and the rest on one other."""
    schedule, t = schedules.SineSquared(p0), jnp.linspace(0, 1, 21)
    arrived = np.asarray(schedule.alpha(t) + schedule.sigma(t) * p0)
    angle = np.arccos(np.minimum(np.sqrt(p0 * arrived) + np.sqrt((1 - p0) * np.abs(1 - arrived)), 1))
    np.testing.assert_allclose(angle, np.arccos(np.sqrt(p0)) * np.asarray(t), atol=1e-7)


def test_the_domain_says_where_the_slope_is_infinite():
    """Nothing is clipped in silence: outside the domain the derivative really is infinite."""
    for schedule, t in [(schedules.VP(), 1.0), (schedules.LinearVP(), 1.0), (schedules.Polynomial(0.5), 0.0)]:
        assert not schedule.domain[0] <= t <= schedule.domain[1]
        c = coefficients(schedule, jnp.asarray(t))
        assert not np.isfinite(c.d_sigma) or not np.isfinite(c.d_alpha)


def test_ddpm_table(x64):
    """alpha^2 at the table's times is the cumulative product; log alpha is linear in between."""
    betas = schedules.linear_betas()
    assert betas[0] == 1e-4
    assert betas[-1] == 0.02
    t = 1 - np.arange(1, 1001) / 1000
    alpha_bar = np.cumprod(1 - np.asarray(betas))
    schedule = schedules.DDPM(betas)
    np.testing.assert_allclose(schedule.alpha(jnp.asarray(t)) ** 2, alpha_bar, rtol=1e-9)
    middle = schedule.alpha(jnp.asarray((t[41] + t[42]) / 2)) ** 2
    np.testing.assert_allclose(middle, np.sqrt(alpha_bar[41] * alpha_bar[42]), rtol=1e-9)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: schedules.Linear(sigma_min=1.0), r"sigma_min must be in \[0, 1\), got 1.0"),
        (lambda: schedules.Linear(sigma_min=-0.1), r"sigma_min must be in \[0, 1\)"),
        (lambda: schedules.SineSquared(1.0), r"p0 must be in \[0, 1\), got 1.0"),
        (lambda: schedules.Polynomial(0.0), "n must be positive and finite, got 0.0"),
        (lambda: schedules.VP(beta_min=0.0), "beta_min must be positive and finite, got 0.0"),
        (lambda: schedules.VP(beta_min=2.0, beta_max=1.0), r"beta_max must be in \[2.0, inf\), got 1.0"),
        (
            lambda: schedules.VE(sigma_min=2.0, sigma_max=1.0),
            "0 < sigma_min < sigma_max < inf must hold, got sigma_min=2.0 and sigma_max=1.0.",
        ),
        (lambda: schedules.DDPM((0.1,)), r"betas must be at least two numbers in \(0, 1\), got \(0.1,\)"),
        (lambda: schedules.DDPM((0.1, 1.0)), r"betas must be at least two numbers in \(0, 1\), got \(0.1, 1.0\)"),
        (lambda: schedules.DDPM(0.1), r"betas must be at least two numbers in \(0, 1\), got 0.1"),
        (lambda: schedules.linear_betas(1), "num_steps must be at least 2, got 1"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
