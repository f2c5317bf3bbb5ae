"""Reflow, k times, then one step: how straight a flow becomes, and what each round costs in quality.

Paper: Liu et al. 2022 (arXiv:2209.03003, algorithm 1).
Command: `python -m experiments.reflow --problem "moons to 8gaussians" --rounds 2`
Hardware: under a minute on two CPU cores.
Expect: a table with a row for the first flow, for each round and for the distilled step: the 2-Wasserstein distance to
test points when solved to tolerance and in one Euler step, beside the floor; straightness, which falls with each round;
path energy; network evaluations. `reflow.md` and `reflow.png` in the run folder.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command_line
from experiments.lab.figures import save_trajectory_table
from experiments.lab.options import SEED, check_options, of_smoke
from experiments.lab.processes import is_first, own_folder
from experiments.lab.smoke import smoke
from experiments.torchcfm_table.methods import (
    APPLY,
    NETWORK,
    PAIR_SAMPLER,
    SMOKE_RECIPE,
    Recipe,
    conditional,
    fit,
    straight,
)
from experiments.torchcfm_table.problems import PROBLEMS, draw, draws, draws_of_pairs, make_splits, source_of
from fm_jax.checks import check_member
from fm_jax.fewstep import distillation, make_pairs, reflow
from fm_jax.metrics import floor, straightness, wasserstein
from fm_jax.models import init_params
from fm_jax.parameterization import bind
from fm_jax.samplers import RungeKutta, sample
from fm_jax.train.folder import check_places, write_text
from fm_jax.types import Array, Batch, LossFn, Params, VelocityFn


@dataclass(frozen=True)
class Config:
    """From where to where, and how often."""

    problem: str = "moons to 8gaussians"
    """A column of `experiments.torchcfm_table`."""
    rounds: int = 2
    """How often to reflow."""
    recipe: Recipe = field(default_factory=Recipe)
    num_test: int = 1000
    """Test points, and samples to judge."""
    seed: int = 42
    """Seed of everything that is random."""
    run_dir: Path = Path("runs/reflow")
    """Folder of the results."""
    floor_repeats: int = 20
    """Pairs of draws of the data that the floor is measured by."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_member("--problem", self.problem, tuple(PROBLEMS))
        check_options(self, seed=SEED, floor_repeats=2)

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        for name in ("bridge_sigma", "reuse", "ofm_steps", "ofm_learning_rate", "ofm_reuse"):
            yield f"recipe.{name}", "reflow has neither couplings nor bridges; experiments.torchcfm_table takes it"
        if self.smoke:
            yield from of_smoke(SMOKE)


SMOKE: dict[str, Any] = {"recipe": SMOKE_RECIPE, "num_test": 64, "rounds": 1, "floor_repeats": 2}
"""The sizes of a smoke run."""


def one_step(recipe: Recipe) -> LossFn:
    """The loss of the distilled step."""
    del recipe
    return distillation(APPLY)


@jax.jit
def measure(params: Params, x0: Array) -> dict[str, Any]:
    """The samples of a network in many steps and in one, and how straight its flow is."""
    v = bind(APPLY, params)
    fine = sample(v, x0, RungeKutta("rk4"), times=50, trajectory=True)
    return {
        "x": fine.x,
        "trajectory": fine.trajectory,
        "one_step": sample(v, x0, RungeKutta("euler"), times=1).x,
        "straightness": straightness(v, x0, times=100),
        "relative": straightness(v, x0, times=100, relative=True),
    }


def run(config: Config) -> dict[str, Any]:
    """Trains, reflows, distils and judges; returns the numbers it prints."""
    config = smoke(config, **SMOKE)
    with own_folder(config.run_dir):
        check_places(config.run_dir, ["reflow.md", "reflow.png"])
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    recipe, source = config.recipe, PROBLEMS[config.problem]
    splits = make_splits(config.problem, config.seed, config.num_test)
    key_init, key_fit, key_pairs, key_last, key_floor, key_distil = jax.random.split(jax.random.key(config.seed), 6)
    shape, options = (recipe.reflow_pairs, 2), PAIR_SAMPLER | {"source": source_of(splits)}

    def batches_of(pairs: Batch) -> Iterator[Batch]:
        return draws_of_pairs(pairs["x0"], pairs["x1"], recipe.batch_size, config.seed)

    params = init_params(NETWORK, key_init, (2,))
    params, _ = fit(conditional, recipe, params, key_fit, draws(splits, recipe.batch_size, config.seed), recipe.steps)
    flows = [params]

    def refit(k: int, pairs: Batch) -> VelocityFn:
        key = jax.random.fold_in(key_fit, k)
        flows.append(fit(straight, recipe, flows[-1], key, batches_of(pairs), recipe.steps)[0])
        return bind(APPLY, flows[-1])

    v = bind(APPLY, params)
    (*_, last) = reflow(refit, v, key_pairs, shape, rounds=config.rounds, **options)
    pairs, _ = make_pairs(last, key_last, shape, **options)
    distilled, _ = fit(one_step, recipe, flows[-1], key_distil, batches_of(pairs), recipe.steps)

    real = floor(wasserstein, partial(draw, source.data), key_floor, config.num_test, repeats=config.floor_repeats)
    names = [*(f"{k}-rectified flow" for k in range(1, len(flows) + 1)), "distilled"]
    measured = {
        name: jax.device_get(measure(p, jnp.asarray(splits.x0_test))) for name, p in zip(names, [*flows, distilled])
    }
    results = {
        name: {
            "w2": wasserstein(found["x"], splits.x1_test),
            "w2_one_step": wasserstein(found["one_step"], splits.x1_test),
            "straightness": float(found["straightness"]),
            "relative_straightness": float(found["relative"]),
        }
        for name, found in measured.items()
    }
    text = _table(results, f"{config.problem}, {config.num_test:,} points; floor {real}")
    if is_first():
        write_text(config.run_dir / "reflow.md", text)
    ways = {
        name: {config.problem: found["trajectory"][:, :200]} for name, found in measured.items() if name != "distilled"
    }
    ways["distilled"] = {config.problem: np.stack([splits.x0_test, measured["distilled"]["one_step"]])[:, :200]}
    save_trajectory_table(config.run_dir / "reflow.png", ways, [config.problem])
    print(f"{text}\n{config.run_dir}: reflow.md, reflow.png")
    return results


def _table(results: dict[str, dict[str, float]], title: str) -> str:
    lines = [f"2-Wasserstein distance, {title}", "", "| | solved | one Euler step | straightness | of the energy |"]
    lines += ["|---|---|---|---|---|"]
    for name, row in results.items():
        solved = "-" if name == "distilled" else f"{row['w2']:.3f}"  # it learned t = 0 only
        straight = (
            ["-"] * 2 if name == "distilled" else [f"{row['straightness']:.3f}", f"{row['relative_straightness']:.2%}"]
        )
        lines += [f"| {name} | {solved} | {row['w2_one_step']:.3f} | " + " | ".join(straight) + " |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    command_line.main(run, Config, Config(), __doc__)


if __name__ == "__main__":
    main()
