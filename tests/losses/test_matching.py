import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import COUPLINGS, SCHEDULES, WEIGHTS, mixture

from fm_jax import losses, oracles, times
from fm_jax.conditions import DropCondition
from fm_jax.couplings import ExactOT, independent
from fm_jax.losses import EDMWeight, SNRWeight, flow_matching
from fm_jax.losses.matching import draw_pairs, times_within
from fm_jax.paths import AffinePath, SplinePath, StochasticInterpolant
from fm_jax.schedules import VP, Cosine, Linear, coefficients
from fm_jax.sources import Normal, Sampled, Uniform
from fm_jax.types import KINDS


def scaled_identity(params, t, x, cond, *, train, rngs):
    return params * x


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_value_by_hand(schedule, x64):
    """The mean of |f - target|^2 on a given batch, in numpy."""
    t = np.array([0.1501, 0.4001, 0.8001])
    x0, x1 = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 1))
    alpha, sigma, d_alpha, d_sigma = (np.asarray(c).reshape(3, 1, 1, 1) for c in coefficients(schedule, jnp.asarray(t)))
    targets = {"velocity": d_alpha * x1 + d_sigma * x0, "data": x1, "noise": x0, "score": -x0 / sigma}
    batch = {"x1": x1, "x0": x0, "t": t}
    path = AffinePath(schedule)
    results = jax.jit(
        lambda: {kind: flow_matching(scaled_identity, path, kind=kind)(0.7, None, batch) for kind in KINDS}
    )()
    for kind, (loss, metrics) in results.items():
        expected = np.square(0.7 * (alpha * x1 + sigma * x0) - targets[kind]).mean()
        np.testing.assert_allclose(loss, expected, rtol=1e-10)
        assert metrics["loss"] == metrics["mse"] == loss


@pytest.mark.slow_but_one
@pytest.mark.parametrize("kind", KINDS)
def test_minimiser_is_the_oracle(kind, key):
    """Moving the perfect network by a constant raises the loss by that constant squared: the cross term vanishes.

    The z-score of the cross term is within 4.5 for each of four kinds; the false-alarm rate is 3e-5.
    """
    gm, schedule, num = mixture(), Linear(), 100_000
    key_data, key_loss = jax.random.split(key)
    batch = {"x1": oracles.sample(gm, key_data, num)}

    def network(shift, t, x, cond, *, train, rngs):
        return getattr(oracles.prediction(gm, schedule, t, x), kind) + shift

    # Times near 1 give the score's target a heavy tail, which would break the normal approximation.
    loss = flow_matching(network, AffinePath(schedule), kind=kind, time_sampler=times.Uniform(0.05, 0.9))
    mse, gradient = jax.jit(jax.value_and_grad(lambda shift: loss(shift, key_loss, batch)[0]))(0.0)
    assert abs(gradient) / (2 * jnp.sqrt(mse / (2 * num))) < 4.5


@pytest.mark.slow_but_one
@pytest.mark.parametrize("weight", WEIGHTS, ids=str)
def test_weighted_losses_agree_between_kinds(weight, key, x64):
    """A weight defines one objective: errors of equivalent networks of all four kinds weigh the same."""
    gm, schedule = mixture(), Cosine()
    x0 = jax.random.normal(key, (6, 2))
    batch = {"x1": oracles.sample(gm, key, 6), "x0": x0, "t": jnp.linspace(0.1, 0.9, 6)}
    values = []
    for kind in KINDS:
        network = lambda p, t, x, c, *, train, rngs: getattr(oracles.prediction(gm, schedule, t, x), kind)  # noqa: B023, E731
        loss_fn = flow_matching(network, AffinePath(schedule), kind=kind, weight=weight)
        loss, metrics = jax.jit(loss_fn, static_argnums=(0, 1))(None, None, batch)
        values.append(loss)
        assert metrics["loss"] == loss
    np.testing.assert_allclose(values, values[0], rtol=1e-8)


