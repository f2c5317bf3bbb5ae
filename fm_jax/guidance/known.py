"""Samples of which a part is known: pixels around a hole, the first frame of a video."""

import jax.numpy as jnp

from fm_jax.checks import check_same_shape, check_schedule, check_shape, check_state, check_velocity, check_where
from fm_jax.nfe import Counted, cost, domain_of, reach_of
from fm_jax.schedules import coefficients
from fm_jax.shapes import time_of
from fm_jax.types import Array, Schedule, State, Time, VelocityFn


def keep_known(v: VelocityFn, schedule: Schedule, x0: State, x1: State, mask: Array) -> VelocityFn:
    """The velocity that takes what is known along its own path, `alpha x1 + sigma x0`, and lets `v` see it there.

    Where `mask` is true the velocity is `alpha' x1 + sigma' x0`: an ODE that starts on the path ends at `x1`, to the
    accuracy of the sampler. Elsewhere it is `v` at the state with the known part put in its place. What is drawn there
    fits the known part only as far as `v` makes it: it is not a draw of the conditional law, unless the two parts are
    independent. A network that was trained with the mask and the known part as a condition draws from that law.

    Args:
        v: velocity function, of a path with this schedule.
        schedule: of the path.
        x0: the noise that sampling starts from, [batch, ...].
        x1: data, of which what is known counts, [batch, ...].
        mask: where they are known, bool, broadcast to the state.

    Returns:
        `v(t, x)`; a call of it costs one of `v`. Start where `mask` is true from `alpha(t0) x1 + sigma(t0) x0`.

    Raises:
        ValueError: if `mask` is not bool or does not broadcast to the state, or `x0` and `x1` have two shapes.

    Example:
        >>> from fm_jax.schedules import Linear
        >>> x0, x1, mask = jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([True, False])
        >>> keep_known(lambda t, x: x, Linear(), x0, x1, mask)(0.5, jnp.full((1, 2), 7.0))
        Array([[1., 7.]], dtype=float32)

    References:
        Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", appendix I.2;
        Lugmayr et al. 2022, "RePaint", equation 8.
    """
    check_velocity(v)
    check_schedule(schedule)
    check_state(x0, "x0")
    check_state(x1, "x1")
    check_same_shape(x0=x0, x1=x1)
    check_where("mask", mask, x1)
    known = jnp.broadcast_to(mask, x1.shape)

    def kept(t: Time, x: State) -> State:
        check_same_shape(x=x, x1=x1)
        a, s, da, ds = coefficients(schedule, time_of(t, x))
        inside = jnp.where(known, (a * x1 + s * x0).astype(x.dtype), x)
        rest = v(t, inside)
        check_shape("v(t, x)", rest, x)
        return jnp.where(known, (da * x1 + ds * x0).astype(x.dtype), rest)

    return Counted(kept, cost(v), domain_of(v), reach_of(v))
