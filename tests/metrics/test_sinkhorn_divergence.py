import math
import sys

import numpy as np
import pytest
from scipy.special import logsumexp

from fm_jax.metrics import sinkhorn, sinkhorn_divergence, wasserstein

X = np.random.default_rng(0).normal(size=(12, 2))
Y = np.random.default_rng(1).normal(size=(15, 2)) * [1.5, 0.5] + [1.0, 0.0]


@pytest.fixture(autouse=True)
def _ott():
    pytest.importorskip("ott")


def entropic_cost(x, y, epsilon):
    """OT by 20,000 plain iterations in float64: the cost of the plan plus epsilon KL(plan | product)."""
    n, m = len(x), len(y)
    costs = np.square(x[:, None] - y[None]).sum(-1)
    f, g = np.zeros((n, 1)), np.zeros((1, m))
    for _ in range(20_000):
        f = -epsilon * (logsumexp((g - costs) / epsilon, axis=1, keepdims=True) - np.log(m))
        g_next = -epsilon * (logsumexp((f - costs) / epsilon, axis=0, keepdims=True) - np.log(n))
        g, change = g_next, abs(g_next - g).max()
        if change < 1e-13:
            break
    log_ratio = (f + g - costs) / epsilon
    plan = np.exp(log_ratio) / (n * m)
    return (plan * costs).sum() + epsilon * (plan * log_ratio).sum()


@pytest.mark.slow_but_one
@pytest.mark.parametrize("epsilon", [10.0, 0.3])
def test_equals_plain_iterations(epsilon):
    expected = entropic_cost(X, Y, epsilon) - (entropic_cost(X, X, epsilon) + entropic_cost(Y, Y, epsilon)) / 2
    np.testing.assert_allclose(sinkhorn_divergence(X, Y, epsilon=epsilon), expected, atol=1e-6)


def test_equals_pot():
    """POT has the entropy of the plan where we have its divergence from the product: epsilon log(n m) more."""
    ot = pytest.importorskip("ot")
    epsilon = 0.5

    def cost(x, y):
        a, b, costs = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y)), ot.dist(x, y)
        plan = ot.sinkhorn(a, b, costs, epsilon, method="sinkhorn_log", stopThr=1e-8, numItermax=10_000)
        return (plan * costs).sum() + epsilon * (plan * np.log(plan * len(x) * len(y))).sum()

    expected = cost(X, Y) - (cost(X, X) + cost(Y, Y)) / 2
    np.testing.assert_allclose(sinkhorn_divergence(X, Y, epsilon=epsilon), expected, atol=1e-6)


@pytest.mark.slow
def test_a_point_and_a_pair():
    """{0} and {-a, a}. The plan of the pair with itself stays in place with probability 1 / (1 + e^(-4 a^2 / eps))."""
    a, epsilon = 0.7, 1.3
    stay = 1 / (1 + math.exp(-4 * a**2 / epsilon))
    divergence = stay * math.log(2 * stay) + (1 - stay) * math.log(2 * (1 - stay))
    within = (1 - stay) * 4 * a**2 + epsilon * divergence
    value = sinkhorn_divergence([0.0], [-a, a], epsilon=epsilon)
    np.testing.assert_allclose(value, a**2 - within / 2, atol=1e-6)


@pytest.mark.slow
def test_limits():
    """0 for equal samples; the squared distance of the means for large epsilon; W_2^2 for small."""
    y = np.random.default_rng(2).normal(size=X.shape) + 1.0
    np.testing.assert_allclose(sinkhorn_divergence(X, X[::-1].copy(), epsilon=0.1), 0.0, atol=1e-6)
    means = np.square(X.mean(axis=0) - y.mean(axis=0)).sum()
    np.testing.assert_allclose(sinkhorn_divergence(X, y, epsilon=1e5), means, rtol=1e-3)
    cost = wasserstein(X, y) ** 2
    gaps = [abs(sinkhorn_divergence(X, y, epsilon=e, max_iterations=200_000) - cost) for e in (0.5, 0.05, 0.005)]
    assert gaps[0] > 5 * gaps[1] > 5 * gaps[2]
    assert gaps[2] < 1e-3


def test_not_converged_is_an_error():
    with pytest.raises(RuntimeError, match=r"at epsilon = 0.001 did not reach threshold = 1e-05 in \d+ iterations"):
        sinkhorn_divergence(X, Y, epsilon=1e-3, max_iterations=10)


def test_without_ott(monkeypatch):
    monkeypatch.setitem(sys.modules, "ott.geometry.pointcloud", None)
    sinkhorn._solve.clear_cache()
    with pytest.raises(ImportError, match=r"needs OTT: pip install 'fm_jax\[ot\]'"):
        sinkhorn_divergence(X, Y, epsilon=1.0)


def test_bad_input():
    for name in ("epsilon", "threshold"):
        with pytest.raises(ValueError, match=f"{name} must be positive and finite, got 0"):
            sinkhorn_divergence(X, Y, **{"epsilon": 1.0, name: 0})
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        sinkhorn_divergence(X, Y, epsilon=1.0, max_iterations=0)
    with pytest.raises(ValueError, match="y must be finite, got 30 of 30"):
        sinkhorn_divergence(X, Y * np.nan, epsilon=1.0)
