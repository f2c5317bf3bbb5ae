"""What depth costs before the first step: FLUX.1's 57 blocks at width 128, traced, lowered and compiled.

Command: `python -m benchmarks.depth`, and `--layouts scanned unrolled` for the blocks written out, which take minutes.

The forward pass and the gradient for all parameters are compiled from shapes, each in a process of its own. The target
on two idle cores, by the clock: 5 s and 20 s. Beside the clock stands the time of the processors, which other work on
the machine does not lengthen as much.

Writes `depth.json` and a table as `depth.md` into `--out`.
"""

import datetime
import itertools
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.compile_time import in_new_process
from benchmarks.lab import commit, lines, write_both
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.models import Compute
from fm_jax.models.conditioning import Conditions
from fm_jax.models.flux import make_flux

Layout = Literal["scanned", "unrolled"]
Pass = Literal["forward", "gradient"]
SECONDS = ("trace", "lower", "compile", "total", "processor")


@dataclass(frozen=True)
class Config:
    """What to measure."""

    out: Path = Path("runs/benchmark_depth")
    """Where the results go."""
    layouts: tuple[Layout, ...] = ("scanned",)
    """Blocks in a loop, or written out."""
    passes: tuple[Pass, ...] = ("forward", "gradient")
    """Programs."""
    remat: bool = False
    """Recompute the blocks in the backward pass."""
    double: int = 19
    """Blocks of two streams."""
    single: int = 38
    """Blocks of one stream."""
    repeats: int = 3
    """Measurements of each row, whose minimum and median are told."""

    def __post_init__(self) -> None:
        check_options(self)


def measure(config: Config, layout: Layout, which: Pass) -> dict[str, Any]:
    """One row, once; to be called in a new process."""
    jax.config.update("jax_enable_compilation_cache", False)
    depth = {"num_double": config.double, "num_single": config.single}
    module = make_flux(
        "tiny", **depth, guidance=True, scan_layers=layout == "scanned", compute=Compute(remat=config.remat)
    )
    numbers: Any = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    t, x = numbers(2), numbers(2, 16, 16, 4)
    cond = Conditions(vector=numbers(2, 32), tokens=numbers(2, 16, 64), guidance=numbers(2))
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(module.init, key, t, x, cond)["params"]
    jax.block_until_ready(jnp.ones(1) + 1)  # starts the backend

    def field(params: Any, *args: Any) -> Any:
        return module.apply({"params": params}, *args)

    function = field if which == "forward" else jax.grad(lambda *args: (field(*args) ** 2).mean())
    processor, times = time.process_time(), [time.perf_counter()]
    traced = jax.jit(function).trace(params, t, x, cond)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return {
        **dict(zip(SECONDS, [*seconds, sum(seconds), time.process_time() - processor], strict=True)),
        "program_lines": lowered.as_text().count("\n"),
        "load": os.getloadavg()[0],
        "device": jax.devices()[0].device_kind,
    }


def row_of(config: Config, layout: Layout, which: Pass) -> dict[str, Any]:
    """The least, the median and all of the repeats."""
    runs = [in_new_process(measure, config, layout, which) for _ in range(config.repeats)]
    row = {"layout": layout, "pass": which, **runs[-1], "load": max(run["load"] for run in runs)}
    for key in SECONDS:
        values = [run[key] for run in runs]
        row[key] = {"min": min(values), "median": statistics.median(values), "all": values}
    return row


def markdown(results: dict[str, Any]) -> str:
    """The results as a table; seconds are minima."""
    head = [
        "blocks",
        "program",
        "trace, s",
        "lower, s",
        "compile, s",
        "total, s",
        "processor, s",
        "median total, s",
        "lines",
    ]
    head += ["load"]
    body = [
        [
            row["layout"],
            row["pass"],
            *(f"{row[key]['min']:.2f}" for key in SECONDS),
            f"{row['total']['median']:.2f}",
            f"{row['program_lines']:,}",
            f"{row['load']:.1f}",
        ]
        for row in results["rows"]
    ]
    about = (
        f"jax {results['jax']} on {results['rows'][0]['device']}, {results['date']}, commit {results['commit']}; "
        f"{results['double']} + {results['single']} blocks of width 128{', remat' if results['remat'] else ''}, "
        f"minimum of {results['repeats']}."
    )
    return f"{lines(head, body)}\n\n{about}\n"


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    config.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "double": config.double,
        "single": config.single,
        "remat": config.remat,
        "repeats": config.repeats,
        "rows": [],
    }
    for layout, which in itertools.product(config.layouts, config.passes):
        results["rows"].append(row_of(config, layout, which))
        write_both(config.out, "depth", results, markdown(results))
    print(markdown(results))
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
