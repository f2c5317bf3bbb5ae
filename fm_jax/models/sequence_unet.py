"""The U-Net over sequences of actions or sounds, with global and local conditions, of Diffusion Policy."""

from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.checks import check_bool, check_event, check_integer, check_member, check_state, shown
from fm_jax.models.compute import Compute, Dtype
from fm_jax.models.conditioning import OURS, Border, Conditions, check_border
from fm_jax.models.dense import Dense
from fm_jax.models.embed import add_condition
from fm_jax.models.layers import check_options, check_widths, num_norm_groups, sinusoidal_features, zeros
from fm_jax.shapes import batch_time
from fm_jax.types import Array, Cond, Key

Upsample = Literal["transposed", "nearest"]


def conv1d(features: int, size: int, dtype: Dtype, name: str, *, stride: int = 1, init: Any = None) -> nn.Conv:
    """A convolution with zeros around the sequence: [l] -> [l / stride]."""
    init = nn.initializers.lecun_normal() if init is None else init
    padding = [(size // 2, size // 2)]
    return nn.Conv(features, (size,), stride, padding=padding, kernel_init=init, dtype=dtype, name=name)


def upsample(x: Array, how: Upsample, dtype: Dtype, name: str) -> Array:
    """[batch, l, c] -> [batch, 2 l, c], by a transposed convolution of four weights or by copies and a convolution."""
    if how == "nearest":
        return conv1d(x.shape[-1], 3, dtype, name)(jnp.repeat(x, 2, axis=1))
    # Zeros between the elements, and two around them: what the gradient of a convolution with padding 1 does.
    return nn.ConvTranspose(x.shape[-1], (4,), (2,), padding=[(2, 2)], transpose_kernel=True, dtype=dtype, name=name)(x)


def _scale_of_one(key: Key, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Biases of scales and shifts: ones and zeros."""
    return jnp.concatenate([jnp.ones(shape[0] // 2, dtype), jnp.zeros(shape[0] // 2, dtype)])


class SequenceBlock(nn.Module):
    """Two convolutions, normalised behind them, with a condition between them, added to the input.

    `x' + mish(norm(conv(condition(mish(norm(conv(x)))))))`, where `x'` is `x`, through a 1x1 convolution if the number
    of channels changes. FiLM conditions by `scale h + shift`, the scale of which starts around one, otherwise by
    `h + shift`.

    Attributes:
        features: output channels.
        kernel_size, film, dropout, num_groups, compute: see `SequenceUNet`.
        starts_at_zero: whether the output is zero at initialisation, the 1x1 convolution being there in any case.
    """

    features: int
    kernel_size: int
    film: bool
    dropout: float
    num_groups: int
    compute: Compute = Compute()
    starts_at_zero: bool = False

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        """Maps `x` [batch, l, c] and the embedding [batch, d] to [batch, l, features]."""
        dtype, size = self.compute.dtype, self.kernel_size
        last_scale = zeros if self.starts_at_zero else nn.initializers.ones_init()
        h = conv1d(self.features, size, dtype, "conv_in")(x)
        h = jax.nn.mish(_norm(self.features, self.num_groups, dtype, "norm_in")(h))
        width, bias_init = (2 * self.features, _scale_of_one) if self.film else (self.features, zeros)
        modulation = Dense(width, bias_init=bias_init, dtype=dtype, name="embed")(jax.nn.mish(emb))[:, None, :]
        if self.film:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = h * scale + shift
        else:
            h = h + modulation
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv1d(self.features, size, dtype, "conv_out")(h)
        h = jax.nn.mish(_norm(self.features, self.num_groups, dtype, "norm_out", scale_init=last_scale)(h))
        if self.starts_at_zero or x.shape[-1] != self.features:
            x = conv1d(self.features, 1, dtype, "skip", init=zeros if self.starts_at_zero else None)(x)
        return x + h


def _norm(channels: int, max_groups: int, dtype: Dtype, name: str, *, scale_init: Any = None) -> nn.GroupNorm:
    """Group normalisation over the sequence and the channels of a group; two-pass statistics in float32."""
    init = nn.initializers.ones_init() if scale_init is None else scale_init
    groups = num_norm_groups(channels, max_groups)
    return nn.GroupNorm(groups, epsilon=1e-5, dtype=dtype, scale_init=init, use_fast_variance=False, name=name)


class SequenceUNet(nn.Module):
    """A U-Net over sequences [batch, length, channels], zero at initialisation: Diffusion Policy's ConditionalUnet1D.

    Level 0 is the full length; each further level halves it. Every level has two residual blocks on the way down, and
    all but level 0 two on the way up, which see what came out of them on the way down.

    A global condition, `cond.vector`, is the same for all positions: it stands beside time in what every block is
    told. A local one, `cond.local`, is aligned with the sequence: a residual block turns it into features, which are
    added behind the first block of level 0, and another one into those added at the end of the way up. Both start at
    zero, so that at first a network with a local condition is the one without. What is left out of `cond` is zeros,
    "no condition".

    Attributes:
        channels: channels of each level.
        kernel_size: of the convolutions in the blocks, odd.
        num_groups: upper limit for the number of groups of the normalisation, see `num_norm_groups`.
        time_channels: number of time features and width of their embedding.
        film: condition by scale and shift instead of only shift.
        resample: on the way up, `"transposed"` convolutions or `"nearest"` neighbours with a convolution.
        vector_dim: length of `cond.vector`; `None` for a network without.
        local_dim: channels of `cond.local`; `None` for a network without. Its length is that of `x` or divides it, as
            that of the frames of a spectrogram does: each element then stands for as many of `x`.
        local_up: whether the local condition joins the way up too. The published class means to do so, but does not:
            its weights want `False`.
        in_channels: channels of the input, where they are to be checked; the rules of files need them.
        out_channels: channels of the output; those of the input by default.
        dropout: dropout rate inside residual blocks.
        embed: module from another condition, such as a label, to a vector added to that of time; see
            `fm_jax.models.embed`.
        border: between our time and sign and those of the network. The published policies, trained to predict noise
            in 100 steps, have `Border(100.0, reverse=True, offset=-1.0)`.
        compute: dtype and rematerialisation.

    References:
        Chi et al. 2023, "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion", "Network Architecture
        Options"; van den Oord et al. 2016, "WaveNet: A Generative Model for Raw Audio", section 2.5.
    """

    channels: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 5
    num_groups: int = 8
    time_channels: int = 256
    film: bool = True
    resample: Upsample = "transposed"
    vector_dim: int | None = None
    local_dim: int | None = None
    local_up: bool = True
    in_channels: int | None = None
    out_channels: int | None = None
    dropout: float = 0.0
    embed: nn.Module | None = None
    border: Border = OURS
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        check_options(embed=self.embed, dropout=self.dropout, compute=self.compute)
        check_border(self.border)
        check_widths("channels", self.channels)
        check_member("resample", self.resample, get_args(Upsample))
        for name in ("film", "local_up"):
            check_bool(name, getattr(self, name))
        check_integer("kernel_size", self.kernel_size)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that lengths stay, got {self.kernel_size}.")
        check_integer("num_groups", self.num_groups)
        check_integer("time_channels", self.time_channels, least=4)
        if self.time_channels % 2:
            raise ValueError(f"time_channels must be even (sines and cosines), got {self.time_channels}.")
        for name in ("vector_dim", "local_dim", "in_channels", "out_channels"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
        for name in set(self._taken()) & set(getattr(self.embed, "reads", ())):
            raise ValueError(
                f"embed must not read the {name}, which the network reads (as {name}_dim), got {self.embed}."
            )
        super().__post_init__()

    def _taken(self) -> tuple[str, ...]:
        """The fields of `Conditions` that the network itself reads."""
        dims = {"vector": self.vector_dim, "local": self.local_dim}
        return tuple(name for name, dim in dims.items() if dim is not None)

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Evaluates the field.

        Args:
            t: time, scalar or [batch].
            x: sequences, [batch, length, channels].
            cond: `Conditions` with `vector` [batch, vector_dim], `local` [batch, length or a divisor, local_dim] and
                what `embed` reads; for a network with `embed` alone also what that takes.
            train: whether dropout is on; it draws from the `"dropout"` key.

        Returns:
            float32, [batch, length, out_channels].

        Raises:
            ValueError: if `x` is no sequence, its length does not halve often enough, or `cond` does not fit the model.
        """
        last, dtype = len(self.channels) - 1, self.compute.dtype
        _check_sequence(x, 2**last, self.in_channels)
        vector, local = self._conditions(x, cond)
        x = x.astype(jnp.float32)
        emb = add_condition(self._time(batch_time(t, x)), self.embed, cond, self._taken())
        if vector is not None:
            emb = jnp.concatenate([emb, vector], axis=-1)
        sequence_block = nn.remat(SequenceBlock, static_argnums=(3,)) if self.compute.remat else SequenceBlock

        def block(h: Array, features: int, name: str, *, starts_at_zero: bool = False) -> Array:
            options = self.kernel_size, self.film, self.dropout, self.num_groups, self.compute, starts_at_zero
            return sequence_block(features, *options, name=name)(h, emb, train)

        h, skips = x, []
        for level, width in enumerate(self.channels):
            h = block(h, width, f"down_{level}_0")
            if level == 0 and local is not None:
                h = h + block(local, width, "local_down", starts_at_zero=True)
            h = block(h, width, f"down_{level}_1")
            skips.append(h)
            if level < last:
                h = conv1d(width, 3, dtype, f"down_{level}_resample", stride=2)(h)
        for i in range(2):
            h = block(h, self.channels[last], f"middle_{i}")
        for level in range(last, 0, -1):
            h = block(jnp.concatenate([h, skips[level]], axis=-1), self.channels[level - 1], f"up_{level}_0")
            h = block(h, self.channels[level - 1], f"up_{level}_1")
            h = upsample(h, self.resample, dtype, f"up_{level}_resample")
        if local is not None and self.local_up:
            h = h + block(local, self.channels[0], "local_up", starts_at_zero=True)

        h = conv1d(self.channels[0], self.kernel_size, dtype, "last")(h)
        h = jax.nn.mish(_norm(self.channels[0], self.num_groups, jnp.float32, "norm")(h))
        out_channels = x.shape[-1] if self.out_channels is None else self.out_channels
        return self.border.output(conv1d(out_channels, 1, jnp.float32, "out", init=zeros)(h))

    def _time(self, t: Array) -> Array:
        """Embeds our time [batch], in float32: [batch, time_channels]."""
        features = self.time_channels
        h = sinusoidal_features(self.border.time(t), features, scale=1.0, frequency_shift=1.0, sine_first=True)
        return Dense(features, name="time_out")(jax.nn.mish(Dense(4 * features, name="time_in")(h)))

    def _conditions(self, x: Array, cond: Any) -> tuple[Array | None, Array | None]:
        """The vector, and the local condition at every position, float32 and checked; `None` where there is none."""
        (batch, length), taken = x.shape[:2], self._taken()
        if taken and cond is not None and not isinstance(cond, Conditions):
            wanted = ", ".join(f"{name}=..." for name in taken)
            raise ValueError(f"cond must be Conditions({wanted}), got {shown(cond)}.")
        given = cond if isinstance(cond, Conditions) else Conditions()
        vector = local = None
        if self.vector_dim is not None:
            shape = (batch, self.vector_dim)
            vector = jnp.zeros(shape) if given.vector is None else given.vector
            check_state(vector, "cond.vector")
            if vector.shape != shape:
                raise ValueError(f"cond.vector must be [batch, vector_dim] = {shape}, got shape {vector.shape}.")
            vector = vector.astype(jnp.float32)
        if self.local_dim is not None:
            local = jnp.zeros((batch, length, self.local_dim)) if given.local is None else given.local
            check_state(local, "cond.local")
            fits = local.ndim == 3 and (local.shape[0], local.shape[2]) == (batch, self.local_dim)
            if not fits or not local.shape[1] or length % local.shape[1]:
                raise ValueError(
                    f"cond.local must be [{batch}, l, {self.local_dim}] with l a divisor of the length {length}, got "
                    f"shape {local.shape}."
                )
            local = jnp.repeat(local.astype(jnp.float32), length // local.shape[1], axis=1)
        return vector, local


def _check_sequence(x: Array, divisor: int, channels: int | None) -> None:
    """Raises `ValueError` unless `x` is [batch, length, channels] with a length divisible by `divisor`."""
    check_event(x)
    if x.ndim != 3:
        raise ValueError(f"x must be [batch, length, channels], got shape {x.shape}.")
    if x.shape[1] % divisor:
        raise ValueError(f"length must be divisible by {divisor}, got {x.shape[1]}.")
    if channels not in (None, x.shape[2]):
        raise ValueError(f"x must have {channels} channels, got shape {x.shape}.")


SEQUENCE_CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"channels": (32, 64), "kernel_size": 3, "time_channels": 64},
    # Chi et al. 2023: policies that see a state, and those that see images.
    "policy": {"channels": (256, 512, 1024), "kernel_size": 5, "time_channels": 256},
    "policy_image": {"channels": (512, 1024, 2048), "kernel_size": 5, "time_channels": 128},
}


def make_sequence_unet(name: str, **overrides: Any) -> SequenceUNet:
    """Builds a sequence U-Net by the name of its size.

    Args:
        name: `"tiny"` (a CPU), or those of Diffusion Policy: `"policy"`, which sees a state, `"policy_image"`.
        **overrides: attributes of `SequenceUNet` to change, such as `vector_dim`.

    Raises:
        ValueError: if there is no such size.

    Example:
        >>> make_sequence_unet("policy", vector_dim=10).channels
        (256, 512, 1024)
    """
    check_member("name", name, tuple(SEQUENCE_CONFIGS))
    return SequenceUNet(**(SEQUENCE_CONFIGS[name] | overrides))
