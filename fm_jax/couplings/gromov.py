"""Gromov-Wasserstein transport: pairs samples of two spaces that have no cost between them."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_function, check_integer, check_setting, is_traced
from fm_jax.couplings.costs import COST, Cost, cost_matrix, on_host, squared_euclidean
from fm_jax.couplings.exact import as_labels, assign_within, call_host
from fm_jax.couplings.pairing import check_batch
from fm_jax.types import AnyArray, Array, ArrayTree, Cond, Examples, Key, Pairing

_APART = 1e3
"""The cost of a pair across classes, where costs within a space have mean 1."""
_TOLERANCE = 1e-5
"""Relative change of the objective at which it has converged. At OTT's own 1e-3 the plan can still be a quarter off."""


@dataclass(frozen=True)
class GromovWassersteinOT:
    """The pairing that best keeps distances: entropic Gromov-Wasserstein transport, rounded to a permutation.

    The plan P, of uniform marginals, minimises

        sum over i, j, k, l of (C0_ik - C1_jl)^2 P_ij P_kl + fused <cross, P> + epsilon KL(P | uniform),

    C0 and C1 the costs within each space and `cross` one between them, each divided by its mean, so that epsilon has no
    unit. Peyré, Cuturi & Solomon 2016 (ICML); the fused problem is of Vayer et al. 2018 (arXiv:1805.09114). The pairing
    is the permutation of largest mass under P. The problem is not convex: P is a stationary point, found from the
    product coupling, and the same whenever either space is rotated or reflected.

    `x0` and `x1` may differ in event shape. `AffinePath` and its like then cannot join them: such pairs are for
    translation between spaces, with `x0` as the condition of a flow to `x1`, or as training data for a map. Needs the
    `ot` extra.

    Attributes:
        epsilon: entropic regularisation. Smaller is sharper and slower.
        cost0: within the source, `cost0(x0, x0) -> [batch, batch]`.
        cost1: within the data.
        cross_cost: between the spaces, `cross_cost(x0, x1) -> [batch, batch]`, or `None` for distances alone.
        fused: its weight.
        max_iterations: linearisations of the problem, each solved by Sinkhorn's algorithm.
        ignore_cond: pairs across classes. Right only if the network does not see `cond`.

    Example:
        >>> x0 = np.array([[0.0], [1.0], [3.0]])
        >>> x1 = np.array([[0.0, 7.0], [0.0, 4.0], [0.0, 5.0]])
        >>> GromovWassersteinOT()(None, x0, x1).index0
        array([2, 0, 1], dtype=int32)
    """

    epsilon: float = 0.02
    cost0: Cost = squared_euclidean
    cost1: Cost = squared_euclidean
    cross_cost: Cost | None = None
    fused: float = 1.0
    max_iterations: int = 100
    ignore_cond: bool = False

    def __post_init__(self) -> None:
        check_setting(self, "epsilon", "(0, inf)")
        check_setting(self, "fused", "[0, inf)")
        check_integer("max_iterations", self.max_iterations)
        check_function("cost0", self.cost0, COST, 2)
        check_function("cost1", self.cost1, COST, 2)
        if self.cross_cost is not None:
            check_function("cross_cost", self.cross_cost, COST, 2)
        check_bool("ignore_cond", self.ignore_cond)

    def __call__(self, key: Key | None, x0: Examples, x1: Examples, cond: Cond = None) -> Pairing:
        """Pairs a batch.

        Args:
            key: not used, the solution is deterministic.
            x0: source.
            x1: data, of any event shape.
            cond: integer labels [batch], or `None`; pairs are within classes.

        Returns:
            `Pairing` with `x0` permuted and `weight` all 1; inside `jit` all NaN where the solver did not converge.

        Raises:
            ValueError: if `x0` and `x1` differ in length, `cond` is not integer labels [batch], a cost has the wrong
                shape or is not finite; or, outside `jit`, the solver does not converge.
            ImportError: without ott-jax.
        """
        del key
        x0, x1 = check_batch(x0, x1)
        labels = as_labels(None if self.ignore_cond else cond, len(x1))
        within0, within1 = cost_matrix(self.cost0, x0, x0), cost_matrix(self.cost1, x1, x1)
        cross = None if self.cross_cost is None else cost_matrix(self.cross_cost, x0, x1)
        plan, converged = _solve(self.epsilon, self.max_iterations, self.fused, within0, within1, cross, labels)
        if not is_traced(converged) and not converged:
            raise ValueError(
                f"Gromov-Wasserstein transport did not converge with epsilon={self.epsilon} and "
                f"max_iterations={self.max_iterations}: raise either of them."
            )
        index0: ArrayTree = call_host(assign_within, jax.ShapeDtypeStruct((len(x1),), jnp.int32), -plan, labels)
        weight: ArrayTree = jnp.where(converged, jnp.ones(len(x1), plan.dtype), jnp.nan)
        if on_host(x0, x1):
            index0, weight = np.asarray(index0), np.asarray(weight)
        return Pairing(x0[index0], x1, cond, index0, weight)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    epsilon: float,
    max_iterations: int,
    fused: float,
    within0: AnyArray,
    within1: AnyArray,
    cross: AnyArray | None,
    labels: AnyArray,
) -> tuple[Array, Array]:
    """The plan [n, n], 0 throughout where it did not converge; and whether it did."""
    try:
        from ott.geometry.geometry import Geometry
        from ott.problems.quadratic.quadratic_problem import QuadraticProblem
        from ott.solvers.linear.sinkhorn import Sinkhorn
        from ott.solvers.quadratic.gromov_wasserstein import GromovWasserstein
    except ImportError as error:
        raise ImportError("Gromov-Wasserstein transport needs ott-jax: pip install 'fm_jax[ot]'.") from error

    # OTT linearises the quadratic form without the factor 2 of its gradient: all else is halved likewise.
    between = jnp.where(labels[:, None] == labels[None, :], 0.0, _APART)
    if cross is not None:
        between = between + 0.5 * fused * _of_mean_one(cross)
    solver = GromovWasserstein(
        Sinkhorn(max_iterations=2000),
        0.5 * epsilon,
        warm_start=True,
        threshold=_TOLERANCE,
        max_iterations=max_iterations,
    )
    with jax.numpy_rank_promotion("allow"):
        problem = QuadraticProblem(Geometry(_of_mean_one(within0)), Geometry(_of_mean_one(within1)), Geometry(between))
        result = solver(problem)
        plan = result.matrix
    converged = result.converged & jnp.isfinite(plan).all()
    return jnp.where(converged, plan, 0.0), converged


def _of_mean_one(costs: AnyArray) -> Array:
    """Divided by their mean, where that is not 0."""
    costs = jax.lax.stop_gradient(jnp.asarray(costs))
    mean = costs.mean()
    return costs / jnp.where(mean == 0, 1.0, mean)
