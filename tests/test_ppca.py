import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from fm_jax.oracles.ppca import PPCA, ppca, ppca_elbo, ppca_log_prob, ppca_mean_log_prob, ppca_posterior

D, K = 5, 2
RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(D, D)) * np.array([3.0, 2.0, 1.0, 0.7, 0.5])
DATA = RNG.normal(size=(200, D)) @ FACTOR.T + np.arange(D)
MEAN, COV = DATA.mean(0), np.cov(DATA.T, bias=True)


def covariance(model):
    return np.asarray(model.weights) @ np.asarray(model.weights).T + float(model.variance) * np.eye(len(model.mean))


def test_likelihood_is_scipys(x64):
    model = ppca(MEAN, COV, K)
    expected = multivariate_normal(MEAN, covariance(model)).logpdf(DATA)
    np.testing.assert_allclose(ppca_log_prob(model, DATA), expected, rtol=1e-11)
    np.testing.assert_allclose(ppca_mean_log_prob(model, MEAN, COV), expected.mean(), rtol=1e-12)
    # Of data with other moments than the model was made of.
    other = DATA[:50] * 1.3 - 0.2
    moments = other.mean(0), np.cov(other.T, bias=True)
    np.testing.assert_allclose(ppca_mean_log_prob(model, *moments), ppca_log_prob(model, other).mean(), rtol=1e-12)


def test_the_model_is_scikit_learns(x64):
    """Whose covariance is divided by n - 1."""
    decomposition = pytest.importorskip("sklearn.decomposition")
    theirs = decomposition.PCA(K).fit(DATA)
    ours = ppca(MEAN, np.cov(DATA.T), K)
    np.testing.assert_allclose(ours.variance, theirs.noise_variance_, rtol=1e-12)
    np.testing.assert_allclose(covariance(ours), theirs.get_covariance(), rtol=1e-10)
    np.testing.assert_allclose(ppca_log_prob(ours, DATA), theirs.score_samples(DATA), rtol=1e-10)


@pytest.mark.parametrize("variance", [None, 0.8])
def test_nothing_near_it_is_likelier(variance, x64):
    model = ppca(MEAN, COV, K, variance=variance)
    best = float(ppca_mean_log_prob(model, MEAN, COV))
    rng = np.random.default_rng(1)
    for _ in range(20):
        step = 1e-3 * rng.normal(size=(D, K))
        noise = float(model.variance) * (1 + (variance is None) * 1e-3 * rng.normal())
        near = PPCA(model.mean + 1e-3 * rng.normal(size=D), model.weights + step, jnp.asarray(noise))
        assert float(ppca_mean_log_prob(near, MEAN, COV)) < best


