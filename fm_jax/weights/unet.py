"""Rules of `fm_jax.models.UNet`: ADM's layout, which TorchCFM has too, and that of diffusers' `UNet2DModel`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_member, shown
from fm_jax.models.conditioning import DDPM
from fm_jax.models.embed import LabelEmbedding
from fm_jax.models.unet import UNet
from fm_jax.models.unet_blocks import ClassEmbedding
from fm_jax.weights.rules import Piece, Rules, conv, conv1x1, dense, norm, template_of

Layout = Literal["diffusers", "diffusers_old", "adm", "adm_new"]


def unet_rules(module: UNet, layout: Layout = "diffusers") -> Rules:
    """Rules of a U-Net.

    Args:
        module: with `in_channels`, and `ClassEmbedding` or `LabelEmbedding` if it has classes.
        layout: `"diffusers"`; `"diffusers_old"`, whose attention is named query, key, value and proj_attn; `"adm"`, the
            files of guided diffusion and of TorchCFM, or `"adm_new"` for those with `use_new_attention_order`.

    Raises:
        ValueError: for a network that the layout cannot hold, or that does not know its `in_channels`.
    """
    check_member("layout", layout, get_args(Layout))
    if module.in_channels is None:
        raise ValueError("The rules of a UNet need its in_channels: module.clone(in_channels=3).")
    if module.patch_size != 1:
        raise ValueError(f"patch_size must be 1, as no file has squares in channels, got {module.patch_size}.")
    table_rows(module)
    side = 2 ** (len(module.channel_mults) - 1)
    x = jax.ShapeDtypeStruct((1, side, side, module.in_channels), jnp.float32)
    template = template_of(module, jnp.zeros(1), x)
    return Rules(template, tuple(_pieces(module, template, layout)))


class Place(NamedTuple):
    """A part of the network: its name here, its key in ADM's and in diffusers' files, and its width."""

    kind: Literal["residual", "attention", "conv"]
    path: str
    adm: str
    diffusers: str
    width: int


def places(module: UNet) -> Iterator[Place]:
    """The blocks and resampling convolutions of a network, in the order in which they are computed."""
    last = len(module.channel_mults) - 1
    widths = [module.channels * mult for mult in module.channel_mults]
    conv_or_block: Literal["residual", "conv"] = "residual" if module.resample == "resblock" else "conv"

    number = 0
    for level, width in enumerate(widths):
        for i in range(module.num_blocks):
            number += 1
            adm, theirs = f"input_blocks.{number}", f"down_blocks.{level}"
            yield Place("residual", f"down_{level}_{i}", f"{adm}.0", f"{theirs}.resnets.{i}", width)
            if level in module.attention_levels:
                yield Place("attention", f"down_{level}_{i}_attention", f"{adm}.1", f"{theirs}.attentions.{i}", width)
        if level < last:
            number += 1
            if module.resample != "pool":
                key = f"down_blocks.{level}.downsamplers.0"
                op, suffix = ("", "") if conv_or_block == "residual" else (".op", ".conv")
                adm = f"input_blocks.{number}.0"
                yield Place(conv_or_block, f"down_{level}_resample", adm + op, key + suffix, width)

    yield Place("residual", "middle_0", "middle_block.0", "mid_block.resnets.0", widths[-1])
    yield Place("attention", "middle_attention", "middle_block.1", "mid_block.attentions.0", widths[-1])
    yield Place("residual", "middle_1", "middle_block.2", "mid_block.resnets.1", widths[-1])

    number = -1
    for level in reversed(range(last + 1)):
        width, attends = widths[level], level in module.attention_levels
        theirs = f"up_blocks.{last - level}"
        for i in range(module.num_blocks + 1):
            number += 1
            adm = f"output_blocks.{number}"
            yield Place("residual", f"up_{level}_{i}", f"{adm}.0", f"{theirs}.resnets.{i}", width)
            if attends:
                yield Place("attention", f"up_{level}_{i}_attention", f"{adm}.1", f"{theirs}.attentions.{i}", width)
        if level > 0 and module.resample != "pool":
            adm, key = f"output_blocks.{number}.{1 + attends}", f"{theirs}.upsamplers.0"
            suffix = "" if conv_or_block == "residual" else ".conv"
            yield Place(conv_or_block, f"up_{level}_resample", adm + suffix, key + suffix, width)


_OURS = ("norm_in", "conv_in", "embed", "norm_out", "conv_out", "skip")
_RESIDUAL = {
    "adm": ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"),
    "diffusers": ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"),
}
_ENDS = {
    "adm": ("input_blocks.0.0", "time_embed.0", "time_embed.2", "label_emb.weight", "out.0", "out.2"),
    "diffusers": (
        "conv_in",
        "time_embedding.linear_1",
        "time_embedding.linear_2",
        "class_embedding.weight",
        "conv_norm_out",
        "conv_out",
    ),
}


def _pieces(module: UNet, template: Any, layout: Layout) -> Iterator[Piece]:
    family = "adm" if layout.startswith("adm") else "diffusers"
    if family == "diffusers" and module.resample == "pool":
        raise ValueError("resample must be 'conv' or 'resblock' in the layout of diffusers, got 'pool'.")
    stem, time_in, time_out, classes, last_norm, out = _ENDS[family]
    yield from conv("stem", stem)
    yield from dense("time/in", time_in)
    yield from dense("time/out", time_out)
    if module.embed is not None:
        yield Piece("embed/table", classes, "n d -> n d")
    for place in places(module):
        key = place.adm if family == "adm" else place.diffusers
        if place.kind == "conv":
            yield from conv(place.path, key)
        elif place.kind == "attention":
            heads = module.num_heads if module.head_channels is None else place.width // module.head_channels
            yield from _attention(place.path, key, layout, heads, place.width)
        else:
            for ours, theirs in zip(_OURS, _RESIDUAL[family], strict=True):
                if ours in template[place.path]:
                    build = norm if "norm" in ours else dense if ours == "embed" else conv
                    yield from build(f"{place.path}/{ours}", f"{key}.{theirs}")
    yield from norm("norm", last_norm)
    yield from conv("out", out)


def _attention(path: str, key: str, layout: Layout, heads: int, width: int) -> Iterator[Piece]:
    """Our fused rows are (3, heads, d); guided diffusion's are (heads, 3, d), unless it splits the three first."""
    qkv, out = f"{path}/attention/qkv", f"{path}/attention/out"
    if layout.startswith("adm"):
        yield from norm(f"{path}/norm", f"{key}.norm")
        order = "h n d" if layout == "adm" else "n h d"
        sizes = {"h": heads, "n": 3}
        yield Piece(f"{qkv}/kernel", f"{key}.qkv.weight", f"({order}) i 1 -> i (n h d)", sizes)
        yield Piece(f"{qkv}/bias", f"{key}.qkv.bias", f"({order}) -> (n h d)", sizes)
        yield from conv1x1(out, f"{key}.proj_out", axes="1")
        return
    yield from norm(f"{path}/norm", f"{key}.group_norm")
    old = layout == "diffusers_old"
    for i, name in enumerate(("query", "key", "value") if old else ("to_q", "to_k", "to_v")):
        yield from dense(qkv, f"{key}.{name}", part=(i * width, (i + 1) * width))
    yield from dense(out, f"{key}.proj_attn" if old else f"{key}.to_out.0")


