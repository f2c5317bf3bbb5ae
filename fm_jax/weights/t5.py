"""Rules of the encoders of the T5 family: the layout of transformers, which diffusers' folders hold too."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_member, shown
from fm_jax.models.stack import place_of_block
from fm_jax.text.t5 import ACTIVATIONS, T5Encoder
from fm_jax.weights.rules import Piece, Rules, dense, from_heads, norm, template_of, to_heads

TABLE, COPY = "shared.weight", "encoder.embed_tokens.weight"
"""The two names of the table of tokens, of which a file may lack either."""
MODEL_TYPES = ("t5", "mt5", "umt5")
_DENSE = {"relu": "relu", "gated-gelu": "gelu_new", "gated-silu": "silu"}
"""`dense_act_fn` by `feed_forward_proj`: tanh's GELU, whatever the name of the latter."""
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
"""What transformers takes for fields that a `config.json` of T5 leaves out."""
_NEWER: dict[str, Any] = {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
}
"""And those of mT5 and UMT5 that differ."""


def t5_from_config(config: Mapping[str, Any]) -> T5Encoder:
    """The encoder that a `config.json` of transformers describes.

    Args:
        config: of an encoder or a whole model of the types `"t5"` (v1.0, v1.1, UL2, ByT5), `"mt5"` or `"umt5"`.

    Raises:
        ValueError: if it is of another type, or a field has a value that this network does not know.
    """
    kind = config.get("model_type")
    check_member("model_type of an encoder of the T5 family", kind, MODEL_TYPES)
    fields = _DEFAULTS | (_NEWER if kind != "t5" else {}) | dict(config)
    activation = fields["feed_forward_proj"]
    check_member("feed_forward_proj", activation, tuple(ACTIVATIONS))
    if (found := fields.get("dense_act_fn", _DENSE[activation])) != _DENSE[activation]:
        raise ValueError(f"dense_act_fn must be {_DENSE[activation]!r} with {activation!r}, got {shown(found)}.")
    if fields.get("is_decoder"):
        raise ValueError("is_decoder must be false: this is an encoder, got true.")
    return T5Encoder(
        vocabulary=fields["vocab_size"],
        hidden=fields["d_model"],
        num_layers=fields["num_layers"],
        num_heads=fields["num_heads"],
        head_dim=fields["d_kv"],
        mlp=fields["d_ff"],
        activation=activation,
        shared_bias=kind != "umt5",
        buckets=fields["relative_attention_num_buckets"],
        max_distance=fields["relative_attention_max_distance"],
        epsilon=fields["layer_norm_epsilon"],
    )


def t5_config(module: T5Encoder) -> dict[str, Any]:
    """The `config.json` of an encoder, as transformers reads it: the inverse of `t5_from_config`."""
    return {
        "architectures": ["T5EncoderModel" if module.shared_bias else "UMT5EncoderModel"],
        "model_type": "t5" if module.shared_bias else "umt5",
        "vocab_size": module.vocabulary,
        "d_model": module.hidden,
        "d_kv": module.head_dim,
        "d_ff": module.mlp,
        "num_layers": module.num_layers,
        "num_heads": module.num_heads,
        "relative_attention_num_buckets": module.buckets,
        "relative_attention_max_distance": module.max_distance,
        "layer_norm_epsilon": module.epsilon,
        "feed_forward_proj": module.activation,
        "dense_act_fn": _DENSE[module.activation],
        "is_gated_act": module.activation.startswith("gated"),
        "is_encoder_decoder": False,
        "tie_word_embeddings": False,
    }


def t5_rules(module: T5Encoder, layout: str = "transformers") -> Rules:
    """Rules of an encoder. The decoder of a whole model is ignored.

    Args:
        module: the encoder.
        layout: `"transformers"` or `"diffusers"`, the same.

    Raises:
        ValueError: for another layout.
    """
    check_member("layout", layout, ("transformers", "diffusers"))
    template = template_of(module, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return Rules(
        template,
        tuple(_pieces(module)),
        copies={COPY: TABLE},
        optional=frozenset({COPY}),
        ignored=(r"decoder\..*", r"lm_head\.weight"),
    )


def _pieces(module: T5Encoder) -> Iterator[Piece]:
    yield Piece("tokens/embedding", TABLE, "n d -> n d")
    distances = "layer.0.SelfAttention.relative_attention_bias.weight"
    if module.shared_bias:
        yield Piece("distance/table", f"encoder.block.0.{distances}", "n h -> n h")
    for i in range(module.num_layers):
        path, layer = place_of_block(i, scan=module.scan_layers)
        attention, mlp = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        if not module.shared_bias:
            yield Piece(f"{path}/distance/table", f"encoder.block.{i}.{distances}", "n h -> n h", layer=layer)
        heads: dict[str, Any] = {"heads": module.num_heads, "bias": False, "layer": layer}
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            yield from to_heads(f"{path}/attention/{name}", f"{attention}.SelfAttention.{letter}", **heads)
        yield from from_heads(f"{path}/attention/out", f"{attention}.SelfAttention.o", **heads)
        yield from norm(f"{path}/norm_attention", f"{attention}.layer_norm", bias=False, layer=layer)
        yield from norm(f"{path}/norm_mlp", f"{mlp}.layer_norm", bias=False, layer=layer)
        names = {"mlp_in": "wi_0", "mlp_value": "wi_1"} if module.activation != "relu" else {"mlp_in": "wi"}
        for name, key in (names | {"mlp_out": "wo"}).items():
            yield from dense(f"{path}/{name}", f"{mlp}.DenseReluDense.{key}", bias=False, layer=layer)
    yield from norm("norm", "encoder.final_layer_norm", bias=False)
