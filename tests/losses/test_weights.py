import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SCHEDULES, WEIGHTS

from fm_jax import losses, schedules
from fm_jax.losses import error_scale
from fm_jax.parameterization import convert
from fm_jax.types import KINDS

T = np.array([0.1001, 0.4001, 0.7001])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_error_scale_is_the_slope_of_the_conversion(schedule, x64):
    x, data = np.ones((3, 2)), np.full((3, 2), 0.3)
    at = jax.jit(lambda data: convert("data", data, T, x, schedule))
    scales = jax.jit(lambda t: {kind: error_scale(kind, t, schedule) for kind in KINDS})(T)
    for kind, scale in scales.items():
        slope = jnp.abs(getattr(at(data + 1), kind) - getattr(at(data), kind))[:, 0]
        np.testing.assert_allclose(slope, scale, rtol=1e-7, err_msg=kind)


@pytest.mark.parametrize(
    ("weight", "kind", "expected"),
    [  # published forms, on a variance-preserving schedule with snr = (alpha / sigma)^2
        (losses.MinSNRWeight(5.0), "noise", lambda snr: np.minimum(snr, 5) / snr),
        (losses.MinSNRWeight(5.0), "data", lambda snr: np.minimum(snr, 5)),
        (losses.SNRWeight(), "noise", lambda snr: np.ones_like(snr)),
        (losses.SNRWeight(0.0), "data", lambda snr: np.ones_like(snr)),
        (losses.EDMWeight(0.5), "data", lambda snr: (1 / snr + 0.25) / (1 / snr * 0.25)),
    ],
)
def test_published_forms(weight, kind, expected, x64):
    snr = np.exp(np.asarray(schedules.log_snr(schedules.Cosine(), T)))
    np.testing.assert_allclose(weight(T, kind, schedules.Cosine()), expected(snr), rtol=1e-9)


@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_velocity_weights_are_finite_on_the_whole_path(weight):
    """A draw of exactly t = 0 happens once in eight million: no 0 / 0 may lurk there."""
    t = jnp.array([0.0, 1e-7, 0.5, 1 - 6e-8])
    assert np.isfinite(weight(t, "velocity", schedules.Linear())).all()
    if weight != losses.EDMWeight() and weight != losses.SNRWeight(0.0):  # infinite on noise at alpha = 0, truly
        assert np.isfinite(weight(t, "noise", schedules.Linear())).all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: losses.MinSNRWeight(0.0), "gamma must be positive and finite, got 0.0."),
        (lambda: losses.EDMWeight(0.0), "sigma_data must be positive and finite, got 0.0."),
        (lambda: error_scale("eps", T, schedules.Linear()), "kind must be one of"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