def table_rows(module: UNet) -> int | None:
    """Rows of the table of classes."""
    if module.embed is None:
        return None
    if isinstance(module.embed, ClassEmbedding):
        return module.embed.num_classes
    if isinstance(module.embed, LabelEmbedding):
        return module.embed.num_classes + 1
    raise ValueError(f"embed must be None, a ClassEmbedding or a LabelEmbedding, got {shown(module.embed)}.")


_FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
_KINDS = {"DownBlock2D": "conv", "UpBlock2D": "conv"} | dict.fromkeys(
    ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "resblock"
)


def unet_from_config(config: Mapping[str, Any]) -> UNet:
    """The network of a `config.json` of diffusers' `UNet2DModel`, which predicts the noise: its border is `DDPM`.

    Args:
        config: fields of the file; those that it lacks have the class's defaults.

    Raises:
        ValueError: for a field that asks for what this network does not have.
    """
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} must be {value!r} for a UNet, got {config[name]!r}.")
    widths = tuple(config.get("block_out_channels", (224, 448, 672, 896)))
    groups = config.get("norm_num_groups", 32)
    film = config.get("resnet_time_scale_shift", "default")
    check_member("resnet_time_scale_shift", film, ("default", "scale_shift"))
    if film == "scale_shift" and config.get("attn_norm_num_groups") != groups:
        raise ValueError(
            f"attn_norm_num_groups must be norm_num_groups = {groups} with resnet_time_scale_shift='scale_shift': the "
            f"attention in the middle has no normalisation without it, got {config.get('attn_norm_num_groups')!r}."
        )
    if config.get("attn_norm_num_groups", groups) not in (None, groups):
        raise ValueError(f"attn_norm_num_groups must be {groups}, got {config['attn_norm_num_groups']!r}.")
    padding = config.get("downsample_padding", 1)
    if padding not in (0, 1):
        raise ValueError(f"downsample_padding must be 0 or 1, got {padding!r}.")
    attention_levels, resample = _levels(config, len(widths))
    classes = config.get("num_class_embeds")
    return UNet(
        **width_options(widths, widths[0], groups),
        num_blocks=config.get("layers_per_block", 2),
        attention_levels=attention_levels,
        head_channels=config.get("attention_head_dim", 8),
        film=film == "scale_shift",
        resample=resample,
        out_channels=config.get("out_channels", 3),
        num_groups=groups,
        dropout=config.get("dropout", 0.0),
        embed=None if classes is None else ClassEmbedding(classes),
        in_channels=config.get("in_channels", 3),
        frequency_shift=float(config.get("freq_shift", 0)),
        sine_first=not config.get("flip_sin_to_cos", True),
        norm_epsilon=config.get("norm_eps", 1e-5),
        down_padding=(1, 1) if padding else (0, 1),
        border=DDPM,
    )


