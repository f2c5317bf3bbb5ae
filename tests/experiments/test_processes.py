"""Experiments under several processes over loopback: the same run, stopped, killed, resumed on other numbers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.lab.processes import LAUNCHERS, Processes, from_first, gathered, mean_of_shares, spread
from fm_jax.train.log import read_metrics

pytestmark = pytest.mark.xdist_group("processes")  # which meet late, and give up, where many start at once
ROOT = Path(__file__).parents[2]
DIGITS = (
    *("experiments.digits", "--model", "smoke_unet", "--num-images", "200", "--num-samples", "20", "--frames", "3"),
    *("--sample-batch", "12", "--solver", "euler", "--steps", "2", "--batch-size", "24", "--warmup-steps", "0"),
    *("--log-every", "5", "--sample-every", "1000", "--decay", "constant"),
)
TOKENS = (
    *("experiments.sudoku", "--width", "64", "--depth", "1", "--num-samples", "16", "--steps", "2", "--per-step", "8"),
    *("--batch-size", "24", "--decay", "constant"),
)
TOY = ("experiments.toy2d", "--width", "128", "--num-samples", "50", "--frames", "3", "--batch-size", "24")


def start(
    arguments: tuple[str, ...], run_dir: Path, processes: int = 1, devices: int = 1, last: tuple[str, ...] = ()
) -> list[subprocess.Popen]:
    """Starts every process of a run, the last with more options; what each says is in a file beside the run folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", *arguments, "--run-dir", str(run_dir)]
    if processes > 1:
        command += ["--coordinator", address, "--num-processes", str(processes)]
    started = []
    for index in range(processes):
        with open(f"{run_dir}.{index}", "w") as said:
            which = ["--process-id", str(index)] if processes > 1 else []
            which += last if index == processes - 1 else ()
            options = {"cwd": ROOT, "env": environment, "stdout": said, "stderr": subprocess.STDOUT}
            started.append(subprocess.Popen([*command, *which], **options))
    return started


def run(arguments: tuple[str, ...], run_dir: Path, processes: int = 1, devices: int = 1) -> str:
    """Runs to the end; returns what the first process said."""
    started = start(arguments, run_dir, processes, devices)
    codes = [process.wait(timeout=300) for process in started]
    said = Path(f"{run_dir}.0").read_text()
    assert codes == [0] * processes, said + Path(f"{run_dir}.{processes - 1}").read_text()
    return said


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(run_dir)}


def wait_for_step(run_dir: Path, step: int, started: list[subprocess.Popen]) -> None:
    """Returns once a step was logged, while all processes are running."""
    for _ in range(1200):
        assert all(process.poll() is None for process in started), Path(f"{run_dir}.0").read_text()
        if (run_dir / "metrics.jsonl").exists() and any(row["step"] >= step for row in read_metrics(run_dir)):
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step}: " + Path(f"{run_dir}.0").read_text())


def assert_same_run(one: Path, other: Path, rtol: float = 1e-4) -> None:
    found, wanted = losses(one), losses(other)
    assert found.keys() == wanted.keys()
    np.testing.assert_allclose([*found.values()], [*wanted.values()], rtol=rtol)


