"""Laws of a few tokens, in full: everything about them is a finite sum.

A table q(x1) of D tokens, each from 0 to K - 1, has K^D states. Carried along a path of tokens it is known at all
times, as are the posterior of every token, the matrix of any rates, the law that a chain with these rates has, and the
law that a sampler really draws from, found by pushing the vector of all states through its step. All in NumPy's double
precision, but for what a sampler calls.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import (
    check_finite,
    check_has,
    check_increasing,
    check_integer,
    check_logits,
    check_number,
    check_tokens,
    shown,
)
from fm_jax.nfe import Counted, check_rates
from fm_jax.shapes import batch_time
from fm_jax.types import ArrayTree, DenoiserFn, Logits, RateFn, Time, TokenPath, TokenState

_NEVER = -1e30
"""The logarithm of 0, with which sums and products stay finite."""
_HALVES = slice(0, 2), slice(2, 4)


class TokenTable(NamedTuple):
    """Data of D tokens: `states` [n, D], those that occur, with `probs` [n]; K is `num_tokens`.

    Made by `token_table`, or `sudoku4`.
    """

    states: np.ndarray
    probs: np.ndarray
    num_tokens: int

    @property
    def num_positions(self) -> int:
        """D."""
        return self.states.shape[1]


def token_table(q: ArrayTree) -> TokenTable:
    """The data of D tokens with given probabilities.

    Args:
        q: [K, ..., K], D axes of K each; normalised here.

    Returns:
        `TokenTable`, without the states of probability 0.

    Raises:
        ValueError: unless all axes are of one length, and the numbers finite, not negative and not all 0.

    Example:
        >>> token_table([[0.5, 0.0], [0.25, 0.25]]).states
        array([[0, 0],
               [1, 0],
               [1, 1]], dtype=int32)
    """
    check_finite("q", q)
    q = np.asarray(q, np.float64)
    if q.ndim < 1 or len(set(q.shape)) != 1 or (q < 0).any() or q.sum() == 0:
        raise ValueError(f"q must be [K, ..., K], not negative and not all 0, got {shown(q)}.")
    where = np.argwhere(q > 0)
    probs = q[tuple(where.T)]
    return TokenTable(where.astype(np.int32), probs / probs.sum(), q.shape[0])


def with_mask(table: TokenTable) -> TokenTable:
    """The same data among one token more, which none of them holds: for a path from `Masked(K + 1, K)`.

    Example:
        >>> with_mask(token_table([0.5, 0.5])).num_tokens
        3
    """
    _check_table(table)
    return table._replace(num_tokens=table.num_tokens + 1)


def sudoku4() -> TokenTable:
    """The 288 solutions of the sudoku of 4 by 4, each as likely: 16 tokens of 4, of log 288 = 5.663 nats.

    Example:
        >>> sudoku4().states.shape
        (288, 16)
    """
    rows = [*itertools.permutations(range(4))]
    bands = [a + b for a, b in itertools.product(rows, repeat=2) if all(len({*a[i], *b[i]}) == 4 for i in _HALVES)]
    grids = (a + b for a, b in itertools.product(bands, repeat=2))
    found = [grid for grid in grids if all(len({*grid[i::4]}) == 4 for i in range(4))]
    return TokenTable(np.array(found, np.int32), np.full(len(found), 1 / len(found)), 4)


def all_states(table: TokenTable) -> np.ndarray:
    """All K^D states, [K^D, D], the last token fastest.

    Example:
        >>> all_states(token_table([[0.5, 0.5], [0.0, 0.0]]))
        array([[0, 0],
               [0, 1],
               [1, 0],
               [1, 1]], dtype=int32)
    """
    _check_table(table)
    return np.array([*itertools.product(range(table.num_tokens), repeat=table.num_positions)], np.int32)


def path_law(table: TokenTable, path: TokenPath, t: float) -> np.ndarray:
    """p_t of all states, [K^D], in the order of `all_states`.

    Args:
        table: the data.
        path: of as many tokens.
        t: from 0 to 1.

    Raises:
        ValueError: if the path is of other tokens than the table.
    """
    _check_table(table)
    return np.exp(_log_likelihood(table, path, t, all_states(table))) @ table.probs


def token_posterior(table: TokenTable, path: TokenPath, t: float, x: ArrayTree) -> np.ndarray:
    """`p(x1_i = a | x_t = x)` of each token i, at one time.

    Of a state that does not occur at t, what is said is that of the data that explain most of its tokens.

    Args:
        table: the data.
        path: of as many tokens.
        t: from 0 to 1.
        x: states [n, D].

    Returns:
        [n, D, K].

    Raises:
        ValueError: if the path or the states are of other tokens than the table.
    """
    joint = _log_likelihood(table, path, t, x) + np.log(table.probs)
    weights = np.exp(joint - joint.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("nm,mia->nia", weights, np.eye(table.num_tokens)[table.states])


def exact_denoiser(table: TokenTable, path: TokenPath) -> DenoiserFn:
    """The perfect network: the logarithm of `token_posterior`, at any times and under `jax.jit` too.

    Args:
        table: the data.
        path: of as many tokens.

    Returns:
        `f(t, x) -> log p(x1_i = a | x_t = x)`, [batch, D, K].

    Raises:
        ValueError: if the path is of other tokens than the table.

    Example:
        >>> from fm_jax.paths import MixturePath
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import UniformTokens
        >>> f = exact_denoiser(token_table([0.5, 0.5]), MixturePath(Linear(), UniformTokens(2)))
        >>> [f"{p:.3f}" for p in jnp.exp(f(0.5, jnp.array([[0]])))[0, 0]]
        ['0.750', '0.250']
    """
    _check(table, path)
    data = jnp.asarray(np.unique(table.states))
    same = table.states[:, :, None] == np.unique(table.states)  # [m, D, n]

    def denoiser(t: Time, x: TokenState) -> Logits:
        check_tokens("x", x, path.num_tokens)
        each = jax.vmap(lambda t: path.probs(t, data))(batch_time(t, x))  # [batch, n, K]
        there = jnp.take_along_axis(each, jnp.asarray(x)[:, None], axis=2)  # p_t(x_i | a), [batch, n, D]
        log_each = jnp.maximum(jnp.log(there), _NEVER)
        joint = jnp.einsum("bai,mia->bm", log_each, jnp.asarray(same, each.dtype), precision="highest")
        joint += jnp.log(jnp.asarray(table.probs, each.dtype))[None]
        weights = jax.nn.softmax(joint, axis=1)
        tokens = jax.nn.one_hot(table.states, table.num_tokens, dtype=each.dtype)
        return jnp.log(jnp.einsum("bm,mia->bia", weights, tokens, precision="highest"))

    return Counted(denoiser, None, returns="logits")


def rate_matrix(rates: RateFn, t: float, states: ArrayTree, num_tokens: int) -> np.ndarray:
    """The generator of all states: `dp/dt = p @ matrix`, with rows of sum 0.

    Notebooks: (14.1).

    Args:
        rates: `u(t, x)`, as from `fm_jax.rates`.
        t: time.
        states: all K^D of them, as from `all_states`.
        num_tokens: K.

    Returns:
        [K^D, K^D], from state to state.

    Raises:
        ValueError: if the states are not all, or `rates` return another shape than [K^D, D, K].
    """
    check_rates("rates", rates)
    check_number("t", t, "[0, 1]")
    states = _checked_states(states, num_tokens)
    found = rates(jnp.asarray(t, float), jnp.asarray(states))
    check_logits("rates(t, x)", found, jnp.asarray(states), num_tokens)
    return _generator(np.asarray(found, np.float64), states)


def chain_law(
    rates: RateFn, law: ArrayTree, states: ArrayTree, num_tokens: int, *, t0: float, t1: float, num_steps: int = 100
) -> np.ndarray:
    """The law of all states at `t1` of the chain with given rates: the master equation `dp/dt = p @ matrix`, by RK4.

    Args:
        rates: `u(t, x)`, finite from `t0` to `t1`, as from `fm_jax.rates`.
        law: at `t0`, [K^D].
        states: all K^D of them, as from `all_states`.
        num_tokens: K.
        t0: start.
        t1: end, after it.
        num_steps: of Runge and Kutta's method of order 4.

    Returns:
        [K^D].

    Raises:
        ValueError: as `rate_matrix`, or if there is not one probability for each state.
    """
    check_rates("rates", rates)
    check_finite("law", law)
    check_increasing("[0, 1]", t0=t0, t1=t1)
    check_integer("num_steps", num_steps)
    states = _checked_states(states, num_tokens)
    law = np.asarray(law, np.float64)
    if law.shape != states.shape[:1]:
        raise ValueError(f"law must be one number for each state, {states.shape[:1]}, got shape {law.shape}.")
    times, h = np.linspace(t0, t1, 2 * num_steps + 1), (t1 - t0) / num_steps
    compiled = jax.jit(rates)
    matrices = (rate_matrix(compiled, float(t), states, num_tokens) for t in times)
    left = next(matrices)
    for _ in range(num_steps):
        middle, right = next(matrices), next(matrices)
        k1 = law @ left
        k2 = (law + h / 2 * k1) @ middle
        k3 = (law + h / 2 * k2) @ middle
        k4 = (law + h * k3) @ right
        law = law + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        left = right
    return law


def transition_matrix(probs: ArrayTree, states: ArrayTree) -> np.ndarray:
    """The kernel of a step that draws each token by itself: `law @ kernel` is the law after it, without a draw.

    Args:
        probs: of each token from each state, [n, D, K].
        states: all of them, [n, D], as from `all_states`.

    Returns:
        [n, n], from state to state.

    Raises:
        ValueError: if `probs` have another shape, or the states are not all.
    """
    check_finite("probs", probs)
    probs = np.asarray(probs, np.float64)
    if probs.ndim != 3:
        raise ValueError(f"probs must be [n, D, K], got shape {probs.shape}.")
    states = _checked_states(states, probs.shape[2])
    if probs.shape[:2] != states.shape:
        raise ValueError(f"probs must be {[*states.shape, probs.shape[2]]}, got shape {probs.shape}.")
    kernel = np.ones((len(states), len(states)))
    for i in range(states.shape[1]):
        kernel *= probs[:, i][:, states[:, i]]
    return kernel


def _generator(rates: np.ndarray, states: np.ndarray) -> np.ndarray:
    num, num_positions, num_tokens = rates.shape
    matrix, weights = np.zeros((num, num)), num_tokens ** np.arange(num_positions)[::-1]
    rows = np.arange(num)
    for i, weight in enumerate(weights):
        for token in range(num_tokens):
            matrix[rows, rows + (token - states[:, i]) * weight] += rates[:, i, token]
    matrix[rows, rows] = 0
    matrix[rows, rows] = -matrix.sum(axis=1)
    return matrix


def _log_likelihood(table: TokenTable, path: TokenPath, t: float, x: ArrayTree) -> np.ndarray:
    """`log p_t(x | x1)` of states x [n, D] for each x1 of the table, [n, m]; about -1e30 where it is -inf."""
    _check(table, path)
    check_number("t", t, "[0, 1]")
    check_tokens("x", x, path.num_tokens)
    x = np.asarray(x)
    if x.shape[1:] != table.states.shape[1:]:
        raise ValueError(f"x must be [n, {table.num_positions}], as the table has it, got shape {x.shape}.")
    data, which = np.unique(table.states, return_inverse=True)
    with jax.enable_x64(True):
        each = np.asarray(path.probs(jnp.asarray(t, float), jnp.asarray(data)), np.float64)
    with np.errstate(divide="ignore"):
        log_each = np.maximum(np.log(each), _NEVER)
    which = which.reshape(table.states.shape)
    return sum((log_each[which[:, i]][:, x[:, i]].T for i in range(table.num_positions)), np.zeros(()))


def _check_table(table: TokenTable) -> None:
    check_has("table", table, ("states", "probs", "num_tokens"), "a TokenTable, as from token_table")


def _check(table: TokenTable, path: TokenPath) -> None:
    _check_table(table)
    check_has("path", path, ("num_tokens", "probs"), "a path of tokens, such as MixturePath(Linear(), Masked(5, 4))")
    if path.num_tokens != table.num_tokens:
        raise ValueError(f"path must be of {table.num_tokens} tokens, those of the table, got {path.num_tokens}.")


def _checked_states(states: ArrayTree, num_tokens: int) -> np.ndarray:
    """As NumPy's; raises `ValueError` unless they are all, in the order of `all_states`."""
    check_integer("num_tokens", num_tokens, least=2)
    check_tokens("states", states, num_tokens)
    states = np.asarray(states)
    num_positions = states.shape[1] if states.ndim == 2 else 0
    weights = num_tokens ** np.arange(num_positions)[::-1]
    if states.ndim != 2 or not np.array_equal(states @ weights, np.arange(num_tokens**num_positions)):
        raise ValueError(
            f"states must be all {num_tokens}^D of {num_tokens} tokens, as from all_states(table), got {shown(states)}."
        )
    return states
