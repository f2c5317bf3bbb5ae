"""How far a flow goes out of its way: path energy and straightness.

The integrals over time are one more component of the ODE, so that the sampler takes them at its own evaluations
(midpoint rule for midpoint, trapezoid for Heun, ...): of its order, and for no evaluation more.
"""

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_bool, check_number
from fm_jax.samplers import RungeKutta, sample
from fm_jax.samplers.grids import check_forward
from fm_jax.samplers.runge_kutta import evaluate
from fm_jax.samplers.sample import as_state, times_of
from fm_jax.shapes import time_dtype
from fm_jax.types import Array, ArrayTree, PerExample, Sampler, Scalar, State, Time, VelocityFn

_MIDPOINT = RungeKutta("midpoint")


def path_energy(
    v: VelocityFn,
    x0: State,
    *,
    sampler: Sampler = _MIDPOINT,
    times: int | ArrayTree | None = None,
) -> Scalar:
    """The kinetic energy that a flow spends on its way: `E integral |v(t, x_t)|^2 dt`.

    Over [0, 1] it is at least W_2^2 between the source and where the flow arrives, with equality for optimal transport
    (Benamou & Brenier 2000): that is its floor. The kinetic-optimal paths are those of least energy (Shaul et al.
    2023, arXiv:2306.06626).

    Notebooks: (8.2).

    Args:
        v: velocity function; called with a scalar t.
        x0: drawn from the source.
        sampler: any that draws no noise; the integral is of its order.
        times: as in `sample`, increasing.

    Returns:
        Summed over the dimensions of x, averaged over the batch.

    Raises:
        ValueError: for bad times, a bad sampler or state, or if `v` returns another shape than that of `x0`.

    Example:
        >>> path_energy(lambda t, x: jnp.full_like(x, 2.0), jnp.zeros((5, 3)), times=4)  # 3 times 2^2
        Array(12., dtype=float32)

    References:
        Tong et al. 2023 (arXiv:2302.00482).
    """
    x0, grid = _start(v, x0, sampler, times)
    _, energy = _transport(v, x0, sampler, grid, origin=jnp.zeros_like(x0))
    return energy.mean()


def normalised_path_energy(v: VelocityFn, x0: State, wasserstein2: ArrayTree, **options) -> Scalar:
    """By how much the energy of a flow differs from that of optimal transport: `|PE - W_2^2| / W_2^2`.

    0 for a flow that transports the source to the data optimally. A flow that falls short of the data can have less
    energy than that, hence the modulus: give it beside a distance of the samples to the data.

    Args:
        v: velocity function.
        x0: drawn from the source.
        wasserstein2: W_2 (not its square) between source and data: `wasserstein` of two large samples, or a closed
            form. Its error goes into the result; see `normalised_path_energy_floor`.
        **options: as in `path_energy`.

    Raises:
        ValueError: as `path_energy`; if `wasserstein2` (unless traced) is not positive.

    Example:
        >>> x0 = jnp.zeros((5, 2))
        >>> normalised_path_energy(lambda t, x: 0 * x + jnp.array([[3.0, 4.0]]), x0, 5.0, times=4)
        Array(0., dtype=float32)

    References:
        Tong et al. 2023 (arXiv:2302.00482).
    """
    if np.shape(wasserstein2) != ():
        raise ValueError(f"wasserstein2 must be a number, got shape {np.shape(wasserstein2)}.")
    check_number("wasserstein2", wasserstein2, "(0, inf)")
    return jnp.abs(path_energy(v, x0, **options) / wasserstein2**2 - 1)


def straightness(
    v: VelocityFn,
    x0: State,
    *,
    sampler: Sampler = _MIDPOINT,
    times: int | ArrayTree | None = None,
    relative: bool = False,
) -> Scalar:
    """How far a flow is from straight lines at constant speed: `S = E integral |x1 - x0 - v(t, x_t)|^2 dt`.

    0 if and only if the velocity is constant along every trajectory, and then one Euler step is exact. On [0, 1] it is
    what the path energy has in excess of the cost of its own coupling, `S = PE - E|x1 - x0|^2` (Pooladian et al. 2023,
    arXiv:2304.14772), which a reflow brings down. On another interval x1 - x0 stands for the mean velocity
    `(x1 - x0) / (t1 - t0)`.

    Notebooks: (8.2).

    Args:
        v: velocity function; called with a scalar t.
        x0: drawn from the source.
        sampler: any that draws no noise; the integral is of its order.
        times: as in `sample`, increasing.
        relative: whether to divide by the energy of the straight lines, `E|x1 - x0|^2` on [0, 1]: a number without
            unit, to compare data sets and resolutions by.

    Returns:
        Summed over the dimensions of x, averaged over the batch.

    Raises:
        ValueError: as `path_energy`.

    Example:
        >>> float(straightness(lambda t, x: jnp.full_like(x, 2 * t), jnp.zeros((5, 3)), times=100).round(3))
        1.0

    References:
        Liu et al. 2022 (arXiv:2209.03003, sec. 2).
    """
    x0, grid = _start(v, x0, sampler, times)
    check_bool("relative", relative)
    # About the mean velocity of the first step, as a variance about a provisional mean: as PE - E|x1 - x0|^2, it would
    # be nothing but rounding where the flow is nearly straight.
    first = (sample(v, x0, sampler, times=grid[:2]).x - x0) / (grid[1] - grid[0])
    duration = grid[-1] - grid[0]
    x1, about_first = _transport(v, x0, sampler, grid, origin=first)
    excess = about_first - duration * _squares((x1 - x0) / duration - first)
    if not relative:
        return excess.mean()
    return excess.mean() / (_squares(x1 - x0) / duration).mean()


def _start(v: VelocityFn, x0: State, sampler: Sampler, times: int | ArrayTree | None) -> tuple[State, ArrayTree]:
    """The state in at least float32, in which sums over dimensions and steps are taken, and the times."""
    x0 = as_state("x0", x0)
    if not x0.size:
        raise ValueError(f"x0 must not be empty, got shape {x0.shape}.")
    x0 = x0.astype(time_dtype(x0))
    grid = times_of(v, sampler, times, x0)
    check_forward(grid, "a measure of a flow")
    return x0, grid


def _transport(v: VelocityFn, x0: State, sampler: Sampler, grid: ArrayTree, origin: State) -> tuple[State, PerExample]:
    """Where the flow takes `x0`, and the integral of |v(t, x_t) - origin|^2 on the way."""

    def state(z: State) -> Array:
        return z[:, :-1].reshape(x0.shape)

    def augmented(t: Time, z: State) -> State:
        velocity = evaluate(v, t, state(z)).astype(z.dtype)
        return jnp.concatenate([velocity.reshape(len(z), -1), _squares(velocity - origin)[:, None]], axis=1)

    z0 = jnp.concatenate([x0.reshape(len(x0), -1), jnp.zeros((len(x0), 1), x0.dtype)], axis=1)
    z = sample(augmented, z0, sampler, times=grid).x
    return state(z), z[:, -1]


def _squares(x: State) -> PerExample:
    """|x|^2 of each example."""
    return (x**2).reshape(len(x), -1).sum(axis=1)
