"""The tiny autoencoders that stand in for those of the published systems: TAESD and its relatives."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax import latents
from fm_jax.checks import check_bool, check_integer, check_member, shown
from fm_jax.latents import LatentSpace
from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense
from fm_jax.models.layers import check_image, check_options, check_widths, conv3x3, double, group_norm
from fm_jax.types import Array

EPSILON = 1e-5
"""Of the normalisation of pooled blocks."""
LARGEST = 3.0
"""The decoder squashes latents into (-3, 3)."""


def _plain_conv(features: int, compute: Compute, name: str, stride: int = 1) -> nn.Conv:
    """A 3x3 convolution without a bias."""
    return nn.Conv(features, (3, 3), stride, padding=1, use_bias=False, dtype=compute.dtype, name=name)


class TinyBlock(nn.Module):
    """Three convolutions, added to the input: `relu(x + conv(relu(conv(relu(conv(x))))))`.

    Where it is pooled, four times as many channels, normalised in four groups over the whole image, come first:
    `x + W2 relu(norm(W1 x))` in place of `x`.

    Attributes: see `TinyAutoencoder`.
    """

    pooled: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, h, w, c] to the same shape."""
        width, dtype = x.shape[-1], self.compute.dtype
        if self.pooled:
            h = Dense(4 * width, use_bias=False, dtype=dtype, name="pool_in")(x)
            h = nn.relu(group_norm(4 * width, 4, dtype, "pool_norm", epsilon=EPSILON)(h))
            x = x + Dense(width, use_bias=False, dtype=dtype, name="pool_out")(h)
        h = nn.relu(conv3x3(width, dtype, "conv_0")(x))
        h = nn.relu(conv3x3(width, dtype, "conv_1")(h))
        return nn.relu(x + conv3x3(width, dtype, "conv_2")(h))


class TinyEncoder(nn.Module):
    """From images in [0, 1] to latents. Attributes: see `TinyAutoencoder`."""

    channels: int
    blocks: tuple[int, ...]
    out_channels: int
    pooled: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, f h, f w, c] to float32 [batch, h, w, out_channels]."""
        block = nn.remat(TinyBlock) if self.compute.remat else TinyBlock
        h = conv3x3(self.channels, self.compute.dtype, "stem")(x)
        last = len(self.blocks) - 1
        for level, num in enumerate(self.blocks):
            if level > 0:
                h = _plain_conv(self.channels, self.compute, f"down_{level}_resample", stride=2)(h)
            for i in range(num):
                h = block(self.pooled and level == last, self.compute, name=f"down_{level}_{i}")(h)
        return conv3x3(self.out_channels, jnp.float32, "out")(h)


class TinyDecoder(nn.Module):
    """From latents to images in [0, 1]. Attributes: see `TinyAutoencoder`."""

    channels: int
    blocks: tuple[int, ...]
    out_channels: int
    pooled: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Maps [batch, h, w, latent_channels] to float32 [batch, f h, f w, out_channels]."""
        block = nn.remat(TinyBlock) if self.compute.remat else TinyBlock
        h = LARGEST * jnp.tanh(z / LARGEST)
        h = nn.relu(conv3x3(self.channels, self.compute.dtype, "stem")(h))
        last = len(self.blocks) - 1
        for i, num in enumerate(self.blocks):
            level = last - i
            for j in range(num):
                h = block(self.pooled and level == last, self.compute, name=f"up_{level}_{j}")(h)
            if level > 0:
                h = _plain_conv(self.channels, self.compute, f"up_{level}_resample")(double(h))
        return conv3x3(self.out_channels, jnp.float32, "out")(h)


