"""Affine conditional paths `x_t = alpha x1 + sigma x0`, for any source and any pairing of x0 with x1."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import (
    check_array,
    check_member,
    check_number,
    check_real,
    check_same_shape,
    check_schedule,
    check_source,
    check_times,
    is_traced,
)
from fm_jax.schedules import Linear, coefficients, vanishes
from fm_jax.shapes import time_of
from fm_jax.sources import Normal, is_standard_normal
from fm_jax.types import KINDS, Array, Key, PathSample, Schedule, Source, State, Time, Weight


@dataclass(frozen=True)
class AffinePath:
    """The path `x_t = alpha(t) x1 + sigma(t) x0` with velocity `u_t = alpha'(t) x1 + sigma'(t) x0`.

    Lipman et al. 2022 (arXiv:2210.02747, eq. 10 and 15) for a Gaussian source; Albergo & Vanden-Eijnden 2022
    (arXiv:2209.15571, eq. 4) for any two distributions.

    Notebooks: (3.2), (3.4), (3.5).

    Attributes:
        schedule: alpha and sigma.
        source: of x0, where a batch brings none; `None` if each has to. Score is a kind, and conversions hold, for the
            standard normal.

    Example:
        >>> x0, x1 = jnp.zeros((4, 2)), jnp.ones((4, 2))
        >>> sample = AffinePath(Linear()).sample(None, jnp.full(4, 0.25), x0, x1)
        >>> sample.x_t[0], sample.u_t[0]
        (Array([0.25, 0.25], dtype=float32), Array([1., 1.], dtype=float32))
    """

    schedule: Schedule = field(default_factory=Linear)
    source: Source | None = field(default_factory=Normal)

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if self.source is not None:
            check_source(self.source)

    @property
    def domain(self) -> tuple[float, float]:
        return self.schedule.domain

    @property
    def kinds(self) -> tuple[str, ...]:
        return KINDS if is_standard_normal(self.source) else KINDS[:3]

    def sample(self, key: Key | None, t: Time, x0: State, x1: State) -> PathSample:
        """The point at `t` between `x0` and `x1`, and its velocity.

        Args:
            key: not used, an affine path is a function of its ends; there so that every path has one signature.
            t: times.
            x0: source.
            x1: data.

        Raises:
            ValueError: if the shapes of `x0` and `x1` differ, they are no real numbers, or `t` is neither a scalar nor
                [batch].
        """
        del key
        check_same_shape(x0=x0, x1=x1)
        check_real("x0", x0)
        check_real("x1", x1)
        alpha, sigma, d_alpha, d_sigma = coefficients(self.schedule, time_of(t, x1))
        return PathSample(jnp.asarray(t), alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0, x0, x1)

    def targets(self, sample: PathSample) -> dict[str, Array]:
        """What a network of each kind should say at a point of the path, all in the shape of `x1`.

        velocity `u_t`; data `x1`; noise `x0`; score `grad log p(x_t | x1) = -x0 / sigma`, which holds for a standard
        normal source (Vincent 2011; Song et al. 2021, arXiv:2011.13456, eq. 7) and is infinite where sigma = 0.
        """
        found = {"velocity": sample.u_t, "data": sample.x1, "noise": sample.x0}
        if "score" in self.kinds:
            found["score"] = -sample.x0 / self.schedule.sigma(time_of(sample.t, sample.x0))
        return found

    def target_domain(self, kind: str, *, weight: Weight | None = None, margin: float = 1e-3) -> tuple[float, float]:
        """The range of times on which the target of a kind is finite, and the weight of its error too.

        `domain` for velocity; all of [0, 1] for data and noise; for the score, up to `margin` before sigma = 0. A
        `weight(t, kind, schedule)` that is not finite at an end moves it by `margin` inward, from where the schedule's
        domain ends if that is short of it.
        """
        check_member("kind", kind, self.kinds)
        check_number("margin", margin, "(0, 0.5)")
        low, high = self.domain if kind == "velocity" else (0.0, 1.0)
        if kind == "score" and vanishes(self.schedule.sigma, 1.0):
            high = 1.0 - margin
        return (low, high) if weight is None else where_finite(weight, kind, self.schedule, (low, high), margin)


def where_finite(
    weight: Weight, kind: str, schedule: Schedule, domain: tuple[float, float], margin: float = 1e-3
) -> tuple[float, float]:
    """The part of a range of times where a weight is finite too: where it is not at an end, that moves inward.

    To where the domain of the schedule ends, if that is short of it, or else by `margin`. A traced weight passes.
    """

    def finite(t: float) -> bool:
        with jax.ensure_compile_time_eval():
            value = weight(jnp.full(1, t), kind, schedule)
            if not isinstance(value, int | float):
                check_array("weight(t, kind, schedule)", value)
            return is_traced(value) or bool(jnp.isfinite(value).all())

    (low, high), (first, last) = domain, schedule.domain
    low = low if finite(low) else first if finite(first) else max(low, first) + margin
    high = high if finite(high) else last if finite(last) else min(high, last) - margin
    return low, high


def start(schedule: Schedule, t0: float = 0.0) -> Normal:
    """The source that sampling starts from at `t0`: N(0, sigma(t0)^2), noise at the level that the path has there.

    For schedules with sigma(0) = 1 this is the standard normal; VE needs `sigma_max` times it. Starting later than 0
    without this scale is a common mistake. The signal `alpha(t0) x1` is left out, so alpha(t0) / sigma(t0) has to be
    small.

    Args:
        schedule: any schedule.
        t0: the time at which the sampler starts.

    Raises:
        ValueError: for what is no schedule, or a `t0` outside of its domain.

    Example:
        >>> from fm_jax.schedules import EDM
        >>> start(EDM(80.0))
        Normal(scale=80.0)
    """
    check_schedule(schedule)
    check_number("t0", t0, "[0, 1]")
    check_times("t0", t0, (schedule.domain[0], 1.0), f"the domain of {schedule}")
    with jax.ensure_compile_time_eval():
        sigma = schedule.sigma(jnp.asarray(t0, dtype=float))
    scale: Any = sigma if is_traced(sigma) else float(sigma)
    return Normal(scale)
