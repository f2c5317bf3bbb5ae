"""The lock of a run folder, and files that are whole or not there."""

import errno
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from fm_jax.train import folder as module
from fm_jax.train.folder import (
    LOCK,
    FolderInUseError,
    FolderRemovedError,
    check_places,
    lock_folder,
    make_folder,
    naming,
    replacing,
    write_text,
)

HOLD = """
import importlib.util, signal, sys

spec = importlib.util.spec_from_file_location("folder", sys.argv[1])
folder = importlib.util.module_from_spec(spec)
spec.loader.exec_module(folder)
with folder.lock_folder(sys.argv[2]):
    print("held", flush=True)
    signal.pause()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has the lock of `tmp_path / "run"`."""
    command = [sys.executable, "-c", HOLD, module.__file__, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_has_the_folder_and_a_killed_one_has_it_no_more(other, tmp_path):
    host = re.escape(socket.gethostname())
    message = rf"run is in use by process {other.pid} on {host}, since 20\d\d-.*another --run-dir. Nothing was"
    for _ in range(2):
        with pytest.raises(FolderInUseError, match=message), lock_folder(tmp_path / "run"):
            pytest.fail("two at once")
    other.kill()
    other.wait()
    assert (tmp_path / "run" / LOCK).exists()  # left behind, and no obstacle
    with lock_folder(tmp_path / "run") as folder:
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_within_one_process_too(tmp_path):
    with lock_folder(tmp_path):
        with pytest.raises(FolderInUseError, match=f"process {os.getpid()}"), lock_folder(tmp_path):
            pass
        assert (tmp_path / LOCK).exists()
    with lock_folder(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00", b'{"pid": 1}'])
def test_what_the_lock_says_may_be_unreadable(content, tmp_path):
    (tmp_path / LOCK).write_bytes(content)
    with lock_folder(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(FolderInUseError, match="is in use by another process"), lock_folder(tmp_path):
            pass


def test_it_ends_with_an_error_and_takes_away_only_the_folders_that_it_made(tmp_path):
    (tmp_path / "old").mkdir()
    for path, left in ((tmp_path / "a" / "b" / "c", False), (tmp_path / "old", True)):
        with pytest.raises(ZeroDivisionError), lock_folder(path):
            1 / path.is_file()
        assert path.exists() == left
    assert not (tmp_path / "a").exists()
    with lock_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_folder_made_anew_has_a_lock_of_its_own(tmp_path):
    """Whoever removes the folder of a running process and starts another does not lose the lock of the other."""
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / LOCK).unlink()
        (tmp_path / "run").rmdir()
        second = lock_folder(tmp_path / "run")
        second.__enter__()
    with pytest.raises(FolderInUseError), lock_folder(tmp_path / "run"):
        pass
    second.__exit__(None, None, None)


def test_without_locks_it_goes_on(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuses)
    with lock_folder(tmp_path / "run") as folder:
        assert folder.is_dir()
    monkeypatch.setattr(module, "fcntl", None)
    with lock_folder(tmp_path / "run") as folder:
        assert folder.is_dir()


def test_what_cannot_be_a_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(NotADirectoryError, match=r"cannot be a folder: \S+/file is a file. Give another folder"):
            make_folder(path)
        with pytest.raises(NotADirectoryError), lock_folder(path):
            pass
    with pytest.raises(OSError, match=r"cannot be made: File name too long. Give another folder"):
        make_folder(tmp_path / ("a" * 300))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="cannot be written to by this user"):
        make_folder(tmp_path)


def test_links_that_lead_nowhere_are_no_folders(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("dangling", "loop"):
        for path in (tmp_path / name, tmp_path / name / "a" / "b"):
            with pytest.raises(OSError, match=rf"cannot be a folder: \S+/{name} is a symbolic link to nothing"):
                make_folder(path)
            with pytest.raises(OSError, match="is a symbolic link to nothing"), lock_folder(path):
                pass
    assert sorted(os.listdir(tmp_path)) == ["dangling", "loop"]


def test_places_that_others_have_taken(tmp_path):
    (tmp_path / "config.json").mkdir()
    (tmp_path / "samples").write_text("mine")
    check_places(tmp_path, files=["samples", "new"], folders=["config.json", "new"])
    message = r"config\.json is a folder, and must be a file: move it away. Nothing was overwritten"
    with pytest.raises(IsADirectoryError, match=message):
        check_places(tmp_path, files=["config.json"])
    with pytest.raises(IsADirectoryError, match=message):
        write_text(tmp_path / "config.json", "new")
    with pytest.raises(NotADirectoryError, match=r"samples is a file, and must be a folder: move it away"):
        check_places(tmp_path, folders=["samples"])
    assert (tmp_path / "samples").read_text() == "mine"
    (tmp_path / LOCK).mkdir()
    with pytest.raises(IsADirectoryError, match=r"\.lock is a folder"), lock_folder(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == [LOCK, "config.json", "samples"]


def test_a_folder_that_was_removed_is_said_to_be_whatever_fails(tmp_path):
    message = "run was removed while the run was going on. Start the run again: it begins anew"

    def work(last):
        with lock_folder(tmp_path / "run") as folder:
            shutil.rmtree(folder)
            last(folder)

    with pytest.raises(FolderRemovedError, match=message):
        work(lambda folder: write_text(folder / "results.json", "new"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ZeroDivisionError):
        work(lambda folder: 1 / folder.exists())


def test_the_folder_of_a_file_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere must be the folder of a.txt, and does not exist: make it"):
        write_text(tmp_path / "nowhere" / "a.txt", "")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as unfinished:
        1 / (unfinished.write_text("ha") - 2)
    assert unfinished.suffix == ".json"
    monkeypatch.setattr(type(path), "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_text(path, "α")
    assert path.read_bytes() == "α".encode()


def full_disk(path, text, **_):
    path.write_bytes(text[:1].encode())
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_a_lock_whose_file_its_last_holder_has_just_removed_counts_for_nothing(tmp_path, monkeypatch):
    flock, calls = module.fcntl.flock, []

    def late(*args):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(args)
        flock(*args)

    monkeypatch.setattr(module.fcntl, "flock", late)
    with lock_folder(tmp_path):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(FolderInUseError), lock_folder(tmp_path):
            pass
    assert len(calls) == 3


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self):
        return True

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(error):
    raise error


def hidden():
    try:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    except OSError:
        raise ValueError("Can't close the ZIP file while there is an open writing handle on it") from None


@pytest.mark.parametrize(
    ("fails", "number", "name"),
    [
        (lambda: failing(OSError(errno.EIO, "Input/output error")), errno.EIO, "mine"),
        (lambda: failing(OSError(errno.ENOSPC, "No space", "theirs")), errno.ENOSPC, "theirs"),
        (lambda: np.savez(Full(), a=np.zeros(9)), errno.ENOSPC, "mine"),
        (hidden, errno.EDQUOT, "mine"),
    ],
    ids=["no name", "a name of its own", "NumPy", "hidden"],
)
def test_what_the_system_refuses_says_which_file(fails, number, name):
    with pytest.raises(OSError, match=r"^\[Errno") as caught, naming("mine"):
        fails()
    assert (caught.value.errno, caught.value.filename) == (number, name)


def test_other_errors_keep_what_they_say():
    def refuses():
        try:
            os.stat("/nowhere/at/all")
        except OSError:
            raise ValueError("mine")  # noqa: B904

    for error in (ValueError("mine"), OSError("mine"), FolderRemovedError("run")):
        with pytest.raises(type(error)) as caught, naming("file"):
            failing(error)
        assert caught.value is error
        assert getattr(error, "filename", None) is None
    with pytest.raises(ValueError, match="mine"), naming("file"):
        refuses()


def test_a_file_on_a_full_disk_is_named_and_not_begun(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    (tmp_path / ".unfinished-a.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_text(tmp_path / "a.json", "x" * 99)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.json"))
    assert os.listdir(tmp_path) == []
