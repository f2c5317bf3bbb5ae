"""Dense transport plans made sparse at random: their mean and their sums stay, most of their entries become 0."""

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from fm_jax.types import Array, Key

_Entries: TypeAlias = tuple[Array, Array, Array]
"""Rows, columns and units of entries, [e] each."""


class Edges(NamedTuple):
    """A sparse matrix of integers as a bipartite graph with multiplicities, in the order of its rows."""

    edge: Array
    """`row n + column` int32 [e]."""
    multiplicity: Array
    """int32 [e], of which some may be 0."""
    by_column: Array
    """Their indices [e] in the order of the columns."""


def thin(key: Key, units: Array) -> Edges:
    """A random matrix of some 1.4 n^1.5 entries with the mean and the sums of a dense one.

    Two rows that share two columns may exchange units along the cycle of the four entries, up or down, until one of
    them is 0; the direction is drawn so that the mean stays. Repeated, this leaves the two no more than one column in
    common. The rows are taken in pairs, then the pairs in pairs, up to groups of some sqrt(2 n) rows. Within a group a
    column is held by one row, so that in two groups the columns of the same two holders are two rows to be separated
    in the same way; what the second has of the column that they keep in common leaves the play. The work is some 2 n^2.

    The random numbers of all groups are sums of a word of the group and a word of the place: uniform and independent
    of all that went before, which is what the mean asks for, and pairwise independent.

    Args:
        key: PRNG key.
        units: int32 [n, n], not negative.

    Returns:
        The edges, as many for each n.

    References:
        Gandhi, Khuller, Parthasarathy & Srinivasan 2006, "Dependent rounding and its applications to approximation
        algorithms"; Deville & Tillé 1998, "Unequal probability sampling without replacement through a splitting
        method", for the two entries that meet.
    """
    n = len(units)
    levels = ((2 * n).bit_length() - 1) // 2
    size = 1 << levels  # of a group in the end
    units = jnp.pad(units, ((0, -n % size), (0, 0)))
    holder, entries = jnp.zeros_like(units), []
    for level, key_level in enumerate(jax.random.split(key, levels) if levels else ()):
        units, holder, kept = _join(key_level, units, holder, 1 << level)
        entries.append(kept)
    num = len(units)
    row = jnp.arange(num, dtype=jnp.int32)[:, None] * size + holder
    column = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (num, n))
    entries.append((row, column, units))
    row, column, count = (jnp.concatenate([each.reshape(-1) for each in part]) for part in zip(*entries))
    row = jnp.minimum(row, n - 1)  # rows that fill a group up are empty
    order = _order(row, n)
    row, column, count = row[order], column[order], count[order]
    return Edges(row * n + column, count, _order(column, n))


