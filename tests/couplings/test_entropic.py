"""Entropic transport against POT, SciPy's assignment and the closed form between Gaussians."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fm_jax.couplings.costs import euclidean, squared_euclidean
from fm_jax.couplings.entropic import EntropicOT, schrodinger_bridge_ot
from fm_jax.losses import flow_matching
from fm_jax.paths import AffinePath

pytest.importorskip("ott")
N = 32


def gaussians(seed, n=N, dim=2):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)).astype(np.float32), (rng.normal(size=(n, dim)) + 1).astype(np.float32)


@pytest.fixture(scope="module")
def batch():
    return tuple(map(jnp.asarray, gaussians(0)))


def cost(x0, x1):
    return np.square(np.asarray(x0)[:, None] - np.asarray(x1)[None]).sum(-1)


@pytest.mark.parametrize("epsilon", [1e-4, 0.05, 0.5, 1e3])
def test_marginals_of_the_plan(batch, epsilon):
    """Rows and columns sum to 1, to the threshold on average."""
    plan = np.asarray(EntropicOT(epsilon).plan(*batch))
    assert plan.min() >= 0
    for axis in (0, 1):
        assert np.abs(plan.sum(axis) - 1).mean() <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.2, 1.0])
def test_plan_and_cost_are_pots(x64, epsilon):
    """In float64 and converged to 1e-9: the plan to 1e-7 and its cost to 1e-9, relative."""
    ot = pytest.importorskip("ot")
    x0, x1 = (x.astype(np.float64) for x in gaussians(1))
    uniform = np.full(N, 1 / N)
    expected = N * ot.sinkhorn(
        uniform, uniform, cost(x0, x1), epsilon, method="sinkhorn_log", stopThr=1e-11, numItermax=20_000
    )
    plan = EntropicOT(epsilon, threshold=1e-9, max_iterations=20_000).plan(x0, x1)
    np.testing.assert_allclose(plan, expected, atol=1e-7)
    np.testing.assert_allclose((plan * cost(x0, x1)).sum(), (expected * cost(x0, x1)).sum(), rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1e-3, 1e-4])
def test_small_epsilon_is_the_assignment(batch, key, epsilon):
    """In single precision, where a peer's plan becomes uniform. Near-ties are shared out until epsilon is 1e-4."""
    rows, columns = linear_sum_assignment(cost(*batch))
    plan = np.asarray(EntropicOT(epsilon).plan(*batch))
    np.testing.assert_array_equal(plan.argmax(1), columns)
    if epsilon == 1e-4:
        assert plan[rows, columns].min() > 0.99
        np.testing.assert_array_equal(columns[EntropicOT(epsilon)(key, *batch).index0], np.arange(N))


def test_large_epsilon_is_the_independent_coupling(batch):
    np.testing.assert_allclose(EntropicOT(1e5).plan(*batch), 1 / N, rtol=1e-3)


def test_between_gaussians_it_tends_to_the_closed_form():
    """Of the covariance of the plan between N(0, 1) and N(mean, s^2), at epsilon = 2 sigma^2.

    The Schroedinger bridge has E[x0 (x1 - mean)] = (sqrt(4 s^2 + sigma^4) - sigma^2) / 2 (Mallasto et al. 2022,
    arXiv:2006.03416). The batch's quantiles stand in for samples, which leaves an error of order 1/n and no chance.
    """
    from scipy.stats import norm

    n, s, sigma = 256, 0.5, 0.8
    x0 = norm.ppf((np.arange(n) + 0.5) / n)[:, None]
    x1 = s * x0 + 2
    plan = np.asarray(schrodinger_bridge_ot(sigma).plan(x0, x1))
    covariance = (plan * (x0 @ (x1 - 2).T)).sum() / n
    assert abs(covariance - (np.sqrt(4 * s**2 + sigma**4) - sigma**2) / 2) < 0.01


def test_relative_epsilon_does_not_see_the_units(batch):
    x0, x1 = batch
    ot = EntropicOT(0.05, relative=True)
    np.testing.assert_allclose(ot.plan(10 * x0, 10 * x1), ot.plan(x0, x1), atol=2e-3)
    absolute = EntropicOT(0.05 * float(squared_euclidean(x0, x1).mean()))
    np.testing.assert_allclose(absolute.plan(x0, x1), ot.plan(x0, x1), atol=1e-5)


def test_any_cost(batch):
    expected = EntropicOT(0.3).plan(*batch)
    other = EntropicOT(0.3, cost=lambda x0, x1: euclidean(x0, x1) ** 2).plan(*batch)
    np.testing.assert_allclose(other, expected, atol=1e-4)


@pytest.mark.slow
def test_pairs_are_as_frequent_as_the_plan_says(batch):
    """10,000 draws of 8 x 8: the largest of 64 standardised deviations exceeds 5 in one of 25,000 runs."""
    x0, x1 = (x[:8] for x in batch)
    ot, draws = EntropicOT(0.5, threshold=1e-5), 10_000
    keys = jax.random.split(jax.random.key(1), draws)
    index0 = np.asarray(jax.jit(jax.vmap(lambda key: ot(key, x0, x1).index0))(keys))
    np.testing.assert_array_equal(np.sort(index0, axis=1), np.broadcast_to(np.arange(8), index0.shape))
    seen = np.stack([np.bincount(column, minlength=8) for column in index0.T], axis=1) / draws
    plan = np.asarray(ot.plan(x0, x1), np.float64)
    # 1 / draws: a pair of probability near 0 may be seen once.
    z = np.abs(seen - plan) / np.sqrt(plan * (1 - plan).clip(0) / draws + 1 / draws**2)
    assert z.max() < 5
    assert (plan > 0.05).sum() > 16  # it is no assignment


