"""The four descriptions of a Gaussian path, velocity, data, noise and score, and the way between them.

With `x_t = alpha x1 + sigma x0` and a standard normal x0, d = E[x1 | x_t] and n = E[x0 | x_t] obey

    alpha d + sigma n = x_t,    v = alpha' d + sigma' n,    score = grad log p_t(x_t) = -n / sigma

(Albergo et al. 2023, arXiv:2303.08797, sec. 4; Ma et al. 2024, arXiv:2401.08740, sec. 2.2, eq. 8 and 9). Any one of the
four gives the others, except where the division below is by zero; there the result is not finite, and `velocity_domain`
says so.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import (
    check_bool,
    check_condition,
    check_function,
    check_member,
    check_network,
    check_number,
    check_real,
    check_same_shape,
    check_schedule,
    check_shape,
    check_times,
    check_velocity,
    is_traced,
)
from fm_jax.nfe import Counted, cost, domain_of, overlap, reach_of, returns_of
from fm_jax.schedules import coefficients, known_to_stand_still, log_snr, vanishes
from fm_jax.self_conditioning import SELF_CONDITIONED
from fm_jax.shapes import batch_time, check_not_steps, time_of
from fm_jax.types import (
    KINDS,
    AnyArray,
    ApplyFn,
    Cond,
    Kind,
    Logits,
    ModelFn,
    Params,
    Prediction,
    Schedule,
    State,
    Time,
    VelocityFn,
)

ALL_TIMES = (0.0, 1.0)
"""From the source to the data."""


def convert(kind: Kind, value: State, t: Time, x_t: State, schedule: Schedule) -> Prediction:
    """All four descriptions from any one of them: the reparameterisations of a network, Tweedie's formula among them.

    Notebooks: (4.10), (5.6).

    Args:
        kind: what `value` is: "velocity", "data", "noise" or "score".
        value: the prediction.
        t: times.
        x_t: points on the path.
        schedule: of the path.

    Returns:
        `Prediction`. Not finite where the conversion has no solution: "data" at sigma = 0, "noise"
        and "score" at alpha = 0; the score is infinite at sigma = 0 whatever it comes from.

    Raises:
        ValueError: if `kind` is unknown, the shapes of `value` and `x_t` differ, or they are no real numbers.

    Example:
        >>> x = jnp.ones((1, 2))
        >>> from fm_jax.schedules import Linear
        >>> convert("data", jnp.zeros((1, 2)), 0.5, x, Linear()).velocity
        Array([[-2., -2.]], dtype=float32)
    """
    check_member("kind", kind, KINDS)
    check_same_shape(value=value, x_t=x_t)
    check_shape("value", value, x_t, "x_t")
    check_real("x_t", x_t)
    alpha, sigma, d_alpha, d_sigma = coefficients(schedule, time_of(t, x_t))
    if kind == "velocity":
        velocity = value
        determinant = alpha * d_sigma - sigma * d_alpha
        data = (d_sigma * x_t - sigma * velocity) / determinant
        noise = (alpha * velocity - d_alpha * x_t) / determinant
        return Prediction(velocity, data, noise, -noise / sigma)
    if kind == "data":
        data, noise = value, (x_t - alpha * value) / sigma
    else:
        noise = value if kind == "noise" else -sigma * value
        data = (x_t - sigma * noise) / alpha
    score = value if kind == "score" else -noise / sigma
    return Prediction(d_alpha * data + d_sigma * noise, data, noise, score)


def bind(apply_fn: ApplyFn, params: Params) -> ModelFn:
    """A network with its parameters bound, out of training: `model_fn(t, x, cond)`, of which a call is one evaluation.

    But for one that is `nfe.Counted` itself, as `self_conditioned` is: then a call costs what it says.

    Args:
        apply_fn: the network, as the losses see it.
        params: its parameters.

    Returns:
        `model_fn(t, x, cond=None)`, `nfe.Counted`. That of a self-conditioned network takes an `estimate` too, see
        `fm_jax.self_conditioning`.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> network = bind(lambda params, t, x, cond, *, train, rngs: params * x, 2.0)
        >>> network(0.5, jnp.ones((1, 2))), velocity_fn(network, "velocity", Linear()).nfe
        (Array([[2., 2.]], dtype=float32), 1)
    """
    check_network("apply_fn", apply_fn)

    def model_fn(t: Time, x: State, cond: Cond = None, *, estimate: Logits | None = None) -> AnyArray:
        told: Any = {} if estimate is None else {"estimate": estimate}
        if told:
            check_function("apply_fn", apply_fn, SELF_CONDITIONED, 4, train=False, rngs=None, **told)
        return apply_fn(params, t, x, cond, train=False, rngs=None, **told)

    evaluations = cost(apply_fn)
    return Counted(model_fn, 1 if evaluations is None else evaluations, returns=returns_of(apply_fn) or "prediction")


def velocity_fn(model_fn: ModelFn, kind: Kind, schedule: Schedule, cond: Cond = None) -> VelocityFn:
    """The velocity function of a network: what every sampler takes.

    Notebooks: (5.6).

    Args:
        model_fn: `model_fn(t, x, cond)`, a network with its parameters bound, as by `bind`. A call of the result costs
            what a call of it does: 1 from `bind`, unknown for any other function that is not `nfe.Counted`.
        kind: what it predicts.
        schedule: of the path it was trained on.
        cond: conditioning [batch, ...] or `None`.

    Returns:
        `v(t, x)`. Where `velocity_domain(kind, schedule)` is less than [0, 1], it carries that domain: `sample` takes a
        number of steps over it, and refuses times at which `v` would be called outside of it.
        `dataclasses.replace(v, domain=velocity_domain(kind, schedule, margin=1e-5))` has another margin. It is still
        known under `jax.jit`; a `lambda` around `v` hides it, and is then asked where the velocity is not finite:
        `nfe.Counted(lambda t, x: ..., None, v.domain)` says it again.

    Raises:
        ValueError: if `model_fn` is no function, `kind` is unknown or `schedule` is none; when called, if the network
            does not return real numbers in the shape of x, or `cond` has another batch.
    """
    check_network("model_fn", model_fn, "a function model_fn(t, x, cond), as by bind(apply_fn, params)")
    check_member("kind", kind, KINDS)
    check_schedule(schedule)

    def velocity(t: Time, x: State) -> State:
        check_real("x", x)
        check_condition(x, cond)
        prediction = model_fn(batch_time(t, x), x, cond)
        check_shape("what the network returns", prediction, x)
        if kind == "velocity":
            return prediction
        return convert(kind, prediction, t, x, schedule).velocity

    domain = velocity_domain(kind, schedule)
    narrower = domain[0] > ALL_TIMES[0] or domain[1] < ALL_TIMES[1]
    return Counted(velocity, cost(model_fn), *((domain, ALL_TIMES) if narrower else ()))


def score_fn(v: VelocityFn, schedule: Schedule) -> VelocityFn:
    """The score function `grad log p_t(x)` of the marginals that a velocity function carries; infinite where sigma = 0.

    Notebooks: (5.6).

    Args:
        v: velocity function of an affine path with a standard normal source.
        schedule: of that path.

    Returns:
        `score(t, x)`, called as `v` is.
    """
    check_velocity(v)
    check_schedule(schedule)

    def score(t: Time, x: State) -> State:
        check_real("x", x)
        velocity = v(t, x)
        check_shape("v(t, x)", velocity, x)
        return convert("velocity", velocity, t, x, schedule).score

    return Counted(score, cost(v), domain_of(v), reach_of(v))


def velocity_domain(kind: Kind, schedule: Schedule, margin: float = 1e-3) -> tuple[float, float]:
    """The range of times on which the velocity of a network of this kind is finite.

    It is `schedule.domain`, less `margin` at the end where the conversion divides by zero: sigma = 0 for "data",
    alpha = 0 for "noise" and "score". There it also begins no earlier than where the signal is `margin` of the noise:
    on `Polynomial(2)` alpha is 1e-6 at t = 0.001, where a prediction rounded to float32 says nothing of the data.
    Samplers go from its lower to its upper end.

    Args:
        kind: what the network predicts.
        schedule: of the path.
        margin: distance kept from the singular time, and least signal-to-noise ratio alpha / sigma there.

    Returns:
        (t_min, t_max).
    """
    check_member("kind", kind, KINDS)
    check_schedule(schedule)
    check_number("margin", margin, "(0, 0.5)")
    t_min, t_max = schedule.domain
    if kind == "data" and vanishes(schedule.sigma, t_max):
        t_max -= margin
    if kind in ("noise", "score") and vanishes(schedule.alpha, t_min):
        t_min += margin
        with jax.ensure_compile_time_eval():
            faint = schedule.t_from_log_snr(jnp.asarray(2 * math.log(margin), dtype=float))
        t_min = t_min if is_traced(faint) else max(t_min, float(faint))
    return t_min, t_max


def conversion_domain(schedule: Schedule, margin: float = 1e-3) -> tuple[float, float]:
    """The range of times on which a velocity says what the data and the noise are.

    It is `schedule.domain`, less `margin` at an end where the log-SNR stands still, alpha sigma' = sigma alpha'. Of
    the schedules here only `Polynomial` with n > 1 does so, at t = 0. Samplers that work with data and noise go from
    its lower to its upper end; the score is still infinite where sigma = 0.

    Args:
        schedule: of the path.
        margin: distance kept from such a time.

    Returns:
        (t_min, t_max).
    """
    check_schedule(schedule)
    check_number("margin", margin, "(0, 0.5)")

    def kept_from(t: float) -> float:
        return margin * known_to_stand_still(schedule, t)

    t_min, t_max = schedule.domain
    return t_min + kept_from(t_min), t_max - kept_from(t_max)


def reschedule_domain(old_schedule: Schedule, new_schedule: Schedule) -> tuple[float, float]:
    """The range of times on the new schedule at which its signal-to-noise ratio is one of the old schedule's.

    That is where `reschedule` is exact. From `Linear` to `Cosine` it is all of [0, 1]; from `VP`, whose source still
    carries some signal, `Linear` begins at 0.0065.

    Args:
        old_schedule: the schedule that a model was trained on; its times are those of `conversion_domain`.
        new_schedule: the schedule to sample on.

    Returns:
        (r_min, r_max), inside `new_schedule.domain`.

    Raises:
        ValueError: if the two have no signal-to-noise ratio in common.

    Example:
        >>> from fm_jax.schedules import VP, Linear
        >>> [round(r, 4) for r in reschedule_domain(VP(), Linear())]
        [0.0065, 0.999]
    """
    check_schedule(old_schedule, "old_schedule")
    check_schedule(new_schedule, "new_schedule")
    return _rescheduled(conversion_domain(old_schedule), old_schedule, new_schedule)


def _rescheduled(old_times: tuple[float, float], old_schedule: Schedule, new_schedule: Schedule) -> tuple[float, float]:
    """The times on the new schedule that have the signal-to-noise ratios of a range of times on the old one."""
    reached, own = _log_snrs(old_schedule, old_times), _log_snrs(new_schedule, new_schedule.domain)
    if reached is None or own is None:
        raise ValueError(f"old_schedule and new_schedule must have known settings, got {old_schedule}, {new_schedule}.")
    with jax.ensure_compile_time_eval():
        low, high = (float(new_schedule.t_from_log_snr(jnp.asarray(each))) for each in reached)
    r_min = new_schedule.domain[0] if own[0] >= reached[0] else low
    r_max = new_schedule.domain[1] if own[1] <= reached[1] else high
    if not r_min < r_max:
        raise ValueError(f"{new_schedule} and {old_schedule} have no signal-to-noise ratio in common.")
    return r_min, r_max


def _log_snrs(schedule: Schedule, times: tuple[float, float]) -> tuple[float, float] | None:
    """At both ends of a range of times; `None` where the schedule has a traced setting."""
    with jax.ensure_compile_time_eval():
        first, last = (log_snr(schedule, jnp.asarray(t, dtype=float)) for t in times)
    return None if is_traced(first) or is_traced(last) else (float(first), float(last))


def reschedule(v: VelocityFn, old_schedule: Schedule, new_schedule: Schedule, *, clip: bool = False) -> VelocityFn:
    """The velocity of another schedule from a model trained on the old one, exactly and without training.

    At new time r the old time t(r) has the same signal-to-noise ratio, and x scales by s(r), the ratio of the norms
    of (alpha, sigma). Then `v_new(r, x) = s' x / s + s t' v(t, x / s)` (Pokle et al. 2023, arXiv:2310.04432; Shaul et
    al. 2023, arXiv:2310.19075). t' and s' come from the angle atan2(alpha, sigma), which is smooth where the SNR is 0
    or infinite.

    Notebooks: (10.1), (10.2).

    Args:
        v: velocity function on `old_schedule`.
        old_schedule: the schedule it was trained on.
        new_schedule: the schedule to sample on.
        clip: what to do where the SNR is none of the old schedule's, outside of `reschedule_domain`. By default such
            times are refused. With `clip` t stays at the nearest end of the old schedule, or of the domain that `v`
            carries, and x only scales: sampling starts, or ends, with the law that the old model has there, noise and
            data in the proportion of its end.

    Returns:
        `v_new(r, x)`, called as `v` is. Without `clip` it carries its domain, over which `sample` takes its steps and
        outside of which it refuses times.

    Raises:
        ValueError: for what is no velocity or no schedule; when called, for an r outside of the domain that is known,
            as it is in `sample`. One that is traced gives NaN there.
    """
    check_velocity(v)
    check_bool("clip", clip)
    check_schedule(old_schedule, "old_schedule")
    check_schedule(new_schedule, "new_schedule")
    convertible = conversion_domain(old_schedule)
    old_domain = overlap(convertible, domain_of(v)) or convertible
    reached = _log_snrs(old_schedule, old_domain)
    known = reached is not None and _log_snrs(new_schedule, new_schedule.domain) is not None
    domain = _rescheduled(old_domain, old_schedule, new_schedule) if known else new_schedule.domain
    reach = None
    if known and not clip and (old_reach := reach_of(v)) is not None:
        reach = _rescheduled(overlap(convertible, old_reach) or convertible, old_schedule, new_schedule)
    allowed = new_schedule.domain if clip else domain

    def new_velocity(r: Time, x: State) -> State:
        check_not_steps("r", r)
        check_times("r", r, allowed, f"the domain of {new_schedule}" if clip else "where the old schedule has its SNR")
        r = time_of(r, x)
        new = coefficients(new_schedule, r)
        inside = (r >= domain[0]) & (r <= domain[1])
        new_log_snr = 2 * (jnp.log(new.alpha) - jnp.log(new.sigma))
        if reached is not None:
            new_log_snr = jnp.clip(new_log_snr, *reached)  # beyond, it may have no inverse
        t = old_schedule.t_from_log_snr(new_log_snr)
        t = jnp.clip(t, *old_domain).astype(r.dtype)  # the inverse may leave the domain by a rounding error
        old = coefficients(old_schedule, t)
        new_norm2, old_norm2 = new.alpha**2 + new.sigma**2, old.alpha**2 + old.sigma**2
        d_angle_new = (new.d_alpha * new.sigma - new.alpha * new.d_sigma) / new_norm2
        d_angle_old = (old.d_alpha * old.sigma - old.alpha * old.d_sigma) / old_norm2
        d_t = jnp.where(inside, d_angle_new / d_angle_old, 0)
        s = jnp.sqrt(new_norm2 / old_norm2)
        d_log_s = (new.alpha * new.d_alpha + new.sigma * new.d_sigma) / new_norm2 - d_t * (
            old.alpha * old.d_alpha + old.sigma * old.d_sigma
        ) / old_norm2
        velocity = v(t.reshape(t.shape[:1]), x / s)
        check_shape("v(t, x)", velocity, x)
        found = d_log_s * x + s * d_t * velocity
        return found if clip else jnp.where(inside, found, jnp.nan)

    return Counted(new_velocity, cost(v), None if clip else domain, reach)
