"""Checkpoints that a run can be continued from bit for bit, and that refuse to be mistaken for another run's."""

import contextlib
import json
import logging
import os
import re
import traceback
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fm_jax.checks import check_function, check_integer, check_key, shown
from fm_jax.train.folder import hold, is_at, make_folder
from fm_jax.train.state import TrainState, check_train_state
from fm_jax.types import Array, Key

ALLOW_CHANGE = frozenset({"total_steps", "num_steps", "log_every", "save_every", "sample_every"})
"""Configuration fields that a resumed run may change."""
_FORMAT = "fm_jax 1"
_ABSENT = "absent"
_NAMES = ("meta", "state", "commit_success.txt", "descriptor", "metrics")
"""What Orbax writes into a checkpoint of ours, besides what begins with an underscore."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used or written, or belongs to another run. Nothing was overwritten."""


class Checkpointer:
    """Saves and restores the state, key, data position and configuration of a run in `run_dir/checkpoints/<step>`.

    Saving is asynchronous, and atomic: a checkpoint that a killed process left half-written does not count. Every
    array carries a checksum, so a damaged checkpoint is refused rather than trained on. In a folder that is removed
    meanwhile nothing is written any more, on Linux not even by a save that has begun.

    Args:
        run_dir: folder of the run, created if absent.
        config: what determines the run; a JSON-like dict, such as `dataclasses.asdict` makes.
        keep: how many checkpoints to keep, the latest ones.
        save_every: the default of `fit`.
        allow_change: fields of `config` that may differ on resuming. Mind that `total_steps` also sets the
            length of a learning-rate decay.
        name_of: a function of a field's path, "model.depth", to what refusals call it; by default the path itself.

    Raises:
        ValueError: if `keep` or `save_every` is less than 1, or `config` is not JSON.
        OSError: if the folder cannot be made or written to.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        keep: int = 3,
        save_every: int = 1000,
        allow_change: Collection[str] = ALLOW_CHANGE,
        name_of: Callable[[str], str] | None = None,
    ):
        for name, value in (("keep", keep), ("save_every", save_every)):
            check_integer(name, value)
        if not isinstance(run_dir, str | os.PathLike):
            raise ValueError(f"run_dir must be a path, got {shown(run_dir)}.")
        if not isinstance(config, Mapping):
            raise ValueError(f"config must be a dict, such as dataclasses.asdict makes, got {shown(config)}.")
        if isinstance(allow_change, str):
            raise ValueError(f"allow_change must be several names, such as {{{allow_change!r}}}, got one string.")
        if name_of is not None:
            check_function("name_of", name_of, "a function of a field's path", 1)
        _silence_orbax()
        self.directory = Path(run_dir).absolute() / "checkpoints"
        self.save_every = save_every
        self._config = _through_json("config", dict(config), exact=False)
        self._allow_change = frozenset(allow_change)
        self._name_of = name_of or (lambda path: path)
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is a file, not a folder. Nothing was overwritten.")
        make_folder(self.directory)
        self._folder = hold(self.directory)
        # Orbax makes every folder above the one that it writes to. By this name there is none to make once it is gone.
        # Several processes agree on names, and these numbers are each one's own.
        held = Path(f"/proc/self/fd/{self._folder}")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_root_metadata=False)
        by_number = jax.process_count() == 1 and held.is_dir()
        self._manager = ocp.CheckpointManager(held if by_number else self.directory, options=options)
        self._started_from = self.latest_step()
        self._restored = False

    def latest_step(self) -> int | None:
        """Step of the latest checkpoint, or `None`."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.directory / str(step)

    def save(self, state: TrainState, key: Key, data_state: Mapping[str, Any]) -> None:
        """Copies the state to the host and writes it in the background; a step already saved is left alone.

        Args:
            state: as it comes from the step.
            key: the key of the run.
            data_state: position in the data; must survive JSON.

        Raises:
            CheckpointError: if the folder held checkpoints that this run did not restore, or was removed since; if this
                checkpoint, or the one before it, cannot be written, or someone else's has its name.
            ValueError: if `data_state` does not survive JSON.
        """
        check_train_state("state", state)
        check_key(key)
        if not isinstance(data_state, Mapping):
            raise ValueError(f"data_state must be a dict, as from data.get_state(), got {shown(data_state)}.")
        step = int(state.step)
        if self._started_from is not None and not self._restored:
            raise CheckpointError(
                f"{self.directory} already holds checkpoints, up to step {self._started_from}, that this run was not "
                "restored from. Call restore first, or take another --run-dir. Nothing was overwritten."
            )
        if step == self.latest_step():
            return
        # A copy, because the next step is given the state's memory.
        host = jax.tree.map(lambda x: np.array(x), state)
        body = {
            "step": step,
            "key": {"impl": str(jax.random.key_impl(key)), "data": np.asarray(jax.random.key_data(key)).tolist()},
            "data_state": _through_json("data_state", dict(data_state), exact=True),
            "config": self._config,
            "leaves": _describe(host),
        }
        meta = {"format": _FORMAT, "body": body, "crc32": _crc32_json(body)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(host), meta=ocp.args.JsonSave(meta))
        self._check_folder()
        if self.path(step).exists():
            raise CheckpointError(f"{self.path(step)} is there, and not of this run: move it away.")
        with self._writing():
            self._manager.save(step, args=args, force=True)

    def restore(self, template: TrainState) -> tuple[TrainState, Key, dict[str, Any]] | None:
        """Reads the latest checkpoint.

        Args:
            template: a state of this run's shapes, from `create_state`.

        Returns:
            The state, the key and the data position as they were saved, or `None` if there is no checkpoint. A leaf
            goes where the template's was committed, else to the default device.

        Raises:
            CheckpointError: if the checkpoint is damaged, has other arrays than `template`, or comes from a run with
                another configuration; if it, or another numbered folder beside it, was not written by `Checkpointer`.
        """
        check_train_state("template", template)
        self.wait()
        step = self.latest_step()
        if step is None:
            return None
        self._refuse_foreign()
        path = self.path(step)
        body = self._read_meta(step)
        self._check_config(path, body["config"])
        _check_leaves(path, body["leaves"], template)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)
        try:
            host = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(zeros))).state
            found = _describe(host)
        except Exception as error:
            raise self._damaged(path, f"its arrays cannot be read ({_brief(error)})") from error
        wrong = [name for name, (_, _, crc32) in found.items() if crc32 != body["leaves"][name][2]]
        if wrong:
            raise self._damaged(path, f"the checksum of {_some(wrong)} does not match")
        key = jax.random.wrap_key_data(jnp.array(body["key"]["data"], jnp.uint32), impl=body["key"]["impl"])
        self._restored = True
        return jax.tree.map(_place, host, template), key, body["data_state"]

    def wait(self) -> None:
        """Returns once the last checkpoint is on disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads."""
        with self._writing():
            self._manager.close()
        if self._folder is not None:  # kept open after an error: what is still being written goes by its number
            os.close(self._folder)
            self._folder = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of Orbax and its storage, in many classes
            self._check_folder()
            if any(_is_number(path.name) and _is_ours(path) for path in self.directory.iterdir()):
                then = "Those before it are as they were: once this is mended, the same command continues from the last"
            else:
                then = "There is none before it: once this is mended, the same command begins anew"
            raise CheckpointError(
                f"A checkpoint could not be written to {self.directory}: {_cause(error)}. {then}."
            ) from error

    def _check_folder(self) -> None:
        if self._folder is not None and not is_at(self._folder, self.directory):
            raise CheckpointError(
                f"{self.directory} was removed while the run was going on. Start the run again: it begins anew."
            )

    def _refuse_foreign(self) -> None:
        # Orbax takes every numbered folder for a checkpoint, and removes the older ones with all that is in them.
        numbered = (each for each in self.directory.iterdir() if _is_number(each.name) and each.is_dir())
        found = sorted(numbered, key=lambda path: int(path.name), reverse=True)
        for path in found:
            foreign = sorted(
                each.name for each in path.iterdir() if each.name not in _NAMES and each.name[0] not in "._"
            )
            if foreign and _is_ours(path):
                raise CheckpointError(
                    f"{path} holds {_some(foreign)}, which fm_jax did not write and would remove with the checkpoint: "
                    "move it out of that folder. Nothing was overwritten."
                )
            if foreign:
                raise CheckpointError(
                    f"{path} is not a checkpoint of fm_jax. Nothing was overwritten. Move it away, or take another "
                    "--run-dir."
                )
        if found and not _is_ours(found[0]):  # an older one may be half removed
            raise self._damaged(found[0], "there is no checkpoint in it")

    def _read_meta(self, step: int) -> dict[str, Any]:
        path = self.path(step)
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            written = meta["format"]
        except Exception as error:
            raise self._damaged(path, f"its description cannot be read ({_brief(error)})") from error
        if written != _FORMAT:
            raise CheckpointError(
                f"{path} has format {written!r}, and this version reads {_FORMAT!r}. Nothing was overwritten."
            )
        if _crc32_json(meta["body"]) != meta["crc32"]:
            raise self._damaged(path, "the checksum of its description does not match")
        return meta["body"]

    def _damaged(self, path: Path, reason: str) -> CheckpointError:
        before = [step for step in self._manager.all_steps() if self.path(step) != path]
        then = "continue from the checkpoint before it" if before else "begin anew"
        return CheckpointError(
            f"{path} is damaged: {reason}. Nothing was overwritten. Move that folder away to {then}."
        )

    def _check_config(self, path: Path, saved: Mapping[str, Any]) -> None:
        old, new = _flatten(saved), _flatten(self._config)
        for name in sorted({*old, *new}):
            before, now = old.get(name, _ABSENT), new.get(name, _ABSENT)
            if before == now or name in self._allow_change or name.split(".")[0] in self._allow_change:
                continue
            name = self._name_of(name)
            raise CheckpointError(
                f"{path} comes from a run with {name}={before}, and this run has {name}={now}. Restore the old "
                "value, or start anew with another --run-dir. Nothing was overwritten."
            )


