"""A run that was killed, terminated and interrupted ends where an unbroken one does, bit for bit."""

import importlib.util
import json
import os
import random
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
