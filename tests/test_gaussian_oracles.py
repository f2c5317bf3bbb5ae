import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from fm_jax import oracles
from fm_jax.samplers import StochasticHeun, sample
from fm_jax.schedules import Cosine, Linear

MEAN0, COV0 = np.array([-1.0, 0.5]), np.array([[0.8, 0.3], [0.3, 0.5]])
MEAN1, COV1 = np.array([1.5, -0.5]), np.array([[0.3, -0.2], [-0.2, 0.9]])
SIGMA = 0.8
X = np.array([[0.1, -0.4], [1.5, 0.3], [-1.0, 1.0]])


def pair():
    return oracles.gaussian_pair(MEAN0, COV0, MEAN1, COV1)


PLANS = {
    "independent": lambda p: p,
    "optimal": oracles.optimal_plan,
    "entropic": lambda p: oracles.entropic_plan(p, SIGMA),
}
BRIDGES = {
    "brownian": (Linear(), lambda t: SIGMA**2 * t * (1 - t)),
    "straight": (Linear(), lambda t: 0.0 * t),
    "curved": (Cosine(), lambda t: (1.5 * t * (1 - t)) ** 2 + 0.01),
}


@functools.cache
def predicting(name):
    """The oracle on a bridge of any plan, `f(pair, t, x)`, compiled once."""
    return jax.jit(lambda p, t, x: oracles.bridge_prediction(oracles.GaussianBridge(p, *BRIDGES[name]), t, x))


def joint_covariance(p):
    return np.block([[p.cov0, p.cross], [p.cross.T, p.cov1]])


def test_transport_is_pots(x64):
    ot = pytest.importorskip("ot")
    expected = ot.gaussian.bures_wasserstein_distance(MEAN0, MEAN1, COV0, COV1)
    np.testing.assert_allclose(oracles.bures_distance(pair()), expected, rtol=1e-12)
    matrix, shift = ot.gaussian.bures_wasserstein_mapping(MEAN0, MEAN1, COV0, COV1)
    np.testing.assert_allclose(oracles.monge_map(pair(), X), X @ matrix + shift, rtol=1e-10)


def test_distance_of_commuting_covariances(x64):
    """There W2^2 = |m0 - m1|^2 + sum (sqrt(a) - sqrt(b))^2 over the eigenvalues."""
    a, b = np.array([0.2, 1.0, 3.0]), np.array([2.0, 1.0, 0.5])
    p = oracles.gaussian_pair(np.zeros(3), np.diag(a), np.ones(3), np.diag(b))
    np.testing.assert_allclose(oracles.bures_distance(p) ** 2, 3 + ((a**0.5 - b**0.5) ** 2).sum(), rtol=1e-12)


def test_the_monge_map_is_a_gradient_that_carries_one_law_to_the_other(x64):
    """T is symmetric and positive definite, and T C0 T = C1: by Brenier's theorem no other map does."""
    matrix = np.asarray(jax.jacfwd(lambda x: oracles.monge_map(pair(), x[None])[0])(jnp.zeros(2)))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert np.linalg.eigvalsh(matrix)[0] > 0
    np.testing.assert_allclose(matrix @ COV0 @ matrix, COV1, atol=1e-12)
    np.testing.assert_allclose(oracles.monge_map(pair(), MEAN0[None])[0], MEAN1, rtol=1e-12)
    np.testing.assert_allclose(oracles.optimal_plan(pair()).cross, COV0 @ matrix, atol=1e-12)


def test_displacement_velocity_moves_points_on_straight_lines(x64):
    line = lambda t: (1 - t) * X + t * oracles.monge_map(pair(), X)  # noqa: E731
    v = oracles.displacement_velocity(pair())
    for t in (0.0, 0.3, 1.0):
        x, dx = jax.jvp(line, (t,), (1.0,))
        np.testing.assert_allclose(v(t, x), dx, rtol=1e-10)


