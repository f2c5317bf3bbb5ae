"""Exact partial transport: only the cheapest part of a batch is paired, and the rest counts for nothing."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_function, check_setting
from fm_jax.couplings.costs import COST, Cost, check_finite, cost_matrix, squared_euclidean
from fm_jax.couplings.exact import _COLD, as_labels, assign, call_host, extend_potentials, row_potentials
from fm_jax.couplings.pairing import check_same_space
from fm_jax.types import Cond, Key, Pairing, State


@dataclass(frozen=True)
class PartialOT:
    """The k = round(mass n) pairs of least total cost, exactly: partial optimal transport of uniform batches.

    `min over injections s of k rows to columns of sum_i cost(x0_i, x1_s(i))`. The k pairs weigh n/k and the others 0,
    so that the mean is 1; nothing is dropped from the batch. Outliers on either side, which would cost most, are left
    out (Chapel et al. 2020, arXiv:2002.08276). With integer labels every class transports its own share, at least one
    pair, and keeps its total weight.

    The source that a network is trained from is the part that was transported, not all of it: leave out little where
    sampling starts from the whole.

    Called with NumPy arrays it works in NumPy alone; inside `jit` it is a host callback.

    Attributes:
        mass: the share of pairs to transport, in (0, 1]; with 1 it is `ExactOT`.
        cost: `cost(x0, x1) -> [batch, batch]`.
        ignore_cond: pairs across classes. Right only if the network does not see `cond`.

    Example:
        >>> x0, x1 = np.array([[0.0], [5.0], [1.0]]), np.array([[1.1], [0.1], [99.0]])
        >>> PartialOT(mass=2 / 3)(None, x0, x1)[-2:]
        (array([2, 0, 1], dtype=int32), array([1.5, 1.5, 0. ]))
    """

    mass: float
    cost: Cost = squared_euclidean
    ignore_cond: bool = False

    def __post_init__(self) -> None:
        check_setting(self, "mass", "(0, 1]")
        check_function("cost", self.cost, COST, 2)
        check_bool("ignore_cond", self.ignore_cond)

    def __call__(self, key: Key | None, x0: State, x1: State, cond: Cond = None) -> Pairing:
        """Pairs a batch.

        Args:
            key: not used, the assignment is deterministic.
            x0: source, independent of `cond`.
            x1: data.
            cond: integer labels [batch], or `None`.

        Returns:
            `Pairing` with `x0` permuted and `weight` [batch], 0 for pairs that are not transported. Those are paired in
            the order in which they stand.

        Raises:
            ValueError: as `ExactOT` does.
        """
        del key
        x0, x1 = check_same_space(x0, x1)
        labels = as_labels(None if self.ignore_cond else cond, len(x1))
        costs = cost_matrix(self.cost, x0, x1)
        dtype = jnp.promote_types(costs.dtype, jnp.float32)
        shapes = jax.ShapeDtypeStruct((len(x1),), jnp.int32), jax.ShapeDtypeStruct((len(x1),), dtype)
        index0, weight = call_host(partial(assign_part_within, mass=self.mass), shapes, costs, labels)
        return Pairing(x0[index0], x1, cond, index0, weight)


def assign_part_within(costs: np.ndarray, labels: np.ndarray, mass: float) -> tuple[np.ndarray, np.ndarray]:
    """The optimal partial assignment within each class, on the host.

    Args:
        costs: [n, n], of x0 in rows with x1 in columns.
        labels: [n] of the x1; the x0 with the same indices are a class's own.
        mass: the share of each class to transport, in (0, 1].

    Returns:
        `index0` int32 [n]: x0[index0[j]] goes with x1[j]; and `weight` [n].

    Raises:
        ValueError: if a cost is not finite.
    """
    check_finite(costs)
    index0 = np.empty(len(labels), dtype=np.int32)
    weight = np.zeros(len(labels), dtype=np.promote_types(costs.dtype, np.float32))
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        num_pairs = max(1, round(mass * len(members)))
        columns, transported = assign_part(costs[np.ix_(members, members)], num_pairs)
        index0[members[columns]] = members
        weight[members[columns[transported]]] = len(members) / num_pairs
    return index0, weight


def assign_part(costs: np.ndarray, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """The `num_pairs` entries of least total cost, no two in one row or column.

    It is an assignment of a larger matrix: a dummy column takes each row that is left out, a dummy row each column, for
    nothing, and two dummies never meet.

    Args:
        costs: [n, n], finite.
        num_pairs: k, from 1 to n.

    Returns:
        Column indices [n], a permutation; and a mask [n] of the rows that are transported.
    """
    n = len(costs)
    if num_pairs == n:
        return assign(costs), np.ones(n, dtype=bool)
    padded = np.zeros((2 * n - num_pairs,) * 2)
    # The same shift of every cost changes nothing, k pairs being chosen anyway. Two dummies meeting would save no pair,
    # costs being at least 0 then, and so lose by any positive cost of theirs.
    padded[:n, :n] = costs - costs.min().astype(np.float64)
    padded[n:, n:] = padded.max() or 1.0
    columns = _assign_padded(padded, n)[:n]
    transported = columns < n
    columns[~transported] = np.setdiff1d(np.arange(n), columns[transported])
    return columns, transported


def _assign_padded(padded: np.ndarray, n: int) -> np.ndarray:
    """`assign`, started from the potentials of a quarter of the n rows, with as large a share of the dummies."""
    if n <= _COLD:
        return assign(padded, np.zeros(len(padded)))
    quarter = n // 4
    rows = np.r_[:quarter, n : n + (len(padded) - n) * quarter // n]
    part = padded[np.ix_(rows, rows)]
    return assign(padded, extend_potentials(padded[rows], row_potentials(part, _assign_padded(part, quarter))))
