"""Wan's autoencoder of videos: causal convolutions over frames, rows and columns, and a first frame by itself."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fm_jax import latents
from fm_jax.checks import check_bool, check_event, check_integer, check_member, shown
from fm_jax.latents import LatentSpace
from fm_jax.models.autoencoder import LOG_VARIANCE, Moments
from fm_jax.models.causal import CausalDecoder, CausalEncoder
from fm_jax.models.compute import Compute
from fm_jax.models.dense import Dense
from fm_jax.models.layers import check_options, check_widths
from fm_jax.types import Array


def _space(mean: str, deviation: str) -> LatentSpace:
    """A space of the published means and standard deviations of the channels, numbers in words."""
    means, deviations = (tuple(float(number) for number in words.split()) for words in (mean, deviation))
    return LatentSpace(means, tuple(1 / number for number in deviations))


WAN = _space(
    "-0.7571 -0.7089 -0.9113 0.1075 -0.1745 0.9653 -0.1517 1.5508 0.4134 -0.0715 0.5517 -0.3632 -0.1922 -0.9497 0.2503 "
    "-0.2921",
    "2.8184 1.4541 2.3275 2.6558 1.2196 1.7708 2.6052 2.0743 3.2687 2.1526 2.8652 1.5579 1.6382 1.1253 2.8251 1.9160",
)
"""Wan 2.1, the A14B of Wan 2.2, and Qwen-Image: 16 channels."""
WAN22 = _space(
    "-0.2289 -0.0052 -0.1323 -0.2339 -0.2799 0.0174 0.1838 0.1557 -0.1382 0.0542 0.2813 0.0891 0.1570 -0.0098 0.0375 "
    "-0.1825 -0.2246 -0.1207 -0.0698 0.5109 0.2665 -0.2108 -0.2158 0.2502 -0.2055 -0.0322 0.1109 0.1567 -0.0729 0.0899 "
    "-0.2799 -0.1230 -0.0313 -0.1649 0.0117 0.0723 -0.2839 -0.2083 -0.0520 0.3748 0.0152 0.1957 0.1433 -0.2944 0.3573 "
    "-0.0548 -0.1681 -0.0667",
    "0.4765 1.0364 0.4514 1.1677 0.5313 0.4990 0.4818 0.5013 0.8158 1.0344 0.5894 1.0901 0.6885 0.6165 0.8454 0.4978 "
    "0.5759 0.3523 0.7135 0.6804 0.5833 1.4146 0.8986 0.5659 0.7069 0.5338 0.4889 0.4917 0.4069 0.4999 0.6866 0.4093 "
    "0.5709 0.6065 0.6415 0.4944 0.5726 1.2042 0.5458 1.6887 0.3971 1.0600 0.3943 0.5537 0.5444 0.4089 0.7468 0.7744",
)
"""Wan 2.2's 5B: 48 channels."""


