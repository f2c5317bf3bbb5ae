"""Samplers: a velocity function and a starting point in, a `Solution` out."""

from fm_jax.samplers.adaptive import sample_adaptive
from fm_jax.samplers.fixed import ode_step, sample_ode
from fm_jax.samplers.sde import sample_sde, sde_step

__all__ = ["ode_step", "sample_adaptive", "sample_ode", "sample_sde", "sde_step"]
