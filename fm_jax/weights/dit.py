"""Rules of `fm_jax.models.DiT`: the papers' own layout of DiT, SiT and REPA's SiT, and that of diffusers."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer, check_member
from fm_jax.models.conditioning import DDPM, SIT
from fm_jax.models.dit import DiT, position_features
from fm_jax.models.embed import LabelEmbedding
from fm_jax.models.stack import place_of_block
from fm_jax.weights.rules import Piece, Rules, dense, patches, template_of

Layout = Literal["official", "diffusers"]


def dit_from_config(config: Mapping[str, Any]) -> DiT:
    """The network of a `config.json` of diffusers' `DiTTransformer2DModel`.

    It is the network as diffusers computes it, which differs in two places from the authors': the time features, and
    the small constant of the second normalisation of a block. The authors' is the same `DiT` with the defaults of
    `frequency_shift` and `norm_mlp_epsilon`.

    Args:
        config: fields of the file.

    Raises:
        ValueError: for a field that asks for what this network does not have.
    """
    fixed = {
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "upcast_attention": False,
    }
    defaults = {"attention_bias": False}
    for name, value in fixed.items():
        if config.get(name, defaults.get(name, value)) != value:
            raise ValueError(f"{name} must be {value!r} for a DiT, got {config.get(name, defaults.get(name))!r}.")
    heads = config.get("num_attention_heads", 16)
    return DiT(
        patch_size=config.get("patch_size", 2),
        hidden=heads * config.get("attention_head_dim", 72),
        num_layers=config.get("num_layers", 28),
        num_heads=heads,
        out_channels=config.get("out_channels") or config.get("in_channels", 4),
        dropout=config.get("dropout", 0.0),
        embed=LabelEmbedding(config.get("num_embeds_ada_norm", 1000), stddev=0.02),
        border=DDPM,
        frequency_shift=1.0,
        norm_mlp_epsilon=config.get("norm_eps", 1e-5),
        scan_layers=True,
    )


def dit_config(module: DiT, *, size: int, channels: int = 4) -> dict[str, Any]:
    """The `config.json` of diffusers for a network.

    Args:
        module: a `DiT` with a `LabelEmbedding`.
        size: side of the latents.
        channels: channels of the latents.

    Raises:
        ValueError: for a network that does not predict noise in the steps of DDPM, or has not the time features of
            diffusers.
    """
    if module.border != DDPM:
        raise ValueError(f"border must be DDPM for diffusers' DiT, whose steps and noise it has, got {module.border}.")
    if module.frequency_shift != 1:
        raise ValueError(
            f"frequency_shift must be 1, as diffusers' DiT has it, got {module.frequency_shift}: there the same "
            "parameters would be another function. The authors' layout is dit_rules(module, 'official')."
        )
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": module.num_heads,
        "attention_head_dim": module.hidden // module.num_heads,
        "in_channels": channels,
        "out_channels": module.out_channels or channels,
        "num_layers": module.num_layers,
        "dropout": module.dropout,
        "attention_bias": True,
        "sample_size": size,
        "patch_size": module.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": _label_embedding(module).num_classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": module.norm_mlp_epsilon,
    }


def sit_from_config(config: Mapping[str, Any]) -> DiT:
    """The network of a configuration of SiT: the keywords that the authors' class is made with.

    Args:
        config: fields of the file.

    Raises:
        ValueError: for a field that the authors' class does not have.
    """
    defaults = {
        "input_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 1152,
        "depth": 28,
        "num_heads": 16,
        "mlp_ratio": 4.0,
        "class_dropout_prob": 0.1,
        "num_classes": 1000,
        "learn_sigma": True,
    }
    if unknown := sorted(name for name in config if name not in defaults and not name.startswith("_")):
        raise ValueError(f"config must have fields of SiT, got {', '.join(unknown)} too.")
    given = defaults | dict(config)
    return DiT(
        patch_size=given["patch_size"],
        hidden=given["hidden_size"],
        num_layers=given["depth"],
        num_heads=given["num_heads"],
        mlp_ratio=given["mlp_ratio"],
        out_channels=given["in_channels"] * (2 if given["learn_sigma"] else 1),
        embed=LabelEmbedding(given["num_classes"], stddev=0.02),
        border=SIT,
        scan_layers=True,
    )


def sit_config(module: DiT, *, size: int, channels: int = 4) -> dict[str, Any]:
    """The configuration of a SiT: the inverse of `sit_from_config`.

    Args:
        module: a `DiT` with a `LabelEmbedding` and `border=SIT`.
        size: side of the latents.
        channels: channels of the latents.

    Raises:
        ValueError: for another border, or another number of channels than once or twice those of the latents.
    """
    out = module.out_channels or channels
    if module.border != SIT or out not in (channels, 2 * channels):
        raise ValueError(
            f"module must have border=SIT and {channels} or {2 * channels} out_channels, got {module!r:.200}."
        )
    return {
        "_class_name": "SiT",
        "input_size": size,
        "patch_size": module.patch_size,
        "in_channels": channels,
        "hidden_size": module.hidden,
        "depth": module.num_layers,
        "num_heads": module.num_heads,
        "mlp_ratio": module.mlp_ratio,
        "num_classes": _label_embedding(module).num_classes,
        "learn_sigma": out == 2 * channels,
    }


def sit_rules(module: DiT, *, size: int = 32, channels: int = 4) -> Rules:
    """Rules of a SiT in its authors' layout, the only one; see `dit_rules`."""
    return dit_rules(module, "official", size=size, channels=channels)