def test_named_losses_are_the_one_function(key):
    path, batch = AffinePath(Cosine()), {"x1": jnp.ones((8, 2))}
    for named, kind, weight in [
        (losses.noise_prediction, "noise", None),
        (losses.data_prediction, "data", None),
        (losses.score_matching, "score", lambda t, kind, schedule: schedule.sigma(t) ** 2),
    ]:
        a = named(scaled_identity, path)(0.3, key, batch)[0]
        np.testing.assert_array_equal(
            a, flow_matching(scaled_identity, path, kind=kind, weight=weight)(0.3, key, batch)[0]
        )


@pytest.mark.slow
def test_weighted_score_loss_is_the_noise_loss(key, x64):
    """sigma^2 |s - (-x0 / sigma)|^2 = |(-sigma s) - x0|^2."""
    path = AffinePath(Linear())
    batch = {"x1": jax.random.normal(key, (5, 2)), "x0": jnp.ones((5, 2)), "t": jnp.linspace(0.1, 0.8, 5)}
    as_noise = lambda p, t, x, c, *, train, rngs: -(1 - t)[:, None] * p * x  # noqa: E731
    a = losses.score_matching(scaled_identity, path)(0.4, None, batch)[0]
    np.testing.assert_allclose(a, losses.noise_prediction(as_noise, path)(0.4, None, batch)[0], rtol=1e-12)


@pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
def test_coupling_and_condition_reach_the_network(coupling, key):
    """With straight pairs recovered, a network that knows the shift has no error; conditions stay with their data."""
    cond = jnp.arange(16)
    x0 = jax.random.normal(jax.random.key(7), (16, 2))
    batch = {"x0": x0, "x1": 10.0 * cond[:, None] + jnp.zeros((16, 2)), "cond": cond}

    def network(params, t, x, cond, *, train, rngs):
        assert train
        assert set(rngs) == {"dropout"}
        return (10.0 * cond[:, None] - x) / (1 - t)[:, None]  # the conditional velocity of the linear path

    loss = flow_matching(network, AffinePath(Linear()), coupling=coupling, time_sampler=times.Uniform(0, 0.9))
    assert jax.jit(loss)(None, key, batch)[0] < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("make", [AffinePath, StochasticInterpolant])
@pytest.mark.parametrize("source", [Normal(), Uniform(-3.0, 3.0), Sampled(lambda key, num: jnp.full((num, 2), 7.0))])
def test_x0_is_drawn_from_the_source_of_the_path(make, source, key):
    """To the last bit the loss of the same x0 given with the batch, whose first key it is drawn with."""
    batch = {"x1": jax.random.normal(jax.random.key(3), (6, 2))}
    x0 = source.draw(jax.random.split(key, 5)[0], batch["x1"])
    loss = flow_matching(scaled_identity, make(source=source))
    np.testing.assert_array_equal(loss(0.5, key, batch)[0], loss(0.5, key, {**batch, "x0": x0})[0])
    if source == Normal():
        np.testing.assert_array_equal(x0, jax.random.normal(jax.random.split(key, 5)[0], (6, 2)))


def test_same_key_same_loss_and_different_key_different(key):
    loss = flow_matching(scaled_identity, AffinePath())
    batch = {"x1": jnp.ones((8, 2))}
    assert loss(0.5, key, batch)[0] == loss(0.5, key, batch)[0]
    assert loss(0.5, key, batch)[0] != loss(0.5, jax.random.key(1), batch)[0]


@pytest.mark.slow
def test_default_times_stay_where_the_target_is_finite(key):
    """VP has an infinite slope at t = 1 and the score is infinite there: 100,000 draws give no infinity."""
    for kind in KINDS:
        for schedule in (VP(), Linear()):
            loss = flow_matching(scaled_identity, AffinePath(schedule), kind=kind)
            assert np.isfinite(loss(0.5, key, {"x1": jnp.ones((100_000, 1))})[0])


