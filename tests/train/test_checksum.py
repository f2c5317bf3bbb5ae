import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.train.checksum import shard_sum

DTYPES = [
    bool,
    *("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *(jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2),
]


def numbers(shape, dtype=np.float32, seed=0):
    bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    return (bits[..., 0] < 128) if dtype is bool else np.ascontiguousarray(bits).view(dtype)[..., 0]


def whole(x):
    return shard_sum(x, (0,) * x.ndim, x.shape)


def in_parts(x, cuts):
    """The sum over the parts that come of cutting each axis at the places given."""
    parts = [((), ())]
    for n, places in zip(x.shape, cuts, strict=True):
        edges = [0, *places, n]
        ranges = list(itertools.pairwise(edges))
        parts = [((*start, a), (*index, slice(a, b))) for start, index in parts for a, b in ranges]
    return sum(shard_sum(x[index], start, x.shape) for start, index in parts) % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_does_not_depend_on_the_cut(dtype):
    for shape, cuts in [
        ((12,), [(5,)]),
        ((12, 10), [(), (4, 7)]),
        ((12, 10), [(1, 6), ()]),
        ((6, 5, 4), [(2,), (1, 4), (3,)]),
        ((3, 1, 1), [(1, 2), (), ()]),
        ((40, 3, 3), [(7, 8), (), ()]),
        ((40, 3, 3), [(9,), (1,), (2,)]),
        ((30_000, 3), [(21_845, 21_846), (1,)]),
        ((2, 70_000), [(1,), (3, 65_536, 65_537)]),
    ]:
        x = numbers(shape, dtype)
        assert in_parts(x, cuts) == whole(x)
        assert whole(np.asfortranarray(x)) == whole(x)


def test_scalars_and_arrays_without_an_element():
    assert whole(np.zeros((0, 3))) == 0
    assert shard_sum(np.zeros((2, 0)), (1, 3), (5, 3)) == 0
    sums = {whole(np.array(i, dtype)) for i in range(1, 5) for dtype in (np.int32, np.float32, jnp.bfloat16)}
    assert len(sums) == 12


def changes(x):
    """What damage does to an array, by name."""
    raw = np.ascontiguousarray(x).view(np.uint8).reshape(-1)
    for bit in (0, 1, 8 * raw.size // 2, 8 * raw.size - 1):
        flipped = raw.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit}", flipped.view(x.dtype).reshape(x.shape)
    negated = raw.copy()
    negated[x.itemsize - 1 :: x.itemsize] ^= 128
    yield "every sign", negated.view(x.dtype).reshape(x.shape)
    negated = raw.copy()
    negated[[x.itemsize - 1, 2 * x.itemsize - 1]] ^= 128
    yield "two signs", negated.view(x.dtype).reshape(x.shape)
    for axis in range(x.ndim):
        swapped = x.copy()
        order = np.arange(x.shape[axis])
        order[[0, -1]] = order[[-1, 0]]
        yield f"swapped along {axis}", np.take(swapped, order, axis)
        yield f"moved along {axis}", np.roll(x, 1, axis)
    zeroed = x.copy()
    zeroed[2:5] = 0
    yield "zeroed", zeroed
    repeated = x.copy()
    repeated[4:8] = x[:4]
    yield "a block twice", repeated
    yield "transposed", np.ascontiguousarray(x.T)
    square = x.copy()
    square[:4, :4] = x[:4, :4].T
    yield "a block transposed", square


@pytest.mark.parametrize("dtype", ["uint8", jnp.bfloat16, "float32", "float64"], ids=str)
def test_notices_damage(dtype):
    x = numbers((16, 16), dtype)
    for name, damaged in changes(x):
        assert damaged.tobytes() != x.tobytes(), name
        assert whole(damaged) != whole(x), name


def test_notices_every_swap_of_two_bytes():
    x = np.arange(64, dtype=np.uint8).reshape(8, 8)
    sums = {whole(x)}
    for i in range(64):
        for j in range(i):
            swapped = x.copy()
            swapped.flat[[i, j]] = swapped.flat[[j, i]]
            sums.add(whole(swapped))
    assert len(sums) == 1 + 64 * 63 // 2


def test_bad_input():
    x = np.zeros((2, 3))
    for args, message in [
        (([1.0], (0,), (1,)), "shard must be an array"),
        ((x, (0, 1), (2, 3)), r"shard must lie within \(2, 3\), got one of shape \(2, 3\) that begins at \(0, 1\)"),
        ((x, (-1, 0), (2, 3)), "shard must lie within"),
        ((x, (0,), (6,)), "shard must lie within"),
    ]:
        with pytest.raises(ValueError, match=message):
            shard_sum(*args)
