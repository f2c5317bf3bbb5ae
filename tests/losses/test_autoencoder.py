import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fm_jax.losses.autoencoder import gaussian_kl, kl_autoencoder, negative_elbo
from fm_jax.oracles.ppca import ppca, ppca_elbo, ppca_log_prob, ppca_mean_log_prob, ppca_posterior
from fm_jax.train import create_state, make_optimizer, make_step
from fm_jax.train.step import scan_steps

D, K = 6, 2
RNG = np.random.default_rng(0)
FACTOR = RNG.normal(size=(D, D)) * np.array([2.0, 1.2, 0.5, 0.4, 0.3, 0.3])
MEAN, COV = np.linspace(-1, 1, D), FACTOR @ FACTOR.T
X = (MEAN + RNG.normal(size=(8, D)) @ FACTOR.T).astype(np.float32)


def encode(w, x):
    """Latents whose moments are easily told: w x and the variance 1/4."""
    return w * x, jnp.full_like(x, 2 * np.log(0.5))


def decode(w, z):
    return z / w


# ---- The divergence


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.5, 0.3), (-2.0, 2.5)])
def test_divergence_is_the_integral(mean, std, x64):
    p, q = norm(mean, std), norm()
    expected, _ = quad(lambda z: p.pdf(z) * (p.logpdf(z) - q.logpdf(z)), mean - 12 * std, mean + 12 * std)
    found = gaussian_kl(jnp.full((3, 2, 2, 1), mean), jnp.full((3, 2, 2, 1), 2 * np.log(std)))
    np.testing.assert_allclose(found, 4 * expected, rtol=1e-9, atol=1e-12)  # of four latents, in nats an example


def test_divergence_near_the_prior_keeps_its_digits():
    """1/4 log_variance^2 there: exp(l) - 1 - l of float32 numbers would be zero or noise."""
    small = jnp.full((1, 1), 1e-3)
    np.testing.assert_allclose(gaussian_kl(jnp.zeros((1, 1)), small), 0.25e-6, rtol=2e-3)
    half = gaussian_kl(jnp.ones((2, 3), jnp.bfloat16), jnp.zeros((2, 3), jnp.bfloat16))
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, 1.5)


# ---- The loss of latent diffusion


@pytest.mark.parametrize("error", ["l1", "l2"])
def test_each_term_has_its_unit(error):
    noise = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)
    loss_fn = jax.jit(kl_autoencoder(encode, decode, beta=0.3, error=error))
    loss, metrics = loss_fn(2.0, None, {"x1": X, "noise": noise})
    differences = np.asarray(noise, np.float64) * 0.5 / 2.0
    expected = np.abs(differences).mean() if error == "l1" else np.square(differences).mean()
    kl = 0.5 * (np.square(2 * np.asarray(X, np.float64)) + 0.25 - 1 - np.log(0.25)).sum(1).mean()
    np.testing.assert_allclose(metrics["error"], expected, rtol=1e-5)  # a number of the image
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)  # an image
    np.testing.assert_allclose(loss, expected + 0.3 * kl / D, rtol=1e-5)
    np.testing.assert_array_equal(metrics["loss"], loss)


def test_beta_weighs_the_sums_over_an_image():
    """A beta of the library is that of a loss that sums over the image, whatever the size of the image."""
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)
    batch = {"x1": x, "noise": np.ones_like(x)}
    loss, metrics = jax.jit(kl_autoencoder(encode, decode, beta=1e-2))(2.0, None, batch)
    summed = np.abs(x - (x + 0.25)).sum(axis=(1, 2, 3)).mean() + 1e-2 * metrics["kl"]
    np.testing.assert_allclose(48 * loss, summed, rtol=1e-5)


def test_features_are_compared_leaf_by_leaf():
    x = np.random.default_rng(1).normal(size=(2, 4, 4, 1)).astype(np.float32)
    batch = {"x1": x, "noise": np.ones_like(x)}  # decoded as x + 1/4

    def features(x):
        return {"mean": x.mean(axis=(1, 2)), "double": 2 * x}

    plain, _ = jax.jit(kl_autoencoder(encode, decode))(2.0, None, batch)
    loss, metrics = jax.jit(kl_autoencoder(encode, decode, features=features, feature_weight=0.5))(2.0, None, batch)
    np.testing.assert_allclose(metrics["features"], (0.0625 + 0.25) / 2, rtol=1e-5)
    np.testing.assert_allclose(loss - plain, 0.5 * metrics["features"], rtol=1e-4)


