"""Two tokens that are a point on a checkerboard: discrete flow matching, judged against its exact table.

Paper: Gat et al. 2024 (arXiv:2407.15595), whose authors' notebook has this picture.
Command: `python -m experiments.tokens2d`; from masks in place of even noise by `--source mask`.
Hardware: four minutes of training on two CPU cores, and some ten to draw a million points; from masks, one.
Expect: a total variation from the table a tenth above its floor, that of as many draws from the table itself, and 99.8%
of the points on black squares; all are printed. From even noise a step cannot know of one token what the other does in
it, so that steps are short at the end; from masks one token falls after the other, by two evaluations.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import normal, zeros

from experiments.lab import command_line
from experiments.lab.figures import save_tables
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
from fm_jax import losses
from fm_jax.checks import check_tokens
from fm_jax.models import init_params, linen_apply, num_params
from fm_jax.models.layers import TimeEmbedding
from fm_jax.parameterization import bind
from fm_jax.paths import MixturePath
from fm_jax.samplers import FirstHitting, MixtureSteps, grids, sample
from fm_jax.schedules import Polynomial
from fm_jax.shapes import batch_time
from fm_jax.sources import Masked, UniformTokens
from fm_jax.types import Array, Cond, Key, Params, Solution, TokenSource

PICTURES = ("samples.png", "loss.png")
SIDE, SQUARE = 128, 32
STEPS_PER_CALL = 50
SOURCES: dict[str, TokenSource] = {"uniform": UniformTokens(SIDE), "mask": Masked(SIDE + 1, SIDE)}
LOSSES = {
    "cross_entropy": losses.cross_entropy,
    "generalized_kl": losses.generalized_kl,
    "reversal_elbo": losses.reversal_elbo,
}


@dataclass(frozen=True)
class Config:
    """A run on two tokens. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "tokens2d"

    training: Training
    source: Literal["uniform", "mask"] = "uniform"
    """Where tokens come from: any of the 128, each as often, or a mask."""
    loss: Literal["cross_entropy", "generalized_kl", "reversal_elbo"] = "cross_entropy"
    """What the denoiser minimises; all have the same minimiser."""
    width: int = 128
    """Width of the network."""
    depth: int = 3
    """Layers of the network, each added to what it is given."""
    steps: int = 64
    """Steps of the sampler from even noise, one evaluation each; from masks two are enough."""
    num_samples: int = 1_000_000
    """Points that are compared with the table."""
    sample_batch: int = 50_000
    """Points drawn at once."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, steps=(1, 10_000), depth=(1, 100))

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield "training.sample_every", "tokens2d draws nothing while it trains; the experiments on images do"
        if self.source == "mask":
            yield "steps", "--source mask is drawn by first hitting, which has no steps; --source uniform takes some"
        yield "training.init_from", "tokens2d begins with parameters of its own"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        yield from self.training.unused()


SMOKE: dict[str, Any] = {"width": 8, "depth": 1, "steps": 2, "num_samples": 128, "sample_batch": 128}
"""The sizes of a smoke run."""
CONFIG = Config(
    training=Training(
        run_dir=Path("runs/tokens2d"),
        total_steps=10_000,
        batch_size=1024,
        learning_rate=1e-2,
        decay="cosine",
        ema_decays=(0.998,),
        log_every=100,
        save_every=5000,
    ),
)


class Network(nn.Module):
    """Logits of both tokens, of K each, by a residual network of both; by time more for the token that is there.

    Attributes:
        num_tokens: K.
        width: of all layers.
        depth: number of layers.
    """

    num_tokens: int
    width: int
    depth: int
    tokens: ClassVar[bool] = True

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Cond = None, *, train: bool = False) -> Array:
        """Maps tokens [batch, n] at t to logits [batch, n, K]."""
        h = time = TimeEmbedding(64, self.width, time_scale=1000.0, name="time")(batch_time(t, x))
        for i in range(x.shape[1]):
            # As large as what a layer adds: tokens that are small beside the time are learned late, and pairs last.
            h = h + nn.Embed(self.num_tokens, self.width, embedding_init=normal(1.0), name=f"token_{i}")(x[:, i])
        for i in range(self.depth):
            h = h + nn.Dense(self.width, name=f"layer_{i}")(nn.silu(nn.LayerNorm(name=f"norm_{i}")(h)))
        h = nn.silu(nn.LayerNorm(name="norm")(h))
        logits = nn.Dense(x.shape[1] * self.num_tokens, name="out")(h).reshape(*x.shape, self.num_tokens)
        here = nn.Dense(x.shape[1], kernel_init=zeros, name="here")(nn.silu(time))
        return logits + here[..., None] * jax.nn.one_hot(x, self.num_tokens)


def checkerboard() -> np.ndarray:
    """The probability of each point, [128, 128]: even on the black squares of four by four, and 0 on the white ones."""
    square = np.arange(SIDE) // SQUARE
    black = (square[:, None] + square[None]) % 2 == 0
    return black / black.sum()


def counts(x: Any) -> np.ndarray:
    """How many of points [n, 2] are at each place, [128, 128].

    Raises:
        ValueError: for what is no place: a mask that is left, or `draws.NONE`, which a network that says NaN leaves.
    """
    check_tokens("the points drawn", x, SIDE)
    return np.bincount(np.asarray(x) @ (SIDE, 1), minlength=SIDE**2).reshape(SIDE, SIDE)


def times(steps: int) -> Array:
    """At which kappa, t^2, is 1 - (1 - s)^2 on an even grid of s: steps that are short at the end.

    There both tokens may still jump in one step, and neither sees the other. With the exact posterior 64 of these are
    off by a total variation of 0.0007, even ones of t by 0.024 and of kappa by 0.013: with those 97.6% and 98.7% of the
    points would be on black squares, and with these 99.9%.
    """
    return jnp.sqrt(1 - (1 - grids.uniform(steps)) ** 2)


def total_variation(found: np.ndarray, num: int, table: np.ndarray) -> float:
    """Half the sum of the differences between the shares of `num` draws and a table."""
    return 0.5 * float(np.abs(found / num - table).sum())


def run(config: Config) -> dict[str, Any]:
    """Trains, samples, compares, draws; returns the numbers it prints."""
    config = smoke(config, **SMOKE)
    check_batch(config.training)
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    run_dir, path, table = config.training.run_dir, MixturePath(Polynomial(2.0), SOURCES[config.source]), checkerboard()
    check_run_dir(config, PICTURES)
    key_train, key_init, key_draw = jax.random.split(jax.random.key(config.training.seed), 3)
    model = Network(path.num_tokens, config.width, config.depth)
    apply_fn, params = linen_apply(model), init_params(model, key_init, (2,))
    print(
        f"two tokens of {SIDE} on a checkerboard, a network with {num_params(params):,} parameters, "
        f"{jax.device_count()} {jax.default_backend()} device(s)"
    )

    def draw(rng: np.random.Generator, step: int, num: int) -> dict[str, Any]:
        found = rng.choice(SIDE**2, size=num, p=table.ravel())
        return {"x1": np.stack(np.divmod(found, SIDE), axis=1).astype(np.int32)}

    data = FreshBatches(draw, config.training.seed, config.training.batch_size // jax.process_count())
    loss_fn = LOSSES[config.loss](apply_fn, path)
    state = train(config, key_train, params, loss_fn, data, steps_per_call=STEPS_PER_CALL)
    params = jax.device_get(everywhere(sampling_params(state, config.training)))

    @jax.jit
    def generate(params: Params, key: Key) -> Solution:
        x0 = path.source.draw(key, jax.ShapeDtypeStruct((config.sample_batch, 2), np.int32))
        denoiser = bind(apply_fn, params)
        if config.source == "mask":
            return sample(denoiser, x0, FirstHitting(path), key=key)
        return sample(denoiser, x0, MixtureSteps(path), times=times(config.steps), key=key)

    found, num_batches = np.zeros((SIDE, SIDE)), -(-config.num_samples // config.sample_batch)
    nfe = int(jax.block_until_ready(generate(params, key_draw)).nfe)  # compiles
    start = time.perf_counter()
    for i in range(num_batches):
        found += counts(generate(params, jax.random.fold_in(key_draw, i)).x)
    seconds, num = time.perf_counter() - start, num_batches * config.sample_batch
    rng = np.random.default_rng(config.training.seed)
    floors = [total_variation(rng.multinomial(num, table.ravel()).reshape(table.shape), num, table) for _ in range(10)]
    results = {
        "total_variation": total_variation(found, num, table),
        "total_variation_floor": float(np.mean(floors)),
        "on_black": float(found[table > 0].sum() / num),
        "num_samples": num,
        "nfe": nfe,
        "seconds_per_sample": seconds / num,
        "training_points_per_second": median_rate(run_dir),
    }
    save_tables(run_dir / "samples.png", {"table": table, "drawn": found / num})
    draw_loss(run_dir)
    write_results(run_dir, results)
    print("\n" + files_of(run_dir, *PICTURES, "metrics.jsonl", "config.json", "results.json", "checkpoints/"))
    print(
        f"total variation from the table {results['total_variation']:.4f}, of {num:,} draws of the table itself "
        f"{results['total_variation_floor']:.4f}; {results['on_black']:.2%} on black squares. NFE {nfe}"
    )
    return results


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
