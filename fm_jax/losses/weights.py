"""Loss weights, comparable between prediction kinds.

An error of one kind is a multiple, known from the schedule, of the error of another: with d the data prediction,

    noise error = (alpha / sigma) d error,  score error = (alpha / sigma^2) d error,
    velocity error = (alpha' - sigma' alpha / sigma) d error.

A weight is stated for data prediction, where its paper states it, and divided by the square of that multiple. It then
defines the same objective whatever the network predicts. No weight (`None` in the losses) is 1 on the kind itself.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from fm_jax.checks import check_member, check_setting
from fm_jax.schedules import coefficients
from fm_jax.types import KINDS, Array, Elementwise, Kind, PerExample, Schedule


def error_scale(kind: Kind, t: Elementwise, schedule: Schedule) -> Elementwise:
    """By how much an error of the data prediction is multiplied in a prediction of `kind`.

    Notebooks: (5.7).

    Args:
        kind: "velocity", "data", "noise" or "score".
        t: times.
        schedule: of the path.

    Returns:
        The factor; infinite where sigma = 0, but for "data".
    """
    _, per_unit = _weights(kind, t, schedule)
    return per_unit**-0.5


def _weights(kind: Kind, t: Elementwise, schedule: Schedule) -> tuple[Array, Array]:
    """The weights SNR and 1 on data prediction, both divided by `error_scale`^2.

    Each is reduced by hand, so that neither is 0 / 0 at the ends of the path.
    """
    check_member("kind", kind, KINDS)
    alpha, sigma, d_alpha, d_sigma = coefficients(schedule, t)
    match kind:
        case "data":
            return (alpha / sigma) ** 2, alpha * 0 + 1
        case "noise":
            return alpha * 0 + 1, (sigma / alpha) ** 2
        case "score":
            return sigma**2, sigma**4 / alpha**2
        case "velocity":
            determinant = sigma * d_alpha - alpha * d_sigma
            return (alpha / determinant) ** 2, (sigma / determinant) ** 2


@dataclass(frozen=True)
class SNRWeight:
    """Weight SNR^power on data prediction: power 1 is the noise loss of DDPM, power 0 uniform on data.

    Salimans & Ho 2022 (arXiv:2202.00512, sec. 4); `power = 1` with `kind="noise"` is Ho et al. 2020, eq. 14.

    Notebooks: (10.4).

    Raises:
        ValueError: if `power` is not finite.
    """

    power: float = 1.0

    def __post_init__(self) -> None:
        check_setting(self, "power", "(-inf, inf)")

    def __call__(self, t: PerExample, kind: Kind, schedule: Schedule) -> PerExample:
        snr, one = _weights(kind, t, schedule)
        return snr**self.power * one ** (1 - self.power)


@dataclass(frozen=True)
class MinSNRWeight:
    """Weight min(SNR, gamma) on data prediction (Hang et al. 2023, arXiv:2303.09556, sec. 3.4).

    Notebooks: (10.4).
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        check_setting(self, "gamma", "(0, inf)")

    def __call__(self, t: PerExample, kind: Kind, schedule: Schedule) -> PerExample:
        snr, one = _weights(kind, t, schedule)
        return jnp.minimum(snr, self.gamma * one)


@dataclass(frozen=True)
class EDMWeight:
    """Weight (s^2 + sigma_data^2) / (s sigma_data)^2 on data prediction, s = sigma / alpha: EDM's effective weight.

    Karras et al. 2022 (arXiv:2206.00364, table 1). Equal to SNR + 1 / sigma_data^2.

    Notebooks: (10.4).
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_setting(self, "sigma_data", "(0, inf)")

    def __call__(self, t: PerExample, kind: Kind, schedule: Schedule) -> PerExample:
        snr, one = _weights(kind, t, schedule)
        return snr + one / self.sigma_data**2