def dit_rules(module: DiT, layout: Layout = "diffusers", *, size: int = 32, channels: int = 4) -> Rules:
    """Rules of a DiT or SiT.

    Args:
        module: a `DiT` with `LabelEmbedding`, its blocks scanned or not.
        layout: `"official"` for the authors' files of DiT, SiT and REPA, whose projectors of training are left out;
            `"diffusers"`, which repeats the embedding of time and class in every block.
        size: side of the latents that the position table of an official file is for.
        channels: channels of the latents.

    Raises:
        ValueError: for another layout, or a network without `LabelEmbedding`.
    """
    check_member("layout", layout, get_args(Layout))
    check_integer("size", size)
    check_integer("channels", channels)
    _label_embedding(module)
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    template = template_of(module, jax.ShapeDtypeStruct((1,), jnp.float32), x)
    if layout == "diffusers":
        return Rules(template, tuple(_diffusers(module)), copies=dict(_copies(module.num_layers)))
    grid = size // module.patch_size

    def table() -> np.ndarray:
        return position_features(grid, grid, module.hidden)[None]

    return Rules(
        template,
        tuple(_official(module)),
        tables={"pos_embed": table},
        optional=frozenset({"pos_embed"}),
        ignored=(r"projectors\..*",),
    )


def _label_embedding(module: DiT) -> LabelEmbedding:
    if not isinstance(module, DiT) or not isinstance(module.embed, LabelEmbedding):
        raise ValueError(f"module must be a DiT with embed=LabelEmbedding(...), got {module!r:.200}.")
    return module.embed


def _official(module: DiT) -> Iterator[Piece]:
    yield from patches("patches", "x_embedder.proj", module.patch_size)
    yield from dense("time/in", "t_embedder.mlp.0")
    yield from dense("time/out", "t_embedder.mlp.2")
    yield Piece("embed/table", "y_embedder.embedding_table.weight", "n d -> n d")
    for i in range(module.num_layers):
        path, layer = place_of_block(i, scan=module.scan_layers)
        key = f"blocks.{i}"
        yield from dense(f"{path}/modulation", f"{key}.adaLN_modulation.1", layer=layer)
        yield from dense(f"{path}/attention/qkv", f"{key}.attn.qkv", layer=layer)
        yield from dense(f"{path}/attention/out", f"{key}.attn.proj", layer=layer)
        yield from dense(f"{path}/mlp_in", f"{key}.mlp.fc1", layer=layer)
        yield from dense(f"{path}/mlp_out", f"{key}.mlp.fc2", layer=layer)
    yield from dense("modulation", "final_layer.adaLN_modulation.1")
    yield from dense("out", "final_layer.linear")


EMBEDDINGS = (
    "timestep_embedder.linear_1.weight",
    "timestep_embedder.linear_1.bias",
    "timestep_embedder.linear_2.weight",
    "timestep_embedder.linear_2.bias",
    "class_embedder.embedding_table.weight",
)


def _copies(num_layers: int) -> Iterator[tuple[str, str]]:
    for i in range(1, num_layers):
        for name in EMBEDDINGS:
            yield f"transformer_blocks.{i}.norm1.emb.{name}", f"transformer_blocks.0.norm1.emb.{name}"


def _diffusers(module: DiT) -> Iterator[Piece]:
    width = module.hidden
    first = "transformer_blocks.0.norm1.emb"
    yield from patches("patches", "pos_embed.proj", module.patch_size)
    yield from dense("time/in", f"{first}.timestep_embedder.linear_1")
    yield from dense("time/out", f"{first}.timestep_embedder.linear_2")
    yield Piece("embed/table", f"{first}.class_embedder.embedding_table.weight", "n d -> n d")
    for i in range(module.num_layers):
        path, layer = place_of_block(i, scan=module.scan_layers)
        key = f"transformer_blocks.{i}"
        yield from dense(f"{path}/modulation", f"{key}.norm1.linear", layer=layer)
        for j, name in enumerate("qkv"):
            part = (j * width, (j + 1) * width)
            yield from dense(f"{path}/attention/qkv", f"{key}.attn1.to_{name}", layer=layer, part=part)
        yield from dense(f"{path}/attention/out", f"{key}.attn1.to_out.0", layer=layer)
        yield from dense(f"{path}/mlp_in", f"{key}.ff.net.0.proj", layer=layer)
        yield from dense(f"{path}/mlp_out", f"{key}.ff.net.2", layer=layer)
    yield from dense("modulation", "proj_out_1")
    yield from dense("out", "proj_out_2")
