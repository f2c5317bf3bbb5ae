import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline
from scipy.optimize import linear_sum_assignment

from fm_jax import times
from fm_jax.conditions import DropCondition
from fm_jax.couplings import ExactOT, independent, minibatch_ot, paired
from fm_jax.losses import couple_snapshots, flow_matching, trajectory_matching
from fm_jax.paths import AffinePath, SplinePath
from fm_jax.schedules import Linear
from fm_jax.types import Pairing

KNOTS = (0.0, 0.3, 1.0)


def scaled_identity(params, t, x, cond, *, train, rngs):
    return params * x


def snapshots(num=16, knots=3):
    return np.random.default_rng(0).normal(size=(num, knots, 2)).astype(np.float32)


def test_chain_of_optimal_assignments_is_scipys():
    """Each link is optimal by SciPy, and the indices say where each snapshot came from."""
    x = snapshots(knots=4)
    chain = couple_snapshots(minibatch_ot, None, jnp.asarray(x))
    here = np.arange(16)
    np.testing.assert_array_equal(chain.indices[:, 3], here)  # the last snapshot stays in place
    for k in (2, 1, 0):
        costs = np.square(x[:, None, k] - x[None, :, k + 1]).sum(-1)
        rows, columns = linear_sum_assignment(costs)
        before = np.empty(16, dtype=int)
        before[columns] = rows  # the snapshot k that goes with each snapshot k + 1
        here = before[here]
        np.testing.assert_array_equal(chain.indices[:, k], here)
        np.testing.assert_array_equal(chain.x[:, k], x[here, k])
    assert chain.weight is None


def test_nothing_is_dropped_or_repeated_and_classes_stay_apart():
    x, cond = snapshots(), np.arange(16) % 3
    chain = couple_snapshots(minibatch_ot, None, jnp.asarray(x), jnp.asarray(cond))
    for k in range(3):
        np.testing.assert_array_equal(np.sort(chain.indices[:, k]), np.arange(16))
        np.testing.assert_array_equal(cond[chain.indices[:, k]], cond)


def test_trajectories_that_are_known_are_recovered(key):
    """Populations that move without mixing, each snapshot in an order of its own: transport finds who is who."""
    start = 10.0 * np.arange(16)[:, None] + np.zeros((16, 2))
    x = np.stack([start, start + 1.0, start + 3.0], axis=1)
    shuffled = np.stack([np.random.default_rng(k).permutation(x[:, k]) for k in range(3)], axis=1)
    chain = jax.jit(lambda x: couple_snapshots(minibatch_ot, None, x))(shuffled.astype(np.float32))
    np.testing.assert_allclose(chain.x[:, 1] - chain.x[:, 0], 1.0, atol=1e-4)
    np.testing.assert_allclose(chain.x[:, 2] - chain.x[:, 1], 2.0, atol=1e-4)


def test_paired_trajectories_are_kept():
    x = snapshots()
    for coupling in (paired, independent):
        chain = couple_snapshots(coupling, None, jnp.asarray(x))
        np.testing.assert_array_equal(chain.x, x)


@pytest.mark.slow
def test_weights_of_the_links_multiply(key):
    """A coupling that weighs its pairs, with a fresh key for each link."""

    def weighing(key, x0, x1, cond=None):
        order = jax.random.permutation(key, 16)
        return Pairing(x0[order], x1, cond, order, jnp.linspace(0.5, 1.5, 16))

    x = jnp.asarray(snapshots())
    chain = couple_snapshots(weighing, key, x)
    np.testing.assert_allclose(chain.weight, np.linspace(0.5, 1.5, 16) ** 2, rtol=1e-6)
    assert (chain.indices[:, 0] != chain.indices[:, 1]).any()
    batch = {"x": x, "t": jnp.linspace(0, 1, 16)}
    weighted = trajectory_matching(scaled_identity, SplinePath(KNOTS), coupling=weighing)(0.3, key, batch)
    assert weighted[0] != weighted[1]["mse"]


def test_value_by_hand():
    """SciPy's spline through SciPy's chain, and the mean of |f - u_t|^2 with the weights of the batch."""
    x, t, weight = snapshots(), np.linspace(0.05, 0.95, 16, dtype=np.float32), np.linspace(0, 2, 16, dtype=np.float32)
    batch = {"x": jnp.asarray(x), "t": t, "weight": weight}
    loss, metrics = trajectory_matching(scaled_identity, SplinePath(KNOTS), coupling=ExactOT())(0.7, None, batch)
    coupled = np.asarray(couple_snapshots(ExactOT(), None, batch["x"]).x, dtype=np.float64)
    errors = []
    for i in range(16):
        spline = CubicSpline(KNOTS, coupled[i], bc_type="natural")
        errors.append(np.square(0.7 * spline(t[i]) - spline(t[i], 1)).mean())
    np.testing.assert_allclose(loss, np.mean(weight * errors), rtol=1e-4)
    np.testing.assert_allclose(metrics["mse"], np.mean(errors), rtol=1e-4)


@pytest.mark.slow
def test_two_snapshots_are_flow_matching(key):
    """K = 2 is the loss on straight lines under the same coupling."""
    x0, x1 = jax.random.normal(key, (2, 16, 3, 3, 1))
    t = jnp.linspace(0, 1, 16)
    a = trajectory_matching(scaled_identity, SplinePath((0, 1)), coupling=minibatch_ot)(
        0.4, None, {"x": jnp.stack([x0, x1], axis=1), "t": t}
    )[0]
    b = flow_matching(scaled_identity, AffinePath(Linear()), coupling=minibatch_ot)(
        0.4, None, {"x0": x0, "x1": x1, "t": t}
    )[0]
    np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.slow