def test_examples_count_by_their_weights():
    batch = {"x1": X, "noise": np.ones_like(X)}
    loss_fn = jax.jit(kl_autoencoder(encode, decode, beta=1.0))
    one = np.ones((1, D), np.float32)
    each = np.stack([loss_fn(2.0, None, {"x1": X[i : i + 1], "noise": one})[0] for i in range(8)])
    weight = np.arange(8.0, dtype=np.float32)
    loss, metrics = loss_fn(2.0, None, batch | {"weight": weight})
    np.testing.assert_allclose(loss, (weight * each).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], loss_fn(2.0, None, batch)[1]["kl"])


def test_the_noise_is_drawn_of_the_key(key):
    loss_fn = jax.jit(kl_autoencoder(encode, decode))
    a, b, c = (float(loss_fn(2.0, k, {"x1": X})[0]) for k in (key, key, jax.random.key(1)))
    assert a == b != c
    noise = jax.random.normal(key, X.shape)
    np.testing.assert_allclose(loss_fn(2.0, None, {"x1": X, "noise": noise})[0], a, rtol=1e-6)


def test_gradients_reach_both_halves_and_the_noise_has_its_scale(key):
    """With one draw the derivative by log_variance is that of the reparametrised sample, noise exp(l / 2) / 2."""

    def moments(params, x):
        return params["mean"] + 0.0 * x, params["log_variance"] + 0.0 * x

    params = {"mean": jnp.float32(0.3), "log_variance": jnp.float32(-0.4), "scale": jnp.float32(1.7)}
    loss_fn = kl_autoencoder(moments, lambda params, z: params["scale"] * z, beta=0.0, error="l2")
    x, noise = jnp.full((1, 1), 0.2), jnp.full((1, 1), 0.9)
    grads = jax.jit(jax.grad(lambda p: loss_fn(p, None, {"x1": x, "noise": noise})[0]))(params)
    std = np.exp(-0.2)
    z = 0.3 + std * 0.9
    slope = 2 * (1.7 * z - 0.2)
    np.testing.assert_allclose(grads["scale"], slope * z, rtol=1e-5)
    np.testing.assert_allclose(grads["mean"], slope * 1.7, rtol=1e-5)
    np.testing.assert_allclose(grads["log_variance"], slope * 1.7 * 0.9 * std / 2, rtol=1e-5)


# ---- The evidence lower bound, against probabilistic principal components


class LinearEncoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        mean = nn.Dense(K)(x)
        return mean, jnp.broadcast_to(self.param("log_variance", nn.initializers.zeros_init(), (K,))[None], mean.shape)


class LinearDecoder(nn.Module):
    learned: bool = False

    @nn.compact
    def __call__(self, z):
        x = nn.Dense(D)(z)
        return (x, self.param("log_variance", nn.initializers.zeros_init(), ())) if self.learned else x


def halves(learned):
    def encode_fn(params, x):
        return LinearEncoder().apply({"params": params["encoder"]}, x)

    def decode_fn(params, z):
        return LinearDecoder(learned).apply({"params": params["decoder"]}, z)

    return encode_fn, decode_fn


def closed_form(model, learned):
    """The parameters of a linear autoencoder that is this model and its posterior."""
    encoder = ppca_posterior(model)
    first = {"kernel": encoder.kernel, "bias": -model.mean @ encoder.kernel}
    decoder = {"Dense_0": {"kernel": model.weights.T, "bias": model.mean}}
    if learned:
        decoder["log_variance"] = jnp.log(model.variance)
    return {
        "encoder": {"Dense_0": first, "log_variance": jnp.log(jnp.diag(encoder.covariance))},
        "decoder": decoder,
    }


