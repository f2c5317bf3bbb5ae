"""Causal convolutions over frames, rows and columns: the two halves of Wan's autoencoder, and what they consist of."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.models.attention import attend
from fm_jax.models.autoencoder import DOWN_PADDING
from fm_jax.models.compute import Compute, Dtype
from fm_jax.models.dense import Dense
from fm_jax.models.layers import conv3x3, double
from fm_jax.types import Array

PAST = (2, 0)
"""Of a convolution over three frames: zeros before the first frame, none behind the last, so that it is causal."""


class ChannelNorm(nn.Module):
    """`sqrt(c) x / |x| scale` over the channels of every pixel, statistics in float32, an output in `dtype`."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., c] to the same shape."""
        width = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones_init(), (width,))
        h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        h = h * jax.lax.rsqrt(jnp.maximum(jnp.sum(h**2, axis=-1, keepdims=True), 1e-24)) * width**0.5
        return (h * scale.reshape((1,) * (x.ndim - 1) + (width,))).astype(self.dtype)


def causal_conv(features: int, dtype: Dtype, name: str) -> nn.Conv:
    """A convolution over three frames, rows and columns, that sees the frame and the two before it."""
    return nn.Conv(features, (3, 3, 3), padding=(PAST, (1, 1), (1, 1)), dtype=dtype, name=name)


def time_conv(features: int, dtype: Dtype, name: str, *, stride: int = 1, padding: Any = PAST) -> nn.Conv:
    """A convolution over three frames of every pixel."""
    return nn.Conv(features, (3, 1, 1), (stride, 1, 1), (padding, (0, 0), (0, 0)), dtype=dtype, name=name)


class CausalBlock(nn.Module):
    """Two normalised causal convolutions, added to the input, which is projected if the number of channels changes.

    Attributes:
        features: output channels.
        compute: dtype.
    """

    features: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, f, h, w, c] to [batch, f, h, w, features]."""
        dtype = self.compute.dtype
        h = causal_conv(self.features, dtype, "conv_in")(nn.silu(ChannelNorm(dtype, name="norm_in")(x)))
        h = causal_conv(self.features, dtype, "conv_out")(nn.silu(ChannelNorm(dtype, name="norm_out")(h)))
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=dtype, name="skip")(x)
        return x + h


class FrameAttention(nn.Module):
    """Normalised self-attention of one head over the pixels of each frame, added to the input; it runs on XLA."""

    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, f, h, w, c] to the same shape."""
        width, dtype = x.shape[-1], self.compute.dtype
        h = ChannelNorm(dtype, name="norm")(x).reshape(x.shape[0] * x.shape[1], -1, width)
        q, k, v = (Dense(width, dtype=dtype, name=name)(h)[:, :, None] for name in ("query", "key", "value"))
        h = attend(q, k, v, implementation="xla")[:, :, 0]
        return x + Dense(width, dtype=dtype, name="out")(h).reshape(x.shape)


def frames_halved(x: Array, conv: Callable[[Array], Array]) -> Array:
    """The first frame as it is, and a convolution without padding over three frames from each second one on.

    Args:
        x: [batch, 1 + 2 k, h, w, c].
        conv: from 1 + 2 k frames to k.

    Returns:
        [batch, 1 + k, h, w, c].
    """
    return jnp.concatenate([x[:, :1], conv(x)], axis=1)


def frames_doubled(x: Array, conv: Callable[[Array], Array]) -> Array:
    """The first frame as it is, and two of each later one: the halves of what a causal convolution makes of these.

    Args:
        x: [batch, 1 + k, h, w, c].
        conv: from c channels to 2 c. It does not see the first frame.

    Returns:
        [batch, 1 + 2 k, h, w, c].
    """
    b, f, h, w, c = x.shape
    pairs = conv(x[:, 1:]).reshape(b, f - 1, h, w, 2, c).transpose(0, 1, 4, 2, 3, 5)
    return jnp.concatenate([x[:, :1], pairs.reshape(b, 2 * (f - 1), h, w, c)], axis=1)


