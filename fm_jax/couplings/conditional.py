"""Exact transport that leaves the source independent of the condition.

At sampling the source is drawn without regard to the condition. Transport that disregards conditions trains every
condition on the part of the source that is nearest to its data, another distribution: the prior is skewed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, check_function, check_setting
from fm_jax.couplings.costs import COST, Cost, check_finite, cost_matrix, squared_euclidean
from fm_jax.couplings.exact import assign_within, call_host
from fm_jax.couplings.pairing import check_same_space
from fm_jax.types import Array, ArrayTree, Cond, Key, Pairing, State

ConditionCost: TypeAlias = Callable[[Cond, Cond], Array]
"""`condition_cost(cond, cond) -> [batch, batch]`: not negative, and 0 for a condition with itself."""


@dataclass(frozen=True)
class ConditionalOT:
    """The pairing of least transport cost plus `weight` times the change of condition: C2OT, exactly.

    Every x0_i starts with the condition of its own row, drawn independently of it, and x0_i with x1_j costs

        cost(x0_i, x1_j) + weight condition_cost(cond_i, cond_j),

    Cheng & Schwing 2025 (arXiv:2503.10636). Weight 0 is optimal transport that disregards conditions; infinite weight
    pairs within equal conditions only, and where all differ leaves the pairs as they come: between the two one trades
    straighter paths for a source less skewed. By default the weight is found for each batch, such that a share `ratio`
    of all pairs remains no dearer than the pair that the data point came with (`adaptive_weight`).

    Integer and boolean leaves of `cond` are labels, [batch] or rows [batch, ...] of them: pairs are within equal ones.
    Floating leaves, which may be there at the same time, are continuous: flattened and joined, they cost their squared
    Euclidean distance. Scale them against each other where their units differ. Without conditions it is `ExactOT`.

    Called with NumPy arrays it works in NumPy alone; inside `jit` it is a host callback.

    Attributes:
        weight: of the conditions' cost, from 0 to `math.inf`; `None` to find it by `ratio`.
        ratio: the share of pairs that stay worth their cost, in (0, 1]. 1 disregards continuous conditions; at
            1 / batch and below only pairs of equal conditions are left, of which a batch has at least that share.
        cost: `cost(x0, x1) -> [batch, batch]`.
        condition_cost: `condition_cost(cond, cond)` of the whole tree, labels included, in place of what is said of
            leaves above.

    Example:
        >>> x0, x1 = np.array([[0.0], [1.0], [2.0], [3.0]]), np.array([[3.0], [2.0], [1.0], [0.0]])
        >>> ConditionalOT(weight=9.0)(None, x0, x1, np.array([0.0, 0.1, 5.0, 5.1])).index0
        array([1, 0, 3, 2], dtype=int32)
    """

    weight: float | None = None
    ratio: float = 0.05
    cost: Cost = squared_euclidean
    condition_cost: ConditionCost | None = None

    def __post_init__(self) -> None:
        if self.weight is not None:  # None finds it by ratio
            check_setting(self, "weight", "[0, inf]")
        check_setting(self, "ratio", "(0, 1]")
        check_function("cost", self.cost, COST, 2)
        if self.condition_cost is not None:
            check_function("condition_cost", self.condition_cost, "a function condition_cost(cond, cond) -> [n, n]", 2)

    def __call__(self, key: Key | None, x0: State, x1: State, cond: Cond = None) -> Pairing:
        """Pairs a batch.

        Args:
            key: not used, the assignment is deterministic.
            x0: source, independent of `cond`.
            x1: data.
            cond: a pytree of numbers [batch, ...], or `None`.

        Returns:
            `Pairing` with `x0` permuted.

        Raises:
            ValueError: if `x0` and `x1` differ in shape, a leaf of `cond` is not [batch, ...] or holds no numbers,
                `condition_cost` returns another shape; or if a cost or a condition is not finite, a condition's cost is
                negative, or one with itself is not 0 (inside `jit`, the error of the callback says so).
        """
        del key
        x0, x1 = check_same_space(x0, x1)
        check_real_conditions(cond, len(x1))
        costs = cost_matrix(self.cost, x0, x1)
        conditions, condition_cost = cond, None if cond is None else self.condition_cost
        if condition_cost is not None:
            conditions = condition_cost(cond, cond)
            check_array("condition_cost(cond, cond)", conditions)
            if conditions.shape != costs.shape:
                raise ValueError(f"condition_cost must return {costs.shape}, got shape {conditions.shape}.")

        def solve(costs: ArrayTree, conditions: ArrayTree) -> ArrayTree:
            if condition_cost is None:
                labels, distances = distances_of(conditions, len(costs))
            else:
                labels, distances = np.zeros(len(costs), dtype=np.int64), conditions
            return assign_conditionally(costs, labels, distances, self.weight, self.ratio)

        index0 = call_host(solve, jax.ShapeDtypeStruct((len(x1),), jnp.int32), costs, conditions)
        return Pairing(x0[index0], x1, cond, index0)


def check_real_conditions(cond: Cond, batch: int) -> None:
    """Raises `ValueError` unless every leaf of `cond` holds numbers [batch, ...]."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(cond)[0]:
        dtype = getattr(leaf, "dtype", type(leaf))
        real = any(jnp.issubdtype(dtype, kind) for kind in (jnp.bool_, jnp.integer, jnp.floating))
        if jnp.shape(leaf)[:1] != (batch,) or not real:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"cond must hold real numbers [batch, ...] with batch = {batch}, got {dtype} {jnp.shape(leaf)}"
                + (f" in {name!r}." if name else ".")
            )


