"""Rules and configurations of FLUX.1: diffusers' `FluxTransformer2DModel`, and the layout of the authors' own files."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_member, shown
from fm_jax.models.conditioning import Conditions
from fm_jax.models.flux import MLP_RATIO, PATCH, Flux
from fm_jax.models.stack import place_of_block
from fm_jax.weights.rules import Piece, Rules, dense, from_heads, norm, template_of, to_heads

CLASS = "FluxTransformer2DModel"
PACKED = "(c p q)"
"""The order of the numbers of a patch in the files; ours is (p q c)."""
SIZES = {"p": PATCH, "q": PATCH}
FIELDS = {
    "num_layers": ("num_double", 19),
    "num_single_layers": ("num_single", 38),
    "num_attention_heads": ("num_heads", 24),
    "joint_attention_dim": ("token_dim", 4096),
    "pooled_projection_dim": ("vector_dim", 768),
    "guidance_embeds": ("guidance", False),
    "axes_dims_rope": ("axes", (16, 56, 56)),
}
"""Of diffusers' configuration: our name, and what it is if it is left out."""
OTHERS = {"patch_size": 1, "in_channels": 64, "out_channels": None, "attention_head_dim": 128}


def flux_from_config(config: Mapping[str, Any]) -> Flux:
    """The network of a `config.json` of diffusers.

    Args:
        config: what is left out is diffusers' default; keys that begin with `_` say nothing of the network but
            `_class_name`.

    Raises:
        ValueError: if it is of another class, or has a field or a value that this network has not.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a dict, as config.json of diffusers holds, got {shown(config)}.")
    if config.get("_class_name", CLASS) != CLASS:
        raise ValueError(f"config must be of a {CLASS}, got _class_name={config['_class_name']!r}.")
    unknown = sorted(key for key in config if not key.startswith("_") and key not in FIELDS | OTHERS)
    if unknown:
        raise ValueError(f"config has fields that this network does not know: {', '.join(unknown)}.")
    options = {ours: config.get(key, default) for key, (ours, default) in FIELDS.items()}
    options["axes"] = tuple(options["axes"])
    others = OTHERS | {key: config[key] for key in OTHERS if key in config}
    if others["patch_size"] != 1:
        raise ValueError(f"patch_size must be 1, as the pipeline packs patches, got {shown(others['patch_size'])}.")
    packed = PATCH**2
    channels_in, channels_out = others["in_channels"], others["out_channels"] or others["in_channels"]
    if channels_in % packed or channels_out % packed or channels_in < channels_out:
        raise ValueError(
            f"in_channels and out_channels must be multiples of {packed} and the first not the smaller, got "
            f"{channels_in} and {channels_out}."
        )
    if others["attention_head_dim"] != sum(options["axes"]):
        raise ValueError(
            f"attention_head_dim must be the sum of axes_dims_rope={options['axes']}, got "
            f"{shown(others['attention_head_dim'])}."
        )
    return Flux(
        channels=channels_out // packed,
        local_channels=(channels_in - channels_out) // packed,
        hidden=options["num_heads"] * others["attention_head_dim"],
        **options,
    )


def flux_config(module: Flux) -> dict[str, Any]:
    """The `config.json` of diffusers for a network: the inverse of `flux_from_config`."""
    channels_in = PATCH**2 * (module.channels + module.local_channels)
    return {
        "_class_name": CLASS,
        "patch_size": 1,
        "in_channels": channels_in,
        "out_channels": PATCH**2 * module.channels if module.local_channels else None,
        "attention_head_dim": module.hidden // module.num_heads,
    } | {key: _plain(getattr(module, ours)) for key, (ours, _) in FIELDS.items()}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def flux_rules(module: Flux, layout: str = "diffusers") -> Rules:
    """Rules of a `Flux`.

    Args:
        module: the network.
        layout: `"diffusers"`, or `"bfl"`, that of the authors' own files, with fused projections.

    Raises:
        ValueError: if there is no such layout.
    """
    layouts = {"diffusers": _diffusers, "bfl": _bfl}
    check_member("layout", layout, tuple(layouts))
    numbers: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    cond = Conditions(
        vector=numbers(1, module.vector_dim),
        tokens=numbers(1, 1, module.token_dim),
        local=numbers(1, PATCH, PATCH, module.local_channels) if module.local_channels else None,
        guidance=numbers(1) if module.guidance else None,
    )
    template = template_of(module, numbers(1), numbers(1, PATCH, PATCH, module.channels), cond)
    return Rules(template, (*_patches(module, *ENDS[layout]), *layouts[layout](module)))


ENDS = {"diffusers": ("x_embedder", "proj_out"), "bfl": ("img_in", "final_layer.linear")}


def _patches(module: Flux, first: str, last: str) -> Iterator[Piece]:
    """The layers from and to patches, whose numbers the files have in another order."""
    yield Piece("patches/kernel", f"{first}.weight", f"o {PACKED} -> (p q c) o", SIZES)
    yield Piece("patches/bias", f"{first}.bias", "o -> o")
    yield Piece("out/kernel", f"{last}.weight", f"{PACKED} i -> i (p q c)", SIZES)
    yield Piece("out/bias", f"{last}.bias", f"{PACKED} -> (p q c)", SIZES)


def _blocks(module: Flux, name: str, length: int, theirs: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Path, key and place of each block of a run."""
    for i in range(length):
        path, layer = place_of_block(i, scan=module.scan_layers, name=name)
        yield path, f"{theirs}.{i}", {"layer": layer}


