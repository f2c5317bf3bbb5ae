"""Error against network evaluations for every sampler, its overhead, and its compile time.

Command: `python -m benchmarks.samplers --run runs/digits`, which needs a finished `python -m experiments.digits`

Three questions, each answered with all samplers of fixed steps in one process, Diffrax's apart:

* On the closed form, a Gaussian mixture with four components in eight dimensions, on the linear and on the VP path: how
  far from the exact flow does a sampler end (root mean square over coordinates, float64), with 5, 10, 20 and 50
  evaluations? A random sampler follows no flow: it is judged, as are the others, by the energy distance of 2,000
  samples to as many of the data, beside the distance of two draws of the data. On uniform times and on those of EDM.
* On a trained network, the run's: the same against a fine solution of the network's own flow, without guidance.
* On a network that matters, a DiT: the time of a sampler over the time of as many evaluations in a bare loop, and what
  it takes to compile.

Writes `samplers.json`, tables as `samplers.md` and a figure `samplers.png` into `--out`.
"""

import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.lab import lines, record
from experiments.lab import command_line, images
from experiments.lab.data import load
from experiments.lab.experiment import restore_run
from experiments.lab.figures import save_error_curves
from experiments.lab.options import check_options
from experiments.lab.samplers import SAMPLERS, make_sampler
from fm_jax import oracles
from fm_jax.models import forward_flops, init_params, linen_apply, make_dit
from fm_jax.parameterization import bind, velocity_fn
from fm_jax.paths import start
from fm_jax.samplers import RungeKutta, grids, learned, sample
from fm_jax.schedules import VP, Linear
from fm_jax.train.learned import fit_solver
from fm_jax.types import Array, ArrayTree, Key, Schedule, Solution, VelocityFn

BUDGETS = (5, 10, 20, 50)
NAMES = tuple(
    name
    for name in SAMPLERS
    if make_sampler(name, Linear()).nfe_per_step is not None
    and name not in ("sea", "shark", "sra1")  # Diffrax's compile slowly
)
GRIDS = ("uniform", "edm")
FIGURE = ("euler", "heun", "rk4", "ab2", "ab4", "dpm_solver++_2m", "unipc_3", "learned")


PAIRS = 10
"""Timings of each sampler and of the bare loop, in turns, whose least make the overhead."""


@dataclass(frozen=True)
class Config:
    """What to measure."""

    run: Path = Path("runs/digits")
    """Folder of a finished run, for the part network."""
    out: Path = Path("runs/benchmark_samplers")
    """Where the results go."""
    parts: tuple[Literal["linear", "vp", "network", "overhead"], ...] = ("network", "linear", "vp", "overhead")
    """What to measure."""
    num: int = 256
    """Samples on the trained network."""
    learned_iterations: int = 150
    """Training steps of a learned solver for the network; ten times as many for the closed form."""

    def __post_init__(self) -> None:
        check_options(self)


class Problem(NamedTuple):
    """A flow to solve: where it starts, where it ends exactly, and draws of the data to compare with."""

    v: VelocityFn
    schedule: Schedule
    x0: Array
    exact: Array
    data: Array
    other_data: Array


def sample_by(name: str, v: VelocityFn, key: Key, x0: Array, schedule: Schedule, times: int | ArrayTree) -> Solution:
    """A sample by the sampler of that name."""
    sampler = make_sampler(name, schedule)
    return sample(v, x0, sampler, times=times, key=key if sampler.stochastic else None)


@functools.cache
def nfe_of(name: str, num_steps: int) -> int:
    """The evaluations that so many steps from 0 to 1 on the linear path take."""
    calls = sample_by(name, lambda t, x: -x, jax.random.key(0), jnp.ones((1, 1)), Linear(), num_steps).calls
    return int(np.asarray(calls))


