"""The methods of the two-dimensional table: how each is trained, and what it generates with.

Paper: Tong et al. 2023 (arXiv:2302.00482 and 2307.03672), Liu et al. 2022 (arXiv:2209.03003), Kornilov et al. 2024
(arXiv:2403.13117), Lipman et al. 2022 (arXiv:2210.02747).
Hardware: one CPU core, 1 to 30 seconds a training; a second core solves the transport ahead of it.
Expect: a `Trained` for each method: parameters, the seconds they took, and a function from x0 to samples.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.options import STEPS, check_multiple, check_options, option
from experiments.lab.parallel import Parallel, make_parallel
from experiments.torchcfm_table.problems import Splits, draws, draws_of_pairs, source_of
from fm_jax.couplings import ExactOT, paired, schrodinger_bridge_ot
from fm_jax.data.coupled import CoupledBatches
from fm_jax.fewstep import make_pairs, optimal_flow_matching, transport
from fm_jax.losses import bridge_score, flow_matching
from fm_jax.metrics import path_energy
from fm_jax.models import ICNN, PlainMLP, init_params, linen_apply, linen_potential
from fm_jax.nfe import Counted
from fm_jax.parameterization import bind
from fm_jax.paths import AffinePath, BrownianBridge, ConstantNoise, StochasticInterpolant
from fm_jax.samplers import Adaptive, EulerMaruyama, RungeKutta, grids, sample
from fm_jax.schedules import Cosine, Linear
from fm_jax.times import Stratified
from fm_jax.train import TrainState, create_state, make_optimizer, make_step
from fm_jax.train.step import scan_steps
from fm_jax.types import Array, Batch, Cond, Coupling, Key, LossFn, Params, VelocityFn

CHUNK = 100
"""Steps of one dispatch."""


@dataclass(frozen=True)
class Recipe:
    """How all networks of the table are trained; the defaults are TorchCFM's settings, but for the average."""

    steps: int = 10_000
    """Steps of every method but OFM."""
    batch_size: int = 128
    """Pairs a step."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    weight_decay: float = 1e-5
    """Of AdamW."""
    ema_decay: float = 0.999
    """Samples are drawn with this average of the parameters; TorchCFM's with the parameters themselves."""
    sigma: float = 0.1
    """Constant latent noise of I-CFM, OT-CFM and VP-CFM, and the width of FM's last Gaussian."""
    bridge_sigma: float = 1.0
    """Of the Brownian bridges."""
    reuse: int = 16
    """Times that each pair of a coupling is trained on."""
    ofm_steps: int = 2_000
    """Steps of OFM, each of which inverts a convex network."""
    ofm_learning_rate: float = 3e-2
    """Of OFM."""
    ofm_reuse: int = 4
    """Times that OFM trains on each pair."""
    reflow_pairs: int = 20_000
    """Pairs that a flow generates for the one that is fitted to them, by 20 steps of rk4."""
    parallel: Parallel | None = None
    """How the devices of a process share a step; by default one of them trains."""

    def __post_init__(self) -> None:
        check_options(
            self,
            steps=STEPS,
            ofm_steps=STEPS,
            learning_rate="(0, inf)",
            weight_decay="[0, inf)",
            ema_decay="(0, 1)",
            sigma="(0, 1)",
            bridge_sigma="(0, inf)",
            ofm_learning_rate="(0, inf)",
        )
        for name in ("steps", "ofm_steps"):
            check_multiple(option(name), getattr(self, name), CHUNK, "which are dispatched at once")


class Generated(NamedTuple):
    """What a trained model makes of the test points."""

    x: Array
    nfe: Array | None
    path_energy: Array
    trajectory: Array | None


class Trained(NamedTuple):
    """Parameters, the seconds that training took with compilation left out, and `generate(params, key, x0)`."""

    params: Params
    seconds: float
    generate: Callable[[Params, Key, Array], Generated]


SMOKE_RECIPE = {"steps": 100, "batch_size": 16, "ofm_steps": 100, "reflow_pairs": 64, "reuse": 4}
PAIR_SAMPLER: dict[str, Any] = {"sampler": RungeKutta("rk4"), "times": 20}
NETWORK = PlainMLP()
APPLY = linen_apply(NETWORK)
POTENTIAL = ICNN(features=(64, 64), sharpness=5.0)
POTENTIAL_FN = linen_potential(POTENTIAL)


def _stacked(batches: Iterator[Batch], num: int) -> Batch:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(next(batches) for _ in range(num)))


