"""Rules of guidance: how the conditional and the unconditional velocity become one.

A rule is called as `rule(t, x, conditional, unconditional, scale)` and returns a velocity. Scale 1 is off, for every
rule: the result is then `conditional` to the last bit. All rules act on velocities, whatever the network predicts;
only `Extrapolate` would give the same if it acted on another kind of prediction.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax.numpy as jnp

from fm_jax.checks import check_function, check_integer, check_schedule, check_setting, check_shape
from fm_jax.schedules import coefficients
from fm_jax.shapes import expand_time, time_of
from fm_jax.types import AnyArray, Schedule, State, Time

Rule: TypeAlias = Callable[[Time, State, State, State, Time], State]
"""`rule(t, x, conditional, unconditional, scale) -> velocity`. Must return `conditional` where `scale` is 1: so it is
switched off outside an interval."""


def _dot(a: State, b: State) -> AnyArray:
    """Inner products over the event: [batch, ...] -> [batch, 1, ..., 1]."""
    return (a * b).sum(axis=tuple(range(1, a.ndim)), keepdims=True)


def _ratio(a: AnyArray, b: AnyArray, where_zero: float) -> AnyArray:
    """The quotient a / b, and `where_zero` where b = 0, with a finite gradient there too."""
    zero = b == 0
    return jnp.where(zero, where_zero, a / jnp.where(zero, 1, b))


def _sqrt(a: AnyArray) -> AnyArray:
    """The square root with derivative 0 at 0, where it is infinite."""
    return jnp.where(a > 0, jnp.sqrt(jnp.where(a > 0, a, 1)), 0)


def _project(a: State, b: State) -> State:
    """The multiple of `b` nearest to `a`, for each example: `b <a, b> / |b|^2`, and 0 where b = 0."""
    return b * _ratio(_dot(a, b), _dot(b, b), 0)


@dataclass(frozen=True)
class Extrapolate:
    """v_u + scale (v_c - v_u).

    With Gaussian marginals this is guiding the score, by `s_u + scale (s_c - s_u)`, the score of p_c^scale
    p_u^(1 - scale) at each t. The samples do not follow that tilted law at t = 1, unless p_c and p_u are Gaussians of
    one covariance: the tilted laws at different t are not marginals of one path. For N(m_c, a^2) and N(m_u, b^2) on
    the line their standard deviation is a^scale b^(1 - scale), and not (scale / a^2 + (1 - scale) / b^2)^(-1/2).

    Notebooks: (6.4).

    Example:
        >>> Extrapolate()(0.5, jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.zeros((1, 2)), 3.0)
        Array([[3., 3.]], dtype=float32)

    References:
        Ho & Salimans 2022 (arXiv:2207.12598, eq. 6), whose w is scale - 1; for flows, Zheng et al. 2023
        (arXiv:2311.13443).
    """

    def __call__(self, t: Time, x: State, conditional: State, unconditional: State, scale: Time) -> State:
        check_shape("conditional", conditional, x)
        check_shape("unconditional", unconditional, x)
        # v_c + (s - 1)(v_c - v_u) is v_u + s (v_c - v_u), and at s = 1 exactly v_c.
        return conditional + expand_time(scale - 1, conditional) * (conditional - unconditional)


@dataclass(frozen=True)
class Rescale:
    """g (1 + phi (std(v_c) / std(g) - 1)), with g = v_u + scale (v_c - v_u): undoes the growth of the guided velocity.

    The standard deviations are over the event of each example. The paper rescales what its network predicts, which is
    not the same for networks of other kinds; here it is the velocity always. phi = 0 is no rescaling.

    Raises:
        ValueError: if `phi` is outside [0, 1].

    References:
        Lin et al. 2023 (arXiv:2305.08891, sec. 3.4), with phi = 0.7.
    """

    phi: float = 0.7

    def __post_init__(self) -> None:
        check_setting(self, "phi", "[0, 1]")

    def __call__(self, t: Time, x: State, conditional: State, unconditional: State, scale: Time) -> State:
        guided = Extrapolate()(t, x, conditional, unconditional, scale)
        event = tuple(range(1, x.ndim))
        variance_ratio = _ratio(conditional.var(event, keepdims=True), guided.var(event, keepdims=True), 1)
        # In this form a ratio of 1 changes no bit.
        return guided * (1 + self.phi * (_sqrt(variance_ratio) - 1))


@dataclass(frozen=True)
class ZeroStar:
    """CFG-Zero*: s* v_u + scale (v_c - s* v_u) with s* = <v_c, v_u> / |v_u|^2, and 0 for t < `zero_until`.

    s* v_u is the multiple of v_u nearest to v_c, for each example. The paper's zero-init leaves out the first steps of
    the solver, 4% of them; here it is the time until which x stands still, the same for Euler's method on an even
    grid. Scale 1 is off in this too. The velocity jumps at `zero_until`: put it on the time grid.

    Raises:
        ValueError: if `zero_until` is outside [0, 1).

    References:
        Fan et al. 2025 (arXiv:2503.18886).
    """

    zero_until: float = 0.04

    def __post_init__(self) -> None:
        check_setting(self, "zero_until", "[0, 1)")

    def __call__(self, t: Time, x: State, conditional: State, unconditional: State, scale: Time) -> State:
        check_shape("unconditional", unconditional, x)
        guided = Extrapolate()(t, x, conditional, _project(conditional, unconditional), scale)
        still = (expand_time(t, x) < self.zero_until) & (expand_time(scale, x) != 1)
        return jnp.where(still, 0, guided)


@dataclass(frozen=True)
class Projected:
    """Adaptive projected guidance: less of the part of the guidance that only amplifies the data prediction.

    With data predictions D_c and D_u, the difference D_c - D_u is shortened to length `norm` where it is longer, and
    split into a part along D_c and one orthogonal to it. The guided prediction is
    `D_c + (scale - 1)(orthogonal + parallel * along)`. `parallel=1` and `norm=inf` is `Extrapolate`.

    A difference of velocities is that of data predictions times -det / sigma, with det = alpha sigma' - sigma alpha',
    and det D_c = sigma' x - sigma v_c. Projection knows no lengths, so that it applies to velocities as it stands,
    also where sigma or alpha is 0. The momentum of the paper needs memory between calls and is left out.

    Raises:
        ValueError: if `parallel` is not finite or `norm` not positive.

    References:
        Sadat et al. 2024 (arXiv:2410.02416), whose eta is `parallel` and r is `norm`.
    """

    schedule: Schedule
    parallel: float = 0.0
    norm: float = math.inf

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_setting(self, "parallel", "(-inf, inf)")
        check_setting(self, "norm", "(0, inf]")

    def __call__(self, t: Time, x: State, conditional: State, unconditional: State, scale: Time) -> State:
        alpha, sigma, d_alpha, d_sigma = coefficients(self.schedule, time_of(t, x))
        check_shape("conditional", conditional, x)
        check_shape("unconditional", unconditional, x)
        difference = conditional - unconditional
        if self.norm < math.inf:
            # min(1, norm / |D_c - D_u|), multiplied out so that nothing is divided by det or sigma.
            length = sigma * _sqrt(_dot(difference, difference))
            limit = self.norm * jnp.abs(alpha * d_sigma - sigma * d_alpha)
            difference = difference * jnp.where(length > limit, _ratio(limit, length, 1), 1)
        along = _project(difference, d_sigma * x - sigma * conditional)
        return conditional + expand_time(scale - 1, x) * (difference + (self.parallel - 1) * along)


@dataclass(frozen=True)
class FirstChannels:
    """Another rule on the first channels alone; the others keep the conditional velocity.

    The published FIDs of DiT, SiT and LightningDiT guide 3 channels of latents that have 4, or 32: their scales mean
    nothing without it.

    Notebooks: (12.9).

    Raises:
        ValueError: if `channels` is less than 1; when called, if the state has fewer.

    Example:
        >>> rule, x = FirstChannels(1), jnp.zeros((1, 2))
        >>> rule(0.5, x, jnp.ones((1, 2)), jnp.zeros((1, 2)), 3.0)
        Array([[3., 1.]], dtype=float32)

    References:
        Peebles & Xie 2022 (arXiv:2212.09748), appendix A.
    """

    channels: int = 3
    rule: Rule = Extrapolate()

    def __post_init__(self) -> None:
        check_integer("channels", self.channels)
        check_function("rule", self.rule, "a rule of guidance, such as Extrapolate()", 5)

    def __call__(self, t: Time, x: State, conditional: State, unconditional: State, scale: Time) -> State:
        check_shape("conditional", conditional, x)
        check_shape("unconditional", unconditional, x)
        if x.shape[-1] < self.channels:
            raise ValueError(f"x must have at least {self.channels} channels, got shape {x.shape}.")
        first = [each[..., : self.channels] for each in (x, conditional, unconditional)]
        guided = self.rule(t, first[0], first[1], first[2], scale)
        return jnp.concatenate([guided, conditional[..., self.channels :]], axis=-1)
