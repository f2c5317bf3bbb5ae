import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist

from fm_jax.metrics import PolynomialKernel, linear, median_distance, mmd


def by_double_loop(kernel, x, y, unbiased):
    def mean(a, b, distinct):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (distinct and i == j)]
        return np.mean([kernel(a[i].ravel(), b[j].ravel()) for i, j in pairs])

    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


def gaussian(bandwidths):
    return lambda a, b: np.mean([math.exp(-np.square(a - b).sum() / (2 * h**2)) for h in bandwidths])


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    return rng.normal(size=(14, 3, 2)), rng.normal(size=(9, 3, 2)) + 0.5


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("bandwidths", [2.0, (0.5, 1.0, 4.0)])
def test_gaussian_kernels_equal_a_double_loop(samples, bandwidths, unbiased):
    expected = by_double_loop(gaussian(np.atleast_1d(bandwidths)), *samples, unbiased)
    np.testing.assert_allclose(mmd(*samples, bandwidths=bandwidths, unbiased=unbiased), expected, atol=1e-6)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize(
    ("kernel", "formula"),
    [
        (linear, lambda a, b: a @ b),
        (PolynomialKernel(), lambda a, b: (a @ b / 6 + 1) ** 3),
        (PolynomialKernel(2, 0.5), lambda a, b: (a @ b / 6 + 0.5) ** 2),
        (lambda x, y: jnp.tanh(x @ y.T), lambda a, b: math.tanh(a @ b)),
    ],
    ids=["linear", "cubic", "square", "own"],
)
def test_other_kernels_equal_a_double_loop(samples, kernel, formula, unbiased):
    value = mmd(*samples, kernel=kernel, unbiased=unbiased)
    np.testing.assert_allclose(value, by_double_loop(formula, *samples, unbiased), rtol=1e-4, atol=1e-6)


def test_linear_is_the_distance_of_the_means(samples):
    x, y = samples
    expected = np.square(x.mean(axis=0) - y.mean(axis=0)).sum()
    np.testing.assert_allclose(mmd(x, y, kernel=linear, unbiased=False), expected, rtol=1e-5)


def test_the_median_distance(samples):
    pooled = np.concatenate(samples).reshape(23, 6)
    median = np.median(pdist(pooled))
    np.testing.assert_allclose(median_distance(*samples), median, rtol=1e-6)
    np.testing.assert_allclose(mmd(*samples), by_double_loop(gaussian([median]), *samples, True), atol=1e-6)
    np.testing.assert_allclose(jax.jit(mmd)(*samples), mmd(*samples), atol=1e-7)


def test_the_median_distance_of_many():
    """Of 1,200 points every third counts, from one end of a sorted sample to the other."""
    x = np.linspace(0, 1, 1200)
    expected = np.median(pdist(np.append(x[::3], x[:2])[:, None]))
    np.testing.assert_allclose(median_distance(x, x[:2]), expected, rtol=1e-5)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_unbiased(shift):
    """The mean over 4,000 pairs of tiny samples is that of the distributions; false alarms: 1 in 16,000.

    Between N(0, 1) and N(s, 1), E k(x, y) = h / sqrt(h^2 + 2) exp(-s^2 / (2 (h^2 + 2))).
    """
    h = 0.8
    expected = 2 * h / math.sqrt(h**2 + 2) * (1 - math.exp(-(shift**2) / (2 * (h**2 + 2))))
    x = jax.random.normal(jax.random.key(0), (4000, 4, 1))
    y = jax.random.normal(jax.random.key(1), (4000, 5, 1)) + shift

    def z_score(unbiased):
        values = jax.jit(jax.vmap(lambda x, y: mmd(x, y, bandwidths=h, unbiased=unbiased)))(x, y)
        return (values.mean() - expected) / (values.std() / math.sqrt(4000))

    assert abs(z_score(True)) < 4
    assert z_score(False) > 10


def test_products_are_taken_in_full_precision():
    """Accelerators would round float32 to 10 bits or fewer, which the difference of the terms would not survive."""
    x = jnp.ones((3, 2))
    for kernel in (linear, PolynomialKernel()):
        jaxpr = str(jax.make_jaxpr(lambda x, k=kernel: mmd(x, x, kernel=k))(x))
        assert jaxpr.count("dot_general") == jaxpr.count("Precision.HIGHEST, Precision.HIGHEST") > 0


def test_kernels_are_values():
    assert PolynomialKernel(3) == PolynomialKernel(3, 1.0)
    assert hash(PolynomialKernel(3)) == hash(PolynomialKernel())
    with pytest.raises(ValueError, match="degree must be at least 1, got 0"):
        PolynomialKernel(0)
    with pytest.raises(ValueError, match=r"offset must be finite and not negative, got -1.0"):
        PolynomialKernel(2, -1.0)


def test_bad_input(samples):
    with pytest.raises(ValueError, match=r"bandwidths must be positive and finite, got \[1.0, 0.0\]"):
        mmd(*samples, bandwidths=[1.0, 0.0])
    with pytest.raises(ValueError, match=r"bandwidths must be a number or a sequence of numbers, got shape \(0,\)"):
        mmd(*samples, bandwidths=[])
    with pytest.raises(ValueError, match="bandwidths are those of the Gaussian kernel"):
        mmd(*samples, bandwidths=1.0, kernel=linear)
    with pytest.raises(ValueError, match="bandwidths must be positive"):
        mmd(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(ValueError, match="at least 2 points"):
        mmd(samples[0], samples[1][:1])
    with pytest.raises(ValueError, match=r"kernel\(x, y\) must be \[n, m\]"):
        mmd(*samples, kernel=lambda x, y: x[:, None] - y[None])