def _out_of_heads(path: str, key: str, heads: int, **where: Any) -> Iterator[Piece]:
    """Columns of attention, then of the hidden layer: [out, d + 4 d] -> [heads, 5 d / heads, out]."""
    sizes = {"h": heads, "g": 1 + MLP_RATIO}
    yield Piece(f"{path}/kernel", f"{key}.weight", "o (g h d) -> h (g d) o", sizes, **where)
    yield Piece(f"{path}/bias", f"{key}.bias", "o -> o", **where)


def _hidden_of_heads(path: str, key: str, heads: int, **where: Any) -> Iterator[Piece]:
    """The hidden layer, dealt out as the columns of `_out_of_heads`: [4 d, in] -> [in, heads, 4 d / heads]."""
    sizes = {"h": heads, "g": MLP_RATIO}
    yield Piece(f"{path}/kernel", f"{key}.weight", "(g h d) i -> i h (g d)", sizes, **where)
    yield Piece(f"{path}/bias", f"{key}.bias", "(g h d) -> h (g d)", sizes, **where)


def _diffusers(module: Flux) -> Iterator[Piece]:
    d, heads = module.hidden, module.num_heads
    yield from dense("tokens", "context_embedder")
    embed = "time_text_embed"
    ends = [("time/in", "timestep_embedder.linear_1"), ("time/out", "timestep_embedder.linear_2")]
    ends += [("vector_in", "text_embedder.linear_1"), ("vector_out", "text_embedder.linear_2")]
    if module.guidance:
        ends += [("guidance/in", "guidance_embedder.linear_1"), ("guidance/out", "guidance_embedder.linear_2")]
    for path, key in ends:
        yield from dense(path, f"{embed}.{key}")
    yield from dense("modulation", "norm_out.linear", rows=(0, d), part=(d, 2 * d))  # the scale first
    yield from dense("modulation", "norm_out.linear", rows=(d, 2 * d), part=(0, d))

    image = {"query": "to_q", "key": "to_k", "value": "to_v", "norm_query": "norm_q", "norm_key": "norm_k"}
    text = {name: f"add_{name[0]}_proj" for name in ("query", "key", "value")}
    text |= {"norm_query": "norm_added_q", "norm_key": "norm_added_k"}
    for path, key, layer in _blocks(module, "double", module.num_double, "transformer_blocks"):
        for stream, names, end, out in (("image", image, "", "to_out.0"), ("text", text, "_context", "to_add_out")):
            yield from _heads(f"{path}/{stream}_attention", f"{key}.attn", names, heads, **layer)
            yield from from_heads(f"{path}/{stream}_out", f"{key}.attn.{out}", heads, **layer)
            yield from dense(f"{path}/{stream}_modulation", f"{key}.norm1{end}.linear", **layer)
            yield from dense(f"{path}/{stream}_mlp_in", f"{key}.ff{end}.net.0.proj", **layer)
            yield from dense(f"{path}/{stream}_mlp_out", f"{key}.ff{end}.net.2", **layer)
    for path, key, layer in _blocks(module, "single", module.num_single, "single_transformer_blocks"):
        yield from _heads(f"{path}/attention", f"{key}.attn", image, heads, **layer)
        yield from dense(f"{path}/modulation", f"{key}.norm.linear", **layer)
        yield from _hidden_of_heads(f"{path}/mlp_in", f"{key}.proj_mlp", heads, **layer)
        yield from _out_of_heads(f"{path}/out", f"{key}.proj_out", heads, **layer)


