import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.couplings import ExactOT
from fm_jax.couplings.partial import PartialOT, assign_part


def draw(seed, n, dim=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)).astype(np.float32), rng.normal(size=(n, dim)).astype(np.float32) + 1


def squared_distances(x0, x1):
    return np.square(x0[:, None] - x1[None]).sum(-1)


def cheapest(costs, k):
    """Over all choices of k rows and all ways to send them to k columns."""
    rows = itertools.combinations(range(len(costs)), k)
    columns = list(itertools.permutations(range(len(costs)), k))
    return min(costs[list(each), list(to)].sum() for each in rows for to in columns)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_equals_brute_force(k):
    for seed in range(10):
        costs = np.random.default_rng(seed).normal(size=(5, 5))  # negative costs too
        columns, transported = assign_part(costs, k)
        assert sorted(columns) == list(range(5))
        assert transported.sum() == k
        np.testing.assert_allclose(costs[np.arange(5), columns][transported].sum(), cheapest(costs, k), rtol=1e-12)


def test_equal_costs_still_give_as_many_pairs_as_asked_for():
    for costs in (np.zeros((6, 6)), np.full((6, 6), 3.0), np.repeat([[0.0], [1.0]], 3, axis=0) * np.ones((1, 6))):
        assert assign_part(costs, 4)[1].sum() == 4


@pytest.mark.parametrize(("n", "mass"), [(40, 0.3), (40, 0.9), (200, 0.1), (200, 0.7), (200, 0.95)])
def test_costs_what_partial_wasserstein_does_in_pot(n, mass):
    """200 is beyond the size from which the solver is started from potentials."""
    ot = pytest.importorskip("ot")
    x0, x1 = (x.astype(np.float64) for x in draw(n, n))
    uniform, costs = np.full(n, 1 / n), squared_distances(x0, x1)
    expected = ot.partial.partial_wasserstein2(uniform, uniform, costs, m=round(mass * n) / n)
    pairing = PartialOT(mass)(None, x0, x1)
    used = pairing.weight > 0
    found = np.square(pairing.x0 - pairing.x1).sum(-1)[used].sum() / n
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_outliers_on_both_sides_count_for_nothing():
    x0, x1 = draw(0, 20)
    x0[[3, 7]] += 100
    x1[[5, 11]] -= 100
    pairing = PartialOT(0.9)(None, x0, x1)
    np.testing.assert_array_equal(np.flatnonzero(pairing.weight == 0), [5, 11])
    np.testing.assert_array_equal(np.sort(pairing.index0[[5, 11]]), [3, 7])
    np.testing.assert_allclose(pairing.weight[pairing.weight > 0], 20 / 18)
    np.testing.assert_array_equal(pairing.x0, x0[pairing.index0])


def test_all_of_the_mass_is_exact_transport():
    x0, x1 = draw(1, 120)
    labels = np.random.default_rng(2).integers(0, 3, 120)
    for cond in (None, labels):
        found = PartialOT(1.0)(None, x0, x1, cond)
        np.testing.assert_array_equal(found.index0, ExactOT()(None, x0, x1, cond).index0)
        np.testing.assert_array_equal(found.weight, np.ones(120))


def test_every_class_transports_its_share_and_keeps_its_weight():
    x0, x1 = draw(3, 13)
    labels = np.array([0] * 8 + [1] * 4 + [2])
    x1[labels == 1] += 50  # a far class is not what is left out
    pairing = PartialOT(0.5)(None, x0, x1, labels)
    np.testing.assert_array_equal(labels[pairing.index0], labels)
    assert [int((pairing.weight[labels == each] > 0).sum()) for each in range(3)] == [4, 2, 1]
    np.testing.assert_allclose([pairing.weight[labels == each].sum() for each in range(3)], [8, 4, 1])
    for each in range(2):
        rows = np.flatnonzero(labels == each)
        paid = np.square(pairing.x0 - x1).sum(-1)[rows][pairing.weight[rows] > 0].sum()
        assert paid <= squared_distances(x0[rows], x1[rows]).diagonal()[: len(rows) // 2].sum()
    free = PartialOT(0.5, ignore_cond=True)(None, x0, x1, labels)
    assert (free.weight[labels == 1] == 0).all()


def test_numpy_jax_and_jit_agree():
    x0, x1 = draw(4, 24)
    labels = np.arange(24) % 2
    host = PartialOT(0.75)(None, x0, x1, labels)
    assert all(isinstance(each, np.ndarray) for each in host)
    for call in (PartialOT(0.75), jax.jit(PartialOT(0.75))):
        found = call(None, jnp.asarray(x0), jnp.asarray(x1), jnp.asarray(labels))
        assert all(isinstance(each, jax.Array) for each in found)
        jax.tree.map(np.testing.assert_array_equal, found, host)


def test_bad_input():
    x0, x1 = draw(5, 4)
    for mass in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"mass must be in \(0, 1\], got {mass}"):
            PartialOT(mass)
    with pytest.raises(ValueError, match="same shape"):
        PartialOT(0.5)(None, x0[:3], x1)
    with pytest.raises(ValueError, match=r"integer labels \[batch\]"):
        PartialOT(0.5)(None, x0, x1, np.ones(4))
    with pytest.raises(ValueError, match="costs must be finite, got 4 of 16"):
        PartialOT(0.5, cost=squared_distances)(None, x0, np.where(np.arange(4)[:, None] == 1, np.nan, x1))
