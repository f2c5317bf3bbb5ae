"""DDIM, from deterministic to ancestral sampling, along any affine path."""

import jax.numpy as jnp

from fm_jax.nfe import nfe_per_call
from fm_jax.samplers.grids import check_state, time_grid
from fm_jax.samplers.levels import Levels, check_key_is_for, check_start, data_and_noise, levels
from fm_jax.samplers.loop import sample_on_grid, step_noise
from fm_jax.types import Array, ArrayTree, Key, Schedule, Solution, VelocityFn


def noise_shares(grid: Levels, eta: float) -> tuple[Array, Array]:
    """What share of each step's noise is kept and what share is drawn afresh, [num_steps] each.

    `kept^2 + fresh^2 = 1` and `fresh = eta sqrt(1 - e^-2h)`.
    """
    if eta == 0:
        return jnp.ones_like(grid.h), jnp.zeros_like(grid.h)
    # e^-h in a form that is 0 where h is infinite. The product is 0 only in a step of length 0 at an end, and a ratio
    # above 1 is rounding.
    product = grid.alpha[1:] * grid.sigma[:-1]
    decay = jnp.where(product > 0, grid.alpha[:-1] * grid.sigma[1:] / jnp.where(product > 0, product, 1), 1)
    decay = jnp.minimum(decay, 1)
    fresh = eta * jnp.sqrt((1 - decay) * (1 + decay))
    return (decay if eta == 1 else jnp.sqrt(1 - fresh**2)), fresh


def sample_ddim(
    v: VelocityFn,
    x0: Array,
    *,
    schedule: Schedule,
    eta: float = 0.0,
    key: Key | None = None,
    num_steps: int | None = None,
    t0: float = 0.0,
    t1: float = 1.0,
    grid: ArrayTree | None = None,
    trajectory: bool = False,
) -> Solution:
    """A sample by DDIM: predict data d and noise n, and mix them anew at the levels of the next time.

    `x_n = alpha_n d + sqrt(sigma_n^2 - s^2) n + s z`, with z standard normal, `s = eta sigma_n sqrt(1 - e^-2h)` and
    `e^-h = alpha sigma_n / (alpha_n sigma)`.

    * `eta = 0` is deterministic and also runs backward, from data to noise. It is the exponential Euler method for the
      flow in log-SNR: order 1, exact where the data is one point. On a Gaussian of width w, with `tan(a) = alpha w /
      sigma`, each step multiplies the exact solution, measured from the mean, by `cos(a_n - a)`. On `Linear` it is the
      Euler method.
    * `eta = 1` draws from the posterior q(x_n | x, x1 = d): on `DDPM` the ancestral sampler with the lower of its two
      variances, and its like on every other schedule. Weak order 1, as for every eta above 0.

    One evaluation a step. Both ends may be singular, alpha = 0 or sigma = 0; the velocity is not evaluated at the last.

    Args:
        v: velocity function of an affine path with a standard normal source; called with a scalar t.
        x0: [batch, ...] at `t0`.
        schedule: of that path.
        eta: share of the posterior's noise, a number in [0, 1].
        key: typed key, where `eta > 0`; step i draws its noise from `fold_in(key, i)`.
        num_steps: for equal steps from `t0` to `t1`; either this or `grid`.
        t0: where `x0` is.
        t1: where to go; after `t0` if `eta > 0`.
        grid: times [num_steps + 1], strictly monotone; increasing if `eta > 0`.
        trajectory: whether to keep the states at all grid times.

    Returns:
        `Solution`: x [batch, ...] at the end; nfe, a scalar; trajectory [num_steps + 1, batch, ...] if asked for.

    Raises:
        ValueError: for a bad grid, state or eta, or unless a key is given exactly where `eta > 0`.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: (2 - x) / (1 - t)  # all data at 2
        >>> solution = sample_ddim(v, jnp.zeros((1, 1)), schedule=Linear(), num_steps=3, t1=0.75)
        >>> solution.x, int(solution.nfe)
        (Array([[1.5]], dtype=float32), 3)

    References:
        Song et al. 2020 (arXiv:2010.02502, eq. 12 and 16); Ho et al. 2020 (arXiv:2006.11239, eq. 7).
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}.")
    check_key_is_for(eta > 0, key, "eta = 0")
    x0 = jnp.asarray(x0)
    check_state(x0)
    times = time_grid(num_steps, grid, t0, t1, x0, forward=eta > 0)
    check_start(schedule, t0, grid)
    at = levels(schedule, times)
    kept, fresh = noise_shares(at, eta)

    def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
        data, noise = data_and_noise(v, schedule, t, x)
        if key is not None:
            noise = kept[i] * noise + fresh[i] * step_noise(key, i, x)
        return (at.alpha[i + 1] * data + at.sigma[i + 1] * noise).astype(x.dtype), memory

    return sample_on_grid(step, x0, times, nfe=(len(times) - 1) * nfe_per_call(v), trajectory=trajectory)
