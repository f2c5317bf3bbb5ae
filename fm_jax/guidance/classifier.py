"""Classifier guidance: an unconditional velocity led by the gradient of a classifier of noisy data."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fm_jax.checks import check_function, check_numbers_of, check_schedule, check_shape, check_state, check_velocity
from fm_jax.guidance.scale import check_interval, check_scale, is_number, scale_at
from fm_jax.nfe import Counted, cost, domain_of, reach_of
from fm_jax.parameterization import velocity_domain
from fm_jax.schedules import coefficients, vanishes
from fm_jax.shapes import batch_time, check_not_steps, expand_time, time_dtype
from fm_jax.types import Array, ArrayTree, PerExample, Schedule, State, Time, VelocityFn


def classifier(
    v: VelocityFn,
    log_prob_fn: Callable[[PerExample, State], PerExample],
    scale: ArrayTree,
    schedule: Schedule,
    *,
    interval: tuple[float, float] | None = None,
) -> VelocityFn:
    """The guided velocity `v + scale c(t) grad_x log p(y | t, x)`, with `c = sigma (sigma alpha' / alpha - sigma')`.

    c is what turns a score into a velocity: v = (alpha' / alpha) x + c score. By Bayes' rule the gradient is the
    conditional less the unconditional score, so that with the exact classifier scale 1 gives the conditional velocity
    and scale s that of `classifier_free`. **Scale 0 is off**, unlike there, since `v` is unconditional.

    Where alpha = 0, at t = 0 of most schedules, c is infinite. The gradient of an exact classifier vanishes like alpha,
    that of a trained one does not quite: its error is multiplied by 1 / alpha. Let a trained classifier guide from
    later on, say t = 0.1, by `interval`.

    Notebooks: (6.2), (6.3).

    Args:
        v: unconditional velocity function.
        log_prob_fn: `log_prob_fn(t, x)` with t [batch]: log p(y | t, x) [batch] of the class that
            each example is led towards. Must treat each example on its own.
        scale: a number, or [batch]. 0 is off (`v` itself is returned for the number 0).
        schedule: of the path that `v` and the classifier were trained on.
        interval: guidance only for t inside, `v` alone outside. `None` is all of the times at which c is finite,
            `velocity_domain("score", schedule)`. The velocity jumps at its ends: start sampling from the lower, or put
            it on the time grid.

    Returns:
        `v(t, x)`; a call of it costs what one of `v` does: evaluations of the classifier are not counted.

    Raises:
        ValueError: if `scale` is not finite or has two axes, or `interval` is reversed or has times at which c is
            infinite; when called, if `log_prob_fn` returns another shape than [batch].

    Example:
        >>> from fm_jax.schedules import Linear
        >>> guided = classifier(lambda t, x: 0 * x, lambda t, x: x.sum(axis=1), 3.0, Linear())
        >>> guided(0.5, jnp.zeros((1, 2)))
        Array([[3., 3.]], dtype=float32)

    References:
        Dhariwal & Nichol 2021 (arXiv:2105.05233, sec. 4).
    """
    check_velocity(v)
    check_function("log_prob_fn", log_prob_fn, "a function log_prob_fn(t, x) -> [batch]", 2)
    check_scale(scale)
    check_schedule(schedule)
    interval = velocity_domain("score", schedule) if interval is None else interval
    check_interval(interval)
    start, end = interval
    domain = schedule.domain
    if start < domain[0] or end > domain[1]:
        raise ValueError(f"interval must be inside the domain of the schedule, {domain}, got {(start, end)}.")
    if vanishes(schedule.alpha, start):
        raise ValueError(
            f"interval must start where alpha > 0, got {(start, end)}: classifier guidance divides by alpha, which is "
            f"0 at t = {start} for {schedule}. The default starts at {velocity_domain('score', schedule)[0]}."
        )
    if is_number(scale, 0):
        return v

    def guided(t: Time, x: State) -> State:
        check_not_steps("t", t)
        # Outside the interval 0 multiplies what the nearest time inside gives, and not what may be infinite.
        inside_t = jnp.clip(jnp.asarray(t, dtype=time_dtype(x)), start, end)

        def total_log_prob(x: Array) -> Array:
            log_prob = log_prob_fn(batch_time(inside_t, x), x)
            check_numbers_of("log_prob_fn(t, x)", log_prob, x, scalar=False)
            check_state(log_prob, "log_prob_fn(t, x)")  # integers have no gradient
            return log_prob.sum()

        alpha, sigma, d_alpha, d_sigma = coefficients(schedule, inside_t)
        weight = scale_at(scale, t, x, interval=(start, end), outside=0) * sigma * (sigma * d_alpha / alpha - d_sigma)
        velocity = v(t, x)
        check_shape("v(t, x)", velocity, x)
        return velocity + expand_time(weight, x) * jax.grad(total_log_prob)(x)

    return Counted(guided, cost(v), domain_of(v), reach_of(v))
