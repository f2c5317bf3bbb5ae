"""How a published system is sampled: its `scheduler_config.json` as a schedule, a kind of prediction, and times."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_integer, check_member, check_number
from fm_jax.samplers import DDIM, PLMS, DPMSolverPlusPlus, RungeKutta, grids
from fm_jax.schedules import DDPM, Linear
from fm_jax.types import Array, Sampler, Schedule

SOLVERS = ("ddim", "dpm_solver++")
"""What samples a network of noise where another solver than the folder's is asked for."""

_OF_CLASS = {
    "PNDMScheduler": ("plms", "leading"),
    "DDIMScheduler": ("ddim", "leading"),
    "EulerDiscreteScheduler": ("euler", "linspace"),
    "DPMSolverMultistepScheduler": ("dpm_solver++", "linspace"),
}
"""By the class of a scheduler: what it does, and its spacing of steps where the file says none."""


@dataclass(frozen=True)
class Steps:
    """How to sample a network.

    Attributes:
        kind: what it predicts: `"velocity"`, `"noise"`, `"data"`, or `"v"`, which is `alpha noise - sigma data`.
        schedule: of its path.
        sampler: the method.
        grid: `grid(num_steps, num_tokens)`: the times, for a picture of so many tokens.
        start: `start(times)`: what standard normal noise is multiplied by at the first of them.
    """

    kind: str
    schedule: Schedule
    sampler: Sampler
    grid: Callable[[int, int], Array]
    start: Callable[[Array], Any] = lambda times: 1.0


def steps_of(config: Mapping[str, Any], solver: str | None = None, *, even_first: bool = False) -> Steps:
    """How a `scheduler_config.json` of diffusers says that a network is sampled.

    Args:
        config: fields of the file.
        solver: one of `SOLVERS`, in place of the one that the file names, on the times that the file speaks of; only
            for networks of noise.
        even_first: whether the pipeline hands its own even grid to the scheduler, as that of FLUX does.

    Raises:
        ValueError: for a scheduler, or an option of one, that is not read here: nothing is passed over.
    """
    name = config.get("_class_name")
    if name == "FlowMatchEulerDiscreteScheduler":
        if solver is not None:
            raise ValueError(f"solver must be None for a flow, whose steps are Euler's, got {solver!r}.")
        return _flow(config, even_first)
    if solver is not None:
        check_member("solver", solver, SOLVERS)
        return _discrete(config, solver, "leading")
    if not isinstance(name, str) or name not in _OF_CLASS:
        raise ValueError(
            f"The folder's scheduler is {name}, whose steps are not taken here: give one of {', '.join(SOLVERS)} as "
            "solver."
        )
    return _discrete(config, *_OF_CLASS[name])


def _refuse(config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} of the scheduler must be {value!r} to be sampled here, got {config[name]!r}.")


def _number(config: Mapping[str, Any], name: str, default: float, within: str) -> float:
    value = config.get(name, default)
    check_number(f"{name} of the scheduler", value, within)
    return value


def _integer(config: Mapping[str, Any], name: str, default: int, least: int) -> int:
    value = config.get(name, default)
    check_integer(f"{name} of the scheduler", value, least=least)
    return value


def _flow(config: Mapping[str, Any], even_first: bool) -> Steps:
    off = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")
    _refuse(config, dict.fromkeys(off, False) | {"num_train_timesteps": 1000, "time_shift_type": "exponential"})
    _refuse(config, {"shift_terminal": None})
    shift, dynamic = _number(config, "shift", 1.0, "(0, inf)"), config.get("use_dynamic_shifting", False)
    low, high = (_number(config, f"{end}_image_seq_len", n, "(0, inf)") for end, n in (("base", 256), ("max", 4096)))
    first, last = (_number(config, f"{end}_shift", n, "(-inf, inf)") for end, n in (("base", 0.5), ("max", 1.15)))
    if dynamic and low == high:
        raise ValueError(f"max_image_seq_len of the scheduler must differ from base_image_seq_len, got {high} twice.")

    def grid(num_steps: int, num_tokens: int) -> Array:
        if dynamic:
            mu = first + (last - first) * (num_tokens - low) / (high - low)
            return grids.shifted(num_steps, math.exp(mu))
        return grids.shifted(num_steps, shift) if even_first else grids.stable_diffusion_3(num_steps, shift)

    if dynamic and not even_first:
        raise ValueError("use_dynamic_shifting of the scheduler must be False for this system, got True.")
    return Steps("velocity", Linear(), RungeKutta("euler"), grid)


