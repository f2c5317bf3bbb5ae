import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marginals import p_values, source_cdf, two_gaussians

from fm_jax import oracles
from fm_jax.guidance import classifier_free
from fm_jax.nfe import Counted
from fm_jax.samplers import DiffraxSDE, sample
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import Linear

NUM_STEPS, FINEST = [4, 8, 16, 32], 128
X = np.ones((2, 3), dtype=np.float32)


def counted(v, calls):
    def counting(t, x):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return v(t, x)

    return counting


def finish(solution):
    jax.block_until_ready(solution)
    jax.effects_barrier()
    return solution


@pytest.mark.slow
def test_strong_order_on_a_shared_brownian_path():
    """ShARK, order 1.5, against itself on the finest grid, for images and a guided velocity.

    All grids have as many steps as the finest, so that they compile once; the steps too many are short ones at first.
    The errors are far above the rounding of float32.
    """
    calls, x0 = [], jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
    field = Counted(counted(lambda t, x: jnp.sin(3 * t + 3 * x) / 2, calls), 1)
    v, score = classifier_free(field, Counted(lambda t, x: 0 * x, 1), 2.0), Counted(lambda t, x: -x / 5, 1)
    sampler = DiffraxSDE(diffusion=lambda t: 0.3 + t, score=score, solver="shark", tol=2.0**-9)
    end = jax.jit(lambda grid: sample(v, x0, sampler, times=grid, key=jax.random.key(1)))

    def grid(n):
        return np.concatenate([1e-9 * np.arange(FINEST - n + 1), np.arange(1, n + 1) / n])

    solutions = [finish(end(grid(n))) for n in [*NUM_STEPS, FINEST]]
    assert len(calls) == 5 * FINEST * 2
    assert all(int(each.calls) == 2 * FINEST * 2 for each in solutions)
    assert all(int(each.nfe) == 3 * FINEST * 2 for each in solutions)
    assert max(calls) < 1
    errors = [np.sqrt(np.mean((each.x - solutions[-1].x) ** 2)) for each in solutions[:-1]]
    np.testing.assert_allclose(-np.polyfit(np.log(NUM_STEPS), np.log(errors), 1)[0], 1.5, atol=0.2)


@pytest.mark.slow
def test_adaptive_steps_reach_the_marginal_and_count_what_they_cost():
    """Each of four p-values is refused below 1e-4: a right sampler fails with probability below 4e-4 under a fresh key.

    Power: a start too wide by a half is refused.
    """
    calls, x0 = [], jax.random.normal(jax.random.key(5), (2000, 2))
    v = counted(oracles.velocity(two_gaussians(), Linear()), calls)

    sampler = DiffraxSDE(Linear(), lambda t: jnp.sqrt(1 - t), solver="sra1", rtol=1e-2, atol=1e-2)
    end = jax.jit(lambda key, x0: sample(v, x0, sampler, times=(0.0, 0.999), key=key))
    solution = finish(end(jax.random.key(6), x0))
    assert int(solution.calls) == len(calls)
    assert int(solution.calls) < 400
    assert solution.nfe is None
    assert min(p_values(solution.x)) > 1e-4
    assert np.abs(end(jax.random.key(7), x0).x - solution.x).mean() > 0.1
    assert min(p_values(end(jax.random.key(6), 1.5 * x0).x)) < 1e-6


@pytest.mark.slow
def test_fixed_steps_backward_reach_the_source():
    """False-alarm rate as above; a start that is not the marginal, one point alone, is refused."""
    key_data, key_noise, key_path = jax.random.split(jax.random.key(8), 3)
    noise = jax.random.normal(key_noise, (2000, 2))
    start = 0.95 * oracles.sample(two_gaussians(), key_data, 2000) + 0.05 * noise
    v = oracles.velocity(two_gaussians(), Linear())

    sampler, times = DiffraxSDE(Linear(), 0.7, solver="sea"), uniform(50, 0.95, 0.0)
    end = jax.jit(lambda x: sample(v, x, sampler, times=times, key=key_path, trajectory=True))
    solution = end(start)
    assert solution.trajectory.shape == (51, 2000, 2)
    np.testing.assert_array_equal(solution.trajectory[0], start)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.x)
    assert min(p_values(solution.x, source_cdf)) > 1e-4
    assert min(p_values(end(start[:1] + 0 * start).x, source_cdf)) < 1e-6


def test_importing_it_does_not_import_diffrax():
    code = "import sys, fm_jax.samplers.diffrax_sde; assert not {'diffrax', 'equinox', 'lineax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_diffrax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match="DiffraxSDE needs diffrax: pip install diffrax"):
        sample(lambda t, x: x, X, DiffraxSDE(Linear(), 1.0), times=3, key=jax.random.key(0))


TOLERANCES = {"schedule": Linear(), "rtol": 1e-2, "atol": 1e-2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": Linear(), "rtol": 1e-2}, "atol must be positive and finite, got None."),
        ({**TOLERANCES, "rtol": -1.0}, "rtol must be finite and not negative, got -1.0."),
        ({**TOLERANCES, "atol": 0.0}, "atol must be positive and finite, got 0.0."),
        (
            {**TOLERANCES, "solver": "sea"},
            "Adaptive steps need a solver with an error estimate, 'shark', 'sra1'; 'sea' has none.",
        ),
        ({**TOLERANCES, "max_steps": 0}, "max_steps must be at least 1, got 0."),
        ({"schedule": Linear(), "tol": 0.0}, "tol must be positive and finite, got 0.0."),
        ({"schedule": Linear(), "solver": "euler"}, "solver must be one of 'sea', 'shark', 'sra1', got 'euler'."),
        ({"schedule": Linear(), "diffusion": -1.0}, "diffusion must be finite and not negative, got -1.0."),
        ({"diffusion": 1.0}, "Exactly one of score and schedule must be given"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffraxSDE(**options)


@pytest.mark.parametrize(
    ("sampler", "call", "message"),
    [
        (DiffraxSDE(**TOLERANCES), {"trajectory": True}, "trajectory needs fixed steps"),
        (
            DiffraxSDE(Linear()),
            {"times": [1.0, 0.0]},
            "The score is infinite where sigma = 0, at t = 1.0: start or end",
        ),
        (DiffraxSDE(Linear(), lambda t: jnp.ones(2)), {}, r"diffusion\(t\) must be a scalar, got shape \(2,\)."),
        (DiffraxSDE(Linear()), {"x0": jnp.ones((2, 2), dtype=jnp.bfloat16)}, "x0 must be float32 or float64"),
    ],
)
def test_bad_paths_are_refused(sampler, call, message):
    call = {"x0": X, "times": 3, "key": jax.random.key(0), **call}
    with pytest.raises(ValueError, match=message):
        sample(lambda t, x: x, call.pop("x0"), sampler, **call)
