"""TorchCFM's two-dimensional table: every method between every pair of distributions, beside the installed `torchcfm`.

Paper: Tong et al. 2023 (arXiv:2302.00482, table 2); its published code for the data, the network and the optimiser.
Command: `python -m experiments.torchcfm_table`. torchcfm is used where it is installed, here or in the environment of
`--peer-python`.
Hardware: under an hour on two CPU cores, the peer's trainings on one of them. Interrupted, it goes on where it was.
Expect: `table.md`, `trajectories.png` and `results.json` in the run folder: the 2-Wasserstein distance to test points
with its floor, the normalised path energy, network evaluations and training time, over five seeds.
"""

import dataclasses
import json
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command_line
from experiments.lab.figures import save_trajectory_table
from experiments.lab.options import SEED, check_options, check_some, of_smoke, option
from experiments.lab.processes import by_first, is_first, own_folder, wait_for_all
from experiments.lab.smoke import smoke
from experiments.lab.training import check_experiment
from experiments.torchcfm_table import peer
from experiments.torchcfm_table.methods import METHODS, SMOKE_RECIPE, Recipe, Trained, by_flow, by_score_and_flow, train
from experiments.torchcfm_table.problems import PROBLEMS, Splits, draw, make_splits
from fm_jax.checks import check_member
from fm_jax.metrics import floor, normalised_path_energy_floor, wasserstein
from fm_jax.train.folder import check_places, make_folder, replacing, write_text

COLUMNS = {
    "w2": "2-Wasserstein distance from {num} samples to as many test points",
    "npe": "Normalised path energy",
    "nfe": "Network evaluations a sample",
    "seconds": "Training time in seconds, compilation left out",
}
PEER = "torchcfm "
SMOKE: dict[str, Any] = {"recipe": SMOKE_RECIPE, "num_test": 64, "num_reference": 64, "floor_repeats": 2}
"""The sizes of a smoke run."""
SMOKE_MOST = {"seeds": 1, "problems": 2}
"""How many of them it has."""


@dataclass(frozen=True)
class Config:
    """The whole table."""

    run_dir: Path = Path("runs/torchcfm_table")
    """Folder of the results."""
    seeds: tuple[int, ...] = (42, 43, 44, 45, 46)
    """One training each."""
    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Columns of the table."""
    methods: tuple[str, ...] = METHODS
    """Rows of the table."""
    recipe: Recipe = field(default_factory=Recipe)
    num_test: int = 1000
    """Test points, and samples to judge."""
    num_reference: int = 4096
    """Points of the exact transport between source and data, which path energies are measured by."""
    peer_python: Path | None = None
    """Interpreter that has torchcfm; by default this one, if it has it, or else no comparison."""
    floor_repeats: int = 20
    """Pairs of draws of the data that the floor is measured by."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self, seeds=SEED, floor_repeats=2)
        check_some("--seeds", self.seeds)
        for name, allowed in (("problems", tuple(PROBLEMS)), ("methods", METHODS)):
            check_some(option(name), values := getattr(self, name))
            for each in values:
                check_member(f"each of {option(name)}", each, allowed)
        if not any(cells(self, self.methods)):
            raise ValueError("--methods FM starts from noise and nothing else: --problems must have one that does.")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        ofm, bridges = {"OFM"}, {"SB-CFM", "SB-CFM, entropic", "[SF]2M"}
        takers = {
            "steps": set(METHODS) - ofm,
            "learning_rate": set(METHODS) - ofm,
            "sigma": set(METHODS) - ofm - bridges,
            "bridge_sigma": bridges,
            "reuse": bridges | {"OT-CFM"},
            "reflow_pairs": {"2-RF"},
            **dict.fromkeys(("ofm_steps", "ofm_learning_rate", "ofm_reuse"), ofm),
        }
        for name, methods in takers.items():
            if methods.isdisjoint(self.methods):
                yield f"recipe.{name}", f"none of --methods takes it; {' and '.join(sorted(methods)[:3])} would"
        if set(self.methods).isdisjoint(peer.METHODS):
            yield "peer_python", "torchcfm has none of --methods"
        if self.smoke:
            yield from of_smoke(SMOKE)
            for name, most in SMOKE_MOST.items():
                if len(getattr(self, name)) > most:
                    yield name, f"--smoke takes no more than {most}"


