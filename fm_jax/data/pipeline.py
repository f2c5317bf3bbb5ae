"""Endless, shuffled, checkpointable training batches from images in memory, through Grain."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING

import jax
import numpy as np

from fm_jax.checks import check_array, check_bool, check_has, check_integer, check_seed
from fm_jax.data.images import ImageDataset, to_float

if TYPE_CHECKING:
    import grain

_FLIPS, _NOISE = 0, 1
"""The random streams of a seed."""


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
    and Grain), and so does one on another number of processes, as long as their batches together are as large. No
    thread or worker process is started.

    Args:
        dataset: uint8 images, or float32 in [-1, 1].
        batch_size: examples in a batch of *this* process, the same on all of them.
        seed: from 0 to 2^32 - 1. Decides the order, the flips and the noise.
        flip: mirror each image left to right with probability 1/2.
        dequantize: replace level k of K by `2 (k + u) / K - 1`, u uniform on (0, 1), instead of `2 k / (K - 1) - 1`.
            A bin is then `2 / K` wide and `floor` recovers k: what likelihoods in bits per dimension need.
        process_index: which process this is; by default `jax.process_index()`.
        process_count: how many there are; by default `jax.process_count()`.

    Returns:
        An iterator over dicts `{"x1": float32 [batch_size, h, w, c] in [-1, 1], "cond": int32 [batch_size]}`.

    Raises:
        ValueError: if the images, labels or sizes do not fit.
        ImportError: if Grain is not installed.

    References:
        Theis et al., "A note on the evaluation of generative models", 2016, section 3.1 (uniform dequantisation).
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011 (the generator Philox).
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    _check_dataset(dataset)
    check_bool("flip", flip)
    check_bool("dequantize", dequantize)
    _check_sizes(len(dataset.images), batch_size, seed, process_index, process_count)
    try:
        import grain
    except ImportError as error:
        raise ImportError("batches needs Grain: pip install 'fm_jax[data]'.") from error

    labels = dataset.labels.astype(np.int32)
    pixels = _to_levels(dataset) if dequantize else dataset.images
    order = _Order(len(pixels), seed)

    def draw(number: int) -> dict[str, np.ndarray]:
        start = number * batch_size
        indices = order(start, batch_size)
        x = np.ascontiguousarray(pixels[indices])  # not take, which would copy all images that are a transposed view
        if flip:
            _mirror(x, _random_bytes(seed, _FLIPS, start, batch_size) < 128)
        if dequantize:
            noise = _random_bytes(seed, _NOISE, 2 * start * x[0].size, 2 * x.size)
            x = _dequantize(x, dataset.levels, noise.view("<u2").reshape(x.shape))
        elif x.dtype == np.uint8:
            x = to_float(x)
        return {"x1": x, "cond": labels[indices]}

    # Whole batches go through Grain: one example at a time costs 7 to 11 ms for a batch of 128, this 0.1.
    numbers = grain.MapDataset.range(sys.maxsize)[process_index::process_count]
    return iter(numbers.map(draw).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


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


def _to_levels(dataset: ImageDataset) -> np.ndarray:
    if dataset.images.dtype == np.uint8:
        return dataset.images
    position = (dataset.images + 1.0) * ((dataset.levels - 1) / 2)
    level = np.rint(position)
    if np.abs(position - level).max() > 0.01:
        raise ValueError(f"dequantize needs images on {dataset.levels} even levels of [-1, 1], got values between.")
    return level.astype(np.float32)


def _check_dataset(dataset: ImageDataset) -> None:
    check_has("dataset", dataset, ("images", "labels", "levels"), "an ImageDataset")
    images, labels = dataset.images, dataset.labels
    check_array("images", images)
    check_array("labels", labels)
    check_integer("levels", dataset.levels, least=2)
    if images.ndim != 4:
        raise ValueError(f"images must be [n, h, w, c], got shape {images.shape}.")
    if images.dtype not in (np.uint8, np.float32):
        raise ValueError(f"images must be uint8 or float32, got {images.dtype}.")
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be [n] = {images.shape[:1]} integers, got {labels.dtype} {labels.shape}.")
    if images.dtype == np.uint8 and dataset.levels != 256:
        raise ValueError(f"levels must be 256 for uint8 images, got {dataset.levels}.")
    if images.dtype == np.float32 and not (images.size and np.abs(images).max() <= 1.0):
        raise ValueError("float32 images must lie in [-1, 1].")


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
