"""Samplers: a velocity function and a starting point in, a `Solution` out.

`sample(v, x0, sampler, times=..., key=...)` runs any of them. A sampler is a frozen dataclass with its own settings:

* for the flow: `RungeKutta`, `AdamsBashforth`, `Adaptive`, and `LearnedSolver`, trained for one velocity;
* for the flow of an affine path with a Gaussian source, in log-SNR: `DDIM`, `DPMSolver`, `DPMSolverPlusPlus`, `UniPC`,
  `PLMS`;
* with noise: `EulerMaruyama`, `StochasticHeun`, `DiffraxSDE`, `Churn`, `PredictorCorrector`, and `DDIM` and
  `DPMSolverPlusPlus` by option;
* on manifolds: `RungeKutta(method, manifold)`, any sampler of flows by `Ambient`, and with noise `GeodesicRandomWalk`;
* for tokens, with noise: `TauLeaping` by rates; `MixtureSteps`, which may mask again (`Cap`, `Rescale`, `Loop`,
  `Confidence`), and `FirstHitting` by a denoiser.

`grids` has the usual times. The steps are functions of their own, for whoever runs the loop; `run_steps` is the loop,
for samplers of your own.
"""

from fm_jax.samplers.adams_bashforth import AdamsBashforth
from fm_jax.samplers.adaptive import Adaptive
from fm_jax.samplers.chain import MixtureSteps, TauLeaping, TokenStep, mixture_step, tau_leap
from fm_jax.samplers.churn import Churn, churn_step, renoise
from fm_jax.samplers.ddim import DDIM, ddim_step
from fm_jax.samplers.diffrax_sde import DiffraxSDE
from fm_jax.samplers.dpm_solver import DPMSolver, DPMSolverPlusPlus
from fm_jax.samplers.first_hitting import FirstHitting
from fm_jax.samplers.langevin import PredictorCorrector, langevin_step
from fm_jax.samplers.learned import LearnedSolver
from fm_jax.samplers.loop import run_steps, step_noise
from fm_jax.samplers.on_manifold import Ambient, GeodesicRandomWalk
from fm_jax.samplers.plms import PLMS
from fm_jax.samplers.remasking import Cap, Confidence, Loop, Remask, Rescale
from fm_jax.samplers.runge_kutta import RungeKutta, Tableau, ode_step
from fm_jax.samplers.sample import sample
from fm_jax.samplers.sde import EulerMaruyama, StochasticHeun, falling_noise, sde_step
from fm_jax.samplers.unipc import UniPC

__all__ = [
    "DDIM",
    "PLMS",
    "AdamsBashforth",
    "Adaptive",
    "Ambient",
    "Cap",
    "Churn",
    "Confidence",
    "DPMSolver",
    "DPMSolverPlusPlus",
    "DiffraxSDE",
    "EulerMaruyama",
    "FirstHitting",
    "GeodesicRandomWalk",
    "LearnedSolver",
    "Loop",
    "MixtureSteps",
    "PredictorCorrector",
    "Remask",
    "Rescale",
    "RungeKutta",
    "StochasticHeun",
    "Tableau",
    "TauLeaping",
    "TokenStep",
    "UniPC",
    "churn_step",
    "ddim_step",
    "falling_noise",
    "langevin_step",
    "mixture_step",
    "ode_step",
    "renoise",
    "run_steps",
    "sample",
    "sde_step",
    "step_noise",
    "tau_leap",
]