def betas_of(config: Mapping[str, Any]) -> tuple[float, ...]:
    """The noise of each step of a discrete diffusion.

    Raises:
        ValueError: for a table that is not known.
    """
    if config.get("trained_betas") is not None:
        return tuple(config["trained_betas"])
    first, last = _number(config, "beta_start", 0.0001, "(0, 1)"), _number(config, "beta_end", 0.02, "(0, 1)")
    num, name = _integer(config, "num_train_timesteps", 1000, least=2), config.get("beta_schedule", "linear")
    check_member("beta_schedule of the scheduler", name, ("linear", "scaled_linear"))
    # In float32, as the networks were trained.
    if name == "linear":
        betas = np.linspace(first, last, num)
    else:
        betas = np.linspace(first**0.5, last**0.5, num) ** 2
    return tuple(np.float32(betas).astype(float).tolist())


def _discrete(config: Mapping[str, Any], solver: str, default_spacing: str) -> Steps:
    expected: dict[str, Any] = {
        "rescale_betas_zero_snr": False,
        "thresholding": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "variance_type": None,
        "timestep_type": "discrete",
    }
    _refuse(config, expected)
    if config.get("_class_name") == "DPMSolverMultistepScheduler" and math.isfinite(
        config.get("lambda_min_clipped", -math.inf)
    ):
        raise ValueError("lambda_min_clipped of the scheduler must be -inf to be sampled here.")
    if config.get("_class_name") == "DDIMScheduler" and config.get("clip_sample", True):
        raise ValueError("clip_sample of the scheduler must be False: latents are not in [-1, 1].")
    if solver == "plms" and not config.get("skip_prk_steps", False):
        raise ValueError(
            "skip_prk_steps of the scheduler must be True: the Runge-Kutta steps of PNDM are not taken here."
        )
    betas = betas_of(config)
    schedule, num = DDPM(betas), len(betas)
    spacing = config.get("timestep_spacing", default_spacing)
    offset = _integer(config, "steps_offset", 0, least=0)
    to_data = _ends_in_data(config, solver)

    def grid(num_steps: int, num_tokens: int) -> Array:
        del num_tokens
        check_integer("num_steps", num_steps, most=num)
        n = _steps(num_steps, num, spacing, offset, solver)
        if (np.diff(n) >= 0).any() or n[-1] < 0 or n[0] >= num:
            raise ValueError(f"{num_steps} steps of spacing {spacing!r} do not fit the {num} steps of the training.")
        t = 1 - (np.append(n, -1 if to_data else 0) + 1) / num
        return jnp.asarray(t if t[-1] > t[-2] else t[:-1])

    samplers = {"dpm_solver++": DPMSolverPlusPlus, "plms": PLMS}
    sampler: Sampler = samplers.get(solver, DDIM)(schedule)
    kinds = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}
    prediction = config.get("prediction_type", "epsilon")
    check_member("prediction_type of the scheduler", prediction, tuple(kinds))
    if solver == "euler" and spacing != "leading":  # begins with sigma times noise; "leading" with what has variance 1
        return Steps(kinds[prediction], schedule, sampler, grid, lambda times: schedule.sigma(times[0]))
    return Steps(kinds[prediction], schedule, sampler, grid)


def _ends_in_data(config: Mapping[str, Any], solver: str) -> bool:
    """Whether the last step ends without noise, or at the first of the training's steps."""
    if config.get("_class_name") == "DDIMScheduler":
        return bool(config.get("set_alpha_to_one", True))
    if config.get("final_sigmas_type", "zero") != "zero":
        raise ValueError(f"final_sigmas_type of the scheduler must be 'zero', got {config['final_sigmas_type']!r}.")
    # The default of PNDM's own scheduler is to end at the first step.
    return solver == "euler" or solver == "dpm_solver++" or bool(config.get("set_alpha_to_one", solver == "ddim"))


def _steps(num_steps: int, num: int, spacing: str, offset: int, solver: str) -> np.ndarray:
    """The steps of the training, 0 to num - 1, that sampling goes through, from noise to data."""
    check_member("timestep_spacing of the scheduler", spacing, ("leading", "trailing", "linspace"))
    if spacing == "trailing":
        return np.round(np.arange(num, 0, -num / num_steps)).astype(int) - 1
    if spacing == "leading":
        gaps = num_steps + 1 if solver == "dpm_solver++" else num_steps
        ratio = num // gaps
        return (np.arange(gaps) * ratio)[::-1][:num_steps].astype(int) + offset
    if solver == "dpm_solver++":
        return np.linspace(0, num - 1, num_steps + 1).round()[::-1][:-1].astype(int)
    n = np.linspace(0, num - 1, num_steps)[::-1]
    if solver == "ddim" or (n != np.round(n)).any():
        raise ValueError("timestep_spacing of the scheduler must be 'leading' or 'trailing' for whole steps.")
    return n.astype(int)
