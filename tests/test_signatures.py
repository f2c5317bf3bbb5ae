"""The contract of every signature: callables, params, key, t, x, cond, then options by keyword."""

import importlib
import inspect
import pkgutil

import contracts
import jax
import jax.numpy as jnp
import optax
import pytest

import fm_jax
from fm_jax import (
    fewstep,
    guidance,
    likelihood,
    losses,
    metrics,
    parameterization,
    samplers,
    schedules,
    sources,
    types,
)
from fm_jax.models import MLP, linen_apply
from fm_jax.paths import AffinePath, SplinePath
from fm_jax.train import make_step

# The names that have one meaning everywhere, by their place. Others may stand between them.
PLACE = {
    name: place
    for place, names in enumerate(
        ["v v_cond v_uncond apply_fn model_fn potential_fn", "params", "key", "t", "t_next", "x x0 x1 x_t", "cond"]
    )
    for name in names.split()
}
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def positional(function) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind in POSITIONAL and each.name != "self"]


def keyword_only(function) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]


def public_functions() -> dict:
    """Every public function, and every public method and `__call__` of the public classes."""
    found = {}
    for info in pkgutil.walk_packages(fm_jax.__path__, "fm_jax."):
        module = importlib.import_module(info.name)
        for name, member in vars(module).items():
            if name.startswith("_") or getattr(member, "__module__", None) != info.name:
                continue
            if inspect.isfunction(member):
                found[f"{info.name}.{name}"] = member
            elif inspect.isclass(member):
                for method, function in vars(member).items():
                    if inspect.isfunction(function) and (method == "__call__" or not method.startswith("_")):
                        found[f"{info.name}.{name}.{method}"] = function
    return found


FUNCTIONS = public_functions()


def test_arguments_are_in_the_one_order():
    assert len(FUNCTIONS) > 100
    wrong = {}
    for name, function in FUNCTIONS.items():
        known = [each for each in positional(function) if each in PLACE]
        if known != sorted(known, key=PLACE.__getitem__):
            wrong[name] = positional(function)
    assert wrong == {}


def test_the_order_can_fail():
    known = positional(lambda x, t: None)
    assert known != sorted(known, key=PLACE.__getitem__)


