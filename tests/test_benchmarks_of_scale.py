"""The benchmarks of speed and scale: their arithmetic, and that they run through where there is nothing to measure."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import memory, scaling
from benchmarks.compiled import Program
from benchmarks.networks import NETWORKS
from fm_jax.models import Compute, num_params
from fm_jax.train.profile import named

ROOT = Path(__file__).parents[1]


def compiled(batch, total):
    return {"batch": batch, "memory": {"total": total, "argument": 0}}


def test_a_line_through_two_batches_gives_the_largest_that_fits():
    line = memory.fit(compiled(8, 1_080), compiled(32, 1_320))
    assert line == {"fixed": 1_000, "per_image": 10}
    assert memory.largest_batch(line, 2_000) == 80  # of 1,800
    assert memory.largest_batch(line, 1_000) == 0


def test_a_sharded_row_takes_the_bytes_of_an_image_from_the_replicated_one():
    plain = memory.Row("dit_xl/2", "h200", "shard_map", 1, False)
    cut = dataclasses.replace(plain, parallel="fsdp", devices=8)
    other = dataclasses.replace(cut, remat=True)
    results = {"date": "today", "jax": "0", "commit": "none", "rows": {}}
    for row, found in ((plain, [compiled(8, 108e9), compiled(32, 132e9)]), (cut, [compiled(8, 28e9)]), (other, [])):
        exact = {"parameters": 1, "state": 1, "gradients": 1}
        results["rows"][row.key] = {"row": dataclasses.asdict(row), "compiled": found, "exact": exact}
    memory.complete(results)
    assert results["rows"][cut.key]["line"] == {"fixed": 20e9, "per_image": 1e9}
    assert results["rows"][cut.key]["largest_batch"] == {"h100": 52, "h200": 106}
    assert "line" not in results["rows"][other.key]
    assert memory.markdown(results).count("\n| dit_xl/2 |") == 2


@pytest.mark.slow
def test_state_of_the_networks():
    """Parameters, two moments and an average, four bytes each, and three integers that count steps."""
    found = memory.exact(memory.Row("dit_s/2", "cpu", "shard_map", 1, False))
    assert found["state"] == 16 * found["parameters"] + 12
    state = Program("cifar10").state()
    labels = 11 * 512  # of ten classes and of none
    assert num_params(state.params) == 35_746_307 + labels
    model = NETWORKS["dit_xl/2"].make(Compute(), scan_layers=True)
    assert (model.hidden, model.num_layers, model.num_heads) == (1152, 28, 16)


@pytest.mark.parametrize("name", ["train_step", "data_loading", "import_time"])
def test_no_runs_are_refused_before_anything_is_measured(name):
    benchmark = pytest.importorskip(f"benchmarks.{name}", reason="needs the experiments' extra")
    with pytest.raises(ValueError, match=r"--repeats must be from 1 to .*, got 0"):
        benchmark.Config(repeats=0)


@pytest.fixture
def host_work():
    return pytest.importorskip("benchmarks.host_work", reason="needs the experiments' extra")


@pytest.mark.slow
def test_what_the_host_does_is_found_in_the_trace(tmp_path, host_work):
    jax.block_until_ready(jax.numpy.ones(1))
    jax.profiler.start_trace(tmp_path)
    start = time.perf_counter()
    for _ in range(2):
        for name, wait in (("data", 0.02), ("step", 0.04), ("wait", 0.01), ("log", 0.03), ("save", 0.03)):
            with named(name):
                time.sleep(wait)
    whole = time.perf_counter() - start
    jax.profiler.stop_trace()
    found = host_work.spans(tmp_path)
    assert {name: len(each) for name, each in found.items()} == dict.fromkeys(
        ("data", "log", "save", "step", "wait"), 2
    )
    assert found["save"][1][1] - found["data"][0][0] == pytest.approx(whole, rel=0.1)
    assert all(end - start >= 0.02 for start, end in found["data"])
    assert found["data"][0][1] <= found["step"][0][0] < found["wait"][0][0] < found["log"][0][0] < found["data"][1][0]


@pytest.mark.slow
def test_host_work_is_found_in_the_trace_of_a_run(tmp_path, host_work):
    (row,) = host_work.run(host_work.Config(tmp_path, ("small_unet",), batch_size=8, every=50))["rows"]
    assert all(row[part] > 0 for part in ("step", "data", "log", "save"))
    host = row["data"] + row["log"] / 50 + row["save"] / 500
    assert row["share"] == pytest.approx(host / row["step"])
    assert row["traced"]["save"] == row["save"]  # one, at the end


@pytest.mark.slow
def test_memory_is_compiled_once_and_kept(tmp_path, monkeypatch):
    config = memory.Config(tmp_path, ("small_dit",), sharded=(2,), replicated=(1,), batches=(2, 4))
    rows = memory.run(config)["rows"]
    assert len(rows) == 4
    plain = rows["small_dit, plain, shard_map 1, cpu"]
    # The state and the batch are the arguments: the key is 8 bytes, an image 8 x 8 x 4 numbers and a label.
    assert plain["compiled"][0]["memory"]["argument"] == plain["exact"]["state"] + 8 + 2 * 4 * (8 * 8 * 4 + 1)
    assert plain["line"]["per_image"] > 4 * (8 * 8 * 4 + 1)
    assert rows["small_dit, plain, fsdp 2, cpu"]["line"]["per_image"] == plain["line"]["per_image"]

    monkeypatch.setattr(memory, "measure", lambda *_: pytest.fail("it has been compiled"))
    assert memory.run(config)["rows"] == rows
    assert (tmp_path / "memory.md").read_text().count("\n| small_dit |") == 4


def test_scaling_is_that_of_rings():
    config = scaling.Config(parameters=1e9, forward_gflop=100.0, batch=10, utilisation=0.5)
    near = scaling.Fabric("one group", 100.0, 1e9, 8, 1e9, "nowhere")
    assert scaling.compute_seconds(config, near) == pytest.approx(3 * 100e9 * 10 / 50e12)
    assert scaling.reduce_seconds(8e9, 1, near) == 0
    assert scaling.reduce_seconds(8e9, 8, near) == pytest.approx(2 * 7)
    # Between four groups each chip sends an eighth, at the same rate.
    assert scaling.reduce_seconds(8e9, 32, near) == pytest.approx(2 * 7 + 2 * 3 / 4)
    rows = scaling.table(config)
    assert all(row["efficiency_no_overlap"] <= row["efficiency_overlap"] <= 1 for row in rows)
    assert {row["efficiency_no_overlap"] for row in rows if row["chips"] == 1} == {1}


def gpu(*options, **environment):
    return subprocess.run(
        ["benchmarks/gpu.sh", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"} | environment,
        check=False,
    )


@pytest.mark.slow
def test_gpu_measures_nothing_where_there_is_none(tmp_path):
    done = gpu(OUT=str(tmp_path))
    assert done.returncode == 1
    assert "There is no GPU here: nothing is measured." in done.stderr
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["device"]


@pytest.mark.slow
def test_gpu_runs_through(tmp_path):
    parts = ("train:cifar10", "train:dit_xl/2 scan", "sample:dit_xl/2", "flags:no flag")
    done = gpu("--smoke", "--minutes", "30", "--parts", *parts, OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert list(found) == ["device", *parts]
    assert not [part for part in found.values() if "failed" in part]
    assert all(found[part]["images_per_second"]["median"] > 0 for part in parts)
    assert found["train:dit_xl/2 scan"]["mfu"]["measured"] > 0


@pytest.mark.slow
def test_gpu_needs_no_more_than_jax_flax_and_optax():
    code = """
import sys
blocked = {"diffrax", "equinox", "experiments", "grain", "orbax", "tensorflow_datasets", "tqdm", "tyro"}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ImportError(name)
sys.meta_path.insert(0, Finder())
from benchmarks import gpu
for part in ("train", "sample"):
    assert gpu.KINDS[part]("dit_xl/2", True)["network"] == "small_dit"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
