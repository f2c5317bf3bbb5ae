"""In low precision times and costs stay precise; in double precision what is float32 stays float32."""

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import couplings, guidance, likelihood, losses, metrics, oracles, parameterization, paths, samplers
from fm_jax.couplings.costs import cost_matrix, squared_euclidean
from fm_jax.likelihood import log_prob
from fm_jax.nfe import Counted
from fm_jax.samplers import RungeKutta, sample
from fm_jax.samplers.churn import renoise
from fm_jax.schedules import VP, Cosine, Linear

KEY = jax.random.key(0)
F32 = jnp.dtype("float32")
LABELS = jnp.array([0, 1, 1, 0])
X, Y = (jax.random.normal(jax.random.key(seed), (4, 2), F32) for seed in (0, 1))

# ---- bfloat16 has 128 numbers in [0.5, 1).

NUM_STEPS = 300


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", contracts.FIXED_STEPS)
def test_times_are_not_rounded_to_the_precision_of_the_state(name):
    """Each time of the grid reaches the network, and the samples are finite, where half precision has far fewer."""
    schedule, seen = VP(), set()
    sampler, exact = contracts.FIXED_STEPS[name](schedule), oracles.velocity(contracts.mixture(), schedule)

    def v(t, x):
        jax.debug.callback(lambda t: seen.add(float(t)), t)
        return exact(t, x.astype(F32)).astype(x.dtype)

    x0 = jax.random.normal(KEY, (3, 2), jnp.bfloat16)
    times = np.linspace(0.5, 0.999, NUM_STEPS + 1)
    x = jax.jit(lambda x0: sample(v, x0, sampler, times=times, key=KEY if sampler.stochastic else None).x)(x0)
    jax.block_until_ready(x)
    jax.effects_barrier()
    assert x.dtype == jnp.bfloat16
    assert jnp.isfinite(x.astype(F32)).all()
    assert {*np.float32(times[:-1]).tolist()} <= seen


@pytest.mark.slow_but_one
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", contracts.COUPLINGS)
def test_partners_are_those_of_the_costs_in_single_precision(name, dtype):
    x0, x1 = (jax.random.normal(jax.random.key(seed), (64, 16), dtype) for seed in (2, 3))
    coupling = contracts.COUPLINGS[name]
    found = coupling(KEY, x0, x1)
    np.testing.assert_array_equal(found.index0, coupling(KEY, x0.astype(F32), x1.astype(F32)).index0)
    assert found.x0.dtype == dtype


def test_costs_of_a_function_of_ones_own_and_of_bytes_are_precise():
    seen = []

    def cost(x0, x1):
        seen.extend([x0.dtype, x1.dtype])
        return squared_euclidean(x0, x1)

    for dtype in (jnp.bfloat16, np.uint8):
        x = np.array([[0], [250]]).astype(dtype)
        assert cost_matrix(cost, x, x[::-1])[0, 0] == 250.0**2
    assert {*seen} == {F32}


def test_a_permutation_follows_a_plan_in_half_precision():
    plan = jnp.full((3, 3), 1 / 3, jnp.bfloat16)
    assert sorted(couplings.sample_permutation(KEY, plan).tolist()) == [0, 1, 2]


def test_a_log_density_of_half_precision_is_summed_in_single():
    x1 = X.astype(jnp.bfloat16)
    options = {"sampler": RungeKutta("rk4"), "times": 200}
    found, wanted = (log_prob(lambda t, x: x, x, **options) for x in (x1, x1.astype(F32)))
    assert found.dtype == F32
    np.testing.assert_array_equal(found, wanted)


def test_a_scale_of_guidance_is_not_rounded():
    scale, x = 7.3, jnp.ones((1, 1), jnp.bfloat16)
    v = guidance.classifier_free(lambda t, x: 1.0 * x, lambda t, x: 0 * x, scale)
    np.testing.assert_allclose(v(0.5, x), [[7.3]], rtol=1e-6)


# ---- Double precision is on for the whole process, and the data are float32 all the same.


class Seen(list):
    """The dtypes of times and states that a network was called with."""

    def network(self, params, t, x, cond, *, train, rngs):
        self.extend([t.dtype, x.dtype])
        params = params.get("drift", params.get("latent", params))
        return params["w"] * x

    def velocity(self, t, x):
        self.extend([t.dtype, x.dtype])
        return -x


def dtypes(tree):
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


