"""Latents of an autoencoder in records: mean and deviation of every image, from which each epoch draws anew.

A folder of latents holds files of ArrayRecord, `train-00000-of-00013.array_record` and so on, the labels, and
`latents.json`, which says what they are and of which autoencoder. `fm_jax.data.encoding.write_latents` writes one,
and `python -m experiments.encode` calls it.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_member, shown
from fm_jax.data.images import ImageDataset
from fm_jax.data.lazy import LazyImages
from fm_jax.data.pipeline import _AHEAD, _FLIPS, _THREADS, _check_sizes, _Order, _random_bytes
from fm_jax.data.shards import Records, read_finished, shards
from fm_jax.latents import LatentSpace

if TYPE_CHECKING:
    import grain

INFO = "latents.json"
_NOISE = 2
"""The random stream of a seed that draws latents; those of flips and of dequantisation are 0 and 1."""
HALF = np.dtype("<f2")
"""What is written."""


@dataclass(frozen=True, eq=False)
class LatentSplit:
    """The latents of one split, by number; nothing is read before it is asked for.

    Attributes:
        records: one for each image.
        shape: of the latents of one image, (h, w, c).
        has_std: whether there are deviations, or the encoder gives latents that are not random.
        flipped: whether the latents of the mirrored images are there too.
        labels: int32 [n], or `None`.
        numbers: of the records of this split, int64 [n].
    """

    records: Records
    shape: tuple[int, int, int]
    has_std: bool
    flipped: bool
    labels: np.ndarray | None
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, indices: np.ndarray, mirrored: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Mean and deviation of some images.

        Args:
            indices: [m] integers.
            mirrored: bool [m], of which the latents of the mirrored image are wanted; `None` for none.

        Returns:
            float32 [m, h, w, c] twice; `None` for the second where there are no deviations.
        """
        found = self.all_of(indices)
        twin = np.zeros(len(found), int) if mirrored is None else np.asarray(mirrored, int)
        if not self.flipped and twin.any():
            raise ValueError("mirrored must be None: the latents of mirrored images were not written.")
        chosen = found[np.arange(len(found)), twin].astype(np.float32)
        return chosen[:, 0], chosen[:, 1] if self.has_std else None

    def all_of(self, indices: np.ndarray) -> np.ndarray:
        """What is written of some images, float16 [m, 1 or 2 (mirrored), 1 or 2 (mean, deviation), h, w, c]."""
        records = self.records.read(self.numbers[indices])
        found = np.frombuffer(b"".join(records), HALF)
        return found.reshape(len(records), 1 + self.flipped, 1 + self.has_std, *self.shape)

    def subset(self, indices: np.ndarray | slice) -> LatentSplit:
        """Some of the images."""
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, labels=labels, numbers=self.numbers[indices])


