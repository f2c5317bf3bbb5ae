"""What a compiled training step consists of: products and their dtypes, fusions, layouts, collectives, memory, FLOPs.

Command: `python -m benchmarks.compiled --model dit_s/2 --parallel fsdp --devices 8`

The step is the experiments': conditional flow matching, clipped Adam, one average, float32 parameters. Shapes alone go
in, so nothing is computed and no device is needed; `--target` names another compiler than the CPU's, see
`benchmarks/targets.py`. A loop counts once, whatever its length, and so do the collectives in it.
"""

import dataclasses
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks.networks import NETWORKS, Network
from benchmarks.targets import OPTIONS, Target, devices
from experiments.lab import command_line
from experiments.lab.options import check_options
from experiments.lab.parallel import Parallel, make_parallel
from fm_jax.models import Compute, init_params, num_params
from fm_jax.train import TrainState, create_state, make_optimizer
from fm_jax.train.parallel import split_batch
from fm_jax.types import Batch, LossFn

Model = Literal["mnist", "cifar10", "dit_s/2", "dit_b/2", "dit_l/2", "dit_xl/2", "small_unet", "small_dit"]
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4} | {
    "s64": 8,
    "u64": 8,
    "f64": 8,
}


@dataclass(frozen=True)
class Program:
    """A training step, all that its compiled form depends on.

    Attributes:
        network: a name of `benchmarks.networks.NETWORKS`.
        parallel: how it is spread over the devices.
        batch: images on each device.
        dtype: what the network computes in.
        remat: whether activations are computed twice.
        scan_layers: whether a transformer is a loop over its blocks.
    """

    network: str
    parallel: Parallel = "shard_map"
    batch: int = 8
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = False
    scan_layers: bool = False

    def lower(self, on: Sequence[jax.Device]) -> jax.stages.Lowered:
        """Lowers the step for these devices."""
        return lower(NETWORKS[self.network], self._model(), self.parallel, self.batch, on)

    def state(self) -> TrainState:
        """The shapes of its state."""
        return abstract_state(NETWORKS[self.network], self._model())

    def _model(self) -> nn.Module:
        network = NETWORKS[self.network]
        return network.make(Compute(self.dtype, self.remat), scan_layers=self.scan_layers and network.is_dit)


def abstract_state(network: Network, model: nn.Module) -> TrainState:
    """The shapes of the state of a run, with clipped Adam and one average."""

    def create(key: jax.Array) -> TrainState:
        return create_state(init_params(model, key, network.event_shape), _optimizer(), (0.9999,))

    return jax.eval_shape(create, jax.random.key(0))


def lower(
    network: Network, model: nn.Module, parallel: Parallel, batch: int, on: Sequence[jax.Device]
) -> jax.stages.Lowered:
    """Lowers the training step of a network; `batch` is that of one device."""
    num = batch * len(on)
    x1 = jax.ShapeDtypeStruct((num, *network.event_shape), jnp.float32)
    whole: Batch = {"x1": x1, "cond": jax.ShapeDtypeStruct((num,), jnp.int32)}
    return lower_step(network.loss(model), _optimizer(), abstract_state(network, model), whole, parallel, on)


def lower_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    parallel: Parallel,
    on: Sequence[jax.Device],
) -> jax.stages.Lowered:
    """Lowers the step of a loss on these devices; state and batch, that of all devices, may be shapes alone."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = make_parallel(parallel, loss_fn, optimizer, list(on))
    if parallel == "pmap":
        return step.run.lower(state, key, jax.eval_shape(lambda whole: split_batch(whole, len(on)), batch))
    placed = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, step.shardings(state)
    )
    return step.run.lower(placed, key, batch)


def _optimizer() -> optax.GradientTransformation:
    return make_optimizer(1e-4, total_steps=1_000_000)


@dataclass(frozen=True)
class Operation:
    """A line of an optimised program: what it makes, and of which operands."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    line: str


# A name, a shape or a tuple of them, with or without layouts, and what is done.
LINE = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<result>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\((?P<rest>.*)$"
)
SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")


def operations(hlo: str) -> Iterator[Operation]:
    """The operations of a program's text, those inside of fusions and loops included."""
    for line in hlo.splitlines():
        if match := LINE.match(re.sub(r"/\*index=\d+\*/", "", line)):
            operands = tuple(re.findall(r"%([\w.\-]+)", match["rest"].partition("), ")[0]))
            yield Operation(match["name"], match["opcode"], match["result"], operands, line)


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in the text of a shape, such as `(f32[8,4]{1,0}, bf16[2]{0})`."""
    return sum(
        ITEM_BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
        for dtype, sizes in SHAPE.findall(shape)
        if dtype in ITEM_BYTES
    )


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Count and bytes of the results of each kind of collective in an optimised program.

    One that is started and awaited apart counts once, where it is awaited.
    """
    found: dict[str, dict[str, int]] = {}
    for op in operations(hlo):
        kind = op.opcode.removesuffix("-done")
        if kind in COLLECTIVES:
            entry = found.setdefault(kind, {"count": 0, "bytes": 0})
            entry["count"] += 1
            entry["bytes"] += shape_bytes(op.result)
    return dict(sorted(found.items()))