def mean_of_cells(x: Array, features: int, cell: tuple[int, int, int]) -> Array:
    """Means of the numbers of each cell of frames, rows and columns, as many as fall on one of `features`.

    The numbers of a cell stand in the order (channel, frame, row, column); zeros stand before the first frame until
    cells tile the frames.
    """
    (b, f, h, w, c), (s, p, q) = x.shape, cell
    x = jnp.pad(x, ((0, 0), (-f % s, 0), (0, 0), (0, 0), (0, 0)))
    f = x.shape[1] // s
    x = x.reshape(b, f, s, h // p, p, w // q, q, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, f, h // p, w // q, features, -1).mean(axis=-1)


def repeated_in_cells(x: Array, features: int, cell: tuple[int, int, int]) -> Array:
    """Every number repeated as often as fills cells of `features`, in the order of `mean_of_cells`.

    Of the first cell only the last frame is kept.
    """
    (b, f, h, w, c), (s, p, q) = x.shape, cell
    x = jnp.repeat(x, features * s * p * q // c, axis=-1).reshape(b, f, h, w, features, s, p, q)
    return x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, f * s, h * p, w * q, features)[:, s - 1 :]


class CausalEncoder(nn.Module):
    """From videos to `out_channels` numbers a latent pixel. Attributes: see `WanAutoencoder`."""

    channels: tuple[int, ...]
    num_blocks: int
    out_channels: int
    halve_frames: tuple[bool, ...]
    residual: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, frames, height, width, c] to float32 latents of `out_channels`."""
        dtype = self.compute.dtype
        block = nn.remat(CausalBlock) if self.compute.remat else CausalBlock
        h = causal_conv(self.channels[0], dtype, "stem")(x)
        for level, features in enumerate(self.channels):
            last, skip = level == len(self.channels) - 1, h
            for i in range(self.num_blocks):
                h = block(features, self.compute, name=f"down_{level}_{i}")(h)
            frames = not last and self.halve_frames[level]
            if not last:
                h = nn.Conv(features, (3, 3), 2, DOWN_PADDING, dtype=dtype, name=f"down_{level}_resample")(h)
            if frames:
                h = frames_halved(h, time_conv(features, dtype, f"down_{level}_time", stride=2, padding=(0, 0)))
            if self.residual:
                h = h + mean_of_cells(skip, features, (1 + frames, 2 - last, 2 - last))
        h = _middle(self, h)
        return causal_conv(self.out_channels, jnp.float32, "out")(nn.silu(ChannelNorm(jnp.float32, name="norm")(h)))


class CausalDecoder(nn.Module):
    """From latents to videos of `out_channels`. Attributes: see `WanAutoencoder`."""

    channels: tuple[int, ...]
    num_blocks: int
    out_channels: int
    halve_frames: tuple[bool, ...]
    residual: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Maps latents [batch, f, h, w, latent_channels] to float32 videos."""
        dtype = self.compute.dtype
        block = nn.remat(CausalBlock) if self.compute.remat else CausalBlock
        h = _middle(self, causal_conv(self.channels[-1], dtype, "stem")(z))
        for level, features in reversed(list(enumerate(self.channels))):
            skip = h
            for i in range(self.num_blocks + 1):
                h = block(features, self.compute, name=f"up_{level}_{i}")(h)
            if level == 0:
                continue
            frames = self.halve_frames[level - 1]
            if frames:
                h = frames_doubled(h, time_conv(2 * features, dtype, f"up_{level}_time"))
            width = features if self.residual else features // 2
            h = conv3x3(width, dtype, f"up_{level}_resample")(jax.vmap(double)(h))
            if self.residual:
                h = h + repeated_in_cells(skip, features, (1 + frames, 2, 2))
        return causal_conv(self.out_channels, jnp.float32, "out")(nn.silu(ChannelNorm(jnp.float32, name="norm")(h)))


def _middle(half: CausalEncoder | CausalDecoder, h: Array) -> Array:
    """The blocks at the lowest resolution, in a compact method of either half."""
    block = nn.remat(CausalBlock) if half.compute.remat else CausalBlock
    attention = nn.remat(FrameAttention) if half.compute.remat else FrameAttention
    h = block(h.shape[-1], half.compute, name="middle_0")(h)
    h = attention(half.compute, name="middle_attention")(h)
    return block(h.shape[-1], half.compute, name="middle_1")(h)
