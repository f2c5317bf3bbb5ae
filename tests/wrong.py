"""Wrong calls, made of right ones: every argument of every public function with what users mistake it for.

`CALLS` has a right call of each function and each value; `wrong_values` says, by the kind of an argument, what to put
in its place. `verdict` is what came of it: refused by a message that names the argument, or right to the last digit.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fm_jax import (
    conditions,
    couplings,
    fewstep,
    guidance,
    likelihood,
    logits,
    losses,
    metrics,
    models,
    nfe,
    oracles,
    parameterization,
    paths,
    rates,
    samplers,
    schedules,
    self_conditioning,
    shapes,
    sources,
    text,
    times,
    train,
)
from fm_jax.couplings.costs import squared_euclidean
from fm_jax.data import images as image_data
from fm_jax.data import toy
from fm_jax.data.coupled import CoupledBatches
from fm_jax.models.dit import patchify, position_features, unpatchify
from fm_jax.models.layers import sinusoidal_features
from fm_jax.samplers import grids, learned
from fm_jax.samplers.churn import churn_step, renoise
from fm_jax.train.learned import fit_solver
from fm_jax.train.optim import make_optimizer, make_schedule
from fm_jax.train.parallel import fsdp_step, pmap_step, shard_map_step, split_batch
from fm_jax.train.sharding import fsdp_mesh
from fm_jax.train.step import scan_steps

NAN, INF = float("nan"), float("inf")
KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 2))
Y = jax.random.normal(jax.random.key(1), (4, 2))
LABELS = jnp.array([0, 1, 1, 0])
T = jnp.array([0.2, 0.4, 0.6, 0.8])
LINEAR = schedules.Linear()
EULER = samplers.RungeKutta("euler")
MIXTURE = oracles.gaussian_mixture([[-1.0, 0.0], [1.0, 0.5]], [0.6, 0.8], [0.3, 0.7])
FIELD = oracles.stationary_field(oracles.power_law_spectrum((4,)), [[1.0]])
SEEN = oracles.field_posterior(FIELD, oracles.known_values(np.arange(4) < 2), 0.1)
WAVES = jax.random.normal(jax.random.key(2), (4, 4, 1))
TOLD = jnp.where((jnp.arange(4) < 2)[None, :, None], WAVES, 0.0)
TOKENS = oracles.token_mixture(jnp.stack([X, Y, X + Y], 1), 0.5, jnp.arange(3)[None] < jnp.array([[1], [2], [3], [3]]))
TABLE = oracles.token_table([[0.3, 0.1, 0.0], [0.2, 0.1, 0.05], [0.05, 0.1, 0.1]])
TOKEN_PATH = paths.MixturePath(LINEAR, sources.UniformTokens(3))
STATES = oracles.all_states(TABLE)
STATES_T = np.linspace(0.1, 0.9, 9)
MASKED_PATH = paths.MixturePath(LINEAR, sources.Masked(3, 2))
TOKEN_BATCH = {"x1": jnp.array([[0, 1], [1, 1], [0, 0], [1, 0]]), "x0": jnp.full((4, 2), 2)}
POSTERIOR = oracles.token_posterior(TABLE, TOKEN_PATH, 0.5, STATES)
COV = np.array([[3.0, 1.0], [1.0, 2.0]])
COMPONENTS = oracles.ppca(np.zeros(2), COV, 1)
PAIR = oracles.gaussian_pair([0.0, 0.0], np.eye(2), [1.0, 2.0], 2 * np.eye(2))
BRIDGE = oracles.schroedinger_bridge(PAIR, 1.0)
BATCH = {"x1": X, "x0": Y, "t": T, "weight": jnp.ones(4), "cond": LABELS}
SOLVER = learned.from_method("euler", 2)
OPTIMIZER = optax.sgd(0.1)
MLP, ICNN = models.MLP((4,)), models.ICNN((4,))
MLP_PARAMS = models.init_params(MLP, KEY, (2,))
IMAGES = jnp.ones((4, 4, 4, 2))
PIXELS = np.arange(16).reshape(4, 2, 2) % 4


def v(t, x):
    return -x


def network(params, t, x, cond, *, train, rngs):
    return params * x


def heads(params, t, x, cond, *, train, rngs):
    return params * x, x


def model(t, x, cond=None):
    return -x


def denoiser(t, x):
    return jax.nn.one_hot(x, 3)


def token_network(params, t, x, cond, *, train, rngs):
    return params * jax.nn.one_hot(x, 3)


def told_network(params, t, x, cond, *, train, rngs, estimate=None):
    return params * jax.nn.one_hot(x, 3) + (0 if estimate is None else estimate)


def five(t, x):
    return jax.nn.one_hot(x % 4, 5)


def jumps(t, x):
    return jax.nn.one_hot((x + 1) % 3, 3)


def two_outputs(t, x, cond=None):
    return -x, x


def potential(params, x):
    return params * (x**2).sum(axis=1)


def codes(params, x):
    return params * x, -x


def decoded(params, z):
    return params * z


def squared_loss(params, key, batch):
    return jnp.mean((batch["x1"] - params) ** 2), {}


class Call(NamedTuple):
    """A right call, by keyword; `use` makes something of what it returns that shows whether it is right."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    use: Callable[[Any], Any] = lambda result: result

    def __call__(self, **changed: Any) -> Any:
        return self.use(self.function(**{**self.arguments, **changed}))


def _loss(make: Callable[..., Any], arguments: dict[str, Any], batch: dict[str, Any], params: Any = 0.5) -> Call:
    return Call(make, arguments, lambda loss_fn: loss_fn(params, KEY, batch))


def _of_loss(loss_fn: Callable[..., Any], batch: dict[str, Any], params: Any = 0.5) -> Call:
    return Call(lambda key, **batch: loss_fn(params, key, batch), {"key": KEY, **batch})


def _of_batches(data: Any, **options: Any) -> dict[str, Any]:
    return next(CoupledBatches(data, **options))


TOKEN_BATCH |= {name: BATCH[name] for name in ("t", "weight", "cond")}
PLAIN = {name: value for name, value in BATCH.items() if name != "cond"}


def new_state():
    return train.create_state(jnp.zeros(()), OPTIMIZER)


STEP = train.make_step(squared_loss, OPTIMIZER, axis_name=None)

