import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import COUPLINGS
from scipy.optimize import linear_sum_assignment

from fm_jax.couplings import minibatch_ot


@pytest.fixture
def batch(key):
    key0, key1, key2 = jax.random.split(key, 3)
    return (
        jax.random.normal(key0, (32, 3, 2)),
        jax.random.normal(key1, (32, 3, 2)),
        jax.random.randint(key2, (32,), 0, 3),
    )


@pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
@pytest.mark.parametrize("labelled", [False, True])
def test_a_permutation_that_leaves_data_in_place(coupling, labelled, batch):
    """Both marginals are kept: nothing dropped, nothing repeated, and the indices say who went where."""
    x0, x1, cond = batch
    cond = cond if labelled else None
    pairing = jax.jit(coupling)(None, x0, x1, cond)
    np.testing.assert_array_equal(np.sort(pairing.index0), np.arange(32))
    np.testing.assert_array_equal(pairing.x0, x0[pairing.index0])
    np.testing.assert_array_equal(pairing.x1, x1)
    if labelled:
        np.testing.assert_array_equal(pairing.cond, cond)


def cost(x0, x1):
    return np.square(x0.reshape(len(x0), 1, -1) - x1.reshape(1, len(x1), -1)).sum(-1)


def test_equals_scipys_assignment(batch):
    x0, x1, _ = map(np.asarray, batch)
    _, expected = linear_sum_assignment(cost(x0, x1).T)
    np.testing.assert_array_equal(minibatch_ot(None, *batch[:2]).index0, expected)


def test_optimal_within_each_class(batch):
    """The source of a class stays what it was: each class permutes its own source samples, optimally."""
    x0, x1, cond = batch
    index0 = np.asarray(minibatch_ot(None, x0, x1, cond).index0)
    np.testing.assert_array_equal(cond[index0], cond)
    for label in range(3):
        rows = np.flatnonzero(cond == label)
        c = cost(np.asarray(x0)[rows], np.asarray(x1)[rows])
        best = c[linear_sum_assignment(c)].sum()
        paired = np.square(np.asarray(x0)[index0[rows]] - np.asarray(x1)[rows]).sum()
        np.testing.assert_allclose(paired, best, rtol=1e-5)


def test_inside_pmap(batch):
    """Each device solves its own batch."""
    x0, x1, _ = batch
    split = lambda x: x.reshape(4, 8, *x.shape[1:])  # noqa: E731
    index0 = jax.pmap(lambda a, b: minibatch_ot(None, a, b).index0)(split(x0), split(x1))
    for device in range(4):
        np.testing.assert_array_equal(index0[device], minibatch_ot(None, split(x0)[device], split(x1)[device]).index0)


def test_bad_input(batch):
    x0, x1, _ = batch
    with pytest.raises(ValueError, match="x0 and x1 must have the same shape"):
        minibatch_ot(None, x0[:4], x1)
    with pytest.raises(ValueError, match=r"integer labels \[batch\] = \(32,\) as cond, got float32"):
        minibatch_ot(None, x0, x1, jnp.ones(32))
