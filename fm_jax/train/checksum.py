"""A checksum of an array that does not depend on how the array is cut into shards."""

import functools
import math
from collections.abc import Sequence

import numpy as np

from fm_jax.checks import check_array

_BITS = 16  # of the number of a column that the table of factors covers
_COLUMNS = 64
_BLOCK, _ROW = 1 << 61, 1 << 62


def shard_sum(shard: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """The part of one shard in the checksum of an array; the parts of all shards add up to it, modulo 2^64.

    Every word of at most 32 bits is multiplied by an odd number that stands for its place in the whole array, one for
    the last axes times one for the others, both from the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), and the
    products are added. One changed word therefore always changes the sum; what is swapped, moved, zeroed or otherwise
    changed leaves it as it was by a chance of at most about 2^-32, as with a CRC-32, at about the speed of that.

    Args:
        shard: [...], any type whose elements have 1, 2, 4, 8 or 16 bytes.
        start: the place of its first element in the whole array, an index for each axis.
        shape: of the whole array.

    Returns:
        An integer from 0 to 2^64 - 1.

    Raises:
        ValueError: if `shard` is no array, or does not lie within `shape`.

    Example:
        >>> x = np.arange(6.0).reshape(2, 3)
        >>> parts = [shard_sum(x[:, :1], (0, 0), (2, 3)), shard_sum(x[:, 1:], (0, 1), (2, 3))]
        >>> sum(parts) % 2**64 == shard_sum(x, (0, 0), (2, 3))
        True
    """
    check_array("shard", shard)
    start, shape = tuple(start), tuple(shape)
    if not len(start) == len(shape) == shard.ndim or not all(
        low >= 0 and low + n <= whole for low, n, whole in zip(start, shard.shape, shape, strict=True)
    ):
        raise ValueError(f"shard must lie within {shape}, got one of shape {shard.shape} that begins at {start}.")
    if shard.size == 0:
        return 0
    if shard.ndim == 0:
        shard, start, shape = shard.reshape(1), (0,), (1,)
    size = shard.dtype.itemsize
    words, per = np.ascontiguousarray(shard).view(f"u{min(size, 4)}"), max(size // 4, 1)
    start, shape = (*start[:-1], start[-1] * per), (*shape[:-1], shape[-1] * per)
    # Rows and columns: the last axes together, as many as have enough columns to be quick.
    split = next((axis for axis in reversed(range(len(shape))) if math.prod(shape[axis:]) >= _COLUMNS), 0)
    rows = words.reshape(math.prod(words.shape[:split]), -1)
    if words.shape[split + 1 :] == shape[split + 1 :]:
        sums = _by_blocks(rows, start[split] * math.prod(shape[split + 1 :]))
    else:
        sums = np.einsum("ij,j->i", rows, _factors(_positions(words.shape[split:], start[split:], shape[split:])))
    row = _positions(words.shape[:split], start[:split], shape[:split])
    return int((sums * _odd(row + np.uint64(_ROW))).sum())


def _by_blocks(rows: np.ndarray, first: int) -> np.ndarray:
    """[rows] sums over columns that lie in a row from the first on."""
    last, sums = first + rows.shape[1], np.zeros(len(rows), np.uint64)
    for block in range(first >> _BITS, (last - 1 >> _BITS) + 1):
        begin = block << _BITS
        low, high = max(first, begin), min(last, begin + (1 << _BITS))
        part = np.einsum("ij,j->i", rows[:, low - first : high - first], _table()[low - begin : high - begin])
        sums += part * _odd(np.array([block + _BLOCK], np.uint64))
    return sums


def _factors(columns: np.ndarray) -> np.ndarray:
    """The same factors for any columns."""
    bits = np.uint64(_BITS)
    return _table()[columns & np.uint64((1 << _BITS) - 1)] * _odd((columns >> bits) + np.uint64(_BLOCK))


def _positions(part: Sequence[int], start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """The places, in order, of a part of some axes among all elements of those axes."""
    places = np.zeros(1, np.uint64)
    for n, low, whole in zip(part, start, shape, strict=True):
        places = (places[:, None] * np.uint64(whole) + np.arange(low, low + n, dtype=np.uint64)[None]).reshape(-1)
    return places


@functools.cache
def _table() -> np.ndarray:
    return _odd(np.arange(1 << _BITS, dtype=np.uint64))


def _odd(x: np.ndarray) -> np.ndarray:
    """[n] integers -> [n] odd integers of 64 bits that look drawn at random."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
