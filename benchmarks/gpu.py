"""One GPU, measured in parts: images a second, model FLOP utilisation and peak memory of training, guided sampling.

Command: `benchmarks/gpu.sh`, or `python -m benchmarks.gpu --smoke` to see whether it runs through anywhere

Every part is a process of its own, with a device to itself, an XLA flag or none, and a time limit; the JSON is written
after each. A part for which there is no time left is left out, and so is what needs a GPU where there is none. Data are
random and stay on the device; compilation is given apart. FLOP are those of three forward passes, 2 a multiply-
accumulate, whatever is computed twice. Nothing but JAX, Flax, Optax and jaxtyping is needed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FLAGS = {
    "no flag": "",
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "Triton for any product": "--xla_gpu_triton_gemm_any=true",
    "latency-hiding scheduler": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "cuDNN layer norm": "--xla_gpu_enable_cudnn_layer_norm=true",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "exhaustive tiling": "--xla_gpu_exhaustive_tiling_search=true",
}
"""Candidates for `experiments/lab/xla.py`, each tried alone on DiT-B/2. None is used elsewhere: not yet measured."""
DATA_SHEET_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}
"""Dense bfloat16 products."""
TRAIN = {"dit_xl/2 scan": 128, "cifar10": 512, "dit_b/2": 256, "dit_s/2": 512, "dit_xl/2": 128}
"""Networks, as a loop over their blocks or without, and images a step; half as many where these do not fit."""
SAMPLE = {"dit_xl/2": 64}
PARTS = (
    "device",
    *(f"train:{name}" for name in TRAIN if name != "dit_xl/2"),
    *(f"sample:{name}" for name in SAMPLE),
    "torch:dit_b/2",
    "train:dit_xl/2",  # from here on, what there is time for
    *(f"flags:{name}" for name in FLAGS),
    "torch:dit_xl/2",
)
LIMIT = {"device": 60, "train": 200, "sample": 150, "torch": 150, "flags": 100}
"""Seconds after which a part is ended."""
LEAST = 30
"""Seconds that a part needs at all."""


def device(smoke: bool) -> dict[str, Any]:
    """What the device is, and its rate in products of square bfloat16 matrices, the best of five."""
    import jax
    import jax.numpy as jnp

    found = jax.devices()[0]
    if found.platform != "gpu" and not smoke:
        return {"kind": found.device_kind, "platform": found.platform}
    size, repeats = (256, 2) if smoke else (8192, 20)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    seconds = []
    jax.block_until_ready(product(a, b))
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(repeats):
            c = product(a, b)
        jax.block_until_ready(c)
        seconds.append((time.perf_counter() - start) / repeats)
    return {
        "kind": found.device_kind,
        "platform": found.platform,
        "jax": jax.__version__,
        "matmul_tflops": 2 * size**3 / min(seconds) / 1e12,
        "memory_limit": (found.memory_stats() or {}).get("bytes_limit"),
    }


def train(name: str, smoke: bool) -> dict[str, Any]:
    """The training step in bfloat16, with cuDNN's attention on a GPU; halves the batch until it fits."""
    import jax

    batch, (name, _, scan) = TRAIN[name], name.partition(" ")
    if smoke:
        name, batch = "small_unet" if name == "cifar10" else "small_dit", 8
    while True:
        try:
            return _train(name, bool(scan), batch, smoke)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or batch < 16:
                raise
            print(f"{name}: {batch} images do not fit", flush=True)
            batch //= 2


def _train(name: str, scan_layers: bool, batch: int, smoke: bool) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from benchmarks.networks import NETWORKS
    from fm_jax.models import Compute, forward_flops, init_params, num_params
    from fm_jax.train import create_state, make_optimizer, make_step

    network = NETWORKS[name]
    model = network.make(Compute("bfloat16", attention=None if _on_cpu() else "cudnn"), scan_layers=scan_layers)
    optimizer, key = make_optimizer(1e-4, total_steps=1_000_000), jax.random.key(0)
    state = create_state(init_params(model, key, network.event_shape), optimizer, (0.9999,))
    num = num_params(state.params)
    images = {
        "x1": jax.random.normal(key, (batch, *network.event_shape)),
        "cond": jnp.arange(batch) % network.num_classes,
    }
    step = jax.jit(make_step(network.loss(model), optimizer, axis_name=None), donate_argnums=0)
    start = time.perf_counter()
    compiled = step.lower(state, key, images).compile()
    seconds = time.perf_counter() - start
    rates = []
    for repeat in range(4):  # the first warms up
        count = 2 if smoke or repeat == 0 else 20
        start = time.perf_counter()
        for _ in range(count):
            state, metrics = compiled(state, key, images)
        loss = float(jax.block_until_ready(metrics["loss"]))
        if repeat:
            rates.append(count * batch / (time.perf_counter() - start))
    if not loss < float("inf"):
        raise ValueError(f"the loss of {name} must be finite, got {loss}.")
    # As the attention of the CPU counts it: XLA does not look into cuDNN's.
    flops = 3 * forward_flops(network.make(Compute("bfloat16", attention="xla")), network.event_shape)
    return {
        "network": name,
        "scan_layers": scan_layers,
        "parameters": num,
        "batch": batch,
        "loss": loss,
        "images_per_second": {"min": min(rates), "median": statistics.median(rates), "max": max(rates)},
        "tflops": statistics.median(rates) * flops / 1e12,
        "train_gflop_per_image": flops / 1e9,
        "compile_seconds": seconds,
        "peak_bytes": _peak_bytes(),
    }