@pytest.mark.slow
def test_within_classes(batch, key):
    """No pair across classes, and in each class the plan that it has by itself."""
    cond = jnp.asarray(np.random.default_rng(3).integers(0, 3, N))
    ot = EntropicOT(0.1, threshold=1e-5)
    plan = np.asarray(ot.plan(*batch, cond))
    same = np.asarray(cond)[:, None] == np.asarray(cond)[None]
    assert (plan[~same] == 0).all()
    members = np.flatnonzero(cond == 1)
    alone = ot.plan(batch[0][members], batch[1][members])
    np.testing.assert_allclose(plan[np.ix_(members, members)], alone, atol=1e-3)
    pairing = jax.jit(ot)(key, *batch, cond)
    np.testing.assert_array_equal(np.sort(pairing.index0), np.arange(N))
    np.testing.assert_array_equal(cond[pairing.index0], cond)
    np.testing.assert_array_equal(pairing.x0, batch[0][pairing.index0])
    np.testing.assert_array_equal(pairing.weight, np.ones(N))
    free = EntropicOT(0.1, threshold=1e-5, ignore_cond=True).plan(*batch, cond)
    assert np.asarray(free)[~same].sum() > 1


def test_classes_stay_apart_however_large_epsilon_is(batch):
    """There the plan is uniform within each class: 1 / 5 and 1 / 27."""
    cond = np.arange(N) < 5
    plan = EntropicOT(1e4).plan(*batch, cond.astype(np.int32))
    expected = np.where(cond[:, None] == cond[None], np.where(cond, 1 / 5, 1 / 27), 0)
    np.testing.assert_allclose(plan, expected, rtol=1e-2)


def test_failure_is_loud(batch, key):
    """One coupling, that needs a hundred iterations for short distances and more for long ones."""
    ot = EntropicOT(1e-3, max_iterations=100)
    x0, x1 = batch
    weight = jax.jit(lambda *arrays: ot(*arrays).weight)
    np.testing.assert_array_equal(weight(key, 0.01 * x0, 0.01 * x1), np.ones(N))
    assert np.isnan(weight(key, x0, x1)).all()
    assert np.isnan(jax.jit(ot.plan)(x0, x1)).all()
    with pytest.raises(ValueError, match="Sinkhorn did not converge in 100 iterations: raise max_iterations"):
        ot(key, x0, x1)
    spoilt = (0.01 * x0).at[3].set(jnp.nan)
    assert np.isnan(weight(key, spoilt, 0.01 * x1)).all()
    with pytest.raises(ValueError, match="costs must be finite, got 32 of 1024 that are not"):
        ot(key, spoilt, x1)


@pytest.mark.slow
def test_training_sees_the_failure(batch, key):
    """The loss and its gradient are NaN, of a jitted step."""
    loss_fn = flow_matching(
        lambda params, t, x, cond, **_: params * x, AffinePath(), coupling=EntropicOT(1e-3, max_iterations=100)
    )
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, _), grad = step(1.0, key, {"x0": batch[0], "x1": batch[1]})
    assert np.isnan(loss)
    assert np.isnan(grad)
    (loss, _), grad = step(1.0, key, {"x0": 0.01 * batch[0], "x1": 0.01 * batch[1]})
    assert np.isfinite(loss)
    assert np.isfinite(grad)


@pytest.mark.slow
def test_inside_pmap(batch):
    """Each device solves its own batch, with its own key."""
    x0, x1 = (x.reshape(4, 8, 2) for x in batch)
    keys = jax.random.split(jax.random.key(2), 4)
    ot = EntropicOT(0.2)
    index0 = jax.pmap(lambda key, a, b: ot(key, a, b).index0)(keys, x0, x1)
    for device in range(4):
        np.testing.assert_array_equal(index0[device], ot(keys[device], x0[device], x1[device]).index0)


@pytest.mark.slow
def test_one_trace_and_no_gradient(batch):
    """Equal couplings are one static argument; the pairing is a choice, through which nothing is differentiated."""
    traces = []

    @partial(jax.jit, static_argnums=0)
    def gradient(ot, key, x0, x1):
        traces.append(None)
        return jax.grad(lambda x: (ot(key, x, x1).x0 * x1).sum())(x0)

    for seed in range(2):
        grad = gradient(EntropicOT(0.2), jax.random.key(seed), batch[0][:8], batch[1][:8])
    assert len(traces) == 1
    np.testing.assert_allclose(np.sort(grad, axis=0), np.sort(batch[1][:8], axis=0))


def test_schrodinger_bridge():
    assert schrodinger_bridge_ot(0.5, threshold=1e-4) == EntropicOT(0.5, threshold=1e-4)
    with pytest.raises(ValueError, match="sigma must be positive and finite, got 0"):
        schrodinger_bridge_ot(0.0)
    with pytest.raises(ValueError, match="sigma determines relative"):
        schrodinger_bridge_ot(1.0, relative=True)


def test_bad_input(batch, key):
    x0, x1 = batch
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="epsilon must be positive"):
            EntropicOT(epsilon)
    for threshold in (0.0, 0.1):
        with pytest.raises(ValueError, match=rf"threshold must be in \(0, 0\.01\], got {threshold}"):
            EntropicOT(1.0, threshold=threshold)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        EntropicOT(1.0, max_iterations=0)
    with pytest.raises(ValueError, match="EntropicOT draws pairs at random and needs a key"):
        EntropicOT(1.0)(None, x0, x1)
    with pytest.raises(ValueError, match="same shape"):
        EntropicOT(1.0)(key, x0[:4], x1)
    with pytest.raises(ValueError, match="ConditionalOT"):
        EntropicOT(1.0)(key, x0, x1, jnp.ones((N, 3)))