def sigma_points(x):
    """Each example with 2 K draws of mean 0 and covariance I, over which a quadratic has its exact expectation."""
    points = np.sqrt(K) * np.concatenate([np.eye(K), -np.eye(K)])
    return {"x1": np.repeat(x, 2 * K, axis=0), "noise": np.tile(points, (len(x), 1)).astype(x.dtype)}


@pytest.mark.parametrize("learned", [False, True])
def test_at_the_closed_form_the_loss_is_the_likelihood(learned, x64):
    model = ppca(MEAN, COV, K)
    loss_fn = jax.jit(negative_elbo(*halves(learned), variance=None if learned else float(model.variance)))
    x = X.astype(np.float64)
    loss, metrics = loss_fn(closed_form(model, learned), None, sigma_points(x))
    np.testing.assert_allclose(loss, -ppca_log_prob(model, x).mean(), rtol=1e-10)
    np.testing.assert_allclose(loss, metrics["nll"] + metrics["kl"], rtol=1e-12)


@pytest.mark.slow
def test_away_from_it_the_loss_is_the_bound_of_the_oracle(x64):
    model, rng = ppca(MEAN, COV, K), np.random.default_rng(3)
    params = closed_form(model, True)
    params["encoder"] = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), params["encoder"])
    x = X.astype(np.float64)
    loss, _ = jax.jit(negative_elbo(*halves(True)))(params, None, sigma_points(x))
    expected = -ppca_elbo(model, x, *halves(True)[0](params, x)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-10)
    assert float(loss) > float(-ppca_log_prob(model, x).mean()) + 1e-3


def test_the_closed_form_is_a_stationary_point(x64):
    """Over data with exactly these moments the gradient is zero in every parameter."""
    root = np.linalg.cholesky(COV)
    points = np.sqrt(D) * np.concatenate([root.T, -root.T]) + MEAN  # 2 D points of mean MEAN and covariance COV
    model = ppca(MEAN, COV, K)
    batch = sigma_points(points)
    loss_fn = negative_elbo(*halves(True))
    gradient = jax.jit(jax.value_and_grad(lambda params: loss_fn(params, None, batch), has_aux=True))
    (loss, _), grads = gradient(closed_form(model, True))
    np.testing.assert_allclose(loss, -ppca_mean_log_prob(model, MEAN, COV), rtol=1e-10)
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
def test_a_linear_autoencoder_learns_principal_components(learned, key):
    """From random parameters on fresh Gaussian data: within 0.5% of the likelihood of probabilistic PCA."""
    model = ppca(MEAN, COV, K)
    encode_fn, decode_fn = halves(learned)
    loss_fn = negative_elbo(encode_fn, decode_fn, variance=None if learned else float(model.variance))
    key_data, key_encoder, key_decoder, key_loss = jax.random.split(key, 4)
    params = {
        "encoder": LinearEncoder().init(key_encoder, X)["params"],
        "decoder": LinearDecoder(learned).init(key_decoder, jnp.zeros((1, K)))["params"],
    }
    optimizer = make_optimizer(1e-2, total_steps=4000, decay="cosine")
    step = jax.jit(scan_steps(make_step(loss_fn, optimizer, axis_name=None)))
    state = create_state(params, optimizer)
    for i in range(40):
        noise = jax.random.normal(jax.random.fold_in(key_data, i), (100, 256, D))
        x = jnp.asarray(MEAN, jnp.float32)[None, None] + noise @ jnp.asarray(FACTOR.T, jnp.float32)
        state, _ = step(state, key_loss, {"x1": x})
    root = np.linalg.cholesky(COV)
    points = np.sqrt(D) * np.concatenate([root.T, -root.T]) + MEAN
    batch = sigma_points(points.astype(np.float32))
    found, best = float(loss_fn(state.params, None, batch)[0]), -float(ppca_mean_log_prob(model, MEAN, COV))
    print(f"\n-ELBO {found:.4f} nats, -log p of pPCA {best:.4f}: {found / best - 1:.2%}")
    assert best - 1e-3 < found < best + 0.005 * abs(best)
    if learned:
        np.testing.assert_allclose(jnp.exp(state.params["decoder"]["log_variance"]), model.variance, rtol=0.03)


# ---- Refusals

