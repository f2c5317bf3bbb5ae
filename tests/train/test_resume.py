"""A run that was killed, terminated and interrupted ends where an unbroken one does, bit for bit."""

import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fm_jax.train.checkpoint import Checkpointer
from fm_jax.train.log import TIMING_FIELDS, read_metrics

SCRIPT = Path(__file__).with_name("train_script.py")


def load_script():
    spec = importlib.util.spec_from_file_location("train_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(run_dir, *options):
    root = SCRIPT.parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(SCRIPT), str(run_dir), *map(str, options)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def committed(run_dir):
    folder = run_dir / "checkpoints"
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()} if folder.exists() else set()


def interrupt(run_dir, signum, delay):
    """Runs until a new checkpoint is there and `delay` seconds longer; returns the exit code and the output."""
    hold = run_dir.with_name("hold")
    hold.touch()
    before, process = committed(run_dir), start(run_dir, "--hold", hold)
    deadline = time.monotonic() + 60
    while not committed(run_dir) - before:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint within a minute"
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signum)
    hold.unlink()
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


def final_state(script, run_dir):
    checkpointer = Checkpointer(run_dir, script.CONFIG)
    state, key, data_state = checkpointer.restore(script.build()[1])
    checkpointer.close()
    return state, key, data_state


def untimed(run_dir):
    return [{name: x for name, x in row.items() if name not in TIMING_FIELDS} for row in read_metrics(run_dir)]


@pytest.mark.slow
def test_killed_terminated_and_interrupted_run_equals_the_unbroken_one(tmp_path):
    script = load_script()
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    reference = start(unbroken)
    rng = random.Random(2024)

    code, output = interrupt(broken, signal.SIGKILL, rng.uniform(0.0, 0.3))
    assert code == -signal.SIGKILL, output

    for signum, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        code, output = interrupt(broken, signum, rng.uniform(0.0, 0.1))
        assert code == 128 + signum, output
        latest = max(committed(broken))
        assert f"{name}: saved {broken / 'checkpoints' / str(latest)}. Run the same command to continue." in output
        meta = json.loads((broken / "checkpoints" / str(latest) / "meta" / "metadata").read_text())
        assert meta["body"]["data_state"] == {"position": latest}

    last = start(broken)
    assert (last.wait(timeout=60), reference.wait(timeout=60)) == (0, 0), (last.stdout.read(), reference.stdout.read())
    last_output, reference_output = last.stdout.read(), reference.stdout.read()
    assert "step 240/240  loss" in last_output
    assert "step 5/240  loss" in reference_output
    assert "step 5/240" not in last_output
    assert "WARNING" not in reference_output + last_output
    assert "Warning" not in reference_output + last_output

    (state, key, data_state), (other, other_key, other_data) = (
        final_state(script, unbroken),
        final_state(script, broken),
    )
    assert int(state.step) == script.NUM_STEPS
    assert data_state == other_data == {"position": script.NUM_STEPS}
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes())
    assert key.dtype == other_key.dtype
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(other_key))
    assert untimed(unbroken) == untimed(broken)
    assert [row["step"] for row in untimed(broken)] == list(range(5, 241, 5))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    process = start(run_dir)
    assert process.wait(timeout=120) == 0, process.stdout.read()
    return run_dir


def finish(run_dir, unbroken):
    """Continues a run to its end, and compares it with the unbroken one bit for bit; returns what it printed."""
    last = start(run_dir)
    output = last.communicate(timeout=120)[0]
    assert last.returncode == 0, output
    assert_same(run_dir, unbroken)
    return output


def assert_same(run_dir, unbroken):
    script = load_script()
    (state, key, data_state), (other, other_key, other_data) = (
        final_state(script, folder) for folder in (unbroken, run_dir)
    )
    assert int(state.step) == script.NUM_STEPS
    assert data_state == other_data
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(other_key))
    assert untimed(run_dir) == untimed(unbroken)


def held(run_dir, *options):
    """A run that waits for its data, its checkpoints but the last few written; and the file that holds it."""
    hold = run_dir.with_name("hold")
    hold.touch()
    process = start(run_dir, "--hold", hold, *options)
    deadline = time.monotonic() + 60
    while max(committed(run_dir), default=0) < 192:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    return process, hold


