"""Straight paths under optimal transport between Gaussians follow the displacement interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.couplings import ExactOT, independent
from fm_jax.paths import AffinePath
from fm_jax.schedules import Linear

MEAN0, COV0 = np.array([-1.0, 0.5]), np.array([[0.8, 0.3], [0.3, 0.5]])
MEAN1, COV1 = np.array([1.5, -0.5]), np.array([[0.3, -0.2], [-0.2, 0.9]])
BATCHES, SIZE, TIMES = 8, 512, (0.25, 0.5, 0.75)


def pooled_regressions(coupling):
    """The regression of u_t on (1, x_t) over all pairs of 8 batches, [3, 2] at each time."""
    pair = oracles.gaussian_pair(MEAN0, COV0, MEAN1, COV1)
    pairs = []
    for key in jax.random.split(jax.random.key(0), BATCHES):
        x0, x1 = map(np.asarray, oracles.sample_pair(pair, key, SIZE))
        pairs.append(coupling(None, x0, x1)[:2])
    x0, x1 = (jnp.asarray(np.concatenate(each)) for each in zip(*pairs, strict=True))
    out = []
    for t in TIMES:
        sample = AffinePath(Linear()).sample(None, t, x0, x1)
        design = np.concatenate([np.ones((len(x0), 1)), np.asarray(sample.x_t)], axis=1)
        out.append(np.linalg.lstsq(design, np.asarray(sample.u_t), rcond=None)[0])
    return np.stack(out)


def displacement():
    """The closed form's intercept and slopes, [3, 2] at each time."""
    v = oracles.displacement_velocity(oracles.gaussian_pair(MEAN0, COV0, MEAN1, COV1))
    out = []
    for t in TIMES:
        at = v(t, jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        out.append(np.concatenate([at[:1], at[1:] - at[:1]]))
    return np.stack(out)


@pytest.mark.slow
def test_exact_transport_of_large_batches():
    """Every coefficient within 0.06 of the closed form, twice the largest error over five keys."""
    np.testing.assert_allclose(pooled_regressions(ExactOT()), displacement(), atol=0.06)


def test_independent_pairs_have_another_velocity():
    """So that the test above can fail: their marginal velocity differs ten times as much."""
    assert np.abs(pooled_regressions(independent) - displacement()).max() > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("t", TIMES)
def test_closed_forms_of_both_couplings(t):
    """The regression above, with infinitely many pairs: the bridge oracle without noise."""
    pair = oracles.gaussian_pair(MEAN0, COV0, MEAN1, COV1)
    x = jnp.array([[0.3, -0.2], [1.0, 2.0]])
    straight = oracles.GaussianBridge(oracles.optimal_plan(pair), Linear(), lambda t: 0 * t)
    np.testing.assert_allclose(
        oracles.bridge_prediction(straight, t, x).velocity, oracles.displacement_velocity(pair)(t, x), atol=1e-4
    )
