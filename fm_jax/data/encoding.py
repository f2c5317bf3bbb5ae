"""The one pass that makes of images what `fm_jax.data.latents` reads; it goes on where it was ended."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.checks import check_bool, check_function, check_integer, check_member, shown
from fm_jax.data.arrays import check_dataset, fingerprint, to_unit_range
from fm_jax.data.images import ImageDataset
from fm_jax.data.latents import HALF, INFO, Latents, LatentSplit, open_latents, splits_of
from fm_jax.data.lazy import watched
from fm_jax.data.shards import ENCODING, read_json, shards, write_array, write_json, write_shard
from fm_jax.latents import PIXELS, LatentSpace

Encode = Callable[[np.ndarray], tuple[Any, Any]]
"""`encode(x) -> (mean, std)`: float32 images [batch, h, w, c] in [-1, 1] to latents; `std` is `None` without any."""
_CHUNK = 1024


def write_latents(
    folder: Path,
    datasets: Mapping[str, ImageDataset],
    encode: Encode,
    *,
    autoencoder: str | None,
    space: LatentSpace = PIXELS,
    flip: bool = False,
    batch_size: int = 64,
    shard_size: int = 4096,
    about: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Latents:
    """Encodes images, once, and writes mean and deviation of their latents in float16.

    A pass that ends early, however it does, has left whole files behind; the same call goes on behind them, and what is
    there at the end are the same bits.

    Args:
        folder: made if need be.
        datasets: "train" and perhaps "test".
        encode: is always given batches of `batch_size`, the last one filled up.
        autoencoder: SHA-256 of its parameters, or another name, which tells its latents from those of another one. By
            `None` nothing is told: a pass without a name begins in a folder without latents, and does not go on.
        space: what the authors of the autoencoder make of its latents.
        flip: whether mirrored images are encoded as well.
        batch_size: images encoded at once.
        shard_size: images in a file, a multiple of `batch_size`.
        about: JSON values to be kept with them.
        progress: `None` for a bar on a terminal and a line now and then elsewhere, `False` for neither.

    Returns:
        The folder, opened.

    Raises:
        ValueError: if the folder holds latents of another autoencoder or of one without a name, of other images, in
            another space or otherwise made; if latents are not finite, or too large for float16.
        ImportError: if array_record is not installed.
    """
    check_function("encode", encode, "a function of images", 1)
    check_bool("flip", flip)
    check_integer("batch_size", batch_size)
    check_integer("shard_size", shard_size)
    if shard_size % batch_size:
        raise ValueError(f"shard_size must be a multiple of batch_size={batch_size}, got {shard_size}.")
    if "train" not in datasets:
        raise ValueError(f"datasets must have the split 'train', got {', '.join(datasets) or 'none'}.")
    for name in datasets:
        check_member("each split", name, ("train", "test"))
    datasets = {name: check_dataset(each) for name, each in datasets.items()}
    folder, first = Path(folder), datasets["train"]
    what = {
        "autoencoder": autoencoder,
        "images": {name: fingerprint(each) for name, each in datasets.items()},
        "space": json.loads(json.dumps(dataclasses.asdict(space))),
        "flip": flip,
        "batch_size": batch_size,
        "shard_size": shard_size,
    }
    before = _check_same(folder, what)
    todo = [
        (path, each, start, stop)
        for name, each in datasets.items()
        for path, start, stop in shards(folder, name, len(each.images), shard_size)
        if not path.is_file()
    ]
    if before.get("finished") and not todo:
        write_json(folder / INFO, before | {"about": dict(about or {})})
        return open_latents(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / INFO, {"finished": False} | what)
    mean, std = encode(_filled(first, 0, 1, batch_size))
    shape, has_std = np.shape(mean)[1:], std is not None
    if len(shape) != 3 or (has_std and np.shape(std) != np.shape(mean)):
        raise ValueError(f"encode must give [batch, h, w, c], got shapes {np.shape(mean)} and {np.shape(std)}.")
    batches = [
        (each, begin, min(begin + batch_size, stop))
        for _, each, start, stop in todo
        for begin in range(start, stop, batch_size)
    ]
    told = watched(
        _encoded(batches, encode, flip, batch_size), len(batches), f"batches of {batch_size}", progress, ENCODING
    )
    for path, _, start, stop in todo:
        parts = range(start, stop, batch_size)
        write_shard(path, (record for _ in parts for record in next(told)))
    for _ in told:  # to its end, which takes the bar away
        pass
    for name, each in datasets.items():
        if each.labels is not None:
            write_array(folder / f"{name}_labels.npy", np.asarray(each.labels, np.int32))
    info = what | {
        "num": {name: len(each.images) for name, each in datasets.items()},
        "shape": list(shape),
        "has_std": has_std,
        "class_names": list(first.class_names),
        "about": dict(about or {}),
    }
    measured = _measured(splits_of(folder, info), progress)
    write_json(folder / INFO, {"finished": True} | info | measured)
    return open_latents(folder)


def _check_same(folder: Path, what: Mapping[str, Any]) -> dict[str, Any]:
    """What the folder says of latents that are there already, which must be the same ones."""
    left = sorted(path.name for name in ("train", "test") for path in folder.glob(f"{name}-*.array_record"))
    if not (folder / INFO).is_file():
        if left:
            raise ValueError(
                f"{folder} holds {left[0]} and no {INFO} to say what it is: remove it, or give another folder. "
                "Nothing was overwritten."
            )
        return {}
    before = read_json(folder / INFO, "a folder of latents")
    words = {"autoencoder": "of another autoencoder", "images": "of other images"}
    for name, ours in what.items():
        if (theirs := before.get(name)) != ours:
            other = words.get(name, f"made with another {name}")
            raise ValueError(
                f"{folder} holds latents {other} ({shown(theirs)}, and this is {shown(ours)}): give another folder. "
                "Nothing was overwritten."
            )
    if what["autoencoder"] is None and left:
        raise ValueError(
            f"{folder} holds latents of an encoder without a name, autoencoder=None, and nothing tells whether this is "
            "the same one: give another folder, and a name, with which a pass goes on. Nothing was overwritten."
        )
    return before


def _filled(dataset: ImageDataset, start: int, stop: int, batch_size: int) -> np.ndarray:
    """Images float32 [batch_size, h, w, c] in [-1, 1], the last ones repeated where there are fewer."""
    x = to_unit_range(np.asarray(dataset.images[start:stop]), dataset.value_range)
    return np.resize(x, (batch_size, *x.shape[1:])) if len(x) < batch_size else x


def _encoded(
    batches: Sequence[tuple[ImageDataset, int, int]], encode: Encode, flip: bool, batch_size: int
) -> Iterator[list[bytes]]:
    """The records of one batch after the other; the next one is computed while one is written."""
    waiting: list[tuple[list[Any], int]] = []
    for dataset, start, stop in batches:
        x = _filled(dataset, start, stop, batch_size)
        parts = [part for each in ((x, x[:, :, ::-1]) if flip else (x,)) for part in encode(each) if part is not None]
        waiting.append((parts, stop - start))
        if len(waiting) > 1:
            yield _records(*waiting.pop(0))
    for each in waiting:
        yield _records(*each)


def _records(parts: Sequence[Any], num: int) -> list[bytes]:
    arrays = [np.asarray(part)[:num] for part in parts]
    for x in arrays:
        if not np.isfinite(x).all():
            raise ValueError("latents must be finite, got NaN or infinity of the encoder.")
        if np.abs(x).max() > np.finfo(HALF).max:
            raise ValueError(f"latents must be at most 65504, as float16 is, got {np.abs(x).max():g}.")
    return [row.tobytes() for row in np.stack(arrays, axis=1).astype(HALF)]


def _measured(splits: Mapping[str, LatentSplit], progress: bool | None) -> dict[str, Any]:
    """Mean and deviation of each channel over the training split, and the checksum of everything."""
    digest, count = hashlib.sha256(), 0
    mean = squares = np.zeros(splits["train"].shape[-1])
    chunks = [(name, i) for name, each in splits.items() for i in range(0, len(each), _CHUNK)]
    for name, start in watched(chunks, len(chunks), f"chunks of {_CHUNK} latents", progress):
        split = splits[name]
        found = split.all_of(np.arange(start, min(start + _CHUNK, len(split))))
        digest.update(np.ascontiguousarray(found).data)
        if name != "train":
            continue
        x = found[:, :, 0].astype(np.float64).reshape(-1, split.shape[-1])
        own, num = x.mean(axis=0), len(x)
        spread = ((x - own) ** 2).sum(axis=0)
        if split.has_std:  # of draws, the variance is that of the means and the mean of the variances
            spread += (found[:, :, 1].astype(np.float64) ** 2).reshape(x.shape).sum(axis=0)
        distance, count = own - mean, count + num
        squares = squares + spread + distance**2 * (num * (count - num) / count)
        mean = mean + distance * (num / count)
    return {"mean": mean.tolist(), "std": np.sqrt(squares / count).tolist(), "sha256": digest.hexdigest()}
