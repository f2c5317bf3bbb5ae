"""Guidance of tokens: of what a denoiser says, and of the rates at which tokens jump.

By Nisonoff et al. 2024 (arXiv:2406.01572): what velocities and scores do by sums, rates do by products. None but
`predictor` at scale 1 has a law that can be written down beforehand; each says below what it samples.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_function, check_logits, check_numbers_of, check_state, check_tokens
from fm_jax.guidance.scale import ALWAYS, check_interval, check_scale, is_number, scale_at
from fm_jax.nfe import Counted, check_denoiser, check_rates, cost, domain_of, logits_like, reach_of, total
from fm_jax.shapes import batch_time, expand_time, time_dtype
from fm_jax.types import AnyArray, Array, ArrayTree, DenoiserFn, Logits, PerExample, RateFn, Returns, Time, TokenState


def classifier_free_logits(
    f_cond: DenoiserFn, f_uncond: DenoiserFn, scale: ArrayTree, *, interval: tuple[float, float] = ALWAYS
) -> DenoiserFn:
    """The denoiser of `p_cond(x1 | x)^s p_uncond(x1 | x)^(1 - s)`, normalised for each token: `l_u + s (l_c - l_u)`.

    Any sampler or rates take it. With a mask tokens appear when they would without guidance: what they are is led, and
    not when.

    Of one masked token what is drawn has exactly the law `q(x1 | c)^s q(x1)^(1 - s)`, normalised. Of several it has
    not: each is drawn by the law of its own that is so tilted, given those that are there, and the normalisers, of
    which each depends on what is there, are not those of the law of all.

    Args:
        f_cond: conditional denoiser, logits [batch, ..., K].
        f_uncond: unconditional denoiser.
        scale: a number, or [batch]. 1 is off (`f_cond` itself is returned for the number 1), 0 unconditional.
        interval: guidance only for t inside, `f_cond` alone outside. Both are evaluated everywhere.

    Returns:
        `f(t, x) -> logits`; a call of it costs what a call of both does. To a token that either of the two excludes it
        gives -inf, but for a scale of 1 or 0.

    Raises:
        ValueError: if `scale` is not finite or has two axes, or `interval` is reversed or outside [0, 1]; when called,
            if `scale` is of another batch than `x`, or the denoisers return different shapes.

    Example:
        >>> f = classifier_free_logits(lambda t, x: jnp.array([[0.0, 1.0]]), lambda t, x: jnp.zeros((1, 2)), 3.0)
        >>> f(0.5, jnp.array([0]))
        Array([[0., 3.]], dtype=float32)
    """
    for name, denoiser in (("f_cond", f_cond), ("f_uncond", f_uncond)):
        check_denoiser(name, denoiser, causal=True)
    returns = logits_like(f_cond, f_uncond)
    return _product(f_cond, f_uncond, ("f_cond", "f_uncond"), returns, scale, interval, _mixed)


def classifier_free_rates(
    u_cond: RateFn, u_uncond: RateFn, scale: ArrayTree, *, interval: tuple[float, float] = ALWAYS
) -> RateFn:
    """The rates `u_cond^s u_uncond^(1 - s)`: predictor-free guidance (Nisonoff et al. 2024, eq. 3).

    It is `predictor` with the predictor that the two rates imply, `p(c | y) / p(c | x) = u_cond / u_uncond`: that of
    the exact one where they are `reversal_rates`, and not where they are `forward_rates` of a source without a mask.

    For s other than 0 and 1 the law at t = 1 is not `q(x1 | c)^s q(x1)^(1 - s)`, normalised, but for one masked token.
    The total rate changes as well: for a mask, where `sum_y p_cond^s p_uncond^(1 - s)` is not 1, tokens appear earlier
    or later, too.

    Args:
        u_cond: conditional rates, [batch, ..., K].
        u_uncond: unconditional rates, of the same path and of the same kind.
        scale: a number, or [batch]. 1 is off (`u_cond` itself is returned for the number 1), 0 unconditional.
        interval: guidance only for t inside, `u_cond` alone outside. Both are evaluated everywhere.

    Returns:
        `u(t, x)`; a call of it costs what a call of both does. A jump that is of rate 0 in either of the two has rate
        0, but for a scale of 1 or 0.

    Raises:
        ValueError: as `classifier_free_logits`.

    Example:
        >>> u_cond, u_uncond = (lambda t, x, u=u: jnp.array([[0.0, u]]) for u in (4.0, 2.0))
        >>> classifier_free_rates(u_cond, u_uncond, 3.0)(0.5, jnp.array([0])).round(3)
        Array([[ 0., 16.]], dtype=float32)
    """
    for name, rates in (("u_cond", u_cond), ("u_uncond", u_uncond)):
        check_rates(name, rates)

    def mixed(conditional: Array, unconditional: Array, scale: Array) -> Array:
        some = (conditional > 0) & (unconditional > 0)
        ratio = jnp.log(jnp.where(some, conditional, 1)) - jnp.log(jnp.where(some, unconditional, 1))
        # Of negative ones, as there are at the token that is there in a row of a generator, nothing is made.
        none = jnp.where((conditional >= 0) & (unconditional >= 0), 0, jnp.minimum(conditional, unconditional))
        from_cond, from_uncond = conditional * jnp.exp((scale - 1) * ratio), unconditional * jnp.exp(scale * ratio)
        found = jnp.where(scale == 1, from_cond, from_uncond)
        return jnp.where(some | (scale == 0) | (scale == 1), found, none)

    return _product(u_cond, u_uncond, ("u_cond", "u_uncond"), "rates", scale, interval, mixed)


def predictor(
    rates: RateFn,
    log_prob_fn: Callable[[PerExample, TokenState], PerExample],
    scale: ArrayTree,
    *,
    interval: tuple[float, float] = ALWAYS,
) -> RateFn:
    """The rates `[p(c | y) / p(c | x)]^s u(y, x)`, y being x with one token changed: exact predictor guidance.

    Nisonoff et al. 2024 (arXiv:2406.01572, eq. 2). All K D changes of the D tokens are put to the predictor, D calls of
    K times the batch. `predictor_taylor` asks once.

    With s = 1, `reversal_rates` and the predictor `p(c | x_t)` of noised data, what is sampled is the law of the data
    given c, and at each t that of the path given c. With other rates it is not: `forward_rates` of a uniform source are
    an average over the data whose weights change with c by more than this ratio. For a mask both rates are the same.
    For s other than 1 the law at t = 1 is not `q(x1) p(c | x1)^s`, normalised.

    Args:
        rates: unconditional, `u(t, x)`, such as `reversal_rates(denoiser, path)`.
        log_prob_fn: `log_prob_fn(t, x)` with t [batch]: log p(c | x_t = x) [batch], of what each example is led to.
            Must treat each example on its own.
        scale: a number, or [batch]. 0 is off (`rates` itself is returned for the number 0).
        interval: guidance only for t inside, `rates` alone outside.

    Returns:
        `u(t, x)`; a call of it costs what one of `rates` does: evaluations of the predictor are not counted. From an x
        that excludes c, where there is no ratio, the rates are as they are.

    Raises:
        ValueError: if `scale` is not finite or has two axes, or `interval` is reversed or outside [0, 1]; when called,
            if `log_prob_fn` returns another shape than [batch].

    Example:
        >>> u = predictor(lambda t, x: 1.0 - jax.nn.one_hot(x, 2), lambda t, x: jnp.log(0.1 + x[:, 0]), 1.0)
        >>> [f"{rate:.3f}" for rate in u(0.5, jnp.array([[0]]))[0, 0]]
        ['0.000', '11.000']
    """

    def gain(t: PerExample, x: TokenState, num_tokens: int) -> Array:
        flat = x.reshape(len(x), math.prod(x.shape[1:]))

        def log_prob(changed: Array) -> Array:
            found = log_prob_fn(t, changed.reshape(x.shape))
            check_numbers_of("log_prob_fn(t, x)", found, x, scalar=False)
            return found

        def of_position(i: Array) -> Array:
            return jax.vmap(lambda token: log_prob(flat.at[:, i].set(token)))(jnp.arange(num_tokens, dtype=x.dtype))

        changed = jax.lax.map(of_position, jnp.arange(flat.shape[1]))  # [D, K, batch]
        here = expand_time(log_prob(flat), jnp.zeros((len(x), 1, 1)), "log_prob_fn(t, x)")
        found = jnp.transpose(changed, (2, 0, 1)) - here
        return jnp.where(here == -jnp.inf, 0, found).reshape(*x.shape, num_tokens)

    return _guided_by(rates, log_prob_fn, scale, interval, gain)


def predictor_taylor(
    rates: RateFn,
    log_prob_fn: Callable[[PerExample, Logits], PerExample],
    scale: ArrayTree,
    *,
    interval: tuple[float, float] = ALWAYS,
) -> RateFn:
    """`predictor` to first order, by one gradient: `log p(c | y) - log p(c | x)` is `<grad log p(c | x), y - x>`.

    The Taylor-approximated guidance of Nisonoff et al. 2024 (arXiv:2406.01572, eq. 4), x and y being one-hot vectors.
    What is sampled is the law of `predictor` where log p(c | x) is linear in them, and no law that is known elsewhere.

    Args:
        rates: unconditional, `u(t, x)`, such as `reversal_rates(denoiser, path)`.
        log_prob_fn: `log_prob_fn(t, z)` with t [batch] and z [batch, ..., K] one-hot, in floating point:
            log p(c | x_t = x) [batch], with a gradient in z. Must treat each example on its own.
        scale: as in `predictor`.
        interval: as in `predictor`.

    Returns:
        `u(t, x)`; a call of it costs what one of `rates` does: evaluations of the predictor are not counted.

    Raises:
        ValueError: as `predictor`.

    Example:
        >>> u = predictor_taylor(lambda t, x: 1.0 - jax.nn.one_hot(x, 2), lambda t, z: 2.0 * z[:, 0, 1], 1.0)
        >>> [f"{rate:.3f}" for rate in u(0.5, jnp.array([[0]]))[0, 0]]  # exp(2)
        ['0.000', '7.389']
    """

    def gain(t: PerExample, x: TokenState, num_tokens: int) -> Array:
        def total_log_prob(z: Array) -> Array:
            log_prob = log_prob_fn(t, z)
            check_numbers_of("log_prob_fn(t, z)", log_prob, x, scalar=False)
            check_state(log_prob, "log_prob_fn(t, z)")  # integers have no gradient
            return log_prob.sum()

        slope = jax.grad(total_log_prob)(jax.nn.one_hot(x, num_tokens, dtype=time_dtype(x)))
        return slope - jnp.take_along_axis(slope, x[..., None], axis=-1)

    return _guided_by(rates, log_prob_fn, scale, interval, gain)


def _mixed(conditional: Array, unconditional: Array, scale: Array) -> Array:
    """`unconditional + scale (conditional - unconditional)`, -inf where one of them is but for a scale of 1 or 0.

    At these it is one of the two to the bit, and its derivative in the scale is what it is beside them.
    """
    excluded = (conditional == -jnp.inf) | (unconditional == -jnp.inf)
    gap = jnp.where(excluded, 0, conditional) - jnp.where(excluded, 0, unconditional)
    beside = jnp.where(scale == 1, conditional + (scale - 1) * gap, unconditional + scale * gap)
    return jnp.where(excluded & (scale != 0) & (scale != 1), -jnp.inf, beside)


def _product(
    cond: Callable[[Time, TokenState], Logits],
    uncond: Callable[[Time, TokenState], Logits],
    names: tuple[str, str],
    returns: Returns,
    scale: ArrayTree,
    interval: tuple[float, float],
    mixed: Callable[[Array, Array, Array], Array],
) -> Any:
    """Two functions as one, by what `mixed` makes of them; at scale 1 and 0 one of the two, to the bit."""
    check_scale(scale)
    check_interval(interval)
    if is_number(scale, 1):
        return cond

    def guided(t: Time, x: TokenState) -> Logits:
        scale_t = scale_at(scale, t, x, interval=interval, outside=1)
        conditional, unconditional = cond(t, x), uncond(t, x)
        for name, found in zip(names, (conditional, unconditional), strict=True):
            check_logits(f"{name}(t, x)", found, x)
        check_logits(f"{names[1]}(t, x)", unconditional, x, conditional.shape[-1])
        return mixed(conditional, unconditional, expand_time(scale_t, conditional, "scale"))

    nfe = total(cost(cond), cost(uncond))
    return Counted(guided, nfe, domain_of(cond, uncond), reach_of(cond, uncond), returns)


def _guided_by(
    rates: RateFn,
    log_prob_fn: Callable[[PerExample, AnyArray], PerExample],
    scale: ArrayTree,
    interval: tuple[float, float],
    gain: Callable[[PerExample, TokenState, int], Array],
) -> RateFn:
    """Rates times `exp(s gain)`, by what a predictor gains of each jump, [batch, ..., K]."""
    check_rates("rates", rates)
    check_function("log_prob_fn", log_prob_fn, "a function log_prob_fn(t, x) -> [batch]", 2)
    check_scale(scale)
    check_interval(interval)
    if is_number(scale, 0):
        return rates

    def guided(t: Time, x: TokenState) -> Logits:
        check_tokens("x", x)
        scale_t = scale_at(scale, t, x, interval=interval, outside=0)
        found = rates(t, x)
        check_logits("rates(t, x)", found, x)
        s = expand_time(scale_t, found, "scale")
        log_ratio = gain(batch_time(t, x), jnp.asarray(x), found.shape[-1])
        # Where a change is impossible, or nothing else is possible, the derivative in the scale is 0.
        infinite = jnp.isinf(log_ratio)
        gain_of = jnp.exp(s * jnp.where(infinite, 0, log_ratio))
        limit = jax.lax.stop_gradient(jnp.exp(jnp.where(infinite & (s != 0), s * log_ratio, 0)))
        return jnp.where(found > 0, found * jnp.where(infinite, limit, gain_of), found)

    return Counted(guided, cost(rates), domain_of(rates), reach_of(rates), "rates")
