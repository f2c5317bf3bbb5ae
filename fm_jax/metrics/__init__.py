"""Metrics: distances between two samples, measures of a flow, and the floor that belongs beside each number.

`wasserstein` and `sinkhorn_divergence` work on the host in double precision and return a float; `energy_distance`,
`mmd` and the measures of a flow are JAX functions that return a scalar. `floor` and `measure` say what such a number is
when both samples are real.
"""

from fm_jax.metrics.energy_distance import energy_distance
from fm_jax.metrics.floor import Floor, Measured, floor, measure, normalised_path_energy_floor
from fm_jax.metrics.mmd import PolynomialKernel, linear, median_distance, mmd
from fm_jax.metrics.paths import normalised_path_energy, path_energy, straightness
from fm_jax.metrics.sinkhorn import sinkhorn_divergence
from fm_jax.metrics.wasserstein import wasserstein

__all__ = [
    "Floor",
    "Measured",
    "PolynomialKernel",
    "energy_distance",
    "floor",
    "linear",
    "measure",
    "median_distance",
    "mmd",
    "normalised_path_energy",
    "normalised_path_energy_floor",
    "path_energy",
    "sinkhorn_divergence",
    "straightness",
    "wasserstein",
]
