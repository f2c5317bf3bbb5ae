"""The maximum mean discrepancy of two samples, and the kernels it is taken in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Real

from fm_jax.checks import check_array, check_bool, check_finite, check_function, check_integer, check_setting, is_traced
from fm_jax.metrics.samples import device_samples
from fm_jax.types import AnyArray, Array, ArrayTree, Scalar

Points0: TypeAlias = Real[AnyArray, "n d"]
Points1: TypeAlias = Real[AnyArray, "m d"]
Pairs: TypeAlias = Real[AnyArray, "n m"]
Kernel: TypeAlias = Callable[[Points0, Points1], Pairs]
"""`kernel(x [n, d], y [m, d]) -> [n, m]`, for every pair, each pair by itself."""
_ENTRIES = 2**24
"""Numbers in memory at once, where XLA does not fuse the differences of all pairs into the sum over them."""
_FOR_MEDIAN = 512
"""Points of each sample that the median distance is taken over."""


def mmd(
    x: ArrayTree,
    y: ArrayTree,
    *,
    bandwidths: float | Sequence[float] | AnyArray | None = None,
    kernel: Kernel | None = None,
    unbiased: bool = True,
) -> Scalar:
    """The squared maximum mean discrepancy, by default in a Gaussian kernel.

    `MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)`, with `k = mean_h exp(-|x - y|^2 / (2 h^2))` over the bandwidths h.
    The unbiased estimate leaves out the pairs of a point with itself and may be negative; the biased one, of the two
    empirical distributions, is not.

    Time n m; the kernel matrix is never in memory as a whole. Works under `jit` and is differentiable.

    Args:
        x: [n, ...].
        y: [m, ...], of the same event shape, which is flattened.
        bandwidths: one h or several. `None` is the median distance within x and y together: handy, but another kernel
            for every pair of samples. Numbers to be compared need one and the same.
        kernel: another kernel in place of the Gaussian: `linear`, `Polynomial(3)` or any `(x, y) -> [n, m]`.
        unbiased: whether to leave out the pairs of a point with itself.

    Raises:
        ValueError: if the event shapes differ, a sample is empty or (unless traced) not finite, an unbiased estimate
            is asked of fewer than 2 points, a bandwidth is not positive, there are both bandwidths and a kernel, or the
            kernel does not return [n, m].

    Example:
        >>> x = jnp.array([[0.0], [2.0]])
        >>> float(mmd(x, x + 1.0, kernel=linear, unbiased=False))  # |E x - E y|^2
        1.0

    References:
        Gretton et al. 2012, "A Kernel Two-Sample Test", JMLR 13, eq. 3 and 5.
    """
    x, y = device_samples(x, y)
    if kernel is not None:
        if bandwidths is not None:
            raise ValueError("bandwidths are those of the Gaussian kernel: give them or a kernel, not both.")
        return discrepancy(kernel, x, y, unbiased=unbiased)
    if bandwidths is not None and not is_traced(bandwidths):
        check_finite("bandwidths", bandwidths)
    h = jnp.atleast_1d(median_distance(x, y) if bandwidths is None else jnp.asarray(bandwidths, dtype=x.dtype))
    if h.ndim != 1 or not h.size:
        raise ValueError(f"bandwidths must be a number or a sequence of numbers, got shape {h.shape}.")
    if not is_traced(h) and not (np.isfinite(h).all() and (np.asarray(h) > 0).all()):
        median = ", the median distance" if bandwidths is None else ""
        raise ValueError(f"bandwidths must be positive and finite, got {np.asarray(h).tolist()}{median}.")
    return discrepancy(Partial(_gaussian, h), x, y, unbiased=unbiased)


def _gaussian(bandwidths: Array, x: Array, y: Array) -> Array:
    distance2 = squared_distance(x, y)
    return jnp.stack([jnp.exp(distance2 / (-2 * h**2)) for h in bandwidths]).mean(axis=0)


def squared_distance(x: Points0, y: Points1) -> Pairs:
    """|x_i - y_j|^2 from the differences.

    XLA fuses it into one loop. The expansion into products would be nowhere near it where points nearly coincide.
    """
    return jnp.square(x[:, None] - y[None]).sum(axis=-1)


def linear(x: Points0, y: Points1) -> Pairs:
    """The kernel `x . y`, whose MMD is the distance between the means."""
    return x @ y.T


@dataclass(frozen=True)
class PolynomialKernel:
    """The kernel `(x . y / d + offset)^degree`: it compares the moments up to `degree`.

    With the default degree, of the features of a network, MMD is the kernel inception distance (Bińkowski et al. 2018,
    arXiv:1801.01401).

    Raises:
        ValueError: if the degree is less than 1 or the offset negative.

    Example:
        >>> PolynomialKernel(2)(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 3.0]]))
        Array([[9.]], dtype=float32)
    """

    degree: int = 3
    offset: float = 1.0

    def __post_init__(self) -> None:
        check_integer("degree", self.degree)
        check_setting(self, "offset", "[0, inf)")

    def __call__(self, x: Points0, y: Points1) -> Pairs:
        """For every pair."""
        return (x @ y.T / x.shape[1] + self.offset) ** self.degree


def median_distance(x: ArrayTree, y: ArrayTree) -> Scalar:
    """The median distance between two different points of both samples together: the usual bandwidth.

    Of samples with more than 512 points, every k-th point counts, so that at most 512 of each do.

    Args:
        x: [n, ...].
        y: [m, ...].

    Returns:
        0 if most points are the same.
    """
    thinned = [sample[:: -(-len(sample) // _FOR_MEDIAN)] for sample in device_samples(x, y)]
    return _median_distance(jnp.concatenate(thinned))


@jax.jit
def _median_distance(pooled: Array) -> Array:
    chunk = _chunk(pooled, pooled)
    distance2 = jax.lax.map(lambda point: squared_distance(point[None], pooled)[0], pooled, batch_size=chunk)
    return jnp.sqrt(jnp.median(distance2[jnp.triu_indices(len(pooled), 1)]))


def discrepancy(kernel: Kernel, x: ArrayTree, y: ArrayTree, *, unbiased: bool = True) -> Scalar:
    """`E k(x, x') + E k(y, y') - 2 E k(x, y)`, the statistic behind `mmd` and `energy_distance`.

    Args:
        kernel: `kernel(x, y) -> [n, m]`. Compiled anew for every new function, not for every new call.
        x: [n, ...].
        y: [m, ...].
        unbiased: whether to leave out the pairs of a point with itself.

    Raises:
        ValueError: as `mmd`.
    """
    check_function("kernel", kernel, "a kernel (x, y) -> [n, m], such as linear", 2)
    check_bool("unbiased", unbiased)
    x, y = device_samples(x, y)
    if unbiased and min(len(x), len(y)) < 2:
        raise ValueError(f"An unbiased estimate needs at least 2 points in x and y, got {len(x)} and {len(y)}.")
    return _discrepancy(kernel if isinstance(kernel, Partial) else Partial(kernel), x, y, unbiased=unbiased)


@partial(jax.jit, static_argnames="unbiased")
def _discrepancy(kernel: Kernel, x: Array, y: Array, *, unbiased: bool) -> Array:
    # The terms all but cancel, so that the short mantissas that accelerators multiply with by default would show.
    with jax.default_matmul_precision("highest"):
        within = _mean(kernel, x, x, distinct=unbiased) + _mean(kernel, y, y, distinct=unbiased)
        return within - 2 * _mean(kernel, x, y)


def _mean(kernel: Kernel, x: Array, y: Array, *, distinct: bool = False) -> Array:
    """The mean of `kernel` over all pairs; without those of equal index if `distinct`."""
    others = len(y) - distinct

    # Without checkpointing, reverse mode would keep the differences of all pairs.
    @jax.checkpoint
    def mean_of_row(row: tuple[Array, Array]) -> Array:
        i, point = row
        values = kernel(point[None], y)
        check_array("kernel(x, y)", values)
        if values.shape != (1, len(y)):
            raise ValueError(f"kernel(x, y) must be [n, m] = {(1, len(y))}, got shape {values.shape}.")
        return jnp.sum(jnp.where(jnp.arange(len(y)) == i, 0.0, values[0]) if distinct else values) / others

    return jax.lax.map(mean_of_row, (jnp.arange(len(x)), x), batch_size=_chunk(x, y)).mean()


def _chunk(x: Array, y: Array) -> int:
    """How many points of x are compared with all of y at once."""
    return max(1, min(len(x), _ENTRIES // y.size))
