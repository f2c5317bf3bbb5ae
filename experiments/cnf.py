"""A continuous normalising flow trained by maximum likelihood on two-dimensional data: no path, no regression.

Papers: Chen et al. 2018 (arXiv:1806.07366); Grathwohl et al. 2018 (FFJORD, arXiv:1810.01367). Each step solves the flow
back from a batch of data and differentiates through the solver; flow matching (`experiments.toy2d`) needs neither.
Too few steps and the network learns to exploit their error: with 8 midpoint steps the loss fell to -37 nats. The result
is therefore measured by an adaptive solver.
Command: `python -m experiments.cnf --data moons`
Hardware: two minutes on two CPU cores.
Expect: the negative log-likelihood of held-out points falls from 3.97 nats, that of a standard normal, to 1.74. The
floor is the entropy of the data, 1.67 nats for moons on the scale of `fm_jax.data.toy` (deviations 1.73 and 1.00).
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command_line
from experiments.lab.figures import save_density
from experiments.lab.options import check_options, of_smoke
from experiments.lab.processes import everywhere, gathered, own_folder, spread
from experiments.lab.smoke import TRAINING, smoke
from experiments.lab.toys import Batches, Toy
from experiments.lab.training import Training, check_batch, check_run_dir, sampling_params, train, write_results
from fm_jax.data.toy import make_toy
from fm_jax.likelihood import log_prob
from fm_jax.models import MLP, init_params, linen_apply
from fm_jax.parameterization import bind
from fm_jax.samplers import RungeKutta, sample
from fm_jax.sources import Normal
from fm_jax.types import ApplyFn, Array, Batch, Key, LossFn, Metrics, Params


@dataclass(frozen=True)
class Config:
    """A run on toy data. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "cnf"

    training: Training
    data: Toy = "moons"
    """What to fit."""
    steps: int = 8
    """Steps of rk4 for the solve in the loss."""
    width: int = 64
    """Width of the network."""
    depth: int = 2
    """Hidden layers of the network."""
    num_samples: int = 10_000
    """Held-out points to judge by, samples to draw and points of the density to plot."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, num_samples=4)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield "training.sample_every", "cnf draws nothing while it trains; the experiments on images do"
        yield "training.init_from", "cnf begins with parameters of its own"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        yield from self.training.unused()


CONFIG = Config(
    training=Training(
        run_dir=Path("runs/cnf"),
        total_steps=1000,
        batch_size=256,
        learning_rate=2e-3,
        decay="cosine",
        ema_decays=(0.99,),
        log_every=50,
        save_every=500,
    )
)
SMOKE: dict[str, Any] = {"steps": 2, "width": 8, "depth": 1, "num_samples": 64}
"""The sizes of a smoke run."""
RK4 = RungeKutta("rk4")


def negative_log_likelihood(apply_fn: ApplyFn, num_steps: int) -> LossFn:
    """The loss of maximum likelihood: the mean of -log p_1(x1) in nats.

    With fixed steps: reverse mode through Diffrax's adaptive loop is refused under `pmap` (diffrax issue 765).
    """

    def loss_fn(
        params: Params, key: Key, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Array, Metrics]:
        del key, target_params  # nothing is random, and there is one network
        return -log_prob(bind(apply_fn, params), batch["x1"], sampler=RK4, times=num_steps).mean(), {}

    return loss_fn


def run(config: Config) -> dict[str, Any]:
    """Trains, judges, draws; returns the numbers it prints."""
    config = smoke(config, **SMOKE)
    check_batch(config.training)
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    run_dir = config.training.run_dir
    check_run_dir(config, ["density.png"])
    key_train, key_data, key_init, key_x0, key_x1 = jax.random.split(jax.random.key(config.training.seed), 5)
    model = MLP(features=(config.width,) * config.depth)
    apply_fn, untrained = linen_apply(model), init_params(model, key_init, (2,))
    x1 = make_toy(config.data)(key_x1, config.num_samples)
    x0 = Normal().draw(key_x0, x1)

    log_density = jax.jit(lambda params, x: log_prob(bind(apply_fn, params), x))
    results = {"nll_untrained": -float(log_density(untrained, x1).mean())}
    loss_fn = negative_log_likelihood(apply_fn, config.steps)
    data = Batches(key_data, Normal(), config.data, config.training.batch_size // jax.process_count())
    state = train(config, key_train, untrained, loss_fn, data)
    params = everywhere(sampling_params(state, config.training))
    values = -gathered(log_density(params, spread(x1)))[: config.num_samples]
    params = jax.device_get(params)
    results |= {
        "nll": float(values.mean()),
        "nll_standard_error": float(values.std() / np.sqrt(len(values))),
        "nll_with_training_steps": float(jax.jit(loss_fn)(params, key_train, {"x1": x1})[0]),
    }
    samples = jax.jit(lambda params, x0: sample(bind(apply_fn, params), x0, RK4, times=config.steps).x)(params, x0)
    limit = 1.15 * float(jnp.abs(x1).max())
    density = _density_on_square(functools.partial(log_density, params), limit, config.num_samples)
    save_density(run_dir / "density.png", np.asarray(x1), density, np.asarray(samples), limit)
    write_results(run_dir, results)
    print(f"\n{run_dir}: density.png, metrics.jsonl, config.json, results.json, checkpoints/")
    print(
        f"negative log-likelihood of {config.num_samples:,} held-out points of {config.data}: "
        f"{results['nll_untrained']:.3f} nats untrained, {results['nll']:.3f} +- {results['nll_standard_error']:.3f} "
        f"trained ({results['nll_with_training_steps']:.3f} with the {config.steps} steps of training)"
    )
    return results


def _density_on_square(log_density: Callable[[Array], Array], limit: float, num: int) -> np.ndarray:
    """The density on a square lattice of about `num` points over [-limit, limit]^2."""
    ticks = jnp.linspace(-limit, limit, math.isqrt(num))
    lattice = jnp.stack(jnp.meshgrid(ticks, ticks), axis=-1)
    return np.exp(np.asarray(log_density(lattice.reshape(-1, 2)))).reshape(lattice.shape[:2])


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
