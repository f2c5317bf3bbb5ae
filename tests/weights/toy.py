"""A network of no use, whose parameters are pieces of every kind; and its tensors."""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.weights.rules import Piece, Rules, conv, conv1x1, dense, from_heads, nested, norm, patches, to_heads

SHAPES = {
    "embed/table": (7, 8),
    "scale": (),
    "image/kernel": (3, 3, 2, 8),
    "image/bias": (8,),
    "video/kernel": (3, 1, 1, 2, 8),
    "pointwise/kernel": (8, 4),
    "pointwise/bias": (4,),
    "patches/kernel": (2 * 2 * 3, 8),
    "patches/bias": (8,),
    "blocks/norm/scale": (2, 8),
    "blocks/norm/bias": (2, 8),
    "blocks/query/kernel": (2, 8, 2, 4),
    "blocks/query/bias": (2, 2, 4),
    "blocks/key/kernel": (2, 8, 2, 4),
    "blocks/key/bias": (2, 2, 4),
    "blocks/out/kernel": (2, 2, 4, 8),
    "blocks/out/bias": (2, 8),
    "blocks/mlp/kernel": (2, 8, 16),
    "blocks/mlp/bias": (2, 16),
    "modulation/kernel": (8, 10),
    "modulation/bias": (10,),
    "count": (3,),
}


def table() -> np.ndarray:
    return np.sin(np.arange(12, dtype=np.float64)).reshape(3, 4).astype(np.float32)


def pieces():
    yield Piece("embed/table", "embed.weight", "n d -> n d")
    yield Piece("scale", "logit_scale", " -> ")
    yield from conv("image", "image")
    yield from conv("video", "video", bias=False, axes="t h w")
    yield from conv1x1("pointwise", "pointwise")
    yield from patches("patches", "patches.proj", 2)
    for i in range(2):
        yield from norm("blocks/norm", f"blocks.{i}.norm", layer=i)
        yield from to_heads("blocks/query", f"blocks.{i}.qk", 2, layer=i, rows=(0, 8))
        yield from to_heads("blocks/key", f"blocks.{i}.qk", 2, layer=i, rows=(8, 16))
        yield from from_heads("blocks/out", f"blocks.{i}.out", 2, layer=i)
        yield from dense("blocks/mlp", f"blocks.{i}.mlp", layer=i)
    yield from dense("modulation", "modulation", rows=(0, 5), part=(5, 10))  # the halves are swapped
    yield from dense("modulation", "modulation", rows=(5, 10), part=(0, 5))
    yield Piece("count", "count", "n -> n")


def rules(**changes) -> Rules:
    dtypes = {"count": jnp.int32}
    template = {path: jax.ShapeDtypeStruct(shape, dtypes.get(path, jnp.float32)) for path, shape in SHAPES.items()}
    options = {
        "copies": {"tied.weight": "embed.weight"},
        "tables": {"positions": table},
        "optional": frozenset({"tied.weight", "positions"}),
        "ignored": (r"(.*\.)?position_ids",),
    }
    return Rules(nested(template), tuple(pieces()), **(options | changes))


def params(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    leaves = {path: np.asarray(rng.standard_normal(shape), dtype) for path, shape in SHAPES.items()}
    return nested(leaves | {"count": rng.integers(9, size=3, dtype=np.int32)})


def tensors(dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    return rules().to_theirs(params(dtype, seed)) | {"positions": table()}


def same_bits(a, b) -> bool:
    """Whether two pytrees have the same structure, dtypes and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)
