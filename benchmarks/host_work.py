"""What the host costs of a training step, from a trace: the next batch, dispatch, metrics, checkpoints.

Command: `python -m benchmarks.host_work`

`fm_jax.train.loop.fit` trains a network on random images of its data's shape, as the experiments do: batches from
`fm_jax.data.pipeline`, a `Checkpointer`, a `MetricsWriter`, and a trace of ten calls, the one that `--profile` writes,
with a line of metrics and a checkpoint every `every` steps and at the end. `share` is what the host does for a step,
but for calling the device and waiting for it, at the experiments' own periods of lines and checkpoints, over the time
of a step. What it does while the device computes is counted too, so that it bounds what a step loses.
"""

import itertools
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
from experiments.lab.options import check_options
from experiments.lab.training import Training
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
"""What the host does, by its names in the trace; the others are `step`, the call, and `wait`, for its results."""


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

    def __post_init__(self) -> None:
        check_options(self)


def spans(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """Begin and end, in seconds, of every one of the loop's named parts in the trace.

    Raises:
        ValueError: if there are none.
    """
    (path,) = folder.rglob("*.xplane.pb")
    parts = (*BUSY, "step", "wait")
    found: dict[str, list[tuple[float, float]]] = {part: [] for part in parts}
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines if plane.name.startswith("/host") else ():
            events = [event for event in line.events if event.name in parts]
            if any(event.name == "data" for event in events):  # the loop's thread
                for event in events:
                    start = event.start_ns / 1e9
                    found[event.name].append((start, start + event.duration_ns / 1e9))
    if not found["data"]:
        raise ValueError(f"a trace of {', '.join(parts)} was expected in {path}.")
    return found


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
    found = spans(folder / "profile")
    total = {part: sum(end - start for start, end in each) for part, each in found.items()}
    mean = {part: total[part] / len(found[part]) for part in BUSY}
    ends = list(itertools.chain.from_iterable(itertools.chain.from_iterable(found.values())))
    step_seconds = (max(ends) - min(ends) - total["log"] - total["save"]) / NUM
    host = mean["data"] + mean["log"] / Training.log_every + mean["save"] / Training.save_every
    return {"model": name, **mean, "step": step_seconds, "share": host / step_seconds, "traced": total}


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    rows = []
    for name in config.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(config, name, Path(folder)))
    head = ["network", "a step, s", "its batch, s", "a line of metrics, s", "a checkpoint, s", "share"]
    body = [[r["model"], *(r[part] for part in ("step", *BUSY)), f"{r['share']:.2%}"] for r in rows]
    results = {"record": record(None), "batch_size": config.batch_size, "every": config.every, "rows": rows}
    write(config.out, "host_work", results, [lines(head, body)])
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
