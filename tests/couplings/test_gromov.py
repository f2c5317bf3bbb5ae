import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ott")

from fm_jax.couplings.gromov import GromovWassersteinOT, _solve

SHARP, BLURRED = GromovWassersteinOT(), GromovWassersteinOT(epsilon=0.3)


def rotation(rng, dim):
    return np.linalg.qr(rng.normal(size=(dim, dim)))[0]


def mean_one(x, y):
    costs = np.square(x[:, None] - y[None]).sum(-1)
    return costs / costs.mean()


def distortion(x, y, plan):
    """The objective without entropy, from its definition."""
    n = len(x)
    difference = np.square(mean_one(x, x).reshape(n, 1, n, 1) - mean_one(y, y).reshape(1, n, 1, n))
    return np.einsum("ijkl,ij,kl->", difference, plan, plan)


def as_plan(index0):
    plan = np.zeros((len(index0), len(index0)))
    plan[index0, np.arange(len(index0))] = 1 / len(index0)
    return plan


@pytest.mark.slow
@pytest.mark.parametrize("coupling", [SHARP, BLURRED], ids=["sharp", "blurred"])
@pytest.mark.parametrize("seed", range(5))
def test_an_isometric_copy_in_more_dimensions_is_recovered(coupling, seed):
    rng = np.random.default_rng(seed)
    x0, shuffle = rng.normal(size=(24, 3)), rng.permutation(24)
    x1 = 7 + 3 * (np.pad(x0, ((0, 0), (0, 2))) @ rotation(rng, 5))[shuffle]  # moved and scaled, too
    pairing = coupling(None, x0, x1)
    np.testing.assert_array_equal(pairing.index0, shuffle)
    np.testing.assert_array_equal(pairing.x0, x0[shuffle])
    assert isinstance(pairing.index0, np.ndarray)


@pytest.mark.parametrize("seed", range(4))
def test_keeps_distances_as_well_as_pot(seed):
    """Of two clouds that have nothing in common, against conditional gradients without entropy, both local."""
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(seed)
    x0, x1 = rng.normal(size=(24, 3)), rng.normal(size=(24, 5)) ** 3
    uniform = np.full(24, 1 / 24)
    expected = ot.gromov.gromov_wasserstein2(mean_one(x0, x0), mean_one(x1, x1), uniform, uniform, "square_loss")
    found = distortion(x0, x1, as_plan(SHARP(None, x0, x1).index0))
    assert expected < 0.5 * distortion(x0, x1, np.full((24, 24), 24**-2))
    assert found < 1.02 * expected


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "fused"), [(0.3, 0.0), (1.0, 1.0)])
def test_the_plan_is_that_of_pot(epsilon, fused):
    """The formula's epsilon and weights are the ones meant: half of it all is POT's fused problem at alpha = 1/2."""
    ot = pytest.importorskip("ot")
    rng = np.random.default_rng(1)
    x0, x1 = rng.normal(size=(24, 3)), rng.normal(size=(24, 3))
    costs = mean_one(x0, x0), mean_one(x1, x1), mean_one(x0, x1)
    expected = ot.gromov.entropic_fused_gromov_wasserstein(
        fused * costs[2], *costs[:2], *[np.full(24, 1 / 24)] * 2, epsilon=epsilon / 2, max_iter=500, tol=1e-10
    )
    within0, within1, cross = (each.astype(np.float32) for each in costs)
    plan, converged = _solve(epsilon, 100, fused or 1.0, within0, within1, cross if fused else None, np.zeros(24, int))
    assert converged
    assert 24 * expected.max() > 5 / 24  # far from the product
    np.testing.assert_allclose(24 * plan, 24 * expected, atol=4e-3)


def test_rotations_change_nothing():
    rng = np.random.default_rng(7)
    x0, x1 = rng.normal(size=(24, 3)), rng.normal(size=(24, 2, 2)) ** 3
    expected = BLURRED(None, x0, x1).index0
    turned = (x1.reshape(24, 4) @ rotation(rng, 4)).reshape(24, 2, 2)
    np.testing.assert_array_equal(BLURRED(None, x0 @ rotation(rng, 3) - 2, turned).index0, expected)


