"""The likelihood of images with discrete pixels, in bits per dimension."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import check_array, check_has, check_integer, check_key, check_number, check_source, is_traced
from fm_jax.likelihood.divergence import Divergence
from fm_jax.likelihood.log_prob import ADAPTIVE, DEFAULT_STEPS, EXACT, NORMAL, log_prob
from fm_jax.samplers.sample import times_of
from fm_jax.types import Array, ArrayTree, Key, PerExample, Sampler, Source, VelocityFn


class NotConvergedError(RuntimeError):
    """A likelihood that changes with the accuracy of the solve by more than is tolerated."""


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

    Raises:
        ValueError: if `images` are no integers or, unless they are traced, leave 0 .. levels - 1.
    """
    check_key(key)
    check_pixels(images, levels)
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
    divergence: Divergence = EXACT,
    source: Source = NORMAL,
    sampler: Sampler = ADAPTIVE,
    times: int | ArrayTree | None = None,
    tolerance: float = 0.01,
) -> PerExample:
    """An upper bound of the negative log-likelihood of images with discrete pixels, in bits per dimension.

    The model's probability of an image is the integral of its density over the image's bin, `(2 / K)^d E_u p(x_u)`
    with x_u from `dequantize`. By Jensen's inequality, for n draws

        bits = -1 / (d log 2) E log[1/n sum_i p(x_ui)] + log2(K / 2)

    is above that of the integral, less so the larger n.

    Every solve is done twice on the same draws, at the accuracy asked for and at half the steps or ten times the
    tolerances, and nothing is reported where the two disagree. Works on the host: call it outside `jax.jit`, which it
    applies itself, compiling once for each `v`, sampler and shape (do not make `v` anew for each batch).

    Notebooks: (7.8).

    Args:
        v: velocity function of a model of dequantised data; called with one draw for each image.
        key: for dequantisation and the probes; draw i uses the two halves of `fold_in(key, i)`.
        images: integers in 0 .. levels - 1, [batch, ...].
        levels: K.
        num_draws: n, 1 for the usual bound; one after the other, in the memory of one.
        divergence: see `log_prob`; must be exact for more than one draw.
        source: see `log_prob`, as the next two.
        sampler: how the flow is solved.
        times: an even number of steps where they are fixed.
        tolerance: largest difference between the two solves for any image, in bits per dimension.

    Returns:
        In bits per dimension.

    Raises:
        ValueError: for images that are not such integers, or a bad number or key; for more than one draw with a
            stochastic divergence: the exponential of a noisy log-density is too large on average, and no bound is left.
        NotConvergedError: if the two solves differ by more than `tolerance`, or are not finite.

    References:
        Theis et al. 2015 (arXiv:1511.01844, sec. 3.1) for dequantisation; Burda et al. 2015 (arXiv:1509.00519, eq. 8)
        for several draws.
    """
    check_pixels(images, levels)
    images = np.asarray(images)
    if images.ndim < 2 or not images.size:
        raise ValueError(f"images must be [batch, ...] with at least one example, got shape {images.shape}.")
    check_key(key)
    check_integer("num_draws", num_draws)
    check_has("divergence", divergence, ("draw", "stochastic"), "a divergence, such as Exact()")
    check_source(source)
    if num_draws > 1 and divergence.stochastic:
        raise ValueError(f"num_draws = {num_draws} needs an exact divergence, got {divergence}: else it is no bound.")
    check_number("tolerance", tolerance, "(0, inf)")
    steps = times_of(v, sampler, times, np.zeros((), float), DEFAULT_STEPS, backward=True)
    grid = tuple(np.asarray(steps).tolist())
    solves = _coarser(sampler, grid), (sampler, grid)
    coarse, fine = _bits(v, key, images, levels, num_draws, divergence, source, solves)
    gap = np.abs(np.asarray(fine) - np.asarray(coarse))
    if not (gap <= tolerance).all():
        worst = int(np.argmax(np.where(np.isfinite(gap), gap, np.inf)))
        said = [
            f"{bits[worst]:.3f} bits/dim by {how} in {len(times) - 1} steps"
            for bits, (how, times) in zip((coarse, fine), solves, strict=True)
        ]
        raise NotConvergedError(
            f"the solve has not converged: {said[0]}, {said[1]} for image {worst}, more than {tolerance} apart. "
            "Take a finer solve."
        )
    return fine


@functools.partial(jax.jit, static_argnames=("v", "levels", "num_draws", "divergence", "source", "solves"))
def _bits(
    v: VelocityFn,
    key: Key,
    images: Array,
    levels: int,
    num_draws: int,
    divergence: Divergence,
    source: Source,
    solves: tuple[tuple[Sampler, tuple[float, ...]], ...],
) -> Array:
    """[2, batch]: from the coarse and from the fine solve."""
    dim = math.prod(images.shape[1:])

    def log_probs(i: Array) -> Array:
        key_u, key_probes = jax.random.split(jax.random.fold_in(key, i))
        x1 = dequantize(key_u, images, levels)
        return jnp.stack(
            [
                log_prob(v, x1, key=key_probes, divergence=divergence, source=source, sampler=sampler, times=times)
                for sampler, times in solves
            ]
        )

    draws = jax.lax.map(log_probs, jnp.arange(num_draws))
    log_p = jax.nn.logsumexp(draws, axis=0) - math.log(num_draws)
    return -log_p / (dim * math.log(2)) + math.log2(levels / 2)


def _coarser(sampler: Sampler, times: tuple[float, ...]) -> tuple[Sampler, tuple[float, ...]]:
    """A less accurate solve: ten times the tolerances, or half the steps."""
    if sampler.nfe_per_step is None:
        check_has("sampler", sampler, ("loosened",), "one with fixed steps, or Adaptive()")
        return sampler.loosened(10), times  # type: ignore[attr-defined]
    if len(times) % 2 == 0:
        raise ValueError(f"times must be an even number of steps, to compare with half of them, got {len(times) - 1}.")
    return sampler, times[::2]


def check_pixels(images: ArrayTree, levels: int) -> None:
    """Raises `ValueError` unless `images` are integers from 0 to `levels - 1`; of traced ones, unless integers."""
    check_integer("levels", levels, least=2, most=2**16)
    check_array("images", images)
    if not jnp.issubdtype(images.dtype, jnp.integer):
        raise ValueError(f"images must be integers in 0 .. {levels - 1}, got {images.dtype}.")
    if is_traced(images) or not np.size(images):
        return
    known = np.asarray(images)
    least, most = int(known.min()), int(known.max())
    if least < 0 or most >= levels:
        raise ValueError(f"images must be in 0 .. {levels - 1}, got {least} .. {most}.")
