"""Command lines made from frozen dataclasses, and mistakes on them told in one sentence."""

import contextlib
import dataclasses
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from experiments.lab.options import path_of, refuse_unused
from experiments.lab.processes import Processes, check_same, connect, end_by_sigterm, ending_all
from experiments.lab.xla import use_flags
from fm_jax.data.picture import PictureError
from fm_jax.train.checkpoint import CheckpointError, last_good
from fm_jax.train.folder import OF_DISK, FolderInUseError, naming
from fm_jax.train.loop import NonFiniteLossError

TRACEBACK = "FM_JAX_TRACEBACK"
"""The environment variable that shows where a mistake was found."""
_OUTPUTS = ("standard output", "standard error")
BROKEN_PIPE = 141
"""The status of a program whose output nobody reads any more, 128 + SIGPIPE."""


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
    use_streams()
    with told_in_a_sentence():
        refuse_empty(sys.argv[1:])
        both = dataclasses.make_dataclass(
            "Both",
            [("config", kind, *_default(default)), ("processes", Processes, *_default(Processes()))],
            frozen=True,
        )
        parsed = parse(both, description=description)
        refuse_unused(parsed.config, default)
        use_flags(smoke=getattr(parsed.config, "smoke", False))
        connect(parsed.processes)
        trains = hasattr(parsed.config, "training")
        with ending_all(), told_in_a_sentence(_folder_of(parsed.config), trains):
            check_same(parsed.config)
            if not trains:  # which alone can end all at the same step
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


def use_streams() -> None:
    """Makes of a standard stream that is closed one that goes nowhere, and of what one cannot encode an escape."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would have its number, and be written to
            os.open(os.devnull, os.O_RDWR)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115
        elif number and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            for method in ("write", "flush"):
                setattr(stream, method, _named(getattr(stream, method), _OUTPUTS[number - 1]))


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        with naming(name):
            return function(*args)

    return call


@contextlib.contextmanager
def told_in_a_sentence(folder: Path | None = None, trains: bool = False) -> Iterator[None]:
    """Ends the process with a message in place of a traceback, which `FM_JAX_TRACEBACK=1` shows.

    Errors that only a mistake in the code can cause, such as `TypeError`, pass. Where nobody reads the output any more,
    as after `| head`, the process ends without a word.

    Args:
        folder: that is written to.
        trains: whether that is the folder of a training, which can be continued.
    """
    hook, show = sys.unraisablehook, warnings.showwarning
    sys.unraisablehook, warnings.showwarning = _unraisablehook, _show_once(show)
    for name in ("absl", "jax._src.callback"):
        logging.getLogger(name).addFilter(_is_news)
    try:
        yield
        if (lost := _lost_output()) is not None:
            raise lost
    except KeyboardInterrupt:
        if os.environ.get(TRACEBACK):
            raise
        raise SystemExit(130) from None
    except (ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        found: Exception = _lost_output() or error
        if isinstance(found, BrokenPipeError) and found.filename in _OUTPUTS:
            raise SystemExit(BROKEN_PIPE) from None
        if os.environ.get(TRACEBACK) or isinstance(error, NotImplementedError | RecursionError):
            raise
        # Of saves that have failed, which is told; Python finds them when it ends.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        raise SystemExit(_sentence(found, folder, trains)) from None
    finally:
        _lost_output()  # of --help, say: not to be found by Python when it ends
        sys.unraisablehook, warnings.showwarning = hook, show


def _lost_output() -> OSError | None:
    """The error with which output cannot be written; what is left of it then goes nowhere, in silence."""
    lost = None
    for stream, name in zip((sys.stdout, sys.stderr), _OUTPUTS, strict=True):
        try:
            stream.flush()
        except OSError as error:
            error.filename = name
            lost = lost or error
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except ValueError:  # closed
            pass
    return lost


def _show_once(show: Callable[..., None]) -> Callable[..., None]:
    """Shows warnings, those about JAX's cache as one sentence for all of them."""
    told: list[str] = []

    def show_or_tell(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        found = re.match("Error (reading|writing) persistent compilation cache entry for [^:]*: (.*)", str(message))
        if found is None or os.environ.get(TRACEBACK):
            show(message, *args, **kwargs)
        elif not told:
            told.append(found[1])
            damaged = found[1] == "reading" and "Errno" not in found[2]
            remedy = "; remove it to have it made anew" if damaged else ""
            folder = jax.config.values["jax_compilation_cache_dir"]
            print(
                f"The compilation cache {folder} cannot be used ({found[2][:200]}): what it lacks is compiled each "
                f"time, and nothing else changes{remedy}.",
                file=sys.stderr,
            )

    return show_or_tell


def _unraisablehook(found: Any) -> None:
    # The threads of the checkpoints' storage that are left after a save has failed, which is told anyway.
    if str(found.exc_value) != "Event loop is closed" or os.environ.get(TRACEBACK):
        sys.__unraisablehook__(found)


def _is_news(record: logging.LogRecord) -> bool:
    # Not the warnings of TFDS about data that are not there, nor the pages about an adaptive solver: both are told.
    of_tfds = "tensorflow_datasets" in record.pathname and record.levelno < logging.ERROR
    return bool(os.environ.get(TRACEBACK)) or not (of_tfds or "callback failed" in record.getMessage())


# Before Matplotlib is imported, which without a home keeps its fonts in a temporary folder, and says so at length.
logging.getLogger("matplotlib").addFilter(
    lambda record: not re.search("MPLCONFIGDIR|mkdir -p failed", record.getMessage())
)


def _folder_of(config: Any) -> Path | None:
    """The folder or file that a command with this configuration writes to."""
    if hasattr(config, "training"):
        folder = config.training.run_dir
    else:
        folder = next((getattr(config, name) for name in ("run_dir", "out", "run") if hasattr(config, name)), None)
    return folder.with_name(folder.name + "-smoke") if getattr(config, "smoke", False) and folder.name else folder


def _sentence(error: Exception, folder: Path | None = None, trains: bool = False) -> str:
    if isinstance(error, OSError) and error.strerror:
        of_disk = error.errno in OF_DISK
        place = folder if of_disk and error.filename is None else error.filename
        where = "" if place is None else f" ({place})"
        return f"{error.strerror}{where}.{_then(error, folder if trains else None) if of_disk else ''}"
    told = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, PictureError):  # a line for each
        return str(error)
    if isinstance(error, NonFiniteLossError) and "Begin a new run from it" in told:
        return (
            f"{told} To change what the run does not accept, begin a new one from its parameters, with --init-from "
            f"{folder or 'RUN'}, another --run-dir and a lower --learning-rate."
        )
    if isinstance(error, RuntimeError) and "is not finite" in told:  # of a sampler, in the pages of JAX and Equinox
        return " ".join(str(error).partition("\n---")[0].rpartition("RuntimeError: ")[2].split())
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


