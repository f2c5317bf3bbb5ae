"""Movie Gen's video transformer: text to images and videos, one network for both."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_event, check_integer, check_member, check_setting, shown
from fm_jax.models.attention import layer_norm, rms_norm
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import OURS, Conditions
from fm_jax.models.crossdit import Attention, check_fields, check_tokens, modulations
from fm_jax.models.dense import Dense
from fm_jax.models.dit import modulate, small_normal
from fm_jax.models.layers import check_options, sinusoidal_features, zeros
from fm_jax.models.stack import run_blocks
from fm_jax.shapes import batch_time
from fm_jax.types import Array

Triple = tuple[int, int, int]


def patchify_video(x: Array, patch_size: Triple) -> Array:
    """Cuts videos [batch, f, h, w, c] into patches [batch, f h w / (s p q), s p q c], both in row-major order."""
    b, c = x.shape[0], x.shape[-1]
    (f, h, w), (s, p, q) = (n // m for n, m in zip(x.shape[1:4], patch_size, strict=True)), patch_size
    return x.reshape(b, f, s, h, p, w, q, c).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, f * h * w, s * p * q * c)


def unpatchify_video(patches: Array, patch_size: Triple, grid: Triple) -> Array:
    """Puts patches back into videos of `grid` patches: the inverse of `patchify_video`."""
    (f, h, w), (s, p, q) = grid, patch_size
    x = patches.reshape(patches.shape[0], f, h, w, s, p, q, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(patches.shape[0], f * s, h * p, w * q, -1)


def _linear(features: int, dtype: Any, name: str, init: Any = small_normal) -> nn.Dense:
    return Dense(features, use_bias=False, kernel_init=init, dtype=dtype, name=name)


class VideoTime(nn.Module):
    """`W2 silu(W1 features(1000 t))`, in float32, without biases.

    Attributes:
        hidden: width of the embedding.
    """

    hidden: int

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """Maps the network's time [batch] to float32 [batch, hidden]."""
        h = sinusoidal_features(t, 256, scale=1.0)
        return _linear(self.hidden, jnp.float32, "out")(nn.silu(_linear(self.hidden, jnp.float32, "in")(h)))


