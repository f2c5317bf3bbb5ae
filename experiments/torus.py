"""Angles: a wrapped normal on tori of many dimensions, learned by flow matching and judged against its exact density.

Paper: Chen & Lipman 2023 (arXiv:2302.03660), whose figure shows the likelihood a dimension to stay as it is in high
dimensions.
Command: `python -m experiments.torus --dim 10`
Hardware: minutes on two CPU cores.
Expect: a negative log-likelihood of held-out angles within 0.02 nats a dimension of the entropy, in 2, 10 and 50
dimensions. On the same angles the exact density is measured too, so that the difference, the divergence of the data
from the model, has a standard error far below that of the likelihood.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command_line
from experiments.lab.globe import save_angles
from experiments.lab.options import check_options, of_smoke
from experiments.lab.processes import everywhere, own_folder
from experiments.lab.scenes import FreshBatches
from experiments.lab.smoke import TRAINING, smoke
from experiments.lab.training import (
    Training,
    check_batch,
    check_run_dir,
    draw_loss,
    files_of,
    median_rate,
    sampling_params,
    train,
    write_results,
)
from fm_jax.checks import check_finite
from fm_jax.likelihood import log_prob
from fm_jax.losses import flow_matching
from fm_jax.manifolds import FlatTorus, UniformOn
from fm_jax.models import init_params, linen_apply, num_params
from fm_jax.models.layers import TimeEmbedding
from fm_jax.parameterization import bind
from fm_jax.paths import GeodesicPath
from fm_jax.samplers import Adaptive, RungeKutta, sample
from fm_jax.shapes import batch_time
from fm_jax.types import Array, Cond, Key, Params

PICTURES = ("angles.png", "loss.png")
STEPS_PER_CALL = 50
JUDGE = Adaptive(rtol=1e-6, atol=1e-6, max_steps=2**15)
TURN = 2 * math.pi


@dataclass(frozen=True)
class Config:
    """A run on a torus. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "torus"

    training: Training
    dim: int = 10
    """Angles of a point."""
    scale: float = 0.2
    """Standard deviation of each, in radians, before it is wrapped."""
    width: int = 256
    """Width of the network."""
    depth: int = 3
    """Hidden layers of the network."""
    num_samples: int = 500
    """Held-out points, and samples for the picture."""
    steps: int = 50
    """Steps of midpoint for the samples."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, dim=(1, 1000), scale="(0, inf)", num_samples=2, steps=(1, 10_000))

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield "training.sample_every", "torus draws nothing while it trains; the experiments on images do"
        yield "training.init_from", "torus begins with parameters of its own"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        yield from self.training.unused()


SMOKE: dict[str, Any] = {"dim": 2, "width": 8, "depth": 1, "num_samples": 16, "steps": 2}
"""The sizes of a smoke run."""
CONFIG = Config(
    training=Training(
        run_dir=Path("runs/torus"),
        total_steps=2000,
        batch_size=512,
        learning_rate=2e-3,
        warmup_steps=100,
        decay="cosine",
        ema_decays=(0.998,),
        log_every=100,
        save_every=1000,
    ),
)


class Network(nn.Module):
    """A field on the torus: of the sines and cosines of all angles, and for each angle of its own, by time.

    Attributes:
        width: of hidden layers.
        depth: hidden layers, all but the first added to what they are given.
        waves: sines and cosines of how many multiples of each angle.
    """

    width: int
    depth: int
    waves: int = 12

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """The velocity of each angle, [batch, d]."""
        time = TimeEmbedding(64, self.width, time_scale=30.0, name="time")(batch_time(t, x))
        multiples = x[..., None] * np.arange(1, self.waves + 1, dtype=np.float32)[None, None]
        own = jnp.concatenate([jnp.sin(multiples), jnp.cos(multiples)], axis=2)
        h = nn.Dense(self.width, name="layer_0")(own[..., :: self.waves].reshape(len(x), -1)) + time
        for i in range(1, self.depth):
            scale = 1 + nn.Dense(self.width, name=f"scale_{i}")(time)
            h = h + scale * nn.Dense(self.width, name=f"layer_{i}")(nn.silu(h))
        both = nn.Dense(x.shape[1], kernel_init=nn.initializers.zeros, name="out")(nn.silu(h))
        # What an angle says of its own velocity: not to be squeezed through the layers with all the others.
        weights = nn.Dense(2 * self.waves * x.shape[1], kernel_init=nn.initializers.zeros, name="own")(nn.silu(time))
        return both + (weights.reshape(own.shape) * own).sum(axis=2)


def wrapped_log_density(x: np.ndarray, scale: float) -> np.ndarray:
    """The log-density of a normal angle of mean 0, wrapped: each of `x` by itself, in nats."""
    turns = np.arange(-(2 + math.ceil(8 * scale / TURN)), 3 + math.ceil(8 * scale / TURN))
    images = -0.5 * ((np.asarray(x, np.float64)[..., None] + TURN * turns) / scale) ** 2
    most = images.max(axis=-1)
    return most + np.log(np.exp(images - most[..., None]).sum(axis=-1)) - math.log(scale * math.sqrt(TURN))


def wrapped_entropy(scale: float) -> float:
    """The entropy of a normal angle, wrapped, in nats: that of the line where the scale is small, log 2 pi at most."""
    ticks = -math.pi + TURN * (np.arange(4096) + 0.5) / 4096
    log_density = wrapped_log_density(ticks, scale)
    return -float((np.exp(log_density) * log_density).sum() * TURN / len(ticks))


def draw_angles(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Normal angles of mean 0, wrapped to [-pi, pi)."""
    x = rng.normal(scale=scale, size=shape)
    return (x - TURN * np.floor(x / TURN + 0.5)).astype(np.float32)


