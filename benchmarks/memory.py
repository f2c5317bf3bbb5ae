"""Which model fits where: memory of a training step on each device, as the compiler plans it, on 1, 8 and 64 devices.

Command: `python -m benchmarks.memory`; `--targets h200 v5e` compiles for these instead of the CPU, see
`benchmarks/targets.py`. Rows that `--out` holds already are kept.

The step is that of `benchmarks.compiled`: float32 parameters, clipped Adam, one average, bfloat16 inside; the state is
donated, and transformers are a loop over their blocks (`scan_layers`). Nothing is computed. Three kinds of number:

* exact, by arithmetic: the parameters, and the bytes of the whole state;
* the compiler's: bytes of a device at two batch sizes, arguments + outputs - what they share + temporaries;
* inferred: the line through these two, and the largest batch at which it stays within nine tenths of the device. The
  other tenth is left to the runtime, to fragmentation and to cuDNN's workspaces.

CPU's plan is a poor stand-in for that of an accelerator: it fuses less, and widens bfloat16. Sharded rows (`fsdp`) are
compiled at one batch size and take the bytes of an image from the replicated row, whose activations are the same.
"""

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks.compiled import Model, Program, collectives, memory
from benchmarks.lab import commit, lines
from benchmarks.targets import BYTES, OPTIONS, Target, compute_on_cpu, devices
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.models import num_params

MARGIN = 0.9
"""Share of a device's memory that a step may take."""
GIGA = 1e9