FUNCTIONS: dict[str, Call] = {
    # parameterisation and conditions
    "convert": Call(
        parameterization.convert, {"kind": "data", "value": X, "t": 0.5, "x_t": Y, "schedule": schedules.Cosine()}
    ),
    "bind": Call(parameterization.bind, {"apply_fn": network, "params": 2.0}, lambda f: f(0.5, X)),
    "velocity_fn": Call(
        parameterization.velocity_fn,
        {"model_fn": model, "kind": "noise", "schedule": LINEAR, "cond": LABELS},
        lambda v: v(0.5, X),
    ),
    "velocity_fn, called": Call(parameterization.velocity_fn(model, "data", LINEAR), {"t": T, "x": X}),
    "score_fn": Call(parameterization.score_fn, {"v": v, "schedule": LINEAR}, lambda score: score(0.5, X)),
    "score_fn, called": Call(parameterization.score_fn(v, LINEAR), {"t": T, "x": X}),
    "velocity_domain": Call(parameterization.velocity_domain, {"kind": "data", "schedule": LINEAR, "margin": 0.01}),
    "conversion_domain": Call(
        parameterization.conversion_domain, {"schedule": schedules.Polynomial(2.0), "margin": 0.01}
    ),
    "reschedule_domain": Call(
        parameterization.reschedule_domain, {"old_schedule": schedules.VP(), "new_schedule": LINEAR}
    ),
    "reschedule": Call(
        parameterization.reschedule,
        {"v": v, "old_schedule": LINEAR, "new_schedule": schedules.Cosine(), "clip": True},
        lambda v: v(0.5, X),
    ),
    "drop_condition": Call(conditions.drop_condition, {"key": KEY, "cond": LABELS, "null_cond": 2, "rate": 0.5}),
    "drop_conditions": Call(
        conditions.drop_conditions,
        {"key": KEY, "cond": {"a": LABELS, "b": T}, "null_cond": {"a": 2, "b": 0.0}, "rates": {"a": 0.5, "b": 0.2}},
    ),
    "DropConditions": Call(
        conditions.DropConditions,
        {"rates": {"a": 0.5}, "null_cond": {"a": 2, "b": 0.0}},
        lambda drop: drop(KEY, {"a": LABELS, "b": T}),
    ),
    "without": Call(conditions.without, {"cond": {"a": LABELS, "b": T}, "null_cond": {"a": 2, "b": 0.0}, "group": "a"}),
    "DropCondition": Call(conditions.DropCondition, {"rate": 0.5, "null_cond": 2}, lambda drop: drop(KEY, LABELS)),
    "null_like": Call(conditions.null_like, {"cond": LABELS, "null_cond": 2}),
    "Counted": Call(nfe.Counted, {"function": v, "nfe": 1}, lambda f: f(0.5, X)),
    "expand_time": Call(shapes.expand_time, {"t": T, "x": X}),
    "batch_time": Call(shapes.batch_time, {"t": T, "x": X}),
    "time_of": Call(shapes.time_of, {"t": T, "x": X}),
    "mean_over_event": Call(shapes.mean_over_event, {"x": X}),
    # schedules, times, sources
    "vanishes": Call(schedules.vanishes, {"coefficient": LINEAR.alpha, "t": 0.5}),
    "stands_still": Call(schedules.stands_still, {"schedule": schedules.Polynomial(2.0), "t": T}),
    "coefficients": Call(schedules.coefficients, {"schedule": schedules.Cosine(), "t": T}),
    "log_snr": Call(schedules.log_snr, {"schedule": schedules.Cosine(), "t": T}),
    "linear_betas": Call(schedules.linear_betas, {"num_steps": 3, "beta_start": 0.1, "beta_end": 0.2}),
    "start": Call(paths.start, {"schedule": LINEAR, "t0": 0.25}, lambda source: source.scale),
    # paths
    "AffinePath.sample": Call(lambda t, x0, x1: paths.AffinePath().sample(None, t, x0, x1), {"t": T, "x0": X, "x1": Y}),
    "StochasticInterpolant.sample": Call(paths.BrownianBridge(1.0).sample, {"key": KEY, "t": T, "x0": X, "x1": Y}),
    "StochasticInterpolant.at": Call(paths.BrownianBridge(1.0).at, {"t": T, "x0": X, "x1": Y, "z": X}),
    "SplinePath.sample": Call(
        paths.SplinePath((0.0, 1.0), sigma=0.1).sample, {"key": KEY, "t": T, "x": jnp.stack([X, Y], 1)}
    ),
    "BrownianBridge": Call(paths.BrownianBridge, {"sigma": 1.0, "margin": 1e-3}, lambda path: path.at(0.5, X, Y, X)),
    "target_domain": Call(paths.AffinePath().target_domain, {"kind": "score", "margin": 0.01}),
    "check_convex": Call(paths.check_convex, {"schedule": LINEAR}),
    "MixturePath.sample": Call(TOKEN_PATH.sample, {"key": KEY, "t": STATES_T, "x0": STATES, "x1": STATES[::-1]}),
    "MixturePath.probs": Call(TOKEN_PATH.probs, {"t": STATES_T, "x1": STATES}),
    "MixturePath.log_posterior": Call(TOKEN_PATH.log_posterior, {"logits": POSTERIOR, "x": STATES}),
    "MixturePath.posterior": Call(TOKEN_PATH.posterior, {"logits": POSTERIOR, "x": STATES}),
    "MixturePath.check_data": Call(TOKEN_PATH.check_data, {"x1": STATES}),
    # rates
    **{
        each.__name__: Call(each, {"denoiser": denoiser, "path": TOKEN_PATH}, lambda u: u(0.5, STATES))
        for each in (rates.forward_rates, rates.reversal_rates)
    },
    **{
        f"{each.__name__}, called": Call(each(denoiser, TOKEN_PATH), {"t": STATES_T, "x": STATES})
        for each in (rates.forward_rates, rates.reversal_rates)
    },
    "reversal": Call(rates.reversal, {"path": TOKEN_PATH, "posterior": POSTERIOR, "t": STATES_T, "x": STATES}),
    "backward_rates": Call(rates.backward_rates, {"path": TOKEN_PATH}, lambda u: u(0.5, STATES)),
    "backward_rates, called": Call(rates.backward_rates(TOKEN_PATH), {"t": STATES_T, "x": STATES}),
    "kinetic_rates": Call(
        rates.kinetic_rates, {"denoiser": denoiser, "path": contracts.TOKEN_PATHS[-1]}, lambda u: u(0.5, STATES)
    ),
    "kinetic_rates, called": Call(rates.kinetic_rates(denoiser, TOKEN_PATH), {"t": STATES_T, "x": STATES}),
    "MetricPath.sample": Call(
        contracts.TOKEN_PATHS[-1].sample, {"key": KEY, "t": STATES_T, "x0": STATES, "x1": STATES[::-1]}
    ),
    "with_corrector": Call(
        rates.with_corrector,
        {"rates": jumps, "path": TOKEN_PATH, "strength": 2.0},
        lambda u: u(0.5, STATES),
    ),
    # losses
    "flow_matching": _loss(
        losses.flow_matching,
        {
            "apply_fn": network,
            "path": paths.AffinePath(),
            "coupling": couplings.independent,
            "time_sampler": times.Uniform(0.1, 0.9),
            "kind": "noise",
            "weight": losses.SNRWeight(),
            "drop": conditions.DropCondition(0.5, 2),
        },
        BATCH,
    ),
    "flow_matching, called": _of_loss(losses.flow_matching(network, paths.AffinePath()), BATCH),
    "gaussian_kl": Call(losses.gaussian_kl, {"mean": X, "log_variance": Y}),
    "kl_autoencoder": _loss(
        losses.kl_autoencoder,
        {"encode_fn": codes, "decode_fn": decoded, "beta": 0.1, "error": "l2", "feature_weight": 0.5},
        {"x1": X, "noise": Y, "weight": jnp.ones(4)},
    ),
    "kl_autoencoder, called": _of_loss(
        losses.kl_autoencoder(codes, decoded, features=lambda x: x), {"x1": X, "noise": Y, "weight": jnp.ones(4)}
    ),
    "negative_elbo": _loss(
        losses.negative_elbo,
        {"encode_fn": codes, "decode_fn": decoded, "variance": 0.5, "beta": 0.1},
        {"x1": X, "noise": Y},
    ),
    "bridge_matching": _loss(
        losses.bridge_matching,
        {"apply_fn": heads, "path": paths.BrownianBridge(1.0), "coupling": couplings.independent},
        BATCH,
    ),
    "bridge_matching, called": _of_loss(losses.bridge_matching(heads, paths.BrownianBridge(1.0)), BATCH),
    "trajectory_matching": _loss(
        losses.trajectory_matching,
        {"apply_fn": network, "path": paths.SplinePath((0.0, 1.0)), "coupling": couplings.independent},
        {"x": jnp.stack([X, Y], 1), "t": T},
    ),
    "trajectory_matching, called": _of_loss(
        losses.trajectory_matching(network, paths.SplinePath((0.0, 1.0))),
        {"x": jnp.stack([X, Y], 1), "t": T, "weight": T},
    ),
    "couple_snapshots": Call(
        losses.couple_snapshots,
        {"coupling": couplings.independent, "key": KEY, "x": jnp.stack([X, Y], 1), "cond": LABELS},
    ),
    **{
        f"{make.__name__}": _loss(make, {"apply_fn": network, "path": paths.AffinePath()}, BATCH)
        for make in (losses.score_matching, losses.noise_prediction, losses.data_prediction)
    },
    "split_channels": Call(
        losses.split_channels,
        {"apply_fn": lambda params, t, x, cond, *, train, rngs: jnp.concatenate([x, x], axis=-1)},
        lambda f: f(1.0, T, X, None, train=False, rngs=None),
    ),
    "two_heads": Call(
        losses.two_heads,
        {"apply_drift": network, "apply_latent": network},
        lambda f: f({"drift": 1.0, "latent": 2.0}, T, X, None, train=False, rngs=None),
    ),
    "bridge_velocity": Call(
        losses.bridge_velocity,
        {"model_fn": two_outputs, "path": paths.BrownianBridge(1.0)},
        lambda v: v(0.5, X),
    ),
    "bridge_score": Call(
        losses.bridge_score, {"model_fn": two_outputs, "path": paths.BrownianBridge(1.0)}, lambda v: v(0.5, X)
    ),
    **{
        make.__name__: _loss(
            make,
            {
                "apply_fn": token_network,
                "path": MASKED_PATH,
                "coupling": couplings.independent,
                "time_sampler": times.Uniform(0.1, 0.9),
                "drop": conditions.DropCondition(0.5, 2),
            },
            TOKEN_BATCH,
        )
        for make in (losses.cross_entropy, losses.masked_elbo, losses.reversal_elbo, losses.generalized_kl)
    },
    "next_token": _loss(
        losses.next_token,
        {"apply_fn": token_network, "path": MASKED_PATH, "drop": conditions.DropCondition(0.5, 2)},
        TOKEN_BATCH,
    ),
    "one_late": Call(losses.one_late, {"apply_fn": token_network, "path": MASKED_PATH}),
    "cross_entropy, called": _of_loss(losses.cross_entropy(token_network, MASKED_PATH), TOKEN_BATCH),
    "error_scale": Call(losses.error_scale, {"kind": "noise", "t": T, "schedule": LINEAR}),
    "distillation": _loss(fewstep.distillation, {"apply_fn": network}, {"x0": X, "x1": Y}),
    "distillation, called": _of_loss(fewstep.distillation(network), {"x0": X, "x1": Y, "weight": T}),
    "optimal_flow_matching": _loss(
        fewstep.optimal_flow_matching,
        {"potential_fn": potential, "coupling": couplings.independent, "tolerance": 1e-3, "max_iterations": 20},
        PLAIN,
    ),
    # few steps
    "transport": Call(fewstep.transport, {"potential_fn": potential, "params": 0.5, "x0": X}),
    "invert": Call(
        fewstep.invert,
        {"potential_fn": potential, "params": 0.5, "t": T, "x_t": X, "tolerance": 1e-3, "max_iterations": 20},
    ),
    "inverse_transport": Call(fewstep.inverse_transport, {"potential_fn": potential, "params": 0.5, "x1": X}),
    "straight_velocity": Call(
        fewstep.straight_velocity,
        {"potential_fn": potential, "params": 0.5, "tolerance": 1e-3, "max_iterations": 20},
        lambda v: v(0.5, X),
    ),
    "make_pairs": Call(
        fewstep.make_pairs,
        {
            "v": v,
            "key": KEY,
            "shape": (4, 2),
            "source": sources.Normal(),
            "sampler": EULER,
            "times": 2,
            "batch_size": 4,
        },
    ),
    "reflow": Call(
        fewstep.reflow,
        {"fit": lambda k, pairs: v, "v": v, "key": KEY, "shape": (4, 2), "rounds": 1, "times": 2},
        lambda flows: flows[0](0.5, X),
    ),
    # samplers
    "sample": Call(samplers.sample, {"v": v, "x0": X, "sampler": EULER, "times": 4, "trajectory": True}),
    "sample, random": Call(
        samplers.sample, {"v": v, "x0": X, "sampler": samplers.DDIM(LINEAR, 1.0), "times": 4, "key": KEY}
    ),
    "sample, at times": Call(samplers.sample, {"v": v, "x0": X, "sampler": EULER, "times": jnp.array([0.0, 0.5, 1.0])}),
    "ode_step": Call(samplers.ode_step, {"v": v, "t": 0.2, "t_next": 0.4, "x": X, "method": "heun", "first": -X}),
    "ddim_step": Call(
        samplers.ddim_step,
        {"v": v, "t": 0.2, "t_next": 0.4, "x": X, "schedule": LINEAR, "eta": 0.5, "noise": Y},
    ),
    "ddim_step, its first velocity": Call(
        lambda first: samplers.ddim_step(v, 0.2, 0.4, X, schedule=LINEAR, first=first), {"first": -X}
    ),
    "sde_step": Call(
        lambda **options: samplers.sde_step(score=None, **options),
        {
            "v": v,
            "diffusion": 0.5,
            "t": 0.2,
            "t_next": 0.4,
            "x": X,
            "noise": Y,
            "schedule": LINEAR,
            "method": "heun",
        },
    ),
    "tau_leap": Call(samplers.tau_leap, {"rates": jumps, "t": 0.2, "t_next": 0.4, "x": STATES, "schedule": LINEAR}),
    "mixture_step": Call(
        samplers.mixture_step,
        {
            "denoiser": denoiser,
            "path": MASKED_PATH,
            "t": 0.2,
            "t_next": 0.4,
            "x": STATES,
            "remask": samplers.Confidence(),
            "confidence": np.full(STATES.shape, 0.5),
        },
    ),
    "sample, tokens": Call(
        samplers.sample,
        {
            "v": denoiser,
            "x0": TOKEN_BATCH["x0"],
            "sampler": samplers.MixtureSteps(MASKED_PATH),
            "times": 4,
            "key": KEY,
            "keep": jnp.ones((4, 2), bool),
        },
    ),
    "with_temperature": Call(
        logits.with_temperature, {"denoiser": denoiser, "temperature": 0.5}, lambda f: f(0.5, STATES)
    ),
    "top_p": Call(logits.top_p, {"denoiser": denoiser, "p": 0.5}, lambda f: f(0.5, STATES)),
    "self_conditioned": Call(
        self_conditioning.self_conditioned,
        {"apply_fn": told_network, "rate": 0.5},
        lambda f: f(2.0, STATES_T, STATES, None, train=True, rngs={"dropout": KEY}),
    ),
    "langevin_step": Call(samplers.langevin_step, {"score": v, "t": 0.5, "x": X, "noise": Y, "step_size": 0.25}),
    "renoise": Call(renoise, {"t": 0.4, "t_next": 0.2, "x": X, "noise": Y, "schedule": LINEAR, "noise_scale": 1.0}),
    "churn_step": Call(
        churn_step,
        {
            "v": v,
            "t": 0.4,
            "t_next": 0.5,
            "x": X,
            "noise": Y,
            "schedule": LINEAR,
            "gamma": 0.1,
            "churn_range": (0.05, 50.0),
            "method": "heun",
        },
    ),
    "grids.uniform": Call(grids.uniform, {"num_steps": 4, "t0": 0.1, "t1": 0.9}),
    "grids.cosine": Call(grids.cosine, {"num_steps": 4, "t0": 0.1, "t1": 0.9}),
    "grids.edm": Call(
        grids.edm,
        {
            "num_steps": 4,
            "schedule": LINEAR,
            "t0": 0.0,
            "t1": 1.0,
            "rho": 7.0,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
        },
    ),
    "grids.quantiles": Call(
        grids.quantiles, {"num_steps": 4, "time_sampler": times.LogitNormal(), "t0": 0.1, "t1": 0.9}
    ),
    "grids.shifted": Call(grids.shifted, {"num_steps": 4, "shift": 3.0, "t0": 0.1, "t1": 0.9}),
    "grids.stable_diffusion_3": Call(grids.stable_diffusion_3, {"num_steps": 4, "shift": 3.0}),
    "grids.flux_shift": Call(grids.flux_shift, {"num_tokens": 256}),
    "grids.linear_quadratic": Call(grids.linear_quadratic, {"num_steps": 4, "linear_steps": 2, "resolution": 1000}),
    "Tableau": Call(
        samplers.Tableau,
        {"order": 1, "a": ((),), "b": (1.0,), "c": (0.0,)},
        lambda tableau: samplers.ode_step(v, 0.0, 0.5, X, tableau),
    ),
    "learned.from_method": Call(
        learned.from_method,
        {"method": "euler", "num_steps": 2, "t0": 0.1, "t1": 0.9},
        lambda solver: samplers.sample(v, X, solver).x,
    ),
    "learned.start_for": Call(
        learned.start_for, {"num_evaluations": 2}, lambda solver: samplers.sample(v, X, solver).x
    ),
    "falling_noise": Call(samplers.falling_noise, {"schedule": LINEAR}, lambda g: g(T)),
    "learned.log_error": Call(learned.log_error, {"x": X, "x1": Y}),
    "learned.decibels": Call(learned.decibels, {"log_error": T, "peak": 2.0}),
    "learned.loss": Call(learned.loss, {"v": v, "solver": SOLVER, "x0": X, "x1": Y}),
    "fit_solver": Call(
        fit_solver,
        {
            "v_of": lambda cond: v,
            "solver": SOLVER,
            "key": KEY,
            "x0": X,
            "x1": Y,
            "cond": LABELS,
            "num_iterations": 1,
            "batch_size": 2,
            "learning_rate": 0.1,
        },
    ),
    # likelihood
    "log_prob": Call(
        likelihood.log_prob,
        {
            "v": v,
            "x1": X,
            "key": KEY,
            "divergence": likelihood.Exact(),
            "source": sources.Normal(),
            "sampler": EULER,
            "times": 2,
        },
    ),
    "encode_and_log_prob": Call(likelihood.encode_and_log_prob, {"v": v, "x1": X, "sampler": EULER, "times": 2}),
    "sample_and_log_prob": Call(likelihood.sample_and_log_prob, {"v": v, "x0": X, "sampler": EULER, "times": 2}),
    "dequantize": Call(likelihood.dequantize, {"key": KEY, "images": PIXELS, "levels": 4}),
    "token_bound": Call(
        likelihood.token_bound,
        {
            "denoiser": denoiser,
            "path": MASKED_PATH,
            "key": KEY,
            "x1": TOKEN_BATCH["x1"],
            "bound": "mask",
            "num_times": 4,
            "end": 0.9,
        },
    ),
    "any_order_log_prob": Call(
        likelihood.any_order_log_prob,
        {"denoiser": denoiser, "path": MASKED_PATH, "key": KEY, "x1": TOKEN_BATCH["x1"]},
    ),
    "next_token_log_prob": Call(
        likelihood.next_token_log_prob, {"denoiser": denoiser, "path": MASKED_PATH, "x1": TOKEN_BATCH["x1"]}
    ),
    "bits_per_token": Call(likelihood.bits_per_token, {"nats": T, "num_tokens": 2}),
    "perplexity": Call(likelihood.perplexity, {"nats": T, "num_tokens": 2}),
    "bits_per_dim": Call(
        likelihood.bits_per_dim,
        {
            "v": v,
            "key": KEY,
            "images": PIXELS,
            "levels": 4,
            "num_draws": 1,
            "divergence": likelihood.Exact(),
            "source": sources.Normal(),
            "sampler": EULER,
            "times": 8,
            "tolerance": 0.5,
        },
    ),
    **{
        f"{type(each).__name__}, called": Call(
            lambda v, t, x, each=each: each(v, each.draw(KEY, x), t, x), {"v": v, "t": T, "x": X}
        )
        for each in contracts.DIVERGENCES
    },
    # guidance
    "classifier_free": Call(
        guidance.classifier_free,
        {"v_cond": v, "v_uncond": model, "scale": 2.0, "interval": (0.2, 0.8), "rule": guidance.Rescale()},
        lambda v: v(0.5, X),
    ),
    "classifier_free_batched": Call(
        guidance.classifier_free_batched,
        {
            "model_fn": model,
            "kind": "noise",
            "schedule": LINEAR,
            "cond": LABELS,
            "null_cond": 2,
            "scale": T,
            "interval": (0.2, 0.8),
            "rule": guidance.Extrapolate(),
        },
        lambda v: v(0.5, X),
    ),
    "compose": Call(
        guidance.compose,
        {
            "model_fn": model,
            "kind": "noise",
            "schedule": LINEAR,
            "conds": [LABELS, LABELS],
            "null_cond": 2,
            "scales": [2.0, -1.0],
            "interval": (0.2, 0.8),
        },
        lambda v: v(0.5, X),
    ),
    "nested": Call(
        guidance.nested,
        {
            "model_fn": model,
            "kind": "noise",
            "schedule": LINEAR,
            "conds": [LABELS, LABELS],
            "null_cond": 2,
            "scales": [2.0, 3.0],
            "interval": (0.2, 0.8),
        },
        lambda v: v(0.5, X),
    ),
    "keep_known": Call(
        guidance.keep_known,
        {"v": v, "schedule": LINEAR, "x0": X, "x1": Y, "mask": jnp.array([True, False])},
        lambda v: v(0.5, X),
    ),
    "classifier": Call(
        guidance.classifier,
        {
            "v": v,
            "log_prob_fn": lambda t, x: -(x**2).sum(axis=1),
            "scale": 2.0,
            "schedule": LINEAR,
            "interval": (0.2, 0.8),
        },
        lambda v: v(0.5, X),
    ),
    "classifier_free_logits": Call(
        guidance.classifier_free_logits,
        {"f_cond": denoiser, "f_uncond": lambda t, x: 0 * denoiser(t, x), "scale": 2.0, "interval": (0.2, 0.8)},
        lambda f: f(0.5, STATES),
    ),
    "classifier_free_rates": Call(
        guidance.classifier_free_rates,
        {"u_cond": jumps, "u_uncond": lambda t, x: 2 * jumps(t, x), "scale": 2.0, "interval": (0.2, 0.8)},
        lambda u: u(0.5, STATES),
    ),
    **{
        each.__name__: Call(
            each,
            {
                "rates": jumps,
                "log_prob_fn": lambda t, x: 0.1 * x.reshape(len(x), -1).sum(axis=1),
                "scale": 2.0,
                "interval": (0.2, 0.8),
            },
            lambda u: u(0.5, STATES),
        )
        for each in (guidance.predictor, guidance.predictor_taylor)
    },
    "predictor, called": Call(
        guidance.predictor(jumps, lambda t, x: 0.1 * x.sum(axis=1), 2.0), {"t": STATES_T, "x": STATES}
    ),
    # couplings
    "schrodinger_bridge_ot": Call(couplings.schrodinger_bridge_ot, {"sigma": 1.0}, lambda c: c.epsilon),
    "sample_permutation": Call(couplings.sample_permutation, {"key": KEY, "plan": jnp.eye(3), "bits": 10}),
    "fit_semidiscrete": Call(
        couplings.fit_semidiscrete,
        {
            "key": KEY,
            "x1": X,
            "source": sources.Normal(),
            "num_iterations": 2,
            "batch_size": 4,
            "learning_rate": 0.1,
            "cost": squared_euclidean,
        },
        lambda transport: transport.potential,
    ),
    "cell_masses": Call(
        couplings.cell_masses,
        {
            "transport": couplings.SemidiscreteOT(X, jnp.zeros(4)),
            "key": KEY,
            "num_batches": 2,
            "batch_size": 4,
        },
    ),
    "SemidiscreteOT.pair": Call(couplings.SemidiscreteOT(X, jnp.zeros(4)).pair, {"x0": Y}),
    "SemidiscreteOT.batch": Call(couplings.SemidiscreteOT(X, jnp.zeros(4)).batch, {"key": KEY, "batch_size": 2}),
    "squared_euclidean": Call(squared_euclidean, {"x0": X, "x1": Y}),
    "euclidean": Call(couplings.euclidean, {"x0": X, "x1": Y}),
    **{
        f"{name}, called": Call(
            lambda x0, x1, cond, coupling=coupling: coupling(KEY, x0, x1, cond), {"x0": X, "x1": Y, "cond": LABELS}
        )
        for name, coupling in contracts.COUPLINGS.items()
    },
    # metrics
    "wasserstein": Call(metrics.wasserstein, {"x": X, "y": Y, "p": 2.0}),
    "energy_distance": Call(metrics.energy_distance, {"x": X, "y": Y, "unbiased": True}),
    "mmd": Call(metrics.mmd, {"x": X, "y": Y, "bandwidths": 1.0, "unbiased": False}),
    "mmd, by a kernel": Call(metrics.mmd, {"x": X, "y": Y, "kernel": metrics.linear}),
    "median_distance": Call(metrics.median_distance, {"x": X, "y": Y}),
    "PolynomialKernel": Call(metrics.PolynomialKernel, {"degree": 2, "offset": 1.0}, lambda kernel: kernel(X, Y)),
    "floor": Call(
        metrics.floor,
        {"metric": metrics.wasserstein, "draw": toy.moons, "key": KEY, "num": 4, "repeats": 2},
        lambda floor: floor.values,
    ),
    "measure": Call(
        metrics.measure,
        {"metric": metrics.wasserstein, "draw": toy.moons, "key": KEY, "x": X, "repeats": 2},
        lambda measured: measured.value,
    ),
    "normalised_path_energy_floor": Call(
        metrics.normalised_path_energy_floor,
        {"draw_x0": toy.moons, "draw_x1": toy.circles, "key": KEY, "num": 4, "repeats": 2},
        lambda floor: floor.values,
    ),
    "path_energy": Call(metrics.path_energy, {"v": v, "x0": X, "sampler": EULER, "times": 2}),
    "normalised_path_energy": Call(metrics.normalised_path_energy, {"v": v, "x0": X, "wasserstein2": 2.0, "times": 2}),
    "straightness": Call(metrics.straightness, {"v": v, "x0": X, "sampler": EULER, "times": 2, "relative": True}),
    # oracles
    "gaussian_mixture": Call(
        oracles.gaussian_mixture,
        {"means": np.array([[0.0, 1.0], [1.0, 1.0]]), "scales": np.array([1.0, 2.0]), "weights": np.array([0.5, 0.5])},
    ),
    "gaussian_pair": Call(
        oracles.gaussian_pair,
        {"mean0": np.zeros(2), "cov0": np.eye(2), "mean1": np.ones(2), "cov1": 2 * np.eye(2), "cross": 0.5 * np.eye(2)},
    ),
    "optimal_plan": Call(oracles.optimal_plan, {"pair": PAIR}),
    "entropic_plan": Call(oracles.entropic_plan, {"pair": PAIR, "sigma": 1.0}),
    "sample_pair": Call(oracles.sample_pair, {"pair": PAIR, "key": KEY, "num": 3}),
    "bures_distance": Call(oracles.bures_distance, {"pair": PAIR}),
    "monge_map": Call(oracles.monge_map, {"pair": PAIR, "x0": X}),
    "displacement_moments": Call(oracles.displacement_moments, {"pair": PAIR, "t": 0.5}),
    "displacement_velocity": Call(oracles.displacement_velocity, {"pair": PAIR}, lambda v: v(0.5, X)),
    "schroedinger_bridge": Call(
        oracles.schroedinger_bridge, {"pair": PAIR, "sigma": 1.0}, lambda b: oracles.bridge_moments(b, 0.5)
    ),
    "bridge_moments": Call(oracles.bridge_moments, {"bridge": BRIDGE, "t": 0.5}),
    "bridge_prediction": Call(oracles.bridge_prediction, {"bridge": BRIDGE, "t": T, "x": X}),
    "bridge_drift": Call(
        oracles.bridge_drift, {"bridge": BRIDGE, "diffusion": 1.0, "direction": 1}, lambda v: v(0.5, X)
    ),
    "power_law_spectrum": Call(oracles.power_law_spectrum, {"grid": (4,), "exponent": 2.0}),
    "stationary_field": Call(
        oracles.stationary_field, {"spectrum": np.array([2.0, 1.0, 0.5, 1.0]), "channels": np.eye(2)}
    ),
    "known_values": Call(oracles.known_values, {"known": np.arange(4) < 2, "channels": 1}),
    "block_means": Call(oracles.block_means, {"grid": (4,), "factor": 2, "channels": 1}),
    "channel_means": Call(oracles.channel_means, {"grid": (2,), "channels": 2, "weights": np.array([0.3, 0.7])}),
    "blur": Call(oracles.blur, {"grid": (4,), "width": 1.0, "channels": 1}),
    "field_posterior": Call(
        oracles.field_posterior,
        {"field": FIELD, "operator": oracles.known_values(np.arange(4) < 2), "noise": 0.1},
        lambda law: law.gain,
    ),
    "field_covariance": Call(oracles.field_covariance, {"law": SEEN}),
    "sample_field": Call(oracles.sample_field, {"field": FIELD, "key": KEY, "num": 3}),
    "observe": Call(oracles.observe, {"posterior": SEEN, "key": KEY, "x1": WAVES}),
    "posterior_mean": Call(oracles.posterior_mean, {"posterior": SEEN, "y": TOLD}),
    "sample_posterior": Call(oracles.sample_posterior, {"posterior": SEEN, "key": KEY, "y": TOLD}),
    "field_prediction": Call(
        oracles.field_prediction, {"law": SEEN, "schedule": LINEAR, "t": T, "x": WAVES, "y": TOLD}
    ),
    "field_velocity": Call(oracles.field_velocity, {"law": SEEN, "schedule": LINEAR}, lambda v: v(0.5, WAVES, TOLD)),
    "loss_floor": Call(oracles.loss_floor, {"law": SEEN, "schedule": LINEAR, "t": T}),
    "token_mixture": Call(oracles.token_mixture, {"tokens": TOKENS.tokens, "std": 0.5, "mask": TOKENS.mask}),
    "sample_points": Call(oracles.sample_points, {"mixture": TOKENS, "key": KEY, "num": 3}),
    "attention_of": Call(oracles.attention_of, {"mixture": TOKENS, "schedule": LINEAR, "t": T, "x": X}),
    "token_prediction": Call(oracles.token_prediction, {"mixture": TOKENS, "schedule": LINEAR, "t": T, "x": X}),
    "token_velocity": Call(
        oracles.token_velocity,
        {"std": 0.5, "schedule": LINEAR},
        lambda v: v(0.5, X, models.Conditions(tokens=TOKENS.tokens, mask=TOKENS.mask)),
    ),
    "token_table": Call(oracles.token_table, {"q": np.array([[0.5, 0.25], [0.0, 0.25]])}),
    "with_mask": Call(oracles.with_mask, {"table": TABLE}),
    "sudoku4": Call(oracles.sudoku4, {}),
    "all_states": Call(oracles.all_states, {"table": TABLE}),
    "path_law": Call(oracles.path_law, {"table": TABLE, "path": TOKEN_PATH, "t": 0.5}),
    "token_posterior": Call(oracles.token_posterior, {"table": TABLE, "path": TOKEN_PATH, "t": 0.5, "x": STATES}),
    "exact_denoiser": Call(oracles.exact_denoiser, {"table": TABLE, "path": TOKEN_PATH}, lambda f: f(0.5, STATES)),
    "exact_denoiser, called": Call(oracles.exact_denoiser(TABLE, TOKEN_PATH), {"t": STATES_T, "x": STATES}),
    "rate_matrix": Call(oracles.rate_matrix, {"rates": jumps, "t": 0.5, "states": STATES, "num_tokens": 3}),
    "chain_law": Call(
        oracles.chain_law,
        {
            "rates": jumps,
            "law": np.full(9, 1 / 9),
            "states": STATES,
            "num_tokens": 3,
            "t0": 0.1,
            "t1": 0.5,
            "num_steps": 2,
        },
    ),
    "transition_matrix": Call(oracles.transition_matrix, {"probs": POSTERIOR, "states": STATES}),
    "ppca": Call(oracles.ppca, {"mean": np.zeros(2), "cov": COV, "num_latents": 1, "variance": 0.5}),
    "ppca_log_prob": Call(oracles.ppca_log_prob, {"model": COMPONENTS, "x": X}),
    "ppca_mean_log_prob": Call(oracles.ppca_mean_log_prob, {"model": COMPONENTS, "mean": np.zeros(2), "cov": COV}),
    "ppca_posterior": Call(oracles.ppca_posterior, {"model": COMPONENTS}),
    "oracles.sample": Call(oracles.sample, {"mixture": MIXTURE, "key": KEY, "num": 3}),
    "oracles.log_prob": Call(oracles.log_prob, {"mixture": MIXTURE, "schedule": LINEAR, "t": T, "x": X}),
    "oracles.prediction": Call(oracles.prediction, {"mixture": MIXTURE, "schedule": LINEAR, "t": T, "x": X}),
    "oracles.cdf": Call(
        oracles.cdf,
        {"mixture": oracles.gaussian_mixture([[0.0], [1.0]], 0.5), "schedule": LINEAR, "t": T, "x": X[:, :1]},
    ),
    "oracles.flow_map": Call(
        oracles.flow_map,
        {"mixture": oracles.gaussian_mixture([[0.0, 1.0]], 0.5), "schedule": LINEAR, "t0": 0.1, "t1": 0.9, "x": X},
    ),
    "oracles.velocity": Call(oracles.velocity, {"mixture": MIXTURE, "schedule": LINEAR}, lambda v: v(0.5, X)),
    # data
    **{
        f"toy.{name}": Call(
            function,
            {
                "key": KEY,
                "num": 3,
                **{
                    each.name: each.default
                    for each in inspect.signature(function).parameters.values()
                    if each.default is not each.empty
                },
            },
        )
        for name, function in toy.TOYS.items()
    },
    "Sampled": Call(sources.Sampled, {"function": toy.moons}, lambda source: source.draw(KEY, X)),
    "Normal.draw": Call(sources.Normal().draw, {"key": KEY, "like": X}),
    "Normal.log_prob": Call(sources.Normal().log_prob, {"x": X}),
    **{
        f"{type(source).__name__}.{name}": Call(getattr(source, name), arguments)
        for source in contracts.TOKEN_SOURCES
        for name, arguments in {
            "draw": {"key": KEY, "like": jnp.ones((2, 3), int)},
            "log_prob": {"x": jnp.ones((2, 3), int)},
        }.items()
    },
    "Uniform.log_prob": Call(sources.Uniform().log_prob, {"x": X}),
    "make_toy": Call(toy.make_toy, {"name": "moons"}, lambda function: function(KEY, 3)),
    "to_float": Call(image_data.to_float, {"images": np.zeros((2, 2), np.uint8)}),
    "to_uint8": Call(image_data.to_uint8, {"x": np.zeros((2, 2), np.float32)}),
    "CoupledBatches": Call(
        lambda **options: _of_batches(iter([{"x1": np.asarray(X)}] * 9), **options),
        {
            "coupling": couplings.minibatch_ot,
            "key": KEY,
            "source": sources.Normal(),
            "group": 1,
            "reuse": 1,
            "ahead": 2,
            "workers": 1,
        },
    ),
    "CoupledBatches, of data": Call(
        lambda **batch: _of_batches(iter([batch] * 9), coupling=couplings.independent, key=KEY),
        {name: np.asarray(value) for name, value in BATCH.items() if name != "t"},
    ),
    # training
    "make_schedule": Call(
        make_schedule,
        {"learning_rate": 0.1, "total_steps": 10, "warmup_steps": 2, "decay": "cosine"},
        lambda rate: [float(rate(step)) for step in range(10)],
    ),
    "make_optimizer": Call(
        make_optimizer,
        {
            "learning_rate": 0.1,
            "total_steps": 10,
            "warmup_steps": 2,
            "decay": "linear",
            "clip_norm": 1.0,
            "weight_decay": 0.1,
            "b1": 0.9,
            "b2": 0.99,
        },
        lambda optimizer: optimizer.update(X, optimizer.init(X), X)[0],
    ),
    "create_state": Call(
        train.create_state, {"params": X, "optimizer": OPTIMIZER, "ema_decays": (0.9,)}, lambda state: state.params
    ),
    "update_ema": Call(train.update_ema, {"ema": {"0.9": X}, "params": Y, "step": jnp.asarray(3), "warmup": True}),
    "make_step": Call(
        train.make_step,
        {"loss_fn": squared_loss, "optimizer": OPTIMIZER, "ema_warmup": True, "accumulate": 1, "axis_name": None},
        lambda step: step(new_state(), KEY, {"x1": X})[0].params,
    ),
    "make_step, called": Call(
        lambda state, key, batch: STEP(state, key, batch)[0].params,
        {"state": new_state(), "key": KEY, "batch": {"x1": X}},
    ),
    "pmap_step": Call(
        lambda step: pmap_step(step)(new_state(), KEY, split_batch({"x1": X}, jax.local_device_count()))[0].params,
        {"step": train.make_step(squared_loss, OPTIMIZER)},
    ),
    "shard_map_step": Call(
        lambda step, mesh: shard_map_step(step, mesh)(new_state(), KEY, {"x1": X})[0].params,
        {
            "step": train.make_step(squared_loss, OPTIMIZER),
            "mesh": jax.sharding.Mesh(np.array(jax.devices()), ("data",)),
        },
    ),
    "fsdp_step": Call(
        lambda step, mesh: fsdp_step(step, mesh)(new_state(), KEY, {"x1": X})[0].params,
        {"step": train.make_step(squared_loss, OPTIMIZER, axis_name=None), "mesh": fsdp_mesh()},
    ),
    "fsdp_mesh": Call(lambda shards: fsdp_mesh(shards).devices.shape, {"shards": 1}),
    "scan_steps": Call(
        lambda step: scan_steps(step)(new_state(), KEY, {"x1": X[None]})[0].params,
        {"step": train.make_step(squared_loss, OPTIMIZER, axis_name=None)},
    ),
    "split_batch": Call(split_batch, {"batch": {"x1": X}, "num_devices": 2}),
    # models
    "init_params": Call(
        models.init_params, {"module": models.MLP((4,)), "key": KEY, "event_shape": (2,)}, lambda p: p["out"]
    ),
    "forward_flops": Call(models.forward_flops, {"module": models.MLP((4,)), "event_shape": (2,)}),
    "linen_apply": Call(
        models.linen_apply, {"module": MLP}, lambda f: f(MLP_PARAMS, T, X, None, train=False, rngs=None)
    ),
    "linen_potential": Call(
        models.linen_potential,
        {"module": ICNN},
        lambda f: f(ICNN.init(KEY, X)["params"], X),
    ),
    "MLP, called": Call(lambda t, x: MLP.apply({"params": MLP_PARAMS}, t, x), {"t": T, "x": X}),
    "ICNN, called": Call(lambda x: ICNN.apply(ICNN.init(KEY, X), x), {"x": X}),
    **{
        f"{name}, called": Call(
            lambda t, x, make=make: jax.tree.map(jnp.zeros_like, make().init(KEY, t, x)), {"t": T, "x": IMAGES}
        )
        for name, make in contracts.MODELS.items()
        if name != "mlp"
    },
    "sinusoidal_features": Call(sinusoidal_features, {"t": T, "dim": 4, "scale": 1000.0, "max_period": 10_000.0}),
    "patchify": Call(patchify, {"x": IMAGES, "patch_size": 2}),
    "unpatchify": Call(unpatchify, {"patches": patchify(IMAGES, 2), "patch_size": 2, "height": 4, "width": 4}),
    "position_features": Call(position_features, {"rows": 2, "columns": 3, "dim": 8}),
    "make_unet": Call(models.make_unet, {"name": "tiny"}, lambda module: module.channels),
    "make_dit": Call(models.make_dit, {"name": "tiny"}, lambda module: module.hidden),
    **{
        f"make_{name}": Call(getattr(models, f"make_{name}"), {"name": "tiny"}, lambda module: None)
        for name in (*contracts.PUBLISHED, "sequence_unet", "autoencoder", "wan_autoencoder", "temporal_autoencoder")
        if name not in ("song_unet", "token_transformer")
    },
    "make_token_transformer": Call(
        models.make_token_transformer, {"name": "tiny", "num_tokens": 5}, lambda module: module.hidden
    ),
    "make_song_unet": Call(models.make_song_unet, {"name": "ddpmpp"}, lambda module: None),
    "make_tiny_autoencoder": Call(models.make_tiny_autoencoder, {"name": "sd"}, lambda module: None),
    "make_clip_text": Call(text.make_clip_text, {"name": "tiny"}, lambda module: None),
    "make_t5": Call(text.make_t5, {"name": "tiny"}, lambda module: None),
    "Border": Call(
        models.Border, {"scale": 1000.0, "reverse": True, "offset": -1.0}, lambda border: border.time(jnp.asarray(0.5))
    ),
    "rope_angles": Call(models.rope_angles, {"ids": np.ones((3, 2)), "dims": (2, 2), "theta": 100.0}),
    "Compute": Call(models.Compute, {"dtype": "float32", "remat": False}, lambda compute: compute.remat),
}