class Cell(NamedTuple):
    """One training: who, what, and with which seed."""

    method: str
    problem: str
    seed: int

    @property
    def file(self) -> str:
        return re.sub(r"\W+", "_", " ".join(map(str, self))) + ".npz"


def cells(config: Config, methods: tuple[str, ...]) -> Iterator[Cell]:
    """All trainings of these methods. FM starts from noise and nothing else."""
    for problem in config.problems:
        for seed in config.seeds:
            for method in methods:
                if method != "FM" or PROBLEMS[problem].source is None:
                    yield Cell(method, problem, seed)


CONFIG = Config()


def references(config: Config) -> dict[str, dict[str, Any]]:
    """For each column the least path energy, W2^2 between source and data, and the floors of both measures."""
    found = {}
    for name in config.problems:
        source, data = (partial(draw, toy) for toy in PROBLEMS[name])
        keys = jax.random.split(jax.random.key(0), 4)
        w2 = floor(wasserstein, data, keys[0], config.num_test, repeats=config.floor_repeats)
        npe = normalised_path_energy_floor(source, data, keys[1], config.num_test, repeats=config.floor_repeats)
        energy = wasserstein(source(keys[2], config.num_reference), data(keys[3], config.num_reference)) ** 2
        found[name] = {"energy": energy, "w2": w2.values.tolist(), "npe": npe.values.tolist()}
    return found


def _splits(config: Config, cell: Cell) -> Splits:
    return make_splits(cell.problem, cell.seed, config.num_test)


def judge(config: Config, cell: Cell, trained: Trained, splits: Splits, energy: float) -> None:
    """Samples from a trained model and writes its numbers and trajectories to the file of the cell."""
    x, nfe, path_energy, trajectory = trained.generate(
        trained.params, jax.random.key(cell.seed), jnp.asarray(splits.x0_test)
    )
    with replacing(_path(config, cell)) as unfinished:
        np.savez(
            unfinished,
            w2=wasserstein(x, splits.x1_test),
            npe=abs(float(path_energy) - energy) / energy,
            nfe=np.nan if nfe is None else float(nfe),
            seconds=trained.seconds,
            trajectory=np.asarray(trajectory)[:, :200],
        )


def _path(config: Config, cell: Cell) -> Path:
    return config.run_dir / "cells" / cell.file


def _is_whole(path: Path, *names: str) -> bool:
    """Whether a file of arrays is there, can be read and has these; one that a killed process left is made again."""
    try:
        with np.load(path) as file:
            return all(file[name] is not None for name in names or file.files)
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error):
        return False


def check_peer(python: Path | None) -> None:
    """Refuses what is not an interpreter that can import what `peer` does."""
    wanted = f"--peer-python must be an interpreter that has torch and torchcfm, got {python}"
    command = [str(python), "-c", "import numpy, torch, torchcfm; print(6 * 7)"]
    try:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 300}
        done = subprocess.run(command, text=True, errors="replace", check=False, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{wanted}: {getattr(error, 'strerror', None) or error}.") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{wanted}: it did not import them within five minutes.") from None
    if done.returncode or done.stdout.split()[-1:] != ["42"]:
        said = (done.stderr.strip().splitlines() or ["it did not do what Python does"])[-1]
        raise ValueError(f"{wanted}: {said[:200]}.")


