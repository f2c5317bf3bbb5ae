"""Unbalanced transport against POT, and weighted permutations against the plan they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.couplings import unbalanced
from fm_jax.couplings.entropic import EntropicOT
from fm_jax.couplings.unbalanced import UnbalancedOT

pytest.importorskip("ott")
N = 8


def gaussians(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, 2)), rng.normal(size=(N, 2)) + 1


def cost(x0, x1):
    return np.square(np.asarray(x0)[:, None] - np.asarray(x1)[None]).sum(-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epsilon", "rho"), [(0.5, (2.0, 2.0)), (0.5, (float("inf"), 0.5))], ids=["both", "keeps_the_source"]
)
def test_plan_is_pots(x64, epsilon, rho):
    """tau = rho / (rho + epsilon), rho POT's reg_m, entropy relative to the product of the marginals."""
    ot = pytest.importorskip("ot")
    x0, x1 = gaussians(0)
    uniform = np.full(N, 1 / N)
    expected = N * ot.unbalanced.sinkhorn_unbalanced(
        uniform, uniform, cost(x0, x1), epsilon, rho, reg_type="kl", stopThr=1e-13, numItermax=20_000
    )
    tau = tuple(1.0 if np.isinf(each) else each / (each + epsilon) for each in rho)
    plan = UnbalancedOT(epsilon, tau, threshold=1e-11, max_iterations=20_000).plan(x0, x1)
    np.testing.assert_allclose(plan, expected, atol=1e-8)
    assert expected.sum() < 0.9 * N or np.isinf(rho[0])  # the marginals do give way


def test_one_mass_by_hand():
    """One pair: minimising pi c + epsilon KL(pi | 1) + 2 rho KL(pi | 1) gives log pi = -c / (epsilon + 2 rho)."""
    epsilon, rho = 0.5, 2.0
    ot = UnbalancedOT(epsilon, rho / (rho + epsilon), threshold=1e-6)
    plan = ot.plan(jnp.zeros((1, 1)), jnp.full((1, 1), 3.0))
    np.testing.assert_allclose(plan, np.exp(-9 / (epsilon + 2 * rho)), rtol=1e-4)


@pytest.mark.slow
def test_the_size_of_the_batch_does_not_matter(x64):
    """A batch repeated twice has the plan of the batch, spread out."""
    x0, x1 = gaussians(1)
    ot = UnbalancedOT(0.5, 0.8, threshold=1e-9)
    twice = ot.plan(np.concatenate([x0, x0]), np.concatenate([x1, x1]))
    np.testing.assert_allclose(2 * twice[:N, :N], ot.plan(x0, x1), atol=1e-6)


def test_weak_marginals_tend_to_the_balanced_plan(x64):
    x0, x1 = gaussians(2)
    soft = UnbalancedOT(0.5, 1 - 1e-6, threshold=1e-9).plan(x0, x1)
    np.testing.assert_allclose(soft, EntropicOT(0.5, threshold=1e-9).plan(x0, x1), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.7, (1.0, 0.7)], ids=["both", "keeps_the_source"])
def test_weighted_pairs_have_the_expectation_of_the_plan(tau):
    """8,000 permutations: the mean weight on each pair is pi_ij over its mass, though all examples are in each draw.

    Of the pairs that the balanced plan draws 200 times and more, which makes their means normal: the largest of 64
    deviations in standard errors exceeds 5 in one of 25,000 runs.
    """
    x0, x1 = map(jnp.asarray, gaussians(3))
    ot, draws = UnbalancedOT(0.5, tau, threshold=1e-5), 8_000
    keys = jax.random.split(jax.random.key(1), draws)
    index0, weight = jax.jit(jax.vmap(lambda key: ot(key, x0, x1)[-2:]))(keys)
    index0, weight = np.asarray(index0), np.asarray(weight, np.float64)
    np.testing.assert_array_equal(np.sort(index0, axis=1), np.broadcast_to(np.arange(N), index0.shape))
    table = np.zeros((draws, N, N))
    table[np.arange(draws)[:, None], index0, np.arange(N)] = weight
    plan = np.asarray(ot.plan(x0, x1), np.float64)
    expected = N * plan / plan.sum()
    z = (table.mean(0) - expected) / (table.std(0) / np.sqrt(draws) + 1 / draws)
    often = draws * np.asarray(EntropicOT(0.5, threshold=1e-5).plan(x0, x1)) > 200
    assert often.sum() > N
    assert np.abs(z[often]).max() < 5
    assert np.abs(expected.sum(0) - 1).max() > 0.2  # far from a balanced plan
    assert weight.std() > 0.2


