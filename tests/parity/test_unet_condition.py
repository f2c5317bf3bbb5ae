"""The conditional U-Net against diffusers' UNet2DConditionModel."""

import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import Case, check_mutation, check_peer, check_record, distances, first_last, random_input, to_torch

from fm_jax.models import layers, unet_condition
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import Border, Conditions
from fm_jax.models.unet_condition import UNetCondition
from fm_jax.weights import unet_condition as weights
from fm_jax.weights.unet_condition import unet_condition_config, unet_condition_from_config, unet_condition_rules

SMALL = {"widths": (16, 32), "num_blocks": 1, "num_groups": 8, "token_width": 24}
MODULES = {
    # Projections as convolutions, as many heads everywhere, a transformer in the middle alone, unrolled; a mask.
    "sd15": UNetCondition(**SMALL, attention_levels=(), num_heads=(2, 2), num_layers=(1, 1), scan_layers=False),
    # Linear projections, heads of one width; a mask and an image to fill beside the state.
    "sd2": UNetCondition(
        **SMALL | {"num_blocks": 2},
        in_channels=9,
        attention_levels=(1,),
        num_heads=(1, 4),
        num_layers=(1, 1),
        linear_projections=True,
    ),
    # Several blocks, scanned; pooled text and sizes.
    "sdxl": UNetCondition(
        **SMALL,
        attention_levels=(1,),
        num_heads=(1, 2),
        num_layers=(1, 3),
        linear_projections=True,
        vector_width=20,
        size_features=8,
    ),
}
# A quiet stream of residuals, which lets the epsilons of its normalisations show.
QUIET = ("conv_in", "conv2", "conv_shortcut", "conv", "proj_in")
STEPS = np.array([749, 124])
TIMES = np.array([0.25, 0.875], np.float32)  # exact: 1000 (1 - t) - 1


def inputs(name):
    module = MODULES[name]
    arrays = {
        "x": random_input("x", (2, 6, 10, 4)),
        "tokens": random_input("tokens", (2, 7, module.token_width)),
    }
    if name == "sd15":
        arrays["mask"] = np.arange(7) < np.array([[7], [4]])
    if name == "sd2":
        arrays["local"] = random_input("local", (2, 6, 10, 5))
    if module.vector_width is not None:
        sizes = np.array([[512, 768, 0, 16, 512, 512], [1024, 600, 3, 0, 1024, 576]], np.float32)
        arrays["vector"] = np.concatenate([random_input("pooled", (2, module.vector_width)), sizes], axis=1)
    return arrays


class Quiet(Case):
    def tensors(self):
        quiet = lambda key: key.rsplit(".", 1)[0].endswith(QUIET)  # noqa: E731
        return {key: value / 8 if quiet(key) else value for key, value in super().tensors().items()}


rules_of = functools.cache(unet_condition_rules)


def conditions(arrays):
    return Conditions(**{name: value for name, value in arrays.items() if name != "x"})


def torch_model(module, tensors, dtype="float32"):
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(**unet_condition_config(module)).eval()
    model.load_state_dict(to_torch(tensors), strict=True)
    return model.to(getattr(torch, dtype))


def torch_call(module, model, arrays):
    """Output, channels last, float32."""
    import torch

    dtype = next(model.parameters()).dtype
    x = np.concatenate([arrays["x"], arrays["local"]], axis=-1) if "local" in arrays else arrays["x"]
    more = {}
    if "mask" in arrays:
        more["encoder_attention_mask"] = torch.tensor(arrays["mask"])
    if "vector" in arrays:
        pooled, sizes = np.split(arrays["vector"], [module.vector_width], axis=1)
        more["added_cond_kwargs"] = {"text_embeds": torch.tensor(pooled).to(dtype), "time_ids": torch.tensor(sizes)}
    with torch.no_grad():
        sample, tokens = torch.tensor(np.moveaxis(x, -1, 1)).to(dtype), torch.tensor(arrays["tokens"]).to(dtype)
        return first_last(model(sample, torch.tensor(STEPS), tokens, **more).sample.float())


