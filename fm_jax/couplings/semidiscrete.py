"""Semi-discrete optimal transport: from a source that can be sampled to a whole data set, not one batch at a time.

Minibatch transport tends to the optimal plan only as the batch grows. Here a potential for each data point is fitted
once, before training, after which a source sample finds its data point by one argmin.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int, Real

from fm_jax.checks import (
    check_data,
    check_function,
    check_has,
    check_integer,
    check_key,
    check_number,
    check_source,
    is_traced,
)
from fm_jax.couplings.costs import COST, Cost, check_finite, precise, squared_euclidean
from fm_jax.sources import Normal
from fm_jax.types import AnyArray, Array, ArrayTree, Key, Source, State

_NORMAL = Normal()


@partial(jax.tree_util.register_dataclass, data_fields=["x1", "potential"], meta_fields=["cost", "source"])
@dataclass(frozen=True)
class SemidiscreteOT:
    """The optimal map from a source to the m points of a data set: x0 goes to `x1[argmin_j c(x0, x1_j) - g_j]`.

    As a batch is drawn from the source and takes its data along, train on `batch` with `coupling=paired`.

    Attributes:
        x1: the data [m, ...].
        potential: g [m], of mean 0.
        cost: `cost(x0, x1) -> [n, m]`.
        source: that the potential was fitted to.
    """

    x1: Array
    potential: Array
    cost: Cost = field(default=squared_euclidean)
    source: Source = field(default_factory=Normal)

    def pair(self, x0: State) -> Int[AnyArray, " batch"]:
        """The data point of each source sample, as its index int32.

        Args:
            x0: source.

        Raises:
            ValueError: if `x0` and the data differ in event shape.
        """
        check_data("x0", x0)
        if x0.shape[1:] != self.x1.shape[1:]:
            raise ValueError(f"x0 must be [batch, ...] with events {self.x1.shape[1:]}, got shape {x0.shape}.")
        return (self.cost(*precise(x0, self.x1)) - self.potential[None, :]).argmin(axis=1).astype(jnp.int32)

    def draw(self, key: Key, batch_size: int) -> State:
        """Points of the source."""
        check_integer("batch_size", batch_size)
        return self.source.draw(key, _like(self.x1, batch_size))

    def batch(self, key: Key, batch_size: int) -> dict[str, Array]:
        """A batch of the optimal pairs: `x0`, its `x1`, and `index1` int32 [batch], with which to look up labels.

        Args:
            key: PRNG key.
            batch_size: number of pairs.
        """
        x0 = self.draw(key, batch_size)
        index1 = self.pair(x0)
        return {"x0": x0, "x1": self.x1[index1], "index1": index1}


class CellMasses(NamedTuple):
    """How much of the source goes to each data point; 1/m each would be exact.

    `masses` [m] sum to 1; `worst` is the largest |masses_j - 1/m|, a scalar; `noise` the standard error that sampling
    leaves in a mass of 1/m: a `worst` of some three or four times that is nothing.
    """

    masses: Array
    worst: Array
    noise: float


def cell_masses(transport: SemidiscreteOT, key: Key, *, num_batches: int = 100, batch_size: int = 1000) -> CellMasses:
    """Estimates the mass of every data point's cell, and so whether any is starved.

    Args:
        transport: from `fit_semidiscrete`.
        key: PRNG key.
        num_batches: batches of source samples.
        batch_size: samples in each.

    Returns:
        `CellMasses`.
    """
    check_has("transport", transport, ("draw", "pair", "potential"), "a SemidiscreteOT, as from fit_semidiscrete")
    check_key(key)
    check_integer("num_batches", num_batches)
    check_integer("batch_size", batch_size)
    m = len(transport.potential)

    def count(counts: Array, key: Key) -> tuple[Array, None]:
        return counts.at[transport.pair(transport.draw(key, batch_size))].add(1), None

    keys = jax.random.split(key, num_batches)
    counts, _ = jax.lax.scan(count, jnp.zeros(m, jnp.int32), keys)
    masses = counts / (num_batches * batch_size)
    return CellMasses(masses, jnp.abs(masses - 1 / m).max(), math.sqrt((1 - 1 / m) / m / (num_batches * batch_size)))


def fit_semidiscrete(
    key: Key,
    x1: Real[AnyArray, " m *event"],
    *,
    source: Source = _NORMAL,
    num_iterations: int = 10_000,
    batch_size: int = 256,
    learning_rate: float = 0.01,
    cost: Cost = squared_euclidean,
) -> SemidiscreteOT:
    """Fits the potential of every data point, so that each gets 1/m of the source at the least cost.

    Maximises the concave dual `E min_j (c(x0, x1_j) - g_j) + mean_j g_j`, whose gradient is 1/m minus the mass of each
    cell, by stochastic steps of Adam's that shrink as 1/sqrt(iteration), averaged over the last half. Each step costs
    `batch_size` times m. Look at `cell_masses` before use, and take more iterations where they are not near 1/m. Needs
    `optax`.

    Args:
        key: PRNG key.
        x1: the data.
        source: of x0, in the event shape of `x1`.
        num_iterations: steps.
        batch_size: source samples in each.
        learning_rate: in units of the costs' standard deviation.
        cost: `cost(x0, x1) -> [n, m]`.

    Returns:
        `SemidiscreteOT`.

    Raises:
        ValueError: if an option is not positive, the source does not draw what looks like `x1`, or, unless it is
            traced, the result is not finite.

    Example:
        >>> from fm_jax.sources import Uniform
        >>> x1 = jnp.array([[3.0], [1.0], [2.0], [4.0]])
        >>> transport = fit_semidiscrete(jax.random.key(0), x1, source=Uniform(), num_iterations=1000)
        >>> transport.pair(jnp.array([[0.1], [0.4], [0.6], [0.9]]))  # a quarter each, in order
        Array([1, 2, 0, 3], dtype=int32)

    References:
        Genevay et al. 2016 (arXiv:1605.08527), sec. 4; Mousavi-Hosseini et al. 2025 (arXiv:2509.25519) for its use in
        flow matching.
    """
    check_integer("num_iterations", num_iterations)
    check_integer("batch_size", batch_size)
    check_number("learning_rate", learning_rate, "(0, inf)")
    check_key(key)
    check_source(source)
    check_function("cost", cost, COST, 2)
    check_data("x1", x1)
    x1 = jnp.asarray(x1)
    potential = _fit(key, x1, learning_rate, source, cost, num_iterations=num_iterations, batch_size=batch_size)
    if not is_traced(potential):
        check_finite(potential)
    return SemidiscreteOT(x1, potential, cost, source)


def _like(x1: Array, num: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num, *x1.shape[1:]), x1.dtype)


@partial(jax.jit, static_argnames=("source", "cost", "num_iterations", "batch_size"))
def _fit(
    key: Key, x1: Array, learning_rate: ArrayTree, source: Source, cost: Cost, *, num_iterations: int, batch_size: int
) -> Array:
    import optax

    like = _like(x1, batch_size)
    m, half = len(x1), num_iterations // 2
    key_scale, key_steps = jax.random.split(key)
    scale = cost(*precise(source.draw(key_scale, like), x1)).std()
    optimizer = optax.adam(lambda i: learning_rate * scale / jnp.sqrt(1 + 100 * i / num_iterations))

    def step(state, i_key):
        i, key = i_key
        potential, average, opt_state = state
        nearest = (cost(*precise(source.draw(key, like), x1)) - potential[None, :]).argmin(axis=1)
        excess = jnp.zeros_like(potential).at[nearest].add(1 / batch_size) - 1 / m  # minus the gradient
        updates, opt_state = optimizer.update(excess, opt_state)
        potential = potential + updates
        average = average + (potential - average) / jnp.maximum(i - half + 1, 1)
        return (potential, average, opt_state), None

    start = jnp.zeros(m, scale.dtype)
    steps = jnp.arange(num_iterations), jax.random.split(key_steps, num_iterations)
    (_, average, _), _ = jax.lax.scan(step, (start, start, optimizer.init(start)), steps)
    return average - average.mean()