@pytest.mark.slow
def test_outliers_count_for_nothing(key):
    """A data point far out is paired, as all are, with a weight near 0; the others are as without it."""
    x0, x1 = gaussians(4)
    x1[5] = 40.0
    pairing = UnbalancedOT(0.5, 0.9)(key, x0, x1)
    np.testing.assert_array_equal(np.sort(pairing.index0), np.arange(N))
    assert pairing.weight[5] < 1e-6
    assert np.delete(pairing.weight, 5).sum() > 1
    balanced = EntropicOT(0.5)(key, x0, x1)
    assert balanced.weight[5] == 1


@pytest.mark.slow
def test_within_classes(key):
    x0, x1 = gaussians(5)
    cond = jnp.array([0, 1, 0, 1, 1, 0, 0, 1])
    ot = UnbalancedOT(0.5, 0.8)
    plan = np.asarray(ot.plan(x0, x1, cond))
    assert (plan[np.asarray(cond)[:, None] != np.asarray(cond)[None]] == 0).all()
    pairing = jax.jit(ot)(key, x0, x1, cond)
    np.testing.assert_array_equal(cond[pairing.index0], cond)
    assert np.isfinite(pairing.weight).all()
    assert (pairing.weight > 0).all()


@pytest.mark.slow
def test_failure_is_loud(key):
    ot = UnbalancedOT(0.01, 0.999, max_iterations=100)
    x0, x1 = map(jnp.asarray, gaussians(6))
    weight = jax.jit(lambda *arrays: ot(*arrays).weight)
    assert np.isfinite(weight(key, 0.01 * x0, 0.01 * x1)).all()
    assert np.isnan(weight(key, x0, x1)).all()
    assert np.isnan(jax.jit(ot.plan)(x0, x1)).all()
    with pytest.raises(ValueError, match="Sinkhorn did not converge in 100 iterations"):
        ot(key, x0, x1)
    spoilt = (0.01 * x0).at[0].set(jnp.nan)
    assert np.isnan(weight(key, spoilt, 0.01 * x1)).all()
    with pytest.raises(ValueError, match="costs must be finite"):
        ot(key, spoilt, x1)


@pytest.mark.slow
def test_failure_of_the_unbalanced_plan_alone_is_loud(key, monkeypatch):
    """The permutation is drawn from the balanced plan, which is fine; the weights are not."""
    monkeypatch.setattr(unbalanced, "_unbalanced", lambda costs, *_, **__: (-costs, costs.max() < 0))
    x0, x1 = map(jnp.asarray, gaussians(7))
    pairing = jax.jit(UnbalancedOT(0.5, 0.9))(key, x0, x1)
    assert np.isnan(pairing.weight).all()
    np.testing.assert_array_equal(np.sort(pairing.index0), np.arange(N))


def test_bad_input(key):
    for tau in (0.0, 1.0, 1.5, (1.0, 1.0), float("nan")):
        with pytest.raises(ValueError, match="tau must be between 0 and 1"):
            UnbalancedOT(1.0, tau)
    with pytest.raises(ValueError, match="epsilon must be positive"):
        UnbalancedOT(0.0, 0.9)
    with pytest.raises(ValueError, match="UnbalancedOT draws pairs at random and needs a key"):
        UnbalancedOT(1.0, 0.9)(None, *gaussians(0))
