"""Losses of a denoiser of tokens: cross entropy, and the integrands of bounds on the likelihood.

All train the same network, logits of x1. They differ in what a time counts for, and in what their integral over time
says: `masked_elbo` and `reversal_elbo` are at best the entropy of the data, `generalized_kl` is above it for any source
but a mask, whatever the network.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_coupling, check_has, check_logits, check_network
from fm_jax.conditions import Drop
from fm_jax.couplings import independent
from fm_jax.losses.matching import check_drop, draw_pairs, times_within
from fm_jax.paths.mixture import MixturePath
from fm_jax.rates import reversal
from fm_jax.schedules import coefficients
from fm_jax.shapes import mean_over_event, time_of
from fm_jax.types import (
    ApplyFn,
    Array,
    Batch,
    Coupling,
    Key,
    Logits,
    LossFn,
    Metrics,
    Params,
    Scalar,
    TimeSampler,
    TokenSample,
)

Integrand = Callable[[MixturePath, TokenSample, Logits], Array]
"""`integrand(path, sample, log_posterior) -> [batch, ...]`, in nats for each token."""


def cross_entropy_of(path: MixturePath, sample: TokenSample, log_posterior: Logits) -> Array:
    """`-log p(x1 | x_t)` (Gat et al. 2024, arXiv:2407.15595, eq. 28): no bound, its minimiser is the posterior."""
    del path
    return -_at(log_posterior, sample.x1)


def masked_elbo_of(path: MixturePath, sample: TokenSample, log_posterior: Logits) -> Array:
    """`kappa' / (1 - kappa) (-log p(x1 | x_t))` where a mask is, else 0 (Shi et al. 2024, arXiv:2406.04329, eq. 4)."""
    _, sigma, d_alpha, _ = coefficients(path.schedule, time_of(sample.t, sample.x1))
    masked = sample.x_t == path.source.mask
    return jnp.where(masked, d_alpha / jnp.where(masked, sigma, 1) * -_at(log_posterior, sample.x1), 0)


def generalized_kl_of(path: MixturePath, sample: TokenSample, log_posterior: Logits) -> Array:
    """The Bregman divergence of `forward_rates`: `sum over y != x of u_th - u + u log(u / u_th)`.

    `-kappa' / (1 - kappa) [p(x_t) - d + (1 - d) log p(x1)]`, with d = 1 where x_t = x1.
    """
    _, sigma, d_alpha, _ = coefficients(path.schedule, time_of(sample.t, sample.x1))
    same = sample.x_t == sample.x1
    log_here = _at(log_posterior, sample.x_t)
    each = jnp.where(same, -jnp.expm1(log_here), -jnp.exp(log_here) - _at(log_posterior, sample.x1))
    return jnp.where(each == 0, 0, d_alpha / jnp.where(each == 0, 1, sigma) * each)


def reversal_elbo_of(path: MixturePath, sample: TokenSample, log_posterior: Logits) -> Array:
    """The same of `reversal_rates`: at best, with the exact posterior, the integral is the entropy of the data."""
    here = jax.nn.one_hot(sample.x1, path.num_tokens, dtype=log_posterior.dtype)
    u = reversal(path, here, sample.t, sample.x_t)
    u_network = reversal(path, jnp.exp(log_posterior), sample.t, sample.x_t)
    there = (u > 0) & (u_network > 0)
    # u e^-r - u + u r with r = log(u / u_network): without cancellation where the two are close.
    r = jnp.log(jnp.where(there, u, 1)) - jnp.log(jnp.where(there, u_network, 1))
    return jnp.where(there, u * (jnp.expm1(-r) + r), jnp.where(u > 0, jnp.inf, u_network)).sum(axis=-1)


def _at(values: Logits, x: Array) -> Array:
    return jnp.take_along_axis(values, x[..., None], axis=-1)[..., 0]


def token_loss(
    apply_fn: ApplyFn,
    path: MixturePath,
    integrand: Integrand = cross_entropy_of,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    drop: Drop | None = None,
) -> LossFn:
    """`E_t integrand`, averaged over the tokens: nats a token.

    Args:
        apply_fn: the network, `apply_fn(params, t, x, cond, train=, rngs=) -> logits` [batch, ..., K] of x1.
        path: of tokens.
        integrand: what is averaged; `cross_entropy_of` or the integrand of a bound.
        coupling: pairs x0 with x1 within the batch.
        time_sampler: training times; `None` is stratified on [0, 1].
        drop: takes conditions away from some examples, as in `flow_matching`.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)` as of `flow_matching`. Metrics are `loss`, and `cross_entropy`
        and `accuracy` of the tokens that are still the source's.
    """
    check_has("path", path, ("log_posterior", "check_data", "sample"), "a path of tokens, such as MixturePath")
    check_network("apply_fn", apply_fn)
    check_coupling(coupling)
    check_drop(drop)
    times = times_within(time_sampler, (0.0, 1.0), f"the loss of {path}")

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params
        pairs = draw_pairs(key, batch, path.source, coupling, times, drop, check=path.check_data)
        sample = path.sample(pairs.key_path, pairs.t, pairs.x0, pairs.x1)
        logits: Any = apply_fn(params, sample.t, sample.x_t, pairs.cond, train=pairs.rngs is not None, rngs=pairs.rngs)
        check_logits("what the network returns", logits, sample.x_t, path.num_tokens)
        log_posterior = path.log_posterior(logits, sample.x_t)
        each = mean_over_event(integrand(path, sample, log_posterior))
        weighted = each if pairs.weight is None else pairs.weight * each
        return weighted.mean(), {"loss": weighted.mean()}

    return loss_fn