BATCH = {"x1": X}
OK = kl_autoencoder(encode, decode)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kl_autoencoder("encode", decode), r"^encode_fn must be a function encode_fn\(params, x\) -> \(mean, "),
        (
            lambda: kl_autoencoder(encode, nn.Dense),
            r"^decode_fn must be a function decode_fn\(params, z\) -> x, got the ",
        ),
        (lambda: kl_autoencoder(encode, decode, beta=-1.0), r"^beta must be finite and not negative, got -1\.0\.$"),
        (lambda: kl_autoencoder(encode, decode, error="l3"), r"^error must be one of 'l1', 'l2', got 'l3'\.$"),
        (lambda: kl_autoencoder(encode, decode, features=3), r"^features must be a function features\(x\) of a batch"),
        (lambda: kl_autoencoder(encode, decode, feature_weight=np.nan), r"^feature_weight must be finite and not "),
        (lambda: negative_elbo(encode, decode, variance=0.0), r"^variance must be positive and finite, got 0\.0\.$"),
        (lambda: OK(2.0, None, BATCH), r"^without a key the batch must hold 'noise'\.$"),
        (lambda: OK(2.0, jax.random.key(0), {"x": X}), r"^the batch must hold 'x1', got \['x'\]\.$"),
        (
            lambda: OK(2.0, jax.random.key(0), {"x1": np.zeros((2, 3), np.uint8)}),
            r"^x1 must be floating point, got uint8",
        ),
        (lambda: OK(2.0, None, {"x1": X, "noise": X[:1]}), r"^noise must have the shape of the latents, \(8, 6\)"),
        (lambda: OK(2.0, None, {"x1": X, "noise": X, "weight": jnp.ones(3)}), r"^weight must be \[batch\] = \(8,\)"),
        (
            lambda: kl_autoencoder(lambda p, x: x, decode)(2.0, None, {"x1": X, "noise": X}),
            r"^what encode_fn returns must be \(mean, log_variance\), got float32 of shape \(8, 6\)\.$",
        ),
        (
            lambda: kl_autoencoder(lambda p, x: (x[:1], x[:1]), decode)(2.0, None, {"x1": X, "noise": X}),
            r"^what encode_fn returns must be \[batch, \.\.\.\] with batch = 8, got shape \(1, 6\)\.$",
        ),
        (
            lambda: kl_autoencoder(encode, lambda p, z: z[..., :1])(2.0, None, {"x1": X, "noise": X}),
            r"^what decode_fn returns must have the shape of x, \(8, 6\), got \(8, 1\)\.$",
        ),
        (
            lambda: kl_autoencoder(encode, decode, features=lambda x: x.mean())(2.0, None, {"x1": X, "noise": X}),
            r"^what features returns must be \[batch, \.\.\.\] with batch = 8, got shape \(\)\.$",
        ),
        (
            lambda: kl_autoencoder(encode, decode, features=lambda x: {})(2.0, None, {"x1": X, "noise": X}),
            r"^what features returns must be a pytree of \[batch, \.\.\.\], got one without arrays\.$",
        ),
        (
            lambda: negative_elbo(encode, decode)(2.0, None, {"x1": X, "noise": X}),
            r"^what decode_fn returns must be \(x, log_variance\), as no variance is given, got float32 of shape",
        ),
        (
            lambda: negative_elbo(encode, lambda p, z: (z, 0.0), variance=1.0)(2.0, None, {"x1": X, "noise": X}),
            r"^what decode_fn returns must be x alone, as its variance is given, got a tuple of 2\.$",
        ),
        (
            lambda: negative_elbo(encode, lambda p, z: (z, jnp.zeros(8)))(2.0, None, {"x1": X, "noise": X}),
            r"^the log_variance of decode_fn must broadcast to x, \(8, 6\), got \(8,\)\.$",
        ),
        (
            lambda: gaussian_kl(X, X[:, :1]),
            r"^mean and log_variance must have the same shape, got \(8, 6\) and \(8, 1\)",
        ),
        (lambda: gaussian_kl(jnp.ones((2, 2), int), X), r"^mean must be floating point, got int32"),
    ],
    ids=lambda value: value[1:50] if isinstance(value, str) else "",
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
