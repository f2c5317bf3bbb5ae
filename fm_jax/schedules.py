"""Schedules: the coefficients alpha(t) and sigma(t) of the path `x_t = alpha x1 + sigma x0`.

Each is a frozen dataclass with `alpha`, `sigma`, the inverse of its log-SNR and its `domain`; everything else follows
by the functions below. Time derivatives are taken by `jax.jvp`.

The log-signal-to-noise ratio is `log_snr = log(alpha^2 / sigma^2)`, increasing in `t` (Kingma et al. 2021,
arXiv:2107.00630); the half of it is DPM-Solver's lambda.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from fm_jax.checks import (
    as_number,
    check_function,
    check_increasing,
    check_integer,
    check_known,
    check_number,
    check_schedule,
    check_setting,
    is_real,
    is_traced,
    shown,
)
from fm_jax.types import AnyArray, Array, Coefficients, Elementwise, Schedule

_EDGE = 1e-5
"""How far a domain stays from a time at which a derivative is infinite."""


def log(value: Any) -> Any:
    """The logarithm of a setting, in double precision unless it is traced."""
    return jnp.log(value) if is_traced(value) else math.log(value)


def _as_times(t: Elementwise) -> Array:
    """Floating-point times; raises `ValueError` for what is no number."""
    if not (is_traced(t) or hasattr(t, "dtype")):
        check_number("t", t, "(-inf, inf)")
    if not is_real(jnp.result_type(t)):
        raise ValueError(f"t must be real numbers, got {shown(t)}.")
    return jnp.asarray(t, dtype=jnp.result_type(t, float))


def _with_derivative(f: Callable[[Array], Array], t: Array) -> tuple[Array, Array]:
    return jax.jvp(f, (t,), (jnp.ones_like(t),))


def coefficients(schedule: Schedule, t: Elementwise) -> Coefficients:
    """alpha, sigma and their time derivatives.

    Notebooks: (3.2).

    Args:
        schedule: any schedule.
        t: times, inside `schedule.domain` for finite results.

    Returns:
        `Coefficients`, each in the shape of `t`.

    Example:
        >>> [float(c) for c in coefficients(Linear(), 0.25)]
        [0.25, 0.75, 1.0, -1.0]
    """
    check_schedule(schedule)
    t = _as_times(t)
    alpha, d_alpha = _with_derivative(schedule.alpha, t)
    sigma, d_sigma = _with_derivative(schedule.sigma, t)
    return Coefficients(alpha, sigma, d_alpha, d_sigma)


def log_snr(schedule: Schedule, t: Elementwise) -> Elementwise:
    """log(alpha^2 / sigma^2); -inf where alpha = 0 and inf where sigma = 0.

    Notebooks: (3.6).
    """
    check_schedule(schedule)
    t = _as_times(t)
    return 2 * (jnp.log(schedule.alpha(t)) - jnp.log(schedule.sigma(t)))


def vanishes(coefficient: Callable[[Elementwise], Elementwise], t: float) -> bool:
    """Whether `schedule.alpha` or `schedule.sigma` is known to be 0 at `t`: a Python bool, also while tracing."""
    check_function("coefficient", coefficient, "a function of t, such as schedule.alpha", 1)
    check_number("t", t, "[0, 1]")
    with jax.ensure_compile_time_eval():
        value = coefficient(jnp.asarray(t, dtype=float))
        return not is_traced(value) and bool(value == 0)


def stands_still(schedule: Schedule, t: Elementwise) -> Bool[AnyArray, " *shape"]:
    """Whether alpha sigma' = sigma alpha' at `t`: the log-SNR stands still, and a velocity says nothing of the data."""
    c = coefficients(schedule, t)
    return c.alpha * c.d_sigma == c.sigma * c.d_alpha


def known_to_stand_still(schedule: Schedule, t: float) -> bool:
    """`stands_still` at one time, as a Python bool; False where a setting is traced."""
    with jax.ensure_compile_time_eval():
        value = stands_still(schedule, jnp.asarray(t, dtype=float))
        return not is_traced(value) and bool(value)


@dataclass(frozen=True)
class Linear:
    """alpha = t, sigma = 1 - (1 - sigma_min) t: straight lines, the path of conditional OT and rectified flow.

    `sigma_min = 0` is rectified flow (Liu et al. 2022, arXiv:2209.03003); a small positive `sigma_min` is the path of
    Lipman et al. 2022 (arXiv:2210.02747, eq. 20), which ends in a Gaussian of that width around each data point.

    Notebooks: (3.2).

    Raises:
        ValueError: if `sigma_min` is outside [0, 1).
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        check_setting(self, "sigma_min", "[0, 1)")

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def alpha(self, t: Elementwise) -> Elementwise:
        return t

    def sigma(self, t: Elementwise) -> Elementwise:
        # Not 1 - (1 - sigma_min) t, in which float32 has no small sigma_min.
        return 1 - t + self.sigma_min * t

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        # alpha / sigma = r gives t = r / (1 + (1 - sigma_min) r); dividing by r keeps r = inf exact.
        return 1 / (1 + (jnp.exp(-log_snr / 2) - self.sigma_min))


