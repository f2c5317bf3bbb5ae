"""Command lines made from frozen dataclasses, and mistakes on them told in one sentence."""

import contextlib
import dataclasses
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.lab.options import refuse_unused
from experiments.lab.processes import Processes, check_same, connect, end_by_sigterm, ending_all
from experiments.lab.xla import use_flags
from fm_jax.train.checkpoint import CheckpointError
from fm_jax.train.folder import FolderInUseError
from fm_jax.train.loop import NonFiniteLossError

TRACEBACK = "FM_JAX_TRACEBACK"
"""The environment variable that shows where a mistake was found."""


def main(run: Callable[[Any], object], kind: type, default: Any = None, description: str | None = None) -> None:
    """A command line: reads the configuration, refuses what would have no effect, runs.

    Args:
        run: called with the configuration.
        kind: as in `parse`, like the next two.
        default: values of the fields that are not given.
        description: shown by `--help`.

    Raises:
        SystemExit: with one sentence for whatever a user can mend.
    """
    with told_in_a_sentence():
        refuse_empty(sys.argv[1:])
        both = dataclasses.make_dataclass(
            "Both",
            [("config", kind, *_default(default)), ("processes", Processes, *_default(Processes()))],
            frozen=True,
        )
        parsed = parse(both, description=description)
        refuse_unused(parsed.config, default)
        use_flags()
        connect(parsed.processes)
        with ending_all(), told_in_a_sentence():
            check_same(parsed.config)
            if not hasattr(parsed.config, "training"):  # which alone can end all at the same step
                end_by_sigterm()
            run(parsed.config)


def _default(value: Any) -> tuple[Any, ...]:
    return () if value is None else (dataclasses.field(default_factory=lambda: value),)


def refuse_empty(arguments: list[str]) -> None:
    """Refuses a command line with an option whose value is empty, which as a path would be the current folder."""
    name = None
    for each in arguments:
        if each.startswith("--"):
            name, equals, value = each.partition("=")
        else:
            equals, value = "=", each
        if name is not None and equals and not value.strip():
            raise ValueError(f"{name} must not be empty. Give a value, or leave it out.")


@contextlib.contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Ends the process with a message in place of a traceback, which `FM_JAX_TRACEBACK=1` shows.

    Errors that only a mistake in the code can cause, such as `TypeError`, pass.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = _unraisablehook
    for name in ("absl", "jax._src.callback"):
        logging.getLogger(name).addFilter(_is_news)
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK):
            raise
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if os.environ.get(TRACEBACK) or isinstance(error, NotImplementedError | RecursionError):
            raise
        # Of saves that have failed, which is told; Python finds them when it ends.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise SystemExit(_sentence(error)) from None
    finally:
        sys.unraisablehook = hook


def _unraisablehook(found: Any) -> None:
    # The threads of the checkpoints' storage that are left after a save has failed, which is told anyway.
    if str(found.exc_value) != "Event loop is closed" or os.environ.get(TRACEBACK):
        sys.__unraisablehook__(found)


def _is_news(record: logging.LogRecord) -> bool:
    # Not the warnings of TFDS about data that are not there, nor the pages about an adaptive solver: both are told.
    of_tfds = "tensorflow_datasets" in record.pathname and record.levelno < logging.ERROR
    return bool(os.environ.get(TRACEBACK)) or not (of_tfds or "callback failed" in record.getMessage())


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f" ({error.filename})"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = " Make room; the same command continues from the last checkpoint." if full else ""
        return f"{error.strerror}{where}.{advice}"
    told = " ".join(str(error).split()) or type(error).__name__
    if re.search("maximum number of (solver )?steps|step size became too small", told):
        return (
            "An adaptive solver came to the end of its steps before that of the path: raise --tolerance, or take a "
            "--solver with fixed steps, such as heun. Where training has diverged neither helps."
        )
    if isinstance(error, CheckpointError | FolderInUseError | NonFiniteLossError | OSError) or _is_ours(error):
        return told
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in told:
        return f"Not enough memory: lower what makes the arrays large, such as --batch-size. ({told[:300]})"
    return f"{type(error).__name__}: {told[:500]} ({TRACEBACK}=1 shows where.)"


def _is_ours(error: Exception) -> bool:
    """Whether the library or an experiment has refused, in its own words."""
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    name = "" if at is None else at.tb_frame.f_globals.get("__name__", "")
    return name == "__main__" or name.partition(".")[0] in ("fm_jax", "experiments")


def parse(kind: type, default: Any = None, description: str | None = None) -> Any:
    """Reads the command line into a configuration: an option for every field, `--help` explains each.

    Args:
        kind: dataclass of the configuration.
        default: values of the fields that are not given.
        description: shown by `--help`.

    Raises:
        ImportError: if tyro is not installed.
        SystemExit: for a mistake, which a configuration that refuses its values is too, and after `--help`.
    """
    try:
        import tyro
    except ImportError as error:
        raise ImportError("experiments need their extra: pip install 'fm_jax[experiments]'.") from error
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a second run starts at once
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fm_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    options: dict[str, Any] = {} if default is None else {"default": default}
    if spec := sys.modules["__main__"].__spec__:
        options["prog"] = f"python -m {spec.name.removesuffix('.__main__')}"
    # One flat list of options: --batch-size rather than --training.batch-size.
    try:
        return tyro.cli(kind, description=description, config=(tyro.conf.OmitArgPrefixes,), **options)
    except ValueError as error:  # a configuration that refuses its values, where tyro does not say so itself
        raise SystemExit(str(error)) from error