# ---- Values: a right call makes one of its fields and uses it as its noun is used.


def _fields(value: Any) -> dict[str, Any]:
    skipped = ("parent", "name", "function", "adjoint")
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value) if each.name not in skipped}


def _sampled(sampler: Any) -> Any:
    key = KEY if sampler.stochastic else None
    return samplers.sample(v, X, sampler, times=np.linspace(0.1, 0.9, 3), key=key).x


def _sampled_tokens(sampler: Any) -> Any:
    f, x0 = (jumps, STATES) if isinstance(sampler, samplers.TauLeaping) else (five, jnp.full((4, 2), 4))
    return samplers.sample(f, x0, sampler, times=2, key=KEY).x


NOUNS: dict[str, tuple[list[Any], Callable[[Any], Any]]] = {
    "schedule": (contracts.SCHEDULES, lambda s: schedules.coefficients(s, T)),
    "source": ([each for each in contracts.SOURCES if _fields(each)], lambda s: s.draw(KEY, X)),
    "token source": (contracts.TOKEN_SOURCES, lambda s: s.draw(KEY, jnp.zeros((4, 2), int))),
    "token path": (contracts.TOKEN_PATHS, lambda path: path.probs(0.5, jnp.ones((2, 3), int))),
    "time sampler": (contracts.TIME_SAMPLERS, lambda s: s(KEY, 4)),
    "weight": (contracts.WEIGHTS, lambda w: w(T, "velocity", LINEAR)),
    "rule": (contracts.RULES, lambda rule: rule(T, X, X, Y, 2.0)),
    "divergence": (contracts.DIVERGENCES, lambda d: d(v, d.draw(KEY, X), 0.5, X)),
    "coupling": (
        [c for c in (contracts.COUPLINGS | contracts.OTT_COUPLINGS).values() if dataclasses.is_dataclass(c)],
        lambda c: None,
    ),
    "gathered": ([*contracts.DEVICE_COUPLINGS.values()], lambda c: None),
    "bridge": (contracts.BRIDGES, lambda path: path.at(0.5, X, Y, X)),
    "gamma": ([path.gamma for path in contracts.BRIDGES], lambda gamma: gamma(T)),
    "spline": (contracts.SPLINES, lambda path: path.sample(KEY, 0.5, jnp.ones((2, len(path.times), 2)))),
    "affine path": ([contracts.PATHS[0]], lambda path: path.sample(None, T, X, Y)),
    "sampler": ([make(LINEAR) for make in contracts.FIXED_STEPS.values()], _sampled),
    "token sampler": (contracts.TOKEN_SAMPLERS, _sampled_tokens),
    "rule of remasking": (contracts.REMASKING, lambda rule: rule(0.25, 0.5)),
    "adaptive": ([make(LINEAR) for make in contracts.DIFFRAX.values()], lambda s: None),
    "model": (
        [make() for make in (contracts.MODELS | contracts.PLAIN_MODELS).values()] + [models.ICNN((4,))],
        lambda module: None,
    ),
    "embed": ([make() for make in contracts.EMBEDS.values()], lambda module: None),
}


