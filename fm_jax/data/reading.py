"""Pictures that were found, wherever, become training data: read into memory, or when they are drawn."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np

from fm_jax.checks import (
    check_bool,
    check_function,
    check_integer,
    check_member,
    check_number,
)
from fm_jax.data.arrays import SPLITS, TEST_SHARE, NoSplitError, Say, Split, held_out, sums_of
from fm_jax.data.images import ImageDataset
from fm_jax.data.lazy import LazyImages, available_memory, watched
from fm_jax.data.picture import (
    Background,
    Colour,
    Fit,
    Picture,
    PictureError,
    PictureHeader,
    PictureReader,
    open_picture,
    read_header,
    shown_path,
)

R = TypeVar("R")

NAMED = 10
"""How many of what is wrong a message names."""
_HEAD = 64 * 1024
_CHUNK, _TASK = 1024, 16


class Found(NamedTuple):
    """Pictures that were found, of a folder in natural order.

    `paths` are files, or functions that return the bytes of one. `names` are the paths relative to the folder, with
    "/"; `labels` [n] int32 index `class_names`, or are `None`; `is_test` [n] is `None` unless there are splits. `notes`
    are sentences about what was understood, `left_out` begin with the name of a file and say why it was left out.
    """

    paths: tuple[Path | Callable[[], bytes], ...]
    names: tuple[str, ...]
    labels: np.ndarray | None
    class_names: tuple[str, ...]
    is_test: np.ndarray | None
    notes: tuple[str, ...]
    left_out: tuple[str, ...]


def gather(
    found: Found,
    where: str,
    split: Split | tuple[Split, ...] = "all",
    *,
    size: int | tuple[int, int] | None = None,
    fit: Fit = "crop",
    colour: Colour | None = None,
    background: Background = "white",
    test_share: float | None = 0.0,
    skip_broken: bool = False,
    stream: bool | None = None,
    num_images: int | None = None,
    say: Say | None = None,
    progress: bool | None = None,
) -> Any:
    """Makes training data of pictures that were found; options, result and errors are those of `load_folder`.

    Args:
        found: the pictures.
        where: they are, for the messages.
        split: as in `fm_jax.data.folder.load_folder`, like the rest.
        size: as there.
        fit: as there.
        colour: as there.
        background: as there.
        test_share: as there.
        skip_broken: as there.
        stream: as there.
        num_images: as there.
        say: as there.
        progress: as there.
    """
    splits = split if isinstance(split, tuple) else (split,)
    for each in splits:
        check_member("split", each, SPLITS)
    reader = _reader_of(size, fit, colour, background)
    is_test = _is_test(where, found, test_share)
    check_bool("skip_broken", skip_broken)
    if stream is not None:
        check_bool("stream", stream)
    if num_images is not None:
        check_integer("num_images", num_images)
    if say is not None:
        check_function("say", say, "a function of a sentence", 1)
    if progress is not None:
        check_bool("progress", progress)

    parts = [_chosen(found, each, is_test, num_images) for each in splits]
    if not any(parts) or (not parts[0] and split == splits[0]):
        why = f"test_share is {test_share}" if found.is_test is None else "its only split is train"
        raise NoSplitError(f"split {splits[0]!r} of {where} has no pictures: {why}. Give a test_share above 0.")
    wanted = chosen = [i for part in parts for i in part]
    work = _Work(found, progress)
    # Of all pictures, where that decides on sizes or channels: they have to be the same for both splits.
    every = list(range(len(found.names))) if reader.size is None or colour is None else chosen
    seen = work.examine(every)
    if stream is None:
        stream = _too_many(
            len(chosen), reader.size or max((one.header.size for one in seen.values()), default=(1, 1)), say
        )
    if not skip_broken and work.broken:
        if not stream:  # those that turn out to be broken only now are told at once
            work.check(chosen, reader)
        _refuse(work, every, skip_broken)
    differ = reader.size is None and len({one.header.size for one in seen.values()}) > 1
    differ = differ or (colour is None and len({one.header.grey for one in seen.values()}) > 1)
    if skip_broken and (stream or differ):  # what is broken must not decide
        work.check(every if differ else chosen, reader)
    headers = [one.header for i, one in seen.items() if i not in work.broken]
    chosen = [i for i in chosen if i not in work.broken]
    if not chosen:
        _refuse(work, every, skip_broken)
    if colour is None and all(header.grey for header in headers):
        reader = dataclasses.replace(reader, colour="grey")
    height, width = reader.size or _only_size([header.size for header in headers])
    shape = (height, width, 1 if reader.colour == "grey" else 3)

    images: Any = None
    if not stream:
        images, chosen = _in_memory(work, chosen, reader, shape)
        if work.broken and not (skip_broken and chosen):
            _refuse(work, every, skip_broken)
    numbers, class_names = _classes_left(work, chosen, reader, skip_broken)
    names = [found.names[i] for i in chosen]
    if stream:
        read = functools.partial(_read_number, reader, (height, width), [found.paths[i] for i in chosen], names)
        images = LazyImages(read, len(chosen), shape)
    _tell(work, wanted, say)
    settings = (height, width, reader.fit, reader.colour, reader.background)
    whole = ImageDataset(images, numbers, class_names)

    def dataset_of(part: list[int]) -> ImageDataset | None:
        left = np.flatnonzero(np.isin(chosen, part))
        if not len(left):
            return None
        rows = slice(int(left[0]), int(left[-1]) + 1)  # side by side, so that nothing is copied
        found_in = [seen[i] for i in chosen[rows]]
        labels_in = None if numbers is None else numbers[rows]
        return whole.subset(rows)._replace(
            fingerprint=_fingerprint(found_in, names[rows], labels_in, class_names, settings)
        )

    datasets = tuple(map(dataset_of, parts))
    return datasets if isinstance(split, tuple) else datasets[0]


class _Seen(NamedTuple):
    """What the first look at a file tells: the header, how many bytes it has, and the CRC-32 of the first of them."""

    header: PictureHeader
    num_bytes: int
    crc: int


class _Work:
    """Reads pictures in threads, and keeps account of those that cannot be read and of what was done to the others."""

    def __init__(self, found: Found, progress: bool | None):
        self.found = found
        self.progress = progress
        self.seen: dict[int, _Seen] = {}
        self.broken: dict[int, str] = {}
        self.notes: dict[int, frozenset[str]] = {}
        self.said: list[str] = []

    def examine(self, indices: list[int]) -> dict[int, _Seen]:
        """What the headers say, of those that have one."""
        self.seen = dict(self._each(lambda i: _examine(self.found.paths[i], self.found.names[i]), indices, "headers"))
        return self.seen

    def read(self, indices: list[int], reader: PictureReader) -> Iterator[tuple[int, np.ndarray]]:
        """The pixels of those that can be read."""
        indices = [i for i in indices if i not in self.broken]
        for i, picture in self._each(lambda i: self._read(i, reader), indices, "pictures"):
            self.notes[i] = picture.notes
            yield i, picture.pixels

    def check(self, indices: list[int], reader: PictureReader) -> None:
        """Finds out which can be read."""
        for _ in self.read(indices, reader):
            pass

    def can_be_read(self, index: int, reader: PictureReader) -> bool:
        """Whether one can be read, which is nothing to be told of."""
        if index in self.broken:
            return False
        try:
            self._read(index, reader)
        except PictureError:
            return False
        return True

    def _read(self, index: int, reader: PictureReader) -> Picture:
        size = reader.size or (self.seen[index].header.size if index in self.seen else None)
        return _read_one(reader, size, self.found.paths[index], self.found.names[index])

    def _each(self, function: Callable[[int], R], indices: list[int], what: str) -> Iterator[tuple[int, R]]:
        def attempt(index: int) -> R | PictureError:
            try:
                return function(index)
            except PictureError as error:
                return error

        def attempt_some(some: list[int]) -> list[R | PictureError]:
            return list(map(attempt, some))

        def results(pool: ThreadPoolExecutor) -> Iterator[R | PictureError]:
            # Several in a task, which would cost more than a small picture does; few enough tasks to be held at once.
            for start in range(0, len(indices), _CHUNK):
                stop = min(start + _CHUNK, len(indices))
                for found in pool.map(attempt_some, (indices[i : i + _TASK] for i in range(start, stop, _TASK))):
                    yield from found

        with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fm_jax_read") as pool:
            watching = watched(results(pool), len(indices), what, self.progress)
            for index, result in zip(indices, watching, strict=True):
                if isinstance(result, PictureError):
                    self.broken[index] = str(result)
                else:
                    yield index, result


def _examine(path: Path | Callable[[], bytes], name: str) -> _Seen:
    name = shown_path(name)
    with contextlib.closing(io.BytesIO(path())) if callable(path) else open_picture(path, name) as file:
        try:
            head = file.read(_HEAD)
            num_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
        except OSError as error:
            raise PictureError(f"{name} cannot be read: {error.strerror}.") from error
        return _Seen(read_header(file, name), num_bytes, zlib.crc32(head))


def _read_one(
    reader: PictureReader, size: tuple[int, int] | None, path: Path | Callable[[], bytes], name: str
) -> Picture:
    name = shown_path(name)
    picture = reader(path() if callable(path) else path, name)
    height, width = picture.pixels.shape[:2]
    if size not in (None, (height, width)):  # which there is only if it is not scaled to a size
        raise PictureError(f"{name} cannot be read: it is {height} x {width}, its header says {size[0]} x {size[1]}.")
    return picture


def _read_number(
    reader: PictureReader,
    size: tuple[int, int],
    paths: list[Path | Callable[[], bytes]],
    names: list[str],
    number: int,
) -> np.ndarray:
    return _read_one(reader, size, paths[number], names[number]).pixels


def _in_memory(
    work: _Work, chosen: list[int], reader: PictureReader, shape: tuple[int, int, int]
) -> tuple[np.ndarray, list[int]]:
    try:
        images = np.empty((len(chosen), *shape), dtype=np.uint8)
    except MemoryError:
        gigabytes = len(chosen) * np.prod(shape, dtype=float) / 1e9
        raise ValueError(
            f"the {len(chosen):,} pictures of {shape} take {gigabytes:,.1f} GB, more than there is: give a smaller "
            "size, or stream=True."
        ) from None
    kept: list[int] = []
    for i, pixels in work.read(chosen, reader):
        images[len(kept)] = pixels
        kept.append(i)
    return images[: len(kept)], kept


def _reader_of(size: Any, fit: Fit, colour: Colour | None, background: Background) -> PictureReader:
    if size is not None and not isinstance(size, tuple | list):
        check_integer("size", size)
        size = (size, size)
    if colour is not None:
        check_member("colour", colour, get_args(Colour))
    return PictureReader(tuple(size) if isinstance(size, list) else size, fit, colour or "rgb", background)


def _is_test(where: str, found: Found, share: float | None) -> np.ndarray:
    """Which pictures are for testing: those of the data's own splits, or a share; by default a tenth."""
    if share is not None:
        check_number("test_share", share, "[0, 1)")
    if found.is_test is None:
        return held_out(found.names, found.labels, TEST_SHARE if share is None else float(share))
    if share:
        raise ValueError(f"test_share must be 0 for {where}, which has splits of its own, got {share}.")
    return found.is_test


