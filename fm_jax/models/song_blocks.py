"""The parts of DDPM++ and NCSN++: filters that halve and double, and the residual block around them."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense
from fm_jax.models.layers import SelfAttention, double, group_norm, halve
from fm_jax.types import Array

EPSILON = 1e-6


def scaled(gain: float) -> nn.initializers.Initializer:
    """Glorot's uniform initialiser times `gain`."""
    return nn.initializers.variance_scaling(gain**2, "fan_avg", "uniform")


def filtered(x: Array, weights: tuple[int, ...], *, up: bool, pad: int | None = None) -> Array:
    """Halves or doubles an image through a separable filter, with zeros around the image.

    Args:
        x: [batch, h, w, c].
        weights: of the filter along an axis, up to their scale; `(1, 1)` averages squares and repeats pixels.
        up: double instead of halve.
        pad: zeros on each side when halving; as many as keep the filter centred by default.
    """
    if weights == (1, 1) and not pad:
        return double(x) if up else halve(x)
    size, channels = len(weights), x.shape[-1]
    pad = (size - 1) // 2 if pad is None else pad
    line = np.asarray(weights, np.float32)
    kernel = np.outer(line, line) / line.sum() ** 2 * (4 if up else 1)
    # The transposed convolution is one of the image with zeros between its pixels, with the filter turned around.
    kernel = kernel[::-1, ::-1] if up else kernel
    return jax.lax.conv_general_dilated(
        x,
        jnp.broadcast_to(jnp.asarray(kernel, x.dtype)[:, :, None, None], (size, size, 1, channels)),
        window_strides=(1, 1) if up else (2, 2),
        padding=[(size - 1 - pad,) * 2 if up else (pad, pad)] * 2,
        lhs_dilation=(2, 2) if up else (1, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
    )


def norm(x: Array, dtype: Any, name: str) -> Array:
    """Group normalisation with groups of at least four channels."""
    return group_norm(x.shape[-1], min(32, x.shape[-1] // 4), dtype, name, epsilon=EPSILON)(x)


def conv(features: int, size: int, dtype: Any, name: str, *, gain: float = 1.0, pad: int = 0) -> nn.Conv:
    """A convolution of odd size with as many zeros around the image as keep its size, and `pad` more."""
    around = (size // 2 + pad,) * 2
    return nn.Conv(features, (size, size), padding=(around, around), kernel_init=scaled(gain), dtype=dtype, name=name)


class SongBlock(nn.Module):
    """Two normalised convolutions around a shift by time, added to the input and scaled; then attention, likewise.

    `sqrt(1/2) (x' + conv(silu(norm(shift + conv(resize(silu(norm(x))))))))`, where `x'` is `x`, resized and through a
    pointwise convolution if size or channels change.

    Attributes:
        features: output channels.
        resize: `"up"`, `"down"` or `None`.
        attends: whether attention of one head follows.
        dropout, resample_filter, compute: see `SongUNet`.
    """

    features: int
    resize: Literal["up", "down"] | None
    attends: bool
    dropout: float
    resample_filter: tuple[int, ...]
    compute: Compute

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        """Maps `x` [batch, h, w, c] and the embedding [batch, d] to [batch, h', w', features]."""
        dtype, scale = self.compute.dtype, np.float32(np.sqrt(0.5))

        def resized(x: Array) -> Array:
            return x if self.resize is None else filtered(x, self.resample_filter, up=self.resize == "up")

        h = conv(self.features, 3, dtype, "conv_in")(resized(nn.silu(norm(x, dtype, "norm_in"))))
        shift = Dense(self.features, kernel_init=scaled(1.0), dtype=dtype, name="embed")(emb)
        h = nn.silu(norm(h + shift[:, None, None, :], dtype, "norm_out"))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv(self.features, 3, dtype, "conv_out", gain=1e-5)(h)
        if self.resize is not None or x.shape[-1] != self.features:
            x = conv(self.features, 1, dtype, "skip")(resized(x))
        x = (x + h) * scale
        if self.attends:
            h = norm(x, dtype, "norm_attention").reshape(x.shape[0], -1, self.features)
            attend = SelfAttention(1, scaled(np.sqrt(0.2)), scaled(1e-5), self.compute, name="attention")
            x = (x + attend(h).reshape(x.shape)) * scale
        return x
