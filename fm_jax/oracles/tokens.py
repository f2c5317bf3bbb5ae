"""Laws of a few tokens, in full: everything about them is a finite sum.

A table q(x1) of D tokens, each from 0 to K - 1, has K^D states. Carried along a mixture path it is known at all times,
as are the posterior of every token, the matrix of any rates, and the law that a sampler really draws from, found by
pushing the vector of all states through its step. All in NumPy's double precision, but for what a sampler calls.
"""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_has, check_number, check_tokens
from fm_jax.paths.mixture import MixturePath
from fm_jax.shapes import batch_time
from fm_jax.types import ArrayTree, DenoiserFn, Logits, RateFn, Time, Tokens


class TokenTable(NamedTuple):
    """Data of D tokens: `states` [n, D], those that occur, with `probs` [n]; K is `num_tokens`. Made by `token_table`."""

    states: np.ndarray
    probs: np.ndarray
    num_tokens: int

    @property
    def num_positions(self) -> int:
        return self.states.shape[1]


def token_table(q: ArrayTree) -> TokenTable:
    """The law with the probabilities q, [K, ..., K], D axes of K each; normalised here."""
    q = np.asarray(q, np.float64)
    if q.ndim < 1 or len(set(q.shape)) != 1 or not np.isfinite(q).all() or (q < 0).any() or q.sum() == 0:
        raise ValueError(f"q must be [K, ..., K], finite, not negative and not all 0, got shape {q.shape}.")
    where = np.argwhere(q > 0)
    probs = q[tuple(where.T)]
    return TokenTable(where.astype(np.int32), probs / probs.sum(), q.shape[0])


def with_mask(table: TokenTable) -> TokenTable:
    """The same data among one token more, which none of them holds: for a path from `Masked(K + 1, K)`."""
    return table._replace(num_tokens=table.num_tokens + 1)


def all_states(table: TokenTable) -> np.ndarray:
    """All K^D states, [K^D, D], the last token fastest."""
    return np.array([*itertools.product(range(table.num_tokens), repeat=table.num_positions)], np.int32)


def path_law(table: TokenTable, path: MixturePath, t: float) -> np.ndarray:
    """p_t of all states, [K^D], in the order of `all_states`."""
    return np.exp(_log_likelihood(table, path, t, all_states(table))) @ table.probs


def token_posterior(table: TokenTable, path: MixturePath, t: float, x: np.ndarray) -> np.ndarray:
    """`p(x1_i = a | x_t = x)`, [n, D, K], at one time; for states [n, D] of probability 0 what is left is even."""
    likelihood = np.exp(_log_likelihood(table, path, t, x)) * table.probs
    total = likelihood.sum(axis=1, keepdims=True)
    weights = np.divide(likelihood, total, out=np.full_like(likelihood, 1 / len(table.probs)), where=total > 0)
    return np.einsum("nm,mia->nia", weights, np.eye(table.num_tokens)[table.states])


def exact_denoiser(table: TokenTable, path: MixturePath) -> DenoiserFn:
    """The perfect network: `f(t, x) -> log p(x1_i = a | x_t = x)`, [batch, D, K], to be called under `jax.jit` too."""
    _check(table, path)
    states, log_q = jnp.asarray(table.states), jnp.log(jnp.asarray(table.probs))

    def denoiser(t: Time, x: Tokens) -> Logits:
        t = batch_time(t, x)
        alpha, sigma = path.schedule.alpha(t), path.schedule.sigma(t)
        noise = sigma[:, None] * jnp.asarray(path.source.probs, t.dtype)[x]  # [batch, D]
        same = x[:, None, :] == states[None]
        each = jnp.where(same, alpha[:, None, None] + noise[:, None], noise[:, None])
        log_joint = jnp.log(each).sum(axis=2) + log_q.astype(t.dtype)[None]
        top = log_joint.max(axis=1, keepdims=True)
        weights = jnp.exp(log_joint - jnp.where(jnp.isfinite(top), top, 0))
        return jnp.log(jnp.einsum("bn,nia->bia", weights, jnp.eye(table.num_tokens, dtype=t.dtype)[states]))

    return denoiser


def rate_matrix(rates: RateFn, t: float, states: np.ndarray, num_tokens: int) -> np.ndarray:
    """The generator of all states, [n, n]: `dp/dt = p @ matrix`. `states` are all K^D of them, as from `all_states`."""
    found = np.asarray(rates(t, jnp.asarray(states)), np.float64)
    matrix, weights = np.zeros((len(states), len(states))), num_tokens ** np.arange(states.shape[1])[::-1]
    rows = np.arange(len(states))
    for i, weight in enumerate(weights):
        for token in range(num_tokens):
            matrix[rows, rows + (token - states[:, i]) * weight] += found[:, i, token]
    matrix[rows, rows] -= matrix.sum(axis=1)
    return matrix


def transition_matrix(probs: np.ndarray, states: np.ndarray) -> np.ndarray:
    """The kernel [n, n] of a step that draws each token by itself, with `probs` [n, D, K] from each state."""
    kernel = np.ones((len(states), len(states)))
    for i in range(states.shape[1]):
        kernel *= np.asarray(probs, np.float64)[:, i][:, states[:, i]]
    return kernel


def _log_likelihood(table: TokenTable, path: MixturePath, t: float, x: np.ndarray) -> np.ndarray:
    """`log p_t(x | x1)` of states x [n, D] for each x1 of the table, [n, m]."""
    _check(table, path)
    check_number("t", t, "[0, 1]")
    check_tokens("x", x, path.num_tokens)
    alpha, sigma = (np.float64(f(np.float64(t))) for f in (path.schedule.alpha, path.schedule.sigma))
    noise = sigma * np.asarray(path.source.probs, np.float64)[x][:, None]
    with np.errstate(divide="ignore"):
        return np.log(alpha * (x[:, None] == table.states) + noise).sum(axis=2)


def _check(table: TokenTable, path: MixturePath) -> None:
    check_has("table", table, ("states", "probs", "num_tokens"), "a TokenTable, as from token_table")
    if path.num_tokens != table.num_tokens:
        raise ValueError(f"path must be of {table.num_tokens} tokens, those of the table, got {path.num_tokens}.")


def sudoku4() -> TokenTable:
    """The 288 solutions of the sudoku of 4 by 4, each as likely: 16 tokens of 4, of log 288 = 5.663 nats.

    Example:
        >>> sudoku4().states.shape
        (288, 16)
    """
    rows = [*itertools.permutations(range(4))]
    found = []
    for grid in itertools.product(rows, repeat=4):
        columns_fit = all(len(set(column)) == 4 for column in zip(*grid, strict=True))
        blocks = ({grid[i + k][j + m] for k in (0, 1) for m in (0, 1)} for i in (0, 2) for j in (0, 2))
        if columns_fit and all(len(block) == 4 for block in blocks):
            found.append(sum(grid, ()))
    return TokenTable(np.array(found, np.int32), np.full(len(found), 1 / len(found)), 4)