def run(config: Config) -> dict[str, Any]:
    """Trains, judges, draws; returns the numbers it prints."""
    config = smoke(config, **SMOKE)
    check_batch(config.training)
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    run_dir, torus = config.training.run_dir, FlatTorus(config.dim)
    source = UniformOn(torus)
    check_run_dir(config, PICTURES)
    key_train, key_init, key_draw = jax.random.split(jax.random.key(config.training.seed), 3)
    model = Network(config.width, config.depth)
    apply_fn, params = linen_apply(model), init_params(model, key_init, (config.dim,))
    print(
        f"a wrapped normal of scale {config.scale:g} in {config.dim} dimensions, a network with "
        f"{num_params(params):,} parameters, {jax.device_count()} {jax.default_backend()} device(s)"
    )

    def draw(rng: np.random.Generator, step: int, num: int) -> dict[str, Any]:
        return {"x1": draw_angles(rng, (num, config.dim), config.scale)}

    data = FreshBatches(draw, config.training.seed, config.training.batch_size // jax.process_count())
    loss_fn = flow_matching(apply_fn, GeodesicPath(torus, source=source))
    state = train(config, key_train, params, loss_fn, data, steps_per_call=STEPS_PER_CALL)
    # On one device: where the steps of several depend on each other, one that fails would end the process.
    params = jax.device_get(everywhere(sampling_params(state, config.training)))

    @jax.jit
    def log_density(params: Params, x: Array) -> Array:
        return log_prob(bind(apply_fn, params), x, manifold=torus, source=source, sampler=JUDGE)

    # The batches begin with (seed, 1).
    x1 = draw_angles(np.random.default_rng((config.training.seed, 0)), (config.num_samples, config.dim), config.scale)
    nll = -np.asarray(log_density(params, x1), np.float64)
    check_finite("the negative log-likelihood", nll)
    excess = (nll + wrapped_log_density(x1, config.scale).sum(axis=1)) / config.dim

    @jax.jit
    def generate(params: Params, key: Key) -> Array:
        x0 = source.draw(key, jax.ShapeDtypeStruct((config.num_samples, config.dim), np.float32))
        return sample(bind(apply_fn, params), x0, RungeKutta("midpoint", manifold=torus), times=config.steps).x

    results: dict[str, Any] = {
        "nll_per_dim": float(nll.mean()) / config.dim,
        "entropy_per_dim": wrapped_entropy(config.scale),
        "excess_per_dim": float(excess.mean()),
        "excess_standard_error": float(excess.std() / math.sqrt(len(excess))),
        "uniform_per_dim": math.log(TURN),
        "training_points_per_second": median_rate(run_dir),
    }
    angles = np.linspace(-math.pi, math.pi, 721)
    samples = np.asarray(generate(params, key_draw))
    save_angles(run_dir / "angles.png", samples, angles, np.exp(wrapped_log_density(angles, config.scale)))
    draw_loss(run_dir)
    write_results(run_dir, results)
    print("\n" + files_of(run_dir, *PICTURES, "metrics.jsonl", "config.json", "results.json", "checkpoints/"))
    print(
        f"negative log-likelihood a dimension {results['nll_per_dim']:.4f} nats, entropy "
        f"{results['entropy_per_dim']:.4f}, even density {results['uniform_per_dim']:.4f}; above the exact one on the "
        f"same points by {results['excess_per_dim']:.4f} +- {results['excess_standard_error']:.4f}"
    )
    if rate := results["training_points_per_second"]:
        print(f"training: {rate:,.0f} points/s")
    return results


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
