"""Unbalanced optimal transport: pairs that count for less where they lie far out, and none that is dropped."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Real

from fm_jax.checks import as_number, shown
from fm_jax.couplings.costs import Cost, squared_euclidean
from fm_jax.couplings.entropic import (
    Problem,
    balanced,
    check_converged,
    check_options,
    draw,
    load_ott,
    nan_unless,
    prepare,
    require_key,
    separate,
)
from fm_jax.types import AnyArray, Array, Cond, Key, Pairing, State


@dataclass(frozen=True)
class UnbalancedOT:
    """Entropic optimal transport with soft marginals: a permutation of x0, and a weight for each pair.

    The plan pi minimises `<pi, c> + epsilon KL(pi | 1/n^2) + rho KL(row sums | 1/n) + rho KL(column sums | 1/n)`, so
    that examples far from everything else have little mass. Drawing pairs from it would drop these and repeat others.
    But pi has the same kernel exp(-c / epsilon) as the balanced plan Q of `EntropicOT`: their ratio is a product of a
    number for x0_i and one for x1_j. So a permutation is drawn from Q, and the pair (i, j) gets the weight
    n pi_ij / Q_ij, divided by the mass of pi, where Q has sums of 1. The weighted mean over pairs has exactly the
    expectation under pi, and the weights the expectation 1.

    How soft the marginals are says `tau = rho / (rho + epsilon)`, as in OTT; `rho` is POT's `reg_m` (with its default
    `reg_type="kl"`), and 1 is hard. Needs `ott-jax`.

    Attributes:
        epsilon: strength of the entropy, in units of the cost.
        tau: between 0 and 1, excluded; or a pair, of x0 and of x1, in which one may be 1: `(1.0, 0.9)` keeps the source
            as it is, from which sampling starts, and weighs the data.
        cost: `cost(x0, x1) -> [batch, batch]`.
        relative: epsilon is in units of the batch's mean cost.
        threshold: of `EntropicOT`, and the relative change of the potentials at which Sinkhorn stops for pi.
        max_iterations: Sinkhorn's iterations, for either plan.
        ignore_cond: pairs across classes. Right only if the network does not see `cond`.

    Example:
        >>> x0, x1 = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [1.0], [9.0]])
        >>> UnbalancedOT(epsilon=0.1, tau=0.9)(jax.random.key(0), x0, x1).weight < 1e-3
        Array([False, False,  True], dtype=bool)

    References:
        Chizat et al. 2018 (arXiv:1607.05816); Eyring et al. 2024 (arXiv:2311.15100) for its use in flow matching.
    """

    epsilon: float
    tau: float | tuple[float, float]
    cost: Cost = squared_euclidean
    relative: bool = False
    threshold: float = 1e-3
    max_iterations: int = 4000
    ignore_cond: bool = False

    def __post_init__(self):
        check_options(self)
        both = self.taus
        if len(both) != 2 or not (all(0 < as_number(tau) <= 1 for tau in both) and min(both) < 1):
            raise ValueError(f"tau must be between 0 and 1, and 1 for one marginal at most, got {shown(self.tau)}.")

    @property
    def taus(self) -> tuple[float, float]:
        """Of x0 and of x1."""
        return self.tau if isinstance(self.tau, tuple) else (self.tau, self.tau)

    def __call__(self, key: Key | None, x0: State, x1: State, cond: Cond = None) -> Pairing:
        """Pairs a batch.

        Args:
            key: PRNG key.
            x0: source, independent of `cond`.
            x1: data.
            cond: integer labels [batch], or `None`. Pairs are within a class; the mass of classes may shift.

        Returns:
            `Pairing` with `x0` permuted, and `weight` [batch] of expected mean 1; NaN where Sinkhorn failed inside
            `jit`.

        Raises:
            ValueError: as `EntropicOT`.
        """
        key = require_key(self, key)
        problem = prepare(self, x0, x1, cond)
        log_balanced, converged_balanced = balanced(self, problem)
        log_plan, converged = self._log_plan(problem)
        index0 = draw(key, log_balanced, problem.order)
        log_ratio = (log_plan - log_balanced)[index0, jnp.arange(len(index0))]
        log_mass = jax.nn.logsumexp(log_plan) - jnp.log(len(index0))  # of pi
        weight = nan_unless(converged_balanced & converged, jnp.exp(log_ratio - log_mass))
        return Pairing(problem.x0[index0], problem.x1, cond, index0, weight)

    def plan(self, x0: State, x1: State, cond: Cond = None) -> Real[AnyArray, "batch batch"]:
        """The plan n pi, x0 in rows and x1 in columns: its sums would be 1, were it balanced.

        NaN where Sinkhorn fails inside `jit`. Arguments and errors as in `__call__`.
        """
        log_plan, converged = self._log_plan(prepare(self, x0, x1, cond))
        return nan_unless(converged, jnp.exp(log_plan))

    def _log_plan(self, problem: Problem) -> tuple[Array, Array]:
        solver = partial(_unbalanced, taus=self.taus, threshold=self.threshold, max_iterations=self.max_iterations)
        return check_converged(self, *solver(problem.costs, problem.epsilon, problem.same))


@partial(jax.jit, static_argnames=("taus", "threshold", "max_iterations"))
def _unbalanced(
    costs: Array,
    epsilon: Array,
    same: Array | None,
    *,
    taus: tuple[float, float],
    threshold: float,
    max_iterations: int,
) -> tuple[Array, Array]:
    """The logarithm of n pi [n, n], and whether Sinkhorn converged."""
    geometry, linear_problem, sinkhorn = load_ott()
    solver = sinkhorn.Sinkhorn(threshold=threshold, max_iterations=max_iterations, recenter_potentials=max(taus) < 1)
    with jax.numpy_rank_promotion("allow"):  # which OTT relies on
        # OTT's entropy is that of the counting measure. Relative to 1/n^2, every cost is higher by epsilon log n^2.
        costs = separate(costs, same, epsilon) + 2 * epsilon * jnp.log(len(costs))
        problem = linear_problem.LinearProblem(geometry.Geometry(costs, epsilon=epsilon), tau_a=taus[0], tau_b=taus[1])
        found = solver(problem)
    log_plan = jnp.log(len(costs)) + (found.f[:, None] + found.g[None, :] - costs) / epsilon
    log_plan = log_plan if same is None else jnp.where(same, log_plan, -jnp.inf)
    return log_plan, found.converged & ~jnp.isnan(log_plan).any()
