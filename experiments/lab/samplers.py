"""Samplers by name, for the command lines, and the files of learned solvers."""

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_member
from fm_jax.samplers import (
    DDIM,
    PLMS,
    AdamsBashforth,
    Adaptive,
    Churn,
    DiffraxSDE,
    DPMSolver,
    DPMSolverPlusPlus,
    EulerMaruyama,
    LearnedSolver,
    PredictorCorrector,
    RungeKutta,
    StochasticHeun,
    UniPC,
)
from fm_jax.schedules import Linear
from fm_jax.train.folder import replacing
from fm_jax.types import Params, Sampler, Schedule

OfSchedule = Callable[[Schedule], Sampler]
SAMPLERS: dict[str, Sampler | OfSchedule] = {
    **{name: RungeKutta(name) for name in ("euler", "midpoint", "heun", "ralston", "heun3", "rk4")},
    **{f"ab{order}": AdamsBashforth(order) for order in (2, 3, 4)},
    "ddim": DDIM,
    **{f"dpm_solver_{order}": partial(DPMSolver, order=order) for order in (2, 3)},
    **{f"dpm_solver++_{order}m": partial(DPMSolverPlusPlus, order=order) for order in (2, 3)},
    "plms": PLMS,
    **{f"unipc_{p}": partial(UniPC, p=p) for p in (1, 2, 3)},
    **{f"unipc_{p}_bh1": partial(UniPC, p=p, variant="bh1") for p in (1, 2, 3)},
    "ddpm": partial(DDIM, eta=1.0),
    "dpm_solver++_2m_sde": partial(DPMSolverPlusPlus, sde=True),
    "euler_maruyama": EulerMaruyama,
    "stochastic_heun": StochasticHeun,
    "churn": Churn,
    "predictor_corrector": PredictorCorrector,
    **{name: partial(DiffraxSDE, solver=name) for name in ("sea", "shark", "sra1")},
    **{name: Adaptive(name) for name in ("bosh3", "tsit5", "dopri5", "dopri8")},
    **{name: Adaptive(name, per_sample=True) for name in ("kvaerno3", "kvaerno5")},
    **{f"adaptive_{name}": partial(DiffraxSDE, solver=name, rtol=1e-3, atol=1e-3) for name in ("shark", "sra1")},
}
"""A sampler, or what makes it of the schedule of the path where it needs one, and with it a standard normal source."""


def needs_schedule(name: str) -> bool:
    """Whether the sampler of that name works with the schedule of the path."""
    return callable(SAMPLERS[name])


def make_sampler(name: str, schedule: Schedule, *, tolerance: float | None = None, **options: float | None) -> Sampler:
    """The sampler of that name.

    Args:
        name: one of `SAMPLERS`.
        schedule: of the path.
        tolerance: relative and absolute, where steps are adaptive.
        options: for whichever sampler has a field of that name, unless its name says the value; `None` is its default.

    Raises:
        ValueError: for an unknown name, and as the sampler.
    """
    check_member("--solver", name, tuple(SAMPLERS))
    entry = SAMPLERS[name]
    sampler = entry(schedule) if callable(entry) else entry
    own = options_of(name)
    given = {option: value for option, value in options.items() if option in own and value is not None}
    if "tolerance" in own and tolerance is not None:
        given |= {"rtol": tolerance, "atol": tolerance}
    return dataclasses.replace(sampler, **given)  # type: ignore[type-var]


def options_of(name: str) -> set[str]:
    """The options that the sampler of that name takes, `steps` and `grid` or `tolerance` among them."""
    entry = SAMPLERS[name]
    sampler = entry(Linear()) if callable(entry) else entry
    own = {field.name for field in dataclasses.fields(sampler)} - set(getattr(entry, "keywords", ()))  # type: ignore
    return own | ({"tolerance"} if sampler.nfe_per_step is None else {"steps", "grid"})


def takers_of(option: str) -> str:
    """Which samplers take an option, in words: up to three of them."""
    names = [name for name in SAMPLERS if option in options_of(name)]
    return ", ".join(names[:3]) + (" and others" if len(names) > 3 else "")


def table() -> str:
    """The samplers as lines of text: name, order, evaluations a step, whether random."""
    lines = []
    for name in SAMPLERS:
        sampler = make_sampler(name, Linear())
        order = f"{'weak ' if sampler.stochastic else ''}order {sampler.order}"
        cost = "adaptive steps" if sampler.nfe_per_step is None else f"{sampler.nfe_per_step} NFE a step"
        facts = [order] * (sampler.order is not None) + [cost] + ["random"] * sampler.stochastic
        lines.append(f"{name}: {', '.join(facts)}")
    return "\n".join(lines)


_NETWORK = "network"
"""The entry of a solver's file that says whose solver it is."""


def checksum_of(params: Params) -> str:
    """16 hexadecimal digits that tell the parameters of one network from those of another."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def save_solver(path: Path, solver: LearnedSolver, params: Params) -> None:
    """Writes the numbers of a solver learned for the network of these parameters, for `load_solver`."""
    arrays: dict[str, Any] = {
        field.name: np.asarray(getattr(solver, field.name)) for field in dataclasses.fields(solver)
    }
    arrays[_NETWORK] = np.array(checksum_of(params))
    with replacing(path) as unfinished:
        np.savez(unfinished, **arrays)


def load_solver(path: Path, params: Params) -> LearnedSolver:
    """A learned solver from the file that `experiments.learned_solver` wrote, for the network of these parameters."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist: python -m experiments.learned_solver writes such a file.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            whose = str(arrays[_NETWORK]) if _NETWORK in arrays else None
            solver = LearnedSolver(**{name: jnp.asarray(each) for name, each in arrays.items() if name != _NETWORK})
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise SystemExit(
            f"{path} is not a learned solver, or damaged: python -m experiments.learned_solver writes such a file."
        ) from error
    if whose not in (None, checksum_of(params)):
        raise SystemExit(
            f"{path} was learned for another network, or an earlier step of this one: python -m "
            "experiments.learned_solver makes one for it."
        )
    return solver