def _values() -> Iterator[tuple[str, Call]]:
    seen: set[Any] = set()
    for listed, use in NOUNS.values():
        for value in listed:
            if type(value) not in seen:  # one of each class: the others have the same checks
                seen.add(type(value))
                yield type(value).__name__, Call(type(value), _fields(value), use)


CALLS = FUNCTIONS | {f"{name}(...)": call for name, call in _values()}

ELSEWHERE = {
    "fm_jax.checks": "tests/test_checks.py",
    "fm_jax.nfe.check_rates": "tests/test_returns.py",
    "fm_jax.nfe.check_denoiser": "tests/test_returns.py",
    "fm_jax.draws": "tests/test_draws.py",
    "fm_jax.manifolds": "tests/manifolds",
    "fm_jax.oracles.PointMixture": "tests/manifolds/test_manifold_oracles.py",
    "fm_jax.oracles.point_mixture": "tests/manifolds/test_manifold_oracles.py",
    "fm_jax.oracles.moebius": "tests/manifolds/test_manifold_oracles.py",
    "fm_jax.oracles.killing": "tests/manifolds/test_manifold_oracles.py",
    "fm_jax.oracles.heat_kernel_circle": "tests/manifolds/test_manifold_oracles.py",
    "fm_jax.oracles.heat_kernel_sphere": "tests/manifolds/test_manifold_oracles.py",
    **dict.fromkeys(
        ("fm_jax.paths.GeodesicPath", "fm_jax.samplers.Ambient", "fm_jax.samplers.GeodesicRandomWalk"),
        "tests/manifolds/test_flow.py",
    ),
    "fm_jax.paths.PremetricPath": "tests/manifolds/test_premetric.py",
    "fm_jax.data.images": "tests/data, which need the extra",
    "fm_jax.data.digits": "tests/data, which need the extra",
    "fm_jax.data.pipeline": "tests/data, which need the extra",
    **dict.fromkeys(
        (f"fm_jax.data.{name}" for name in ("arrays", "folder", "lazy", "picture", "reading", "records")),
        "tests/data, which need the extra",
    ),
    "fm_jax.shapes.check_not_steps": "tests/samplers/test_times_outside.py, tests/losses/test_refusals.py",
    "fm_jax.nfe.reach_of": "tests/samplers/test_default_times.py",
    "fm_jax.nfe.overlap": "tests/samplers/test_default_times.py",
    "fm_jax.metrics.sinkhorn_divergence": "tests/metrics, which need the extra",
    "fm_jax.models.from_nnx": "tests/test_network_libraries.py",
    "fm_jax.models.from_equinox": "tests/test_network_libraries.py",
    "fm_jax.models.fill_local": "tests/models/test_flux.py",
    **dict.fromkeys((f"fm_jax.models.{name}" for name in ("attend", "apply_rope")), "tests/models/test_attention.py"),
    "fm_jax.models.sample_moments": "tests/models/test_autoencoder.py",
    **dict.fromkeys(
        (f"fm_jax.models.{type(make('tiny')).__name__}" for make in contracts.PUBLISHED.values()),
        "a file of its own in tests/models",
    ),
    **dict.fromkeys(
        (f"fm_jax.models.{name}" for name in ("Autoencoder", "TinyAutoencoder")), "tests/models/test_autoencoder.py"
    ),
    "fm_jax.models.PixelTokens": "tests/models/test_pixel_tokens.py",
    "fm_jax.models.WanAutoencoder": "tests/models/test_wan_autoencoder.py",
    **dict.fromkeys(
        (f"fm_jax.models.{name}" for name in ("TemporalAutoencoder", "inflate", "outlier_penalty")),
        "tests/models/test_temporal_autoencoder.py",
    ),
    "fm_jax.latents": "tests/test_latents.py",
    **dict.fromkeys(
        (f"fm_jax.data.{name}" for name in ("encoding", "latents", "texts", "shards")),
        "tests/data/test_latents.py, tests/data/test_texts.py, which need the extra",
    ),
    "fm_jax.parts": "tests/test_conditions.py",
    **dict.fromkeys(
        (
            f"fm_jax.models.{name}"
            for name in ("Branched", "VectorBranch", "LocalBranch", "CrossBranch", "ImagePrompt", "ChannelConcat")
        ),
        "tests/models/test_branches.py",
    ),
    **dict.fromkeys(
        (f"fm_jax.models.{name}" for name in ("Controlled", "with_base", "base_of", "trainable")),
        "tests/models/test_control.py",
    ),
    "fm_jax.models.SequenceUNet": "tests/models/test_sequence_unet.py",
    "fm_jax.oracles.ppca_elbo": "tests/test_ppca.py",
    "fm_jax.text": "tests/text",
    "fm_jax.weights": "tests/weights, tests/parity",
    "fm_jax.pretrained": "tests/parity/test_pretrained.py, tests/experiments/test_sample_pretrained.py",
    "fm_jax.models.stack_layers": "tests/models/test_scan_layers.py",
    "fm_jax.models.unstack_layers": "tests/models/test_scan_layers.py",
    "fm_jax.train.loop": "tests/train",
    "fm_jax.train.checkpoint": "tests/train",
    "fm_jax.train.checksum": "tests/train",
    "fm_jax.train.folder": "tests/train",
    "fm_jax.train.log": "tests/train",
    **dict.fromkeys(
        (
            *(f"fm_jax.models.layers.{name}" for name in ("TimeEmbedding", "SelfAttention")),
            *(f"fm_jax.models.unet.{name}" for name in ("ResBlock", "AttentionBlock")),
            *(f"fm_jax.models.dit.{name}" for name in ("DiTBlock", "modulate")),
            "fm_jax.models.embed.add_condition",
            "fm_jax.models.num_params",
            "fm_jax.samplers.run_steps",
            "fm_jax.samplers.TokenStep",
            "fm_jax.logits.logits_of",
            *(f"fm_jax.self_conditioning.{name}" for name in ("estimate_of", "no_estimate")),
            "fm_jax.samplers.step_noise",
            "fm_jax.samplers.LearnedSolver",
            "fm_jax.train.ema.check_decay",
            "fm_jax.train.state.check_train_state",
            "fm_jax.train.step.split_leading",
            "fm_jax.train.progress.Progress",
            "fm_jax.train.profile",
            "fm_jax.train.parallel.ParallelStep",
            "fm_jax.train.sharding.data_mesh",
            "fm_jax.train.sharding.fsdp_sharding",
            "fm_jax.train.interrupts",
            "fm_jax.shapes.time_dtype",
            "fm_jax.couplings.SemidiscreteOT",
            "fm_jax.metrics.linear",
            "fm_jax.schedules.known_to_stand_still",
            "fm_jax.schedules.log",
            "fm_jax.sources.is_standard_normal",
            *(f"fm_jax.nfe.{name}" for name in ("cost", "domain_of", "returns_of", "logits_like", "total", "spent")),
        ),
        "parts of others, which refuse before them",
    ),
}
"""Public functions that are not in `CALLS`, or their modules, and where they are tried."""