@cache
def _trainer(loss: Callable[[Recipe], LossFn], recipe: Recipe, num_steps: int):
    """The optimiser and the jitted `run(state, key, batches) -> state` of `CHUNK` steps."""
    optimizer = make_optimizer(
        recipe.learning_rate, total_steps=num_steps, decay="cosine", weight_decay=recipe.weight_decay, clip_norm=None
    )
    if recipe.parallel is None:
        steps = scan_steps(make_step(loss(recipe), optimizer, axis_name=None))
        return optimizer, jax.jit(lambda state, key, batches: steps(state, key, batches)[0], donate_argnums=0)
    devices = jax.local_devices()
    check_multiple("--batch-size", recipe.batch_size, len(devices), "the devices of this process")
    shared = make_parallel(recipe.parallel, loss(recipe), optimizer, devices, stacked=True)
    return optimizer, lambda state, key, batches: shared(state, key, shared.batch_to_device(batches))[0]


def fit(
    loss: Callable[[Recipe], LossFn], recipe: Recipe, params: Params, key: Key, batches: Iterator[Batch], num_steps: int
) -> tuple[Params, float]:
    """The average of the parameters after `num_steps`, and the seconds that it took, compilation left out."""
    optimizer, run = _trainer(loss, recipe, num_steps)

    def new_state() -> TrainState:
        return create_state(jax.tree.map(jnp.array, params), optimizer, (recipe.ema_decay,))

    jax.block_until_ready(run(new_state(), key, _stacked(batches, CHUNK)))  # compiles
    state, start = new_state(), time.perf_counter()
    for _ in range(num_steps // CHUNK):
        state = run(state, key, _stacked(batches, CHUNK))
    jax.block_until_ready(state)
    return state.ema[str(recipe.ema_decay)], time.perf_counter() - start


def conditional(recipe: Recipe) -> LossFn:
    """I-CFM and OT-CFM: straight lines with a constant latent noise."""
    return flow_matching(APPLY, StochasticInterpolant(Linear(), ConstantNoise(recipe.sigma)), **_OPTIONS)


def variance_preserving(recipe: Recipe) -> LossFn:
    """VP-CFM: the trigonometric interpolant with a constant latent noise."""
    return flow_matching(APPLY, StochasticInterpolant(Cosine(), ConstantNoise(recipe.sigma)), **_OPTIONS)


def gaussian(recipe: Recipe) -> LossFn:
    """FM: from noise to a Gaussian of width sigma around each data point."""
    return flow_matching(APPLY, AffinePath(Linear(sigma_min=recipe.sigma)), **_OPTIONS)


def straight(recipe: Recipe) -> LossFn:
    """2-RF: the straight lines between the pairs of a flow."""
    return flow_matching(APPLY, AffinePath(), **_OPTIONS)


def bridge(recipe: Recipe, kind: str = "velocity") -> LossFn:
    """SB-CFM: the velocity of Brownian bridges, between pairs of exact transport as torchcfm's default has it.

    Only with the entropic coupling are their marginals a Schroedinger bridge's; it takes longer ways than transport.
    """
    path = BrownianBridge(recipe.bridge_sigma)
    return flow_matching(APPLY, path, kind=kind, coupling=paired, time_sampler=Stratified(*path.domain))


def bridge_and_score(recipe: Recipe) -> LossFn:
    """[SF]2M: velocity and denoiser of Brownian bridges, two networks with the sum of their losses."""
    losses = {"velocity": bridge(recipe), "latent": bridge(recipe, "latent")}

    def loss_fn(params: Params, key: Key, batch: Batch, *, target_params: Params | None = None):
        keys = dict(zip(losses, jax.random.split(key), strict=True))
        parts = {name: loss(params[name], keys[name], batch)[0] for name, loss in losses.items()}
        return sum(parts.values()), parts

    return loss_fn


def optimal(recipe: Recipe) -> LossFn:
    """OFM: the gradient of a convex potential. Any pairs will do; those of transport spare it noise in the gradient."""
    return optimal_flow_matching(POTENTIAL_FN, coupling=paired)


_OPTIONS: dict[str, Any] = {"coupling": paired, "time_sampler": Stratified()}


@jax.jit
def by_flow(params: Params, key: Key, x0: Array) -> Generated:
    """Samples of a velocity network, by its flow and dopri5, as TorchCFM's evaluation does."""
    v = bind(APPLY, params)
    solution = sample(v, x0, Adaptive("dopri5", 1e-5, 1e-5), times=np.linspace(0, 1, 41), trajectory=True)
    return Generated(solution.x, solution.nfe, path_energy(v, x0, times=100), solution.trajectory)


def _by_sde(
    v: VelocityFn, score: VelocityFn, sigma: float, key: Key, x0: Array, t0: float = 0.0, t1: float = 1.0
) -> Generated:
    """By 100 Euler-Maruyama steps of the SDE with g = sigma; the path energy is that of the flow."""
    times, sampler = grids.uniform(100, t0, t1), EulerMaruyama(diffusion=sigma, score=score)
    solution = sample(v, x0, sampler, times=times, key=key, trajectory=True)
    energy = path_energy(v, x0, times=times)
    return Generated(solution.x, solution.nfe, energy, solution.trajectory)


@cache
def by_bridge(sigma: float) -> Callable[[Params, Key, Array], Generated]:
    """Samples of velocity and denoiser of a Brownian bridge, by its SDE."""
    path = BrownianBridge(sigma)
    t0, t1 = path.domain

    def generate(params: Params, key: Key, x0: Array) -> Generated:
        key_start, key_sde = jax.random.split(key)
        v, denoiser = (bind(APPLY, params[name]) for name in ("velocity", "latent"))

        def pair(t: Array, x: Array, cond: Cond = None) -> tuple[Array, Array]:
            return x, denoiser(t, x)  # the score needs the second alone

        score = bridge_score(Counted(pair, 1), path)
        # The velocity is infinite at t = 0: the bridge is entered a moment later, where it has spread a little.
        start = x0 + path.gamma(jnp.asarray(t0)) * jax.random.normal(key_start, x0.shape)
        return _by_sde(v, score, sigma, key_sde, start, t0, t1)

    return jax.jit(generate)


@cache
def by_score_and_flow(sigma: float) -> Callable[[Params, Key, Array], Generated]:
    """Samples of TorchCFM's [SF]2M, whose second network is sigma^2 / 2 times the score, by its SDE."""

    def generate(params: Params, key: Key, x0: Array) -> Generated:
        flow, scaled_score = bind(APPLY, params["0"]), bind(APPLY, params["1"])
        return _by_sde(flow, Counted(lambda t, x: 2 / sigma**2 * scaled_score(t, x), 1), sigma, key, x0)

    return jax.jit(generate)


@jax.jit
def by_map(params: Params, key: Key, x0: Array) -> Generated:
    """Samples of an OFM potential: one evaluation, straight lines."""
    x1 = transport(POTENTIAL_FN, params, x0)
    return Generated(x1, jnp.asarray(1), ((x1 - x0) ** 2).sum(axis=1).mean(), jnp.stack([x0, x1]))


def train(method: str, recipe: Recipe, splits: Splits, seed: int) -> Trained:
    """Trains a method on training points.

    Args:
        method: one of `METHODS`.
        recipe: how.
        splits: the points.
        seed: of the initial parameters, the batches and the loss.
    """
    key_init, key_fit, key_coupling, key_pairs, key_student = jax.random.split(jax.random.key(seed), 5)
    pairs = draws(splits, recipe.batch_size, seed)

    def coupled(coupling: Coupling) -> Iterator[Batch]:
        return CoupledBatches(pairs, coupling, key_coupling, reuse=recipe.reuse)

    def fitted(loss, batches=pairs, key=key_fit, params=None, num_steps=recipe.steps) -> tuple[Params, float]:
        params = init_params(NETWORK, key_init, (2,)) if params is None else params
        return fit(loss, recipe, params, key, batches, num_steps)

    match method:
        case "I-CFM":
            return Trained(*fitted(conditional), by_flow)
        case "OT-CFM":
            return Trained(*fitted(conditional, coupled(ExactOT())), by_flow)
        case "FM":
            return Trained(*fitted(gaussian), by_flow)
        case "VP-CFM":
            return Trained(*fitted(variance_preserving), by_flow)
        case "SB-CFM":
            return Trained(*fitted(bridge, coupled(ExactOT())), by_flow)
        case "SB-CFM, entropic":
            return Trained(*fitted(bridge, coupled(schrodinger_bridge_ot(recipe.bridge_sigma))), by_flow)
        case "[SF]2M":
            keys = jax.random.split(key_init)
            heads = {name: init_params(NETWORK, key, (2,)) for name, key in zip(("velocity", "latent"), keys)}
            batches = coupled(ExactOT())
            return Trained(*fitted(bridge_and_score, batches, params=heads), by_bridge(recipe.bridge_sigma))
        case "2-RF":
            teacher, seconds = fitted(conditional)
            start = time.perf_counter()
            v, shape = bind(APPLY, teacher), (recipe.reflow_pairs, 2)
            made, _ = make_pairs(v, key_pairs, shape, source=source_of(splits), **PAIR_SAMPLER)
            batches = draws_of_pairs(made["x0"], made["x1"], recipe.batch_size, seed)
            seconds += time.perf_counter() - start
            student, more_seconds = fitted(straight, batches, key=key_student, params=teacher)
            return Trained(student, seconds + more_seconds, by_flow)
        case "OFM":
            potential = POTENTIAL.init(key_init, jnp.zeros((1, 2)))["params"]
            recipe = dataclasses.replace(recipe, learning_rate=recipe.ofm_learning_rate, reuse=recipe.ofm_reuse)
            return Trained(*fitted(optimal, coupled(ExactOT()), params=potential, num_steps=recipe.ofm_steps), by_map)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")


METHODS = ("I-CFM", "OT-CFM", "SB-CFM", "SB-CFM, entropic", "[SF]2M", "FM", "VP-CFM", "2-RF", "OFM")
