"""DDIM, from deterministic to ancestral sampling, along any affine path."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from fm_jax.checks import (
    check_known,
    check_number,
    check_schedule,
    check_setting,
    check_shape,
    check_state,
    check_velocity,
)
from fm_jax.nfe import spent
from fm_jax.samplers.grids import check_forward
from fm_jax.samplers.levels import check_start, data_and_noise, range_of
from fm_jax.samplers.loop import run_steps, step_noise
from fm_jax.samplers.runge_kutta import evaluate, path_times
from fm_jax.types import Array, ArrayTree, Key, Scalar, Schedule, Solution, State, VelocityFn


def noise_shares(alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array, eta: float) -> tuple[Array, Array]:
    """What share of a step's noise is kept and what share is drawn afresh, elementwise in the levels at both ends.

    `kept^2 + fresh^2 = 1` and `fresh = eta sqrt(1 - e^-2h)`.
    """
    if eta == 0:
        return jnp.ones_like(sigma), jnp.zeros_like(sigma)
    # e^-h in a form that is 0 where h is infinite. The product is 0 only in a step of length 0 at an end, and a ratio
    # above 1 is rounding.
    product = alpha_next * sigma
    decay = jnp.where(product > 0, alpha * sigma_next / jnp.where(product > 0, product, 1), 1)
    decay = jnp.minimum(decay, 1)
    fresh = eta * jnp.sqrt((1 - decay) * (1 + decay))
    return (decay if eta == 1 else jnp.sqrt(1 - fresh**2)), fresh


def ddim_step(
    v: VelocityFn,
    t: Scalar | float,
    t_next: Scalar | float,
    x: State,
    *,
    schedule: Schedule,
    eta: float = 0.0,
    noise: State | None = None,
    first: State | None = None,
) -> State:
    """One step of DDIM from `t` to `t_next`: `alpha_n d + sigma_n n` with the predictions d and n of data and noise.

    Notebooks: (5.9), (5.10).

    Args:
        v: velocity function of an affine path with a standard normal source.
        t: time of `x`.
        t_next: after `t` if `eta > 0`.
        x: the state.
        schedule: of the path.
        eta: share of the posterior's noise, a number in [0, 1].
        noise: standard normal, where `eta > 0`.
        first: `v(t, x)`, where it is already known.

    Returns:
        The state at `t_next`, in the dtype of `x`.

    Raises:
        ValueError: if an argument is not what it should be, or `v` returns another shape than that of `x`.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: (2 - x) / (1 - t)  # all data at 2
        >>> ddim_step(v, 0.0, 0.75, jnp.zeros((1, 1)), schedule=Linear())
        Array([[1.5]], dtype=float32)
    """
    check_velocity(v)
    check_state(x, "x")
    check_schedule(schedule)
    check_known("eta", eta)
    check_number("eta", eta, "[0, 1]")
    for name, value in (("noise", noise), ("first", first)):
        if value is not None:
            check_shape(name, value, x)
    if eta > 0 and noise is None:
        raise ValueError(f"noise must be given for eta > 0, got eta={eta}.")
    t, t_next = path_times(t, t_next, x)
    data, predicted_noise = data_and_noise(evaluate(v, t, x) if first is None else first, schedule, t, x)
    alpha_next, sigma_next = schedule.alpha(t_next), schedule.sigma(t_next)
    if eta > 0:
        kept, fresh = noise_shares(schedule.alpha(t), schedule.sigma(t), alpha_next, sigma_next, eta)
        predicted_noise = kept * predicted_noise + fresh * noise
    return (alpha_next * data + sigma_next * predicted_noise).astype(x.dtype)


@dataclass(frozen=True)
class DDIM:
    """DDIM: predict data d and noise n, and mix them anew at the levels of the next time.

    `x_n = alpha_n d + sqrt(sigma_n^2 - s^2) n + s z`, with z standard normal, `s = eta sigma_n sqrt(1 - e^-2h)` and
    `e^-h = alpha sigma_n / (alpha_n sigma)`.

    * `eta = 0` is deterministic and also runs backward, from data to noise. It is the exponential Euler method for the
      flow in log-SNR: order 1, exact where the data is one point. On a Gaussian of width w, with `tan(a) = alpha w /
      sigma`, each step multiplies the exact solution, measured from the mean, by `cos(a_n - a)`. On `Linear` it is the
      Euler method.
    * `eta = 1` draws from the posterior q(x_n | x, x1 = d): on `DDPM` the ancestral sampler with the lower of its two
      variances, and its like on every other schedule. Weak order 1, as for every eta above 0.

    One evaluation a step. Both ends may be singular, alpha = 0 or sigma = 0; the velocity is not evaluated at the last.

    Notebooks: (5.9), (5.10), (5.11), (5.12), (10.3).

    Attributes:
        schedule: of the affine path with a standard normal source that the velocity belongs to.
        eta: share of the posterior's noise, a number in [0, 1]. Above 0, time must run forward; step i draws its noise
            from `fold_in(key, i)`.

    Raises:
        ValueError: for another eta; from `sample`, for a start where the velocity does not tell data from noise.

    Example:
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> v = lambda t, x: (2 - x) / (1 - t)  # all data at 2
        >>> solution = sample(v, jnp.zeros((1, 1)), DDIM(Linear()), times=[0.0, 0.25, 0.5, 0.75])
        >>> solution.x, int(solution.calls)
        (Array([[1.5]], dtype=float32), 3)

    References:
        Song et al. 2020 (arXiv:2010.02502, eq. 12 and 16); Ho et al. 2020 (arXiv:2006.11239, eq. 7).
    """

    schedule: Schedule
    eta: float = 0.0
    order: ClassVar[int] = 1
    nfe_per_step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        check_known("eta", self.eta)  # whether there is noise at all
        check_setting(self, "eta", "[0, 1]")

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    @property
    def domain(self) -> tuple[float, float]:
        return range_of(self.schedule)

    def skips_last(self, times: ArrayTree) -> bool:
        """Whether the velocity is never called at the last of the times."""
        return True

    def solve(self, v: VelocityFn, key: Key | None, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        check_start(self.schedule, times)
        if key is not None:
            check_forward(times, self)

        def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
            noise = None if key is None else step_noise(key, i, x)
            return ddim_step(v, t, t_next, x, schedule=self.schedule, eta=self.eta, noise=noise), memory

        return run_steps(step, x0, times, spent(len(times) - 1, v), trajectory=trajectory)
