"""DiT, SiT, REPA's SiT and LightningDiT against PyTorch; DiT also against diffusers' class."""

import dataclasses
import math
from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest
from parity.harness import (
    Case,
    check_mutation,
    check_peer,
    check_record,
    first_difference,
    first_last,
    manifest,
    random_input,
    to_torch,
)

from fm_jax.models import DiT, LabelEmbedding, dit, unstack_layers
from fm_jax.models.conditioning import DDPM, REPA, SIT
from fm_jax.models.lightning import LightningDiT
from fm_jax.weights import open_model, save_model
from fm_jax.weights.dit import dit_config, dit_from_config, dit_rules, sit_config, sit_from_config, sit_rules
from fm_jax.weights.lightning import lightning_rules

WIDTH, DEPTH, HEADS, CLASSES = 32, 3, 2, 5
SIZES = {"hidden": WIDTH, "num_layers": DEPTH, "num_heads": HEADS, "embed": LabelEmbedding(CLASSES, stddev=0.02)}
T = np.float32([0.31, 0.875])
CONFIG = dit_config(DiT(**SIZES, out_channels=8, border=DDPM, frequency_shift=1.0, norm_mlp_epsilon=1e-5), size=12)


def inputs(channels=4, height=12, width=8):
    x = random_input("x", (2, height, width, channels))
    return {"t": T, "x": x, "label": np.int32([3, CLASSES])}


def ours(module, params, inputs):
    return {"out": module.apply({"params": params}, inputs["t"], inputs["x"], inputs["label"])}


def trace_ours(module, params, inputs):
    module = dataclasses.replace(module, scan_layers=False, parent=None)
    params = unstack_layers(params) if "blocks" in params else params
    arrays = inputs["t"], inputs["x"], inputs["label"]
    _, state = module.apply({"params": params}, *arrays, capture_intermediates=True)
    return {f"block_{i}": state["intermediates"][f"block_{i}"]["__call__"][0] for i in range(DEPTH)}


def official(module, tensors, inputs, *, patch, channels, out_channels, size, lightning=False, trace=False):
    import torch
    from parity.reference_dit import Transformer

    network = Transformer(WIDTH, DEPTH, HEADS, patch, channels, out_channels, CLASSES, size, lightning)
    network.load_state_dict(to_torch(tensors))
    border, outputs = module.border, {}
    s = border.scale * (1 - inputs["t"] if border.reverse else inputs["t"]) + border.offset
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(inputs["x"], -1, 1).copy())
        out = network(x, torch.from_numpy(s), torch.from_numpy(inputs["label"]).long(), outputs)
    return outputs if trace else {"out": border.sign * out.numpy()}


def of_diffusers(tensors, inputs):
    import torch
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel.from_config(CONFIG).eval()
    missing, unused = network.load_state_dict(to_torch(tensors), strict=False)
    assert (missing, unused) == (["pos_embed.pos_embed"], []) or not missing + unused
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(inputs["x"], -1, 1).copy())
        n = torch.from_numpy(1000 * (1 - inputs["t"]) - 1)
        return {"out": first_last(network(x, n, torch.from_numpy(inputs["label"]).long()).sample)}


BLOCKS = tuple((f"block_{i}", f"blocks.{i}") for i in range(DEPTH))


def case(name, module, rules, *, channels=4, patch=2, lightning=False):
    options = {"patch": patch, "channels": channels, "out_channels": module.out_channels or channels, "size": 12}
    theirs = partial(official, module, lightning=lightning, **options)
    return Case(
        name,
        partial(rules, module, size=12, channels=channels),
        partial(inputs, channels),
        partial(ours, module),
        theirs,
        BLOCKS,
        partial(trace_ours, module),
        partial(theirs, trace=True),
    )


