"""Every sampler by name, with its order and its cost: for command lines, benchmarks and whoever wants to compare."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from fm_jax.samplers.adams_bashforth import START, sample_adams_bashforth
from fm_jax.samplers.adaptive import IMPLICIT, sample_adaptive
from fm_jax.samplers.churn import sample_churn
from fm_jax.samplers.ddim import sample_ddim
from fm_jax.samplers.diffrax_sde import sample_sde_diffrax
from fm_jax.samplers.dpm_solver import sample_dpm_solver
from fm_jax.samplers.fixed import METHODS, sample_ode
from fm_jax.samplers.langevin import sample_predictor_corrector
from fm_jax.samplers.loop import check_key
from fm_jax.samplers.sde import sample_sde
from fm_jax.samplers.unipc import sample_unipc
from fm_jax.schedules import coefficients
from fm_jax.types import Array, Diffusion, Key, Schedule, Solution, VelocityFn, check_member

FIXED_STEPS = ("num_steps", "grid", "trajectory")
ADAPTIVE_STEPS = ("rtol", "atol")


@dataclass(frozen=True)
class Sampler:
    """What to know of a sampler before choosing it."""

    run: Callable[..., Solution]
    """`run(v, key, x0, schedule, **options)`; `key` and `schedule` are ignored where they are not needed."""
    order: int
    """Order of convergence in the step size, the weak order where it is random. With steps in log-SNR it holds between
    times with finite log-SNR, and for multistep methods where the first steps, of low order, are short."""
    nfe_per_step: int | None
    """Evaluations of the velocity in a step; `None` if steps are adaptive, by tolerances."""
    stochastic: bool = False
    """Whether it draws noise on the way, and so needs a key."""
    needs_schedule: bool = False
    """Whether it needs the schedule of the path, and with it a standard normal source."""
    own_options: tuple[str, ...] = ()
    """What it takes besides its times; see the sampler's own function."""


def falling_noise(schedule: Schedule) -> Callable[[Array], Array]:
    """The diffusion coefficient g with `g(t)^2 = -d sigma^2 / dt`: noise is added as fast as the path sheds it.

    On `VE` and `EDM` it is that of the reverse diffusion; it vanishes with sigma, so that the score term stays finite.
    """

    def g(t: Array) -> Array:
        c = coefficients(schedule, t)
        return jnp.sqrt(jnp.maximum(-2 * c.sigma * c.d_sigma, 0))

    return g


def _sde(run: Callable[..., Solution], **fixed: Any) -> Callable[..., Solution]:
    def sample(
        v: VelocityFn, key: Key, x0: Array, schedule: Schedule, *, diffusion: Diffusion | None = None, **options: Any
    ) -> Solution:
        g = falling_noise(schedule) if diffusion is None else diffusion
        return run(v, None, g, key, x0, schedule=schedule, **fixed, **options)

    return sample


def _flow(run: Callable[..., Solution], **fixed: Any) -> Callable[..., Solution]:
    return lambda v, key, x0, schedule, **options: run(v, x0, **fixed, **options)


def _path(run: Callable[..., Solution], **fixed: Any) -> Callable[..., Solution]:
    return lambda v, key, x0, schedule, **options: run(v, x0, schedule=schedule, **fixed, **options)


def _ddim(
    v: VelocityFn, key: Key | None, x0: Array, schedule: Schedule, *, eta: float = 0.0, **options: Any
) -> Solution:
    return sample_ddim(v, x0, schedule=schedule, eta=eta, key=key if eta > 0 else None, **options)


def _keyed_path(run: Callable[..., Solution], **fixed: Any) -> Callable[..., Solution]:
    return lambda v, key, x0, schedule, **options: run(v, x0, schedule=schedule, key=key, **fixed, **options)


def _noisy(run: Callable[..., Solution]) -> Callable[..., Solution]:
    return lambda v, key, x0, schedule, **options: run(v, key, x0, schedule=schedule, **options)


def _adaptive(order: int, **fixed: Any) -> Sampler:
    options = tuple(name for name in ("times", "per_sample", "max_steps", "adjoint") if name not in fixed)
    return Sampler(_flow(sample_adaptive, **fixed), order, None, own_options=options)


def _diffrax_sde(solver: str, order: int, nfe_per_step: int | None, *own_options: str) -> Sampler:
    run = _sde(sample_sde_diffrax, solver=solver)
    return _random(run, order, nfe_per_step, own_options=("diffusion", "tol", *own_options))


