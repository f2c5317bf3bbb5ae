import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fm_jax.couplings import ExactOT, anti_ot, euclidean, minibatch_ot, squared_euclidean
from fm_jax.couplings.exact import assign, extend_potentials, row_potentials


@pytest.fixture
def batch(key):
    key0, key1, key2 = jax.random.split(key, 3)
    return (
        jax.random.normal(key0, (32, 3, 2)),
        jax.random.normal(key1, (32, 3, 2)),
        jax.random.randint(key2, (32,), 0, 3),
    )


def cost(x0, x1):
    return np.square(x0.reshape(len(x0), 1, -1) - x1.reshape(1, len(x1), -1)).sum(-1)


def test_equals_scipys_assignment(batch):
    x0, x1, _ = map(np.asarray, batch)
    _, expected = linear_sum_assignment(cost(x0, x1).T)
    np.testing.assert_array_equal(minibatch_ot(None, *batch[:2]).index0, expected)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("num", [2, 97, 130, 600])
@pytest.mark.parametrize("dim", [1, 2, 50])
def test_potentials_of_a_part_leave_the_optimum_as_it_is(num, dim):
    """From 97 points on the search starts from potentials of a quarter; the total cost is scipy's to rounding."""
    rng = np.random.default_rng(num)
    costs = cost(rng.standard_normal((num, dim)), rng.standard_normal((num, dim)) + 2)
    rows, columns = linear_sum_assignment(costs)
    np.testing.assert_allclose(costs[rows, assign(costs)].sum(), costs[rows, columns].sum(), rtol=1e-12)
    # Also from potentials that are plainly wrong.
    misled = assign(costs, 100 * rng.standard_normal(num))
    np.testing.assert_allclose(costs[rows, misled].sum(), costs[rows, columns].sum(), rtol=1e-12)


def test_potentials_are_dual():
    """u_i + v_j <= c_ij everywhere, and their sum is the optimal cost: the two conditions of duality."""
    rng = np.random.default_rng(0)
    costs = cost(rng.standard_normal((80, 3)), rng.standard_normal((80, 3)))
    columns = assign(costs)
    u = row_potentials(costs, columns)
    v = extend_potentials(costs, u)
    assert (costs - u[:, None] - v[None, :]).min() > -1e-12
    np.testing.assert_allclose(u.sum() + v.sum(), costs[np.arange(80), columns].sum(), rtol=1e-12)


def test_ties_and_repeated_points():
    """Costs of which many are equal, as for points on a lattice."""
    costs = np.random.default_rng(0).integers(0, 3, (150, 150)).astype(float)
    assert sorted(assign(costs)) == [*range(150)]
    np.testing.assert_allclose(costs[np.arange(150), assign(costs)].sum(), costs[linear_sum_assignment(costs)].sum())
    np.testing.assert_array_equal(np.sort(assign(np.zeros((120, 120)))), np.arange(120))


def test_worst_pairing_and_other_costs(batch):
    x0, x1, cond = map(np.asarray, batch)
    c = cost(x0, x1)
    _, expected = linear_sum_assignment(c.T, maximize=True)
    np.testing.assert_array_equal(anti_ot(None, x0, x1).index0, expected)
    _, expected = linear_sum_assignment(np.sqrt(c.T))
    np.testing.assert_array_equal(ExactOT(cost=euclidean)(None, *batch[:2]).index0, expected)
    _, expected = linear_sum_assignment(c.T)
    np.testing.assert_array_equal(ExactOT(ignore_cond=True)(None, x0, x1, cond).index0, expected)


def test_numpy_in_numpy_out(batch):
    """No array of JAX is made where none was given, and the pairing is the one that JAX arrays get."""
    pairing = minibatch_ot(None, *map(np.asarray, batch))
    assert all(type(each) is np.ndarray for each in pairing[:4])
    np.testing.assert_array_equal(pairing.index0, minibatch_ot(None, *batch).index0)


def test_numpy_out_under_a_cost_of_jax(batch):
    x0, x1, _ = map(np.asarray, batch)
    index0 = ExactOT(cost=lambda x0, x1: jnp.asarray(squared_euclidean(x0, x1)))(None, x0, x1).index0
    assert type(index0) is np.ndarray
    np.testing.assert_array_equal(index0, minibatch_ot(None, x0, x1).index0)


def test_costs_far_from_the_origin_keep_their_digits():
    """Distances of order 1 between points a million away, in float32: to 1e-6 of the points' own rounding."""
    rng = np.random.default_rng(0)
    x0, x1 = (rng.standard_normal((20, 3)).astype(np.float32) + np.float32(4096) for _ in range(2))
    exact = cost(x0.astype(np.float64), x1.astype(np.float64))
    np.testing.assert_allclose(squared_euclidean(x0, x1), exact, rtol=1e-5, atol=1e-5)


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


@pytest.mark.slow
def test_inside_pmap(batch):
    """Each device solves its own batch."""
    x0, x1, _ = batch
    split = lambda x: x.reshape(4, 8, *x.shape[1:])  # noqa: E731
    index0 = jax.pmap(lambda a, b: minibatch_ot(None, a, b).index0)(split(x0), split(x1))
    for device in range(4):
        np.testing.assert_array_equal(index0[device], minibatch_ot(None, split(x0)[device], split(x1)[device]).index0)


@pytest.mark.slow
def test_devices_that_meet_afterwards_do_not_deadlock():
    """Costs of 256 KiB, beyond what XLA's CPU client copies in place: it hung when other devices were waiting."""
    x0, x1 = jax.random.normal(jax.random.key(1), (2, 4, 256, 2))
    total = jax.pmap(lambda a, b: jax.lax.psum(minibatch_ot(None, a, b).x0, "data"), axis_name="data")
    expected = sum(minibatch_ot(None, *each).x0 for each in zip(x0, x1))
    for _ in range(3):
        np.testing.assert_allclose(total(x0, x1)[0], expected, rtol=1e-5, atol=1e-5)


def test_gradients_pass_by_the_assignment(batch):
    """An encoder under training may make the data: the pairing is constant almost everywhere."""
    x0, x1, _ = batch
    loss = lambda scale: ((scale * x1 - minibatch_ot(None, x0, scale * x1).x0) ** 2).sum()  # noqa: E731
    value = jax.jit(jax.grad(loss))(1.0)
    np.testing.assert_allclose(value, (loss(1.001) - loss(0.999)) / 0.002, rtol=1e-2)


def test_bad_input(batch):
    x0, x1, _ = batch
    with pytest.raises(ValueError, match="x0 and x1 must have the same shape"):
        minibatch_ot(None, x0[:4], x1)
    with pytest.raises(ValueError, match=r"integer labels \[batch\] = \(32,\).*got float32"):
        minibatch_ot(None, x0, x1, jnp.ones(32))
    with pytest.raises(ValueError, match="costs must be finite, got 32 of 1024 that are not"):
        minibatch_ot(None, x0.at[3].set(jnp.nan), x1)
    with pytest.raises(ValueError, match=r"cost\(x0, x1\) must be \[n, m\] = \(32, 32\), got shape \(32,\)"):
        ExactOT(cost=lambda x0, x1: x0.sum((1, 2)))(None, x0, x1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="costs must be finite, got 32 of 1024"):
        jax.block_until_ready(jax.jit(minibatch_ot)(None, x0.at[3].set(jnp.inf), x1))
