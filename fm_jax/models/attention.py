"""Attention, once for every network: masks, lengths, biases, rotary positions, normalised queries and keys."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer, check_member, check_number, check_real, shown
from fm_jax.models.compute import Attention, Dtype
from fm_jax.models.dense import DenseGeneral
from fm_jax.types import Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    lengths: Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: Attention | None = None,
) -> Array:
    """Softmax attention, `softmax(scale q k^T + bias) v`, with a softmax in float32.

    A key that is masked has weight zero to the bit. A query all of whose keys are masked gets zero.

    Notebooks: (12.1), (12.2).

    Args:
        q: queries [batch, n, heads, head_dim].
        k: keys [batch, m, heads, head_dim].
        v: values [batch, m, heads, head_dim].
        mask: which keys are seen: bool [batch, m], or whatever broadcasts to [batch, heads, n, m].
        bias: added to the scaled products; broadcasts to [batch, heads, n, m].
        lengths: number of keys that are seen, the first ones, [batch]: a mask that cuDNN takes too.
        causal: whether a query sees only the keys up to its own place.
        scale: of the products; `1 / sqrt(head_dim)` by default.
        implementation: `"xla"`, `"cudnn"`, or `None` for JAX's choice. What cuDNN does not take (float32, heads wider
            than 128 or not of a multiple of 8, a bias) runs on XLA, with one warning when it is traced.

    Returns:
        [batch, n, heads, head_dim], in the dtype of `q`.

    Raises:
        ValueError: if the shapes do not fit each other.

    References:
        Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """
    _check_attention(q, k, v, mask, bias, lengths)
    if implementation is not None:
        check_member("implementation", implementation, get_args(Attention))
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    if implementation == "cudnn" and (why := _not_for_cudnn(q, bias)) is not None:
        warnings.warn(f"cuDNN's attention does not take {why}: XLA's is used.", stacklevel=2)
        implementation = "xla"
    if mask is not None and implementation != "xla":  # cuDNN does not broadcast a mask of keys
        mask = jnp.broadcast_to(mask, (q.shape[0], mask.shape[1], q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=lengths,
        query_seq_lengths=None if lengths is None else jnp.full(q.shape[:1], q.shape[1], jnp.int32),
        implementation=implementation,
    )
    if mask is not None:
        out = jnp.where(jnp.swapaxes(mask.any(axis=-1, keepdims=True), 1, 2), out, 0)
    return out if lengths is None else jnp.where(lengths[:, None, None, None] > 0, out, 0)


def _not_for_cudnn(q: Array, bias: Array | None) -> str | None:
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return str(q.dtype)
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"heads of {q.shape[-1]} channels"
    return None if bias is None else "a bias whose gradient is wanted for more than one example"


def _check_attention(
    q: Array, k: Array, v: Array, mask: Array | None, bias: Array | None, lengths: Array | None
) -> None:
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, head_dim], got shape {value.shape}.")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q, k and v must agree but for their tokens, got {q.shape}, {k.shape} and {v.shape}.")
    batch_size, keys = k.shape[:2]
    pairs = (batch_size, q.shape[2], q.shape[1], keys)
    if mask is not None and mask.dtype != bool:
        raise ValueError(f"mask must be bool, true where a key is seen, got {shown(mask)}.")
    if mask is not None and mask.shape != (batch_size, keys) and not _broadcasts(mask, pairs):
        wanted = f"[batch, keys] = {(batch_size, keys)} or broadcast to {pairs}"
        raise ValueError(f"mask must be {wanted}, got shape {mask.shape}.")
    if bias is not None and not _broadcasts(bias, pairs):
        raise ValueError(f"bias must broadcast to {pairs}, got shape {bias.shape}.")
    if lengths is not None and (lengths.shape != (batch_size,) or not jnp.issubdtype(lengths.dtype, jnp.integer)):
        raise ValueError(f"lengths must be integers [batch] = ({batch_size},), got {shown(lengths)}.")


def _broadcasts(x: Array, shape: tuple[int, ...]) -> bool:
    return x.ndim == len(shape) and all(size in (1, wanted) for size, wanted in zip(x.shape, shape, strict=True))


def rope_angles(ids: Array | np.ndarray, dims: Sequence[int], theta: float = 10_000.0) -> Array | np.ndarray:
    """Angles of rotary positions over several axes: `ids[..., a] theta^(-2 j / dims[a])`, the axes one behind another.

    Notebooks: (12.3).

    Args:
        ids: position of each token on each axis, [..., axes]. A NumPy array gives float64 constants of the program.
        dims: channels of a head that belong to each axis, even; their sum is the width of a head.
        theta: base of the wavelengths.

    Returns:
        [..., sum(dims) / 2].

    Raises:
        ValueError: if `dims` has an odd number, or another length than `ids` has axes, or `theta` is not positive.

    References:
        Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", section 3.2.2.
    """
    check_real("ids", ids)
    if not isinstance(dims, tuple | list):
        raise ValueError(f"dims must be a tuple, one number for each axis, got {shown(dims)}.")
    for i, dim in enumerate(dims):
        check_integer(f"dims[{i}]", dim, least=2)
        if dim % 2:
            raise ValueError(f"dims must be even, as channels turn in pairs, got {tuple(dims)}.")
    if ids.ndim < 1 or ids.shape[-1] != len(dims):
        raise ValueError(f"ids must have {len(dims)} axes, as dims has, got shape {ids.shape}.")
    check_number("theta", theta, "(0, inf)")
    numpy = np if isinstance(ids, np.ndarray) else jnp
    lead = (1,) * (ids.ndim - 1)
    frequencies = [(theta ** (-np.arange(0, dim, 2) / dim)).reshape(*lead, -1) for dim in dims]
    return numpy.concatenate([ids[..., a, None] * w for a, w in enumerate(frequencies)], axis=-1)


class Rotation(NamedTuple):
    """Cosines and sines of rotary positions, each [..., head_dim / 2]: a pytree that many layers share."""

    cos: Array
    sin: Array


def rotation(angles: Array | np.ndarray) -> Rotation:
    """Cosines and sines in float32, of constants (`angles` in NumPy) computed in float64."""
    numpy = np if isinstance(angles, np.ndarray) else jnp
    dtype = jnp.promote_types(jnp.result_type(angles), jnp.float32)
    return Rotation(jnp.asarray(numpy.cos(angles), dtype), jnp.asarray(numpy.sin(angles), dtype))


def apply_rope(x: Array, angles: Array | np.ndarray | Rotation) -> Array:
    """Turns the pairs of channels (0, 1), (2, 3), ... of every head by the angles of its token.

    Notebooks: (12.3).

    Args:
        x: queries or keys, [batch, tokens, heads, head_dim].
        angles: [tokens, head_dim / 2] or [batch, tokens, head_dim / 2], or the `rotation` by them, where layers in a
            loop share it: what comes into a loop is no constant any more, and its angles would be float32.

    Returns:
        As `x`; turned in float32 or better.

    Raises:
        ValueError: if `angles` does not fit `x`.
    """
    turn = angles if isinstance(angles, Rotation) else rotation(angles)
    shared = (x.shape[1], x.shape[-1] // 2)
    if x.shape[-1] % 2 or turn.cos.shape not in (shared, (1, *shared), (x.shape[0], *shared)):
        raise ValueError(f"angles must be [tokens, head_dim / 2] = {shared}, got shape {turn.cos.shape}.")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = (part.astype(dtype)[..., None, :] for part in turn)
    cos, sin = (part if part.ndim == x.ndim else part[None] for part in (cos, sin))
    even, odd = x[..., 0::2].astype(dtype), x[..., 1::2].astype(dtype)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def layer_norm(dtype: Dtype, name: str, *, affine: bool = False, epsilon: float = 1e-6) -> nn.LayerNorm:
    """Layer normalisation, by default without scale and shift; two-pass statistics in float32, an output in `dtype`."""
    return nn.LayerNorm(
        epsilon=epsilon, use_scale=affine, use_bias=affine, dtype=dtype, use_fast_variance=False, name=name
    )


def rms_norm(dtype: Dtype, name: str, *, epsilon: float = 1e-6) -> nn.RMSNorm:
    """`x / sqrt(mean(x^2) + epsilon) scale` over the last axis, statistics in float32, an output in `dtype`."""
    return nn.RMSNorm(epsilon=epsilon, dtype=dtype, name=name)


def to_heads(heads: int, head_dim: int, dtype: Dtype, name: str, *, use_bias: bool = True) -> nn.DenseGeneral:
    """A projection [..., d] -> [..., heads, head_dim] with a kernel [d, heads, head_dim], to be sharded by heads."""
    return DenseGeneral((heads, head_dim), use_bias=use_bias, dtype=dtype, name=name)


def from_heads(features: int, dtype: Dtype, name: str, *, use_bias: bool = True) -> nn.DenseGeneral:
    """A projection [..., heads, head_dim] -> [..., features] with a kernel [heads, head_dim, features]."""
    return DenseGeneral(features, axis=(-2, -1), use_bias=use_bias, dtype=dtype, name=name)