def test_posterior_is_that_of_the_joint_gaussian(x64):
    model = ppca(MEAN, COV, K)
    w, own = np.asarray(model.weights), covariance(model)
    encoder = ppca_posterior(model)
    np.testing.assert_allclose(encoder.kernel, np.linalg.solve(own, w), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(encoder.covariance, np.eye(K) - w.T @ np.linalg.solve(own, w), rtol=1e-10, atol=1e-12)


def bound(model):
    """The bound on the data of the best encoder with a diagonal covariance, s_j^2 = sigma^2 / M_jj."""
    encoder, w = ppca_posterior(model), np.asarray(model.weights)
    variances = float(model.variance) / np.diag(w.T @ w + float(model.variance) * np.eye(K))
    latents = (DATA - np.asarray(model.mean)) @ np.asarray(encoder.kernel)
    return ppca_elbo(model, DATA, latents, np.broadcast_to(np.log(variances), latents.shape))


def test_the_bound_is_the_likelihood_where_the_posterior_is_diagonal(x64):
    model = ppca(MEAN, COV, K)
    np.testing.assert_allclose(bound(model), ppca_log_prob(model, DATA), rtol=1e-12)
    angle = 0.6  # the same likelihood, and a bound below it by the KL of independent latents from correlated ones
    turned = model._replace(
        weights=model.weights @ np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    )
    np.testing.assert_allclose(ppca_log_prob(turned, DATA), ppca_log_prob(model, DATA), rtol=1e-12)
    precision = np.linalg.inv(np.asarray(ppca_posterior(turned).covariance))
    gap = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    assert gap > 0.05
    np.testing.assert_allclose(ppca_log_prob(turned, DATA) - bound(turned), gap, rtol=1e-9)


def test_the_bound_is_below_the_likelihood_for_any_encoder(x64):
    model, rng = ppca(MEAN, COV, K), np.random.default_rng(2)
    for _ in range(5):
        latents, log_variance = rng.normal(size=(2, len(DATA), K))
        assert (ppca_elbo(model, DATA, latents, log_variance) < ppca_log_prob(model, DATA)).all()


def test_a_latent_that_the_noise_hides_is_its_prior(x64):
    """Posterior collapse: a given variance above the second eigenvalue leaves one latent."""
    values = np.linalg.eigvalsh(COV)[::-1]
    model = ppca(MEAN, COV, K, variance=float(np.sqrt(values[0] * values[1])))
    np.testing.assert_array_equal(model.weights[:, 1], 0.0)
    encoder = ppca_posterior(model)
    np.testing.assert_allclose(encoder.covariance[1], [0.0, 1.0], atol=1e-12)
    np.testing.assert_array_equal(encoder.kernel[:, 1], 0.0)


def test_as_many_latents_as_directions_is_the_gaussian_itself(x64):
    model = ppca(MEAN, COV, D - 1)
    np.testing.assert_allclose(covariance(model), COV, rtol=1e-10)


def test_in_single_precision_and_compiled():
    model = ppca(MEAN, COV, K)
    assert model.weights.dtype == jnp.float32
    x = jnp.asarray(DATA, jnp.float32)
    found = jax.jit(lambda x: ppca_log_prob(model, x))(x)
    np.testing.assert_allclose(found, multivariate_normal(MEAN, covariance(model)).logpdf(DATA), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ppca(MEAN, COV, D), r"^num_latents must be from 1 to 4, got 5\.$"),
        (lambda: ppca(MEAN, COV, 0), r"^num_latents must be from 1 to 4, got 0\.$"),
        (lambda: ppca(MEAN, COV[:3, :3], K), r"^cov must be of shape \(5, 5\), got \(3, 3\)\.$"),
        (lambda: ppca(MEAN, COV + np.triu(COV), K), r"^cov must be symmetric\.$"),
        (lambda: ppca(MEAN, -COV, K), r"^cov must have no negative eigenvalue, got -"),
        (lambda: ppca(np.zeros(3), np.diag([1.0, 0, 0]), 1), r"^cov must vary in more than num_latents=1 directions"),
        (lambda: ppca(MEAN, COV, K, variance=0.0), r"^variance must be positive and finite, got 0\.0\.$"),
        (lambda: ppca([np.nan, 0.0], np.eye(2), 1), r"^mean must be real and finite numbers"),
        (lambda: ppca_log_prob((MEAN, COV, 1.0), jnp.ones((2, D))), r"^model must be a PPCA, as from ppca"),
        (lambda: ppca_log_prob(ppca(MEAN, COV, K), jnp.ones((2, 3))), r"^x must be \[batch, d\] with d = 5"),
        (lambda: ppca_mean_log_prob(ppca(MEAN, COV, K), [0.0], [[1.0]]), r"^mean must be of shape \(5,\), that of the"),
        (
            lambda: ppca_elbo(ppca(MEAN, COV, K), jnp.ones((2, D)), jnp.ones((2, 3)), jnp.ones((2, 3))),
            r"^latent_mean must be \[batch, d\] with d = 2",
        ),
        (
            lambda: ppca_elbo(ppca(MEAN, COV, K), jnp.ones((2, D)), jnp.ones((3, K)), jnp.ones((3, K))),
            r"^latent_mean must be of as many examples as x, 2, got 3\.$",
        ),
    ],
    ids=lambda value: value[1:40] if isinstance(value, str) else "",
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_model_that_is_traced_is_refused_where_it_is_decomposed():
    model, x = ppca(MEAN, COV, K), jnp.asarray(DATA)
    for call in (ppca_log_prob, lambda model, x: ppca_mean_log_prob(model, MEAN, COV), lambda m, x: ppca_posterior(m)):
        with pytest.raises(ValueError, match="model must hold numbers, not what is traced"):
            jax.eval_shape(call, model, x)
