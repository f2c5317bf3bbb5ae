"""Samplers: a velocity function and a starting point in, a `Solution` out."""

from fm_jax.samplers.adams_bashforth import sample_adams_bashforth
from fm_jax.samplers.adaptive import sample_adaptive
from fm_jax.samplers.bespoke import BespokeSolver, sample_bespoke
from fm_jax.samplers.catalogue import SAMPLERS, Sampler, falling_noise, sample, table
from fm_jax.samplers.churn import sample_churn
from fm_jax.samplers.ddim import sample_ddim
from fm_jax.samplers.diffrax_sde import sample_sde_diffrax
from fm_jax.samplers.dpm_solver import sample_dpm_solver
from fm_jax.samplers.fixed import ode_step, sample_ode
from fm_jax.samplers.langevin import sample_predictor_corrector
from fm_jax.samplers.sde import sample_sde, sde_step
from fm_jax.samplers.unipc import sample_unipc

__all__ = [
    "SAMPLERS",
    "BespokeSolver",
    "Sampler",
    "falling_noise",
    "ode_step",
    "sample",
    "sample_adams_bashforth",
    "sample_adaptive",
    "sample_bespoke",
    "sample_churn",
    "sample_ddim",
    "sample_dpm_solver",
    "sample_ode",
    "sample_predictor_corrector",
    "sample_sde",
    "sample_sde_diffrax",
    "sample_unipc",
    "sde_step",
    "table",
]
