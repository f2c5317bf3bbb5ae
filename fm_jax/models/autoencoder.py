"""The convolutional autoencoder of latent diffusion, with a diagonal Gaussian for the latents of an image."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax import latents
from fm_jax.checks import check_bool, check_has, check_integer, check_key, check_member, shown
from fm_jax.latents import LatentSpace
from fm_jax.models.autoencoder_blocks import ResidualBlock, middle, norm
from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense
from fm_jax.models.layers import check_image, check_options, check_widths, conv3x3, double
from fm_jax.types import Array, Key, Params

DOWN_PADDING = ((0, 1), (0, 1))
"""Of the strided convolutions: zeros below and to the right of the image alone."""
LOG_VARIANCE = (-30.0, 20.0)
"""What logarithms of variances are clipped to."""


class Moments(NamedTuple):
    """Diagonal Gaussians over latents.

    Attributes:
        mean: [batch, height, width, channels].
        log_variance: logarithm of the variance, alike, from -30 to 20.
    """

    mean: Array
    log_variance: Array


def sample_moments(key: Key, moments: Moments) -> Array:
    """One draw of the latents of each image, `mean + exp(log_variance / 2) noise`.

    Args:
        key: PRNG key.
        moments: what `Autoencoder.encode` gives.

    Returns:
        As `moments.mean`.

    Raises:
        ValueError: if `moments` are none, or `key` is not one key.
    """
    check_key(key)
    if not isinstance(moments, tuple) or len(moments) != 2:
        raise ValueError(f"moments must be Moments, as Autoencoder.encode gives, got {shown(moments)}.")
    mean, log_variance = moments
    return mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)


class Encoder(nn.Module):
    """From images to `out_channels` numbers a latent pixel. Attributes: see `Autoencoder`."""

    channels: tuple[int, ...]
    num_blocks: int
    out_channels: int
    num_groups: int
    attention: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, f h, f w, c] to float32 [batch, h, w, out_channels]."""
        dtype = self.compute.dtype
        block = nn.remat(ResidualBlock) if self.compute.remat else ResidualBlock
        h = conv3x3(self.channels[0], dtype, "stem")(x)
        for level, features in enumerate(self.channels):
            for i in range(self.num_blocks):
                h = block(features, self.num_groups, self.compute, name=f"down_{level}_{i}")(h)
            if level < len(self.channels) - 1:
                name = f"down_{level}_resample"
                h = nn.Conv(features, (3, 3), 2, padding=DOWN_PADDING, dtype=dtype, name=name)(h)
        h = middle(h, self.num_groups, self.attention, self.compute)
        h = nn.silu(norm(h.shape[-1], self.num_groups, jnp.float32, "norm")(h))
        return conv3x3(self.out_channels, jnp.float32, "out")(h)


class Decoder(nn.Module):
    """From latents to images of `out_channels`. Attributes: see `Autoencoder`."""

    channels: tuple[int, ...]
    num_blocks: int
    out_channels: int
    num_groups: int
    attention: bool
    compute: Compute = Compute()

    @nn.compact
    def __call__(self, z: Array) -> Array:
        """Maps [batch, h, w, latent_channels] to float32 [batch, f h, f w, out_channels]."""
        dtype = self.compute.dtype
        block = nn.remat(ResidualBlock) if self.compute.remat else ResidualBlock
        h = conv3x3(self.channels[-1], dtype, "stem")(z)
        h = middle(h, self.num_groups, self.attention, self.compute)
        for level, features in reversed(list(enumerate(self.channels))):
            for i in range(self.num_blocks + 1):
                h = block(features, self.num_groups, self.compute, name=f"up_{level}_{i}")(h)
            if level > 0:
                h = conv3x3(features, dtype, f"up_{level}_resample")(double(h))
        h = nn.silu(norm(h.shape[-1], self.num_groups, jnp.float32, "norm")(h))
        return conv3x3(self.out_channels, jnp.float32, "out")(h)


