"""Entropic optimal transport between the source and the data of a batch: Sinkhorn's plan, on the device."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Real

from fm_jax.checks import check_bool, check_function, check_integer, check_key, check_number, is_traced
from fm_jax.couplings.costs import COST, Cost, cost_matrix, squared_euclidean
from fm_jax.couplings.exact import as_labels
from fm_jax.couplings.pairing import check_same_space
from fm_jax.couplings.permutations import sample_permutation
from fm_jax.types import AnyArray, Array, Cond, Key, Pairing, State

_VISIT = 200
"""Iterations at one epsilon before the next smaller one is tried."""


@dataclass(frozen=True)
class EntropicOT:
    """The entropic optimal-transport pairing of a batch: a permutation of x0 drawn from Sinkhorn's plan.

    The plan minimises `sum_ij plan_ij c_ij + epsilon plan_ij log plan_ij` with sums 1 in rows and columns. As epsilon
    goes to 0 it becomes the assignment of `ExactOT`, as epsilon grows the independent coupling. Each pair (i, j) is
    drawn with probability plan_ij, and yet every example is there exactly once (`sample_permutation`). With integer
    labels the plan is that of each class by itself.

    For a Schroedinger bridge of Brownian motion with variance sigma^2, epsilon is 2 sigma^2 under the default cost:
    `schrodinger_bridge_ot`.

    Sinkhorn starts from an epsilon of the size of the costs and halves it down to the one asked for, each time from
    costs reduced by the potentials found so far, so that small epsilon needs few iterations and loses no digits. A plan
    that has not converged is never used: it raises, or inside `jit`, where nothing can be raised, the weights of the
    pairs are NaN, and with them the loss. Needs `ott-jax`.

    Notebooks: (8.7).

    Attributes:
        epsilon: strength of the entropy, in units of the cost.
        cost: `cost(x0, x1) -> [batch, batch]`.
        relative: epsilon is in units of the batch's mean cost.
        threshold: how far the rows' and the columns' sums may be off, on average, when Sinkhorn stops.
        max_iterations: Sinkhorn's iterations in all, counted after every 200 at most.
        ignore_cond: pairs across classes. Right only if the network does not see `cond`.

    Example:
        >>> x0, x1 = jnp.array([[0.0], [5.0]]), jnp.array([[4.0], [1.0]])
        >>> EntropicOT(epsilon=0.1)(jax.random.key(0), x0, x1).index0
        Array([1, 0], dtype=int32)

    References:
        Cuturi 2013 (arXiv:1306.0895); Peyré & Cuturi 2019 (arXiv:1803.00567), sec. 4.
    """

    epsilon: float
    cost: Cost = squared_euclidean
    relative: bool = False
    threshold: float = 1e-3
    max_iterations: int = 4000
    ignore_cond: bool = False

    def __post_init__(self):
        check_options(self)

    def __call__(self, key: Key | None, x0: State, x1: State, cond: Cond = None) -> Pairing:
        """Pairs a batch.

        Args:
            key: PRNG key.
            x0: source, independent of `cond`.
            x1: data.
            cond: integer labels [batch], or `None`.

        Returns:
            `Pairing` with `x0` permuted; `weight` [batch] is 1, or NaN where Sinkhorn failed inside `jit`.

        Raises:
            ValueError: if there is no key, `x0` and `x1` differ in shape, `cond` is not integer labels [batch]; or,
                outside `jit`, a cost is not finite or Sinkhorn does not converge.
        """
        key = require_key(self, key)
        problem = prepare(self, x0, x1, cond)
        log_plan, converged = balanced(self, problem)
        index0 = draw(key, log_plan, problem.order)
        weight = nan_unless(converged, jnp.ones(len(index0), problem.costs.dtype))
        return Pairing(problem.x0[index0], problem.x1, cond, index0, weight)

    def plan(self, x0: State, x1: State, cond: Cond = None) -> Real[AnyArray, "batch batch"]:
        """The plan, x0 in rows and x1 in columns, each of sum 1: the probabilities of the pairs.

        NaN where Sinkhorn fails inside `jit`. Arguments and errors as in `__call__`.
        """
        log_plan, converged = balanced(self, prepare(self, x0, x1, cond))
        return nan_unless(converged, jnp.exp(log_plan))


def schrodinger_bridge_ot(sigma: float, **options) -> EntropicOT:
    """`EntropicOT(epsilon=2 sigma^2)`: the ends of a Schroedinger bridge of Brownian motion with variance sigma^2.

    From x0 Brownian motion reaches x1 at time 1 with a density proportional to exp(-|x1 - x0|^2 / (2 sigma^2)), which
    is Sinkhorn's kernel exp(-c / epsilon). Use it with `BrownianBridge(sigma)`, of the same sigma.

    Notebooks: (8.7).

    Args:
        sigma: of the bridge's reference process, positive.
        options: further attributes of `EntropicOT`; not `cost`, `epsilon` or `relative`, which sigma determines.

    Raises:
        ValueError: if `sigma` is not positive, or an option is none.

    References:
        Tong et al. 2023 (arXiv:2307.03672).
    """
    check_number("sigma", sigma, "(0, inf)")
    taken = {"cost", "epsilon", "relative"} & set(options)
    if taken:
        raise ValueError(f"sigma determines {', '.join(sorted(taken))}: EntropicOT takes them.")
    return EntropicOT(epsilon=2 * sigma**2, **options)


class Problem(NamedTuple):
    """A batch, checked, and what transport sees of it."""

    x0: State
    x1: State
    costs: Array
    """[n, n], floating."""
    epsilon: Array
    """In units of the costs."""
    same: Array | None
    """[n, n], whether x0 and x1 are of one class; `None` where there are no classes."""
    order: Array | None
    """[n], the examples class by class; `None` where there are no classes."""


def check_options(options: Any) -> None:
    """Raises `ValueError` unless epsilon, threshold and max_iterations of a coupling make sense."""
    check_number("epsilon", options.epsilon, "(0, inf)")
    check_function("cost", options.cost, COST, 2)
    check_bool("relative", options.relative)
    check_number("threshold", options.threshold, "(0, 0.01]")
    check_integer("max_iterations", options.max_iterations)
    check_bool("ignore_cond", options.ignore_cond)


def require_key(options: Any, key: Key | None) -> Key:
    """The key; raises `ValueError` if there is none."""
    if key is None:
        raise ValueError(f"{type(options).__name__} draws pairs at random and needs a key, got None.")
    check_key(key)
    return key


def prepare(options: Any, x0: State, x1: State, cond: Cond) -> Problem:
    """Checks a batch and finds its costs, as `EntropicOT` and `UnbalancedOT` want them; raises what they raise."""
    x0, x1 = map(jnp.asarray, check_same_space(x0, x1))
    costs = cost_matrix(options.cost, jax.lax.stop_gradient(x0), jax.lax.stop_gradient(x1))
    costs = jnp.asarray(costs, jnp.promote_types(costs.dtype, jnp.float32))
    if cond is None or options.ignore_cond:
        same = order = None
    else:
        labels = jnp.asarray(as_labels(cond, len(x1)))
        same, order = labels[:, None] == labels[None, :], jnp.argsort(labels)
    scale = costs.mean(where=same) if options.relative else 1.0
    return Problem(x0, x1, costs, jnp.asarray(options.epsilon * scale, costs.dtype), same, order)


def balanced(options: Any, problem: Problem) -> tuple[Array, Array]:
    """The logarithm of the plan with sums 1 in rows and columns, and whether it has converged, as `check_converged`."""
    solver = partial(_balanced, threshold=options.threshold, max_iterations=options.max_iterations)
    return check_converged(options, *solver(problem.costs, problem.epsilon, problem.same))


def check_converged(options: Any, log_plan: Array, converged: Array) -> tuple[Array, Array]:
    """Raises `ValueError` if Sinkhorn has not converged, unless that is traced; returns the last two arguments."""
    if not is_traced(converged) and not converged:
        raise ValueError(
            f"Sinkhorn did not converge in {options.max_iterations} iterations: raise max_iterations in {options}."
        )
    return log_plan, converged


def nan_unless(converged: Array, value: Array) -> Array:
    """The value, or NaN. Applied last: on CPU, XLA's exp of a NaN from `where` is not NaN (jax 0.10.2)."""
    return jnp.where(converged, value, jnp.nan)


