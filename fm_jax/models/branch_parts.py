"""What branches are made of: small modules, the last layer of each of which starts at zero where it joins a network."""

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.models.attention import attend, layer_norm, to_heads
from fm_jax.models.dense import Dense, DenseGeneral
from fm_jax.models.layers import zeros
from fm_jax.models.places import Head
from fm_jax.types import Array


class LocalFeatures(nn.Module):
    """Two convolutions of 3 places an axis, each with silu, over what is aligned with the state."""

    features: int

    @nn.compact
    def __call__(self, local: Array) -> Array:
        """Maps [batch, *grid, channels] to float32 [batch, *grid, features]."""
        h = local.astype(jnp.float32)
        for name in ("in", "out"):
            h = nn.silu(nn.Conv(self.features, (3,) * (h.ndim - 2), name=name)(h))
        return h


class VectorPart(nn.Module):
    """Two layers with silu between them, the last of which starts at zero."""

    features: int

    @nn.compact
    def __call__(self, vector: Array) -> Array:
        """Maps [batch, dim] to float32 [batch, features]."""
        h = nn.silu(Dense(self.features, name="in")(vector.astype(jnp.float32)))
        return Dense(self.features, kernel_init=zeros, name="out")(h)


class CrossPart(nn.Module):
    """Attention of normalised states to tokens, with a last projection that starts at zero."""

    num_heads: int

    @nn.compact
    def __call__(self, h: Array, tokens: Array, mask: Array | None) -> Array:
        """Maps states [batch, n, d], which ask, and tokens [batch, m, e] to [batch, n, d]."""
        width, dtype = h.shape[-1], h.dtype
        if width % self.num_heads:
            raise ValueError(f"num_heads must divide the {width} channels of every block, got {self.num_heads}.")
        head = self.num_heads, width // self.num_heads, dtype
        q = to_heads(*head, "query")(layer_norm(dtype, "norm")(h))
        k, v = (to_heads(*head, name)(tokens) for name in ("key", "value"))
        out = DenseGeneral(width, axis=(-2, -1), use_bias=False, kernel_init=zeros, dtype=dtype, name="out")
        return out(attend(q, k, v, mask=mask))


class PromptTokens(nn.Module):
    """Tokens of an image, normalised; of a vector, where there is a number of them, by a linear layer."""

    num_tokens: int | None

    @nn.compact
    def __call__(self, h: Array) -> Array:
        """Maps [batch, n, dim], or [batch, dim], to float32 [batch, n, dim]."""
        h, dim = h.astype(jnp.float32), h.shape[-1]
        if self.num_tokens is not None:
            h = DenseGeneral((self.num_tokens, dim), name="tokens")(h)
        normed: Array = layer_norm(jnp.float32, "norm", affine=True, epsilon=1e-5)(h)
        return normed


class PromptPart(nn.Module):
    """Keys, and values that start at zero, of the tokens of an image, for heads that exist."""

    head: Head

    @nn.compact
    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        """Maps tokens [batch, m, dim] to keys and values [batch, m, heads, head_dim]."""
        shape, dtype = (self.head.heads, self.head.head_dim), self.head.dtype
        k = DenseGeneral(shape, use_bias=False, dtype=dtype, name="key")(tokens)
        if self.head.normed:
            k = nn.RMSNorm(epsilon=1e-6, dtype=dtype, name="norm_key")(k)
        return k, DenseGeneral(shape, use_bias=False, kernel_init=zeros, dtype=dtype, name="value")(tokens)