def _describe(tree: TrainState) -> dict[str, list]:
    """Name of each leaf -> [shape, dtype, CRC-32 of its bytes]."""
    names, leaves = _named_leaves(tree)
    with ThreadPoolExecutor() as pool:  # zlib lets go of the interpreter lock
        sums = pool.map(lambda x: zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data), leaves)
        return {name: [list(x.shape), str(x.dtype), crc32] for name, x, crc32 in zip(names, leaves, sums, strict=True)}


def _named_leaves(tree: TrainState) -> tuple[list[str], list[Array]]:
    paths, leaves = zip(*jax.tree_util.tree_leaves_with_path(tree), strict=True)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths], list(leaves)


def _check_leaves(path: Path, saved: Mapping[str, list], template: TrainState) -> None:
    wanted = {name: [list(x.shape), str(x.dtype)] for name, x in zip(*_named_leaves(template), strict=True)}
    complaints = []
    if missing := sorted(wanted.keys() - saved.keys()):
        complaints.append(f"it lacks {_some(missing)}")
    if extra := sorted(saved.keys() - wanted.keys()):
        complaints.append(f"it holds {_some(extra)}, which this run has not")
    for name in wanted:
        if name in saved and saved[name][:2] != wanted[name]:
            (old_shape, old_dtype), (shape, dtype) = saved[name][:2], wanted[name]
            complaints.append(f"{name} is {old_dtype}{old_shape} there and {dtype}{shape} in this run")
            break
    if complaints:
        raise CheckpointError(
            f"{path} is a checkpoint of another model or optimiser: {'; '.join(complaints)}. Restore the old "
            "settings, or start anew with another --run-dir. Nothing was overwritten."
        )


