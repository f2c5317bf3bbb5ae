"""Random permutations that follow a transport plan.

To draw a partner for each example on its own drops those that nobody draws, 37% of a batch under a uniform plan. A
doubly stochastic matrix is a mean of permutations (Birkhoff 1946), so one of these can be drawn whole.
"""

from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Real

from fm_jax.checks import check_integer, check_key, check_state, is_traced
from fm_jax.couplings.thinning import thin
from fm_jax.types import AnyArray, Array, Key

_STRIDE = 3
"""Halvings between two removals of empty edges: fewer make it faster, and slower to compile."""
_SMALL = 2**12
"""Graphs of up to so many edges keep the empty ones."""
_BLOCK = 64
"""Numbers summed up in one row by a running sum."""


def sample_permutation(key: Key, plan: Real[AnyArray, "n n"], *, bits: int = 20) -> Int[Array, " n"]:
    """A random permutation whose pairs have the probabilities of a plan: `P(index0[j] = i) = plan[i, j]`.

    In units of 2^-bits the plan is a bipartite graph in which every row and every column has 2^bits edges. First most
    multiplicities become 0, at random (`thin`): some 1.4 n^1.5 are left of n^2. Then the edges are
    split into two halves with 2^(bits - 1) in every row and column, one of which stays; after `bits` splits one edge is
    left in each. An edge of even multiplicity is halved. The odd ones form closed walks that alternate between rows and
    columns; every other edge of a walk stays, and a fair coin says which. (Euler splits, as a dependent rounding.)
    So thinning and each split keep the expectations. The rounding to 2^-bits does too, but for the last few units that
    make the sums exact, some sqrt(n) 2^-bits in a row. Pairs outside the blocks of a block-diagonal plan are never
    drawn.

    The work is some 10 passes over the plan, and some 2 bits log2(n) gathers of the n^1.5 edges that are left.

    Args:
        key: PRNG key.
        plan: with x0 in rows and x1 in columns; rows and columns sum to 1, that is n times the joint
            distribution. Sums off by less than 1% on average, as Sinkhorn's are, are evened out, whereby a pair of
            probability 0 may be drawn, as seldom as the sums are wrong.
        bits: precision, 1 to 24.

    Returns:
        `index0` int32, a permutation: x0[index0[j]] goes with x1[j].

    Raises:
        ValueError: if `bits` is out of range or `plan` is not square; or, unless it is traced, negative, not finite or
            not doubly stochastic.

    Example:
        >>> plan = jnp.array([[0.0, 0.7, 0.3], [1.0, 0.0, 0.0], [0.0, 0.3, 0.7]])
        >>> sample_permutation(jax.random.key(0), plan)
        Array([1, 0, 2], dtype=int32)

    References:
        Gabow 1976, "Using Euler partitions to edge color bipartite multigraphs"; Gandhi, Khuller, Parthasarathy &
        Srinivasan 2006, "Dependent rounding and its applications to approximation algorithms".
    """
    check_key(key)
    check_integer("bits", bits, most=24)
    check_state(plan, "plan")
    plan = jnp.asarray(plan, jnp.promote_types(plan.dtype, jnp.float32))
    check_plan(plan)
    return _sample(key, plan, bits)


def check_plan(plan: Array) -> None:
    """Raises `ValueError` unless the plan is square and, as far as it is known, doubly stochastic."""
    if plan.ndim != 2 or plan.shape[0] != plan.shape[1] or not plan.size:
        raise ValueError(f"plan must be [n, n], got shape {plan.shape}.")
    if is_traced(plan):
        return
    values = np.asarray(plan)
    if not (values >= 0).all() or not np.isfinite(values).all():
        raise ValueError("plan must be finite and not negative: look for NaN in x0 and x1.")
    off = max(np.abs(values.sum(axis=axis) - 1).mean() for axis in (0, 1))
    if off > 0.01:
        raise ValueError(
            f"plan must have rows and columns that sum to 1, got sums that are off by {off:.3g} on average."
        )