def _join(key: Key, units: Array, holder: Array, size: int) -> tuple[Array, Array, _Entries]:
    """Joins groups of `size` rows in pairs.

    The columns are cut into chunks, which are gone through side by side, so that the sequential steps are few. Each
    chunk, in each group, has one open column of every pair of holders; the next column of these holders meets it, and
    one of the two is settled: all its units are with one holder. Last the open columns of the chunks meet.

    Args:
        key: PRNG key.
        units: of each group and column [2 m, n].
        holder: which of the group's rows has them [2 m, n], 0 to `size - 1`.
        size: rows of a group.

    Returns:
        `units` and `holder` of the joint groups [m, n]; and the entries left over, at most one for two holders.
    """
    n, kinds = units.shape[1], size**2
    share, both, kind = units[0::2], units[0::2] + units[1::2], holder[0::2] * size + holder[1::2]
    num = len(share)
    chunks = max(1, min(math.isqrt(n), n // kinds))
    steps = -(-n // chunks)
    words = jax.random.bits(key, (2 * num + chunks * (steps + kinds),))
    of_group, of_group_last, of_place, of_place_last = jnp.split(words, [num, 2 * num, 2 * num + chunks * steps])

    def cut(x: Array) -> Array:
        """[steps, num, chunks] of [num, n]."""
        x = jnp.pad(x, ((0, 0), (0, chunks * steps - n)))
        return x.reshape(num, chunks, steps).transpose(2, 0, 1)

    # The table of open columns, [num, chunks, kinds] in one dimension; a column n is none.
    first = jnp.arange(num * chunks, dtype=jnp.int32).reshape(num, chunks) * kinds
    shape = (num * chunks * kinds,) if kinds > 1 else (num, chunks)
    opened = (jnp.full(shape, n, jnp.int32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.int32))

    def step(opened, x):
        kind, word, column, *rest = x
        at, column = first + kind, jnp.broadcast_to(column, first.shape)
        found = opened if kinds == 1 else [each.at[at].get(mode="promise_in_bounds") for each in opened]
        stay, settled = _meet(word[None, :] + of_group[:, None], found, (column, *rest))
        if kinds > 1:
            stay = tuple(
                each.at[at].set(new, unique_indices=True, mode="promise_in_bounds") for each, new in zip(opened, stay)
            )
        return stay, settled

    columns = jnp.arange(chunks * steps, dtype=jnp.int32).reshape(chunks, steps).T
    xs = (cut(kind), of_place.reshape(chunks, steps).T, columns, cut(share), cut(both))
    opened, settled = lax.scan(step, opened, xs)
    tables = [each.reshape(num, chunks, kinds).transpose(1, 0, 2) for each in opened]

    def meet_last(stay, x):
        word, *other = x
        return _meet(word[None, :] + of_group_last[:, None], stay, other)

    rest = (of_place_last.reshape(chunks, kinds)[1:], *(each[1:] for each in tables))
    last, settled_last = lax.scan(meet_last, tuple(each[0] for each in tables), rest)
    column, share_last, both_last = last
    left_over = jnp.where(share_last > 0, both_last - share_last, 0)

    group = jnp.arange(num, dtype=jnp.int32)[:, None]

    def place(column: Array) -> Array:
        """In [num, n] as one dimension, of [..., num, k]; beyond it for none."""
        return jnp.where(column < n, jnp.broadcast_to(group, column.shape) * n + column, num * n).reshape(-1)

    share = jnp.zeros(num * n, jnp.int32)
    for where, value in (settled, settled_last, (column, share_last)):
        share = share.at[place(where)].set(value.reshape(-1), mode="drop")
    share = share.reshape(num, n)
    both = both.reshape(-1).at[place(column)].add(-left_over.reshape(-1), mode="drop").reshape(num, n)
    joint = jnp.where(share > 0, kind // size, size + kind % size)
    row = group * 2 * size + size + jnp.arange(kinds, dtype=jnp.int32)[None, :] % size
    return both, joint, (row, jnp.minimum(column, n - 1), left_over)


def _meet(word: Array, first, second):
    """Two columns (index, units of the upper holder, units of both) of the same holders exchange units.

    Returns:
        The one that stays open; and of the other, all of whose units are with one holder now, index and units of the
        upper one.
    """
    index1, share1, both1 = first
    index2, share2, both2 = second
    up, down = jnp.minimum(both1 - share1, share2), jnp.minimum(share1, both2 - share2)
    uniform = (word >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    moved = jnp.where(uniform * (up + down).astype(jnp.float32) < down.astype(jnp.float32), up, -down)
    share1, share2 = share1 + moved, share2 - moved
    settled1 = (share1 == 0) | (share1 == both1)
    open_ = tuple(jnp.where(settled1, y, x) for x, y in ((index1, index2), (share1, share2), (both1, both2)))
    return open_, tuple(jnp.where(settled1, x, y) for x, y in ((index1, index2), (share1, share2)))


def _order(numbers: Array, limit: int) -> Array:
    """Indices [e] that sort numbers below `limit`, equal ones in their order."""
    bits = (len(numbers) - 1).bit_length()
    if bits + (limit - 1).bit_length() > 32:
        return jnp.argsort(numbers, stable=True).astype(jnp.int32)
    # XLA sorts single numbers on a CPU ten times as fast as pairs.
    packed = (numbers.astype(jnp.uint32) << bits) | jnp.arange(len(numbers), dtype=jnp.uint32)
    return (jnp.sort(packed) & jnp.uint32((1 << bits) - 1)).astype(jnp.int32)
