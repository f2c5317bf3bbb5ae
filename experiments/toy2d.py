"""Flow matching between two-dimensional distributions.

Paper: Lipman et al. 2022 (arXiv:2210.02747); Tong et al. 2023 (arXiv:2302.00482) for the pairs and the couplings.
Command: `python -m experiments.toy2d --source moons --data eight_gaussians --coupling minibatch_ot`
Hardware: about a minute on two CPU cores.
Expect: a Wasserstein distance near its floor, which is the distance of two independent draws of the data themselves;
both are printed.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np

from experiments.lab import command_line
from experiments.lab.experiment import Experiment, begin_with
from experiments.lab.figures import save_scatter
from experiments.lab.method import Method, check_first_steps, couple_ahead, make_loss
from experiments.lab.options import check_options, of_smoke
from experiments.lab.processes import own_folder
from experiments.lab.samplers import needs_schedule, options_of
from experiments.lab.sampling import OF_SOLVER, Sampling, frame_times, generate_together, make_generate, nfe_text
from experiments.lab.smoke import TRAINING, smoke
from experiments.lab.toys import Batches, Toy
from experiments.lab.training import (
    Training,
    check_batch,
    check_run_dir,
    draw_loss,
    files_of,
    sampling_params,
    train,
    write_results,
)
from fm_jax.data.toy import make_toy
from fm_jax.metrics import Measured, floor, wasserstein
from fm_jax.models import MLP, linen_apply
from fm_jax.sources import Normal, Sampled


@dataclass(frozen=True)
class Config:
    """A run on toy data. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "toy2d"

    training: Training
    data: Toy = "eight_gaussians"
    """Where to."""
    source: Literal["normal", "eight_gaussians", "moons", "checkerboard", "s_curve", "circles", "pinwheel"] = "normal"
    """Where from; anything but "normal" needs a velocity prediction and an ODE solver."""
    method: Method = field(default_factory=Method)
    sampling: Sampling = field(default_factory=Sampling)
    width: int = 128
    """Width of the network."""
    depth: int = 3
    """Hidden layers of the network."""
    num_samples: int = 1000
    """Samples to judge at the end."""
    frames: int = 31
    """Times at which the trajectories are drawn."""
    floor_repeats: int = 10
    """Pairs of draws of the data that the floor is measured by."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, frames=2, floor_repeats=2)
        gaussian = needs_schedule(self.sampling.solver) or self.method.prediction != "velocity"
        if self.source != "normal" and gaussian:
            raise ValueError(
                f"--source {self.source} needs --prediction velocity and a solver such as heun: it is not noise."
            )

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield "training.sample_every", "toy2d draws nothing while it trains; the experiments on images do"
        yield "sampling.sample_batch", "toy2d draws its --num-samples at once"
        for name in ("guidance", "guidance_interval", "guidance_rule"):
            yield f"sampling.{name}", "the points have no classes; the experiments on images are guided"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
            for name in OF_SOLVER:
                if name not in options_of(SMOKE["sampling"]["solver"]):
                    yield f"sampling.{name}", "--smoke has its own --solver, which does not take it"
        yield from self.training.unused()
        yield from self.method.unused()
        yield from self.sampling.unused()


STEPS_PER_CALL = 100
SMOKE: dict[str, Any] = {
    "sampling": {"solver": "euler", "steps": 2},
    "width": 8,
    "depth": 1,
    "num_samples": 64,
    "frames": 3,
    "floor_repeats": 2,
}
"""The sizes of a smoke run."""
CONFIG = Config(
    training=Training(
        run_dir=Path("runs/toy2d"),
        total_steps=5000,
        batch_size=256,
        learning_rate=2e-3,
        decay="cosine",
        log_every=100,
        save_every=2500,
        sample_every=2500,
    ),
    sampling=Sampling(solver="dopri5", tolerance=1e-4, guidance=1.0),
)


def build(config: Config) -> Experiment:
    """The network."""
    model = MLP(features=(config.width,) * config.depth)
    source = Normal() if config.source == "normal" else Sampled(make_toy(config.source))
    return Experiment(model, linen_apply(model), source, (2,))


def run(config: Config) -> dict[str, Any]:
    """Trains, samples, judges, draws; returns the numbers it prints."""
    config = smoke(config, **SMOKE)
    check_batch(config.training)
    check_first_steps(config.method, config.training)
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    experiment, run_dir = build(config), config.training.run_dir
    pictures = ("samples.png", "loss.png")
    check_run_dir(config, pictures)
    keys = jax.random.split(jax.random.key(config.training.seed), 8)
    key_train, key_data, key_init, key_x0, key_x1, key_floor, key_sampler, key_pairs = keys
    loss_fn = make_loss(config.method, experiment)
    params = experiment.init_params(key_init)

    def data_of(index: int, count: int) -> Batches:
        size = config.training.batch_size // count
        return Batches(key_data, experiment.source, config.data, size, process_index=index, process_count=count)

    paired = couple_ahead(config.method, data_of, key_pairs, experiment.source)
    times = frame_times(config.method, config.frames)
    generate = make_generate(config.sampling, config.method, experiment.apply_fn, null_label=None)
    animate = make_generate(config.sampling, config.method, experiment.apply_fn, null_label=None, frames=times)
    x0 = experiment.draw_x0(key_x0, config.num_samples)
    # Traced now, so that what cannot be sampled is not found after the training.
    for each in (generate, animate):
        jax.eval_shape(each, params, key_sampler, x0, None)
    # A step takes a fraction of a millisecond, less than to dispatch it.
    begin = partial(begin_with, config, ())
    state = train(config, key_train, params, loss_fn, paired, steps_per_call=STEPS_PER_CALL, begin=begin)
    params = sampling_params(state, config.training)

    generate_together(generate, params, key_sampler, x0, None)  # compiles
    start = time.perf_counter()
    solution = generate_together(generate, params, key_sampler, x0, None)
    seconds = time.perf_counter() - start
    x1 = make_toy(config.data)(key_x1, config.num_samples)
    distance = Measured(
        wasserstein(solution.x, x1),
        floor(wasserstein, make_toy(config.data), key_floor, config.num_samples, repeats=config.floor_repeats),
    )
    results = {
        "wasserstein2": distance.value,
        "wasserstein2_floor": distance.floor.mean,
        "nfe": None if solution.nfe is None else float(np.mean(solution.nfe)),
        "seconds_per_sample": seconds / config.num_samples,
    }
    trajectory = np.asarray(generate_together(animate, params, key_sampler, x0, None).trajectory)
    save_scatter(run_dir / "samples.png", np.asarray(x0), np.asarray(solution.x), trajectory, np.asarray(x1))
    draw_loss(run_dir)
    write_results(run_dir, results)
    print("\n" + files_of(run_dir, *pictures, "metrics.jsonl", "config.json", "results.json", "checkpoints/"))
    print(
        f"2-Wasserstein distance to {config.data}: {distance}; the floor is that of two draws of the data themselves. "
        f"NFE {nfe_text(results['nfe'])}"
    )
    return results


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