class WanAutoencoder(nn.Module):
    """A variational autoencoder of videos and images, of Wan and of Qwen-Image.

    A frame is seen by itself and by later ones, so a video of 1 + 4 k frames has 1 + k frames of latents, the first of
    which is that of an image. What goes into latents and pictures is independent of how many frames follow.

    Videos are [batch, frames, height, width, channels] in [-1, 1]. `encode` and `decode` speak of the autoencoder's
    own latents; those that a model sees are `module.latents.to_model(z)`. Both take a clip at once, of which they hold
    all activations.

    Attributes:
        channels: of each level; every further one halves the sides.
        num_blocks: residual blocks of a level; the decoder has one more.
        latent_channels: channels of the latents.
        image_channels: channels of videos.
        halve_frames: whether a level halves the frames too, for each but the last.
        decoder_channels: of each level of the decoder, where they are others.
        residual: whether levels are added to what averages and copies make of their input, as in Wan 2.2's 5B.
        patch_size: side of the squares of pixels that are channels of the first and the last convolution.
        latents: what a model sees of the latents.
        compute: dtype and rematerialisation.

    Example:
        >>> import jax
        >>> model = make_wan_autoencoder("tiny")
        >>> x = jax.ShapeDtypeStruct((1, 5, 8, 12, 3), jnp.float32)  # only shapes, nothing is computed
        >>> variables = jax.eval_shape(model.init, jax.random.key(0), x)
        >>> jax.eval_shape(lambda variables, x: model.apply(variables, x, method="encode"), variables, x).mean.shape
        (1, 3, 2, 3, 4)

    References:
        Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models" (arXiv:2503.20314), section 4.1.
    """

    channels: tuple[int, ...] = (96, 192, 384, 384)
    num_blocks: int = 2
    latent_channels: int = 16
    image_channels: int = 3
    halve_frames: tuple[bool, ...] = (False, True, True)
    decoder_channels: tuple[int, ...] | None = None
    residual: bool = False
    patch_size: int = 1
    latents: LatentSpace = latents.PIXELS
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("num_blocks", "latent_channels", "image_channels", "patch_size"):
            check_integer(name, getattr(self, name))
        check_bool("residual", self.residual)
        if not isinstance(self.latents, LatentSpace):
            raise ValueError(f"latents must be a LatentSpace, such as fm_jax.latents.SD, got {shown(self.latents)}.")
        check_widths("channels", self.channels)
        if self.decoder_channels is not None:
            check_widths("decoder_channels", self.decoder_channels)
        levels = len(self.channels)
        if len(self.decoder_channels or self.channels) != levels:
            raise ValueError(f"decoder_channels must have {levels} levels, as channels, got {self.decoder_channels}.")
        if not isinstance(self.halve_frames, tuple | list) or len(self.halve_frames) != levels - 1:
            raise ValueError(f"halve_frames must be {levels - 1} of True and False, got {shown(self.halve_frames)}.")
        for i, halved in enumerate(self.halve_frames):
            check_bool(f"halve_frames[{i}]", halved)
        _check_levels(self.residual, self.channels, self.decoder_channels or self.channels, self.halve_frames)
        super().__post_init__()

    @property
    def factor(self) -> int:
        """How many times smaller the sides of the latents are than those of the video."""
        return self.patch_size * 2 ** (len(self.channels) - 1)

    @property
    def time_factor(self) -> int:
        """How many frames fall on one of the latents, but for the first."""
        return 2 ** sum(self.halve_frames)

    def setup(self) -> None:
        options = (tuple(self.halve_frames), self.residual, self.compute)
        self.encoder = CausalEncoder(self.channels, self.num_blocks, 2 * self.latent_channels, *options)
        channels = self.decoder_channels or self.channels
        self.decoder = CausalDecoder(channels, self.num_blocks, self.image_channels * self.patch_size**2, *options)
        self.encoder_out = Dense(2 * self.latent_channels)
        self.decoder_in = Dense(self.latent_channels)

    def encode(self, x: Array) -> Moments:
        """The latents of videos.

        Args:
            x: videos in [-1, 1], [batch, 1 + time_factor k, height, width, image_channels]; an image has one frame.

        Returns:
            float32, [batch, 1 + k, height / factor, width / factor, latent_channels].

        Raises:
            ValueError: if `x` is no such video.
        """
        check_event(x)
        if x.ndim != 5 or x.shape[-1] != self.image_channels:
            raise ValueError(f"x must be [batch, frames, height, width, {self.image_channels}], got shape {x.shape}.")
        b, f, h, w, c = x.shape
        if (f - 1) % self.time_factor or f < 1:
            raise ValueError(f"frames must be one more than a multiple of {self.time_factor}, got {f}.")
        if h % self.factor or w % self.factor:
            raise ValueError(f"height and width must be divisible by {self.factor}, got {h}x{w}.")
        p = self.patch_size
        x = x.astype(jnp.float32).reshape(b, f, h // p, p, w // p, p, c).transpose(0, 1, 2, 4, 6, 5, 3)
        moments = self.encoder_out(self.encoder(x.reshape(*x.shape[:4], -1)))  # channels, columns, rows
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCE))

    def decode(self, z: Array, *, clip: bool = True) -> Array:
        """The videos of latents.

        Args:
            z: the autoencoder's own latents, not those that a model sees, [batch, frames, height, width, channels].
            clip: to [-1, 1], where a loss would not see what is beyond.

        Returns:
            float32 videos of `1 + time_factor (frames - 1)` frames, sides multiplied by `factor`.

        Raises:
            ValueError: if `z` has another shape.
        """
        if getattr(z, "ndim", 0) != 5 or z.shape[-1] != self.latent_channels:
            raise ValueError(f"z must be [batch, frames, height, width, {self.latent_channels}], got {shown(z)}.")
        x, p = self.decoder(self.decoder_in(z.astype(jnp.float32))), self.patch_size
        b, f, h, w, _ = x.shape
        x = x.reshape(b, f, h, w, -1, p, p).transpose(0, 1, 2, 6, 3, 5, 4).reshape(b, f, h * p, w * p, -1)
        return jnp.clip(x, -1.0, 1.0) if clip else x

    def __call__(self, x: Array) -> Array:
        """Videos there and back, through the means of their latents."""
        return self.decode(self.encode(x).mean)