def test_no_experiment_computes_before_processes_have_met():
    """JAX refuses to bring them together after its first computation, which so must not be at an import."""
    names = [path.stem for path in sorted((ROOT / "experiments").glob("*.py")) if path.stem != "__init__"]
    assert {"digits", "sudoku", "tokens2d"} <= {*names}
    code = (
        "import importlib\nfrom jax._src import xla_bridge\n"
        f"for name in {names}:\n"
        "    importlib.import_module('experiments.' + name)\n"
        "    assert not xla_bridge.backends_are_initialized(), name"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "processes", "devices", "alone_on"),
    [("shard_map", 2, 2, 4), ("fsdp", 2, 2, 1), ("fsdp", 4, 1, 2)],
    ids=["shard_map, 2 of 2 devices", "fsdp, 2 of 2 devices", "fsdp, 4 of 1 device"],
)
def test_several_processes_are_one_run(tmp_path, parallel, processes, devices, alone_on):
    arguments = (*DIGITS, "--parallel", parallel, "--total-steps", "20", "--save-every", "20", "--flip")
    run(arguments, tmp_path / "alone", 1, alone_on)
    run(arguments, tmp_path / "together", processes, devices)
    assert_same_run(tmp_path / "together", tmp_path / "alone")
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "together")]
    assert results[0]["guided"]["nfe"] == results[1]["guided"]["nfe"]
    assert results[0]["classifier_accuracy_on_real"] == pytest.approx(results[1]["classifier_accuracy_on_real"])
    for name in ("samples.png", "animation.gif", "loss.png", "config.json"):
        assert (tmp_path / "together" / name).exists()
    # Every line once, by the first process alone.
    lines = (tmp_path / "together" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4
    said = Path(f"{tmp_path / 'together'}.1").read_text()
    assert "step 5/20" in Path(f"{tmp_path / 'together'}.0").read_text()
    assert "step 5/20" not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment", [(*TOY, "--coupling", "minibatch_ot", "--reuse-pairs", "2"), TOKENS], ids=["pairs", "tokens"]
)
def test_coupled_pairs_tokens_and_a_cut_state_do_not_depend_on_the_processes(experiment, tmp_path):
    arguments = (*experiment, "--parallel", "fsdp")
    arguments += ("--total-steps", "20", "--log-every", "5", "--save-every", "20")
    run(arguments, tmp_path / "alone")
    run(arguments, tmp_path / "together", 2)
    assert_same_run(tmp_path / "together", tmp_path / "alone")


@pytest.mark.slow
def test_sigterm_to_one_saves_once_and_other_numbers_continue(tmp_path):
    """Killed on two processes of two devices, continued on one of one: the numbers of the unbroken run."""
    arguments = (*DIGITS, "--parallel", "fsdp", "--save-every", "100000")
    started = start((*arguments, "--total-steps", "100000"), tmp_path / "broken", 2, 2)
    wait_for_step(tmp_path / "broken", 5, started)
    started[1].send_signal(signal.SIGTERM)
    begun = time.monotonic()
    codes = [process.wait(timeout=60) for process in started]
    said = Path(f"{tmp_path / 'broken'}.0").read_text()
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert time.monotonic() - begun < 60
    (checkpoint,) = (tmp_path / "broken" / "checkpoints").iterdir()
    assert f"SIGTERM: saved {checkpoint}" in said
    step = int(checkpoint.name)
    total = str(5 * (step // 5) + 15)
    said = run((*arguments, "--total-steps", total), tmp_path / "broken", 1, 1)
    assert f"from step {step:,}" in said
    run((*arguments, "--total-steps", total), tmp_path / "whole", 1, 4)
    assert_same_run(tmp_path / "broken", tmp_path / "whole", rtol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(tmp_path, victim):
    started = start((*DIGITS, "--save-every", "20", "--total-steps", "100000"), tmp_path / "run", 2)
    wait_for_step(tmp_path / "run", 25, started)
    started[victim].kill()
    begun = time.monotonic()
    assert started[1 - victim].wait(timeout=60) != 0
    assert time.monotonic() - begun < 60
    said = Path(f"{tmp_path / 'run'}.{1 - victim}").read_text()
    assert "another task died" in said.replace("\n", " ")
    said = run((*DIGITS, "--save-every", "20", "--total-steps", "60"), tmp_path / "run")
    assert re.search(r"Continuing .* from step \d+.* saved on 2 device\(s\) and continues on 1: each draws noise", said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "23"), "--batch-size must be a multiple of 2, the devices of the 2 processes, got 23"),
        (("--parallel", "pmap"), "--parallel pmap joins the devices of one process, got 2 processes"),
    ],
    ids=["batch", "pmap"],
)
def test_what_does_not_divide_is_refused_by_all(tmp_path, arguments, message):
    started = start((*DIGITS, *arguments), tmp_path / "run", 2)
    assert [process.wait(timeout=120) for process in started] == [1, 1]
    for index in range(2):
        assert message in Path(f"{tmp_path / 'run'}.{index}").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "10.0.0.1:1234"}, "go together: give all three"),
        ({"num_processes": 2}, "go together"),
        ({"process_id": 1}, "go together"),
        ({"coordinator": "10.0.0.1", "num_processes": 2, "process_id": 0}, "must be HOST:PORT, .*, got 10.0.0.1"),
        ({"coordinator": "a:0", "num_processes": 2, "process_id": 0}, "must be HOST:PORT, .*, got a:0"),
        ({"coordinator": "a:99999", "num_processes": 2, "process_id": 0}, "must be HOST:PORT, .*, got a:99999"),
        ({"coordinator": "a:1", "num_processes": 2, "process_id": 2}, "--process-id must be from 0 to 1, .*, got 2"),
        (
            {"coordinator": "a:1", "num_processes": 0, "process_id": 0},
            "--num-processes must be from 1 to .*, got 0",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": -1},
            "--process-id must be from 0 to .*, got -1",
        ),
    ],
)
def test_processes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Processes(**options)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_launchers_are_known_by_their_environment(environment, name):
    assert LAUNCHERS[name](environment)
    # One task of a job, and a notebook on a cluster, run alone.
    for alone in ({}, {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}):
        assert not LAUNCHERS[name](alone)


