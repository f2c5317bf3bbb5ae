"""Samplers of tokens: chains of jumps in continuous time, in steps in which each token is drawn by itself.

A step first decides whether a token is drawn anew, and only then what it is: the joint draw of "stay, or which token"
loses rare tokens in single precision (see `fm_jax.draws`).
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import (
    check_bool,
    check_logits,
    check_schedule,
    check_shape,
    check_tokens,
    is_traced,
)
from fm_jax.draws import bernoulli, categorical, none_of
from fm_jax.logits import logits_of
from fm_jax.nfe import check_denoiser, check_rates, spent
from fm_jax.paths.mixture import MixturePath, check_has_mask, check_mixture
from fm_jax.samplers.grids import check_forward
from fm_jax.samplers.loop import run_steps
from fm_jax.samplers.remasking import Confidence, Loop, Remask, check_remask, most
from fm_jax.samplers.runge_kutta import path_times
from fm_jax.schedules import coefficients
from fm_jax.self_conditioning import estimate_of, no_estimate
from fm_jax.shapes import expand_time
from fm_jax.types import Array, ArrayTree, DenoiserFn, Key, Logits, RateFn, Schedule, Solution, Time, TokenState

REMASK_NEEDS = "a rule of remasking puts it there again"


class TokenStep(NamedTuple):
    """How each token of x [batch, ...] is drawn in a step, independently of the others.

    Attributes:
        chance: that it is drawn anew, [batch, ...].
        weights: of what it then is, [batch, ..., K], not negative; only their proportions matter.
    """

    chance: Array
    weights: Logits

    def draw(self, key: Key, x: TokenState) -> TokenState:
        """The tokens after the step; `draws.NONE` where chance or weights are NaN, and from then on."""
        key_chance, key_token = jax.random.split(key)
        anew, none = bernoulli(key_chance, self.chance), none_of(x.dtype)
        drawn = jnp.where(anew, categorical(key_token, self.weights).astype(x.dtype), x)
        return jnp.where(jnp.isnan(self.chance) | (x == none), none, drawn)

    def probs(self, x: TokenState) -> Logits:
        """The law of each token after the step, [batch, ..., K]."""
        total = self.weights.sum(axis=-1, keepdims=True)
        anew = self.chance[..., None] * self.weights / jnp.where(total > 0, total, 1)
        return anew + (1 - self.chance)[..., None] * jax.nn.one_hot(x, self.weights.shape[-1], dtype=anew.dtype)

    def keeping(self, keep: Array | None) -> "TokenStep":
        """The step in which the tokens at `keep` stay as they are."""
        return self if keep is None else self._replace(chance=jnp.where(keep, 0, self.chance))


def tau_leap(rates: RateFn, t: Time, t_next: Time, x: TokenState, *, schedule: Schedule | None = None) -> TokenStep:
    """One step of `TauLeaping`: a token jumps with probability `min(1, h u)`, u the sum of its rates at `t`.

    Args:
        rates: `u(t, x) -> [batch, ..., K]`. At the token that is there what is negative counts as 0, so that a whole
            row of a generator, with minus the sum there, serves as well; of infinite ones each is as likely. One that
            is negative elsewhere, or NaN, is refused where it is known; else the token becomes `draws.NONE`.
        t: time.
        t_next: the time after the step, h later.
        x: tokens.
        schedule: by which h is measured, `(kappa_next - kappa) / kappa'`; by the clock if there is none.

    Raises:
        ValueError: for what are no tokens, no schedule, or rates of another shape; for rates known to be NaN, or
            negative at a token that is not there.

    Example:
        >>> step = tau_leap(lambda t, x: jnp.array([[[0.0, 1.0, 2.0]]]), 0.0, 0.25, jnp.array([[0]]))
        >>> step.probs(jnp.array([[0]]))
        Array([[[0.25, 0.25, 0.5 ]]], dtype=float32)
    """
    check_rates("rates", rates)
    check_tokens("x", x)
    u = rates(t, x)
    check_logits("rates(t, x)", u, x)
    _check_rates(u, x)
    u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
    number = jnp.finfo(u.dtype)
    elsewhere = ~jax.nn.one_hot(x, u.shape[-1], dtype=bool)
    u = jnp.where((u < 0) & elsewhere, jnp.nan, jnp.clip(u, 0, number.max**0.5))  # sums and quotients stay finite
    t, t_next = _ends(t, t_next, x)
    h = t_next - t
    if schedule is not None:
        check_schedule(schedule)
        alpha, sigma, slope, _ = coefficients(schedule, t)
        later, rest = schedule.alpha(t_next), schedule.sigma(t_next)
        h = jnp.where(later < 0.5, later - alpha, sigma - rest) / jnp.where(slope > 0, slope, 1)
    chance = h * u.sum(axis=-1)
    # What is 1 but for rounding is 1: of the masks before a step to t = 1 none may be left over.
    return TokenStep(jnp.where(chance > 1 - 16 * number.eps, 1, jnp.maximum(chance, 0)), u)


def mixture_step(
    denoiser: DenoiserFn,
    path: MixturePath,
    t: Time,
    t_next: Time,
    x: TokenState,
    *,
    remask: Remask | None = None,
    confidence: Array | None = None,
) -> TokenStep:
    """One step of `MixtureSteps`: with probability `1 - (1 - kappa_next) / (1 - kappa)` a token is one of p(x1 | x).

    Notebooks: (14.7).

    Args:
        denoiser: logits of x1.
        path: that it was trained on.
        t: time.
        t_next: the time after the step.
        x: tokens.
        remask: with what probability a token that is there is masked again, see `samplers.remasking`.
        confidence: with which each token was drawn, [batch, ...], infinite where it was given, for `Confidence`.

    Raises:
        ValueError: for what are no tokens of the path, or no logits of them; `remask` without a mask, or `Confidence`
            without `confidence`.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> x, path = jnp.array([[2]]), MixturePath(Linear(), Masked(3, 2))
        >>> mixture_step(lambda t, x: jnp.zeros((1, 1, 3)), path, 0.5, 0.75, x).probs(x)
        Array([[[0.25, 0.25, 0.5 ]]], dtype=float32)
    """
    check_denoiser("denoiser", denoiser)
    check_mixture(path)
    posterior = path.posterior(logits_of(denoiser, t, x, path.num_tokens), x)
    t, t_next = _ends(t, t_next, x)
    left, right = path.schedule.sigma(t), path.schedule.sigma(t_next)
    kappa, kappa_next = path.schedule.alpha(t), path.schedule.alpha(t_next)
    # Each difference where it has more digits: a short step at the start is right, and at t = 1 all of the rest falls.
    grown, left = jnp.where(kappa_next < 0.5, kappa_next - kappa, left - right), jnp.where(left > 0, left, 1)
    if remask is None:
        return TokenStep(jnp.broadcast_to(jnp.clip(grown / left, 0, 1), x.shape), posterior)
    check_remask(remask)
    check_has_mask(path, REMASK_NEEDS)
    sigma = jnp.clip(remask(kappa, kappa_next), 0, most(kappa, kappa_next))
    masked = x == path.source.mask
    again = jnp.broadcast_to(sigma, x.shape)
    if isinstance(remask, Confidence):
        if confidence is None:
            raise ValueError(f"confidence must be given for {remask}.")
        check_shape("confidence", confidence, x)
        drawn = jnp.where(masked, jnp.inf, confidence)
        again = remask.chances(sigma, drawn)
    chance = jnp.where(masked, jnp.clip((grown + sigma * kappa) / left, 0, 1), again)
    return TokenStep(chance, jnp.where(masked[..., None], posterior, path.source_probs(posterior)))


@dataclass(frozen=True)
class TauLeaping:
    """Euler's method for chains: rates stand still for a step, in which each token jumps at most once.

    Takes rates of any kind, `sample(rates, x0, TauLeaping(), times=, key=)`. They have no memory: of a self-conditioned
    network they are those of `bind(self_conditioned(apply_fn), params)`. A token jumps with probability
    `min(1, h u)`, and not `1 - exp(-h u)`, that of a jump under rates that stand still: they do not, the error is of
    the same order, and in the last step to t = 1, where h u is 1, a mask would stay with probability 1/e. Order 1 in
    the law; on `Linear`, with one token and h u <= 1 throughout, it is exact, since the law is linear in t there.

    With a `schedule` h is the step in kappa, `(kappa_next - kappa) / kappa'`, and what was said of `Linear` holds for
    it, of all rates of a `MixturePath` on it, which are in proportion to kappa'. Without it, on any other schedule than
    `Linear`, some masks are left over at t = 1: of `Polynomial(2)` about one in the square of the number of steps.

    Where h u is above 1, as with a strong corrector or with `reversal_rates` near t = 0, it is cut, and the law is off
    by more than order 1 says: take steps of h <= 1 / u (Gat et al. 2024, eq. 30, of `forward_rates`). Rates are never
    asked for at the last time, so that they may be infinite at t = 1.

    Attributes:
        schedule: of the path that the rates are of, or `None`.

    Step i draws from `fold_in(key, i)`.

    Raises:
        ValueError: for what is no schedule.

    Example:
        >>> from fm_jax.paths.mixture import MixturePath
        >>> from fm_jax.rates import forward_rates
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> path, x0 = MixturePath(Linear(), Masked(3, 2)), jnp.full((1, 4), 2)
        >>> u = forward_rates(lambda t, x: jnp.log(jnp.eye(3))[jnp.ones_like(x)], path)
        >>> sample(u, x0, TauLeaping(), times=8, key=jax.random.key(0)).x
        Array([[1, 1, 1, 1]], dtype=int32)

    References:
        Gat et al. 2024 (arXiv:2407.15595, eq. 12).
    """

    schedule: Schedule | None = None
    order: ClassVar[int] = 1
    nfe_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.schedule is not None:
            check_schedule(self.schedule)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the rates are never asked for at the last of the times."""
        return True

    def solve(
        self, v: RateFn, key: Key, times: ArrayTree, x0: TokenState, trajectory: bool, *, keep: Array | None = None
    ) -> Solution:
        """Called by `sample`."""
        check_rates("v", v)
        check_forward(times, self)

        def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
            leap = tau_leap(v, t, t_next, x, schedule=self.schedule)
            check_start_of("x0", x0, leap.weights.shape[-1])
            return leap.keeping(keep).draw(jax.random.fold_in(key, i), x), memory

        return run_steps(step, x0, times, spent(len(times) - 1, v), trajectory=trajectory)


