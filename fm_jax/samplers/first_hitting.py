"""First hitting: masked tokens appear one at a time, each at the moment at which the chain would have it."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_integer, check_member, is_traced
from fm_jax.draws import categorical, uniform
from fm_jax.logits import logits_of
from fm_jax.nfe import check_denoiser, returns_of, spent
from fm_jax.paths.mixture import MixturePath, check_has_mask, check_mixture
from fm_jax.samplers.chain import check_start_of
from fm_jax.samplers.grids import check_forward
from fm_jax.self_conditioning import estimate_of, no_estimate
from fm_jax.shapes import expand_time
from fm_jax.types import Array, ArrayTree, DenoiserFn, Key, Logits, PerExample, Solution, TokenState

Position = Literal["random", "confidence", "margin", "first"]
POSITIONS: tuple[Position, ...] = get_args(Position)


class _Falling(NamedTuple):
    """Examples on their way: `sigma` [batch], their `x` [batch, ...], and the sigma at which each token `fell`."""

    sigma: PerExample
    x: TokenState
    fell: Array


@dataclass(frozen=True)
class FirstHitting:
    """The exact chain of masked tokens, without steps: of n masks the next one falls where kappa has grown enough.

    `1 - kappa(t_next) = u^(1/n) (1 - kappa(t))` with u uniform, and any of the n as likely (Zheng et al. 2024,
    arXiv:2409.02908, prop. 4.1). One evaluation for each mask of `x0`, as many as the example with the most has, and as
    many as tokens that `keep` leaves where `x0` is traced; there is no discretisation error. Stopping at t < 1 gives
    the chain at t, some masks still there.

    Takes a denoiser, `sample(denoiser, x0, FirstHitting(path), times=, key=)`, which is called with a time for each
    example, that of its next fall. What is drawn depends on the first and the last of the times alone; a trajectory is
    the chain at all of them.

    Attributes:
        path: with a `Masked` source.
        position: which mask falls: "random" is right. "confidence" takes the one whose likeliest token is likeliest,
            "margin" the one that is furthest ahead of the second, of several alike any. These are biased: at t < 1 the
            law is another, and at t = 1 too, but for a perfect network with one token a step; then, whatever the
            order, it is the same. What is drawn by a network that errs may look better, and is less varied. "first" is
            from left to right, as `losses.next_token` trains a network to: then it is right at t = 1.
        per_step: tokens drawn from one evaluation. More than one do not see each other: an error like that of steps,
            and a large one with "confidence", which draws those at once that all seem sure.
        carry_estimate: whether a self-conditioned denoiser, `f(t, x, estimate=)`, is told in each evaluation what it
            said in the one before, as probabilities, and zeros in the first; see `fm_jax.self_conditioning`.

    Raises:
        ValueError: for another path than a `MixturePath` with a mask, another order, or less than one token a step.

    Example:
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> path, x0 = MixturePath(Linear(), Masked(3, 2)), jnp.array([[2, 0, 2, 2]])
        >>> f = lambda t, x: jnp.log(jnp.eye(3))[jnp.ones_like(x)]
        >>> solution = sample(f, x0, FirstHitting(path), key=jax.random.key(0))
        >>> solution.x, int(solution.calls)
        (Array([[1, 0, 1, 1]], dtype=int32), 3)
    """

    path: MixturePath
    position: Position = "random"
    per_step: int = 1
    carry_estimate: bool = False
    order: ClassVar[None] = None
    nfe_per_step: ClassVar[None] = None
    stochastic: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_mixture(self.path)
        check_has_mask(self.path, "MixtureSteps is for all sources")
        check_member("position", self.position, POSITIONS)
        check_integer("per_step", self.per_step)
        check_bool("carry_estimate", self.carry_estimate)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the denoiser is never asked at the last of the times: an example that is done is, in vain."""
        return False

    def solve(
        self, v: DenoiserFn, key: Key, times: ArrayTree, x0: TokenState, trajectory: bool, *, keep: Array | None = None
    ) -> Solution:
        """Called by `sample`."""
        check_denoiser("v", v, causal=self.position == "first")
        check_forward(times, self)
        check_start_of("x0", x0, self.path.num_tokens)
        path, times = self.path, jnp.asarray(times)
        sigmas = path.schedule.sigma(times)
        with jax.ensure_compile_time_eval():
            can_fall = jnp.broadcast_to(True if keep is None else ~keep, x0.shape)
            masked = (x0 == path.source.mask) & can_fall
            may_fall = can_fall if is_traced(masked) else masked
            known = not is_traced(may_fall) and may_fall.is_fully_addressable
            if returns_of(v) == "next_logits":
                self._check_causal(masked if known and not is_traced(masked) else None)
            most = int(_count(may_fall).max(initial=0)) if known else math.prod(x0.shape[1:])
        num_calls = -(-most // self.per_step)

        def step(carried: tuple[_Falling, Any], i: Array) -> tuple[tuple[_Falling, Any], None]:
            state, estimate = carried
            keys = jax.random.split(jax.random.fold_in(key, i), self.per_step)
            # The network is asked at the time of the first of these falls; where there is none, at the last time.
            t = jnp.minimum(_time(path, _next_sigma(keys[0], state, can_fall, path)), times[-1])
            logits = logits_of(v, t, state.x, path.num_tokens, estimate=estimate)
            posterior = path.posterior(logits, state.x)
            hit = lambda state, key: (self._hit(key, posterior, sigmas[-1], can_fall, state), None)  # noqa: E731
            state, _ = jax.lax.scan(hit, state, keys)
            return (state, estimate_of(logits) if self.carry_estimate else None), None

        start = _Falling(jnp.full(x0.shape[:1], sigmas[0]), x0, jnp.where(masked, -1, jnp.inf).astype(times.dtype))
        estimate = no_estimate(x0, path.num_tokens) if self.carry_estimate else None
        (end, _), _ = jax.lax.scan(step, (start, estimate), jnp.arange(num_calls))
        if not trajectory:
            return Solution(end.x, *spent(num_calls, v))
        there = end.fell[None] >= sigmas[1:].reshape(-1, *(1,) * x0.ndim)
        states = jnp.where(there | ~masked[None], end.x[None], x0[None])
        return Solution(end.x, *spent(num_calls, v), jnp.concatenate([x0[None], states]))

    def _check_causal(self, masked: Array | None) -> None:
        """Raises `ValueError` where a causal denoiser would be asked for a token without all that are before it."""
        if self.per_step > 1:
            raise ValueError(f"per_step must be 1 for a causal denoiser, which sees all before, got {self.per_step}.")
        if masked is None:
            return
        flat = np.asarray(masked).reshape(len(masked), -1)
        if (flat[:, :-1] & ~flat[:, 1:]).any():
            raise ValueError(
                "x0 must be masked from some place on for a causal denoiser, which is blind to what is given after "
                "that: got tokens after masks."
            )

    def _hit(self, key: Key, posterior: Logits, last: Array, can_fall: Array, state: _Falling) -> _Falling:
        """The next mask of each example falls, unless its time is after the last."""
        sigma, x = _next_sigma(key, state, can_fall, self.path), state.x
        _, key_position, key_token = jax.random.split(key, 3)
        masked = (x == self.path.source.mask) & can_fall
        score = jnp.zeros(x.shape)
        if self.position == "first":
            score = score - jnp.arange(math.prod(x.shape[1:]), dtype=score.dtype).reshape(1, *x.shape[1:])
        elif self.position != "random":
            top = jax.lax.top_k(posterior, 2)[0]
            score = top[..., 0] - top[..., 1] if self.position == "margin" else top[..., 0]
            score = jnp.where(jnp.isnan(score), jnp.inf, score)  # NaN is not to leave masks, but what shows
        flat = jnp.where(masked, score, -jnp.inf).reshape(len(x), math.prod(x.shape[1:]))
        best = flat == flat.max(axis=1, keepdims=True)
        here = jnp.where(best, jax.random.uniform(key_position, flat.shape), -1).argmax(axis=1)
        here = jax.nn.one_hot(here, flat.shape[1], dtype=bool).reshape(x.shape)
        falls = here & masked & expand_time(sigma >= last, x)
        x = jnp.where(falls, categorical(key_token, posterior).astype(x.dtype), x)
        return _Falling(sigma, x, jnp.where(falls, expand_time(sigma, x), state.fell))


def _count(masked: Array) -> Array:
    return masked.reshape(len(masked), math.prod(masked.shape[1:])).sum(axis=1)


def _next_sigma(key: Key, state: _Falling, can_fall: Array, path: MixturePath) -> PerExample:
    """The sigma at which the next mask of each example falls; where there is none, the present one."""
    left = _count((state.x == path.source.mask) & can_fall)
    u = uniform(jax.random.split(key, 3)[0], state.sigma.shape, state.sigma.dtype)
    return jnp.where(left > 0, state.sigma * u ** (1 / jnp.maximum(left, 1).astype(u.dtype)), state.sigma)


def _time(path: MixturePath, sigma: PerExample) -> PerExample:
    """The time at which `1 - kappa` is `sigma`."""
    return path.schedule.t_from_log_snr(2 * (jnp.log1p(-sigma) - jnp.log(sigma)))
