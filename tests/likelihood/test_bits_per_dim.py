import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fm_jax import oracles
from fm_jax.likelihood import Hutchinson, NotConvergedError, bits_per_dim, dequantize
from fm_jax.samplers import Adaptive, DiffraxSDE, RungeKutta
from fm_jax.schedules import Linear
from fm_jax.sources import Normal

KEY = jax.random.key(0)


LEVELS = 8
IMAGES = np.array([[[2], [5]], [[6], [2]], [[3], [5]], [[0], [0]]], dtype=np.uint8)
RK4 = RungeKutta("rk4")
TEN_STEPS = {"sampler": RK4, "times": 10}


def shrink(t, x):
    return -x


def euler(num_steps):
    return {"sampler": RungeKutta("euler"), "times": num_steps}


def as_images(v):
    """The same velocity on [batch, 1, d, 1]."""
    return lambda t, x: v(t, x.reshape(len(x), -1)).reshape(x.shape)


def narrow(t, x):
    """To N(0, 0.15^2)."""
    return np.log(0.15) * x


def test_dequantised_levels_fill_their_bins():
    images = np.tile(np.arange(LEVELS, dtype=np.uint8), (4000, 1))
    x = np.asarray(dequantize(jax.random.key(0), images, LEVELS))
    np.testing.assert_array_equal(np.floor((x + 1) / 2 * LEVELS), images)
    # Uniform within the bin: refused at p < 1e-4.
    assert scipy.stats.kstest(((x + 1) / 2 * LEVELS - images).ravel(), "uniform").pvalue > 1e-4


def test_more_draws_tighten_the_bound_to_the_exact_probability():
    """Means over 400 copies of two images under N(0, 0.15^2): most of the bias of one draw is gone with 20."""
    images = np.array([[3, 5], [2, 4]])
    edges = (2 * np.stack([images, images + 1.0]) / LEVELS - 1) / 0.15
    exact = -np.log2(np.diff(scipy.stats.norm.cdf(edges), axis=0)[0]).mean(axis=1)
    images = np.tile(images, (400, 1))
    bounds, errors = [], []
    for num_draws in (1, 20):
        bits = bits_per_dim(narrow, KEY, images, levels=LEVELS, num_draws=num_draws, **TEN_STEPS).reshape(400, 2)
        bounds.append(bits.mean(axis=0))
        errors.append(bits.std(axis=0) / 20)
    assert (bounds[0] - bounds[1] > 4 * np.hypot(*errors)).all()
    assert (bounds[1] - exact > -3 * errors[1]).all()
    assert (bounds[1] - exact < 0.2 * (bounds[0] - exact)).all()


def test_one_draw_may_be_estimated_by_hutchinson():
    """With signs it is exact on a diagonal Jacobian."""
    options = {"v": shrink, "key": jax.random.key(3), "images": IMAGES, "levels": LEVELS, **euler(200)}
    bits = bits_per_dim(**options, tolerance=0.1, divergence=Hutchinson())
    np.testing.assert_allclose(bits, bits_per_dim(**options, tolerance=0.1), rtol=1e-5)


@pytest.mark.slow
def test_a_converged_solve_is_the_closed_form_and_another_is_refused():
    """Eight Euler steps on a sharp model are off by bits."""
    mixture = oracles.gaussian_mixture([[-0.4, 0.3], [0.5, -0.2]], 0.02)
    v, images = as_images(oracles.velocity(mixture, Linear())), np.array([[[76], [166]], [[191], [102]]], np.uint8)
    bits = bits_per_dim(v, KEY, images, sampler=RK4, times=200)
    x1 = dequantize(jax.random.split(jax.random.fold_in(KEY, 0))[0], images)[..., 0]
    exact = -oracles.log_prob(mixture, Linear(), 1.0, x1) / np.log(2) / 2 + 7
    np.testing.assert_allclose(bits, exact, atol=1e-3)
    said = (
        r"the solve has not converged: -?\d.* bits/dim by RungeKutta.* in 4 steps, -?\d.* in 8 steps for image \d, more"
    )
    with pytest.raises(NotConvergedError, match=said):
        bits_per_dim(v, KEY, images, **euler(8))
    assert (np.abs(bits_per_dim(v, KEY, images, **euler(8), tolerance=1e6) - exact) > 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rate", "options", "message"),
    [
        (50.0, {"sampler": Adaptive(rtol=0.1, atol=0.1)}, r"rtol=1\.0, atol=1\.0, .*, .* rtol=0\.1, atol=0\.1"),
        (jnp.nan, euler(8), "nan bits/dim"),
    ],
)
def test_loose_tolerances_and_nans_are_refused(rate, options, message):
    with pytest.raises(NotConvergedError, match=message):
        bits_per_dim(lambda t, x: rate * jnp.cos(rate * t) * x, KEY, IMAGES, levels=LEVELS, **options)


def test_bits_per_dim_compiles_once():
    traces = []

    def v(t, x):
        traces.append(1)
        return -x

    counts = []
    for i in range(2):
        bits_per_dim(v, jax.random.key(i), IMAGES, levels=LEVELS, **TEN_STEPS)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


def test_a_wider_source_is_a_wider_model():
    """N(0, 4 I) carried nowhere: the log-density at the dequantised point."""
    bits = bits_per_dim(lambda t, x: 0 * x, KEY, IMAGES, levels=LEVELS, source=Normal(2.0), **TEN_STEPS)
    x1 = dequantize(jax.random.split(jax.random.fold_in(KEY, 0))[0], IMAGES, LEVELS).reshape(4, -1)
    exact = -scipy.stats.norm(0, 2).logpdf(x1).mean(axis=1) / np.log(2) + np.log2(LEVELS / 2)
    np.testing.assert_allclose(bits, exact, rtol=1e-5)


BITS = {"v": shrink, "key": KEY, "images": IMAGES, "levels": LEVELS}
BAD = [
    ({"key": None}, "key must be one typed key"),
    ({"levels": 1}, "levels must be from 2 to 65536, got 1."),
    ({"levels": 4}, r"images must be in 0 .. 3, got 0 .. 6."),
    ({"images": -1 * IMAGES.astype(int)}, r"images must be in 0 .. 7, got -6 .. 0."),
    ({"images": IMAGES / 2}, r"images must be integers in 0 .. 7, got float64"),
    ({"images": IMAGES[0, 0]}, r"images must be \[batch, ...\] with at least one example, got shape \(1,\)"),
    ({"num_draws": 0}, "num_draws must be at least 1, got 0."),
    ({"tolerance": 0.0}, "tolerance must be positive and finite, got 0.0."),
    ({"num_draws": 2, "divergence": Hutchinson()}, "num_draws = 2 needs an exact divergence"),
    (euler(1), "times must be an even number of steps, to compare with half of them, got 1."),
    (euler(0), "times must be at least 1, got 0."),
    ({"sampler": DiffraxSDE(Linear(), rtol=1e-2, atol=1e-2)}, r"sampler must be one with fixed steps, or Adaptive\(\)"),
    ({"sampler": DiffraxSDE(Linear())}, "sampler must not draw noise"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(**BITS | options)
