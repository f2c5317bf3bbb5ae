"""Images that are arrays: what people have is brought to an `ImageDataset`, or refused with the reason."""

import hashlib
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fm_jax.checks import check_array, check_has, check_integer, check_member, check_number, check_pair, shown
from fm_jax.data.images import ImageDataset, to_float
from fm_jax.data.lazy import LazyImages

Say = Callable[[str], None]
Split = Literal["train", "test", "all"]
SPLITS: tuple[str, ...] = ("train", "test", "all")
TEST_SHARE = 0.1
"""Held out of data without test images of their own, where no share is given."""
_NAMES = ("class_names", "label_names", "target_names")
_CHUNK = 4096
_FILLED = 0.9
"""How far values must reach to both sides for a range of [-1, 1] that nobody has declared."""
_ENTRIES = {
    "images": ("images", "image", "x", "data", "samples", "pixels", "arr_0"),
    "labels": ("labels", "label", "y", "targets", "target", "classes", "arr_1"),
}
"""What npz files call them, with "train" and "test" before or behind."""


class NoSplitError(ValueError):
    """The data have no images in the split that was asked for."""


def warn(text: str) -> None:
    """Says what was made of data by a warning."""
    warnings.warn(text, stacklevel=3)


def make_dataset(
    images: Any,
    labels: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
    channels: Literal["first", "last"] | None = None,
    levels: int = 256,
    say: Say | None = None,
) -> ImageDataset:
    """Brings images and labels as people have them to an `ImageDataset`, and says what it had to change.

    Images may be [n, h, w, c], [n, c, h, w] or [n, h, w]; NumPy, JAX, memory-mapped, lists; bytes, bools, wider
    integers that are from 0 to 255, or floating point in a declared range. Labels may be any integers, strings or
    bools, lists, [n, 1], or one-hot [n, classes]; classes are in natural order, 2 before 10.

    Args:
        images: the images.
        labels: a label for each; `None` for unlabelled images.
        class_names: of the classes, in order; strings among the labels must be of them, integers from 0 index them, and
            integers from 1 count them.
        value_range: (low, high) of images that are not `uint8`, which become -1 and 1; (-inf, inf) for what is used as
            it is, such as latents.
        channels: "first" for [n, c, h, w], "last" for [n, h, w, c]; `None` where that is clear from the shape.
        levels: evenly spaced values that pixels take, of floating-point images.
        say: called with a sentence for every change; by default each is a warning.

    Returns:
        A dataset that `batches` takes; nothing that needs no change is copied.

    Raises:
        ValueError: for what cannot be understood, such as images of several shapes, pixels that are NaN, floating-point
            pixels without a range, or labels that are missing.

    Example:
        >>> said = []
        >>> dataset = make_dataset(np.zeros((3, 1, 8, 8), np.uint8), ["b", "a", "b"], say=said.append)
        >>> dataset.images.shape, dataset.labels.tolist(), dataset.class_names
        ((3, 8, 8, 1), [1, 0, 1], ('a', 'b'))
        >>> said
        ['images [3, 1, 8, 8] have channels first; they were moved last, [3, 8, 8, 1].']
    """
    say = say or warn
    if value_range is not None:
        value_range = _checked_range(value_range)
    if channels is not None:
        check_member("channels", channels, ("first", "last"))
    pixels, value_range = _to_pixels(_to_array("images", images), value_range, channels, say)
    numbers, names = _to_labels(labels, class_names, len(pixels), say)
    if numbers is not None:
        present = set(np.unique(numbers).tolist())
        if none := [name for i, name in enumerate(names) if i not in present]:
            say(f"no image is of the class {', '.join(map(repr, none[:5]))}{', ...' * (len(none) > 5)}.")
    dataset = ImageDataset(pixels, numbers, names, levels, value_range)
    return check_dataset(dataset)


