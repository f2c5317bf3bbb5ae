"""Exact optimal transport between the source and the data of a batch.

With uniform marginals it is an assignment, solved on the host by SciPy's shortest augmenting paths. They are started
from dual potentials of a quarter of the batch, which leaves the optimum as it is and most of the work undone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, check_bool, check_function, is_traced
from fm_jax.couplings.costs import COST, Cost, check_finite, cost_matrix, squared_euclidean
from fm_jax.couplings.pairing import check_same_space
from fm_jax.types import ArrayTree, Cond, Key, Pairing, State

_COLD = 96
"""Problems up to this size are solved without potentials."""
_PIECE = 2**16
"""Bytes that XLA's CPU client copies without a thread of its own; the limit is 100 KiB."""


@dataclass(frozen=True)
class ExactOT:
    """The optimal-transport pairing of a batch, exactly: the permutation of x0 of least total cost.

    Minibatch optimal transport, Tong et al. 2023 (arXiv:2302.00482) and Pooladian et al. 2023 (arXiv:2304.14772). With
    integer labels the pairing is optimal within each class: free pairing would skew the source seen by each class away
    from the one that sampling starts from (Cheng & Schwing 2025, arXiv:2503.10636).

    Called with NumPy arrays it works in NumPy alone; inside `jit` it is a host callback.

    Notebooks: (8.6).

    Attributes:
        cost: `cost(x0, x1) -> [batch, batch]`.
        maximize: the most expensive pairing in place of the cheapest ("anti-OT"), for study.
        ignore_cond: pairs across classes. Right only if the network does not see `cond`.

    Example:
        >>> x0, x1 = np.array([[0.0], [5.0]]), np.array([[4.0], [1.0]])
        >>> ExactOT()(None, x0, x1).index0
        array([1, 0], dtype=int32)
    """

    cost: Cost = squared_euclidean
    maximize: bool = False
    ignore_cond: bool = False

    def __post_init__(self) -> None:
        check_function("cost", self.cost, COST, 2)
        check_bool("maximize", self.maximize)
        check_bool("ignore_cond", self.ignore_cond)

    def __call__(self, key: Key | None, x0: State, x1: State, cond: Cond = None) -> Pairing:
        """Pairs a batch.

        Args:
            key: not used, the assignment is deterministic.
            x0: source, independent of `cond`.
            x1: data.
            cond: integer labels [batch], or `None`.

        Returns:
            `Pairing` with `x0` permuted.

        Raises:
            ValueError: if `x0` and `x1` differ in shape, `cond` is not integer labels [batch], or a cost is not finite
                (inside `jit`, the error of the callback says so).
        """
        del key
        x0, x1 = check_same_space(x0, x1)
        labels = as_labels(None if self.ignore_cond else cond, len(x1))
        costs = cost_matrix(self.cost, x0, x1)
        if self.maximize:
            costs = -costs
        index0 = call_host(assign_within, jax.ShapeDtypeStruct((len(x1),), jnp.int32), costs, labels)
        return Pairing(x0[index0], x1, cond, index0)


minibatch_ot = ExactOT()
"""`ExactOT()`: squared Euclidean costs, within each class where there are integer labels.

Notebooks: (8.6).
"""
anti_ot = ExactOT(maximize=True)
"""`ExactOT(maximize=True)`: the most expensive pairing, for study."""


