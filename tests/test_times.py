import jax
import numpy as np
import pytest
from contracts import TIME_SAMPLERS
from scipy import stats

from fm_jax import schedules, times

NUM = 20_000


@pytest.mark.slow_but_one
@pytest.mark.parametrize("sampler", TIME_SAMPLERS, ids=str)
def test_contract(sampler, key):
    """Shape, range, one stream a key, and the whole under jit."""
    t = jax.jit(sampler, static_argnums=1)(key, 1000)
    assert t.shape == (1000,)
    low, high = sampler.domain
    assert (t >= low - 1e-6).all()
    assert (t <= high).all()
    np.testing.assert_allclose(t, sampler(key, 1000), atol=1e-5)
    assert (t != sampler(jax.random.key(1), 1000)).mean() > 0.9


def mode_cdf(scale):
    u = np.linspace(0, 1, 100_001)
    t = u + scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    return lambda x: np.interp(x, t, u)


CDFS = [
    (times.Uniform(0.2, 0.7), stats.uniform(0.2, 0.5).cdf),
    (times.Stratified(), stats.uniform().cdf),
    (times.LogitNormal(0.5, 0.8), lambda t: stats.norm(0.5, 0.8).cdf(np.log(t / (1 - t)))),
    (times.Beta(2.0, 3.0), stats.beta(2, 3).cdf),
    (times.Mode(1.29), mode_cdf(1.29)),
    (times.Mode(-0.5), mode_cdf(-0.5)),
    # On the linear path sigma / alpha = (1 - t) / t.
    (times.EDMLogNormal(), lambda t: stats.norm(-1.2, 1.2).sf(np.log((1 - t) / t))),
    (times.Rescale(times.Beta(2.0, 3.0), 0.5, 1.0), lambda t: stats.beta(2, 3).cdf(2 * t - 1)),
]


@pytest.mark.parametrize(("sampler", "cdf"), CDFS)
def test_distribution(sampler, cdf, key):
    """Kolmogorov-Smirnov with a fixed key; the false-alarm rate of each case is 1e-4."""
    assert stats.kstest(np.asarray(sampler(key, NUM), dtype=float), cdf).pvalue > 1e-4


def test_edm_noise_levels_are_log_normal_on_every_schedule(key):
    for schedule in (schedules.VP(), schedules.Cosine(), schedules.VE()):
        t = times.EDMLogNormal(schedule=schedule)(key, NUM)
        log_sigma = -np.asarray(schedules.log_snr(schedule, t), dtype=float) / 2
        assert stats.kstest(log_sigma, stats.norm(-1.2, 1.2).cdf).pvalue > 1e-4


def test_strata_hold_one_draw_each(key):
    t = times.Stratified()(key, 64)
    np.testing.assert_array_equal(np.floor(np.asarray(t) * 64), np.arange(64))


def test_stratified_average_varies_less(key):
    keys = jax.random.split(key, 200)
    spread = [np.std([f(k, 64).mean() for k in keys]) for f in (times.Uniform(), times.Stratified())]
    np.testing.assert_allclose(spread[0], 1 / np.sqrt(12 * 64), rtol=0.2)  # 0.036
    np.testing.assert_allclose(spread[1], 1 / np.sqrt(12 * 64) / 64, rtol=0.2)  # 0.00056


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: times.Uniform(0.5, 0.5), "0 <= t_min < t_max <= 1 must hold, got t_min=0.5 and t_max=0.5"),
        (lambda: times.Stratified(-0.1, 1.0), "0 <= t_min < t_max <= 1"),
        (lambda: times.LogitNormal(std=0.0), "std must be positive and finite, got 0.0"),
        (lambda: times.Mode(2.0), r"scale must be in \[-1"),
        (lambda: times.Beta(a=0.0), "a must be positive and finite, got 0.0"),
        (lambda: times.EDMLogNormal(std=-1.0), "std must be positive"),
        (
            lambda: times.Rescale(times.Uniform(0.1, 0.9), 0.0, 0.5),
            r"sampler must draw from \[0, 1\], got \[0.1, 0.9\]",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
