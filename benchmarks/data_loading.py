"""Batches of images in memory: `fm_jax.data.pipeline.batches`, beside the least that NumPy needs, and PyTorch.

Command: `python -m benchmarks.data_loading`; `--peer-python` names an interpreter that has torch, whose `DataLoader` is
then timed too: an image at a time, as it is mostly used, and with whole batches asked of the data.

The limit is `to_float(images[indices])` with the same indices: a gather and a conversion, without an order, flips,
noise, labels or a position that can be saved. All take turns, in one thread each besides the loader's workers, and a
ratio is the median of those of the turns. Images are random, in the shapes of MNIST and CIFAR-10.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import Peer, Run, asking, lines, record, write
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.data.images import ImageDataset, to_float
from fm_jax.data.pipeline import batches

SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}


@dataclass(frozen=True)
class Config:
    """What to time."""

    out: Path = Path("runs/benchmark_data_loading")
    """Where the results go."""
    num_images: int = 50_000
    """Images in memory."""
    batch_size: int = 128
    """Images a batch."""
    num_batches: int = 100
    """Batches of one timing."""
    repeats: int = 9
    """Turns."""
    peer_python: Path | None = None
    """Interpreter that has torch."""
    workers: tuple[int, ...] = (0, 2)
    """Worker processes of the peer's loader."""

    def __post_init__(self) -> None:
        check_options(self, workers=0)


def measure(config: Config, name: str, flip: bool, dequantize: bool, peer: Peer | None, folder: Path) -> dict[str, Any]:
    """Milliseconds a batch of ours, of the limit, and of the peer's loaders."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (config.num_images, *SHAPES[name]), dtype=np.uint8)
    dataset = ImageDataset(images, np.arange(len(images), dtype=np.int32), tuple(map(str, range(len(images)))))
    options: dict[str, Any] = {"flip": flip, "dequantize": dequantize}
    iterator = batches(dataset, batch_size=config.batch_size, seed=0, process_index=0, process_count=1, **options)
    indices: list[np.ndarray] = []

    def ours() -> float:
        indices.clear()
        start = time.perf_counter()
        for _ in range(config.num_batches):
            indices.append(next(iterator)["cond"])
        return time.perf_counter() - start

    def limit() -> float:
        start = time.perf_counter()
        for each in indices:
            to_float(images[each])
        return time.perf_counter() - start

    contestants: dict[str, Callable[[], float]] = {"fm_jax": ours, "limit": limit}
    if peer is not None:
        path = folder / f"{name}.npy"
        np.save(path, images)
        options |= {"path": str(path), "batch_size": config.batch_size, "num": config.num_batches, "threads": 1}
        for batched, workers in itertools.product((False, True), config.workers):
            loader = peer.run("batches", batched=batched, workers=workers, **options)
            how = "batches" if batched else "images"
            contestants[f"DataLoader, {how}, {workers} workers"] = partial(_seconds, loader)
    times: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for turn in range(1 + config.repeats):
        for contestant, timed in contestants.items():
            seconds = timed()
            if turn:  # the first fills caches
                times[contestant].append(1e3 * seconds / config.num_batches)
    return {
        "images": name,
        "flip": flip,
        "dequantize": dequantize,
        "contestants": {
            contestant: {
                "min_ms": min(each),
                "median_ms": statistics.median(each),
                "batches_per_second": 1e3 / statistics.median(each),
                "images_per_second": 1e3 * config.batch_size / statistics.median(each),
                "over_fm_jax": _ratio(each, times["fm_jax"]),
            }
            for contestant, each in times.items()
        },
        "over_limit": _ratio(times["fm_jax"], times["limit"]),
    }


def _seconds(run: Run) -> float:
    return run()["seconds"]


def _ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    rows = results["rows"]
    peers = list(rows[0]["contestants"])[2:]
    head = ["images", "flips", "noise", "batches/s", "images/s", "ms, min", "ms, median", "over the limit", *peers]
    body = []
    for row in rows:
        ours = row["contestants"]["fm_jax"]
        body.append(
            [row["images"], *("yes" if row[name] else "no" for name in ("flip", "dequantize"))]
            + [f"{ours['batches_per_second']:,.0f}", f"{ours['images_per_second']:,.0f}"]
            + [f"{ours['min_ms']:.3f}", f"{ours['median_ms']:.3f}", f"{row['over_limit']:.2f}"]
            + [f"{row['contestants'][name]['over_fm_jax']:.1f}" for name in peers]
        )
    title = f"Batches of {results['batch_size']}; of a DataLoader, how many times as long it takes."
    return f"{title}\n\n{lines(head, body)}"


def run(config: Config) -> dict[str, Any]:
    """Measures; writes, prints and returns the results."""
    config.out.mkdir(parents=True, exist_ok=True)
    cases = list(itertools.product(SHAPES, (False, True), (False, True)))
    with asking(config.peer_python) as peer, tempfile.TemporaryDirectory() as folder:
        rows = [measure(config, *case, peer, Path(folder)) for case in cases]
        results = {"batch_size": config.batch_size, "record": record(peer), "rows": rows}
    write(config.out, "data_loading", results, [markdown(results)])
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
