"""What the exponential integrators share: signal and noise levels on the whole grid, and the first-order step.

Along an affine path `x_t = alpha x1 + sigma x0` the flow is solved by variation of constants in half the log-SNR,
`lambda = log(alpha / sigma)`. From t to t_n, a step of length `h = lambda_n - lambda`, with d and n the predictions of
data and noise along the flow,

    x_n = (sigma_n / sigma) x + sigma_n int e^l d(l) dl = (alpha_n / alpha) x - alpha_n int e^-l n(l) dl

(Lu et al. 2022, arXiv:2206.00927, prop. 3.1; arXiv:2211.01095, prop. 4.1). With d, or n, constant both are
`x_n = alpha_n d + sigma_n n`, which is DDIM and stays finite where alpha or sigma is 0. The methods differ in how they
add the change of d or n over the step.

The velocity gives d and n wherever the path moves: not at a time at which both alpha' and sigma' are 0, as with
`Polynomial(2)` at t = 0, which is refused as a start.

All levels depend on the grid alone, so that they are computed once, before the scan, and indexed by the step's number.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.checks import check_times
from fm_jax.parameterization import conversion_domain, convert
from fm_jax.samplers.grids import first_time
from fm_jax.schedules import known_to_stand_still
from fm_jax.shapes import time_dtype
from fm_jax.types import AnyArray, Array, ArrayTree, Elementwise, Schedule, State, Time


class Levels(NamedTuple):
    """Levels on a grid: `alpha`, `sigma`, `half_log_snr` [num_steps + 1], and the steps `h`, `regular` [num_steps].

    A step is `regular` if its length in lambda is neither infinite nor zero. Where it is not, or where lambda is not
    finite, `h` and `half_log_snr` hold harmless numbers, so that what is computed from them has no NaN to hide.
    """

    alpha: Array
    sigma: Array
    half_log_snr: Array
    h: Array
    regular: Array

    def order(self, most: int) -> Array:
        """The order [num_steps] that each step can have: one more than the regular steps just before it, if regular.

        An interval of infinite length in lambda is stepped with order 1, and polynomials do not reach across it.
        """
        i = jnp.arange(len(self.h))
        last_irregular = jax.lax.cummax(jnp.where(self.regular, -1, i))
        return jnp.clip(i - last_irregular, 1, most)

    def h_before(self, steps: int) -> Array:
        """`h` of the step that many steps earlier, [num_steps]; that of the first step where there is none."""
        return jnp.concatenate([jnp.repeat(self.h[:1], steps), self.h])[: len(self.h)]


def range_of(schedule: Schedule) -> tuple[float, float]:
    """The range of times of samplers that work with data and noise: from where the velocity tells them to the data.

    At the end nothing is evaluated, so that it is 1 also where the schedule has an infinite slope there.
    """
    return conversion_domain(schedule)[0], 1.0


def check_start(schedule: Schedule, times: ArrayTree) -> None:
    """Raises `ValueError` if the velocity says nothing of data and noise at the first time, where that is known."""
    first = first_time(times)
    if first is not None:
        check_times("the first of times", first, schedule.domain, f"the domain of {schedule}")
    if first is not None and known_to_stand_still(schedule, first):
        raise ValueError(
            f"The velocity says nothing of data and noise where the log-SNR stands still, at t = {first} on "
            f"{schedule}: start or end short of it, e.g. at t = 0.001."
        )


def levels(schedule: Schedule, times: AnyArray) -> Levels:
    """`Levels` of a schedule on the times [num_steps + 1]."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    finite = (alpha > 0) & (sigma > 0)
    # Ones before the logarithm as well: a NaN that only `where` hides comes back in the gradient.
    half_log_snr = jnp.log(jnp.where(finite, alpha, 1)) - jnp.log(jnp.where(finite, sigma, 1))
    h = jnp.diff(half_log_snr)
    regular = finite[:-1] & finite[1:] & (h != 0)
    return Levels(alpha, sigma, half_log_snr, jnp.where(regular, h, jnp.sign(times[-1] - times[0])), regular)


def data_and_noise(velocity: State, schedule: Schedule, t: Time, x: State) -> tuple[State, State]:
    """The predictions of data and noise from the velocity."""
    prediction = convert("velocity", velocity, t, x, schedule)
    return prediction.data.astype(time_dtype(x)), prediction.noise.astype(time_dtype(x))


def phi(k: int, z: Elementwise) -> Elementwise:
    """`phi_k(z) = int_0^1 e^((1 - s) z) s^(k - 1) / (k - 1)! ds`; `phi_1(z) = (e^z - 1) / z`.

    The functions of exponential integrators (Hochbruck & Ostermann 2010, Acta Numerica 19). The recursion
    `phi_k+1 = (phi_k - 1 / k!) / z` loses all digits near 0, where the power series serves.
    """
    near = jnp.abs(z) < 1
    small, large = jnp.where(near, z, 0), jnp.where(near, 1, z)
    series = jnp.zeros_like(z)
    for j in reversed(range(18)):
        series = series * small + 1 / math.factorial(j + k)
    recursion = jnp.exp(large)
    for j in range(k):
        recursion = (recursion - 1 / math.factorial(j)) / large
    return jnp.where(near, series, recursion)
