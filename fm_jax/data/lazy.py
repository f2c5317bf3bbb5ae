"""Images that are read when they are drawn, where all of them do not fit into memory."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fm_jax.checks import check_array, check_function, check_integer

T = TypeVar("T")
_SECONDS = 10
"""Between two lines about reading, where there is no terminal."""


class LazyImages:
    """Images [n, h, w, c] of which only those that are indexed are read, by as many threads as there are cores.

    It stands in the place of the array of an `ImageDataset`: `images[indices]` is an array.

    Args:
        read: `read(i)`, the image [h, w, c] of number i; called by several threads at once.
        num: how many images there are.
        shape: of one image, (h, w, c).
        dtype: of its pixels.

    Raises:
        ValueError: if an argument is not what its name says; when indexed, if `read` returns another shape or dtype.
        IndexError: for a number that there is not.

    Example:
        >>> images = LazyImages(lambda i: np.full((2, 2, 1), i, np.uint8), 5, (2, 2, 1))
        >>> images.shape, images[np.array([3, 0])][:, 0, 0, 0].tolist()
        ((5, 2, 2, 1), [3, 0])
    """

    def __init__(self, read: Callable[[int], np.ndarray], num: int, shape: Sequence[int], dtype: Any = np.uint8):
        check_function("read", read, "a function of the number of an image", 1)
        check_integer("num", num, least=0)
        if len(shape) != 3:
            raise ValueError(f"shape must be (h, w, c), of one image, got {tuple(shape)}.")
        for n in shape:
            check_integer("shape", n)
        self._read = read
        self.shape = (num, *map(int, shape))
        self.dtype = np.dtype(dtype)
        self._pool: ThreadPoolExecutor | None = None

    @property
    def ndim(self) -> int:
        """Of the array that this stands for."""
        return 4

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        numbers = np.arange(len(self))[index]
        if numbers.ndim > 1:
            raise IndexError(f"images are indexed along their first axis alone, got indices of shape {numbers.shape}.")
        if numbers.ndim == 0:
            return self._checked(int(numbers))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fm_jax_read")
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for place, image in enumerate(self._pool.map(self._checked, numbers.tolist())):
            found[place] = image
        return found

    def subset(self, indices: np.ndarray | slice) -> "LazyImages":
        """Some of the images, none of which is read."""
        if not isinstance(indices, slice):
            check_array("indices", indices)
        numbers = np.arange(len(self))[indices]
        return LazyImages(lambda i: self._read(int(numbers[i])), len(numbers), self.shape[1:], self.dtype)

    def _checked(self, number: int) -> np.ndarray:
        image = self._read(number)
        if image.shape != self.shape[1:] or image.dtype != self.dtype:
            raise ValueError(
                f"image {number} must be {self.dtype} of shape {self.shape[1:]}, got {image.dtype} of shape "
                f"{image.shape}."
            )
        return image


def available_memory() -> int | None:
    """Bytes that this process can still take, as far as the system says; `None` where it does not.

    The least of what the machine has left, what the control group of a container has left, and what limits of the
    process leave (`ulimit -v`, `ulimit -d`).
    """
    left = []
    meminfo, statm, status = (_text(f"/proc/{name}") for name in ("meminfo", "self/statm", "self/status"))
    if found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo):
        left.append(1024 * int(found[1]))
    for folder, most, own in (("", "memory.max", "anon"), ("memory/", "memory.limit_in_bytes", "total_rss")):
        limit = _text(f"/sys/fs/cgroup/{folder}{most}").strip()
        # Not all that is in use: pages of files are given back.
        taken = re.search(rf"^{own} (\d+)$", _text(f"/sys/fs/cgroup/{folder}memory.stat"), re.MULTILINE)
        if limit.isdigit() and taken:
            left.append(int(limit) - int(taken[1]))
    try:
        import resource
    except ImportError:  # not on Windows
        return min(left, default=None)
    taken_by: dict[str, int] = {}
    if statm:
        taken_by["RLIMIT_AS"] = int(statm.split()[0]) * resource.getpagesize()
    if found := re.search(r"VmData:\s+(\d+) kB", status):
        taken_by["RLIMIT_DATA"] = 1024 * int(found[1])
    for name, used_now in taken_by.items():
        limit_now = resource.getrlimit(getattr(resource, name))[0]
        if limit_now != resource.RLIM_INFINITY:
            left.append(limit_now - used_now)
    return max(0, min(left)) if left else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def watched(
    items: Iterable[T],
    total: int,
    what: str,
    progress: bool | None = None,
    verb: tuple[str, str] = ("reading", "Read"),
) -> Iterator[T]:
    """Passes on what takes a while to read, and shows how far it is.

    Args:
        items: one after the other.
        total: how many there will be.
        what: they are, such as "pictures".
        progress: `None` for a bar on a terminal and a line now and then elsewhere, `False` for neither.
        verb: what is done to them, as it is said beside the bar and in a line.
    """
    if progress is not False and sys.stderr is not None and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            yield from tqdm(items, total=total, unit=f" {what}", desc=verb[0], leave=False, dynamic_ncols=True)
            return
    said = time.monotonic()
    for number, item in enumerate(items, 1):
        if progress is not False and time.monotonic() - said > _SECONDS:
            said = time.monotonic()
            print(f"{verb[1]} {number:,} of {total:,} {what}.", flush=True)
        yield item