# ---- What is put in the place of an argument, by its kind.


class Wrong(NamedTuple):
    """A wrong value: of which `kind` the mistake is, and what it would have to be taken for, if for anything."""

    kind: str
    value: Any
    meant: Any = None


NETWORKS = (
    "v",
    "v_cond",
    "v_uncond",
    "apply_fn",
    "apply_drift",
    "apply_latent",
    "model_fn",
    "score",
    "denoiser",
    "rates",
    "f_cond",
    "f_uncond",
    "u_cond",
    "u_uncond",
)
"""Arguments that are called as a network is: they may also return what is none."""


def wrong_values(name: str, value: Any, others: list[Any], optional: bool) -> Iterator[Wrong]:
    """What users put where `value` belongs, a right argument; `others` are the call's other arguments."""
    if not optional:
        yield Wrong("None", None)
    if isinstance(value, bool):
        yield from (Wrong("not a bool", 1), Wrong("string", "yes"))
    elif isinstance(value, int):
        yield from (Wrong("NaN", NAN), Wrong("infinite", INF), Wrong("fraction", value + 0.5))
        yield from (Wrong("string", str(value)), Wrong("negative", -7), Wrong("list", [value]), Wrong("bool", True))
    elif isinstance(value, float):
        yield from (Wrong("NaN", NAN), Wrong("infinite", INF), Wrong("infinite", -INF))
        yield from (Wrong("string", str(value)), Wrong("list", [value]), Wrong("complex", value + 1j))
        yield Wrong("rank", np.full((3, 2), value))
    elif isinstance(value, str):
        yield from (Wrong("unknown name", value + "_"), Wrong("not a name", 3))
    elif isinstance(value, tuple) and not hasattr(value, "_fields"):
        yield from (Wrong("string", "ab"), Wrong("number", 0.5), Wrong("empty", ()))
        if value and all(isinstance(each, float | int) for each in value):
            yield from (Wrong("NaN", (NAN, *value[1:])), Wrong("string", (*map(str, value),)))
        if len(value) == 2 and all(isinstance(each, float) for each in value) and value[0] < value[1]:
            yield from (Wrong("reversed", value[::-1]), Wrong("one too many", (*value, 2 * value[1])))
    elif isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        yield from (Wrong("seed for a key", 0), Wrong("legacy key", jax.random.PRNGKey(0)))
        yield from (Wrong("many keys", jax.random.split(KEY, 4)), Wrong("string", "key"))
    elif isinstance(value, jax.Array | np.ndarray):
        yield from _wrong_arrays(value, others)
    elif isinstance(value, dict):
        yield from (Wrong("list", [value]), Wrong("string", "batch"), Wrong("number", 3))
    elif isinstance(value, list):
        yield from (Wrong("string", "ab"), Wrong("number", 0.5), Wrong("empty", []), Wrong("one too many", value * 2))
    else:
        yield from (Wrong("string", "linear"), Wrong("number", 3), Wrong("class", _class_of(value)))
        if name in NETWORKS:
            yield from _wrong_networks(value)


