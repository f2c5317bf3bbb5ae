"""Files of ArrayRecord that are written one by one, each whole or not there: a pass that is killed goes on."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.checks import imported

ENCODING = ("encoding", "Encoded")
"""What is said of a pass that encodes, while it goes on and now and then."""
_OPTIONS = "group_size:1,uncompressed"
"""One record is read without its neighbours, and numbers that are noise in their last digits do not shrink."""


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `path` once all went well.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_file(Path(folder) / "a.txt") as unfinished:
        ...         _ = unfinished.write_text("whole")
        ...     os.listdir(folder)
        ['a.txt']
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON object, or leaves the old file as it was."""
    with whole_file(path) as unfinished:
        unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: if there is no such file: the folder is not `what`.
        ValueError: if it is damaged.
    """
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path.parent} is not {what}: it has no {path.name}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}.") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object.")
    return record


def read_finished(folder: Path, name: str, what: str) -> dict[str, Any]:
    """The record of a folder of `what`, such as "latents", that is finished.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if it is damaged, or not finished.
    """
    info = read_json(folder / name, f"a folder of {what}")
    if not info.get("finished"):
        raise ValueError(f"{folder} holds {what} that are not finished: the command that began them goes on.")
    return info


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as `.npy`, or leaves the old file as it was."""
    with whole_file(path) as unfinished, open(unfinished, "wb") as file:
        np.save(file, array, allow_pickle=False)


def shards(folder: Path, name: str, num: int, size: int) -> list[tuple[Path, int, int]]:
    """The files of `num` records, `size` in each: path, first record, and the one behind the last.

    Example:
        >>> [(path.name, start, stop) for path, start, stop in shards(Path("a"), "train", 5, 4)]
        [('train-00000-of-00002.array_record', 0, 4), ('train-00001-of-00002.array_record', 4, 5)]
    """
    starts = range(0, num, size)
    return [
        (folder / f"{name}-{i:05d}-of-{len(starts):05d}.array_record", start, min(start + size, num))
        for i, start in enumerate(starts)
    ]


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Writes one file of ArrayRecord, or none.

    Raises:
        ImportError: if array_record is not installed.
    """
    module = imported("array_record.python.array_record_module", "latents", "'fm_jax[data]'")
    with whole_file(path) as unfinished:
        writer = module.ArrayRecordWriter(str(unfinished), _OPTIONS)
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()


class Records:
    """The records of several files, by number.

    Args:
        files: as `shards` gives them; each is looked at, and none read.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for one that is damaged, or has another number of records.
        ImportError: if array_record is not installed.
    """

    def __init__(self, files: Sequence[tuple[Path, int, int]]):
        module = imported("array_record.python.array_record_data_source", "latents", "'fm_jax[data]'")
        self._files = tuple(files)
        for path, start, stop in self._files:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there: the command that wrote the others writes it anew.")
            try:
                num = len(module.ArrayRecordDataSource([str(path)]))
            except Exception as error:  # of several classes
                raise ValueError(f"{path} is damaged ({_told(error)}). {_ANEW}") from None
            if num != stop - start:
                raise ValueError(f"{path} must hold {stop - start} records, got {num}. {_ANEW}")
        self._source = module.ArrayRecordDataSource([str(path) for path, _, _ in self._files])

    def __len__(self) -> int:
        return self._files[-1][2] if self._files else 0

    def read(self, numbers: np.ndarray) -> Sequence[bytes]:
        """The records of these numbers, in their order.

        Raises:
            ValueError: if one cannot be read.
        """
        try:
            return self._source.__getitems__(numbers.tolist())
        except Exception as error:  # of several classes
            paths = {path.name for path, start, stop in self._files if ((numbers >= start) & (numbers < stop)).any()}
            folder = self._files[0][0].parent
            raise ValueError(
                f"{folder} is damaged in one of {', '.join(sorted(paths))} ({_told(error)}). {_ANEW}"
            ) from None


_ANEW = "Remove the file, and the command that wrote it writes it anew."


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
