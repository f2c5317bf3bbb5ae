"""Pairs of a flow against its closed-form map; reflow and distillation of Gaussians against theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SAMPLERS

from fm_jax import oracles
from fm_jax.couplings import paired
from fm_jax.fewstep import distillation, make_pairs, reflow
from fm_jax.losses import flow_matching
from fm_jax.nfe import Counted
from fm_jax.paths import AffinePath, start
from fm_jax.samplers import Adaptive, RungeKutta, UniPC, sample
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import VE, VP, Linear
from fm_jax.shapes import expand_time
from fm_jax.sources import Sampled

GAUSSIAN = oracles.gaussian_mixture([[1.0, -2.0]], np.array([[[0.5, 0.2], [0.2, 0.3]]]))
MEAN, STD = 1.5, 0.3
ON_A_LINE = oracles.gaussian_mixture([[MEAN]], STD)


ONE_STEP = RungeKutta("euler")
RK4 = {"sampler": RungeKutta("rk4"), "times": 40}


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("schedule", "options", "nfe", "atol"),
    [
        (Linear(), RK4, 160, 1e-4),
        (Linear(), {"times": 100}, 200, 2e-3),
        (Linear(), {}, 40, 2e-2),
        (VP(), {"sampler": UniPC(VP()), "times": uniform(300, 0.0, 0.999)}, 300, 1e-2),
        (VE(0.1, 20.0), {"sampler": UniPC(VE(0.1, 20.0)), "times": 200, "source": start(VE(0.1, 20.0))}, 200, 2e-2),
        (Linear(), {"sampler": Adaptive()}, None, 1e-3),
    ],
    ids=["rk4", "midpoint", "default", "unipc", "source", "adaptive"],
)
def test_pairs_obey_the_flow_map(schedule, options, nfe, atol, key):
    v, num = Counted(oracles.velocity(GAUSSIAN, schedule), 1), 24
    pairs, spent = make_pairs(v, key, (num, 2), batch_size=12, **options)
    assert sorted(pairs) == ["x0", "x1"]
    assert pairs["x0"].shape == pairs["x1"].shape == (num, 2)
    last = 0.999 if schedule == VP() else 1.0
    exact = oracles.flow_map(GAUSSIAN, schedule, 0.0, last, jnp.asarray(pairs["x0"]))
    np.testing.assert_allclose(pairs["x1"], exact, atol=atol)
    assert spent.shape == (num,)
    assert (spent == nfe).all() if nfe else (spent > 20).all()
    assert len(np.unique(pairs["x0"])) == 2 * num  # no batch is drawn twice
    scale = start(schedule).scale
    assert 0.5 * scale < pairs["x0"].std() < 1.5 * scale


def test_a_last_batch_that_is_smaller_and_a_cost_that_is_not_known(key):
    pairs, spent = make_pairs(lambda t, x: x, key, (5, 2, 1), batch_size=2, times=3)
    assert pairs["x0"].shape == pairs["x1"].shape == (5, 2, 1)
    assert spent is None


def linear_fit(k, pairs):
    """The regression of u_t on x_t over the pairs, at any t: exact where all is Gaussian."""
    del k
    m0, m1 = pairs["x0"].mean(), pairs["x1"].mean()
    (c00, c01), (_, c11) = np.cov(pairs["x0"][:, 0], pairs["x1"][:, 0])

    def v(t, x):
        t = expand_time(jnp.asarray(t, dtype=x.dtype), x)
        covariance = (1 - t) * (c01 - c00) + t * (c11 - c01)
        variance = (1 - t) ** 2 * c00 + 2 * t * (1 - t) * c01 + t**2 * c11
        return m1 - m0 + covariance / variance * (x - (1 - t) * m0 - t * m1)

    return v


def displacement(t, x):
    """The velocity of optimal transport from N(0, 1) to N(m, s^2): x_t = (1 - t + t s) x0 + t m."""
    t = expand_time(jnp.asarray(t, dtype=x.dtype), x)
    return MEAN + (STD - 1) / (1 - t + t * STD) * (x - t * MEAN)


def energy(v, x0, num_steps=200):
    """E integral |v|^2 dt along the flow of v, by the midpoint rule."""
    states = sample(v, x0, times=num_steps, trajectory=True).trajectory
    return float(num_steps * (jnp.diff(states, axis=0) ** 2).mean(axis=1).sum())


@pytest.mark.slow
def test_one_reflow_is_optimal_transport_on_a_line(key):
    """The flow's pairs are monotone, so the reflowed velocity is the displacement's, and its energy is W2^2."""
    v = oracles.velocity(ON_A_LINE, Linear())
    (once,) = reflow(linear_fit, v, key, (3000, 1), batch_size=1500, **RK4)
    x = jnp.linspace(-2, 2, 9)[:, None]
    for t in (0.0, 0.3, 0.9):
        np.testing.assert_allclose(once(t, x), displacement(t, x), atol=2e-3)
    exact = oracles.flow_map(ON_A_LINE, Linear(), 0.0, 1.0, x)
    np.testing.assert_allclose(sample(once, x, ONE_STEP, times=1).x, exact, atol=2e-3)
    assert abs(sample(v, x, ONE_STEP, times=1).x - exact).max() > 0.5  # it was not straight before
    x0 = jax.random.normal(key, (3000, 1))
    w2 = float(((MEAN + (STD - 1) * x0) ** 2).mean())
    np.testing.assert_allclose(energy(once, x0), w2, rtol=2e-3)
    assert energy(v, x0) > 1.02 * w2


@pytest.mark.slow
def test_displacement_is_the_minimiser_on_the_pairs(key):
    """flow_matching with coupling=paired takes the pairs as they are: the loss of the displacement's velocity is 0."""
    v = oracles.velocity(ON_A_LINE, Linear())
    pairs, _ = make_pairs(v, key, (64, 1), **RK4)
    loss = lambda v: flow_matching(lambda p, t, x, c, **_: v(t, x), AffinePath(), coupling=paired)(None, key, pairs)[0]  # noqa: E731
    assert loss(displacement) < 1e-6
    assert loss(v) > 1e-2


