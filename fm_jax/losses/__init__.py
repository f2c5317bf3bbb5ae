"""Losses: `(params, key, batch) -> (scalar, metrics)`, for any network library."""

from fm_jax.losses.autoencoder import gaussian_kl, kl_autoencoder, negative_elbo
from fm_jax.losses.bridge import bridge_matching, bridge_score, bridge_velocity, split_channels, two_heads
from fm_jax.losses.causal import next_token, one_late
from fm_jax.losses.matching import data_prediction, flow_matching, noise_prediction, score_matching
from fm_jax.losses.tokens import cross_entropy, generalized_kl, masked_elbo, reversal_elbo
from fm_jax.losses.trajectory import couple_snapshots, trajectory_matching
from fm_jax.losses.weights import EDMWeight, MinSNRWeight, SNRWeight, error_scale

__all__ = [
    "EDMWeight",
    "MinSNRWeight",
    "SNRWeight",
    "bridge_matching",
    "bridge_score",
    "bridge_velocity",
    "couple_snapshots",
    "cross_entropy",
    "data_prediction",
    "error_scale",
    "flow_matching",
    "gaussian_kl",
    "generalized_kl",
    "kl_autoencoder",
    "masked_elbo",
    "negative_elbo",
    "next_token",
    "noise_prediction",
    "one_late",
    "reversal_elbo",
    "score_matching",
    "split_channels",
    "trajectory_matching",
    "two_heads",
]