def _class_of(value: Any) -> type:
    return dict if inspect.isroutine(value) else type(value)


def _wrong_arrays(value: Any, others: list[Any]) -> Iterator[Wrong]:
    floating = jnp.issubdtype(value.dtype, jnp.floating)
    yield Wrong("list", np.asarray(value).tolist(), value)
    yield Wrong("string", "x")
    if value.ndim:
        yield Wrong("scalar", value.reshape(-1)[0])
        yield Wrong("empty", value[:0])
    yield Wrong("complex", value + 1j)
    if floating:
        yield Wrong("integers", jnp.ones(value.shape, int), jnp.ones(value.shape))
        yield Wrong("bools", jnp.ones(value.shape, bool))
    else:
        yield Wrong("floats", value + 0.5)
    arrays = [each for each in others if isinstance(each, jax.Array | np.ndarray) and each.ndim]
    if any(each.shape[:1] == value.shape[:1] for each in arrays):
        yield Wrong("one too many", np.concatenate([value, value[:1]]))
        if value.ndim == 1:
            yield Wrong("[batch, 1]", value[:, None])
    if value.ndim > 1 and any(each.shape == value.shape for each in arrays):
        yield Wrong("another event", value[:, :1])


def _wrong_networks(right: Callable[..., Any]) -> Iterator[Wrong]:
    def returning(make: Callable[[Any], Any]) -> Callable[..., Any]:
        return lambda *args, **options: make(right(*args, **options))

    def first(out: Any) -> Any:
        return out[0] if isinstance(out, tuple) else out

    yield Wrong("returns None", returning(lambda out: None))
    yield Wrong("returns another shape", returning(lambda out: first(out)[:, :1]))
    yield Wrong("returns complex", returning(lambda out: jax.tree.map(lambda each: each + 1j, out)))
    yield Wrong("returns a scalar", returning(lambda out: first(out).sum()))
    yield Wrong("returns three", returning(lambda out: (first(out),) * 3))
    yield Wrong("returns a list", returning(lambda out: [first(out)] * 3))


