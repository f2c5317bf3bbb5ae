"""The places of a network of ours where something may join it, without a change of its code or its parameters' names.

Three of them, in every network that has them: the embedding of time, the blocks, and the attention that looks at what
the network is told. Methods are intercepted while the network runs (`flax.linen.intercept_methods`), inside of loops
over blocks and of rematerialised blocks too; a module that is made there belongs to the module it joins.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.models import crossdit, unet_condition
from fm_jax.models.attention import attend
from fm_jax.models.crossdit import CrossDiTBlock
from fm_jax.models.dit import DiTBlock
from fm_jax.models.flux import PATCH, DoubleBlock, Flux, SingleBlock
from fm_jax.models.layers import SelfAttention, TimeEmbedding
from fm_jax.models.lightning import LightningBlock
from fm_jax.models.mlp import Hidden
from fm_jax.models.mmdit import JointAttention, JointBlock
from fm_jax.models.sequence_unet import SequenceBlock
from fm_jax.models.song_blocks import SongBlock
from fm_jax.models.unet_blocks import ResBlock
from fm_jax.models.videodit import VideoDiTBlock, VideoTime
from fm_jax.models.wan_blocks import WanAttention, WanBlock
from fm_jax.types import Array

TOKEN_BLOCKS = (
    DiTBlock,
    LightningBlock,
    CrossDiTBlock,
    JointBlock,
    DoubleBlock,
    SingleBlock,
    VideoDiTBlock,
    WanBlock,
)
"""Blocks of tokens [batch, n, d]: those of the state stand first, in the first of several streams."""
BLOCKS = (*TOKEN_BLOCKS, ResBlock, SongBlock, SequenceBlock, Hidden)
"""Those, the residual blocks of feature maps [batch, h, w, c] and of sequences [batch, l, c], and the hidden layers
[batch, d] of an `MLP`."""

Interceptor = Callable[[Any, Any, Any, Any], Any]


class Looking(NamedTuple):
    """An attention that more keys and values may join.

    Attributes:
        kind: class of the module.
        name: that the module must have; any if `None`.
        queries: names of the submodules that give the queries, the last of which counts.
        out: name of the submodule that takes what was attended to.
        normed: whether keys are normalised; `None`: where `module.qk_norm` is.
    """

    kind: type
    name: str | None
    queries: tuple[str, ...]
    out: str
    normed: bool | None = False


LOOKING = (
    Looking(unet_condition.Attention, "cross_attention", ("query",), "out"),
    Looking(crossdit.Attention, "cross", ("query",), "out"),
    Looking(WanAttention, "cross", ("query", "norm_query"), "out", normed=True),
    Looking(JointAttention, "attention", ("query", "norm_query"), "out", normed=None),
    Looking(DoubleBlock, None, ("image_attention",), "image_out", normed=True),
    Looking(SingleBlock, None, ("attention",), "out", normed=True),
    Looking(LightningBlock, None, ("attention_query",), "attention_out"),
    Looking(SelfAttention, "attention", ("qkv",), "out"),
)
"""Cross-attention where a network has it, joint attention or self-attention where it has none."""


def _nested(network: nn.Module) -> list[nn.Module]:
    """A network that reads text (`TextConditioned`) or has branches or control, and those in it, outermost first."""
    inner = getattr(network, "network", None)
    return [network, *_nested(inner)] if isinstance(inner, nn.Module) else [network]


def innermost(network: nn.Module) -> nn.Module:
    """The network itself, of one that reads text or has branches or control."""
    return _nested(network)[-1]


def path_of(network: nn.Module) -> tuple[str, ...]:
    """The path of `innermost(network)`, of a bound network."""
    return (*network.path, *["network"] * (len(_nested(network)) - 1))


def token_grid(network: nn.Module, x: Array) -> tuple[int, ...]:
    """Rows and columns (and frames before them) of the patches of a state, as the blocks of tokens see them."""
    network = innermost(network)
    patch = PATCH if isinstance(network, Flux) else getattr(network, "patch_size", 1)
    sides = x.shape[1:-1]
    patches = (patch,) * len(sides) if isinstance(patch, int) else tuple(patch)
    return tuple(side // size for side, size in zip(sides, patches, strict=False))  # the network refuses what differs


def at_time(root: tuple[str, ...], add: Callable[[nn.Module, Array], Array]) -> Interceptor:
    """Adds to the embedding of time, [rows, d], of the network at the path `root`: `emb + add(module, emb)`.

    Rows are examples, or the frames of all examples one behind another where each has a time of its own.
    """

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        module = context.module
        embeds = isinstance(module, TimeEmbedding | VideoTime) and module.name == "time"
        last = isinstance(module, nn.Dense) and module.name == "time_out"  # of a SongUNet
        if context.method_name != "__call__" or module.path[:-1] != root or not (embeds or last):
            return out
        return out + add(module, out).astype(out.dtype)

    return interceptor


def at_blocks(root: tuple[str, ...], tokens: int, add: Callable[[nn.Module, Array], Array]) -> Interceptor:
    """Adds to the state in what every block gives, feature map or `tokens` tokens: `h + add(module, h)`."""

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_fun(*args, **kwargs)
        if not _called(context, root) or not isinstance(context.module, BLOCKS):
            return out
        h = state_of(out, tokens)
        return with_state(out, h + add(context.module, h).astype(h.dtype))

    return interceptor


def state_of(out: Any, tokens: int) -> Array:
    """The state in what a block gives: a feature map, or the first `tokens` tokens of the first stream."""
    h: Array = out[0] if isinstance(out, tuple) else out
    return h[:, :tokens] if h.ndim == 3 else h


def with_state(out: Any, h: Array) -> Any:
    """What a block gives with another state in it: the inverse of `state_of`."""
    if isinstance(out, tuple):
        return (h, *out[1:])
    return h if out.ndim != 3 or out.shape == h.shape else jnp.concatenate([h, out[:, h.shape[1] :]], axis=1)


class Seen(NamedTuple):
    """What more is seen in an attention: keys and values [batch, m, heads, head_dim], a mask, and a factor on it."""

    keys: Array
    values: Array
    mask: Array | None
    scale: float


class Head(NamedTuple):
    """The attention that keys and values are made for: number and width of heads, dtype, are its keys normalised."""

    heads: int
    head_dim: int
    dtype: Any
    normed: bool


def at_attention(root: tuple[str, ...], tokens: int, see: Callable[[nn.Module, Head], list[Seen]]) -> Interceptor:
    """Adds attention of the same queries to more keys and values, before the projection out.

    Args:
        root: path of the network.
        tokens: number of those of the state in a block of tokens.
        see: of the module with the attention, in whose scope it makes modules, and its heads: what is seen there.
    """
    within: list[dict[str, Any]] = []  # the attention that is running, innermost last

    def interceptor(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not _called(context, root):
            return next_fun(*args, **kwargs)
        if (place := _looking(module)) is not None:
            width = state_of(args[0], tokens).shape[-1]
            normed = bool(module.qk_norm if place.normed is None else place.normed)
            head = Head(module.num_heads, width // module.num_heads, module.compute.dtype, normed)
            # Before the call: a block that is rematerialised runs in a scope of its own.
            within.append({"path": module.path, "place": place, "seen": see(module, head), "module": module})
            out = next_fun(*args, **kwargs)
            within.pop()
            return out
        if within and module.path[:-1] == within[-1]["path"]:
            current = within[-1]
            if module.name in current["place"].queries:
                out = next_fun(*args, **kwargs)
                current["queries"] = _queries(out, module.name, current["module"], tokens)
                return out
            if module.name == current["place"].out:
                args = (_joined(args[0], current), *args[1:])
        return next_fun(*args, **kwargs)

    return interceptor


def _called(context: Any, root: tuple[str, ...]) -> bool:
    return context.method_name == "__call__" and context.module.path[: len(root)] == root


def _looking(module: nn.Module) -> Looking | None:
    return next(
        (each for each in LOOKING if isinstance(module, each.kind) and each.name in (None, module.name)),
        None,
    )


def _queries(out: Any, name: str, module: Any, tokens: int) -> Array:
    """Queries [batch, n, heads, head_dim] of the state, of what the submodule that makes them gives."""
    q: Array = out[0] if isinstance(out, tuple) else out
    if name == "qkv":  # fused, [batch, n, 3 width]
        q = q[..., : q.shape[-1] // 3]
        q = q.reshape(*q.shape[:2], module.num_heads, -1)
    return q[:, :tokens] if isinstance(module, SingleBlock) else q


def _joined(h: Array, current: dict[str, Any]) -> Array:
    """What was attended to, [batch, n, width] or [batch, n, heads, head_dim and more], with what is seen beside it."""
    q = current["queries"]
    heads = h if h.ndim == 4 else h.reshape(*q.shape)
    for keys, values, mask, scale in current["seen"]:
        more = attend(q, keys, values, mask=mask, implementation=current["module"].compute.attention)
        heads = heads.at[:, : q.shape[1], :, : q.shape[3]].add((scale * more).astype(h.dtype))
    return heads.reshape(h.shape)


def resized(features: Array, grid: tuple[int, ...]) -> Array:
    """Features [batch, *sides, c] on another grid: means of squares to fewer, repeated to more places.

    Raises:
        ValueError: if a side is neither a multiple nor a divisor of the one wanted.
    """
    for axis, (side, wanted) in enumerate(zip(features.shape[1:-1], grid, strict=True), start=1):
        if side % wanted and wanted % side:
            raise ValueError(
                f"The sides of a condition, {features.shape[1:-1]}, must be multiples or divisors of those of blocks, "
                f"got blocks of {grid}."
            )
        if side > wanted:
            shape = features.shape
            features = features.reshape(*shape[:axis], wanted, side // wanted, *shape[axis + 1 :]).mean(axis=axis + 1)
        elif side < wanted:
            features = jnp.repeat(features, wanted // side, axis=axis, total_repeat_length=wanted)
    return features


def on_grid(features: Array, h: Array, grid: tuple[int, ...]) -> Array:
    """Features [batch, *sides, c] in the layout of a block's state `h`: a map, a sequence, or tokens on `grid`."""
    if h.ndim != 3 or len(grid) == 1:
        return resized(features, h.shape[1:-1])
    if h.shape[1] != math.prod(grid):
        raise ValueError(f"The tokens of a block must tile the state, {grid}, got {h.shape[1]} of them.")
    return resized(features, grid).reshape(h.shape[0], h.shape[1], -1)
