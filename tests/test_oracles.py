import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SCHEDULES, mixture
from scipy import stats

from fm_jax import oracles, schedules
from fm_jax.paths import AffinePath

T = np.array([0.05, 0.3, 0.6, 0.9])
X = np.array([[0.1, -0.4], [1.5, 0.3], [-1.0, 1.0], [0.4, -1.2]])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_density_is_scipys(schedule, x64):
    gm = mixture()
    expected = []
    for t, x in zip(T, X):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        density = 0.0
        for k in range(3):
            covariance = gm.eigenvectors[k] @ np.diag(gm.eigenvalues[k]) @ gm.eigenvectors[k].T
            normal = stats.multivariate_normal(alpha * gm.means[k], alpha**2 * covariance + sigma**2 * np.eye(2))
            density += gm.weights[k] * normal.pdf(x)
        expected.append(np.log(density))
    np.testing.assert_allclose(jax.jit(lambda x: oracles.log_prob(gm, schedule, T, x))(X), expected, rtol=1e-6)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_score_is_the_gradient_of_the_density(schedule, x64):
    gm = mixture()
    gradient = jax.jit(jax.grad(lambda x: oracles.log_prob(gm, schedule, T, x).sum()))(X)
    score = jax.jit(lambda x: oracles.prediction(gm, schedule, T, x).score)(X)
    np.testing.assert_allclose(score, gradient, rtol=1e-7)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_velocity_satisfies_the_continuity_equation(schedule, x64):
    """d log p / dt + div v + v . grad log p = 0, with every term by autodiff."""
    gm = mixture()

    def residual(t, x):
        log_p = lambda t, x: oracles.log_prob(gm, schedule, t, x[None])[0]  # noqa: E731
        v = lambda x: oracles.velocity(gm, schedule)(t, x[None])[0]  # noqa: E731
        return jax.grad(log_p)(t, x) + jnp.trace(jax.jacfwd(v)(x)) + v(x) @ jax.grad(log_p, 1)(t, x)

    assert jnp.abs(jax.jit(jax.vmap(residual))(T + 1e-4, X)).max() < 1e-9


@pytest.mark.slow
def test_data_and_noise_are_the_conditional_means(key):
    """E[x1 | x_t near x] over two million draws: the definition, by counting. Standard error 0.005."""
    gm, schedule, t, x = mixture(), schedules.Linear(), 0.6, jnp.array([[0.2, -0.5]])
    key_data, key_noise = jax.random.split(key)
    x1 = oracles.sample(gm, key_data, 2_000_000)
    x0 = jax.random.normal(key_noise, x1.shape)
    near = jnp.square(t * x1 + (1 - t) * x0 - x).sum(axis=1) < 0.08**2
    assert near.sum() > 5000
    p = oracles.prediction(gm, schedule, t, x)
    np.testing.assert_allclose(x1[near].mean(axis=0), p.data[0], atol=0.03)
    np.testing.assert_allclose(x0[near].mean(axis=0), p.noise[0], atol=0.03)
    np.testing.assert_allclose((x1 - x0)[near].mean(axis=0), p.velocity[0], atol=0.05)


@pytest.mark.slow
def test_samples_have_the_mixtures_moments(key):
    gm = mixture()
    x = oracles.sample(gm, key, 200_000)
    mean = gm.weights @ gm.means
    within = jnp.einsum("k,kij,kj,klj->il", gm.weights, gm.eigenvectors, gm.eigenvalues, gm.eigenvectors)
    centred = gm.means - mean[None]
    np.testing.assert_allclose(x.mean(axis=0), mean, atol=0.015)
    np.testing.assert_allclose(jnp.cov(x.T), within + (gm.weights[:, None] * centred).T @ centred, atol=0.02)


