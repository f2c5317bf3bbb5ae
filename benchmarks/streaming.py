"""A folder of pictures that does not fit into the memory of the process: streamed batches, beside those in memory.

Command: `python -m benchmarks.streaming`

Makes a folder of JPEGs of odd sizes, and reads batches of it in processes of their own: from memory without a limit;
streamed, under a limit of memory that the decoded pictures exceed; from memory under that limit, which must fail; and,
as the limit of speed, the same pictures decoded by as many threads and nothing else. The limit is on private memory
(RLIMIT_DATA), counted from what the process has once everything is imported. The folder lies in the cache of the
system, so a disk is not measured.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.lab import lines, peak_bytes, record, write
from experiments.lab import command_line
from experiments.lab.options import check_options

How = Literal["memory", "stream", "threads"]


@dataclass(frozen=True)
class Config:
    """What to measure."""

    out: Path = Path("runs/benchmark_streaming")
    """Where the results go."""
    num_images: int = 12_000
    """Pictures in the folder."""
    size: int = 128
    """Height and width that they are brought to; they have a quarter to a half more."""
    batch_size: int = 128
    """Images a batch."""
    num_batches: int = 60
    """Batches of a timing."""
    limit_mib: int = 256
    """Memory that a limited process may take, beyond what it has when all is imported."""

    def __post_init__(self) -> None:
        check_options(self)


def make_folder(folder: Path, config: Config) -> int:
    """Writes JPEGs of smooth random pictures; how many bytes they are."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)) for _ in range(500)]
    total = 0
    for i in range(config.num_images):
        height, width = rng.integers(config.size * 5 // 4, config.size * 3 // 2, 2)
        path = folder / f"{i % 10}" / f"{i:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        coarse[i % 500].resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=90)
        total += path.stat().st_size
    return total


def measure(folder: Path, config: Config, how: How, limited: bool) -> dict[str, Any]:
    """Images a second of one way, in a process of its own."""
    settings = json.dumps({"folder": str(folder), "how": how, "limited": limited, **asdict(config), "out": ""})
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", "--worker", settings], capture_output=True, text=True
    )
    if found.returncode:
        return {"error": (found.stderr.strip().splitlines() or ["ended without a word"])[-1][:200]}
    return json.loads(found.stdout.splitlines()[-1])


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What the process does."""
    import resource

    import grain  # noqa: F401  # all that is imported, before the limit

    from fm_jax.data.folder import find_pictures, load_folder
    from fm_jax.data.picture import PictureReader
    from fm_jax.data.pipeline import batches

    size, batch_size, num = settings["size"], settings["batch_size"], settings["num_batches"]
    PictureReader(size=(size, size))(next(Path(settings["folder"]).glob("*/*.jpg")))
    if settings["limited"]:
        status = Path("/proc/self/status").read_text()
        taken = 1024 * int(status.split("VmData:")[1].split()[0])
        limit = taken + settings["limit_mib"] * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start, resident = time.perf_counter(), peak_bytes()
    if settings["how"] == "threads":
        reader, found = PictureReader(size=(size, size)), find_pictures(settings["folder"])
        paths = [found.paths[i] for i in np.random.default_rng(0).permutation(len(found.paths))]
        begun = time.perf_counter()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for first in range(0, num * batch_size, batch_size):
                list(pool.map(reader, (paths[i % len(paths)] for i in range(first, first + batch_size))))
    else:
        dataset = load_folder(settings["folder"], size=size, stream=settings["how"] == "stream", progress=False)
        iterator = batches(dataset, batch_size=batch_size, seed=0, process_index=0, process_count=1)
        next(iterator)
        begun = time.perf_counter()
        for _ in range(num):
            next(iterator)
    return {
        "images_per_second": num * batch_size / (time.perf_counter() - begun),
        "seconds_before": begun - start,
        "mib_more": (peak_bytes() - resident) / 2**20,
    }


def run(config: Config) -> dict[str, Any]:
    """Measures; writes, prints and returns the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = make_folder(folder, config)
        decoded = config.num_images * config.size**2 * 3
        if decoded <= config.limit_mib * 2**20:
            raise ValueError(f"--limit-mib must be below the {decoded / 2**20:.0f} MiB of the decoded pictures.")
        ways: list[tuple[str, How, bool]] = [
            ("decoded by threads, nothing else", "threads", False),
            ("in memory", "memory", False),
            ("streamed", "stream", False),
            (f"streamed, at most {config.limit_mib} MiB", "stream", True),
            (f"in memory, at most {config.limit_mib} MiB", "memory", True),
        ]
        rows = [{"name": label} | measure(folder, config, how, limited) for label, how, limited in ways]
    results = {"record": record(None), "decoded_mib": decoded / 2**20, "files_mib": written / 2**20, "rows": rows}
    head = ["", "images/s", "before the first batch, s", "most memory more, MiB"]
    body = [
        [row["name"], *(row[key] for key in ("images_per_second", "seconds_before", "mib_more"))]
        if "error" not in row
        else [row["name"], row["error"], "", ""]
        for row in rows
    ]
    title = (
        f"{config.num_images:,} JPEGs of {written / 2**20:.0f} MiB, {decoded / 2**20:.0f} MiB at {config.size}x"
        f"{config.size}; batches of {config.batch_size}"
    )
    write(config.out, "streaming", results, [f"### {title}\n\n{lines(head, body)}"])
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
    else:
        command_line.main(run, Config, description=__doc__)
