"""Bounds on the likelihood of tokens, each unbiased for its bound, with its standard error."""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from fm_jax.checks import check_integer, check_key, check_member
from fm_jax.losses.tokens import generalized_kl_of, masked_elbo_of, reversal_elbo_of
from fm_jax.paths.mixture import MixturePath
from fm_jax.types import Array, DenoiserFn, Key, PerExample, Tokens

Bound = Literal["mask", "reversal", "forward"]
BOUNDS: tuple[Bound, ...] = get_args(Bound)
_INTEGRANDS = {"mask": masked_elbo_of, "reversal": reversal_elbo_of, "forward": generalized_kl_of}


class TokenBound(NamedTuple):
    """`nats` [batch], an upper bound of -log p(x1) in expectation, and its standard error over the draws, [batch]."""

    nats: Array
    error: Array

    def bits_per_token(self, num: int) -> PerExample:
        return self.nats / (num * math.log(2))


def token_bound(
    denoiser: DenoiserFn, path: MixturePath, key: Key, x1: Tokens, *, bound: Bound, num_times: int = 32
) -> TokenBound:
    """An upper bound of `-log p(x1)` in nats.

    * "mask", for a `Masked` source: with the exact posterior it is `-log p(x1)` itself.
    * "reversal", for any source: with the exact posterior it is the entropy of the data on average.
    * "forward", for any source: what training by the generalised KL minimises. For a source that is not a mask it is
      above the entropy, whatever the network.

    Times are stratified: one offset for all, so that the integral over time has a third of the variance.
    """
    check_key(key)
    check_member("bound", bound, BOUNDS)
    check_integer("num_times", num_times, least=2)
    path.check_data(x1)
    key_offset, key_draw = jax.random.split(key)
    integrand = _INTEGRANDS[bound]
    offset = jax.random.uniform(key_offset, x1.shape[:1])

    def one(i: Array) -> PerExample:
        t = (offset + i / num_times) % 1
        key_x0, key_path = jax.random.split(jax.random.fold_in(key_draw, i))
        sample = path.sample(key_path, t, path.source.draw(key_x0, x1), x1)
        found = integrand(path, sample, path.log_posterior(denoiser(t, sample.x_t), sample.x_t))
        return found.reshape(len(x1), -1).sum(axis=1)

    each = jax.lax.map(one, jnp.arange(num_times))
    return TokenBound(each.mean(axis=0), each.std(axis=0, ddof=1) / math.sqrt(num_times))
