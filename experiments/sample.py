"""Draws samples from any finished or interrupted run.

Command: `python -m experiments.sample --run runs/digits --num 64 --class 3 --guidance 2 --solver heun --steps 20 \
--out samples.png`

Writes a picture (`.png`) or the arrays (`.npz`: samples, labels), and prints the number of network evaluations.
"""

import dataclasses
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
import tyro

from experiments import figures
from experiments.command_line import parse
from experiments.sampling import generate_many, make_generate
from experiments.training import from_json, restore, sampling_params
from fm_jax.models import init_params

EXPERIMENTS = ("images", "toy2d")


@dataclass(frozen=True)
class Config:
    """What to draw. Options that are not given are those of the run."""

    run: Path
    """Folder of the run."""
    out: Path = Path("samples.png")
    """Where to: a picture (.png) or arrays (.npz)."""
    num: int = 64
    """How many samples."""
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all samples; by default every class in turn."""
    guidance: float | None = None
    """Scale of classifier-free guidance; 1 is none."""
    solver: (
        Literal["euler", "midpoint", "heun", "rk4", "bosh3", "tsit5", "dopri5", "dopri8", "euler_maruyama"] | None
    ) = None
    """Solver."""
    steps: int | None = None
    """Steps of a solver with fixed steps."""
    tolerance: float | None = None
    """Tolerance of an adaptive solver."""
    seed: int = 0
    """Seed of the noise."""


def run(config: Config) -> None:
    """Restores the run, draws, writes."""
    record = _read(config)
    module = importlib.import_module(f"experiments.{record.pop('experiment')}")
    # The folder may have been moved since it was written.
    run_config = from_json(module.Config, record)
    run_config = dataclasses.replace(run_config, training=dataclasses.replace(run_config.training, run_dir=config.run))
    experiment = module.build(run_config)
    labels = _labels(config, experiment.num_classes)

    key_init, key = jax.random.key(0), jax.random.key(config.seed)
    shapes = jax.eval_shape(lambda k: init_params(experiment.model, k, experiment.event_shape), key_init)
    state = restore(run_config, shapes)
    given = {name: getattr(config, name) for name in ("guidance", "solver", "steps", "tolerance")}
    sampling = dataclasses.replace(run_config.sampling, **{k: v for k, v in given.items() if v is not None})
    generate = make_generate(sampling, run_config.method, experiment.apply_fn, null_label=experiment.num_classes)
    params, size = sampling_params(state, run_config.training), min(config.num, sampling.sample_batch)
    samples, nfe = generate_many(generate, params, key, experiment.draw_x0, labels, size)
    _write(config, np.asarray(samples), labels)
    print(f"{config.out}: {config.num} samples from step {int(state.step):,} with {sampling.solver}, NFE {nfe:.0f}")


def _read(config: Config) -> dict:
    if config.num < 1:
        raise SystemExit(f"--num must be at least 1, got {config.num}.")
    if config.out.suffix not in (".png", ".npz"):
        raise SystemExit(f"--out must end in .png or .npz, got {config.out}.")
    path = config.run / "config.json"
    if not path.exists():
        raise SystemExit(f"{config.run} is not the folder of a run: it has no config.json.")
    record = json.loads(path.read_text())
    if record.get("experiment") not in EXPERIMENTS:
        raise SystemExit(f"{path} was not written by one of the experiments {', '.join(EXPERIMENTS)}.")
    return record


def _labels(config: Config, num_classes: int | None) -> np.ndarray:
    if config.label is None:
        return np.arange(config.num) % (num_classes or 1)
    if num_classes is None or not 0 <= config.label < num_classes:
        raise SystemExit(f"--class must be one of the run's {num_classes or 0} classes, got {config.label}.")
    return np.full(config.num, config.label)


def _write(config: Config, samples: np.ndarray, labels: np.ndarray) -> None:
    config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.out.suffix == ".npz":
        np.savez(config.out, samples=samples, labels=labels)
    elif samples.ndim == 4:
        figures.save_sheet(config.out, samples)
    else:
        figures.save_points(config.out, samples)


if __name__ == "__main__":
    run(parse(Config, description=__doc__))
