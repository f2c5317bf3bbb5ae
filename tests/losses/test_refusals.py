"""What every loss refuses: times outside of its range, numbers that would broadcast, data that are no real numbers."""

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import couplings, fewstep, losses, paths
from fm_jax.times import Rescale, Uniform
from fm_jax.types import Pairing

KEY = jax.random.key(0)
X, Y = (jax.random.normal(jax.random.key(seed), (4, 2)) for seed in (0, 1))
W = {"w": jnp.asarray(0.7)}


def network(params, t, x, cond, *, train, rngs):
    params = params.get("drift", params.get("latent", params))
    return params["w"] * x


def call(name, **changed):
    """A loss of the contract list, on a batch with some values changed."""
    params = {"drift": W, "latent": W} if name == "bridge_matching" else W
    batch = {"x": jnp.stack([X, Y, X], axis=1)} if name == "trajectory_matching" else {"x0": X, "x1": Y}
    return contracts.LOSSES[name](network)(params, KEY, batch | changed)


WITH_TIMES = [name for name in contracts.LOSSES if name != "distillation"]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("t", [-0.5, 1.5, np.nan, np.inf])
@pytest.mark.parametrize("name", WITH_TIMES)
def test_times_in_the_batch_outside_of_the_range(name, t):
    call(name, t=jnp.full(4, 0.5))
    with pytest.raises(ValueError, match=r"^t must be "):
        call(name, t=jnp.array([0.5, 0.5, 0.5, t]))


class Steps:
    """Times of DDPM's code."""

    domain = (0.0, 1.0)

    def __call__(self, key, batch_size):
        return jax.random.randint(key, (batch_size,), 0, 1000)


@pytest.mark.parametrize("name", WITH_TIMES)
def test_numbers_of_steps_are_no_times(name):
    """Traced ones too, of which nobody can say that they are 0 and 1."""
    for t in (jnp.array([0, 5, 999, 3]), np.arange(4)):
        with pytest.raises(ValueError, match=r"^t must be real numbers from 0, the source, .* t = 1 - n / 1000"):
            call(name, t=t)
    with pytest.raises(ValueError, match=r"^t must be real numbers from 0, the source, "):
        jax.jit(lambda t: call(name, t=t))(jnp.zeros(4, int))
    call(name, t=jnp.zeros(4, int))


def test_a_time_sampler_that_draws_numbers_of_steps():
    for run in (lambda f: f, jax.jit):
        loss_fn = run(losses.flow_matching(network, paths.AffinePath(), time_sampler=Steps()))
        with pytest.raises(ValueError, match=r"^t must be real numbers from 0, the source, "):
            loss_fn(W, KEY, {"x1": X})


@pytest.mark.parametrize("name", WITH_TIMES)
def test_a_pair_in_place_of_a_batch(name):
    loss_fn = contracts.LOSSES[name](network)
    for pair, said in (((X, Y), "a tuple of 2"), ([X], "a list of 1")):
        with pytest.raises(
            ValueError, match=rf'^the batch must be a dict, \{{"x1?": data, "cond": labels\}}, got {said}'
        ):
            loss_fn(W, KEY, pair)


def test_a_time_at_which_the_score_is_infinite():
    loss_fn = losses.score_matching(network, paths.AffinePath())
    with pytest.raises(
        ValueError,
        match=r"^t must be within \[0.0, 0.999\], where the score target .* is finite, got times from 0.5 to 1",
    ):
        loss_fn(W, KEY, {"x1": Y, "t": jnp.array([0.5, 0.6, 0.7, 1.0])})


def test_a_time_at_which_the_weight_is_infinite():
    """The noise is finite at t = 0, where EDM's weight of its error is not: such times are neither drawn nor taken."""
    options = {"kind": "noise", "weight": losses.EDMWeight()}
    loss_fn = losses.flow_matching(network, paths.AffinePath(), **options)
    assert np.isfinite(loss_fn(W, KEY, {"x1": Y})[0])
    with pytest.raises(
        ValueError, match=r"^t must be within \[0.001, 1.0\], where the noise target .* weighted by EDM"
    ):
        loss_fn(W, KEY, {"x1": Y, "t": jnp.array([0.0, 0.6, 0.7, 1.0])})
    with pytest.raises(
        ValueError, match=r"draws from \[0.0, 1.0\], but the noise target .* is finite only on \[0.001, 1"
    ):
        losses.flow_matching(network, paths.AffinePath(), time_sampler=Uniform(), **options)
    there = Rescale(Uniform(), 0.001, 1.0)
    assert np.isfinite(
        losses.flow_matching(network, paths.AffinePath(), time_sampler=there, **options)(W, KEY, {"x1": Y})[0]
    )


@pytest.mark.parametrize("factor", [jnp.ones((4, 1)), jnp.ones((4, 2)), jnp.ones(3), jnp.ones(4) + 1j, None, "one"])
def test_a_weight_that_is_not_a_number_for_each_example(factor):
    def loss(weight):
        return losses.flow_matching(network, paths.AffinePath(), weight=weight)(W, KEY, {"x1": Y, "x0": X})[0]

    assert loss(lambda t, kind, schedule: 2.0) == loss(lambda t, kind, schedule: jnp.full(4, 2.0))
    with pytest.raises(ValueError, match=r"^weight\(t, kind, schedule\) must be "):
        loss(lambda t, kind, schedule: factor)