def products(hlo: str) -> dict[str, int]:
    """How often each product occurs in an optimised program: `dot bf16 x bf16 -> f32`."""
    found = list(operations(hlo))
    dtypes = {op.name: _dtype(op.result) for op in found}
    return _sorted_counts(
        f"{op.opcode} {' x '.join(dtypes.get(name, '?') for name in op.operands[:2])} -> {_dtype(op.result)}"
        for op in found
        if op.opcode in ("dot", "convolution")
    )


def products_asked_for(stablehlo: str) -> dict[str, int]:
    """How often each product occurs in a program as it was traced."""
    tensor = r"tensor<(?:\d+x)*(\w+)>"
    pattern = rf"stablehlo\.(dot_general|convolution)\b.* : \({tensor}, {tensor}\) -> {tensor}"
    return _sorted_counts(f"{kind} {a} x {b} -> {out}" for kind, a, b, out in re.findall(pattern, stablehlo))


def layouts(hlo: str) -> dict[str, Any]:
    """What shows how arrays lie in memory: the order of the axes of convolutions, and what is copied to change it."""
    moved = [op for op in operations(hlo) if op.opcode in ("copy", "transpose")]
    return {
        "convolutions": _sorted_counts(re.findall(r"dim_labels=(\S+?)[,\s]", hlo)),
        "copies_and_transposes": len(moved),
        "bytes_of_these": sum(shape_bytes(op.result) for op in moved),
    }


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of one device: arguments, outputs, those that share the arguments' memory, temporaries, and their sum."""
    found = compiled.memory_analysis()
    sizes = {
        name: int(getattr(found, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp", "generated_code")
    }
    return sizes | {"total": sum(sizes.values()) - 2 * sizes["alias"]}


def cost(compiled: jax.stages.Compiled) -> dict[str, float]:
    """FLOP and bytes accessed, as the compiler counts them for one device; nothing where it does not."""
    found = compiled.cost_analysis() or {}
    return {name: float(found[name]) for name in ("flops", "bytes accessed", "transcendentals") if name in found}


def inspect(program: Program, target: Target, num_devices: int) -> dict[str, Any]:
    """Compiles a program and returns what can be seen of it."""
    on = devices(target, num_devices)
    start = time.perf_counter()
    lowered = program.lower(on)
    lowered_at = time.perf_counter()
    compiled = lowered.compile(OPTIONS.get(target))
    seconds = {"lower": lowered_at - start, "compile": time.perf_counter() - lowered_at}
    hlo = compiled.as_text() or ""
    ops = list(operations(hlo))
    return {
        **dataclasses.asdict(program),
        "target": target,
        "devices": num_devices,
        "device_kind": on[0].device_kind,
        "jax": jax.__version__,
        "parameters": num_params(program.state().params),
        "products_as_traced": products_asked_for(lowered.as_text()),
        "products": products(hlo),
        "fusions": _sorted_counts(re.findall(r"kind=k(\w+)", hlo)),
        "custom_calls": _sorted_counts(re.findall(r'custom_call_target="([^"]*)"', hlo)),
        "operations": dict(Counter(op.opcode for op in ops).most_common(12)),
        "layouts": layouts(hlo),
        "collectives": collectives(hlo),
        "memory": memory(compiled),
        "cost": cost(compiled),
        "seconds": seconds,
    }


def _dtype(shape: str) -> str:
    return ", ".join(dict.fromkeys(dtype for dtype, _ in SHAPE.findall(shape)))


def _sorted_counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


@dataclass(frozen=True)
class Config:
    """What to compile, and for what."""

    model: Model = "dit_s/2"
    """Network."""
    parallel: Parallel = "shard_map"
    """How the step is spread over the devices."""
    batch: int = 8
    """Images on each device."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """What the network computes in."""
    remat: bool = False
    """Compute activations twice."""
    scan_layers: bool = False
    """Compile one block of a transformer and loop over it."""
    devices: int = 8
    """How many."""
    target: Target = "cpu"
    """Which compiler, see `benchmarks/targets.py`."""
    out: Path | None = None
    """Where the JSON goes; it is printed anyway."""

    def __post_init__(self) -> None:
        check_options(self)


def run(config: Config) -> dict[str, Any]:
    """Compiles, prints and returns."""
    program = Program(config.model, config.parallel, config.batch, config.dtype, config.remat, config.scan_layers)
    found = inspect(program, config.target, config.devices)
    text = json.dumps(found, indent=2)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(text + "\n")
    print(text)
    return found


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