@pytest.mark.slow
@pytest.mark.parametrize("name", contracts.LOSSES)
def test_losses_stay_in_single_precision(name, x64):
    seen, w = Seen(), {"w": jnp.ones((), F32)}
    params = {"drift": w, "latent": w} if name == "bridge_matching" else w
    batch = {"x": jnp.stack([X, Y, X], axis=1)} if name == "trajectory_matching" else {"x0": X, "x1": Y}
    value = jax.value_and_grad(contracts.LOSSES[name](seen.network), has_aux=True)
    for more in ({}, {"t": np.full(4, 0.4)}):
        if more and name == "distillation":
            continue
        assert dtypes(value(params, KEY, batch | more)) == {F32}
    assert {*seen} <= {F32}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("weight", [None, *contracts.WEIGHTS], ids=str)
@pytest.mark.parametrize("kind", ["velocity", "data", "noise", "score"])
def test_every_weight_of_every_kind_is_finite_and_in_single_precision(kind, weight, x64):
    """On the times that the loss draws by default, also at both ends of their range."""
    for schedule in contracts.SCHEDULES:
        seen, path = Seen(), paths.AffinePath(schedule)
        loss_fn = losses.flow_matching(seen.network, path, kind=kind, weight=weight)
        for t in (None, np.linspace(*path.target_domain(kind, weight=weight), 4)):
            loss, metrics = loss_fn({"w": jnp.ones((), F32)}, KEY, {"x1": Y, "t": t})
            assert np.isfinite(loss), (schedule, t)
            assert dtypes((loss, metrics)) == {F32}
        assert {*seen} == {F32}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("times", contracts.TIME_SAMPLERS, ids=str)
def test_every_time_sampler_leaves_the_data_in_single_precision(times, x64):
    seen = Seen()
    schedule = getattr(times, "schedule", Linear())
    loss_fn = losses.flow_matching(seen.network, paths.AffinePath(schedule), time_sampler=times)
    assert dtypes(loss_fn({"w": jnp.ones((), F32)}, KEY, {"x1": Y})) == {F32}
    assert {*seen} == {F32}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", contracts.FIXED_STEPS | contracts.LEARNED)
def test_samplers_stay_in_single_precision(name, x64):
    seen, sampler = Seen(), (contracts.FIXED_STEPS | contracts.LEARNED)[name](Linear())
    key = KEY if sampler.stochastic else None
    for times in (None,) if name == "learned" else (3, np.linspace(0.1, 0.9, 4)):
        assert sample(seen.velocity, X, sampler, times=times, key=key).x.dtype == F32
    assert {*seen[1::2]} == {F32}  # states; times may be as precise as those of a learned solver are


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.5, np.float64(0.5), np.full(4, 0.5)], ids=["number", "scalar", "batch"])
def test_functions_of_time_and_state_stay_in_single_precision(t, x64):
    found = [parameterization.convert(kind, X, t, Y, VP()) for kind in ("velocity", "data", "noise", "score")]
    v = parameterization.velocity_fn(lambda t, x, cond: -x, "data", Cosine())
    found += [v(t, X), parameterization.score_fn(v, Cosine())(t, X)]
    found += [parameterization.reschedule(v, Cosine(), Linear())(t, X)]
    for rule in contracts.RULES:
        for scale in (2.0, np.full(4, 2.0)):
            found += [guidance.classifier_free(v, lambda t, x: x, scale, rule=rule, interval=(0.1, 0.9))(t, X)]
    found += [guidance.classifier(v, lambda t, x: -(x**2).sum(axis=1), 2.0, Linear())(t, X)]
    for path in contracts.PATHS:
        ends = (jnp.stack([X] * len(path.times), axis=1),) if path.source is None else (X, Y)
        at = path.sample(KEY, t, *ends)
        found += [at.x_t, at.u_t, path.targets(at)]
    found += [divergence(v, divergence.draw(KEY, X), t, X) for divergence in contracts.DIVERGENCES]
    found += [samplers.langevin_step(v, t, X, Y, 0.1)]
    assert dtypes(found) == {F32}


@pytest.mark.slow
def test_steps_and_measures_stay_in_single_precision(x64):
    def v(t, x):
        return -x

    found = [renoise(0.5, 0.4, X, Y, schedule=Linear()), samplers.ode_step(v, 0.2, 0.4, X)]
    found += [samplers.ddim_step(v, 0.2, 0.4, X, schedule=Linear(), eta=0.5, noise=Y)]
    found += [likelihood.log_prob(v, X, sampler=RungeKutta("rk4"), times=4), metrics.path_energy(v, X)]
    found += [metrics.mmd(X, Y), metrics.energy_distance(X, Y), metrics.straightness(v, X)]
    found += [guidance.compose(lambda t, x, c: x, "data", Linear(), [LABELS, LABELS], 2, [2.0, -1.0])(0.5, X)]
    assert dtypes(found) == {F32}


def test_a_function_that_does_leave_single_precision_is_seen(x64):
    seen = Seen()
    sample(Counted(seen.velocity, 1), X.astype(jnp.float64), RungeKutta("euler"), times=2)
    assert {*seen} == {jnp.dtype("float64")}
