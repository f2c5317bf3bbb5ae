"""A training step beside the peers' in one run: seconds, images/s, FLOP and, where the peak is known, MFU.

Command: `python -m benchmarks.train_step --peer-python PYTHON`; on an accelerator
`python -m benchmarks.train_step --models cifar10 --batch-size 128 --dtype bfloat16 --steps 20`.

* Images: the experiments' step, conditional flow matching with a tenth of the labels dropped, Adam, gradients clipped
  to 1, one average, under `pmap` on all local devices. PyTorch has a network of as many parameters, which the results
  give for both, and the same batch, loss, clipping and average; for `mnist` the network of TorchCFM's own example
  stands beside, as large, which attends at 28x28 rather than at 7x7. Data are random and stay on the device.
* `points`: TorchCFM's own 3 x 64 network from a Gaussian to eight, data drawn anew for each step on both sides; ours
  through `fit`, as the experiments run it, with a line of metrics every 100 steps.
* `toy2d`: the network of `experiments.toy2d` as the experiment runs it, beside bare JAX: the same step in one
  `lax.scan`. Neither saves anything; the experiment would every 2,500 steps.

Each timing is of `steps` steps; what compiles comes before. FLOP of training are those of three forward passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.flops import by_hand
from benchmarks.lab import Peer, Run, asking, clocked, in_torch, in_turns, record, table, write
from benchmarks.networks import NETWORKS, Network
from experiments.lab import command_line
from experiments.lab.options import check_options
from experiments.lab.toys import Batches, Toy
from fm_jax.data.toy import make_toy
from fm_jax.losses import flow_matching
from fm_jax.models import MLP, Compute, PlainMLP, forward_flops, init_params, linen_apply, num_params
from fm_jax.paths import AffinePath
from fm_jax.sources import Normal
from fm_jax.train import TrainState, create_state, make_optimizer, make_step
from fm_jax.train.loop import fit
from fm_jax.train.parallel import pmap_step
from fm_jax.types import Key

PEAK_TFLOPS = {"NVIDIA H200": 790.0}
"""Dense bfloat16 matrix products as measured on the device, not the data sheet's figure."""
IMAGES = {"tiny": Network("tiny", (8, 8, 1), 10)} | NETWORKS
BATCH_SIZES = {"points": 256, "toy2d": 256, "mnist": 128, "cifar10": 8, "dit_s/2": 8, "dit_b/2": 4, "dit_xl/2": 1}
STEPS = {"points": 1000, "toy2d": 2000}
Model = Literal["points", "toy2d", "tiny", "mnist", "cifar10", "dit_s/2", "dit_b/2", "dit_l/2", "dit_xl/2"]
DATA: Toy = "eight_gaussians"
LOG_EVERY = 100


@dataclass(frozen=True)
class Config:
    """What to time."""

    out: Path = Path("runs/benchmark_train_step")
    """Where the results go."""
    models: tuple[Model, ...] = ("points", "toy2d", "mnist", "cifar10", "dit_s/2", "dit_b/2")
    """Networks."""
    peer_python: Path | None = None
    """Interpreter of the peers; without it ours are timed alone."""
    threads: tuple[int, ...] = (1, 2)
    """Threads of PyTorch: each is timed on points, the largest number on images."""
    torch_compile: tuple[Model, ...] = ("points", "mnist", "dit_s/2")
    """Networks for which `torch.compile` is timed too; it takes minutes on a CPU."""
    batch_size: int | None = None
    """Examples a step over all devices, by default 1 to 256 as the network allows on a CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of ours."""
    steps: int | None = None
    """Steps in each timing, by default 1 for images."""
    repeats: int = 5
    """Timings of each."""
    steps_per_call: int = 100
    """Steps that `fit` dispatches at once, in two dimensions."""

    def __post_init__(self) -> None:
        check_options(self)


