"""Convolutions and attention over pixels, each followed by one over frames: the halves of Movie Gen's autoencoder."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.models.attention import attend
from fm_jax.models.autoencoder import DOWN_PADDING
from fm_jax.models.autoencoder_blocks import PixelAttention, norm
from fm_jax.models.compute import Compute, Dtype
from fm_jax.models.dense import Dense
from fm_jax.models.layers import double, zeros
from fm_jax.types import Array, Key


def identity(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """The kernel [3, 1, 1, c, c] that hands on the frame in the middle."""
    return jnp.zeros(shape, dtype).at[1, 0, 0].set(jnp.eye(shape[-1], dtype=dtype))


def framewise(layer: Callable[[Array], Array], x: Array) -> Array:
    """What acts on images [batch, h, w, c], on every frame of videos [batch, f, h, w, c]."""
    out = layer(x.reshape(-1, *x.shape[2:]))
    return out.reshape(*x.shape[:2], *out.shape[1:])


class TimeConv(nn.Module):
    """A convolution over three frames of every pixel; beyond either end stands the last frame. At first the identity.

    Attributes:
        dtype: of the convolution.
        stride: 2 keeps each second frame, of which the first is one: f become ceil(f / 2).
    """

    dtype: Dtype
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, f, h, w, c] to [batch, ceil(f / stride), h, w, c]."""
        x = jnp.concatenate([x[:, :1], x, x[:, -1:]], axis=1)
        strides = (self.stride, 1, 1)
        conv = nn.Conv(x.shape[-1], (3, 1, 1), strides, "VALID", kernel_init=identity, dtype=self.dtype, name="conv")
        return conv(x)


def _conv(x: Array, features: int, dtype: Dtype, name: str, *, halve: bool = False, stride: int = 1) -> Array:
    """A 3x3 convolution, one that halves the sides or not, and one over frames, in a compact method."""
    padding = DOWN_PADDING if halve else 1
    conv = nn.Conv(features, (3, 3), 1 + halve, padding=padding, dtype=dtype, name=name)
    return TimeConv(dtype, stride, name=f"{name}_time")(framewise(conv, x))


def _norm(x: Array, num_groups: int, dtype: Dtype, name: str) -> Array:
    """A normalisation of every frame by itself, in a compact method."""
    return framewise(norm(x.shape[-1], num_groups, dtype, name), x)


class TemporalBlock(nn.Module):
    """Two normalised convolutions, each followed by one over frames, added to the input.

    Attributes:
        features: output channels.
        num_groups, compute: see `TemporalAutoencoder`.
    """

    features: int
    num_groups: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, f, h, w, c] to [batch, f, h, w, features]."""
        dtype = self.compute.dtype
        h = nn.silu(_norm(x, self.num_groups, dtype, "norm_in"))
        h = _conv(h, self.features, dtype, "conv_in")
        h = nn.silu(_norm(h, self.num_groups, dtype, "norm_out"))
        h = _conv(h, self.features, dtype, "conv_out")
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=dtype, name="skip")(x)
        return x + h


class TimeAttention(nn.Module):
    """Normalised self-attention of one head over the frames of each pixel, added to the input; at first nothing."""

    num_groups: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, f, h, w, c] to the same shape."""
        b, f, *sides, width = x.shape
        dtype = self.compute.dtype
        h = jnp.moveaxis(_norm(x, self.num_groups, dtype, "norm"), 1, 3).reshape(-1, f, width)
        q, k, v = (Dense(width, dtype=dtype, name=name)(h)[:, :, None] for name in ("query", "key", "value"))
        h = attend(q, k, v, implementation="xla")[:, :, 0]
        h = Dense(width, kernel_init=zeros, dtype=dtype, name="out")(h)
        return x + jnp.moveaxis(h.reshape(b, *sides, f, width), 3, 1)


class TemporalEncoder(nn.Module):
    """From videos to `out_channels` numbers a latent pixel. Attributes: see `TemporalAutoencoder`."""

    channels: tuple[int, ...]
    num_blocks: int
    out_channels: int
    halve_frames: tuple[bool, ...]
    num_groups: int
    attention: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, f, h, w, c] to float32 latents of `out_channels`."""
        dtype = self.compute.dtype
        block = nn.remat(TemporalBlock) if self.compute.remat else TemporalBlock
        h = _conv(x, self.channels[0], dtype, "stem")
        for level, features in enumerate(self.channels):
            for i in range(self.num_blocks):
                h = block(features, self.num_groups, self.compute, name=f"down_{level}_{i}")(h)
            if level < len(self.channels) - 1:
                stride = 1 + self.halve_frames[level]
                h = _conv(h, features, dtype, f"down_{level}_resample", halve=True, stride=stride)
        h = _middle(self, h)
        h = nn.silu(_norm(h, self.num_groups, jnp.float32, "norm"))
        return _conv(h, self.out_channels, jnp.float32, "out")


class TemporalDecoder(nn.Module):
    """From latents to videos of `out_channels`. Attributes: see `TemporalAutoencoder`."""

    channels: tuple[int, ...]
    num_blocks: int
    out_channels: int
    halve_frames: tuple[bool, ...]
    num_groups: int
    attention: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Maps latents [batch, f, h, w, latent_channels] to float32 videos."""
        dtype = self.compute.dtype
        block = nn.remat(TemporalBlock) if self.compute.remat else TemporalBlock
        h = _middle(self, _conv(z, self.channels[-1], dtype, "stem"))
        for level, features in reversed(list(enumerate(self.channels))):
            for i in range(self.num_blocks + 1):
                h = block(features, self.num_groups, self.compute, name=f"up_{level}_{i}")(h)
            if level > 0:
                h = framewise(double, h)
                h = jnp.repeat(h, 2, axis=1) if self.halve_frames[level - 1] else h
                h = _conv(h, features, dtype, f"up_{level}_resample")
        h = nn.silu(_norm(h, self.num_groups, jnp.float32, "norm"))
        return _conv(h, self.out_channels, jnp.float32, "out")


def _middle(half: TemporalEncoder | TemporalDecoder, h: Array) -> Array:
    """The blocks at the lowest resolution, in a compact method of either half."""
    block = nn.remat(TemporalBlock) if half.compute.remat else TemporalBlock
    options = (half.num_groups, half.compute)
    h = block(h.shape[-1], *options, name="middle_0")(h)
    if half.attention:
        h = framewise(PixelAttention(*options, name="middle_attention"), h)
        h = TimeAttention(*options, name="middle_attention_time")(h)
    return block(h.shape[-1], *options, name="middle_1")(h)
