"""What `sample` promises, and what every sampler says of itself, held against what it does."""

import functools
import re
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from contracts import FIXED_STEPS, SAMPLERS, SCHEDULES
from exponential import KEY, run
from marginals import p_values

from fm_jax import oracles, samplers
from fm_jax.checks import shown
from fm_jax.guidance import classifier_free
from fm_jax.nfe import Counted
from fm_jax.parameterization import conversion_domain
from fm_jax.paths import start
from fm_jax.samplers import sample
from fm_jax.samplers.grids import edm
from fm_jax.schedules import VP, Linear, Polynomial

CONDITIONAL, UNCONDITIONAL, SCALE = np.array([0.8, 0.3]), np.array([0.2, -0.5]), 2.0
GUIDED = UNCONDITIONAL + SCALE * (CONDITIONAL - UNCONDITIONAL)
COVARIANCE = np.array([[0.5, 0.2], [0.2, 0.3]])
X = np.ones((2, 3), dtype=np.float32)
LINEAR = {name: make(Linear()) for name, make in SAMPLERS.items()}
STEPS = {name: LINEAR[name] for name in FIXED_STEPS}


def gaussian(mean):
    return oracles.gaussian_mixture(mean[None], COVARIANCE[None])


def p_value(x, mean, covariance=COVARIANCE):
    return min(p_values(x, lambda d: scipy.stats.norm(d @ mean, np.sqrt(d @ covariance @ d)).cdf))


def minus(t, x):
    return -x


@pytest.fixture(scope="module")
def draws():
    """1,000 samples by each sampler, 100 steps on the linear path, guided, for two keys, and the calls that happened.

    Guidance between Gaussians of one covariance leads to the Gaussian at m_u + scale (m_c - m_u).
    """
    happened = Counter()
    v_cond, v_uncond = (Counted(oracles.velocity(gaussian(mean), Linear()), 1) for mean in (CONDITIONAL, UNCONDITIONAL))
    guided = classifier_free(v_cond, v_uncond, SCALE)
    x0 = jax.random.normal(jax.random.key(0), (1000, 2))

    def watched(name, t, x):
        jax.debug.callback(lambda: happened.update([name]))
        return guided(t, x)

    @jax.jit
    def draw(key):
        out = {}
        for name, sampler in STEPS.items():
            v = Counted(functools.partial(watched, name), guided.nfe)
            key_or_none = key if sampler.stochastic else None
            out[name] = sample(v, x0, sampler, times=100, key=key_or_none, trajectory=True)
        return out

    first = jax.block_until_ready(draw(jax.random.key(1)))
    jax.effects_barrier()
    calls = dict(happened)
    return x0, calls, first, draw(jax.random.key(2))


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_samples_the_guided_law(draws, name):
    """Refused at p < 1e-4: a right sampler fails with probability below 4e-4 under a fresh key."""
    assert p_value(draws[2][name].x, GUIDED) > 1e-4


def test_the_test_has_power(draws):
    assert p_value(draws[2]["heun"].x, CONDITIONAL) < 1e-4
    assert p_value(draws[2]["heun"].x, GUIDED, 0.7 * COVARIANCE) < 1e-4


def test_calls_are_those_that_happen_and_guidance_doubles_what_they_cost(draws):
    """The start of a multistep method and singular ends change the evaluations a step by a few."""
    _, calls, first, _ = draws
    for name, sampler in STEPS.items():
        assert int(first[name].calls) == calls[name], name
        assert int(first[name].nfe) == 2 * calls[name], name
        assert abs(calls[name] - 100 * sampler.nfe_per_step) <= 6, name


def test_stochastic_means_that_the_key_matters(draws):
    for name, sampler in STEPS.items():
        differs = bool(jnp.abs(draws[2][name].x - draws[3][name].x).max() > 0)
        assert sampler.stochastic == differs, name


def test_a_trajectory_goes_from_the_start_to_the_end(draws):
    for name, solution in draws[2].items():
        assert solution.trajectory.shape == (101, 1000, 2), name
        np.testing.assert_array_equal(solution.trajectory[0], draws[0], err_msg=name)
        np.testing.assert_array_equal(solution.trajectory[-1], solution.x, err_msg=name)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_says_what_it_is(name):
    sampler = LINEAR[name]
    assert sampler.order is None or sampler.order >= 1
    assert sampler.nfe_per_step is None or sampler.nfe_per_step >= 1
    assert isinstance(sampler.stochastic, bool)
    assert sampler.domain == (0.0, 1.0)
    assert sampler == SAMPLERS[name](Linear())
    assert hash(sampler) == hash(SAMPLERS[name](Linear()))


