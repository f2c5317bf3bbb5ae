import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.couplings import ExactOT, independent
from fm_jax.couplings.conditional import ConditionalOT, adaptive_weight

RNG = np.random.default_rng(0)


def squared_distances(x0, x1):
    return np.square(x0.reshape(len(x0), 1, -1) - x1.reshape(1, len(x1), -1)).sum(-1)


def cheapest(costs, allowed=None):
    """The pairing of least cost over all permutations: rows of each column."""
    columns = np.arange(len(costs))
    permutations = [np.array(each) for each in itertools.permutations(columns)]
    if allowed is not None:
        permutations = [each for each in permutations if allowed[each, columns].all()]
    return min(permutations, key=lambda rows: costs[rows, columns].sum())


def test_equals_brute_force():
    for weight in (0.0, 0.3, 3.0):
        x0, x1, cond = (RNG.normal(size=shape) for shape in ((6, 2), (6, 2), (6, 3)))
        costs = squared_distances(x0, x1) + weight * squared_distances(cond, cond)
        np.testing.assert_array_equal(ConditionalOT(weight)(None, x0, x1, cond).index0, cheapest(costs))


def test_several_conditions_at_once():
    """Labels of any shape must be equal, all else should be near, whatever the tree."""
    for _ in range(5):
        x0, x1, where = (RNG.normal(size=shape) for shape in ((7, 2), (7, 2), (7, 2, 2)))
        label, flags, when = RNG.integers(0, 2, 7), RNG.integers(0, 2, (7, 2)).astype(bool), RNG.normal(size=7)
        cond = {"label": label, "more": (flags, where, when)}
        costs = squared_distances(x0, x1) + 0.2 * (squared_distances(where, where) + squared_distances(when, when))
        discrete = np.concatenate([label[:, None], flags], axis=1)
        allowed = (discrete[:, None] == discrete[None]).all(-1)
        np.testing.assert_array_equal(ConditionalOT(0.2)(None, x0, x1, cond).index0, cheapest(costs, allowed))
        within = np.where(allowed, squared_distances(where, where) + squared_distances(when, when), np.inf)
        weight = adaptive_weight(squared_distances(x0, x1), within, 0.5)
        found, expected = (ConditionalOT(w, ratio=0.5)(None, x0, x1, cond) for w in (None, weight))
        np.testing.assert_array_equal(found.index0, expected.index0)


