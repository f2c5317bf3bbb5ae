"""Batches of images in memory: `fm_jax.data.pipeline.batches`, beside the least that NumPy needs, and PyTorch.

Command: `python -m benchmarks.data_loading`; `--peer-python` names an interpreter that has torch, whose `DataLoader` is
then timed too: an image at a time, as it is mostly used, and with whole batches asked of the data.

The limit is `to_float(images[indices])` with the same indices: a gather and a conversion, without an order, flips,
noise, labels or a position that can be saved. All take turns, in one thread each besides the loader's workers, and a
ratio is the median of those of the turns. Images are random, in the shapes of MNIST and CIFAR-10.
"""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab import commit, lines, write_both
from experiments.lab import command_line
from fm_jax.data.images import ImageDataset, to_float
from fm_jax.data.pipeline import batches

SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
PEER = Path(__file__).with_name("data_loading_peer.py")
Ask = Callable[[dict[str, Any]], dict[str, Any]]


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


def measure(config: Config, name: str, flip: bool, dequantize: bool, peer: tuple[Ask, Path] | None) -> dict[str, Any]:
    """Milliseconds a batch of ours, of the limit, and of the peer's loaders."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (config.num_images, *SHAPES[name]), dtype=np.uint8)
    dataset = ImageDataset(images, np.arange(len(images), dtype=np.int32), ("the label is the index",))
    options = {"flip": flip, "dequantize": dequantize}
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
        ask, path = peer

        def seconds_of(request: dict[str, Any]) -> float:
            return ask(request)["seconds"]

        np.save(path, images)
        request = {"path": str(path), "batch_size": config.batch_size, "num": config.num_batches, **options}
        for batched, workers in itertools.product((False, True), config.workers):
            how = "batches" if batched else "images"
            each = {**request, "batched": batched, "workers": workers}
            contestants[f"DataLoader, {how}, {workers} workers"] = partial(seconds_of, each)
    times: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for turn in range(1 + config.repeats):
        for contestant, timed in contestants.items():
            seconds = timed()
            if turn:  # the first fills caches
                times[contestant].append(1e3 * seconds / config.num_batches)
    return {
        "images": name,
        **options,
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


def _ratio(times: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


@contextmanager
def _peer(python: Path | None) -> Iterator[tuple[dict[str, Any], tuple[Ask, Path] | None]]:
    """The peer's versions, and what to ask it with: a request as JSON in, its answer out."""
    if python is None:
        yield {}, None
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([python, PEER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        reader, writer = process.stdout, process.stdin
        assert reader is not None
        assert writer is not None

        def answer() -> dict[str, Any]:
            if not (line := reader.readline()):
                raise ChildProcessError(f"{python} ended with status {process.wait()}: see what it printed.")
            return json.loads(line)

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            writer.write(json.dumps(request) + "\n")
            writer.flush()
            return answer()

        yield answer(), (ask, Path(folder) / "images.npy")
        writer.close()


def machine() -> dict[str, Any]:
    """Where, when and with what."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("numpy", "grain", "jax")},
    }


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
    about = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    title = f"Batches of {results['batch_size']}; of a DataLoader, how many times as long it takes. {about}."
    return f"{title}\n\n{lines(head, body)}\n"


def run(config: Config) -> dict[str, Any]:
    """Measures; writes, prints and returns the results."""
    config.out.mkdir(parents=True, exist_ok=True)
    cases = list(itertools.product(SHAPES, (False, True), (False, True)))
    with _peer(config.peer_python) as (versions, peer):
        rows = [measure(config, *case, peer) for case in cases]
    results = {"batch_size": config.batch_size, "machine": machine() | versions, "rows": rows}
    write_both(config.out, "data_loading", results, markdown(results))
    print(markdown(results))
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
