import functools
from types import SimpleNamespace

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats

from fm_jax import oracles, schedules
from fm_jax.guidance import classifier_free
from fm_jax.likelihood import Hutchinson, HutchPlusPlus, encode_and_log_prob, log_prob, sample_and_log_prob
from fm_jax.nfe import Counted
from fm_jax.paths import start
from fm_jax.samplers import Adaptive, EulerMaruyama, RungeKutta
from fm_jax.samplers.grids import uniform
from fm_jax.samplers.learned import from_method
from fm_jax.schedules import VE, Linear
from fm_jax.sources import Normal, Sampled, Uniform

KEY = jax.random.key(0)
SCHEDULES = [schedules.Linear(), schedules.Cosine(), schedules.Polynomial(2.0), schedules.VP(), schedules.VE()]
RK4 = RungeKutta("rk4")
MIDPOINT = {"sampler": RungeKutta("midpoint"), "times": 300}  # quicker to compile
MATRIX = np.array([[0.5, -1.0, 0.3], [0.2, -0.4, 0.8], [0.1, 0.6, 0.7]])


def data(num=8):
    return oracles.sample(contracts.mixture(), jax.random.key(0), num)


def shrink(t, x):
    return -x


def affine(t, x, scale=1.0):
    """dx/dt = scale A x: x(1) = exp(scale A) x(0), and the divergence is scale trace A."""
    return scale * (x @ jnp.asarray(MATRIX, x.dtype).T)


def as_images(v):
    """The same velocity on [batch, 1, d, 1]."""
    return lambda t, x: v(t, x.reshape(len(x), -1)).reshape(x.shape)


@pytest.fixture(scope="module")
def closed_forms():
    """Log-densities of a Gaussian mixture under every schedule, and what they should be."""

    @jax.jit
    def both():
        x1, mixture, results = data(), contracts.mixture(), {}
        for schedule in SCHEDULES:
            t0, t1 = schedule.domain
            source = SimpleNamespace(draw=None, log_prob=functools.partial(oracles.log_prob, mixture, schedule, t0))
            v, times = oracles.velocity(mixture, schedule), uniform(200, t0, t1)
            computed = log_prob(v, x1, source=source, sampler=RK4, times=times)
            results[str(schedule)] = computed, oracles.log_prob(mixture, schedule, t1, x1)
        return results

    with jax.enable_x64(True):
        return both()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_log_prob_is_the_closed_form(closed_forms, schedule):
    computed, exact = closed_forms[str(schedule)]
    assert np.ptp(exact) > 0.5
    np.testing.assert_allclose(computed, exact, atol=1e-5)


@pytest.mark.slow
def test_defaults_in_single_precision_on_images():
    """The adaptive solver; sources that are a normal distribution up to the signal left in them."""
    mixture = contracts.mixture()

    @jax.jit
    def both(images):
        v, ve = oracles.velocity(mixture, Linear()), oracles.velocity(mixture, VE())
        return (
            encode_and_log_prob(as_images(v), images),
            log_prob(as_images(ve), images, source=start(VE()), **MIDPOINT),
        )

    x1 = data()
    (source, log_p), exploding = both(x1.reshape(-1, 1, 2, 1))
    assert source.x.shape == (8, 1, 2, 1)
    np.testing.assert_allclose(log_p, oracles.log_prob(mixture, Linear(), 1.0, x1), atol=1e-3)
    np.testing.assert_allclose(exploding, oracles.log_prob(mixture, VE(), 1.0, x1), atol=0.05)


@pytest.fixture(scope="module")
def estimates():
    """Stochastic log-densities of 8,000 copies of one point, each with its own probes, on an affine flow."""

    @jax.jit
    def all_of_them(x1):
        options = {"key": jax.random.key(1), "sampler": RK4, "times": 4}
        return [log_prob(affine, x1, divergence=each, **options) for each in (Hutchinson(), HutchPlusPlus(3))]

    x1 = np.tile(np.float32([0.5, -1.0, 0.2]), (8000, 1))
    return [np.asarray(each, dtype=float) for each in all_of_them(x1)]


