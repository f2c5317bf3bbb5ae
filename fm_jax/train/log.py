"""Metrics of a run as JSON lines and TensorBoard event files."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TIMING_FIELDS = ("images_per_second",)
"""Fields in which a resumed run may differ from an unbroken one."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl`, one object a line, and to `run_dir/tensorboard`.

    Lines of steps after `start_step`, which a resumed run takes again, are removed, as is a line that a killed
    process left unfinished: a run that was broken off and resumed ends with the file of an unbroken one, save
    `TIMING_FIELDS`. Non-finite numbers, for which JSON has no notation, are the strings NaN, Infinity, -Infinity.

    Args:
        run_dir: folder of the run, created if absent.
        start_step: the step that the run continues from; 0 for a new one.
        tensorboard: whether to write event files as well, if tensorboardX is installed.
    """

    def __init__(self, run_dir: str | os.PathLike[str], start_step: int = 0, *, tensorboard: bool = True):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(self.path, start_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._events = _event_writer(self.path.parent / "tensorboard", start_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line, there for good when this returns, and one scalar a value, on disk within a second."""
        line = {"step": step, **{name: _to_json(float(value)) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads `run_dir/metrics.jsonl`: one dict a line, in order, non-finite numbers as floats again."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(_parse, lines) if row is not None]
    return [{name: _NON_FINITE[x] if isinstance(x, str) else x for name, x in row.items()} for row in rows]


def _to_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = [line for line in text.splitlines() if (row := _parse(line)) is not None and row["step"] <= step]
    rest = "".join(line + "\n" for line in kept)
    if rest != text:
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(rest, encoding="utf-8")
        os.replace(unfinished, path)


def _event_writer(folder: Path, start_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        warnings.warn(
            "tensorboardX is not installed: no TensorBoard files are written, metrics.jsonl is.", stacklevel=3
        )
        return None
    # purge_step makes TensorBoard forget the steps that are taken again. Calling flush would not help: it does not
    # wait for the events that tensorboardX has queued.
    return SummaryWriter(str(folder), purge_step=start_step + 1, flush_secs=1)
