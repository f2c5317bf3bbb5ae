"""Checkpoints of a training state beside the limit of the disk in one run: what `save` holds up, the whole, `restore`.

Command: `python -m benchmarks.checkpoint --peer-python PYTHON`

The state is that of the CIFAR-10 U-Net of 35.7M parameters with Adam and one average, 572 MB. The limit is as many
bytes by `np.save` into one file with `fsync`, and by `np.load` of it; `torch.save` and `torch.load` carry as many.
Reading finds the pages in memory on all sides. A `Checkpointer` computes the checksum of every array besides.
"""

import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lab import Run, asking, clocked, in_turns, record, table, write
from benchmarks.networks import NETWORKS
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.models import Compute, init_params
from fm_jax.train import create_state, make_optimizer
from fm_jax.train.checkpoint import Checkpointer


@dataclass(frozen=True)
class Config:
    """What to time."""

    out: Path = Path("runs/benchmark_checkpoint")
    """Where the results go; the checkpoints are beside them while this runs."""
    model: Literal["mnist", "cifar10", "dit_s/2", "dit_b/2", "dit_xl/2"] = "cifar10"
    """Network."""
    peer_python: Path | None = None
    """Interpreter of the peers; without it there are ours and the limit."""
    repeats: int = 5
    """Timings of each."""

    def __post_init__(self) -> None:
        check_options(self)


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    network = NETWORKS[config.model]
    params = init_params(network.make(Compute()), jax.random.key(0), network.event_shape)
    state = create_state(params, make_optimizer(1e-3, total_steps=1000), (0.999,))
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
    config.out.mkdir(parents=True, exist_ok=True)
    with asking(config.peer_python) as peer, tempfile.TemporaryDirectory(dir=config.out) as name:
        folder = Path(name)
        checkpointer = Checkpointer(folder / "ours", {}, keep=1)
        steps, blocked = itertools.count(1), dict[str, Any]()
        values, file = np.ones(numbers, np.float32), folder / "limit.npy"

        def save_begun() -> None:
            checkpointer.save(state._replace(step=jnp.int32(next(steps))), jax.random.key(1), {})

        def save() -> dict[str, Any]:
            began = clocked(save_begun)()
            ended = clocked(checkpointer.wait)()
            blocked.update(began)
            return {key: began[key] + ended[key] for key in began}

        def save_limit() -> None:
            with file.open("wb") as out:
                np.save(out, values)
                out.flush()
                os.fsync(out.fileno())

        def restore() -> Any:
            restored = checkpointer.restore(state)
            assert restored is not None
            return restored[0]

        saves: dict[str, Run] = {
            "limit: np.save and fsync": clocked(save_limit),
            "fm_jax, whole": save,
            "fm_jax, what the training waits for": lambda: dict(blocked),
        }
        loads: dict[str, Run] = {"limit: np.load": clocked(lambda: np.load(file)), "fm_jax": clocked(restore)}
        if peer is not None:
            saves["torch.save and fsync"] = peer.run("save", numbers=numbers, folder=str(folder))
            loads["torch.load"] = peer.run("load", numbers=numbers, folder=str(folder))
        results = {
            "record": record(peer),
            "bytes": 4 * numbers,
            "save": in_turns(saves, config.repeats),
            "restore": in_turns(loads, config.repeats),
        }
        checkpointer.close()
    size = f"{config.model}, {4 * numbers / 1e6:,.0f} MB"
    tables = [table(f"{part}, {size}", results[part]) for part in ("save", "restore")]  # type: ignore[arg-type]
    write(config.out, "checkpoint", results, tables)
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
