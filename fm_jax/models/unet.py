"""The U-Net of the diffusion literature, and the sizes that published results were made with."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_integer, check_member, check_setting, shown
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import OURS, Border, Conditions, check_border
from fm_jax.models.crossdit import check_tokens
from fm_jax.models.embed import add_condition
from fm_jax.models.layers import (
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
from fm_jax.models.unet_blocks import AttentionBlock, ResBlock, TokenBlock
from fm_jax.shapes import batch_time
from fm_jax.types import Array, Cond

Resample = Literal["conv", "pool", "resblock"]


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
        token_dim: channels of `cond.tokens` [batch, n, token_dim], such as encoded text, that the pixels attend to
            behind every attention, where `cond.mask` [batch, n] is; `cond` is then a `Conditions`. `None` for none.
        positions: whether attention is told where pixels are, by a fixed table of sines and cosines. Convolutions alone
            know it from their padding; what is asked for in a place is found in fewer steps with the table.
        compute: dtype, attention and rematerialisation.
        in_channels: channels of the input, where they are to be checked; the rules of files need them.
        time_channels: number of time features, a quarter of the width of their embedding; `channels` by default.
        frequency_shift, sine_first: of the time features, see `sinusoidal_features`; 1 and true in DDPM's.
        norm_epsilon: of every normalisation; 1e-6 in DDPM's.
        down_padding: zeros before and after each axis in the strided convolutions, (1, 1) or DDPM's (0, 1).
        border: between our time and sign and those of the network. Published weights have another than ours: `DDPM` for
            DDPM and ADM, which predict the noise, `SIT` for TorchCFM.

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
    token_dim: int | None = None
    positions: bool = False
    compute: Compute = Compute()
    in_channels: int | None = None
    time_channels: int | None = None
    frequency_shift: float = 0.0
    sine_first: bool = False
    norm_epsilon: float = 1e-5
    down_padding: tuple[int, int] = (1, 1)
    border: Border = OURS

    def __post_init__(self) -> None:
        check_options(embed=self.embed, dropout=self.dropout, compute=self.compute)
        check_member("resample", self.resample, get_args(Resample))
        check_widths("channel_mults", self.channel_mults)
        check_bool("film", self.film)
        check_bool("positions", self.positions)
        check_bool("sine_first", self.sine_first)
        check_setting(self, "frequency_shift", "[0, 1]")
        check_setting(self, "norm_epsilon", "(0, inf)")
        check_border(self.border)
        if self.down_padding not in ((1, 1), (0, 1)):
            raise ValueError(f"down_padding must be (1, 1) or (0, 1), got {shown(self.down_padding)}.")
        for name in ("channels", "num_blocks", "num_heads", "num_groups", "patch_size"):
            check_integer(name, getattr(self, name))
        for name in ("head_channels", "out_channels", "in_channels", "time_channels", "token_dim"):
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
            cond: what `embed` takes, or `None` for "no condition"; with `token_dim`, `Conditions` with the tokens, and
                what `embed` takes.
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            float32, [batch, height, width, out_channels].

        Raises:
            ValueError: if `x` is no image, its sides do not halve often enough, or `cond` does not fit the model.
        """
        last = len(self.channel_mults) - 1
        check_image(x, self.patch_size * 2**last)
        channels = x.shape[-1]
        x = space_to_depth(x.astype(jnp.float32), self.patch_size)
        if self.in_channels not in (None, channels):
            raise ValueError(f"x must have {self.in_channels} channels, got shape {(*x.shape[:3], channels)}.")
        emb = self._time(batch_time(t, x))
        tokens, mask = self._tokens(x, cond)
        emb = add_condition(emb, self.embed, cond, () if self.token_dim is None else ("tokens", "mask"))
        dtype, epsilon = self.compute.dtype, self.norm_epsilon
        # Names are explicit so that parameters do not depend on `remat`, which renames classes.
        res_block = nn.remat(ResBlock, static_argnums=(3,)) if self.compute.remat else ResBlock
        attention_block = nn.remat(AttentionBlock) if self.compute.remat else AttentionBlock
        token_block = nn.remat(TokenBlock) if self.compute.remat else TokenBlock

        def residual(h: Array, features: int, name: str, resize: Callable[[Array], Array] | None = None) -> Array:
            options = self.film, self.dropout, self.num_groups, self.compute, resize, epsilon
            return res_block(features, *options, name=name)(h, emb, train)

        def attend(h: Array, name: str) -> Array:
            heads = self.num_heads if self.head_channels is None else h.shape[-1] // self.head_channels
            options = heads, self.num_groups, self.compute, epsilon, self.positions
            h = attention_block(*options, name=name)(h)
            if tokens is None:
                return h
            return token_block(*options, name=f"{name}_tokens")(h, tokens, mask)

        def down(h: Array, name: str) -> Array:
            if self.resample == "resblock":
                return residual(h, h.shape[-1], name, halve)
            if self.resample == "pool":
                return halve(h)
            return conv3x3(h.shape[-1], dtype, name, stride=2, padding=self.down_padding)(h)

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

        h = nn.silu(group_norm(h.shape[-1], self.num_groups, jnp.float32, "norm", epsilon=epsilon)(h))
        out_channels = x.shape[-1] if self.out_channels is None else self.out_channels * self.patch_size**2
        h = conv3x3(out_channels, jnp.float32, "out", init=zeros)(h)
        return self.border.output(depth_to_space(h, self.patch_size))

    def _tokens(self, x: Array, cond: Cond) -> tuple[Array | None, Array | None]:
        """The tokens and which of them are seen, or `ValueError` for what are not those of this network."""
        if self.token_dim is None:
            return None, None
        if not isinstance(cond, Conditions):
            raise ValueError(f"cond must be Conditions(tokens=..., mask=...), got {shown(cond)}.")
        check_tokens(cond.tokens, cond.mask, x.shape[0], self.token_dim)
        return cond.tokens, cond.mask

    def _time(self, t: Array) -> Array:
        """Embeds our time [batch]."""
        # Our own border scales the frequencies instead of time, which rounds as trainings before there was one did.
        scale, t = (self.border.scale, t) if self.border == OURS else (1.0, self.border.time(t))
        features = self.channels if self.time_channels is None else self.time_channels
        shift, sine_first = self.frequency_shift, self.sine_first
        return TimeEmbedding(features, 4 * features, scale, shift, sine_first, name="time")(t)


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