def test_alone_everything_is_as_it_is():
    x = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(gathered(spread(x))[:3], x)
    assert len(spread(x)) == 4  # of the four devices of the tests
    assert from_first(lambda: {"a": [1, None]}) == {"a": [1, None]}
    assert mean_of_shares(lambda x: x[:, 0], x) == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--learning-rate 0.01", "--total-steps 60", "--seed 1"])
def test_other_options_in_one_process_are_refused_before_anything_starts(tmp_path, option):
    begun = time.monotonic()
    started = start((*TOY, "--total-steps", "40"), tmp_path / "run", 2, last=tuple(option.split()))
    assert [process.wait(timeout=100) for process in started] == [1, 1]
    assert time.monotonic() - begun < 100
    said = [Path(f"{tmp_path / 'run'}.{index}").read_text() for index in (0, 1)]
    assert f"got training {option} in place of" in said[1] or f"got {option} in place of" in said[1]
    assert "which process 1 was not" in said[0]
    assert not any("Traceback" in each for each in said)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_ends_what_does_not_save(tmp_path):
    """Without a checkpoint to make there is nothing to wait for: JAX puts SIGTERM off, and nobody would ask for it."""
    arguments = ("experiments.reflow", "--steps", "1000000", "--batch-size", "64")
    started = start(arguments, tmp_path / "run", 2)
    time.sleep(20)
    assert all(process.poll() is None for process in started), Path(f"{tmp_path / 'run'}.0").read_text()
    begun = time.monotonic()
    started[1].send_signal(signal.SIGTERM)
    codes = [process.wait(timeout=60) for process in started]
    assert codes[1] == -signal.SIGTERM
    assert codes[0] != 0
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_a_run_says_when_its_noise_is_drawn_otherwise(tmp_path):
    arguments = (*TOY, "--decay", "constant", "--save-every", "2")
    run((*arguments, "--total-steps", "2"), tmp_path / "run", devices=2)
    said = run((*arguments, "--total-steps", "4", "--parallel", "fsdp"), tmp_path / "run", devices=2)
    assert "Its noise was drawn by each device, and is drawn for the whole batch from here on" in said
    said = run((*arguments, "--total-steps", "6", "--parallel", "fsdp"), tmp_path / "run", devices=1)
    assert "from step 4" in said
    assert "Its noise" not in said
    said = run((*arguments, "--total-steps", "8", "--parallel", "shard_map"), tmp_path / "run", devices=2)
    assert "Its noise was drawn for the whole batch, and is drawn by each device from here on" in said
