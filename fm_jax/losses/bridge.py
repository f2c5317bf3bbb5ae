"""Velocity and score of a bridge, learned together: [SF]2M and stochastic interpolants."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from fm_jax.checks import (
    check_condition,
    check_coupling,
    check_function,
    check_has,
    check_network,
    check_real,
    check_shape,
    is_traced,
    shown,
)
from fm_jax.conditions import Drop
from fm_jax.couplings import independent
from fm_jax.losses.matching import check_drop, draw_pairs, times_within
from fm_jax.nfe import Counted, cost
from fm_jax.paths.bridge import StochasticInterpolant, value_and_slope
from fm_jax.shapes import batch_time, expand_time, mean_over_event, time_of
from fm_jax.types import (
    ApplyFn,
    Batch,
    Cond,
    Coupling,
    Key,
    LossFn,
    Metrics,
    Params,
    PerExample,
    Scalar,
    State,
    Time,
    TimeSampler,
    VelocityFn,
)

PairModelFn: TypeAlias = Callable[[PerExample, State, Cond], tuple[State, State]]
"""`f(t, x, cond) -> (drift, latent)`: a network of two outputs whose parameters are bound."""

PAIR_MODEL = "a function model_fn(t, x, cond) -> (drift, latent), as by bind(apply_fn, params)"


@runtime_checkable
class PairApplyFn(Protocol):
    """A network as `ApplyFn`, of two outputs `(drift, latent)`."""

    def __call__(
        self, params: Params, t: PerExample, x: State, cond: Cond, /, *, train: bool, rngs: Any
    ) -> tuple[State, State]: ...


def bridge_matching(
    apply_fn: PairApplyFn,
    path: StochasticInterpolant,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    drop: Drop | None = None,
) -> LossFn:
    """The loss of drift and denoiser of a stochastic interpolant, from which velocity and score follow.

    `E |f_1(t, x_t) - (alpha' x1 + sigma' x0)|^2 + |f_2(t, x_t) - z|^2`, each averaged over the dimensions of x. The
    minimiser is `drift = E[alpha' x1 + sigma' x0 | x_t]` and `latent = E[z | x_t]`, and

        velocity = drift + gamma' latent,    score = -latent / gamma

    by `bridge_velocity` and `bridge_score`. Unlike those two, both targets stay finite where gamma is 0 or has an
    infinite slope. With `BrownianBridge` and an entropic coupling this is simulation-free score and flow matching,
    [SF]2M, and the SDE of these two with g = sigma is the Schroedinger bridge; other paths and couplings give the other
    stochastic interpolants.

    Notebooks: (8.8).

    Args:
        apply_fn: the network, `apply_fn(params, t, x, cond, train=, rngs=) -> (drift, latent)`; made of one network by
            `split_channels`, of two by `two_heads`.
        path: with latent noise.
        coupling: pairs x0 with x1 within the batch; its weights of pairs, if it has any, multiply the loss.
        time_sampler: training times; `None` is uniform on the domain of `path.interpolant`.
        drop: takes conditions away from some examples, as in `flow_matching`.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)`, as from `flow_matching`, with the same batch. The key is
        required: it draws z. Metrics are `loss`, and `mse_drift` and `mse_latent`, both unweighted.

    Raises:
        ValueError: if `path` is not a stochastic interpolant or `time_sampler` leaves its range; when the loss is
            traced, without a key, if the batch does not fit, or if the network does not return two arrays like x.

    References:
        Tong et al. 2023 (arXiv:2307.03672); Albergo, Boffi & Vanden-Eijnden 2023 (arXiv:2303.08797, sec. 2).
    """
    check_network("apply_fn", apply_fn)
    check_latent(path)
    check_coupling(coupling)
    check_drop(drop)
    times = times_within(time_sampler, path.target_domain("drift"), f"the drift target of {path}")

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params
        pairs = draw_pairs(key, batch, path.source, coupling, times, drop)
        sample = path.sample(pairs.key_path, pairs.t, pairs.x0, pairs.x1)
        targets = path.targets(sample)
        prediction = apply_fn(params, pairs.t, sample.x_t, pairs.cond, train=True, rngs=pairs.rngs)
        check_two_outputs(prediction, sample.x_t)
        mse_drift, mse_latent = (
            mean_over_event((value.astype(wanted.dtype) - wanted) ** 2)
            for value, wanted in zip(prediction, (targets["drift"], targets["latent"]), strict=True)
        )
        weighted = mse_drift + mse_latent
        if pairs.weight is not None:
            weighted = pairs.weight * weighted
        return weighted.mean(), {
            "loss": weighted.mean(),
            "mse_drift": mse_drift.mean(),
            "mse_latent": mse_latent.mean(),
        }

    return loss_fn


def check_latent(path: Any) -> None:
    """Raises `ValueError` unless `path` has a latent noise gamma z."""
    check_has("the path", path, ("interpolant", "gamma"), "a StochasticInterpolant, as from BrownianBridge")


def check_two_outputs(prediction: Any, x: State) -> None:
    """Raises `ValueError` unless `prediction` is two arrays of the shape of `x`."""
    if not isinstance(prediction, tuple | list) or len(prediction) != 2:
        several = isinstance(prediction, tuple | list)
        got = f"a {type(prediction).__name__} of {len(prediction)}" if several else shown(prediction)
        raise ValueError(f"the network must return (drift, latent), both of the shape of x, {x.shape}, got {got}.")
    for name, value in zip(("drift", "latent"), prediction, strict=True):
        check_shape(f"the {name} that the network returns", value, x)


def split_channels(apply_fn: ApplyFn) -> PairApplyFn:
    """One network with twice the channels of x, as `(drift, latent)`: the halves of its last axis."""
    check_network("apply_fn", apply_fn)

    def split(params: Params, t: PerExample, x: State, cond: Cond, *, train: bool, rngs: Any) -> tuple[State, State]:
        output = apply_fn(params, t, x, cond, train=train, rngs=rngs)
        check_real("what the network returns", output)
        if output.shape != (*x.shape[:-1], 2 * x.shape[-1]):
            raise ValueError(f"the network must return twice the channels of x, {x.shape}, got {shown(output)}.")
        drift, latent = jnp.split(output, 2, axis=-1)
        return drift, latent

    return split


def two_heads(apply_drift: ApplyFn, apply_latent: ApplyFn) -> PairApplyFn:
    """Two networks as one with two outputs; its parameters are a dict of theirs, `{"drift": ..., "latent": ...}`."""
    check_network("apply_drift", apply_drift)
    check_network("apply_latent", apply_latent)

    def both(params: Params, t: PerExample, x: State, cond: Cond, *, train: bool, rngs: Any) -> tuple[State, State]:
        rngs_drift, rngs_latent = rngs, rngs
        if rngs is not None:
            keys = {name: jax.random.split(key) for name, key in rngs.items()}
            rngs_drift, rngs_latent = ({name: key[i] for name, key in keys.items()} for i in range(2))
        drift = apply_drift(params["drift"], t, x, cond, train=train, rngs=rngs_drift)
        return drift, apply_latent(params["latent"], t, x, cond, train=train, rngs=rngs_latent)

    return both


def _drift_and_latent(model_fn: PairModelFn, t: PerExample, x: State, cond: Cond) -> tuple[State, State]:
    prediction = model_fn(t, x, cond)
    check_two_outputs(prediction, x)
    drift, latent = prediction
    return drift, latent


def bridge_velocity(model_fn: PairModelFn, path: StochasticInterpolant, cond: Cond = None) -> VelocityFn:
    """The velocity `drift + gamma' latent` of a network trained by `bridge_matching`.

    Sample within `path.domain`. A Brownian bridge's begins at t_0 > 0, where the path is no longer at x0 but near
    `x0 + gamma(t_0) z`: start from there.

    Args:
        model_fn: `model_fn(t, x, cond) -> (drift, latent)`, with its parameters bound.
        path: that it was trained on.
        cond: conditioning [batch, ...] or `None`.

    Returns:
        `v(t, x)`; infinite or NaN outside `path.domain`, where gamma' is.
    """
    check_function("model_fn", model_fn, PAIR_MODEL, 3)
    check_latent(path)

    def velocity(t: Time, x: State) -> State:
        check_condition(x, cond)
        drift, latent = _drift_and_latent(model_fn, batch_time(t, x), x, cond)
        return drift + value_and_slope(path.gamma, time_of(t, x))[1] * latent

    return Counted(velocity, cost(model_fn))


def bridge_score(model_fn: PairModelFn, path: StochasticInterpolant, cond: Cond = None) -> VelocityFn:
    """The score `-latent / gamma` of a network trained by `bridge_matching`, for `EulerMaruyama(score=...)`.

    Infinite where gamma = 0, at both ends of most paths: an SDE starts and ends short of them, as at `path.domain` of a
    Brownian bridge. Its steps there have to be short, unless its g vanishes like sqrt(gamma) or faster, as
    `diffusion=path.gamma` does.

    Args:
        model_fn: `model_fn(t, x, cond) -> (drift, latent)`, with its parameters bound.
        path: that it was trained on.
        cond: conditioning [batch, ...] or `None`.

    Returns:
        `score(t, x)`. In an SDE sampler both this and the velocity call the
        network at the same point, and both calls are counted; `jit` may make one of them.

    Raises:
        ValueError: when called with a t known to have gamma = 0.
    """
    check_function("model_fn", model_fn, PAIR_MODEL, 3)
    check_latent(path)

    def score(t: Time, x: State) -> State:
        check_condition(x, cond)
        t = batch_time(t, x)
        gamma, _ = value_and_slope(path.gamma, t)
        if not is_traced(gamma) and bool((gamma == 0).any()):
            raise ValueError(f"the score is infinite where gamma = 0, at t = {t[gamma == 0].tolist()}.")
        _, latent = _drift_and_latent(model_fn, t, x, cond)
        return -latent / expand_time(gamma, x)

    return Counted(score, cost(model_fn))
