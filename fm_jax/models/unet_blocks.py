"""The parts of the U-Nets: a residual block, attention over pixels, and classes without a class for "none"."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_setting
from fm_jax.models.attention import attend, to_heads
from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense
from fm_jax.models.dit import position_features
from fm_jax.models.embed import look_up
from fm_jax.models.layers import SelfAttention, conv3x3, group_norm, zeros
from fm_jax.types import Array


class ResBlock(nn.Module):
    """Two normalised convolutions around a time conditioning, added to the input; the identity at initialisation.

    `x' + conv(silu(condition(norm(conv(silu(norm(x)))))))`, where `x'` is `x`, through a 1x1 convolution if the
    number of channels changes. FiLM conditions by `norm(h) (1 + scale) + shift`, otherwise by `norm(h + shift)`.

    Notebooks: (9.4).

    Attributes:
        features: output channels.
        film: scale and shift (FiLM) instead of only shift.
        resize: applied to the input of the first convolution and to `x`: `halve`, `double`, or `None`.
        dropout, num_groups, compute, norm_epsilon: see `UNet`.
    """

    features: int
    film: bool
    dropout: float
    num_groups: int
    compute: Compute = Compute()
    resize: Callable[[Array], Array] | None = None
    norm_epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        """Maps `x` [batch, h, w, c] and the embedding [batch, d] to [batch, h', w', features]."""
        dtype, epsilon = self.compute.dtype, self.norm_epsilon
        h = nn.silu(group_norm(x.shape[-1], self.num_groups, dtype, "norm_in", epsilon=epsilon)(x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = conv3x3(self.features, dtype, "conv_in")(h)
        width = 2 * self.features if self.film else self.features
        modulation = jnp.expand_dims(Dense(width, dtype=dtype, name="embed")(nn.silu(emb)), (1, 2))
        norm = group_norm(self.features, self.num_groups, dtype, "norm_out", epsilon=epsilon)
        if self.film:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = norm(h) * (1.0 + scale) + shift
        else:
            h = norm(h + modulation)
        h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
        h = conv3x3(self.features, dtype, "conv_out", init=zeros)(h)
        if x.shape[-1] != self.features:
            x = nn.Conv(self.features, (1, 1), dtype=dtype, name="skip")(x)
        return x + h


def _pixels(block: "AttentionBlock | TokenBlock", x: Array) -> Array:
    """What attention sees of an image: its normalised pixels as a sequence, and where they are."""
    (batch, height, width, channels), dtype = x.shape, block.compute.dtype
    h = group_norm(channels, block.num_groups, dtype, "norm", epsilon=block.norm_epsilon)(x)
    h = h.reshape(batch, height * width, channels)
    return h + position_features(height, width, channels)[None].astype(dtype) if block.positions else h


class AttentionBlock(nn.Module):
    """Normalised self-attention over the pixels, added to the input; the identity at initialisation."""

    num_heads: int
    num_groups: int
    compute: Compute = Compute()
    norm_epsilon: float = 1e-5
    positions: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = _pixels(self, x)
        attend = SelfAttention(self.num_heads, out_init=zeros, compute=self.compute, name="attention")
        return x + attend(h).reshape(x.shape)


class TokenBlock(nn.Module):
    """Attention of the pixels to tokens, such as encoded text, added to the input; the identity at initialisation."""

    num_heads: int
    num_groups: int
    compute: Compute = Compute()
    norm_epsilon: float = 1e-5
    positions: bool = False

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array | None) -> Array:
        """Maps `x` [batch, h, w, c], which asks, and `tokens` [batch, n, d], seen where `mask` is, to `x`'s shape."""
        (batch, _, _, width), dtype = x.shape, self.compute.dtype
        h = _pixels(self, x)
        q = to_heads(self.num_heads, width // self.num_heads, dtype, "query")(h)
        k, v = (to_heads(self.num_heads, width // self.num_heads, dtype, name)(tokens) for name in ("key", "value"))
        h = attend(q, k, v, mask=mask, implementation=self.compute.attention).reshape(batch, -1, width)
        return x + Dense(width, kernel_init=zeros, dtype=dtype, name="out")(h).reshape(x.shape)


class ClassEmbedding(nn.Module):
    """A learned vector for each class, and none for "no class": the published class-conditional U-Nets have it so.

    `LabelEmbedding(num_classes - 1)` reads the same table as one whose last row is "no class".

    Attributes:
        num_classes: number of classes.
        stddev: standard deviation of the initial table.

    Raises:
        ValueError: if `num_classes` is less than 1.
    """

    num_classes: int
    stddev: float = 1.0

    def __post_init__(self) -> None:
        check_integer("num_classes", self.num_classes)
        check_setting(self, "stddev", "[0, inf)")
        super().__post_init__()

    @nn.compact
    def __call__(self, cond: Array | None, features: int, batch_size: int) -> Array:
        """Looks labels up.

        Args:
            cond: integers [batch] in 0, ..., `num_classes - 1`. A traced label outside gives NaN.
            features: width of the vectors.
            batch_size: number of examples.

        Returns:
            float32 [batch, features].

        Raises:
            ValueError: if `cond` is not [batch], does not hold integers, or one that is known to be no class.
        """
        table = self.param("table", nn.initializers.normal(self.stddev), (self.num_classes, features))
        if cond is None:
            if self.is_initializing():
                return jnp.zeros((batch_size, features))
            raise ValueError(
                f"cond must be labels [batch] = ({batch_size},): the network has no class for none, got None."
            )
        return look_up(table, cond, batch_size)
