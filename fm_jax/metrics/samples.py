"""The two samples that a distance compares, checked and flattened."""

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import is_real, is_traced, shown
from fm_jax.types import Array, ArrayTree


def host_samples(x: ArrayTree, y: ArrayTree) -> tuple[np.ndarray, np.ndarray]:
    """Two samples as float64 NumPy arrays [n, d] and [m, d]; raises `ValueError` as `check_samples`."""
    check_samples(x, y)
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return x.reshape(len(x), -1), y.reshape(len(y), -1)


def device_samples(x: ArrayTree, y: ArrayTree) -> tuple[Array, Array]:
    """Two samples as JAX arrays [n, d] and [m, d] of one dtype, at least float32; raises as `check_samples`."""
    check_samples(x, y)
    x, y = jnp.asarray(x), jnp.asarray(y)
    dtype = jnp.result_type(x, y, jnp.float32)
    return x.reshape(len(x), -1).astype(dtype), y.reshape(len(y), -1).astype(dtype)


def check_samples(x: ArrayTree, y: ArrayTree) -> None:
    """Checks that two samples can be compared.

    Args:
        x: [n, ...].
        y: [m, ...].

    Raises:
        ValueError: if one is empty or complex, they differ in event shape, or one is not finite (unless it is traced).
    """
    for name, sample in (("x", x), ("y", y)):
        _check_numbers(name, sample)
    shape_x, shape_y = np.shape(x), np.shape(y)
    if not shape_x or not shape_y or shape_x[1:] != shape_y[1:]:
        raise ValueError(f"x [n, ...] and y [m, ...] must have the same event shape, got {shape_x} and {shape_y}.")
    for name, sample in (("x", x), ("y", y)):
        if not np.size(sample):
            raise ValueError(f"{name} must not be empty, got shape {np.shape(sample)}.")
        if is_traced(sample):
            continue
        bad = int((~np.isfinite(np.asarray(sample, dtype=np.float64))).sum())
        if bad:
            raise ValueError(f"{name} must be finite, got {bad} of {np.size(sample)} entries that are not.")


def _check_numbers(name: str, sample: ArrayTree) -> None:
    try:
        dtype = sample.dtype if is_traced(sample) else np.asarray(sample).dtype
    except ValueError:  # a ragged list
        dtype = np.dtype(object)
    if not is_real(dtype):
        raise ValueError(f"{name} must be an array [n, ...] of real numbers, got {shown(sample)}.")
