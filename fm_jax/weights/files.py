"""Files that are written as a whole or not at all, also several that belong together."""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fm_jax.checks import shown, why_no_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SECONDS = 60  # after which a file that nobody holds is nobody's


def check_path(name: str, path: Any) -> Path:
    """Refuses what is not a path."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise ValueError(f"{name} must be a path, got {shown(path)}.")
    return Path(path)


def replace_files(contents: Mapping[Path, Callable[[Any], Any]], old: Callable[[], list[Path]] = list) -> None:
    """Writes several files of one folder, which take their names when all of them are complete.

    Args:
        contents: by file, a function that writes what is to be in it; the last of several is what readers begin with.
        old: returns the files that are replaced as a whole: those that are not written anew are removed.

    Raises:
        OSError: as the system says; the old files are as they were.
    """
    folder = next(iter(contents)).parent
    if why := why_no_folder(folder):
        raise NotADirectoryError(f"{folder} cannot be a folder: {why}. Give another folder.")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    unfinished: dict[Path, tuple[Path, Any]] = {}
    try:
        for path, write in contents.items():
            if path.is_dir():
                raise IsADirectoryError(f"{path} is a folder, and must be a file: move it away.")
            _remove_orphans(path)
            draft = path.with_name(f".unfinished-{path.name}-{secrets.token_hex(4)}")
            file = open(draft, "xb")  # noqa: SIM115
            unfinished[path] = draft, file
            _try_lock(file)
            with _naming(path):
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if fcntl is None:
                file.close()
        with _locked(folder):
            _take_names({path: draft for path, (draft, _) in unfinished.items()}, old())
    except BaseException:
        for draft, _ in unfinished.values():
            draft.unlink(missing_ok=True)
        for each in made:
            with contextlib.suppress(OSError):  # not empty
                each.rmdir()
        raise
    finally:
        for _, file in unfinished.values():
            with contextlib.suppress(OSError):  # a disk that is full says so a second time
                file.close()


def _take_names(drafts: Mapping[Path, Path], old: list[Path]) -> None:
    """Old and new are never mixed: between the two there is no index, and so nothing that can be read."""
    *parts, last = drafts
    if parts:
        for path in old:
            if path.suffix == ".json":
                path.unlink(missing_ok=True)
    for path in (*parts, last):
        os.replace(drafts[path], path)
    for path in old:
        if path not in drafts:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the system refuses in here says which file it was about."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the system has locks."""
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _try_lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):
        return False
    return True


def _remove_orphans(path: Path) -> None:
    """Removes what writers of this file that were killed have left: old, and nobody holds its lock."""
    for each in path.parent.glob(f".unfinished-{path.name}-*"):
        with contextlib.suppress(OSError), open(each, "rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _SECONDS and _try_lock(file):
                each.unlink()