def steps_within(name: str, budget: int) -> tuple[int, int]:
    """The most steps, and the evaluations they take, within a budget; (0, 0) if there is none."""
    for num_steps in range(budget // make_sampler(name, Linear()).nfe_per_step + 2, 0, -1):
        if (nfe := nfe_of(name, num_steps)) <= budget:
            return num_steps, nfe
    return 0, 0


def energy_distance(x: Array, y: Array) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, unbiased: 0 on average for two draws of one law, and so at times negative."""

    def mean_distance(a: Array, b: Array) -> Array:
        return jnp.sqrt(jnp.maximum(((a[:, None] - b[None]) ** 2).sum(axis=-1), 1e-30)).mean()

    a, b = (z.reshape(len(z), -1) for z in (x, y))
    correction = len(a) / (len(a) - 1)
    return float(2 * mean_distance(a, b) - correction * (mean_distance(a, a) + mean_distance(b, b)))


def times_of(grid: str, num_steps: int, schedule: Schedule) -> Array:
    """A grid over the whole path."""
    ends = schedule.domain
    return grids.uniform(num_steps, *ends) if grid == "uniform" else grids.edm(num_steps, schedule, *ends)


def errors(problem: Problem, names: tuple[str, ...], grid_names: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for every sampler, grid and budget."""
    rows = []
    for name in names:
        for budget in BUDGETS:
            num_steps, nfe = steps_within(name, budget)
            if num_steps == 0:
                continue
            for grid in grid_names:
                times = times_of(grid, num_steps, problem.schedule)
                draw = jax.jit(
                    lambda key, x0, name=name, times=times: (
                        sample_by(name, problem.v, key, x0, problem.schedule, times).x
                    )
                )
                begin = time.perf_counter()
                x = jax.block_until_ready(draw(jax.random.key(1), problem.x0))
                rows.append(_row(problem, name, budget, grid, nfe, x, time.perf_counter() - begin))
                print(rows[-1], flush=True)
    return rows


def _row(problem: Problem, name: str, budget: int, grid: str, nfe: int, x: Array, seconds: float) -> dict[str, Any]:
    stochastic = name in SAMPLERS and make_sampler(name, problem.schedule).stochastic
    return {
        "sampler": name,
        "budget": budget,
        "grid": grid,
        "nfe": nfe,
        "rmse": None if stochastic else float(jnp.sqrt(jnp.mean((x - problem.exact) ** 2))),
        "energy_distance": energy_distance(x, problem.data),
        "seconds_with_compilation": seconds,
    }


def learned_errors(
    problem: Problem,
    v_of: Callable[[Any], VelocityFn],
    key: Key,
    pairs: tuple[Array, Array, Any],
    iterations: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Rows of solvers trained for this flow, on other starting points than those judged."""
    rows = []
    for budget in (5, 10):
        untrained = learned.start_for(budget, *problem.schedule.domain)
        begin = time.perf_counter()
        solver, _ = fit_solver(v_of, untrained, key, *pairs, num_iterations=iterations, batch_size=batch_size)
        jax.block_until_ready(solver)
        seconds = time.perf_counter() - begin
        draw = jax.jit(lambda solver, x0: sample(problem.v, x0, solver).x)
        rows.append(_row(problem, "learned", budget, "its own", budget, draw(solver, problem.x0), seconds))
        print(rows[-1], flush=True)
    return rows


def oracle(config: Config, schedule: Schedule) -> dict[str, Any]:
    """The closed form, in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        mixture = oracles.gaussian_mixture(1.5 * rng.normal(size=(4, 8)), [0.2, 0.3, 0.4, 0.5], [0.4, 0.3, 0.2, 0.1])
        v, num, t0 = oracles.velocity(mixture, schedule), 2000, schedule.domain[0]
        keys = jax.random.split(jax.random.key(0), 5)
        fine = jax.jit(lambda x0: sample(v, x0, RungeKutta("rk4"), times=times_of("edm", 2000, schedule)).x)
        x0, train_x0 = (start(schedule, t0).draw(key, jnp.zeros((num, 8))) for key in keys[:2])
        data, other = (oracles.sample(mixture, key, num) for key in keys[2:4])
        problem = Problem(v, schedule, x0, fine(x0), data, other)
        rows = errors(problem, NAMES, GRIDS)
        pairs = train_x0, fine(train_x0), None
        rows += learned_errors(problem, lambda _: v, keys[4], pairs, 10 * config.learned_iterations, 256)
        name = type(schedule).__name__
        return {"rows": rows, **_floors(problem), "problem": f"4 Gaussians in 8 dimensions, {name} path, float64"}


def _floors(problem: Problem) -> dict[str, float]:
    return {
        "energy_distance_exact_flow": energy_distance(problem.exact, problem.data),
        "energy_distance_floor": energy_distance(problem.other_data, problem.data),
    }


def network(config: Config) -> dict[str, Any]:
    """The network of a run, without guidance."""
    restored = restore_run(config.run)
    experiment, method, num = restored.experiment, restored.config.method, config.num
    labels = jnp.arange(num) % experiment.num_classes

    def v_of(labels: Array) -> VelocityFn:
        return velocity_fn(bind(experiment.apply_fn, restored.params), method.prediction, method.schedule, labels)

    v = v_of(labels)
    fine = jax.jit(lambda x0: sample(v, x0, RungeKutta("rk4"), times=40).x)
    keys = jax.random.split(jax.random.key(0), 4)
    x0 = experiment.draw_x0(keys[0], num)
    real = images.in_unit_range(load(restored.config.data).train)
    halves = np.split(np.random.default_rng(0).permutation(len(real))[: 2 * num], 2)
    data, other = (jnp.asarray(real[half]) for half in halves)
    problem = Problem(v, method.schedule, x0, fine(x0), data, other)
    rows = errors(problem, NAMES, ("uniform",))
    train_x0 = experiment.draw_x0(keys[1], num)
    pairs = train_x0, fine(train_x0), labels
    rows += learned_errors(problem, v_of, keys[2], pairs, config.learned_iterations, 64)
    return {"rows": rows, **_floors(problem), "problem": f"{config.run.name}, {num} samples, {x0.dtype}, unguided"}


def overhead() -> dict[str, Any]:
    """Time of each sampler over that of as many evaluations in a bare loop; a DiT-S/4 on 32 x 32 images, batch 4."""
    model, shape, num_steps = make_dit("S/4"), (32, 32, 3), 6
    params, apply_fn = init_params(model, jax.random.key(0), shape), linen_apply(model)
    x0, key = jax.random.normal(jax.random.key(1), (4, *shape)), jax.random.key(2)

    def v_of(params: Any) -> VelocityFn:
        return velocity_fn(bind(apply_fn, params), "velocity", Linear())

    def bare(params: Any, key: Key, x: Array) -> Array:
        v = v_of(params)
        # At a time that changes: what depends on a constant one alone would be computed once for all.
        return jax.lax.fori_loop(0, 2 * num_steps, lambda i, x: v(i / jnp.float32(2 * num_steps), x), x)

    # On shared CPU cores the processor time of this process says more than the clock, which sees the neighbours too.
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def timed(f: Callable[..., Array]) -> float:
        start = clock()
        jax.block_until_ready(f(params, key, x0))
        return clock() - start

    jax.config.update("jax_enable_compilation_cache", False)  # compilations are timed
    compilation_cache.reset_cache()  # which only then takes effect
    bare, bare_compile = _compiled(bare, params, key, x0)
    rows = []
    for name in NAMES:
        nfe = nfe_of(name, num_steps)
        run, compile_seconds = _compiled(
            lambda params, key, x, name=name: sample_by(name, v_of(params), key, x, Linear(), num_steps).x,
            params,
            key,
            x0,
        )
        # In turns, so that both see the same machine; the least of some, so that neighbours count least.
        pairs = [(timed(run) / nfe, timed(bare) / (2 * num_steps)) for _ in range(PAIRS)]
        ratio = min(p for p, _ in pairs) / min(q for _, q in pairs)
        rows.append(
            {
                "sampler": name,
                "nfe": nfe,
                "overhead": ratio,
                "compile_over_bare_loop": compile_seconds / bare_compile,
            }
        )
        print(rows[-1], flush=True)
    return {
        "rows": rows,
        "problem": f"DiT-S/4, 32 x 32 x 3, batch 4, float32, {forward_flops(model, shape) / 1e9:.1f} GFLOP a forward",
        "seconds_a_forward": statistics.median(timed(bare) for _ in range(3)) / (2 * num_steps),
        "compile_seconds_bare_loop": bare_compile,
    }


def _compiled(f: Callable[..., Array], *args: Any) -> tuple[Callable[..., Array], float]:
    lowered = jax.jit(f).lower(*args)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    return compiled, seconds


PARTS = ("linear", "vp", "network")


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    parts = [f"Device: {results['device']}, jax {results['jax']}, {results['date']}, commit {results['commit']}."]
    for part in PARTS:
        if part not in results:
            continue
        found = results[part]
        stochastic = [row for row in found["rows"] if row["rmse"] is None]
        flow, floor = found["energy_distance_exact_flow"], found["energy_distance_floor"]
        parts += [
            f"### {found['problem']}",
            "Root mean square distance from the end of the exact flow. `e`: on EDM's times, where these were better.",
            _table([row for row in found["rows"] if row["rmse"] is not None], "rmse"),
            "Random samplers, and Euler's method to compare: energy distance to the data. "
            f"The exact flow: {flow:.4f}; two draws of the data: {floor:.4f}.",
            _table([row for row in found["rows"] if row["sampler"] == "euler"] + stochastic, "energy_distance"),
        ]
    if "overhead" in results:
        found = results["overhead"]
        head = ["sampler", "NFE", "time over NFE forwards", "compile time over that of a bare loop"]
        rows = [
            [r["sampler"], str(r["nfe"]), f"{r['overhead']:.3f}", f"{r['compile_over_bare_loop']:.2f}"]
            for r in found["rows"]
        ]
        parts += [f"### Overhead: {found['problem']}", lines(head, rows)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[dict[str, Any]], quantity: str) -> str:
    """A row for each sampler, on the better of its grids; the best of each column in bold type."""
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        at = row["sampler"], row["budget"]
        if at not in cells or row[quantity] < cells[at][quantity]:
            cells[at] = row
    best = {budget: min((r[quantity] for (_, b), r in cells.items() if b == budget), default=0.0) for budget in BUDGETS}

    def text(name: str, budget: int) -> str:
        if (name, budget) not in cells:
            return ""
        row = cells[name, budget]
        value = f"{row[quantity]:.2g}" + (" e" if row["grid"] == "edm" else "")
        return f"**{value}**" if row[quantity] == best[budget] else value

    names = dict.fromkeys(row["sampler"] for row in rows)
    body = [[name, *(text(name, budget) for budget in BUDGETS)] for name in names]
    return lines(["sampler", *(f"{budget} NFE" for budget in BUDGETS)], body)


def figure(results: dict[str, Any], path: Path) -> None:
    """Error against evaluations, a panel for each problem; each sampler on the better of its grids."""
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for part in PARTS:
        if part in results:
            panel = panels.setdefault(results[part]["problem"], {name: {} for name in FIGURE})
            for row in results[part]["rows"]:
                if row["sampler"] in panel:
                    curve, nfe = panel[row["sampler"]], row["nfe"]
                    curve[nfe] = min(row["rmse"], curve.get(nfe, math.inf))
    save_error_curves(path, panels)


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "samplers.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= record(None)
    parts = {
        "linear": lambda: oracle(config, Linear()),
        "vp": lambda: oracle(config, VP()),
        "network": lambda: network(config),
        "overhead": overhead,
    }
    for part in config.parts:
        results[part] = parts[part]()
        path.write_text(json.dumps(results, indent=1) + "\n")
    (config.out / "samplers.md").write_text(markdown(results))
    if set(PARTS) & set(results):
        figure(results, config.out / "samplers.png")
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
