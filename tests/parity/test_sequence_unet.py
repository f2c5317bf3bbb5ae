"""The U-Net over sequences against an independent PyTorch network with the keys of Diffusion Policy."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from parity.harness import Case, check_mutation, check_peer, check_record, first_last, random_input, to_torch

from fm_jax.models import Conditions, sequence_unet
from fm_jax.models.conditioning import Border
from fm_jax.models.embed import LabelEmbedding
from fm_jax.models.sequence_unet import SequenceUNet, make_sequence_unet
from fm_jax.weights.sequence_unet import blocks_of, sequence_unet_rules

POLICY = Border(100.0, reverse=True, offset=-1.0)
SIZES = {"channels": (16, 24, 40), "kernel_size": 5, "time_channels": 16, "in_channels": 3, "border": POLICY}
MODULES = {
    "global": SequenceUNet(**SIZES, vector_dim=5),
    "shift": SequenceUNet(**SIZES, film=False, out_channels=2),
    "local": SequenceUNet(**SIZES, local_dim=4, vector_dim=2),
    "local_down": SequenceUNet(**SIZES, local_dim=4, local_up=False),
}


def inputs(module):
    arrays = {"t": np.float32([0.02, 0.7]), "x": random_input("x", (2, 12, 3))}
    if module.vector_dim is not None:
        arrays["vector"] = random_input("vector", (2, module.vector_dim))
    if module.local_dim is not None:
        arrays["local"] = random_input("local", (2, 12, module.local_dim))
    return arrays


def call(module, params, inputs, **options):
    cond = Conditions(vector=inputs.get("vector"), local=inputs.get("local"))
    return module.apply({"params": params}, inputs["t"], inputs["x"], cond, **options)


def ours(module, params, inputs):
    return {"out": call(module, params, inputs)}


def trace_ours(module, params, inputs):
    _, state = call(module, params, inputs, capture_intermediates=True)
    return {path: state["intermediates"][path]["__call__"][0] for path, _ in blocks_of(module)}


def theirs_of(module):
    from parity import reference_sequence_unet

    return reference_sequence_unet.SequenceUNet(
        module.in_channels,
        module.out_channels or module.in_channels,
        module.channels,
        module.kernel_size,
        module.num_groups,
        module.time_channels,
        module.vector_dim or 0,
        module.local_dim or 0,
        module.local_up,
        module.film,
    )


def theirs(module, tensors, inputs, *, trace=False):
    import torch

    network, outputs = theirs_of(module), {}
    network.load_state_dict(to_torch(tensors))
    for path, key in blocks_of(module):
        part = network.get_submodule(key)
        part.register_forward_hook(lambda *call, path=path: outputs.update({path: first_last(call[2].detach())}))
    first = {
        name: torch.from_numpy(np.moveaxis(inputs[name], -1, 1).copy()) for name in ("x", "local") if name in inputs
    }
    vector = torch.from_numpy(inputs["vector"]) if "vector" in inputs else None
    steps = torch.from_numpy(np.float32(100 * (1 - inputs["t"]) - 1))
    with torch.no_grad():
        out = first_last(network(first["x"], steps, vector, first.get("local")))
    return outputs if trace else {"out": out}


def case(name):
    module = MODULES[name]
    return Case(
        name=f"sequence-unet-{name}",
        rules=cache(partial(sequence_unet_rules, module)),
        inputs=partial(inputs, module),
        ours=partial(ours, module),
        theirs=partial(theirs, module),
        blocks=tuple((path, path) for path, _ in blocks_of(module)),
        trace_ours=partial(trace_ours, module),
        trace_theirs=partial(theirs, module, trace=True),
    )


CASES = {name: case(name) for name in MODULES}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["local", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "local")]
)
def test_record(name):
    check_record(CASES[name])


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_peer(name):
    check_peer(CASES[name])


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", CASES)
def test_rules_are_a_bijection(name):
    tensors, rules = CASES[name].tensors(), CASES[name].rules()
    back = rules.to_theirs(rules.to_ours(tensors))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in back)


MISH, CONV = jax.nn.mish, sequence_unet.conv1d
MUTATIONS = {
    "silu": (jax.nn, "mish", jax.nn.silu),
    "frequencies": (
        sequence_unet,
        "sinusoidal_features",
        lambda t, dim, **_: SINES(t, dim, scale=1.0, sine_first=True),
    ),
    "cosine first": (
        sequence_unet,
        "sinusoidal_features",
        lambda t, dim, **_: SINES(t, dim, scale=1.0, frequency_shift=1.0),
    ),
    "groups": (sequence_unet, "num_norm_groups", lambda channels, most: channels),
    "upsampling": (
        sequence_unet,
        "upsample",
        lambda x, how, dtype, name: UP(x[:, ::-1], how, dtype, name)[:, ::-1],
    ),
}
SINES, UP = sequence_unet.sinusoidal_features, sequence_unet.upsample


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mutation(mistake, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[mistake])
    check_mutation(CASES["global"])


@pytest.mark.parity
@pytest.mark.parametrize(("name", "count"), [("policy", 65_353_218), ("policy_image", 248_013_954)])
def test_keys_of_published_sizes(name, count):
    torch = pytest.importorskip("torch")
    module = make_sequence_unet(name, in_channels=2, vector_dim=10)
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in theirs_of(module).state_dict().items()}
    assert shapes == sequence_unet_rules(module).shapes
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == count


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": None}, "The rules of a SequenceUNet need its in_channels"),
        ({"resample": "nearest"}, "resample must be 'transposed', as the published class has it, got 'nearest'"),
        ({"embed": LabelEmbedding(3)}, "embed must be None, as the published class has none"),
        ({"local_dim": 16}, r"local_dim must not be channels\[0\] = 16"),
    ],
)
def test_rules_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        sequence_unet_rules(MODULES["global"].clone(**options))
