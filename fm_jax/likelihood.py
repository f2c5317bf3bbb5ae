"""The likelihood of data under a flow, by the instantaneous change of variables.

Along dx/dt = v(t, x) the log-density obeys d/dt log p_t(x_t) = -div v(t, x_t) (Chen et al. 2018, arXiv:1806.07366,
thm. 1; Grathwohl et al. 2018, arXiv:1810.01367, eq. 3), so that one solve of the state together with its log-density
gives both: `log p_1(x_1) = log p_0(x_0) - integral of div v from t0 to t1`.

A solver here is any sampler of ODEs, `solve(v, z, t0=, t1=) -> Solution`. It sees one array z [batch, d + 1], the
flattened state and the log-density, which so takes part in an adaptive solver's error control. It must: with steps
chosen by the state alone, `log_prob` on Gaussian mixtures was 15 to 90 times less accurate for two thirds of the NFE.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.divergence import Divergence, Exact
from fm_jax.nfe import nfe_per_call, with_nfe_per_call
from fm_jax.samplers.adaptive import sample_adaptive
from fm_jax.samplers.grids import check_state
from fm_jax.samplers.loop import check_key
from fm_jax.types import Array, ArrayTree, Key, Solution, VelocityFn

Solve: TypeAlias = Callable[..., Solution]
"""`solve(v, z, t0=, t1=) -> Solution`: `sample_adaptive`, or a sampler whose other options are bound."""
LogDensity: TypeAlias = Callable[[Array], Array]
"""`log_p0(x) -> [batch]` in nats, for x [batch, ...]."""

_EXACT = Exact()


class NotConvergedError(RuntimeError):
    """A likelihood that changes with the accuracy of the solve by more than is tolerated."""


def normal_log_prob(x: Array, scale: float = 1.0) -> Array:
    """The log-density of N(0, scale^2 I) in nats: [batch, ...] -> [batch].

    Example:
        >>> normal_log_prob(jnp.zeros((1, 2)))  # -log(2 pi)
        Array([-1.837877], dtype=float32)
    """
    squares = (x / scale) ** 2 + math.log(2 * math.pi * scale**2)
    return -0.5 * squares.reshape(x.shape[0], -1).sum(axis=1)


def log_prob(
    v: VelocityFn,
    x1: Array,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    log_p0: LogDensity = normal_log_prob,
    solve: Solve = sample_adaptive,
    t0: float = 0.0,
    t1: float = 1.0,
) -> Array:
    """The log-density of data under a flow, in nats: `encode_and_log_prob` without the encoding.

    Differentiable in `x1` and in what `v` closes over, so that `-log_prob(...).mean()` trains a continuous normalising
    flow. With a stochastic divergence it is unbiased up to the error of the solve.

    Args:
        v: velocity function.
        x1: data [batch, ...], any event shape.
        key: for a stochastic divergence, which draws its probes once; `Exact` ignores it.
        divergence: `Exact`, `Hutchinson` or `HutchPlusPlus`, from `fm_jax.divergence`.
        log_p0: log-density of the source at `t0`. For a schedule with sigma(t0) = s and hardly any signal, such as VE,
            `functools.partial(normal_log_prob, scale=s)`.
        solve: solver; `sample_adaptive` has tolerances of 1e-5, `functools.partial(sample_ode, num_steps=50,
            method="rk4")` fixed steps.
        t0: where the source is.
        t1: where the data are. Short of 1 where the velocity is singular there, see `schedule.domain`.

    Returns:
        [batch], in nats.

    Raises:
        ValueError: for a stochastic divergence without a key; what `solve` refuses.

    Example:
        >>> from fm_jax.samplers import sample_ode
        >>> solve = functools.partial(sample_ode, num_steps=10, method="rk4")
        >>> log_p = log_prob(lambda t, x: x, jnp.zeros((1, 2)), solve=solve)
        >>> abs(float(log_p[0]) + math.log(2 * math.pi) + 2) < 1e-4  # N(0, e^2 I)
        True
    """
    _, log_p1 = encode_and_log_prob(v, x1, key=key, divergence=divergence, log_p0=log_p0, solve=solve, t0=t0, t1=t1)
    return log_p1


def encode_and_log_prob(
    v: VelocityFn,
    x1: Array,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    log_p0: LogDensity = normal_log_prob,
    solve: Solve = sample_adaptive,
    t0: float = 0.0,
    t1: float = 1.0,
) -> tuple[Solution, Array]:
    """Where data come from, and their log-density, in one solve from `t1` back to `t0`.

    Args:
        v: velocity function.
        x1: data [batch, ...].
        key: see `log_prob`, as the other options.
        divergence: estimator of div v.
        log_p0: log-density of the source.
        solve: solver.
        t0: where the source is.
        t1: where the data are.

    Returns:
        `Solution` with x the source [batch, ...] and nfe the evaluations of `v` (each with the Jacobian products that
        the divergence takes, which are not counted); the log-density of the data, [batch] in nats.
    """
    solution, change = _transport(v, "x1", x1, key, divergence, solve, t1, t0)
    return solution, log_p0(solution.x) - change


def sample_and_log_prob(
    v: VelocityFn,
    x0: Array,
    *,
    key: Key | None = None,
    divergence: Divergence = _EXACT,
    log_p0: LogDensity = normal_log_prob,
    solve: Solve = sample_adaptive,
    t0: float = 0.0,
    t1: float = 1.0,
) -> tuple[Solution, Array]:
    """Samples and their log-density, in one solve from `t0` to `t1`.

    Args:
        v: velocity function.
        x0: drawn from the source, [batch, ...].
        key: see `log_prob`, as the other options.
        divergence: estimator of div v.
        log_p0: log-density of the source.
        solve: solver.
        t0: where the source is.
        t1: where the samples are.

    Returns:
        `Solution` with x the samples [batch, ...] and nfe as for `encode_and_log_prob`; their log-density, [batch] in
        nats.
    """
    solution, change = _transport(v, "x0", x0, key, divergence, solve, t0, t1)
    return solution, log_p0(jnp.asarray(x0)) + change


def _transport(
    v: VelocityFn, name: str, x: Array, key: Key | None, divergence: Divergence, solve: Solve, start: float, end: float
) -> tuple[Solution, Array]:
    """Carries x from `start` to `end`; and the change of its log-density on the way, [batch]."""
    x = jnp.asarray(x)
    check_state(x, name)
    batch, event = x.shape[0], x.shape[1:]
    probes = divergence.draw(key, x)

    def state(z: Array) -> Array:
        return z[..., :-1].reshape(*z.shape[:-1], *event)

    def augmented(t: Array, z: Array) -> Array:
        velocity, div = divergence(v, probes, t, state(z))
        return jnp.concatenate([velocity.reshape(batch, -1), -div[:, None]], axis=1).astype(z.dtype)

    z = jnp.concatenate([x.reshape(batch, -1), jnp.zeros((batch, 1), x.dtype)], axis=1)
    z, nfe, trajectory = solve(with_nfe_per_call(augmented, nfe_per_call(v)), z, t0=start, t1=end)
    return Solution(state(z), nfe, None if trajectory is None else state(trajectory)), z[:, -1]


def dequantize(key: Key, images: ArrayTree, levels: int = 256) -> Array:
    """Spreads level k of K over its bin: `2 (k + u) / K - 1`, u uniform on [0, 1).

    The scale of `fm_jax.data.pipeline.batches(..., dequantize=True)`. That of `data.images.to_float`, on which the
    middles of the bins are `2 k / (K - 1) - 1`, is larger by K / (K - 1).

    Args:
        key: typed key.
        images: integers in 0 .. levels - 1, any shape.
        levels: K.

    Returns:
        In [-1, 1], in the shape of `images`.
    """
    images = jnp.asarray(images)
    dtype = jnp.result_type(float)
    return 2 * (images.astype(dtype) + jax.random.uniform(key, images.shape, dtype)) / levels - 1


def bits_per_dim(
    v: VelocityFn,
    key: Key,
    images: ArrayTree,
    *,
    levels: int = 256,
    num_draws: int = 1,
    divergence: Divergence = _EXACT,
    log_p0: LogDensity = normal_log_prob,
    solve: Solve = sample_adaptive,
    t0: float = 0.0,
    t1: float = 1.0,
    tolerance: float = 0.01,
) -> Array:
    """An upper bound of the negative log-likelihood of images with discrete pixels, in bits per dimension.

    The model's probability of an image is the integral of its density over the image's bin, `(2 / K)^d E_u p(x_u)`
    with x_u from `dequantize`. By Jensen's inequality, for n draws

        bits = -1 / (d log 2) E log[1/n sum_i p(x_ui)] + log2(K / 2)

    is above that of the integral, less so the larger n.

    Every solve is done twice on the same draws, at the accuracy of `solve` and at half its steps or ten times its
    tolerances, and nothing is reported where the two disagree. Works on the host: call it outside `jax.jit`, which it
    applies itself, compiling once for each `v`, `solve` and shape (the objects, so do not make them anew each batch).

    Args:
        v: velocity function of a model of dequantised data; called with one draw for each image.
        key: for dequantisation and the probes; draw i uses the two halves of `fold_in(key, i)`.
        images: integers in 0 .. levels - 1, [batch, ...].
        levels: K.
        num_draws: n, 1 for the usual bound; one after the other, in the memory of one.
        divergence: see `log_prob`; must be exact for more than one draw.
        log_p0: see `log_prob`.
        solve: see `log_prob`; must have an option `num_steps`, or `rtol` and `atol`.
        t0: where the source is.
        t1: where the data are.
        tolerance: largest difference between the two solves for any image, in bits per dimension.

    Returns:
        [batch], in bits per dimension.

    Raises:
        ValueError: for images that are not such integers, or a bad number or key; for more than one draw with a
            stochastic divergence: the exponential of a noisy log-density is too large on average, and no bound is left.
        NotConvergedError: if the two solves differ by more than `tolerance`, or are not finite.

    References:
        Theis et al. 2015 (arXiv:1511.01844, sec. 3.1) for dequantisation; Burda et al. 2015 (arXiv:1509.00519, eq. 8)
        for several draws.
    """
    images = np.asarray(images)
    _check_images(images, levels)
    check_key(key)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}.")
    if num_draws > 1 and divergence.stochastic:
        raise ValueError(f"num_draws = {num_draws} needs an exact divergence, got {divergence}: else it is no bound.")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}.")
    coarse, fine = _bits(v, key, images, levels, num_draws, divergence, log_p0, solve, t0, t1)
    gap = np.abs(np.asarray(fine) - np.asarray(coarse))
    if not (gap <= tolerance).all():
        worst = int(np.argmax(np.where(np.isfinite(gap), gap, np.inf)))
        said = [
            f"{bits[worst]:.3f} bits/dim at {', '.join(f'{name} = {value:g}' for name, value in options.items())}"
            for bits, options in zip((coarse, fine), _accuracies(solve), strict=True)
        ]
        raise NotConvergedError(
            f"the solve has not converged: {said[0]}, {said[1]} for image {worst}, more than {tolerance} apart. "
            "Take a finer solve."
        )
    return fine


_STATIC = ("v", "levels", "num_draws", "divergence", "log_p0", "solve", "t0", "t1")


@functools.partial(jax.jit, static_argnames=_STATIC)
def _bits(
    v: VelocityFn,
    key: Key,
    images: Array,
    levels: int,
    num_draws: int,
    divergence: Divergence,
    log_p0: LogDensity,
    solve: Solve,
    t0: float,
    t1: float,
) -> Array:
    """[2, batch]: from the coarse and from the fine solve."""
    dim = math.prod(images.shape[1:])

    def log_probs(i: Array) -> Array:
        key_u, key_probes = jax.random.split(jax.random.fold_in(key, i))
        x1 = dequantize(key_u, images, levels)
        solves = [functools.partial(solve, **options) for options in _accuracies(solve)]
        options = {"key": key_probes, "divergence": divergence, "log_p0": log_p0, "t0": t0, "t1": t1}
        return jnp.stack([log_prob(v, x1, solve=each, **options) for each in solves])

    draws = jax.lax.map(log_probs, jnp.arange(num_draws))
    log_p = jax.nn.logsumexp(draws, axis=0) - math.log(num_draws)
    return -log_p / (dim * math.log(2)) + math.log2(levels / 2)


def _accuracies(solve: Solve) -> tuple[dict[str, float], dict[str, float]]:
    """The options that decide the accuracy of a solver, coarser ones and its own."""
    options = {name: parameter.default for name, parameter in inspect.signature(solve).parameters.items()}
    num_steps, rtol, atol = (options.get(name) for name in ("num_steps", "rtol", "atol"))
    if isinstance(num_steps, (int, np.integer)):
        return {"num_steps": int(num_steps) // 2}, {"num_steps": int(num_steps)}
    if isinstance(rtol, float | int) and isinstance(atol, float | int):
        return {"rtol": 10 * rtol, "atol": 10 * atol}, {"rtol": rtol, "atol": atol}
    raise ValueError(f"solve must have num_steps, or rtol and atol, for its convergence to be checked, got {solve}.")


def _check_images(images: np.ndarray, levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}.")
    if images.ndim < 2 or not np.issubdtype(images.dtype, np.integer):
        raise ValueError(f"images must be integers [batch, ...], got {images.dtype} of shape {images.shape}.")
    if images.size and not (images.min() >= 0 and images.max() < levels):
        raise ValueError(f"images must be in 0 .. {levels - 1}, got {images.min()} .. {images.max()}.")