def test_finite_at_both_ends():
    gm, x = mixture(), jnp.asarray(X)
    for t in (0.0, 1.0):
        assert all(np.isfinite(value).all() for value in oracles.prediction(gm, schedules.Linear(), t, x))


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_flow_map_obeys_the_ode(schedule, x64):
    """d/dt flow_map = v(t, flow_map), and there and back is the identity."""
    gm = oracles.gaussian_mixture([[1.0, -0.5]], np.array([[[0.5, 0.2], [0.2, 0.3]]]))
    path = lambda t: oracles.flow_map(gm, schedule, 0.1, t, X)  # noqa: E731
    x, dx = jax.jit(lambda t: jax.jvp(path, (t,), (1.0,)))(0.6001)
    np.testing.assert_allclose(dx, jax.jit(oracles.velocity(gm, schedule))(0.6001, x), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(oracles.flow_map(gm, schedule, 0.6001, 0.1, x), X, rtol=1e-8)


def test_any_dimension(key, x64):
    """In 20 dimensions, a single Gaussian's velocity is that of its marginals coordinate by coordinate."""
    variances = np.linspace(0.1, 2.0, 20)
    full = oracles.gaussian_mixture(np.ones((1, 20)), np.diag(variances)[None])
    x = jax.random.normal(key, (3, 20))
    v = jax.jit(oracles.velocity(full, schedules.VP()))(0.7, x)
    one = oracles.gaussian_mixture([[1.0]], np.sqrt(variances[7]))
    np.testing.assert_allclose(v[:, 7:8], jax.jit(oracles.velocity(one, schedules.VP()))(0.7, x[:, 7:8]), rtol=1e-9)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.domain == (0.0, 1.0)], ids=str)
def test_marginalisation(schedule, key, x64):
    """The marginal velocity minimises the conditional loss: its gradient E[(v - u_t) f(x_t)] is zero for any f.

    Test functions: 1, x and sin(3x). Each of the 6 z-scores is within 4.5; the false-alarm rate is 4e-5.
    """
    gm, num = mixture(), 200_000
    key_data, key_noise, key_t = jax.random.split(key, 3)
    x1 = oracles.sample(gm, key_data, num)
    t = jax.random.uniform(key_t, (num,), minval=0.05, maxval=0.95)
    sample = AffinePath(schedule).sample(None, t, jax.random.normal(key_noise, x1.shape), x1)
    error = oracles.velocity(gm, schedule)(t, sample.x_t) - sample.u_t
    for f in (jnp.ones_like, lambda x: x, lambda x: jnp.sin(3 * x)):
        product = error * f(sample.x_t)
        z = product.mean(axis=0) / (product.std(axis=0) / jnp.sqrt(num))
        assert jnp.abs(z).max() < 4.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0], 1.0), r"means must be \[k, d\], got shape \(2,\)"),
        (([[1.0, 2.0]], [1.0, 1.0]), r"scales must be a scalar, \[k\] = \[1\] or \[k, d, d\]"),
        (([[1.0, 2.0]], -1.0), "scales must not be negative"),
        (([[1.0, 2.0]], [[[1.0, 0.5], [0.0, 1.0]]]), "scales, as covariances, must be symmetric"),
        (([[1.0, 2.0]], [[[1.0, 2.0], [2.0, 1.0]]]), "scales, as covariances, must be positive semi-definite"),
        (([[1.0, 2.0]], [[1.0, 0.5], [0.5, 1.0]]), r"scales, as covariances, must be \[k, d, d\] = \(1, 2, 2\)"),
        (([[1.0, 2.0]], 1.0, [1.0, 1.0]), r"weights must be \[k\] = \[1\]"),
        (([[1.0, 2.0]], 1.0, [0.0]), "with a positive sum"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        oracles.gaussian_mixture(*arguments)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_distribution_function_is_scipys(schedule, x64):
    means, stds, weights = np.array([-1.0, 2.0]), np.array([0.2, 0.7]), np.array([0.3, 0.7])
    line = oracles.gaussian_mixture(means[:, None], stds, weights)
    x = np.linspace(-2, 3, 7)
    for t in T:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        expected = stats.norm.cdf(x[:, None], alpha * means, np.sqrt(alpha**2 * stds**2 + sigma**2)) @ weights
        np.testing.assert_allclose(oracles.cdf(line, schedule, t, x[:, None]), expected, rtol=1e-9)


def test_jvp_of_a_jitted_density(key):
    """Of a large batch, with the mixture closed over: jaxlib 0.10.2 crashed here, or gave numbers of its own."""
    gm, x = mixture(), jax.random.normal(key, (1600, 2))
    f = jax.jit(lambda t: oracles.log_prob(gm, schedules.Linear(), t, x))
    _, slope = jax.jvp(f, (jnp.float32(0.7),), (jnp.float32(1.0),))
    expected = (f(0.705) - f(0.695)) / 0.01
    np.testing.assert_allclose(slope, expected, atol=2e-2, rtol=2e-2)


def test_distribution_function_of_a_plane_is_refused():
    with pytest.raises(ValueError, match="one dimension, got 2"):
        oracles.cdf(mixture(), schedules.Linear(), 0.5, X)


def test_flow_map_of_a_mixture_is_refused():
    with pytest.raises(ValueError, match="flow_map needs a single Gaussian, got 3 components"):
        oracles.flow_map(mixture(), schedules.Linear(), 0.0, 1.0, X)
