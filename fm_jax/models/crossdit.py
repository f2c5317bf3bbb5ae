"""PixArt: a transformer over the patches of an image with adaLN-single and cross-attention to text."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_integer, check_member, check_real, check_setting, shown
from fm_jax.models.attention import attend, from_heads, layer_norm, to_heads
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import DDPM, Border, Conditions
from fm_jax.models.dense import Dense
from fm_jax.models.dit import modulate, patchify, small_normal, unpatchify, xavier
from fm_jax.models.layers import TimeEmbedding, check_image, check_options, zeros
from fm_jax.models.stack import run_blocks
from fm_jax.shapes import batch_time
from fm_jax.types import Array

SIZES = 3  # numbers in cond.vector


def position_table(rows: int, columns: int, dim: int, base: int, scale: float) -> np.ndarray:
    """Fixed sines and cosines of positions that span the same range whatever the size of the grid is.

    Row `i` is at `i / (rows / base) / scale`, columns alike, so a larger image has a finer grid. With
    `w_i = 10000^(-i / (dim / 4))`: `[sin(w column), cos(w column), sin(w row), cos(w row)]`.

    Args:
        rows: height of the grid of patches.
        columns: width of the grid of patches.
        dim: width of the features, divisible by 4.
        base: side of the grid at which positions are `0, 1 / scale, ...`.
        scale: shrinks the range: how many times larger images are than those of the first stage of training.

    Returns:
        float32 [rows * columns, dim], in row-major order.
    """
    # Positions are rounded to float32, as the published networks have them, and the angles are float64.
    ends = [np.arange(n, dtype=np.float32) / np.float32(n / base) / np.float32(scale) for n in (rows, columns)]
    row, column = np.meshgrid(*ends, indexing="ij")
    frequencies = 10_000.0 ** (-np.arange(dim // 4) / (dim // 4))
    angles = [np.outer(position.reshape(-1), frequencies) for position in (column, row)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=-1).astype(np.float32)


def modulations(table: Array, emb: Array) -> list[Array]:
    """The rows of `table + emb`, one learned table [k, d] and what time says [batch, k or 1, d]: k of [batch, 1, d]."""
    return jnp.split(table[None] + emb, len(table), axis=1)


def check_fields(cond: Any, taken: tuple[str, ...], wanted: str) -> Conditions:
    """`cond`, or `ValueError` for what is no `Conditions`, and for a field that the network has no use for."""
    if not isinstance(cond, Conditions):
        raise ValueError(f"cond must be Conditions({wanted}), got {shown(cond)}.")
    given = [name for name, value in zip(cond._fields, cond, strict=True) if value is not None]
    if unknown := [name for name in given if name not in taken]:
        raise ValueError(f"cond must be Conditions({wanted}), got {', '.join(unknown)} too.")
    return cond


def check_tokens(tokens: Any, mask: Any, batch: int, features: int, at: str = "") -> None:
    """Raises `ValueError` unless text is [batch, n, features] and its mask, if there is one, bool [batch, n]."""
    check_real(f"cond.tokens{at}", tokens)
    if tokens.ndim != 3 or tokens.shape[0] != batch or tokens.shape[2] != features:
        raise ValueError(f"cond.tokens{at} must be [{batch}, n, {features}], got shape {tokens.shape}.")
    if mask is not None and (getattr(mask, "shape", None) != tokens.shape[:2] or mask.dtype != bool):
        raise ValueError(f"cond.mask{at} must be bool {list(tokens.shape[:2])}, true for text, got {shown(mask)}.")


class Attention(nn.Module):
    """Multi-head attention from tokens to tokens, to themselves or to others.

    Attributes:
        num_heads: number of heads; divides the width of the tokens.
        use_bias: of the four projections.
        compute: dtype and implementation.
    """

    num_heads: int
    use_bias: bool = True
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None = None) -> Array:
        """Maps `x` [batch, n, d] and `context` [batch, m, d], of which `mask` [batch, m] is seen, to [batch, n, d]."""
        width, dtype = x.shape[-1], self.compute.dtype
        head = (self.num_heads, width // self.num_heads, dtype)
        q = to_heads(*head, "query", use_bias=self.use_bias)(x)
        k = to_heads(*head, "key", use_bias=self.use_bias)(context)
        v = to_heads(*head, "value", use_bias=self.use_bias)(context)
        h = attend(q, k, v, mask=mask, implementation=self.compute.attention)
        return from_heads(width, dtype, "out", use_bias=self.use_bias)(h)


class CrossDiTBlock(nn.Module):
    """Self-attention and MLP, shifted, scaled and gated by time; between them cross-attention, without norm or gate.

    Attributes: see `CrossDiT`.
    """

    num_heads: int
    mlp_ratio: float
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, modulation: Array, text: Array, mask: Array | None, train: bool) -> Array:
        """Maps tokens [batch, n, d], modulation [batch, 6, d] and text [batch, m, d] to tokens [batch, n, d]."""
        width, dtype = x.shape[-1], self.compute.dtype
        table = self.param("table", nn.initializers.normal(width**-0.5), (6, width))
        parts = [part.astype(dtype) for part in modulations(table, modulation)]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts

        h = modulate(layer_norm(dtype, "norm_attention")(x), shift_a, scale_a)
        x = x + gate_a * Attention(self.num_heads, compute=self.compute, name="attention")(h, h)
        x = x + Attention(self.num_heads, compute=self.compute, name="cross")(x, text, mask)

        h = modulate(layer_norm(dtype, "norm_mlp")(x), shift_m, scale_m)
        h = Dense(int(self.mlp_ratio * width), kernel_init=xavier, dtype=dtype, name="mlp_in")(h)
        h = nn.gelu(h, approximate=True)
        return x + gate_m * Dense(width, kernel_init=xavier, dtype=dtype, name="mlp_out")(h)


class TextProjection(nn.Module):
    """Two linear layers with a tanh-GELU between them, from the features of an encoder to tokens.

    Attributes: see `CrossDiT`.
    """

    hidden: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps [batch, n, text_features] to [batch, n, hidden]."""
        h = Dense(self.hidden, kernel_init=small_normal, dtype=self.compute.dtype, name="in")(tokens)
        h = nn.gelu(h, approximate=True)
        return Dense(self.hidden, kernel_init=small_normal, dtype=self.compute.dtype, name="out")(h)


