"""DDPM++ and NCSN++ as EDM has them against an independent PyTorch network with EDM's keys."""

from functools import cache, partial

import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import Case, check_mutation, check_peer, check_record, first_last, random_input, to_torch

from fm_jax.models import song_blocks, song_unet
from fm_jax.models.conditioning import Conditions
from fm_jax.models.song_unet import SongUNet, make_song_unet
from fm_jax.weights import song_unet as rules_of_song_unet
from fm_jax.weights.song_unet import blocks_of, song_unet_config, song_unet_from_config, song_unet_rules

T = np.float32([-1.2, 0.7])  # log(sigma) / 4
CLASSES = 4
SIZES = {"channels": 16, "channel_mults": (1, 2), "num_blocks": 1, "in_channels": 3, "resolution": 16}
NCSNPP = {"time_features": "fourier", "time_mult": 2, "resample_filter": (1, 3, 3, 1)}
MODULES = {
    "ddpmpp": SongUNet(**SIZES, num_classes=CLASSES, augment_dim=9),
    "ncsnpp": SongUNet(**SIZES, **NCSNPP, encoder="residual", attention_levels=(0, 1)),
    "skip": SongUNet(
        **SIZES,
        encoder="skip",
        decoder="skip",
        resample_filter=(1, 3, 3, 1),
        out_channels=5,
        embedding_mult=2,
        time_mult=2,
    ),
}


def inputs(module):
    arrays = {"t": T, "x": random_input("x", (2, 8, 12, 3))}
    if module.num_classes is not None:
        arrays["label"] = np.int32([2, module.num_classes])
    if module.augment_dim:
        arrays["vector"] = random_input("augment", (2, module.augment_dim))
    return arrays


def call(module, params, inputs, **options):
    cond = Conditions(label=inputs.get("label"), vector=inputs.get("vector"))
    return module.apply({"params": params}, inputs["t"], inputs["x"], cond, **options)


def ours(module, params, inputs):
    return {"out": call(module, params, inputs)}


def trace_ours(module, params, inputs):
    _, state = call(module, params, inputs, capture_intermediates=True)
    return {path: state["intermediates"][path]["__call__"][0] for path, _ in blocks_of(module)}


def theirs(module, tensors, inputs, *, trace=False):
    import torch
    from parity import reference_song_unet

    config = {key: value for key, value in song_unet_config(module).items() if key != "_class_name"}
    network, outputs = reference_song_unet.SongUNet(**config), {}
    network.load_state_dict(to_torch(tensors))
    for path, key in blocks_of(module):
        part = network.get_submodule(key)
        part.register_forward_hook(lambda *call, path=path: outputs.update({path: first_last(call[2].detach())}))
    label = np.eye(CLASSES + 1, CLASSES, dtype=np.float32)[inputs["label"]] if "label" in inputs else None
    others = (None if each is None else torch.from_numpy(each) for each in (label, inputs.get("vector")))
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(inputs["x"], -1, 1).copy())
        out = first_last(network(x, torch.from_numpy(inputs["t"]), *others))
    return outputs if trace else {"out": out}


def case(name, module):
    return Case(
        name=f"song-unet-{name}",
        rules=cache(partial(song_unet_rules, module)),
        inputs=partial(inputs, module),
        ours=partial(ours, module),
        theirs=partial(theirs, module),
        blocks=tuple((path, path) for path, _ in blocks_of(module)),
        trace_ours=partial(trace_ours, module),
        trace_theirs=partial(theirs, module, trace=True),
    )