_on_path = functools.partial(Sampler, needs_schedule=True)
_random = functools.partial(Sampler, needs_schedule=True, stochastic=True)
SAMPLERS: dict[str, Sampler] = {
    **{name: Sampler(_flow(sample_ode, method=name), m.order, m.stages) for name, m in METHODS.items()},
    **{f"ab{order}": Sampler(_flow(sample_adams_bashforth, order=order), order, 1) for order in START},
    "ddim": _on_path(_ddim, 1, 1, own_options=("eta",)),
    "dpm_solver_2": _on_path(_path(sample_dpm_solver, method="dpm_solver_2"), 2, 2),
    "dpm_solver_3": _on_path(_path(sample_dpm_solver, method="dpm_solver_3"), 3, 3),
    "dpm_solver++_2m": _on_path(_path(sample_dpm_solver, method="dpm_solver++_2m"), 2, 1),
    "dpm_solver++_3m": _on_path(_path(sample_dpm_solver, method="dpm_solver++_3m"), 3, 1),
    **{
        f"unipc_{order}{suffix}": _on_path(_path(sample_unipc, order=order, variant=variant), order + 1, 1)
        for variant, suffix in (("bh2", ""), ("bh1", "_bh1"))
        for order in (1, 2, 3)
    },
    "ddpm": _random(_keyed_path(sample_ddim, eta=1.0), 1, 1),
    "dpm_solver++_2m_sde": _random(_keyed_path(sample_dpm_solver, method="dpm_solver++_2m_sde"), 2, 1),
    "euler_maruyama": _random(_sde(sample_sde), 1, 1, own_options=("diffusion",)),
    "stochastic_heun": _random(_sde(sample_sde, method="heun"), 2, 2, own_options=("diffusion",)),
    "churn": _random(_noisy(sample_churn), 2, 2, own_options=("churn", "churn_range", "noise_scale", "method")),
    "predictor_corrector": _random(
        _noisy(sample_predictor_corrector), 1, 2, own_options=("diffusion", "corrector_steps", "snr")
    ),
    "sea": _diffrax_sde("sea", 1, 1),
    "shark": _diffrax_sde("shark", 2, 2),
    "sra1": _diffrax_sde("sra1", 2, 2),
    **{
        name: _adaptive(order, solver=name)
        for name, order in [("bosh3", 3), ("tsit5", 5), ("dopri5", 5), ("dopri8", 8)]
    },
    **{name: _adaptive(int(name[-1]), solver=name, per_sample=True) for name in IMPLICIT},
    "adaptive_shark": _diffrax_sde("shark", 2, None, "max_steps"),
    "adaptive_sra1": _diffrax_sde("sra1", 2, None, "max_steps"),
}
"""All samplers that are called with a velocity function and a starting point."""


def sample(
    name: str, v: VelocityFn, key: Key | None, x0: Array, *, schedule: Schedule | None = None, **options: Any
) -> Solution:
    """A sample by the sampler of that name.

    Args:
        name: one of `SAMPLERS`.
        v: velocity function.
        key: typed key, or `None`, which will do for samplers that are not random.
        x0: [batch, ...] at `t0`.
        schedule: of the path of `v`; may be `None` where the sampler does not need it.
        options: `t0`, `t1`; `num_steps` or `grid`, and `trajectory`, with fixed steps; `rtol` and `atol` with adaptive
            steps; and the sampler's `own_options`.

    Returns:
        `Solution`.

    Raises:
        ValueError: for an unknown name, a key or schedule that is missing, or an option that the sampler does not have;
            and as the sampler's own function.

    Example:
        >>> sample("rk4", lambda t, x: x, None, jnp.ones((1, 1)), num_steps=1).x
        Array([[2.7083335]], dtype=float32)
    """
    check_member("name", name, tuple(SAMPLERS))
    sampler = SAMPLERS[name]
    if sampler.stochastic:
        if key is None:
            raise ValueError(f"key must be given: {name!r} draws noise on the way.")
        check_key(key)
    if sampler.needs_schedule and schedule is None:
        raise ValueError(f"schedule must be given: {name!r} works with the alpha and sigma of the path.")
    steps = ADAPTIVE_STEPS if sampler.nfe_per_step is None else FIXED_STEPS
    allowed = ("t0", "t1", *steps, *sampler.own_options)
    if wrong := sorted(set(options) - set(allowed)):
        raise ValueError(f"{name!r} takes {', '.join(allowed)}; got {', '.join(wrong)}.")
    return sampler.run(v, key, x0, schedule, **options)


def table() -> str:
    """The samplers as lines of text: name, order, evaluations a step, whether random."""
    lines = []
    for name, sampler in SAMPLERS.items():
        cost = "adaptive steps" if sampler.nfe_per_step is None else f"{sampler.nfe_per_step} NFE a step"
        order = f"{'weak ' if sampler.stochastic else ''}order {sampler.order}"
        lines.append(f"{name}: {order}, {cost}{', random' if sampler.stochastic else ''}")
    return "\n".join(lines)
