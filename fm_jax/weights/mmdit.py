"""Rules of Stable Diffusion 3's transformer: the layouts of diffusers and of Stability AI's own files."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer, check_member, shown
from fm_jax.models.conditioning import Conditions
from fm_jax.models.mmdit import MMDiT, position_table
from fm_jax.models.stack import place_of_block
from fm_jax.weights.rules import Piece, Rules, dense, from_heads, norm, patches, template_of, to_heads

# Fields of the configuration that change the network, with the values that a file without them means.
_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
_SAME = {"patch_size", "num_layers"}


def mmdit_from_config(config: Mapping[str, Any]) -> MMDiT:
    """The network that a `config.json` of diffusers' `SD3Transformer2DModel` describes.

    Args:
        config: its fields; those that begin with an underscore say nothing about the network.

    Raises:
        ValueError: for another class, a field that is not known, or a value that this network has no way to be.

    Example:
        >>> mmdit_from_config({"num_attention_heads": 2, "caption_projection_dim": 128, "num_layers": 3}).hidden
        128
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"The configuration must be a dict, as config.json holds, got {shown(config)}.")
    name = config.get("_class_name", "SD3Transformer2DModel")
    if name != "SD3Transformer2DModel":
        raise ValueError(f"The configuration must be of an SD3Transformer2DModel, got {shown(name)}.")
    if unknown := sorted(key for key in config if not key.startswith("_") and key not in _DEFAULTS):
        raise ValueError(f"The configuration has fields that are not known: {', '.join(unknown)}.")
    fields = _DEFAULTS | {key: value for key, value in config.items() if not key.startswith("_")}
    for name in _DEFAULTS.keys() - {"out_channels", "dual_attention_layers", "qk_norm"}:
        check_integer(name, fields[name])
    hidden = fields["num_attention_heads"] * fields["attention_head_dim"]
    if fields["caption_projection_dim"] != hidden:
        raise ValueError(f"caption_projection_dim must be {hidden}, got {fields['caption_projection_dim']}.")
    if fields["qk_norm"] not in (None, "rms_norm"):
        raise ValueError(f"qk_norm must be None or 'rms_norm', got {shown(fields['qk_norm'])}.")
    dual = fields["dual_attention_layers"] or ()
    if not isinstance(dual, list | tuple) or set(dual) != set(range(len(dual))):
        raise ValueError(f"dual_attention_layers must be the first ones, 0, 1, ..., got {shown(dual)}.")
    return MMDiT(
        **{key: fields[key] for key in _SAME},
        channels=fields["in_channels"],
        out_channels=None if fields["out_channels"] in (None, fields["in_channels"]) else fields["out_channels"],
        hidden=hidden,
        num_heads=fields["num_attention_heads"],
        num_dual=len(dual),
        qk_norm=fields["qk_norm"] is not None,
        token_dim=fields["joint_attention_dim"],
        vector_dim=fields["pooled_projection_dim"],
        table_size=fields["pos_embed_max_size"],
        table_base=fields["sample_size"] // fields["patch_size"],
    )


def mmdit_config(module: MMDiT) -> dict[str, Any]:
    """The `config.json` of a network for diffusers: the inverse of `mmdit_from_config`."""
    _check_module(module)
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": module.table_base * module.patch_size,
        "patch_size": module.patch_size,
        "in_channels": module.channels,
        "num_layers": module.num_layers,
        "attention_head_dim": module.hidden // module.num_heads,
        "num_attention_heads": module.num_heads,
        "joint_attention_dim": module.token_dim,
        "caption_projection_dim": module.hidden,
        "pooled_projection_dim": module.vector_dim,
        "out_channels": module.out_channels or module.channels,
        "pos_embed_max_size": module.table_size,
        "dual_attention_layers": list(range(module.num_dual)),
        "qk_norm": "rms_norm" if module.qk_norm else None,
    }


def mmdit_rules(module: MMDiT, layout: str = "diffusers") -> Rules:
    """Rules of an `MMDiT`.

    Args:
        module: the network.
        layout: `"diffusers"`, of `SD3Transformer2DModel`, or `"stability"`, of Stability AI's files without the prefix
            `model.diffusion_model.`

    Raises:
        ValueError: for another module or layout.
    """
    _check_module(module)
    check_member("layout", layout, ("diffusers", "stability"))
    side = module.patch_size
    vector, tokens = (
        jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in ((module.vector_dim,), (1, module.token_dim))
    )
    cond: Any = Conditions(vector, tokens=tokens)  # type: ignore[arg-type]
    x = jax.ShapeDtypeStruct((1, side, side, module.channels), jnp.float32)
    template = template_of(module, jax.ShapeDtypeStruct((1,), jnp.float32), x, cond)

    def table() -> np.ndarray:
        size = module.table_size
        return position_table(size, size, size, module.table_base, module.hidden)[None]

    pieces, key = (
        (_diffusers(module), "pos_embed.pos_embed") if layout == "diffusers" else (_stability(module), "pos_embed")
    )
    return Rules(template, tuple(pieces), tables={key: table}, optional=frozenset({key}))


def _check_module(module: Any) -> None:
    if not isinstance(module, MMDiT):
        raise ValueError(f"module must be an MMDiT, such as make_mmdit('medium'), got {shown(module)}.")


def _blocks(module: MMDiT) -> Iterator[tuple[int, str, dict[str, Any], bool, bool]]:
    """Index, path, options of the pieces, whether dual, whether last, of every block."""
    for name, start, length in module.runs:
        for i in range(length):
            path, layer = place_of_block(i, scan=module.scan_layers, name=name)
            yield start + i, path, {"layer": layer}, name == "dual_block", False
    yield module.num_layers - 1, "last_block", {}, module.num_dual == module.num_layers, True


