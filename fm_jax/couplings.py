"""Couplings: which source sample goes with which data sample.

A coupling is a function `(key, x0, x1, cond) -> Pairing` that permutes the source samples of a batch; data and
conditions stay in place, so no example is lost or repeated.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.types import Array, ArrayTree, Cond, Key, Pairing


def independent(key: Key | None, x0: Array, x1: Array, cond: Cond = None) -> Pairing:
    """The product coupling: pairs as they come.

    Args:
        key: not used; there so that every coupling has one signature.
        x0: source [batch, ...].
        x1: data [batch, ...].
        cond: conditioning [batch, ...] or `None`.
    """
    del key
    return Pairing(x0, x1, cond, jnp.arange(x1.shape[0]))


def minibatch_ot(key: Key | None, x0: Array, x1: Array, cond: Cond = None) -> Pairing:
    """The exact optimal-transport pairing of a batch for the squared Euclidean cost.

    With uniform marginals optimal transport is an assignment; it is solved on the host by
    `scipy.optimize.linear_sum_assignment` (Tong et al. 2023, arXiv:2302.00482; Pooladian et al. 2023,
    arXiv:2304.14772). With integer labels the pairing is optimal within each class: free pairing would skew the
    source seen by each class away from the one that sampling starts from (Cheng & Schwing 2025, arXiv:2503.10636).

    Args:
        key: not used, the assignment is deterministic.
        x0: source [batch, ...]; independent of `cond`.
        x1: data [batch, ...].
        cond: integer labels [batch], or `None`.

    Returns:
        `Pairing` with `x0` permuted.

    Raises:
        ValueError: if `x0` and `x1` differ in shape, or `cond` is not integer labels [batch].
    """
    del key
    if x0.shape != x1.shape:
        raise ValueError(f"x0 and x1 must have the same shape, got {x0.shape} and {x1.shape}.")
    batch = x1.shape[0]
    if cond is None:
        labels = jnp.zeros(batch, dtype=jnp.int32)
    else:
        labels = jnp.asarray(cond)
        if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
            raise ValueError(
                f"minibatch_ot takes integer labels [batch] = ({batch},) as cond, got {labels.dtype} {labels.shape}."
            )
    index0 = jax.pure_callback(
        _assign,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        x0.reshape(batch, -1),
        x1.reshape(batch, -1),
        labels,
        vmap_method="sequential",
    )
    return Pairing(x0[index0], x1, cond, index0)


def _assign(x0: ArrayTree, x1: ArrayTree, labels: ArrayTree) -> np.ndarray:
    """For each data sample the row of `x0` that the optimal assignment within its class gives it."""
    from scipy.optimize import linear_sum_assignment  # imported here: it would double the time to import fm_jax

    x0, x1, labels = np.asarray(x0), np.asarray(x1), np.asarray(labels)
    index0 = np.empty(len(x1), dtype=np.int32)
    for label in np.unique(labels):
        (rows,) = np.nonzero(labels == label)
        # |x0 - x1|^2 up to terms that depend on one side only, which no assignment can change.
        _, columns = linear_sum_assignment(-x1[rows] @ x0[rows].T)
        index0[rows] = rows[columns]
    return index0
