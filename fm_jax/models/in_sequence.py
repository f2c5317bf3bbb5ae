"""Tokens in the sequence of an image's patches: seen by all, and cut off before the output."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_state, shown
from fm_jax.models.attention import attend
from fm_jax.models.compute import Dtype
from fm_jax.models.conditioning import Conditions
from fm_jax.models.dense import Dense
from fm_jax.models.layers import SelfAttention
from fm_jax.types import Array, Cond

FIELDS = ("tokens", "mask")
"""What a network with `token_dim` reads of `Conditions` itself."""


def check_token_dim(token_dim: Any, embed: Any) -> None:
    """Raises `ValueError` for what is neither `None` nor a width, and for an `embed` that would read tokens too."""
    if token_dim is None:
        return
    check_integer("token_dim", token_dim)
    if embed is not None and set(FIELDS) & set(getattr(embed, "reads", ())):
        raise ValueError(f"embed must not read tokens that stand in the sequence (token_dim={token_dim}), got {embed}.")


def fields_read(token_dim: int | None, cond: Cond) -> tuple[str, ...]:
    """What a network reads of `Conditions` itself; `ValueError` for a `cond` that cannot hold tokens."""
    if token_dim is None:
        return ()
    if cond is not None and not isinstance(cond, Conditions):
        raise ValueError(f"cond must be Conditions(tokens=..., mask=...), as token_dim={token_dim}, got {shown(cond)}.")
    return FIELDS


def append_tokens(h: Array, cond: Conditions | None, token_dim: int, dtype: Dtype) -> tuple[Array, Array | None]:
    """Appends `cond.tokens`, projected by a layer `"tokens"` to the width of the patches; in a compact method.

    They get no positions: what their order is, they say themselves, as those of text encoders do.

    Args:
        h: patches [batch, n, d].
        cond: `Conditions` with `tokens` [batch, m, token_dim] and, if some of them are padding, `mask` [batch, m];
            without tokens, or `None`, the patches stay alone.
        token_dim: width of the tokens.
        dtype: of the projection.

    Returns:
        Patches, and tokens behind them, [batch, n + m, d], and which of these are seen, bool [batch, n + m]; `None`
        where all are.

    Raises:
        ValueError: if tokens and mask do not fit.
    """
    batch, num = h.shape[:2]
    tokens, mask = (None, None) if cond is None else (cond.tokens, cond.mask)
    if tokens is None:
        if mask is not None:
            raise ValueError("cond.mask must come with cond.tokens, got a mask alone.")
        tokens = jnp.zeros((batch, 0, token_dim))  # the projection is there all the same
    check_state(tokens, "cond.tokens")
    if tokens.ndim != 3 or tokens.shape[0] != batch or tokens.shape[2] != token_dim:
        raise ValueError(
            f"cond.tokens must be [batch, m, token_dim] = [{batch}, m, {token_dim}], got shape {tokens.shape}."
        )
    if mask is not None:
        if getattr(mask, "shape", None) != tokens.shape[:2] or mask.dtype != bool:
            raise ValueError(f"cond.mask must be bool {list(tokens.shape[:2])}, true for tokens, got {shown(mask)}.")
        tokens = jnp.where(mask[:, :, None], tokens, 0)  # so that padding may be anything, NaN too
        mask = jnp.concatenate([jnp.ones((batch, num), bool), mask], axis=1)
    projected = Dense(h.shape[2], kernel_init=nn.initializers.xavier_uniform(), dtype=dtype, name="tokens")(tokens)
    return jnp.concatenate([h, projected], axis=1), mask


class MaskedSelfAttention(SelfAttention):
    """`SelfAttention`, with its parameters, over tokens of which some are seen by none."""

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Maps tokens [batch, tokens, channels], seen where `mask` [batch, tokens] is, to the same shape."""
        batch_size, num_tokens, width = x.shape
        dtype = self.compute.dtype
        qkv = Dense(3 * width, kernel_init=self.kernel_init, dtype=dtype, name="qkv")(x)
        q, k, v = jnp.moveaxis(qkv.reshape(batch_size, num_tokens, 3, self.num_heads, width // self.num_heads), 2, 0)
        h = attend(q, k, v, mask=mask, implementation=self.compute.attention).reshape(batch_size, num_tokens, width)
        return Dense(width, kernel_init=self.out_init, dtype=dtype, name="out")(h)
