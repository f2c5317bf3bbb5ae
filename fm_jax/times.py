"""Time samplers: where on the path a loss spends its examples.

Each is a frozen dataclass, called as `sampler(key, batch_size) -> t [batch]`, with the `domain` it draws from. t = 1 is
data: distributions published in diffusion time are mirrored.
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from fm_jax.checks import check_has, check_integer, check_key, check_range, check_schedule, check_setting
from fm_jax.schedules import Linear, log_snr
from fm_jax.types import Key, PerExample, Schedule, TimeSampler


def _check_draw(key: Key, batch_size: int) -> None:
    check_key(key)
    check_integer("batch_size", batch_size, least=0)


@dataclass(frozen=True)
class Uniform:
    """t ~ U(t_min, t_max)."""

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.t_min, self.t_max)

    @property
    def domain(self) -> tuple[float, float]:
        return self.t_min, self.t_max

    def __call__(self, key: Key, batch_size: int) -> PerExample:
        _check_draw(key, batch_size)
        return jax.random.uniform(key, (batch_size,), minval=self.t_min, maxval=self.t_max)


@dataclass(frozen=True)
class Stratified:
    """Uniform with one draw in each of `batch_size` equal strata: the batch average over time varies far less.

    `t_i = t_min + (t_max - t_min) (i + u_i) / batch_size` with independent u_i ~ U(0, 1).
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_range(self.t_min, self.t_max)

    @property
    def domain(self) -> tuple[float, float]:
        return self.t_min, self.t_max

    def __call__(self, key: Key, batch_size: int) -> PerExample:
        _check_draw(key, batch_size)
        u = (jnp.arange(batch_size) + jax.random.uniform(key, (batch_size,))) / batch_size
        return self.t_min + (self.t_max - self.t_min) * u


@dataclass(frozen=True)
class LogitNormal:
    """logit(t) ~ N(mean, std^2): most draws in the middle (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Here t = 1 is data, in the paper it is noise: `LogitNormal(m, s)` is its rf/lognorm(-m, s).
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_setting(self, "mean", "(-inf, inf)")
        check_setting(self, "std", "(0, inf)")

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def __call__(self, key: Key, batch_size: int) -> PerExample:
        _check_draw(key, batch_size)
        return jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (batch_size,)))


@dataclass(frozen=True)
class Mode:
    """Mode sampling with heavy tails: t = u + scale (cos^2(pi u / 2) - 1 + u), u ~ U(0, 1).

    Positive scales favour the middle, negative ones the ends; scale 0 is uniform. Esser et al. 2024
    (arXiv:2403.03206, eq. 20), in our direction of time.

    Raises:
        ValueError: if `scale` is outside [-1, 2 / (pi - 2)], where the map is not monotone.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        check_setting(self, "scale", f"[-1, {2 / (math.pi - 2)}]")

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def __call__(self, key: Key, batch_size: int) -> PerExample:
        _check_draw(key, batch_size)
        u = jax.random.uniform(key, (batch_size,))
        return u + self.scale * (jnp.cos(math.pi / 2 * u) ** 2 - 1 + u)


@dataclass(frozen=True)
class Beta:
    """t ~ Beta(a, b): mean a / (a + b)."""

    a: float = 1.0
    b: float = 1.0

    def __post_init__(self) -> None:
        check_setting(self, "a", "(0, inf)")
        check_setting(self, "b", "(0, inf)")

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def __call__(self, key: Key, batch_size: int) -> PerExample:
        _check_draw(key, batch_size)
        return jax.random.beta(key, self.a, self.b, (batch_size,))


@dataclass(frozen=True)
class EDMLogNormal:
    """log(sigma / alpha) ~ N(mean, std^2): the training noise levels of EDM, on any schedule.

    The normal is truncated to the noise levels that the schedule's domain reaches. Karras et al. 2022
    (arXiv:2206.00364, table 1).

    Raises:
        ValueError: if `std` is not positive.
    """

    mean: float = -1.2
    std: float = 1.2
    schedule: Schedule = field(default_factory=Linear)

    def __post_init__(self) -> None:
        check_setting(self, "mean", "(-inf, inf)")
        check_setting(self, "std", "(0, inf)")
        check_schedule(self.schedule)

    @property
    def domain(self) -> tuple[float, float]:
        return self.schedule.domain

    def __call__(self, key: Key, batch_size: int) -> PerExample:
        _check_draw(key, batch_size)
        t_min, t_max = self.domain
        highest, lowest = (-log_snr(self.schedule, jnp.asarray(t)) / 2 for t in (t_min, t_max))
        z = jax.random.truncated_normal(
            key, (lowest - self.mean) / self.std, (highest - self.mean) / self.std, (batch_size,)
        )
        t = self.schedule.t_from_log_snr(-2 * (self.mean + self.std * z))
        return jnp.clip(t, t_min, t_max)  # the inverse may leave the domain by a rounding error


@dataclass(frozen=True)
class Rescale:
    """Another sampler's draws from [0, 1], mapped linearly to [t_min, t_max]."""

    sampler: TimeSampler
    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        check_range(self.t_min, self.t_max)
        _check_unit("sampler", self.sampler)

    @property
    def domain(self) -> tuple[float, float]:
        return self.t_min, self.t_max

    def __call__(self, key: Key, batch_size: int) -> PerExample:
        return self.t_min + (self.t_max - self.t_min) * self.sampler(key, batch_size)


@dataclass(frozen=True)
class Shifted:
    """Another sampler's draws from [0, 1], shifted towards the noise: sigma -> s sigma / (1 + (s - 1) sigma).

    With sigma = 1 - t. For pictures of more pixels than those a distribution of times was chosen for; Esser et al. 2024
    (arXiv:2403.03206, eq. 23) train at 1024 pixels with s = 3. `samplers.grids.shifted` is the grid that goes with it.

    Raises:
        ValueError: if `shift` is not positive, or `sampler` does not draw from [0, 1].
    """

    sampler: TimeSampler
    shift: float

    def __post_init__(self) -> None:
        check_setting(self, "shift", "(0, inf)")
        _check_unit("sampler", self.sampler)

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, 1.0

    def __call__(self, key: Key, batch_size: int) -> PerExample:
        t = self.sampler(key, batch_size)
        return t / (t + self.shift * (1 - t))


def _check_unit(name: str, sampler: TimeSampler) -> None:
    """Raises `ValueError` for what is no time sampler on [0, 1]."""
    check_has(name, sampler, ("domain", "__call__"), "a time sampler, such as LogitNormal()")
    if sampler.domain != (0.0, 1.0):
        raise ValueError(f"{name} must draw from [0, 1], got {list(sampler.domain)}.")
