import functools

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
from fm_jax.divergence import Hutchinson, HutchPlusPlus

from fm_jax import oracles, schedules
from fm_jax.guidance import classifier_free
from fm_jax.likelihood import (
    NotConvergedError,
    bits_per_dim,
    dequantize,
    encode_and_log_prob,
    log_prob,
    normal_log_prob,
    sample_and_log_prob,
)
from fm_jax.samplers import sample_adaptive, sample_ode
from fm_jax.schedules import VE, Linear

KEY = jax.random.key(0)
SCHEDULES = [schedules.Linear(), schedules.Cosine(), schedules.Polynomial(2.0), schedules.VP(), schedules.VE()]
RK4 = functools.partial(sample_ode, num_steps=200, method="rk4")
MIDPOINT = functools.partial(sample_ode, num_steps=300, method="midpoint")  # quicker to compile
MATRIX = np.array([[0.5, -1.0, 0.3], [0.2, -0.4, 0.8], [0.1, 0.6, 0.7]])


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """These programs run for a moment and are slow to compile."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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
            options = {"t0": t0, "t1": t1, "solve": RK4}
            options["log_p0"] = functools.partial(oracles.log_prob, mixture, schedule, t0)
            computed = log_prob(oracles.velocity(mixture, schedule), x1, **options)
            results[str(schedule)] = computed, oracles.log_prob(mixture, schedule, t1, x1)
        return results

    with jax.enable_x64(True):
        return both()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_log_prob_is_the_closed_form(closed_forms, schedule):
    computed, exact = closed_forms[str(schedule)]
    assert np.ptp(exact) > 0.5
    np.testing.assert_allclose(computed, exact, atol=1e-5)


def test_defaults_in_single_precision_on_images():
    """The adaptive solver; sources that are a normal distribution up to the signal left in them."""
    mixture = contracts.mixture()

    @jax.jit
    def both(images):
        v, ve = oracles.velocity(mixture, Linear()), oracles.velocity(mixture, VE())
        wide = functools.partial(normal_log_prob, scale=50.0)
        return (
            encode_and_log_prob(as_images(v), images),
            log_prob(as_images(ve), images, log_p0=wide, solve=MIDPOINT),
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
        options = {"key": jax.random.key(1), "solve": functools.partial(sample_ode, num_steps=4, method="rk4")}
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
    assert samples.nfe < 100
    assert source.nfe < 100


def test_nfe_counts_the_calls_that_happen():
    calls = []

    def network(t, x):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    x = jnp.ones((2, 3))
    solution, _ = jax.jit(lambda x: encode_and_log_prob(network, x, solve=RK4))(x)
    jax.block_until_ready(solution)
    jax.effects_barrier()
    assert int(solution.nfe) == len(calls) == 800
    guided = classifier_free(lambda t, x: -x, lambda t, x: x, 2.0)
    assert int(encode_and_log_prob(guided, x, solve=RK4)[0].nfe) == 1600


def test_guided_flow_integrates_to_one(x64):
    """What a guided velocity transports has a density too, though no closed form."""
    cats = oracles.gaussian_mixture([[-1.0], [0.5]], [0.3, 0.4])
    everything = oracles.gaussian_mixture([[0.0]], 1.0)
    v = classifier_free(oracles.velocity(cats, Linear()), oracles.velocity(everything, Linear()), 2.0)
    x = jnp.linspace(-6, 6, 601)[:, None]
    density = jnp.exp(jax.jit(lambda x: log_prob(v, x, solve=MIDPOINT))(x))
    np.testing.assert_allclose(jnp.trapezoid(density, x[:, 0]), 1, atol=1e-4)
    assert np.abs(density - jnp.exp(oracles.log_prob(cats, Linear(), 1.0, x))).max() > 0.05


def affine_log_prob(x1, a=1.0):
    """The log-density of N(0, F F') with F = exp(a A), in double precision."""
    flow = scipy.linalg.expm(a * MATRIX)
    return scipy.stats.multivariate_normal(cov=flow @ flow.T).logpdf(x1)


def test_gradients_are_those_of_the_closed_form():
    """In x1 and in a parameter of the velocity, through the adaptive solver and through fixed steps."""
    solves = [sample_adaptive, functools.partial(sample_ode, num_steps=40, method="midpoint")]

    @jax.jit
    def gradients(x1, a):
        flows = [lambda x1, a, s=s: log_prob(lambda t, x: affine(t, x, a), x1, solve=s).sum() for s in solves]
        return [jax.grad(flow, argnums=(0, 1))(x1, a) for flow in flows]

    x1 = np.random.default_rng(0).normal(size=(5, 3))
    flow = scipy.linalg.expm(0.7 * MATRIX)
    score = -np.linalg.solve(flow @ flow.T, x1.T).T
    by_a = (affine_log_prob(x1, 0.7 + 1e-4) - affine_log_prob(x1, 0.7 - 1e-4)).sum() / 2e-4
    for computed_score, computed_by_a in gradients(jnp.asarray(x1), 0.7):
        np.testing.assert_allclose(computed_score, score, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(computed_by_a, by_a, rtol=2e-3)


def test_trajectory_and_scalar_events():
    solve = functools.partial(sample_ode, num_steps=10, method="rk4", trajectory=True)
    solution, log_p = sample_and_log_prob(lambda t, x: x, jnp.array([0.0, 1.0]), solve=solve)
    assert solution.trajectory.shape == (11, 2)
    np.testing.assert_allclose(solution.trajectory[:, 1], np.exp(np.linspace(0, 1, 11)), rtol=1e-4)
    np.testing.assert_allclose(log_p, normal_log_prob(jnp.array([0.0, 1.0])) - 1, rtol=1e-5)


def test_one_step_size_for_each_example():
    x1 = jnp.array([[0.0], [1.0], [-20.0]])
    solve = functools.partial(sample_adaptive, per_sample=True)
    solution, log_p = jax.jit(lambda x1: encode_and_log_prob(shrink, x1, solve=solve))(x1)
    assert solution.nfe.shape == (3,)
    np.testing.assert_allclose(log_p, scipy.stats.norm(0, np.exp(-1)).logpdf(x1[:, 0]), rtol=1e-3)


LEVELS = 8
IMAGES = np.array([[[2], [5]], [[6], [2]], [[3], [5]], [[0], [0]]], dtype=np.uint8)
SOLVE = functools.partial(sample_ode, num_steps=10, method="rk4")


def euler(num_steps):
    return functools.partial(sample_ode, num_steps=num_steps, method="euler")


def narrow(t, x):
    """To N(0, 0.15^2)."""
    return np.log(0.15) * x


def test_dequantised_levels_fill_their_bins():
    images = np.tile(np.arange(LEVELS, dtype=np.uint8), (4000, 1))
    x = np.asarray(dequantize(jax.random.key(0), images, LEVELS))
    np.testing.assert_array_equal(np.floor((x + 1) / 2 * LEVELS), images)
    # Uniform within the bin: refused at p < 1e-4.
    assert scipy.stats.kstest(((x + 1) / 2 * LEVELS - images).ravel(), "uniform").pvalue > 1e-4


def test_more_draws_tighten_the_bound_to_the_exact_probability():
    """Means over 400 copies of two images under N(0, 0.15^2): most of the bias of one draw is gone with 20."""
    images = np.array([[3, 5], [2, 4]])
    edges = (2 * np.stack([images, images + 1.0]) / LEVELS - 1) / 0.15
    exact = -np.log2(np.diff(scipy.stats.norm.cdf(edges), axis=0)[0]).mean(axis=1)
    images = np.tile(images, (400, 1))
    bounds, errors = [], []
    for num_draws in (1, 20):
        bits = bits_per_dim(narrow, KEY, images, levels=LEVELS, num_draws=num_draws, solve=SOLVE).reshape(400, 2)
        bounds.append(bits.mean(axis=0))
        errors.append(bits.std(axis=0) / 20)
    assert (bounds[0] - bounds[1] > 4 * np.hypot(*errors)).all()
    assert (bounds[1] - exact > -3 * errors[1]).all()
    assert (bounds[1] - exact < 0.2 * (bounds[0] - exact)).all()


def test_one_draw_may_be_estimated_by_hutchinson():
    """With signs it is exact on a diagonal Jacobian."""
    options = {"v": shrink, "key": jax.random.key(3), "images": IMAGES, "levels": LEVELS, "solve": euler(200)}
    bits = bits_per_dim(**options, tolerance=0.1, divergence=Hutchinson())
    np.testing.assert_allclose(bits, bits_per_dim(**options, tolerance=0.1), rtol=1e-5)


def test_a_converged_solve_is_the_closed_form_and_another_is_refused():
    """Eight Euler steps on a sharp model are off by bits."""
    mixture = oracles.gaussian_mixture([[-0.4, 0.3], [0.5, -0.2]], 0.02)
    v, images = as_images(oracles.velocity(mixture, Linear())), np.array([[[76], [166]], [[191], [102]]], np.uint8)
    bits = bits_per_dim(v, KEY, images, solve=RK4)
    x1 = dequantize(jax.random.split(jax.random.fold_in(KEY, 0))[0], images)[..., 0]
    exact = -oracles.log_prob(mixture, Linear(), 1.0, x1) / np.log(2) / 2 + 7
    np.testing.assert_allclose(bits, exact, atol=1e-3)
    said = r"the solve has not converged: -?\d.* bits/dim at num_steps = 4, -?\d.* at num_steps = 8 for image \d, more"
    with pytest.raises(NotConvergedError, match=said):
        bits_per_dim(v, KEY, images, solve=euler(8))
    assert (np.abs(bits_per_dim(v, KEY, images, solve=euler(8), tolerance=1e6) - exact) > 1).all()


@pytest.mark.parametrize(
    ("rate", "message"), [(50.0, r"at rtol = 1, atol = 1, .* at rtol = 0\.1, atol = 0\.1"), (jnp.nan, "nan bits/dim")]
)
def test_loose_tolerances_and_nans_are_refused(rate, message):
    solve = functools.partial(sample_adaptive, rtol=0.1, atol=0.1) if rate == 50 else euler(8)
    with pytest.raises(NotConvergedError, match=message):
        bits_per_dim(lambda t, x: rate * jnp.cos(rate * t) * x, KEY, IMAGES, levels=LEVELS, solve=solve)


def test_bits_per_dim_compiles_once():
    traces = []

    def v(t, x):
        traces.append(1)
        return -x

    counts = []
    for i in range(2):
        bits_per_dim(v, jax.random.key(i), IMAGES, levels=LEVELS, solve=SOLVE)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


X = jnp.ones((2, 3))
BITS = {"v": shrink, "key": KEY, "images": IMAGES, "levels": LEVELS}
BAD = [
    (lambda: log_prob(shrink, X, divergence=Hutchinson()), r"Hutchinson\(.*\) draws random probes and needs a key"),
    (lambda: log_prob(shrink, X, divergence=HutchPlusPlus(), key=0), "key must be one typed key"),
    (lambda: log_prob(shrink, jnp.ones((2, 3), dtype=int)), "must be floating point, got int32."),
    (lambda: log_prob(shrink, jnp.ones(())), r"must be \[batch, ...\], got a scalar."),
    (lambda: log_prob(lambda t, x: x[:, :1], X), r"v\(t, x\) must have the shape of x, \(2, 3\), got \(2, 1\)."),
    (lambda: log_prob(shrink, X, t0=1.0), "t0 and t1 must differ"),
    (lambda: sample_and_log_prob(shrink, X, divergence=Hutchinson()), "needs a key"),
    (lambda: bits_per_dim(**BITS | {"key": None}), "key must be one typed key"),
    (lambda: bits_per_dim(**BITS | {"levels": 1}), "levels must be at least 2, got 1."),
    (lambda: bits_per_dim(**BITS | {"levels": 4}), r"images must be in 0 .. 3, got 0 .. 6."),
    (lambda: bits_per_dim(**BITS | {"images": -1 * IMAGES.astype(int)}), r"images must be in 0 .. 7, got -6 .. 0."),
    (lambda: bits_per_dim(**BITS | {"images": IMAGES / 2}), r"images must be integers \[batch, ...\], got float64"),
    (lambda: bits_per_dim(**BITS | {"images": IMAGES[0, 0]}), r"images must be integers \[batch, ...\]"),
    (lambda: bits_per_dim(**BITS, num_draws=0), "num_draws must be at least 1, got 0."),
    (lambda: bits_per_dim(**BITS, tolerance=0.0), "tolerance must be positive, got 0.0."),
    (lambda: bits_per_dim(**BITS, num_draws=2, divergence=Hutchinson()), "num_draws = 2 needs an exact divergence"),
    (lambda: bits_per_dim(**BITS, solve=lambda v, z, t0, t1: z), "solve must have num_steps, or rtol and atol"),
    (lambda: bits_per_dim(**BITS, solve=euler(1)), "num_steps must be at least 1, got 0."),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