def _heads(path: str, key: str, names: Mapping[str, str], heads: int, **layer: Any) -> Iterator[Piece]:
    for ours, theirs in names.items():
        if ours.startswith("norm"):
            yield from norm(f"{path}/{ours}", f"{key}.{theirs}", bias=False, **layer)
        else:
            yield from to_heads(f"{path}/{ours}", f"{key}.{theirs}", heads, **layer)


def _bfl(module: Flux) -> Iterator[Piece]:
    d, heads = module.hidden, module.num_heads
    yield from dense("tokens", "txt_in")
    ends = [("time/in", "time_in.in_layer"), ("time/out", "time_in.out_layer")]
    ends += [("vector_in", "vector_in.in_layer"), ("vector_out", "vector_in.out_layer")]
    if module.guidance:
        ends += [("guidance/in", "guidance_in.in_layer"), ("guidance/out", "guidance_in.out_layer")]
    for path, key in (*ends, ("modulation", "final_layer.adaLN_modulation.1")):
        yield from dense(path, key)

    for path, key, layer in _blocks(module, "double", module.num_double, "double_blocks"):
        for stream, theirs in (("image", "img"), ("text", "txt")):
            attention = f"{key}.{theirs}_attn"
            yield from _fused(f"{path}/{stream}_attention", f"{attention}.qkv", heads, d, **layer)
            yield from _scales(f"{path}/{stream}_attention", f"{attention}.norm", **layer)
            yield from from_heads(f"{path}/{stream}_out", f"{attention}.proj", heads, **layer)
            yield from dense(f"{path}/{stream}_modulation", f"{key}.{theirs}_mod.lin", **layer)
            yield from dense(f"{path}/{stream}_mlp_in", f"{key}.{theirs}_mlp.0", **layer)
            yield from dense(f"{path}/{stream}_mlp_out", f"{key}.{theirs}_mlp.2", **layer)
    for path, key, layer in _blocks(module, "single", module.num_single, "single_blocks"):
        yield from _fused(f"{path}/attention", f"{key}.linear1", heads, d, **layer)
        rows = (3 * d, (3 + MLP_RATIO) * d)
        yield from _hidden_of_heads(f"{path}/mlp_in", f"{key}.linear1", heads, rows=rows, **layer)
        yield from _scales(f"{path}/attention", f"{key}.norm", **layer)
        yield from dense(f"{path}/modulation", f"{key}.modulation.lin", **layer)
        yield from _out_of_heads(f"{path}/out", f"{key}.linear2", heads, **layer)


def _fused(path: str, key: str, heads: int, d: int, **layer: Any) -> Iterator[Piece]:
    """Queries, keys and values, one behind another in the rows of a tensor."""
    for i, name in enumerate(("query", "key", "value")):
        yield from to_heads(f"{path}/{name}", key, heads, rows=(i * d, (i + 1) * d), **layer)


def _scales(path: str, key: str, **layer: Any) -> Iterator[Piece]:
    for name in ("query", "key"):
        yield Piece(f"{path}/norm_{name}/scale", f"{key}.{name}_norm.scale", "d -> d", **layer)
