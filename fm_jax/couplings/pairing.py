"""Pairings that need no transport, and what all couplings share."""

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_condition, check_same_shape
from fm_jax.couplings.costs import as_arrays, on_host
from fm_jax.types import AnyArray, ArrayTree, Cond, Examples, Key, Pairing


def independent(key: Key | None, x0: Examples, x1: Examples, cond: Cond = None) -> Pairing:
    """The product coupling: pairs as they come, of a source and data drawn independently.

    Args:
        key: not used; there so that every coupling has one signature.
        x0: source.
        x1: data.
        cond: conditioning [batch, ...] or `None`.

    Returns:
        `Pairing` with everything in place.

    Raises:
        ValueError: if `x0`, `x1` and `cond` differ in length.
    """
    del key
    x0, x1 = check_batch(x0, x1)
    check_condition(x1, cond)
    return Pairing(x0, x1, cond, (np if on_host(x0, x1) else jnp).arange(x1.shape[0]))


def paired(key: Key | None, x0: Examples, x1: Examples, cond: Cond = None) -> Pairing:
    """The coupling that the data bring along, as blurred and sharp images of one scene: pairs as they come.

    The losses refuse to draw the `x0` of a paired batch, which is the one difference to `independent`.
    """
    return independent(key, x0, x1, cond)


def check_batch(x0: ArrayTree, x1: ArrayTree) -> tuple[AnyArray, AnyArray]:
    """Both as arrays; raises `ValueError` unless they have one length, at least 1."""
    x0, x1 = as_arrays(x0, x1)
    if not x0.ndim or not x1.ndim or len(x0) != len(x1) or not len(x1):
        raise ValueError(f"x0 and x1 must have the same batch, at least 1, got shapes {x0.shape} and {x1.shape}.")
    return x0, x1


def check_same_space(x0: ArrayTree, x1: ArrayTree) -> tuple[AnyArray, AnyArray]:
    """Both as arrays; raises `ValueError` unless they have one shape."""
    check_same_shape(x0=x0, x1=x1)
    return check_batch(x0, x1)
