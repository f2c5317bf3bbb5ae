"""What is added to the library is listed in contracts.py, and what a listed value claims is measured here."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import types

import contracts
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import guided_by_half
from exponential import even, one_draw_an_example, slow_start

import fm_jax
import fm_jax.manifolds
import fm_jax.models
from fm_jax import losses, oracles, samplers, schedules
from fm_jax.nfe import Counted
from fm_jax.samplers import RungeKutta, sample
from fm_jax.schedules import VP, Linear, Polynomial, log_snr

# ---- Completeness: a class is of a noun if it has what the noun has; every one must be in the list of the noun.

NOUNS = {
    "source": (("draw", "log_prob"), [*contracts.SOURCES, *contracts.TOKEN_SOURCES, *contracts.MANIFOLD_SOURCES]),
    "token source": (("draw", "log_prob", "probs", "mask", "num_tokens"), contracts.TOKEN_SOURCES),
    "schedule": (("alpha", "sigma", "t_from_log_snr"), contracts.SCHEDULES),
    "path": (("sample", "targets", "kinds"), [*contracts.PATHS, *contracts.MANIFOLD_PATHS]),
    "token path": (("sample", "probs", "log_posterior", "posterior"), contracts.TOKEN_PATHS),
    "manifold": (("exp", "log", "project", "tangent", "squared_norm"), [*contracts.MANIFOLDS, *contracts.MESHES]),
    "sampler": (
        ("solve", "order", "nfe_per_step", "stochastic", "domain"),
        [
            *(make(Linear()) for make in (contracts.SAMPLERS | contracts.LEARNED).values()),
            *contracts.TOKEN_SAMPLERS,
            *contracts.MANIFOLD_SAMPLERS,
        ],
    ),
}
CALLED = {
    "time sampler": (["key", "batch_size"], contracts.TIME_SAMPLERS),
    "coupling": (
        ["key", "x0", "x1", "cond"],
        [*contracts.COUPLINGS.values(), *contracts.OTT_COUPLINGS.values(), *contracts.DEVICE_COUPLINGS.values()],
    ),
    "weight": (["t", "kind", "schedule"], contracts.WEIGHTS),
    "rule of guidance": (["t", "x", "conditional", "unconditional", "scale"], contracts.RULES),
    "divergence": (["v", "probes", "t", "x"], contracts.DIVERGENCES),
    "model": (
        ["t", "x", "cond", "train"],
        [make() for make in (contracts.MODELS | contracts.PLAIN_MODELS | contracts.AROUND).values()]
        + [make("tiny") for make in contracts.PUBLISHED.values()],
    ),
    "rule of remasking": (["kappa", "kappa_next"], contracts.REMASKING),
    "embed": (
        ["cond", "features", "batch_size"],
        [make() for make in (contracts.EMBEDS | contracts.OTHER_EMBEDS).values()],
    ),
}


def name_of(value):
    """Without addresses of functions, which differ between the workers that collect the tests."""
    return re.sub(r"<function (\w+) at \w+>", r"\1", str(value))[:60]


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def has(cls, attributes):
    fields = getattr(cls, "__dataclass_fields__", {})
    return all(hasattr(cls, each) or each in fields for each in attributes)


def public(module):
    """Public functions and classes that a module defines; protocols only say what others have."""
    for name, member in vars(module).items():
        ours = getattr(member, "__module__", None) == module.__name__ and not name.startswith("_")
        if (
            ours
            and not getattr(member, "_is_protocol", False)
            and (inspect.isclass(member) or inspect.isroutine(member))
        ):
            yield member


def unlisted(modules):
    """{noun: what of it is not listed}."""
    found = {}
    listed_losses = {*contracts.LOSSES, *contracts.TOKEN_LOSSES, *contracts.OTHER_LOSSES}
    for member in [member for module in modules for member in public(module)]:
        if inspect.isclass(member):
            nouns = [(noun, listed) for noun, (needed, listed) in NOUNS.items() if has(member, needed)]
            call = vars(member).get("__call__")
            nouns += [(noun, listed) for noun, (names, listed) in CALLED.items() if call and parameters(call) == names]
            for noun, listed in nouns:
                if member not in map(type, listed):
                    found.setdefault(noun, []).append(member.__name__)
        elif parameters(member) == CALLED["coupling"][0] and member not in CALLED["coupling"][1]:
            found.setdefault("coupling", []).append(member.__name__)
        elif (
            inspect.signature(member).return_annotation is fm_jax.types.LossFn and member.__name__ not in listed_losses
        ):
            found.setdefault("loss", []).append(member.__name__)
    return found


def library():
    return [importlib.import_module(info.name) for info in pkgutil.walk_packages(fm_jax.__path__, "fm_jax.")]


def test_every_value_of_a_noun_is_listed():
    assert unlisted(library()) == {}


def test_what_nobody_listed_is_found():
    module = types.ModuleType("fm_jax.invented")

    def invented(cls, name):
        return type(name, (cls,), {"__module__": module.__name__})

    classes = [
        schedules.Cosine,
        samplers.DDIM,
        fm_jax.sources.Normal,
        fm_jax.sources.UniformTokens,
        fm_jax.paths.AffinePath,
        fm_jax.paths.MixturePath,
        fm_jax.manifolds.Sphere,
        fm_jax.times.Uniform,
        losses.EDMWeight,
        fm_jax.guidance.Extrapolate,
        samplers.Cap,
        fm_jax.likelihood.Exact,
        fm_jax.couplings.ExactOT,
        fm_jax.models.MLP,
        fm_jax.models.LabelEmbedding,
    ]
    for cls in classes:
        new = invented(cls, "New" + cls.__name__)
        if "__call__" in vars(cls):
            new.__call__ = vars(cls)["__call__"]
        setattr(module, new.__name__, new)
    module.new_loss = types.FunctionType(losses.flow_matching.__code__, {}, "new_loss")
    module.new_loss.__annotations__ = losses.flow_matching.__annotations__
    module.new_loss.__module__ = module.__name__
    assert unlisted([module]).keys() == {*NOUNS, *CALLED, "loss"}


@pytest.mark.parametrize(
    "value",
    [value for _, listed in (*NOUNS.values(), *CALLED.values()) for value in listed],
    ids=name_of,
)
def test_is_a_value(value):
    """Equal, hashable and printed as itself, so that it can be an argument of `jit`; frozen."""
    if not dataclasses.is_dataclass(value) or isinstance(value, samplers.LearnedSolver | nn.Module):
        return  # a function, a pytree of arrays, or a value that Flax has made
    again = dataclasses.replace(value)
    assert value == again
    assert hash(value) == hash(again)
    assert type(value).__name__ in repr(value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.something = 1


# ---- Schedules: the declared inverse and domain.


def claims_of(schedule, num=41):
    """Largest error of the inverse, and whether all is finite on the domain and the SNR increases."""
    t = np.linspace(*schedule.domain, num)
    inside = jnp.asarray(t[1:-1])
    inverse = np.abs(schedule.t_from_log_snr(log_snr(schedule, inside)) - inside).max()
    finite = all(np.isfinite(c).all() for c in schedules.coefficients(schedule, jnp.asarray(t, jnp.float32)))
    return float(inverse), finite, bool((np.diff(log_snr(schedule, inside)) > 0).all())


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", contracts.SCHEDULES, ids=name_of)
def test_schedules_keep_what_they_claim(schedule, x64):
    inverse, finite, increasing = claims_of(schedule)
    assert inverse < 1e-12
    assert finite
    assert increasing


def test_a_schedule_with_a_wrong_inverse_or_domain_is_found(x64):
    class Inverse(schedules.Cosine):
        def t_from_log_snr(self, log_snr):
            return super().t_from_log_snr(log_snr) ** 1.01

    class Domain(schedules.LinearVP):
        domain = (0.0, 1.0)

    assert claims_of(Inverse())[0] > 1e-3
    assert not claims_of(Domain())[1]


# ---- Samplers: the declared order, evaluations a step, randomness and range.

NUM_STEPS = [32, 64, 128]
PLACE = Linear(), 0.05, 0.95
"""Where the log-SNR is finite, and its steps are bounded."""


def slope(errors):
    return -np.polyfit(np.log(NUM_STEPS), np.log(errors), 1)[0]


def continued(grid):
    """The grid with tiny steps after its end, so that all have one length and compile once."""
    further = NUM_STEPS[-1] + 3 - len(grid)
    return np.concatenate([grid, grid[-1] + 1e-6 * np.arange(1, further + 1)])


def flow_orders(made):
    """Orders on the flow of a guided mixture, {name: order}; in float64.

    Multistep methods in log-SNR start with short steps, for those of low order not to matter.
    """
    schedule, t0, t1 = PLACE
    x0 = jax.random.normal(jax.random.key(0), (8, 2), dtype=float)
    v = guided_by_half(schedule, len(x0))
    starts = {start: [continued(t0 + (t1 - t0) * start(n)) for n in NUM_STEPS] for start in (even, slow_start)}
    fine = jax.jit(lambda: sample(v, x0, RungeKutta("rk4"), times=np.linspace(t0, t1, 801)).x)()

    @jax.jit
    def errors():
        found = {}
        for name, each in made.items():
            start = slow_start if hasattr(each, "schedule") else even
            last = jnp.array([len(start(n)) - 1 for n in NUM_STEPS])

            def error(grid, last, each=each):
                return jnp.abs(sample(v, x0, each, times=grid, trajectory=True).trajectory[last] - fine).mean()

            found[name] = jax.vmap(error)(np.stack(starts[start]), last)
        return found

    return {name: slope(found) for name, found in errors().items()}


def law_orders(made):
    """Weak orders on a Gaussian, {name: order}, by the exact variance at the end: there is no Monte Carlo error.

    A sampler is affine in its start and its noise there, so that its responses give the law. To be called with
    `step_noise` replaced by `one_draw_an_example`.
    """
    schedule, t0, t1 = PLACE
    v, scale = oracles.velocity(oracles.gaussian_mixture([[0.5]], 0.6), schedule), 0.6
    (a0, a1), (s0, s1) = schedule.alpha(jnp.array([t0, t1])), schedule.sigma(jnp.array([t0, t1]))

    def error(sampler, num):
        x0 = jnp.zeros((num + 2, 1), dtype=float).at[1].set(1.0)
        x = sample(v, x0, sampler, times=np.linspace(t0, t1, num + 1), key=jax.random.key(0)).x[:, 0]
        response = x[1:] - x[0]
        variance = response[0] ** 2 * (a0**2 * scale**2 + s0**2) + (response[1:] ** 2).sum()
        return jnp.abs(variance - (a1**2 * scale**2 + s1**2))

    found = jax.jit(lambda: {name: [error(each, num) for num in NUM_STEPS] for name, each in made.items()})()
    return {name: slope(errors) for name, errors in found.items()}


MADE = {name: make(Linear()) for name, make in contracts.FIXED_STEPS.items()}
ON_FLOW = {name: each for name, each in MADE.items() if not each.stochastic}
WITH_NOISE = {name: each for name, each in MADE.items() if each.stochastic and each.order is not None}


@pytest.fixture(scope="module")
def measured():
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        for module in ("sde", "ddim", "dpm_solver", "churn"):
            patch.setattr(f"fm_jax.samplers.{module}.step_noise", one_draw_an_example)
        return flow_orders(ON_FLOW) | law_orders(WITH_NOISE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FLOW | WITH_NOISE)
def test_the_declared_order_is_the_measured_one(measured, name):
    assert abs(measured[name] - MADE[name].order) < (0.35 if MADE[name].order > 3 else 0.25), measured[name]


def test_an_order_that_is_only_claimed_is_found(x64):
    class Sold(samplers.RungeKutta):
        order = 7

    assert abs(flow_orders({"sold": Sold("heun")})["sold"] - Sold.order) > 4


def calls_that_happen(sampler, schedule, times):
    """How often the network really runs, at which times, and what the solution says."""
    seen = []

    def network(t, x):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return -x

    key = jax.random.key(0) if sampler.stochastic else None
    x0 = jnp.ones((2, 1))
    solution = jax.jit(lambda x: sample(Counted(network, 3), x, sampler, times=times, key=key))(x0)
    jax.block_until_ready(solution)
    jax.effects_barrier()
    return seen, solution


@pytest.mark.parametrize("name", MADE)
def test_what_is_called_is_counted_and_each_step_costs_what_is_declared(name):
    counts = []
    for num in (6, 9):
        seen, solution = calls_that_happen(MADE[name], Linear(), np.linspace(0.1, 0.9, num + 1))
        assert int(solution.calls) == len(seen)
        assert int(solution.nfe) == 3 * len(seen)
        counts.append(len(seen))
    assert counts[1] - counts[0] == 3 * MADE[name].nfe_per_step


@pytest.mark.parametrize("schedule", [VP(), Polynomial(2.0)], ids=name_of)
@pytest.mark.parametrize("name", MADE)
def test_a_number_of_steps_goes_over_the_declared_range(name, schedule):
    sampler = contracts.FIXED_STEPS[name](schedule)
    seen, solution = calls_that_happen(sampler, schedule, 4)
    t0, t1 = sampler.domain
    assert math.isclose(min(seen), t0, abs_tol=1e-7)
    assert max(seen) <= t1 + 1e-7
    assert np.isfinite(solution.x).all()


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", MADE)
def test_random_means_that_the_key_matters(name):
    sampler, x0 = MADE[name], jnp.ones((4, 2))
    keys = (jax.random.key(0), jax.random.key(1)) if sampler.stochastic else (None, None)
    end = jax.jit(lambda key: sample(lambda t, x: -x, x0, sampler, times=np.linspace(0.1, 0.9, 4), key=key).x)
    one, other = map(end, keys)
    assert sampler.stochastic == bool((one != other).any())


IMPLICIT = pytest.mark.xfail(reason="Lineax compares shardings, which pmap adds", raises=ValueError, strict=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=IMPLICIT) if "kvaerno" in name else name for name in contracts.SAMPLERS]
)
def test_samples_are_the_same_on_each_device(name):
    """Under `pmap` every device draws what it would alone; steps chosen by an error may differ in the last bits."""
    sampler, x0 = contracts.SAMPLERS[name](Linear()), jax.random.normal(jax.random.key(0), (2, 3, 2))
    keys, times = jax.random.split(jax.random.key(1), 2), np.linspace(0.1, 0.9, 4)

    def end(key, x):
        return sample(lambda t, x: -x, x, sampler, times=times, key=key if sampler.stochastic else None).x

    alone = jnp.stack([jax.jit(end)(key, x) for key, x in zip(keys, x0, strict=True)])
    np.testing.assert_allclose(jax.pmap(end)(keys, x0), alone, atol=1e-6 if sampler.nfe_per_step else 1e-3)


# ---- Losses: one interface.

PARAMS = {"w": jnp.asarray(0.7)}


def apply_fn(params, t, x, cond, *, train, rngs):
    return params.get("drift", params.get("latent", params))["w"] * x if "w" not in params else params["w"] * x


def token_network(params, t, x, cond, *, train, rngs):
    return params["w"] * jnp.sin(jnp.arange(5)[None, None] * (1.0 + x[..., None]))


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", [*contracts.LOSSES, *contracts.TOKEN_LOSSES])
def test_losses_are_pure_differentiable_and_weigh_examples(name):
    params = {"drift": PARAMS, "latent": PARAMS} if name == "bridge_matching" else PARAMS
    x = jax.random.normal(jax.random.key(1), (6, 3, 2))
    batch = {"x": x} if name == "trajectory_matching" else {"x0": x[:, 0], "x1": x[:, 1]}
    if name in contracts.TOKEN_LOSSES:
        loss_fn, batch = contracts.TOKEN_LOSSES[name](token_network), {"x1": jnp.arange(18).reshape(6, 3) % 4}
    else:
        loss_fn = contracts.LOSSES[name](apply_fn)
    key, value = jax.random.key(0), jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, metrics), gradient = value(params, key, batch)
    assert loss.shape == ()
    assert float(loss) == float(metrics["loss"])
    assert all(np.shape(each) == () for each in metrics.values())
    assert all(np.isfinite(leaf) and leaf != 0 for leaf in jax.tree.leaves(gradient))
    np.testing.assert_array_equal(value(params, key, batch)[0][0], loss)
    double, none = ({**batch, "weight": jnp.full(6, weight)} for weight in (2.0, 0.0))
    np.testing.assert_allclose(value(params, key, double)[0][0], 2 * loss, rtol=1e-5)
    assert value(params, key, none)[0][0] == 0
    with pytest.raises(ValueError, match="the batch must hold 'x"):
        loss_fn(params, key, {})


# ---- Sources and paths.


@pytest.mark.slow
@pytest.mark.parametrize("source", contracts.SOURCES, ids=name_of)
def test_sources_draw_like_what_is_given(source):
    for like in (jnp.zeros((5, 2)), jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)):
        x = source.draw(jax.random.key(0), like)
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
    assert (
        source.draw(jax.random.key(0), jnp.zeros((5, 2))) != source.draw(jax.random.key(1), jnp.zeros((5, 2)))
    ).any()


@pytest.mark.slow_but_one
@pytest.mark.parametrize("source", contracts.TOKEN_SOURCES, ids=name_of)
def test_sources_of_tokens_draw_what_their_probabilities_say(source):
    assert len(source.probs) == source.num_tokens
    for like in (jnp.zeros((8, 4000), jnp.int32), jax.ShapeDtypeStruct((8, 4000), jnp.uint8)):
        x = source.draw(jax.random.key(0), like)
        assert (x.shape, x.dtype) == (like.shape, like.dtype)
        often = np.bincount(np.asarray(x).ravel(), minlength=source.num_tokens) / x.size
        assert np.abs(often - source.probs).max() < 5 * 0.5 / math.sqrt(x.size)
    with np.errstate(divide="ignore"):
        expected = np.log(np.asarray(source.probs))[np.asarray(x)].sum(axis=1)
    np.testing.assert_allclose(source.log_prob(x), expected, rtol=1e-4)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("path", contracts.TOKEN_PATHS, ids=name_of)
def test_paths_of_tokens_start_at_the_source_end_in_the_data_and_draw_their_law(path):
    num = path.num_tokens
    x1 = jnp.broadcast_to(jnp.array([1, num - 2, 1, 1])[:, None], (4, 8000))
    time = jnp.array([0.0, 0.3, 0.7, 1.0])
    law = path.probs(time, x1[:, :1])
    np.testing.assert_allclose(law.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(law[0, 0], path.source.probs, atol=1e-6)
    np.testing.assert_array_equal(law[-1, 0], np.eye(num)[1])
    drawn = path.sample(jax.random.key(0), time, path.source.draw(jax.random.key(1), x1), x1)
    assert drawn.x_t.shape == x1.shape
    assert drawn.x_t.dtype == x1.dtype
    often = np.stack([np.bincount(row, minlength=num) / row.size for row in np.asarray(drawn.x_t)])
    assert np.abs(often - law[:, 0]).max() < 5 * 0.5 / math.sqrt(8000)
    logits = jax.random.normal(jax.random.key(2), (*x1[:, :9].shape, num))
    posterior = path.posterior(logits, x1[:, :9])
    np.testing.assert_allclose(posterior.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(path.log_posterior(logits, x1[:, :9])), posterior, rtol=1e-6)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("path", contracts.PATHS, ids=name_of)
def test_paths_say_what_can_be_regressed_and_where(path):
    """Every kind has a target, in the shape of the state, finite over the whole of its declared range."""
    num = len(path.times) if path.source is None else 2
    x = jax.random.normal(jax.random.key(0), (9, num, 2))
    ends = (x,) if path.source is None else (x[:, 0], x[:, 1])
    assert "velocity" in path.kinds
    assert path.target_domain("velocity") == path.domain
    for kind in path.kinds:
        low, high = path.target_domain(kind)
        drawn = path.sample(jax.random.key(1), jnp.linspace(low, high, 9), *ends)
        targets = path.targets(drawn)
        assert targets.keys() == {*path.kinds}
        assert targets[kind].shape == drawn.x_t.shape
        assert np.isfinite(targets[kind]).all(), kind
    with pytest.raises(ValueError, match="kind must be one of 'velocity'"):
        path.target_domain("velocities")