def test_traces_once(key):
    loss_fn = flow_matching(scaled_identity, AffinePath())

    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradient(params, key, batch):
        return jax.grad(loss_fn, has_aux=True)(params, key, batch)

    for i in range(3):
        gradient(float(i), jax.random.fold_in(key, i), {"x1": jnp.full((4, 2), float(i))})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: flow_matching(scaled_identity, AffinePath(), kind="eps"), "kind must be one of"),
        (
            lambda: flow_matching(scaled_identity, AffinePath(VP()), time_sampler=times.LogitNormal()),
            r"draws from \[0.0, 1.0\], but the velocity target of .*VP.* times.Rescale\(sampler, 0.0, 0.99999\)",
        ),
        (
            lambda: losses.score_matching(scaled_identity, AffinePath(), time_sampler=times.Uniform()),
            "the score target of .*Linear.* is finite only on",
        ),
        (
            lambda: flow_matching(scaled_identity, AffinePath(source=Uniform()), kind="score"),
            "kind must be one of 'velocity', 'data', 'noise', got 'score'",
        ),
        (
            lambda: flow_matching(scaled_identity, SplinePath((0.0, 1.0)), weight=WEIGHTS[0]),
            "weight needs a path with a schedule, by which kinds convert; SplinePath.* has none",
        ),
    ],
)
def test_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("batch", "key", "message"),
    [
        ({"x": jnp.ones((2, 2))}, jax.random.key(0), r"the batch must hold 'x1', got \['x'\]"),
        ({"x1": jnp.ones((2, 2))}, None, "without a key the batch must hold 'x0' and 't'"),
        ({"x1": jnp.ones((2, 2)), "x0": jnp.ones((3, 2))}, jax.random.key(0), "must have the same batch"),
        ({"x1": jnp.ones((2, 2)), "t": jnp.ones((2, 1))}, jax.random.key(0), r"t must be \[batch\] = \(2,\)"),
        (
            {"x1": jnp.ones((2, 2)), "cond": jnp.ones(3)},
            jax.random.key(0),
            r"cond must be .* with batch = 2",
        ),
    ],
)
def test_refused_when_traced(batch, key, message):
    with pytest.raises(ValueError, match=message):
        flow_matching(scaled_identity, AffinePath())(0.5, key, batch)


@pytest.mark.slow
def test_dropping_conditions_changes_nothing_else(key):
    """Source, times, pairs and keys are those of a loss without, which are the first five of the key's split."""
    cond = jnp.arange(16)
    batch = {"x1": 1.0 * cond[:, None] + jnp.zeros((16, 2)), "cond": {"label": cond, "vector": 1.0 * cond[:, None]}}
    coupling, drop = ExactOT(ignore_cond=True), DropCondition(0.5, {"label": -1, "vector": -1.0})
    within = times_within(None, (0.0, 1.0), "it")
    plain, dropped = (draw_pairs(key, batch, Normal(), coupling, within, each) for each in (None, drop))
    key_x0, key_t, key_coupling, key_path, key_dropout, key_drop = jax.random.split(key, 6)
    assert (jax.random.key_data(jax.random.split(key, 5)) == jax.random.key_data(jax.random.split(key, 6)[:5])).all()
    pairing = coupling(key_coupling, jax.random.normal(key_x0, (16, 2)), batch["x1"])
    for pairs in (plain, dropped):
        np.testing.assert_array_equal(pairs.x0, pairing.x0)
        np.testing.assert_array_equal(pairs.t, times.Uniform()(key_t, 16))
        assert pairs.key_path == key_path
        assert pairs.rngs["dropout"] == key_dropout
    jax.tree.map(np.testing.assert_array_equal, plain.cond, batch["cond"])
    jax.tree.map(np.testing.assert_array_equal, dropped.cond, drop(key_drop, batch["cond"]))
    lost = np.asarray(dropped.cond["label"] == -1)
    assert 0 < lost.sum() < 16
    np.testing.assert_array_equal(dropped.cond["vector"][:, 0] == -1, lost)


