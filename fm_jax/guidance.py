"""Guidance: velocity functions made of other velocity functions.

Classifier-free guidance is due to Ho & Salimans 2022 (arXiv:2207.12598, eq. 6), for flows to Zheng et al. 2023
(arXiv:2311.13443). Scale 1 is no guidance, so that the scale is one more than the former's w.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.nfe import nfe_per_call, with_nfe_per_call
from fm_jax.shapes import expand_time
from fm_jax.types import Array, ArrayTree, Cond, ModelFn, VelocityFn


def _is_off(scale: ArrayTree) -> bool:
    return isinstance(scale, (int, float)) and scale == 1


def _check(scale: ArrayTree, interval: tuple[float, float]) -> None:
    if np.ndim(scale) > 1:
        raise ValueError(f"scale must be a number or [batch], got shape {np.shape(scale)}.")
    if not isinstance(scale, jax.core.Tracer) and not np.isfinite(scale).all():
        raise ValueError(f"scale must be finite, got {scale}.")
    start, end = interval
    if not (math.isfinite(start) and math.isfinite(end) and 0 <= start < end <= 1):
        raise ValueError(f"interval must be (start, end) with 0 <= start < end <= 1, got {interval}.")


def _extrapolate(
    conditional: Array, unconditional: Array, scale: ArrayTree, interval: tuple[float, float], t: Array
) -> Array:
    scale = jnp.asarray(scale, dtype=conditional.dtype)
    if interval != (0.0, 1.0):
        scale = jnp.where((interval[0] <= t) & (t <= interval[1]), scale, 1)
    # v_c + (s - 1)(v_c - v_u) is v_u + s (v_c - v_u), and at s = 1 exactly v_c.
    return conditional + expand_time(scale - 1, conditional) * (conditional - unconditional)


def classifier_free(
    v_cond: VelocityFn, v_uncond: VelocityFn, scale: ArrayTree, *, interval: tuple[float, float] = (0.0, 1.0)
) -> VelocityFn:
    """The guided velocity `v_u + scale (v_c - v_u)` from two velocity functions.

    Any two will do: with a weaker model as `v_uncond` this is autoguidance (Karras et al. 2024, arXiv:2406.02507).

    Args:
        v_cond: conditional velocity function.
        v_uncond: unconditional velocity function.
        scale: a number, or [batch]. 1 is off (`v_cond` itself is returned for the number 1), 0 unconditional.
        interval: guidance only for t inside, `v_cond` alone outside (Kynkaanniemi et al. 2024, arXiv:2404.07724). Both
            are evaluated everywhere. The velocity jumps at the ends: put them on the time grid.

    Returns:
        `v(t, x)`; its `nfe_per_call` is the sum of both.

    Raises:
        ValueError: if `scale` is not finite or has two axes, or `interval` is reversed or outside [0, 1].

    Example:
        >>> v = classifier_free(lambda t, x: x, lambda t, x: 0 * x, 3.0)
        >>> v(0.5, jnp.ones((1, 2))), v.nfe_per_call
        (Array([[3., 3.]], dtype=float32), 2)
    """
    _check(scale, interval)
    if _is_off(scale):
        return v_cond

    def guided(t: Array, x: Array) -> Array:
        return _extrapolate(v_cond(t, x), v_uncond(t, x), scale, interval, t)

    return with_nfe_per_call(guided, nfe_per_call(v_cond) + nfe_per_call(v_uncond))


def classifier_free_model(
    model_fn: ModelFn, null_cond: Cond, scale: ArrayTree, *, interval: tuple[float, float] = (0.0, 1.0)
) -> ModelFn:
    """The guided network `f_u + scale (f_c - f_u)`, both branches in one call of twice the batch.

    Guiding the prediction, whatever its kind, is guiding the velocity: the conversions are affine in the prediction,
    and the weights of the two branches add up to 1. Give the result to `velocity_fn` with the kind of the network.

    Args:
        model_fn: `model_fn(t, x, cond)`, with its parameters bound.
        null_cond: what stands for "no condition": a pytree like `cond`, each leaf broadcast to that of `cond`, such as
            the number of the null class.
        scale: a number, or [batch]. 1 is off (`model_fn` itself is returned for the number 1), 0 unconditional.
        interval: guidance only for t inside, the conditional branch alone outside; as in `classifier_free`.

    Returns:
        `guided(t, x, cond)`; its `nfe_per_call` is twice that of `model_fn`.

    Raises:
        ValueError: as `classifier_free`; when called, if `cond` is `None`.

    Example:
        >>> model_fn = lambda t, x, cond: x * cond[:, None]
        >>> guided = classifier_free_model(model_fn, 0, 3.0)
        >>> guided(0.5, jnp.ones((2, 1)), jnp.array([1, 2]))
        Array([[3.],
               [6.]], dtype=float32)
    """
    _check(scale, interval)
    if _is_off(scale):
        return model_fn

    def guided(t: Array, x: Array, cond: Cond = None) -> Array:
        if cond is None:
            raise ValueError("cond must be given: classifier-free guidance needs a condition to guide towards.")
        both = jax.tree.map(_append_broadcast, cond, null_cond)
        twice_t = t if jnp.ndim(t) == 0 else jnp.concatenate([t, t])
        conditional, unconditional = jnp.split(model_fn(twice_t, jnp.concatenate([x, x]), both), 2)
        return _extrapolate(conditional, unconditional, scale, interval, t)

    return with_nfe_per_call(guided, 2 * nfe_per_call(model_fn))


def _append_broadcast(cond: Array, null: ArrayTree) -> Array:
    return jnp.concatenate([cond, jnp.broadcast_to(jnp.asarray(null, dtype=cond.dtype), cond.shape)])
