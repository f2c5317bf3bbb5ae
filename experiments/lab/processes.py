"""The processes of one run: how they find each other, which of them writes, and what they compute together."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ParamSpec

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from experiments.lab.options import check_options, option
from fm_jax import __version__
from fm_jax.train.folder import lock_folder
from fm_jax.train.loop import DataIterator
from fm_jax.train.sharding import data_mesh
from fm_jax.types import Array, Batch, Params

SILENCE = 30
"""Seconds without a sign of life after which a process counts as dead, and the others end."""
LAUNCHERS: dict[str, Callable[[Mapping[str, str]], bool]] = {
    "SLURM": lambda env: "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", 1)) > 1,
    "Open MPI": lambda env: int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1,
    "Kubernetes": lambda env: "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env,
    "Cloud TPU": lambda env: env.get("JAX_PLATFORMS") != "cpu" and bool(find_spec("libtpu")) and _has_tpu(),
}
"""Whether the environment is one where `jax.distributed.initialize()` finds the processes by itself."""
P = ParamSpec("P")


def _has_tpu() -> bool:
    return any([*Path("/dev").glob("accel*"), *Path("/dev").glob("vfio/[0-9]*")])


@dataclass(frozen=True)
class Processes:
    """Several processes that run one experiment. On SLURM, Cloud TPU and Kubernetes none of this is needed."""

    coordinator: str | None = None
    """HOST:PORT of process 0, the same on all."""
    num_processes: int | None = None
    """How many there are; 1 runs alone, wherever it is."""
    process_id: int | None = None
    """Which one this is, from 0."""

    def __post_init__(self) -> None:
        check_options(self, process_id=0)
        if self.num_processes == 1 and self.coordinator is None and self.process_id in (None, 0):
            return
        given = [self.coordinator, self.num_processes, self.process_id]
        if any(each is not None for each in given) and None in given:
            raise ValueError("--coordinator, --num-processes and --process-id go together: give all three, or none.")
        if self.coordinator is not None:
            port = re.fullmatch(r"\S+:(\d{1,5})", self.coordinator)
            if port is None or not 0 < int(port[1]) < 2**16:
                raise ValueError(f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234, got {self.coordinator}.")
        if self.process_id is not None and self.process_id >= self.num_processes:
            raise ValueError(
                f"--process-id must be from 0 to {self.num_processes - 1}, one of --num-processes, got "
                f"{self.process_id}."
            )


def connect(processes: Processes) -> None:
    """Joins the processes of the run, before JAX looks for devices. Only the first goes on talking.

    Raises:
        RuntimeError: if they do not find each other.
    """
    found = [name for name, is_there in LAUNCHERS.items() if is_there(os.environ)]
    if processes.num_processes == 1 or (processes.coordinator is None and not found):
        return
    try:
        jax.distributed.initialize(
            processes.coordinator,
            processes.num_processes,
            processes.process_id,
            heartbeat_timeout_seconds=SILENCE,
            # The others wait for the first, which draws and writes.
            shutdown_timeout_seconds=3600,
        )
    except Exception as error:  # of many classes
        where = f"through {found[0]}" if processes.coordinator is None else f"at {processes.coordinator}"
        told = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"The processes did not find each other {where}: {told} (--num-processes 1 runs alone.)"
        ) from error
    if jax.process_count() == 1:
        return
    print(
        f"{jax.process_count()} processes with {jax.device_count()} devices. When one ends before the others, JAX ends "
        f"them within {SILENCE} s, saying that another task died; the same command on all continues from the last "
        "checkpoint.",
        flush=True,
    )
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def check_same(config: Any) -> None:
    """Refuses processes with other options, other versions, or unequal numbers of devices.

    Raises:
        ValueError: in every process; it names what differs where it does.
    """
    count, here = jax.process_count(), jax.local_device_count()
    if count == 1:
        return
    if here * count != jax.device_count():
        raise ValueError(f"All processes must have as many devices, got {here} of {jax.device_count()} here.")
    own = {"jax": jax.__version__, "fm_jax": __version__} | _leaves(dataclasses.asdict(config))
    first = from_first(lambda: own)
    other = [name for name in {**first, **own} if own.get(name) != first.get(name)]
    differs = multihost_utils.process_allgather(np.int32(bool(other)))
    if differs.any():
        which = ", ".join(map(str, np.flatnonzero(differs)))
        told = f"which process {which} was not, and says so" if is_first() else "as others were not"
        if other:
            told = "got " + ", ".join(f"{name} {own.get(name)} in place of {first.get(name)}" for name in other)
        raise ValueError(f"All processes must be given the same options as process 0, {told}.")


def _leaves(tree: dict[str, Any], within: str = "") -> dict[str, str]:
    """The values of nested options, as they are typed; not where the data are, which may differ."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{within}{name} ")
        elif name != "data_dir":
            found[f"{within}{option(name)}"] = str(value)
    return found