def check_dataset(dataset: Any) -> ImageDataset:
    """Refuses what batches cannot be made of; what is merely of another type is converted without a loss.

    Args:
        dataset: an `ImageDataset`; its images may be a JAX array, its labels a list.

    Returns:
        The dataset, labels int32.

    Raises:
        ValueError: says what is wrong, and what makes it right.
    """
    wanted = "an ImageDataset, as fm_jax.data.arrays.make_dataset makes of arrays"
    if not isinstance(dataset, ImageDataset):  # a tuple of its own, an npz handle
        check_has("dataset", dataset, ImageDataset._fields, wanted)
    images, labels = dataset.images, dataset.labels
    check_integer("levels", dataset.levels, least=2)
    check_array("images", images, "an array [n, h, w, c]")
    if not isinstance(images, np.ndarray | LazyImages):
        images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"images must be [n, h, w, c], got shape {images.shape}. {_MAKE}")
    if _layout(images.shape) == "n last":
        raise ValueError(
            f"images must be [n, h, w, c], got shape {images.shape}, which looks like [h, w, c, n]: "
            "np.moveaxis(images, -1, 0) puts the images first."
        )
    if _layout(images.shape) == "first":
        raise ValueError(
            f"images must be [n, h, w, c], got {images.dtype} of shape {images.shape}, which looks like channels "
            "first: np.moveaxis(images, 1, -1) moves them, as make_dataset does. (If the images really are "
            f"{images.shape[1]} high and have {images.shape[3]} channels, swap their height and width.)"
        )
    if images.dtype not in (np.uint8, np.float32):
        raise ValueError(f"images must be uint8 or float32, got {images.dtype}. {_MAKE}")
    if 0 in images.shape:
        raise ValueError(f"images must not be empty, got shape {images.shape}.")
    if images.dtype == np.uint8:
        if type(images) is np.ndarray and images.max() == 1:
            raise ValueError("images must reach to 255, got uint8 of 0 and 1 alone. make_dataset takes a value_range.")
        if dataset.levels != 256:
            raise ValueError(f"levels must be 256 for uint8 images, got {dataset.levels}.")
        if dataset.value_range not in (None, (0, 255), (0.0, 255.0)):
            raise ValueError(f"value_range must be None for uint8 images, got {shown(dataset.value_range)}.")
        value_range = None
    else:
        value_range = None if dataset.value_range is None else _checked_range(dataset.value_range)
        value_range = _check_values(images, value_range)
    return dataset._replace(
        images=images, labels=_check_labels(labels, dataset.class_names, len(images)), value_range=value_range
    )


def to_unit_range(images: np.ndarray, value_range: tuple[float, float] | None) -> np.ndarray:
    """Some images of a dataset as float32: its `value_range` to [-1, 1], or as they are where that is infinite.

    Args:
        images: uint8 or float32.
        value_range: of the dataset, from `check_dataset`.
    """
    if images.dtype == np.uint8:
        return to_float(images)
    low, high = value_range or (-1.0, 1.0)
    if (low, high) == (-1.0, 1.0) or math.isinf(low):
        return np.asarray(images, np.float32)
    return images.astype(np.float32) * np.float32(2 / (high - low)) - np.float32((high + low) / (high - low))


