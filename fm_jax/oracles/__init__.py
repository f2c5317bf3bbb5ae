"""Closed forms that everything else is checked against.

* `mixture`: a Gaussian mixture carried along any affine path from a standard normal source;
* `gaussian`: two Gaussians, with any Gaussian coupling, joined by any stochastic interpolant.
"""

from fm_jax.oracles.gaussian import (
    BridgePrediction,
    GaussianBridge,
    GaussianPair,
    bridge_drift,
    bridge_moments,
    bridge_prediction,
    bures_distance,
    displacement_moments,
    displacement_velocity,
    entropic_plan,
    gaussian_pair,
    monge_map,
    optimal_plan,
    sample_pair,
    schroedinger_bridge,
)
from fm_jax.oracles.mixture import (
    GaussianMixture,
    cdf,
    flow_map,
    gaussian_mixture,
    log_prob,
    prediction,
    sample,
    velocity,
)

__all__ = [
    "BridgePrediction",
    "GaussianBridge",
    "GaussianMixture",
    "GaussianPair",
    "bridge_drift",
    "bridge_moments",
    "bridge_prediction",
    "bures_distance",
    "cdf",
    "displacement_moments",
    "displacement_velocity",
    "entropic_plan",
    "flow_map",
    "gaussian_mixture",
    "gaussian_pair",
    "log_prob",
    "monge_map",
    "optimal_plan",
    "prediction",
    "sample",
    "sample_pair",
    "schroedinger_bridge",
    "velocity",
]
