"""Likelihood: the log-density of data under a flow, exactly or by estimates of the divergence."""

from fm_jax.likelihood.bits_per_dim import NotConvergedError, bits_per_dim, dequantize
from fm_jax.likelihood.divergence import Divergence, Exact, Hutchinson, HutchPlusPlus
from fm_jax.likelihood.log_prob import encode_and_log_prob, log_prob, sample_and_log_prob

__all__ = [
    "Divergence",
    "Exact",
    "HutchPlusPlus",
    "Hutchinson",
    "NotConvergedError",
    "bits_per_dim",
    "dequantize",
    "encode_and_log_prob",
    "log_prob",
    "sample_and_log_prob",
]