def fingerprint(dataset: ImageDataset) -> str:
    """A checksum of images, labels and names of classes: 16 hexadecimal digits that other data do not share.

    Of images that are read when drawn it is that of where they come from, with labels and names.

    Example:
        >>> one = ImageDataset(np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]), ("a", "b"))
        >>> fingerprint(one) == fingerprint(one._replace(labels=np.array([1, 0])))
        False
    """
    check_has("dataset", dataset, ImageDataset._fields, "an ImageDataset")
    digest = hashlib.blake2b(digest_size=8)
    images, labels = dataset.images, dataset.labels
    facts = (tuple(images.shape), str(images.dtype), dataset.class_names, dataset.levels, dataset.value_range)
    digest.update(repr(facts).encode("utf-8", "surrogateescape"))
    if labels is not None:
        digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    if dataset.fingerprint is not None:
        digest.update(dataset.fingerprint.encode())
    else:
        for chunk in _chunks(images):
            digest.update(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def held_out(names: Sequence[str], labels: np.ndarray | None, share: float) -> np.ndarray:
    """Which examples are for testing: a share of every class, the same whatever else there is.

    An example goes by the CRC-32 of its name, so that one more leaves nearly all others where they were.

    Args:
        names: of the examples.
        labels: [n], or `None` where there are none.
        share: for testing, in [0, 1).

    Returns:
        bool [n]; of a class with two examples or more at least one is left for training.
    """
    check_number("share", share, "[0, 1)")
    order = sums_of(names)
    chosen = np.zeros(len(order), bool)
    kinds = np.zeros(len(order), int) if labels is None else np.asarray(labels)
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        num = min(round(share * len(members)), len(members) - 1)
        chosen[members[np.argsort(order[members], kind="stable")[:num]]] = True
    return chosen


def sums_of(names: Sequence[str]) -> np.ndarray:
    """int64 [n], the CRC-32 of names: an order in which nothing that is near stays near, whatever else there is."""
    return np.array([zlib.crc32(str(name).encode("utf-8", "surrogateescape")) for name in names], np.int64)


def part(dataset: ImageDataset, split: Split, is_test: np.ndarray) -> ImageDataset:
    """One split of a dataset.

    Raises:
        NoSplitError: if there is nothing in it.
        ValueError: if there is no such split.
    """
    check_member("split", split, SPLITS)
    if split == "all":
        return dataset
    chosen = is_test if split == "test" else ~is_test
    if not chosen.any():
        raise NoSplitError(
            f"split {split!r} has no images: give a share for testing above 0, got {len(is_test)} images."
        )
    return dataset.subset(np.flatnonzero(chosen))


def load_npz(
    path: str | os.PathLike[str],
    split: Split | tuple[Split, ...] = "all",
    *,
    images: str | None = None,
    labels: str | None = None,
    test_share: float | None = 0.0,
    class_names: Sequence[str] | None = None,
    value_range: tuple[float, float] | None = None,
    channels: Literal["first", "last"] | None = None,
    levels: int = 256,
    say: Say | None = None,
) -> Any:
    """Reads images, and labels if there are any, from an `.npz` or an `.npy` file; the latter is not read into memory.

    Args:
        path: of the file.
        split: "all"; "train" or "test" by entries such as `x_train` and `test_images` (or val), or by `test_share`; or
            ("train", "test") for both at once, which reads the file once.
        images: the entry with the images; by default one that is called images, x, data, samples or arr_0.
        labels: the entry with the labels; by default labels, y, targets or arr_1, if there is one.
        test_share: share of every class for testing, of a file without splits of its own; `None` for a tenth.
        class_names: as in `make_dataset`, like the rest; by default an entry of that name.
        value_range: as there.
        channels: as there.
        levels: as there.
        say: as there.

    Returns:
        A dataset; for several splits a tuple, with `None` for one without images.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none, or damaged; if an entry is missing; and as `make_dataset`.
    """
    path = Path(path)
    for each in split if isinstance(split, tuple) else (split,):
        check_member("split", each, SPLITS)
    if test_share is not None:
        check_number("test_share", test_share, "[0, 1)")
    say = say or warn
    entries = _read_entries(path)
    if class_names is None:
        class_names = next((tuple(map(str, entries[name])) for name in _NAMES if name in entries), None)
    options: dict[str, Any] = {"value_range": value_range, "channels": channels, "levels": levels, "say": say}
    own = {which: _find(path, entries, "images", images, which) for which in ("train", "test")}
    kinds = {which: _find(path, entries, "labels", labels, which) for which in ("train", "test")}
    if images is not None or own["train"] is None:
        own = {"train": _find(path, entries, "images", images, None), "test": None}
        kinds = {"train": _find(path, entries, "labels", labels, None), "test": None}
        if own["train"] is None:
            raise ValueError(f"{path} must have an entry for the images, such as 'images', got {_described(entries)}.")
    if own["test"] is not None and (kinds["train"] is None) != (kinds["test"] is None):
        with_labels = "train" if kinds["test"] is None else "test"
        say(f"only the images for {with_labels}ing of {path.name} have labels; those for testing were left aside.")
        own["test"], kinds["test"] = None, None
    used = [name for name in (*own.values(), *kinds.values()) if name is not None]
    if left := [name for name in entries if name not in (*used, *_NAMES)]:
        say(f"of {path.name} {', '.join(used)} were read; left aside: {_described(left)}.")
    pixels, numbers = entries[own["train"]], None if kinds["train"] is None else entries[kinds["train"]]
    num_train = None
    if own["test"] is not None:  # both at once, so that they have the same classes
        if test_share:
            raise ValueError(f"test_share must be 0 for {path}, which has splits of its own: {_described(entries)}.")
        num_train, tests = len(pixels), entries[own["test"]]
        if pixels.shape[1:] != tests.shape[1:]:
            raise ValueError(
                f"{path} must have images of one shape in both splits, got {pixels.shape} and {tests.shape}."
            )
        pixels = np.concatenate([pixels, tests])
        numbers = None if numbers is None else np.concatenate([numbers, entries[kinds["test"]]])
    dataset = make_dataset(pixels, numbers, class_names=None if numbers is None else class_names, **options)
    places = range(len(dataset.images))
    if num_train is None:
        share = TEST_SHARE if test_share is None else test_share
        is_test = held_out(list(map(str, places)), dataset.labels, share)
    else:
        is_test = np.array(places) >= num_train
    if isinstance(split, tuple):
        return tuple(_part_or_none(dataset, each, is_test) for each in split)
    return part(dataset, split, is_test)


def _part_or_none(dataset: ImageDataset, split: Split, is_test: np.ndarray) -> ImageDataset | None:
    try:
        return part(dataset, split, is_test)
    except NoSplitError:
        return None


def standardise(dataset: ImageDataset) -> tuple[ImageDataset, np.ndarray, np.ndarray]:
    """Brings every channel to mean 0 and variance 1, as latents are trained on.

    Args:
        dataset: whose images are floating point, or uint8.

    Returns:
        The dataset, used as it is; the mean and the standard deviation [c], for `x * std + mean` to go back.

    Raises:
        ValueError: as `check_dataset`, and if a channel is constant.

    References:
        Rombach et al. 2021 (arXiv:2112.10752), appendix G.
    """
    dataset = check_dataset(dataset)
    x = np.asarray(dataset.images[:] if isinstance(dataset.images, LazyImages) else dataset.images)
    mean = x.mean(axis=(0, 1, 2), dtype=np.float64)
    std = x.std(axis=(0, 1, 2), dtype=np.float64)
    if not (std > 1e-6 * np.maximum(1, np.abs(mean))).all():
        raise ValueError(f"images must vary in every channel to have unit variance, got deviations {std.tolist()}.")
    scaled = ((x - mean) / std).astype(np.float32)
    return dataset._replace(images=scaled, value_range=(-math.inf, math.inf)), mean, std


_MAKE = "fm_jax.data.arrays.make_dataset brings arrays to what is wanted."


def _checked_range(value_range: Any) -> tuple[float, float]:
    if isinstance(value_range, tuple | list) and tuple(value_range) == (-math.inf, math.inf):
        return -math.inf, math.inf
    low, high = check_pair("value_range", value_range, "(-inf, inf)")
    return float(low), float(high)


def _chunks(images: Any) -> Iterator[np.ndarray]:
    for start in range(0, len(images), _CHUNK):
        yield np.asarray(images[start : start + _CHUNK])


def _check_values(images: Any, value_range: tuple[float, float] | None) -> tuple[float, float] | None:
    """The range of floating-point images; refuses NaN, and values outside of it."""
    if isinstance(images, LazyImages):
        return value_range or (-1.0, 1.0)
    low, high = math.inf, -math.inf
    for i, chunk in enumerate(_chunks(images)):
        least, most = float(chunk.min()), float(chunk.max())
        if not (math.isfinite(least) and math.isfinite(most)):
            bad = np.flatnonzero(~np.isfinite(chunk).all(axis=(1, 2, 3)))
            raise ValueError(f"images must be finite, got NaN or infinity in image {i * _CHUNK + bad[0]}.")
        low, high = min(low, least), max(high, most)
    if value_range is None:
        if -1 <= low <= -_FILLED and _FILLED <= high <= 1:
            return -1.0, 1.0
        guess = (0.0, 1.0) if low >= 0 and high <= 1 else (0.0, 255.0) if low >= 0 and high <= 255 else None
        say = "(low, high), or (-inf, inf) for latents" if guess is None else f"{guess}, or what it is"
        raise ValueError(
            f"value_range must be said of floating-point images from {low:g} to {high:g}, which do not fill "
            f"[-1, 1]: value_range={say}."
        )
    within = 1e-6 * (value_range[1] - value_range[0]) if math.isfinite(value_range[0]) else 0.0
    if low < value_range[0] - within or high > value_range[1] + within:
        raise ValueError(f"images must lie in value_range={value_range}, got values from {low:g} to {high:g}.")
    return value_range


def _check_labels(labels: Any, class_names: Any, num: int) -> np.ndarray | None:
    if labels is None:
        if class_names:
            raise ValueError(f"class_names must be empty without labels, got {shown(class_names)}.")
        return None
    if isinstance(labels, list | tuple):
        labels = np.asarray(labels)
    check_array("labels", labels, "integers [n], or None")
    labels = np.asarray(labels)
    if labels.shape != (num,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be [n] = {(num,)} integers, got {labels.dtype} {labels.shape}. {_MAKE}")
    if isinstance(class_names, str) or not class_names:
        raise ValueError(f"class_names must be a tuple with a name for every class, got {shown(class_names)}.")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= len(class_names):
        raise ValueError(
            f"labels must be from 0 to {len(class_names) - 1}, as class_names has {len(class_names)}, got {least} to "
            f"{most}. {_MAKE}"
        )
    return labels.astype(np.int32)


def _layout(shape: Sequence[int]) -> str:
    """What [n, a, b, c] must be: "last" or "first", by where the channels are; "n last"; "unclear"."""
    _, a, b, c = shape
    if c <= 4:
        return "last"
    if b <= 4 and shape[0] == a > 4:
        return "n last"  # [h, w, c, n], as of MATLAB
    if a <= 4 < b or a != b == c:
        return "first"
    return "last" if a == b != c else "unclear"


def _to_array(name: str, value: Any) -> np.ndarray | LazyImages:
    if isinstance(value, np.ma.MaskedArray):
        if np.ma.is_masked(value):
            raise ValueError(
                f"{name} must not be masked, got {np.ma.count_masked(value)} masked values: leave them out."
            )
        value = value.data
    if isinstance(value, np.ndarray | LazyImages):
        return value
    if hasattr(value, "files") and hasattr(value, "keys"):
        raise ValueError(f"{name} must be an array, got an npz file with {_described(value)}: load_npz reads it.")
    if isinstance(value, str | bytes | dict | type) or value is None:
        raise ValueError(f"{name} must be an array, got {shown(value)}.")
    try:
        return np.asarray(value)
    except ValueError:  # ragged
        return np.array([None])


def _to_pixels(
    x: Any, value_range: tuple[float, float] | None, channels: str | None, say: Say
) -> tuple[np.ndarray | LazyImages, tuple[float, float] | None]:
    if x.dtype == object:
        raise ValueError("images must all have one shape, got several, or none: resize them before.")
    if x.ndim == 3:
        if x.shape[-1] <= 4 < min(x.shape[:2]):
            raise ValueError(
                f"images must be [n, h, w, c], got shape {x.shape}, which looks like one image: add an axis."
            )
        n, h, w = x.shape
        if (n == h != w) or (n <= 4 and h > 4):
            raise ValueError(
                f"images must be [n, h, w], got shape {x.shape}, which looks like [h, w, n] or one image: move "
                "the axis of the images to the front, or add one."
            )
        x = x[..., None]
    if x.ndim != 4:
        raise ValueError(f"images must be [n, h, w, c], [n, c, h, w] or [n, h, w], got shape {x.shape}.")
    if 0 in x.shape:
        raise ValueError(f"images must not be empty, got shape {x.shape}.")
    layout = channels or ("last" if isinstance(x, LazyImages) else _layout(x.shape))
    if layout in ("unclear", "n last"):
        raise ValueError(
            f"channels must be said of images of shape {x.shape}, 'first' for [n, c, h, w] or 'last' for [n, h, w, c]."
        )
    if layout == "first":
        moved = np.moveaxis(x, 1, -1)
        if channels is None:
            say(f"images {list(x.shape)} have channels first; they were moved last, {list(moved.shape)}.")
        x = moved
    if x.dtype == np.uint8 and value_range in (None, (0, 255)):
        if value_range is None and not isinstance(x, LazyImages) and x.max() == 1:
            raise ValueError("value_range must be said of uint8 images of 0 and 1 alone: (0, 1), or (0, 255).")
        return x, None
    if x.dtype == np.float32:
        return x, value_range
    if x.dtype == bool:
        say("images are True and False; they became 255 and 0.")
        return x.astype(np.uint8) * np.uint8(255), None
    if np.issubdtype(x.dtype, np.integer):
        least, most = int(x.min()), int(x.max())
        if value_range is None and least >= 0 and 1 < most <= 255:
            say(f"images are {x.dtype} from {least} to {most}; they became uint8.")
            return x.astype(np.uint8), None
        if value_range is None:
            raise ValueError(
                f"value_range must be said of {x.dtype} images, which are from {least} to {most}: (0, 1), (0, 65535) "
                "or what it is."
            )
        return x.astype(np.float32), value_range
    if x.dtype.kind not in "fV" or np.issubdtype(x.dtype, np.void):
        raise ValueError(f"images must be numbers, got {x.dtype}.")
    return x.astype(np.float32), value_range


def _to_labels(
    labels: Any, class_names: Sequence[str] | None, num: int, say: Say
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    if isinstance(class_names, str) or (class_names is not None and len(set(class_names)) < len(class_names)):
        raise ValueError(f"class_names must be distinct names, got {shown(class_names)}.")
    names = None if class_names is None else tuple(map(str, class_names))
    if labels is None:
        if names:
            raise ValueError(f"class_names must be None without labels, got {shown(class_names)}.")
        return None, ()
    y = np.asarray(_to_array("labels", labels))
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.dtype.kind in "biuf" and len(y):
        if not (((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all()):
            raise ValueError(f"labels [n, {y.shape[1]}] must be one-hot, a single 1 in each row: one class an image.")
        say(f"labels {list(y.shape)} are one-hot; they became the numbers of the classes.")
        names = names or tuple(map(str, range(y.shape[1])))
        y = y.argmax(axis=1)
    if y.shape != (num,):
        raise ValueError(f"labels must be [n] = {(num,)}, one an image, got shape {y.shape}.")
    if y.dtype.kind == "f" or y.dtype == object:
        missing = [i for i, each in enumerate(y.tolist()) if each is None or each != each]
        if missing:
            raise ValueError(f"labels must not be missing, got {y[missing[0]]} for image {missing[0]}.")
        if y.dtype.kind == "f":
            if not (y == np.rint(y)).all():
                raise ValueError(f"labels must be integers or names, got {y.dtype} such as {y[y != np.rint(y)][0]}.")
            y = y.astype(np.int64)
    if y.dtype.kind in "iu" and names is not None:
        least, most = (int(y.min()), int(y.max())) if num else (0, 0)
        if least == 1 and most == len(names):
            say(f"labels are from 1 to {most}; they became 0 to {most - 1}.")
            y = y - 1
        return y, names
    if y.dtype.kind == "S":
        y = np.char.decode(y, "utf-8", "backslashreplace")
    words = [str(each) for each in y.tolist()]
    found = tuple(sorted(set(words), key=natural))
    if names is None:
        names = found
        if y.dtype.kind not in "iu" or found != tuple(map(str, range(len(found)))):
            few = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            if y.dtype.kind in "iu":
                say(f"labels are {few}; they became 0 to {len(found) - 1} in that order.")
    elif unknown := [each for each in found if each not in names]:
        raise ValueError(f"labels must be of class_names, got {shown(unknown[0])}.")
    places = {name: i for i, name in enumerate(names)}
    return np.array([places[each] for each in words], np.int64), names


def natural(name: str) -> tuple[Any, ...]:
    """A key to sort by: 2 before 10, the same in every locale."""
    parts = re.split(r"([0-9]+)", name)
    # Not int, which refuses thousands of digits.
    numbers = (
        (len(each.lstrip("0")), each.lstrip("0")) if each[0] in "0123456789" else (-1, each) for each in parts if each
    )
    return tuple(numbers), name


def _read_entries(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a file of NumPy, .npz or .npy.")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"images": found}
        with found:
            return {name: found[name] for name in found.files}
    except MemoryError:
        raise MemoryError(f"{path} does not fit into memory: a .npy file of the images is not read into it.") from None
    except Exception as error:  # of many classes: of zip files, headers and pickles
        raise ValueError(
            f"{path} is no file of NumPy, .npz or .npy without pickled objects, or damaged: {error}"
        ) from None


def _find(path: Path, entries: Any, what: str, asked: str | None, which: str | None) -> str | None:
    """The entry with the images or labels of a split; `None` if there is none."""
    if asked is not None:
        if which is not None:
            return None
        if asked not in entries:
            raise ValueError(f"{path} must have an entry {asked!r} for the {what}, got {_described(entries)}.")
        return asked
    found = []
    for word in ("",) if which is None else ("train",) if which == "train" else ("test", "val", "valid", "validation"):
        for name in _ENTRIES[what]:
            wanted = {name} if which is None else {f"{name}_{word}", f"{word}_{name}"}
            found += [each for each in entries if each.lower() in wanted]
        if found:
            break
    if len(found) > 1:
        raise ValueError(
            f"{path} has several entries that could be the {what}, {', '.join(found)}: name one by {what}."
        )
    return found[0] if found else None


def _described(entries: Any) -> str:
    names = list(entries)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
