"""Rules of PixArt's transformers of `fm_jax.models.crossdit`: the layout of diffusers' `PixArtTransformer2DModel`."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_member, shown
from fm_jax.models.conditioning import Conditions
from fm_jax.models.crossdit import SIZES, CrossDiT
from fm_jax.models.stack import place_of_block
from fm_jax.weights.rules import Piece, Rules, dense, from_heads, patches, template_of, to_heads

CLASS = "PixArtTransformer2DModel"
# Fields of the class, and of its predecessor Transformer2DModel, that the network here has one value for: others are
# other networks. The first value is the one that `crossdit_config` writes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": (CLASS, "Transformer2DModel"),
    "dropout": (0.0,),
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_single",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "upcast_attention": (False,),
    "attention_type": ("default",),
}
_LEGACY: dict[str, tuple[Any, ...]] = {
    "num_vector_embeds": (None,),
    "use_linear_projection": (False,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
}
# What changes nothing in this network: the groups of a norm that it lacks, and the number of steps of training.
_IDLE = ("norm_num_groups", "num_embeds_ada_norm")
_READ = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
}


def crossdit_from_config(config: Mapping[str, Any]) -> CrossDiT:
    """The network of a `config.json` of diffusers; fields that it lacks have the class's defaults.

    Args:
        config: its contents.

    Raises:
        ValueError: if it is that of another network, or has a field or a value that is not known here; by name.

    Example:
        >>> crossdit_from_config({"_class_name": "PixArtTransformer2DModel", "caption_channels": 4096}).size_conditions
        True
    """
    for name, allowed in (_FIXED | _LEGACY).items():
        if name in config and config[name] not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))} in PixArt, got {shown(config[name])}.")
    known = {*_FIXED, *_LEGACY, *_IDLE, *_READ}
    if unknown := sorted(name for name in config if name not in known and not name.startswith("_")):
        raise ValueError(f"config must have fields of {CLASS}, got {', '.join(unknown)} too.")
    read = _READ | {name: value for name, value in config.items() if name in _READ}
    size = read["sample_size"]
    hidden = read["num_attention_heads"] * read["attention_head_dim"]
    if read["cross_attention_dim"] != hidden:
        got = f"cross_attention_dim={shown(read['cross_attention_dim'])}"
        raise ValueError(f"cross_attention_dim must be num_attention_heads attention_head_dim = {hidden}, got {got}.")
    if read["caption_channels"] is None:
        raise ValueError("caption_channels must be the width of the text, 4096 in PixArt, got None.")
    scale, sizes = read["interpolation_scale"], read["use_additional_conditions"]
    return CrossDiT(
        patch_size=read["patch_size"],
        hidden=hidden,
        num_layers=read["num_layers"],
        num_heads=read["num_attention_heads"],
        text_features=read["caption_channels"],
        sample_size=size,
        interpolation_scale=float(max(size // 64, 1) if scale is None else scale),
        size_conditions=size == 128 if sizes is None else sizes,
        in_channels=read["in_channels"],
        out_channels=read["in_channels"] if read["out_channels"] is None else read["out_channels"],
    )


def crossdit_config(module: CrossDiT) -> dict[str, Any]:
    """The `config.json` of a network: the inverse of `crossdit_from_config`.

    Raises:
        ValueError: if diffusers' class cannot be this network.
    """
    if module.mlp_ratio != 4.0:
        raise ValueError(f"mlp_ratio must be 4.0 in {CLASS}, got {module.mlp_ratio}.")
    fixed = {name: allowed[0] for name, allowed in _FIXED.items()}
    scale = module.interpolation_scale
    return fixed | {
        "num_attention_heads": module.num_heads,
        "attention_head_dim": module.hidden // module.num_heads,
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "num_layers": module.num_layers,
        "cross_attention_dim": module.hidden,
        "sample_size": module.sample_size,
        "patch_size": module.patch_size,
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "use_additional_conditions": module.size_conditions,
        "caption_channels": module.text_features,
        "num_embeds_ada_norm": 1000,
        "norm_num_groups": 32,
    }


def crossdit_rules(module: CrossDiT, layout: str = "diffusers") -> Rules:
    """Rules of a PixArt transformer.

    Args:
        module: the network.
        layout: `"diffusers"`.
    """
    check_member("layout", layout, ("diffusers",))
    shape: Any = jax.ShapeDtypeStruct
    x = shape((1, module.patch_size, module.patch_size, module.in_channels), jnp.float32)
    sizes = shape((1, SIZES), jnp.float32) if module.size_conditions else None
    cond = Conditions(tokens=shape((1, 1, module.text_features), jnp.float32), vector=sizes)
    return Rules(template_of(module, shape((1,), jnp.float32), x, cond), tuple(_pieces(module)))


def _pieces(module: CrossDiT) -> Iterator[Piece]:
    yield from patches("patches", "pos_embed.proj", module.patch_size)
    for path, key in (("time", "timestep"), ("resolution", "resolution"), ("aspect", "aspect_ratio")):
        if path == "time" or module.size_conditions:
            yield from dense(f"{path}/in", f"adaln_single.emb.{key}_embedder.linear_1")
            yield from dense(f"{path}/out", f"adaln_single.emb.{key}_embedder.linear_2")
    yield from dense("modulation", "adaln_single.linear")
    yield from dense("text/in", "caption_projection.linear_1")
    yield from dense("text/out", "caption_projection.linear_2")
    for i in range(module.num_layers):
        path, layer = place_of_block(i, scan=module.scan_layers)
        yield from _block(path, f"transformer_blocks.{i}", module.num_heads, layer)
    yield Piece("table", "scale_shift_table", "k d -> k d")
    yield from dense("out", "proj_out")


def _block(path: str, key: str, heads: int, layer: int | None) -> Iterator[Piece]:
    yield Piece(f"{path}/table", f"{key}.scale_shift_table", "k d -> k d", layer=layer)
    for name, theirs in (("attention", "attn1"), ("cross", "attn2")):
        for part in ("query", "key", "value"):
            yield from to_heads(f"{path}/{name}/{part}", f"{key}.{theirs}.to_{part[0]}", heads, layer=layer)
        yield from from_heads(f"{path}/{name}/out", f"{key}.{theirs}.to_out.0", heads, layer=layer)
    yield from dense(f"{path}/mlp_in", f"{key}.ff.net.0.proj", layer=layer)
    yield from dense(f"{path}/mlp_out", f"{key}.ff.net.2", layer=layer)