def test_rounds_follow_each_other_with_fresh_noise(key):
    seen = []

    def fit(k, pairs):
        seen.append((k, pairs))
        return lambda t, x: jnp.full_like(x, 10.0 * (k + 1))

    flows = reflow(fit, lambda t, x: jnp.zeros_like(x), key, (5, 2), rounds=3, batch_size=2, times=1)
    assert [k for k, _ in seen] == [0, 1, 2]
    for k, pairs in seen:
        np.testing.assert_allclose(pairs["x1"], pairs["x0"] + 10 * k, rtol=1e-6)
    assert len(np.unique(np.stack([pairs["x0"] for _, pairs in seen]))) == 3 * 5 * 2
    assert [float(v(0.0, jnp.zeros((1, 1)))[0, 0]) for v in flows] == [10.0, 20.0, 30.0]


@pytest.mark.parametrize("name", [name for name, make in SAMPLERS.items() if make(Linear()).stochastic])
def test_random_samplers_are_refused(name, key):
    with pytest.raises(ValueError, match="sampler must not be random, for x1 to be a function of x0, got"):
        make_pairs(lambda t, x: x, key, (4, 2), sampler=SAMPLERS[name](Linear()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (0, 2)}, r"shape\[0\], the number of pairs, must be at least 1, got 0"),
        ({"shape": 4}, r"shape must be \(number of pairs, \*event\), got 4"),
        ({"shape": ()}, r"shape must be \(number of pairs, \*event\), got \(\)"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (
            {"source": Sampled(lambda key, num: jnp.zeros((3, 2)))},
            r"must have the shape of like, \(4, 2\), got \(3, 2\)",
        ),
        ({"v": lambda t, x: x / 0}, "samples must be finite, got 4 of 4 that are not"),
        ({"times": [0.0, 0.5, 0.2]}, "times must be finite and strictly monotone"),
    ],
)
def test_refuses(options, message, key):
    given = {"v": lambda t, x: x, "shape": (4, 2), "times": 2, **options}
    with pytest.raises(ValueError, match=message):
        make_pairs(given.pop("v"), key, given.pop("shape"), **given)


def test_refuses_no_rounds(key):
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        reflow(linear_fit, lambda t, x: x, key, (4, 1), rounds=0)


def affine(params, t, x, cond, *, train, rngs):
    """Sees t, so that any other time than 0 shows."""
    assert train is (rngs is not None)
    return params["a"] * x + params["b"] + 100 * expand_time(t, x)


def test_distillation_by_hand(key):
    x0, x1 = np.random.default_rng(0).standard_normal((2, 5, 2, 3)).astype(np.float32)
    weight = np.arange(5, dtype=np.float32)
    params = {"a": 0.3, "b": -0.7}
    error = ((1.3 * x0 - 0.7 - x1) ** 2).mean(axis=(1, 2))
    loss, metrics = distillation(affine)(params, key, {"x0": x0, "x1": x1, "weight": weight})
    np.testing.assert_allclose(loss, (weight * error).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["distance"], error.mean(), rtol=1e-5)
    largest = distillation(affine, distance=lambda x, y: abs(x - y).max(axis=(1, 2)))
    expected = np.abs(1.3 * x0 - 0.7 - x1).max(axis=(1, 2)).mean()
    np.testing.assert_allclose(largest(params, None, {"x0": x0, "x1": x1})[0], expected, rtol=1e-5)


def test_distillation_finds_the_map(key):
    """At the flow's own map x1 = m + s x0 the loss and its gradient are 0 up to the error of the sampler."""
    v = oracles.velocity(ON_A_LINE, Linear())
    pairs, _ = make_pairs(v, key, (64, 1), **RK4)
    loss = lambda params: distillation(affine)(params, None, pairs)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)({"a": STD - 1, "b": MEAN})
    assert value < 1e-7
    assert max(map(abs, gradient.values())) < 1e-3
    assert max(map(abs, jax.grad(loss)({"a": STD - 1, "b": MEAN + 0.1}).values())) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": jnp.zeros(2)}, "distillation is for t = 0: take 't' out of the batch"),
        ({"x0": None}, "the batch must hold 'x0'"),
        ({"x1": None}, "the batch must hold 'x1'"),
        ({"x0": jnp.ones((2, 3))}, r"x0 must have the shape of x1, \(2, 1\), got \(2, 3\)"),
    ],
)
def test_distillation_refuses(change, message):
    batch = {"x0": jnp.ones((2, 1)), "x1": jnp.ones((2, 1)), **change}
    batch = {name: value for name, value in batch.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        distillation(affine)({"a": 1.0, "b": 0.0}, None, batch)
    with pytest.raises(ValueError, match=r"distance\(x, y\) must be \[batch\] = \(2,\), got shape \(\)"):
        distillation(affine, distance=lambda x, y: ((x - y) ** 2).mean())(
            {"a": 1.0, "b": 0.0}, None, {"x0": jnp.ones((2, 1)), "x1": jnp.ones((2, 1))}
        )
