"""Sudoku of 4 by 4: masked diffusion of the 288 solutions, and what each sampler makes of the same network.

Papers: Shi et al. 2024 (arXiv:2406.04329) and Sahoo et al. 2024 (arXiv:2406.07524) for masked diffusion, Zheng et al.
2024 (arXiv:2409.02908) for first hitting.
Command: `python -m experiments.sudoku`
Hardware: ten minutes on two CPU cores.
Expect: nearly all grids right by first hitting, which draws one cell after the other, and fewer the more are drawn at
once: a step cannot know of two free cells that they may not be the same. The exact posterior has that error too, and is
drawn beside the network. Tau-leaping takes the same steps as the exact ones, as the share of data is linear in time
here, and so its curve is theirs. The mask bound ends a little above its floor, log 288 = 5.663 nats.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab import command_line
from experiments.lab.figures import save_shares
from experiments.lab.options import check_multiple, check_options, check_some, of_smoke
from experiments.lab.processes import everywhere, own_folder
from experiments.lab.scenes import FreshBatches
from experiments.lab.smoke import TRAINING, smoke
from experiments.lab.training import (
    Training,
    check_batch,
    check_run_dir,
    draw_loss,
    files_of,
    median_rate,
    sampling_params,
    train,
    write_results,
)
from fm_jax import losses
from fm_jax.checks import check_tokens
from fm_jax.likelihood import token_bound
from fm_jax.models import TokenTransformer, init_params, linen_apply, num_params
from fm_jax.oracles import TokenTable, exact_denoiser, sudoku4, with_mask
from fm_jax.parameterization import bind
from fm_jax.paths import MixturePath
from fm_jax.rates import forward_rates
from fm_jax.samplers import FirstHitting, MixtureSteps, TauLeaping, grids, sample
from fm_jax.schedules import Linear
from fm_jax.sources import Masked
from fm_jax.types import Array, DenoiserFn, Key, Params, Sampler, Solution

PICTURES = ("validity.png", "loss.png")
CELLS, MASK = 16, 4
LOSSES = {"masked_elbo": losses.masked_elbo, "cross_entropy": losses.cross_entropy}
HEADS = 4
STEPS_PER_CALL = 50
BOUND: dict[str, Any] = {"bound": "mask", "num_times": 64}
Shares = dict[str, dict[str, float]]
"""Of grids that are solutions: by the name of a sampler, by network evaluations."""


@dataclass(frozen=True)
class Steps:
    """How finely the samplers go."""

    steps: tuple[int, ...] = (4, 8, 16, 32, 64)
    """Numbers of steps of the samplers that have a grid of times."""
    per_step: tuple[int, ...] = (1, 2, 4)
    """Cells that first hitting draws from one evaluation of the network."""

    def __post_init__(self) -> None:
        check_options(self, steps=(1, 1000), per_step=(1, CELLS))
        check_some("--steps", self.steps)
        check_some("--per-step", self.per_step)


@dataclass(frozen=True)
class Config:
    """A run on sudoku. The command line has an option for every field."""

    EXPERIMENT: ClassVar[str] = "sudoku"

    training: Training
    loss: Literal["masked_elbo", "cross_entropy"] = "masked_elbo"
    """The bound on the likelihood, or the cross entropy of the masked cells, all times alike."""
    width: int = 96
    """Width of the network, a multiple of 8."""
    depth: int = 3
    """Blocks of the network."""
    sampling: Steps = field(default_factory=Steps)
    num_samples: int = 1000
    """Grids that are drawn by each sampler."""
    smoke: bool = False
    """Run the whole path once with next to no computation; sizes and steps are its own."""

    def __post_init__(self) -> None:
        check_options(self)
        check_multiple("--width", self.width, 2 * HEADS, f"twice its {HEADS} heads")

    def unused(self) -> Iterator[tuple[str, str]]:
        """Options of no effect, and why."""
        yield "training.sample_every", "sudoku draws nothing while it trains; the experiments on images do"
        yield "training.init_from", "sudoku begins with parameters of its own"
        if self.smoke:
            yield from of_smoke(SMOKE | {"training": TRAINING | {"batch_size": None}})
        yield from self.training.unused()


SMOKE: dict[str, Any] = {
    "width": 8,
    "depth": 1,
    "sampling": {"steps": (2,), "per_step": (8,)},
    "num_samples": 16,
}
"""The sizes of a smoke run."""
CONFIG = Config(
    training=Training(
        run_dir=Path("runs/sudoku"),
        total_steps=8000,
        batch_size=64,
        learning_rate=2e-3,
        decay="cosine",
        ema_decays=(0.99,),
        log_every=50,
        save_every=1000,
    ),
)


@functools.cache
def path() -> MixturePath:
    """From masks to solutions. Made when it is asked for: it computes, and processes have to meet before that."""
    return MixturePath(Linear(), Masked(MASK + 1, MASK))


class Way(NamedTuple):
    """One way to draw grids: a sampler, its times, and whether it takes rates in place of a denoiser."""

    sampler: Sampler
    times: Array | None = None
    of_rates: bool = False


def ways(steps: Steps) -> dict[str, list[Way]]:
    """All that are compared, by name. The grid "cosine" has its short steps where all is masked (Shi et al. 2024)."""
    evens = [grids.uniform(num) for num in steps.steps]
    cosines = [jnp.asarray(1 - np.cos(np.pi / 2 * np.asarray(times, np.float64)), jnp.float32) for times in evens]
    found = {
        "exact steps, even": [Way(MixtureSteps(path()), times) for times in evens],
        "exact steps, cosine": [Way(MixtureSteps(path()), times) for times in cosines],
        "tau-leaping": [Way(TauLeaping(), times, of_rates=True) for times in evens],
    }
    positions: tuple[Any, ...] = ("random", "confidence", "margin")
    return found | {
        f"first hitting, {position}": [Way(FirstHitting(path(), position, num)) for num in steps.per_step]
        for position in positions
    }


def are_solutions(table: TokenTable, x: Any) -> np.ndarray:
    """Of grids [n, 16], which are among those of a table: bool [n]."""
    return np.isin(_numbers(x), _numbers(table.states))


def _numbers(x: Any) -> np.ndarray:
    """A number for each grid, its own."""
    return np.asarray(x, np.int64) @ (MASK + 1) ** np.arange(CELLS)


def validity(
    denoiser_of: Callable[[Params], DenoiserFn], params: Params, table: TokenTable, steps: Steps, key: Key, num: int
) -> tuple[Shares, np.ndarray]:
    """The share of solutions among `num` grids of each sampler, and those of the first of first hitting.

    Args:
        denoiser_of: of the parameters.
        params: of the network; `None` for what has none.
        table: of the solutions.
        steps: of the samplers.
        key: typed key, the same for all.
        num: grids for each.
    """

    @functools.partial(jax.jit, static_argnames=("sampler", "of_rates"))
    def draw(params: Params, key: Key, times: Array | None, sampler: Sampler, of_rates: bool) -> Solution:
        denoiser = denoiser_of(params)
        v = forward_rates(denoiser, path()) if of_rates else denoiser
        x0 = path().source.draw(key, jax.ShapeDtypeStruct((num, CELLS), np.int32))
        return sample(v, x0, sampler, times=times, key=key)

    shares: Shares = {}
    kept = None
    for name, each in ways(steps).items():
        shares[name] = {}
        for way in each:
            solution: Any = jax.device_get(draw(params, key, way.times, way.sampler, way.of_rates))
            check_tokens("the grids drawn", solution.x, MASK + 1)
            shares[name][str(int(solution.calls))] = float(are_solutions(table, solution.x).mean())
            kept = solution.x if kept is None and name.startswith("first hitting") else kept
    assert kept is not None
    return shares, kept


def run(config: Config) -> dict[str, Any]:
    """Trains, bounds, draws by every sampler; returns the numbers it prints."""
    config = smoke(config, **SMOKE)
    check_batch(config.training)
    with own_folder(config.training.run_dir):
        return _run(config)


def _run(config: Config) -> dict[str, Any]:
    run_dir, table = config.training.run_dir, with_mask(sudoku4())
    check_run_dir(config, PICTURES)
    key_train, key_init, key_bound, key_draw = jax.random.split(jax.random.key(config.training.seed), 4)
    model = TokenTransformer(
        MASK + 1,
        mask=MASK,
        hidden=config.width,
        num_layers=config.depth,
        num_heads=HEADS,
        timed=False,
        length=CELLS,
        scan_layers=False,
    )
    apply_fn, params = linen_apply(model), init_params(model, key_init, (CELLS,))
    print(
        f"{len(table.states)} solutions of the sudoku of 4 by 4, a transformer with {num_params(params):,} parameters, "
        f"{jax.device_count()} {jax.default_backend()} device(s)"
    )

    def draw(rng: np.random.Generator, step: int, num: int) -> dict[str, Any]:
        return {"x1": table.states[rng.integers(len(table.states), size=num)]}

    data = FreshBatches(draw, config.training.seed, config.training.batch_size // jax.process_count())
    loss_fn = LOSSES[config.loss](apply_fn, path())
    state = train(config, key_train, params, loss_fn, data, steps_per_call=STEPS_PER_CALL)
    params = jax.device_get(everywhere(sampling_params(state, config.training)))

    bound = jax.jit(lambda params, key, x1: token_bound(bind(apply_fn, params), path(), key, x1, **BOUND))
    found = jax.device_get(bound(params, key_bound, table.states))
    judged = functools.partial(validity, table=table, steps=config.sampling, key=key_draw, num=config.num_samples)
    network, drawn = judged(lambda params: bind(apply_fn, params), params)
    exact, _ = judged(lambda _: exact_denoiser(table, path()), None)
    results: dict[str, Any] = {
        "mask_bound": float(found.nats.mean()),
        "mask_bound_standard_error": float(np.sqrt((found.error**2).sum())) / len(table.states),
        "mask_bound_floor": math.log(len(table.states)),
        "distinct": len(np.unique(drawn[are_solutions(table, drawn)], axis=0)),
        "network": network,
        "exact": exact,
        "training_grids_per_second": median_rate(run_dir),
    }
    save_shares(run_dir / "validity.png", network, exact)
    draw_loss(run_dir)
    write_results(run_dir, results)
    print(_report(config, results))
    return results


def _report(config: Config, results: dict[str, Any]) -> str:
    run_dir = config.training.run_dir
    lines = ["\n" + files_of(run_dir, *PICTURES, "metrics.jsonl", "config.json", "results.json", "checkpoints/")]
    lines.append(f"solutions among {config.num_samples:,} grids, by the network and by the exact posterior:")
    for name, shares in results["network"].items():
        for nfe, share in shares.items():
            lines.append(f"  {name:<25} {nfe:>4} NFE  {share:6.1%}  {results['exact'][name][nfe]:6.1%}")
    lines.append(
        f"first hitting drew {results['distinct']} of the 288 solutions; mask bound {results['mask_bound']:.3f} +- "
        f"{results['mask_bound_standard_error']:.3f} nats, of which {results['mask_bound_floor']:.3f} are the floor"
    )
    if rate := results["training_grids_per_second"]:
        lines.append(f"training: {rate:,.0f} grids/s")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    command_line.main(run, Config, CONFIG, __doc__)


if __name__ == "__main__":
    main()