class Autoencoder(nn.Module):
    """A variational autoencoder of images, `AutoencoderKL` of the published systems.

    Images are NHWC in [-1, 1]. `encode` and `decode` speak of the autoencoder's own latents; those that a model sees
    are `latent_space(module, params).to_model(z)`.

    Attributes:
        channels: of each level; every further one halves the sides, so that an image is reduced `2^(levels - 1)` times.
        num_blocks: residual blocks of a level; the decoder has one more.
        latent_channels: channels of the latents.
        image_channels: channels of images.
        decoder_channels: of each level of the decoder, where they are others.
        num_groups: groups of the normalisation; divides every number of channels.
        attention: whether the pixels of the lowest resolution attend to each other.
        quantize: whether 1x1 convolutions end the encoder and begin the decoder.
        statistics: whether the parameters hold means and variances of 2x2 squares of latents, as FLUX.2's do; they
            take no part in `encode` and `decode`, and no optimiser should see them.
        latents: what a model sees of the latents; with `statistics` those say it.
        compute: dtype and rematerialisation. In float16, as some weights are published, SDXL's activations overflow:
            float32 and bfloat16 have the range.

    Example:
        >>> model = make_autoencoder("tiny")
        >>> x = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)  # only shapes, nothing is computed
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> jax.eval_shape(lambda variables, x: model.apply(variables, x, method="encode"), variables, x).mean.shape
        (1, 7, 7, 4)

    References:
        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and appendix
        G; Kingma & Welling 2014, "Auto-Encoding Variational Bayes", appendix B.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    num_blocks: int = 2
    latent_channels: int = 4
    image_channels: int = 3
    decoder_channels: tuple[int, ...] | None = None
    num_groups: int = 32
    attention: bool = True
    quantize: bool = True
    statistics: bool = False
    latents: LatentSpace = latents.PIXELS
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("num_blocks", "latent_channels", "image_channels", "num_groups"):
            check_integer(name, getattr(self, name))
        for name in ("attention", "quantize", "statistics"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.latents, LatentSpace):
            raise ValueError(f"latents must be a LatentSpace, such as fm_jax.latents.SD, got {shown(self.latents)}.")
        check_widths("channels", self.channels)
        if self.decoder_channels is not None:
            check_widths("decoder_channels", self.decoder_channels)
            if len(self.decoder_channels) != len(self.channels):
                raise ValueError(
                    f"decoder_channels must have as many levels as channels={self.channels}, got "
                    f"{self.decoder_channels}."
                )
        for width in (*self.channels, *(self.decoder_channels or ())):
            if width % self.num_groups:
                raise ValueError(f"num_groups must divide the channels of every level, {width}, got {self.num_groups}.")
        super().__post_init__()

    @property
    def factor(self) -> int:
        """How many times smaller the sides of the latents are than those of the image."""
        return 2 ** (len(self.channels) - 1)

    def setup(self) -> None:
        options = (self.num_groups, self.attention, self.compute)
        self.encoder = Encoder(self.channels, self.num_blocks, 2 * self.latent_channels, *options)
        decoder_channels = self.decoder_channels or self.channels
        self.decoder = Decoder(decoder_channels, self.num_blocks, self.image_channels, *options)
        if self.quantize:
            self.encoder_out = Dense(2 * self.latent_channels)
            self.decoder_in = Dense(self.latent_channels)
        if self.statistics:
            size = (4 * self.latent_channels,)
            self.latent_mean = self.param("latent_mean", nn.initializers.zeros_init(), size)
            self.latent_variance = self.param("latent_variance", nn.initializers.ones_init(), size)

    def encode(self, x: Array) -> Moments:
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
        h = self.encoder(x.astype(jnp.float32))
        if self.quantize:
            h = self.encoder_out(h)
        mean, log_variance = jnp.split(h, 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCE))

    def decode(self, z: Array) -> Array:
        """The images of latents.

        Args:
            z: the autoencoder's own latents, not those that a model sees, [batch, height, width, latent_channels].

        Returns:
            float32 images, in [-1, 1] but for what the decoder makes of it; sides multiplied by `factor`.

        Raises:
            ValueError: if `z` has another shape.
        """
        if getattr(z, "ndim", 0) != 4 or z.shape[-1] != self.latent_channels:
            raise ValueError(f"z must be [batch, height, width, {self.latent_channels}], got {shown(z)}.")
        z = z.astype(jnp.float32)
        return self.decoder(self.decoder_in(z) if self.quantize else z)

    def __call__(self, x: Array) -> Array:
        """Images [batch, height, width, image_channels] there and back, through the means of their latents."""
        return self.decode(self.encode(x).mean)


def latent_space(module: nn.Module, params: Params) -> LatentSpace:
    """What a model sees of an autoencoder's latents: its `latents`, or what the statistics of its parameters say.

    Args:
        module: an `Autoencoder` or a `TinyAutoencoder`.
        params: its parameters.

    Raises:
        ValueError: if it is no autoencoder, or its parameters lack the statistics.
    """
    check_has("module", module, ("latents",), "an autoencoder, such as make_autoencoder('sd')")
    if not getattr(module, "statistics", False):
        return module.latents  # type: ignore[attr-defined]
    if not {"latent_mean", "latent_variance"} <= params.keys():
        raise ValueError(f"params must hold latent_mean and latent_variance, got {sorted(map(str, params))}.")
    return latents.flux2_latents(params["latent_mean"], params["latent_variance"])


_KL16: dict[str, Any] = {"latent_channels": 16, "quantize": False}
AUTOENCODER_CONFIGS: dict[str, dict[str, Any]] = {
    # Four times smaller: MNIST and CIFAR-10 on a CPU.
    "tiny": {"channels": (32, 64, 128), "num_blocks": 1},
    "sd": {"latents": latents.SD},
    "sdxl": {"latents": latents.SDXL},
    "sd3": _KL16 | {"latents": latents.SD3},
    "flux": _KL16 | {"latents": latents.FLUX},
    "flux2": {"latent_channels": 32, "statistics": True},
}


def make_autoencoder(name: str, **overrides: Any) -> Autoencoder:
    """Builds an autoencoder by its name.

    Args:
        name: `"tiny"` (small images on a CPU), `"sd"` (Stable Diffusion 1 and 2, DiT, SiT; 83,653,863 parameters),
            `"sdxl"` (the same network), `"sd3"` (83,819,683), `"flux"` (the same) or `"flux2"` (84,046,115 and 256
            statistics).
        **overrides: attributes of `Autoencoder` to change.

    Raises:
        ValueError: if there is no such name.

    Example:
        >>> make_autoencoder("flux").latents
        LatentSpace(shift=0.1159, scale=0.3611, square=1)
    """
    check_member("name", name, tuple(AUTOENCODER_CONFIGS))
    return Autoencoder(**(AUTOENCODER_CONFIGS[name] | overrides))
