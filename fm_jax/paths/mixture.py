"""Paths of tokens: each is that of the source until, at a random time, it becomes that of the data.

Time runs as for flows, from the source at 0 to the data at 1. A token x is an integer from 0 to K - 1; a mask, where
there is one, is among the K.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_has, check_key, check_logits, check_same_shape, check_schedule, check_tokens, is_traced
from fm_jax.shapes import time_dtype, time_of
from fm_jax.types import Array, Key, Logits, Schedule, Time, TokenPath, TokenSample, TokenSource, TokenState


@dataclass(frozen=True)
class MixturePath:
    """`p_t(x | x0, x1) = (1 - kappa(t)) delta_x0 + kappa(t) delta_x1`, for each token by itself.

    Gat et al. 2024 (arXiv:2407.15595, eq. 9). With `Masked` this is masked diffusion, with `UniformTokens` uniform
    diffusion.

    Notebooks: (14.2).

    Attributes:
        schedule: of which alpha is kappa; convex, `alpha + sigma = 1`, from 0 to 1.
        source: of x0.

    Raises:
        ValueError: for a schedule that is not convex or does not go from 0 to 1, or what is no source of tokens.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import UniformTokens
        >>> MixturePath(Linear(), UniformTokens(4)).probs(0.5, jnp.array([[1]]))
        Array([[[0.125, 0.625, 0.125, 0.125]]], dtype=float32)
    """

    schedule: Schedule
    source: TokenSource

    def __post_init__(self) -> None:
        check_convex(self.schedule)
        check_has("source", self.source, ("draw", "probs", "num_tokens"), "a source of tokens, such as Masked(28, 27)")

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.source.num_tokens

    @property
    def domain(self) -> tuple[float, float]:
        """The times at which the law has a finite slope."""
        return self.schedule.domain

    def sample(self, key: Key, t: Time, x0: TokenState, x1: TokenState) -> TokenSample:
        """The tokens at `t` of pairs of source and data.

        Args:
            key: decides of each token whether it is that of the data already.
            t: times.
            x0: source.
            x1: data.

        Raises:
            ValueError: if the shapes of `x0` and `x1` differ, they are no tokens, or `t` is neither a scalar nor
                [batch].
        """
        check_key(key)
        check_same_shape(x0=x0, x1=x1)
        check_tokens("x0", x0, self.num_tokens)
        self.check_data(x1)
        kappa = self.schedule.alpha(time_of(t, x1))
        arrived = jax.random.uniform(key, x1.shape, kappa.dtype) < kappa
        return TokenSample(jnp.asarray(t), jnp.where(arrived, x1, x0), jnp.asarray(x0), jnp.asarray(x1))

    def probs(self, t: Time, x1: TokenState) -> Logits:
        """`p_t(x | x1)`, of each token by itself, the source integrated out."""
        self.check_data(x1)
        here = jax.nn.one_hot(x1, self.num_tokens, dtype=time_dtype(x1))
        time = time_of(t, here)
        return self.schedule.sigma(time) * self.source_probs(here) + self.schedule.alpha(time) * here

    def log_probs(self, t: Time, x1: TokenState) -> Logits:
        """`log p_t(x | x1)`, -inf for what cannot be."""
        return jnp.log(self.probs(t, x1))

    def source_probs(self, like: Logits) -> Array:
        """p_0 of one token, [1, ..., 1, K], in the rank of `like` [batch, ..., K] and in `time_dtype(like)`."""
        return jnp.asarray(self.source.probs, time_dtype(like)).reshape((1,) * (like.ndim - 1) + (-1,))

    def log_posterior(self, logits: Logits, x: TokenState) -> Logits:
        """`log p(x1 | x_t = x)` of each token by itself, from the logits of a network.

        What is known without a network is put right: a mask is not data, and a token that the source never draws is
        that of the data already. So a network of masked tokens has nothing to say of those that are seen.

        Args:
            logits: of x1, [batch, ..., K].
            x: tokens at t, [batch, ...].

        Returns:
            [batch, ..., K], in float32 or better; -inf for what cannot be.
        """
        check_tokens("x", x, self.num_tokens)
        check_logits("logits", logits, x, self.num_tokens)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if self.source.mask is not None:
            logits = logits.at[..., self.source.mask].set(-jnp.inf)
        found = jax.nn.log_softmax(logits, axis=-1)
        never = np.asarray(self.source.probs) == 0
        if not never.any():
            return found
        here = jax.nn.one_hot(x, self.num_tokens, dtype=bool)
        return jnp.where(jnp.asarray(never)[x][..., None], jnp.where(here, 0.0, -jnp.inf), found)

    def posterior(self, logits: Logits, x: TokenState) -> Logits:
        """`p(x1 | x_t = x)`, the exponential of `log_posterior`."""
        return jnp.exp(self.log_posterior(logits, x))

    def check_data(self, x1: TokenState) -> None:
        """Raises `ValueError` for what is no data: no tokens, or some that are the mask."""
        check_tokens("x1", x1, self.num_tokens)
        mask = self.source.mask
        if mask is not None and not is_traced(x1) and (np.asarray(x1) == mask).any():
            raise ValueError(f"x1 must be data, got {mask} in it, the mask of {self.source}, which no data may hold.")


def check_convex(schedule: Schedule) -> None:
    """Refuses a schedule that is not convex: `alpha + sigma = 1`, with alpha from 0 to 1, never falling.

    Alpha is then the share of tokens that are those of the data, all of them at t = 1.

    Raises:
        ValueError: for any other; settings that are traced pass.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> check_convex(Linear(sigma_min=0.1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: schedule must be convex, alpha + sigma = 1 with alpha rising from 0 to 1, ...
    """
    check_schedule(schedule)
    with jax.ensure_compile_time_eval():
        t = jnp.linspace(0.0, 1.0, 33)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if is_traced(alpha) or is_traced(sigma):
            return
    share, total = np.asarray(alpha), np.asarray(alpha) + np.asarray(sigma)
    if not np.allclose(share[[0, -1]], (0, 1), atol=1e-5):
        got = f"alpha from {share[0]:.4g} to {share[-1]:.4g}"
    elif not np.allclose(total, 1, atol=1e-5):
        got = f"alpha + sigma from {total.min():.4g} to {total.max():.4g}"
    elif (np.diff(share) < -1e-5).any():
        got = "an alpha that falls"
    else:
        return
    raise ValueError(
        "schedule must be convex, alpha + sigma = 1 with alpha rising from 0 to 1, such as Linear() or Polynomial(), "
        f"got {schedule} with {got}."
    )


def check_mixture(path: Any) -> None:
    """Raises `ValueError` for what is not a `MixturePath`."""
    check_has("path", path, ("schedule", "source", "num_tokens", "posterior", "source_probs"), "a MixturePath")


def check_own_mask(name: str, apply_fn: Any, path: TokenPath) -> None:
    """Raises `ValueError` for a network, by `linen_apply`, that takes for the mask what is data of the path."""
    module = getattr(inspect.unwrap(apply_fn), "module", None)
    mask = getattr(module, "mask", None) if getattr(module, "tokens", False) else None
    if mask is not None and mask != path.source.mask:
        raise ValueError(f"{name} must be a network with the mask of {path.source}, got one with mask={mask}.")


def check_has_mask(path: MixturePath, otherwise: str) -> None:
    """Raises `ValueError` for a path whose source has no mask; `otherwise` says what to take, or what it is for."""
    if path.source.mask is None:
        raise ValueError(f"path must have a mask, such as Masked(28, 27), got {path.source}; {otherwise}.")