def _levels(config: Mapping[str, Any], num: int) -> tuple[tuple[int, ...], Any]:
    """Which levels have attention, and how the levels are resampled, of the names of diffusers' blocks."""
    default = ("DownBlock2D", *["AttnDownBlock2D"] * 3), (*["AttnUpBlock2D"] * 3, "UpBlock2D")
    down = [name.removeprefix("UNetRes") for name in config.get("down_block_types", default[0])]
    up = [name.removeprefix("UNetRes") for name in config.get("up_block_types", default[1])][::-1]
    if len(down) != num or len(up) != num:
        raise ValueError(f"down_block_types and up_block_types must be {num}, as block_out_channels, got {down}, {up}.")
    resampled = set()
    for names, name, skipped in ((down, "down", num - 1), (up, "up", 0)):
        kinds = _KINDS | {
            f"Attn{name.title()}Block2D": {"conv": "conv", "resnet": "resblock"}.get(
                config.get(f"{name}sample_type", "conv")
            )
        }
        for level, block in enumerate(names):
            if kinds.get(block) is None or name not in block.lower():
                raise ValueError(
                    f"{name}_block_types must be known to a UNet, got {block!r} with {name}sample_type="
                    f"{config.get(f'{name}sample_type', 'conv')!r}."
                )
            if level != skipped:
                resampled.add(kinds[block])
    attends = [tuple(level for level, block in enumerate(names) if block.startswith("Attn")) for names in (down, up)]
    if attends[0] != attends[1]:
        raise ValueError(
            f"up_block_types must have attention on the levels of down_block_types, got {up[::-1]}, {down}."
        )
    if len(resampled) > 1:
        raise ValueError(f"All levels must be resampled by convolutions or all by blocks, got {down}, {up[::-1]}.")
    return attends[0], next(iter(resampled), "conv")


def width_options(widths: Sequence[int], time_channels: int, groups: int) -> dict[str, Any]:
    """The attributes of a `UNet` that has these widths."""
    for width in widths:
        check_integer("width", width)
        if width % groups:
            raise ValueError(f"The {groups} groups of a normalisation must divide every width, got {tuple(widths)}.")
    whole = all(width % time_channels == 0 for width in widths)
    channels = time_channels if whole else math.gcd(*widths)
    return {
        "channels": channels,
        "channel_mults": tuple(width // channels for width in widths),
        "time_channels": None if channels == time_channels else time_channels,
    }


def unet_config(module: UNet, *, size: int | None = None) -> dict[str, Any]:
    """The `config.json` of diffusers' `UNet2DModel` for a network; the inverse of `unet_from_config`.

    Args:
        module: the network.
        size: side of the images, `sample_size` of the file.

    Raises:
        ValueError: for a network that diffusers' class cannot be.
    """
    widths = [module.channels * mult for mult in module.channel_mults]
    last = len(widths) - 1
    if module.patch_size != 1 or module.resample == "pool":
        raise ValueError("diffusers' UNet2DModel has neither patch_size > 1 nor resample='pool'.")
    if (module.time_channels or module.channels) != widths[0]:
        raise ValueError(f"time_channels must be {widths[0]}, the width of level 0, for diffusers' UNet2DModel.")
    if any(width % module.num_groups for width in widths) or module.in_channels is None:
        raise ValueError(f"diffusers' UNet2DModel has in_channels, and num_groups that divide the widths {widths}.")
    dims: set[Any] = {module.head_channels}
    if module.head_channels is None and module.num_heads > 1:
        dims = {widths[level] // module.num_heads for level in {*module.attention_levels, last}}
    if len(dims) > 1:
        raise ValueError(f"All heads must be of one width for diffusers' UNet2DModel, got {sorted(dims)}.")
    block = module.resample == "resblock"
    names = [
        "Attn{}Block2D" if level in module.attention_levels else "Resnet{}sampleBlock2D" if block else "{}Block2D"
        for level in range(last + 1)
    ]
    return _FIXED | {
        "_class_name": "UNet2DModel",
        "sample_size": size,
        "in_channels": module.in_channels,
        "out_channels": module.in_channels if module.out_channels is None else module.out_channels,
        "block_out_channels": widths,
        "layers_per_block": module.num_blocks,
        "down_block_types": [name.format("Down") for name in names],
        "up_block_types": [name.format("Up") for name in names[::-1]],
        "downsample_type": "resnet" if block else "conv",
        "upsample_type": "resnet" if block else "conv",
        "downsample_padding": module.down_padding[0],
        "attention_head_dim": dims.pop(),
        "norm_num_groups": module.num_groups,
        "attn_norm_num_groups": module.num_groups if module.film else None,
        "norm_eps": module.norm_epsilon,
        "resnet_time_scale_shift": "scale_shift" if module.film else "default",
        "num_class_embeds": table_rows(module),
        "dropout": module.dropout,
        "freq_shift": module.frequency_shift,
        "flip_sin_to_cos": not module.sine_first,
    }
