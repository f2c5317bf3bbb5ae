import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marginals import p_values, source_cdf, two_gaussians

from fm_jax import oracles
from fm_jax.guidance import classifier_free
from fm_jax.samplers.diffrax_sde import sample_sde_diffrax
from fm_jax.schedules import Linear

NUM_STEPS, FINEST = [4, 8, 16, 32], 128
X = np.ones((2, 3), dtype=np.float32)


def mixture():
    return two_gaussians()


def counted(v, calls):
    def counting(t, x):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return v(t, x)

    return counting


def finish(solution):
    jax.block_until_ready(solution)
    jax.effects_barrier()
    return solution


def test_strong_order_on_a_shared_brownian_path():
    """ShARK, order 1.5, against itself on the finest grid, for images and a guided velocity.

    All grids have as many steps as the finest, so that they compile once; the steps too many are short ones at first.
    The errors are far above the rounding of float32.
    """
    calls, x0 = [], jax.random.normal(jax.random.key(0), (64, 2, 2, 1))
    v = classifier_free(counted(lambda t, x: jnp.sin(3 * t + 3 * x) / 2, calls), lambda t, x: 0 * x, 2.0)

    @jax.jit
    def sample(grid):
        options = {"solver": "shark", "grid": grid, "tol": 2.0**-9}
        return sample_sde_diffrax(v, lambda t, x: -x / 5, lambda t: 0.3 + t, jax.random.key(1), x0, **options)

    def grid(n):
        return np.concatenate([1e-9 * np.arange(FINEST - n + 1), np.arange(1, n + 1) / n])

    solutions = [finish(sample(grid(n))) for n in [*NUM_STEPS, FINEST]]
    assert len(calls) == 5 * FINEST * 2
    assert all(int(each.nfe) == 3 * FINEST * 2 for each in solutions)
    assert max(calls) < 1
    errors = [np.sqrt(np.mean((each.x - solutions[-1].x) ** 2)) for each in solutions[:-1]]
    np.testing.assert_allclose(-np.polyfit(np.log(NUM_STEPS), np.log(errors), 1)[0], 1.5, atol=0.2)


def test_adaptive_steps_reach_the_marginal_and_count_what_they_cost():
    """Each of four p-values is refused below 1e-4: a right sampler fails with probability below 4e-4 under a fresh key.

    Power: a start too wide by a half is refused.
    """
    calls, x0 = [], jax.random.normal(jax.random.key(5), (4000, 2))
    v = counted(oracles.velocity(mixture(), Linear()), calls)

    @jax.jit
    def sample(key, x0):
        options = {"schedule": Linear(), "solver": "sra1", "rtol": 1e-2, "atol": 1e-2, "t1": 0.999}
        return sample_sde_diffrax(v, None, lambda t: jnp.sqrt(1 - t), key, x0, **options)

    solution = finish(sample(jax.random.key(6), x0))
    assert int(solution.nfe) == len(calls)
    assert int(solution.nfe) < 400
    assert min(p_values(solution.x)) > 1e-4
    np.testing.assert_array_equal(sample(jax.random.key(6), x0).x, solution.x)
    assert np.abs(sample(jax.random.key(7), x0).x - solution.x).mean() > 0.1
    assert min(p_values(sample(jax.random.key(6), 1.5 * x0).x)) < 1e-6


def test_fixed_steps_backward_reach_the_source():
    """False-alarm rate as above; a start that is not the marginal, one point alone, is refused."""
    key_data, key_noise, key_path = jax.random.split(jax.random.key(8), 3)
    noise = jax.random.normal(key_noise, (4000, 2))
    start = 0.95 * oracles.sample(mixture(), key_data, 4000) + 0.05 * noise
    v = oracles.velocity(mixture(), Linear())

    @jax.jit
    def sample(x):
        options = {"schedule": Linear(), "solver": "sea", "num_steps": 64, "t0": 0.95, "t1": 0.0, "trajectory": True}
        return sample_sde_diffrax(v, None, 0.7, key_path, x, **options)

    solution = sample(start)
    assert solution.trajectory.shape == (65, 4000, 2)
    np.testing.assert_array_equal(solution.trajectory[0], start)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.x)
    assert min(p_values(solution.x, source_cdf)) > 1e-4
    assert min(p_values(sample(start[:1] + 0 * start).x, source_cdf)) < 1e-6


def test_importing_it_does_not_import_diffrax():
    code = "import sys, fm_jax.samplers.diffrax_sde; assert not {'diffrax', 'equinox', 'lineax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_diffrax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match="sample_sde_diffrax needs Diffrax: pip install diffrax"):
        sample_sde_diffrax(lambda t, x: x, None, 1.0, jax.random.key(0), X, schedule=Linear(), num_steps=3)


TOLERANCES = {"num_steps": None, "rtol": 1e-2, "atol": 1e-2}
BAD = [
    ({"num_steps": 0}, "num_steps must be at least 1, got 0."),
    ({"num_steps": None}, r"Either num_steps or grid must be given \(fixed steps\), or rtol and atol"),
    ({"rtol": 1e-2, "atol": 1e-2}, "Either num_steps or grid must be given"),
    ({"grid": [0.0, 0.5]}, "Exactly one of num_steps and grid must be given."),
    ({"num_steps": None, "grid": [0.0, 0.5, 0.5]}, "grid must be finite and strictly monotone"),
    ({"num_steps": None, "rtol": 1e-2}, "atol must be finite and not negative, got None."),
    ({**TOLERANCES, "rtol": -1.0}, "rtol must be finite and not negative, got -1.0."),
    ({**TOLERANCES, "rtol": 0.0, "atol": 0.0}, "rtol and atol must not both be 0."),
    (
        {**TOLERANCES, "solver": "sea"},
        "Adaptive steps need a solver with an error estimate, 'shark', 'sra1'; 'sea' has none.",
    ),
    ({**TOLERANCES, "trajectory": True}, "trajectory needs a fixed grid"),
    ({**TOLERANCES, "max_steps": 0}, "max_steps must be at least 1, got 0."),
    ({**TOLERANCES, "t1": 0.0}, "t0 and t1 must differ, both are 0.0."),
    ({"tol": 0.0}, "tol must be finite and positive, got 0.0."),
    ({"solver": "euler"}, "solver must be one of 'sea', 'shark', 'sra1', got 'euler'."),
    ({"t0": 1.0, "t1": 0.0}, "The score is infinite where sigma = 0, at t = 1.0: start or end short of it"),
    ({"diffusion": -1.0}, "diffusion must be finite and not negative, got -1.0."),
    ({"diffusion": lambda t: jnp.ones(2)}, r"diffusion\(t\) must be a scalar, got shape \(2,\)."),
    ({"key": None}, "key must be one typed key, as from jax.random.key"),
    ({"schedule": None}, "Exactly one of score and schedule must be given"),
    ({"x0": jnp.ones((2, 2), dtype=int)}, "x0 must be floating point, got int32."),
    ({"x0": jnp.ones((2, 2), dtype=jnp.bfloat16)}, "x0 must be float32 or float64"),
    ({"v": lambda t, x: x[:, :1]}, r"v\(t, x\) must have the shape of x, \(2, 3\), got \(2, 1\)."),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    options = {
        "v": lambda t, x: x,
        "score": None,
        "diffusion": 1.0,
        "key": jax.random.key(0),
        "x0": X,
        "schedule": Linear(),
        "num_steps": 3,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        sample_sde_diffrax(**options)