SQUARE = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])


@pytest.mark.slow
@pytest.mark.parametrize("meant", [[2, 3, 0, 1], [1, 2, 3, 0], [0, 3, 2, 1]])
def test_costs_and_classes_break_symmetry(meant):
    """The corners of a square, in three dimensions: every symmetry keeps distances, the rest says which is meant."""
    x1 = np.pad(SQUARE, ((0, 0), (0, 1)))[meant]
    fused = GromovWassersteinOT(cross_cost=lambda x0, x1: np.square(x0[:, None] - x1[None, :, :2]).sum(-1))
    np.testing.assert_array_equal(fused(None, SQUARE, x1).index0, meant)
    # Rows 0 and 1 know their corners from their labels, the other two by distances only: turned to where they belong.
    x1 = SQUARE[[0, 1, 3, 2]]
    np.testing.assert_array_equal(SHARP(None, SQUARE, x1, np.array([0, 1, 2, 2])).index0, [0, 1, 3, 2])


def test_within_classes():
    rng = np.random.default_rng(3)
    x0, shuffle, labels = rng.normal(size=(24, 3)), rng.permutation(24), np.arange(24) % 2
    x1 = x0[shuffle]
    pairing = SHARP(None, x0, x1, labels)
    np.testing.assert_array_equal(labels[pairing.index0], labels)
    free = GromovWassersteinOT(ignore_cond=True)(None, x0, x1, labels)
    np.testing.assert_array_equal(free.index0, shuffle)
    # Sorted by class, the copy is within classes, and there it is found.
    by_class = np.concatenate([rng.permutation(np.flatnonzero(labels == each)) for each in (0, 1)])
    spread = np.argsort(np.argsort(labels, kind="stable"))
    within = by_class[spread]
    np.testing.assert_array_equal(SHARP(None, x0, x0[within], labels).index0, within)


@pytest.mark.slow
def test_inside_jit():
    """Where nothing can be raised, weights of NaN say that it failed."""
    rng = np.random.default_rng(4)
    x0, x1 = rng.normal(size=(24, 3)).astype(np.float32), rng.normal(size=(24, 5)).astype(np.float32)
    jitted = jax.jit(SHARP)
    found = jitted(None, x0, x1)
    np.testing.assert_array_equal(found.index0, SHARP(None, jnp.asarray(x0), jnp.asarray(x1)).index0)
    np.testing.assert_array_equal(found.weight, np.ones(24))
    x0[3, 0] = np.nan
    found = jitted(None, x0, x1)
    assert np.isnan(found.weight).all()
    np.testing.assert_array_equal(np.sort(found.index0), np.arange(24))


def test_failure_is_loud():
    x0, x1 = np.random.default_rng(5).normal(size=(2, 24, 3))
    with pytest.raises(ValueError, match=r"did not converge with epsilon=0.02 and max_iterations=3"):
        GromovWassersteinOT(max_iterations=3)(None, x0, x1)
    with pytest.raises(ValueError, match="costs must be finite"):
        SHARP(None, np.full_like(x0, np.nan), x1)


def test_bad_input():
    with pytest.raises(ValueError, match=r"epsilon must be positive and finite, got 0.0"):
        GromovWassersteinOT(0.0)
    with pytest.raises(ValueError, match="fused must be finite and not negative, got -1"):
        GromovWassersteinOT(fused=-1.0)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        GromovWassersteinOT(max_iterations=0)
    with pytest.raises(ValueError, match="the same batch"):
        SHARP(None, np.zeros((3, 1)), np.zeros((4, 1)))
    with pytest.raises(ValueError, match=r"integer labels \[batch\]"):
        SHARP(None, np.zeros((3, 1)), np.zeros((3, 1)), np.zeros(3))
