"""Losses: `(params, key, batch) -> (scalar, metrics)`, for any network library."""

from fm_jax.losses.matching import data_prediction, flow_matching, noise_prediction, score_matching, target_domain
from fm_jax.losses.weights import EDMWeight, MinSNRWeight, SNRWeight, error_scale

__all__ = [
    "EDMWeight",
    "MinSNRWeight",
    "SNRWeight",
    "data_prediction",
    "error_scale",
    "flow_matching",
    "noise_prediction",
    "score_matching",
    "target_domain",
]
