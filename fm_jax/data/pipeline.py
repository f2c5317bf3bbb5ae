"""Endless, shuffled, checkpointable training batches of images, in memory or not, through Grain."""

from __future__ import annotations

import functools
import math
import sys
from typing import TYPE_CHECKING

import jax
import numpy as np

from fm_jax.checks import check_bool, check_integer, check_seed
from fm_jax.data.arrays import check_dataset, to_unit_range
from fm_jax.data.images import ImageDataset

if TYPE_CHECKING:
    import grain

_FLIPS, _NOISE = 0, 1
"""The random streams of a seed."""
_THREADS, _AHEAD = 2, 4
"""Batches that are read at once, and at most ahead, where images are not in memory."""
_CHUNK = 4096


def batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    flip: bool = False,
    dequantize: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator:
    """Iterates over shuffled batches forever.

    The examples form one endless sequence, each epoch a new permutation of the dataset. It is cut into steps of
    `batch_size * process_count` examples, across epochs where that does not divide, so nothing is ever dropped; of each
    step process p has the rows from `p * batch_size`. The n-th example of the sequence, its flip and noise included, is
    a function of `(seed, n)` alone, drawn by a generator that counts to it. So P processes see together, step by step,
    the bits that one process sees with the batch of all, and no process draws what another needs.

    `iterator.get_state()` is a small JSON-serialisable dict, the number of steps taken, and so the same on all
    processes. After `set_state` an iterator made with the same arguments goes on bit-identically (given the same NumPy
    and Grain), and so does one on another number of processes, as long as their batches together are as large.

    Images in memory need no thread. `LazyImages` and memory-mapped arrays are read by threads, a few batches ahead: the
    same bits, and no more of them in memory.

    Args:
        dataset: uint8 images, or float32 in their `value_range`; with labels or without.
        batch_size: examples in a batch of *this* process, the same on all of them.
        seed: from 0 to 2^32 - 1. Decides the order, the flips and the noise.
        flip: mirror each image left to right with probability 1/2.
        dequantize: replace level k of K by `2 (k + u) / K - 1`, u uniform on (0, 1), instead of `2 k / (K - 1) - 1`.
            A bin is then `2 / K` wide and `floor` recovers k: what likelihoods in bits per dimension need.
        process_index: which process this is; by default `jax.process_index()`.
        process_count: how many there are; by default `jax.process_count()`.

    Returns:
        An iterator over dicts `{"x1": float32 [batch_size, h, w, c] in [-1, 1], "cond": int32 [batch_size]}`; without
        labels there is no "cond", and latents are as they are.

    Raises:
        ValueError: if the images, labels or sizes do not fit; see `fm_jax.data.arrays.check_dataset`.
        ImportError: if Grain is not installed.

    References:
        Theis et al., "A note on the evaluation of generative models", 2016, section 3.1 (uniform dequantisation).
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011 (the generator Philox).
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    dataset = check_dataset(dataset)
    check_bool("flip", flip)
    check_bool("dequantize", dequantize)
    _check_sizes(len(dataset.images), batch_size, seed, process_index, process_count)
    try:
        import grain
    except ImportError as error:
        raise ImportError("batches needs Grain: pip install 'fm_jax[data]'.") from error

    images, labels, value_range = dataset.images, dataset.labels, dataset.value_range
    lazy = not isinstance(images, np.ndarray) or isinstance(images, np.memmap)
    if dequantize:
        if value_range is not None and math.isinf(value_range[0]):
            raise ValueError("dequantize must be False for images that are used as they are, value_range=(-inf, inf).")
        if images.dtype != np.uint8 and not lazy:
            _check_levels(images, value_range or (-1.0, 1.0), dataset.levels)
    order = _Order(len(images), seed)

    def draw(number: int) -> dict[str, np.ndarray]:
        start = number * batch_size
        indices = order(start, batch_size)
        x = np.ascontiguousarray(images[indices])  # not take, which would copy all images that are a transposed view
        if flip:
            _mirror(x, _random_bytes(seed, _FLIPS, start, batch_size) < 128)
        if dequantize:
            if x.dtype != np.uint8:
                x = np.rint(_positions(x, value_range, dataset.levels))
            noise = _random_bytes(seed, _NOISE, 2 * start * x[0].size, 2 * x.size)
            x = _dequantize(x, dataset.levels, noise.view("<u2").reshape(x.shape))
        else:
            x = to_unit_range(x, value_range)
        return {"x1": x} if labels is None else {"x1": x, "cond": labels[indices]}

    # Whole batches go through Grain: one example at a time costs 7 to 11 ms for a batch of 128, this 0.1.
    numbers = grain.MapDataset.range(sys.maxsize)[process_index::process_count].map(draw)
    # What is in memory needs no thread. What is read from a disk is read ahead, while the device computes.
    ahead = (_THREADS, _AHEAD) if lazy else (0, 0)
    return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=ahead[0], prefetch_buffer_size=ahead[1])))


class _Order:
    """The endless sequence of examples: where a batch starts and its size -> its indices into the dataset."""

    def __init__(self, num_examples: int, seed: int):
        self._num_examples = num_examples
        # Two, because a batch may lie across the border of two epochs.
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(num_examples)
        )

    def __call__(self, start: int, num: int) -> np.ndarray:
        epoch, first = divmod(start, self._num_examples)
        indices = self._epoch(epoch)[first : first + num]
        missing = num - len(indices)
        return np.concatenate([indices, self._epoch(epoch + 1)[:missing]]) if missing else indices


def _random_bytes(seed: int, stream: int, start: int, num: int) -> np.ndarray:
    """Bytes `start` to `start + num` of an endless stream: a counter's values, 32 bytes each, under a block cipher."""
    first, skipped = divmod(start, 32)
    words = np.random.Philox(key=seed + (stream << 64), counter=first).random_raw(-(-(skipped + num) // 8))
    return words.astype("<u8", copy=False).view(np.uint8)[skipped : skipped + num]


def _mirror(x: np.ndarray, mirrored: np.ndarray) -> None:
    """Mirrors some of the images [n, h, w, c] in place; pixels are moved whole, not channel by channel."""
    whole = x.view(f"V{x.itemsize * x.shape[-1]}")
    chosen = np.flatnonzero(mirrored)
    whole[chosen] = whole[chosen][:, :, ::-1]


def _dequantize(level: np.ndarray, levels: int, noise: np.ndarray) -> np.ndarray:
    # 15 of the 16 random bits, centred, so that level + u is exact in float32 and never rounds up into the next bin.
    noise |= 1  # in place: with one array more, glibc gives memory back and asks for it anew for each batch
    x = noise.astype(np.float32)
    x *= 2.0**-16
    x += level
    x *= 2.0 / levels
    x -= 1.0
    return x


def _check_levels(images: np.ndarray, value_range: tuple[float, float], levels: int) -> None:
    """Refuses images that do not lie on even levels, which noise would not make continuous."""
    for start in range(0, len(images), _CHUNK):
        position = _positions(images[start : start + _CHUNK], value_range, levels)
        if np.abs(position - np.rint(position)).max() > 0.01:
            raise ValueError(f"dequantize needs images on {levels} even levels of [-1, 1], got values between.")


def _positions(images: np.ndarray, value_range: tuple[float, float] | None, levels: int) -> np.ndarray:
    return (to_unit_range(images, value_range) + 1.0) * ((levels - 1) / 2)


def _check_sizes(num_examples: int, batch_size: int, seed: int, process_index: int, process_count: int) -> None:
    check_integer("process_count", process_count)
    check_integer("process_index", process_index, least=0, most=process_count - 1)
    check_integer("batch_size", batch_size)
    check_seed("seed", seed)
    if batch_size * process_count > num_examples:
        raise ValueError(
            f"batch_size must be at most {num_examples // process_count}, the {num_examples} examples over "
            f"{process_count} process(es), got {batch_size}."
        )