def test_couplings_see_what_is_dropped(key):
    """The coupling sees the true condition, the network what is left of it."""
    cond = jnp.arange(16) % 2
    seen = {}

    def network(params, t, x, cond, *, train, rngs):
        seen[train] = cond
        return x

    def watching(key, x0, x1, cond=None):
        seen["coupling"] = cond
        return independent(key, x0, x1, cond)

    batch = {"x1": jnp.ones((16, 2)), "cond": cond}
    loss_fn = flow_matching(network, AffinePath(), coupling=watching, drop=DropCondition(1.0, 2))
    loss_fn(None, key, batch)
    np.testing.assert_array_equal(seen["coupling"], cond)
    np.testing.assert_array_equal(seen[True], jnp.full(16, 2))
    loss_fn(None, None, batch | {"x0": jnp.zeros((16, 2)), "t": jnp.full(16, 0.5)})  # without a key nothing is random
    np.testing.assert_array_equal(seen[False], cond)


def test_what_is_not_there_cannot_be_dropped(key):
    loss_fn = flow_matching(scaled_identity, AffinePath(), drop=DropCondition(0.1, 2))
    with pytest.raises(ValueError, match=r"cond must be a pytree of \[batch, ...\], got None: there is no condition"):
        loss_fn(0.5, key, {"x1": jnp.ones((2, 2))})


def test_a_path_without_a_source_needs_x0(key):
    with pytest.raises(ValueError, match="the path has no source to draw x0 from: the batch must hold 'x0'"):
        flow_matching(scaled_identity, SplinePath((0.0, 1.0)))(0.5, key, {"x1": jnp.ones((2, 2))})


def test_network_of_the_wrong_shape_is_refused(key):
    """[batch] minus [batch, 1] would broadcast to [batch, batch] and train on nonsense."""
    loss = flow_matching(lambda p, t, x, c, *, train, rngs: x[:, :1] * p, AffinePath())
    with pytest.raises(ValueError, match=r"what the network returns must have the shape of x, \(4, 2\), got \(4, 1\)"):
        loss(1.0, key, {"x1": jnp.ones((4, 2))})


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("kind", "weight", "end"),
    [
        ("noise", EDMWeight(), 0.0),
        ("noise", SNRWeight(0.0), 0.0),
        ("data", SNRWeight(), 1.0),
    ],
    ids=str,
)
def test_times_of_an_infinite_weight_are_left_out(kind, weight, end, key):
    path = AffinePath()
    loss_fn = jax.jit(flow_matching(scaled_identity, path, kind=kind, weight=weight))
    x1 = jax.random.normal(key, (512, 2))
    assert np.isfinite(loss_fn(0.5, key, {"x1": x1})[0])
    low, high = path.target_domain(kind, weight=weight)
    batch = {"x1": x1, "t": jnp.where(jnp.arange(512) % 2, low, high)}
    assert np.isfinite(loss_fn(0.5, key, batch)[0])
    message = (
        rf"t must be within \[{low}, {high}\], where the {kind} target of .*, weighted by .*, is finite, got {end:g}\."
    )
    with pytest.raises(ValueError, match=message):
        flow_matching(scaled_identity, path, kind=kind, weight=weight)(0.5, key, {"x1": x1[:1], "t": jnp.full(1, end)})
    with pytest.raises(ValueError, match=rf"draws from \[0.0, 1.0\], but .* is finite only on \[{low}, {high}\]"):
        flow_matching(scaled_identity, path, kind=kind, weight=weight, time_sampler=times.Uniform())


def test_paths_are_values():
    assert AffinePath(Linear()) == AffinePath(Linear())
    assert dataclasses.replace(AffinePath(), schedule=Cosine()) == AffinePath(Cosine())