class EncodedText(nn.Module):
    """Text of one encoder as tokens: a linear layer and an affine layer normalisation.

    Attributes: see `VideoDiT`.
    """

    hidden: int
    epsilon: float
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps [batch, n, features of the encoder] to [batch, n, hidden]."""
        dtype = self.compute.dtype
        h = _linear(self.hidden, dtype, "linear")(tokens)
        return layer_norm(dtype, "norm", affine=True, epsilon=self.epsilon)(h)


class FactorisedPositions(nn.Module):
    """A learned vector for each frame, each row and each column, whose sum is the position of a patch.

    Attributes:
        sizes: largest number of frames, rows and columns of patches.
        hidden: width of the vectors.
        std: standard deviation of the vectors that they start with.
    """

    sizes: Triple
    hidden: int
    std: float = 0.02

    @nn.compact
    def __call__(self, grid: Triple) -> Array:
        """[frames rows columns, hidden] of a grid of patches, in row-major order."""
        names, init = ("frames", "rows", "columns"), nn.initializers.normal(self.std)
        tables = [self.param(names[i], init, (self.sizes[i], self.hidden))[: grid[i]] for i in range(3)]
        total = tables[0][:, None, None] + tables[1][None, :, None] + tables[2][None, None]
        return total.reshape(math.prod(grid), self.hidden)


class VideoDiTBlock(nn.Module):
    """Positions added, self-attention and SwiGLU modulated by time, and between them cross-attention as it is.

    Attributes: see `VideoDiT`.
    """

    num_heads: int
    mlp_hidden: int
    epsilon: float
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self, x: Array, positions: Array, modulation: Array, text: Array, mask: Array | None, train: bool
    ) -> Array:
        """Maps tokens [batch, n, d] to tokens [batch, n, d].

        Args:
            x: tokens.
            positions: [n, d].
            modulation: of time, [batch, 6, d].
            text: [batch, m, d].
            mask: which of it is seen, [batch, m].
            train: changes nothing.
        """
        width, dtype, compute = x.shape[-1], self.compute.dtype, self.compute
        table = self.param("table", nn.initializers.normal(width**-0.5), (6, width))
        parts = [part.astype(dtype) for part in modulations(table, modulation)]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts

        x = x + positions[None]
        h = modulate(rms_norm(dtype, "norm_attention", epsilon=self.epsilon)(x), shift_a, scale_a)
        x = x + gate_a * Attention(self.num_heads, False, compute, name="attention")(h, h)
        x = x + Attention(self.num_heads, False, compute, name="cross")(x, text, mask)

        h = modulate(rms_norm(dtype, "norm_mlp", epsilon=self.epsilon)(x), shift_m, scale_m)
        gate, h = _linear(self.mlp_hidden, dtype, "mlp_gate")(h), _linear(self.mlp_hidden, dtype, "mlp_in")(h)
        return x + gate_m * _linear(width, dtype, "mlp_out")(nn.silu(gate) * h)


class VideoDiT(nn.Module):
    """Movie Gen's transformer over the patches of a video, or of an image as one frame; zero at initialisation.

    Llama 3's blocks without a causal mask, cross-attention in them, no biases; adaLN-single as in `CrossDiT`; learned
    positions of frame, row and column, added at the input of every block. It gives the velocity along
    `x_t = t x1 + (1 - (1 - 1e-5) t) x0`, the path of `schedules.Linear(1e-5)`: `u = x1 - (1 - 1e-5) x0`.

    `cond` is `Conditions(tokens={"ul2": [batch, n, 4096], ...}, mask={"ul2": [batch, n], ...})`: for each encoder of
    text its features, and which of them are text; an encoder without a mask has text everywhere. Their tokens stand
    one behind another for one cross-attention, which does not know their order.

    Attributes:
        patch_size: of a patch in latents: frames, rows, columns.
        hidden: width of the tokens, divisible by `num_heads`.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp_hidden: width of the hidden layer of a block's SwiGLU.
        positions: largest video in patches: frames, rows, columns.
        encoders: name and width of the features of each encoder of text.
        channels: of the latents.
        epsilon: of all norms.
        compute: dtype, attention and rematerialisation.
        scan_layers: see `DiT`.
        position_std: standard deviation of the vectors of positions at the start; a small network learns sooner what is
            where if they are as large as what it sees of a patch.

    References:
        Polyak et al. 2024, "Movie Gen: A Cast of Media Foundation Models", sections 3.1.3 and 3.1.4. It has no public
        weights: `epsilon`, and `"1B"` and `"5B"` of `VIDEODIT_CONFIGS`, are those of the open implementation in
        MindSpore, mindone.
    """

    patch_size: Triple = (1, 2, 2)
    hidden: int = 6144
    num_layers: int = 48
    num_heads: int = 48
    mlp_hidden: int = 16384
    positions: Triple = (32, 48, 48)
    encoders: tuple[tuple[str, int], ...] = (("ul2", 4096), ("metaclip", 1280), ("byt5", 1472))
    channels: int = 16
    epsilon: float = 1e-5
    compute: Compute = Compute()
    scan_layers: bool = True
    position_std: float = 0.02

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("hidden", "num_layers", "num_heads", "mlp_hidden", "channels"):
            check_integer(name, getattr(self, name))
        for name in ("patch_size", "positions"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or len(value) != 3:
                raise ValueError(f"{name} must be (frames, rows, columns), got {shown(value)}.")
            for i, number in enumerate(value):
                check_integer(f"{name}[{i}]", number)
        check_encoders(self.encoders)
        check_setting(self, "epsilon", "(0, inf)")
        check_setting(self, "position_std", "(0, inf)")
        check_bool("scan_layers", self.scan_layers)
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads must divide hidden={self.hidden}, got {self.num_heads}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Conditions | None = None, *, train: bool = False) -> Array:
        """Evaluates the velocity.

        Args:
            t: time, 0 for noise and 1 for data, scalar or [batch].
            x: latents, [batch, frames, height, width, channels]; an image has one frame.
            cond: text; see the class.
            train: changes nothing: there is no dropout.

        Returns:
            float32, of the shape of `x`.

        Raises:
            ValueError: if `x` is no video, patches do not tile it, it is larger than `positions`, or `cond` does not
                fit the model.
        """
        grid = self._grid(x)
        tokens, masks = self._text(x, cond)
        x = x.astype(jnp.float32)
        dtype = self.compute.dtype
        emb = VideoTime(self.hidden, name="time")(OURS.time(batch_time(t, x)))
        modulation = _linear(6 * self.hidden, jnp.float32, "modulation", zeros)(nn.silu(emb))
        text = [
            EncodedText(self.hidden, self.epsilon, self.compute, name=f"text_{name}")(tokens[name]) for name in tokens
        ]
        positions = FactorisedPositions(self.positions, self.hidden, self.position_std, name="positions")(grid)

        h = _linear(self.hidden, dtype, "patches")(patchify_video(x, self.patch_size))
        options = {name: getattr(self, name) for name in ("num_heads", "mlp_hidden", "epsilon", "compute")}
        args = (positions.astype(dtype), modulation.reshape(-1, 6, self.hidden), jnp.concatenate(text, axis=1), masks)
        scan, remat = self.scan_layers, self.compute.remat
        h = run_blocks(VideoDiTBlock, options, self.num_layers, h, *args, train=train, scan=scan, remat=remat)

        table = self.param("table", nn.initializers.normal(self.hidden**-0.5), (2, self.hidden))
        shift, scale = modulations(table, emb[:, None])  # of the embedding itself, without silu
        h = modulate(rms_norm(jnp.float32, "norm", epsilon=self.epsilon)(h), shift, scale)
        h = _linear(math.prod(self.patch_size) * self.channels, jnp.float32, "out", zeros)(h)
        return unpatchify_video(h, self.patch_size, grid)

    def _grid(self, x: Array) -> Triple:
        """The number of patches on each axis, of what is a video."""
        check_event(x)
        if x.ndim != 5 or x.shape[-1] != self.channels:
            raise ValueError(f"x must be [batch, frames, height, width, {self.channels}], got shape {x.shape}.")
        if any(n % p for n, p in zip(x.shape[1:4], self.patch_size, strict=True)):
            sides = " x ".join(map(str, self.patch_size))
            raise ValueError(f"frames, height and width must be tiled by patches of {sides}, got shape {x.shape}.")
        frames, rows, columns = grid = tuple(n // p for n, p in zip(x.shape[1:4], self.patch_size, strict=True))
        if any(n > most for n, most in zip(grid, self.positions, strict=True)):
            raise ValueError(f"x must have at most positions={self.positions} patches, got {grid}.")
        return frames, rows, columns

    def _text(self, x: Array, cond: Any) -> tuple[dict[str, Array], Array | None]:
        """The features of each encoder, in order, and the mask of all of them."""
        names = [name for name, _ in self.encoders]
        wanted = f"tokens={{{', '.join(f'{name!r}: ...' for name in names)}}}, mask=..."
        cond = check_fields(cond, ("tokens", "mask"), wanted)
        tokens, masks = cond.tokens, {} if cond.mask is None else cond.mask
        for field, value, missing in (("tokens", tokens, True), ("mask", masks, False)):
            if not isinstance(value, Mapping) or set(value) - set(names) or (missing and set(names) - set(value)):
                got = sorted(map(str, value)) if isinstance(value, Mapping) else shown(value)
                raise ValueError(f"cond.{field} must be a dict of {', '.join(map(repr, names))}, got {got}.")
        for name, features in self.encoders:
            check_tokens(tokens[name], masks.get(name), x.shape[0], features, f"[{name!r}]")
        if all(masks.get(name) is None for name in names):
            return {name: tokens[name] for name in names}, None
        seen = [jnp.ones(tokens[name].shape[:2], bool) if masks.get(name) is None else masks[name] for name in names]
        return {name: tokens[name] for name in names}, jnp.concatenate(seen, axis=1)


def check_encoders(encoders: Any) -> None:
    """Raises `ValueError` for what is not a tuple of at least one (name, features), names different."""
    pairs = isinstance(encoders, tuple | list) and all(isinstance(e, tuple | list) and len(e) == 2 for e in encoders)
    names = [name for name, _ in encoders] if pairs else []
    if not names or len(set(map(str, names))) != len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f'encoders must be pairs of name and width, such as (("ul2", 4096),), got {shown(encoders)}.')
    for name, features in encoders:
        check_integer(f"encoders, {name!r},", features)


_SMALL = {"positions": (16, 8, 8), "encoders": (("words", 32),), "channels": 4}
VIDEODIT_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 64, "num_layers": 4, "num_heads": 4, "mlp_hidden": 176} | _SMALL,
    "1B": {"hidden": 1536, "num_layers": 24, "num_heads": 16, "mlp_hidden": 4096},
    "5B": {"hidden": 3072, "num_layers": 32, "num_heads": 24, "mlp_hidden": 8192},
    "30B": {"hidden": 6144, "num_layers": 48, "num_heads": 48, "mlp_hidden": 16384},
}


def make_videodit(name: str, **overrides: Any) -> VideoDiT:
    """Builds a video transformer by the name of its size.

    Args:
        name: `"tiny"` (a CPU, one encoder), `"30B"` of the paper, `"1B"` and `"5B"` of the open implementation.
        **overrides: attributes of `VideoDiT` to change, such as `positions`, `encoders` and `channels`.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> make_videodit("30B").num_layers
        48
    """
    check_member("name", name, tuple(VIDEODIT_CONFIGS))
    return VideoDiT(**(VIDEODIT_CONFIGS[name] | overrides))