def _then(error: OSError, run_dir: Path | None) -> str:
    """What the same command does once the disk has been mended."""
    if run_dir is None:
        return " Once this is mended, run the same command again."
    parents = [] if error.filename is None else [*Path(os.fsdecode(error.filename)).parents]
    folders = [each / "checkpoints" for each in (*parents, run_dir)]
    return " " + last_good(next((each for each in folders if each.is_dir()), folders[-1]))


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
    options: dict[str, Any] = {} if default is None else {"default": default}
    if spec := sys.modules["__main__"].__spec__:
        options["prog"] = f"python -m {spec.name.removesuffix('.__main__')}"
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(lambda info: _as_paths(info, tyro.constructors.PrimitiveConstructorSpec))
    # One flat list of options: --batch-size rather than --training.batch-size.
    try:
        with registry:
            parsed = tyro.cli(kind, description=description, config=(tyro.conf.OmitArgPrefixes,), **options)
    except ValueError as error:  # a configuration that refuses its values, where tyro does not say so itself
        raise SystemExit(str(error)) from error
    use_cache()
    return parsed


def _as_paths(info: Any, spec: Any) -> Any:
    """How tyro is to read any option that is a path, and several of them."""
    if info.type is not Path:
        return None

    def read(texts: list[str]) -> Path:
        try:
            return path_of(texts[0])
        except ValueError as error:
            raise SystemExit(f"{_option_with(texts[0])} {error}") from error

    return spec(
        nargs=1,
        metavar="PATH",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


def _option_with(text: str) -> str:
    """The option on the command line that was given this value."""
    name = "a path"
    for each in sys.argv[1:]:
        option, equals, value = each.partition("=")
        if each.startswith("--") and each != text:
            name = option
        if text in (each, value if equals else each):
            return name
    return name


def use_cache() -> None:
    """Keeps compiled programs in the home directory, so that a second run starts at once, where there is one."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    given = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "fm_jax" / "xla"
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        return
    if os.access(cache, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(cache))
