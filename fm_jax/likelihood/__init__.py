"""Likelihood: the log-density of data under a flow, exactly or by estimates of the divergence; bounds for tokens."""

from fm_jax.likelihood.bits_per_dim import NotConvergedError, bits_per_dim, dequantize
from fm_jax.likelihood.divergence import Divergence, Exact, Hutchinson, HutchPlusPlus
from fm_jax.likelihood.log_prob import encode_and_log_prob, log_prob, sample_and_log_prob
from fm_jax.likelihood.token_bound import (
    TokenBound,
    any_order_log_prob,
    bits_per_token,
    next_token_log_prob,
    perplexity,
    token_bound,
)

__all__ = [
    "Divergence",
    "Exact",
    "HutchPlusPlus",
    "Hutchinson",
    "NotConvergedError",
    "TokenBound",
    "any_order_log_prob",
    "bits_per_dim",
    "bits_per_token",
    "dequantize",
    "encode_and_log_prob",
    "log_prob",
    "next_token_log_prob",
    "perplexity",
    "sample_and_log_prob",
    "token_bound",
]
