"""Movie Gen's temporal autoencoder: one of images, with a convolution over frames behind each one over pixels."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax import latents
from fm_jax.checks import (
    check_bool,
    check_event,
    check_integer,
    check_key,
    check_member,
    check_number,
    check_real,
    shown,
)
from fm_jax.latents import LatentSpace
from fm_jax.models.autoencoder import LOG_VARIANCE, Moments
from fm_jax.models.compute import Compute, once
from fm_jax.models.dense import Dense
from fm_jax.models.layers import check_options, check_widths
from fm_jax.models.temporal_blocks import TemporalDecoder, TemporalEncoder
from fm_jax.types import Array, Key, Params


class TemporalAutoencoder(nn.Module):
    """A variational autoencoder of videos and images: an inflated `Autoencoder`.

    Behind every 3x3 convolution stands one over three frames, and attention over frames behind that over pixels. Both
    do nothing at first, so that `inflate` makes it of a trained autoencoder of images: then latents are those of every
    `time_factor`-th frame, and pictures are repeated as often. Normalisation and pointwise layers see single frames.

    A video may have any number of frames: the last of its latents then stands for fewer, and `decode` is told how many
    to keep. Videos are [batch, frames, height, width, channels] in [-1, 1].

    No weights of it are published. It follows the description in the paper; what that leaves open is a choice of ours:
    single frames are normalised, pointwise layers have no convolution over frames behind them, and that behind a
    convolution which halves the sides is the one which halves the frames.

    Attributes:
        channels: of each level; every further one halves the sides.
        num_blocks: residual blocks of a level; the decoder has one more.
        latent_channels: channels of the latents.
        image_channels: channels of videos.
        halve_frames: whether a level halves the frames too, for each but the last.
        num_groups: groups of the normalisation; divides every number of channels.
        attention: whether pixels and frames of the lowest resolution attend to each other.
        quantize: whether 1x1 convolutions end the encoder and begin the decoder, as in the `Autoencoder` it is made of.
        latents: what a model sees of the latents.
        compute: dtype and rematerialisation.

    References:
        Polyak et al. 2024, "Movie Gen: A Cast of Media Foundation Models" (arXiv:2410.13720), section 3.1.1.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    num_blocks: int = 2
    latent_channels: int = 16
    image_channels: int = 3
    halve_frames: tuple[bool, ...] = (True, True, True)
    num_groups: int = 32
    attention: bool = True
    quantize: bool = False
    latents: LatentSpace = latents.PIXELS
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=0.0, compute=self.compute)
        for name in ("num_blocks", "latent_channels", "image_channels", "num_groups"):
            check_integer(name, getattr(self, name))
        for name in ("attention", "quantize"):
            check_bool(name, getattr(self, name))
        if not isinstance(self.latents, LatentSpace):
            raise ValueError(f"latents must be a LatentSpace, such as fm_jax.latents.SD, got {shown(self.latents)}.")
        check_widths("channels", self.channels)
        levels = len(self.channels)
        if not isinstance(self.halve_frames, tuple | list) or len(self.halve_frames) != levels - 1:
            raise ValueError(f"halve_frames must be {levels - 1} of True and False, got {shown(self.halve_frames)}.")
        for i, halved in enumerate(self.halve_frames):
            check_bool(f"halve_frames[{i}]", halved)
        for width in self.channels:
            if width % self.num_groups:
                raise ValueError(f"num_groups must divide the channels of every level, {width}, got {self.num_groups}.")
        super().__post_init__()

    @property
    def factor(self) -> int:
        """How many times smaller the sides of the latents are than those of the video."""
        return 2 ** (len(self.channels) - 1)

    @property
    def time_factor(self) -> int:
        """How many frames fall on one of the latents."""
        return 2 ** sum(self.halve_frames)

    def setup(self) -> None:
        options = (tuple(self.halve_frames), self.num_groups, self.attention, self.compute)
        self.encoder = TemporalEncoder(self.channels, self.num_blocks, 2 * self.latent_channels, *options)
        self.decoder = TemporalDecoder(self.channels, self.num_blocks, self.image_channels, *options)
        if self.quantize:
            self.encoder_out = Dense(2 * self.latent_channels)
            self.decoder_in = Dense(self.latent_channels)

    def encode(self, x: Array) -> Moments:
        """The latents of videos.

        Args:
            x: videos in [-1, 1], [batch, frames, height, width, image_channels]; an image has one frame.

        Returns:
            float32, [batch, ceil(frames / time_factor), height / factor, width / factor, latent_channels].

        Raises:
            ValueError: if `x` is no such video.
        """
        check_event(x)
        if x.ndim != 5 or x.shape[-1] != self.image_channels:
            raise ValueError(f"x must be [batch, frames, height, width, {self.image_channels}], got shape {x.shape}.")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"height and width must be divisible by {self.factor}, got {x.shape[2]}x{x.shape[3]}.")
        h = self.encoder(x.astype(jnp.float32))
        mean, log_variance = jnp.split(self.encoder_out(h) if self.quantize else h, 2, axis=-1)
        return Moments(mean, jnp.clip(log_variance, *LOG_VARIANCE))

    def decode(self, z: Array, *, frames: int | None = None) -> Array:
        """The videos of latents.

        Args:
            z: latents [batch, f, height, width, latent_channels].
            frames: how many to keep of those that come out; all of `time_factor f` by default. An image has one.

        Returns:
            float32 videos, sides multiplied by `factor`.

        Raises:
            ValueError: if `z` has another shape, or `frames` are not those of such latents.
        """
        if getattr(z, "ndim", 0) != 5 or z.shape[-1] != self.latent_channels:
            raise ValueError(f"z must be [batch, frames, height, width, {self.latent_channels}], got {shown(z)}.")
        if frames is not None:
            check_integer("frames", frames)
            if math.ceil(frames / self.time_factor) != z.shape[1]:
                most = self.time_factor * z.shape[1]
                wanted = f"more than {most - self.time_factor} and at most {most}"
                raise ValueError(f"frames of {z.shape[1]} frames of latents must be {wanted}, got {frames}.")
        z = z.astype(jnp.float32)
        return self.decoder(self.decoder_in(z) if self.quantize else z)[:, :frames]

    def __call__(self, x: Array) -> Array:
        """Videos there and back, through the means of their latents."""
        return self.decode(self.encode(x).mean, frames=x.shape[1])