def test_a_schedule_says_where_even_steps_go():
    from_noise = conversion_domain(Polynomial(2.0))[0]
    assert from_noise > 0
    for name, make in SAMPLERS.items():
        without_levels = not hasattr(LINEAR[name], "schedule") or name == "churn"
        assert make(Polynomial(2.0)).domain == (0.0 if without_levels else from_noise, 1.0), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", FIXED_STEPS)
def test_the_state_keeps_its_dtype_and_times_are_float32_at_least(name, dtype):
    seen = set()

    def v(t, x):
        seen.add((t.dtype, x.dtype))
        return -x

    solution = jax.eval_shape(lambda x: run(STEPS[name], v, x, 4, trajectory=True), jnp.asarray(X, dtype))
    assert solution.x.dtype == solution.trajectory.dtype == dtype
    assert seen == {(jnp.dtype("float32"), jnp.dtype(dtype))}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FIXED_STEPS, "shark"])
def test_it_is_traced_as_often_for_many_steps_as_for_few(name):
    def traces(num_steps):
        calls = []
        jax.eval_shape(lambda x: run(LINEAR[name], lambda t, x: calls.append(1) or -x, x, num_steps), X)
        return len(calls)

    assert traces(5) == traces(50) <= 20


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_every_sampler_refuses(name):
    sampler = LINEAR[name]
    with pytest.raises(ValueError, match=r"v\(t, x\) must have the shape of x, \(2, 3\), got \(2, 1\)."):
        jax.eval_shape(lambda x: run(sampler, lambda t, x: x[:, :1], x, 3), X)
    if sampler.stochastic:
        with pytest.raises(ValueError, match=r"key must be given: .* draws noise on the way."):
            sample(minus, X, sampler)
        for key in (0, jax.random.PRNGKey(0), jax.random.split(KEY)):
            with pytest.raises(ValueError, match="key must be one typed key"):
                sample(minus, X, sampler, key=key)
    else:
        with pytest.raises(ValueError, match=r"key must be None for .*, which draws no noise, got key"):
            sample(minus, X, sampler, key=KEY)


@pytest.mark.parametrize("name", ["ddpm", "dpm_solver++_2m_sde", "churn"])
def test_where_noise_is_made_of_the_path_time_runs_forward(name):
    with pytest.raises(ValueError, match=r"Time must run forward for .*, got times from 0.5 to 0.25"):
        sample(minus, X, LINEAR[name], times=[0.5, 0.25], key=KEY)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != VP(beta_min=1.0, beta_max=1.0)], ids=str)
def test_falling_noise_keeps_the_marginals_on_every_schedule_that_starts_from_noise(schedule):
    t0, t1 = conversion_domain(schedule)
    x0 = start(schedule, t0).draw(jax.random.key(3), jax.ShapeDtypeStruct((1000, 2), jnp.float32))
    v, times = oracles.velocity(gaussian(CONDITIONAL), schedule), edm(300, schedule, t0, t1)
    x = jax.jit(lambda x: sample(v, x, samplers.EulerMaruyama(schedule), times=times, key=KEY).x)(x0)
    alpha, sigma = (float(c(jnp.asarray(t1))) for c in (schedule.alpha, schedule.sigma))
    assert p_value(x, alpha * CONDITIONAL, alpha**2 * COVARIANCE + sigma**2 * np.eye(2)) > 1e-4


@dataclass(frozen=True)
class Spy:
    """A sampler that returns what `sample` hands to it."""

    stochastic: bool = False
    domain: tuple[float, float] = (0.2, 0.8)
    order: int = 1
    nfe_per_step: int = 1

    def solve(self, *args):
        return args