def start_peer(config: Config) -> tuple[list[dict[str, Any]], subprocess.Popen] | None:
    """Starts torchcfm's trainings in another process, if it is there."""
    python = config.peer_python or (Path(sys.executable) if find_spec("torchcfm") and find_spec("torch") else None)
    if python is None:
        print("torchcfm is not installed: the table goes without it. --peer-python gives an interpreter that has it.")
        return None
    folder, jobs = config.run_dir / "torchcfm", []
    folder.mkdir(exist_ok=True)
    for cell in cells(config, tuple(m for m in config.methods if m in peer.METHODS)):
        data = folder / Cell("data", cell.problem, cell.seed).file
        if not _is_whole(data):
            splits = _splits(config, cell)
            with replacing(data) as unfinished:
                train_splits = {k: v for k, v in splits._asdict().items() if k.endswith("train") and v is not None}
                np.savez(unfinished, **train_splits)
        if not _is_whole(folder / cell.file):
            (folder / cell.file).unlink(missing_ok=True)
        recipe = dataclasses.asdict(config.recipe)
        jobs.append(recipe | cell._asdict() | {"data": str(data), "out": str(folder / cell.file)})
    write_text(folder / "jobs.json", json.dumps(jobs))
    command = [str(python), peer.__file__, str(folder / "jobs.json")]
    return jobs, subprocess.Popen(command)


def load_peer(job: dict[str, Any]) -> Trained:
    """A model that torchcfm has trained, as one of ours."""
    networks: dict[str, dict] = {}
    with np.load(job["out"]) as file:
        seconds = float(file["seconds"])
        for name in file:
            if name != "seconds":
                network, layer, leaf = name.split("/")
                networks.setdefault(network, {}).setdefault(layer, {})[leaf] = jnp.asarray(file[name])
    if len(networks) == 1:
        return Trained(networks["0"], seconds, by_flow)
    return Trained(networks, seconds, by_score_and_flow(job["bridge_sigma"]))


def run(config: Config) -> dict[str, Any]:
    """Trains, judges and writes the table; returns the results, in the first process."""
    first = {name: getattr(config, name)[:most] for name, most in SMOKE_MOST.items()}
    config = smoke(config, **SMOKE, **first)
    if (python := config.peer_python) is not None:
        if python.exists():  # a path, though "./python" has lost what says so
            config = dataclasses.replace(config, peer_python=python.absolute())
        check_peer(config.peer_python)
    with own_folder(config.run_dir):
        _prepare(config)
        wait_for_all("the folder of the cells")
        started = start_peer(config) if is_first() else None
        try:
            return _run(config, started)
        finally:
            if started is not None:
                started[1].terminate()  # not to train on alone


def _run(config: Config, started: tuple[list[dict[str, Any]], subprocess.Popen] | None) -> dict[str, Any]:
    reference = references(config)
    done = [*cells(config, config.methods)]
    for cell in done[jax.process_index() :: jax.process_count()]:  # each process trains its part of them
        if not _is_whole(_path(config, cell), *COLUMNS, "trajectory"):
            splits = _splits(config, cell)
            trained = train(cell.method, config.recipe, splits, cell.seed)
            judge(config, cell, trained, splits, reference[cell.problem]["energy"])
            print(f"{cell.method}, {cell.problem}, seed {cell.seed}: {trained.seconds:.1f} s", flush=True)
    wait_for_all("the end of the trainings")
    if not is_first():
        return {}
    if started is not None:
        jobs, process = started
        if process.wait():
            raise SystemExit(f"torchcfm's process ended with status {process.returncode}; what it said is above.")
        for job in jobs:
            cell = Cell(PEER + job["method"], job["problem"], job["seed"])
            judge(config, cell, load_peer(job), _splits(config, cell), reference[cell.problem]["energy"])
            done.append(cell)
    results = {"references": reference, "cells": _collect(config, done)}
    write_text(config.run_dir / "results.json", json.dumps(results, indent=1) + "\n")
    text = render(config, results)
    write_text(config.run_dir / "table.md", text)
    _figure(config, done)
    print(f"\n{text}\n{config.run_dir}: table.md, trajectories.png, results.json")
    return results


