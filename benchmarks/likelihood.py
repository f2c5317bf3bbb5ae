"""Likelihood beside `flow_matching` with `torchdiffeq` in one run: the divergence exact, or Hutchinson's estimate.

Command: `python -m benchmarks.likelihood --peer-python PYTHON`

`exact`: TorchCFM's 3 x 64 network on points, midpoint steps. `adaptive`: the same by dopri5 at tolerances of 1e-5,
where the steps depend on the random weights; compare the time over the evaluations (NFE). `hutchinson`: one probe, the
MNIST U-Net, Euler's method. All in float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks.lab import Peer, Run, asking, clocked, compared, in_torch
from benchmarks.networks import NETWORKS
from benchmarks.sampling import perturbed
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.likelihood import Exact, Hutchinson, encode_and_log_prob
from fm_jax.models import Compute, PlainMLP, init_params, linen_apply
from fm_jax.parameterization import bind, velocity_fn
from fm_jax.samplers import Adaptive, RungeKutta
from fm_jax.schedules import Linear
from fm_jax.types import Array, Params, Sampler

Part = Literal["exact", "adaptive", "hutchinson"]


@dataclass(frozen=True)
class Config:
    """What to time."""

    out: Path = Path("runs/benchmark_likelihood")
    """Where the results go."""
    parts: tuple[Part, ...] = ("exact", "adaptive", "hutchinson")
    """What to time."""
    peer_python: Path | None = None
    """Interpreter of the peers; without it ours are timed alone."""
    threads: tuple[int, ...] = (1, 2)
    """Threads of PyTorch: each is timed on points, the largest number on images."""
    num_points: int = 1024
    """Points at once."""
    num_images: int = 16
    """Images at once."""
    steps: int = 50
    """Midpoint steps on points; Euler steps on images are half as many."""
    repeats: int = 5
    """Timings of each."""

    def __post_init__(self) -> None:
        check_options(self)


def ours(config: Config, part: Part) -> Run:
    """One jitted program."""
    on_images = part == "hutchinson"
    shape = NETWORKS["mnist"].event_shape if on_images else (2,)
    model = NETWORKS["mnist"].make(Compute()) if on_images else PlainMLP()
    params = perturbed(init_params(model, jax.random.key(0), shape))
    num = config.num_images if on_images else config.num_points
    x1, labels = jax.random.normal(jax.random.key(1), (num, *shape)), jnp.arange(num) % 10 if on_images else None
    sampler: Sampler = Adaptive("dopri5") if part == "adaptive" else RungeKutta("euler" if on_images else "midpoint")
    divergence = Hutchinson() if on_images else Exact()
    times = {"exact": config.steps, "adaptive": None, "hutchinson": config.steps // 2}[part]

    @jax.jit
    def evaluate(params: Params, x1: Array) -> tuple[Array, Any]:
        v = velocity_fn(bind(linen_apply(model), params), "velocity", Linear(), labels)
        key = jax.random.key(2)
        solution, log_p = encode_and_log_prob(v, x1, key=key, divergence=divergence, sampler=sampler, times=times)
        return log_p, solution.calls

    calls: list[Any] = []

    def once() -> Array:
        log_p, count = evaluate(params, x1)
        calls[:] = [count]
        return log_p

    timed = clocked(once)
    return lambda: timed() | {"nfe": int(calls[0])}


def theirs(config: Config, part: Part, peer: Peer | None) -> dict[str, Run]:
    """`flow_matching`'s, which differentiates the network at each evaluation."""
    options: dict[str, Any] = {"compiled": False, "label": "flow_matching", "exact": part != "hutchinson"}
    if part == "hutchinson":
        options |= {"model": "mnist", "batch": config.num_images, "steps": config.steps // 2, "method": "euler"}
        return in_torch(peer, "likelihood", threads=(max(config.threads),), **options)
    options |= {"model": "points", "batch": config.num_points, "threads": config.threads}
    fixed = part == "exact"
    return in_torch(
        peer, "likelihood", steps=config.steps if fixed else 0, method="midpoint" if fixed else "dopri5", **options
    )


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    with asking(config.peer_python) as peer:

        def parts() -> Iterator[tuple[str, str, int, dict[str, Run]]]:
            for part in config.parts:
                num = config.num_images if part == "hutchinson" else config.num_points
                yield part, part, num, {"fm_jax": ours(config, part)} | theirs(config, part, peer)

        return compared(config.out, "likelihood", peer, parts(), config.repeats)


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
