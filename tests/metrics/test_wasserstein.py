import sys

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.stats import wasserstein_distance

from fm_jax.metrics import wasserstein


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def by_linear_programming(x, y, p):
    """The transport problem written out as a linear programme, solved by HiGHS."""
    n, m = len(x), len(y)
    costs = np.linalg.norm(x[:, None] - y[None], axis=-1) ** p
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    marginals = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    result = linprog(costs.ravel(), A_eq=np.vstack([rows, columns]), b_eq=marginals)
    assert result.status == 0
    return result.fun ** (1 / p)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (37, 23), (1, 9)])
def test_w1_on_one_axis_equals_scipys(rng, n, m):
    x, y = rng.normal(size=n), rng.gamma(2.0, size=m)
    np.testing.assert_allclose(wasserstein(x, y, p=1), wasserstein_distance(x, y), rtol=1e-12)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_one_axis_equals_a_linear_programme(rng, p):
    x, y = rng.normal(size=(9, 1)), rng.gamma(2.0, size=(6, 1))
    np.testing.assert_allclose(wasserstein(x, y, p=p), by_linear_programming(x, y, p), rtol=1e-8)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(("n", "m"), [(20, 20), (15, 10), (3, 7)])
def test_the_plane_equals_a_linear_programme(rng, n, m, p):
    """Of equal size, and of unequal size by repetition."""
    x, y = rng.normal(size=(n, 2)), rng.normal(size=(m, 2)) + 0.5
    np.testing.assert_allclose(wasserstein(x, y, p=p), by_linear_programming(x, y, p), rtol=1e-8)


@pytest.mark.parametrize("p", [1, 2])
def test_sizes_without_a_small_common_multiple(rng, p):
    pytest.importorskip("ot")
    x, y = rng.normal(size=(47, 2)), rng.normal(size=(45, 2)) + 0.5
    np.testing.assert_allclose(wasserstein(x, y, p=p), by_linear_programming(x, y, p), rtol=1e-8)


@pytest.mark.parametrize("p", [1, 2])
def test_equals_pot(rng, p):
    """At a size where the assignment starts from potentials."""
    ot = pytest.importorskip("ot")
    x, y = rng.normal(size=(300, 5)), rng.normal(size=(300, 5)) + 0.2
    costs = ot.dist(x, y, metric="sqeuclidean" if p == 2 else "euclidean")
    np.testing.assert_allclose(wasserstein(x, y, p=p), ot.emd2([], [], costs) ** (1 / p), rtol=1e-8)


@pytest.mark.parametrize("p", [1, 2, 2.5])
def test_a_shift_costs_its_length(rng, p):
    """Whatever the order, the event shape and the dtype; a shift by 3 in each of 12 entries is as long as sqrt(108)."""
    x = rng.normal(size=(50, 2, 2, 3)).astype(np.float32)
    y = rng.permutation(x + np.float32(3))
    np.testing.assert_allclose(wasserstein(x, y, p=p), np.sqrt(108), rtol=1e-6)
    assert wasserstein(x, rng.permutation(x), p=p) == 0


def test_between_gaussians(rng):
    """N(0, I) and N((3, 0), 4 I): W_2^2 = |m|^2 + sum (s - 1)^2 = 11 (Bures).

    Over 20 seeds at n = 600 the distance was 3.32 with a standard deviation of 0.07: five of them are allowed.
    """
    x, y = rng.normal(size=(600, 2)), 2 * rng.normal(size=(600, 2)) + [3, 0]
    np.testing.assert_allclose(wasserstein(x, y), np.sqrt(11), atol=0.35)


def test_without_pot(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    assert wasserstein(rng.normal(size=(10, 2)), rng.normal(size=(15, 2))) > 0
    with pytest.raises(ImportError, match=r"47 and 45 points needs POT: pip install 'fm_jax\[ot\]'"):
        wasserstein(rng.normal(size=(47, 2)), rng.normal(size=(45, 2)))


def test_an_iteration_limit_is_an_error(rng, monkeypatch):
    ot = pytest.importorskip("ot")
    monkeypatch.setattr(ot, "emd", lambda a, b, costs, **_: (costs, {"warning": "numItermax reached"}))
    with pytest.raises(RuntimeError, match=r"did not reach the optimal plan .* numItermax reached"):
        wasserstein(rng.normal(size=(47, 2)), rng.normal(size=(45, 2)))


def test_bad_input():
    x = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"same event shape, got \(3, 2\) and \(3, 1\)"):
        wasserstein(x, np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"same event shape, got \(\) and \(3,\)"):
        wasserstein(np.float64(1.0), np.zeros(3))
    with pytest.raises(ValueError, match=r"y must not be empty, got shape \(0, 2\)"):
        wasserstein(x, np.zeros((0, 2)))
    with pytest.raises(ValueError, match="x must be finite, got 1 of 6 entries that are not"):
        wasserstein(np.where(np.arange(6) == 4, np.nan, 0.0).reshape(3, 2), x)
    with pytest.raises(ValueError, match=r"y must be an array \[n, ...\] of real numbers, got complex128"):
        wasserstein(x, x + 1j)
    with pytest.raises(ValueError, match=r"p must be in \[1, inf\), got 0.5"):
        wasserstein(x, x, p=0.5)
