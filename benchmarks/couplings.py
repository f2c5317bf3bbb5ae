"""What couplings cost: a training step with exact optimal transport and one without; each coupling, and POT's.

Command: `python -m benchmarks.couplings`; `--peer-python` names an interpreter that has torchcfm, whose own training
step is then timed as well; POT is timed if it is installed.

`step`: TorchCFM's two-dimensional set-up, moons to eight Gaussians with its 3 x 64 network and AdamW, in alternation
with independent pairs (I-CFM) and with pairs of exact transport made ahead in threads (OT-CFM), each pair used `reuse`
times, beside SciPy's assignment alone, the least that one thread could take. `mnist`: the same for the 1.1M U-Net on
MNIST's shape. `couplings`: one batch at a time of two Gaussians, in 2 and in 784 dimensions, float32, compilation left
out; POT gets float64, as its solvers want, and the same costs, regularisation and, as nearly as its criteria allow,
stopping threshold; `ott`, which `EntropicOT` calls, is timed by itself at the epsilon asked for, from zero
potentials. `draws`: the plan of `EntropicOT` and a permutation drawn from it, in alternation.
"""

import dataclasses
import itertools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import linear_sum_assignment

from benchmarks.lab import lines, record
from experiments.lab import command_line, images
from experiments.lab.data import Data
from experiments.lab.method import Method, make_loss
from experiments.lab.options import check_options
from experiments.lab.training import Training
from experiments.torchcfm_table import peer
from experiments.torchcfm_table.methods import NETWORK, Recipe, conditional, fit
from experiments.torchcfm_table.problems import Splits, draws
from fm_jax import couplings
from fm_jax.couplings.costs import cost_matrix, squared_euclidean
from fm_jax.data.coupled import CoupledBatches
from fm_jax.data.toy import eight_gaussians, moons
from fm_jax.models import init_params, num_params
from fm_jax.train import create_state, make_optimizer, make_step
from fm_jax.train.parallel import pmap_step, split_batch
from fm_jax.types import Array, Batch, Coupling

GROMOV_EPSILON = 0.1
"""Below this POT's solver, which leaves the log domain, fails on these batches."""
Part = Literal["step", "mnist", "couplings", "draws"]


@dataclass(frozen=True)
class Config:
    """What to measure."""

    out: Path = Path("runs/benchmark_couplings")
    """Where the results go."""
    parts: tuple[Part, ...] = ("step", "mnist", "couplings", "draws")
    """What to measure."""
    steps: int = 6000
    """Steps of one timing in two dimensions."""
    workers: int = 2
    """Threads that couple batches ahead of a step in two dimensions."""
    repeats: int = 5
    """Timings, whose median counts."""
    mnist_steps: int = 4
    """Steps of one timing on images."""
    sizes: tuple[int, ...] = (128, 256, 1024, 4096)
    """Points of a batch."""
    peer_python: Path | None = None
    """Interpreter that has torchcfm."""

    def __post_init__(self) -> None:
        check_options(self)


def toy_step(config: Config) -> list[dict[str, Any]]:
    """Milliseconds a step in two dimensions, by batch size and reuse."""
    keys = jax.random.split(jax.random.key(0), 4)
    x0, x1 = np.asarray(moons(keys[0], 10_000)), np.asarray(eight_gaussians(keys[1], 10_000))
    splits, rows = Splits(x0, x1, x0[:1], x1[:1]), []
    params = init_params(NETWORK, keys[2], (2,))
    for batch_size, reuses in ((128, (1, 8, 16)), (256, (1, 16, 64)), (512, (1, 32, 128))):
        recipe = dataclasses.replace(Recipe(), batch_size=batch_size)

        def seconds(reuse: int | None, recipe: Recipe = recipe) -> float:
            batches: Iterator[Batch] = draws(splits, recipe.batch_size, 0)
            if reuse is not None:
                batches = CoupledBatches(batches, couplings.ExactOT(), keys[3], reuse=reuse, workers=config.workers)
            num_steps = config.steps if reuse != 1 else config.steps // 10
            return fit(conditional, recipe, params, keys[3], batches, num_steps)[1] / num_steps

        times, assignments = [], []
        for _ in range(config.repeats):
            times.append({reuse: seconds(reuse) for reuse in (None, *reuses)})
            assignments.append(_assignment_ms(splits, batch_size))
        peer = _peer_steps(config, recipe, splits) if config.peer_python else {}
        for reuse in reuses:
            rows.append(
                {
                    "batch_size": batch_size,
                    "reuse": reuse,
                    "i_cfm_ms": 1e3 * statistics.median(each[None] for each in times),
                    "ot_cfm_ms": 1e3 * statistics.median(each[reuse] for each in times),
                    "ratio": statistics.median(each[reuse] / each[None] for each in times),
                    "ratios": [each[reuse] / each[None] for each in times],
                    "assignment_ms": statistics.median(assignments),
                }
                | peer
            )
    return rows


