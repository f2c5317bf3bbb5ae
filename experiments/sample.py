"""Draws samples from any finished or interrupted run.

Command: `python -m experiments.sample --run runs/digits --num 64 --class 3 --guidance 2 --solver heun --steps 20 \
--out samples.png`

Writes a picture (`.png`) or the arrays (`.npz`: samples, labels), and prints the number of network evaluations.
Guidance leads away from no class in particular; with `--avoid 5` away from class 5, with `--weak-run DIR` away from a
weaker network, such as that of a shorter run (autoguidance); with `--also 8` to class 8 as well.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from experiments.lab import command_line, figures
from experiments.lab.experiment import Experiment, Restored, read_run, restore_run
from experiments.lab.options import SEED, check_options, option
from experiments.lab.processes import by_first
from experiments.lab.samplers import SAMPLERS, load_solver
from experiments.lab.sampling import (
    OF_SOLVER,
    RANGES,
    SOLVER_HELP,
    Generate,
    Grid,
    RuleName,
    Sampling,
    Weak,
    check_interval,
    generate_many,
    make_generate,
    nfe_text,
)
from fm_jax.checks import check_member
from fm_jax.train.folder import make_folder, replacing


@dataclass(frozen=True)
class Drawing:
    """How to draw from a run. Options that are not given are those of the run."""

    run: Path
    """Folder of the run."""
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

    def __post_init__(self) -> None:
        check_options(self, label=0, also=0, avoid=0, seed=SEED, **RANGES)  # a subclass may have label and seed
        if self.solver is not None:
            check_member("--solver", self.solver, tuple(SAMPLERS))
        if sum(each is not None for each in (self.avoid, self.also, self.weak_run)) > 1:
            raise ValueError("--also, --avoid and --weak-run are three ways to guide: give one.")
        if self.also is not None and self.guidance_rule not in (None, "extrapolate"):
            raise ValueError(f"--also goes with --guidance-rule extrapolate, got {self.guidance_rule}.")
        if self.learned_solver is not None and self.solver is not None:
            raise ValueError("--learned-solver takes the place of --solver: give one.")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect on samples of that run, and why."""
        of_run, experiment = read_run(self.run)
        sampling = sampling_of(self, of_run)
        if experiment.num_classes is None and self.weak_run is None:
            for name in ("guidance", "guidance_interval", "guidance_rule"):
                yield name, "the run has no classes; with --weak-run it would"
        if sampling.guidance == 1:
            for name in ("avoid", "weak_run"):
                yield name, "--guidance 1 is none; another scale would take it"
        if self.weak_run is not None and self.weak_run.resolve() == self.run.resolve():
            yield "weak_run", "it is the run itself, from which nothing leads away"
        if self.learned_solver is not None:
            for name in OF_SOLVER:
                yield name, "--learned-solver has its own steps"
        for name, why in sampling.unused(""):
            if name != "guidance_interval" or self.also is None:  # which two classes have at any scale
                yield name, why


