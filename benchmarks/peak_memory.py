"""Peak memory of a training step: what the compiler plans, and what a fresh process takes, beside PyTorch's.

Command: `python -m benchmarks.peak_memory --peer-python PYTHON`

The steps are those of `benchmarks.train_step` on one device, in float32. Each process makes the state, steps thrice
and reads its greatest resident size, less that with JAX or PyTorch imported and nothing made; what compiling takes
counts for ours. What fits on an accelerator is in `benchmarks.memory`.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.lab import Peer, lines, peak_bytes, record, write
from benchmarks.networks import NETWORKS
from benchmarks.train_step import BATCH_SIZES
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.models import Compute, init_params
from fm_jax.train import create_state, make_optimizer, make_step

Model = Literal["mnist", "cifar10", "dit_s/2", "dit_b/2", "dit_xl/2"]
STEPS = 3


@dataclass(frozen=True)
class Config:
    """What to measure."""

    out: Path = Path("runs/benchmark_peak_memory")
    """Where the results go."""
    models: tuple[Model, ...] = ("mnist", "cifar10", "dit_s/2")
    """Networks."""
    peer_python: Path | None = None
    """Interpreter of the peers; without it ours are measured alone."""
    alone: bool = False
    """Print the numbers of the first network, and start no other process."""

    def __post_init__(self) -> None:
        check_options(self)


def ours(name: Model) -> dict[str, int]:
    """Bytes of this process, which should be fresh."""
    jax.block_until_ready(jnp.ones(1))
    before, network = peak_bytes(), NETWORKS[name]
    model, num = network.make(Compute()), BATCH_SIZES[name]
    optimizer = make_optimizer(1e-3, total_steps=1000)
    step = jax.jit(make_step(network.loss(model), optimizer, axis_name=None), donate_argnums=0)
    state = create_state(init_params(model, jax.random.key(0), network.event_shape), optimizer, (0.999,))
    key = jax.random.key(1)
    x1 = jax.random.normal(key, (num, *network.event_shape))
    batch = {"x1": x1, "cond": jnp.arange(num) % network.num_classes}
    compiled = step.lower(state, key, batch).compile()
    plan: Any = compiled.memory_analysis()
    for _ in range(STEPS):
        state, _ = compiled(state, key, batch)
    jax.block_until_ready(state)
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {"planned": total + plan.temp_size_in_bytes, "peak": peak_bytes() - before}


def theirs(name: Model, python: Path) -> int:
    """Bytes of a fresh process of PyTorch."""
    with Peer(python) as peer:
        before = peer.ask(do="record")["peak_rss_bytes"]
        peer.run("train", model=name, batch=BATCH_SIZES[name], steps=STEPS, threads=2)()
        return peer.ask(do="record")["peak_rss_bytes"] - before


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    if config.alone:
        found = ours(config.models[0])
        print(json.dumps(found))
        return found
    rows: dict[str, dict[str, int]] = {}
    for name in config.models:
        command = [sys.executable, "-m", "benchmarks.peak_memory", "--alone", "--models", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        if config.peer_python is not None:
            rows[name]["torch_peak"] = theirs(name, config.peer_python)
    head = ["network, batch", "planned by XLA, MB", "peak of the process, MB", "PyTorch's, MB"]
    body = []
    for each, row in rows.items():
        cells = [f"{row[key] / 1e6:,.0f}" if key in row else "" for key in ("planned", "peak", "torch_peak")]
        body.append([f"{each}, {BATCH_SIZES[each]}", *cells])
    results = {"record": record(None), "rows": rows}
    write(config.out, "peak_memory", results, [lines(head, body)])
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
