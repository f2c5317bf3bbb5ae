"""The blocks of Wan's transformer."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.models.attention import Rotation, apply_rope, attend, from_heads, layer_norm, rope_angles, to_heads
from fm_jax.models.compute import Compute
from fm_jax.models.crossdit import modulations
from fm_jax.models.dense import Dense
from fm_jax.models.dit import modulate, small_normal, xavier
from fm_jax.models.videodit import Triple
from fm_jax.types import Array


def rope_axes(head_dim: int) -> Triple:
    """Channels of a head that turn with frame, row and column: two sixths to either side, the rest to frames."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def grid_angles(grid: Triple, head_dim: int) -> np.ndarray:
    """Rotary angles of every patch of a grid, in row-major order: float64 [frames rows columns, head_dim / 2]."""
    ids = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), axis=-1).reshape(-1, 3)
    return np.asarray(rope_angles(ids, rope_axes(head_dim)))


def spread(part: Array, x: Array) -> Array:
    """What time says of every token of `x` [batch, n, d]: [batch, 1, d], or [batch, n, d] of times for each frame.

    Args:
        part: [batch times, 1, d] with a number of times an example, one behind another.
        x: tokens, frame by frame.
    """
    part = part.reshape(x.shape[0], -1, x.shape[-1])
    times = part.shape[1]
    return part if times == 1 else jnp.repeat(part, x.shape[1] // times, axis=1, total_repeat_length=x.shape[1])


class WanAttention(nn.Module):
    """Attention whose queries and keys are normalised, all heads of a token together, and turned by their positions.

    Attributes: see `Wan`.
    """

    num_heads: int
    epsilon: float = 1e-6
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Array,
        *,
        mask: Array | None = None,
        image: Array | None = None,
        positions: Rotation | None = None,
    ) -> Array:
        """Maps tokens [batch, n, d] to tokens [batch, n, d].

        Args:
            x: queries.
            context: keys and values, [batch, m, d].
            mask: which of them are seen, [batch, m].
            image: keys and values of a second attention of the same queries, which is added, [batch, k, d].
            positions: turns of `x` and `context`.
        """
        width, dtype = x.shape[-1], self.compute.dtype
        head = (self.num_heads, width // self.num_heads, dtype)
        q, k, v = (to_heads(*head, name)(h) for name, h in (("query", x), ("key", context), ("value", context)))
        q, k = self._norm("norm_query")(q), self._norm("norm_key")(k)
        if positions is not None:
            q, k = apply_rope(q, positions), apply_rope(k, positions)
        h = attend(q, k, v, mask=mask, implementation=self.compute.attention)
        if image is not None:
            k, v = (to_heads(*head, name)(image) for name in ("image_key", "image_value"))
            h = h + attend(q, self._norm("norm_image_key")(k), v, implementation=self.compute.attention)
        return from_heads(width, dtype, "out")(h)

    def _norm(self, name: str) -> nn.RMSNorm:
        """Over heads and their channels; the scale is [heads, head_dim]."""
        axes, dtype = (-2, -1), self.compute.dtype
        return nn.RMSNorm(self.epsilon, dtype, reduction_axes=axes, feature_axes=axes, name=name)


class WanBlock(nn.Module):
    """Self-attention and MLP, shifted, scaled and gated by time; between them cross-attention behind an affine norm.

    Attributes: see `Wan`.
    """

    num_heads: int
    mlp_hidden: int
    epsilon: float = 1e-6
    compute: Compute = Compute()

    @nn.compact
    def __call__(
        self,
        x: Array,
        positions: Rotation,
        modulation: Array,
        text: Array,
        mask: Array | None,
        image: Array | None,
        train: bool,
    ) -> Array:
        """Maps tokens [batch, n, d] to tokens [batch, n, d].

        Args:
            x: tokens.
            positions: turns of the tokens.
            modulation: of time, [batch times, 6, d], see `spread`.
            text: [batch, m, d].
            mask: which of it is seen, [batch, m].
            image: tokens of an image, [batch, k, d].
            train: changes nothing.
        """
        width, dtype, epsilon = x.shape[-1], self.compute.dtype, self.epsilon
        options = (self.num_heads, epsilon, self.compute)
        table = self.param("table", nn.initializers.normal(width**-0.5), (6, width))
        parts = [spread(part.astype(dtype), x) for part in modulations(table, modulation)]
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts

        h = modulate(layer_norm(dtype, "norm_attention", epsilon=epsilon)(x), shift_a, scale_a)
        x = x + gate_a * WanAttention(*options, name="attention")(h, h, positions=positions)
        h = layer_norm(dtype, "norm_cross", affine=True, epsilon=epsilon)(x)
        x = x + WanAttention(*options, name="cross")(h, text, mask=mask, image=image)

        h = modulate(layer_norm(dtype, "norm_mlp", epsilon=epsilon)(x), shift_m, scale_m)
        h = Dense(self.mlp_hidden, kernel_init=xavier, dtype=dtype, name="mlp_in")(h)
        h = nn.gelu(h, approximate=True)
        return x + gate_m * Dense(width, kernel_init=xavier, dtype=dtype, name="mlp_out")(h)


class ImageProjection(nn.Module):
    """Two linear layers with a GELU (erf) between them and an affine normalisation on either side.

    Attributes:
        hidden: width of the tokens.
        compute: dtype.
    """

    hidden: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Maps features of an image [batch, k, image_features] to tokens [batch, k, hidden]."""
        dtype = self.compute.dtype
        h = layer_norm(dtype, "norm_in", affine=True, epsilon=1e-5)(tokens)
        h = Dense(h.shape[-1], kernel_init=small_normal, dtype=dtype, name="in")(h)
        h = nn.gelu(h, approximate=False)
        h = Dense(self.hidden, kernel_init=small_normal, dtype=dtype, name="out")(h)
        return layer_norm(dtype, "norm_out", affine=True, epsilon=1e-5)(h)
