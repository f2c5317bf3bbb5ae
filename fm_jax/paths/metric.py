"""Paths along a metric: tokens that are near to those of the data come before it, and less near ones before those."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import (
    check_finite,
    check_key,
    check_known,
    check_logits,
    check_same_shape,
    check_setting,
    check_tokens,
    shown,
)
from fm_jax.draws import categorical
from fm_jax.shapes import time_dtype, time_of
from fm_jax.sources import UniformTokens
from fm_jax.types import Array, ArrayTree, Key, Logits, Time, TokenSample, TokenState

_EDGE = 1e-5
"""How far the domain stays from the ends, where beta has an infinite slope."""


@dataclass(frozen=True)
class MetricPath:
    """`p_t(x | x1) = softmax over x of -beta(t) d(x, x1)`, with `beta = c (t / (1 - t))^a`, for each token by itself.

    The metric-induced path of Shaul et al. 2024 (arXiv:2412.03487). It begins with all tokens alike and closes in on
    that of the data, from 256 levels of grey, say, over those that are like it. Its jumps are `rates.kinetic_rates`,
    followed by `samplers.TauLeaping`; there is no schedule, and so no step that is exact in one.

    Attributes:
        distances: [K, K], `d(x, x1)` from row x to column x1: 0 on the diagonal and positive elsewhere. They become a
            tuple of tuples.
        c: how much the metric counts, positive.
        a: how late it does, positive. These values of c and a are those of FUDOKI, 2025
            (arXiv:2505.20147, eq. 5).

    Raises:
        ValueError: unless `distances` are such, of two tokens or more, and `c` and `a` positive and finite.

    Example:
        >>> levels = np.arange(4)
        >>> path = MetricPath(np.abs(levels[:, None] - levels))
        >>> [f"{p:.3f}" for p in path.probs(0.5, jnp.array([[1]]))[0, 0]]
        ['0.045', '0.907', '0.045', '0.002']
    """

    distances: ArrayTree
    c: float = 3.0
    a: float = 0.9

    def __post_init__(self) -> None:
        given = self.distances
        check_known("distances", given)
        try:
            check_finite("distances", given)
        except ValueError:
            raise ValueError(f"distances must be finite numbers [K, K], got {shown(given)}.") from None
        found = np.asarray(given, np.float64)
        if found.ndim != 2 or found.shape[0] != found.shape[1] or len(found) < 2:
            raise ValueError(f"distances must be [K, K] with K at least 2, got shape {found.shape}.")
        held, size = np.finfo(np.float32), found[found > 0]
        if size.size and not (held.tiny <= size.min() and size.max() <= held.max):
            least, most = size.min(), size.max()
            raise ValueError(f"distances must be numbers of float32, got some from {least:.3g} to {most:.3g}.")
        diagonal = np.eye(len(found), dtype=bool)
        if found[diagonal].any() or not (found[~diagonal] > 0).all():
            raise ValueError(
                "distances must be 0 from a token to itself and positive to every other, got "
                f"{np.abs(found[diagonal]).max():g} and {found[~diagonal].min():g}."
            )
        object.__setattr__(self, "distances", tuple(map(tuple, found.tolist())))  # an array would not be hashable
        check_setting(self, "c", "(0, inf)")
        check_setting(self, "a", "(0, inf)")

    def __repr__(self) -> str:
        return f"MetricPath({self.num_tokens} tokens, c={self.c}, a={self.a})"

    @property
    def num_tokens(self) -> int:
        """K."""
        return len(self.distances)

    @property
    def source(self) -> UniformTokens:
        """Of x0: all tokens as often."""
        return UniformTokens(self.num_tokens)

    @property
    def domain(self) -> tuple[float, float]:
        """The times at which the law has a finite slope."""
        return _EDGE, 1 - _EDGE

    def sample(self, key: Key, t: Time, x0: TokenState, x1: TokenState) -> TokenSample:
        """The tokens at `t` of data.

        Args:
            key: decides which.
            t: times.
            x0: source, which goes with the sample and has no part in it: at t what is known of it is in the law.
            x1: data.

        Raises:
            ValueError: if the shapes of `x0` and `x1` differ, they are no tokens, or `t` is neither a scalar nor
                [batch].
        """
        check_key(key)
        check_same_shape(x0=x0, x1=x1)
        check_tokens("x0", x0, self.num_tokens)
        x_t = categorical(key, self.probs(t, x1)).astype(x1.dtype)
        return TokenSample(jnp.asarray(t), x_t, jnp.asarray(x0), jnp.asarray(x1))

    def probs(self, t: Time, x1: TokenState) -> Logits:
        """`p_t(x | x1)`, [batch, ..., K], of each token by itself."""
        return jnp.exp(self.log_probs(t, x1))

    def log_probs(self, t: Time, x1: TokenState) -> Logits:
        """`log p_t(x | x1)`, [batch, ..., K]; finite for t < 1, also where its exponential is 0 in float32."""
        self.check_data(x1)
        distances = jnp.asarray(np.transpose(self.distances), time_dtype(x1))[x1]
        time = time_of(t, distances)
        beta = self.c * (time / (1 - time)) ** self.a
        # At t = 1, where beta is infinite, x1 itself is left.
        return jax.nn.log_softmax(jnp.where(distances > 0, -beta * distances, 0.0), axis=-1)

    def log_posterior(self, logits: Logits, x: TokenState) -> Logits:
        """`log p(x1 | x_t = x)` of each token by itself, from the logits of a network: the log-softmax.

        Args:
            logits: of x1, [batch, ..., K].
            x: tokens at t, [batch, ...].

        Returns:
            [batch, ..., K], in float32 or better.
        """
        check_tokens("x", x, self.num_tokens)
        check_logits("logits", logits, x, self.num_tokens)
        precise: Array = jnp.asarray(logits, time_dtype(logits))
        return jax.nn.log_softmax(precise, axis=-1)

    def posterior(self, logits: Logits, x: TokenState) -> Logits:
        """`p(x1 | x_t = x)`, the exponential of `log_posterior`."""
        return jnp.exp(self.log_posterior(logits, x))

    def check_data(self, x1: TokenState) -> None:
        """Raises `ValueError` for what is no tokens."""
        check_tokens("x1", x1, self.num_tokens)