@dataclass(frozen=True)
class Cosine:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): the trigonometric, variance-preserving path.

    Albergo & Vanden-Eijnden 2022 (arXiv:2209.15571); in diffusion time the cosine schedule of Nichol & Dhariwal 2021
    (arXiv:2102.09672, eq. 17) without its offset.

    Notebooks: (3.2).
    """

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def alpha(self, t: Elementwise) -> Elementwise:
        return jnp.sin(math.pi / 2 * t)

    def sigma(self, t: Elementwise) -> Elementwise:
        # sin of the complement is exactly 0 at t = 1, where cos(pi / 2) rounds to a negative number in float32.
        return jnp.sin(math.pi / 2 * (1 - t))

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        return 2 / math.pi * jnp.arctan(jnp.exp(log_snr / 2))


@dataclass(frozen=True)
class Polynomial:
    """alpha = t^n, sigma = 1 - t^n: the linear path run at another speed.

    Notebooks: (3.2).

    Raises:
        ValueError: if `n` is not positive.
    """

    n: float = 2.0

    def __post_init__(self) -> None:
        check_known("n", self.n)  # its domain depends on it
        check_setting(self, "n", "(0, inf)")

    @property
    def domain(self) -> tuple[float, float]:
        return (0.0 if self.n >= 1 else _EDGE), 1.0

    def alpha(self, t: Elementwise) -> Elementwise:
        return t**self.n

    def sigma(self, t: Elementwise) -> Elementwise:
        return 1 - t**self.n

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        return jax.nn.sigmoid(log_snr / 2) ** (1 / self.n)


@dataclass(frozen=True)
class MaskCosine:
    """alpha = 1 - cos(pi t / 2), sigma = cos(pi t / 2): convex, slow at first and fast at last.

    The cosine schedule of masked diffusion (MD4, Shi et al. 2024, arXiv:2406.04329): of few tokens that are seen, each
    is chosen with care.
    """

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def alpha(self, t: Elementwise) -> Elementwise:
        return jnp.where(t < 0.5, self._little(t), 1 - self._left(t))

    def sigma(self, t: Elementwise) -> Elementwise:
        return jnp.where(t < 0.5, 1 - self._little(t), self._left(t))

    # In forms that have small values, and a small slope, with all their digits in float32.
    def _little(self, t: Elementwise) -> Elementwise:
        return 2 * jnp.sin(math.pi / 4 * t) ** 2

    def _left(self, t: Elementwise) -> Elementwise:
        return jnp.sin(math.pi / 2 * (1 - t))

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        alpha, sigma = jax.nn.sigmoid(log_snr / 2), jax.nn.sigmoid(-log_snr / 2)
        return 2 / math.pi * jnp.arctan2(jnp.sqrt(alpha * (1 + sigma)), sigma)


@dataclass(frozen=True)
class SineSquared:
    """alpha = sin^2(pi t / 2), sigma = cos^2(pi t / 2): convex, slow at both ends.

    With it the law of a token goes from the mask to the data along a great circle of `sqrt(p)`, at constant speed in
    the metric of Fisher and Rao: of all schedules the one with the least kinetic energy (Shaul et al. 2024,
    arXiv:2412.03487). Where the source may draw the token of the data itself, with probability p0, that schedule is
    `alpha = 1 - sin^2((1 - t) W) / sin^2 W` with `W = arccos sqrt(p0)`: p0 = 0 for a mask, 1 / K for `UniformTokens`.
    Of other sources p0, and with it the best schedule, differs from token to token.

    Attributes:
        p0: how often the source draws the token of the data.

    Raises:
        ValueError: if `p0` is outside [0, 1).
    """

    p0: float = 0.0

    def __post_init__(self) -> None:
        check_setting(self, "p0", "[0, 1)")

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    @property
    def _angle(self) -> Any:
        """Pi / 2 - W: how far p_0 is from a mask."""
        return jnp.arcsin(jnp.sqrt(self.p0)) if is_traced(self.p0) else math.asin(math.sqrt(self.p0))

    def alpha(self, t: Elementwise) -> Elementwise:
        return jnp.where(t < 0.5, self._little(t), 1 - self._left(t))

    def sigma(self, t: Elementwise) -> Elementwise:
        return jnp.where(t < 0.5, 1 - self._little(t), self._left(t))

    # In forms that have small values, and a small slope, with all their digits in float32.
    def _little(self, t: Elementwise) -> Elementwise:
        turned = (math.pi / 2 - self._angle) * t  # of sin^2 W - sin^2((1 - t) W)
        return 1 / (1 - self.p0) * jnp.sin(turned) * jnp.sin(turned + 2 * self._angle)

    def _left(self, t: Elementwise) -> Elementwise:
        return 1 / (1 - self.p0) * jnp.sin((math.pi / 2 - self._angle) * (1 - t)) ** 2

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        alpha, sigma = jax.nn.sigmoid(log_snr / 2), jax.nn.sigmoid(-log_snr / 2)
        # The angle from p_0 to p_t, by its sine and cosine; arrived^2 is how often the token is that of the data.
        arrived, left = jnp.sqrt(alpha + self.p0 * sigma), jnp.sqrt(self.p0 * sigma)
        sine = jnp.where(alpha > 0, alpha / (arrived + left), 0) * (1 - self.p0) ** 0.5
        cosine = (1 - self.p0) * jnp.sqrt(sigma) + self.p0**0.5 * arrived
        return jnp.arctan2(sine, cosine) / (math.pi / 2 - self._angle)


@dataclass(frozen=True)
class VP:
    """The variance-preserving diffusion with linear beta: alpha = exp(-T / 2), sigma = sqrt(1 - exp(-T)).

    `T(t) = s beta_min + s^2 (beta_max - beta_min) / 2` with `s = 1 - t` (Song et al. 2021, arXiv:2011.13456, eq. 33).
    At t = 0 a little signal is left, alpha(0) = 0.0066; at t = 1 sigma has an infinite slope, left out of the domain.

    Notebooks: (2.9).

    Raises:
        ValueError: unless 0 < beta_min <= beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_setting(self, "beta_min", "(0, inf)")
        check_setting(self, "beta_max", "(0, inf)")
        if not (is_traced(self.beta_min) or is_traced(self.beta_max)):
            check_number("beta_max", self.beta_max, f"[{self.beta_min}, inf)")

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0 - _EDGE

    def _integrated_beta(self, t: Elementwise) -> Elementwise:
        s = 1 - t
        return s * self.beta_min + s**2 * (self.beta_max - self.beta_min) / 2

    def alpha(self, t: Elementwise) -> Elementwise:
        return jnp.exp(-self._integrated_beta(t) / 2)

    def sigma(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(-jnp.expm1(-self._integrated_beta(t)))

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        integrated = jax.nn.softplus(-log_snr)  # exp(-T) = sigmoid(log_snr)
        # The root of the quadratic in the form that loses no digits near T = 0, and that allows beta_max = beta_min.
        slope = self.beta_max - self.beta_min
        return 1 - 2 * integrated / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integrated))