def test_displacement_is_a_geodesic(x64):
    """W2 grows in proportion to time, and the moments end where they should."""
    p = pair()
    for t in (0.25, 0.7):
        mean, cov = oracles.displacement_moments(p, t)
        part = oracles.bures_distance(oracles.gaussian_pair(MEAN0, COV0, mean, cov))
        np.testing.assert_allclose(part, t * oracles.bures_distance(p), rtol=1e-9)
    np.testing.assert_allclose(oracles.displacement_moments(p, 1.0)[1], COV1, atol=1e-12)


@pytest.mark.slow
def test_displacement_is_the_straight_bridge_of_the_optimal_plan(x64):
    """Two derivations of one velocity: by the Monge map and by conditioning."""
    straight = oracles.GaussianBridge(oracles.optimal_plan(pair()), Linear(), lambda t: 0 * t)
    for t in (0.0, 0.4, 1.0):
        expected = oracles.bridge_prediction(straight, t, X)
        np.testing.assert_allclose(oracles.displacement_velocity(pair())(t, X), expected.velocity, rtol=1e-9)
        for got, wanted in zip(oracles.displacement_moments(pair(), t), oracles.bridge_moments(straight, t)):
            np.testing.assert_allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.2, 0.8, 5.0])
def test_entropic_plan_is_optimal(sigma, x64):
    """Its density is exp(-|x0 - x1|^2 / (2 sigma^2)) f(x0) g(x1): what couples x0 with x1 is -I / sigma^2 alone."""
    p = oracles.entropic_plan(pair(), sigma)
    precision = np.linalg.inv(joint_covariance(p))
    np.testing.assert_allclose(precision[:2, 2:], -np.eye(2) / sigma**2, atol=1e-8 / sigma**2)
    np.testing.assert_array_equal(p.cov0, COV0)
    np.testing.assert_array_equal(p.cov1, COV1)


