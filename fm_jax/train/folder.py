"""The folder of a run: one process at a time writes to it, and no file in it is ever half written."""

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from fm_jax.checks import why_no_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]
OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""The errors of a disk that is full, over its quota, not to be written to or broken."""
LOCK = ".lock"
"""The file in a run folder that a running process holds."""


class FolderInUseError(RuntimeError):
    """Another process writes to this folder. Nothing was overwritten."""


class FolderRemovedError(OSError):
    """The folder of a run was removed while it was going on."""

    def __init__(self, folder: PathLike):
        super().__init__(f"{folder} was removed while the run was going on. Start the run again: it begins anew.")


@contextlib.contextmanager
def lock_folder(run_dir: PathLike) -> Iterator[Path]:
    """Keeps every other process that asks for it out of a run folder.

    The lock is the kernel's (`flock`): it ends with the process, however that ends, and is never left behind. Where
    the system or the file system has none, there is no lock.

    Args:
        run_dir: folder of the run, created if absent; taken away again if nothing was put into it.

    Yields:
        The folder.

    Raises:
        FolderInUseError: at once, if another process has the folder; says which.
        FolderRemovedError: in place of any other `OSError`, if the folder is no longer there.
        OSError: if the folder cannot be made or written to; says why.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, lock_folder(folder):
        ...     with contextlib.suppress(FolderInUseError), lock_folder(folder):
        ...         print("never")
    """
    folder = Path(run_dir)
    made = [each for each in (folder, *folder.parents) if not os.path.exists(each)]
    held = lock = None
    try:
        make_folder(folder)
        check_places(folder, files=[LOCK])
        held = hold(folder)
        lock = _take(folder)
        yield folder
    except OSError as error:
        if held is not None and not is_at(held, folder):
            raise FolderRemovedError(folder) from error
        raise
    finally:
        if held is not None:
            os.close(held)
        if lock is not None:
            _release(lock, folder / LOCK)
        with contextlib.suppress(OSError):  # not empty
            for each in made:
                each.rmdir()


def make_folder(folder: PathLike) -> None:
    """Creates a folder and those above it.

    Raises:
        OSError: in words, if that cannot be done or it cannot be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if why := why_no_folder(folder):
            raise NotADirectoryError(f"{folder} cannot be a folder: {why}. Give another folder.") from None
        raise type(error)(f"{folder} cannot be made: {error.strerror}. Give another folder.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to by this user. Give another folder.")


def check_places(folder: PathLike, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """Refuses a folder in which others have the names of what is going to be written.

    Args:
        folder: that is looked at, and not written to.
        files: names of files; those that are there will be replaced.
        folders: names of folders.

    Raises:
        IsADirectoryError: for a folder that has the name of a file.
        NotADirectoryError: for a file, or a link that leads nowhere, that has the name of a folder.
    """
    for name in files:
        if (path := Path(folder) / name).is_dir():
            raise IsADirectoryError(f"{path} is a folder, and must be a file: move it away. Nothing was overwritten.")
    for name in folders:
        path = Path(folder) / name
        if os.path.lexists(path) and (why := why_no_folder(path)):
            raise NotADirectoryError(f"{why}, and must be a folder: move it away. Nothing was overwritten.")


@contextlib.contextmanager
def naming(path: PathLike) -> Iterator[None]:
    """What the system refuses in here, such as to write to a full disk, says which file it was about.

    NumPy hides that a disk is full behind an error of its own, about a file that it could not close.

    Raises:
        OSError: with `path` for its `filename` where it had none.

    Example:
        >>> with contextlib.suppress(OSError) as _, naming("runs/a"):
        ...     raise OSError(28, "No space left on device")
    """
    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not (isinstance(found, OSError) and found.errno in OF_DISK):
            found = found.__cause__ or found.__context__
        cause = found or error
        if isinstance(cause, OSError) and cause.errno is not None and cause.filename is None:
            cause.filename = str(path)
        if cause is error:
            raise
        raise cause from None


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A file of the same ending to write to, which takes the place of `path` when all went well, and only then.

    Raises:
        FileNotFoundError: if its folder does not exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "a.txt") as unfinished:
        ...         _ = unfinished.write_text("whole")
        ...     os.listdir(folder)
        ['a.txt']
    """
    path = Path(path)
    unfinished = path.with_name(f".unfinished-{path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} must be the folder of {path.name}, and does not exist: make it before.")
    check_places(path.parent, files=[path.name, unfinished.name])
    try:
        with naming(path):
            yield unfinished
            os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def write_text(path: PathLike, text: str) -> None:
    """Writes a whole file, or leaves the old one as it was."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def hold(folder: PathLike) -> int | None:
    """Opens a folder, so that one that is removed and made anew is known for another one; `None` where none can be."""
    return os.open(folder, os.O_RDONLY) if os.name == "posix" else None


def is_at(opened: int, path: Path) -> bool:
    """Whether an open file or folder is still the one at that path, rather than removed or replaced."""
    try:
        return os.path.samestat(os.fstat(opened), path.stat())
    except OSError:
        return False


def _take(folder: Path) -> int | None:
    """The open file that holds the lock."""
    path = folder / LOCK
    while fcntl is not None:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(lock)
            os.close(lock)
            raise FolderInUseError(
                f"{folder} is in use by {holder}. Wait for it, stop it, or take another --run-dir. Nothing was "
                "overwritten."
            ) from None
        except OSError:  # a file system without locks
            os.close(lock)
            return None
        if is_at(lock, path):  # else its last holder has just removed it
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                os.truncate(lock, 0)
                os.write(lock, json.dumps(owner).encode())
            return lock
        os.close(lock)
    return None


def _release(lock: int, path: Path) -> None:
    # Removed while it is held, so that nobody else holds what is removed.
    if is_at(lock, path):
        path.unlink(missing_ok=True)
    os.close(lock)


def _holder(lock: int) -> str:
    try:
        owner = json.loads(os.pread(lock, 1000, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # about to be written
        return "another process"
