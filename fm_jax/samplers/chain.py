"""Samplers of tokens: chains of jumps in continuous time, in steps in which each token is drawn by itself.

A step first decides whether a token is drawn anew, and only then what it is: the joint draw of "stay, or which token"
loses rare tokens in single precision (see `fm_jax.draws`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.checks import check_has, check_logits
from fm_jax.draws import bernoulli, categorical
from fm_jax.nfe import spent
from fm_jax.paths.mixture import MixturePath
from fm_jax.samplers.grids import check_forward
from fm_jax.samplers.loop import run_steps
from fm_jax.samplers.remasking import Remask, most
from fm_jax.shapes import time_of
from fm_jax.types import Array, ArrayTree, DenoiserFn, Key, Logits, RateFn, Solution, Time, Tokens


class TokenStep(NamedTuple):
    """How each token of x [batch, ...] is drawn in a step, independently of the others.

    Attributes:
        chance: that it is drawn anew, [batch, ...].
        weights: of what it then is, [batch, ..., K], not negative; only their proportions matter.
    """

    chance: Array
    weights: Logits

    def draw(self, key: Key, x: Tokens) -> Tokens:
        """The tokens after the step."""
        key_chance, key_token = jax.random.split(key)
        anew = bernoulli(key_chance, self.chance)
        return jnp.where(anew, categorical(key_token, self.weights).astype(x.dtype), x)

    def probs(self, x: Tokens) -> Logits:
        """The law of each token after the step, [batch, ..., K]."""
        total = self.weights.sum(axis=-1, keepdims=True)
        anew = self.chance[..., None] * self.weights / jnp.where(total > 0, total, 1)
        return anew + (1 - self.chance)[..., None] * jax.nn.one_hot(x, self.weights.shape[-1], dtype=anew.dtype)


def tau_leap(rates: RateFn, t: Time, t_next: Time, x: Tokens) -> TokenStep:
    """One step of `TauLeaping`: a token jumps with probability `min(1, h u)`, u its total rate at `t`.

    Args:
        rates: `u(t, x) -> [batch, ..., K]`.
        t: time.
        t_next: the time after the step, h later.
        x: tokens.
    """
    u = rates(t, x)
    check_logits("what rates return", u, x, u.shape[-1])
    h = time_of(t_next, x) - time_of(t, x)
    return TokenStep(jnp.clip(h * u.sum(axis=-1), 0, 1), u)


def mixture_step(
    denoiser: DenoiserFn, path: MixturePath, t: Time, t_next: Time, x: Tokens, *, remask: Remask | None = None
) -> TokenStep:
    """One step of `MixtureSteps`: with probability `1 - (1 - kappa_next) / (1 - kappa)` a token is drawn from p(x1 | x).

    Args:
        denoiser: logits of x1.
        path: that it was trained on.
        t: time.
        t_next: the time after the step.
        x: tokens.
        remask: with what probability a token that is there is masked again, see `samplers.remasking`.
    """
    posterior = path.posterior(denoiser(t, x), x)
    t, t_next = time_of(t, x), time_of(t_next, x)
    left, right = path.schedule.sigma(t), path.schedule.sigma(t_next)
    if remask is None:
        return TokenStep(jnp.broadcast_to(1 - right / left, x.shape), posterior)
    kappa, kappa_next = path.schedule.alpha(t), path.schedule.alpha(t_next)
    again = jnp.minimum(remask(t, kappa, kappa_next), most(kappa, kappa_next))
    masked = x == path.source.mask
    chance = jnp.where(masked, (kappa_next - (1 - again) * kappa) / left, again)
    return TokenStep(chance, jnp.where(masked[..., None], posterior, path.source_probs(posterior)))


@dataclass(frozen=True)
class TauLeaping:
    """Euler's method for chains: rates stand still for a step, in which each token jumps at most once.

    Takes rates of any kind, `sample(rates, x0, TauLeaping(), times=, key=)`. Order 1. To t = 1 the last step is as long
    as the time that is left, and with `forward_rates` every token that is still the source's jumps.

    References:
        Gat et al. 2024 (arXiv:2407.15595, eq. 12); Campbell et al. 2022 (arXiv:2205.14987).
    """

    order: ClassVar[int] = 1
    nfe_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the rates are never asked for at the last of the times."""
        return True

    def solve(self, v: RateFn, key: Key, times: ArrayTree, x0: Tokens, trajectory: bool) -> Solution:
        """Called by `sample`."""
        return run_chain(lambda t, t_next, x: tau_leap(v, t, t_next, x), self, v, key, times, x0, trajectory)


@dataclass(frozen=True)
class MixtureSteps:
    """Steps that are exact in the schedule: in law right for each token by itself, however few they are.

    Takes a denoiser, `sample(denoiser, x0, MixtureSteps(path), times=, key=)`. What is left of the error is that
    tokens of one step do not see each other: order 1 in the law of several. With a mask this is ancestral sampling.

    Attributes:
        path: that the denoiser was trained on.

    References:
        Of masked tokens: Shi et al. 2024 (arXiv:2406.04329), Sahoo et al. 2024 (arXiv:2406.07524).
    """

    path: MixturePath
    order: ClassVar[int] = 1
    nfe_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_has("path", self.path, ("schedule", "source", "posterior"), "a MixturePath")

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the denoiser is never asked at the last of the times."""
        return True

    def solve(self, v: DenoiserFn, key: Key, times: ArrayTree, x0: Tokens, trajectory: bool) -> Solution:
        """Called by `sample`."""
        path = self.path
        return run_chain(lambda t, s, x: mixture_step(v, path, t, s, x), self, v, key, times, x0, trajectory)


def run_chain(
    step_of: Callable[[Array, Array, Tokens], TokenStep],
    sampler: Any,
    function: Any,
    key: Key,
    times: ArrayTree,
    x0: Tokens,
    trajectory: bool,
) -> Solution:
    """Goes along the times; step i draws from `fold_in(key, i)`."""
    check_forward(times, sampler)

    def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
        return step_of(t, t_next, x).draw(jax.random.fold_in(key, i), x), memory

    return run_steps(step, x0, times, spent(len(times) - 1, function), trajectory=trajectory)