# ---- What came of a wrong call.

_RETURNS = ("None", "another shape", "complex", "a scalar", "three", "a list")
_RETURNS = tuple(f"returns {each}" for each in _RETURNS)
ALSO: dict[str, tuple[str, ...]] = {
    "apply_fn": ("network",),
    "apply_drift": ("network", "drift"),
    "apply_latent": ("network", "latent"),
    "model_fn": ("network",),
    "denoiser": ("logits",),
    "v": ("denoiser",),
}
"""What a message may call an argument besides its name."""


class Case(NamedTuple):
    """A wrong call: of `call`, with `wrong` for `argument`."""

    call: str
    argument: str
    wrong: Wrong


def is_optional(call: Call, argument: str) -> bool:
    """Whether `None` is a right value."""
    parameter = inspect.signature(call.function).parameters.get(argument)
    return parameter is not None and parameter.default is None


def cases() -> Iterator[Case]:
    """Every wrong call."""
    for name, call in CALLS.items():
        for argument, value in call.arguments.items():
            if argument in OPAQUE:
                continue
            others = [other for each, other in call.arguments.items() if each != argument]
            optional = argument in NONE_IS_RIGHT or is_optional(call, argument)
            right = RIGHT.get((name, argument), ()) + RIGHT.get(("", argument), ())
            for wrong in wrong_values(argument, value, others, optional):
                if wrong.kind not in right:
                    yield Case(name, argument, wrong)