def skew_and_cost(coupling):
    """The correlation of x0 with cond, and the mean cost, for x1 = (3 cond, 0) + noise: 20 batches of 128."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(20):
        cond = rng.normal(size=(128, 1))
        x1 = np.concatenate([3 * cond, np.zeros_like(cond)], axis=1) + 0.5 * rng.normal(size=(128, 2))
        pairing = coupling(None, rng.normal(size=(128, 2)), x1, cond)
        found.append((cond[:, 0], pairing.x0[:, 0], np.square(pairing.x0 - x1).sum(-1)))
    cond, x0, cost = map(np.concatenate, zip(*found))
    return abs(np.corrcoef(cond, x0)[0, 1]), cost.mean()


def test_the_source_stays_independent_of_a_continuous_condition():
    """Plain transport skews the source almost fully.

    Of independent pairs the correlation has a standard deviation of 1 / sqrt(2560) = 0.02, so 0.1 is 5 of them. Within
    each condition, transport costs E|3 cond|^2 + |1 - 0.5|^2 + |1 - 0.5|^2 = 9.5, and no pairing that is not skewed
    costs less; independent pairs cost 9 + 2 (1 + 0.25) = 11.5.
    """
    skew, cost = skew_and_cost(ConditionalOT())
    plain_skew, plain_cost = skew_and_cost(ExactOT(ignore_cond=True))
    _, free_cost = skew_and_cost(independent)
    assert plain_skew > 0.9
    assert plain_cost < 5.5
    assert skew < 0.1
    assert cost < free_cost - 1.0  # half of what there is to gain, and more
    skews = [skew_and_cost(ConditionalOT(weight))[0] for weight in (1.0, 10.0, 100.0)]
    assert skews == sorted(skews, reverse=True)


def test_limits_of_weight_and_ratio():
    x0, x1, cond = RNG.normal(size=(30, 2)), RNG.normal(size=(30, 2)), RNG.normal(size=(30, 2))
    free = ExactOT(ignore_cond=True)(None, x0, x1, cond).index0
    for coupling in (ConditionalOT(0.0), ConditionalOT(ratio=1.0)):
        np.testing.assert_array_equal(coupling(None, x0, x1, cond).index0, free)
    np.testing.assert_array_equal(ConditionalOT()(None, x0, x1).index0, free)
    for coupling in (ConditionalOT(1e9), ConditionalOT(math.inf), ConditionalOT(ratio=1e-3)):
        np.testing.assert_array_equal(coupling(None, x0, x1, cond).index0, np.arange(30))


@pytest.mark.parametrize("weight", [0.0, None, math.inf])
def test_labels_are_kept_whatever_the_weight(weight):
    x0, x1, labels = RNG.normal(size=(120, 2)), RNG.normal(size=(120, 2)), RNG.integers(0, 3, (120, 2))
    expected = ExactOT()(None, x0, x1, labels[:, 0] * 3 + labels[:, 1]).index0
    np.testing.assert_array_equal(ConditionalOT(weight)(None, x0, x1, labels).index0, expected)
    expected = ExactOT()(None, x0, x1, labels[:, 0]).index0
    np.testing.assert_array_equal(ConditionalOT(weight)(None, x0, x1, labels[:, 0]).index0, expected)


@pytest.mark.parametrize("coupling", [ConditionalOT(math.inf), ConditionalOT(1e6), ConditionalOT(ratio=0.01)])
def test_equal_embeddings_are_classes(coupling):
    """Continuous conditions that repeat, as the embeddings of classes do: rounding must not tell them apart."""
    x0, x1 = RNG.normal(size=(60, 2)), RNG.normal(size=(60, 2))
    labels = np.arange(60) % 3
    embeddings = (100 + RNG.normal(size=(3, 64))).astype(np.float32)[labels]
    expected = ExactOT()(None, x0, x1, labels).index0
    np.testing.assert_array_equal(coupling(None, x0, x1, embeddings).index0, expected)


def cosine_distance(cond0, cond1):
    unit0, unit1 = (x / (x**2).sum(axis=1, keepdims=True) ** 0.5 for x in (cond0, cond1))
    return 1 - unit0 @ unit1.T


def test_any_cost_of_conditions():
    x0, x1, cond = (RNG.normal(size=(7, 3)).astype(np.float32) for _ in range(3))
    expected = cheapest(squared_distances(x0, x1) + 5 * cosine_distance(cond, cond))
    coupling = ConditionalOT(5.0, condition_cost=cosine_distance)
    for call in (coupling, jax.jit(coupling)):
        np.testing.assert_array_equal(call(None, x0, x1, cond).index0, expected)
    apart = ConditionalOT(math.inf, condition_cost=lambda a, b: np.abs(a[:, None] - b[None]).clip(1) - 1.0)
    labels = np.array([0, 1, 2, 9, 9, 8, 7])
    allowed = np.abs(labels[:, None] - labels[None]) <= 1  # nothing that only a chain of neighbours connects
    np.testing.assert_array_equal(apart(None, x0, x1, labels).index0, cheapest(squared_distances(x0, x1), allowed))


@pytest.mark.parametrize("distinct", [40, 8])
@pytest.mark.parametrize("ratio", [0.03, 0.05, 0.1, 0.2, 0.4])
def test_the_adaptive_weight_is_where_the_share_of_pairs_passes_the_ratio(ratio, distinct):
    """Against bisection on the definition."""
    x0, x1, cond = RNG.normal(size=(40, 2)), RNG.normal(size=(40, 2)), RNG.normal(size=(distinct, 1))
    cond = cond[np.arange(40) % distinct]
    costs, changes = squared_distances(x0, x1), squared_distances(cond, cond)
    share = lambda w: (costs + w * changes <= np.diagonal(costs)[None, :]).mean()  # noqa: E731
    low, high = 0.0, 1e9
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) >= ratio else (low, middle)
    expected = math.inf if share(1e12) >= ratio else low
    np.testing.assert_allclose(adaptive_weight(costs, changes, ratio), expected, rtol=1e-6)


def test_numpy_jax_and_jit_agree():
    x0, x1 = (RNG.normal(size=(24, 2)).astype(np.float32) for _ in range(2))
    cond = {"a": RNG.normal(size=(24, 2)).astype(np.float32), "b": np.arange(24) % 2}
    host = ConditionalOT(ratio=0.2)(None, x0, x1, cond)
    assert isinstance(host.index0, np.ndarray)
    for call in (ConditionalOT(ratio=0.2), jax.jit(ConditionalOT(ratio=0.2))):
        found = call(None, *jax.tree.map(jnp.asarray, (x0, x1, cond)))
        jax.tree.map(np.testing.assert_array_equal, found, host)
    assert jax.jit(ConditionalOT())(None, x0, x1, cond["a"].astype(jnp.bfloat16)).index0.shape == (24,)


def test_bad_input():
    x0, x1, cond = (RNG.normal(size=(4, 2)) for _ in range(3))
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"weight must be in \[0, inf\], got {weight}"):
            ConditionalOT(weight)
    for ratio in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"ratio must be in \(0, 1\], got {ratio}"):
            ConditionalOT(ratio=ratio)
    with pytest.raises(ValueError, match=r"\[batch, ...\] with batch = 4, got float64 \(3, 2\)\."):
        ConditionalOT()(None, x0, x1, cond[:3])
    with pytest.raises(ValueError, match=r"batch = 4, got int64 \(5,\) in 'b.0'\."):
        ConditionalOT()(None, x0, x1, {"a": cond, "b": [np.arange(5)]})
    with pytest.raises(ValueError, match=r"real numbers .* got complex64"):
        ConditionalOT()(None, x0, x1, cond.astype(np.complex64))
    broken = np.where(np.arange(4)[:, None] == 2, np.nan, cond)
    for each in (broken, jnp.asarray(broken)):
        with pytest.raises(ValueError, match="conditions must be finite, got 1 of 4"):
            ConditionalOT()(None, x0, x1, each)
    with pytest.raises(jax.errors.JaxRuntimeError, match="conditions must be finite, got 1 of 4"):
        jax.jit(ConditionalOT())(None, x0, x1, broken).x0.block_until_ready()
    with pytest.raises(ValueError, match=r"condition_cost must return \(4, 4\), got shape \(4,\)"):
        ConditionalOT(condition_cost=lambda a, b: a[:, 0])(None, x0, x1, cond)
    with pytest.raises(ValueError, match=r"not be negative, and 0 for a condition with itself, .* -1 and -1 on"):
        ConditionalOT(condition_cost=lambda a, b: -np.eye(4))(None, x0, x1, cond)
