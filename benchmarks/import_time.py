"""What `import fm_jax` costs over `import jax`, in fresh processes that take turns.

Command: `python -m benchmarks.import_time`

Each import is timed inside a process of its own, from its first statement to its last, so that the start of Python is
left out; wall-clock and processor time. The first round, which fills the file cache, is not counted. `over jax` is the
median, over the rounds, of what an import took longer than `import jax` in the same round.
"""

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab import lines, record, write_both
from experiments.lab import command_line
from experiments.lab.options import check_options

IMPORTS = {
    "jax": "import jax",
    "fm_jax": "import fm_jax",
    "fm_jax.losses, .models, .samplers": "import fm_jax.losses, fm_jax.models, fm_jax.samplers",
    "fm_jax.train": "import fm_jax.train",
    "jax, flax, optax": "import jax, flax.linen, optax",
}
LIMIT = 0.3
"""Seconds that `import fm_jax` may take over `import jax`."""
_TIMED = """
import time
wall, processor = time.perf_counter(), time.process_time()
{}
print(time.perf_counter() - wall, time.process_time() - processor)
"""


@dataclass(frozen=True)
class Config:
    """How often to import."""

    out: Path = Path("runs/benchmark_import_time")
    """Where the results go."""
    repeats: int = 10
    """Processes of each import."""

    def __post_init__(self) -> None:
        check_options(self)


def seconds(statement: str) -> tuple[float, float]:
    """Wall-clock and processor seconds of a statement in a fresh process."""
    code = [sys.executable, "-c", _TIMED.format(statement)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    found = subprocess.run(code, check=True, capture_output=True, text=True, env=environment).stdout
    wall, processor = map(float, found.split())
    return wall, processor


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns the times."""
    rounds = [{name: seconds(code) for name, code in IMPORTS.items()} for _ in range(1 + config.repeats)][1:]
    rows = []
    for name in IMPORTS:
        row: dict[str, Any] = {"import": name}
        for i, clock in enumerate(("wall", "processor")):
            times = [each[name][i] for each in rounds]
            over = [each[name][i] - each["jax"][i] for each in rounds]
            row |= {f"{clock}_min": min(times), f"{clock}_median": statistics.median(times)}
            row |= {f"{clock}_over_jax": statistics.median(over)}
        rows.append(row)
    results = record(None) | {"repeats": config.repeats, "limit": LIMIT, "rows": rows}
    text = markdown(results)
    write_both(config.out, "import_time", results, text)
    print(text)
    return results


def markdown(results: dict[str, Any]) -> str:
    """The results as a table, in seconds."""
    head = ["import", "min", "median", "over jax", "processor, min", "processor, median", "processor, over jax"]
    body = [[cell if isinstance(cell, str) else f"{cell:.3f}" for cell in row.values()] for row in results["rows"]]
    about = f"jax {results['jax']}, {results['date']}, commit {results['commit']}, median of {results['repeats']}."
    return f"{lines(head, body)}\n\n{about}\n"


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
