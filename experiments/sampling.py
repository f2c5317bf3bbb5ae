"""Sampling of any experiment: one function from parameters and noise to samples, by the name of a solver."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.method import Method
from fm_jax.guidance import classifier_free_model
from fm_jax.parameterization import velocity_domain, velocity_fn
from fm_jax.paths import source
from fm_jax.samplers import sample_adaptive, sample_ode, sample_sde
from fm_jax.types import ApplyFn, Array, Cond, Key, ModelFn, Params, Solution

FIXED = ("euler", "midpoint", "heun", "rk4")
ADAPTIVE = ("bosh3", "tsit5", "dopri5", "dopri8")
Generate = Callable[[Params, Key, Array, Cond], Solution]
DrawSource = Callable[[Key, int], Array]


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn."""

    solver: Literal["euler", "midpoint", "heun", "rk4", "bosh3", "tsit5", "dopri5", "dopri8", "euler_maruyama"] = "heun"
    """Fixed steps: euler (order 1), midpoint, heun (2), rk4 (4). Adaptive, by Diffrax: bosh3, tsit5, dopri5, dopri8.
    Stochastic, with the same marginals: euler_maruyama."""
    steps: int = 20
    """Steps of a solver with fixed steps."""
    tolerance: float = 1e-3
    """Relative and absolute tolerance of an adaptive solver."""
    diffusion: float = 1.0
    """Noise coefficient of the stochastic solver."""
    guidance: float = 2.0
    """Scale of classifier-free guidance; 1 is none."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which to guide."""
    sample_batch: int = 100
    """Samples drawn at once."""


def frame_times(method: Method, num: int) -> np.ndarray:
    """Times [num] from the start to the end of what can be sampled, for the frames of an animation."""
    return np.linspace(*velocity_domain(method.prediction, method.schedule), num)


def make_generate(
    sampling: Sampling, method: Method, apply_fn: ApplyFn, *, null_label: int | None, times: np.ndarray | None = None
) -> Generate:
    """Builds `generate(params, key, x0, labels) -> Solution`, jitted.

    Args:
        sampling: solver and guidance.
        method: that the network was trained with.
        apply_fn: the network.
        null_label: the label that stands for none; `None` for an unconditional network, which is not guided.
        times: if given, the solution also has the trajectory at these times, from the start of the path to its end;
            they are the steps of a solver with fixed steps, and the stochastic solver gives way to tsit5.

    Returns:
        A function of parameters, key (only the stochastic solver uses it), standard normal noise [batch, ...] and
        labels [batch], which an unconditional network does not see.
    """
    t0, t1 = velocity_domain(method.prediction, method.schedule)

    def generate(params: Params, key: Key, x0: Array, labels: Cond) -> Solution:
        def network(t: Array, x: Array, cond: Cond = None, /) -> Array:
            return apply_fn(params, t, x, cond, train=False, rngs=None)

        model_fn: ModelFn = network
        if null_label is None:
            labels = None
        else:
            model_fn = classifier_free_model(
                network, null_label, sampling.guidance, interval=sampling.guidance_interval
            )
        v = velocity_fn(model_fn, method.prediction, method.schedule, labels)
        x0 = source(method.schedule, x0, t0)
        if sampling.solver in FIXED:
            if times is not None:
                return sample_ode(v, x0, grid=times, method=sampling.solver, trajectory=True)
            return sample_ode(v, x0, num_steps=sampling.steps, method=sampling.solver, t0=t0, t1=t1)
        if sampling.solver in ADAPTIVE or times is not None:
            solver, tolerance = sampling.solver if sampling.solver in ADAPTIVE else "tsit5", sampling.tolerance
            return sample_adaptive(v, x0, rtol=tolerance, atol=tolerance, solver=solver, t0=t0, t1=t1, times=times)
        return sample_sde(
            v, None, sampling.diffusion, key, x0, schedule=method.schedule, num_steps=sampling.steps, t0=t0, t1=t1
        )

    return jax.jit(generate)


def generate_many(
    generate: Generate, params: Params, key: Key, draw_x0: DrawSource, labels: Array | np.ndarray, batch_size: int
) -> tuple[Array, float]:
    """Draws a sample for every label, in batches of one size so that all share one compilation.

    Args:
        generate: from `make_generate`.
        params: network parameters.
        key: PRNG key.
        draw_x0: `draw_x0(key, num)`, source samples [num, ...].
        labels: [num].
        batch_size: samples drawn at once.

    Returns:
        Samples [num, ...], and the mean number of network evaluations an example.
    """
    num = len(labels)
    padded = jnp.resize(labels, (-(-num // batch_size) * batch_size,))
    samples, nfe = [], []
    for i, part in enumerate(padded.reshape(-1, batch_size)):
        key_x0, key_sampler = jax.random.split(jax.random.fold_in(key, i))
        solution = generate(params, key_sampler, draw_x0(key_x0, batch_size), part)
        samples.append(solution.x)
        nfe.append(solution.nfe)
    return jnp.concatenate(samples)[:num], float(jnp.mean(jnp.asarray(nfe)))