@partial(jax.jit, static_argnames="bits")
def _sample(key: Key, plan: Array, bits: int) -> Array:
    """`sample_permutation`, of arguments that are right."""
    n = len(plan)
    key_round, key_thin, key_coins = jax.random.split(key, 3)
    edge, count, by_column = thin(key_thin, _to_integers(key_round, plan, bits))
    coins = jax.random.bits(key_coins, (len(edge),), dtype=jnp.uint32)  # a bit of each for a split
    # With 2^level edges in a row, n 2^level multiplicities can be above 0.
    sparse = 0 if len(edge) <= _SMALL else min(bits, ((len(edge) - 1) // n).bit_length() - 1)
    for start, stop in pairwise([bits, *range(sparse, 0, -_STRIDE), 0]):
        if start <= sparse:
            edge, count, by_column = _drop_empty(edge, count, by_column, min(n << start, len(edge)))
        halve = lambda depth, count, by_column=by_column: _halve(coins >> depth, count, by_column)  # noqa: E731
        count = jax.lax.fori_loop(np.uint32(bits - start), np.uint32(bits - stop), halve, count)
    row, column = edge // n, edge % n
    return jnp.zeros(n, jnp.int32).at[jnp.where(count == 1, column, n)].set(row, mode="drop")


def _to_integers(key: Key, plan: Array, bits: int) -> Array:
    """The plan in units of 2^-bits, at random and without bias: int32 [n, n], each row and column 2^bits in sum."""
    n, total = len(plan), 1 << bits
    running = _running(plan)
    offset = jax.random.uniform(key, (n, 1), plan.dtype)
    # In single precision total + offset may be rounded up to total + 1.
    units = jnp.minimum(jnp.floor(running / running[:, -1:] * total + offset), total).astype(jnp.int32)
    units = jnp.diff(units, axis=1, prepend=0)
    # The rows are right; columns give up what is too much, and what rows and columns then lack is filled in from the
    # north-west corner, which is the overlap of two partitions of one line.
    units = jnp.diff(jnp.minimum(_running(units.T).T, total), axis=0, prepend=0)
    lack0, lack1 = total - units.sum(axis=1), total - units.sum(axis=0)
    end0, end1 = jnp.cumsum(lack0), jnp.cumsum(lack1)
    overlap = jnp.minimum(end0[:, None], end1[None, :]) - jnp.maximum((end0 - lack0)[:, None], (end1 - lack1)[None, :])
    return units + overlap.clip(0)


def _halve(coins: Array, count: Array, by_column: Array) -> Array:
    """One Euler split: multiplicities [e] of half the sum in each row and column, each half of what it was on average.

    Args:
        coins: uint32 [e], random in the lowest bit.
        count: multiplicities [e], in the order of the rows.
        by_column: their indices [e] in the order of the columns.
    """
    # Odd edges are numbered in the order of the rows. Rows have an even number of them, so 2 k and 2 k + 1 are in one
    # row; likewise neighbours in the order of the columns. Numbers that no edge has stay alone.
    ids = jnp.arange(len(count), dtype=jnp.int32)
    odd = count % 2 == 1
    number = _running(odd.astype(jnp.int32)) - 1
    nth = _place(odd[by_column], number[by_column], ids)
    place = ids.at[nth].set(ids)
    across = jnp.where(ids <= number[-1], nth[place[ids ^ 1] ^ 1], ids)  # along the row, then along the column

    # The least number on every orbit of `across`, by doubling. The two orbits of a closed walk are its two halves.
    def double(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        least, jump, _ = state
        shorter = jnp.minimum(least, least[jump])
        return shorter, jump[jump], (shorter != least).any()

    least, _, _ = jax.lax.while_loop(lambda state: state[2], double, (ids, across, jnp.array(True)))
    opposite = least[ids ^ 1]
    up = (least < opposite) ^ (coins[jnp.minimum(least, opposite)] % 2 == 1)
    return jnp.where(odd, count + jnp.where(up[number], 1, -1), count) // 2


def _drop_empty(edge: Array, count: Array, by_column: Array, capacity: int) -> tuple[Array, Array, Array]:
    """Keeps the edges of multiplicity above 0, of which there are at most `capacity`, in their orders."""
    ids = jnp.arange(capacity, dtype=jnp.int32)
    alive = count > 0
    number = _running(alive.astype(jnp.int32)) - 1
    edge, count = (_place(alive, each, jnp.zeros_like(ids)) for each in (edge, count))
    return edge, count, _place(alive[by_column], number[by_column], ids)


def _place(mask: Array, values: Array, rest: Array) -> Array:
    """The values where `mask` is true, one after the other, at the head of `rest`."""
    return rest.at[jnp.where(mask, _running(mask.astype(jnp.int32)) - 1, len(rest))].set(values, mode="drop")


def _running(x: Array) -> Array:
    """Sums up to each place of the last axis, in blocks: on a CPU faster than one long cumulative sum."""
    length = x.shape[-1]
    if length <= _BLOCK:
        return jnp.cumsum(x, axis=-1)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % _BLOCK)])
    within = jnp.cumsum(x.reshape(*x.shape[:-1], -1, _BLOCK), axis=-1)
    ends = within[..., -1]
    sums = within + (_running(ends) - ends)[..., None]
    return sums.reshape(*x.shape)[..., :length]