def assign_conditionally(
    costs: np.ndarray, labels: np.ndarray, condition_costs: np.ndarray, weight: float | None, ratio: float
) -> np.ndarray:
    """The optimal assignment of transport and conditions, on the host.

    Args:
        costs: [n, n], of x0 in rows with x1 in columns.
        labels: [n], pairs are within equal ones.
        condition_costs: [n, n].
        weight: of these; `None` for `adaptive_weight` among the pairs of equal labels.
        ratio: see there.

    Returns:
        `index0` int32 [n]: x0[index0[j]] goes with x1[j].

    Raises:
        ValueError: if a cost is not finite, or `condition_costs` is negative anywhere or not 0 on the diagonal.
    """
    check_finite(costs)
    costs = costs - costs.min().astype(np.float64)
    condition_costs = _without_rounding(condition_costs)
    if weight is None:
        same = labels[:, None] == labels[None, :]
        weight = adaptive_weight(costs, np.where(same, condition_costs, np.inf), ratio)
    if weight < math.inf:
        return assign_within(costs + weight * condition_costs, labels)
    # Finite for the solver's sake, and dearer than any pairing that keeps the conditions, as the one at hand does.
    forbidden = 2 * len(costs) * (costs.max() or 1.0)
    return assign_within(np.where(condition_costs == 0, costs, forbidden), labels)


def adaptive_weight(costs: np.ndarray, condition_costs: np.ndarray, ratio: float) -> float:
    """The largest weight at which a share `ratio` of the pairs is no dearer than the data point's own pair.

    `mean over i, j of [costs_ij + w condition_costs_ij <= costs_jj] >= ratio`, Cheng & Schwing 2025 (arXiv:2503.10636),
    who search for w. A pair holds up to `w_ij = (costs_jj - costs_ij) / condition_costs_ij`, so that w is a quantile of
    these.

    Args:
        costs: [n, n], of x0 in rows with x1 in columns.
        condition_costs: [n, n], not negative, 0 on the diagonal; infinite for pairs that do not count.
        ratio: in (0, 1].

    Returns:
        The weight: infinite if pairs of equal conditions suffice, 0 if there are not that many pairs at any weight.

    Example:
        >>> adaptive_weight(np.array([[2.0, 0.0], [1.0, 3.0]]), np.array([[0.0, 1.0], [4.0, 0.0]]), ratio=0.75)
        3.0
    """
    costs = costs.astype(np.float64)
    gain = np.diagonal(costs)[None, :] - costs
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = np.where(condition_costs > 0, gain / condition_costs, np.inf)
    bound = np.where(gain >= 0, bound, -np.inf)[np.isfinite(condition_costs)]
    nth = math.ceil(ratio * bound.size)
    return max(0.0, float(np.partition(bound, -nth)[-nth]))


def distances_of(cond: Cond, batch: int) -> tuple[np.ndarray, ArrayTree]:
    """What is discrete as labels, and the squared distances of what is continuous, of NumPy arrays.

    Args:
        cond: as in `ConditionalOT`.
        batch: the length of its leaves.

    Returns:
        Labels [batch], equal where a row's integers are; and distances float64 [batch, batch].

    Raises:
        ValueError: if a number is not finite.
    """
    leaves = [leaf.reshape(batch, -1) for leaf in jax.tree.leaves(cond)]
    labels: np.ndarray = np.zeros(batch, dtype=np.int64)
    features: ArrayTree = np.zeros((batch, 0))
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            features = np.concatenate([features, leaf.astype(np.float64)], axis=1)
        else:
            rows = np.unique(leaf, axis=0, return_inverse=True)[1].reshape(batch)
            labels = np.unique(labels * batch + rows, return_inverse=True)[1]
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    if bad:
        raise ValueError(f"conditions must be finite, got {bad} of {batch} that are not.")
    return labels, squared_euclidean(features, features)


def _without_rounding(condition_costs: np.ndarray) -> np.ndarray:
    """With rounding errors of 0 as 0; raises `ValueError` if they are not costs."""
    check_finite(condition_costs)
    tolerance = (
        100 * jnp.finfo(jnp.promote_types(condition_costs.dtype, jnp.float32)).eps * np.abs(condition_costs).max()
    )
    condition_costs = np.where(np.abs(condition_costs) <= tolerance, 0, condition_costs.astype(np.float64))
    if (condition_costs < 0).any() or np.diagonal(condition_costs).any():
        raise ValueError(
            "condition_cost must not be negative, and 0 for a condition with itself, got a least cost of "
            f"{condition_costs.min():.3g} and {np.diagonal(condition_costs).max():.3g} on the diagonal."
        )
    return condition_costs