def sample(name: str, smoke: bool) -> dict[str, Any]:
    """Euler's method with classifier-free guidance, both branches in one batch."""
    import jax
    import jax.numpy as jnp

    from benchmarks.networks import NETWORKS
    from fm_jax.guidance import classifier_free_batched
    from fm_jax.models import Compute, init_params, linen_apply
    from fm_jax.parameterization import bind
    from fm_jax.samplers import RungeKutta
    from fm_jax.samplers import sample as follow
    from fm_jax.schedules import Linear

    name, batch, steps = ("small_dit", 4, 2) if smoke else (name, SAMPLE[name], 50)
    network = NETWORKS[name]
    model = network.make(Compute("bfloat16", attention=None if _on_cpu() else "cudnn"))
    params = init_params(model, jax.random.key(0), network.event_shape)
    labels = jnp.arange(batch) % network.num_classes

    @jax.jit
    def draw(params, x0):
        model_fn = bind(linen_apply(model), params)
        v = classifier_free_batched(model_fn, "velocity", Linear(), labels, network.num_classes, 4.0)
        return follow(v, x0, RungeKutta("euler"), times=steps).x

    x0 = jax.random.normal(jax.random.key(1), (batch, *network.event_shape))
    jax.block_until_ready(draw(params, x0))
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(draw(params, x0))
        rates.append(batch / (time.perf_counter() - start))
    return {
        "network": name,
        "batch": batch,
        "steps": steps,
        "nfe": 2 * steps,
        "images_per_second": {"min": min(rates), "median": statistics.median(rates), "max": max(rates)},
        "peak_bytes": _peak_bytes(),
    }


def flags(name: str, smoke: bool) -> dict[str, Any]:
    """The training step of DiT-B/2 under the flag of that name, which the process was started with."""
    return train("dit_b/2", smoke) | {"flag": FLAGS[name]}


def torch(name: str, smoke: bool) -> dict[str, Any]:
    """PyTorch's training step of the same network, compiled and with its fused attention."""
    from benchmarks import gpu_peer

    return gpu_peer.train(name, 4 if smoke else TRAIN[name], smoke)


def _on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


def _peak_bytes() -> int | None:
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


KINDS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "device": lambda _, smoke: device(smoke),
    "train": train,
    "sample": sample,
    "flags": flags,
    "torch": torch,
}


def run_part(part: str, smoke: bool, limit: float) -> dict[str, Any]:
    """Runs a part in a process of its own; what it found, or why it found nothing."""
    kind, _, name = part.partition(":")
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
    if kind == "flags":
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {FLAGS[name]}".strip()
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", part, *(["--smoke"] if smoke else [])]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit, check=False, cwd=_root()
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"failed": f"exit status {done.returncode}: {reason[:500]}"}
    return json.loads(lines[-1]) | {"seconds": round(time.perf_counter() - start, 1)}


def add_utilisation(results: dict[str, Any]) -> None:
    """Adds the shares of the measured and of the data sheet's peak to whatever has a rate of FLOP."""
    found = results["parts"].get("device", {})
    peaks = {"measured": found.get("matmul_tflops"), "data_sheet": DATA_SHEET_TFLOPS.get(found.get("kind", ""))}
    for part in results["parts"].values():
        if "tflops" in part:
            part["mfu"] = {name: part["tflops"] / peak for name, peak in peaks.items() if peak}


def line(part: str, found: dict[str, Any]) -> str:
    """What was found, in a line."""
    if "failed" in found:
        return f"{part}: {found['failed']}"
    words = [found["kind"]] if "kind" in found else [f"{found['images_per_second']['median']:,.1f} images/s"]
    if "matmul_tflops" in found:
        words.append(f"{found['matmul_tflops']:,.1f} TFLOP/s")
    words += [f"{share:.1%} of the {name.replace('_', ' ')} peak" for name, share in found.get("mfu", {}).items()]
    if found.get("peak_bytes"):
        words.append(f"{found['peak_bytes'] / 1e9:.1f} GB")
    return f"{part}: {', '.join(words)}"


def main() -> None:
    """Runs the parts in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the JSON")
    parser.add_argument("--minutes", type=float, default=11.5, help="after these no part is begun, and none goes on")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure, in this order")
    parser.add_argument("--smoke", action="store_true", help="next to no computation, also without a GPU")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        kind, _, name = options.only.partition(":")
        if options.smoke and kind != "torch":
            import jax

            jax.config.update("jax_disable_most_optimizations", True)  # which take longer than what is to be run
        print(json.dumps(KINDS[kind](name, options.smoke)))
        return
    begin = time.perf_counter()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"command": sys.argv, "smoke": options.smoke, "parts": {}}
    for part in dict.fromkeys(("device", *options.parts)):
        left = 60 * options.minutes - (time.perf_counter() - begin)
        if left < LEAST:
            results["parts"][part] = {"failed": "no time left"}
        else:
            results["parts"][part] = run_part(
                part, options.smoke, min(left, LIMIT[part.partition(":")[0]] * (3 if options.smoke else 1))
            )
        add_utilisation(results)
        results["seconds"] = round(time.perf_counter() - begin, 1)
        (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"[{results['seconds']:6.1f} s] {line(part, results['parts'][part])}", flush=True)
        if part == "device" and results["parts"][part].get("platform") != "gpu" and not options.smoke:
            sys.exit("There is no GPU here: nothing is measured. --smoke runs through all parts on a CPU.")


def _root() -> Path:
    return Path(__file__).parents[1]


if __name__ == "__main__":
    main()
