"""The blocks of the autoencoder of latent diffusion."""

import flax.linen as nn

from fm_jax.models.attention import attend
from fm_jax.models.compute import Compute, Dtype
from fm_jax.models.dense import Dense
from fm_jax.models.layers import conv3x3, group_norm
from fm_jax.types import Array

EPSILON = 1e-6
"""Of every normalisation."""


def norm(channels: int, num_groups: int, dtype: Dtype, name: str) -> nn.GroupNorm:
    """Group normalisation as everywhere in these autoencoders."""
    return group_norm(channels, num_groups, dtype, name, epsilon=EPSILON)


class ResidualBlock(nn.Module):
    """Two normalised convolutions, added to the input; no condition.

    `x' + conv(silu(norm(conv(silu(norm(x))))))`, where `x'` is `x`, projected if the number of channels changes.

    Attributes:
        features: output channels.
        num_groups, compute: see `Autoencoder`.
    """

    features: int
    num_groups: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, c] to [batch, h, w, features]."""
        dtype = self.compute.dtype
        h = nn.silu(norm(x.shape[-1], self.num_groups, dtype, "norm_in")(x))
        h = conv3x3(self.features, dtype, "conv_in")(h)
        h = nn.silu(norm(self.features, self.num_groups, dtype, "norm_out")(h))
        h = conv3x3(self.features, dtype, "conv_out")(h)
        if x.shape[-1] != self.features:
            x = Dense(self.features, dtype=dtype, name="skip")(x)
        return x + h


class PixelAttention(nn.Module):
    """Normalised self-attention of one head over all pixels, added to the input.

    The head is as wide as the image has channels: more than cuDNN takes, so it runs on XLA.
    """

    num_groups: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, c] to the same shape."""
        width, dtype = x.shape[-1], self.compute.dtype
        h = norm(width, self.num_groups, dtype, "norm")(x).reshape(x.shape[0], -1, width)
        q, k, v = (Dense(width, dtype=dtype, name=name)(h)[:, :, None] for name in ("query", "key", "value"))
        h = attend(q, k, v, implementation="xla")[:, :, 0]
        return x + Dense(width, dtype=dtype, name="out")(h).reshape(x.shape)


def middle(h: Array, num_groups: int, attention: bool, compute: Compute) -> Array:
    """The blocks at the lowest resolution, in a compact method: `middle_0`, `middle_attention` and `middle_1`."""
    block = nn.remat(ResidualBlock) if compute.remat else ResidualBlock
    attend_block = nn.remat(PixelAttention) if compute.remat else PixelAttention
    h = block(h.shape[-1], num_groups, compute, name="middle_0")(h)
    if attention:
        h = attend_block(num_groups, compute, name="middle_attention")(h)
    return block(h.shape[-1], num_groups, compute, name="middle_1")(h)
