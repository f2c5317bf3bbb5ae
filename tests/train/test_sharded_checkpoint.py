"""States that are spread over devices, saved by some and restored by others."""

import ctypes
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from fm_jax.train.checkpoint import Checkpointer, CheckpointError
from fm_jax.train.state import TrainState

SCRIPT = Path(__file__).with_name("sharded_script.py")
CONFIG = {"a": 1}
KEY = jax.random.key(3)


def mesh(*shape):
    return Mesh(np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape), ("a", "b")[: len(shape)])


def make_state(place=jnp.array, width=12):
    """Of any bits, from the host: cutting up what is on a device would quiet the NaNs among them."""
    bits = np.random.default_rng(0).integers(0, 2**32, (8, width), dtype=np.uint32)
    params = {
        "w": bits.view(np.float32),
        "half": bits.view(jnp.bfloat16),
        "mask": bits % 2 == 0,
        "bytes": bits.view(jnp.float8_e4m3fn),
    }
    return jax.tree.map(place, TrainState(np.array(7, np.int32), params, (np.arange(8, dtype=np.int8),), {}))


def on(mesh, *spec):
    """The sharding of each leaf: as many axes as it has of the spec."""
    return lambda x: NamedSharding(mesh, PartitionSpec(*spec[: x.ndim]))


def placed(sharding_of, **options):
    return make_state(lambda x: jax.device_put(x, sharding_of(x)), **options)


def described(sharding_of, **options):
    return make_state(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), **options)