def _chosen(found: Found, split: Split, is_test: np.ndarray, num_images: int | None) -> list[int]:
    """The pictures of a split, in their order."""
    mask = np.ones(len(is_test), dtype=bool) if split == "all" else is_test if split == "test" else ~is_test
    chosen = np.flatnonzero(mask)
    if num_images is None or num_images >= len(chosen):
        return chosen.tolist()
    order = sums_of([found.names[i] for i in chosen])
    return np.sort(chosen[np.argsort(order, kind="stable")[:num_images]]).tolist()


def _only_size(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    if len(distinct := sorted(set(sizes), key=lambda size: (size[0] * size[1], size))) > 1:
        (h0, w0), (h1, w1) = distinct[0], distinct[-1]
        raise ValueError(
            f"the {len(sizes)} pictures have {len(distinct)} sizes, from {h0} x {w0} to {h1} x {w1} (height x width): "
            "give size, to which all are brought."
        )
    return distinct[0]


def _refuse(work: _Work, among: list[int], skip_broken: bool) -> None:
    """Refuses what cannot be read, all at once."""
    raise PictureError(listed_errors([work.broken[i] for i in sorted(work.broken)], len(among), skip_broken))


def listed_errors(errors: list[str], among: int, skip_broken: bool = False) -> str:
    """Why pictures are refused, ten of them by name."""
    more = f"\n... and {len(errors) - NAMED} more" if len(errors) > NAMED else ""
    hint = f"{len(errors)} of {count(among, 'file')} cannot be read"
    hint += ", and nothing is left." if skip_broken else ": mend or remove them, or leave them out by skip_broken=True."
    return "\n".join(errors[:NAMED]) + f"{more}\n{hint}"


def _classes_left(
    work: _Work, kept: list[int], reader: PictureReader, skip_broken: bool
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels and names of the classes, without those of which nothing can be read, in either split."""
    found = work.found
    if found.labels is None:
        return None, ()
    numbers = found.labels[kept]
    if not skip_broken:
        return numbers, found.class_names
    present = set(numbers.tolist())
    left, dropped, elsewhere = [], [], []
    for number, name in enumerate(found.class_names):
        if number in present:
            left.append(number)
        elif any(work.can_be_read(i, reader) for i in np.flatnonzero(found.labels == number).tolist()):
            left.append(number)
            elsewhere.append(name)
        else:
            dropped.append(name)
    if dropped:
        work.said.append(f"Dropped {count(len(dropped), 'class')} of which nothing can be read: {quoted(dropped)}.")
    if elsewhere:
        work.said.append(f"Nothing is left here of {count(len(elsewhere), 'class')}: {quoted(elsewhere)}.")
    place = np.full(len(found.class_names), -1, dtype=np.int32)
    place[left] = np.arange(len(left), dtype=np.int32)
    return place[numbers], tuple(found.class_names[number] for number in left)


def _tell(work: _Work, wanted: list[int], say: Say | None) -> None:
    left_out = [*work.found.left_out, *(work.broken[i] for i in wanted if i in work.broken)]
    head = f"Left out {count(len(left_out), 'file')}:"
    if say is None:
        if left_out or work.said:
            more = [f"... and {len(left_out) - NAMED} more"] if len(left_out) > NAMED else []
            warnings.warn("\n".join([head, *left_out[:NAMED], *more, *work.said]), stacklevel=4)
        return
    for note in work.found.notes:
        say(note)
    counts = Counter(note for i in wanted for note in work.notes.get(i, ()))
    for note, num in sorted(counts.items()):
        say(f"{num} pictures {note}." if num > 1 else f"1 picture {note.replace('their', 'its')}.")
    if left_out:
        say("\n".join([head, *left_out]))
    for text in work.said:
        say(text)


def _fingerprint(
    seen: list[_Seen],
    names: list[str],
    labels: np.ndarray | None,
    class_names: tuple[str, ...],
    settings: tuple[Any, ...],
) -> str:
    digest = hashlib.sha256(repr((class_names, settings)).encode())
    for number, (one, name) in enumerate(zip(seen, names, strict=True)):
        label = None if labels is None else int(labels[number])
        digest.update(repr((name, label, one.num_bytes, one.crc)).encode())
    return digest.hexdigest()[:32]


def named(names: Iterable[str]) -> str:
    """Names in a row, ten at most."""
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def quoted(names: Iterable[str]) -> str:
    """Names in quotation marks in a row, ten at most."""
    return named(repr(shown_path(name)) for name in names)


def count(num: int, what: str) -> str:
    """How many of what, in words: "3 classes"."""
    return f"1 {what}" if num == 1 else f"{num} {what}{'es' if what.endswith('s') else 's'}"


def _too_many(num: int, size: tuple[int, int], say: Say | None) -> bool:
    """Whether so many pictures would take more than half of the memory that is left."""
    needed, left = 3.0 * num * size[0] * size[1], available_memory()
    if left is None or needed <= left / 2:
        return False
    if say is not None:
        say(
            f"{num:,} pictures would take {needed / 1e9:.1f} GB, and {left / 1e9:.1f} GB of memory are left: "
            "they are read when they are drawn."
        )
    return True
