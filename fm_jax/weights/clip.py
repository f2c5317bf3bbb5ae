"""Rules of CLIP's text encoder: the layout of transformers, which diffusers' folders hold too."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_member, shown
from fm_jax.models.stack import place_of_block
from fm_jax.text.clip import ACTIVATIONS, ClipText
from fm_jax.weights.rules import Piece, Rules, dense, from_heads, norm, shifted, template_of, to_heads

LAYOUTS = {"transformers": "text_model.", "diffusers": "text_model.", "bare": ""}
"""Where the encoder's tensors are. Published files have `text_model.`; `"bare"` is `CLIPTextModel` in transformers 5,
which reads both and writes what it has read."""
ARCHITECTURES = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
_OLD_END = 2
"""`eos_token_id` of configurations that mean the largest id of a row."""
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
"""What transformers takes for fields that a `config.json` leaves out."""


def clip_from_config(config: Mapping[str, Any]) -> ClipText:
    """The encoder that a `config.json` of transformers describes.

    Args:
        config: of a `CLIPTextModel`, a `CLIPTextModelWithProjection` or a whole `CLIPModel`, whose text encoder with
            its projection it gives.

    Raises:
        ValueError: if it is of another class, or a field has a value that this network does not know.
    """
    names = config.get("architectures") or [None]
    architecture = names[0] if isinstance(names, list | tuple) else names
    check_member("architectures of a text encoder of CLIP", architecture, ARCHITECTURES)
    fields = _DEFAULTS | dict(config)
    if architecture == "CLIPModel":
        fields = _DEFAULTS | dict(config.get("text_config", {})) | {"projection_dim": config.get("projection_dim", 512)}
    check_member("hidden_act", fields["hidden_act"], tuple(ACTIVATIONS))
    end = fields["eos_token_id"]
    if not isinstance(end, int):
        raise ValueError(f"eos_token_id must be an integer, got {shown(end)}.")
    return ClipText(
        vocabulary=fields["vocab_size"],
        max_tokens=fields["max_position_embeddings"],
        hidden=fields["hidden_size"],
        num_layers=fields["num_hidden_layers"],
        num_heads=fields["num_attention_heads"],
        mlp=fields["intermediate_size"],
        activation=fields["hidden_act"],
        projection=None if architecture == "CLIPTextModel" else fields["projection_dim"],
        end=None if end == _OLD_END else end,
        epsilon=fields["layer_norm_eps"],
    )


def clip_config(module: ClipText) -> dict[str, Any]:
    """The `config.json` of an encoder, as transformers reads it: the inverse of `clip_from_config`."""
    projected = module.projection is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": module.vocabulary,
        "max_position_embeddings": module.max_tokens,
        "hidden_size": module.hidden,
        "num_hidden_layers": module.num_layers,
        "num_attention_heads": module.num_heads,
        "intermediate_size": module.mlp,
        "hidden_act": module.activation,
        "projection_dim": module.projection if projected else module.hidden,
        "eos_token_id": _OLD_END if module.end is None else module.end,
        "layer_norm_eps": module.epsilon,
    }


def clip_layout(keys: Iterable[str]) -> str:
    """The layout of a file with these keys: `"bare"` if none begins with `text_model.`."""
    return "transformers" if any(key.startswith("text_model.") for key in keys) else "bare"


def clip_rules(module: ClipText, layout: str = "transformers") -> Rules:
    """Rules of an encoder. The half of a whole CLIP that looks at images is ignored.

    Args:
        module: the encoder.
        layout: `"transformers"` or `"diffusers"`, the same, with `text_model.` in front; `"bare"` without it.

    Raises:
        ValueError: for another layout.
    """
    check_member("layout", layout, tuple(LAYOUTS))
    template = template_of(module, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    pieces = shifted(_pieces(module), LAYOUTS[layout])
    if module.projection is not None:
        pieces += tuple(dense("projection", "text_projection", bias=False))
    ignored = (r"(.*\.)?position_ids", "logit_scale", r"vision_model\..*", r"visual_projection\.weight")
    return Rules(template, pieces, ignored=ignored)


def _pieces(module: ClipText) -> Iterator[Piece]:
    yield Piece("tokens/embedding", "embeddings.token_embedding.weight", "n d -> n d")
    yield Piece("positions", "embeddings.position_embedding.weight", "n d -> n d")
    for i in range(module.num_layers):
        path, layer = place_of_block(i, scan=module.scan_layers)
        key = f"encoder.layers.{i}"
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            yield from to_heads(
                f"{path}/attention/{name}", f"{key}.self_attn.{letter}_proj", module.num_heads, layer=layer
            )
        yield from from_heads(f"{path}/attention/out", f"{key}.self_attn.out_proj", module.num_heads, layer=layer)
        yield from norm(f"{path}/norm_attention", f"{key}.layer_norm1", layer=layer)
        yield from norm(f"{path}/norm_mlp", f"{key}.layer_norm2", layer=layer)
        yield from dense(f"{path}/mlp_in", f"{key}.mlp.fc1", layer=layer)
        yield from dense(f"{path}/mlp_out", f"{key}.mlp.fc2", layer=layer)
    yield from norm("norm", "final_layer_norm")
