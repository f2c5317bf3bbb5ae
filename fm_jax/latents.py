"""The latents of an autoencoder, and those of unit variance that a model is trained on: a shift and a scale."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_finite, check_integer, check_number, check_state, is_traced, shown
from fm_jax.types import Array

Constant = float | tuple[float, ...]


@dataclass(frozen=True)
class LatentSpace:
    """What an autoencoder's latents become for the model: `(z - shift) * scale`.

    Notebooks: (12.8).

    Attributes:
        shift: mean of the latents, for all channels or for each.
        scale: one over their standard deviation, for all channels or for each.
        square: side of the squares of latent pixels whose places have constants of their own: a tuple then has a number
            for every channel of a packed square, in the order (channel, row, column).

    Raises:
        ValueError: for a scale that is not positive, a number that is not finite, or tuples that do not fit each other.

    Example:
        >>> LatentSpace(shift=0.1, scale=2.0).to_model(jnp.ones((1, 2, 2, 4)))[0, 0, 0, 0]
        Array(1.8, dtype=float32)

    References:
        Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", appendix G.
    """

    shift: Constant = 0.0
    scale: Constant = 1.0
    square: int = 1

    def __post_init__(self) -> None:
        check_integer("square", self.square)
        lengths = set()
        for name, within in (("shift", "(-inf, inf)"), ("scale", "(0, inf)")):
            value = getattr(self, name)
            if not isinstance(value, tuple | list | np.ndarray):
                check_number(name, value, within)
                object.__setattr__(self, name, float(value))
                continue
            for i, number in enumerate(value):
                check_number(f"{name}[{i}]", number, within)
            object.__setattr__(self, name, tuple(float(number) for number in value))
            lengths.add(len(value))
        if len(lengths) > 1:
            raise ValueError(f"shift and scale must be of one length, got {len(self.shift)} and {len(self.scale)}.")  # type: ignore[arg-type]
        num = lengths.pop() if lengths else self.square**2
        if not num or num % self.square**2:
            raise ValueError(
                f"shift and scale must have a number for each channel and each place of {self.square}x{self.square} "
                f"squares, got {num}."
            )

    def to_model(self, z: Array) -> Array:
        """Latents as a model sees them.

        Args:
            z: latents of the autoencoder, [..., height, width, channels].

        Returns:
            The same shape; float32 or better, but for the identity, which hands on what it gets.

        Raises:
            ValueError: if the constants do not fit the shape.
        """
        if self == PIXELS:
            return z
        shift, scale = self._constants(z)
        return (z.astype(shift.dtype) - shift) * scale

    def to_latent(self, z: Array) -> Array:
        """Latents as a decoder takes them: the inverse of `to_model`.

        Args:
            z: latents of a model, [..., height, width, channels].

        Returns:
            The same shape; float32 or better, but for the identity, which hands on what it gets.

        Raises:
            ValueError: if the constants do not fit the shape.
        """
        if self == PIXELS:
            return z
        shift, scale = self._constants(z)
        return z.astype(shift.dtype) / scale + shift

    def _constants(self, z: Array) -> tuple[Array, Array]:
        check_state(z, "z")
        sizes = [len(value) for value in (self.shift, self.scale) if isinstance(value, tuple)]
        squares = self.square**2
        if sizes and (z.ndim < 3 or z.shape[-1] * squares != sizes[0]):
            wanted = sizes[0] // squares
            raise ValueError(f"z must be [..., height, width, {wanted}] for this space, got shape {tuple(z.shape)}.")
        if sizes and (z.shape[-3] % self.square or z.shape[-2] % self.square):
            raise ValueError(f"height and width must be divisible by {self.square}, got {z.shape[-3]}x{z.shape[-2]}.")
        dtype = jnp.promote_types(z.dtype, jnp.float32)
        shift, scale = (jnp.asarray(self._over(value, z), dtype) for value in (self.shift, self.scale))
        return shift, scale

    def _over(self, value: Constant, z: Array) -> np.ndarray:
        if not isinstance(value, tuple):
            return np.asarray(value)
        numbers = np.asarray(value)
        if self.square > 1:
            places = numbers.reshape(-1, self.square, self.square).transpose(1, 2, 0)
            numbers = np.tile(places, (z.shape[-3] // self.square, z.shape[-2] // self.square, 1))
        return numbers.reshape((1,) * (z.ndim - numbers.ndim) + numbers.shape)


PIXELS = LatentSpace()
"""No autoencoder: the identity."""
SD = LatentSpace(scale=0.18215)
"""Stable Diffusion 1 and 2, DiT, SiT: 4 channels."""
SDXL = LatentSpace(scale=0.13025)
"""Stable Diffusion XL: 4 channels."""
SD3 = LatentSpace(shift=0.0609, scale=1.5305)
"""Stable Diffusion 3 and 3.5: 16 channels."""
FLUX = LatentSpace(shift=0.1159, scale=0.3611)
"""FLUX.1 and Z-Image: 16 channels."""


def flux2_latents(mean: Any, variance: Any, *, epsilon: float = 1e-4) -> LatentSpace:
    """The latents of FLUX.2: normalised by the running statistics of 2x2 squares, which its autoencoder's file holds.

    Args:
        mean: `bn.running_mean`, [channels * 4], in the order (channel, row, column).
        variance: `bn.running_var`, alike.
        epsilon: added to the variance.

    Returns:
        A space over latents [..., height, width, channels], which are not packed.

    Raises:
        ValueError: if they are not two vectors of one length, finite, and of positive variances.
    """
    check_number("epsilon", epsilon, "[0, inf)")
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    if mean.ndim != 1 or mean.shape != variance.shape:
        raise ValueError(
            f"mean and variance must be vectors of one length, got shapes {mean.shape} and {variance.shape}."
        )
    check_finite("mean", mean)
    if not (variance + epsilon > 0).all():
        raise ValueError(f"variance must be positive, got {variance.min():g}.")
    return LatentSpace(tuple(mean.tolist()), tuple((1 / np.sqrt(variance + epsilon)).tolist()), square=2)


def latent_space_of(config: Mapping[str, Any]) -> LatentSpace:
    """The latent space that an autoencoder's `config.json` in the layout of diffusers speaks of.

    Args:
        config: of an `AutoencoderKL`, an `AutoencoderTiny`, or a class whose config has `latents_mean` and
            `latents_std`, such as Wan's.

    Raises:
        ValueError: if the config says nothing of its latents, or two things; for FLUX.2, whose constants are in the
            file: see `flux2_latents`.

    Example:
        >>> latent_space_of({"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159}) == FLUX
        True
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"config must be a mapping, as config.json holds, got {shown(config)}.")
    if "batch_norm_eps" in config:
        raise ValueError("The latent space of this autoencoder is in its file, not in its config: see flux2_latents.")
    defaults = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}
    name = config.get("_class_name", "AutoencoderKL")
    mean, deviation, shift = (config.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
    if (mean is None) != (deviation is None):
        raise ValueError("A config must have both latents_mean and latents_std, or neither.")
    scale = config.get("scaling_factor", 1.0 if name not in defaults and mean is not None else defaults.get(name))
    if scale is None:
        raise ValueError(f"The config of {name!r} has neither scaling_factor nor latents_mean and latents_std.")
    if mean is None or deviation is None:
        return LatentSpace(shift or 0.0, scale)
    if shift:
        raise ValueError(f"A config must have latents_mean or shift_factor, got both: {shown(mean)} and {shift}.")
    for i, number in enumerate(deviation):
        check_number(f"latents_std[{i}]", number, "(0, inf)")
    return LatentSpace(tuple(mean), tuple(scale / number for number in deviation))


def check_latents(z: Array, name: str = "latents") -> float:
    """Refuses latents that a model should not be trained on as they are: a standard deviation outside of 0.5 to 2.

    Args:
        z: some latents as the model would see them, a batch or more, in any shape.
        name: what the refusal calls them.

    Returns:
        Their standard deviation, all numbers together.

    Raises:
        ValueError: if it is outside of 0.5 to 2, a number is not finite, or there are none.
    """
    if is_traced(z):
        raise ValueError(f"{name} must be known to be measured, got a traced value.")
    check_finite(name, z)
    numbers = np.asarray(z).astype(np.float64)
    deviation = float(numbers.std()) if numbers.size else math.nan
    if not 0.5 <= deviation <= 2:
        raise ValueError(
            f"{name} must be of unit variance, with a standard deviation from 0.5 to 2, got {deviation:.3g}: "
            "LatentSpace.to_model shifts and scales what an encoder gives."
        )
    return deviation