def _check_levels(
    residual: bool, channels: tuple[int, ...], decoder_channels: tuple[int, ...], halve_frames: tuple[bool, ...]
) -> None:
    """Raises `ValueError` for widths that cannot be halved, or of which copies and averages do not make each other."""
    if not residual:
        for i, width in enumerate(decoder_channels[1:], 1):
            if width % 2:
                raise ValueError(f"channels of the decoder must be even but for the first, got {width} in level {i}.")
        return
    last = len(channels) - 1
    for level in range(last + 1):
        before, after = channels[max(level - 1, 0)], channels[level]
        cell = 1 if level == last else 4 * (1 + halve_frames[level])
        if before * cell % after:
            raise ValueError(f"channels {after} must divide {before} x {cell}, a cell averaged, got {channels}.")
    for level in range(last, 0, -1):
        before, after = decoder_channels[min(level + 1, last)], decoder_channels[level]
        cell = 4 * (1 + halve_frames[level - 1])
        if after * cell % before:
            raise ValueError(f"channels {before} must divide {after} x {cell}, a cell filled, got {decoder_channels}.")


WAN_AUTOENCODER_CONFIGS: dict[str, dict[str, Any]] = {
    # Four times smaller, half as many frames: small videos on a CPU.
    "tiny": {"channels": (16, 32, 32), "num_blocks": 1, "latent_channels": 4, "halve_frames": (False, True)},
    "2.1": {"latents": WAN},
    "2.2-5B": {
        "channels": (160, 320, 640, 640),
        "decoder_channels": (256, 512, 1024, 1024),
        "latent_channels": 48,
        "residual": True,
        "patch_size": 2,
        "latents": WAN22,
    },
}


def make_wan_autoencoder(name: str, **overrides: Any) -> WanAutoencoder:
    """Builds an autoencoder of videos by its name.

    Args:
        name: `"tiny"` (small videos on a CPU), `"2.1"` (Wan 2.1, the A14B of Wan 2.2 and Qwen-Image; 126,892,531
            parameters) or `"2.2-5B"` (704,688,668).
        **overrides: attributes of `WanAutoencoder` to change.

    Raises:
        ValueError: if there is no such name.

    Example:
        >>> make_wan_autoencoder("2.1").factor, make_wan_autoencoder("2.1").time_factor
        (8, 4)
    """
    check_member("name", name, tuple(WAN_AUTOENCODER_CONFIGS))
    return WanAutoencoder(**(WAN_AUTOENCODER_CONFIGS[name] | overrides))
