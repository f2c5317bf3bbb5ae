"""Semi-discrete transport against the quantiles of a Gaussian, the one case with a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from fm_jax.couplings.costs import euclidean
from fm_jax.couplings.semidiscrete import SemidiscreteOT, cell_masses, fit_semidiscrete
from fm_jax.data.toy import moons
from fm_jax.sources import Sampled

M = 16


@pytest.fixture(scope="module")
def line():
    """From a Gaussian to 16 points on the line, in no order."""
    x1 = np.random.default_rng(0).normal(1.0, 0.5, size=(M, 1)).astype(np.float32)
    return fit_semidiscrete(jax.random.key(0), x1, num_iterations=4000)


@pytest.fixture(scope="module")
def plane():
    """From a Gaussian to 64 points around two centres."""
    rng = np.random.default_rng(1)
    x1 = rng.normal(size=(64, 2)) * 0.3 + 3 * rng.integers(0, 2, size=(64, 1))
    return fit_semidiscrete(jax.random.key(1), x1.astype(np.float32), num_iterations=4000)


@pytest.mark.slow
def test_cells_are_quantiles(line):
    """The k-th smallest point gets what lies between the quantiles k/m and (k + 1)/m.

    Cell bounds are within 2% of a cell of the quantiles, so at 400 equally likely x0 at most 8 disagree.
    """
    p = (np.arange(400) + 0.5) / 400
    index1 = line.pair(jnp.asarray(norm.ppf(p)[:, None], jnp.float32))
    order = np.argsort(line.x1[:, 0])
    assert (np.asarray(index1) != order[np.floor(p * M).astype(int)]).sum() <= 8


def test_potential_is_the_closed_form(line):
    """Neighbours' costs less potentials are equal at the quantile between them. Off by up to 2% of the range."""
    x = np.sort(np.asarray(line.x1[:, 0], np.float64))
    bound = norm.ppf(np.arange(1, M) / M)
    expected = np.concatenate([[0], np.cumsum((bound - x[1:]) ** 2 - (bound - x[:-1]) ** 2)])
    found = np.asarray(line.potential)[np.argsort(line.x1[:, 0])]
    np.testing.assert_allclose(found, expected - expected.mean(), atol=0.02 * np.ptp(expected))


def test_cost_is_the_wasserstein_distance(line):
    """E |x0 - x1|^2 over the quantile cells, from truncated normals, to 1%; independent pairs cost 1.8 times that."""
    batch = line.batch(jax.random.key(2), 200_000)
    found = float(jnp.square(batch["x0"] - batch["x1"]).mean())
    x = np.sort(np.asarray(line.x1[:, 0], np.float64))
    density = norm.pdf(norm.ppf(np.arange(M + 1) / M))  # the mean of a cell is density lost over mass
    expected = 1 + (x**2).mean() - 2 * (x * (density[:-1] - density[1:])).sum()
    assert abs(found - expected) < 0.01 * (1 + expected)
    assert found < 0.6 * (1 + (x**2).mean())


@pytest.mark.slow
def test_cells_have_equal_masses(plane):
    """400,000 samples: every mass within 5% of 1/64, of which 4 standard errors of 1.3% are noise."""
    masses, worst, noise = cell_masses(plane, jax.random.key(3), num_batches=400)
    assert masses.shape == (64,)
    np.testing.assert_allclose(masses.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(noise, np.sqrt(1 / 64 * 63 / 64 / 400_000))
    assert worst == np.abs(masses - 1 / 64).max()
    assert worst < 0.1 / 64
    unfitted = SemidiscreteOT(plane.x1, jnp.zeros(64))
    assert cell_masses(unfitted, jax.random.key(3)).worst > 3 / 64


def test_no_better_map_with_these_masses(plane):
    """Optimal for the masses that the cells have: as an assignment, no exchange of data among samples is cheaper."""
    from scipy.optimize import linear_sum_assignment

    batch = plane.batch(jax.random.key(4), 128)
    x0, x1 = np.asarray(batch["x0"]), np.asarray(batch["x1"])
    costs = np.square(x0[:, None] - x1[None]).sum(-1)
    rows, columns = linear_sum_assignment(costs)
    np.testing.assert_allclose(np.trace(costs), costs[rows, columns].sum(), rtol=1e-5)
    np.testing.assert_array_equal(x1, plane.x1[batch["index1"]])


def test_any_cost_and_event_shape():
    """Images, and a cost that is not squared: two points and a symmetric source share it equally."""
    x1 = jnp.stack([jnp.ones((2, 2, 1)), 5 * jnp.ones((2, 2, 1))])
    transport = fit_semidiscrete(jax.random.key(5), x1, num_iterations=1000, cost=euclidean)
    assert cell_masses(transport, jax.random.key(6), num_batches=10).worst < 0.05
    assert transport.cost is euclidean


def test_a_value_that_jit_takes(line):
    """Pairing inside `jit` with the transport as an argument, or its potential updated, needs no new trace."""
    traces = []

    @jax.jit
    def pair(transport, x0):
        traces.append(None)
        return transport.pair(x0)

    x0 = line.draw(jax.random.key(7), 8)
    np.testing.assert_array_equal(pair(line, x0), line.pair(x0))
    pair(SemidiscreteOT(line.x1, 0 * line.potential), x0)
    assert len(traces) == 1


def test_bad_input(line, key):
    x1 = jnp.ones((4, 1))
    for option, least in (
        ("num_iterations", "at least 1"),
        ("batch_size", "at least 1"),
        ("learning_rate", "positive"),
    ):
        with pytest.raises(ValueError, match=f"{option} must be {least}"):
            fit_semidiscrete(key, x1, **{option: 0})
    with pytest.raises(
        ValueError, match=r"Sampled\(moons\) draws must have the shape of like, \(256, 1\), got \(256, 2\)"
    ):
        fit_semidiscrete(key, x1, source=Sampled(moons))
    with pytest.raises(ValueError, match=r"x1 must be \[batch, ...\], not empty, got shape \(0, 1\)"):
        fit_semidiscrete(key, jnp.ones((0, 1)))
    with pytest.raises(ValueError, match="must be finite"):
        fit_semidiscrete(key, x1.at[1].set(jnp.nan), num_iterations=2)
    with pytest.raises(ValueError, match=r"x0 must be \[batch, ...\] with events \(1,\), got shape \(3, 2\)"):
        line.pair(jnp.ones((3, 2)))