def call_host(function: Callable[..., Any], result: ArrayTree, *args: ArrayTree) -> ArrayTree:
    """`function(*args)` on the host, with NumPy arrays: at once, or inside `jit` as a callback.

    Its result is an index or a weight, constant almost everywhere, so no derivative passes through.

    Args:
        function: pure, of as many pytrees of NumPy arrays as there are `args`.
        result: a pytree of `jax.ShapeDtypeStruct`, like what `function` returns.
        *args: pytrees of arrays.

    Returns:
        What `function` returns, as NumPy arrays if the first argument is one, or else as JAX arrays.
    """
    leaves, tree = jax.tree.flatten(args)
    if not any(is_traced(leaf) for leaf in leaves):
        found = function(*jax.tree.map(np.asarray, args))
        return found if isinstance(args[0], np.ndarray) else jax.tree.map(jnp.asarray, found)
    leaves = [jax.lax.stop_gradient(jnp.asarray(leaf)) for leaf in leaves]
    # JAX copies a callback's inputs on one of XLA's threads, of which simulated devices have one each. Those may all be
    # waiting for this device in a collective: a deadlock, unless the copies are small enough to be made in place.
    simulated = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    lengths = [_PIECE // leaf.dtype.itemsize if simulated else max(leaf.size, 1) for leaf in leaves]
    shapes = [leaf.shape for leaf in leaves]
    pieces = [
        [leaf.ravel()[start : start + length] for start in range(0, max(leaf.size, 1), length)]
        for leaf, length in zip(leaves, lengths)
    ]

    def on_pieces(pieces):
        return function(
            *jax.tree.unflatten(tree, [np.concatenate(x).reshape(shape) for x, shape in zip(pieces, shapes)])
        )

    return jax.pure_callback(on_pieces, result, pieces, vmap_method="sequential")


def as_labels(cond: Cond, batch: int) -> ArrayTree:
    """Labels [batch], all alike if `cond` is `None`; raises `ValueError` unless they are integers of that length."""
    if cond is None:
        return np.zeros(batch, dtype=np.int32)
    check_array("cond", cond)
    labels = cond if isinstance(cond, np.ndarray) else jnp.asarray(cond)
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"cond must be integer labels [batch] = ({batch},), got {labels.dtype} {labels.shape}; ConditionalOT takes "
            "any other, ignore_cond=True disregards it."
        )
    return labels


def assign_within(costs: ArrayTree, labels: ArrayTree) -> np.ndarray:
    """The optimal assignment within each class, on the host.

    Args:
        costs: [n, n], of x0 in rows with x1 in columns.
        labels: [n] of the x1; the x0 with the same indices are a class's own.

    Returns:
        `index0` int32 [n]: x0[index0[j]] goes with x1[j].

    Raises:
        ValueError: if a cost is not finite.
    """
    costs, labels = np.asarray(costs), np.asarray(labels)
    check_finite(costs)
    index0 = np.empty(len(labels), dtype=np.int32)
    for label in np.unique(labels):
        (members,) = np.nonzero(labels == label)
        within = costs if len(members) == len(labels) else costs[np.ix_(members, members)]
        index0[members[assign(within)]] = members
    return index0


def assign(costs: np.ndarray, potentials: np.ndarray | None = None) -> np.ndarray:
    """The column that the optimal assignment gives each row.

    Args:
        costs: [n, n], finite.
        potentials: an estimate [n] of the columns' dual potentials. The nearer to the optimal ones, the less work; the
            assignment is optimal whatever they are. By default those of a quarter of the problem, carried over.

    Returns:
        Column indices [n].
    """
    from scipy.optimize import linear_sum_assignment  # imported here: it would double the time to import fm_jax

    if potentials is None and len(costs) > _COLD:
        quarter = len(costs) // 4
        part = costs[:quarter, :quarter]
        potentials = extend_potentials(costs[:quarter], row_potentials(part, assign(part)))
    if potentials is not None:
        costs = costs - potentials[None, :]
        costs = costs - costs.min(axis=1, keepdims=True)
        costs = costs - costs.min(axis=0, keepdims=True)
    return linear_sum_assignment(costs)[1]


def row_potentials(costs: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The rows' dual potentials u [n] of an optimal assignment.

    With the columns' v, u_i + v_j <= c_ij everywhere and equality on the assignment: complementary slackness (Peyré &
    Cuturi 2019, arXiv:1803.00567, sec. 3.3). v_j is the length of a shortest path in the graph of the assignment, found
    by Bellman and Ford's iteration.

    Args:
        costs: [n, n].
        columns: optimal columns [n] of its rows.
    """
    matched = costs[np.arange(len(costs)), columns]
    slack, v = costs - matched[:, None], np.zeros(len(costs), dtype=costs.dtype)
    for _ in range(len(costs)):
        shorter = np.minimum(v, (v[columns][:, None] + slack).min(axis=0))
        if np.array_equal(shorter, v):
            break
        v = shorter
    return matched - v[columns]


def extend_potentials(costs: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Dual potentials of new columns, by the c-transform `v_j = min_i c_ij - u_i`.

    Args:
        costs: [k, n], of the rows that have potentials with the new columns.
        u: the rows' potentials [k].

    Returns:
        v [n].
    """
    return (costs - u[:, None]).min(axis=0)