OPAQUE = ("params",)
"""Arguments that the library hands on as they are."""
NONE_IS_RIGHT = {"shards", "cond", "weight", "x0", "t", "nfe", "clip_norm", "source", "axis_name"}
"""Arguments that may be left out, where a call of the table does not say so."""
RIGHT: dict[tuple[str, str], tuple[str, ...]] = {
    **{("", name): ("scalar",) for name in ("t", "t_next", "step_size", "scale", "scales")},  # [batch], or one for all
    **{("", name): ("complex", "floats", "[batch, 1]") for name in ("cond",)},  # numbers of any kind, of any event
    ("", "null_cond"): ("negative", "bool"),  # a value of cond
    ("", "times"): ("None",),
    ("", "first"): ("None",),
    ("couple_snapshots", "key"): ("None",),
    ("sample, tokens", "keep"): ("another event",),  # it is broadcast
    **{
        (f"{name}, called", "key"): ("None",)  # nothing is random there
        for name in ("flow_matching", "trajectory_matching", "distillation", "kl_autoencoder")
    },
    ("kl_autoencoder, called", "noise"): ("None",),  # which is drawn then
    ("", "diffusion"): ("number",),  # None is the default, a number as right
    ("", "tol"): ("number",),
    ("", "out_channels"): ("number",),
    ("", "in_channels"): ("number",),
    ("", "time_channels"): ("number",),
    ("", "token_dim"): ("number",),
    ("", "head_channels"): ("number",),
    ("grids.edm", "rho"): ("infinite",),
    ("expand_time", "t"): ("complex", "bools", "scalar"),  # whatever is one for each example
    **{(name, "x"): ("complex", "bools") for name in ("expand_time", "batch_time", "time_of")},
    ("learned.decibels", "log_error"): ("scalar",),
    ("update_ema", "step"): ("floats",),
    ("Projected(...)", "norm"): ("infinite",),
    ("ConditionalOT(...)", "weight"): ("number",),
    ("Gathered(...)", "axis_name"): ("unknown name",),
    ("make_step", "axis_name"): ("string",),
    ("init_params", "event_shape"): ("empty",),
    ("create_state", "ema_decays"): ("empty",),
    ("dequantize", "images"): ("scalar",),
    ("to_float", "images"): ("scalar",),
    ("to_uint8", "x"): ("scalar",),
    ("mmd", "bandwidths"): ("list",),
    ("gaussian_mixture", "scales"): ("scalar",),
    **{(name, "x0"): ("complex", "bools", "another event") for name in ("independent, called", "paired, called")},
    **{(name, "x1"): ("complex", "bools", "another event") for name in ("independent, called", "paired, called")},
    ("CoupledBatches, of data", "x0"): ("another event",),
    ("CoupledBatches, of data", "x1"): ("another event",),
    **{
        (name, argument): ("one too many",)
        for name in (
            "wasserstein",
            "energy_distance",
            "mmd",
            "mmd, by a kernel",
            "median_distance",
            "squared_euclidean",
            "euclidean",
        )
        for argument in ("x", "y", "x0", "x1")
    },
    **{
        (name, each): _RETURNS for name in ("bind", "two_heads", "one_late") for each in NETWORKS
    },  # their callers look at it
}
"""Kinds of values that are no mistake, by call (or "" for all) and argument."""
OF_OTHERS = ("empty", "one too many", "another event", "scalar", "[batch, 1]", "None", "number", "string", "class")
"""Mistakes by which an argument does not fit another, which the message may name as well."""


def verdict(case: Case) -> str:
    """ "refused", "right", or what is wrong with the answer."""
    call = CALLS[case.call]
    names = [case.argument, *ALSO.get(case.argument, ())]
    if case.wrong.kind in OF_OTHERS:
        names += call.arguments
    try:
        found = call(**{case.argument: case.wrong.value})
    except ValueError as error:
        message = str(error).partition("\n---")[0]
        named = any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names)
        return "refused" if named and re.search(" (must|needs) ", message) else f"obscure: {message[:200]}"
    except Exception as error:
        return f"obscure: {type(error).__name__}: {str(error)[:200]}"
    if case.wrong.meant is not None and same(found, call(**{case.argument: case.wrong.meant})):
        return "right"
    if case.wrong.kind == "empty" and not any(np.isnan(leaf).any() for leaf in jax.tree.leaves(found)):
        return "right"  # of nothing, nothing
    return "silent"


def same(one: Any, other: Any) -> bool:
    """Whether two results are equal to the last digit."""
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(map(np.array_equal, leaves, others))
