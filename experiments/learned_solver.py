"""Trains solvers of a few steps for the network of a finished run, and says what they gain.

Paper: Shaul et al. 2024 (arXiv:2403.01329).
Command: `python -m experiments.learned_solver --run runs/digits --calls 5 10`
Hardware: minutes on two CPU cores for the digits. Writes `learned_solver_<calls>.npz` into the run's folder, for
`python -m experiments.sample --run runs/digits --learned-solver runs/digits/learned_solver_5.npz`.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.lab import command_line
from experiments.lab.experiment import refuse_sentences, restore_run
from experiments.lab.options import SEED, STEPS, check_options, check_some
from experiments.lab.processes import is_first
from experiments.lab.samplers import make_sampler, save_solver
from experiments.lab.sampling import guided_velocity, sampled_times
from fm_jax.paths import start
from fm_jax.samplers import RungeKutta, grids, learned, sample
from fm_jax.train.folder import check_places, make_folder, write_text
from fm_jax.train.learned import fit_solver
from fm_jax.types import Array, Sampler, VelocityFn

OTHERS = ("euler", "midpoint", "ab2", "dpm_solver++_2m", "unipc_2")


@dataclass(frozen=True)
class Config:
    """What to train."""

    run: Path
    """Folder of the run; its own guidance is used."""
    calls: tuple[int, ...] = (5, 10)
    """Calls of the velocity: a solver is trained for each. Guidance makes a call two network evaluations."""
    num: int = 256
    """Pairs of noise and fine solution to train on; half as many are kept to judge."""
    fine_steps: int = 20
    """Steps of rk4 in a fine solution."""
    iterations: int = 300
    """Training steps."""
    batch_size: int = 64
    """Pairs a training step."""
    learning_rate: float = 5e-3
    """Of Adam, at the start."""
    seed: int = 0
    """Seed of noise and batches."""

    def __post_init__(self) -> None:
        check_options(self, calls=(1, 1000), iterations=STEPS, learning_rate="(0, inf)", seed=SEED)
        check_some("--calls", self.calls)
        if self.batch_size > self.num:
            raise ValueError(f"--batch-size must be at most --num, got {self.batch_size} and {self.num}.")


def run(config: Config) -> dict[str, Any]:
    """Trains, judges on new noise, writes; returns what it prints, in decibels."""
    restored = restore_run(config.run)
    refuse_sentences(config.run, restored.experiment, "experiments.learned_solver")
    make_folder(config.run)  # found before the training: whether solvers can be written there
    check_places(config.run, ["learned_solver.json", *(f"learned_solver_{calls}.npz" for calls in config.calls)])
    experiment, method, sampling = restored.experiment, restored.config.method, restored.config.sampling
    t0, t1 = sampled_times(method)
    key_train, key_judge, key_fit = jax.random.split(jax.random.key(config.seed), 3)

    def v_of(labels: Array) -> VelocityFn:
        return guided_velocity(
            sampling, method, experiment.apply_fn, restored.params, labels, null_label=experiment.num_classes
        )

    @jax.jit
    def fine(x0: Array, labels: Array) -> Array:
        return sample(v_of(labels), x0, RungeKutta("rk4"), times=grids.uniform(config.fine_steps, t0, t1)).x

    def pairs(key: Array, num: int) -> tuple[Array, Array, Array]:
        x0 = start(method.schedule, t0).scale * experiment.draw_x0(key, num)
        labels = jnp.arange(num) % (experiment.num_classes or 1)
        return x0, fine(x0, labels), labels

    x0, x1, labels = pairs(key_train, config.num)
    judge_x0, judge_x1, judge_labels = pairs(key_judge, max(1, config.num // 2))
    peak = float(x1.max() - x1.min())

    def decibels(sampler: Sampler, times: Array | None = None) -> float:
        draw = jax.jit(lambda x0, labels: sample(v_of(labels), x0, sampler, times=times).x)
        return float(learned.decibels(learned.log_error(draw(judge_x0, judge_labels), judge_x1), peak))

    results: dict[str, Any] = {}
    for calls in config.calls:
        begin = time.perf_counter()
        solver, _ = fit_solver(
            v_of,
            learned.start_for(calls, t0, t1),
            key_fit,
            x0,
            x1,
            labels,
            num_iterations=config.iterations,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
        )
        jax.block_until_ready(solver)
        seconds = time.perf_counter() - begin
        found = {"learned": decibels(solver)}
        for name in OTHERS:
            num_steps = calls // 2 if name == "midpoint" else calls
            if num_steps:
                found[name] = decibels(make_sampler(name, method.schedule), grids.uniform(num_steps, t0, t1))
        path = config.run / f"learned_solver_{calls}.npz"
        if is_first():
            save_solver(path, solver, restored.params)
        print(f"{path}: {calls} calls, trained in {seconds:.0f} s; PSNR to the fine solution in dB:")
        print("  " + ", ".join(f"{name} {value:.1f}" for name, value in found.items()), flush=True)
        results[str(calls)] = found | {"seconds": seconds}
    if is_first():
        write_text(config.run / "learned_solver.json", json.dumps(results, indent=2) + "\n")
    return results


def main() -> None:
    """The command line."""
    command_line.main(run, Config, description=__doc__)


if __name__ == "__main__":
    main()