def case(name, module=None, rules=rules_of):
    module = MODULES[name] if module is None else module

    def ours(params, arrays):
        return {"out": module.apply({"params": params}, TIMES, arrays["x"], conditions(arrays))}

    def theirs(tensors, arrays):
        return {"out": torch_call(module, torch_model(module, tensors), arrays)}

    blocks = [layer for layer in weights._layers(module) if not layer[1].startswith(("time", "vector", "norm"))]

    def trace_ours(params, arrays):
        args = {"params": params}, TIMES, arrays["x"], conditions(arrays)
        _, state = module.apply(*args, capture_intermediates=True, mutable=["intermediates"])
        return {path: state["intermediates"][path]["__call__"][0] for _, path, *_ in blocks}

    def trace_theirs(tensors, arrays):
        model, found = torch_model(module, tensors), {}
        for _, _, key, _ in blocks:
            keep = lambda _, args, out, key=key: found.update(  # noqa: E731
                {key: first_last(out[0] if isinstance(out, tuple) else getattr(out, "sample", out))}
            )
            model.get_submodule(key.removesuffix(".conv")).register_forward_hook(keep)
        torch_call(module, model, arrays)
        return found

    pairs = tuple((path, key) for _, path, key, _ in blocks)
    make = lambda: rules(module)  # noqa: E731
    kind = Quiet if name == "sd15" else Case
    return kind(f"unet_condition_{name}", make, lambda: inputs(name), ours, theirs, pairs, trace_ours, trace_theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_record(name):
    check_record(case(name))


@pytest.mark.parity
@pytest.mark.parametrize("name", MODULES)
def test_peer(name):
    check_peer(case(name))


@pytest.mark.parity
@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_of_the_peer(name):
    pytest.importorskip("torch")
    module = MODULES[name]
    one = case(name, replace(module, compute=Compute("bfloat16")))
    theirs = torch_call(module, torch_model(module, one.tensors(), "bfloat16"), inputs(name))
    assert distances(one.outputs(), {"out": theirs})["out"] < 2e-2


@pytest.mark.parity
@pytest.mark.parametrize("name", MODULES)
def test_the_whole_configuration_of_the_peer_is_read(name):
    pytest.importorskip("torch")
    module = MODULES[name]
    config = dict(torch_model(module, case(name).tensors()).config)
    assert unet_condition_from_config(config, scan_layers=module.scan_layers) == module


@pytest.mark.parity
@pytest.mark.parametrize("name", MODULES)
def test_ldm_names_are_those_that_diffusers_converts(name):
    pytest.importorskip("torch")
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    module = MODULES[name]
    params = rules_of(module).to_ours(case(name).tensors())
    ldm = unet_condition_rules(module, "ldm").to_theirs(params)
    config = {"layers_per_block": module.num_blocks, **unet_condition_config(module)}
    converted = convert_ldm_unet_checkpoint(
        {f"model.diffusion_model.{key}": value for key, value in ldm.items()}, config
    )
    expected = case(name).tensors()
    assert converted.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(converted[key], value)


# Mistakes that porters have made, and whether a record sees them.


def tanh_gelu(monkeypatch):
    monkeypatch.setattr(nn, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=True))
    return case("sdxl")


def epsilon_of_the_transformer(monkeypatch):
    norm = unet_condition.group_norm
    monkeypatch.setattr(unet_condition, "group_norm", lambda *args, epsilon=1e-5: norm(*args, epsilon=1e-5))
    return case("sd15")


def epsilon_of_layer_norm(monkeypatch):
    norm = unet_condition.layer_norm
    monkeypatch.setattr(
        unet_condition, "layer_norm", lambda *args, **options: norm(*args, **options | {"epsilon": 1e-6})
    )
    return case("sd15")


def heads_taken_for_their_width(monkeypatch):
    one = MODULES["sd15"]
    heads = tuple(width // heads for width, heads in zip(one.widths, one.num_heads, strict=True))
    return case("sd15", replace(one, num_heads=heads))


def value_and_gate_swapped(monkeypatch):
    def swapped(module):
        rules, other = rules_of(module), {"mlp_in": "mlp_gate", "mlp_gate": "mlp_in"}
        paths = ["/".join(other.get(part, part) for part in piece.path.split("/")) for piece in rules.pieces]
        return replace(rules, pieces=tuple(replace(p, path=path) for p, path in zip(rules.pieces, paths, strict=True)))

    return case("sd15", rules=swapped)


def asymmetric_padding(monkeypatch):
    conv = unet_condition.conv3x3

    def below_and_right(features, dtype, name, *, stride=1, init=None):
        if stride == 1:
            return conv(features, dtype, name, init=init)
        return nn.Conv(features, (3, 3), stride, padding=((0, 1), (0, 1)), dtype=dtype, name=name)

    monkeypatch.setattr(unet_condition, "conv3x3", below_and_right)
    return case("sd15")


def steps_counted_from_one(monkeypatch):
    return case("sd15", replace(MODULES["sd15"], border=Border(reverse=True)), lambda _: rules_of(MODULES["sd15"]))


def sines_before_cosines(monkeypatch):
    features = layers.sinusoidal_features
    turned = lambda t, dim, **options: jnp.roll(features(t, dim, **options), dim // 2, axis=-1)  # noqa: E731
    monkeypatch.setattr(layers, "sinusoidal_features", turned)
    return case("sd15")


def sizes_before_the_text(monkeypatch):
    split = jnp.split
    monkeypatch.setattr(jnp, "split", lambda x, at, axis: split(x, [x.shape[1] - at[0]], axis)[::-1])
    return case("sdxl")


def mask_forgotten(monkeypatch):
    attend = unet_condition.attend
    monkeypatch.setattr(unet_condition, "attend", lambda *args, mask, **options: attend(*args, **options))
    return case("sd15")


MISTAKES = (
    tanh_gelu,
    epsilon_of_the_transformer,
    epsilon_of_layer_norm,
    heads_taken_for_their_width,
    value_and_gate_swapped,
    asymmetric_padding,
    steps_counted_from_one,
    sines_before_cosines,
    sizes_before_the_text,
    mask_forgotten,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.slow
def test_mistake_is_seen(mistake, monkeypatch):
    check_mutation(mistake(monkeypatch))
