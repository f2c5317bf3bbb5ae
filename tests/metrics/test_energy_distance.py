import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import energy_distance as scipy_energy_distance
from scipy.stats import norm

from fm_jax.metrics import energy_distance

MMD = importlib.import_module("fm_jax.metrics.mmd")  # fm_jax.metrics.mmd as an attribute is the function


def by_double_loop(x, y, unbiased):
    def mean(a, b, distinct):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (distinct and i == j)]
        return np.mean([math.dist(a[i].ravel(), b[j].ravel()) for i, j in pairs])

    return 2 * mean(x, y, False) - mean(x, x, unbiased) - mean(y, y, unbiased)


def test_on_one_axis_equals_scipys_square():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=60), rng.gamma(2.0, size=35)
    value = energy_distance(x, y, unbiased=False)
    np.testing.assert_allclose(value, scipy_energy_distance(x, y) ** 2, rtol=1e-5)


@pytest.mark.parametrize("unbiased", [True, False])
def test_equals_a_double_loop(unbiased):
    """Any event shape, and far from the origin."""
    rng = np.random.default_rng(1)
    x, y = ((rng.normal(size=(n, 2, 3)) + mean).astype(np.float32) for n, mean in ((13, 100), (9, 100.5)))
    np.testing.assert_allclose(energy_distance(x, y, unbiased=unbiased), by_double_loop(x, y, unbiased), atol=2e-6)


def test_in_parts(monkeypatch):
    """Five rows of the matrix at a time, the last ones fewer."""
    monkeypatch.setattr(MMD, "_ENTRIES", 5 * 11 * 2)
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(17, 2)), rng.normal(size=(11, 2)) + 1
    np.testing.assert_allclose(energy_distance(x, y), by_double_loop(x, y, True), rtol=1e-5)


def test_memory_is_not_quadratic():
    sample = jax.ShapeDtypeStruct((20_000, 2), jnp.float32)
    memory = jax.jit(energy_distance).lower(sample, sample).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.2 * 4 * 20_000**2


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_unbiased(shift):
    """The mean over 4,000 pairs of tiny samples is that of the distributions; false alarms: 1 in 16,000.

    Between N(0, 1) and N(s, 1), E|x - y| is the mean of a folded normal with mean s and variance 2.
    """

    def folded(mean, std):
        spread = std * math.sqrt(2 / math.pi) * math.exp(-(mean**2) / (2 * std**2))
        return spread + mean * (1 - 2 * norm.cdf(-mean / std))

    expected = 2 * folded(shift, math.sqrt(2)) - 2 * folded(0.0, math.sqrt(2))
    x = jax.random.normal(jax.random.key(0), (4000, 4, 1))
    y = jax.random.normal(jax.random.key(1), (4000, 5, 1)) + shift

    def z_score(unbiased):
        values = jax.jit(jax.vmap(lambda x, y: energy_distance(x, y, unbiased=unbiased)))(x, y)
        return (values.mean() - expected) / (values.std() / math.sqrt(4000))

    assert abs(z_score(True)) < 4
    assert z_score(False) > 10


def test_differentiable_where_points_coincide():
    """As a loss: the gradient in x is the derivative by differences, also with a point of x in y."""
    x, y = jnp.array([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]), jnp.array([[0.0, 0.0], [3.0, 1.0]])
    gradient = jax.grad(lambda x: energy_distance(x, y, unbiased=False))(x)
    assert np.isfinite(gradient).all()
    x, y, step = np.array([[0.3, 0.1], [1.0, 2.0]]), np.array([[0.0, 0.0], [3.0, 1.0]]), np.array([[1e-5, 0.0], [0, 0]])
    difference = (by_double_loop(x + step, y, True) - by_double_loop(x - step, y, True)) / 2e-5
    np.testing.assert_allclose(jax.grad(lambda x: energy_distance(x, y))(x)[0, 0], difference, rtol=1e-4)


def test_bad_input():
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="at least 2 points in x and y, got 1 and 3"):
        energy_distance(x[:1], x)
    with pytest.raises(ValueError, match="x must be finite, got 6 of 6"):
        energy_distance(x / 0, x)
    with pytest.raises(ValueError, match="same event shape"):
        jax.jit(energy_distance)(x, x[:, :1])
    assert np.isnan(jax.jit(energy_distance)(x / 0, x))
    assert float(energy_distance(x[:1], x, unbiased=False)) == 0