CASES = {name: case(name, module) for name, module in MODULES.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_record(name):
    check_record(CASES[name])


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_peer(name):
    check_peer(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_rules_are_a_bijection(name):
    tensors, rules = CASES[name].tensors(), CASES[name].rules()
    back = rules.to_theirs(rules.to_ours(tensors))
    assert back.keys() | rules.tables.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in back)


SINES, FILTERED, PIECE = song_unet.sinusoidal_features, song_blocks.filtered, rules_of_song_unet.Piece


def ragged(x, weights, *, up, pad=None):
    """Doubles with the filter off by one pixel."""
    return jnp.roll(FILTERED(x, weights, up=up, pad=pad), int(up), axis=1)


def norm_of_32_groups(x, dtype, name):
    return song_blocks.group_norm(x.shape[-1], 32, dtype, name, epsilon=1e-6)(x)


MUTATIONS = {
    "epsilon": (song_blocks, "EPSILON", 1e-5),
    "cosine first": (
        song_unet,
        "sinusoidal_features",
        lambda t, dim, **_: SINES(t, dim, scale=1.0, frequency_shift=1.0),
    ),
    "frequencies": (song_unet, "sinusoidal_features", lambda t, dim, **_: SINES(t, dim, scale=1.0, sine_first=True)),
    "groups": (song_blocks, "norm", norm_of_32_groups),
    "filter": (song_blocks, "filtered", ragged),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MUTATIONS)
def test_mutation(mistake, monkeypatch):
    monkeypatch.setattr(*MUTATIONS[mistake])
    check_mutation(CASES["ddpmpp"])


def test_mutation_of_rows(monkeypatch):
    def wrong(path, key, axes, *rest):
        return PIECE(path, key, axes.replace("(d n)", "(n d)"), *rest)

    monkeypatch.setattr(rules_of_song_unet, "Piece", wrong)
    check_mutation(case("ddpmpp", MODULES["ddpmpp"]))


@pytest.mark.parametrize("name", CASES)
def test_config_there_and_back(name):
    module = MODULES[name]
    assert song_unet_from_config(song_unet_config(module)) == module.clone(out_channels=module.out_channels or 3)


def test_prefix_of_the_preconditioning():
    module = MODULES["skip"]
    bare, behind = (song_unet_rules(module, layout) for layout in ("edm", "edm_preconditioned"))
    assert behind.shapes == {f"model.{key}": shape for key, shape in bare.shapes.items()}
    assert behind.tables.keys() == {f"model.{key}" for key in bare.tables}


SIZES_OF_NAMES = {"ddpmpp": 55_733_891, "ncsnpp": 56_397_827}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", SIZES_OF_NAMES)
def test_published_sizes(name):
    shapes = song_unet_rules(make_song_unet(name)).shapes
    count = sum(int(np.prod(shape)) for key, shape in shapes.items() if key != "map_noise.freqs")
    assert count == SIZES_OF_NAMES[name]


@pytest.mark.parity
@pytest.mark.parametrize("name", SIZES_OF_NAMES)
def test_keys_of_published_sizes(name):
    torch = pytest.importorskip("torch")
    from parity import reference_song_unet

    module = make_song_unet(name, num_classes=10)
    config = {key: value for key, value in song_unet_config(module).items() if key != "_class_name"}
    with torch.device("meta"):
        network = reference_song_unet.SongUNet(**config)
    rules = song_unet_rules(module)
    filters = {key: table().shape for key, table in rules.tables.items()}
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == rules.shapes | filters


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: song_unet_rules(SongUNet()), "The rules of a SongUNet need its in_channels"),
        (lambda: song_unet_rules(SongUNet(in_channels=3), "adm"), "layout must be one of 'edm', 'edm_preconditioned'"),
        (lambda: song_unet_config(SongUNet()), "The keywords of a SongUNet need its in_channels"),
        (
            lambda: song_unet_from_config({"model_channels": 8}),
            "config must have the keywords of SongUNet, img_resolution",
        ),
        (lambda: song_unet_from_config({"img_resolution": 8, "width": 8}), "config must have the keywords of SongUNet"),
        (
            lambda: song_unet_from_config({"img_resolution": 8, "model_type": "DhariwalUNet"}),
            "model_type must be one of 'SongUNet', got 'DhariwalUNet'",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