def swapped_halves(path: str, key: str, width: int) -> Iterator[Piece]:
    """A linear layer to two halves of `width` rows that the file has in the other order than we."""
    yield from dense(path, key, rows=(0, width), part=(width, 2 * width))
    yield from dense(path, key, rows=(width, 2 * width), part=(0, width))


def _diffusers(module: MMDiT) -> Iterator[Piece]:
    heads, width = module.num_heads, module.hidden

    def attention(path: str, key: str, where: dict[str, Any]) -> Iterator[Piece]:
        for mine, theirs in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
            yield from to_heads(f"{path}/{mine}", f"{key}.{theirs}", heads, **where)
        if module.qk_norm:
            yield from norm(f"{path}/norm_query", f"{key}.norm_q", bias=False, **where)
            yield from norm(f"{path}/norm_key", f"{key}.norm_k", bias=False, **where)
        yield from from_heads(f"{path}/out", f"{key}.to_out.0", heads, **where)

    def context_attention(path: str, key: str, last: bool, where: dict[str, Any]) -> Iterator[Piece]:
        for mine, theirs in (("query", "add_q_proj"), ("key", "add_k_proj"), ("value", "add_v_proj")):
            yield from to_heads(f"{path}/context_{mine}", f"{key}.{theirs}", heads, **where)
        if module.qk_norm:
            yield from norm(f"{path}/norm_context_query", f"{key}.norm_added_q", bias=False, **where)
            yield from norm(f"{path}/norm_context_key", f"{key}.norm_added_k", bias=False, **where)
        if not last:
            yield from from_heads(f"{path}/context_out", f"{key}.to_add_out", heads, **where)

    yield from patches("patches", "pos_embed.proj", module.patch_size)
    yield from dense("time/in", "time_text_embed.timestep_embedder.linear_1")
    yield from dense("time/out", "time_text_embed.timestep_embedder.linear_2")
    yield from dense("vector_in", "time_text_embed.text_embedder.linear_1")
    yield from dense("vector_out", "time_text_embed.text_embedder.linear_2")
    yield from dense("context", "context_embedder")
    for i, path, where, dual, last in _blocks(module):
        key = f"transformer_blocks.{i}"
        yield from dense(f"{path}/modulation", f"{key}.norm1.linear", **where)
        yield from attention(f"{path}/attention", f"{key}.attn", where)
        yield from context_attention(f"{path}/attention", f"{key}.attn", last, where)
        if dual:
            yield from attention(f"{path}/self_attention", f"{key}.attn2", where)
        yield from dense(f"{path}/mlp_in", f"{key}.ff.net.0.proj", **where)
        yield from dense(f"{path}/mlp_out", f"{key}.ff.net.2", **where)
        if last:
            yield from swapped_halves(f"{path}/context_modulation", f"{key}.norm1_context.linear", width)
            continue
        yield from dense(f"{path}/context_modulation", f"{key}.norm1_context.linear", **where)
        yield from dense(f"{path}/context_mlp_in", f"{key}.ff_context.net.0.proj", **where)
        yield from dense(f"{path}/context_mlp_out", f"{key}.ff_context.net.2", **where)
    yield from swapped_halves("modulation", "norm_out.linear", width)
    yield from dense("out", "proj_out")


def _stability(module: MMDiT) -> Iterator[Piece]:
    heads, width = module.num_heads, module.hidden

    def attention(path: str, prefix: str, key: str, out: bool, where: dict[str, Any]) -> Iterator[Piece]:
        for n, name in enumerate(("query", "key", "value")):
            rows = (n * width, (n + 1) * width)
            yield from to_heads(f"{path}/{prefix}{name}", f"{key}.qkv", heads, rows=rows, **where)
        if module.qk_norm:
            yield from norm(f"{path}/norm_{prefix}query", f"{key}.ln_q", bias=False, **where)
            yield from norm(f"{path}/norm_{prefix}key", f"{key}.ln_k", bias=False, **where)
        if out:
            yield from from_heads(f"{path}/{prefix}out", f"{key}.proj", heads, **where)

    yield from patches("patches", "x_embedder.proj", module.patch_size)
    yield from dense("time/in", "t_embedder.mlp.0")
    yield from dense("time/out", "t_embedder.mlp.2")
    yield from dense("vector_in", "y_embedder.mlp.0")
    yield from dense("vector_out", "y_embedder.mlp.2")
    yield from dense("context", "context_embedder")
    for i, path, where, dual, last in _blocks(module):
        for prefix, stream in (("", "x_block"), ("context_", "context_block")):
            key, whole = f"joint_blocks.{i}.{stream}", not (prefix and last)
            yield from dense(f"{path}/{prefix}modulation", f"{key}.adaLN_modulation.1", **where)
            yield from attention(f"{path}/attention", prefix, f"{key}.attn", whole, where)
            if dual and not prefix:
                yield from attention(f"{path}/self_attention", "", f"{key}.attn2", True, where)
            if whole:
                yield from dense(f"{path}/{prefix}mlp_in", f"{key}.mlp.fc1", **where)
                yield from dense(f"{path}/{prefix}mlp_out", f"{key}.mlp.fc2", **where)
    yield from dense("modulation", "final_layer.adaLN_modulation.1")
    yield from dense("out", "final_layer.linear")