def same(state, other):
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    return all(a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def save(folder, state):
    checkpointer = Checkpointer(folder, CONFIG)
    checkpointer.save(state, KEY, {"position": 7})
    checkpointer.close()


def restore(folder, template):
    checkpointer = Checkpointer(folder, CONFIG)
    try:
        state, _, position = checkpointer.restore(template)
        assert position == {"position": 7}
        return state, checkpointer
    finally:
        checkpointer.close()


LAYOUTS = {
    "4": lambda: on(mesh(4), "a"),
    "2x2": lambda: on(mesh(2, 2), "b", "a"),
    "columns": lambda: on(mesh(2, 2), None, "a"),
    "2": lambda: on(mesh(2), "a"),
    "replicated": lambda: on(mesh(4)),
    "one device": lambda: lambda x: SingleDeviceSharding(jax.devices()[-1]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder for each layout that the state was saved in."""
    folders = {}
    for name in ("4", "2x2", "columns", "replicated"):
        folders[name] = tmp_path_factory.mktemp("saved")
        save(folders[name], placed(LAYOUTS[name]()))
    return folders


@pytest.mark.slow_but_one
@pytest.mark.parametrize("to", LAYOUTS)
def test_restored_onto_another_mesh(to, saved):
    sharding_of = LAYOUTS[to]()
    for name, folder in saved.items():
        for template in (described(sharding_of), placed(sharding_of)):
            state, checkpointer = restore(folder, template)
            assert all(x.sharding == sharding_of(x) and x.committed for x in jax.tree.leaves(state))
            assert same(state, make_state())
            assert (checkpointer.restored_devices, checkpointer.restored_processes) == (4, 1), name


def test_leaves_without_a_place_go_to_the_default_device(saved):
    for template in (make_state(), jax.eval_shape(make_state)):
        state, _ = restore(saved["2x2"], template)
        assert same(state, make_state())
        assert all(x.devices() == {jax.devices()[0]} and not x.committed for x in jax.tree.leaves(state))


def test_the_same_checksums_whatever_the_cut(saved):
    found = {
        str(json.loads((folder / "checkpoints" / "7" / "meta" / "metadata").read_text())["body"]["leaves"])
        for folder in saved.values()
    }
    assert len(found) == 1


DAMAGED = r"is damaged: (the checksum of params/[a-z]+ does not match|its arrays cannot be read)"
"""Leaves that are compressed are found out by decompressing them, where the bit that is flipped lies in one."""


def damage(folder):
    """Flips one bit among the numbers."""
    files = [path for path in (folder / "checkpoints" / "7" / "state").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("saver", ["4", "2x2", "replicated"])
def test_damage_is_noticed_whatever_the_cut(saver, tmp_path):
    save(tmp_path, placed(LAYOUTS[saver](), width=6000))
    damage(tmp_path)
    for name in ("4", "2x2", "one device"):
        with pytest.raises(CheckpointError, match=DAMAGED):
            restore(tmp_path, described(LAYOUTS[name](), width=6000))


def test_what_is_written_is_a_copy(tmp_path):
    """The next step is given the state's memory: here it is overwritten at once."""
    for name in ("2x2", "replicated", "one device"):
        checkpointer, sharding_of = Checkpointer(tmp_path / name, CONFIG), LAYOUTS[name]
        bits = np.random.default_rng(0).integers(0, 2**32, (512, 4096), dtype=np.uint32)
        state = TrainState(jnp.int32(1), {"w": jax.device_put(bits.copy(), sharding_of()(bits))}, (), {})
        checkpointer.save(state, KEY, {})
        for each in state.params["w"].addressable_shards:
            ctypes.memset(each.data.unsafe_buffer_pointer(), 255, each.data.nbytes)
        restored = checkpointer.restore(state)[0]
        checkpointer.close()
        np.testing.assert_array_equal(restored.params["w"], bits)
        step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
        state = jax.block_until_ready(step(restored))
        if jax.__version_info__ < (0, 11):  # later ones copy shards that the host has looked at: more memory, once
            assert restored.params["w"].is_deleted()
        np.testing.assert_array_equal(state.params["w"], bits + np.uint32(1))


def save_in_the_first_format(folder, state):
    """As versions did that held the whole state on the host, with a CRC-32 of each array."""
    host = jax.tree.map(np.array, state)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(host)]
    leaves = {
        path: [list(x.shape), str(x.dtype), zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)]
        for path, x in zip(paths, jax.tree.leaves(host), strict=True)
    }
    body = {
        "step": int(host.step),
        "key": {"impl": str(jax.random.key_impl(KEY)), "data": np.asarray(jax.random.key_data(KEY)).tolist()},
        "data_state": {"position": 7},
        "config": CONFIG,
        "leaves": leaves,
    }
    meta = {"format": "fm_jax 1", "body": body, "crc32": zlib.crc32(json.dumps(body, sort_keys=True).encode())}
    manager = ocp.CheckpointManager(
        folder / "checkpoints", options=ocp.CheckpointManagerOptions(save_root_metadata=False)
    )
    manager.save(7, args=ocp.args.Composite(state=ocp.args.StandardSave(host), meta=ocp.args.JsonSave(meta)))
    manager.close()


def test_the_first_format_is_read(tmp_path):
    save_in_the_first_format(tmp_path, make_state(width=6000))
    for template in (make_state(width=6000), described(LAYOUTS["2x2"](), width=6000)):
        state, checkpointer = restore(tmp_path, template)
        assert same(state, make_state(width=6000))
        assert checkpointer.restored_devices is checkpointer.restored_processes is None
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=DAMAGED):
        restore(tmp_path, make_state(width=6000))
    assert os.listdir(tmp_path / "checkpoints") == ["7"]


