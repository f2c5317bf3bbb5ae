"""Metrics of a run as JSON lines and TensorBoard event files."""

import json
import math
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fm_jax.checks import check_integer
from fm_jax.train.folder import FolderRemovedError, check_places, hold, is_at, make_folder, naming, replacing

TIMING_FIELDS = ("images_per_second",)
"""Fields in which a resumed run may differ from an unbroken one."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BEGINNING = b'{"step": '


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl`, one object a line, and to `run_dir/tensorboard`.

    Lines of steps after `start_step`, which a resumed run takes again, are removed, as is a line that a killed
    process left unfinished: a run that was broken off and resumed ends with the file of an unbroken one, save
    `TIMING_FIELDS`. Lines that this class did not write stay where they are. Non-finite numbers, for which JSON has no
    notation, are the strings NaN, Infinity, -Infinity.

    Args:
        run_dir: folder of the run, created if absent.
        start_step: the step that the run continues from; 0 for a new one.
        tensorboard: whether to write event files as well, if tensorboardX is installed.

    Raises:
        ValueError: if `start_step` is not an integer, at least 0.
        OSError: if the folder cannot be written to.
    """

    def __init__(self, run_dir: str | os.PathLike[str], start_step: int = 0, *, tensorboard: bool = True):
        check_integer("start_step", start_step, least=0)
        self.path = Path(run_dir) / "metrics.jsonl"
        make_folder(self.path.parent)
        check_places(self.path.parent, files=[self.path.name], folders=["tensorboard"] if tensorboard else [])
        self._folder = hold(self.path.parent)
        _drop_after(self.path, start_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = _event_writer(self.path.parent / "tensorboard", start_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line, and one TensorBoard scalar a value, there for good when this returns.

        Raises:
            OSError: if the line cannot be written, or the file was removed: what is written now would be lost.
        """
        if not is_at(self._file.fileno(), self.path):
            if self._folder is not None and not is_at(self._folder, self.path.parent):
                raise FolderRemovedError(self.path.parent)
            raise FileNotFoundError(
                f"{self.path} was removed while the run was going on. Start the run again: it continues from its last "
                "checkpoint, without the lines that were lost."
            )
        line = {"step": step, **{name: _to_json(float(value)) for name, value in values.items()}}
        with naming(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        if self._events is not None:
            self._events.write(step, values)

    def close(self) -> None:
        """Closes both files."""
        try:
            with naming(self.path):
                self._file.close()
        finally:
            if self._folder is not None:
                os.close(self._folder)
                self._folder = None
            if self._events is not None:
                self._events.close()


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads `run_dir/metrics.jsonl`: one dict a line, in order, non-finite numbers as floats again.

    Lines that `MetricsWriter` did not write are passed over.
    """
    lines = (Path(run_dir) / "metrics.jsonl").read_bytes().split(b"\n")
    rows = [row for row in map(_parse, lines) if row is not None]
    return [{name: _NON_FINITE[x] if isinstance(x, str) else x for name, x in row.items()} for row in rows]


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line as `MetricsWriter.write` makes them, an integer step and numbers; `None` for any other."""
    try:
        row = json.loads(line.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    numbers = (type(x) in (int, float) or (isinstance(x, str) and x in _NON_FINITE) for x in row.values())
    return row if all(numbers) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    *lines, last = data.split(b"\n")
    if last and not _is_torn(last):  # someone's, or ours without its end
        lines.append(last)
    kept = [line for line in lines if (row := _parse(line)) is None or row["step"] <= step]
    rest = b"".join(line + b"\n" for line in kept)
    if rest != data:
        with replacing(path) as unfinished:
            unfinished.write_bytes(rest)


def _is_torn(line: bytes) -> bool:
    """Whether this is the beginning of a line that a killed process did not finish."""
    return _parse(line) is None and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line))


class _Events:
    """A TensorBoard event file, written at once: tensorboardX's own writer is a thread, which dies on a full disk."""

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX import event_file_writer
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        make_folder(folder)
        self._folder = folder
        # Makes TensorBoard forget the steps that are taken again.
        log = SessionLog(status=SessionLog.START)
        with naming(folder):
            self._file = event_file_writer.EventsWriter(str(folder / "events"), f".{os.getpid()}")
            self._file.write_event(Event(step=start_step + 1, wall_time=time.time(), session_log=log))
            self._file.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        numbers = [self._summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()]
        with naming(self._folder):
            self._file.write_event(self._event(step=step, wall_time=time.time(), summary=self._summary(value=numbers)))
            self._file.flush()

    def close(self) -> None:
        with naming(self._folder):
            self._file.close()


def _event_writer(folder: Path, start_step: int) -> _Events | None:
    try:
        return _Events(folder, start_step)
    except ImportError:
        warnings.warn(
            "tensorboardX is not installed: no TensorBoard files are written, metrics.jsonl is.", stacklevel=3
        )
        return None
