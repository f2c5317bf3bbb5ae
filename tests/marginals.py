"""Samples in the plane held against exact laws, by Kolmogorov-Smirnov tests on four projections.

Refused below 1e-4 on any of the four, a right sampler fails with probability below 4e-4 under a fresh key.
"""

import numpy as np
import scipy.stats

from fm_jax import oracles

MEANS, SCALES, WEIGHTS = np.array([[-1.5, 0.0], [1.0, 0.5]]), [0.4, 0.7], [0.3, 0.7]


def two_gaussians():
    """The mixture that most samplers are tried on."""
    return oracles.gaussian_mixture(MEANS, SCALES, WEIGHTS)


def data_cdf(direction):
    """The distribution function of `two_gaussians`, projected."""
    components = list(zip(WEIGHTS, MEANS @ direction, SCALES, strict=True))
    return lambda y: sum(w * scipy.stats.norm.cdf(y, mean, scale) for w, mean, scale in components)


def source_cdf(direction):
    """That of the source, a standard normal, the same in every direction."""
    return scipy.stats.norm.cdf


def p_values(x, cdf=data_cdf):
    """Four p-values of samples [n, 2], against `cdf(direction)(y)`."""
    angles = np.pi * np.arange(4) / 4
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return [scipy.stats.kstest(np.asarray(x) @ d, cdf(d)).pvalue for d in directions]