@dataclass(frozen=True, eq=False)
class Latents:
    """A folder of latents.

    Attributes:
        folder: where it is.
        splits: by their names, "train" and perhaps "test".
        class_names: of the labels; empty without any.
        mean: float64 [c], the mean of each channel over the training split, mirrored images included.
        std: float64 [c], the standard deviation of each channel, as of latents that are drawn: the deviations of the
            encoder are in it.
        space: what the authors of the autoencoder make of its latents.
        autoencoder: SHA-256 of its parameters, or another name; `None` for one without.
        sha256: of all that is written, in order.
        images: checksums of the images by split, as `fm_jax.data.arrays.fingerprint` gives them.
        about: whatever the writer added, such as size and crop of the images.
    """

    folder: Path
    splits: Mapping[str, LatentSplit]
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    space: LatentSpace
    autoencoder: str | None
    sha256: str
    images: Mapping[str, str]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the latents of one image, (h, w, c)."""
        return self.splits["train"].shape

    def measured(self) -> LatentSpace:
        """The space in which every channel has mean 0 and variance 1 over the training split.

        Raises:
            ValueError: if a channel is constant.
        """
        if not (self.std > 1e-6 * np.maximum(1, np.abs(self.mean))).all():
            raise ValueError(
                f"latents must vary in every channel to have unit variance, got deviations {shown(self.std.tolist())}."
            )
        return LatentSpace(tuple(self.mean.tolist()), tuple((1 / self.std).tolist()))


def open_latents(folder: str | Path) -> Latents:
    """Opens a folder of latents; none of them is read.

    Raises:
        FileNotFoundError: if it is none, or a file is missing.
        ValueError: if it is not finished, or damaged.
        ImportError: if array_record is not installed.
    """
    folder = Path(folder)
    info = read_finished(folder, INFO, "latents")
    try:
        space: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in info["space"].items()}
        return Latents(
            folder,
            splits_of(folder, info),
            tuple(info["class_names"]),
            np.asarray(info["mean"], np.float64),
            np.asarray(info["std"], np.float64),
            LatentSpace(**space),
            info["autoencoder"],
            info["sha256"],
            info["images"],
            info["about"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INFO} is damaged ({type(error).__name__}: {error}).") from None


def splits_of(folder: Path, info: Mapping[str, Any]) -> dict[str, LatentSplit]:
    """The splits of a folder of which `info` is what its JSON says; none is read."""
    splits = {}
    for name, num in info["num"].items():
        labels = np.load(folder / f"{name}_labels.npy", allow_pickle=False) if info["class_names"] else None
        records = Records(shards(folder, name, num, info["shard_size"]))
        shape = tuple(info["shape"])
        splits[name] = LatentSplit(records, shape, info["has_std"], info["flip"], labels, np.arange(num))  # type: ignore[arg-type]
    return splits


class LatentImages(LazyImages):
    """The means of latents as a model sees them, float32 [n, h, w, c], in the place of images.

    Args:
        split: of a folder of latents.
        space: what the model sees of them.

    Raises:
        ValueError: if the space does not fit the shape.
    """

    def __init__(self, split: LatentSplit, space: LatentSpace):
        super().__init__(lambda i: self[np.array([i])][0], len(split), split.shape, np.float32)
        self._split, self._space, self._affine = split, space, _affine(space, split.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        numbers = np.arange(len(self))[index]
        if numbers.ndim > 1:
            raise IndexError(f"images are indexed along their first axis alone, got indices of shape {numbers.shape}.")
        mean, _ = self._split.read(np.atleast_1d(numbers))
        shift, scale = self._affine
        x = (mean - shift) * scale
        return x if numbers.ndim else x[0]

    def subset(self, indices: np.ndarray | slice) -> LatentImages:
        """Some of them, none of which is read."""
        return LatentImages(self._split.subset(indices), self._space)


def latent_dataset(latents: Latents, split: str, space: LatentSpace) -> ImageDataset:
    """A split as a data set: means of latents as a model sees them, read when they are asked for.

    Args:
        latents: a folder of latents.
        split: one of its splits.
        space: what the model sees, such as `latents.measured()`.

    Raises:
        ValueError: if there is no such split, or the space does not fit.
    """
    check_member("split", split, tuple(latents.splits))
    found = latents.splits[split]
    return ImageDataset(
        LatentImages(found, space),
        found.labels,
        latents.class_names,
        value_range=(-math.inf, math.inf),
        fingerprint=f"{latents.sha256} {space} {split}",
    )


def latent_batches(
    split: LatentSplit,
    *,
    space: LatentSpace,
    batch_size: int,
    seed: int,
    flip: bool = False,
    process_index: int | None = None,
    process_count: int | None = None,
) -> grain.DatasetIterator:
    """Iterates over shuffled batches of latents forever, drawn anew each time: `mean + std noise`.

    As `fm_jax.data.pipeline.batches`: the n-th example, its noise and its flip included, is a function of `(seed, n)`
    alone, on any number of processes, and the position can be saved and set.

    Args:
        split: of a folder of latents.
        space: what the model sees of them.
        batch_size: examples in a batch of this process, the same on all of them.
        seed: from 0 to 2^32 - 1. Decides the order, the flips and the noise.
        flip: take the latents of the mirrored image with probability 1/2; they must have been written.
        process_index: which process this is; by default `jax.process_index()`.
        process_count: how many there are; by default `jax.process_count()`.

    Returns:
        An iterator over dicts `{"x1": float32 [batch_size, h, w, c], "cond": int32 [batch_size]}`; without labels
        there is no "cond".

    Raises:
        ValueError: if the sizes do not fit, or there are no mirrored latents to flip to.
        ImportError: if Grain is not installed.

    References:
        Box & Muller 1958, "A Note on the Generation of Random Normal Deviates".
    """
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    check_bool("flip", flip)
    _check_sizes(len(split), batch_size, seed, process_index, process_count)
    if flip and not split.flipped:
        raise ValueError("flip must be False: the latents of mirrored images were not written.")
    try:
        import grain
    except ImportError as error:
        raise ImportError("latent_batches needs Grain: pip install 'fm_jax[data]'.") from error
    shift, scale = _affine(space, split.shape)
    order = _Order(len(split), seed)

    def draw(number: int) -> dict[str, np.ndarray]:
        start = number * batch_size
        indices = order(start, batch_size)
        mirrored = _random_bytes(seed, _FLIPS, start, batch_size) < 128 if flip else None
        x, std = split.read(indices, mirrored)
        if std is not None:
            x = x + std * _normal(seed, start, x.shape)
        x = (x - shift) * scale
        return {"x1": x} if split.labels is None else {"x1": x, "cond": split.labels[indices]}

    numbers = grain.MapDataset.range(sys.maxsize)[process_index::process_count].map(draw)
    return iter(numbers.to_iter_dataset(grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)))


def _normal(seed: int, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers float32 of the examples from `start` on."""
    size = 2 * -(-math.prod(shape[1:]) // 2)  # of an example, an even number
    bits = _random_bytes(seed, _NOISE, 4 * start * size, 4 * shape[0] * size).view("<u4") >> 8
    first, second = bits.reshape(shape[0], 2, -1).swapaxes(0, 1).astype(np.float32)
    radius = np.sqrt(-2 * np.log((first + 1) * np.float32(2**-24)))  # 24 bits: exact, and never the logarithm of 0
    angle = second * np.float32(2 * math.pi * 2**-24)
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return both[:, : math.prod(shape[1:])].reshape(shape)


def _affine(space: LatentSpace, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Shift and scale for latents [..., h, w, c] on the host, where the threads that read them are."""
    nothing = jnp.zeros((1, *shape))
    shift = np.asarray(space.to_latent(nothing))
    scale = np.asarray(dataclasses.replace(space, shift=0.0).to_model(nothing + 1))
    return shift, scale
