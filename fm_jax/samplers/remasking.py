"""Remasking: of masked tokens, some that are there are masked again, so that what was drawn too early is drawn anew.

Wang et al. 2025 (ReMDM, arXiv:2503.00307). In a step from kappa to kappa_next a token is masked with probability
sigma, and a mask falls with `(kappa_next - (1 - sigma) kappa) / (1 - kappa)`: the marginals of the path stay what they
are, for every sigma up to `min(1, (1 - kappa_next) / kappa)`, at which each rule is cut.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp

from fm_jax.checks import check_function, check_integer, check_setting, shown
from fm_jax.types import Array, Elementwise

Remask: TypeAlias = Callable[[Elementwise, Elementwise], Elementwise]
"""`remask(kappa, kappa_next) -> sigma`, elementwise, not negative; more than there may be is cut."""


def most(kappa: Elementwise, kappa_next: Elementwise) -> Array:
    """The largest sigma with which the marginals can be kept, `min(1, (1 - kappa_next) / kappa)`."""
    return jnp.where(kappa > 0, jnp.minimum(1.0, (1 - kappa_next) / jnp.where(kappa > 0, kappa, 1)), 1.0)


@dataclass(frozen=True)
class Cap:
    """sigma = `eta`, or the most there may be. Keeps the marginals of the path.

    Raises:
        ValueError: unless `eta` is in [0, 1].

    Example:
        >>> float(Cap(0.25)(0.5, 0.6)), float(Cap(0.25)(0.5, 1.0))
        (0.25, 0.0)
    """

    eta: float = 0.04

    def __post_init__(self) -> None:
        check_setting(self, "eta", "[0, 1]")

    def __call__(self, kappa: Elementwise, kappa_next: Elementwise) -> Array:
        return jnp.minimum(self.eta, most(kappa, kappa_next))


@dataclass(frozen=True)
class Rescale:
    """sigma = `eta` times the most there may be. Keeps the marginals of the path.

    Raises:
        ValueError: unless `eta` is in [0, 1].

    Example:
        >>> float(Rescale(0.5)(0.5, 0.75))
        0.25
    """

    eta: float = 0.015

    def __post_init__(self) -> None:
        check_setting(self, "eta", "[0, 1]")

    def __call__(self, kappa: Elementwise, kappa_next: Elementwise) -> Array:
        return self.eta * most(kappa, kappa_next)


@dataclass(frozen=True)
class Loop:
    """Time stands still at `at` for `num` steps, in which a rule masks as many tokens as masks fall; none elsewhere.

    Each of them costs one evaluation, and all keep the marginals of the path at that time: what was decided early is
    reconsidered by a network that sees most of the rest.

    Attributes:
        rule: such as `Rescale(0.5)`.
        at: time stands still at the last time of the grid that is not after it; at the first, where all are.
        num: how many steps.

    Raises:
        ValueError: for what is no rule, or itself of this kind or `Confidence`; for `at` outside of (0, 1), or less
            than one step.
    """

    rule: Remask = Rescale(0.5)
    at: float = 0.9
    num: int = 8

    def __post_init__(self) -> None:
        check_plain(self.rule, (Loop, Confidence))
        check_setting(self, "at", "(0, 1)")
        check_integer("num", self.num)

    def __call__(self, kappa: Elementwise, kappa_next: Elementwise) -> Array:
        return jnp.where(kappa == kappa_next, self.rule(kappa, kappa_next), 0.0)

    def place(self, times: Array) -> Array:
        """Where in the times [num + 1] time stands still: the index."""
        return jnp.maximum(jnp.searchsorted(times, self.at + 1e-6, side="right") - 1, 0)


@dataclass(frozen=True)
class Confidence:
    """A rule's sigma shared out among the tokens: the less likely one was when it was drawn, the sooner it is masked.

    Token i gets `min(1, l e^-c_i)`, of the n tokens of its example that were drawn, with c the probability that the
    network gave each when it was drawn, and l such that they sum to n sigma. As many are masked as by the rule alone,
    but not all alike: the marginals of the path are not kept, likely tokens become more. What is there at the start
    counts as given: it is never masked.

    Attributes:
        rule: that says how many, `Cap`, `Rescale`, `Loop` or a function of your own.

    Raises:
        ValueError: for what is no rule.
    """

    rule: Remask = Rescale(0.5)

    def __post_init__(self) -> None:
        check_plain(self.rule, (Confidence,))

    def __call__(self, kappa: Elementwise, kappa_next: Elementwise) -> Elementwise:
        return self.rule(kappa, kappa_next)

    def chances(self, sigma: Array, confidence: Array) -> Array:
        """With what probability each token is masked, [batch, ...], of mean sigma over the drawn ones of each example.

        Args:
            sigma: from 0 to 1, a scalar or [batch, 1, ..., 1].
            confidence: [batch, ...]; infinite at tokens that were not drawn.
        """
        batch = len(confidence)
        weights = jnp.exp(-confidence).reshape(batch, math.prod(confidence.shape[1:]))
        num = jnp.isfinite(confidence).reshape(weights.shape).sum(axis=1, keepdims=True)
        wanted = jnp.broadcast_to(sigma, (batch, *(1,) * (confidence.ndim - 1))).reshape(batch, 1) * num
        # With the k largest at 1 the others share what is left: the first k at which none of them is above 1.
        ordered = jnp.sort(weights, axis=1, descending=True)
        rest = jnp.cumsum(ordered[:, ::-1], axis=1)[:, ::-1]
        factor = (wanted - jnp.arange(weights.shape[1])[None]) / jnp.where(rest > 0, rest, 1)
        first = jnp.argmax(factor * ordered <= 1, axis=1)[:, None]
        chance = jnp.take_along_axis(factor, first, axis=1) * weights
        return jnp.clip(chance, 0, 1).reshape(confidence.shape)


def check_remask(remask: Any, name: str = "remask") -> None:
    """Raises `ValueError` for what is not a rule of remasking."""
    wanted = "a rule of remasking, such as Cap() or Rescale() of fm_jax.samplers"
    check_function(name, remask, wanted)
    try:
        check_function(name, remask, wanted, 2)
    except ValueError:
        raise ValueError(f"{name} must be {wanted}, got {type(remask).__module__}.{shown(remask)}.") from None


def check_plain(rule: Any, others: tuple[type, ...]) -> None:
    """Raises `ValueError` for what is not a rule, or one of the others, which are not put into each other."""
    check_remask(rule, "rule")
    if isinstance(rule, others):
        raise ValueError(f"rule must say sigma alone, as Cap() and Rescale() do, got {shown(rule)}.")