class TinyAutoencoder(nn.Module):
    """A distilled autoencoder of 2.4M parameters: convolutions, ReLU, and nothing random.

    Images are NHWC in [-1, 1], as everywhere here; the network itself and its own programs take and give [0, 1], into
    which they are mapped inside. Latents are those that a model sees: there is nothing to shift or to scale.

    Attributes:
        channels: of every layer.
        encoder_blocks: blocks of each level, from the full resolution down.
        decoder_blocks: blocks of each level, from the lowest resolution up.
        latent_channels: channels of the latents.
        image_channels: channels of images.
        pooled: whether the blocks at the lowest resolution see the whole image, through a normalisation.
        latents: what a model sees of the latents; the identity for all that are published.
        compute: dtype and rematerialisation.

    Example:
        >>> import jax
        >>> model = make_tiny_autoencoder("taef2")
        >>> x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)  # only shapes, nothing is computed
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> jax.eval_shape(lambda variables, x: model.apply(variables, x, method="encode"), variables, x).shape
        (1, 4, 4, 32)

    References:
        Bohan 2023, "TAESD: Tiny AutoEncoder for Stable Diffusion", https://github.com/madebyollin/taesd.
    """

    channels: int = 64
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    image_channels: int = 3
    pooled: bool = False
    latents: LatentSpace = latents.PIXELS
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("channels", "latent_channels", "image_channels"):
            check_integer(name, getattr(self, name))
        check_bool("pooled", self.pooled)
        for name in ("encoder_blocks", "decoder_blocks"):
            check_widths(name, getattr(self, name))
        if len(self.encoder_blocks) != len(self.decoder_blocks):
            raise ValueError(
                "encoder_blocks and decoder_blocks must have as many levels, got "
                f"{self.encoder_blocks} and {self.decoder_blocks}."
            )
        if not isinstance(self.latents, LatentSpace):
            raise ValueError(f"latents must be a LatentSpace, such as fm_jax.latents.SD, got {shown(self.latents)}.")
        super().__post_init__()

    @property
    def factor(self) -> int:
        """How many times smaller the sides of the latents are than those of the image."""
        return 2 ** (len(self.encoder_blocks) - 1)

    def setup(self) -> None:
        options = (self.pooled, self.compute)
        self.encoder = TinyEncoder(self.channels, self.encoder_blocks, self.latent_channels, *options)
        self.decoder = TinyDecoder(self.channels, self.decoder_blocks, self.image_channels, *options)

    def encode(self, x: Array) -> Array:
        """The latents of images.

        Args:
            x: images in [-1, 1], [batch, height, width, image_channels].

        Returns:
            float32, sides divided by `factor`.

        Raises:
            ValueError: if `x` is no such image, or its sides do not halve often enough.
        """
        check_image(x, self.factor)
        if x.shape[-1] != self.image_channels:
            raise ValueError(f"x must be images of {self.image_channels} channels, got shape {x.shape}.")
        return self.encoder((x.astype(jnp.float32) + 1) / 2)

    def decode(self, z: Array) -> Array:
        """The images of latents.

        Args:
            z: latents, [batch, height, width, latent_channels]; squashed into (-3, 3).

        Returns:
            float32 images, in [-1, 1] but for what the decoder makes of it; sides multiplied by `factor`.

        Raises:
            ValueError: if `z` has another shape.
        """
        if getattr(z, "ndim", 0) != 4 or z.shape[-1] != self.latent_channels:
            raise ValueError(f"z must be [batch, height, width, {self.latent_channels}], got {shown(z)}.")
        return 2 * self.decoder(z.astype(jnp.float32)) - 1

    def __call__(self, x: Array) -> Array:
        """Images [batch, height, width, image_channels] there and back."""
        return self.decode(self.encode(x))


TINY_AUTOENCODER_CONFIGS: dict[str, dict[str, Any]] = {
    # For the latents of Stable Diffusion and of SDXL, by files of their own.
    "sd": {},
    # For the latents of Stable Diffusion 3 and of FLUX.1, by files of their own.
    "16ch": {"latent_channels": 16},
    # For the latents of FLUX.2.
    "taef2": {"latent_channels": 32, "pooled": True},
}


def make_tiny_autoencoder(name: str, **overrides: Any) -> TinyAutoencoder:
    """Builds a tiny autoencoder by its name.

    Args:
        name: `"sd"` (TAESD and TAESDXL, 2,445,063 parameters), `"16ch"` (TAESD3 and TAEF1, 2,458,899) or `"taef2"`
            (TAEF2, 2,677,027).
        **overrides: attributes of `TinyAutoencoder` to change.

    Raises:
        ValueError: if there is no such name.

    Example:
        >>> make_tiny_autoencoder("16ch").latent_channels
        16
    """
    check_member("name", name, tuple(TINY_AUTOENCODER_CONFIGS))
    return TinyAutoencoder(**(TINY_AUTOENCODER_CONFIGS[name] | overrides))
