"""What the host costs of a training step, from a trace: the next batch, dispatch, metrics, checkpoints.

Command: `python -m benchmarks.host_work`

`fm_jax.train.loop.fit` trains a network on random images of its data's shape, as the experiments do: batches from
`fm_jax.data.pipeline`, a `Checkpointer`, a `MetricsWriter`, and a trace of ten calls, the one that `--profile` writes.
Within these there are a line of metrics and a checkpoint every `every` steps, far more than in an experiment. `busy` is
the share of the time between the first and the last of the traced steps that the host spent on anything but waiting for
the device or calling it; what it does while the device computes is counted too, so that it bounds what a step loses.
"""

import collections
import gzip
import json
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from benchmarks.lab import lines, record, write
from benchmarks.networks import NETWORKS
from experiments.lab import command_line
from fm_jax.data.images import ImageDataset
from fm_jax.data.pipeline import batches
from fm_jax.models import Compute, init_params
from fm_jax.train import create_state, make_optimizer, make_step
from fm_jax.train.checkpoint import Checkpointer
from fm_jax.train.log import MetricsWriter
from fm_jax.train.loop import fit
from fm_jax.train.parallel import pmap_step
from fm_jax.train.profile import FIRST, NUM

Model = Literal["mnist", "cifar10", "small_unet"]
BUSY = ("data", "log", "save")
"""Names in the trace; the others are `step`, the call, and `wait`, for its results."""


@dataclass(frozen=True)
class Config:
    """What to trace."""

    out: Path = Path("runs/benchmark_host_work")
    """Where the results go."""
    models: tuple[Model, ...] = ("mnist",)
    """Networks."""
    batch_size: int = 128
    """Images a step."""
    every: int = 5
    """Steps between two lines of metrics, and between two checkpoints."""


def seconds(folder: Path) -> dict[str, float]:
    """Seconds of the loop's named parts in the trace, and of the `whole` from the first to the last.

    Raises:
        ValueError: if they are not there.
    """
    (path,) = folder.rglob("*.trace.json.gz") if folder.exists() else (folder,)
    with gzip.open(path) as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    threads = {e["tid"] for e in events if e["name"] == "data"}
    if len(threads) != 1:
        raise ValueError(f"one thread of the trace must have the loop's parts, got {len(threads)}.")
    mine = [e for e in events if e["tid"] in threads and e["name"] in (*BUSY, "step", "wait")]
    found = collections.Counter[str]()
    for event in mine:
        found[event["name"]] += event["dur"] / 1e6
    whole = max(e["ts"] + e["dur"] for e in mine) - min(e["ts"] for e in mine)
    return {**found, "whole": whole / 1e6}


def measure(config: Config, name: Model, folder: Path) -> dict[str, Any]:
    """Trains in a folder that does not last."""
    network, num = NETWORKS[name], config.batch_size
    images = np.random.default_rng(0).integers(0, 256, (8 * num, *network.event_shape), dtype=np.uint8)
    labels = np.arange(len(images), dtype=np.int32) % network.num_classes
    dataset = ImageDataset(images, labels, tuple(map(str, range(network.num_classes))))
    data = batches(dataset, batch_size=num, seed=0, process_index=0, process_count=1, flip=True)
    model, optimizer = network.make(Compute()), make_optimizer(1e-3, total_steps=1000)
    state = create_state(init_params(model, jax.random.key(0), network.event_shape), optimizer, (0.999,))
    step = pmap_step(make_step(network.loss(model), optimizer))
    every: dict[str, Any] = {"log_every": config.every, "save_every": config.every}
    with closing(MetricsWriter(folder, tensorboard=False)) as writer:
        checkpointer = Checkpointer(folder / "checkpoints", {}, keep=2)
        fit(
            step,
            state,
            jax.random.key(1),
            data,
            num_steps=FIRST + NUM,
            images_per_batch=num,
            checkpointer=checkpointer,
            writer=writer,
            progress=False,
            profile_dir=folder / "profile",
            **every,
        )
        checkpointer.close()
    found = seconds(folder / "profile")
    return {"model": name, **found, "busy": sum(found.get(each, 0.0) for each in BUSY) / found["whole"]}


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    rows = []
    for name in config.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(config, name, Path(folder)))
    parts = [*BUSY, "step", "wait", "whole"]
    head = ["network", *(f"{part}, s" for part in parts), "busy"]
    body = [[r["model"], *(r.get(part, 0.0) for part in parts), f"{r['busy']:.1%}"] for r in rows]
    results = {"record": record(None), "batch_size": config.batch_size, "every": config.every, "rows": rows}
    write(config.out, "host_work", results, [lines(head, body)])
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
