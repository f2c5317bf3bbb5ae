"""Sampling beside the peers in one run: one evaluation, fixed steps, adaptive steps, two branches of guidance.

Command: `python -m benchmarks.sampling --peer-python PYTHON`

The MNIST U-Net of 1.1M parameters, the same in PyTorch, with random weights: what they draw is noise, and how long it
takes is the same. Beside it stands the network of TorchCFM's MNIST example, as large, which attends at 28x28 too. Ours
is one jitted program. Of PyTorch, eager and `torch.compile`d, there are a plain loop of Euler's method (`loop`) and
`flow_matching`'s solver on `torchdiffeq`, both without gradients. Adaptive steps depend on the weights: there the
seconds over the network evaluations (NFE) are to be compared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lab import Peer, Run, asking, clocked, compared, in_torch
from benchmarks.networks import NETWORKS
from experiments.lab import command_line
from experiments.lab.options import check_options
from fm_jax.guidance import classifier_free_batched
from fm_jax.models import Compute, init_params, linen_apply
from fm_jax.parameterization import bind, velocity_fn
from fm_jax.samplers import Adaptive, RungeKutta, sample
from fm_jax.schedules import Linear
from fm_jax.types import Array, Params, Sampler

NAME = "mnist"
Part = Literal["forward", "fixed", "adaptive", "guided"]
GUIDANCE = 2.0


@dataclass(frozen=True)
class Config:
    """What to time."""

    out: Path = Path("runs/benchmark_sampling")
    """Where the results go."""
    parts: tuple[Part, ...] = ("forward", "fixed", "adaptive", "guided")
    """What to time."""
    peer_python: Path | None = None
    """Interpreter of the peers; without it ours are timed alone."""
    threads: int = 2
    """Threads of PyTorch."""
    torch_compile: bool = True
    """Whether `torch.compile` is timed too."""
    batch_size: int = 16
    """Images at once."""
    forward_batch_size: int = 128
    """Images in the one evaluation."""
    steps: int = 100
    """Steps of Euler's method; half as many with guidance, for as many evaluations."""
    tolerance: float = 1e-5
    """Absolute and relative, of adaptive steps; `flow_matching`'s default."""
    repeats: int = 5
    """Timings of each."""

    def __post_init__(self) -> None:
        check_options(self)


def perturbed(params: Params) -> Params:
    """Parameters with noise, as the peers': the networks start at zero, which is no field to solve."""
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: x + np.float32(0.02) * rng.standard_normal(x.shape, dtype=np.float32), params)


def ours(config: Config, part: Part) -> Run:
    """One jitted program."""
    network = NETWORKS[NAME]
    model = network.make(Compute())
    params = perturbed(init_params(model, jax.random.key(0), network.event_shape))
    num = config.forward_batch_size if part == "forward" else config.batch_size
    x0 = jax.random.normal(jax.random.key(1), (num, *network.event_shape))
    labels = jnp.arange(num) % network.num_classes
    method: Sampler = Adaptive("dopri5", config.tolerance, config.tolerance)
    if part != "adaptive":
        method = RungeKutta("euler")
    steps = None if part == "adaptive" else config.steps // (2 if part == "guided" else 1)

    @jax.jit
    def draw(params: Params, x0: Array) -> tuple[Array, Any]:
        network_fn = bind(linen_apply(model), params)
        if part == "guided":
            null = network.num_classes
            v: Callable = classifier_free_batched(network_fn, "velocity", Linear(), labels, null, GUIDANCE)
        else:
            v = velocity_fn(network_fn, "velocity", Linear(), labels)
        if part == "forward":
            return v(jnp.float32(0.5), x0), jnp.int32(1)
        solution = sample(v, x0, method, times=steps)
        return solution.x, solution.nfe

    nfe: list[int] = []

    def once() -> Array:
        x, count = draw(params, x0)
        nfe[:] = [count]
        return x

    timed = clocked(once)
    return lambda: timed() | {"nfe": int(nfe[0])}


def theirs(config: Config, part: Part, peer: Peer | None) -> dict[str, Run]:
    """PyTorch's plain loop and `flow_matching`'s solver."""
    options: dict[str, Any] = {"threads": (config.threads,), "compiled": config.torch_compile, "model": NAME}
    example: dict[str, Any] = {"model": "torchcfm_mnist", "label": "TorchCFM's example network", "compiled": False}
    if part == "forward":
        found = in_torch(peer, "forward", batch=config.forward_batch_size, **options)
        return found | in_torch(peer, "forward", batch=config.forward_batch_size, **options | example)
    options |= {"batch": config.batch_size}
    if part == "adaptive":
        return in_torch(peer, "sample", label="flow_matching", method="dopri5", **options)
    guided = part == "guided"
    options |= {"guided": guided, "steps": config.steps // (2 if guided else 1)}
    loop = in_torch(peer, "sample", label="loop", method="loop", **options)
    loop |= in_torch(peer, "sample", label="flow_matching", method="euler", **options)
    if not guided:
        loop |= in_torch(peer, "sample", method="loop", **options | example)
    return loop


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    with asking(config.peer_python) as peer:

        def parts() -> Iterator[tuple[str, str, int, dict[str, Run]]]:
            for part in config.parts:
                num = config.forward_batch_size if part == "forward" else config.batch_size
                yield part, f"{part}, MNIST U-Net", num, {"fm_jax": ours(config, part)} | theirs(config, part, peer)

        return compared(config.out, "sampling", peer, parts(), config.repeats)


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
