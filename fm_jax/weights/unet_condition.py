"""Rules of the conditional U-Nets of Stable Diffusion: diffusers' layout, and that of the papers' own files ("ldm")."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_member, shown
from fm_jax.models.conditioning import Conditions
from fm_jax.models.stack import place_of_block
from fm_jax.models.unet_condition import UNetCondition
from fm_jax.weights.rules import Piece, Rules, conv, conv1x1, dense, from_heads, norm, template_of, to_heads

LAYOUTS = ("diffusers", "ldm")
_CLASS = "UNet2DConditionModel"
_PLAIN, _SEEING = ("DownBlock2D", "CrossAttnDownBlock2D")
# What diffusers' class can do and this network cannot: the values that mean what it does, the default first.
_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
# What does not change the network: how it is called, what it is for, a precision that is ours anyway.
_SILENT = ("sample_size", "upcast_attention", "addition_embed_type_num_heads")
_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (_SEEING, _SEEING, _SEEING, _PLAIN),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 8,
    "transformer_layers_per_block": 1,
    "cross_attention_dim": 1280,
    "norm_num_groups": 32,
    "use_linear_projection": False,
    "dropout": 0.0,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_embedding_dim": None,
}


def unet_condition_from_config(config: Mapping[str, Any], *, num_sizes: int = 6, **overrides: Any) -> UNetCondition:
    """The network that a `config.json` of diffusers' `UNet2DConditionModel` describes.

    Args:
        config: the file as a dict. A field that it lacks has diffusers' default.
        num_sizes: of a network with `addition_embed_type` "text_time", how many numbers stand behind the pooled text:
            the file does not say it. SDXL has 6, its refiner 5.
        **overrides: attributes of `UNetCondition` that are no matter of the file, such as `compute`.

    Raises:
        ValueError: for another class, a field that is not known, or a value that this network cannot follow.
    """
    if config.get("_class_name", _CLASS) != _CLASS:
        raise ValueError(f"_class_name must be {_CLASS!r}, got {shown(config['_class_name'])}.")
    unknown = [name for name in config if name not in (*_FIXED, *_SILENT, *_DEFAULTS) and not name.startswith("_")]
    if unknown:
        raise ValueError(f"The config has fields that UNetCondition does not know: {', '.join(sorted(unknown))}.")
    for name, allowed in _FIXED.items():
        value = config.get(name, allowed[0])
        values = value if isinstance(value, list | tuple) and value else [value]
        if any(each not in allowed for each in values):
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {shown(value)}.")
    fields = _DEFAULTS | {name: value for name, value in config.items() if name in _DEFAULTS}
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(fields[name], list | tuple):
            raise ValueError(f"{name} must be a list, got {shown(fields[name])}.")
    widths, down = tuple(fields["block_out_channels"]), tuple(fields["down_block_types"])
    up = tuple(kind.replace("Down", "Up") for kind in reversed(down))
    if not set(down) <= {_PLAIN, _SEEING} or len(down) != len(widths):
        wanted = f"{len(widths)} of {_PLAIN!r} and {_SEEING!r}, one for each of block_out_channels"
        raise ValueError(f"down_block_types must be {wanted}, got {shown(list(down))}.")
    if tuple(fields["up_block_types"]) != up:
        wanted = f"down_block_types read backwards, {shown(list(up))}"
        raise ValueError(f"up_block_types must be {wanted}, got {shown(list(fields['up_block_types']))}.")
    if fields["time_embedding_dim"] not in (None, 4 * widths[0]):
        wanted = f"None or 4 x {widths[0]} = {4 * widths[0]}"
        raise ValueError(f"time_embedding_dim must be {wanted}, got {shown(fields['time_embedding_dim'])}.")

    def one(name: str) -> Any:
        values = fields[name]
        if isinstance(values, list | tuple):
            if len(set(values)) != 1:
                raise ValueError(f"{name} must be the same number on every level, got {shown(values)}.")
            return values[0]
        return values

    def each(name: str) -> tuple[Any, ...]:
        values = fields[name]
        return tuple(values) if isinstance(values, list | tuple) else (values,) * len(widths)

    attributes = {
        "in_channels": fields["in_channels"],
        "out_channels": fields["out_channels"],
        "widths": widths,
        "num_blocks": one("layers_per_block"),
        "attention_levels": tuple(level for level, kind in enumerate(down) if kind == _SEEING),
        "num_heads": each("attention_head_dim"),
        "num_layers": each("transformer_layers_per_block"),
        "token_width": one("cross_attention_dim"),
        "num_groups": fields["norm_num_groups"],
        "linear_projections": bool(fields["use_linear_projection"]),
        "dropout": fields["dropout"],
        "scan_layers": set(each("transformer_layers_per_block")) != {1},
    }
    if config.get("addition_embed_type") is not None:
        check_integer("num_sizes", num_sizes)
        waves, width = fields["addition_time_embed_dim"], fields["projection_class_embeddings_input_dim"]
        if not isinstance(waves, int) or not isinstance(width, int) or width <= num_sizes * waves:
            raise ValueError(
                f"projection_class_embeddings_input_dim must be the width of the pooled text + {num_sizes} x "
                f"addition_time_embed_dim, got {shown(width)} with {shown(waves)}."
            )
        attributes |= {"vector_width": width - num_sizes * waves, "num_sizes": num_sizes, "size_features": waves}
    return UNetCondition(**(attributes | overrides))


def unet_condition_config(module: UNetCondition) -> dict[str, Any]:
    """The `config.json` of a network: the inverse of `unet_condition_from_config`, `num_sizes` aside."""
    kinds = [_SEEING if level in module.attention_levels else _PLAIN for level in range(len(module.widths))]
    config = {
        "_class_name": _CLASS,
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "block_out_channels": list(module.widths),
        "layers_per_block": module.num_blocks,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "attention_head_dim": list(module.num_heads),
        "transformer_layers_per_block": list(module.num_layers),
        "cross_attention_dim": module.token_width,
        "norm_num_groups": module.num_groups,
        "use_linear_projection": module.linear_projections,
        "dropout": module.dropout,
    }
    if module.vector_width is None:
        return config
    return config | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": module.size_features,
        "projection_class_embeddings_input_dim": module.vector_width + module.num_sizes * module.size_features,
    }


def unet_condition_rules(module: UNetCondition, layout: str = "diffusers") -> Rules:
    """Rules of a conditional U-Net.

    Args:
        module: the network.
        layout: `"diffusers"`, or `"ldm"`, the names in Stability's own files (`input_blocks`, ...), which stand there
            behind `model.diffusion_model.`.

    Raises:
        ValueError: for another layout.
    """
    check_member("layout", layout, LAYOUTS)
    side = 2 ** (len(module.widths) - 1)
    x = jax.ShapeDtypeStruct((1, side, side, module.in_channels), jnp.float32)
    tokens: Any = jax.ShapeDtypeStruct((1, 1, module.token_width), jnp.float32)
    vector: Any = None
    if module.vector_width is not None:
        vector = jax.ShapeDtypeStruct((1, module.vector_width + module.num_sizes), jnp.float32)
    template = template_of(module, jnp.zeros(1), x, Conditions(tokens=tokens, vector=vector))
    names = LAYOUTS.index(layout)
    pieces: list[Piece] = []
    for kind, path, *keys in _layers(module):
        if kind == "resnet":
            pieces += _resnet(path, keys[names], names, "skip" in template[path])
        elif kind == "transformer":
            level = -1 if path.startswith("middle") else int(path.split("_")[1])
            pieces += _transformer(path, keys[names], level, module)
        else:
            pieces += _KINDS[kind](path, keys[names])
    return Rules(template, tuple(pieces))


_KINDS = {"dense": dense, "conv": conv, "norm": norm}


def _layers(module: UNetCondition) -> Iterator[tuple[str, str, str, str]]:
    """Kind, our path, diffusers' and LDM's name of every layer and block: the one place where blocks are counted."""
    last, each = len(module.widths) - 1, module.num_blocks + 1
    yield "dense", "time/in", "time_embedding.linear_1", "time_embed.0"
    yield "dense", "time/out", "time_embedding.linear_2", "time_embed.2"
    if module.vector_width is not None:
        yield "dense", "vector/in", "add_embedding.linear_1", "label_emb.0.0"
        yield "dense", "vector/out", "add_embedding.linear_2", "label_emb.0.2"
    yield "conv", "stem", "conv_in", "input_blocks.0.0"
    for level in range(last + 1):
        key = f"down_blocks.{level}"
        for i in range(module.num_blocks):
            path, ldm = f"down_{level}_{i}", f"input_blocks.{1 + level * each + i}"
            yield "resnet", path, f"{key}.resnets.{i}", f"{ldm}.0"
            if level in module.attention_levels:
                yield "transformer", f"{path}_transformer", f"{key}.attentions.{i}", f"{ldm}.1"
        if level < last:
            ldm = f"input_blocks.{(level + 1) * each}.0.op"
            yield "conv", f"down_{level}_resample", f"{key}.downsamplers.0.conv", ldm
    yield "resnet", "middle_0", "mid_block.resnets.0", "middle_block.0"
    yield "transformer", "middle_transformer", "mid_block.attentions.0", "middle_block.1"
    yield "resnet", "middle_1", "mid_block.resnets.1", "middle_block.2"
    for level in reversed(range(last + 1)):
        key = f"up_blocks.{last - level}"
        for i in range(each):
            path, ldm = f"up_{level}_{i}", f"output_blocks.{(last - level) * each + i}"
            yield "resnet", path, f"{key}.resnets.{i}", f"{ldm}.0"
            if level in module.attention_levels:
                yield "transformer", f"{path}_transformer", f"{key}.attentions.{i}", f"{ldm}.1"
        if level > 0:
            # LDM's last block of a level upsamples behind what else it does.
            ldm = f"{ldm}.{2 if level in module.attention_levels else 1}.conv"
            yield "conv", f"up_{level}_resample", f"{key}.upsamplers.0.conv", ldm
    yield "norm", "norm", "conv_norm_out", "out.0"
    yield "conv", "out", "conv_out", "out.2"


def _resnet(path: str, key: str, names: int, skip: bool) -> Iterator[Piece]:
    yield from norm(f"{path}/norm_in", f"{key}.{('norm1', 'in_layers.0')[names]}")
    yield from conv(f"{path}/conv_in", f"{key}.{('conv1', 'in_layers.2')[names]}")
    yield from dense(f"{path}/embed", f"{key}.{('time_emb_proj', 'emb_layers.1')[names]}")
    yield from norm(f"{path}/norm_out", f"{key}.{('norm2', 'out_layers.0')[names]}")
    yield from conv(f"{path}/conv_out", f"{key}.{('conv2', 'out_layers.3')[names]}")
    if skip:
        yield from conv(f"{path}/skip", f"{key}.{('conv_shortcut', 'skip_connection')[names]}")


def _transformer(path: str, key: str, level: int, module: UNetCondition) -> Iterator[Piece]:
    """The same names in both layouts."""
    project = dense if module.linear_projections else conv1x1
    yield from norm(f"{path}/norm", f"{key}.norm")
    yield from project(f"{path}/in", f"{key}.proj_in")
    for i in range(module.num_layers[level]):
        block, layer = place_of_block(i, scan=module.scan_layers)
        where = {"layer": layer}
        yield from _block(
            f"{path}/{block}", f"{key}.transformer_blocks.{i}", module.num_heads[level], module.widths[level], where
        )
    yield from project(f"{path}/out", f"{key}.proj_out")


def _block(path: str, key: str, heads: int, width: int, layer: dict[str, Any]) -> Iterator[Piece]:
    for theirs, ours in (("attn1", "self_attention"), ("attn2", "cross_attention")):
        for name, row in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
            yield from to_heads(f"{path}/{ours}/{name}", f"{key}.{theirs}.{row}", heads, bias=False, **layer)
        yield from from_heads(f"{path}/{ours}/out", f"{key}.{theirs}.to_out.0", heads, **layer)
    for theirs, ours in (("norm1", "norm_self"), ("norm2", "norm_cross"), ("norm3", "norm_mlp")):
        yield from norm(f"{path}/{ours}", f"{key}.{theirs}", **layer)
    # Values above, gates below.
    yield from dense(f"{path}/mlp_in", f"{key}.ff.net.0.proj", rows=(0, 4 * width), **layer)
    yield from dense(f"{path}/mlp_gate", f"{key}.ff.net.0.proj", rows=(4 * width, 8 * width), **layer)
    yield from dense(f"{path}/mlp_out", f"{key}.ff.net.2", **layer)
