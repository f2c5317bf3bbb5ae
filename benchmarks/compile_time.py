"""What a training step takes from Python to an executable: seconds to trace, to lower and to compile.

Command: `python -m benchmarks.compile_time --models dit_s/2 dit_b/2 dit_xl/2`

The step is the library's: conditional flow matching, Adam, gradient clipping, one EMA. It is compiled from shapes, so
that no parameters are drawn and nothing is trained. A transformer has two rows, its blocks written out and
`scan_layers`; the MLP and the U-Nets are there for reference. Each measurement has a process to itself, in which
nothing has been compiled before, and the two layouts alternate. Beside the time on the clock stands that of the
processors, which other work on the machine does not lengthen as much.

Writes `compile_time.json` and a table as `compile_time.md` into `--out`.
"""

import datetime
import itertools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.lab import commit, lines, peak_bytes, write_both
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.conditions import DropCondition
from fm_jax.losses import flow_matching
from fm_jax.models import MLP, Compute, LabelEmbedding, linen_apply, make_dit, make_unet, num_params
from fm_jax.paths import AffinePath
from fm_jax.train import TrainState, create_state, make_optimizer, make_step

NUM_CLASSES = 1000
LABELS, PAPER_LABELS = LabelEmbedding(NUM_CLASSES), LabelEmbedding(NUM_CLASSES, stddev=0.02)
LATENTS, MNIST, CIFAR10 = (32, 32, 4), (28, 28, 1), (32, 32, 3)
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "mlp": (partial(MLP, embed=LABELS), (2,)),
    "mnist": (partial(make_unet, "mnist", embed=LABELS), MNIST),
    "cifar10": (partial(make_unet, "cifar10", embed=LABELS), CIFAR10),
    **{f"dit_{s.lower()}": (partial(make_dit, s, embed=PAPER_LABELS), LATENTS) for s in ("S/2", "B/2", "L/2", "XL/2")},
}
"""By name: the network and the shape of one example."""
Layout = Literal["unrolled", "scanned"]
SECONDS = ("trace", "lower", "compile", "total", "processor")


@dataclass(frozen=True)
class Config:
    """What to measure."""

    out: Path = Path("runs/benchmark_compile_time")
    """Where the results go."""
    models: tuple[Literal["mlp", "mnist", "cifar10", "dit_s/2", "dit_b/2", "dit_l/2", "dit_xl/2"], ...] = (
        "mlp",
        "mnist",
        "cifar10",
        "dit_s/2",
        "dit_b/2",
        "dit_xl/2",
    )
    """Networks."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    remat: bool = False
    """Recompute the blocks in the backward pass."""
    batch_size: int = 8
    """Examples a step."""
    repeats: int = 3
    """Measurements of each row, whose minimum and median are told."""

    def __post_init__(self) -> None:
        check_options(self)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(config: Config, name: str, layout: Layout) -> dict[str, Any]:
    """One row, once; to be called in a new process."""
    jax.config.update("jax_enable_compilation_cache", False)
    make, event_shape = NETWORKS[name]
    options: dict[str, Any] = {"scan_layers": True} if layout == "scanned" else {}
    module = make(compute=Compute(config.dtype, config.remat), **options)
    optimizer, drop = make_optimizer(1e-4, total_steps=1000), DropCondition(0.1, null_cond=NUM_CLASSES)
    step = make_step(flow_matching(linen_apply(module), AffinePath(), drop=drop), optimizer, axis_name=None)

    def state_of(key: jax.Array) -> TrainState:
        params = module.init(key, jnp.zeros(1), jnp.zeros((1, *event_shape)))["params"]
        return create_state(params, optimizer, (0.999,))

    key = jax.eval_shape(lambda: jax.random.key(0))
    state, shape = jax.eval_shape(state_of, key), (config.batch_size, *event_shape)
    batch = {"x1": jax.ShapeDtypeStruct(shape, jnp.float32), "cond": jax.ShapeDtypeStruct(shape[:1], jnp.int32)}
    jax.block_until_ready(jnp.ones(1) + 1)  # starts the backend

    processor, times = _processor_seconds(), [time.perf_counter()]
    traced = jax.jit(step, donate_argnums=0).trace(state, key, batch)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    seconds = [b - a for a, b in itertools.pairwise(times)]
    memory = compiled.memory_analysis()
    return {
        **dict(zip(SECONDS, [*seconds, sum(seconds), _processor_seconds() - processor], strict=True)),
        "peak_gib": peak_bytes() / 2**30,  # of the process
        "temporary_gib": None if memory is None else memory.temp_size_in_bytes / 2**30,  # of the step that runs
        "program_lines": lowered.as_text().count("\n"),
        "parameters": num_params(state.params),
        "device": jax.devices()[0].device_kind,
    }


def in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def rows_of(config: Config, name: str) -> list[dict[str, Any]]:
    """The rows of a network."""
    layouts: tuple[Layout, ...] = ("unrolled", "scanned") if name.startswith("dit") else ("unrolled",)
    found: dict[Layout, list[dict[str, Any]]] = {layout: [] for layout in layouts}
    for _ in range(config.repeats):
        for layout in layouts:
            found[layout].append(in_new_process(measure, config, name, layout))
    rows = []
    for layout, all_of in found.items():
        row = {"model": name, "layout": layout, **all_of[0]}
        for key in SECONDS:
            values = [each[key] for each in all_of]
            row[key] = {"min": min(values), "median": statistics.median(values), "all": values}
        if layout == "scanned":
            row["ratio"] = {
                key: statistics.median(b[key] / a[key] for a, b in zip(found["unrolled"], all_of, strict=True))
                for key in ("total", "processor")
            }
        rows.append(row)
    return rows


def markdown(results: dict[str, Any]) -> str:
    """The results as a table; seconds are minima, ratios medians of neighbours."""
    head = ["network", "blocks", "trace, s", "lower, s", "compile, s", "total, s", "processor, s", "scanned/unrolled"]
    head += ["of the processor", "lines", "peak GiB", "GiB of a step"]
    body = []
    for row in results["rows"]:
        ratio = row.get("ratio", {})
        cells = [row["model"], row["layout"], *(f"{row[key]['min']:.2f}" for key in SECONDS)]
        cells += [f"{ratio[key]:.2f}" if ratio else "" for key in ("total", "processor")]
        memory = row["temporary_gib"]
        cells += [f"{row['program_lines']:,}", f"{row['peak_gib']:.2f}", "" if memory is None else f"{memory:.2f}"]
        body.append(cells)
    about = (
        f"jax {results['jax']} on {results['device']}, {results['date']}, commit {results['commit']}; "
        f"{results['dtype']}{', remat' if results['remat'] else ''}, batch {results['batch_size']}, minimum of "
        f"{results['repeats']}, ratios are medians."
    )
    return f"{lines(head, body)}\n\n{about}\n"


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    config.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "dtype": config.dtype,
        "remat": config.remat,
        "batch_size": config.batch_size,
        "repeats": config.repeats,
        "rows": [],
    }
    for name in config.models:
        results["rows"] += rows_of(config, name)
        results["device"] = results["rows"][0]["device"]
        write_both(config.out, "compile_time", results, markdown(results))
    print(markdown(results))
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
