"""Draws samples from any finished or interrupted run.

Command: `python -m experiments.sample --run runs/digits --num 64 --class 3 --guidance 2 --solver heun --steps 20 \
--out samples.png`

Writes a picture (`.png`) or the arrays (`.npz`: samples, labels), and prints the number of network evaluations.
Guidance leads away from no class in particular; with `--avoid 5` away from class 5, with `--weak-run DIR` away from a
weaker network, such as that of a shorter run (autoguidance); with `--also 8` to class 8 as well.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from experiments.lab import figures
from experiments.lab.command_line import parse
from experiments.lab.experiment import restore_run
from experiments.lab.samplers import load_solver
from experiments.lab.sampling import SOLVER_HELP, Grid, RuleName, Sampling, Weak, generate_many, make_generate, nfe_text


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
    also: int | None = None
    """A second class, to be guided towards at the same time; the two scales add up."""
    avoid: int | None = None
    """Class to be guided away from: a negative condition."""
    weak_run: Path | None = None
    """Folder of a run with a weaker network of the same method, to be guided away from."""
    solver: Annotated[str | None, SOLVER_HELP] = None
    learned_solver: Path | None = None
    """File of a solver trained by `python -m experiments.learned_solver`, in place of a sampler's name."""
    steps: int | None = None
    """Steps of a sampler with fixed steps."""
    grid: Grid | None = None
    """Their times."""
    tolerance: float | None = None
    """Tolerance of an adaptive sampler."""
    diffusion: float | None = None
    """Noise coefficient of an SDE."""
    eta: float | None = None
    """Share of fresh noise in ddim, 0 to 1."""
    churn: float | None = None
    """Fresh noise of the sampler churn."""
    guidance: float | None = None
    """Scale of guidance; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Times between which to guide."""
    guidance_rule: RuleName | None = None
    """How the two branches are combined."""
    seed: int = 0
    """Seed of the noise."""


SAMPLING_OPTIONS = tuple(field.name for field in dataclasses.fields(Sampling) if field.name in Config.__annotations__)


def run(config: Config) -> None:
    """Restores the run, draws, writes."""
    _check(config)
    restored = restore_run(config.run)
    experiment, num_classes = restored.experiment, restored.experiment.num_classes
    labels = _labels(config, num_classes)
    null_label, weak = num_classes, None
    if config.avoid is not None:
        null_label = _label("--avoid", config.avoid, num_classes)
    if config.weak_run is not None:
        weaker = restore_run(config.weak_run)
        if weaker.config.method != restored.config.method:
            raise SystemExit(f"{config.weak_run} was trained by another method than {config.run}.")
        weak = Weak(weaker.experiment.apply_fn, weaker.params)
    given = {name: getattr(config, name) for name in SAMPLING_OPTIONS}
    try:
        sampling = dataclasses.replace(restored.config.sampling, **{k: v for k, v in given.items() if v is not None})
        generate = make_generate(
            sampling,
            restored.config.method,
            experiment.apply_fn,
            null_label=null_label,
            also=None if config.also is None else _label("--also", config.also, num_classes),
            weak=weak,
            learned_solver=None if config.learned_solver is None else load_solver(config.learned_solver),
        )
        size, key = min(config.num, sampling.sample_batch), jax.random.key(config.seed)
        samples, nfe = generate_many(generate, restored.params, key, experiment, labels, size)
    except ValueError as error:  # what a sampler or a rule of guidance refuses
        raise SystemExit(str(error)) from error
    _write(config, np.asarray(samples), labels)
    solver = config.learned_solver or sampling.solver
    print(f"{config.out}: {config.num} samples from step {restored.step:,} with {solver}, NFE {nfe_text(nfe)}")


def _check(config: Config) -> None:
    if config.num < 1:
        raise SystemExit(f"--num must be at least 1, got {config.num}.")
    if config.out.suffix not in (".png", ".npz"):
        raise SystemExit(f"--out must end in .png or .npz, got {config.out}.")
    if sum(each is not None for each in (config.avoid, config.also, config.weak_run)) > 1:
        raise SystemExit("--also, --avoid and --weak-run are three ways to guide: give one.")
    if config.also is not None and config.guidance_rule not in (None, "extrapolate"):
        raise SystemExit(f"--also goes with --guidance-rule extrapolate, got {config.guidance_rule}.")
    if config.learned_solver is not None and config.solver is not None:
        raise SystemExit("--learned-solver takes the place of --solver: give one.")


def _label(option: str, label: int, num_classes: int | None) -> int:
    if num_classes is None or not 0 <= label < num_classes:
        raise SystemExit(f"{option} must be one of the run's {num_classes or 0} classes, got {label}.")
    return label


def _labels(config: Config, num_classes: int | None) -> np.ndarray:
    if config.label is None:
        return np.arange(config.num) % (num_classes or 1)
    return np.full(config.num, _label("--class", config.label, num_classes))


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