@pytest.mark.parametrize("name", contracts.LOSSES)
def test_weights_in_the_batch_of_another_shape(name):
    one, double = (call(name, weight=jnp.full(4, each))[0] for each in (1.0, 2.0))
    np.testing.assert_allclose(double, 2 * one, rtol=1e-6)
    for weight in (jnp.ones((4, 1)), jnp.ones(3), jnp.ones(())):
        with pytest.raises(ValueError, match=r"^weight must be \[batch\] = \(4,\), got shape"):
            call(name, weight=weight)


def coupling_of(**changed):
    """The independent coupling, but for some parts of what it returns."""
    return lambda key, x0, x1, cond=None: couplings.independent(key, x0, x1, cond)._replace(**changed)


MADE = {
    "flow_matching": lambda coupling: losses.flow_matching(network, paths.AffinePath(), coupling=coupling),
    "bridge_matching": lambda coupling: losses.bridge_matching(
        losses.two_heads(network, network), paths.BrownianBridge(1.0), coupling=coupling
    ),
    "optimal_flow_matching": lambda coupling: fewstep.optimal_flow_matching(
        lambda params, x: (x**2).sum(axis=1), coupling=coupling
    ),
    "trajectory_matching": lambda coupling: losses.trajectory_matching(
        network, paths.SplinePath((0.0, 1.0)), coupling=coupling
    ),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": jnp.ones((4, 1))}, r"weight of the pairing must be \[batch\] = \(4,\), got shape \(4, 1\)"),
        ({"weight": jnp.ones(3)}, r"weight of the pairing must be \[batch\]"),
        ({"x1": Y[:3]}, r"x1 and x1 of the pairing must have the same shape"),
        ({"cond": jnp.arange(3)}, r"cond must be \[batch, ...\] with batch = 4"),
    ],
)
@pytest.mark.parametrize("name", MADE)
def test_a_coupling_that_returns_what_does_not_fit(name, changed, message):
    batch = {"x": jnp.stack([X, Y], axis=1)} if name == "trajectory_matching" else {"x0": X, "x1": Y}
    params = {"drift": W, "latent": W} if name == "bridge_matching" else W
    with pytest.raises(ValueError, match=message):
        MADE[name](coupling_of(**changed))(params, KEY, batch)


def test_a_coupling_that_returns_no_pairing():
    with pytest.raises(ValueError, match=r"^what the coupling returns must be a Pairing, got .*which has no 'x0'"):
        MADE["flow_matching"](lambda key, x0, x1, cond: (x0, x1))(W, KEY, {"x0": X, "x1": Y})
    assert Pairing._fields[:2] == ("x0", "x1")


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool, np.complex64])
@pytest.mark.parametrize("which", ["x0", "x1"])
def test_data_that_are_no_real_numbers(which, dtype):
    for name in ("flow_matching", "bridge_matching", "distillation", "optimal_flow_matching"):
        with pytest.raises(ValueError, match=rf"^{which} must be floating point, got "):
            call(name, **{which: np.ones((4, 2), dtype)})


def test_bytes_are_told_where_to_go():
    with pytest.raises(ValueError, match=r"got uint8; fm_jax.data.images.to_float brings pixels to \[-1, 1\]"):
        call("flow_matching", x1=np.ones((4, 2), np.uint8))


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_weights_in_the_batch_that_are_not_finite(weight):
    for name in contracts.LOSSES:
        with pytest.raises(ValueError, match=r"^weight must be finite, got "):
            call(name, weight=jnp.array([1.0, 1.0, 1.0, weight]))


def test_a_condition_of_another_batch_than_that_of_a_bridge():
    path, cond = paths.BrownianBridge(1.0), jnp.ones(1)
    for make in (losses.bridge_velocity, losses.bridge_score):
        v = make(lambda t, x, c: (c * x, x), path, cond)
        with pytest.raises(ValueError, match=r"^cond must be \[batch, ...\] with batch = 4, got shape \(1,\)"):
            v(0.5, jnp.ones((4, 2)))


def test_a_path_of_ones_own_with_a_schedule_is_weighted_where_the_weight_is_finite():
    class Own:
        """A path that says of no weight where it is finite."""

        def __init__(self):
            self.inner = paths.AffinePath()
            self.source, self.schedule, self.domain = self.inner.source, self.inner.schedule, self.inner.domain
            self.kinds, self.sample, self.targets = self.inner.kinds, self.inner.sample, self.inner.targets

        def target_domain(self, kind):
            return self.inner.target_domain(kind)

    options = {"kind": "noise", "weight": losses.EDMWeight()}
    own, usual = (
        losses.flow_matching(network, path, **options)(W, KEY, {"x1": Y})[0] for path in (Own(), paths.AffinePath())
    )
    assert own == usual
    with pytest.raises(ValueError, match=r"^t must be within \[0.001, 1.0\]"):
        losses.flow_matching(network, Own(), **options)(W, KEY, {"x1": Y, "t": jnp.zeros(4)})
