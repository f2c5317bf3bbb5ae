"""LightningDiT: a diffusion transformer with RMS normalisation, gated MLPs and rotary positions."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_integer, check_member
from fm_jax.models.attention import apply_rope, attend, from_heads, rms_norm, rope_angles, to_heads
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import SIT, Border, check_border
from fm_jax.models.dense import Dense
from fm_jax.models.dit import modulate, patchify, position_features, small_normal, unpatchify
from fm_jax.models.embed import add_condition
from fm_jax.models.in_sequence import append_tokens, check_token_dim, fields_read
from fm_jax.models.layers import TimeEmbedding, check_image, check_options, zeros
from fm_jax.models.stack import run_blocks
from fm_jax.shapes import batch_time
from fm_jax.types import Array, Cond


class LightningBlock(nn.Module):
    """A block of `LightningDiT`; the identity at initialisation, because the gates start at zero."""

    num_heads: int
    mlp_hidden: int
    dropout: float
    compute: Compute = Compute()
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array, angles: Array, mask: Array | None, train: bool) -> Array:
        """Maps tokens [batch, n, d], seen where `mask` is, with emb [batch, d] and angles [n, d / heads / 2].

        Where it is `causal`, a token sees itself and those before it alone.
        """
        width, dtype = x.shape[-1], self.compute.dtype
        modulation = Dense(6 * width, kernel_init=zeros, dtype=dtype, name="modulation")(nn.silu(emb))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(modulation[:, None, :], 6, axis=-1)
        drop = nn.Dropout(self.dropout, deterministic=not train)

        h = modulate(rms_norm(dtype, "norm_attention")(x), shift_a, scale_a)
        q, k, v = (
            to_heads(self.num_heads, width // self.num_heads, dtype, f"attention_{name}")(h)
            for name in ("query", "key", "value")
        )
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        h = attend(q, k, v, mask=mask, causal=self.causal, implementation=self.compute.attention)
        x = x + gate_a * drop(from_heads(width, dtype, "attention_out")(h))

        h = modulate(rms_norm(dtype, "norm_mlp")(x), shift_m, scale_m)
        gate = Dense(self.mlp_hidden, dtype=dtype, name="mlp_gate")(h)
        h = nn.silu(gate) * Dense(self.mlp_hidden, dtype=dtype, name="mlp_in")(h)
        return x + gate_m * drop(Dense(width, dtype=dtype, name="mlp_out")(h))


class LightningDiT(nn.Module):
    """A `DiT` with RMS normalisation, gated MLPs (SwiGLU) and rotary positions beside the fixed table.

    Attributes:
        patch_size: side of a patch.
        hidden: width of the tokens, divisible by 4 and by `num_heads`; the width of a head by 4.
        num_layers: number of blocks.
        num_heads: attention heads.
        mlp_hidden: width of the gated layer; two thirds of `4 hidden` by default.
        out_channels: channels of the output; those of the input by default.
        dropout: dropout rate at the end of both branches of a block.
        embed: module from a condition to a vector, see `fm_jax.models.embed`.
        border: between our time and sign and those of the network.
        compute: dtype, attention and rematerialisation.
        scan_layers: whether the blocks are one stacked block in a loop, as in `DiT`.
        token_dim: width of tokens in the sequence, as in `DiT`; they do not turn.

    References:
        Yao et al. 2025, "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models",
        section 4; Shazeer 2020, "GLU Variants Improve Transformer", equation 6; Su et al. 2021, "RoFormer".
    """

    patch_size: int = 1
    hidden: int = 384
    num_layers: int = 12
    num_heads: int = 6
    mlp_hidden: int | None = None
    out_channels: int | None = None
    dropout: float = 0.0
    embed: nn.Module | None = None
    border: Border = SIT
    compute: Compute = Compute()
    scan_layers: bool = True
    token_dim: int | None = None

    def __post_init__(self) -> None:
        check_options(embed=self.embed, dropout=self.dropout, compute=self.compute)
        check_bool("scan_layers", self.scan_layers)
        check_border(self.border)
        check_token_dim(self.token_dim, self.embed)
        for name in ("patch_size", "hidden", "num_layers", "num_heads"):
            check_integer(name, getattr(self, name))
        for name in ("mlp_hidden", "out_channels"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        if self.hidden % (4 * self.num_heads):
            raise ValueError(
                f"hidden must be divisible by 4 num_heads = {4 * self.num_heads}, as channels turn in pairs on two "
                f"axes, got {self.hidden}."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, scalar or [batch].
            x: latents, [batch, height, width, channels].
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
        rows, columns = height // self.patch_size, width // self.patch_size
        time = TimeEmbedding(256, self.hidden, time_scale=1.0, kernel_init=small_normal, name="time")
        taken = fields_read(self.token_dim, cond)
        emb = add_condition(time(self.border.time(batch_time(t, x))), self.embed, cond, taken)
        dtype, mask = self.compute.dtype, None

        h = Dense(self.hidden, dtype=dtype, name="patches")(patchify(x, self.patch_size))
        h = h + jnp.asarray(position_features(rows, columns, self.hidden), dtype)[None]
        half = self.hidden // self.num_heads // 2
        ids = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), axis=-1).reshape(-1, 2)
        angles = np.asarray(rope_angles(ids, (half, half)))
        if self.token_dim is not None:
            h, mask = append_tokens(h, cond, self.token_dim, dtype)
            angles = np.pad(angles, ((0, h.shape[1] - rows * columns), (0, 0)))  # they do not turn

        options = {
            "num_heads": self.num_heads,
            "mlp_hidden": int(2 / 3 * 4 * self.hidden) if self.mlp_hidden is None else self.mlp_hidden,
            "dropout": self.dropout,
            "compute": self.compute,
        }
        scan, remat = self.scan_layers, self.compute.remat
        args = (emb, jnp.asarray(angles, jnp.float32), mask)
        h = run_blocks(LightningBlock, options, self.num_layers, h, *args, train=train, scan=scan, remat=remat)
        h = h[:, : rows * columns] if self.token_dim is not None else h

        modulation = Dense(2 * self.hidden, kernel_init=zeros, name="modulation")(nn.silu(emb))[:, None, :]
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h = modulate(rms_norm(jnp.float32, "norm")(h), shift, scale)
        h = Dense(self.patch_size**2 * (self.out_channels or channels), kernel_init=zeros, name="out")(h)
        return self.border.output(unpatchify(h, self.patch_size, height, width))


LIGHTNING_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 128, "num_layers": 4, "num_heads": 4, "patch_size": 2},
    "XL/1": {"hidden": 1152, "num_layers": 28, "num_heads": 16, "patch_size": 1},
}


def make_lightning(name: str, **overrides: Any) -> LightningDiT:
    """Builds a LightningDiT by the name of its size.

    Args:
        name: `"tiny"`, or `"XL/1"`, for latents of 16x16x32.
        **overrides: attributes of `LightningDiT` to change, such as `embed`.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> make_lightning("XL/1").num_layers
        28
    """
    check_member("name", name, tuple(LIGHTNING_CONFIGS))
    return LightningDiT(**(LIGHTNING_CONFIGS[name] | overrides))
