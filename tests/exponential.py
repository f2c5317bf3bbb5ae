"""What the tests of the exponential integrators (DDIM, DPM-Solver, UniPC) share: fields, grids and measurements.

A sampler is given as a function of the schedule: `DDIM`, or `lambda schedule: DPMSolver(schedule, order=3)`.
"""

import jax
import jax.numpy as jnp
import marginals
import numpy as np
from contracts import guided_by_half
from marginals import two_gaussians

from fm_jax import oracles
from fm_jax.samplers import RungeKutta, grids, sample
from fm_jax.schedules import VP, Linear, coefficients, known_to_stand_still

KEY = jax.random.key(3)

NUM_STEPS = [64, 128, 256]
RANGES = {"linear": (Linear(), 0.05, 0.95), "vp": (VP(), 0.2, 0.9)}
"""Schedules with a range of times on which the log-SNR is finite."""


def run(sampler, v, x0, times, **options):
    """`sample`, with a key where the sampler wants one."""
    return sample(v, x0, sampler, times=times, key=KEY if sampler.stochastic else None, **options)


def even(n):
    return np.linspace(0, 1, n + 1)


def slow_start(n):
    """Two first steps of length 1 / (4 n^2), so that the low orders of a multistep method's start do not matter."""
    return np.concatenate([np.array([0, 1, 2]) / (4 * n**2), even(n)[1:]])


def padded(times):
    """The grids as one array, so that they compile once, with steps of length 0 that change nothing.

    They come first: after the last step UniPC would find an evaluation to correct it with.
    """
    return np.stack([np.pad(grid, (max(map(len, times)) - len(grid), 0), mode="edge") for grid in times])


def orders(samplers, ranges):
    """Measured orders {(name, range, start, field): order}, from one compiled call a range."""
    times = padded([start(n) for start in (even, slow_start) for n in NUM_STEPS])
    out = {}
    for place in ranges:
        schedule, t0, t1 = RANGES[place]
        x0 = jax.random.normal(jax.random.key(0), (8, 2), dtype=float)
        v = guided_by_half(schedule, len(x0))

        @jax.jit
        def ends(times, v=v, schedule=schedule, x0=x0):
            return {
                name: jax.vmap(lambda grid, make=make: run(make(schedule), v, x0, grid).x)(times)
                for name, make in samplers.items()
            }

        fine = grids.uniform(1000, t0, t1)
        reference = jax.jit(lambda x0, v=v, fine=fine: sample(v, x0, RungeKutta("rk4"), times=fine).x)(x0)
        for name, x in ends(t0 + (t1 - t0) * times).items():
            # [start, num_steps, field]
            errors = np.abs(x - reference[None]).reshape(2, len(NUM_STEPS), 2, -1).mean(axis=-1)
            for i, start in enumerate(["even", "slow start"]):
                for j, field in enumerate(["mixture", "guided"]):
                    out[name, place, start, field] = slope(errors[i, :, j])
    return out


def slope(errors):
    return -np.polyfit(np.log(NUM_STEPS), np.log(errors), 1)[0]


POINT = np.array([[0.7, -0.4]])


def point_velocity(schedule, x1):
    """The velocity where all data is the one point x1 [1, d]."""

    def v(t, x):
        alpha, sigma, d_alpha, d_sigma = coefficients(schedule, t)
        return d_alpha * x1 + d_sigma * (x - alpha * x1) / sigma

    return v


def point_errors(samplers):
    """Largest distance from the exact end point where all data is one point, for each of the samplers.

    Forward over the whole domain and backward from its middle. The data prediction, and the noise prediction along the
    flow, are constant, so that every exponential integrator is exact however few its steps.
    """
    x = np.array([[1.0, 2.0], [-0.5, 0.3]])

    def error(sampler):
        schedule = sampler.schedule
        start, end = schedule.domain
        if known_to_stand_still(schedule, start):
            start = 1e-3  # where the path stands still, its velocity says nothing of the data
        middle = (start + end) / 2
        v = point_velocity(schedule, POINT)

        def distance(grid):
            (a0, a1), (s0, s1) = schedule.alpha(grid[jnp.array([0, -1])]), schedule.sigma(grid[jnp.array([0, -1])])
            exact = a1 * POINT + s1 / s0 * (x - a0 * POINT)
            return jnp.abs(run(sampler, v, jnp.asarray(x), grid).x - exact).max()

        return jax.vmap(distance)(jnp.array([[start, middle, end], [middle, (start + middle) / 2, start]])).max()

    return np.array(jax.jit(lambda: [error(sampler) for sampler in samplers])())


