"""The parts that the networks share: time and label embedding, attention, normalisation, resampling.

Parameters are always float32. `dtype` is what convolutions and matrix products compute in; normalisation statistics,
the time embedding and every network's output stay float32.
"""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.checks import check_member
from fm_jax.types import Array

Dtype = Any
AttentionImplementation = Literal["xla", "cudnn"]
zeros = nn.initializers.zeros_init()


def check_options(
    *,
    num_classes: int | None,
    label_dropout: float,
    dropout: float,
    dtype: Dtype,
    attention_implementation: AttentionImplementation | None = None,
) -> None:
    """Raises `ValueError` for options that no network of this package accepts."""
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be None or at least 1, got {num_classes}.")
    for name, rate in (("label_dropout", label_dropout), ("dropout", dropout)):
        if not 0.0 <= rate <= 1.0:
            raise ValueError(f"{name} must be between 0 and 1, got {rate}.")
    if label_dropout > 0.0 and num_classes is None:
        raise ValueError(f"label_dropout={label_dropout} needs num_classes, got num_classes=None.")
    check_member("dtype", jnp.dtype(dtype).name, ("float32", "bfloat16"))
    if attention_implementation is not None:
        check_member("attention_implementation", attention_implementation, get_args(AttentionImplementation))


def check_image(x: Array, divisor: int) -> None:
    """Raises `ValueError` unless `x` is [batch, height, width, channels] with sides divisible by `divisor`."""
    if x.ndim != 4:
        raise ValueError(f"x must be [batch, height, width, channels], got shape {x.shape}.")
    if x.shape[1] % divisor or x.shape[2] % divisor:
        raise ValueError(f"height and width must be divisible by {divisor}, got {x.shape[1]}x{x.shape[2]}.")


def sinusoidal_features(t: Array, dim: int, *, scale: float = 1000.0, max_period: float = 10_000.0) -> Array:
    """Cosines and sines of time at geometrically spaced frequencies.

    `[cos(w_i scale t), sin(w_i scale t)]` with `w_i = max_period^(-i / (dim / 2))`, `i = 0, ..., dim / 2 - 1`.

    Args:
        t: times in [0, 1], [batch].
        dim: number of features, even.
        scale: factor on `t`; 1000 is the number of steps of the diffusion models that introduced these features.
        max_period: ratio of the largest to (nearly) the smallest frequency.

    Returns:
        float32 features, [batch, dim].

    Raises:
        ValueError: if `dim` is odd.

    Example:
        >>> sinusoidal_features(jnp.zeros(1), 4)
        Array([[1., 1., 0., 0.]], dtype=float32)

    References:
        Vaswani et al. 2017, "Attention Is All You Need", section 3.5; Ho et al. 2020, "Denoising Diffusion
        Probabilistic Models", appendix B.
    """
    if dim % 2:
        raise ValueError(f"The number of time features must be even, got {dim}.")
    frequencies = scale * max_period ** (-jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class LabelEmbedding(nn.Module):
    """A learned vector for each class, and one more, the last row, for "no class".

    Attributes:
        num_classes: number of classes; the label `num_classes` is the null class.
        features: width of the embedding.
        label_dropout: probability that an example loses its label in training, independently of the others.
        stddev: standard deviation of the initial table.

    References:
        Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", algorithm 1 (label dropout).
    """

    num_classes: int
    features: int
    label_dropout: float = 0.0
    stddev: float = 1.0

    @nn.compact
    def __call__(self, labels: Array | None, batch_size: int, train: bool) -> Array:
        """Looks labels [batch] up; `None` means that all are null. Returns float32 [batch, features]."""
        table = self.param("table", nn.initializers.normal(self.stddev), (self.num_classes + 1, self.features))
        if labels is None:
            labels = jnp.full((batch_size,), self.num_classes)
        labels = jnp.asarray(labels)
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(f"cond must hold integer labels, got dtype {labels.dtype.name}.")
        if labels.shape != (batch_size,):
            raise ValueError(f"cond must be [batch] = ({batch_size},), got shape {labels.shape}.")
        if train and self.label_dropout > 0.0:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), self.label_dropout, labels.shape)
            labels = jnp.where(dropped, self.num_classes, labels)
        # A label outside the table gives NaN, never another class: a traced value cannot raise.
        return table.at[labels].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class ConditionEmbedding(nn.Module):
    """Embeds time, and a class where there are any: `W2 silu(W1 features(t)) + table[label]`, in float32.

    Attributes:
        time_features: number of sinusoidal features.
        features: width of the embedding.
        num_classes, label_dropout, label_stddev: see `LabelEmbedding`; `num_classes=None` is unconditional.
        time_scale: factor on time in the sinusoidal features.
        kernel_init: initialiser of the two linear layers.
    """

    time_features: int
    features: int
    num_classes: int | None = None
    label_dropout: float = 0.0
    label_stddev: float = 1.0
    time_scale: float = 1000.0
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, t: Array, cond: Array | None, train: bool) -> Array:
        """Maps `t` [batch] and labels [batch] or `None` to float32 [batch, features]."""
        h = sinusoidal_features(t, self.time_features, scale=self.time_scale)
        h = nn.silu(nn.Dense(self.features, kernel_init=self.kernel_init, name="time_in")(h))
        h = nn.Dense(self.features, kernel_init=self.kernel_init, name="time_out")(h)
        if self.num_classes is None:
            if cond is not None:
                raise ValueError("cond must be None: the model is unconditional (num_classes=None).")
            return h
        labels = LabelEmbedding(self.num_classes, self.features, self.label_dropout, self.label_stddev, name="labels")
        return h + labels(cond, t.shape[0], train)


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens, with biases and no normalisation of its own.

    Attributes:
        num_heads: number of heads; divides the width of the tokens.
        kernel_init, out_init: initialisers of the query-key-value and of the output projection.
        implementation: passed to `jax.nn.dot_product_attention`. `"cudnn"` is fast but has no forward-mode derivative.
        dtype: compute dtype.

    References:
        Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """

    num_heads: int
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    implementation: AttentionImplementation | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps tokens [batch, tokens, channels] to the same shape."""
        batch_size, num_tokens, width = x.shape
        qkv = nn.Dense(3 * width, kernel_init=self.kernel_init, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch_size, num_tokens, 3, self.num_heads, width // self.num_heads)
        h = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], implementation=self.implementation)
        h = h.reshape(batch_size, num_tokens, width)
        return nn.Dense(width, kernel_init=self.out_init, dtype=self.dtype, name="out")(h)


def num_norm_groups(channels: int, max_groups: int = 32) -> int:
    """The largest divisor of `channels` that is at most `max_groups`.

    Example:
        >>> num_norm_groups(128), num_norm_groups(48), num_norm_groups(20)
        (32, 24, 20)
    """
    return max(groups for groups in range(1, max_groups + 1) if channels % groups == 0)


def group_norm(channels: int, max_groups: int, dtype: Dtype, name: str) -> nn.GroupNorm:
    """Group normalisation with float32 statistics and an output in `dtype`."""
    groups = num_norm_groups(channels, max_groups)
    return nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=dtype, name=name)


def conv3x3(features: int, dtype: Dtype, name: str, *, stride: int = 1, init: Any = None) -> nn.Conv:
    """A 3x3 convolution with one pixel of zeros around the image: [h, w] -> [h / stride, w / stride]."""
    init = nn.initializers.lecun_normal() if init is None else init
    return nn.Conv(features, (3, 3), stride, padding=((1, 1), (1, 1)), kernel_init=init, dtype=dtype, name=name)


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
