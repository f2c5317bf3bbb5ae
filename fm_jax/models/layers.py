"""The parts that the networks share: time embedding, attention, normalisation, resampling.

Parameters are always float32. `dtype` is what convolutions and matrix products compute in; normalisation statistics,
the time embedding and every network's output stay float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_event, check_integer, check_number, check_real, shown
from fm_jax.models.compute import Compute, Dtype
from fm_jax.models.dense import Dense
from fm_jax.types import Array

zeros = nn.initializers.zeros_init()


def check_options(*, embed: Any, dropout: float, compute: Any) -> None:
    """Raises `ValueError` for options that no network of this package accepts."""
    if embed is not None and not isinstance(embed, nn.Module):
        raise ValueError(f"embed must be None or a Linen module such as LabelEmbedding(10), got {shown(embed)}.")
    check_number("dropout", dropout, "[0, 1]")
    if not isinstance(compute, Compute):
        raise ValueError(f"compute must be a Compute, such as Compute('bfloat16'), got {shown(compute)}.")


def check_image(x: Array, divisor: int) -> None:
    """Raises `ValueError` unless `x` is [batch, height, width, channels] with sides divisible by `divisor`."""
    check_event(x)
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, height, width, channels], got shape {x.shape}.")
    if x.shape[1] % divisor or x.shape[2] % divisor:
        raise ValueError(f"height and width must be divisible by {divisor}, got {x.shape[1]}x{x.shape[2]}.")


def check_widths(name: str, widths: Any) -> None:
    """Raises `ValueError` for what is not a tuple of at least one positive integer."""
    if not isinstance(widths, tuple | list) or not widths:
        raise ValueError(f"{name} must be a tuple of at least one positive integer, got {shown(widths)}.")
    for i, width in enumerate(widths):
        check_integer(f"{name}[{i}]", width)


def sinusoidal_features(
    t: Array,
    dim: int,
    *,
    scale: float = 1000.0,
    max_period: float = 10_000.0,
    frequency_shift: float = 0.0,
    sine_first: bool = False,
) -> Array:
    """Cosines and sines of time at geometrically spaced frequencies.

    `[cos(w_i scale t), sin(w_i scale t)]` with `w_i = max_period^(-i / (dim / 2 - frequency_shift))`, `i = 0, ...,
    dim / 2 - 1`.

    Notebooks: (9.2).

    Args:
        t: times in [0, 1], [batch].
        dim: number of features, even.
        scale: factor on `t`; 1000 is the number of steps of the diffusion models that introduced these features.
        max_period: ratio of the largest to (nearly) the smallest frequency.
        frequency_shift: 1 makes it exactly that ratio, as in the U-Nets of DDPM.
        sine_first: sines before cosines, as in the U-Nets of DDPM.

    Returns:
        float32 features, [batch, dim].

    Raises:
        ValueError: if `dim` is odd, or leaves no frequencies.

    Example:
        >>> sinusoidal_features(jnp.zeros(1), 4)
        Array([[1., 1., 0., 0.]], dtype=float32)

    References:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.5; Ho et al. 2020, "Denoising Diffusion
        Probabilistic Models", appendix B.
    """
    check_real("t", t)
    if t.ndim != 1:
        raise ValueError(f"t must be [batch], got shape {t.shape}.")
    check_integer("dim", dim, least=2)
    check_number("scale", scale, "(0, inf)")
    check_number("max_period", max_period, "(0, inf)")
    if dim % 2:
        raise ValueError(f"The number of time features must be even, got {dim}.")
    check_number("frequency_shift", frequency_shift, "[0, inf)")
    check_bool("sine_first", sine_first)
    if frequency_shift >= dim // 2:
        raise ValueError(f"frequency_shift must be less than dim / 2 = {dim // 2}, got {frequency_shift}.")
    # A constant, rounded to float32 at every step: published networks were trained so, and for t of some hundreds the
    # last digits of a frequency are seen in the output.
    exponents = np.float32(-np.log(max_period)) * np.arange(dim // 2, dtype=np.float32)
    frequencies = scale * np.exp((exponents / np.float32(dim // 2 - frequency_shift)).astype(np.float64))
    angles = t.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)[None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([sin, cos] if sine_first else [cos, sin], axis=-1)


class TimeEmbedding(nn.Module):
    """Embeds time: `W2 silu(W1 features(t) + b1) + b2`, in float32.

    Notebooks: (9.3).

    Attributes:
        time_features: number of sinusoidal features.
        features: width of the embedding.
        time_scale: factor on time in the sinusoidal features.
        frequency_shift, sine_first: see `sinusoidal_features`.
        kernel_init: initialiser of the two linear layers.
    """

    time_features: int
    features: int
    time_scale: float = 1000.0
    frequency_shift: float = 0.0
    sine_first: bool = False
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, t: Array) -> Array:
        """Maps `t` [batch] to float32 [batch, features]."""
        h = sinusoidal_features(
            t,
            self.time_features,
            scale=self.time_scale,
            frequency_shift=self.frequency_shift,
            sine_first=self.sine_first,
        )
        h = nn.silu(Dense(self.features, kernel_init=self.kernel_init, name="in")(h))
        return Dense(self.features, kernel_init=self.kernel_init, name="out")(h)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens, with biases and no normalisation of its own.

    Attributes:
        num_heads: number of heads; divides the width of the tokens.
        kernel_init, out_init: initialisers of the query-key-value and of the output projection.
        compute: dtype and implementation.

    References:
        Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """

    num_heads: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps tokens [batch, tokens, channels] to the same shape."""
        batch_size, num_tokens, width = x.shape
        dtype, implementation = self.compute.dtype, self.compute.attention
        qkv = Dense(3 * width, kernel_init=self.kernel_init, dtype=dtype, name="qkv")(x)
        qkv = qkv.reshape(batch_size, num_tokens, 3, self.num_heads, width // self.num_heads)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], implementation=implementation)
        h = h.reshape(batch_size, num_tokens, width)
        return Dense(width, kernel_init=self.out_init, dtype=dtype, name="out")(h)


def num_norm_groups(channels: int, max_groups: int = 32) -> int:
    """The largest divisor of `channels` that is at most `max_groups`.

    Example:
        >>> num_norm_groups(128), num_norm_groups(48), num_norm_groups(20)
        (32, 24, 20)
    """
    return max(groups for groups in range(1, max_groups + 1) if channels % groups == 0)


def group_norm(channels: int, max_groups: int, dtype: Dtype, name: str, *, epsilon: float = 1e-5) -> nn.GroupNorm:
    """Group normalisation with two-pass statistics in float32 and an output in `dtype`."""
    groups = num_norm_groups(channels, max_groups)
    return nn.GroupNorm(num_groups=groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def conv3x3(
    features: int,
    dtype: Dtype,
    name: str,
    *,
    stride: int = 1,
    init: Any = None,
    padding: tuple[int, int] = (1, 1),
) -> nn.Conv:
    """A 3x3 convolution with zeros around the image: [h, w] -> [h / stride, w / stride].

    `padding` is how many zeros stand before and after an axis; DDPM's convolutions of stride 2 have (0, 1).
    """
    init = nn.initializers.lecun_normal() if init is None else init
    return nn.Conv(features, (3, 3), stride, padding=(padding, padding), kernel_init=init, dtype=dtype, name=name)


def space_to_depth(x: Array, size: int) -> Array:
    """Moves squares of pixels into channels: [b, h, w, c] -> [b, h / size, w / size, size^2 c]."""
    b, h, w, c = x.shape
    squares = x.reshape(b, h // size, size, w // size, size, c)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // size, w // size, size * size * c)


def depth_to_space(x: Array, size: int) -> Array:
    """The inverse of `space_to_depth`: [b, h, w, size^2 c] -> [b, size h, size w, c]."""
    b, h, w, c = x.shape
    squares = x.reshape(b, h, w, size, size, c // (size * size))
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * size, w * size, c // (size * size))


def halve(x: Array) -> Array:
    """Averages 2x2 squares: [batch, h, w, c] -> [batch, h/2, w/2, c]."""
    batch_size, height, width, channels = x.shape
    return x.reshape(batch_size, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def double(x: Array) -> Array:
    """Repeats each pixel in a 2x2 square: [batch, h, w, c] -> [batch, 2h, 2w, c]."""
    batch_size, height, width, channels = x.shape
    squares = jnp.broadcast_to(x[:, :, None, :, None, :], (batch_size, height, 2, width, 2, channels))
    return squares.reshape(batch_size, 2 * height, 2 * width, channels)
