"""Every value of the library that has a noun of the theory, listed once: what is added here goes through its contract.

`test_contracts.py` finds the value that nobody listed, and measures what the listed ones claim.
"""

import functools

import numpy as np

from fm_jax import (
    couplings,
    fewstep,
    guidance,
    likelihood,
    losses,
    manifolds,
    models,
    oracles,
    paths,
    samplers,
    schedules,
    sources,
    times,
)
from fm_jax.data.toy import moons
from fm_jax.guidance import classifier_free
from fm_jax.models import MLP, DiT, LabelEmbedding, PlainMLP, TokenEmbedding, UNet, VectorEmbedding
from fm_jax.models.unet_blocks import ClassEmbedding
from fm_jax.nfe import Counted
from fm_jax.samplers.learned import from_method
from fm_jax.samplers.runge_kutta import TABLEAUX
from fm_jax.text import TextConditioned, WordEncoder

SOURCES = [
    sources.Normal(),
    sources.Normal(3.0),
    sources.Uniform(-1.0, 2.0),
    sources.Sampled(moons),
]
TOKEN_SOURCES = [
    sources.Masked(5, 4),
    sources.UniformTokens(3),
    sources.Categorical((0.6, 0.3, 0.1)),
    sources.Categorical((0.6, 0.4, 0.0)),
]
"""With 1 and the last token but one among the data of each."""
SCHEDULES = [
    schedules.Linear(),
    schedules.Linear(sigma_min=1e-2),
    schedules.Cosine(),
    schedules.Polynomial(2.0),
    schedules.Polynomial(0.5),
    schedules.MaskCosine(),
    schedules.SineSquared(),
    schedules.SineSquared(0.25),
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
    times.Shifted(times.LogitNormal(), 3.0),
]
WEIGHTS = [losses.SNRWeight(), losses.SNRWeight(0.0), losses.MinSNRWeight(), losses.EDMWeight()]
RULES = [
    guidance.Extrapolate(),
    guidance.Rescale(),
    guidance.ZeroStar(),
    guidance.Projected(schedules.Linear()),
    guidance.FirstChannels(1),
]
DIVERGENCES = [likelihood.Exact(), likelihood.Hutchinson(), likelihood.HutchPlusPlus()]
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
DEVICE_COUPLINGS = {"gathered": couplings.Gathered(couplings.ExactOT())}
"""Those that need a device axis: tests of their own."""
BRIDGES = [
    paths.BrownianBridge(0.8),
    *(
        paths.StochasticInterpolant(gamma=g)
        for g in (paths.ConstantNoise(0.1), paths.QuadraticNoise(), paths.SineNoise())
    ),
]
SPLINES = [paths.SplinePath((0.0, 0.4, 1.0)), paths.SplinePath((0.0, 1.0), kind="linear", sigma=0.1)]
PATHS = [
    *(paths.AffinePath(schedule) for schedule in SCHEDULES),
    paths.AffinePath(source=sources.Uniform()),
    *BRIDGES,
    *SPLINES,
]
TOKEN_PATHS = [
    *(paths.MixturePath(schedules.Linear(), source) for source in TOKEN_SOURCES),
    paths.MixturePath(schedules.SineSquared(), sources.Masked(5, 0)),
    paths.MetricPath([[0.0, 1.0, 3.0], [1.0, 0.0, 2.0], [3.0, 2.0, 0.0]]),
]
MANIFOLDS = [
    manifolds.Euclidean(3),
    manifolds.Sphere(2),
    manifolds.Sphere(5),
    manifolds.FlatTorus(2),
    manifolds.Hyperbolic(2),
    manifolds.Simplex(2),
    manifolds.SO3(),
    manifolds.Product((manifolds.FlatTorus(1), manifolds.Sphere(2))),
    manifolds.SE3(),
    manifolds.SPD(2),
    manifolds.LogEuclideanSPD(2),
]
OCTAHEDRON = np.concatenate([np.eye(3), -np.eye(3)])
FACES = [
    [3 * (i < 0) + 0, 3 * (j < 0) + 1, 3 * (k < 0) + 2][:: i * j * k] for i in (1, -1) for j in (1, -1) for k in (1, -1)
]
MESHES = [manifolds.TriangleMesh(OCTAHEDRON, np.array(FACES), 4)]
"""Surfaces, whose geodesics are not known."""
MANIFOLD_SOURCES = [
    manifolds.UniformOn(manifolds.Sphere(2)),
    manifolds.WrappedNormal(manifolds.FlatTorus(2), (0.5, -3.0), 0.7),
    manifolds.VonMisesFisher((0.0, 0.6, 0.8), 3.0),
]
MANIFOLD_PATHS = [
    *(paths.GeodesicPath(manifold) for manifold in MANIFOLDS),
    paths.PremetricPath(manifolds.Sphere(2), manifolds.SpectralPremetric(lambda x: x, (1.0, 1.0, 1.0))),
]
MANIFOLD_SAMPLERS = [
    samplers.RungeKutta("heun", MANIFOLDS[0]),
    samplers.Ambient(MANIFOLDS[0], samplers.RungeKutta("heun")),
    samplers.GeodesicRandomWalk(MANIFOLDS[0], 0.0),
]
LOSSES = {
    "flow_matching": lambda apply_fn: losses.flow_matching(apply_fn, paths.AffinePath()),
    "score_matching": lambda apply_fn: losses.score_matching(apply_fn, paths.AffinePath()),
    "noise_prediction": lambda apply_fn: losses.noise_prediction(apply_fn, paths.AffinePath()),
    "data_prediction": lambda apply_fn: losses.data_prediction(apply_fn, paths.AffinePath()),
    "bridge_matching": lambda apply_fn: losses.bridge_matching(losses.two_heads(apply_fn, apply_fn), BRIDGES[0]),
    "trajectory_matching": lambda apply_fn: losses.trajectory_matching(apply_fn, SPLINES[0]),
    "distillation": fewstep.distillation,
    "optimal_flow_matching": lambda apply_fn: fewstep.optimal_flow_matching(
        lambda params, x: params["w"] * (x**2).sum(axis=1)
    ),
}
"""By name: the loss of a network `apply_fn`."""
TOKEN_LOSSES = {
    make.__name__: functools.partial(make, path=TOKEN_PATHS[0])
    for make in (
        losses.cross_entropy,
        losses.masked_elbo,
        losses.generalized_kl,
        losses.reversal_elbo,
        losses.next_token,
    )
}
"""By name: the loss of a network `apply_fn` of tokens, logits of five."""
REMASKING = [
    samplers.Cap(),
    samplers.Rescale(),
    samplers.Loop(samplers.Rescale(0.5), at=0.6, num=2),
    samplers.Confidence(),
]
TOKEN_SAMPLERS = [
    samplers.TauLeaping(),
    samplers.MixtureSteps(TOKEN_PATHS[0]),
    *(samplers.MixtureSteps(TOKEN_PATHS[0], remask) for remask in REMASKING),
    samplers.FirstHitting(TOKEN_PATHS[0]),
]
"""Of rates the first, the others of a denoiser."""
OTHER_LOSSES = ("kl_autoencoder", "negative_elbo")
"""Those of two functions, an encoder and a decoder."""
FIXED_STEPS = {
    **{name: lambda s, name=name: samplers.RungeKutta(name) for name in TABLEAUX},
    **{f"ab{order}": lambda s, order=order: samplers.AdamsBashforth(order) for order in (2, 3, 4)},
    "ddim": samplers.DDIM,
    "ddim eta": lambda s: samplers.DDIM(s, eta=0.5),
    "ddpm": lambda s: samplers.DDIM(s, eta=1.0),
    **{f"dpm_solver_{order}": lambda s, order=order: samplers.DPMSolver(s, order) for order in (2, 3)},
    **{f"dpm_solver++_{order}m": lambda s, order=order: samplers.DPMSolverPlusPlus(s, order) for order in (2, 3)},
    "dpm_solver++_2m_sde": lambda s: samplers.DPMSolverPlusPlus(s, sde=True),
    **{f"unipc_{p}": lambda s, p=p: samplers.UniPC(s, p) for p in (1, 2, 3)},
    **{f"unipc_{p}_bh1": lambda s, p=p: samplers.UniPC(s, p, "bh1") for p in (1, 2, 3)},
    "plms": samplers.PLMS,
    "euler_maruyama": samplers.EulerMaruyama,
    "stochastic_heun": samplers.StochasticHeun,
    "churn": lambda s: samplers.Churn(s, churn=1.0),
    "predictor_corrector": samplers.PredictorCorrector,
}
"""By name: the sampler of a schedule, with fixed steps of our own."""
DIFFRAX = {
    **{name: lambda s, name=name: samplers.DiffraxSDE(s, solver=name) for name in ("sea", "shark", "sra1")},
    **{
        f"adaptive_{name}": lambda s, name=name: samplers.DiffraxSDE(s, solver=name, rtol=1e-3, atol=1e-3)
        for name in ("shark", "sra1")
    },
    **{name: lambda s, name=name: samplers.Adaptive(name) for name in ("bosh3", "tsit5", "dopri5", "dopri8")},
    "adaptive_heun": lambda s: samplers.Adaptive("heun"),
    **{name: lambda s, name=name: samplers.Adaptive(name, per_sample=True) for name in ("kvaerno3", "kvaerno5")},
}
"""Those by Diffrax, which are slow to compile."""
SAMPLERS = FIXED_STEPS | DIFFRAX
MODELS = {
    "mlp": functools.partial(MLP, features=(16, 16), time_features=8),
    "unet": functools.partial(UNet, channels=8, channel_mults=(1, 2), num_blocks=1, num_heads=2, num_groups=4),
    "dit": functools.partial(DiT, patch_size=2, hidden=16, num_layers=2, num_heads=2),
}
"""By name: the small network of an `embed` and a `compute`, for images [batch, 4, 4, 2]."""
PUBLISHED = {
    "lightning": models.make_lightning,
    "mmdit": models.make_mmdit,
    "flux": models.make_flux,
    "crossdit": models.make_crossdit,
    "unet_condition": models.make_unet_condition,
    "song_unet": lambda name: models.SongUNet(channels=8, channel_mults=(1, 2), num_blocks=1),
    "videodit": models.make_videodit,
    "wan": models.make_wan,
    "token_transformer": functools.partial(models.make_token_transformer, num_tokens=5),
}
"""By name: the small network of a published family, made by the name "tiny"; each has a file of tests of its own."""
PLAIN_MODELS = {"plain_mlp": PlainMLP}
"""Those without conditions."""
AROUND = {
    "branched": lambda: models.Branched(MODELS["dit"](), {"vector": models.VectorBranch(3)}),
    "controlled": lambda: models.Controlled(MODELS["dit"](), channels=1),
    "text": lambda: TextConditioned(models.make_mmdit("tiny"), WordEncoder(5, 8, hidden=16)),
    "sequence_unet": lambda: models.make_sequence_unet("tiny"),
    "pixel_tokens": lambda: models.PixelTokens(models.make_unet("tiny", out_channels=3), 3),
}
"""Networks around a network, and that of sequences; each has a file of tests of its own."""
EMBEDS = {
    "label": lambda: LabelEmbedding(3),
    "vector": lambda: VectorEmbedding(5),
    "token": lambda: TokenEmbedding(4),
}
OTHER_EMBEDS = {"class": lambda: ClassEmbedding(3)}
"""Those without a value for "no condition", which published networks have."""
LEARNED = {"learned": lambda s: from_method("midpoint", 4)}
"""Those with times of their own."""


def mixture() -> oracles.GaussianMixture:
    """Three Gaussians in the plane with different full covariances, one of them narrow."""
    covariances = np.array([[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.4]], [[0.05, -0.02], [-0.02, 0.05]]])
    return oracles.gaussian_mixture([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]], covariances, [0.5, 0.3, 0.2])


def guided_by_half(schedule, batch):
    """The velocity of a mixture, unguided in the first half of the batch and guided with scale 2 in the second."""
    cats = oracles.gaussian_mixture([[-1.0, 0.0], [1.0, 0.5]], [0.6, 0.8], [0.3, 0.7])
    everything = oracles.gaussian_mixture([[0.0, 0.0], [0.5, -0.5]], [1.0, 0.7])
    scale = np.repeat([1.0, 2.0], batch // 2)
    v_cond, v_uncond = (Counted(oracles.velocity(each, schedule), 1) for each in (cats, everything))
    return classifier_free(v_cond, v_uncond, scale)
