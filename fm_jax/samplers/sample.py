"""The one entry to sampling."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import (
    check_bool,
    check_event,
    check_finite,
    check_has,
    check_key,
    check_times,
    check_tokens,
    check_velocity,
    check_where,
    is_traced,
    shown,
)
from fm_jax.nfe import domain_of, reach_of
from fm_jax.parameterization import ALL_TIMES
from fm_jax.samplers.grids import time_grid
from fm_jax.samplers.runge_kutta import RungeKutta
from fm_jax.shapes import check_not_steps
from fm_jax.types import Array, ArrayTree, DenoiserFn, Key, RateFn, Sampler, Solution, State, TokenState, VelocityFn

DEFAULT_STEPS = 20
SOURCE_TO_DATA = "from source to data unless nfe.Counted gives v another domain"
_MIDPOINT = RungeKutta("midpoint")


def sample(
    v: VelocityFn | RateFn | DenoiserFn,
    x0: State | TokenState,
    sampler: Sampler = _MIDPOINT,
    *,
    times: int | ArrayTree | None = None,
    key: Key | None = None,
    trajectory: bool = False,
    keep: Array | None = None,
) -> Solution:
    """Samples: the flow dx/dt = v(t, x), or the SDE with its marginals (its SDE extension), or a chain of tokens.

    Any sampler of `fm_jax.samplers` is run by this function, and any dataclass of your own that keeps to
    `fm_jax.types.Sampler`. With fixed steps it is one `lax.scan`, differentiable in forward and reverse mode; samplers
    of the flow also with respect to traced `times`. Wrap it in `jax.jit`.

    Notebooks: (1.1).

    Args:
        v: velocity function; called with a scalar t in float32 or better, or with t [batch] where each example has its
            own steps (`Adaptive(per_sample=True)`, `FirstHitting`). Of tokens rates, for `TauLeaping`, or a denoiser.
        x0: the state at the first time, floating point and finite. Where that is t0 > 0, as 0.001 for a network of
            noise or score on `Linear`, or where sigma(0) is not 1, as on `VE`, it is the standard normal times
            `paths.start(schedule, t0).scale`. At 0.001 that is 0.999 on `Linear` and nearer to 1 on `Cosine`: there
            standard normal noise serves as well. Of tokens integers, as the source of their path draws them. Some
            may be given, as a prompt: in place of masks they are kept by every sampler that does not mask them again.
        sampler: how to follow it: `RungeKutta("heun")`, `Adaptive()`, `DDIM(schedule)`, `EulerMaruyama(schedule)`, ...
        times: how many even steps to take over the sampler's range, from source to data, 20 by default; or the times
            themselves, [num + 1] and strictly monotone, as from `samplers.grids`. Decreasing ones run backward, from
            data to noise. An adaptive sampler chooses its own steps from the first time to the last. A velocity that
            `velocity_fn` made of data, noise or score carries its `velocity_domain`: a number of steps keeps to it, and
            other times are refused, but for the last where the sampler does not call `v` there (as Euler's method and
            DDIM to t = 1).
        key: typed key, for a sampler that draws noise and for no other.
        trajectory: whether to keep the states at all times.
        keep: bool, broadcast to `x0`: where tokens stay as they are, to the bit, also under correctors and remasking,
            and from a source without a mask. The law of the others is that given these only with a mask. For flows
            there is `guidance.keep_known`.

    Returns:
        `Solution`: x [batch, ...] at the last time, in the dtype of `x0`; calls of `v` and network evaluations,
        scalars, or [batch] where each example has its own steps; trajectory [num + 1, batch, ...] if asked for.

    Raises:
        ValueError: for what is no velocity function or no sampler; bad times or a bad state; tokens for a sampler of
            points, points for one of tokens; `keep` without tokens; times known to leave [0, 1], or the domain that `v`
            carries (`nfe.Counted`); a key that is missing or not needed; and what the sampler refuses, such as a start
            where its predictions are infinite.
        ImportError: if the sampler needs Diffrax and it is missing.

    Example:
        >>> solution = sample(lambda t, x: x, jnp.ones((1, 1)), RungeKutta("rk4"), times=10)
        >>> float(abs(solution.x[0, 0] - jnp.e)) < 1e-5, int(solution.calls)
        (True, 40)
    """
    check_velocity(v)
    check_sampler(sampler)
    _check_kind(x0, sampler)
    x0 = as_tokens("x0", x0) if is_of_tokens(sampler) else as_state("x0", x0)
    more = {} if keep is None else {"keep": _as_kept(keep, x0, sampler)}
    check_bool("trajectory", trajectory)
    if sampler.stochastic:
        if key is None:
            raise ValueError(f"key must be given: {sampler} draws noise on the way.")
        check_key(key)
    elif key is not None:
        raise ValueError(f"key must be None for {sampler}, which draws no noise, got {shown(key)}.")
    own = own_times_of(sampler)
    if own is not None:
        if times is not None:
            raise ValueError(f"times must be None: {sampler} has its own, got {shown(times)}.")
        _check_domain("the sampler's times", own, v, sampler)
        return sampler.solve(v, key, own, x0, trajectory)
    return sampler.solve(v, key, times_of(v, sampler, times, x0), x0, trajectory, **more)


def times_of(
    v: VelocityFn,
    sampler: Sampler,
    times: int | ArrayTree | None,
    x: ArrayTree,
    default: int = DEFAULT_STEPS,
    *,
    backward: bool = False,
) -> ArrayTree:
    """The times of a solve, for `sample` and for whoever puts more to the state and so must know them before.

    With `backward` the solve goes through them from the last to the first.

    Raises:
        ValueError: as `sample`, and for a sampler that goes through times of its own.
    """
    check_velocity(v)
    check_sampler(sampler)
    if own_times_of(sampler) is not None:
        raise ValueError(f"sampler must go through any times, in either direction, got {sampler}, which has its own.")
    (low, high), domain, reach = sampler.domain, domain_of(v) or ALL_TIMES, reach_of(v) or ALL_TIMES
    times = default if times is None else times
    is_number = isinstance(times, int | float | np.number)
    if not is_number and domain[1] <= ALL_TIMES[1]:
        check_not_steps("times", times)
    grid = time_grid(times, (max(low, domain[0]), min(high, domain[1])), x)
    if is_number and not backward and min(high, reach[1]) > domain[1]:
        further = time_grid(times, (max(low, domain[0]), min(high, reach[1])), x)
        if _skips_last(sampler, further) and further[-2] <= domain[1]:
            grid = further
    _check_domain("times", grid[::-1] if backward else grid, v, sampler)
    return grid


def _skips_last(sampler: Sampler, times: ArrayTree) -> bool:
    """Whether a sampler says that it never calls the velocity at the last of these times."""
    said = getattr(sampler, "skips_last", None)
    return said is not None and said(times)


def _check_domain(name: str, times: ArrayTree, v: VelocityFn, sampler: Sampler) -> None:
    domain, reach = domain_of(v), reach_of(v)
    if is_traced(times):
        return
    if domain is None or reach is None:
        check_times(name, times, ALL_TIMES, SOURCE_TO_DATA)
    elif reach == domain:
        check_times(name, times, domain, "the domain of v")
    else:
        what = "the velocity_domain of the network in v, to which a number of steps keeps by itself"
        if _skips_last(sampler, times):
            check_times(f"the last of {name}", times[-1:], reach, "where v may be left")
            times = times[:-1]
        check_times(name, times, domain, what)


def as_state(name: str, x: ArrayTree) -> Array:
    """The state as an array; raises `ValueError` for what is none, not floating point [batch, ...], or not finite."""
    if isinstance(x, list | tuple):
        check_finite(name, x)
        x = np.asarray(x, dtype=float)
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(f"{name} must be an array, got a ShapeDtypeStruct: jax.eval_shape(sample, ...) takes one.")
    check_event(x, name)
    if not is_traced(x) and getattr(x, "is_fully_addressable", True):
        with jax.ensure_compile_time_eval():
            bad = int((~jnp.isfinite(x)).reshape(len(x), math.prod(x.shape[1:])).any(axis=1).sum())
        if bad:
            raise ValueError(f"{name} must be finite, got NaN or infinity in {bad} of {len(x)} examples.")
    return jnp.asarray(x)


def as_tokens(name: str, x: ArrayTree) -> Array:
    """The tokens as an array; raises `ValueError` for what is not integers [batch, ...], not negative."""
    check_tokens(name, x)
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must be [batch, ...] with an event that is not empty, got shape {tuple(x.shape)}.")
    return jnp.asarray(x)


def _check_kind(x0: ArrayTree, sampler: Sampler) -> None:
    """Raises `ValueError` for tokens where a sampler moves points, and points where it moves tokens."""
    dtype = getattr(x0, "dtype", None)
    if dtype is None or dtype == np.uint8:  # pixels, of which `as_state` says more, or tokens
        return
    if is_of_tokens(sampler) and jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"x0 must be tokens, integers, got {dtype}: {sampler} moves tokens, and points are moved by samplers of "
            "flows, such as RungeKutta('heun')."
        )
    if not is_of_tokens(sampler) and jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"x0 must be floating point, got {dtype}: {sampler} moves points, and tokens are moved by TauLeaping, "
            "MixtureSteps or FirstHitting."
        )


def _as_kept(keep: ArrayTree, x0: Array, sampler: Sampler) -> Array:
    if not is_of_tokens(sampler):
        raise ValueError(
            f"keep must be None for {sampler}, which moves points, got {shown(keep)}: fm_jax.guidance.keep_known keeps "
            "parts of those."
        )
    check_where("keep", keep, x0)
    with jax.ensure_compile_time_eval():
        return jnp.broadcast_to(keep, x0.shape)


def is_of_tokens(sampler: Sampler) -> bool:
    """Whether a sampler moves tokens, by jumps, and not points."""
    return getattr(sampler, "tokens", False)


def own_times_of(sampler: Sampler) -> Any:
    """The times that a sampler has itself, as a learned one does; `None` if it goes through any."""
    return getattr(sampler, "own_times", None)


def check_sampler(sampler: Any) -> None:
    """Raises `ValueError` for what is not a sampler."""
    wanted = "a sampler, such as RungeKutta('heun') or DDIM(schedule)"
    check_has("sampler", sampler, ("order", "nfe_per_step", "stochastic", "domain", "solve"), wanted)
