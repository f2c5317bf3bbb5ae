"""Remasking: of masked tokens, some that are there are masked again, so that what was drawn too early is drawn anew.

Wang et al. 2025 (ReMDM, arXiv:2503.00307). From t to s a token is masked with probability sigma, and a mask falls with
`(kappa_s - (1 - sigma) kappa_t) / (1 - kappa_t)`: the marginals of the path stay what they are, for any sigma up to
`min(1, (1 - kappa_s) / kappa_t)`, which every rule is cut at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax.numpy as jnp

from fm_jax.checks import check_increasing, check_setting
from fm_jax.types import Array, Elementwise

Remask: TypeAlias = Callable[[Elementwise, Elementwise, Elementwise], Elementwise]
"""`remask(t, kappa, kappa_next) -> sigma`, elementwise; more than there may be is cut."""


def most(kappa: Elementwise, kappa_next: Elementwise) -> Elementwise:
    """The largest sigma with which the marginals can be kept."""
    return jnp.minimum(1.0, (1 - kappa_next) / jnp.maximum(kappa, 1e-12))


@dataclass(frozen=True)
class Cap:
    """sigma = `eta`, or the most there may be."""

    eta: float = 0.04

    def __post_init__(self) -> None:
        check_setting(self, "eta", "[0, 1]")

    def __call__(self, t: Elementwise, kappa: Elementwise, kappa_next: Elementwise) -> Array:
        return jnp.minimum(self.eta, most(kappa, kappa_next))


@dataclass(frozen=True)
class Rescale:
    """sigma = `eta` times the most there may be."""

    eta: float = 0.015

    def __post_init__(self) -> None:
        check_setting(self, "eta", "[0, 1]")

    def __call__(self, t: Elementwise, kappa: Elementwise, kappa_next: Elementwise) -> Array:
        return self.eta * most(kappa, kappa_next)


@dataclass(frozen=True)
class Loop:
    """Another rule between two times, and none elsewhere."""

    rule: Remask
    first: float = 0.45
    last: float = 0.95

    def __post_init__(self) -> None:
        check_increasing("[0, 1]", first=self.first, last=self.last)

    def __call__(self, t: Elementwise, kappa: Elementwise, kappa_next: Elementwise) -> Array:
        return jnp.where((t >= self.first) & (t < self.last), self.rule(t, kappa, kappa_next), 0.0)
