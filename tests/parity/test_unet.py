"""U-Nets against TorchCFM's class, which is guided diffusion's but for the order of its arguments, and diffusers'."""

import dataclasses
import json
from functools import cache, partial

import numpy as np
import pytest
from parity.harness import (
    Case,
    check_mutation,
    check_peer,
    check_record,
    distance,
    first_difference,
    first_last,
    manifest,
    random_input,
    to_torch,
)

from fm_jax.models import Compute, LabelEmbedding, UNet, make_unet
from fm_jax.models.conditioning import DDPM, SIT
from fm_jax.models.unet_blocks import ClassEmbedding
from fm_jax.weights.adm import ADM_FLAGS, adm_config, adm_from_config
from fm_jax.weights.unet import places, unet_config, unet_from_config, unet_rules

# 1000 (1 - t) - 1 is exact in float32, and moderate: PyTorch's exponential is off in the last digit of one frequency in
# 30, which a step of several hundred multiplies.
T = np.float32([0.875, 0.9375])
SIZES = {"channels": 32, "channel_mults": (1, 2), "num_blocks": 1, "in_channels": 3}


def inputs(module):
    arrays = {"t": T, "x": random_input("x", (2, 8, 12, 3))}
    return arrays | ({} if module.embed is None else {"label": np.int32([3, 1])})


def ours(module, params, inputs):
    return {"out": module.apply({"params": params}, inputs["t"], inputs["x"], inputs.get("label"))}


def trace_ours(module, params, inputs):
    arrays = inputs["t"], inputs["x"], inputs.get("label")
    _, state = module.apply({"params": params}, *arrays, capture_intermediates=True)
    return {place.path: state["intermediates"][place.path]["__call__"][0] for place in places(module)}


def theirs(module, layout, tensors, inputs, *, trace=False):
    import torch

    if layout.startswith("adm"):
        from torchcfm.models.unet.unet import UNetModel

        config = {key: value for key, value in adm_config(module, size=8).items() if key != "_class_name"}
        network = UNetModel(**config, use_new_attention_order=layout == "adm_new")
    else:
        from diffusers import UNet2DModel

        network = UNet2DModel.from_config(unet_config(module, size=8))
    network.load_state_dict(to_torch(tensors))
    border, outputs = module.border, {}
    s = torch.from_numpy(
        border.scale * (1 - inputs["t"] if border.reverse else inputs["t"]) + np.float32(border.offset)
    )
    label = None if "label" not in inputs else torch.from_numpy(inputs["label"])
    for place in places(module):
        part = network.get_submodule(place.adm if layout.startswith("adm") else place.diffusers)
        part.register_forward_hook(lambda *call, path=place.path: outputs.update({path: first_last(call[2].detach())}))
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(inputs["x"], -1, 1).copy())
        out = network(s, x, label) if layout.startswith("adm") else network(x, s, label).sample
    return outputs if trace else {"out": first_last(out)}


def case(name, layout, module):
    return Case(
        name=f"unet-{name}",
        rules=cache(partial(unet_rules, module, layout)),
        inputs=partial(inputs, module),
        ours=partial(ours, module),
        theirs=partial(theirs, module, layout),
        blocks=tuple((place.path, place.path) for place in places(module)),
        trace_ours=partial(trace_ours, module),
        trace_theirs=partial(theirs, module, layout, trace=True),
    )