def together(processes, run_dir, *options, limit=None):
    """What each of several processes printed, run over loopback at once; the limit is one of MB on the data of each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # Threads with small stacks and one heap for all, so that little is reserved without being used.
    within = [] if limit is None else ["sh", "-c", f'ulimit -s 2048 -d {limit * 1024}; exec "$@"', "sh"]
    environment = os.environ if limit is None else {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [*within, sys.executable, str(SCRIPT), str(run_dir), *map(str, options), "--address", address]
    started = [
        subprocess.Popen(
            [*command, "--processes", str(processes), "--process", str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for i in range(processes)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), outputs
    return [[json.loads(line) for line in output.splitlines() if line.startswith("{")] for output in outputs]


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    """It is there for each of the processes, and not the same: their parts would be lost."""
    for refused, _ in together(2, tmp_path, "apart", "--mesh", "2", "--spec", "a,None"):
        assert re.search("this is not the .* that process 0 writes to", refused["refused"])
        assert "give a --run-dir that all processes share" in refused["refused"]
        assert refused["left"] == []


@pytest.mark.slow
def test_no_process_ever_holds_the_whole_state(tmp_path):
    """1200 MB by processes that may have 1100 MB each; restored by fewer, with the arrays cut the other way."""
    size, limit = 1200, 1100
    saved = together(6, tmp_path, "save", "--mesh", "3x2", "--spec", "a,b", "--megabytes", size, limit=limit)
    for latest, peak in saved:
        assert latest == {"latest": 7}
        assert peak["peak"] < limit
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 0.95 * size * 2**20
    restored = together(4, tmp_path, "restore", "--mesh", "2x2", "--spec", "b,a", "--megabytes", size, limit=limit)
    expected = {"step": 7, "wrong": [], "placed": True, "same_key": True, "position": {"position": 7}}
    for found, peak in restored:
        assert found == {**expected, "devices": 6, "processes": 6}
        assert peak["peak"] < limit
    shutil.rmtree(tmp_path / "checkpoints")


@pytest.mark.slow
def test_all_processes_come_to_one_verdict(tmp_path):
    layout = ("--mesh", "2x1", "--spec", "a,None", "--megabytes", 8)
    actions = ("save_bad", "save_local", "other", "restore", "restore")
    first, second = together(2, tmp_path / "run", *actions, *layout)
    bad = "data_state must survive JSON (lists for tuples, string keys), got {'position': (7,)}."
    assert (first[0], second[0]) == ({"refused": f"Process 1: {bad}"}, {"bad": bad})
    assert first[1] == second[1] == {"latest": 7}
    assert "comes from a run with a=1, and this run has a=2" in second[2]["refused"]
    assert first[2]["refused"] == f"Process 1: {second[2]['refused']}"
    for restored in (*first[3:5], *second[3:5]):
        assert restored["wrong"] == []
        assert restored["placed"]
        assert restored["processes"] == 2

    # One process of four devices reads what two processes wrote.
    folder = tmp_path / "run" / "checkpoints"
    leaves = json.loads((folder / "7" / "meta" / "metadata").read_text())["body"]["leaves"]
    spread = on(mesh(2, 2), "b", "a")
    structs = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype, _) in leaves.items()}
    structs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread(x)) for name, x in structs.items()}
    params = {name.removeprefix("params/"): x for name, x in structs.items() if name != "step"}
    state, checkpointer = restore(tmp_path / "run", TrainState(structs["step"], params, (), {}))
    assert all(x.sharding == spread(x) for x in jax.tree.leaves(state))
    assert (checkpointer.restored_devices, checkpointer.restored_processes) == (1, 2)

    # What only one of them reads.
    path = max((folder / "7" / "state" / "ocdbt.process_1" / "d").iterdir(), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], data[: len(data) // 2] + b"\x00" * 64 + data[len(data) // 2 + 64 :]):
        path.write_bytes(damaged)
        found = [refused["refused"] for refused, _ in together(2, tmp_path / "run", "restore", *layout)]
        assert all(re.search(r"is damaged: (the checksum of|its arrays cannot be read)", each) for each in found), found
    path.write_bytes(data)

    (folder / "5").mkdir()
    (folder / "5" / "thesis.tex").write_text("mine")
    first, second = together(2, tmp_path / "run", "restore", *layout)
    assert "checkpoints/5 is not a checkpoint of fm_jax" in first[0]["refused"]
    assert second[0]["refused"] == f"Process 0: {first[0]['refused']}"

    save_in_the_first_format(tmp_path / "old", make_state())
    for refused, _ in together(2, tmp_path / "old", "restore", *layout):
        assert "restore it in one process and save it there" in refused["refused"]