def _assignment_ms(splits: Splits, batch_size: int, num: int = 100) -> float:
    """Milliseconds of SciPy's assignment alone, on cost matrices that are already there."""
    batches: Iterator[Batch] = itertools.islice(draws(splits, batch_size, 0), num)
    costs = [np.asarray(cost_matrix(squared_euclidean, each["x0"], each["x1"])) for each in batches]
    start = time.perf_counter()
    for each in costs:
        linear_sum_assignment(each)
    return 1e3 * (time.perf_counter() - start) / num


def _peer_steps(config: Config, recipe: Recipe, splits: Splits) -> dict[str, float]:
    """Milliseconds a step of torchcfm's I-CFM and OT-CFM on the same data."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, x0_train=np.asarray(splits.x0_train), x1_train=splits.x1_train)
        steps = max(100, config.steps // 10)
        for method in ("I-CFM", "OT-CFM"):
            jobs, out = Path(folder) / "jobs.json", Path(folder) / f"{method}.npz"
            job = dataclasses.asdict(recipe) | {"method": method, "seed": 0, "data": str(data), "out": str(out)}
            jobs.write_text(json.dumps([job | {"steps": steps}]))
            subprocess.run([str(config.peer_python), peer.__file__, str(jobs)], check=True)
            with np.load(out) as file:
                found[f"torchcfm_{method}_ms"] = 1e3 * float(file["seconds"]) / steps
    found["torchcfm_ratio"] = found["torchcfm_OT-CFM_ms"] / found["torchcfm_I-CFM_ms"]
    return found


def mnist_step(config: Config) -> dict[str, Any]:
    """Seconds a step of the 1.1M U-Net on random images of MNIST's shape, batch 128."""
    training = Training(run_dir=Path("unused"))
    experiment = images.build(images.Config(data=Data(dataset="mnist"), training=training, model="mnist"))
    params = init_params(experiment.model, jax.random.key(0), experiment.event_shape)
    optimizer = make_optimizer(training.learning_rate, total_steps=training.total_steps)
    state = create_state(params, optimizer, training.ema_decays)
    step = pmap_step(make_step(make_loss(Method(), experiment), optimizer))
    key, num = jax.random.key(1), training.batch_size

    def draw() -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        while True:
            shape = (num, *experiment.event_shape)
            x0, x1 = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
            yield {"x0": x0, "x1": x1, "cond": np.arange(num) % experiment.num_classes}

    iterators = {"i_cfm": draw(), "ot_cfm": CoupledBatches(draw(), couplings.ExactOT(), key)}
    times: dict[str, list[float]] = {name: [] for name in iterators}
    for _ in range(1 + config.repeats):
        for name, batches in iterators.items():
            start = time.perf_counter()
            for _ in range(config.mnist_steps):
                state, _ = step(state, key, split_batch(next(batches), jax.local_device_count()))
            jax.block_until_ready(state)
            times[name].append((time.perf_counter() - start) / config.mnist_steps)
    measured = {name: values[1:] for name, values in times.items()}  # the first compiles
    return {
        "parameters": num_params(params),
        "batch_size": num,
        **{f"{name}_seconds": statistics.median(values) for name, values in measured.items()},
        "ratio": statistics.median(b / a for a, b in zip(*measured.values(), strict=True)),
    }


