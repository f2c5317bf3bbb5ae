"""First hitting: masked tokens appear one at a time, each at the moment at which the chain would have it."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import jax
import jax.numpy as jnp

from fm_jax.checks import check_has, check_integer, check_member
from fm_jax.draws import categorical, uniform
from fm_jax.nfe import spent
from fm_jax.paths.mixture import MixturePath
from fm_jax.samplers.grids import check_forward
from fm_jax.shapes import expand_time
from fm_jax.types import Array, ArrayTree, DenoiserFn, Key, Logits, PerExample, Scalar, Solution, Tokens

Order = Literal["random", "confidence", "margin"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class FirstHitting:
    """The exact chain of masked tokens, without steps: of n masks the next one falls where kappa has grown enough.

    `1 - kappa(t_next) = u^(1/n) (1 - kappa(t))` with u uniform, and any of the n as likely (Zheng et al. 2024,
    arXiv:2409.02908, prop. 4.1). One evaluation for each token that `x0` has, D of them; there is no discretisation
    error. Stopping at t < 1 gives the chain at t, some masks still there.

    Takes a denoiser, `sample(denoiser, x0, FirstHitting(path), times=, key=)`, of which the first and the last time
    count alone.

    Attributes:
        path: with a `Masked` source.
        position: which mask falls: "random" is right. "confidence" takes the one whose likeliest token is likeliest,
            "margin" the one that is furthest ahead of the second: a perfect network is not sampled from its law by
            these, though what is drawn may look better.
        per_step: tokens drawn from one evaluation. More than one do not see each other: an error like that of steps.

    Raises:
        ValueError: for a source without a mask, another order, or less than one token a step.
    """

    path: MixturePath
    position: Order = "random"
    per_step: int = 1
    order: ClassVar[None] = None
    nfe_per_step: ClassVar[None] = None
    stochastic: ClassVar[bool] = True
    tokens: ClassVar[bool] = True
    domain: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_has("path", self.path, ("schedule", "source", "posterior"), "a MixturePath")
        if self.path.source.mask is None:
            raise ValueError(f"path must have a mask, such as Masked(28, 27), got {self.path.source}.")
        check_member("position", self.position, ORDERS)
        check_integer("per_step", self.per_step)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the denoiser is never asked at the last of the times."""
        return False

    def solve(self, v: DenoiserFn, key: Key, times: ArrayTree, x0: Tokens, trajectory: bool) -> Solution:
        """Called by `sample`."""
        check_forward(times, self)
        first, last = (jnp.asarray(times)[i] for i in (0, -1))
        num_calls = -(-math.prod(x0.shape[1:]) // self.per_step)

        def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array | None]:
            keys = jax.random.split(jax.random.fold_in(key, i), self.per_step)
            t, x = carry
            t_next = _next_time(jax.random.split(keys[0], 3)[0], self.path, t, x)
            posterior = self.path.posterior(v(jnp.minimum(t_next, last), x), x)
            carry, _ = jax.lax.scan(lambda carry, key: (self._hit(key, posterior, last, *carry), None), carry, keys)
            return carry, carry[1] if trajectory else None

        carry, states = jax.lax.scan(step, (jnp.full(x0.shape[:1], first), x0), jnp.arange(num_calls))
        kept = None if states is None else jnp.concatenate([x0[None], states])
        return Solution(carry[1], *spent(num_calls, v), kept)

    def _hit(self, key: Key, posterior: Logits, last: Scalar, t: PerExample, x: Tokens) -> tuple[PerExample, Tokens]:
        """The next mask of each example falls, unless its time is after the last."""
        key_time, key_position, key_token = jax.random.split(key, 3)
        t = _next_time(key_time, self.path, t, x)
        masked = x == self.path.source.mask
        if self.position == "random":
            score = jax.random.uniform(key_position, x.shape)
        else:
            top = jax.lax.top_k(posterior, 2)[0]
            score = top[..., 0] - top[..., 1] if self.position == "margin" else top[..., 0]
        flat = jnp.where(masked, score, -jnp.inf).reshape(len(x), -1)
        here = jax.nn.one_hot(flat.argmax(axis=1), flat.shape[1], dtype=bool).reshape(x.shape)
        falls = here & masked & expand_time(t <= last, x)
        return t, jnp.where(falls, categorical(key_token, posterior).astype(x.dtype), x)


def _next_time(key: Key, path: MixturePath, t: PerExample, x: Tokens) -> PerExample:
    """When the next mask of each example falls; infinity where there is none, or from there on."""
    left = (x == path.source.mask).reshape(len(x), -1).sum(axis=1)
    u = uniform(key, t.shape, t.dtype)
    sigma = path.schedule.sigma(jnp.where(jnp.isfinite(t), t, 0)) * u ** (1 / jnp.maximum(left, 1).astype(t.dtype))
    t_next = path.schedule.t_from_log_snr(2 * (jnp.log1p(-sigma) - jnp.log(sigma)))
    return jnp.where((left > 0) & jnp.isfinite(t), t_next, jnp.inf)