@pytest.mark.parametrize("index", [0, 1], ids=["Hutchinson", "HutchPlusPlus"])
def test_stochastic_log_prob_is_unbiased(estimates, index):
    """|z| > 4 has probability 6e-5. Power: a trace that is 20% off is refused."""
    exact = affine_log_prob([0.5, -1.0, 0.2])
    values = estimates[index]
    error = values.std() / np.sqrt(len(values))
    assert error > 0
    assert abs(values.mean() - exact) < 4 * error
    assert abs(values.mean() - exact - 0.2 * np.trace(MATRIX)) > 4 * error


@pytest.mark.slow
def test_both_directions_agree_and_probes_cost_no_steps():
    """Probes redrawn at each call would need thousands of steps."""
    matrix = jnp.asarray(MATRIX, jnp.float32)

    def v(t, x):
        return jnp.tanh(3 * x @ matrix + t) - x

    @jax.jit
    def there_and_back(x0):
        samples, forward = sample_and_log_prob(v, x0, divergence=Hutchinson(), key=KEY)
        return samples, forward, encode_and_log_prob(v, samples.x, divergence=Hutchinson(), key=KEY)

    x0 = jax.random.normal(jax.random.key(2), (8, 3))
    samples, forward, (source, backward) = there_and_back(x0)
    np.testing.assert_allclose(forward, backward, atol=1e-3)
    np.testing.assert_allclose(source.x, x0, atol=1e-3)
    assert samples.calls < 100
    assert source.calls < 100


def test_calls_are_those_that_happen_and_cost_what_the_velocity_costs():
    calls = []

    def network(t, x):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    x = jnp.ones((2, 3))
    guided = classifier_free(Counted(network, 1), Counted(lambda t, x: x, 1), 2.0)
    solution, _ = jax.jit(lambda x: encode_and_log_prob(guided, x, sampler=RK4, times=200))(x)
    jax.block_until_ready(solution)
    jax.effects_barrier()
    assert int(solution.calls) == len(calls) == 800
    assert int(solution.nfe) == 1600
    assert encode_and_log_prob(shrink, x, sampler=RK4, times=2)[0].nfe is None


@pytest.mark.slow
def test_guided_flow_integrates_to_one(x64):
    """What a guided velocity transports has a density too, though no closed form."""
    cats = oracles.gaussian_mixture([[-1.0], [0.5]], [0.3, 0.4])
    everything = oracles.gaussian_mixture([[0.0]], 1.0)
    v = classifier_free(oracles.velocity(cats, Linear()), oracles.velocity(everything, Linear()), 2.0)
    x = jnp.linspace(-6, 6, 601)[:, None]
    density = jnp.exp(jax.jit(lambda x: log_prob(v, x, **MIDPOINT))(x))
    np.testing.assert_allclose(jnp.trapezoid(density, x[:, 0]), 1, atol=1e-4)
    assert np.abs(density - jnp.exp(oracles.log_prob(cats, Linear(), 1.0, x))).max() > 0.05


def affine_log_prob(x1, a=1.0):
    """The log-density of N(0, F F') with F = exp(a A), in double precision."""
    flow = scipy.linalg.expm(a * MATRIX)
    return scipy.stats.multivariate_normal(cov=flow @ flow.T).logpdf(x1)


