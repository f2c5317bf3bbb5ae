"""The U-Net with spatial transformers of latent diffusion: Stable Diffusion 1, 2 and XL."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_condition, check_integer, check_member, shown
from fm_jax.models.attention import attend, from_heads, layer_norm, to_heads
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import DDPM, Border, Conditions
from fm_jax.models.dense import Dense
from fm_jax.models.layers import (
    TimeEmbedding,
    check_image,
    check_options,
    check_widths,
    conv3x3,
    double,
    group_norm,
    sinusoidal_features,
    zeros,
)
from fm_jax.models.stack import run_blocks
from fm_jax.models.unet import ResBlock
from fm_jax.shapes import batch_time
from fm_jax.types import Array


class VectorEmbedding(nn.Module):
    """Embeds pooled text and numbers: `W2 silu(W1 [pooled, features(n_1), features(n_2), ...] + b1) + b2`, float32."""

    num_sizes: int
    size_features: int
    features: int

    @nn.compact
    def __call__(self, vector: Any) -> Array:
        """Maps `vector` [batch, pooled + num_sizes] to float32 [batch, features]."""
        pooled, sizes = jnp.split(vector.astype(jnp.float32), [vector.shape[1] - self.num_sizes], axis=1)
        waves = sinusoidal_features(sizes.reshape(-1), self.size_features, scale=1.0)
        h = jnp.concatenate([pooled, waves.reshape(vector.shape[0], -1)], axis=1)
        return Dense(self.features, name="out")(nn.silu(Dense(self.features, name="in")(h)))


class Attention(nn.Module):
    """Attention of tokens to a sequence, with a bias in the last projection alone."""

    num_heads: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array, tokens: Array, mask: Array | None = None) -> Array:
        """Maps `x` [batch, n, d], which asks, and `tokens` [batch, m, e] to [batch, n, d]."""
        width, dtype = x.shape[-1], self.compute.dtype
        project = partial(to_heads, self.num_heads, width // self.num_heads, dtype, use_bias=False)
        q, k, v = project("query")(x), project("key")(tokens), project("value")(tokens)
        h = attend(q, k, v, mask=mask, implementation=self.compute.attention)
        return from_heads(width, dtype, "out")(h)


class TransformerBlock(nn.Module):
    """Attention to the pixels, attention to the text, and an MLP of `value gelu(gate)`, with the GELU by `erf`."""

    num_heads: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, h: Array, tokens: Array, mask: Array | None, train: bool) -> Array:
        """Maps pixels [batch, n, d] and text [batch, m, e] to pixels; `train` changes nothing."""
        width, dtype = h.shape[-1], self.compute.dtype
        norm = partial(layer_norm, dtype, affine=True, epsilon=1e-5)
        seen = norm("norm_self")(h)
        h = h + Attention(self.num_heads, self.compute, name="self_attention")(seen, seen)
        seen = norm("norm_cross")(h)
        h = h + Attention(self.num_heads, self.compute, name="cross_attention")(seen, tokens, mask)
        seen = norm("norm_mlp")(h)
        value = Dense(4 * width, dtype=dtype, name="mlp_in")(seen)
        gate = Dense(4 * width, dtype=dtype, name="mlp_gate")(seen)
        return h + Dense(width, dtype=dtype, name="mlp_out")(value * nn.gelu(gate, approximate=False))


class SpatialTransformer(nn.Module):
    """Transformer blocks on the pixels of an image, added to it; the identity at initialisation."""

    num_layers: int
    num_heads: int
    num_groups: int
    compute: Compute = Compute()
    scan_layers: bool = True

    @nn.compact
    def __call__(self, x: Array, tokens: Array | None, mask: Array | None, train: bool) -> Array:
        """Maps an image [batch, h, w, c] and text [batch, m, e] to an image."""
        channels, dtype = x.shape[-1], self.compute.dtype
        h = group_norm(channels, self.num_groups, dtype, "norm", epsilon=1e-6)(x)
        h = Dense(channels, dtype=dtype, name="in")(h.reshape(x.shape[0], -1, channels))
        options = {"num_heads": self.num_heads, "compute": self.compute}
        loop: dict[str, Any] = {"train": train, "scan": self.scan_layers, "remat": self.compute.remat}
        h = run_blocks(TransformerBlock, options, self.num_layers, h, tokens, mask, **loop)
        h = Dense(channels, kernel_init=zeros, dtype=dtype, name="out")(h)
        return x + h.reshape(x.shape)


class UNetCondition(nn.Module):
    """A U-Net that sees text by cross-attention; zero at initialisation.

    Level 0 is the full resolution; each further level halves it. It returns the raw prediction: the noise for Stable
    Diffusion 1, 2-base and XL, and `v = alpha noise - sigma data` for 2.1 at 768 pixels, where `alpha v + sigma x_t` is
    the noise; `fm_jax.parameterization` makes any other description of it.

    Conditions: `tokens` [batch, n, token_width], encoded text, always; `mask` [batch, n], which of them are seen; with
    `vector_width`, `vector` [batch, vector_width + num_sizes], float32: the pooled text and behind it plain numbers,
    those of SDXL in pixels: original height and width, top and left of the crop, height and width; `local`
    [batch, h, w, c], channels behind those of `x`, such as mask and masked latents of a network that fills holes.

    Attributes:
        in_channels, out_channels: channels of `x` and `cond.local` together; channels of the output.
        widths: channels of each level.
        num_blocks: residual blocks of a level on the way down; one more on the way up.
        attention_levels: levels whose residual blocks are followed by a transformer. The middle always has one.
        num_heads: attention heads of each level, the last for the middle too; diffusers' `attention_head_dim`.
        num_layers: transformer blocks in a transformer of each level, the last for the middle too.
        token_width: width of the text tokens.
        vector_width: width of the pooled text; `None` for a network that takes no `cond.vector`.
        num_sizes, size_features: how many numbers stand behind the pooled text; sines and cosines of each.
        num_groups: groups of the normalisation; divides all widths.
        linear_projections: in files, linear layers around a transformer; otherwise, the same as 1x1 convolutions.
        dropout: dropout rate inside residual blocks.
        border: between our time and the network's.
        compute: dtype, attention and rematerialisation.
        scan_layers: trace and compile one block of each transformer and loop over it; see `DiT`.

    References:
        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.3; Podell et al.
        2023, "SDXL", sections 2.1 and 2.2, table 1.
    """

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = (0, 1, 2)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    num_layers: tuple[int, ...] = (1, 1, 1, 1)
    token_width: int = 768
    vector_width: int | None = None
    num_sizes: int = 6
    size_features: int = 256
    num_groups: int = 32
    linear_projections: bool = False
    dropout: float = 0.0
    border: Border = DDPM
    compute: Compute = Compute()
    scan_layers: bool = True

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=self.dropout, compute=self.compute)
        more = () if self.vector_width is None else ("vector_width", "num_sizes", "size_features")
        for name in ("in_channels", "out_channels", "num_blocks", "token_width", "num_groups", *more):
            check_integer(name, getattr(self, name))
        for name in ("linear_projections", "scan_layers"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.border, Border):
            raise ValueError(f"border must be a Border, such as DDPM, got {shown(self.border)}.")
        for name in ("widths", "num_heads", "num_layers"):
            check_widths(name, getattr(self, name))
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name} must be as many numbers as widths, got {getattr(self, name)}.")
        last = len(self.widths) - 1
        if not isinstance(self.attention_levels, tuple | list):
            raise ValueError(f"attention_levels must be a tuple of levels, got {shown(self.attention_levels)}.")
        for i, level in enumerate(self.attention_levels):
            check_integer(f"attention_levels[{i}]", level, least=0, most=last)
        for level, (width, heads) in enumerate(zip(self.widths, self.num_heads, strict=True)):
            if width % self.num_groups or width % 2:
                raise ValueError(f"widths must be even and divisible by num_groups={self.num_groups}, got {width}.")
            if width % heads and level in (*self.attention_levels, last):
                raise ValueError(f"num_heads[{level}] must divide widths[{level}]={width}, got {heads}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Conditions | None = None, *, train: bool = False) -> Array:
        """Evaluates the prediction.

        Args:
            t: time, ours, scalar or [batch].
            x: images or latents, [batch, height, width, channels].
            cond: `Conditions` with `tokens`.
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            float32, [batch, height, width, out_channels].

        Raises:
            ValueError: if `x` is no image whose sides each further level can halve, or `cond` does not fit the model.
        """
        last = len(self.widths) - 1
        check_image(x, 2**last)
        cond = self._checked(x, cond)
        tokens, mask, dtype = cond.tokens, cond.mask, self.compute.dtype
        x = x.astype(jnp.float32)
        embed = TimeEmbedding(self.widths[0], 4 * self.widths[0], time_scale=1.0, name="time")
        emb = embed(self.border.time(batch_time(t, x)))
        if self.vector_width is not None:
            emb = emb + VectorEmbedding(self.num_sizes, self.size_features, emb.shape[1], name="vector")(cond.vector)
        if cond.local is not None:
            x = jnp.concatenate([x, cond.local.astype(jnp.float32)], axis=-1)

        res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.compute.remat else ResBlock

        def residual(h: Array, level: int, name: str) -> Array:
            block = res_block(self.widths[level], False, self.dropout, self.num_groups, self.compute, name=name)
            return block(h, emb, train)

        def look(h: Array, level: int, name: str) -> Array:
            options = self.num_layers[level], self.num_heads[level], self.num_groups, self.compute, self.scan_layers
            return SpatialTransformer(*options, name=name)(h, tokens, mask, train)

        def both(h: Array, level: int, name: str) -> Array:
            h = residual(h, level, name)
            return look(h, level, f"{name}_transformer") if level in self.attention_levels else h

        h = conv3x3(self.widths[0], dtype, "stem")(x)
        skips = [h]
        for level, width in enumerate(self.widths):
            for i in range(self.num_blocks):
                h = both(h, level, f"down_{level}_{i}")
                skips.append(h)
            if level < last:
                h = conv3x3(width, dtype, f"down_{level}_resample", stride=2)(h)
                skips.append(h)
        h = look(residual(h, last, "middle_0"), last, "middle_transformer")
        h = residual(h, last, "middle_1")
        for level in reversed(range(last + 1)):
            for i in range(self.num_blocks + 1):
                h = both(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_{i}")
            if level > 0:
                h = conv3x3(self.widths[level], dtype, f"up_{level}_resample")(double(h))

        h = nn.silu(group_norm(h.shape[-1], self.num_groups, jnp.float32, "norm")(h))
        return self.border.output(conv3x3(self.out_channels, jnp.float32, "out", init=zeros)(h))

    def _checked(self, x: Array, cond: Any) -> Conditions:
        """The conditions, or `ValueError`."""
        if not isinstance(cond, Conditions) or cond.tokens is None:
            got = "Conditions without them" if isinstance(cond, Conditions) else shown(cond)
            raise ValueError(f"cond must be Conditions with tokens [batch, n, {self.token_width}], got {got}.")
        check_condition(x, cond)
        tokens, mask, vector, local = cond.tokens, cond.mask, cond.vector, cond.local
        for name in ("label", "guidance", "vector")[: 3 if self.vector_width is None else 2]:
            if getattr(cond, name) is not None:
                raise ValueError(f"cond.{name} must be None, as this network takes none, got one.")
        if tokens.ndim != 3 or tokens.shape[2] != self.token_width or not jnp.issubdtype(tokens.dtype, jnp.floating):
            raise ValueError(f"cond.tokens must be floating point [batch, n, {self.token_width}], got {shown(tokens)}.")
        if mask is not None and (mask.dtype != bool or mask.shape != tokens.shape[:2]):
            raise ValueError(f"cond.mask must be bool [batch, n] = {tokens.shape[:2]}, got {shown(mask)}.")
        if self.vector_width is not None:
            shape = (x.shape[0], self.vector_width + self.num_sizes)
            if vector is None or vector.shape != shape or vector.dtype.itemsize < 4:
                wanted = f"[batch, {self.vector_width} of pooled text + {self.num_sizes} numbers]"
                raise ValueError(f"cond.vector must be float32 {wanted}, got {shown(vector)}.")
        if local is not None and local.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"cond.local must be [batch, h, w, c] with the sides of x {x.shape}, got {local.shape}.")
        channels = x.shape[-1] + (0 if local is None else local.shape[-1])
        if channels != self.in_channels:
            raise ValueError(f"x and cond.local must have {self.in_channels} channels together, got {channels}.")
        return cond


UNET_CONDITION_CONFIGS: dict[str, dict[str, Any]] = {
    # 8x8 latents on a CPU.
    "tiny": {"widths": (32, 64), "num_blocks": 1, "attention_levels": (1,), "num_heads": (2, 4), "num_layers": (1, 2)}
    | {"token_width": 32, "num_groups": 8},
    # Rombach et al. 2022; no transformer has a second block to loop over.
    "sd1.5": {"scan_layers": False},
    "sd2": {"num_heads": (5, 10, 20, 20), "token_width": 1024, "linear_projections": True, "scan_layers": False},
    # Podell et al. 2023, table 1.
    "sdxl": {"widths": (320, 640, 1280), "attention_levels": (1, 2), "num_heads": (5, 10, 20), "num_layers": (1, 2, 10)}
    | {"token_width": 2048, "vector_width": 1280, "linear_projections": True},
}


def make_unet_condition(name: str, **overrides: Any) -> UNetCondition:
    """Builds a text-conditional U-Net by the name of its size.

    Args:
        name: `"tiny"` (a CPU), `"sd1.5"` (859,520,964 parameters), `"sd2"` (865,910,724; 2.1 too) or `"sdxl"`
            (2,567,463,684).
        **overrides: attributes of `UNetCondition` to change, such as `in_channels=9` for filling holes.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> make_unet_condition("sdxl").num_layers
        (1, 2, 10)
    """
    check_member("name", name, tuple(UNET_CONDITION_CONFIGS))
    return UNetCondition(**(UNET_CONDITION_CONFIGS[name] | overrides))
