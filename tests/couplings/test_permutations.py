"""Permutations drawn from a plan: always permutations, and their pairs as frequent as the plan says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from fm_jax.couplings import permutations
from fm_jax.couplings.permutations import sample_permutation

DRAWS = 8_000


@pytest.fixture(scope="module")
def draw():
    """8,000 permutations of a plan."""
    keys = jax.random.split(jax.random.key(1), DRAWS)
    compiled = jax.jit(lambda plan: jax.vmap(lambda key: sample_permutation(key, plan))(keys))
    return lambda plan: np.asarray(compiled(jnp.asarray(plan, jnp.float32)))


def doubly_stochastic(n, seed, sharpness=1.0):
    kernel = np.exp(sharpness * np.random.default_rng(seed).normal(size=(n, n)))
    for _ in range(500):
        kernel /= kernel.sum(1, keepdims=True)
        kernel /= kernel.sum(0, keepdims=True)
    return kernel


def frequencies(index0):
    n = index0.shape[1]
    return np.stack([np.bincount(column, minlength=n) for column in index0.T], axis=1) / len(index0)


BLOCKS = np.zeros((8, 8))
BLOCKS[:3, :3], BLOCKS[3:, 3:] = 1 / 3, doubly_stochastic(5, 4)
PLANS = {
    "dense": doubly_stochastic(8, 0),
    "sharp": doubly_stochastic(8, 1, sharpness=3.0),
    "uniform": np.full((8, 8), 1 / 8),
    "blocks": BLOCKS,
    "permuted_blocks": BLOCKS[:, [3, 0, 4, 1, 5, 2, 7, 6]],
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_pairs_are_as_frequent_as_the_plan_says(draw, plan):
    """Pearson's chi-square of every row, of which the worst of 8 is in the tail of 1e-4 in one of 1,250 runs."""
    index0 = draw(plan)
    np.testing.assert_array_equal(np.sort(index0, axis=1), np.broadcast_to(np.arange(8), index0.shape))
    seen, possible = frequencies(index0), plan > 1e-9
    expected = np.where(possible, plan, 1)
    assert seen[~possible].sum() * DRAWS <= 5  # the units that make the sums exact: some 8 sqrt(8) 2^-20 a draw
    statistic = (np.where(possible, (seen - plan) ** 2, 0) / expected).sum(1) * DRAWS
    freedom = possible.sum(1) - 1
    assert (statistic <= chi2.isf(1e-4, freedom)).all(), statistic / freedom


@pytest.mark.slow
def test_without_empty_edges_it_is_the_same(monkeypatch):
    """Dropping empty edges, as larger plans do, changes no permutation."""
    plan, keys = jnp.asarray(PLANS["sharp"], jnp.float32), jax.random.split(jax.random.key(6), 100)
    draw = lambda: jax.vmap(lambda key: permutations._sample.__wrapped__(key, plan, 20))(keys)  # noqa: E731
    kept = draw()
    monkeypatch.setattr(permutations, "_SMALL", 0)
    np.testing.assert_array_equal(draw(), kept)


@pytest.mark.slow
def test_drawing_with_a_bias_would_be_seen(draw):
    """A third of the mass moved along one cycle of four is far outside what the test above admits: 104 of 30."""
    plan = doubly_stochastic(8, 0)
    moved = plan.copy()
    shift = min(plan[0, 0], plan[1, 1]) / 3
    moved[[0, 1], [0, 1]] -= shift
    moved[[0, 1], [1, 0]] += shift
    statistic = ((frequencies(draw(moved)) - plan) ** 2 / plan).sum(1) * DRAWS
    assert statistic[:2].max() > chi2.isf(1e-4, 7)


@pytest.mark.slow
def test_blocks_are_never_left(draw):
    index0 = draw(BLOCKS)
    assert (index0[:, :3] < 3).all()
    assert (index0[:, 3:] >= 3).all()


@pytest.mark.slow
def test_a_permutation_is_returned_as_it_is(draw):
    order = np.random.default_rng(2).permutation(8)
    plan = np.zeros((8, 8))
    plan[order, np.arange(8)] = 1
    assert (draw(plan) == order).all()


@pytest.mark.slow
def test_pairs_of_pairs_are_random_too(draw):
    """Of the 24 permutations of 4, drawn from the uniform plan, no few make up the sample."""
    found, times = np.unique(draw(np.kron(np.eye(2), np.full((4, 4), 1 / 4)))[:, :4], axis=0, return_counts=True)
    assert len(found) == 24
    assert times.min() > DRAWS / 24 / 4


@pytest.mark.slow
@pytest.mark.parametrize(("n", "bits"), [(1, 20), (37, 12), (70, 7)])
def test_sizes_and_precisions(n, bits):
    index0 = sample_permutation(jax.random.key(3), jnp.asarray(doubly_stochastic(n, n)), bits=bits)
    np.testing.assert_array_equal(np.sort(index0), np.arange(n))


def test_one_bit_is_unbiased():
    """The coarsest rounding, to halves, still has the right mean: 4,000 draws, 5 standard deviations, 1 in 100,000."""
    plan = jnp.array([[0.7, 0.3], [0.3, 0.7]])
    keys = jax.random.split(jax.random.key(4), 4000)
    same = jax.vmap(lambda key: sample_permutation(key, plan, bits=1))(keys)[:, 0] == 0
    assert abs(same.mean() - 0.7) < 5 * np.sqrt(0.21 / 4000)


@pytest.mark.slow
def test_sums_that_are_a_little_off_are_evened_out(draw):
    plan = doubly_stochastic(8, 5)
    skewed = plan * np.linspace(0.99, 1.01, 8)
    index0 = draw(skewed)
    np.testing.assert_array_equal(np.sort(index0, axis=1), np.broadcast_to(np.arange(8), index0.shape))
    assert np.abs(frequencies(index0) - plan).max() < 0.01 + 5 * np.sqrt(0.25 / DRAWS)


def test_integers_have_the_sums_of_a_plan():
    """In every one of 5,000 roundings; at 20 bits single precision has few digits left behind the point."""
    to_integers = jax.jit(jax.vmap(lambda key: permutations._to_integers(key, jnp.full((3, 3), 1 / 3), 20)))
    units = np.asarray(to_integers(jax.random.split(jax.random.key(2), 5000)))
    assert (units >= 0).all()
    for axis in (1, 2):
        np.testing.assert_array_equal(units.sum(axis=axis), 2**20)


def test_one_trace():
    traces = []

    @jax.jit
    def pair(key, plan):
        traces.append(None)
        return sample_permutation(key, plan)

    for seed in range(3):
        pair(jax.random.key(seed), jnp.asarray(doubly_stochastic(5, seed)))
    assert len(traces) == 1


def test_bad_input(key):
    with pytest.raises(ValueError, match="bits must be from 1 to 24, got 0"):
        sample_permutation(key, jnp.eye(3), bits=0)
    with pytest.raises(ValueError, match=r"plan must be \[n, n\], got shape \(2, 3\)"):
        sample_permutation(key, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="sum to 1, got sums that are off by"):
        sample_permutation(key, jnp.eye(3) / 3)
    with pytest.raises(ValueError, match="finite and not negative"):
        sample_permutation(key, jnp.eye(3) * jnp.nan)
    with pytest.raises(ValueError, match="finite and not negative"):
        sample_permutation(key, jnp.array([[1.5, -0.5], [-0.5, 1.5]]))