@dataclass(frozen=True)
class MixtureSteps:
    """Steps that are exact in the schedule: in law right for each token by itself, however few they are.

    Takes a denoiser, `sample(denoiser, x0, MixtureSteps(path), times=, key=)`. What is left of the error is that
    tokens of one step do not see each other: order 1 in the law of several. With a mask this is ancestral sampling: a
    token that is seen never changes, unless it is masked again.

    Attributes:
        path: that the denoiser was trained on.
        remask: a rule by which tokens that are there are masked again, `Cap`, `Rescale`, `Loop`, `Confidence` or a
            function of your own `(kappa, kappa_next) -> sigma`. It masks given tokens too, unless `sample` is told to
            `keep` them.
        carry_estimate: whether a self-conditioned denoiser, `f(t, x, estimate=)`, is told in each step what it said in
            the step before, as probabilities, and zeros in the first; see `fm_jax.self_conditioning`. It still costs
            one evaluation a step.

    Step i draws from `fold_in(key, i)`.

    Raises:
        ValueError: for another path than a `MixturePath`, what is no rule, or a rule and a source without a mask.

    Example:
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.samplers.remasking import Rescale
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> path, x0 = MixturePath(Linear(), Masked(3, 2)), jnp.full((1, 4), 2)
        >>> f = lambda t, x: jnp.log(jnp.eye(3))[jnp.ones_like(x)]
        >>> sample(f, x0, MixtureSteps(path, Rescale(0.5)), times=8, key=jax.random.key(0)).x
        Array([[1, 1, 1, 1]], dtype=int32)

    References:
        Of masked tokens: Shi et al. 2024 (arXiv:2406.04329), Sahoo et al. 2024 (arXiv:2406.07524). With remasking: Wang
        et al. 2025 (arXiv:2503.00307).
    """

    path: MixturePath
    remask: Remask | None = None
    carry_estimate: bool = False
    order: ClassVar[int] = 1
    nfe_per_step: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_mixture(self.path)
        check_bool("carry_estimate", self.carry_estimate)
        if self.remask is not None:
            check_remask(self.remask)
            check_has_mask(self.path, REMASK_NEEDS)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the denoiser is never asked at the last of the times."""
        return True

    def solve(
        self, v: DenoiserFn, key: Key, times: ArrayTree, x0: TokenState, trajectory: bool, *, keep: Array | None = None
    ) -> Solution:
        """Called by `sample`."""
        check_denoiser("v", v)
        check_forward(times, self)
        check_start_of("x0", x0, self.path.num_tokens)
        num, of_confidence = len(times), isinstance(self.remask, Confidence)

        def step(x: Array, memory: Any, i: Array, t: Array, t_next: Array) -> tuple[Array, Any]:
            confidence, estimate = memory
            logits = logits_of(v, t, x, self.path.num_tokens, estimate=estimate)
            one = mixture_step(lambda *_: logits, self.path, t, t_next, x, remask=self.remask, confidence=confidence)
            x_next = one.keeping(keep).draw(jax.random.fold_in(key, i), x)
            if of_confidence:
                drawn = jnp.take_along_axis(one.weights, x_next[..., None].astype(int), axis=-1)[..., 0]
                confidence = jnp.where(x == x_next, confidence, drawn.astype(confidence.dtype))
            return x_next, (confidence, estimate_of(logits) if self.carry_estimate else None)

        loop = self.remask.rule if isinstance(self.remask, Confidence) else self.remask
        if isinstance(loop, Loop):
            times = jnp.asarray(times)
            place = loop.place(times)
            times = jnp.sort(jnp.concatenate([times, jnp.full(loop.num, times[place])]))
        confidence = jnp.full(x0.shape, jnp.inf, jnp.result_type(float)) if of_confidence else None
        memory = (confidence, no_estimate(x0, self.path.num_tokens) if self.carry_estimate else None)
        solution = run_steps(step, x0, times, spent(len(times) - 1, v), memory=memory, trajectory=trajectory)
        if not (trajectory and isinstance(loop, Loop)):
            return solution
        i = jnp.arange(num)  # of the loop the last state alone, and the start as it was
        return solution._replace(trajectory=solution.trajectory[jnp.where(i > 0, i + loop.num * (i >= place), 0)])


def _ends(t: Time, t_next: Time, x: TokenState) -> tuple[Array, Array]:
    """Both ends of a step, scalars or [batch, 1, ..., 1]."""
    t, t_next = path_times(t, t_next, x)
    return expand_time(t, x), expand_time(t_next, x)


def check_start_of(name: str, x: TokenState, num_tokens: int) -> None:
    """Raises `ValueError` for tokens that are not among K, or of integers that cannot hold K and `draws.NONE`."""
    check_tokens(name, x)
    if jnp.iinfo(x.dtype).max < num_tokens:
        raise ValueError(f"{name} must be of integers that hold {num_tokens} tokens, such as int32, got {x.dtype}.")
    check_tokens(name, x, num_tokens)


def _check_rates(u: Array, x: TokenState) -> None:
    """Raises `ValueError` for rates to other tokens that are known to be negative or NaN."""
    if is_traced(u) or is_traced(x):
        return
    others = np.asarray(x)[..., None] != np.arange(u.shape[-1])
    bad = ~(np.asarray(u, np.float64) >= 0) & others
    if bad.any():
        raise ValueError(f"rates(t, x) must not be negative, got some from {np.asarray(u)[bad].min()} on.")
