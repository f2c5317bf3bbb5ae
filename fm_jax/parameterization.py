"""The four descriptions of a Gaussian path, velocity, data, noise and score, and the way between them.

With `x_t = alpha x1 + sigma x0` and a standard normal x0, d = E[x1 | x_t] and n = E[x0 | x_t] obey

    alpha d + sigma n = x_t,    v = alpha' d + sigma' n,    score = grad log p_t(x_t) = -n / sigma

(Albergo et al. 2023, arXiv:2303.08797, sec. 4; Ma et al. 2024, arXiv:2401.08740, sec. 2.3). Any one of the four gives
the others, except where the division below is by zero; there the result is not finite, and `velocity_domain` says so.
"""

import jax
import jax.numpy as jnp

from fm_jax.checks import check_condition, check_member, check_same_shape, check_schedule
from fm_jax.nfe import Counted, cost
from fm_jax.schedules import coefficients, stands_still, vanishes
from fm_jax.shapes import batch_time, expand_time, time_dtype
from fm_jax.types import KINDS, ApplyFn, Cond, Kind, ModelFn, Params, Prediction, Schedule, State, Time, VelocityFn


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
        ValueError: if `kind` is unknown or the shapes of `value` and `x_t` differ.

    Example:
        >>> x = jnp.ones((1, 2))
        >>> from fm_jax.schedules import Linear
        >>> convert("data", jnp.zeros((1, 2)), 0.5, x, Linear()).velocity
        Array([[-2., -2.]], dtype=float32)
    """
    check_member("kind", kind, KINDS)
    check_same_shape(value=value, x_t=x_t)
    alpha, sigma, d_alpha, d_sigma = coefficients(schedule, expand_time(t, x_t))
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

    Args:
        apply_fn: the network, as the losses see it.
        params: its parameters.

    Returns:
        `model_fn(t, x, cond=None)`, `nfe.Counted` as 1.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> network = bind(lambda params, t, x, cond, *, train, rngs: params * x, 2.0)
        >>> network(0.5, jnp.ones((1, 2))), velocity_fn(network, "velocity", Linear()).nfe
        (Array([[2., 2.]], dtype=float32), 1)
    """

    def model_fn(t: Time, x: State, cond: Cond = None) -> State:
        return apply_fn(params, t, x, cond, train=False, rngs=None)

    return Counted(model_fn, 1)


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
        `v(t, x)`.
    """
    check_member("kind", kind, KINDS)
    check_schedule(schedule)

    def velocity(t: Time, x: State) -> State:
        check_condition(x, cond)
        prediction = model_fn(batch_time(t, x), x, cond)
        if kind == "velocity":
            return prediction
        return convert(kind, prediction, t, x, schedule).velocity

    return Counted(velocity, cost(model_fn))


def score_fn(v: VelocityFn, schedule: Schedule) -> VelocityFn:
    """The score function `grad log p_t(x)` of the marginals that a velocity function carries; infinite where sigma = 0.

    Notebooks: (5.6).

    Args:
        v: velocity function of an affine path with a standard normal source.
        schedule: of that path.

    Returns:
        `score(t, x)`, called as `v` is.
    """

    def score(t: Time, x: State) -> State:
        return convert("velocity", v(t, x), t, x, schedule).score

    return Counted(score, cost(v))


def velocity_domain(kind: Kind, schedule: Schedule, margin: float = 1e-3) -> tuple[float, float]:
    """The range of times on which the velocity of a network of this kind is finite.

    It is `schedule.domain`, less `margin` at the end where the conversion divides by zero: sigma = 0 for "data",
    alpha = 0 for "noise" and "score". Samplers go from its lower to its upper end.

    Args:
        kind: what the network predicts.
        schedule: of the path.
        margin: distance kept from the singular time.

    Returns:
        (t_min, t_max).
    """
    check_member("kind", kind, KINDS)
    t_min, t_max = schedule.domain
    if kind == "data" and vanishes(schedule.sigma, t_max):
        t_max -= margin
    if kind in ("noise", "score") and vanishes(schedule.alpha, t_min):
        t_min += margin
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

    def kept_from(t: float) -> float:
        with jax.ensure_compile_time_eval():
            return margin * bool(stands_still(schedule, jnp.asarray(t, dtype=float)))

    t_min, t_max = schedule.domain
    return t_min + kept_from(t_min), t_max - kept_from(t_max)


def reschedule(v: VelocityFn, old_schedule: Schedule, new_schedule: Schedule) -> VelocityFn:
    """The velocity of another schedule from a model trained on the old one, exactly and without training.

    At new time r the old time t(r) has the same signal-to-noise ratio, and x scales by s(r), the ratio of the norms
    of (alpha, sigma). Then `v_new(r, x) = s' x / s + s t' v(t, x / s)` (Pokle et al. 2023, arXiv:2310.04432, prop. 1;
    Shaul et al. 2023, arXiv:2310.19075). t' and s' come from the angle atan2(alpha, sigma), which is smooth where the
    SNR is 0 or infinite.

    Notebooks: (10.1), (10.2).

    Args:
        v: velocity function on `old_schedule`.
        old_schedule: the schedule it was trained on.
        new_schedule: the schedule to sample on. Where its SNR is outside the old one's range, t leaves [0, 1], and
            where it is 0 or infinite the result is not finite: sample between the times that have the SNR of the old
            ends.

    Returns:
        `v_new(r, x)`, called as `v` is.
    """

    def new_velocity(r: Time, x: State) -> State:
        new = coefficients(new_schedule, r)
        t = old_schedule.t_from_log_snr(2 * (jnp.log(new.alpha) - jnp.log(new.sigma))).astype(time_dtype(x))
        old = coefficients(old_schedule, t)
        new_norm2, old_norm2 = new.alpha**2 + new.sigma**2, old.alpha**2 + old.sigma**2
        d_angle_new = (new.d_alpha * new.sigma - new.alpha * new.d_sigma) / new_norm2
        d_angle_old = (old.d_alpha * old.sigma - old.alpha * old.d_sigma) / old_norm2
        d_t = d_angle_new / d_angle_old
        s = jnp.sqrt(new_norm2 / old_norm2)
        d_log_s = (new.alpha * new.d_alpha + new.sigma * new.d_sigma) / new_norm2 - d_t * (
            old.alpha * old.d_alpha + old.sigma * old.d_sigma
        ) / old_norm2
        return expand_time(d_log_s, x) * x + expand_time(s * d_t, x) * v(t, x / expand_time(s, x))

    return Counted(new_velocity, cost(v))