def images(config: Config, name: Model, peer: Peer | None) -> dict[str, Any]:
    """A network on images."""
    network = IMAGES[name]
    model = network.make(Compute(config.dtype))
    params = init_params(model, jax.random.key(0), network.event_shape)
    optimizer = make_optimizer(1e-3, total_steps=1000)
    num, steps = config.batch_size or BATCH_SIZES.get(name, 8), config.steps or 1
    step = pmap_step(make_step(network.loss(model), optimizer))
    key, count = jax.random.key(1), num_params(params)
    x1 = jax.random.normal(key, (num, *network.event_shape))
    batch = step.batch_to_device({"x1": x1, "cond": jnp.arange(num) % network.num_classes})
    state = create_state(params, optimizer, (0.999,))
    metrics: Mapping[str, Any] = {}

    def train() -> Any:
        nonlocal state, metrics
        for _ in range(steps):
            state, metrics = step(state, key, batch)
        return state, metrics

    timed = clocked(train)
    runs: dict[str, Run] = {"fm_jax": lambda: timed() | {"loss": float(metrics["loss"]), "parameters": count}}
    if name not in ("tiny", "dit_l/2"):
        options: dict[str, Any] = {"threads": (max(config.threads),), "batch": num, "steps": steps}
        runs |= in_torch(peer, "train", model=name, compiled=name in config.torch_compile, **options)
        if name == "mnist":
            label = "TorchCFM's example network"
            runs |= in_torch(peer, "train", model="torchcfm_mnist", label=label, compiled=False, **options)
    rows = in_turns({who: per(steps, run) for who, run in runs.items()}, config.repeats)
    return {"batch_size": num, "dtype": config.dtype, "rows": rows} | _work(model, network.event_shape, num, rows)


def points(config: Config, peer: Peer | None) -> dict[str, Any]:
    """TorchCFM's network."""
    model, num, steps = PlainMLP(), config.batch_size or BATCH_SIZES["points"], config.steps or STEPS["points"]
    runs = {f"fm_jax, fit, {config.steps_per_call} steps a call": fitted(model, num, steps, config.steps_per_call)}
    options: dict[str, Any] = {"model": "points", "batch": num, "steps": steps, "threads": config.threads}
    runs |= in_torch(peer, "train", compiled="points" in config.torch_compile, **options)
    runs |= in_torch(peer, "train", compiled=False, label="PyTorch, fused Adam", fused=True, **options)
    rows = in_turns({who: per(steps, run) for who, run in runs.items()}, config.repeats)
    return {"batch_size": num, "dtype": "float32", "rows": rows} | _work(model, (2,), num, rows)


def toy2d(config: Config) -> dict[str, Any]:
    """The network of the experiment in `fit`, by steps a call, and in a bare scan."""
    model, num, steps = MLP((128,) * 3), config.batch_size or BATCH_SIZES["toy2d"], config.steps or STEPS["toy2d"]
    runs = {"bare JAX, one scan": scanned(model, num, steps)}
    for each in (config.steps_per_call, 1):
        runs[f"fm_jax, fit, {each} steps a call"] = fitted(model, num, steps, each)
    rows = in_turns({who: per(steps, run) for who, run in runs.items()}, config.repeats)
    return {"batch_size": num, "dtype": "float32", "rows": rows} | _work(model, (2,), num, rows)


def _toy(model: nn.Module) -> tuple[Any, Any, TrainState, Key]:
    """Loss, optimiser, new state and key of a run in two dimensions."""
    optimizer = make_optimizer(2e-3, total_steps=10**6, decay="cosine")
    loss_fn = flow_matching(linen_apply(model), AffinePath())
    state = create_state(init_params(model, jax.random.key(0), (2,)), optimizer, (0.999,))
    return loss_fn, optimizer, state, jax.random.key(1)


class _Last:
    """A writer that keeps the last line."""

    values: Mapping[str, float]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.values = values