@dataclass(frozen=True)
class LinearVP:
    """alpha = t, sigma = sqrt(1 - t^2): variance-preserving with linear signal; the slope of sigma is infinite at 1.

    Notebooks: (3.2).
    """

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0 - _EDGE

    def alpha(self, t: Elementwise) -> Elementwise:
        return t

    def sigma(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt((1 - t) * (1 + t))

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        return jnp.sqrt(jax.nn.sigmoid(log_snr))


@dataclass(frozen=True)
class VE:
    """alpha = 1, sigma = sigma_max (sigma_min / sigma_max)^t: the variance-exploding diffusion with geometric noise.

    Song et al. 2021 (arXiv:2011.13456, eq. 31) in reversed time. The source still carries the data at t = 0:
    `x_0 = x1 + sigma_max x0`, so sampling starts from `paths.start` and `sigma_max` has to be large.

    Notebooks: (3.2).

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        check_increasing("(0, inf)", sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def alpha(self, t: Elementwise) -> Elementwise:
        return jnp.ones_like(t)

    def sigma(self, t: Elementwise) -> Elementwise:
        return self.sigma_max * jnp.exp(log(self.sigma_min / self.sigma_max) * t)

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        return (-log_snr / 2 - log(self.sigma_max)) / log(self.sigma_min / self.sigma_max)


@dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = sigma_max (1 - t): the variance-exploding diffusion that runs at constant speed in sigma.

    Euler and Heun steps in t are then those in sigma of Karras et al. 2022 (arXiv:2206.00364, algorithm 1). Sampling
    starts from `paths.start`, as with `VE`.

    Notebooks: (3.2).

    Raises:
        ValueError: unless `sigma_max` is positive and finite.
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        check_setting(self, "sigma_max", "(0, inf)")

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def alpha(self, t: Elementwise) -> Elementwise:
        return jnp.ones_like(t)

    def sigma(self, t: Elementwise) -> Elementwise:
        return self.sigma_max * (1 - t)

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        return 1 - jnp.exp(-log_snr / 2) / self.sigma_max


def linear_betas(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> tuple[float, ...]:
    """The beta table of Ho et al. 2020 (arXiv:2006.11239, sec. 4), equally spaced from `beta_start` to `beta_end`."""
    check_integer("num_steps", num_steps, least=2)
    check_number("beta_start", beta_start, "(0, 1)")
    check_number("beta_end", beta_end, "(0, 1)")
    return tuple(beta_start + (beta_end - beta_start) * i / (num_steps - 1) for i in range(num_steps))


@dataclass(frozen=True)
class DDPM:
    """DDPM's discrete beta table as a schedule in continuous time.

    The n-th of N entries (n = 1..N) sits at `t = 1 - n / N`: there alpha^2 = prod_{i <= n} (1 - beta_i), Ho et al. 2020
    (arXiv:2006.11239, eq. 4). In between, log alpha is linear, which is the VP diffusion with a piecewise constant
    beta. The domain ends at the table's first entry, t = 1 - 1 / N.

    Notebooks: (2.9), (5.8).

    Raises:
        ValueError: if the table has fewer than two entries or one outside (0, 1).
    """

    betas: tuple[float, ...] = field(default_factory=linear_betas)

    def __post_init__(self) -> None:
        given = self.betas
        betas = tuple(map(as_number, given)) if np.ndim(given) == 1 and not isinstance(given, str) else ()
        if len(betas) < 2 or not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least two numbers in (0, 1), got {shown(given)}.")
        object.__setattr__(self, "betas", betas)  # a list or an array would not be hashable

    def __repr__(self) -> str:
        return f"DDPM({len(self.betas)} betas, {self.betas[0]:g} to {self.betas[-1]:g})"

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0 - 1.0 / len(self.betas)

    def _table(self) -> tuple[Array, Array]:
        """Times from 0 to 1 and -log alpha^2 at each."""
        total = [0.0]
        for beta in self.betas:
            total.append(total[-1] - math.log1p(-beta))
        num = len(self.betas)
        return jnp.asarray([1 - n / num for n in range(num, -1, -1)]), jnp.asarray(total[::-1])

    def _integrated_beta(self, t: Elementwise) -> Elementwise:
        times, integrated = self._table()
        dtype = jnp.result_type(t, float)
        return jnp.interp(t, times.astype(dtype), integrated.astype(dtype))

    def alpha(self, t: Elementwise) -> Elementwise:
        return jnp.exp(-self._integrated_beta(t) / 2)

    def sigma(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(-jnp.expm1(-self._integrated_beta(t)))

    def t_from_log_snr(self, log_snr: Elementwise) -> Elementwise:
        times, integrated = self._table()
        return jnp.interp(jax.nn.softplus(-log_snr), integrated[::-1], times[::-1])
