"""What all manifolds share: points [..., *shape], refusals, and numbers that stay finite where a vector is zero."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, is_traced, shown
from fm_jax.types import AnyArray, Array, Manifold

TOLERANCE = 1e-3
"""How far a point may be off the manifold, in relation to 1 + its size: more than rounding, less than a slip."""


def check_shape_of(name: str, x: Any, manifold: Manifold) -> None:
    """Refuses what is not floating point [..., *shape]."""
    check_array(name, x)
    num = len(manifold.shape)
    wanted = f"points of {manifold}, [..., {', '.join(map(str, manifold.shape))}]"
    if len(x.shape) < num or tuple(x.shape[len(x.shape) - num :]) != manifold.shape:
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(x.shape)}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be {wanted}, in floating point, got {x.dtype}.")


def check_points(name: str, x: AnyArray, manifold: Manifold) -> None:
    """Refuses what is not floating point [..., *shape], or is known to lie off the manifold; NaN does."""
    check_shape_of(name, x, manifold)
    if is_traced(x) or not getattr(x, "is_fully_addressable", True):
        return
    with jax.ensure_compile_time_eval():
        nearest = np.asarray(manifold.project(jnp.asarray(x)), np.float64)
    off = np.abs(np.asarray(x, np.float64) - nearest)
    off = off.reshape(-1, math.prod(manifold.shape)).max(axis=1, initial=0)
    size = 1 + np.abs(np.asarray(x, np.float64)).reshape(len(off), -1).max(axis=1, initial=0)
    tolerance = max(TOLERANCE, 4 * float(jnp.finfo(x.dtype).eps))
    if num := int((~(off <= tolerance * size)).sum()):
        raise ValueError(
            f"{name} must be points of {manifold}, got {num} of {len(off)} off it, by up to {off.max():.3g}; "
            "manifold.project brings them there."
        )


def dot(a: Array, b: Array) -> Array:
    """The sum of products over the last axis, which stays."""
    return (a * b).sum(axis=-1, keepdims=True)


def norm(u: Array) -> Array:
    """The length along the last axis, which stays; its derivatives at 0 are 0, of both modes and all orders."""
    squares = dot(u, u)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)


def over(a: Array, b: Array, limit: float = 1.0) -> Array:
    """`a / b`, and `limit` where b is 0, with derivatives that are finite."""
    there = b != 0
    return jnp.where(there, a / jnp.where(there, b, 1), limit)


def event_sum(each: Array) -> Array:
    """What is a number a point [batch, ...], summed over the points of each example: [batch]."""
    return each.reshape(len(each), math.prod(each.shape[1:])).sum(axis=1)


def refuse_uniform(manifold: Any) -> Any:
    """Raises `ValueError`: a manifold of infinite volume has no uniform distribution."""
    raise ValueError(f"{shown(manifold)} has no uniform distribution, its volume is infinite: take WrappedNormal(...).")
