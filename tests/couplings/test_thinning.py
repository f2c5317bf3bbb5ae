"""Dense plans made sparse: sums exact, few entries, none that was not there, and the mean that of the plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import optimised
from scipy.stats import chi2

from fm_jax.couplings.permutations import sample_permutation
from fm_jax.couplings.thinning import thin

TOTAL = 2**12


def plan(n, seed, sharpness=1.0):
    """Integers whose rows and columns sum to TOTAL: a mean of permutations, with some entries 0."""
    rng = np.random.default_rng(seed)
    shares = rng.multinomial(TOTAL, rng.dirichlet(np.full(4 * n, 1 / sharpness)))
    found = np.zeros((n, n), np.int32)
    for share in shares:
        found[rng.permutation(n), np.arange(n)] += share
    return found


def dense(edges, n):
    edge, count, by_column = map(np.asarray, edges)
    row, column = np.divmod(edge, n)
    assert (np.diff(row) >= 0).all()
    assert (np.diff(column[by_column]) >= 0).all()
    np.testing.assert_array_equal(np.sort(by_column), np.arange(len(edge)))
    found = np.zeros((n, n), np.int64)
    np.add.at(found, (row, column), count)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 8, 37, 100])
def test_sums_stay_and_few_entries_are_left(n):
    units = plan(n, n)
    edges = jax.jit(thin)(jax.random.key(n), jnp.asarray(units))
    found = dense(edges, n)
    for axis in (0, 1):
        np.testing.assert_array_equal(found.sum(axis), TOTAL)
    assert (np.asarray(edges.multiplicity) >= 0).all()
    assert (found[units == 0] == 0).all()
    assert (found > 0).sum() <= len(edges.edge) <= 2 * (n + 1) ** 1.5


def test_a_column_has_one_entry_in_a_group_but_for_what_is_left_over():
    """32 points in groups of 8: of two groups that are joined, at most one column of every pair of holders is left."""
    edges = jax.jit(thin)(jax.random.key(0), jnp.asarray(plan(32, 5, 20.0)))
    used = dense(edges, 32) > 0
    left_over = sum(32 // (2 * size) * size**2 for size in (1, 2, 4))
    assert len(edges.edge) == 32 * 4 + left_over
    in_groups = used.reshape(4, 8, 32).sum(1)
    assert (in_groups - 1).clip(0).sum() <= left_over
    assert used.sum() > 32 * 4  # some are, or this tries nothing


@pytest.fixture(scope="module")
def draw():
    """Edges and multiplicities of many draws."""
    return jax.jit(lambda keys, units: jax.vmap(lambda key: thin(key, units))(keys)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("sharpness", [1.0, 20.0])
def test_the_mean_is_the_plan(draw, sharpness):
    """4,000 draws of 20 points, groups of 4: z-scores of 400 entries, the worst above 5 in one of 4,000 runs."""
    n, num = 20, 4000
    units = plan(n, 1, sharpness)
    keys = jax.random.split(jax.random.key(2), num)
    edge, count = draw(keys, jnp.asarray(units))
    draws = np.zeros((num, n * n))
    np.add.at(draws, (np.arange(num)[:, None], np.asarray(edge)), np.asarray(count))
    mean, std, units = draws.mean(0), draws.std(0), units.reshape(-1)
    moves = std > 0
    np.testing.assert_array_equal(mean[~moves], units[~moves])
    z = (mean - units)[moves] / std[moves] * np.sqrt(num)
    assert np.abs(z).max() < 5
    assert 0.8 < z.std() < 1.2  # it is spread as it should be: the draws do differ
    assert moves.sum() > 0.9 * (units > 0).sum()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 3])
def test_large_plans_are_drawn_as_they_say(dim):
    """400 permutations of 300 points, all of them permutations.

    Chi-square of how often 10 sorted groups of rows meet 10 groups of columns, each of the 100 numbers with its own
    standard deviation over the draws, in the tail of 1e-4.
    """
    n, num, groups = 300, 400, 10
    rng = np.random.default_rng(3)
    x0, x1 = rng.normal(size=(2, n, dim))
    kernel = np.exp(-((x0[:, None] - x1[None]) ** 2).sum(-1))
    for _ in range(2000):
        kernel /= kernel.sum(1, keepdims=True)
        kernel /= kernel.sum(0, keepdims=True)
    keys = jax.random.split(jax.random.key(4), num)
    draw = optimised(lambda keys: jax.lax.map(lambda key: sample_permutation(key, jnp.asarray(kernel)), keys))
    index0 = np.asarray(draw(keys))
    np.testing.assert_array_equal(np.sort(index0, axis=1), np.broadcast_to(np.arange(n), index0.shape))
    rank0, rank1 = (np.argsort(np.argsort(x[:, 0])) * groups // n for x in (x0, x1))
    met = np.zeros((num, groups, groups))
    np.add.at(met, (np.arange(num)[:, None], rank0[index0], rank1[None]), 1)
    expected = np.zeros((groups, groups))
    np.add.at(expected, (rank0[:, None], rank1[None]), kernel)
    z = (met.mean(0) - expected) / (met.std(0) + 1e-2) * np.sqrt(num)
    assert (z**2).sum() < chi2.isf(1e-4, groups**2)
    assert np.abs(z).max() < 4.9
