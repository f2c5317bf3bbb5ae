"""Rules of the diffusion transformers of `fm_jax.models.DiT`: the official layout of DiT and SiT."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.models.dit import DiT, position_features
from fm_jax.weights.rules import Piece, Rules, dense, patches, template_of


def dit_rules(module: DiT, size: int, channels: int = 4) -> Rules:
    """Rules of a DiT or SiT in the layout of the papers' own files.

    Args:
        module: a `DiT` with `LabelEmbedding`.
        size: side of the latents that the position table of the file is for.
        channels: channels of the latents.
    """
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    template = template_of(module, jnp.zeros(1), x)
    grid = size // module.patch_size
    table = lambda: position_features(grid, grid, module.hidden)[None]  # noqa: E731
    return Rules(template, tuple(_pieces(module)), tables={"pos_embed": table}, optional=frozenset({"pos_embed"}))


def _pieces(module: DiT) -> Iterator[Piece]:
    yield from patches("patches", "x_embedder.proj", module.patch_size)
    yield from dense("time/in", "t_embedder.mlp.0")
    yield from dense("time/out", "t_embedder.mlp.2")
    yield Piece("embed/table", "y_embedder.embedding_table.weight", "n d -> n d")
    for i in range(module.num_layers):
        path: str
        layer: dict[str, Any]
        path, layer = ("blocks", {"layer": i}) if module.scan_layers else (f"block_{i}", {})
        key = f"blocks.{i}"
        yield from dense(f"{path}/modulation", f"{key}.adaLN_modulation.1", **layer)
        yield from dense(f"{path}/attention/qkv", f"{key}.attn.qkv", **layer)
        yield from dense(f"{path}/attention/out", f"{key}.attn.proj", **layer)
        yield from dense(f"{path}/mlp_in", f"{key}.mlp.fc1", **layer)
        yield from dense(f"{path}/mlp_out", f"{key}.mlp.fc2", **layer)
    yield from dense("modulation", "final_layer.adaLN_modulation.1")
    yield from dense("out", "final_layer.linear")
