"""DDPM++ and NCSN++, the U-Nets of score-based diffusion as EDM has them."""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer, check_member, shown
from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import SIT, Border, Conditions, check_border
from fm_jax.models.dense import Dense
from fm_jax.models.embed import check_below, check_integers
from fm_jax.models.layers import check_image, check_options, check_widths, sinusoidal_features
from fm_jax.models.song_blocks import SongBlock, conv, filtered, norm, scaled
from fm_jax.shapes import batch_time
from fm_jax.types import Array

Encoder = Literal["standard", "skip", "residual"]
Decoder = Literal["standard", "skip"]
TimeFeatures = Literal["positional", "fourier"]


class SongUNet(nn.Module):
    """DDPM++ and NCSN++ as EDM has them, in the raw: what stands around them (EDM's preconditioning) is not in it.

    As `UNet`, but each sum is scaled by `sqrt(1/2)`, levels are resampled inside residual blocks through a filter, the
    way up has attention after its last block of a level alone, and condition and augmentation join time before its two
    layers. `t` is what the network is trained with through `border`: EDM's own weights want `log(sigma) / 4` of the
    noise level, an input `x / sqrt(sigma^2 + sigma_data^2)`, and the border `SIT`, which hands `t` on as it is.

    Attributes:
        channels: base number of channels.
        channel_mults: channels of each level, in units of `channels`.
        num_blocks: residual blocks of a level.
        attention_levels: levels with attention. The middle always has it.
        embedding_mult: width of the embedding of time, in units of `channels`.
        time_features: `"positional"` (DDPM++), those of DDPM, or `"fourier"` (NCSN++), at random frequencies, which are
            among the parameters and get no gradient.
        time_mult: number of time features, in units of `channels`; 1 in DDPM++, 2 in NCSN++.
        encoder: `"standard"` (DDPM++), or the image, halved, joins every level: `"residual"` (NCSN++) or `"skip"`.
        decoder: `"standard"`, or every level adds to the output: `"skip"`.
        resample_filter: weights along an axis, even in number; (1, 1) in DDPM++, (1, 3, 3, 1) in NCSN++.
        num_classes: of `Conditions.label`; the label `num_classes` is "no class". `None` for an unconditional network.
        augment_dim: length of `Conditions.vector`, what EDM's augmentations say of themselves (9); zeros say "none".
        in_channels: channels of the input, where they are to be checked; the rules of files need them.
        out_channels: channels of the output; those of the input by default.
        resolution: side of the images, after which files name their tensors; others do too.
        dropout: dropout rate inside residual blocks.
        border: between our time and sign and those of the network.
        compute: dtype, attention and rematerialisation.

    References:
        Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix H;
        Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2.
    """

    channels: int = 128
    channel_mults: tuple[int, ...] = (2, 2, 2)
    num_blocks: int = 4
    attention_levels: tuple[int, ...] = (1,)
    embedding_mult: int = 4
    time_features: TimeFeatures = "positional"
    time_mult: int = 1
    encoder: Encoder = "standard"
    decoder: Decoder = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
    num_classes: int | None = None
    augment_dim: int = 0
    in_channels: int | None = None
    out_channels: int | None = None
    resolution: int = 32
    dropout: float = 0.0
    border: Border = SIT
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=None, dropout=self.dropout, compute=self.compute)
        check_border(self.border)
        check_widths("channel_mults", self.channel_mults)
        check_widths("resample_filter", self.resample_filter)
        if len(self.resample_filter) % 2:
            raise ValueError(f"resample_filter must have an even number of weights, got {self.resample_filter}.")
        check_member("time_features", self.time_features, get_args(TimeFeatures))
        check_member("encoder", self.encoder, get_args(Encoder))
        check_member("decoder", self.decoder, get_args(Decoder))
        for name in ("channels", "num_blocks", "embedding_mult", "time_mult", "resolution"):
            check_integer(name, getattr(self, name))
        for name in ("num_classes", "in_channels", "out_channels"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        check_integer("augment_dim", self.augment_dim, least=0)
        last = len(self.channel_mults) - 1
        for i, level in enumerate(self.attention_levels):
            check_integer(f"attention_levels[{i}]", level, least=0, most=last)
        if self.channels % 4:
            raise ValueError(f"channels must be divisible by 4, the least of a group, got {self.channels}.")
        super().__post_init__()

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Conditions | None = None, *, train: bool = False) -> Array:
        """Evaluates the network.

        Args:
            t: time, scalar or [batch].
            x: images, [batch, height, width, channels].
            cond: `Conditions` with `label`, integers [batch], where there are classes, and `vector` [batch,
                augment_dim] where there are augmentations; what is left out is "none".
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            float32, [batch, height, width, out_channels].

        Raises:
            ValueError: if `x` is no image, its sides do not halve often enough, or `cond` does not fit the model.
        """
        last = len(self.channel_mults) - 1
        check_image(x, 2**last)
        if self.in_channels not in (None, x.shape[-1]):
            raise ValueError(f"x must have {self.in_channels} channels, got shape {x.shape}.")
        x = image = x.astype(jnp.float32)
        emb = self._embedding(batch_time(t, x), self._checked(x, cond))
        dtype, pad = self.compute.dtype, (len(self.resample_filter) - 1) // 2
        song_block = nn.remat(SongBlock, static_argnums=(3,)) if self.compute.remat else SongBlock

        def block(h: Array, level: int, name: str, resize: Any = None, attends: bool | None = None) -> Array:
            features = h.shape[-1] if resize else self.channels * self.channel_mults[level]
            attends = level in self.attention_levels if attends is None else attends
            options = features, resize, attends, self.dropout, self.resample_filter, self.compute
            return song_block(*options, name=name)(h, emb, train)

        h = conv(self.channels, 3, dtype, "stem")(x)
        skips = [h]
        for level in range(last + 1):
            if level > 0:
                h = block(h, level, f"down_{level - 1}_resample", "down", attends=False)
                if self.encoder == "skip":
                    image = filtered(image, self.resample_filter, up=False)
                    h = h + conv(h.shape[-1], 1, dtype, f"image_{level}")(image)
                elif self.encoder == "residual":
                    joined = conv(h.shape[-1], 3, dtype, f"image_{level}", pad=pad)(image)
                    h = image = (h + filtered(joined, self.resample_filter, up=False, pad=0)) / np.float32(np.sqrt(2.0))
                skips.append(h)
            for i in range(self.num_blocks):
                h = block(h, level, f"down_{level}_{i}")
                skips.append(h)

        h = block(h, last, "middle_0", attends=True)
        h = block(h, last, "middle_1", attends=False)
        out_channels = x.shape[-1] if self.out_channels is None else self.out_channels
        out: Any = None
        for level in reversed(range(last + 1)):
            if level < last:
                h = block(h, level, f"up_{level + 1}_resample", "up", attends=False)
            for i in range(self.num_blocks + 1):
                attends = None if i == self.num_blocks else False
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_{i}", attends=attends)
            if self.decoder == "skip" or level == 0:
                # The last layers stay in float32.
                part = nn.silu(norm(h, jnp.float32, f"norm_{level}"))
                part = conv(out_channels, 3, jnp.float32, f"out_{level}", gain=1e-5)(part)
                out = part if out is None else part + filtered(out, self.resample_filter, up=True)
        return self.border.output(out)

    def _embedding(self, t: Array, cond: Conditions) -> Array:
        """What the blocks are told, [batch, embedding_mult * channels], in float32."""
        features, width = self.time_mult * self.channels, self.embedding_mult * self.channels
        t = self.border.time(t)
        if self.time_features == "fourier":
            frequencies = self.param("frequencies", nn.initializers.normal(16.0), (features // 2,))
            angles = t[:, None] * (np.float32(2 * np.pi) * jax.lax.stop_gradient(frequencies)[None, :])
            emb = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        else:
            emb = sinusoidal_features(t, features, scale=1.0, frequency_shift=1.0, sine_first=True)
        if self.num_classes is not None:
            none = jnp.full(t.shape, self.num_classes)
            labels = jax.nn.one_hot(none if cond.label is None else cond.label, self.num_classes)
            labels = labels * np.float32(np.sqrt(self.num_classes))
            emb = emb + Dense(features, kernel_init=scaled(1.0), name="label")(labels)
        if self.augment_dim > 0:
            vector = jnp.zeros((t.shape[0], self.augment_dim)) if cond.vector is None else cond.vector
            emb = emb + Dense(features, use_bias=False, kernel_init=scaled(1.0), name="augment")(vector)
        for name in ("time_in", "time_out"):
            emb = nn.silu(Dense(width, kernel_init=scaled(1.0), name=name)(emb))
        return emb

    def _checked(self, x: Array, cond: Any) -> Conditions:
        """The conditions, or `ValueError`."""
        if cond is None:
            return Conditions()
        if not isinstance(cond, Conditions):
            raise ValueError(f"cond must be Conditions with a label or a vector, got {shown(cond)}.")
        takes = {"label": self.num_classes is not None, "vector": self.augment_dim > 0}
        for name, value in zip(cond._fields, cond, strict=True):
            if value is not None and not takes.get(name, False):
                raise ValueError(f"cond must have no {name}: the network does not take it.")
        if cond.label is not None:
            check_integers("cond.label", "labels", cond.label)
            if cond.label.shape != x.shape[:1]:
                raise ValueError(f"cond.label must be [batch] = {x.shape[:1]}, got shape {cond.label.shape}.")
            check_below("cond.label", cond.label, self.num_classes + 1)
        if cond.vector is not None and cond.vector.shape != (x.shape[0], self.augment_dim):
            wanted = (x.shape[0], self.augment_dim)
            raise ValueError(f"cond.vector must be [batch, augment_dim] = {wanted}, got shape {cond.vector.shape}.")
        return cond


SONG_CONFIGS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"augment_dim": 9, "dropout": 0.13, "in_channels": 3},
    "ncsnpp": {
        "time_features": "fourier",
        "time_mult": 2,
        "encoder": "residual",
        "resample_filter": (1, 3, 3, 1),
        "augment_dim": 9,
        "dropout": 0.13,
        "in_channels": 3,
    },
}


def make_song_unet(name: str, **overrides: Any) -> SongUNet:
    """Builds one of EDM's networks for CIFAR-10.

    Args:
        name: `"ddpmpp"` or `"ncsnpp"`.
        **overrides: attributes of `SongUNet` to change, such as `num_classes`.

    Raises:
        ValueError: if there is no such network.

    Example:
        >>> make_song_unet("ncsnpp").resample_filter
        (1, 3, 3, 1)
    """
    check_member("name", name, tuple(SONG_CONFIGS))
    return SongUNet(**(SONG_CONFIGS[name] | overrides))