class CrossDiT(nn.Module):
    """PixArt's transformer: predicts noise from an image, a time and text; zero at initialisation.

    One modulation of time for all blocks, to which each adds a learned table (adaLN-single). `cond` is
    `Conditions(tokens=..., mask=...)`: the last hidden states of T5 v1.1 XXL [batch, n, 4096], and which of them are
    text; PixArt-alpha has 120 of them, Sigma 300. With `size_conditions`, as the published alpha network for 1024
    pixels has them, `cond.vector` is [batch, 3]: height and width of the image in pixels (not of the latents), and
    height / width.

    Attributes:
        patch_size: side of a patch in latent pixels.
        hidden: width of the tokens, divisible by 4 and by `num_heads`, and by 3 with `size_conditions`.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the blocks' hidden layer in units of `hidden`.
        text_features: width of `cond.tokens`.
        sample_size: side of the latents that the position table is for; others are interpolated: see `position_table`.
        interpolation_scale: of the position table: 1 for 512 pixels, 2 for 1024.
        size_conditions: whether the network is told the size of the image.
        in_channels: channels of the latents.
        out_channels: channels of the output. The published networks have twice those of the input: the noise, then
            the numbers from which a variance was learned, v in 0, ..., 1 between the two of DDPM.
        border: between our time and the network's, and the sign of what it gives.
        compute: dtype, attention and rematerialisation.
        scan_layers: see `DiT`.

    References:
        Chen et al. 2023, "PixArt-alpha: Fast Training of Diffusion Transformer for Photorealistic Text-to-Image
        Synthesis", section 2.3; Chen et al. 2024, "PixArt-Sigma: Weak-to-Strong Training of Diffusion Transformer for
        4K Text-to-Image Generation".
    """

    patch_size: int = 2
    hidden: int = 1152
    num_layers: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    text_features: int = 4096
    sample_size: int = 64
    interpolation_scale: float = 1.0
    size_conditions: bool = False
    in_channels: int = 4
    out_channels: int = 8
    border: Border = DDPM
    compute: Compute = Compute()
    scan_layers: bool = True

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("patch_size", "hidden", "num_layers", "num_heads", "text_features", "sample_size"):
            check_integer(name, getattr(self, name))
        for name in ("in_channels", "out_channels"):
            check_integer(name, getattr(self, name))
        for name in ("size_conditions", "scan_layers"):
            check_bool(name, getattr(self, name))
        for name in ("mlp_ratio", "interpolation_scale"):
            check_setting(self, name, "(0, inf)")
        if not isinstance(self.border, Border):
            raise ValueError(f"border must be a Border, such as DDPM, got {shown(self.border)}.")
        if self.hidden % 4 or self.hidden % self.num_heads:
            raise ValueError(f"hidden must be divisible by 4 and num_heads={self.num_heads}, got {self.hidden}.")
        if self.size_conditions and self.hidden % 3:
            raise ValueError(f"hidden must be divisible by 3 with size_conditions, got {self.hidden}.")
        if self.sample_size % self.patch_size:
            raise ValueError(f"patch_size must divide sample_size={self.sample_size}, got {self.patch_size}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Conditions | None = None, *, train: bool = False) -> Array:
        """Predicts the noise.

        Args:
            t: our time, 0 for noise and 1 for data, scalar or [batch].
            x: latents, [batch, height, width, channels].
            cond: text, and the size of the image where the network is told; see the class.
            train: changes nothing: there is no dropout.

        Returns:
            float32, [batch, height, width, out_channels]: the noise in the first `channels` of them.

        Raises:
            ValueError: if `x` is no image, patches do not tile it, or `cond` does not fit the model.
        """
        check_image(x, self.patch_size)
        tokens, mask, sizes = self._conditions(x, cond)
        x = x.astype(jnp.float32)
        _, height, width, _ = x.shape
        dtype, time = self.compute.dtype, self.border.time(batch_time(t, x))
        embedding = functools.partial(TimeEmbedding, 256, time_scale=1.0, kernel_init=small_normal)
        emb = embedding(features=self.hidden, name="time")(time)
        if sizes is not None:
            third = self.hidden // 3
            resolution = embedding(features=third, name="resolution")(sizes[:, :2].reshape(-1))
            aspect = embedding(features=third, name="aspect")(sizes[:, 2])
            emb = emb + jnp.concatenate([resolution.reshape(-1, 2 * third), aspect], axis=-1)
        modulation = Dense(6 * self.hidden, kernel_init=small_normal, name="modulation")(nn.silu(emb))
        text = TextProjection(self.hidden, self.compute, name="text")(tokens)

        h = Dense(self.hidden, kernel_init=xavier, dtype=dtype, name="patches")(patchify(x, self.patch_size))
        grid = (height // self.patch_size, width // self.patch_size)
        base = self.sample_size // self.patch_size
        h = h + jnp.asarray(position_table(*grid, self.hidden, base, self.interpolation_scale), dtype)[None]

        options = {"num_heads": self.num_heads, "mlp_ratio": self.mlp_ratio, "compute": self.compute}
        args = (modulation.reshape(-1, 6, self.hidden), text, mask)
        scan, remat = self.scan_layers, self.compute.remat
        h = run_blocks(CrossDiTBlock, options, self.num_layers, h, *args, train=train, scan=scan, remat=remat)

        table = self.param("table", nn.initializers.normal(self.hidden**-0.5), (2, self.hidden))
        shift, scale = modulations(table, emb[:, None])  # of the embedding itself, without silu
        h = modulate(layer_norm(jnp.float32, "norm")(h), shift, scale)
        h = Dense(self.patch_size**2 * self.out_channels, kernel_init=zeros, name="out")(h)
        return self.border.output(unpatchify(h, self.patch_size, height, width))

    def _conditions(self, x: Array, cond: Any) -> tuple[Array, Array | None, Array | None]:
        """Text, its mask, and the sizes, checked."""
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels, got shape {x.shape}.")
        batch, sizes = x.shape[0], self.size_conditions
        wanted = "tokens=text, mask=..." + (", vector=[height, width, height / width]" if sizes else "")
        cond = check_fields(cond, ("tokens", "mask", "vector") if sizes else ("tokens", "mask"), wanted)
        check_tokens(cond.tokens, cond.mask, batch, self.text_features)
        if not sizes:
            return cond.tokens, cond.mask, None
        check_real("cond.vector", cond.vector)
        if cond.vector.shape != (batch, SIZES):
            raise ValueError(
                f"cond.vector must be [batch, {SIZES}] = {(batch, SIZES)}, height and width of the image in pixels and "
                f"height / width, got shape {cond.vector.shape}."
            )
        return cond.tokens, cond.mask, cond.vector.astype(jnp.float32)


_ALPHA_1024 = {"sample_size": 128, "interpolation_scale": 2.0, "size_conditions": True}
CROSSDIT_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 96, "num_layers": 4, "num_heads": 4, "text_features": 64, "sample_size": 16, "out_channels": 4},
    "alpha-512": {"sample_size": 64, "interpolation_scale": 1.0},
    "alpha-1024": _ALPHA_1024,
    "sigma-512": {"sample_size": 64, "interpolation_scale": 1.0},
    "sigma-1024": _ALPHA_1024 | {"size_conditions": False},
}


def make_crossdit(name: str, **overrides: Any) -> CrossDiT:
    """Builds a PixArt transformer by its name.

    Args:
        name: `"tiny"` (a CPU; four channels, no learned variance), or generation and pixels of the published networks:
            `"alpha-512"`, `"alpha-1024"`, `"sigma-512"`, `"sigma-1024"`.
        **overrides: attributes of `CrossDiT` to change.

    Raises:
        ValueError: if there is no such network.

    Example:
        >>> make_crossdit("alpha-1024").size_conditions
        True
    """
    check_member("name", name, tuple(CROSSDIT_CONFIGS))
    return CrossDiT(**(CROSSDIT_CONFIGS[name] | overrides))
