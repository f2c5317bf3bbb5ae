"""Checkpoints that a run can be continued from bit for bit, and that refuse to be mistaken for another run's."""

import contextlib
import json
import logging
import os
import re
import secrets
import time
import traceback
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from fm_jax.checks import check_bool, check_function, check_integer, check_key, shown
from fm_jax.train.checksum import shard_sum
from fm_jax.train.folder import hold, is_at, make_folder
from fm_jax.train.state import TrainState, check_train_state
from fm_jax.types import Array, Key

ALLOW_CHANGE = frozenset({"total_steps", "num_steps", "log_every", "save_every", "sample_every"})
"""Configuration fields that a resumed run may change."""
_FORMAT, _WHOLE = "fm_jax 2", "fm_jax 1"  # the latter has a CRC-32 of each whole array
_CHUNK, _FILE = 2**26, 2**27  # bytes that are compressed at a time, and that are gathered before they are written
_PIECE = 2**21  # elements whose checksum is taken at a time
_AT_A_TIME = 2**28  # bytes that are read, or twice the largest array where that is more
_SECONDS = 600  # in which all of several processes must have written their files
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

    Arrays that are spread over devices are saved and restored shard by shard, onto whatever devices the template names.
    Several processes write one checkpoint together, each the shards that lie with it. All of them have to make the
    `Checkpointer`, and to call `save`, `restore` and `wait` alike; what one of them raises, all raise.

    Attributes:
        restored_devices: how many devices held the state that `restore` returned when it was saved; `None` before, and
            for a checkpoint of a version that did not say.
        restored_processes: how many processes there were then, likewise.

    Args:
        run_dir: folder of the run, created if absent; in several processes, one that all of them see.
        config: what determines the run; a JSON-like dict, such as `dataclasses.asdict` makes.
        keep: how many checkpoints to keep, the latest ones.
        save_every: the default of `fit`.
        allow_change: fields of `config` that may differ on resuming. Mind that `total_steps` also sets the
            length of a learning-rate decay.
        name_of: a function of a field's path, "model.depth", to what refusals call it; by default the path itself.
        data: what the data of the run are, such as {"num_images": 200, "classes": ["a", "b"], "checksum": "9f3a"}; a
            JSON-like dict. A checkpoint of other data is refused. `None`, like a checkpoint in which nothing is said of
            them, leaves nothing to compare.
        new_fields: values of fields of `config`, nested as it is, that a checkpoint of before there were these fields
            counts as having.
        read_only: only to restore, also from where nothing can be written; `save` is then refused.

    Raises:
        ValueError: if `keep` or `save_every` is less than 1, or `config` or `data` is not JSON.
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
        data: Mapping[str, Any] | None = None,
        new_fields: Mapping[str, Any] | None = None,
        read_only: bool = False,
    ):
        check_bool("read_only", read_only)
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
        if data is not None and not isinstance(data, Mapping):
            raise ValueError(f"data must be a dict that describes the data, or None, got {shown(data)}.")
        if new_fields is not None and not isinstance(new_fields, Mapping):
            raise ValueError(f"new_fields must be a dict of fields of config, or None, got {shown(new_fields)}.")
        _silence_orbax()
        self.directory = Path(run_dir).absolute() / "checkpoints"
        self.save_every = save_every
        self._config = through_json("config", dict(config), exact=False)
        self._data = None if data is None else through_json("data", dict(data), exact=False)
        self._new_fields = _flatten(through_json("new_fields", dict(new_fields or {}), exact=False))
        self._allow_change = frozenset(allow_change)
        self._name_of = name_of or (lambda path: path)
        self.restored_devices: int | None = None
        self.restored_processes: int | None = None
        with _one_verdict():
            if self.directory.exists() and not self.directory.is_dir():
                raise CheckpointError(f"{self.directory} is a file, not a folder. Nothing was overwritten.")
            if read_only and not self.directory.is_dir():
                raise CheckpointError(f"{self.directory} is not there: give the folder of a run.")
            if jax.process_index() == 0 and not read_only:
                make_folder(self.directory)
        if not read_only:
            _check_shared(self.directory)
        with _one_verdict():
            self._folder = hold(self.directory)
        # Orbax makes every folder above the one that it writes to. By this name there is none to make once it is gone.
        # Several processes agree on names, and these numbers are each one's own.
        held = Path(f"/proc/self/fd/{self._folder}")
        alone = jax.process_count() == 1
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            save_root_metadata=False,
            read_only=read_only,
            single_host_load_and_broadcast=not alone,  # the steps that process 0 sees
            async_options=ocp.AsyncOptions() if alone else ocp.AsyncOptions(timeout_secs=_SECONDS),
        )
        self._manager = ocp.CheckpointManager(
            held if alone and held.is_dir() else self.directory,
            options=options,
            item_handlers={"state": _handler(), "meta": ocp.JsonCheckpointHandler()},
        )
        self._read_only = read_only
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
            state: as it comes from the step. In several processes its arrays are global; one that each process holds
                for itself is saved by the first.
            key: the key of the run.
            data_state: position in the data; must survive JSON.

        Raises:
            CheckpointError: if the folder held checkpoints that this run did not restore, or was removed since; if this
                checkpoint, or the one before it, cannot be written, or someone else's has its name.
            ValueError: if `data_state` does not survive JSON.
        """
        with _one_verdict():
            if self._read_only:
                raise CheckpointError(f"{self.directory} was opened with read_only=True, and nothing is saved to it.")
            check_train_state("state", state)
            check_key(key)
            if not isinstance(data_state, Mapping):
                raise ValueError(f"data_state must be a dict, as from data.get_state(), got {shown(data_state)}.")
            step = int(state.step)
            if self._started_from is not None and not self._restored:
                raise CheckpointError(
                    f"{self.directory} already holds checkpoints, up to step {self._started_from}, that this run was "
                    "not restored from. Call restore first, or take another --run-dir. Nothing was overwritten."
                )
            if saved := step == self.latest_step():
                position = {}
            else:
                position = through_json("data_state", dict(data_state), exact=True)
                self._check_folder()
                if jax.process_index() == 0 and self.path(step).exists():
                    raise CheckpointError(f"{self.path(step)} is there, and not of this run: move it away.")
        if saved:
            return
        held = jax.tree.map(_held, state)
        names, leaves = _named_leaves(held)
        sums = _over_processes(_sums(leaves), leaves)
        body = {
            "step": step,
            "key": {"impl": str(jax.random.key_impl(key)), "data": np.asarray(jax.random.key_data(key)).tolist()},
            "data_state": position,
            "config": self._config,
            "data": self._data,
            "devices": len(state.step.sharding.device_set) if isinstance(state.step, jax.Array) else 1,
            "processes": jax.process_count(),
            "leaves": {
                name: [list(x.shape), str(x.dtype), int(each)]
                for name, x, each in zip(names, leaves, sums, strict=True)
            },
        }
        meta = {"format": _FORMAT, "body": body, "crc32": _crc32_json(body)}
        chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), held)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(held, save_args=chunks, ocdbt_target_data_file_size=_FILE),
            meta=ocp.args.JsonSave(meta),
        )
        with _one_verdict(), self._writing():
            self._manager.save(step, args=args, force=True)

    def restore(self, template: TrainState) -> tuple[TrainState, Key, dict[str, Any]] | None:
        """Reads the latest checkpoint, each process what goes to its devices.

        Args:
            template: a state of this run's shapes, from `create_state`, or `jax.ShapeDtypeStruct`s in its place.

        Returns:
            The state, the key and the data position as they were saved, or `None` if there is no checkpoint. A leaf
            goes where the template's was committed or where its `sharding` says, on whatever mesh, else to the default
            device.

        Raises:
            CheckpointError: if the checkpoint is damaged, has other arrays than `template`, or comes from a run with
                another configuration or on other data; if it, or another numbered folder beside it, was not written by
                `Checkpointer`.
        """
        check_train_state("template", template)
        self.wait()
        step = self.latest_step()
        if step is None:
            return None
        path = self.path(step)
        with _one_verdict():
            if jax.process_index() == 0:
                self._refuse_foreign()
            written, body = self._read_meta(step)
            self._check_config(path, body["config"])
            self._check_data(path, body.get("data"))
            _check_leaves(path, body["leaves"], template)
        with _one_verdict():
            state = self._read_state(path, template)
        names, leaves = _named_leaves(state)
        if written == _WHOLE:
            sums = [_crc32(x) for x in leaves]
        else:
            sums = _over_processes(_sums(leaves), leaves).tolist()
        with _one_verdict():
            found = [[list(x.shape), str(x.dtype), each] for x, each in zip(leaves, sums, strict=True)]
            if wrong := [name for name, each in zip(names, found, strict=True) if each != body["leaves"][name]]:
                raise self._damaged(path, f"the checksum of {_some(wrong)} does not match")
        key = jax.random.wrap_key_data(jnp.array(body["key"]["data"], jnp.uint32), impl=body["key"]["impl"])
        self._restored = True
        if self._data is None:  # which is not to be forgotten where it is not said again
            self._data = body.get("data")
        self.restored_devices, self.restored_processes = body.get("devices"), body.get("processes")
        return jax.tree.map(_anew, state), key, body["data_state"]

    def wait(self) -> None:
        """Returns once the last checkpoint is on disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        with _one_verdict(), self._writing():
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
            told = CheckpointError(
                f"A checkpoint could not be written to {self.directory}: {_cause(error)}. {last_good(self.directory)}"
            )
            if _of_system(error):  # told to the end: what Orbax and its threads were doing says no more
                raise told from None
            raise told from error

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

    def _read_meta(self, step: int) -> tuple[str, dict[str, Any]]:
        path = self.path(step)
        try:
            meta = json.loads((path / "meta" / "metadata").read_bytes())
            written = meta["format"]
        except Exception as error:
            raise self._damaged(path, f"its description cannot be read ({_brief(error)})") from error
        if written not in (_FORMAT, _WHOLE):
            raise CheckpointError(
                f"{path} has format {written!r}, and this version reads {_WHOLE!r} and {_FORMAT!r}. "
                "Nothing was overwritten."
            )
        if _crc32_json(meta["body"]) != meta["crc32"]:
            raise self._damaged(path, "the checksum of its description does not match")
        if written == _WHOLE and jax.process_count() > 1:
            raise CheckpointError(
                f"{path} has format {written!r}, whose checksums one process has to read, and there are "
                f"{jax.process_count()}: restore it in one process and save it there. Nothing was overwritten."
            )
        return written, meta["body"]

    def _read_state(self, path: Path, template: TrainState) -> TrainState:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), template)
        largest = max(np.prod(x.shape, dtype=int) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        args = ocp.args.PyTreeRestore(item=shapes, restore_args=jax.tree.map(_whereto, template))
        # Not by the manager, which waits for the other processes where one of them has raised an error.
        try:
            return _handler(max(_AT_A_TIME, 2 * largest + 1)).restore(path / "state", args=args)
        except Exception as error:
            raise self._damaged(path, f"its arrays cannot be read ({_brief(error)})") from error

    def _damaged(self, path: Path, reason: str) -> CheckpointError:
        before = [step for step in self._manager.all_steps() if self.path(step) != path]
        then = "continue from the checkpoint before it" if before else "begin anew"
        return CheckpointError(
            f"{path} is damaged: {reason}. Nothing was overwritten. Move that folder away to {then}."
        )

    def _check_config(self, path: Path, saved: Mapping[str, Any]) -> None:
        old, new = _flatten(saved), _flatten(self._config)
        for name in sorted({*old, *new}):
            before, now = old.get(name, self._new_fields.get(name, _ABSENT)), new.get(name, _ABSENT)
            if before == now or name in self._allow_change or name.split(".")[0] in self._allow_change:
                continue
            name = self._name_of(name)
            raise CheckpointError(
                f"{path} comes from a run with {name}={before}, and this run has {name}={now}. Restore the old "
                "value, or start anew with another --run-dir, with --init-from from these parameters. Nothing was "
                "overwritten."
            )

    def _check_data(self, path: Path, saved: Mapping[str, Any] | None) -> None:
        if saved is None or self._data is None:
            return
        old, new = _flatten(saved), _flatten(self._data)
        # In the order in which they are told, with the checksum, which says the least, at the end.
        names = sorted({**new, **old}, key=lambda name: "checksum" in name)
        differ = [name for name in names if not _is_same(old.get(name, _ABSENT), new.get(name, _ABSENT))]
        if not differ:
            return
        told = "; ".join(_difference(name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in differ)
        if all("checksum" in name for name in differ) and len(differ) < len(names):
            told += ", and all else that is known of them is the same: some were changed, or put in another order"
        raise CheckpointError(
            f"{path} comes from a run on other data: {told}. Restore the data, start anew in another folder "
            "(--run-dir), or begin a new run there from the parameters of this one (--init-from; in a program, restore "
            "them with data=None). Nothing was overwritten."
        )


def last_good(directory: Path) -> str:
    """Two sentences: which of the checkpoints in a folder is the last good one, and what the same command then does."""
    try:
        steps = [int(each.name) for each in directory.iterdir() if _is_number(each.name) and _is_ours(each)]
    except OSError:
        steps = []
    if not steps:
        return "There is no good step: once this is mended, the same command begins anew."
    return f"The last good step is {max(steps):,}: once this is mended, the same command continues from it."


def _handler(at_a_time: int = _AT_A_TIME) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of pytrees, which reads less than so many bytes at a time."""
    registry = ocp.type_handlers.create_type_handler_registry(
        # Replica 0 of each shard, as it lies on its device: a part of every replica would have to be cut out there.
        (jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)),
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    )
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry,
        handler_impl=ocp.BasePyTreeCheckpointHandler(
            type_handler_registry=registry,
            restore_concurrent_bytes=at_a_time,
            # What the checksum was taken of is written: to pinned memory it would be transferred once more.
            enable_pinned_host_transfer=False,
        ),
    )


def _held(x: Array) -> Array | np.ndarray:
    """What stays as it is while it is written, although the next step is given the state's memory."""
    alone = jax.process_count() == 1
    if not isinstance(x, jax.Array) or (x.is_fully_addressable and not alone):
        return np.array(x)
    if alone and x.is_fully_replicated:
        x = x.addressable_data(0)
    if x.sharding.memory_kind == "device" and next(iter(x.devices())).platform != "cpu":
        # Orbax has copied it to the host when its `save` returns: `transfer_arrays_to_host` comes before the first
        # thing that it does in the background.
        return _anew(x)
    return jax.device_put(x, x.sharding, may_alias=False)  # here NumPy and Orbax read the very memory of the device


def _anew(x: Array) -> Array:
    """The same memory under a new object, free of the host's copy or view that the old one keeps once it was read."""
    if not isinstance(x, jax.Array):
        return jnp.array(x)  # a copy: memory that NumPy still owns could not be donated
    return jax.make_array_from_single_device_arrays(x.shape, x.sharding, [each.data for each in x.addressable_shards])


def _whereto(like: Any) -> ocp.RestoreArgs:
    """How Orbax is to read a leaf: into a sharding, or to the host, from where it goes to the default device."""
    named = isinstance(like, jax.ShapeDtypeStruct) or getattr(like, "committed", False)
    if named and like.sharding is not None:
        return ocp.ArrayRestoreArgs(sharding=like.sharding, global_shape=like.shape, dtype=like.dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _sums(leaves: Sequence[Array]) -> np.ndarray:
    """[leaves] uint64, the sums over the shards of this process; each shard counts once, whatever its replicas."""
    shards = []
    for i, x in enumerate(leaves):
        if not isinstance(x, jax.Array):
            shards.append((i, x, (0,) * x.ndim))
            continue
        for each in x.addressable_shards:
            if each.replica_id == 0:
                each.data.copy_to_host_async()
                shards.append((i, each.data, tuple(part.start or 0 for part in each.index)))
    pieces = [(i, *each) for i, shard, start in shards for each in _pieces(np.asarray(shard), start)]
    sums = np.zeros(len(leaves), np.uint64)
    with ThreadPoolExecutor() as pool:  # NumPy lets go of the interpreter lock
        parts = pool.map(lambda i, piece, start: shard_sum(piece, start, leaves[i].shape), *zip(*pieces, strict=True))
        np.add.at(sums, [i for i, _, _ in pieces], np.array(list(parts), np.uint64))
    return sums


def _pieces(shard: np.ndarray, start: tuple[int, ...]) -> Iterator[tuple[np.ndarray, tuple[int, ...]]]:
    """A shard in pieces, each with the place of its first element."""
    if shard.size <= _PIECE:
        yield shard, start
        return
    axis = next(axis for axis, n in enumerate(shard.shape) if n > 1)
    for part, offset in zip(np.split(shard, [shard.shape[axis] // 2], axis), (0, shard.shape[axis] // 2), strict=True):
        yield from _pieces(part, (*start[:axis], start[axis] + offset, *start[axis + 1 :]))


def _over_processes(sums: np.ndarray, leaves: Sequence[Array]) -> np.ndarray:
    """[leaves] uint64, the sums over all shards: those of the other processes are added where an array is global."""
    if jax.process_count() == 1:
        return sums
    own = np.array([not isinstance(x, jax.Array) or x.is_fully_addressable for x in leaves])
    # Without jax_enable_x64 there are no integers of 64 bits.
    gathered = np.ascontiguousarray(multihost_utils.process_allgather(sums.view(np.uint32)))
    return np.where(own, sums, gathered.view(np.uint64).sum(axis=0))


def _crc32(x: Array) -> int:
    return zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def _one_verdict() -> Iterator[None]:
    """What one process raises in here, all raise; nothing in here may wait for another process."""
    if jax.process_count() == 1:
        yield
        return
    raised = None
    try:
        yield
    except Exception as error:
        raised = error
    said = np.zeros(2000, np.uint8)
    if raised is not None:
        text = (str(raised) or _brief(raised)).encode()[: said.size]
        said[: len(text)] = list(text)
    texts = multihost_utils.process_allgather(said)
    if raised is not None:
        raise raised
    for process, text in enumerate(texts):
        if text.any():
            raise CheckpointError(f"Process {process}: {bytes(text).rstrip(bytes(1)).decode(errors='replace')}")


def _check_shared(folder: Path, seconds: float = 10) -> None:
    """Refuses a folder that the processes do not share: one of the same name may be there, of another machine."""
    if jax.process_count() == 1:
        return
    number, first = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))), jax.process_index() == 0
    sign, end = folder / f".shared_{int(number):08x}", time.monotonic() + seconds
    with _one_verdict():
        if first:
            sign.touch()
    try:
        with _one_verdict():
            while not sign.exists():
                if time.monotonic() > end:
                    raise CheckpointError(
                        f"this is not the {folder} that process 0 writes to: give a --run-dir that all processes share."
                    )
                time.sleep(0.1)
    finally:
        if first:
            sign.unlink(missing_ok=True)


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


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and name == str(int(name))


def _is_ours(path: Path) -> bool:
    """Whether anything is left of what `Checkpointer.save` writes."""
    return (path / "meta" / "metadata").is_file() or (path / "state" / "_METADATA").is_file()


def through_json(name: str, value: dict[str, Any], *, exact: bool) -> dict[str, Any]:
    """A dict as it comes back from JSON; raises `ValueError` if it cannot, or with `exact` if it comes back another."""
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


def _is_same(before: Any, now: Any) -> bool:
    """Whether two JSON values are the same, of which NaN is not equal to itself."""
    return before == now or json.dumps(before) == json.dumps(now)


def _difference(name: str, before: Any, now: Any) -> str:
    """How a part of the description of data differs, in words: "200 images there and 201 here"."""
    lists = isinstance(before, list) and isinstance(now, list)
    if lists and all(isinstance(x, str) for x in (*before, *now)):  # of names there may be thousands
        gone, new = ([x for x in some if x not in other] for some, other in ((before, now), (now, before)))
        if not gone and not new:
            return f"{name} in another order" if len(before) == len(now) else f"{name} a different number of times"
        only = [f"{_some(names)} only {where}" for names, where in ((gone, "there"), (new, "here")) if names]
        return f"{name} {' and '.join(only)}"
    if name.startswith("num_") and _ABSENT not in (before, now):
        return f"{before} {name.removeprefix('num_').replace('_', ' ')} there and {now} here"
    return f"{name} {before} there and {now} here"


def _crc32_json(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _cause(error: Exception) -> str:
    """What the system said, which Orbax and its storage wrap in pages of their own."""
    return _of_system(error) or _brief(error)


def _of_system(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if str(error).startswith("NOT_FOUND: "):
        return "what was written of it is gone"
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else None


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