def ended(process, hold):
    if hold.exists():
        hold.unlink()
    output = process.communicate(timeout=60)[0]
    assert "Traceback" not in output, output
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "code", "message"),
    [
        ([signal.SIGKILL], -signal.SIGKILL, ""),
        ([signal.SIGTERM], 128 + signal.SIGTERM, "SIGTERM: saved "),
        ([signal.SIGHUP], 128 + signal.SIGHUP, "SIGHUP: saved "),
        ([signal.SIGINT], 128 + signal.SIGINT, "SIGINT: saved "),
        ([signal.SIGTERM, signal.SIGTERM], 128 + signal.SIGTERM, "SIGTERM: saved "),
        ([signal.SIGHUP, signal.SIGHUP], 128 + signal.SIGHUP, "SIGHUP: saved "),
        ([signal.SIGINT, signal.SIGINT], 128 + signal.SIGINT, ""),
        ([signal.SIGTERM, signal.SIGINT], 128 + signal.SIGINT, ""),
        ([signal.SIGTERM, signal.SIGKILL], -signal.SIGKILL, ""),
    ],
    ids=lambda x: "-".join(each.name for each in x) if isinstance(x, list) else None,
)
def test_each_signal_once_and_twice(signals, code, message, tmp_path, unbroken):
    process, hold = held(tmp_path / "run")
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.2)
    found, output = ended(process, hold)
    assert found == code, output
    assert message in output
    assert not (tmp_path / "run" / ".lock").exists() or found < 0
    assert "step 5/240" not in finish(tmp_path / "run", unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-log"]], ids=["metrics", "checkpoint"])
@pytest.mark.parametrize("batch", [20, 119, 239])
def test_full_disk(options, batch, tmp_path, unbroken):
    """No room for the next line, or the next checkpoint, from the last one on too."""
    run_dir = tmp_path / "run"
    process = start(run_dir, "--full-at", batch, *options)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "Traceback" not in output
    assert "never" not in output, "retrieved, or awaited"
    last = output.splitlines()[-1]
    assert re.match(r"(A checkpoint could not be written to \S+: )?File too large", last), output
    before = committed(run_dir)
    assert batch == 20 or before
    if options:  # the metrics of an unbroken run are what it lacks
        shutil.copy(unbroken / "metrics.jsonl", run_dir)
    finish(run_dir, unbroken)


@pytest.mark.slow
def test_folder_removed(tmp_path, unbroken):
    process, hold = held(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    code, output = ended(process, hold)
    assert code == 1
    assert "was removed while the run was going on. Start the run again: it begins anew." in output.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    assert "step 5/240" in finish(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_foreign_files(tmp_path, unbroken):
    process, hold = held(tmp_path / "run")
    process.kill()
    ended(process, hold)
    foreign = {
        ".lock": b"\x00",
        "notes.txt": b"mine",
        "checkpoints/notes.txt": b"mine",
        "checkpoints/200": b"mine",
        "tensorboard/notes": b"mine",
        ".unfinished-metrics.jsonl": b"half",
    }
    for name, content in foreign.items():
        (tmp_path / "run" / name).write_bytes(content)
    metrics = tmp_path / "run" / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(
        b"".join([*lines[:3], b"a note\n", *lines[3:], b'{"step": "a"}\n', b"\xff\x00\n", lines[-1][:20]])
    )
    assert "step 5/240" not in finish(tmp_path / "run", unbroken)
    assert all(line in metrics.read_bytes() for line in (b"a note\n", b'\n{"step": "a"}\n', b"\n\xff\x00\n"))
    assert (tmp_path / "run" / "checkpoints" / "notes.txt").read_bytes() == b"mine"


@pytest.mark.slow
@pytest.mark.parametrize("time_of_ten", range(10))
def test_two_starts_at_once(time_of_ten, tmp_path, unbroken):
    hold = tmp_path / "hold"
    hold.touch()
    processes = [start(tmp_path / "run", "--hold", hold) for _ in range(2)]
    deadline = time.monotonic() + 120
    while all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline, "both run"
        time.sleep(0.01)
    hold.unlink()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 1], outputs
    running = processes[codes.index(0)]
    refused = outputs[codes.index(1)]
    assert f"is in use by process {running.pid} on " in refused
    assert "Traceback" not in refused
    assert_same(tmp_path / "run", unbroken)