def _pot_couplings(epsilon: float, tau: float) -> dict[str, Callable[[np.ndarray, np.ndarray], Any]]:
    """POT's solvers of the same problems, as functions of x0 and x1; the cost matrix is a part of the work."""
    import ot

    def costs(x0: Any, x1: Any) -> Any:
        return squared_euclidean(x0.astype(np.float64), x1.astype(np.float64))

    def sinkhorn(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
        c = costs(x0, x1)
        return ot.sinkhorn(
            [], [], c, reg=epsilon * c.mean(), method="sinkhorn_log", stopThr=1e-3 / len(c), numItermax=4000
        )

    def unbalanced(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
        c = costs(x0, x1)
        reg = epsilon * c.mean()
        marginal = reg * tau / (1 - tau)
        return ot.unbalanced.sinkhorn_unbalanced([], [], c, reg=reg, reg_m=marginal, stopThr=1e-4, numItermax=4000)

    def gromov(x0: np.ndarray, x1: np.ndarray) -> np.ndarray:
        within = [c / c.mean() for c in (costs(x0, x0), costs(x1, x1))]
        uniform = [np.full(len(x), 1 / len(x)) for x in (x0, x1)]
        options = {"epsilon": GROMOV_EPSILON, "max_iter": 100, "tol": 1e-4}
        return ot.gromov.entropic_gromov_wasserstein(*within, *uniform, "square_loss", **options)

    return {
        "Gromov-Wasserstein": gromov,
        "exact": lambda x0, x1: ot.emd([], [], costs(x0, x1), numItermax=10**7),
        "entropic, the plan": sinkhorn,
        "unbalanced, the plan": unbalanced,
        "partial": lambda x0, x1: ot.partial.partial_wasserstein(
            np.full(len(x0), 1 / len(x0)), np.full(len(x1), 1 / len(x1)), costs(x0, x1), m=0.9, numItermax=10**7
        ),
    }


def _ott_plan(epsilon: float) -> Callable[[Array, Array], Any]:
    """The same plan by `ott` alone, and whether it converged, as one jitted program."""
    from ott.geometry.geometry import Geometry
    from ott.solvers.linear import solve

    @jax.jit
    def plan(x0: Array, x1: Array) -> Any:
        c: Any = squared_euclidean(x0, x1)
        found = solve(Geometry(c, epsilon=epsilon * c.mean()), threshold=1e-3, max_iterations=4000)
        return len(x0) * found.matrix, found.converged

    return plan


def _best_ms(function: Callable[[], Any], seconds: float = 2.0, *, compiles: bool = True) -> float:
    """The least of the timings that fit into `seconds`, at least one; a first call that compiles is left out."""
    if compiles:
        jax.block_until_ready(function())
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < 20):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def each_coupling(config: Config) -> list[dict[str, Any]]:
    """Milliseconds of each coupling and of POT's solver, by size and dimension."""
    epsilon, tau = 0.05, 0.9
    entropic = couplings.EntropicOT(epsilon, relative=True)
    unbalanced = couplings.UnbalancedOT(epsilon, tau, relative=True)
    gromov = couplings.GromovWassersteinOT(GROMOV_EPSILON)
    host: dict[str, Coupling] = {
        "exact": couplings.ExactOT(),
        "partial": couplings.PartialOT(0.9),
        "conditional": couplings.ConditionalOT(),
    }
    device: dict[str, Callable[..., Array]] = {
        "entropic, the plan": jax.jit(entropic.plan),
        "entropic": jax.jit(partial(_index0, entropic)),
        "unbalanced, the plan": jax.jit(unbalanced.plan),
        "unbalanced": jax.jit(partial(_index0, unbalanced)),
        "Gromov-Wasserstein": jax.jit(partial(_index0, gromov)),
    }
    try:
        theirs = _pot_couplings(epsilon, tau)
    except ImportError:
        print("POT is not installed: the couplings are timed alone.")
        theirs = {}
    ott_plan, rows = _ott_plan(epsilon), []
    for dim, num in itertools.product((2, 784), config.sizes):
        rng = np.random.default_rng(0)
        x0 = rng.standard_normal((num, dim), dtype=np.float32)
        x1 = rng.standard_normal((num, dim), dtype=np.float32) + np.float32(1)
        cond = rng.standard_normal((num, 1), dtype=np.float32)
        calls: dict[str, Callable[[], Any]] = {
            name: partial(_index0, coupling, x0, x1, cond if name == "conditional" else None)
            for name, coupling in host.items()
        }
        calls |= {name: partial(call, jnp.asarray(x0), jnp.asarray(x1)) for name, call in device.items()}
        for name, call in calls.items():
            if name == "Gromov-Wasserstein" and num > 1024:
                continue  # cubic in the number of points
            row = {"coupling": name, "dim": dim, "num": num, "ms": _best_ms(call, compiles=name in device)}
            if name in theirs:
                row["pot_ms"] = _best_ms(partial(theirs[name], x0, x1), compiles=False)
            if name == "entropic, the plan":
                row["ott_ms"] = _best_ms(partial(ott_plan, jnp.asarray(x0), jnp.asarray(x1)))
                row["ott_converged"] = bool(ott_plan(jnp.asarray(x0), jnp.asarray(x1))[1])
            rows.append(row)
            print(row, flush=True)
    return rows


def each_draw(config: Config) -> list[dict[str, Any]]:
    """Milliseconds of Sinkhorn's plan and of a permutation drawn from it, in alternation."""
    make_plan = jax.jit(couplings.EntropicOT(0.05, relative=True).plan)
    draw = jax.jit(couplings.sample_permutation)
    rows = []
    for dim, num in itertools.product((2, 784), config.sizes):
        rng = np.random.default_rng(0)
        x0, x1 = (jnp.asarray(rng.standard_normal((num, dim), dtype=np.float32)) for _ in range(2))
        plan = make_plan(x0, x1 + 1)
        calls = {"plan": partial(make_plan, x0, x1 + 1), "draw": partial(draw, jax.random.key(0), plan)}
        for call in calls.values():
            jax.block_until_ready(call())  # compiles
        times = [
            {name: _best_ms(call, 0, compiles=False) for name, call in calls.items()} for _ in range(config.repeats)
        ]
        row: dict[str, Any] = {"dim": dim, "num": num}
        for name in calls:
            values = [each[name] for each in times]
            row |= {f"{name}_ms": min(values), f"{name}_median_ms": statistics.median(values)}
        row["ratio"] = row["draw_ms"] / row["plan_ms"]
        row["median_ratio"] = statistics.median(each["draw"] / each["plan"] for each in times)
        rows.append(row)
        print(row, flush=True)
    return rows


def _index0(coupling: Coupling, x0: Any, x1: Any, cond: Any = None) -> Array:
    return coupling(jax.random.key(0), x0, x1, cond).index0


def markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    parts = [f"Device: {results['device']}, jax {results['jax']}, {results['date']}, commit {results['commit']}."]
    if "step" in results:
        peer = "torchcfm_ratio" in results["step"][0]
        head = ["batch", "each pair used", "I-CFM, ms", "OT-CFM, ms", "ratio", "SciPy's assignment, ms"]
        head += ["torchcfm I-CFM, ms", "torchcfm OT-CFM, ms", "ratio"] if peer else []
        columns = ["batch_size", "reuse", "i_cfm_ms", "ot_cfm_ms", "ratio", "assignment_ms"]
        columns += ["torchcfm_I-CFM_ms", "torchcfm_OT-CFM_ms", "torchcfm_ratio"] if peer else []
        parts += ["### A step in two dimensions", lines(head, [[r[c] for c in columns] for r in results["step"]])]
    if "mnist" in results:
        found = results["mnist"]
        parts += [
            "### A step on MNIST's shape",
            f"{found['parameters']:,} parameters, batch {found['batch_size']}: I-CFM {found['i_cfm_seconds']:.2f} s, "
            f"OT-CFM {found['ot_cfm_seconds']:.2f} s, ratio {found['ratio']:.3f}.",
        ]
    if "couplings" in results:
        rows = results["couplings"]
        sizes = sorted({row["num"] for row in rows})
        for dim in sorted({row["dim"] for row in rows}):
            cells = {(r["coupling"], r["num"]): r for r in rows if r["dim"] == dim}
            body = [
                [name, *(_pair(cells.get((name, num))) for num in sizes)]
                for name in dict.fromkeys(r["coupling"] for r in rows)
            ]
            title = f"### Milliseconds a batch in {dim} dimensions, ours / POT / ott"
            parts += [title, lines(["coupling", *map(str, sizes)], body)]
    if "draws" in results:
        columns = ["dim", "num", "plan_ms", "draw_ms", "ratio", "plan_median_ms", "draw_median_ms", "median_ratio"]
        head = [
            "dimensions",
            "points",
            "plan, ms",
            "draw, ms",
            "ratio",
            "plan, median",
            "draw, median",
            "ratio, median",
        ]
        parts += ["### A plan and a draw", lines(head, [[r[c] for c in columns] for r in results["draws"]])]
    return "\n\n".join(parts) + "\n"


def _pair(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    cells = [f"{row[key]:.3g}" for key in ("ms", "pot_ms", "ott_ms") if key in row]
    return " / ".join(cells) + ("" if row.get("ott_converged", True) else " (not converged)")


def run(config: Config) -> dict[str, Any]:
    """Measures, writes and returns what was asked for."""
    config.out.mkdir(parents=True, exist_ok=True)
    path = config.out / "couplings.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results |= record(None)
    parts: dict[Part, Callable[[Config], Any]] = {
        "step": toy_step,
        "mnist": mnist_step,
        "couplings": each_coupling,
        "draws": each_draw,
    }
    for part in config.parts:
        results[part] = parts[part](config)
        path.write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results)
    (config.out / "couplings.md").write_text(text)
    print(text)
    return results


if __name__ == "__main__":
    command_line.main(run, Config, description=__doc__)