@dataclass(frozen=True)
class Config:
    """What to compile."""

    out: Path = Path("runs/benchmark_memory")
    """Where the results go."""
    models: tuple[Model, ...] = ("mnist", "cifar10", "dit_s/2", "dit_b/2", "dit_l/2", "dit_xl/2")
    """Networks."""
    targets: tuple[Target, ...] = ("cpu",)
    """Whose compilers plan the memory."""
    sharded: tuple[int, ...] = (8, 64)
    """Numbers of devices over which the state is cut."""
    replicated: tuple[int, ...] = (1, 8, 64)
    """Numbers of devices that each hold the whole state."""
    batches: tuple[int, int] = (32, 64)
    """Images on each device, of the two compilations that a line goes through: enough that activations, and not the
    optimiser, decide the most that is in memory at once."""
    minutes: float = 60.0
    """After these no further program is compiled; what is missing is left out."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Row:
    """One program of the table, without its batch."""

    network: Model
    target: Target
    parallel: str
    devices: int
    remat: bool

    def program(self, batch: int) -> Program:
        """The step at that batch on each device."""
        return Program(self.network, self.parallel, batch, remat=self.remat, scan_layers=True)  # type: ignore[arg-type]

    @property
    def key(self) -> str:
        return f"{self.network}, {'remat' if self.remat else 'plain'}, {self.parallel} {self.devices}, {self.target}"


def rows(config: Config) -> Iterator[Row]:
    """All rows, those that give others the bytes of an image before these."""
    sizes = [("shard_map", num) for num in config.replicated] + [("fsdp", num) for num in config.sharded]
    for network in config.models:
        for target in config.targets:
            for parallel, num in sizes:
                for remat in (False, True):
                    yield Row(network, target, parallel, num, remat)


def exact(row: Row) -> dict[str, int]:
    """Bytes by arithmetic: of parameters, and of the state, which is those, both moments of Adam and the average."""
    state = row.program(1).state()
    return {"parameters": num_params(state.params), "gradients": _bytes(state.params), "state": _bytes(state)}


def measure(row: Row, batch: int) -> dict[str, Any]:
    """Compiles one program; what the compiler says of its memory, or that it does not fit."""
    start = time.perf_counter()
    lowered = row.program(batch).lower(devices(row.target, row.devices))
    try:
        compiled = lowered.compile(OPTIONS.get(row.target))
    except jax.errors.JaxRuntimeError as error:  # a compiler that knows its device refuses what does not fit
        return {"batch": batch, "refused": str(error)[:200]}
    found = {"batch": batch, "memory": memory(compiled), "collectives": collectives(compiled.as_text() or "")}
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def fit(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """The line through two compilations: bytes without any image, and bytes of an image."""
    (b0, bytes0), (b1, bytes1) = ((each["batch"], each["memory"]["total"]) for each in (first, second))
    per_image = (bytes1 - bytes0) / (b1 - b0)
    return {"fixed": bytes0 - b0 * per_image, "per_image": per_image}


def largest_batch(line: dict[str, float], capacity: float) -> int:
    """The most images on a device of that many bytes; 0 if not even one fits."""
    left = MARGIN * capacity - line["fixed"]
    return max(0, math.floor(left / line["per_image"])) if line["per_image"] > 0 else 0


def complete(results: dict[str, Any]) -> None:
    """Adds the lines, and the largest batches, to what has been compiled."""
    for each in results["rows"].values():
        compiled = sorted((found for found in each["compiled"] if "memory" in found), key=lambda found: found["batch"])
        base = results["rows"].get(dataclasses.replace(Row(**each["row"]), parallel="shard_map", devices=1).key, {})
        if len(compiled) > 1:
            each["line"] = fit(*compiled[-2:])
        elif compiled and "line" in base:
            slope = base["line"]["per_image"]
            fixed = compiled[-1]["memory"]["total"] - compiled[-1]["batch"] * slope
            each["line"] = {"fixed": fixed, "per_image": slope}
        if "line" in each:
            target = each["row"]["target"]
            kinds = {"cpu": tuple(BYTES), "h100": ("h100", "h200"), "h200": ("h100", "h200")}.get(target, (target,))
            each["largest_batch"] = {kind: largest_batch(each["line"], BYTES[kind]) for kind in kinds}


def markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    targets = list(dict.fromkeys(each["row"]["target"] for each in results["rows"].values()))
    parts = [f"{results['date']}, jax {results['jax']}, commit {results['commit']}."]
    for target in targets:
        found = [each for each in results["rows"].values() if each["row"]["target"] == target and "line" in each]
        kinds = list(dict.fromkeys(kind for each in found for kind in each["largest_batch"]))
        head = ["network", "parameters", "remat", "parallel", "devices", "state, GB (exact)", "of a device, GB"]
        head += ["without images, GB", "an image, MB", *(f"{kind}, {BYTES[kind] / GIGA:.0f} GB" for kind in kinds)]
        body = [_cells(each, kinds) for each in found]
        parts += [f"### Planned by the compiler for {target}", lines(head, body)]
    return "\n\n".join(parts) + "\n"


def _cells(each: dict[str, Any], kinds: list[str]) -> list[str]:
    row, state = each["row"], each["exact"]
    argument = each["compiled"][0].get("memory", {}).get("argument", math.nan)
    return [
        row["network"],
        f"{state['parameters'] / 1e6:.1f}M",
        "yes" if row["remat"] else "no",
        "replicated" if row["parallel"] == "shard_map" else row["parallel"],
        str(row["devices"]),
        f"{state['state'] / GIGA:.2f}",
        f"{argument / GIGA:.2f}",
        f"{each['line']['fixed'] / GIGA:.2f}",
        f"{each['line']['per_image'] / 1e6:.1f}",
        *(f"{each['largest_batch'][kind]:,}" if kind in each["largest_batch"] else "" for kind in kinds),
    ]


def _bytes(tree: Any) -> int:
    # A key, which no state has, would have no itemsize.
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def run(config: Config) -> dict[str, Any]:
    """Compiles what is missing, writes and returns the results."""
    compute_on_cpu()
    config.out.mkdir(parents=True, exist_ok=True)
    path, end = config.out / "memory.json", time.perf_counter() + 60 * config.minutes
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    results |= {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "commit": commit()}
    for row in rows(config):
        each = results["rows"].setdefault(row.key, {"row": dataclasses.asdict(row), "compiled": []})
        each["exact"] = exact(row)
        wanted = config.batches if row.parallel == "shard_map" and row.devices == 1 else config.batches[:1]
        for batch in wanted:
            if any(found["batch"] == batch for found in each["compiled"]):
                continue
            if time.perf_counter() > end:
                print(f"{row.key}, batch {batch}: no time left")
                break
            each["compiled"].append(measure(row, batch))
            complete(results)
            path.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{row.key}, batch {batch}: {each['compiled'][-1].get('memory', 'refused')}", flush=True)
    results["rows"] = {key: each for key, each in results["rows"].items() if each["compiled"]}
    complete(results)
    path.write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    (config.out / "memory.md").write_text(text)
    print(text)
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