def test_entropic_plan_between_its_limits(x64):
    np.testing.assert_allclose(oracles.entropic_plan(pair(), 1e-3).cross, oracles.optimal_plan(pair()).cross, atol=2e-6)
    np.testing.assert_allclose(oracles.entropic_plan(pair(), 1e3).cross, 0, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_samples_have_the_joint_moments(plan, key):
    """Covariances of 100,000 draws, standard error below 0.005; with the optimal plan x1 is the Monge map of x0."""
    p = PLANS[plan](pair())
    x0, x1 = oracles.sample_pair(p, key, 100_000)
    np.testing.assert_allclose(jnp.cov(jnp.concatenate([x0, x1], axis=1).T), joint_covariance(p), atol=0.02)
    np.testing.assert_allclose(jnp.concatenate([x0, x1], axis=1).mean(axis=0), [*MEAN0, *MEAN1], atol=0.015)
    if plan == "optimal":
        np.testing.assert_allclose(x1, oracles.monge_map(p, x0), atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", BRIDGES)
def test_conditional_means_by_numpy(plan, name, x64):
    """Regression on x_t in the joint law of (x0, x1, z), by least squares on its square root."""
    p, t = PLANS[plan](pair()), 0.35
    got = predicting(name)(p, t, X)
    eigenvalues, eigenvectors = np.linalg.eigh(joint_covariance(p))
    root = eigenvectors * np.sqrt(eigenvalues.clip(0))
    root_x0, root_x1, root_z = (np.zeros((2, 6)) for _ in range(3))
    root_x0[:, :4], root_x1[:, :4], root_z[:, 4:] = root[:2], root[2:], np.eye(2)
    if name == "curved":
        alpha, sigma, d_alpha, d_sigma = np.sin(np.pi / 2 * t), np.cos(np.pi / 2 * t), 0, 0
        d_alpha, d_sigma = np.pi / 2 * sigma, -np.pi / 2 * alpha
        gamma = np.sqrt((1.5 * t * (1 - t)) ** 2 + 0.01)
        d_gamma = 1.5**2 * t * (1 - t) * (1 - 2 * t) / gamma
    else:
        alpha, sigma, d_alpha, d_sigma = t, 1 - t, 1, -1
        gamma = SIGMA * np.sqrt(t * (1 - t)) if name == "brownian" else 0.0
        d_gamma = SIGMA * (1 - 2 * t) / 2 / np.sqrt(t * (1 - t)) if name == "brownian" else 0.0
    root_t = alpha * root_x1 + sigma * root_x0 + gamma * root_z
    centred = X - alpha * MEAN1 - sigma * MEAN0

    def given_x_t(mean, root_y):
        return mean + centred @ np.linalg.lstsq(root_t.T, root_y.T, rcond=None)[0]

    drift = given_x_t(d_alpha * MEAN1 + d_sigma * MEAN0, d_alpha * root_x1 + d_sigma * root_x0)
    noise = given_x_t(0, root_z)
    np.testing.assert_allclose(got.drift, drift, rtol=1e-8)
    np.testing.assert_allclose(got.noise, noise, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(got.velocity, drift + d_gamma * noise, rtol=1e-8)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", BRIDGES)
def test_continuity_equation(name, x64):
    """d log p / dt + div v + v . grad log p = 0 and the score is grad log p, with every derivative by autodiff."""

    def residual(p, t, x):
        bridge = oracles.GaussianBridge(p, *BRIDGES[name])
        log_p = lambda t, x: jax.scipy.stats.multivariate_normal.logpdf(x, *oracles.bridge_moments(bridge, t))  # noqa: E731
        f = lambda x: oracles.bridge_prediction(bridge, t, x[None]).velocity[0]  # noqa: E731
        dt, gradient = jax.grad(log_p, (0, 1))(t, x)
        return dt + jnp.trace(jax.jacfwd(f)(x)) + f(x) @ gradient, gradient

    t, residual = jnp.array([0.1, 0.5, 0.9]), jax.jit(jax.vmap(residual, in_axes=(None, 0, 0)))
    for p in (plan(pair()) for plan in PLANS.values()):
        rest, gradient = residual(p, t, X)
        np.testing.assert_allclose(rest, 0, atol=1e-8)
        np.testing.assert_allclose(predicting(name)(p, t, X).score, gradient, rtol=1e-8)


@jax.jit
def drift_matrix(p, t, g, direction):
    bridge = oracles.GaussianBridge(p, *BRIDGES["brownian"])
    return jax.jacfwd(lambda x: oracles.bridge_drift(bridge, g, direction)(t, x[None])[0])(jnp.zeros(2))


def sde_moments(p, g, direction=1):
    """Cov(X_end) and Cov(X_end, X_start) of the SDE with noise g, by its linear moment equations and SciPy.

    It has the marginals of the Brownian bridges between the ends of the pair.
    """
    start, t0, t1 = (COV0, 0.0, 1.0) if direction == 1 else (COV1, 1.0, 0.0)

    def slope(t, y):
        cov, cross = y.reshape(2, 2, 2)
        b = np.asarray(drift_matrix(p, t, g, direction))
        return np.stack([b @ cov + cov @ b.T + direction * g**2 * np.eye(2), b @ cross]).ravel()

    end = solve_ivp(slope, (t0, t1), np.stack([start, start]).ravel(), rtol=1e-8, atol=1e-10).y[:, -1]
    return end.reshape(2, 2, 2)


def test_the_sde_with_noise_sigma_is_the_schroedinger_bridge(x64):
    """Every g leads to the same ends, but only g = sigma couples them by the entropic plan."""
    bridge = oracles.schroedinger_bridge(pair(), SIGMA)
    couplings = {}
    for g in (0.0, 0.5, SIGMA):
        cov, couplings[g] = sde_moments(bridge.pair, g)
        np.testing.assert_allclose(cov, COV1, atol=1e-6)
    np.testing.assert_allclose(couplings[SIGMA].T, bridge.pair.cross, atol=1e-6)
    assert np.abs(couplings[0.0].T - bridge.pair.cross).max() > 0.1
    assert np.abs(couplings[0.5].T - bridge.pair.cross).max() > 0.05


def test_the_backward_sde_is_the_same_bridge(x64):
    bridge = oracles.schroedinger_bridge(pair(), SIGMA)
    cov, cross = sde_moments(bridge.pair, SIGMA, direction=-1)
    np.testing.assert_allclose(cov, COV0, atol=1e-6)
    np.testing.assert_allclose(cross, bridge.pair.cross, atol=1e-6)


def test_a_bridge_of_another_coupling_is_not_the_schroedinger_bridge(x64):
    """A Brownian bridge between independent ends has the right marginals; the SDE forgets the coupling."""
    cov, cross = sde_moments(pair(), SIGMA)
    np.testing.assert_allclose(cov, COV1, atol=1e-6)
    assert np.abs(cross).max() > 0.05  # not independent
    assert np.abs(cross.T - oracles.entropic_plan(pair(), SIGMA).cross).max() > 0.05


@jax.jit
def heun(key, x, g, grid):
    bridge = oracles.schroedinger_bridge(pair(), SIGMA)
    v = lambda t, x: oracles.bridge_prediction(bridge, t, x).velocity  # noqa: E731
    score = lambda t, x: oracles.bridge_prediction(bridge, t, x).score  # noqa: E731
    # g is traced, so that all share one compilation: a function of t passes the checks of a number.
    return sample(v, x, StochasticHeun(diffusion=lambda t: g, score=score), times=grid, key=key).x


@pytest.mark.slow
@pytest.mark.parametrize("direction", [1, -1])
def test_sde_sampler_between_the_gaussians(direction, key):
    """Moments of 5,000 samples by Heun steps, forward and backward, for three g; and the coupling for g = sigma.

    Each z-score is within 4.5: 19 in each direction, a false-alarm rate of 3e-4 for both.
    """
    cross, num = oracles.entropic_plan(pair(), SIGMA).cross, 5_000
    start, end = [(MEAN0, COV0), (MEAN1, COV1)][::direction]
    cross = cross if direction == 1 else cross.T
    key_start, key_sde = jax.random.split(key)
    x = start[0][None] + jax.random.normal(key_start, (num, 2)) @ np.linalg.cholesky(start[1]).T
    for g in (0.0, 0.5, SIGMA):
        y = heun(key_sde, x, g, jnp.linspace(0, 1, 49)[::direction])
        assert np.abs(moment_scores(y, *end)).max() < 4.5
    products = (np.asarray(x) - start[0])[:, :, None] * (np.asarray(y) - end[0])[:, None, :]
    assert np.abs((products.mean(axis=0) - cross) / (products.std(axis=0) / num**0.5)).max() < 4.5


def moment_scores(x, mean, cov):
    """Z-scores of the sample's mean and covariance under N(mean, cov): 5 in the plane."""
    n, variances = len(x), np.diag(cov)
    centred = np.asarray(x, dtype=np.float64) - mean
    of_mean = centred.mean(axis=0) / np.sqrt(variances / n)
    of_cov = (centred.T @ centred / n - cov) / np.sqrt((np.outer(variances, variances) + cov**2) / n)
    return np.concatenate([of_mean, of_cov[np.triu_indices(2)]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0.0]], [[1.0]], [0.0], [[1.0]]), r"mean0 must be finite and of shape \(1,\), got \[\[0.0\]\]"),
        (([0.0], [1.0], [0.0], [[1.0]]), r"cov0 must be finite and of shape \(1, 1\), got \[1.0\]"),
        (([0.0], [[1.0]], [np.nan], [[1.0]]), r"mean1 must be real and finite numbers, got \[nan\]"),
        (([0.0], [[1.0]], [0.0], [[0.0]]), r"cov1 must be symmetric and positive definite, got \[\[0.0\]\]"),
        ((np.zeros(2), [[1.0, 0.5], [0.0, 1.0]], np.zeros(2), np.eye(2)), "cov0 must be symmetric"),
    ],
)
def test_bad_pairs(arguments, message):
    with pytest.raises(ValueError, match=message):
        oracles.gaussian_pair(*arguments)


def test_bad_couplings():
    with pytest.raises(ValueError, match=r"cross must be that of a joint law of cov0 and cov1, got \[\[1.5\]\]"):
        oracles.gaussian_pair([0.0], [[1.0]], [0.0], [[1.0]], cross=[[1.5]])
    for sigma in (0.0, -1.0, np.inf):
        with pytest.raises(ValueError, match="sigma must be positive and finite"):
            oracles.entropic_plan(pair(), sigma)