def test_a_sampler_of_your_own_gets_checked_arguments():
    v, key, times, x0, trajectory = sample(minus, [[1.0, 2.0]], Spy(), times=3, trajectory=True)
    assert v is minus
    assert key is None
    np.testing.assert_array_equal(times, np.linspace(0.2, 0.8, 4, dtype=np.float32))
    assert isinstance(times, np.ndarray)
    assert isinstance(x0, jax.Array)
    assert trajectory is True
    assert sample(minus, X, Spy(stochastic=True), key=KEY)[1] is KEY
    np.testing.assert_array_equal(sample(minus, X, Spy(), times=[0.9, 0.1])[2], np.float32([0.9, 0.1]))


def test_twenty_steps_of_the_midpoint_rule_by_default():
    np.testing.assert_array_equal(sample(minus, X, Spy())[2], np.linspace(0.2, 0.8, 21, dtype=np.float32))
    by_default = sample(minus, X)
    np.testing.assert_array_equal(by_default.x, sample(minus, X, samplers.RungeKutta("midpoint"), times=20).x)
    assert by_default.trajectory is None
    assert int(by_default.calls) == 40
    assert by_default.nfe is None  # a function of your own


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("heun", {}, r"sampler must be a sampler, such as RungeKutta\('heun'\) or DDIM\(schedule\), got 'heun'."),
        (None, {}, "sampler must be a sampler, .*, got None."),
        (samplers.DDIM, {}, "sampler must be a sampler, .*, got the class DDIM."),
        (samplers.RungeKutta, {}, "sampler must be a sampler, .*, got the class RungeKutta."),
        (Spy(), {"x0": np.ones((2, 2), dtype=int)}, "x0 must be floating point, got int"),
        (Spy(), {"x0": np.float32(1.0)}, r"x0 must be \[batch, ...\], got a scalar."),
        (Spy(), {"times": 0}, "times must be at least 1, got 0."),
        (Spy(), {"times": 2.0}, "times must be an integer, got 2.0."),
        (Spy(), {"times": [0.0, 0.5, 0.2]}, "times must be finite and strictly monotone"),
        (Spy(), {"times": [0.5]}, r"times must be a number of steps or \[num \+ 1\] .*, at least two, got \[0.5\]."),
        (
            Spy(),
            {"times": [0.0, 2.0]},
            r"times must be within .*, from source to data .*, got times from 0 to 2.",
        ),
        (Spy(), {"times": [1.0, -1.0]}, r"times must be within \[0.0, 1.0\], .* got times from -1 to 1."),
        (Spy(), {"x0": None}, "x0 must be an array, as jnp.asarray makes, got None."),
        (Spy(), {"trajectory": 1}, "trajectory must be True or False, got 1."),
        (Spy(stochastic=True), {}, r"key must be given: Spy\(.*\) draws noise on the way."),
        (Spy(stochastic=True), {"key": 0}, "key must be one typed key, as from .*, got 0."),
        (Spy(), {"key": KEY}, r"key must be None for Spy\(.*\), which draws no noise, got "),
    ],
)
def test_bad_input_is_refused(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sample(minus, options.pop("x0", X), sampler, **options)


def test_what_is_no_velocity_is_refused():
    for v in (None, X, Spy):
        with pytest.raises(ValueError, match=rf"v must be a velocity function v\(t, x\), got {re.escape(shown(v))}."):
            sample(v, X)


def test_times_of_a_velocity_with_a_domain():
    """Even steps go over what the sampler and the velocity have in common, and times outside the latter are refused."""
    v = Counted(minus, 1, (0.0, 0.5))
    np.testing.assert_array_equal(sample(v, X, Spy(), times=3)[2], np.linspace(0.2, 0.5, 4, dtype=np.float32))
    np.testing.assert_array_equal(sample(v, X, Spy(), times=[0.5, 0.0])[2], np.float32([0.5, 0.0]))
    with pytest.raises(
        ValueError, match=r"times must be within \[0.0, 0.5\], the domain of v, got times from 0.1 to 0.6."
    ):
        sample(v, X, Spy(), times=[0.1, 0.6])


def test_a_rounding_error_beyond_an_end_is_none():
    times = np.float32([-1e-8, 0.5, 1 + 1.2e-7])
    assert times[-1] > 1
    np.testing.assert_array_equal(sample(minus, X, Spy(), times=times)[2], times)


def test_traced_times_may_be_any():
    x = jax.jit(lambda times: sample(minus, X, times=times).x)(jnp.linspace(0, 2, 41))
    np.testing.assert_allclose(x, X * np.exp(-2), rtol=1e-3)
