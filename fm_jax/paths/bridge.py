"""Stochastic interpolants `x_t = alpha x1 + sigma x0 + gamma z`, paths with a latent noise, and Brownian bridges."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from fm_jax.checks import (
    check_function,
    check_key,
    check_member,
    check_number,
    check_real,
    check_same_shape,
    check_schedule,
    check_setting,
    check_source,
    is_traced,
)
from fm_jax.schedules import Linear, coefficients, vanishes
from fm_jax.shapes import time_of
from fm_jax.sources import Normal
from fm_jax.types import Array, Elementwise, Key, PathSample, Schedule, Source, State, Time

Gamma: TypeAlias = Callable[[Elementwise], Elementwise]
"""`gamma(t)`, elementwise: the amplitude of the latent noise. An attribute `domain` says where gamma' is finite, if not
on all of [0, 1]."""


@dataclass(frozen=True)
class BrownianNoise:
    """gamma = sigma sqrt(t (1 - t)): given its ends, x_t is a Brownian bridge of variance sigma^2 per unit of time.

    The slope is infinite at both ends; the domain stays `margin` away from them.
    """

    sigma: float = 1.0
    margin: float = 1e-3

    def __post_init__(self) -> None:
        check_setting(self, "sigma", "(0, inf)")
        check_setting(self, "margin", "(0, 0.5)")

    @property
    def domain(self) -> tuple[float, float]:
        return self.margin, 1 - self.margin

    def __call__(self, t: Elementwise) -> Elementwise:
        return self.sigma * jnp.sqrt(t * (1 - t))


@dataclass(frozen=True)
class ConstantNoise:
    """gamma = sigma: u_t is that without noise, and both ends of the path are blurred by N(0, sigma^2).

    Independent conditional flow matching with sigma > 0 (Tong et al. 2023, arXiv:2302.00482, I-CFM).
    """

    sigma: float

    def __post_init__(self) -> None:
        check_setting(self, "sigma", "(0, inf)")

    def __call__(self, t: Elementwise) -> Elementwise:
        return jnp.full_like(t, self.sigma)


@dataclass(frozen=True)
class QuadraticNoise:
    """gamma = a t (1 - t): vanishes at both ends, with a finite slope (Albergo et al. 2023, arXiv:2303.08797)."""

    a: float = 1.0

    def __post_init__(self) -> None:
        check_setting(self, "a", "(0, inf)")

    def __call__(self, t: Elementwise) -> Elementwise:
        return self.a * t * (1 - t)


@dataclass(frozen=True)
class SineNoise:
    """gamma = a sin^2(pi t): vanishes at both ends together with its slope (Albergo et al. 2023, arXiv:2303.08797)."""

    a: float = 1.0

    def __post_init__(self) -> None:
        check_setting(self, "a", "(0, inf)")

    def __call__(self, t: Elementwise) -> Elementwise:
        # With the nearer end: sin(pi) rounds to a number that is not 0.
        return self.a * jnp.sin(math.pi * jnp.minimum(t, 1 - t)) ** 2


@dataclass(frozen=True)
class StochasticInterpolant:
    """The path `x_t = alpha x1 + sigma x0 + gamma z` with velocity `u_t = alpha' x1 + sigma' x0 + gamma' z`.

    z is standard normal and independent of the ends, which may come from any two distributions, coupled in any way. The
    coefficients alpha and sigma of the ends are those of `interpolant`; the usual conversions between velocity, data,
    noise and score are for a Gaussian source and do not hold here. What can be learned is the velocity, the latent z,
    the drift `alpha' x1 + sigma' x0`, which is the velocity without the latent's part, and the score `-z / gamma`;
    `losses.bridge_matching` learns drift and latent together.

    Attributes:
        interpolant: alpha and sigma.
        gamma: `gamma(t)`, one of the dataclasses of this file or any function of t.
        source: of x0, where a batch brings none.

    Raises:
        ValueError: if gamma or its slope is not finite at an end of the domain; a function of your own may say in an
            attribute `domain` where both are.

    Example:
        >>> path = StochasticInterpolant(Linear(), QuadraticNoise(2.0))
        >>> x0, x1, z = jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.ones((1, 2))
        >>> sample = path.at(jnp.array([0.25]), x0, x1, z)
        >>> sample.x_t, sample.u_t  # 0.25 + 2 * 0.25 * 0.75 and 1 + 2 * (1 - 2 * 0.25)
        (Array([[0.625, 0.625]], dtype=float32), Array([[2., 2.]], dtype=float32))

    References:
        Albergo, Boffi & Vanden-Eijnden 2023 (arXiv:2303.08797, eq. 2.1).
    """

    interpolant: Schedule = field(default_factory=Linear)
    gamma: Gamma = field(default_factory=BrownianNoise)
    source: Source = field(default_factory=Normal)
    schedule: ClassVar[None] = None
    kinds: ClassVar[tuple[str, ...]] = ("velocity", "latent", "drift", "score")

    def __post_init__(self) -> None:
        check_schedule(self.interpolant, "interpolant")
        check_function("gamma", self.gamma, "a function gamma(t), such as QuadraticNoise()", 1)
        check_source(self.source)
        for t in self.domain:
            with jax.ensure_compile_time_eval():
                found = value_and_slope(self.gamma, jnp.asarray(t, dtype=float))
            if any(map(is_traced, found)):
                continue
            values = [float(value) for value in found]
            if not all(map(math.isfinite, values)):
                raise ValueError(
                    f"gamma and its slope must be finite on the domain, got {values} at t = {t}; an attribute "
                    "domain = (t_min, t_max) of gamma says where they are."
                )

    @property
    def domain(self) -> tuple[float, float]:
        """Where u_t is finite."""
        low, high = getattr(self.gamma, "domain", (0.0, 1.0))
        return max(low, self.interpolant.domain[0]), min(high, self.interpolant.domain[1])

    def sample(self, key: Key | None, t: Time, x0: State, x1: State) -> PathSample:
        """The path at `t` with a fresh z.

        Args:
            key: typed key of z.
            t: times.
            x0: source.
            x1: data.

        Returns:
            `PathSample` with `z`.

        Raises:
            ValueError: if `key` is `None`, the shapes of `x0` and `x1` differ, or `t` is neither a scalar nor [batch].
        """
        if key is None:
            raise ValueError("a stochastic interpolant draws its noise: key must be a typed key, got None.")
        check_key(key)
        check_same_shape(x0=x0, x1=x1)
        return self.at(t, x0, x1, jax.random.normal(key, x1.shape, jnp.result_type(x0, x1)))

    def at(self, t: Time, x0: State, x1: State, z: State) -> PathSample:
        """The path at `t` for a given z; otherwise as `sample`."""
        check_same_shape(x0=x0, x1=x1, z=z)
        for name, each in (("x0", x0), ("x1", x1), ("z", z)):
            check_real(name, each)
        t_x = time_of(t, x1)
        alpha, sigma, d_alpha, d_sigma = coefficients(self.interpolant, t_x)
        gamma, d_gamma = value_and_slope(self.gamma, t_x)
        x_t = alpha * x1 + sigma * x0 + gamma * z
        return PathSample(jnp.asarray(t), x_t, d_alpha * x1 + d_sigma * x0 + d_gamma * z, x0, x1, z)

    def targets(self, sample: PathSample) -> dict[str, Array]:
        """What a network of each kind should say at a point of the path."""
        if sample.z is None:
            raise ValueError("the sample must have a latent z, as this path's own samples do, got None.")
        t_x = time_of(sample.t, sample.x1)
        _, _, d_alpha, d_sigma = coefficients(self.interpolant, t_x)
        gamma, _ = value_and_slope(self.gamma, t_x)
        drift = d_alpha * sample.x1 + d_sigma * sample.x0
        return {"velocity": sample.u_t, "latent": sample.z, "drift": drift, "score": -sample.z / gamma}

    def target_domain(self, kind: str, *, margin: float = 1e-3) -> tuple[float, float]:
        """The range of times on which the target of a kind is finite.

        All of [0, 1] for the latent; that of `interpolant` for the drift; `domain` for the velocity, and for the score,
        there less `margin` at an end with gamma = 0.
        """
        check_member("kind", kind, self.kinds)
        check_number("margin", margin, "(0, 0.5)")
        if kind == "latent":
            return 0.0, 1.0
        low, high = self.interpolant.domain if kind == "drift" else self.domain
        if kind == "score":
            low, high = low + margin * vanishes(self.gamma, low), high - margin * vanishes(self.gamma, high)
        return low, high


def BrownianBridge(sigma: float, margin: float = 1e-3) -> StochasticInterpolant:
    """The path `x_t = (1 - t) x0 + t x1 + sigma sqrt(t (1 - t)) z`: Brownian bridges between x0 and x1.

    Under the entropic coupling with regularisation 2 sigma^2 of the squared distance, its marginals are those of the
    Schroedinger bridge. Tong et al. 2023 (arXiv:2302.00482, SB-CFM; arXiv:2307.03672).

    Notebooks: (8.8).

    Args:
        sigma: of the Brownian motion, positive.
        margin: how far training stays from t = 0 and t = 1, where u_t is infinite.
    """
    return StochasticInterpolant(Linear(), BrownianNoise(sigma, margin))


def value_and_slope(gamma: Gamma, t: Elementwise) -> tuple[Elementwise, Elementwise]:
    """The noise amplitude and its time derivative."""
    t = jnp.asarray(t, dtype=jnp.result_type(t, float))
    return jax.jvp(lambda t: jnp.broadcast_to(gamma(t), t.shape), (t,), (jnp.ones_like(t),))