official_rules = partial(dit_rules, layout="official")
CASES = [
    case("dit", DiT(**SIZES, out_channels=8, border=DDPM, scan_layers=True), official_rules),
    case("sit", DiT(**SIZES, out_channels=8, border=SIT, scan_layers=True), official_rules),
    case("repa", DiT(**SIZES, border=REPA), official_rules),
    case("lightning", LightningDiT(**SIZES), lightning_rules, channels=6, patch=1, lightning=True),
    Case(
        "dit_diffusers",
        lambda: dit_rules(dit_from_config(CONFIG), size=12),
        partial(inputs, 4, 12, 12),  # the class takes squares alone
        lambda params, inputs: ours(dit_from_config(CONFIG), params, inputs),
        of_diffusers,
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
DIT, LIGHTNING = CASES[0], CASES[3]


@pytest.mark.slow_but_one
@every_case
def test_record(case):
    check_record(case)


@pytest.mark.parity
@every_case
def test_peer(case):
    check_peer(case)


def _row_first(rows, columns, dim, real=dit.position_features):
    return np.roll(real(rows, columns, dim), dim // 2, axis=1)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("target", "name", "wrong"),
    [
        (dit, "position_features", _row_first),
        (nn, "gelu", lambda x, approximate: nn.activation.gelu(x, approximate=False)),
        (
            dit,
            "layer_norm",
            lambda dtype, name, epsilon=0: nn.LayerNorm(1e-5, use_scale=False, use_bias=False, name=name),
        ),
        (dit, "patchify", lambda x, p: _patches_channels_first(x, p)),
    ],
    ids=["row-first table", "erf for tanh GELU", "epsilon 1e-5", "patches (c, p, q)"],
)
def test_mistakes_are_seen(target, name, wrong, monkeypatch):
    monkeypatch.setattr(target, name, wrong)
    check_mutation(DIT)


def _patches_channels_first(x, p):
    b, h, w, c = x.shape
    x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, -1, p * p * c)


@pytest.mark.parity
def test_a_failure_names_the_first_block_that_differs(monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed")
    assert first_difference(DIT).startswith("all blocks agree")
    monkeypatch.setattr(dit, "modulate", lambda h, shift, scale: h * scale + shift)
    assert first_difference(DIT).startswith("first difference: block_0 and blocks.0 differ")


@every_case
def test_parameters_come_back_to_the_bit(case):
    rules, tensors = case.rules(), case.tensors()
    written = rules.to_theirs(rules.to_ours(tensors))
    assert written.keys() == tensors.keys() - rules.tables.keys()
    assert all((written[key] == tensors[key]).all() for key in written)


@pytest.mark.parametrize(
    ("name", "params"),
    [("S/2", 32_963_360), ("B/2", 130_512_416), ("L/2", 458_102_816), ("XL/2", 675_129_632)],
)
def test_published_sizes(name, params):
    module = dit.make_dit(name, embed=LabelEmbedding(1000), out_channels=8, scan_layers=True)
    rules = official_rules(module)
    assert sum(map(math.prod, rules.shapes.values())) + rules.tables["pos_embed"]().size == params


def test_manifest_of_diffusers():
    module = dit.make_dit("XL/2", embed=LabelEmbedding(1000), out_channels=8, scan_layers=True)
    shapes = dit_rules(module).shapes
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (538, 749_826_464)
    assert manifest(shapes) == "07dfb528d822"


def test_configuration_comes_back():
    assert dit_config(dit_from_config(CONFIG), size=12) == CONFIG
    sit = dataclasses.replace(CASES[1].ours.args[0], parent=None)
    assert sit_from_config(sit_config(sit, size=12)) == sit


def test_folder_of_a_sit(tmp_path):
    module = CASES[1].ours.args[0]
    params = sit_rules(module, size=12).to_ours(CASES[1].tensors())
    save_model(tmp_path, module, params, size=12)
    opened, loaded = open_model(tmp_path)
    assert opened == module
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_another_function_is_not_written_as_diffusers_own(tmp_path):
    module = DiT(**SIZES)
    with pytest.raises(ValueError, match="border must be DDPM for diffusers' DiT"):
        save_model(tmp_path, module, {}, size=12)
    with pytest.raises(ValueError, match="frequency_shift must be 1, as diffusers' DiT has it"):
        save_model(tmp_path, DiT(**SIZES, border=DDPM), {}, size=12)


@pytest.mark.parametrize(
    ("change", "match"),
    [({"attention_bias": False}, "attention_bias must be True"), ({"activation_fn": "gelu"}, "activation_fn must be")],
)
def test_configurations_that_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        dit_from_config(CONFIG | change)