@pytest.mark.parametrize(
    ("protocol", "members"),
    [
        (types.Schedule, contracts.SCHEDULES),
        (types.TimeSampler, contracts.TIME_SAMPLERS),
        (types.Coupling, [*contracts.COUPLINGS.values(), *contracts.OTT_COUPLINGS.values()]),
        (types.Path, [*(AffinePath(schedule) for schedule in contracts.SCHEDULES), *contracts.BRIDGES]),
        (types.Source, [sources.Normal(), sources.Uniform(), sources.Sampled(lambda key, num: key)]),
        (types.Sampler, [make(schedules.Linear()) for make in contracts.SAMPLERS.values()]),
        (types.Sampler, contracts.TOKEN_SAMPLERS),
        (types.Sampler, [samplers.learned.from_method("euler", 2)]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_members_have_the_methods_of_their_protocol(protocol, members):
    """Every member of the contract has what its Protocol has, with the same arguments in the same order."""
    names = [name for name in vars(protocol) if name == "__call__" or not name.startswith("_")]
    assert names
    for member in members:
        for name in names:
            declared = vars(protocol)[name]
            if isinstance(declared, property):
                assert hasattr(member, name), f"{member} has no {name}"
            else:
                given = member if name == "__call__" else getattr(member, name)
                assert positional(given) == positional(declared), f"{member}.{name}"


@pytest.mark.parametrize("weight", contracts.WEIGHTS, ids=str)
def test_weights(weight):
    assert positional(weight) == ["t", "kind", "schedule"]


def _constant(t, x, cond=None):
    return jnp.zeros_like(x)


def _potential(params, x):
    return (x**2).sum(axis=-1)


APPLY, PATH = linen_apply(MLP()), AffinePath()
LOSS = (["params", "key", "batch"], ["target_params"])
NETWORK = (["params", "t", "x", "cond"], ["train", "rngs"])
LINEAR, COSINE = schedules.Linear(), schedules.Cosine()


@pytest.mark.parametrize(
    ("made", "arguments", "options"),
    [
        (APPLY, *NETWORK),
        (losses.flow_matching(APPLY, PATH), *LOSS),
        (losses.score_matching(APPLY, PATH), *LOSS),
        (losses.noise_prediction(APPLY, PATH), *LOSS),
        (losses.data_prediction(APPLY, PATH), *LOSS),
        (losses.bridge_matching(losses.split_channels(APPLY), contracts.BRIDGES[0]), *LOSS),
        (losses.trajectory_matching(APPLY, SplinePath((0.0, 1.0))), *LOSS),
        (fewstep.optimal_flow_matching(_potential), *LOSS),
        (fewstep.distillation(APPLY), *LOSS),
        (fewstep.straight_velocity(_potential, {}), ["t", "x"], []),
        (losses.split_channels(APPLY), *NETWORK),
        (losses.two_heads(APPLY, APPLY), *NETWORK),
        (make_step(losses.flow_matching(APPLY, PATH), optax.sgd(0.1)), ["state", "key", "batch"], []),
        (parameterization.velocity_fn(_constant, "data", LINEAR), ["t", "x"], []),
        (parameterization.score_fn(_constant, LINEAR), ["t", "x"], []),
        (parameterization.reschedule(_constant, LINEAR, COSINE), ["r", "x"], []),
        (guidance.classifier_free(_constant, _constant, 2.0), ["t", "x"], []),
        (guidance.classifier_free_batched(_constant, "velocity", LINEAR, jnp.zeros(2), 0, 2.0), ["t", "x"], []),
    ],
)
def test_what_is_made_is_called_alike(made, arguments, options):
    """Losses, steps, velocities and networks that functions return: each interface has one signature."""
    assert positional(made) == arguments
    assert keyword_only(made) == options


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (samplers.sample, ["v", "x0", "sampler"]),
        (likelihood.log_prob, ["v", "x1"]),
        (likelihood.bits_per_dim, ["v", "key", "images"]),
        (metrics.path_energy, ["v", "x0"]),
        (fewstep.make_pairs, ["v", "key", "shape"]),
        (losses.flow_matching, ["apply_fn", "path"]),
        (guidance.classifier_free, ["v_cond", "v_uncond", "scale"]),
        (parameterization.convert, ["kind", "value", "t", "x_t", "schedule"]),
    ],
)
def test_options_are_keywords(function, arguments):
    """Everything after the objects worked on is named at the call."""
    assert positional(function) == arguments
    assert all(
        each.default is not inspect.Parameter.empty
        for each in inspect.signature(function).parameters.values()
        if each.kind is inspect.Parameter.KEYWORD_ONLY
    )


def test_what_samples_shares_its_options():
    """The same words for the same things."""
    assert keyword_only(samplers.sample) == ["times", "key", "trajectory", "keep"]
    inside = [likelihood.log_prob, likelihood.encode_and_log_prob, likelihood.sample_and_log_prob]
    for function in (*inside, likelihood.bits_per_dim, metrics.path_energy, metrics.straightness, fewstep.make_pairs):
        assert {"sampler", "times"} <= set(keyword_only(function))
    for sampler in (samplers.EulerMaruyama, samplers.StochasticHeun, samplers.DiffraxSDE):
        assert positional(sampler)[:3] == ["schedule", "diffusion", "score"]


@pytest.mark.slow
def test_the_loss_is_what_jax_differentiates():
    """`jax.value_and_grad(loss_fn, has_aux=True)` works as it is."""
    loss_fn = losses.flow_matching(lambda params, t, x, cond, **_: params * x, PATH)
    batch = {"x1": jnp.ones((2, 1)), "x0": jnp.zeros((2, 1)), "t": jnp.array([0.25, 0.5])}
    (loss, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(2.0, None, batch)
    assert float(loss) == float(metrics["loss"]) == 0.125
    assert float(gradient) == float(jnp.mean(2 * (2 * batch["t"] - 1) * batch["t"]))
