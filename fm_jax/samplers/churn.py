"""Churn: fresh noise before each step of an ODE solver, the stochastic sampler of EDM on any affine path."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from fm_jax.checks import check_number, check_pair, check_schedule, check_setting, check_shape, check_state, check_times
from fm_jax.nfe import spent
from fm_jax.samplers.grids import check_forward
from fm_jax.samplers.loop import run_steps, step_noise
from fm_jax.samplers.runge_kutta import Tableau, ode_step, path_times, tableau
from fm_jax.schedules import log_snr
from fm_jax.types import Array, ArrayTree, Key, Scalar, Schedule, Solution, State, VelocityFn

MOST_CHURN_A_STEP = math.sqrt(2) - 1
"""At the most the variance of the noise, in proportion to the signal, doubles."""
CHURN_RANGE = (0.05, 50.0)


def renoise(
    t: Scalar | float, t_next: Scalar | float, x: State, noise: State, *, schedule: Schedule, noise_scale: float = 1.0
) -> State:
    """Goes back along the path by adding noise: if x has the law p_t, the result has the law p_(t_next).

    `a x + sqrt(sigma_n^2 - a^2 sigma^2) noise` with `a = alpha_n / alpha`, the transition of the diffusion.

    Notebooks: (5.8).

    Args:
        t: time of `x`.
        t_next: not after `t`.
        x: the state.
        noise: standard normal.
        schedule: of the path.
        noise_scale: factor of the noise; any other than 1 leaves the path.

    Returns:
        The state at `t_next`; `x` itself where `t_next = t`.

    Raises:
        ValueError: if an argument is not what it should be.
    """
    check_state(x, "x")
    check_shape("noise", noise, x)
    check_schedule(schedule)
    check_number("noise_scale", noise_scale, "[0, inf)")
    t, t_next = path_times(t, t_next, x)
    alpha, alpha_next = schedule.alpha(t), schedule.alpha(t_next)
    # Where alpha = 0 there is no signal to scale.
    a = jnp.where(alpha > 0, alpha_next / jnp.where(alpha > 0, alpha, 1), 1)
    old, new = a * schedule.sigma(t), schedule.sigma(t_next)
    variance = (new - old) * (new + old)
    added = variance > 0
    return a * x + noise_scale * jnp.where(added, jnp.sqrt(jnp.where(added, variance, 1)), 0) * noise


def churn_step(
    v: VelocityFn,
    t: Scalar | float,
    t_next: Scalar | float,
    x: State,
    noise: State,
    *,
    schedule: Schedule,
    gamma: Scalar | float,
    t_first: Scalar | float = 0.0,
    churn_range: tuple[float, float] = CHURN_RANGE,
    noise_scale: float = 1.0,
    method: str | Tableau = "heun",
) -> State:
    """One step of `Churn`: from `t` back to t_hat by `renoise`, and from there to `t_next` by `ode_step`.

    Args:
        v: velocity function.
        t: time of `x`.
        t_next: after `t`.
        x: the state.
        noise: standard normal.
        schedule: of the path.
        gamma: t_hat has 1 + gamma times the noise-to-signal ratio of `t`.
        t_first: the earliest t_hat.
        churn_range: noise-to-signal ratios at which noise is added.
        noise_scale: factor of the noise.
        method: of the ODE step.

    Returns:
        The state at `t_next`, in the dtype of `x`.

    Raises:
        ValueError: if an argument is not what it should be.
    """
    check_state(x, "x")
    check_schedule(schedule)
    check_number("gamma", gamma, "[0, inf)")
    t, t_next = path_times(t, t_next, x)
    low, high = check_pair("churn_range", churn_range, "[0, inf]")
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    inside = (alpha > 0) & (sigma > 0) & (low * alpha <= sigma) & (sigma <= high * alpha)
    noisier = schedule.t_from_log_snr(log_snr(schedule, t) - 2 * jnp.log1p(gamma)).astype(t.dtype)
    # The inverse is rounded: without churn t must stay what it is, to the last bit.
    t_hat = jnp.where(inside & (gamma > 0), jnp.clip(noisier, t_first, t), t)
    x_hat = renoise(t, t_hat, x, noise, schedule=schedule, noise_scale=noise_scale).astype(x.dtype)
    return ode_step(v, t_hat, t_next, x_hat, method)


@dataclass(frozen=True)
class Churn:
    """An ODE solver that, before each step, adds noise and goes back in time accordingly: EDM's stochastic sampler.

    With r = sigma / alpha, the noise-to-signal ratio (EDM's sigma), a step from t with r inside `churn_range` is

        r_hat = (1 + gamma) r,    gamma = min(churn / num_steps, sqrt(2) - 1)
        x_hat = (alpha_hat / alpha) x + alpha_hat sqrt(r_hat^2 - r^2) noise_scale z,    z standard normal

    and an ODE step from (t_hat, x_hat) to the next time, t_hat being the time of r_hat. The added noise keeps the
    marginals: the error that earlier steps have made is partly forgotten, and the weak order is the order of `method`.
    t_hat does not go below the first time, so that the first step has no churn. Time must run forward; step i draws its
    noise from `fold_in(key, i)`. The velocity may be evaluated at the last time.

    Attributes:
        schedule: of the affine path with a standard normal source that the velocity belongs to.
        churn: the paper's S_churn, spread evenly over the steps. 0 is `RungeKutta(method)`.
        churn_range: the paper's (S_tmin, S_tmax): the least and the greatest r at which noise is added.
        noise_scale: the paper's S_noise. 1 is exact; the paper takes 1.003 on ImageNet and 1.007 on CIFAR-10, against
            networks that remove slightly too much noise.
        method: "euler", "midpoint", "heun", "ralston", "heun3", "rk4" or a tableau, as in `RungeKutta`.

    Raises:
        ValueError: for a bad method, a negative churn or noise scale, or a range that is not one.

    Example:
        >>> import jax
        >>> from fm_jax.samplers import sample
        >>> from fm_jax.schedules import Linear
        >>> v, x0 = lambda t, x: 2 - x, jnp.zeros((3, 1))
        >>> solution = sample(v, x0, Churn(Linear()), times=10, key=jax.random.key(0))
        >>> solution.x.shape, int(solution.calls)
        ((3, 1), 20)

    References:
        Karras et al. 2022 (arXiv:2206.00364, algorithm 2), there for alpha = 1.
    """

    schedule: Schedule
    churn: float = 40.0
    churn_range: tuple[float, float] = CHURN_RANGE
    noise_scale: float = 1.0
    method: str | Tableau = "heun"
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        tableau(self.method)
        check_setting(self, "churn", "[0, inf)")
        check_setting(self, "noise_scale", "[0, inf)")
        check_pair("churn_range", self.churn_range, "[0, inf]")

    @property
    def order(self) -> int:
        return tableau(self.method).order

    @property
    def nfe_per_step(self) -> int:
        return tableau(self.method).stages

    @property
    def domain(self) -> tuple[float, float]:
        return self.schedule.domain

    def solve(self, v: VelocityFn, key: Key, times: ArrayTree, x0: State, trajectory: bool) -> Solution:
        """Called by `sample`."""
        check_forward(times, self)
        check_times("times", times, self.domain, f"the domain of {self.schedule}")
        times = jnp.asarray(times)
        gamma = jnp.minimum(self.churn / (len(times) - 1), MOST_CHURN_A_STEP)

        def step(x: Array, memory: tuple[()], i: Array, t: Array, t_next: Array) -> tuple[Array, tuple[()]]:
            x = churn_step(
                v,
                t,
                t_next,
                x,
                step_noise(key, i, x),
                schedule=self.schedule,
                gamma=gamma,
                t_first=times[0],
                churn_range=self.churn_range,
                noise_scale=self.noise_scale,
                method=self.method,
            )
            return x, memory

        return run_steps(step, x0, times, spent((len(times) - 1) * self.nfe_per_step, v), trajectory=trajectory)