def render(config: Config, results: dict[str, Any]) -> str:
    """The results as Markdown: a table for each measure, ours above torchcfm's, and where ours is the worse one."""
    found, reference = results["cells"], results["references"]
    methods = [*config.methods, *(PEER + m for m in peer.METHODS)]
    lines = []
    for column, title in COLUMNS.items():
        lines += [f"**{title.format(num=f'{config.num_test:,}')}**", "", "| | " + " | ".join(config.problems) + " |"]
        lines += ["|---" * (1 + len(config.problems)) + "|"]
        if column in ("w2", "npe"):
            floors = [_mean_and_std(reference[name][column]) for name in config.problems]
            lines += ["| floor | " + " | ".join(floors) + " |"]
        for method in methods:
            values = [found.get(method, {}).get(name, {}).get(column) for name in config.problems]
            if any(values):
                lines += [f"| {method} | " + " | ".join("-" if v is None else _mean_and_std(v) for v in values) + " |"]
        lines += [""]
    worse = [*_worse_cells(config, results)]
    lines += [
        "Above both torchcfm and the floor, each by more than two standard errors: "
        + (", ".join(worse) or "none")
        + "."
    ]
    return "\n".join(lines) + "\n"


def _worse_cells(config: Config, results: dict[str, Any]) -> Iterator[str]:
    """Where our distance or path energy is above torchcfm's and above the floor, each by two standard errors."""
    for method in peer.METHODS:
        for name in config.problems:
            for column in ("w2", "npe"):
                ours, theirs = (
                    results["cells"].get(who, {}).get(name, {}).get(column) for who in (method, PEER + method)
                )
                if (
                    ours
                    and theirs
                    and all(
                        np.mean(ours) - np.mean(other) > 2 * np.hypot(_standard_error(ours), _standard_error(other))
                        for other in (theirs, results["references"][name][column])
                    )
                ):
                    yield f"{method}, {name}, {column}"


def _standard_error(values: list[float]) -> float:
    return float(np.std(values) / np.sqrt(max(1, len(values) - 1)))


def _mean_and_std(values: list[float]) -> str:
    mean, std = np.mean(values), np.std(values)
    return f"{mean:.0f} ± {std:.0f}" if mean >= 20 else f"{mean:.3f} ± {std:.3f}"


def _collect(config: Config, done: list[Cell]) -> dict[str, Any]:
    """{method: {problem: {measure: values over seeds}}}."""
    found: dict[str, Any] = {}
    for cell in done:
        with np.load(_path(config, cell)) as file:
            for column in COLUMNS:
                row = found.setdefault(cell.method, {}).setdefault(cell.problem, {})
                row.setdefault(column, []).append(float(file[column]))
    return found


def _figure(config: Config, done: list[Cell]) -> None:
    panels: dict[str, dict[str, np.ndarray]] = {method: {} for method in config.methods}
    for cell in done:
        if cell.method in panels and cell.seed == config.seeds[0]:
            with np.load(_path(config, cell)) as file:
                panels[cell.method][cell.problem] = file["trajectory"]
    save_trajectory_table(config.run_dir / "trajectories.png", panels, config.problems)


@by_first
def _prepare(config: Config) -> None:
    """Makes the folder, or goes on in one that was made for the same table."""
    files = ["config.json", "results.json", "table.md", "trajectories.png"]
    check_places(config.run_dir, files, ["cells", "torchcfm"])
    check_experiment(config.run_dir, None)
    text = json.dumps(dataclasses.asdict(dataclasses.replace(config, peer_python=None)), indent=2, default=str) + "\n"
    path = config.run_dir / "config.json"
    if path.exists() and (found := path.read_bytes()) != text.encode():
        try:
            damaged = not isinstance(json.loads(found), dict)
        except ValueError:
            damaged = True
        wrong = (
            f"has a damaged {path.name}, so that whose cells it holds is unknown" if damaged else "holds another table"
        )
        raise SystemExit(f"{config.run_dir} {wrong}: give another --run-dir, or remove the folder.")
    make_folder(config.run_dir / "cells")
    write_text(path, text)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)
