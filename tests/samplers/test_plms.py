"""PLMS against its formulas in NumPy, on a diffusion's own table."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.samplers import DDIM, PLMS, sample
from fm_jax.schedules import DDPM, Linear

SCHEDULE = DDPM()
VELOCITY = oracles.velocity(oracles.gaussian_mixture([[0.5, -1.0], [2.0, 1.0]], [0.5, 0.3], [0.4, 0.6]), SCHEDULE)


def noise(n, x):
    """What a network would say at step n, from the velocity of the mixture."""
    t = jnp.asarray(1 - (n + 1) / 1000)
    from fm_jax.parameterization import convert

    return np.asarray(convert("velocity", VELOCITY(t, jnp.asarray(x)), t, jnp.asarray(x), SCHEDULE).noise)


@pytest.mark.slow
def test_the_published_formulas(x64):
    alpha2 = np.cumprod(1 - np.asarray(SCHEDULE.betas))
    steps = [901, 701, 501, 301, 101, 0]
    x = np.random.default_rng(0).normal(size=(3, 2))

    def move(x, n, n_next, e):
        a, b = alpha2[n], alpha2[n_next]
        return np.sqrt(b / a) * x + (np.sqrt(1 - b) - np.sqrt(b * (1 - a) / a)) * e

    known, y = [], x
    for i, (n, n_next) in enumerate(itertools.pairwise(steps)):
        known = [noise(n, y), *known][:4]
        if i == 0:
            e = (known[0] + noise(n_next, move(y, n, n_next, known[0]))) / 2
        else:
            weights = {2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
            e = sum(w * each for w, each in zip(weights[len(known)], known, strict=True))
        y = move(y, n, n_next, e)
    solution = sample(VELOCITY, jnp.asarray(x), PLMS(SCHEDULE), times=1 - (np.array(steps) + 1) / 1000)
    np.testing.assert_allclose(solution.x, y, rtol=1e-6)
    assert int(solution.calls) == len(steps)


@pytest.mark.slow
def test_a_single_step_is_ddim():
    x, times = jnp.ones((2, 2)), [0.1, 0.6]
    one, other = (sample(VELOCITY, x, sampler(SCHEDULE), times=times) for sampler in (PLMS, DDIM))
    np.testing.assert_allclose(one.x, other.x, rtol=1e-6)
    assert int(one.calls) == 1


def test_what_is_no_schedule():
    with pytest.raises(ValueError, match="schedule"):
        PLMS("linear")
    assert PLMS(Linear()).order == 2
