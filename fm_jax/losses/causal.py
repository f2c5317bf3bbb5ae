"""The autoregressive control: a causal network, trained to say each token given those before it."""

import functools
from typing import Any

import jax.numpy as jnp

from fm_jax.checks import check_logits, check_network, check_tokens
from fm_jax.conditions import Drop
from fm_jax.couplings import independent
from fm_jax.losses.matching import check_drop, times_within
from fm_jax.losses.tokens import at_tokens, draw_token_pairs
from fm_jax.nfe import Counted, cost
from fm_jax.paths.mixture import MixturePath, check_has_mask, check_mixture, check_own_mask
from fm_jax.shapes import mean_over_event
from fm_jax.types import ApplyFn, Array, Batch, Cond, Key, Logits, LossFn, Metrics, Params, Scalar, Time, TokenState


def one_late(apply_fn: ApplyFn, path: MixturePath) -> ApplyFn:
    """The network of tokens one place late: it sees `[mask, x_0, ..., x_(n-2)]`, so that a causal one at i sees x_<i.

    It is told t = 1 at all times. As a denoiser, `FirstHitting(path, "first")` draws from it from left to right, and
    goes on from what is given at the beginning; whatever would ask it for a token without all that are before refuses
    it.

    Args:
        apply_fn: a causal network of tokens [batch, n], such as `TokenTransformer(causal=True)`.
        path: with a `Masked` source, whose mask stands at the beginning.

    Raises:
        ValueError: for a path without a mask; when called, for what are no tokens [batch, n].

    Example:
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> late = one_late(lambda params, t, x, cond, **_: x, MixturePath(Linear(), Masked(3, 2)))
        >>> late({}, 0.0, jnp.array([[0, 1, 1]]))
        Array([[2, 0, 1]], dtype=int32)
    """
    check_network("apply_fn", apply_fn)
    check_own_mask("apply_fn", apply_fn, path)
    mask = _mask_of(path)

    def late(params: Params, t: Time, x: TokenState, cond: Cond = None, **options: Any) -> Array:
        check_tokens("x", x, path.num_tokens)
        if len(x.shape) != 2:
            raise ValueError(f"x must be tokens [batch, n], which have an order, got shape {tuple(x.shape)}.")
        before = jnp.concatenate([jnp.full_like(x[:, :1], mask), x[:, :-1]], axis=1)
        return apply_fn(params, jnp.ones_like(jnp.asarray(t)), before, cond, **options)

    functools.update_wrapper(late, apply_fn, assigned=(), updated=())  # it takes what the network takes
    evaluations = cost(apply_fn)
    return Counted(late, 1 if evaluations is None else evaluations, returns="next_logits")


def next_token(apply_fn: ApplyFn, path: MixturePath, *, drop: Drop | None = None) -> LossFn:
    """`-log p(x1_i | x1_<i)`, averaged over the tokens: of a causal network `one_late`, minus its log-likelihood.

    What masked diffusion is measured against: the same network, which may look back only, in one order. See
    `likelihood.next_token_log_prob`.

    Args:
        apply_fn: the network as `one_late` returns it; one that sees the token it is to say learns nothing.
        path: as that of `one_late`.
        drop: takes conditions away from some examples, as in `flow_matching`.

    Returns:
        `loss_fn(params, key, batch) -> (loss, metrics)`, in nats a token, as of `cross_entropy`. Nothing is noised: the
        times and `x0` of a batch do not count. Metrics are `loss` and `accuracy`, the share of tokens that are right.

    Raises:
        ValueError: for a path without a mask; when the loss is traced, as `cross_entropy`.

    Example:
        >>> import jax
        >>> from fm_jax.schedules import Linear
        >>> from fm_jax.sources import Masked
        >>> even, path = lambda params, t, x, cond, **_: jnp.zeros((*x.shape, 3)), MixturePath(Linear(), Masked(3, 2))
        >>> loss, _ = next_token(one_late(even, path), path)({}, jax.random.key(0), {"x1": jnp.array([[0, 1]])})
        >>> float(loss)  # log 2: the mask is no data
        0.6931471824645996
    """
    check_network("apply_fn", apply_fn)
    _mask_of(path)
    check_drop(drop)
    times = times_within(None, (0.0, 1.0), "the loss of the next token")

    def loss_fn(
        params: Params, key: Key | None, batch: Batch, *, target_params: Params | None = None
    ) -> tuple[Scalar, Metrics]:
        del target_params
        pairs = draw_token_pairs(path, key, batch, independent, times, drop)
        logits = apply_fn(params, pairs.t, pairs.x1, pairs.cond, train=True, rngs=pairs.rngs)
        log_probs = log_probs_of_data(logits, path, pairs.x1)
        each = -mean_over_event(at_tokens(log_probs, pairs.x1))
        loss = (each if pairs.weight is None else pairs.weight * each).mean()
        return loss, {"loss": loss, "accuracy": (log_probs.argmax(axis=-1) == pairs.x1).mean()}

    return loss_fn


def log_probs_of_data(logits: Logits, path: MixturePath, x1: TokenState) -> Logits:
    """The log-probabilities of all K tokens at each place of x1, of which the mask has none."""
    check_logits("what the network returns", logits, x1, path.num_tokens)
    return path.log_posterior(logits, jnp.full_like(x1, _mask_of(path)))


def _mask_of(path: MixturePath) -> int:
    check_mixture(path)
    check_has_mask(path, "it stands where the first token is to be said")
    return int(path.source.mask)  # type: ignore[arg-type]