MODULES = {
    "torchcfm": (
        "adm",
        adm_from_config(
            {"dim": (3, 8, 8), "num_channels": 32, "num_res_blocks": 2, "channel_mult": (1, 2)}
            | {"attention_resolutions": "4", "num_heads": 4, "num_head_channels": 16}
        ),
    ),
    "torchcfm-classes": (
        "adm_new",
        UNet(**SIZES, num_heads=4, resample="resblock", embed=ClassEmbedding(5), border=SIT),
    ),
    "adm": (
        "adm",
        adm_from_config(
            {"image_size": 8, "in_channels": 3, "model_channels": 64, "out_channels": 6, "num_res_blocks": 1}
            | {"attention_resolutions": (1,), "channel_mult": (0.5, 1), "conv_resample": False, "num_heads": 2}
            | {"use_scale_shift_norm": True, "num_classes": 5}
        ).clone(embed=LabelEmbedding(4)),
    ),
    "ddpm": (
        "diffusers",
        UNet(
            **SIZES,
            film=False,
            frequency_shift=1.0,
            sine_first=True,
            norm_epsilon=1e-6,
            down_padding=(0, 1),
            border=DDPM,
        ),
    ),
    "diffusers": (
        "diffusers",
        UNet(
            **SIZES, attention_levels=(0,), head_channels=8, resample="resblock", embed=ClassEmbedding(5), border=DDPM
        ),
    ),
}
CASES = {name: case(name, layout, module) for name, (layout, module) in MODULES.items()}
MUTATIONS = {
    "epsilon": ("ddpm", {"norm_epsilon": 1e-5}),
    "padding on both sides": ("ddpm", {"down_padding": (1, 1)}),
    "cosine first": ("ddpm", {"sine_first": False}),
    "order of rows": ("adm", "adm_new"),
}
SLOW_MUTATIONS = {
    "frequencies": ("ddpm", {"frequency_shift": 0.0}),
    "time": ("ddpm", {"border": SIT}),
    "heads": ("torchcfm", {"head_channels": 32}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_record(name):
    check_record(CASES[name])


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_peer(name):
    check_peer(CASES[name])


def check_mistake(name, change):
    layout, module = MODULES[name]
    changed = case(name, change, module) if isinstance(change, str) else case(name, layout, module.clone(**change))
    check_mutation(changed)


@pytest.mark.parametrize("mistake", MUTATIONS)
@pytest.mark.slow
def test_mutation(mistake):
    check_mistake(*MUTATIONS[mistake])


@pytest.mark.slow
@pytest.mark.parametrize("mistake", SLOW_MUTATIONS)
def test_slow_mutation(mistake):
    check_mistake(*SLOW_MUTATIONS[mistake])


@pytest.mark.parity
def test_bfloat16_is_as_close_as_that_of_pytorch():
    torch = pytest.importorskip("torch")
    from diffusers import UNet2DModel

    _, module = MODULES["ddpm"]
    arrays, tensors = inputs(module), CASES["ddpm"].tensors()
    network = UNet2DModel.from_config(unet_config(module, size=8))
    network.load_state_dict(to_torch(tensors))
    with torch.no_grad():
        x = torch.from_numpy(np.moveaxis(arrays["x"], -1, 1).copy()).bfloat16()
        out = network.bfloat16()(x, torch.from_numpy(1000 * (1 - T) - 1)).sample.float()
    params = CASES["ddpm"].rules().to_ours(tensors)
    near = ours(module.clone(compute=Compute("bfloat16")), params, arrays)["out"]
    assert distance(np.asarray(near), first_last(out)) <= 2e-2


@pytest.mark.parity
def test_a_failure_names_the_block():
    _, module = MODULES["ddpm"]
    mistaken = partial(trace_ours, module.clone(down_padding=(1, 1)))
    message = first_difference(dataclasses.replace(CASES["ddpm"], trace_ours=mistaken))
    assert message.startswith("first difference: down_0_resample and down_0_resample differ by"), message


@pytest.mark.parametrize("name", CASES)
def test_rules_are_a_bijection(name):
    tensors = CASES[name].tensors()
    rules = CASES[name].rules()
    back = rules.to_theirs(rules.to_ours(tensors))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_name(key):
    for new, old in OLD.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def test_old_names_of_attention():
    _, module = MODULES["ddpm"]
    new, old = (unet_rules(module, layout).shapes for layout in ("diffusers", "diffusers_old"))
    assert old == {old_name(key): shape for key, shape in new.items()} != new


@pytest.mark.parity
def test_diffusers_reads_old_names_as_we_do(tmp_path):
    pytest.importorskip("torch")
    from diffusers import UNet2DModel
    from safetensors.torch import save_file

    _, module = MODULES["ddpm"]
    tensors = CASES["ddpm"].tensors()
    (tmp_path / "config.json").write_text(json.dumps(unet_config(module, size=8)))
    save_file(
        to_torch({old_name(key): value for key, value in tensors.items()}),
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    loaded = UNet2DModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(np.array_equal(loaded[key].numpy(), tensors[key]) for key in tensors)


# As in the file that google/ddpm-cifar10-32 has on the hub.
CIFAR10 = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


@pytest.mark.slow
def test_ddpm_cifar10_is_our_size_with_five_options():
    module = unet_from_config(CIFAR10)
    expected = make_unet(
        "cifar10",
        head_channels=None,
        dropout=0.0,
        in_channels=3,
        out_channels=3,
        frequency_shift=1.0,
        sine_first=True,
        norm_epsilon=1e-6,
        down_padding=(0, 1),
        border=DDPM,
    )
    assert module == expected
    shapes = unet_rules(module).shapes
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 35_746_307
    assert len(shapes) == 328
    assert manifest(shapes) == "51561907f7a3"


@pytest.mark.parametrize("name", CASES)
def test_config_there_and_back(name):
    layout, module = MODULES[name]
    if layout.startswith("adm"):
        back = adm_from_config(adm_config(module, size=8), border=module.border)
    else:
        back = unet_from_config(unet_config(module, size=8))
    rows = None if module.embed is None else module.embed.num_classes + isinstance(module.embed, LabelEmbedding)
    embed = None if rows is None else ClassEmbedding(rows)
    assert back == module.clone(embed=embed, out_channels=module.out_channels or 3)


def test_flags_of_the_published_adm():
    module = adm_from_config(ADM_FLAGS["64"] | {"noise_schedule": "cosine"})
    assert module == UNet(
        channels=192,
        channel_mults=(1, 2, 3, 4),
        num_blocks=3,
        attention_levels=(1, 2, 3),
        head_channels=64,
        resample="resblock",
        out_channels=6,
        dropout=0.1,
        embed=ClassEmbedding(1000),
        in_channels=3,
        border=DDPM,
    )
    large = adm_from_config(ADM_FLAGS["512"])
    assert (large.channels, large.time_channels, large.attention_levels) == (128, 256, (4, 5, 6))
    assert large.channel_mults == (1, 2, 2, 4, 4, 8, 8)


PUBLISHED = ADM_FLAGS | {
    "torchcfm-cifar10": {"dim": (3, 32, 32), "num_channels": 128, "num_res_blocks": 2, "num_head_channels": 64}
    | {"channel_mult": (1, 2, 2, 2), "num_heads": 4, "attention_resolutions": "16"},
}


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_sizes(name):
    torch = pytest.importorskip("torch")
    from torchcfm.models.unet.unet import UNetModel

    module = adm_from_config(PUBLISHED[name])
    config = {key: value for key, value in adm_config(module, size=32).items() if key != "_class_name"}
    with torch.device("meta"):
        network = UNetModel(**config)
    shapes = unet_rules(module, "adm").shapes
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn must be 'silu' for a UNet, got 'gelu'"),
        ({"add_attention": False}, "add_attention must be True for a UNet, got False"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be one of 'default', 'scale_shift'"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups must be norm_num_groups = 32 with"),
        ({"attn_norm_num_groups": 8}, "attn_norm_num_groups must be 32, got 8"),
        ({"downsample_padding": 2}, "downsample_padding must be 0 or 1, got 2"),
        ({"norm_num_groups": 48}, "The 48 groups of a normalisation must divide every width"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types and up_block_types must be 4"),
        (
            {"down_block_types": ["SkipDownBlock2D"] * 4},
            "down_block_types must be known to a UNet, got 'SkipDownBlock2D'",
        ),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types must have attention on the levels of down_block_types"),
        ({"downsample_type": "resnet"}, "All levels must be resampled by convolutions or all by blocks"),
    ],
)
def test_refuses_a_config(change, message):
    with pytest.raises(ValueError, match=message):
        unet_from_config(CIFAR10 | change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: adm_from_config({"image_size": 64}),
            r"config must have image_size or dim, and \['num_channels', 'num_res",
        ),
        (lambda: adm_from_config({"image_size": 64, "width": 3}), r"have no \['width'\]"),
        (
            lambda: adm_from_config({"image_size": 48, "num_channels": 32, "num_res_blocks": 1}),
            "channel_mult must be given",
        ),
        (lambda: unet_rules(UNet()), "The rules of a UNet need its in_channels"),
        (
            lambda: unet_rules(UNet(in_channels=3), "torch"),
            "layout must be one of 'diffusers', 'diffusers_old', 'adm', 'ad",
        ),
        (lambda: unet_rules(UNet(in_channels=3, patch_size=2)), "patch_size must be 1"),
        (
            lambda: unet_rules(UNet(in_channels=3, resample="pool")),
            "resample must be 'conv' or 'resblock' in the layout",
        ),
        (
            lambda: adm_config(UNet(in_channels=3, norm_epsilon=1e-6), size=8),
            "norm_epsilon must be 1e-05 for UNetModel",
        ),
        (
            lambda: unet_config(make_unet("tiny")),
            "diffusers' UNet2DModel has neither patch_size > 1 nor resample='pool'",
        ),
        (lambda: unet_config(UNet(num_heads=4)), "diffusers' UNet2DModel has in_channels"),
        (
            lambda: unet_config(UNet(num_heads=2, channel_mults=(1, 2, 4), in_channels=3)),
            "All heads must be of one width",
        ),
        (
            lambda: unet_config(UNet(channel_mults=(2, 2), in_channels=3)),
            "time_channels must be 256, the width of level 0",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