def end_by_sigterm() -> None:
    """SIGTERM, which JAX has put off since the processes met, ends this one from here on, and the others follow."""
    if jax.process_count() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def ending_all() -> Iterator[None]:
    """Ends a process that has failed at once, for the others to end too, where it would wait for them."""
    try:
        yield
    except BaseException as error:
        orderly = isinstance(error, SystemExit) and error.code in (None, 0, 128 + signal.SIGTERM)
        if orderly or jax.process_count() == 1:
            raise
        told = str(error.code) if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        print(f"Process {jax.process_index()}: {told}", file=sys.stderr, flush=True)
        if is_first():  # which the others depend on to tell what they have to
            time.sleep(2)
        os._exit(1)


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def by_first(function: Callable[P, None]) -> Callable[P, None]:
    """A function that only the first process runs: it writes."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_first():
            function(*args, **kwargs)

    return run


def wait_for_all(where: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def from_first(function: Callable[[], Any]) -> Any:
    """What the function returns in the first process, JSON values, in all of them."""
    if jax.process_count() == 1:
        return function()
    told = json.dumps(function()).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(told)] = np.frombuffer(told, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


@contextlib.contextmanager
def own_folder(folder: Path) -> Iterator[None]:
    """Makes the folder of a run, and keeps other runs out."""
    with lock_folder(folder) if is_first() else contextlib.nullcontext():
        wait_for_all("the folder of the run")
        yield
        wait_for_all("the end of the run")


def mean_of_shares(function: Callable[..., np.ndarray], *arrays: np.ndarray) -> float:
    """The mean of `function(*arrays)`, an array [batch], of which each process computes its rows."""
    rows = slice(jax.process_index(), None, jax.process_count())
    found = function(*(x[rows] for x in arrays)) if len(arrays[0][rows]) else np.zeros(0)
    total = np.float32(np.sum(found))
    return float(np.sum(multihost_utils.process_allgather(total))) / len(arrays[0])


def own_rows(x: Any) -> Any:
    """The rows that this process has of an array [batch, ...] that all processes make alike."""
    index, count = jax.process_index(), jax.process_count()
    return x[index * len(x) // count : (index + 1) * len(x) // count]


class Share:
    """The rows that this process has of the batches of data that all processes make alike."""

    def __init__(self, data: DataIterator):
        self._data = data
        self.get_state, self.set_state = data.get_state, data.set_state

    def __iter__(self) -> "Share":
        return self

    def __next__(self) -> Batch:
        return jax.tree.map(own_rows, next(self._data))


def spread(x: Array | np.ndarray) -> Array:
    """An array that all processes have, [batch, ...], with the batch over all devices.

    Where they do not divide it, it is filled up with its first rows.
    """
    missing = -len(x) % jax.device_count()
    return _placed(np.resize(x, (len(x) + missing, *x.shape[1:])) if missing else x, PartitionSpec("data"))


def everywhere(tree: Params) -> Params:
    """Arrays, of this process or of all, cut or not, whole on every device."""
    return _placed(tree, PartitionSpec())


def gathered(x: Array) -> Any:
    """A whole array, on the host of each process."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _placed(tree: Any, spec: PartitionSpec) -> Any:
    if jax.device_count() == 1:
        return tree

    def of_all(x: Any) -> Array | np.ndarray:
        there = isinstance(x, jax.Array) and len(x.sharding.device_set) == jax.device_count()
        return x if there else np.asarray(x)

    return jax.device_put(jax.tree.map(of_all, tree), NamedSharding(data_mesh(), spec))
