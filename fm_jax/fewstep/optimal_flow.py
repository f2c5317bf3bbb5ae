"""Optimal Flow Matching: a transport map learned through its straight paths, from pairs of any plan.

The velocity is restricted to those of straight paths `phi_t(z) = (1 - t) z + t grad Psi(z)` with a convex potential
Psi. Within that family the flow-matching loss has its minimum at the optimal transport map, whatever pairs it is shown,
and a sample costs one evaluation of `grad Psi` (Kornilov et al. 2024, arXiv:2403.13117).

A potential here is a function `potential_fn(params, x [batch, ...]) -> [batch]` that acts on each example alone, is
convex in x and twice differentiable, such as `linen_potential(ICNN())` of `fm_jax.models.icnn`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from fm_jax.checks import (
    check_array,
    check_coupling,
    check_function,
    check_integer,
    check_number,
    check_state,
    check_times,
)
from fm_jax.couplings import independent
from fm_jax.losses.matching import draw_pairs, times_within
from fm_jax.paths.affine import AffinePath
from fm_jax.shapes import batch_time, expand_time, mean_over_event
from fm_jax.types import (
    Array,
    Batch,
    Coupling,
    Key,
    LossFn,
    Metrics,
    Params,
    Scalar,
    State,
    Time,
    TimeSampler,
    VelocityFn,
)

Potential: TypeAlias = Callable[[Params, Array], Array]
"""`potential_fn(params, x [batch, ...]) -> [batch]`, convex in x."""

POTENTIAL = "a potential (params, x) -> [batch], such as linen_potential(ICNN())"
_DENSE = 64
"""Up to this dimension a Newton step of the inverse forms its matrix; above, and always in the gradient, conjugate
gradients on Hessian-vector products."""


class Inverse(NamedTuple):
    """Where lines start: `z0` [batch, ...], and `residual` [batch], the root mean square of `phi_t(z0) - x_t`."""

    z0: Array
    residual: Array


def optimal_flow_matching(
    potential_fn: Potential,
    *,
    coupling: Coupling = independent,
    time_sampler: TimeSampler | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
) -> LossFn:
    """The loss of Optimal Flow Matching.

    `E_t,x0,x1 |v(x_t) - u_t|^2 = E |(z0 - x0) / t|^2`, averaged over the dimensions of x as `flow_matching` does (d
    times this is the paper's), with `x_t = (1 - t) x0 + t x1`, `u_t = x1 - x0`, `z0 = phi_t^-1(x_t)` and
    `v = grad Psi(z0) - z0`, a form that does not divide by t. For every plan it is minimal at the optimal transport
    map; the minimum itself depends on the plan, and is 0 for pairs of that map.

    The gradient is that of the implicit function theorem: nothing is differentiated through the iterations of the
    inverse, and with w = v - u_t it is `2 d/dparams <(t H + (1 - t) I)^-1 w, grad Psi(z0)>`, H the Hessian at z0.

    Args:
        potential_fn: the convex potential Psi, unconditional.
        coupling: pairs x0 with x1 within the batch.
        time_sampler: training times; `None` is uniform on [0, 1].
        tolerance: root mean square of `phi_t(z0) - x_t`, in the units of x, up to which an inverse counts as found.
        max_iterations: most Newton steps, shortened ones included.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)` as from `flow_matching`, with the same batch except `cond`.
        Metrics are `loss` and `mse`, the unweighted error; `residual`, the worst of the batch; and `unconverged`, the
        share of the batch whose inverse was not found. Those examples still count in the loss: where the share does not
        stay near 0, raise `max_iterations` or the strong convexity of the potential.

    Raises:
        ValueError: if `tolerance` or `max_iterations` is not positive; when the loss is traced, for a batch with
            `cond`, a potential that is not [batch], and as `flow_matching`.
        ImportError: if Optimistix, which comes with Diffrax, is missing.

    Example:
        >>> loss_fn = optimal_flow_matching(lambda params, x: params * (x**2).sum(axis=1) / 2)
        >>> batch = {"x1": jnp.full((2, 3), 4.0), "x0": jnp.full((2, 3), 2.0), "t": jnp.array([0.0, 0.5])}
        >>> round(float(loss_fn(2.0, None, batch)[0]), 5), round(float(loss_fn(1.0, None, batch)[0]), 5)
        (0.0, 4.0)

    References:
        Kornilov et al. 2024 (arXiv:2403.13117, sec. 3).
    """
    check_function("potential_fn", potential_fn, POTENTIAL, 2)
    check_coupling(coupling)
    _check_options(tolerance, max_iterations)
    path = AffinePath()
    times = times_within(time_sampler, path.domain, "the line")

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params
        pairs = draw_pairs(key, batch, path.source, coupling, times)
        if pairs.cond is not None:
            raise ValueError("the potential sees no condition: take 'cond' out of the batch.")
        sample = path.sample(None, pairs.t, pairs.x0, pairs.x1)
        z0, residual = invert(
            potential_fn, params, pairs.t, sample.x_t, tolerance=tolerance, max_iterations=max_iterations
        )
        mse = mean_over_event((transport(potential_fn, params, z0) - z0 - sample.u_t) ** 2)
        loss = (mse if pairs.weight is None else pairs.weight * mse).mean()
        unconverged = jnp.mean(~(residual <= tolerance))  # so written, a NaN has not converged
        return loss, {"loss": loss, "mse": mse.mean(), "residual": residual.max(), "unconverged": unconverged}

    return loss_fn


def transport(potential_fn: Potential, params: Params, x0: State) -> State:
    """The transport map `grad Psi(x0)`: a sample for one evaluation.

    Args:
        potential_fn: the potential.
        params: its parameters.
        x0: source.

    Raises:
        ValueError: if the potential is not [batch].

    Example:
        >>> transport(lambda params, x: (x**2).sum(axis=1) + x[:, 0], None, jnp.ones((1, 2)))
        Array([[3., 2.]], dtype=float32)
    """
    check_function("potential_fn", potential_fn, POTENTIAL, 2)
    check_state(x0)

    def total(x: Array) -> Array:
        potential = potential_fn(params, x)
        check_array("the potential", potential)
        if potential.shape != x.shape[:1]:
            raise ValueError(f"the potential must be [batch] = {x.shape[:1]}, got shape {potential.shape}.")
        return potential.sum()

    return jax.grad(total)(x0)


def invert(
    potential_fn: Potential,
    params: Params,
    t: Time,
    x_t: State,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
) -> Inverse:
    """The point z0 whose straight line passes `x_t` at `t`: `phi_t(z0) = (1 - t) z0 + t grad Psi(z0) = x_t`.

    z0 is the minimiser of the strongly convex `t Psi(z) + (1 - t) |z|^2 / 2 - <z, x_t>`, found for each example on its
    own by Newton's method with Armijo's rule on `|phi_t(z) - x_t|^2`, of Optimistix. Its derivatives are those of the
    implicit function theorem, in forward and reverse mode.

    Args:
        potential_fn: the potential.
        params: its parameters.
        t: times.
        x_t: points on the lines.
        tolerance: root mean square of `phi_t(z0) - x_t` over the dimensions at which to stop.
        max_iterations: most Newton steps, shortened ones included.

    Returns:
        `Inverse`. Nothing is raised where no inverse was found: look at `residual`.

    Raises:
        ValueError: if `tolerance` or `max_iterations` is not positive, or the potential is not [batch].
        ImportError: if Optimistix, which comes with Diffrax, is missing.
    """
    check_function("potential_fn", potential_fn, POTENTIAL, 2)
    _check_options(tolerance, max_iterations)
    check_state(x_t, "x_t")
    check_times("t", t, (0.0, 1.0), "from source to data")
    linear_solve, root_find = _solvers(math.prod(x_t.shape[1:]), x_t.dtype, tolerance, max_iterations)

    def invert_one(t: Array, x: Array) -> tuple[Array, Array]:
        def residual(z: Array) -> Array:
            return t * transport(potential_fn, params, z[None])[0] + (1 - t) * z - x

        z0 = jax.lax.custom_root(residual, x, root_find, linear_solve)
        return z0, jnp.sqrt(jnp.mean(residual(jax.lax.stop_gradient(z0)) ** 2))

    return Inverse(*jax.vmap(invert_one)(batch_time(t, x_t), x_t))


def inverse_transport(
    potential_fn: Potential, params: Params, x1: State, *, tolerance: float = 1e-4, max_iterations: int = 100
) -> Inverse:
    """The inverse of the transport map, from data back to the source: `invert` at t = 1."""
    check_state(x1, "x1")
    return invert(potential_fn, params, jnp.ones(()), x1, tolerance=tolerance, max_iterations=max_iterations)


def straight_velocity(
    potential_fn: Potential, params: Params, *, tolerance: float = 1e-4, max_iterations: int = 100
) -> VelocityFn:
    """The velocity of the straight paths, `v(t, x) = grad Psi(z0) - z0` with `phi_t(z0) = x`, for samplers.

    It is constant along each line, so that one Euler step is exact. From t = 0 `transport` is the cheaper way: each
    evaluation of v inverts a map, which NFE does not count.

    Args:
        potential_fn: the potential.
        params: its parameters.
        tolerance: as for `invert`.
        max_iterations: as for `invert`.

    Returns:
        `v(t, x)`; NaN for an example whose inverse was not found.
    """
    check_function("potential_fn", potential_fn, POTENTIAL, 2)
    _check_options(tolerance, max_iterations)

    def velocity(t: Time, x: State) -> State:
        z0, residual = invert(potential_fn, params, t, x, tolerance=tolerance, max_iterations=max_iterations)
        return jnp.where(expand_time(residual <= tolerance, x), transport(potential_fn, params, z0) - z0, jnp.nan)

    return velocity


def _check_options(tolerance: float, max_iterations: int) -> None:
    check_number("tolerance", tolerance, "(0, inf)")
    check_integer("max_iterations", max_iterations)


def _solvers(dim: int, dtype: Any, tolerance: float, max_iterations: int) -> tuple[Callable, Callable]:
    """How to solve, for one example, `g(x) = y` with g linear and definite, and `f(z) = 0` with f a convex gradient."""
    try:
        import equinox as eqx
        import lineax as lx
        import optimistix as optx
    except ImportError as error:
        raise ImportError("fm_jax.fewstep.optimal_flow needs Optimistix: pip install optimistix.") from error
    definite = frozenset({lx.symmetric_tag, lx.positive_semidefinite_tag})

    def linear_solve(g: Callable[[Array], Array], y: Array) -> Array:
        operator = lx.FunctionLinearOperator(g, jax.eval_shape(lambda: y), definite)
        accurate = lx.CG(rtol=float(jnp.finfo(dtype).eps) ** 0.5, atol=0.0)
        return lx.linear_solve(operator, y, accurate, throw=False).value

    # Full steps cycle or diverge where the map is steep between flat pieces, as it is between modes of the data.
    rough: Any = lx.Cholesky() if dim <= _DENSE else lx.CG(rtol=1e-2, atol=0.0)
    newton: Any = optx.GaussNewton(tolerance, tolerance, optx.rms_norm, linear_solver=rough)
    newton = eqx.tree_at(lambda solver: solver.search, newton, optx.BacktrackingArmijo())

    def root_find(f: Callable[[Array], Array], z: Array) -> Array:
        found: Any = optx.least_squares(
            lambda z, _: f(z), newton, z, max_steps=max_iterations, throw=False, tags=definite
        )
        return found.value

    return linear_solve, root_find
