"""The likelihood of many examples of tokens, in batches."""

import math
from collections.abc import Callable

import jax
import numpy as np

from fm_jax.types import Array, Key, Params

Judge = Callable[..., tuple[Array, Array]]
"""`judge(params, key, *rows) -> (nats, error)`, each [batch], as `likelihood.token_bound` gives them."""


def total_nats(judge: Judge, params: Params, key: Key, size: int, *rows: np.ndarray) -> tuple[float, float]:
    """The nats of all examples together, and their standard error.

    Args:
        judge: of a batch; compiled here, once.
        params: network parameters.
        key: of the bounds.
        size: examples in a batch; the last one is filled up.
        rows: [num, ...], what the examples are.
    """
    of, num = jax.jit(judge), len(rows[0])
    nats, squared = 0.0, 0.0
    for i in range(0, num, size):
        some, which = min(size, num - i), np.arange(i, i + size) % num
        found, error = jax.device_get(of(params, jax.random.fold_in(key, i), *(each[which] for each in rows)))
        nats += float(found[:some].sum(dtype=np.float64))
        squared += float((error[:some] ** 2).sum(dtype=np.float64))
    return nats, math.sqrt(squared)
