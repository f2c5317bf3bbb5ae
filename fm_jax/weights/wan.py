"""Rules of Wan's video transformers of `fm_jax.models.wan`: the layout of diffusers' `WanTransformer3DModel`."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_member, shown
from fm_jax.models.conditioning import Conditions
from fm_jax.models.stack import place_of_block
from fm_jax.models.wan import Wan
from fm_jax.weights.rules import Piece, Rules, dense, from_heads, norm, template_of, to_heads

CLASS = "WanTransformer3DModel"
# Fields that the network here has one value for: others are other networks.
_FIXED: dict[str, Any] = {
    "_class_name": CLASS,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "pos_embed_seq_len": None,
}
_READ: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
}
_IDLE = {"rope_max_seq_len": 1024}  # the length of a table of what is computed here


def wan_from_config(config: Mapping[str, Any]) -> Wan:
    """The network of a `config.json` of diffusers; fields that it lacks have the class's defaults.

    Args:
        config: its contents.

    Raises:
        ValueError: if it is that of another network, such as Wan 2.1's from a first and a last frame, or has a field or
            a value that is not known here; by name.

    Example:
        >>> wan_from_config({"_class_name": "WanTransformer3DModel", "num_layers": 30}).num_layers
        30
    """
    for name, only in _FIXED.items():
        if name in config and config[name] != only:
            raise ValueError(f"{name} must be {only!r} in {CLASS}, got {shown(config[name])}.")
    known = {*_FIXED, *_READ, *_IDLE}
    if unknown := sorted(name for name in config if name not in known and not name.startswith("_")):
        raise ValueError(f"config must have fields of {CLASS}, got {', '.join(unknown)} too.")
    read = _READ | {name: value for name, value in config.items() if name in _READ}
    channels = read["in_channels"] if read["out_channels"] is None else read["out_channels"]
    for name in ("num_attention_heads", "attention_head_dim", "in_channels"):
        check_integer(name, read[name])
    if read["in_channels"] < channels:
        raise ValueError(f"in_channels must be at least out_channels={channels}, got {read['in_channels']}.")
    hidden = read["num_attention_heads"] * read["attention_head_dim"]
    if read["added_kv_proj_dim"] != (None if read["image_dim"] is None else hidden):
        wanted = f"None, or {hidden} beside an image_dim, here {read['image_dim']}"
        raise ValueError(f"added_kv_proj_dim must be {wanted}, got {shown(read['added_kv_proj_dim'])}.")
    return Wan(
        patch_size=tuple(read["patch_size"]),
        hidden=hidden,
        num_layers=read["num_layers"],
        num_heads=read["num_attention_heads"],
        mlp_hidden=read["ffn_dim"],
        text_features=read["text_dim"],
        time_features=read["freq_dim"],
        channels=channels,
        local_channels=read["in_channels"] - channels,
        image_features=read["image_dim"] or 0,
        epsilon=read["eps"],
    )


def wan_config(module: Wan) -> dict[str, Any]:
    """The `config.json` of a network: the inverse of `wan_from_config`."""
    return (
        _FIXED
        | _IDLE
        | {
            "patch_size": list(module.patch_size),
            "num_attention_heads": module.num_heads,
            "attention_head_dim": module.hidden // module.num_heads,
            "in_channels": module.channels + module.local_channels,
            "out_channels": module.channels,
            "text_dim": module.text_features,
            "freq_dim": module.time_features,
            "ffn_dim": module.mlp_hidden,
            "num_layers": module.num_layers,
            "eps": module.epsilon,
            "image_dim": module.image_features or None,
            "added_kv_proj_dim": module.hidden if module.image_features else None,
        }
    )


def wan_rules(module: Wan, layout: str = "diffusers") -> Rules:
    """Rules of a video transformer of Wan.

    Args:
        module: the network.
        layout: `"diffusers"`.
    """
    check_member("layout", layout, ("diffusers",))
    shape: Any = jax.ShapeDtypeStruct
    x = shape((1, *module.patch_size, module.channels), jnp.float32)
    local = shape((*x.shape[:-1], module.local_channels), jnp.float32) if module.local_channels else None
    tokens = shape((1, 1, module.text_features), jnp.float32)
    if module.image_features:
        tokens = {"text": tokens, "image": shape((1, 1, module.image_features), jnp.float32)}
    cond = Conditions(tokens=tokens, local=local)
    return Rules(template_of(module, shape((1,), jnp.float32), x, cond), tuple(_pieces(module)))


def _pieces(module: Wan) -> Iterator[Piece]:
    sizes = dict(zip("spq", module.patch_size, strict=True))
    yield Piece("patches/kernel", "patch_embedding.weight", "o c s p q -> (s p q c) o", sizes)
    yield Piece("patches/bias", "patch_embedding.bias", "o -> o")
    for path, key in (("time", "time_embedder"), ("text", "text_embedder")):
        yield from dense(f"{path}/in", f"condition_embedder.{key}.linear_1")
        yield from dense(f"{path}/out", f"condition_embedder.{key}.linear_2")
    yield from dense("modulation", "condition_embedder.time_proj")
    if module.image_features:
        key = "condition_embedder.image_embedder"
        for path, theirs in (("in", "ff.net.0.proj"), ("out", "ff.net.2")):
            yield from dense(f"image/{path}", f"{key}.{theirs}")
        for path, theirs in (("norm_in", "norm1"), ("norm_out", "norm2")):
            yield from norm(f"image/{path}", f"{key}.{theirs}")
    for i in range(module.num_layers):
        path, layer = place_of_block(i, scan=module.scan_layers)
        yield from _block(path, f"blocks.{i}", module.num_heads, layer)
        if module.image_features:
            yield from _image(f"{path}/cross", f"blocks.{i}.attn2", module.num_heads, layer)
    yield Piece("table", "scale_shift_table", "1 k d -> k d")
    yield from dense("out", "proj_out")


def _image(path: str, key: str, heads: int, layer: int | None) -> Iterator[Piece]:
    for name in ("key", "value"):
        yield from to_heads(f"{path}/image_{name}", f"{key}.add_{name[0]}_proj", heads, layer=layer)
    scale = f"{path}/norm_image_key/scale"
    yield Piece(scale, f"{key}.norm_added_k.weight", "(h d) -> h d", {"h": heads}, layer=layer)


def _block(path: str, key: str, heads: int, layer: int | None) -> Iterator[Piece]:
    yield Piece(f"{path}/table", f"{key}.scale_shift_table", "1 k d -> k d", layer=layer)
    for name, theirs in (("attention", f"{key}.attn1"), ("cross", f"{key}.attn2")):
        for part in ("query", "key", "value"):
            yield from to_heads(f"{path}/{name}/{part}", f"{theirs}.to_{part[0]}", heads, layer=layer)
        for part in ("query", "key"):
            scale = f"{theirs}.norm_{part[0]}.weight"
            yield Piece(f"{path}/{name}/norm_{part}/scale", scale, "(h d) -> h d", {"h": heads}, layer=layer)
        yield from from_heads(f"{path}/{name}/out", f"{theirs}.to_out.0", heads, layer=layer)
    yield from norm(f"{path}/norm_cross", f"{key}.norm2", layer=layer)
    yield from dense(f"{path}/mlp_in", f"{key}.ffn.net.0.proj", layer=layer)
    yield from dense(f"{path}/mlp_out", f"{key}.ffn.net.2", layer=layer)
