"""The U-Net of the diffusion literature, and the sizes that published results were made with."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_integer, check_member, shown
from fm_jax.models.compute import Compute
from fm_jax.models.embed import add_condition
from fm_jax.models.layers import (
    SelfAttention,
    TimeEmbedding,
    check_image,
    check_options,
    check_widths,
    conv3x3,
    depth_to_space,
    double,
    group_norm,
    halve,
    space_to_depth,
    zeros,
)
from fm_jax.shapes import batch_time
from fm_jax.types import Array, Cond

Resample = Literal["conv", "pool", "resblock"]


class ResBlock(nn.Module):
    """Two normalised convolutions around a time conditioning, added to the input; the identity at initialisation.

    `x' + conv(silu(condition(norm(conv(silu(norm(x)))))))`, where `x'` is `x`, through a 1x1 convolution if the
    number of channels changes. FiLM conditions by `norm(h) (1 + scale) + shift`, otherwise by `norm(h + shift)`.

    Notebooks: (9.4).

    Attributes:
        features: output channels.
        film: scale and shift (FiLM) instead of only shift.
        resize: applied to the input of the first convolution and to `x`: `halve`, `double`, or `None`.
        dropout, num_groups, compute: see `UNet`.
    """

    features: int
    film: bool
    dropout: float
    num_groups: int
    compute: Compute = Compute()
    resize: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        """Maps `x` [batch, h, w, c] and the embedding [batch, d] to [batch, h', w', features]."""
        dtype = self.compute.dtype
        h = nn.silu(group_norm(x.shape[-1], self.num_groups, dtype, "norm_in")(x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = conv3x3(self.features, dtype, "conv_in")(h)
        width = 2 * self.features if self.film else self.features
        modulation = jnp.expand_dims(nn.Dense(width, dtype=dtype, name="embed")(nn.silu(emb)), (1, 2))
        norm = group_norm(self.features, self.num_groups, dtype, "norm_out")
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


class AttentionBlock(nn.Module):
    """Normalised self-attention over the pixels, added to the input; the identity at initialisation."""

    num_heads: int
    num_groups: int
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = group_norm(x.shape[-1], self.num_groups, self.compute.dtype, "norm")
        h = norm(x).reshape(x.shape[0], -1, x.shape[-1])
        attend = SelfAttention(self.num_heads, out_init=zeros, compute=self.compute, name="attention")
        return x + attend(h).reshape(x.shape)


class UNet(nn.Module):
    """A convolutional U-Net with residual blocks, attention and time (and other) conditioning; zero at initialisation.

    Level 0 is the full resolution; each further level halves it. Every level has `num_blocks` residual blocks on the
    way down and `num_blocks + 1` on the way up, which see the matching activations of the way down.

    Notebooks: (9.5).

    Attributes:
        channels: base number of channels.
        channel_mults: channels of each level, in units of `channels`.
        num_blocks: residual blocks of a level.
        attention_levels: levels whose residual blocks are followed by attention. The middle always has it.
        num_heads: attention heads, unless `head_channels` is set.
        head_channels: channels of a head; the number of heads follows.
        film: time conditioning by scale and shift instead of only shift.
        resample: between levels, a strided convolution down and nearest neighbours with a convolution up (`"conv"`),
            averages down and nearest neighbours up (`"pool"`), or the same inside a residual block (`"resblock"`).
        patch_size: squares of this size become the channels of one pixel before the first convolution, and are put
            back after the last: a U-Net on a smaller image, for little compute.
        out_channels: channels of the output; those of the input by default.
        num_groups: upper limit for the number of groups of the normalisation, see `num_norm_groups`.
        dropout: dropout rate inside residual blocks.
        embed: module from a condition to a vector, see `fm_jax.models.embed`; `None` for an unconditional field.
        compute: dtype, attention and rematerialisation.

    References:
        Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B; Dhariwal & Nichol 2021, "Diffusion
        Models Beat GANs on Image Synthesis", section 3; Perez et al. 2018, "FiLM", equation 2.
    """

    channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 1
    head_channels: int | None = None
    film: bool = True
    resample: Resample = "conv"
    patch_size: int = 1
    out_channels: int | None = None
    num_groups: int = 32
    dropout: float = 0.0
    embed: nn.Module | None = None
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=self.embed, dropout=self.dropout, compute=self.compute)
        check_member("resample", self.resample, get_args(Resample))
        check_widths("channel_mults", self.channel_mults)
        check_bool("film", self.film)
        for name in ("channels", "num_blocks", "num_heads", "num_groups", "patch_size"):
            check_integer(name, getattr(self, name))
        for name in ("head_channels", "out_channels"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        num_levels = len(self.channel_mults)
        if not isinstance(self.attention_levels, tuple | list):
            raise ValueError(f"attention_levels must be a tuple of levels, got {shown(self.attention_levels)}.")
        for i, level in enumerate(self.attention_levels):
            check_integer(f"attention_levels[{i}]", level, least=0)
            if level >= num_levels:
                raise ValueError(f"attention_levels must lie in 0, ..., {num_levels - 1}, got {self.attention_levels}.")
        for level in {*self.attention_levels, num_levels - 1}:
            width = self.channels * self.channel_mults[level]
            divisor = self.num_heads if self.head_channels is None else self.head_channels
            if width % divisor:
                name = "num_heads" if self.head_channels is None else "head_channels"
                raise ValueError(f"{name} must divide the {width} channels of level {level}, got {divisor}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, scalar or [batch].
            x: images, [batch, height, width, channels].
            cond: what `embed` takes, or `None` for "no condition".
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            float32, [batch, height, width, out_channels].

        Raises:
            ValueError: if `x` is no image, its sides do not halve often enough, or `cond` does not fit the model.
        """
        last = len(self.channel_mults) - 1
        check_image(x, self.patch_size * 2**last)
        x = space_to_depth(x.astype(jnp.float32), self.patch_size)
        emb = TimeEmbedding(self.channels, 4 * self.channels, name="time")(batch_time(t, x))
        emb = add_condition(emb, self.embed, cond)
        dtype = self.compute.dtype
        # Names are explicit so that parameters do not depend on `remat`, which renames classes.
        res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.compute.remat else ResBlock
        attention_block = nn.remat(AttentionBlock) if self.compute.remat else AttentionBlock

        def residual(h: Array, features: int, name: str, resize: Callable[[Array], Array] | None = None) -> Array:
            block = res_block(features, self.film, self.dropout, self.num_groups, self.compute, resize, name=name)
            return block(h, emb, train)

        def attend(h: Array, name: str) -> Array:
            heads = self.num_heads if self.head_channels is None else h.shape[-1] // self.head_channels
            return attention_block(heads, self.num_groups, self.compute, name=name)(h)

        def down(h: Array, name: str) -> Array:
            if self.resample == "resblock":
                return residual(h, h.shape[-1], name, halve)
            return halve(h) if self.resample == "pool" else conv3x3(h.shape[-1], dtype, name, stride=2)(h)

        def up(h: Array, name: str) -> Array:
            if self.resample == "resblock":
                return residual(h, h.shape[-1], name, double)
            return double(h) if self.resample == "pool" else conv3x3(h.shape[-1], dtype, name)(double(h))

        h = conv3x3(self.channels * self.channel_mults[0], dtype, "stem")(x)
        skips = [h]
        for level, mult in enumerate(self.channel_mults):
            for block in range(self.num_blocks):
                h = residual(h, self.channels * mult, f"down_{level}_{block}")
                if level in self.attention_levels:
                    h = attend(h, f"down_{level}_{block}_attention")
                skips.append(h)
            if level < last:
                h = down(h, f"down_{level}_resample")
                skips.append(h)

        h = residual(h, h.shape[-1], "middle_0")
        h = attend(h, "middle_attention")
        h = residual(h, h.shape[-1], "middle_1")

        for level, mult in reversed(list(enumerate(self.channel_mults))):
            for block in range(self.num_blocks + 1):
                h = residual(jnp.concatenate([h, skips.pop()], axis=-1), self.channels * mult, f"up_{level}_{block}")
                if level in self.attention_levels:
                    h = attend(h, f"up_{level}_{block}_attention")
            if level > 0:
                h = up(h, f"up_{level}_resample")

        h = nn.silu(group_norm(h.shape[-1], self.num_groups, jnp.float32, "norm")(h))
        out_channels = x.shape[-1] if self.out_channels is None else self.out_channels * self.patch_size**2
        return depth_to_space(conv3x3(out_channels, jnp.float32, "out", init=zeros)(h), self.patch_size)


