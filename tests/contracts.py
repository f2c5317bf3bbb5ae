"""Every schedule, time sampler, weight and coupling, listed once: what is added here goes through the same contract."""

import numpy as np

from fm_jax import couplings, losses, oracles, paths, schedules, times
from fm_jax.guidance import classifier_free

SCHEDULES = [
    schedules.Linear(),
    schedules.Linear(sigma_min=1e-2),
    schedules.Cosine(),
    schedules.Polynomial(2.0),
    schedules.Polynomial(0.5),
    schedules.VP(),
    schedules.VP(beta_min=1.0, beta_max=1.0),
    schedules.LinearVP(),
    schedules.VE(),
    schedules.EDM(),
    schedules.DDPM(),
]
TIME_SAMPLERS = [
    times.Uniform(),
    times.Uniform(0.2, 0.7),
    times.Stratified(),
    times.LogitNormal(0.5, 0.8),
    times.Mode(1.29),
    times.Mode(-0.5),
    times.Beta(2.0, 3.0),
    times.EDMLogNormal(),
    times.EDMLogNormal(schedule=schedules.VP()),
    times.Rescale(times.LogitNormal(), 0.0, 0.9),
]
WEIGHTS = [losses.SNRWeight(), losses.SNRWeight(0.0), losses.MinSNRWeight(), losses.EDMWeight()]
COUPLINGS = {
    "independent": couplings.independent,
    "paired": couplings.paired,
    "exact_ot": couplings.ExactOT(),
    "anti_ot": couplings.ExactOT(maximize=True),
    "partial_ot": couplings.PartialOT(0.8),
    "conditional_ot": couplings.ConditionalOT(),
}
OTT_COUPLINGS = {
    "entropic_ot": couplings.EntropicOT(0.1, relative=True),
    "unbalanced_ot": couplings.UnbalancedOT(0.1, 0.9, relative=True),
    "gromov_wasserstein_ot": couplings.GromovWassersteinOT(),
}
"""Those that need the extra fm_jax[ot]."""
BRIDGES = [
    paths.BrownianBridge(0.8),
    *(
        paths.StochasticInterpolant(gamma=g)
        for g in (paths.ConstantNoise(0.1), paths.QuadraticNoise(), paths.SineNoise())
    ),
]


def mixture() -> oracles.GaussianMixture:
    """Three Gaussians in the plane with different full covariances, one of them narrow."""
    covariances = np.array([[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.4]], [[0.05, -0.02], [-0.02, 0.05]]])
    return oracles.gaussian_mixture([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]], covariances, [0.5, 0.3, 0.2])


def guided_by_half(schedule, batch):
    """The velocity of a mixture, unguided in the first half of the batch and guided with scale 2 in the second."""
    cats = oracles.gaussian_mixture([[-1.0, 0.0], [1.0, 0.5]], [0.6, 0.8], [0.3, 0.7])
    everything = oracles.gaussian_mixture([[0.0, 0.0], [0.5, -0.5]], [1.0, 0.7])
    scale = np.repeat([1.0, 2.0], batch // 2)
    return classifier_free(oracles.velocity(cats, schedule), oracles.velocity(everything, schedule), scale)