def fitted(model: nn.Module, num: int, steps: int, steps_per_call: int) -> Run:
    """`steps` more steps of `fit`, as the experiments run it."""
    loss_fn, optimizer, state, key = _toy(model)
    step = pmap_step(make_step(loss_fn, optimizer), stacked=steps_per_call > 1)
    data, last = Batches(jax.random.key(2), Normal(), DATA, num), _Last()
    writer: Any = last
    options: dict[str, Any] = {"steps_per_call": steps_per_call, "log_every": LOG_EVERY, "progress": False}

    def train() -> Any:
        nonlocal state
        end = int(state.step) + steps
        state = fit(
            step,
            state,
            key,
            data,
            num_steps=end,
            images_per_batch=num,
            writer=writer,
            **options,
        )
        return state

    timed = clocked(train)
    return lambda: timed() | {"loss": last.values["loss"], "parameters": num_params(state.params)}


def scanned(model: nn.Module, num: int, steps: int) -> Run:
    """The same steps on the same law of data in one `lax.scan`, the data drawn inside."""
    loss_fn, optimizer, state, key = _toy(model)
    step, source, toy = make_step(loss_fn, optimizer, axis_name=None), Normal(), make_toy(DATA)

    def body(state: TrainState, key_data: Key) -> tuple[TrainState, Any]:
        key_x0, key_x1 = jax.random.split(key_data)
        x1 = toy(key_x1, num)
        return step(state, key, {"x0": source.draw(key_x0, x1), "x1": x1})

    @jax.jit
    def keys_of(first: Any) -> Key:
        return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(2), i))(first + jnp.arange(steps))

    scan = jax.jit(lambda state, first: jax.lax.scan(body, state, keys_of(first)), donate_argnums=0)
    metrics: dict[str, Any] = {}

    def train() -> Any:
        nonlocal state, metrics
        state, metrics = scan(state, int(state.step))  # a copy, for the state is donated
        return state

    timed = clocked(train)
    return lambda: timed() | {"loss": float(metrics["loss"][-1]), "parameters": num_params(state.params)}


def per(steps: int, run: Run) -> Run:
    """The run with its seconds divided by its steps."""

    def once() -> dict[str, Any]:
        found = run()
        return found | {name: found[name] / steps for name in ("seconds", "cpu_seconds")}

    return once


def _work(model: nn.Module, event_shape: tuple[int, ...], num: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The FLOP of a step on one example, and how many of them and of examples a second ours comes to."""
    flops, rate = 3 * forward_flops(model, event_shape), num / rows[0]["median"]
    peak = PEAK_TFLOPS.get(jax.devices()[0].device_kind)
    return {
        "train_gflop_by_hand": 3 * by_hand(model, event_shape) / 1e9,
        "train_gflop_lowered": flops / 1e9,
        "examples_per_second": rate,
        "tflops_per_second": rate * flops / 1e12,
        "mfu": None if peak is None else rate * flops / 1e12 / (peak * jax.local_device_count()),
        "devices": jax.local_device_count(),
    }


def _table(name: str, found: dict[str, Any]) -> str:
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    title = (
        f"{name}, batch {found['batch_size']}, {found['dtype']}: a step, "
        f"{found['rows'][0].get('parameters', 0):,} parameters"
    )
    work = (
        f"{found['train_gflop_by_hand']:.3g} GFLOP an example by hand, {found['train_gflop_lowered']:.3g} lowered; "
        f"ours {found['examples_per_second']:.3g} examples/s, {found['tflops_per_second']:.3g} TFLOP/s{mfu}."
    )
    return table(title, found["rows"]) + f"\n\n{work}"


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    with asking(config.peer_python) as peer:
        results: dict[str, Any] = {"record": record(peer)}
        for name in config.models:
            if name == "points":
                results[name] = points(config, peer)
            elif name == "toy2d":
                results[name] = toy2d(config)
            else:
                results[name] = images(config, name, peer)
            tables = [_table(each, results[each]) for each in results if each != "record"]
            write(config.out, "train_step", results, tables)
        return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