def _place(host: np.ndarray, like: Array) -> Array:
    # jnp.array copies: memory that NumPy still owns could not be donated.
    return jax.device_put(host, like.sharding) if getattr(like, "committed", False) else jnp.array(host)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name))


def _is_ours(path: Path) -> bool:
    """Whether anything is left of what `Checkpointer.save` writes."""
    return (path / "meta" / "metadata").is_file() or (path / "state" / "_METADATA").is_file()


def _through_json(name: str, value: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    try:
        result = json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be JSON (dicts, lists, strings, numbers), got {value}: {error}.") from error
    if exact and result != value:
        raise ValueError(f"{name} must survive JSON (lists for tuples, string keys), got {value}.")
    return result


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        inner = isinstance(value, Mapping) and value
        flat.update(_flatten(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value})
    return flat


def _crc32_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _cause(error: Exception) -> str:
    """What the system said, which Orbax and its storage wrap in pages of their own."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error).startswith("NOT_FOUND: "):
        return "what was written of it is gone"
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else _brief(error)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _not_from_orbax(record: logging.LogRecord) -> bool:
    error, trace = record.exc_info[1:] if record.exc_info else (None, None)
    if record.name == "asyncio" and re.match("[A-Z_]+: ", str(error)):  # a status of TensorStore, without a traceback
        return False
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    return not any("orbax" in file for file in (record.pathname, *files))


def _silence_orbax() -> None:
    # Orbax narrates every save, and every error at the length of its stack; what a user must know is raised instead.
    # addFilter ignores repeats.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_not_from_orbax)
