"""Costs of moving x0 to x1: functions `(x0 [n, ...], x1 [m, ...]) -> [n, m]`, of NumPy or of JAX arrays alike."""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Real

from fm_jax.checks import check_array, check_real, is_traced
from fm_jax.types import AnyArray, ArrayTree

Costs: TypeAlias = Real[AnyArray, "n m"]
Cost: TypeAlias = Callable[[AnyArray, AnyArray], Costs]
"""`cost(x0 [n, ...], x1 [m, ...]) -> [n, m]`, for every pair."""

COST = "a function cost(x0, x1) -> [n, m], such as squared_euclidean"


def squared_euclidean(x0: Real[AnyArray, " n *event"], x1: Real[AnyArray, " m *event"]) -> Costs:
    """|x0_i - x1_j|^2, summed over the dimensions of an example.

    Args:
        x0: in rows.
        x1: in columns.

    Returns:
        Costs, not negative.

    Example:
        >>> squared_euclidean(np.array([[0.0, 0.0]]), np.array([[3.0, 4.0], [0.0, 1.0]]))
        array([[25.,  1.]])
    """
    x0, x1 = precise(x0, x1)
    if x0.shape[1:] != x1.shape[1:]:
        raise ValueError(f"x0 and x1 must have the same event shape, got {x0.shape} and {x1.shape}.")
    dim = math.prod(x1.shape[1:])
    x0, x1 = x0.reshape(x0.shape[0], dim), x1.reshape(x1.shape[0], dim)
    # Distances do not change with the origin, and rounding is least with it in the middle.
    middle = x1.mean(axis=0, keepdims=True)
    x0, x1 = x0 - middle, x1 - middle
    distance2 = (x0**2).sum(axis=1)[:, None] + (x1**2).sum(axis=1)[None, :] - 2 * (x0 @ x1.T)
    return distance2.clip(0)


def euclidean(x0: Real[AnyArray, " n *event"], x1: Real[AnyArray, " m *event"]) -> Costs:
    """|x0_i - x1_j|: the cost of the 1-Wasserstein distance. Arguments as in `squared_euclidean`."""
    return squared_euclidean(x0, x1) ** 0.5


def cost_matrix(cost: Cost, x0: Real[AnyArray, " n ..."], x1: Real[AnyArray, " m ..."]) -> ArrayTree:
    """The costs of all pairs, checked.

    Args:
        cost: the cost function.
        x0: [n, ...].
        x1: [m, ...].

    Returns:
        [n, m], a NumPy array where `x0` and `x1` are.

    Raises:
        ValueError: if `cost` returns another shape; or, unless it is traced, a cost that is not finite.
    """
    matrix = cost(*precise(x0, x1))
    check_real("cost(x0, x1)", matrix)
    if matrix.shape != (len(x0), len(x1)):
        raise ValueError(f"cost(x0, x1) must be [n, m] = {(len(x0), len(x1))}, got shape {matrix.shape}.")
    if is_traced(matrix):
        return matrix
    check_finite(matrix)
    return np.asarray(matrix) if on_host(x0, x1) else matrix


def precise(x0: AnyArray, x1: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Both in one dtype, their own if it is float32 or better, else float32: in bfloat16 other partners are nearest."""
    for name, x in (("x0", x0), ("x1", x1)):
        check_real(name, x)
        if not x.shape:
            raise ValueError(f"{name} must be [n, ...], got a scalar.")
    dtype = jnp.promote_types(jnp.promote_types(x0.dtype, x1.dtype), jnp.float32)
    return x0.astype(dtype), x1.astype(dtype)


def check_finite(matrix: AnyArray | np.ndarray) -> None:
    """Raises `ValueError` saying how many costs are not finite, if any are; not for traced arrays."""
    bad = int((~np.isfinite(np.asarray(matrix))).sum())
    if bad:
        raise ValueError(f"costs must be finite, got {bad} of {matrix.size} that are not: look for NaN in x0 and x1.")


def on_host(*arrays: AnyArray | None) -> bool:
    """Whether all of the arrays are NumPy's, so that the work may be done without JAX."""
    return all(isinstance(each, np.ndarray) for each in arrays if each is not None)


def as_arrays(x0: ArrayTree, x1: ArrayTree) -> tuple[AnyArray, AnyArray]:
    """The two batches as arrays: NumPy's stay NumPy's, if both are; raises `ValueError` for what is no array."""
    check_array("x0", x0)
    check_array("x1", x1)
    return (x0, x1) if on_host(x0, x1) else (jnp.asarray(x0), jnp.asarray(x1))
