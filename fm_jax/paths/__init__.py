"""Conditional probability paths: what to regress."""

from fm_jax.paths.affine import AffinePath, start
from fm_jax.paths.bridge import (
    BrownianBridge,
    BrownianNoise,
    ConstantNoise,
    QuadraticNoise,
    SineNoise,
    StochasticInterpolant,
)
from fm_jax.paths.geodesic import GeodesicPath
from fm_jax.paths.metric import MetricPath
from fm_jax.paths.mixture import MixturePath, check_convex
from fm_jax.paths.premetric import PremetricPath
from fm_jax.paths.spline import SplinePath

__all__ = [
    "AffinePath",
    "BrownianBridge",
    "BrownianNoise",
    "ConstantNoise",
    "GeodesicPath",
    "MetricPath",
    "MixturePath",
    "PremetricPath",
    "QuadraticNoise",
    "SineNoise",
    "SplinePath",
    "StochasticInterpolant",
    "check_convex",
    "start",
]
