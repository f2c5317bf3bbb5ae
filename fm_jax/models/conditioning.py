"""What a published network is told beside time and state: one NamedTuple, and the border between its time and ours."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from fm_jax.checks import check_bool, check_setting, shown
from fm_jax.types import Array


class Conditions(NamedTuple):
    """What a network may be conditioned by, sorted by what it is aligned with; `None` for what there is not.

    A pytree: what drops, composes and guides conditions takes it leaf by leaf.

    Attributes:
        vector: one vector an example, [batch, d]: pooled text, sizes.
        label: class of each example, [batch].
        local: aligned with the state, [batch, *grid, c]: a mask and an image to fill, a depth.
        tokens: a sequence an example, [batch, n, d]: encoded text.
        mask: which tokens there are, bool [batch, n]; padding stands on the right.
        guidance: guidance scale that a distilled network is told, [batch].
    """

    vector: Array | None = None
    label: Array | None = None
    local: Array | None = None
    tokens: Array | None = None
    mask: Array | None = None
    guidance: Array | None = None


@dataclass(frozen=True)
class Border:
    """Between the time and sign of a published network and ours: t = 0 is noise, 1 is data, u = x1 - x0.

    The network's time is `scale (1 - t) + offset` if `reverse`, otherwise `scale t + offset`; what it gives, times
    `sign`, is what ours gives.

    Notebooks: (12.5).

    Attributes:
        scale: factor on time before the sines and cosines.
        reverse: whether its time runs from data to noise.
        offset: added to the scaled time.
        sign: 1, or -1 for a network that gives noise minus data.

    Example:
        >>> RECTIFIED.time(jnp.float32(0.25))
        Array(750., dtype=float32)
    """

    scale: float = 1000.0
    reverse: bool = False
    offset: float = 0.0
    sign: float = 1.0

    def __post_init__(self) -> None:
        check_setting(self, "scale", "(0, inf)")
        check_bool("reverse", self.reverse)
        check_setting(self, "offset", "(-inf, inf)")
        if self.sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {shown(self.sign)}.")

    def time(self, t: Array) -> Array:
        """The network's time, float32, of ours."""
        t = jnp.asarray(t, jnp.promote_types(jnp.result_type(t), jnp.float32))
        return self.scale * (1.0 - t if self.reverse else t) + self.offset

    def output(self, out: Array) -> Array:
        """Our output of the network's."""
        return out if self.sign == 1.0 else -out


OURS = Border()
"""Our own networks: 1000 t, the velocity. Also Z-Image's network; its published pipeline negates it twice."""
RECTIFIED = Border(reverse=True, sign=-1.0)
"""Stable Diffusion 3, FLUX, Wan, Qwen-Image: 1000 sigma with sigma = 1 - t, noise minus data."""
SIT = Border(scale=1.0)
"""SiT and LightningDiT: t itself, the velocity."""
REPA = Border(scale=1.0, reverse=True, sign=-1.0)
"""REPA's SiT: 1 - t, noise minus data."""
DDPM = Border(reverse=True, offset=-1.0)
"""DiT, ADM, PixArt, Stable Diffusion 1, 2 and XL: the step n = 1000 (1 - t) - 1 in 0, ..., 999 of `schedules.DDPM`,
whose own count starts from 1; the prediction is the noise."""


def check_border(border: Any) -> None:
    """Raises `ValueError` for what is not a `Border`."""
    if not isinstance(border, Border):
        raise ValueError(f"border must be a Border, such as RECTIFIED, got {shown(border)}.")