def inflate(module: TemporalAutoencoder, params: Params, key: Key) -> Params:
    """Parameters of an autoencoder of videos that does to every frame what an autoencoder of images does to an image.

    Args:
        module: the autoencoder of videos.
        params: of an `Autoencoder` with the same levels, blocks and channels.
        key: PRNG key, for the queries, keys and values of the attention over frames.

    Returns:
        The parameters, with those of images among them as they are.

    Raises:
        ValueError: if `params` are of another autoencoder; by name.
    """
    check_key(key)
    if not isinstance(module, TemporalAutoencoder):
        raise ValueError(f"module must be a TemporalAutoencoder, got {shown(type(module))}.")
    side = module.factor
    x = jnp.zeros((1, 1, side, side, module.image_channels))
    init = once(lambda key: module.init(key, x)["params"])
    shapes = _merged(jax.eval_shape(init, key), params, "params")  # refuses before it draws
    fresh = init(key)
    return jax.tree.map(lambda drawn, given: drawn if isinstance(given, jax.ShapeDtypeStruct) else given, fresh, shapes)


def _merged(ours: Any, images: Any, at: str) -> Any:
    """`ours`, with what `images` has in its place; everything of it has to have one."""
    if not isinstance(ours, Mapping) or not isinstance(images, Mapping):
        if getattr(ours, "shape", None) != getattr(images, "shape", ()):
            raise ValueError(f"{at} must be {shown(ours)}, got {shown(images)}.")
        return images
    ours_alone = [name for name in ours if name not in images and not name.endswith("_time")]
    if unknown := sorted({*ours_alone, *(name for name in images if name not in ours)}):
        raise ValueError(
            f"{at} must be of an Autoencoder of these levels: only one of the two has {', '.join(unknown)}."
        )
    return {name: _merged(ours[name], images[name], f"{at}/{name}") if name in images else ours[name] for name in ours}


def outlier_penalty(z: Array, r: float = 3.0) -> Array:
    """How far latents stand out: a term of the loss that keeps spots of the decoded picture from their few pixels.

    For a frame with latents `z_ij` in rows i and columns j, with mean and standard deviation of every channel over
    them: the mean over pixels of `max(|z_ij - mean| - r |std|, 0)`, norms over channels.

    Args:
        z: latents [..., height, width, channels], frames and examples before them.
        r: how many standard deviations are no outlier.

    Returns:
        float32 scalar, the mean over frames. It is small: Movie Gen's open implementation, mindone, weights it by 1e5,
        and takes every channel by itself.

    Raises:
        ValueError: if `z` is no grid of latents, or `r` is negative.

    References:
        Polyak et al. 2024, "Movie Gen: A Cast of Media Foundation Models" (arXiv:2410.13720), section 3.1.1.
    """
    check_real("z", z)
    if z.ndim < 3:
        raise ValueError(f"z must be [..., height, width, channels], got shape {z.shape}.")
    check_number("r", r, "[0, inf)")
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    centred = z - z.mean(axis=(-3, -2), keepdims=True)
    squares = jnp.square(centred)
    least = 1e-30  # a norm of zero has no derivative
    far = jnp.sqrt(jnp.maximum(squares.sum(-1), least))
    usual = jnp.sqrt(jnp.maximum(squares.mean(axis=(-3, -2), keepdims=True).sum(-1), least))
    return jnp.maximum(far - r * usual, 0.0).mean()


TEMPORAL_AUTOENCODER_CONFIGS: dict[str, dict[str, Any]] = {
    # Four times smaller, also in time: small videos on a CPU.
    "tiny": {"channels": (32, 64, 128), "num_blocks": 1, "latent_channels": 4, "halve_frames": (True, True)},
    "moviegen": {},
}


def make_temporal_autoencoder(name: str, **overrides: Any) -> TemporalAutoencoder:
    """Builds a temporal autoencoder by its name.

    Args:
        name: `"tiny"` (small videos on a CPU), or `"moviegen"`, 8 x 8 x 8 with 16 channels on the levels of
            `make_autoencoder("sd3")`.
        **overrides: attributes of `TemporalAutoencoder` to change.

    Raises:
        ValueError: if there is no such name.

    Example:
        >>> make_temporal_autoencoder("moviegen").time_factor
        8
    """
    check_member("name", name, tuple(TEMPORAL_AUTOENCODER_CONFIGS))
    return TemporalAutoencoder(**(TEMPORAL_AUTOENCODER_CONFIGS[name] | overrides))