@pytest.mark.slow
def test_gradients_are_those_of_the_closed_form():
    """In x1 and in a parameter of the velocity, through the adaptive solver and through fixed steps."""
    solves = [{}, {"sampler": RungeKutta("midpoint"), "times": 40}]

    @jax.jit
    def gradients(x1, a):
        flows = [lambda x1, a, s=s: log_prob(lambda t, x: affine(t, x, a), x1, **s).sum() for s in solves]
        return [jax.grad(flow, argnums=(0, 1))(x1, a) for flow in flows]

    x1 = np.random.default_rng(0).normal(size=(5, 3))
    flow = scipy.linalg.expm(0.7 * MATRIX)
    score = -np.linalg.solve(flow @ flow.T, x1.T).T
    by_a = (affine_log_prob(x1, 0.7 + 1e-4) - affine_log_prob(x1, 0.7 - 1e-4)).sum() / 2e-4
    for computed_score, computed_by_a in gradients(jnp.asarray(x1), 0.7):
        np.testing.assert_allclose(computed_score, score, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(computed_by_a, by_a, rtol=2e-3)


def test_scalar_events():
    solution, log_p = sample_and_log_prob(lambda t, x: x, jnp.array([0.0, 1.0]), sampler=RK4, times=10)
    np.testing.assert_allclose(solution.x, [0, np.e], rtol=1e-4)
    np.testing.assert_allclose(log_p, scipy.stats.norm.logpdf([0.0, 1.0]) - 1, rtol=1e-5)


@pytest.mark.slow
def test_one_step_size_for_each_example():
    x1 = jnp.array([[0.0], [1.0], [-20.0]])
    solution, log_p = jax.jit(lambda x1: encode_and_log_prob(shrink, x1, sampler=Adaptive(per_sample=True)))(x1)
    assert solution.calls.shape == (3,)
    np.testing.assert_allclose(log_p, scipy.stats.norm(0, np.exp(-1)).logpdf(x1[:, 0]), rtol=1e-3)


@pytest.mark.slow
def test_the_source_is_any_with_a_density():
    """dx/dt = x takes the box [-1, 1]^2 to [-e, e]^2, of density (2 e)^-2."""
    x1 = jnp.array([[0.5, -1.0], [2.5, 2.5], [2.8, 0.0]])
    options = {"source": Uniform(-1.0, 1.0), "sampler": RK4, "times": 10}
    log_p = log_prob(lambda t, x: x, x1, **options)
    np.testing.assert_allclose(log_p, [-2 * np.log(2 * np.e)] * 2 + [-np.inf], rtol=1e-5)
    x0 = jnp.array([[0.5, -1.0]])
    np.testing.assert_allclose(sample_and_log_prob(lambda t, x: x, x0, **options)[1], -2 * np.log(2 * np.e), rtol=1e-5)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("times", [20, uniform(20), np.linspace(0, 1, 21)])
def test_times_run_from_the_source_to_the_data(times):
    x1 = jnp.array([[0.3, -0.5]])
    log_p = jax.jit(lambda times: log_prob(shrink, x1, sampler=RK4, times=times))(times) if np.ndim(times) else None
    exact = scipy.stats.norm(0, np.exp(-1)).logpdf(x1).sum()
    np.testing.assert_allclose(log_prob(shrink, x1, sampler=RK4, times=times), exact, rtol=1e-5)
    if log_p is not None:  # traced
        np.testing.assert_allclose(log_p, exact, rtol=1e-5)


X = jnp.ones((2, 3))
BAD = [
    (lambda: log_prob(shrink, X, divergence=Hutchinson()), r"Hutchinson\(.*\) draws random probes and needs a key"),
    (lambda: log_prob(shrink, X, divergence=HutchPlusPlus(), key=0), "key must be one typed key"),
    (lambda: log_prob(shrink, jnp.ones((2, 3), dtype=int)), "x1 must be floating point, got int32."),
    (lambda: sample_and_log_prob(shrink, jnp.ones((2, 3), dtype=int)), "x0 must be floating point, got int32."),
    (lambda: log_prob(shrink, jnp.ones(())), r"x1 must be \[batch, ...\], got a scalar."),
    (lambda: log_prob(lambda t, x: x[:, :1], X), r"v\(t, x\) must have the shape of x, \(2, 3\), got \(2, 1\)."),
    (lambda: log_prob(shrink, X, times=(1.0, 1.0)), "times must be finite and strictly monotone"),
    (
        lambda: log_prob(shrink, X, times=(1.0, 0.0)),
        "Time must run forward for a likelihood, got times from 1.0 to 0.0",
    ),
    (lambda: log_prob(shrink, X, sampler=EulerMaruyama(Linear())), "sampler must not draw noise, .*got EulerMaruyama"),
    (
        lambda: log_prob(shrink, X, source=Sampled(lambda key, num: X), sampler=RK4, times=1),
        "has no density: a likelihood needs a source",
    ),
    (lambda: sample_and_log_prob(shrink, X, divergence=Hutchinson()), "needs a key"),
    (
        lambda: log_prob(shrink, X, sampler=from_method("euler", 2)),
        "must go through any times, .* which has its own",
    ),
    (lambda: log_prob(shrink, X, sampler="rk4"), "sampler must be a sampler, .* got 'rk4', which has no 'order'"),
    (lambda: log_prob(shrink, X, source=Normal), "source must be a source, .* got the class Normal"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
