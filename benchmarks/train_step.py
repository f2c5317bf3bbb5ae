"""Training throughput of a network alone: images/s and, where the device's peak is known, model FLOP utilisation.

Command: `python -m benchmarks.train_step --model cifar10 --batch-size 128 --dtype bfloat16`

The step is the experiments': conditional flow matching, Adam, gradient clipping, one EMA, under `pmap` on all local
devices. Data are random and stay on the device; compilation is excluded and given apart. FLOP are those of three
forward passes as XLA counts them, 2 a multiply-accumulate.
"""

import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.lab import command_line, images
from experiments.lab.method import Method, make_loss
from experiments.lab.training import Training
from fm_jax.models import forward_flops, init_params, num_params
from fm_jax.train import create_state, make_optimizer, make_step
from fm_jax.train.parallel import pmap_step, split_batch

PEAK_TFLOPS = {"NVIDIA H200": 790.0}
"""Dense bfloat16 matrix products as measured on the device, not the data sheet's figure."""


@dataclass(frozen=True)
class Config:
    """What to time."""

    model: Literal["tiny", "mnist_fast", "mnist", "cifar10", "cifar10_edm", "dit_tiny", "dit_s/2", "dit_b/2"] = "tiny"
    """Network."""
    dataset: Literal["digits", "mnist", "cifar10"] = "digits"
    """Whose shape the random images have."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    batch_size: int = 128
    """Images a step, over all devices."""
    steps: int = 20
    """Steps in each of five timings."""


def run(config: Config) -> dict:
    """Times the step; returns what it prints."""
    training = Training(run_dir=Path("unused"))
    experiment = images.build(
        images.Config(dataset=config.dataset, training=training, model=config.model, dtype=config.dtype)
    )
    params = init_params(experiment.model, jax.random.key(0), experiment.event_shape)
    optimizer = make_optimizer(training.learning_rate, total_steps=training.total_steps)
    state = create_state(params, optimizer, training.ema_decays)
    step = pmap_step(make_step(make_loss(Method(), experiment), optimizer))
    key, num = jax.random.key(1), config.batch_size
    x1 = jax.random.normal(key, (num, *experiment.event_shape))
    batch = split_batch({"x1": x1, "cond": jnp.arange(num) % experiment.num_classes}, jax.local_device_count())

    start = time.perf_counter()
    state, metrics = jax.block_until_ready(step(state, key, batch))
    compile_seconds = time.perf_counter() - start
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(config.steps):
            state, metrics = step(state, key, batch)
        jax.block_until_ready((state, metrics))
        rates.append(config.steps * num / (time.perf_counter() - start))
    device = jax.devices()[0].device_kind
    rate, flops = statistics.median(rates), 3 * forward_flops(experiment.model, experiment.event_shape)
    peak = PEAK_TFLOPS.get(device)
    return {
        "model": config.model,
        "parameters": num_params(params),
        "dtype": config.dtype,
        "batch_size": num,
        "device": device,
        "devices": jax.local_device_count(),
        "jax": jax.__version__,
        "images_per_second": {"min": min(rates), "median": rate, "max": max(rates)},
        "train_gflop_per_image": flops / 1e9,
        "tflops_per_second": rate * flops / 1e12,
        "mfu": None if peak is None else rate * flops / 1e12 / (peak * jax.local_device_count()),
        "compile_seconds": compile_seconds,
    }


if __name__ == "__main__":
    command_line.main(lambda config: print(json.dumps(run(config), indent=2)), Config, description=__doc__)