@dataclass(frozen=True)
class Config(Drawing):
    """What to draw. Options that are not given are those of the run."""

    out: Path = Path("samples.png")
    """Where to: a picture (.png) or arrays (.npz)."""
    num: int = 64
    """How many samples."""
    label: Annotated[int | None, tyro.conf.arg(name="class")] = None
    """Class of all samples; by default every class in turn."""
    seed: int = 0
    """Seed of the noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("also", "avoid"):
            if self.label is not None and getattr(self, name) == self.label:
                raise ValueError(f"{option(name)} must be another class than --class, got {self.label} for both.")
        if self.out.suffix not in (".png", ".npz"):
            raise ValueError(f"--out must end in .png or .npz, got {self.out}.")


SAMPLING_OPTIONS = tuple(field.name for field in dataclasses.fields(Sampling) if field.name in Drawing.__annotations__)


def sampling_of(config: Drawing, of_run: Any) -> Sampling:
    """How to draw: as the run, but for what is given."""
    given = {name: getattr(config, name) for name in SAMPLING_OPTIONS}
    sampling = dataclasses.replace(of_run.sampling, **{k: v for k, v in given.items() if v is not None})
    dataclasses.replace(of_run, sampling=sampling)  # which refuses what the run cannot be drawn from by
    by_null_label = sampling.guidance != 1 and config.avoid is None and config.weak_run is None
    if getattr(of_run, "label_dropout", None) == 0 and config.also is not None:
        raise ValueError(
            "--also needs what the network makes without a label, which a run with --label-dropout 0 does not know, at "
            "any --guidance. Leave it out."
        )
    if by_null_label and getattr(of_run, "label_dropout", None) == 0:
        raise ValueError(
            f"--guidance must be 1 for a run with --label-dropout 0, which knows no samples without a label, got "
            f"{sampling.guidance:g}."
        )
    if config.also is not None and sampling.guidance_rule != "extrapolate":  # the run's own rule
        raise ValueError(
            f"--also goes with --guidance-rule extrapolate, and the run has {sampling.guidance_rule}: give it as well."
        )
    guides = (getattr(of_run, "label_dropout", None) is not None) or config.weak_run is not None
    if guides and (sampling.guidance != 1 or config.also is not None) and config.learned_solver is None:
        check_interval(sampling, of_run.method)
    return sampling


def run(config: Config) -> None:
    """Restores the run, draws, writes."""
    restored = restore_run(config.run)
    make_folder(config.out.parent)
    if config.out.is_dir():
        raise SystemExit(f"--out {config.out} is a folder: give a file.")
    labels = _labels(config, restored.experiment.num_classes)
    try:
        sampling, generate = generator(config, restored)
        size, key = min(config.num, sampling.sample_batch), jax.random.key(config.seed)
        samples, nfe = generate_many(generate, restored.params, key, restored.experiment, labels, size)
    except ValueError as error:  # what a sampler or a rule of guidance refuses
        raise SystemExit(str(error)) from error
    _write(config, restored.experiment, samples, labels)
    solver = config.learned_solver or sampling.solver
    print(f"{config.out}: {config.num} samples from step {restored.step:,} with {solver}, NFE {nfe_text(nfe)}")


def generator(config: Drawing, restored: Restored) -> tuple[Sampling, Generate]:
    """How to draw from a run, and the function that does.

    Raises:
        SystemExit: for options that do not fit the run.
        ValueError: for what a sampler refuses.
    """
    experiment, num_classes = restored.experiment, restored.experiment.num_classes
    null_label, weak = num_classes, None
    if config.avoid is not None:
        null_label = _label("--avoid", config.avoid, num_classes)
    if config.weak_run is not None:
        weaker = restore_run(config.weak_run, "--weak-run")
        if weaker.config.method != restored.config.method:
            raise SystemExit(f"--weak-run {config.weak_run} was trained by another method than {config.run}.")
        if weaker.experiment.event_shape != experiment.event_shape or weaker.experiment.num_classes != num_classes:
            raise SystemExit(f"--weak-run {config.weak_run} was trained on other data than {config.run}.")
        weak = Weak(weaker.experiment.apply_fn, weaker.params)
    sampling = sampling_of(config, restored.config)
    generate = make_generate(
        sampling,
        restored.config.method,
        experiment.apply_fn,
        null_label=null_label,
        also=None if config.also is None else _label("--also", config.also, num_classes),
        weak=weak,
        learned_solver=None if config.learned_solver is None else load_solver(config.learned_solver, restored.params),
    )
    return sampling, generate


def _label(name: str, label: int, num_classes: int | None) -> int:
    if num_classes is None:
        raise SystemExit(f"{name} needs a run with classes, and this one has none, got {label}.")
    if not 0 <= label < num_classes:
        raise SystemExit(f"{name} must be one of the run's {num_classes} classes, from 0, got {label}.")
    return label


def _labels(config: Config, num_classes: int | None) -> np.ndarray:
    if config.label is None:
        return np.arange(config.num) % (num_classes or 1)
    return np.full(config.num, _label("--class", config.label, num_classes))


@by_first
def _write(config: Config, experiment: Experiment, samples: np.ndarray, labels: np.ndarray) -> None:
    if config.out.suffix == ".npz":
        of_classes: dict[str, Any] = {} if experiment.num_classes is None else {"labels": labels}
        with replacing(config.out) as unfinished:
            np.savez(unfinished, samples=experiment.to_data(samples), **of_classes)
    elif samples.ndim == 4:
        figures.save_sheet(config.out, experiment.visible(samples))
    else:
        figures.save_points(config.out, samples)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
