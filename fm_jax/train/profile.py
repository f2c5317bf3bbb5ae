"""A trace of some steps of a run, for TensorBoard and Perfetto."""

import os
from contextlib import AbstractContextManager
from typing import Any

import jax

from fm_jax.checks import shown

FIRST, NUM = 2, 10
"""The calls that are traced: after those that compile, and few, because a trace of many is slow to open."""


def named(name: str, **values: int) -> AbstractContextManager[Any]:
    """What the host does within, by a name in the trace; `step_num=` marks a step."""
    annotation = jax.profiler.StepTraceAnnotation if values else jax.profiler.TraceAnnotation
    return annotation(name, **values)


class Profile:
    """Traces calls `FIRST + 1` to `FIRST + NUM` of a loop to a folder, fewer if the loop ends.

    Args:
        folder: where to; `None` traces nothing.

    Raises:
        ValueError: if `folder` is no path.
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        if folder is not None and not isinstance(folder, str | os.PathLike):
            raise ValueError(f"profile_dir must be a path or None, got {shown(folder)}.")
        self._folder, self._calls, self._running = folder, 0, False

    def after_call(self, results: Any) -> None:
        """To be told after every call of the loop, with what it gave."""
        self._calls += 1
        if self._folder is None:
            return
        if self._calls == FIRST:
            jax.block_until_ready(results)
            jax.profiler.start_trace(os.fspath(self._folder), create_perfetto_trace=True)
            self._running = True
        elif self._calls == FIRST + NUM:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being made."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
