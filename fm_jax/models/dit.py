"""The diffusion transformer with adaLN-Zero conditioning."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_integer, check_member, check_real, check_setting
from fm_jax.models.attention import layer_norm
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import OURS, Border, check_border
from fm_jax.models.dense import Dense
from fm_jax.models.embed import add_condition
from fm_jax.models.in_sequence import MaskedSelfAttention, append_tokens, check_token_dim, fields_read
from fm_jax.models.layers import SelfAttention, TimeEmbedding, check_image, check_options, zeros
from fm_jax.models.stack import run_blocks
from fm_jax.shapes import batch_time
from fm_jax.types import Array, Cond

xavier = nn.initializers.xavier_uniform()
small_normal = nn.initializers.normal(0.02)


def patchify(x: Array, patch_size: int) -> Array:
    """Cuts images [batch, h, w, c] into patches [batch, h w / p^2, p^2 c], both in row-major order.

    Notebooks: (9.6).
    """
    check_integer("patch_size", patch_size)
    check_image(x, patch_size)
    batch_size, height, width, channels = x.shape
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch_size, rows, patch_size, columns, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch_size, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Array, patch_size: int, height: int, width: int) -> Array:
    """Puts patches [batch, h w / p^2, p^2 c] back into images [batch, h, w, c]: the inverse of `patchify`."""
    for name, value in (("patch_size", patch_size), ("height", height), ("width", width)):
        check_integer(name, value)
    check_real("patches", patches)
    rows, columns = height // patch_size, width // patch_size
    if patches.ndim != 3 or patches.shape[1] != rows * columns or patches.shape[2] % patch_size**2:
        raise ValueError(
            f"patches must be [batch, {rows * columns}, {patch_size**2} c], to tile an image of {height}x{width}, got "
            f"shape {patches.shape}."
        )
    channels = patches.shape[2] // patch_size**2
    x = patches.reshape(patches.shape[0], rows, columns, patch_size, patch_size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(patches.shape[0], height, width, channels)


def position_features(rows: int, columns: int, dim: int) -> np.ndarray:
    """Fixed sines and cosines of the row and of the column of each patch.

    With `w_i = 10000^(-i / (dim / 4))`: `[sin(w column), cos(w column), sin(w row), cos(w row)]`, the order of the
    published weights of DiT, SiT, PixArt and Stable Diffusion 3.

    Args:
        rows: height of the grid of patches.
        columns: width of the grid of patches.
        dim: width of the features, divisible by 4.

    Returns:
        float32 [rows * columns, dim], in row-major order.

    References:
        Peebles & Xie 2022, section 3.2, "Patchify".
    """
    for name, value in (("rows", rows), ("columns", columns), ("dim", dim)):
        check_integer(name, value)
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4, got {dim}.")
    # In NumPy and float64: a constant of the traced program, computed once.
    frequencies = 10_000.0 ** (-np.arange(dim // 4) / (dim // 4))
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    angles = [np.outer(position.reshape(-1), frequencies) for position in (column, row)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=-1).astype(np.float32)


def modulate(h: Array, shift: Array, scale: Array) -> Array:
    """`h (1 + scale) + shift` for tokens [batch, tokens, d] with `shift` and `scale` [batch, 1, d].

    Notebooks: (9.7).
    """
    return h * (1.0 + scale) + shift


class DiTBlock(nn.Module):
    """A transformer block whose two branches are shifted, scaled and gated by the condition.

    The identity at initialisation, because the gates start at zero.

    Attributes: see `DiT`.

    Notebooks: (9.7).
    """

    num_heads: int
    mlp_ratio: float
    dropout: float
    norm_mlp_epsilon: float = 1e-6
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, emb: Array, mask: Array | None, train: bool) -> Array:
        """Maps tokens [batch, tokens, d], seen where `mask` is, and the embedding [batch, d] to the same tokens."""
        width, dtype = x.shape[-1], self.compute.dtype
        modulation = Dense(6 * width, kernel_init=zeros, dtype=dtype, name="modulation")(nn.silu(emb))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation[:, None, :], 6, axis=-1)
        drop = nn.Dropout(self.dropout, deterministic=not train)

        h = modulate(layer_norm(dtype, "norm_attention")(x), shift_a, scale_a)
        options = self.num_heads, xavier, xavier, self.compute
        if mask is None:
            h = SelfAttention(*options, name="attention")(h)
        else:
            h = MaskedSelfAttention(*options, name="attention")(h, mask)
        x = x + gate_a * drop(h)

        h = modulate(layer_norm(dtype, "norm_mlp", epsilon=self.norm_mlp_epsilon)(x), shift_m, scale_m)
        h = Dense(int(self.mlp_ratio * width), kernel_init=xavier, dtype=dtype, name="mlp_in")(h)
        h = nn.gelu(h, approximate=True)
        h = Dense(width, kernel_init=xavier, dtype=dtype, name="mlp_out")(h)
        return x + gate_m * drop(h)


class DiT(nn.Module):
    """A transformer over the patches of an image, conditioned by adaLN-Zero; zero at initialisation.

    Notebooks: (9.6).

    Attributes:
        patch_size: side of a patch in pixels.
        hidden: width of the tokens, divisible by 4 and by `num_heads`.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the blocks' hidden layer in units of `hidden`.
        out_channels: channels of the output; those of the input by default.
        dropout: dropout rate at the end of both branches of a block.
        embed: module from a condition to a vector, see `fm_jax.models.embed`; `None` for an unconditional field.
            The paper's is `LabelEmbedding(1000, stddev=0.02)`.
        border: between our time and sign and those of the network. Published weights have another than ours: `DDPM` for
            DiT, which predicts the noise, `SIT` and `REPA`.
        frequency_shift: of the time features, see `sinusoidal_features`; 1 in diffusers' class of a DiT.
        norm_mlp_epsilon: of the second normalisation of a block; 1e-5 in diffusers' class of a DiT.
        compute: dtype, attention and rematerialisation.
        scan_layers: trace and compile one block and loop over it, for a program whose size does not grow with
            `num_layers`. The parameters of the blocks are stacked on a first axis: `fm_jax.models.stack_layers` makes
            them of those of the unrolled network, and the outputs are the same up to rounding. Initial parameters and
            dropout have the same law, and other draws.
        token_dim: width of tokens that join the sequence of patches and are seen by every block; `cond` is then
            `Conditions` with `tokens` [batch, m, token_dim], the `mask` of which are there, and what `embed` reads.
            Without tokens, `Conditions()` or `None`, the patches are alone, as if all were masked.

    References:
        Peebles & Xie 2022, "Scalable Diffusion Models with Transformers", section 3.2 and figure 3.
    """

    patch_size: int = 2
    hidden: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    out_channels: int | None = None
    dropout: float = 0.0
    embed: nn.Module | None = None
    border: Border = OURS
    frequency_shift: float = 0.0
    norm_mlp_epsilon: float = 1e-6
    compute: Compute = Compute()
    scan_layers: bool = False
    token_dim: int | None = None

    def __post_init__(self) -> None:
        check_options(embed=self.embed, dropout=self.dropout, compute=self.compute)
        check_bool("scan_layers", self.scan_layers)
        check_border(self.border)
        check_token_dim(self.token_dim, self.embed)
        for name in ("patch_size", "hidden", "num_layers", "num_heads"):
            check_integer(name, getattr(self, name))
        if self.out_channels is not None:
            check_integer("out_channels", self.out_channels)
        for name in ("mlp_ratio", "norm_mlp_epsilon"):
            check_setting(self, name, "(0, inf)")
        check_setting(self, "frequency_shift", "[0, 1]")
        if self.hidden % 4:
            raise ValueError(f"hidden must be divisible by 4 (sines and cosines of two axes), got {self.hidden}.")
        if self.hidden % self.num_heads:
            raise ValueError(f"num_heads must divide hidden={self.hidden}, got {self.num_heads}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, scalar or [batch].
            x: images, [batch, height, width, channels].
            cond: what `embed` takes, or `Conditions` that hold it, and tokens; `None` for "no condition".
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            float32, [batch, height, width, out_channels].

        Raises:
            ValueError: if `x` is no image, patches do not tile it, or `cond` does not fit the model.
        """
        check_image(x, self.patch_size)
        x = x.astype(jnp.float32)
        _, height, width, channels = x.shape
        time = TimeEmbedding(256, self.hidden, 1.0, self.frequency_shift, kernel_init=small_normal, name="time")
        taken = fields_read(self.token_dim, cond)
        emb = add_condition(time(self.border.time(batch_time(t, x))), self.embed, cond, taken)
        dtype, mask = self.compute.dtype, None

        # A product with the cut patches is the strided convolution of the paper, and fast inside loops on CPU too.
        h = Dense(self.hidden, kernel_init=xavier, dtype=dtype, name="patches")(patchify(x, self.patch_size))
        position = position_features(height // self.patch_size, width // self.patch_size, self.hidden)
        h = h + jnp.asarray(position, dtype=dtype)[None]
        num_patches = h.shape[1]
        if self.token_dim is not None:
            h, mask = append_tokens(h, cond, self.token_dim, dtype)

        options = {
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "dropout": self.dropout,
            "norm_mlp_epsilon": self.norm_mlp_epsilon,
            "compute": self.compute,
        }
        scan, remat = self.scan_layers, self.compute.remat
        h = run_blocks(DiTBlock, options, self.num_layers, h, emb, mask, train=train, scan=scan, remat=remat)
        h = h[:, :num_patches] if self.token_dim is not None else h

        shift, scale = jnp.split(
            Dense(2 * self.hidden, kernel_init=zeros, name="modulation")(nn.silu(emb))[:, None, :], 2, axis=-1
        )
        h = modulate(layer_norm(jnp.float32, "norm")(h), shift, scale)
        h = Dense(self.patch_size**2 * (self.out_channels or channels), kernel_init=zeros, name="out")(h)
        return self.border.output(unpatchify(h, self.patch_size, height, width))


# Peebles & Xie 2022, table 1.
SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden": 384, "num_layers": 12, "num_heads": 6},
    "B": {"hidden": 768, "num_layers": 12, "num_heads": 12},
    "L": {"hidden": 1024, "num_layers": 24, "num_heads": 16},
    "XL": {"hidden": 1152, "num_layers": 28, "num_heads": 16},
}
DIT_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 128, "num_layers": 4, "num_heads": 4, "patch_size": 2},
    **{f"{size}/{patch}": widths | {"patch_size": patch} for size, widths in SIZES.items() for patch in (2, 4, 8)},
}


def make_dit(name: str, **overrides: Any) -> DiT:
    """Builds a diffusion transformer by the name of its size.

    Args:
        name: `"tiny"` (digits and MNIST on a CPU), or size and patch as in the paper: `"S/2"`, ..., `"XL/8"`.
        **overrides: attributes of `DiT` to change, such as `embed`.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> make_dit("XL/2").num_layers
        28
    """
    check_member("name", name, tuple(DIT_CONFIGS))
    return DiT(**(DIT_CONFIGS[name] | overrides))