def one_draw_an_example(key, i, x):
    """Instead of normal noise: 1 in step i for example i + 2, otherwise 0."""
    return jnp.asarray(jnp.arange(len(x)) == i + 2, dtype=x.dtype)[:, None]


def gaussian_moments(samplers, ranges):
    """Mean and variance errors at the end for data N(0.5, 0.6^2), without Monte Carlo error, each over NUM_STEPS.

    On a single Gaussian a sampler is affine in its start and its noise, so that the law at the end follows from its
    responses: example 0 starts at 0 without noise, 1 at 1, and the others have a unit of noise in one step each. To be
    called with `step_noise` replaced by `one_draw_an_example`.
    """
    times = padded([even(n) for n in NUM_STEPS])
    x0 = jnp.zeros((NUM_STEPS[-1] + 2, 1), dtype=float).at[1].set(1.0)
    mixture = oracles.gaussian_mixture([[0.5]], 0.6)

    @jax.jit
    def ends():
        out = {}
        for place in ranges:
            schedule, t0, t1 = RANGES[place]
            v = oracles.velocity(mixture, schedule)
            for name, make in samplers.items():
                end = jax.vmap(lambda grid, make=make, schedule=schedule, v=v: run(make(schedule), v, x0, grid).x[:, 0])
                out[name, place] = end(t0 + (t1 - t0) * times)
        return out

    errors = {}
    for (name, place), x in ends().items():
        schedule, *ends_of_range = RANGES[place]
        (a0, a1), (s0, s1) = (level(jnp.array(ends_of_range)) for level in (schedule.alpha, schedule.sigma))
        response = x[:, 1:] - x[:, :1]
        mean = x[:, 0] + response[:, 0] * a0 * 0.5
        variance = response[:, 0] ** 2 * (a0**2 * 0.36 + s0**2) + (response[:, 1:] ** 2).sum(axis=1)
        errors[name, place] = np.abs(mean - a1 * 0.5), np.abs(variance - (a1**2 * 0.36 + s1**2))
    return errors


def p_values(sampler, num_steps=200):
    """`marginals.p_values` of 4,000 samples."""
    v, x0 = oracles.velocity(two_gaussians(), sampler.schedule), jax.random.normal(jax.random.key(5), (4000, 2))
    return marginals.p_values(jax.jit(lambda x: run(sampler, v, x, num_steps).x)(x0))


def field(t, x):
    """A velocity that is cheap to compile, not linear, and smooth from end to end, as those of real data are."""
    return jnp.sin(2 * x) + jnp.cos(3 * t) - t * x


def end_to_end(samplers):
    """From infinite to infinite log-SNR on `Linear` with `field`, {name: (errors, gradients)}.

    errors: of coming back to the start, after 64 and 128 steps each way. gradients: of the end with respect to the
    start and to a time inside, in three steps.
    """
    x0 = np.array([[0.5, -1.0], [2.0, 0.1]])

    def results(sampler, times):
        def there(x, grid):
            return run(sampler, field, x, grid).x

        def in_three(x, middle):
            return there(x, jnp.stack([0 * middle, middle, 0 * middle + 0.8, 0 * middle + 1])).sum()

        # One loop over both directions, so that the sampler compiles once.
        x, _ = jax.lax.scan(
            lambda x, times: (jax.vmap(there)(x, times), None), jnp.stack([x0, x0]), jnp.stack([times, times[:, ::-1]])
        )
        return jnp.abs(x - x0[None]).mean(axis=(1, 2)), jax.grad(in_three, argnums=(0, 1))(jnp.asarray(x0), 0.3)

    times = jnp.asarray(padded([even(64), even(128)]))
    return jax.jit(lambda times: {name: results(make(Linear()), times) for name, make in samplers.items()})(times)


def single_and_double(samplers):
    """Where each ends in single and in double precision, after 200 steps on `Linear` with `field`: {name: (x, x)}."""
    x0 = jax.random.normal(KEY, (4, 2), dtype=jnp.float32)
    return jax.jit(
        lambda: {
            name: [run(make(Linear()), field, x, 200).x for x in (x0, x0.astype(float))]
            for name, make in samplers.items()
        }
    )()
