"""What is done to the logits of a denoiser before tokens are drawn from them: temperature and nucleus.

Both change each token's probabilities by themselves, given what is seen of the others. What is then sampled is no law
that could be written down for all tokens at once: in particular not the joint law to the power 1 / temperature.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_array, check_function, check_logits, check_number, check_tokens
from fm_jax.nfe import Counted, check_denoiser, cost, domain_of, logits_like, reach_of
from fm_jax.shapes import time_of
from fm_jax.types import DenoiserFn, Elementwise, Logits, Time, TokenState

ESTIMATING = "a denoiser f(t, x, *, estimate=None), as of a self-conditioned network by bind(apply_fn, params)"


def with_temperature(denoiser: DenoiserFn, temperature: float | Callable[[Elementwise], Elementwise]) -> DenoiserFn:
    """The denoiser with its logits divided by `temperature`: below 1 it is surer, at 1 the same to the bit.

    They are measured from the highest one, so that none overflows, however low the temperature.

    What is seen of the others given, each token then has a law in proportion to `p^(1 / temperature)`. That is not the
    tempered joint law `q^(1 / temperature)`, whose conditionals are other ones: with one token at a time
    (`FirstHitting`) a sequence is drawn with the product of tempered conditionals, averaged over the orders. With a
    source without a mask the jumps no longer carry the marginals of the path either.

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`.
        temperature: positive; a number, or a function of t, elementwise.

    Returns:
        `f(t, x)`; a call of it costs one of `denoiser`.

    Raises:
        ValueError: if `denoiser` is no denoiser, or the temperature is not positive and finite; where a function of t
            gives one that is not positive, the logits are NaN.

    Example:
        >>> f = with_temperature(lambda t, x: jnp.array([[[0.0, 1.0]]]), 0.5)
        >>> f(0.3, jnp.array([[0]]))
        Array([[[-2.,  0.]]], dtype=float32)
    """
    check_denoiser("denoiser", denoiser, causal=True)
    if callable(temperature):
        check_function("temperature", temperature, "a number or a function of time", 1)
    else:
        check_number("temperature", temperature, "(0, inf)")

    def tempered(t: Time, x: TokenState) -> Logits:
        logits = logits_of(denoiser, t, x)
        least = float(jnp.finfo(jnp.result_type(logits, float)).tiny)
        at = temperature(time_of(t, logits)) if callable(temperature) else max(temperature, least)
        at = jnp.asarray(at, logits.dtype)
        highest = logits.max(axis=-1, keepdims=True)  # from which the others are measured, so that nothing overflows
        cooled = (logits - jnp.where(jnp.isfinite(highest), highest, 0)) / jnp.where(at > 0, at, jnp.nan)
        return jnp.where(at == 1, logits, cooled)

    return Counted(tempered, cost(denoiser), domain_of(denoiser), reach_of(denoiser), logits_like(denoiser))


def top_p(denoiser: DenoiserFn, p: float) -> DenoiserFn:
    """The denoiser with the likeliest tokens alone, as few as have the probability `p` together; at 1 the same.

    Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751), for each token by itself: what is sampled is no law of
    all tokens that could be written down, and rare sequences are never drawn. Those as likely as the last one stay too.

    Args:
        denoiser: logits of x1, `f(t, x) -> [batch, ..., K]`; minus infinity at a mask, which is no data.
        p: in (0, 1].

    Returns:
        `f(t, x)`, with minus infinity elsewhere; a call of it costs one of `denoiser`.

    Raises:
        ValueError: if `denoiser` is no denoiser, or `p` is not in (0, 1].

    Example:
        >>> f = top_p(lambda t, x: jnp.log(jnp.array([[[0.5, 0.3, 0.2]]])), 0.6)
        >>> jnp.exp(f(0.3, jnp.array([[0]])))
        Array([[[0.5, 0.3, 0. ]]], dtype=float32)
    """
    check_denoiser("denoiser", denoiser, causal=True)
    check_number("p", p, "(0, 1]")

    def cut(t: Time, x: TokenState) -> Logits:
        logits = logits_of(denoiser, t, x)
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        last = jnp.where(before < p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where((logits >= last) | (p >= 1), logits, -jnp.inf)

    return Counted(cut, cost(denoiser), domain_of(denoiser), reach_of(denoiser), logits_like(denoiser))


def logits_of(
    denoiser: DenoiserFn, t: Time, x: TokenState, num_tokens: int | None = None, *, estimate: Logits | None = None
) -> Logits:
    """What a denoiser says; raises `ValueError` if that is not `num_tokens` numbers, or any, for each token of `x`.

    With an `estimate` [batch, ..., K] it is told that too, and refused if it does not take it: see
    `fm_jax.self_conditioning`.
    """
    check_tokens("x", x)
    told: Any = {} if estimate is None else {"estimate": estimate}
    if told:
        check_function("denoiser", denoiser, ESTIMATING, 2, **told)
    logits = denoiser(t, x, **told)
    check_array("denoiser(t, x)", logits)
    check_logits("denoiser(t, x)", logits, x, num_tokens or (logits.shape or (0,))[-1])
    return logits
