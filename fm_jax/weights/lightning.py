"""Rules of `fm_jax.models.LightningDiT`: the authors' layout."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer
from fm_jax.models.dit import position_features
from fm_jax.models.embed import LabelEmbedding
from fm_jax.models.lightning import LightningDiT
from fm_jax.models.stack import place_of_block
from fm_jax.weights.rules import Piece, Rules, dense, from_heads, norm, patches, template_of, to_heads


def lightning_rules(module: LightningDiT, *, size: int = 16, channels: int = 32) -> Rules:
    """Rules of a LightningDiT in the layout of the authors' files.

    Args:
        module: a `LightningDiT` with `LabelEmbedding`, its blocks scanned or not.
        size: side of the latents that the position table of the file is for.
        channels: channels of the latents.

    Raises:
        ValueError: for a network without `LabelEmbedding`.
    """
    check_integer("size", size)
    check_integer("channels", channels)
    if not isinstance(module, LightningDiT) or not isinstance(module.embed, LabelEmbedding):
        raise ValueError(f"module must be a LightningDiT with embed=LabelEmbedding(...), got {module!r:.200}.")
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    template = template_of(module, jax.ShapeDtypeStruct((1,), jnp.float32), x)
    grid = size // module.patch_size

    def table() -> np.ndarray:
        return position_features(grid, grid, module.hidden)[None]

    return Rules(
        template,
        tuple(_pieces(module)),
        tables={"pos_embed": table},
        optional=frozenset({"pos_embed"}),
        ignored=(r"feat_rope\..*",),
    )


def _pieces(module: LightningDiT) -> Iterator[Piece]:
    width, heads = module.hidden, module.num_heads
    hidden = int(2 / 3 * 4 * width) if module.mlp_hidden is None else module.mlp_hidden
    yield from patches("patches", "x_embedder.proj", module.patch_size)
    yield from dense("time/in", "t_embedder.mlp.0")
    yield from dense("time/out", "t_embedder.mlp.2")
    yield Piece("embed/table", "y_embedder.embedding_table.weight", "n d -> n d")
    for i in range(module.num_layers):
        path, layer = place_of_block(i, scan=module.scan_layers)
        key = f"blocks.{i}"
        yield from dense(f"{path}/modulation", f"{key}.adaLN_modulation.1", layer=layer)
        yield from norm(f"{path}/norm_attention", f"{key}.norm1", bias=False, layer=layer)
        yield from norm(f"{path}/norm_mlp", f"{key}.norm2", bias=False, layer=layer)
        for j, name in enumerate(("query", "key", "value")):
            rows = (j * width, (j + 1) * width)
            yield from to_heads(f"{path}/attention_{name}", f"{key}.attn.qkv", heads, layer=layer, rows=rows)
        yield from from_heads(f"{path}/attention_out", f"{key}.attn.proj", heads, layer=layer)
        yield from dense(f"{path}/mlp_gate", f"{key}.mlp.w12", layer=layer, rows=(0, hidden))
        yield from dense(f"{path}/mlp_in", f"{key}.mlp.w12", layer=layer, rows=(hidden, 2 * hidden))
        yield from dense(f"{path}/mlp_out", f"{key}.mlp.w3", layer=layer)
    yield from norm("norm", "final_layer.norm_final", bias=False)
    yield from dense("modulation", "final_layer.adaLN_modulation.1")
    yield from dense("out", "final_layer.linear")
