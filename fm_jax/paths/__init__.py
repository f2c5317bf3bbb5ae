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
from fm_jax.paths.spline import SplinePath

__all__ = [
    "AffinePath",
    "BrownianBridge",
    "BrownianNoise",
    "ConstantNoise",
    "QuadraticNoise",
    "SineNoise",
    "SplinePath",
    "StochasticInterpolant",
    "start",
]