# Averages instead of strided convolutions, whose gradients are slow on a CPU.
_SMALL: dict[str, Any] = {
    "channel_mults": (1, 2),
    "num_blocks": 1,
    "attention_levels": (1,),
    "num_heads": 4,
    "resample": "pool",
    "num_groups": 8,
}
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    # 8x8 digits on a CPU.
    "tiny": _SMALL | {"channels": 24},
    # 28x28 MNIST on a CPU: the same on 14x14 squares of four pixels.
    "mnist_fast": _SMALL | {"channels": 32, "patch_size": 2},
    # 28x28 MNIST, the size of TorchCFM's notebooks.
    "mnist": {
        "channels": 32,
        "channel_mults": (1, 2, 2),
        "num_blocks": 1,
        "attention_levels": (2,),
        "num_heads": 4,
        "film": False,
    },
    # Tong et al. 2023, "Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport".
    "cifar10": {
        "channels": 128,
        "channel_mults": (1, 2, 2, 2),
        "num_blocks": 2,
        "attention_levels": (1,),
        "head_channels": 64,
        "film": False,
        "dropout": 0.1,
    },
    # Lipman et al. 2024, "Flow Matching Guide and Code", the CIFAR-10 example.
    "cifar10_edm": {
        "channels": 128,
        "channel_mults": (2, 2, 2),
        "num_blocks": 4,
        "attention_levels": (1,),
        "num_heads": 1,
        "resample": "pool",
        "dropout": 0.3,
    },
}


def make_unet(name: str, **overrides: Any) -> UNet:
    """Builds a U-Net by the name of its size.

    Args:
        name: `"tiny"` (8x8 digits), `"mnist_fast"`, `"mnist"`, `"cifar10"` (35,746,307 parameters) or `"cifar10_edm"`
            (55,676,419).
        **overrides: attributes of `UNet` to change, such as `embed`.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> from fm_jax.models.embed import LabelEmbedding
        >>> make_unet("cifar10", embed=LabelEmbedding(10)).channel_mults
        (1, 2, 2, 2)
    """
    check_member("name", name, tuple(UNET_CONFIGS))
    return UNet(**(UNET_CONFIGS[name] | overrides))
