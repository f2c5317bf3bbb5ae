"""Weak scaling on paper: the time of a training step on up to 256 chips, from FLOP, bytes and published rates.

Command: `python -m benchmarks.scaling`; nothing is measured.

Assumptions, all of them:

* A chip computes at 40% of its peak of dense bfloat16 products; a training step is three forward passes.
* Gradients, and the parameters that `fsdp` gathers, are float32. A ring over N chips has each send (N - 1) / N of the
  bytes for a reduce-scatter or an all-gather, and twice that for an all-reduce.
* Data parallelism all-reduces the gradients. `fsdp` gathers the parameters once and reduce-scatters the gradients, as
  its compiled program does: the same bytes. To gather them anew for the backward pass would be half as much again.
* Links run at their published rate in one direction, with no latency. GPUs reduce within a node of eight by NVLink and
  between nodes with an eighth of the bytes each over a link of their own. TPUs use all links of a chip at once, as on a
  torus that closes; smaller slices do not close, and have less.
* Overlap lies between none, where the times add up, and perfect, where the longer one counts. Data come in time.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lab import lines
from experiments.lab import command_line
from experiments.lab.options import check_options


@dataclass(frozen=True)
class Fabric:
    """Chips and what joins them.

    Attributes:
        name: what it is called in the table.
        tflops: peak of dense bfloat16 products of a chip.
        near: bytes a second that a chip sends to the others of its group.
        group: chips that are joined at that rate.
        far: bytes a second of a chip to other groups.
        source: where the rates are published.
    """

    name: str
    tflops: float
    near: float
    group: int
    far: float
    source: str


FABRICS = (
    Fabric("H100, H200", 989.4, 450e9, 8, 50e9, "NVLink 4: 900 GB/s both ways; ConnectX-7: 400 Gb/s a GPU"),
    Fabric("TPU v5e", 197.0, 200e9, 256, math.inf, "cloud.google.com/tpu/docs/v5e: 400 GB/s both ways"),
    Fabric("TPU v6e", 918.0, 400e9, 256, math.inf, "cloud.google.com/tpu/docs/v6e: 800 GB/s both ways"),
    Fabric("TPU v5p", 459.0, 600e9, 8960, math.inf, "cloud.google.com/tpu/docs/v5p: 1200 GB/s both ways"),
)


@dataclass(frozen=True)
class Config:
    """What is trained."""

    parameters: float = 675e6
    """Parameters; those of DiT-XL/2."""
    forward_gflop: float = 237.2
    """GFLOP of one forward pass of one image."""
    batch: int = 32
    """Images on each chip."""
    utilisation: float = 0.4
    """Share of the peak at which a chip computes."""
    chips: tuple[int, ...] = (1, 8, 16, 64, 256)
    """Numbers of chips."""
    out: Path | None = None
    """Where the JSON goes, if anywhere."""

    def __post_init__(self) -> None:
        check_options(self)


def compute_seconds(config: Config, fabric: Fabric) -> float:
    """Of the products of a step on one chip."""
    return 3 * config.forward_gflop * 1e9 * config.batch / (config.utilisation * fabric.tflops * 1e12)


def reduce_seconds(num_bytes: float, chips: int, fabric: Fabric) -> float:
    """Of an all-reduce, or of a gather and a reduce-scatter, of as many bytes.

    Within groups first: each chip then has its part of the sum, which goes to the chips of the same place in the other
    groups and comes back whole.
    """
    inside = min(chips, fabric.group)
    groups = math.ceil(chips / fabric.group)
    near = 2 * (inside - 1) / inside * num_bytes / fabric.near
    far = 2 * (groups - 1) / groups * num_bytes / inside / fabric.far
    return near + far


def table(config: Config) -> list[dict[str, Any]]:
    """A row for every fabric and number of chips."""
    rows = []
    for fabric in FABRICS:
        compute = compute_seconds(config, fabric)
        for chips in config.chips:
            reduce = reduce_seconds(4 * config.parameters, chips, fabric)
            rows.append(
                {
                    "fabric": fabric.name,
                    "chips": chips,
                    "compute_ms": 1e3 * compute,
                    "collectives_ms": 1e3 * reduce,
                    "efficiency_no_overlap": compute / (compute + reduce),
                    "efficiency_overlap": compute / max(compute, reduce),
                    "images_per_second": [
                        chips * config.batch / seconds for seconds in (compute + reduce, max(compute, reduce))
                    ],
                    "least_batch_to_hide": math.ceil(config.batch * reduce / compute),
                }
            )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    head = ["chips", "number", "products, ms", "collectives, ms", "efficiency, no overlap - perfect", "images/s"]
    head.append("images a chip that hide the collectives")
    cells = [
        [
            row["fabric"],
            str(row["chips"]),
            f"{row['compute_ms']:.1f}",
            f"{row['collectives_ms']:.1f}",
            f"{row['efficiency_no_overlap']:.0%} - {row['efficiency_overlap']:.0%}",
            " - ".join(f"{rate:,.0f}" for rate in row["images_per_second"]),
            str(row["least_batch_to_hide"]),
        ]
        for row in rows
    ]
    return lines(head, cells)


def run(config: Config) -> list[dict[str, Any]]:
    """Prints the table and returns its rows."""
    rows = table(config)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(markdown(rows))
    return rows


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