def test_the_velocity_of_moving_gaussians_has_no_slope(key):
    """Snapshots N(m_k, s_k^2) in one dimension, coupled optimally: the spline of the moments moves them.

    x_t = m(t) + s(t) e with e the trajectory's normal score, so v = m' + s'/s (x - m), m and s the splines through the
    moments. With all ranks known the loss of that velocity is 0, though each snapshot is shuffled.
    """
    means, scales = np.array([0.0, 2.0, -1.0]), np.array([1.0, 0.5, 2.0])
    e = np.random.default_rng(1).normal(size=64)
    x = np.stack([np.random.default_rng(k).permutation(means[k] + scales[k] * e) for k in range(3)], axis=1)[..., None]
    t = np.linspace(0.01, 0.99, 64)
    mean, scale = (CubicSpline(KNOTS, y, bc_type="natural") for y in (means, scales))
    m, s, dm, ds = (jnp.asarray(y)[:, None] for y in (mean(t), scale(t), mean(t, 1), scale(t, 1)))

    def network(params, t, x, cond, *, train, rngs):
        return dm + ds / s * (x - m)

    loss_fn = trajectory_matching(network, SplinePath(KNOTS), coupling=minibatch_ot)
    assert (
        loss_fn(None, None, {"x": jnp.asarray(x, dtype=jnp.float32), "t": jnp.asarray(t, dtype=jnp.float32)})[0] < 1e-8
    )


def test_conditions_are_dropped_and_nothing_else_changes(key):
    """The keys are the first four of the split, and then that of dropping."""
    cond, seen, x = jnp.arange(64), [], jnp.asarray(snapshots(64))

    def network(params, t, x, cond, *, train, rngs):
        seen.append((t, x, cond, rngs["dropout"]))
        return params * x

    drop, path = DropCondition(0.5, -1), SplinePath(KNOTS, sigma=0.3)
    for each in (None, drop):
        trajectory_matching(network, path, drop=each)(0.7, key, {"x": x, "cond": cond})
    key_t, key_coupling, key_path, key_dropout = jax.random.split(key, 4)
    t = times.Uniform()(key_t, 64)
    chain = couple_snapshots(independent, key_coupling, x, cond)
    for t_seen, x_seen, _, rng in seen:
        np.testing.assert_array_equal(t_seen, t)
        np.testing.assert_array_equal(x_seen, path.sample(key_path, t, chain.x).x_t)
        assert rng == key_dropout
    np.testing.assert_array_equal(seen[0][2], cond)
    np.testing.assert_array_equal(seen[1][2], drop(jax.random.split(key, 5)[4], cond))


def test_conditions_dropout_keys_and_gradients(key):
    """Under jit, with everything random, the network sees conditions in place and is differentiated."""
    cond = jnp.arange(16)
    x = jnp.asarray(snapshots()) + 100.0 * cond[:, None, None]

    def network(params, t, x, cond, *, train, rngs):
        assert train
        assert set(rngs) == {"dropout"}
        return params * (jnp.round(x / 100) - cond[:, None])

    loss_fn = trajectory_matching(network, SplinePath(KNOTS, sigma=0.1))
    (_, metrics), gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(1.0, key, {"x": x, "cond": cond})
    assert gradient == 0.0
    assert metrics["loss"] == metrics["mse"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trajectory_matching(scaled_identity, AffinePath()), "the path must be a SplinePath, got AffinePath"),
        (
            lambda: trajectory_matching(scaled_identity, SplinePath(KNOTS))(
                1.0, jax.random.key(0), {"x1": jnp.ones(2)}
            ),
            r"the batch must hold 'x', got \['x1'\]",
        ),
        (
            lambda: trajectory_matching(scaled_identity, SplinePath(KNOTS))(
                1.0, jax.random.key(0), {"x": jnp.ones((4, 2, 2))}
            ),
            r"with K = 3 snapshots, got shape \(4, 2, 2\)",
        ),
        (lambda: couple_snapshots(paired, None, jnp.ones((4, 1))), r"with K >= 2 snapshots, got shape \(4, 1\)"),
        (
            lambda: trajectory_matching(scaled_identity, SplinePath(KNOTS))(1.0, None, {"x": jnp.ones((4, 3, 2))}),
            "without a key the batch must hold 't'",
        ),
        (
            lambda: trajectory_matching(scaled_identity, SplinePath(KNOTS))(
                1.0, None, {"x": jnp.ones((4, 3, 2)), "t": jnp.ones((4, 1))}
            ),
            r"t must be \[batch\] = \(4,\), got shape \(4, 1\)",
        ),
        (
            lambda: trajectory_matching(scaled_identity, SplinePath(KNOTS, sigma=0.1))(
                1.0, None, {"x": jnp.ones((4, 3, 2)), "t": jnp.ones(4)}
            ),
            "needs a key",
        ),
        (
            lambda: trajectory_matching(lambda p, t, x, c, **_: x[:, :1], SplinePath(KNOTS))(
                1.0, jax.random.key(0), {"x": jnp.ones((4, 3, 2))}
            ),
            r"what the network returns must have the shape of x, \(4, 2\), got \(4, 1\)",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_times_may_be_any_on_the_unit_interval(key):
    loss_fn = trajectory_matching(scaled_identity, SplinePath(KNOTS), time_sampler=times.LogitNormal())
    assert np.isfinite(loss_fn(0.5, key, {"x": jnp.asarray(snapshots())})[0])
