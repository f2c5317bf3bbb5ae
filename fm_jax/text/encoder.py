"""What the text encoders share: their outputs, their attention, and the ids that they refuse."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, check_integer, is_traced, shown
from fm_jax.models.attention import attend, from_heads, to_heads
from fm_jax.models.compute import Compute
from fm_jax.models.dense import DenseGeneral
from fm_jax.models.embed import rows
from fm_jax.types import AnyArray, Array


class TextFeatures(NamedTuple):
    """What a text encoder makes of prompts; `None` for what an encoder has not.

    Attributes:
        last: output of the last block behind the final normalisation, float32 [batch, n, d].
        hidden: the last ones of the encoder's states *without* the final normalisation, float32 [batch, n, d]:
            `hidden[-1]` is the output of the last block, `hidden[-2]` its input. `keep_hidden` says how many.
        pooled: `last` at the token that ends the text, float32 [batch, d].
        projected: `pooled` behind the projection to the space of text and images, float32 [batch, projection].
    """

    last: Array
    hidden: tuple[Array, ...] = ()
    pooled: Array | None = None
    projected: Array | None = None


class SelfAttention(nn.Module):
    """Self-attention with projections by heads.

    Attributes:
        num_heads: attention heads.
        head_dim: width of a head; heads times width need not be the width of the tokens.
        use_bias: whether the four projections have biases.
        causal: whether a token sees only those up to its own place.
        scale: of the products, `1 / sqrt(head_dim)` by default. With a scale of 1 queries start smaller by that factor.
        compute: dtype and attention.
    """

    num_heads: int
    head_dim: int
    use_bias: bool
    causal: bool = False
    scale: float | None = None
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, bias: Array | None) -> Array:
        """Maps tokens [batch, n, d] to tokens, with a mask of keys [batch, n] and a bias [1, heads, n, n]."""
        dtype, heads = self.compute.dtype, (self.num_heads, self.head_dim)
        variance = 1.0 if self.scale is None else self.scale**2 / self.head_dim
        query = DenseGeneral(
            heads,
            use_bias=self.use_bias,
            dtype=dtype,
            kernel_init=nn.initializers.variance_scaling(variance, "fan_in", "truncated_normal"),
            name="query",
        )
        key, value = (to_heads(*heads, dtype, name, use_bias=self.use_bias) for name in ("key", "value"))
        h = attend(
            query(x),
            key(x),
            value(x),
            mask=mask,
            bias=bias,
            causal=self.causal,
            scale=self.scale,
            implementation=self.compute.attention,
        )
        return from_heads(x.shape[-1], dtype, "out", use_bias=self.use_bias)(h)


class TokenEmbed(nn.Module):
    """A vector for each token; one that is not in the vocabulary, a negative one too, is NaN.

    Attributes:
        vocabulary: number of ids.
        features: width of the vectors.
        init: initialiser of the table, [vocabulary, features].
    """

    vocabulary: int
    features: int
    init: Any

    @nn.compact
    def __call__(self, ids: AnyArray) -> Array:
        """The vectors [..., features] of ids [...]."""
        return rows(self.param("embedding", self.init, (self.vocabulary, self.features)), jnp.asarray(ids))


def check_ids(ids: AnyArray, mask: AnyArray | None, vocabulary: int) -> None:
    """Refuses what are not token ids [batch, n] of a vocabulary, and a mask that does not fit them.

    Values that are traced pass; of those the embedding makes NaN where the vocabulary has no such token.
    """
    check_array("ids", ids, "integers [batch, n], as a tokenizer makes")
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or 0 in ids.shape:
        raise ValueError(f"ids must be integers [batch, n], as a tokenizer makes, got {shown(ids)}.")
    if mask is not None:
        check_array("mask", mask)
        if mask.shape != ids.shape or mask.dtype != bool:
            raise ValueError(f"mask must be bool, true where a token is no padding, {ids.shape}, got {shown(mask)}.")
    if not is_traced(ids):
        values = np.asarray(ids)  # of an array of JAX inside a jitted function too
        least, most = values.min(), values.max()
        if least < 0 or most >= vocabulary:
            raise ValueError(f"ids must be from 0 to {vocabulary - 1}, got ids from {least} to {most}.")


def check_kept(keep_hidden: int, num_layers: int) -> None:
    """Refuses more states than an encoder has."""
    check_integer("keep_hidden", keep_hidden, least=0, most=num_layers + 1)