def draw(key: Key, log_plan: Array, order: Array | None) -> Array:
    """A permutation from the plan, class by class where examples have an `order`."""
    if order is None:
        return sample_permutation(key, jnp.exp(log_plan))
    # With the classes side by side the plan is block-diagonal, and its blocks are never left.
    within = sample_permutation(key, jnp.exp(log_plan[order[:, None], order[None, :]]))
    return jnp.zeros_like(within).at[order].set(order[within].astype(within.dtype))


def separate(costs: Array, same: Array | None, epsilon: Array) -> Array:
    """The costs, and where x0 and x1 are of different classes a finite cost so high that exp(-c / epsilon) is 0.

    OTT would multiply infinite costs by 0.
    """
    return costs if same is None else jnp.where(same, costs, 2 * jnp.abs(costs).max() + 200 * epsilon)


@partial(jax.jit, static_argnames=("threshold", "max_iterations"))
def _balanced(
    costs: Array, epsilon: Array, same: Array | None, *, threshold: float, max_iterations: int
) -> tuple[Array, Array]:
    """Log plan [n, n], and whether its marginals are right.

    Costs reduced by potentials, c - f - g, have the same plan, and exp(-(c - f - g) / epsilon) is the plan once f and g
    are Sinkhorn's. So each visit to an epsilon starts where the last one ended.
    """
    n = len(costs)
    geometry, linear_problem, sinkhorn = load_ott()
    solver = sinkhorn.Sinkhorn(threshold=0.9 * threshold, max_iterations=min(_VISIT, max_iterations))

    def visit(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        reduced, current, iterations, _ = state
        current = jnp.maximum(current / 2, epsilon)
        reduced = separate(reduced, same, current)
        found = solver(linear_problem.LinearProblem(geometry.Geometry(reduced, epsilon=current)))
        reduced = reduced - found.f[:, None] - found.g[None, :]
        plan = jnp.exp(-reduced / current)
        error = jnp.maximum(*(jnp.abs(plan.sum(axis=axis) - 1 / n).sum() for axis in (0, 1)))
        return reduced, current, iterations + found.n_iters.astype(jnp.int32), error

    def unfinished(state: tuple[Array, Array, Array, Array]) -> Array:
        _, current, iterations, error = state
        return ((current > epsilon) | (error > threshold)) & (iterations < max_iterations)

    with jax.numpy_rank_promotion("allow"):  # which OTT relies on
        reduced = separate(costs, same, epsilon)
        reduced = reduced - reduced.min(axis=1, keepdims=True)
        reduced = reduced - reduced.min(axis=0, keepdims=True)
        infinity = jnp.full((), jnp.inf, costs.dtype)
        start = (reduced, 2 * jnp.maximum(reduced.mean(where=same), epsilon), jnp.zeros((), jnp.int32), infinity)
        reduced, current, _, error = jax.lax.while_loop(unfinished, visit, start)
    log_plan = jnp.log(n) - reduced / current
    log_plan = log_plan if same is None else jnp.where(same, log_plan, -jnp.inf)
    return log_plan, (current <= epsilon) & (error <= threshold)


def load_ott() -> tuple[Any, Any, Any]:
    """OTT's modules geometry, linear_problem and sinkhorn; raises `ImportError` naming the extra if there are none."""
    try:
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn
    except ImportError as error:
        raise ImportError("entropic transport needs ott-jax: pip install 'fm_jax[ot]'.") from error
    return geometry, linear_problem, sinkhorn
