"""Self-conditioning of networks of tokens: they are also told what they themselves took the data for before.

Chen et al. 2022 (arXiv:2208.04202, section 3.2), here with probabilities of tokens in place of bits. Such a network
takes one more keyword, `apply_fn(params, t, x, cond, train=, rngs=, estimate=)`: probabilities of x1 [batch, ..., K],
the softmax of its logits. `None` says that there is none yet, and so do zeros.

One network is a denoiser in three ways:

* `bind(apply_fn, params)` is told nothing: one evaluation;
* `bind(self_conditioned(apply_fn), params)` is told what it takes this x for: two evaluations, and a function of t and
  x like any other, for all samplers, rates and bounds;
* with `carry_estimate=True` samplers tell `bind(apply_fn, params)` what it took the x of the step before for, at one
  evaluation a step.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from fm_jax.checks import check_function, check_logits, check_network, check_number
from fm_jax.draws import bernoulli
from fm_jax.nfe import Counted, cost, returns_of
from fm_jax.types import ApplyFn, Cond, Logits, Params, Time, TokenState

SELF_CONDITIONED = "a self-conditioned network apply_fn(params, t, x, cond, train=, rngs=, estimate=)"


def self_conditioned(apply_fn: ApplyFn, rate: float = 0.5) -> ApplyFn:
    """The network that tells itself: it is evaluated without an estimate, and again with what it then said of x1.

    In training the estimate is given to each example with probability `rate`; the others are evaluated with zeros. No
    gradient goes through it. Out of training it is given to all, so that the result is one denoiser, whose bounds are
    bounds of what is sampled.

    Args:
        apply_fn: the network, with one more keyword: `estimate` [batch, ..., K], `None` by default.
        rate: in (0, 1]; .5 in Campbell et al. 2024 (arXiv:2402.04997).

    Returns:
        `apply_fn(params, t, x, cond, *, train, rngs)` for every loss of tokens and for `bind`; `nfe.Counted` as two
        evaluations. In training it draws from `rngs["dropout"]`, and gives each evaluation a key of its own.

    Raises:
        ValueError: if `apply_fn` takes no `estimate`, or `rate` is not in (0, 1]; when called, if the network does not
            return logits, or without a key in training.

    Example:
        >>> def network(params, t, x, cond, *, train, rngs, estimate=None):
        ...     return jnp.zeros((1, 2)) if estimate is None else jnp.array([[0.0, 1.0]]) + estimate
        >>> f = self_conditioned(network)
        >>> f({}, jnp.zeros(1), jnp.array([0]), None, train=False, rngs=None), f.nfe
        (Array([[0.5, 1.5]], dtype=float32), 2)
    """
    check_network("apply_fn", apply_fn)
    check_function("apply_fn", apply_fn, SELF_CONDITIONED, 4, train=True, rngs=None, estimate=None)
    check_number("rate", rate, "(0, 1]")
    network: Any = apply_fn

    def applied(params: Params, t: Time, x: TokenState, cond: Cond, /, *, train: bool, rngs: Any) -> Logits:
        drawn = train and rate < 1
        if drawn and not rngs:
            raise ValueError(f"rngs must be {{'dropout': key}}: estimates are given at random in training, got {rngs}.")
        choice, first, second = ({name: jax.random.fold_in(rngs[name], i) for name in rngs or ()} for i in range(3))
        said = network(params, t, x, cond, train=train, rngs=first or None)
        check_logits("what the network returns", said, x)
        estimate = jax.lax.stop_gradient(estimate_of(said))
        if drawn:
            given = bernoulli(choice["dropout"], jnp.full(len(x), rate))
            estimate = jnp.where(given.reshape(-1, *(1,) * x.ndim), estimate, 0)
        return network(params, t, x, cond, train=train, rngs=second or None, estimate=estimate)

    applied.module = getattr(inspect.unwrap(apply_fn), "module", None)  # type: ignore[attr-defined]
    evaluations = cost(apply_fn)
    return Counted(applied, 2 * (1 if evaluations is None else evaluations), returns=returns_of(apply_fn))


def estimate_of(logits: Logits) -> Logits:
    """The probabilities that logits stand for, in float32 or better: what a self-conditioned network is told.

    Example:
        >>> estimate_of(jnp.array([[0, 0]]))
        Array([[0.5, 0.5]], dtype=float32)
    """
    return jax.nn.softmax(jnp.asarray(logits, jnp.result_type(float)), axis=-1)


def no_estimate(x: TokenState, num_tokens: int) -> Logits:
    """Zeros [batch, ..., K]: what a self-conditioned network is told in the first step."""
    return jnp.zeros((*x.shape, num_tokens), jnp.result_type(float))
