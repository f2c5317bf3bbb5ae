import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import optimised
from contracts import SCHEDULES, mixture
from flax import linen as nn

from fm_jax import oracles
from fm_jax.data.digits import load_digits
from fm_jax.guidance import classifier, classifier_free
from fm_jax.nfe import Counted
from fm_jax.paths import AffinePath
from fm_jax.samplers import sample
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import VP, Linear

T = np.array([0.07, 0.33, 0.61, 0.93])
X = np.array([[0.1, -0.4], [1.5, 0.3], [-1.0, 1.0], [0.4, -1.2]])
LINEAR = Linear()


def exact_classifier(schedule):
    """Unconditional velocity, velocity of a class and log p(class | t, x): the class is two of three Gaussians."""
    everything = mixture()
    members = np.array([0, 2])
    weights = np.asarray(everything.weights)[members]
    one_class = oracles.GaussianMixture(
        jnp.asarray(weights / weights.sum()), *(leaf[members] for leaf in everything[1:])
    )

    def log_prob_fn(t, x):
        joint = jnp.log(weights.sum()) + oracles.log_prob(one_class, schedule, t, x)
        return joint - oracles.log_prob(everything, schedule, t, x)

    return oracles.velocity(everything, schedule), oracles.velocity(one_class, schedule), log_prob_fn


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_exact_classifier_gives_the_conditional_velocity(schedule, x64):
    """And at scale s that of classifier-free guidance, since grad log p(y | x) is the difference of the scores."""
    v, v_class, log_prob_fn = exact_classifier(schedule)
    scales = np.array([1.0, 1.0, 1.0, 1.0, 3.0, -1.0, 0.5, 0.0])
    guided, free = classifier(v, log_prob_fn, scales, schedule), classifier_free(v_class, v, scales)
    t, x = np.tile(T, 2), np.tile(X, (2, 1))
    exact = jax.jit(free)(t, x)  # where the scale is 1, v_class to the last bit
    np.testing.assert_allclose(jax.jit(guided)(t, x), exact, rtol=1e-7, atol=1e-9)


def test_guided_samples_are_those_of_the_class(x64):
    """The flow from the first time at which guidance is finite, with the classifier and with the class itself."""

    v, v_class, log_prob_fn = exact_classifier(LINEAR)
    guided = classifier(v, log_prob_fn, 1.0, LINEAR)

    @jax.jit
    def ends(x):
        return [sample(each, x, times=uniform(100, 1e-3)).x for each in (guided, v_class, v)]

    guided, expected, unguided = ends(X)
    np.testing.assert_allclose(guided, expected, atol=1e-8)
    assert np.abs(unguided - expected).max() > 0.5


@pytest.mark.parametrize("schedule", [LINEAR, VP()], ids=str)
def test_outside_the_interval_nothing_is_added_and_nothing_is_nan(schedule):
    """Outside its interval the classifier is infinite or NaN, and so is c: neither comes through, also in gradients."""
    log_prob_fn = lambda t, x: (x**2).sum(axis=1) / (t - 0.2) * jnp.log(0.8 - t)  # noqa: E731
    guided = jax.jit(classifier(lambda t, x: x**3, log_prob_fn, 2.0, schedule, interval=(0.3, 0.7)))
    x, t = jnp.asarray(X), jnp.array([0.0, 0.2, 0.8, 1.0])
    np.testing.assert_array_equal(guided(t, x), x**3)
    for each in (0.0, 1.0):
        np.testing.assert_array_equal(guided(each, x), x**3)
    gradient = jax.jit(jax.grad(lambda t, x: guided(t, x).sum(), argnums=(0, 1)))(t, x)
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    assert (jnp.abs(guided(jnp.array([0.3, 0.5, 0.6, 0.7]), x) - x**3) > 1e-3).all()


def test_default_interval_is_where_the_coefficient_is_finite():
    for schedule, start in ((LINEAR, 1e-3), (VP(), 0.0)):
        guided = classifier(lambda t, x: 0 * x, lambda t, x: x.sum(axis=1), 1.0, schedule)
        x = jnp.zeros((1, 2))
        assert np.isfinite(guided(0.0, x)).all()
        assert (guided(start, x) != 0).all()
        assert (guided(0.0, x) != 0).all() == (start == 0)


def test_scale_zero_is_off_and_nfe_is_that_of_the_velocity():
    v = Counted(lambda t, x: x, 3)
    log_prob_fn = lambda t, x: x.sum(axis=1)  # noqa: E731
    assert classifier(v, log_prob_fn, 0, LINEAR) is v
    assert classifier(v, log_prob_fn, 2.0, LINEAR).nfe == 3
    assert classifier(v.function, log_prob_fn, 2.0, LINEAR).nfe is None


def test_any_event_shape_and_a_batch_of_times():
    shapes = []

    def log_prob_fn(t, x):
        shapes.append((t.shape, x.shape))
        return (x * t[:, None, None, None]).sum(axis=(1, 2, 3))

    x, scale = jnp.ones((2, 4, 4, 3)), jnp.array([2.0, 4.0])
    guided = classifier(lambda t, x: x, log_prob_fn, scale, LINEAR)(0.5, x)
    # c = (1 - t) / t = 1 and the gradient is t = 0.5.
    np.testing.assert_allclose(guided, 1 + 0.5 * jnp.broadcast_to(scale[:, None, None, None], x.shape), rtol=1e-6)
    assert shapes == [((2,), (2, 4, 4, 3))]


BAD = [
    ({"scale": float("nan")}, "scale must be finite, got nan."),
    ({"scale": jnp.ones((2, 2))}, r"scale must be a number or \[batch\], got float32 of shape \(2, 2\)."),
    ({"interval": (0.5, 0.2)}, r"interval must be a pair \(low, high\): .* must hold, got low=0.5 and high=0.2."),
    ({"interval": (0.0, 1.0)}, "classifier guidance divides by alpha, which is 0 at t = 0.0 for Linear"),
    ({"interval": (0.0, 1.0), "schedule": VP()}, r"inside the domain of the schedule, \(0.0, 0.99999\), got \(0.0, 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    options = {"scale": 2.0, "schedule": LINEAR, **options}
    with pytest.raises(ValueError, match=message):
        classifier(lambda t, x: x, lambda t, x: x.sum(axis=1), **options)


def test_a_classifier_that_does_not_return_one_number_an_example_is_refused():
    guided = classifier(lambda t, x: x, lambda t, x: x, 2.0, LINEAR)
    with pytest.raises(ValueError, match=r"log_prob_fn\(t, x\) must be \[batch\] = \(4,\), got shape \(4, 2\)."):
        guided(0.5, jnp.asarray(X, dtype=jnp.float32))


# A trained classifier


class NoisyDigits(nn.Module):
    """Logits of the ten digits from a noisy image and its time."""

    @nn.compact
    def __call__(self, t, x):
        h = jnp.concatenate([x.reshape(x.shape[0], -1), t[:, None]], axis=1)
        for _ in range(2):
            h = nn.silu(nn.Dense(256)(h))
        return nn.Dense(10)(h)


NUM = 300


def narrow_gaussians(centres, width):
    """`oracles.velocity` of equal Gaussians of one width, without the rotations that are slow in 64 dimensions."""

    def v(t, x):
        variance = t**2 * width**2 + (1 - t) ** 2
        squares = ((x[:, None] - t * centres[None]) ** 2).sum(axis=2)
        mean = jax.nn.softmax(-squares / (2 * variance)) @ centres
        noise = (1 - t) / variance * (x - t * mean)
        return mean + t * width**2 / variance * (x - t * mean) - noise

    return v


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_the_field_of_narrow_gaussians_is_the_oracle(t, x64):
    centres, x = np.random.default_rng(2).normal(size=(2, 5, 3))
    exact = oracles.velocity(oracles.gaussian_mixture(centres, 0.1), LINEAR)(t, x)
    np.testing.assert_allclose(narrow_gaussians(centres, 0.1)(t, x), exact, rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def few_digits():
    """Images [300, 64] and their labels."""
    pytest.importorskip("sklearn")
    digits = load_digits("train")
    return digits.images[:NUM].reshape(-1, 64), digits.labels[:NUM]


@pytest.fixture(scope="module")
def trained(few_digits):
    """`log_probs(t, x)` [batch, 10] of a classifier trained on 300 digits with noise, along the linear path."""
    model, path, num_steps = NoisyDigits(), AffinePath(LINEAR), 1500
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

    @optimised
    def train(key, images, labels):
        def loss(params, key):
            key_i, key_t, key_x0 = jax.random.split(key, 3)
            i = jax.random.randint(key_i, (128,), 0, NUM)
            t = jax.random.uniform(key_t, (128,))
            x_t = path.sample(None, t, jax.random.normal(key_x0, (128, 64)), images[i]).x_t
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, t, x_t), labels[i]).mean()

        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        params = model.init(key, jnp.zeros(1), images[:1])
        keys = jax.random.split(key, num_steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    params = train(jax.random.key(0), *few_digits)
    return lambda t, x: jax.nn.log_softmax(model.apply(params, t, x))


@pytest.mark.slow
def test_the_trained_classifier_reads_noisy_digits(trained):
    """At t = 0.9, 92% of held-out digits; less at t = 0.5, where there is as much noise as signal; chance at t = 0."""
    digits = load_digits("test")
    images = digits.images.reshape(-1, 64)
    noise = np.random.default_rng(1).normal(size=images.shape)
    accuracy = []
    for t in (0.9, 0.5, 0.0):
        logits = trained(jnp.full(len(images), t), jnp.asarray(t * images + (1 - t) * noise, dtype=jnp.float32))
        accuracy.append((logits.argmax(axis=1) == digits.labels).mean())
    assert accuracy[0] > 0.88
    assert 0.5 < accuracy[1] < 0.85
    assert accuracy[2] < 0.2


@pytest.mark.slow
def test_a_trained_classifier_leads_to_its_class(trained, few_digits):
    """The unconditional field is exact, each of the 300 digits a narrow Gaussian. Samples end at one of them: 90% at
    one of their class, and 7% without guidance.
    """
    images, labels = few_digits
    v = narrow_gaussians(jnp.asarray(images), 0.1)
    wanted = jnp.arange(100) % 10

    def log_prob_fn(t, x):
        return jnp.take_along_axis(trained(t, x), wanted[:, None], axis=1)[:, 0]

    @jax.jit
    def samples(scale):
        x0 = jax.random.normal(jax.random.key(2), (100, 64))
        return sample(classifier(v, log_prob_fn, scale, LINEAR, interval=(0.1, 1.0)), x0, times=30).x

    def agreement(scale):
        nearest = ((np.asarray(samples(scale))[:, None] - images[None]) ** 2).sum(axis=2).argmin(axis=1)
        return (labels[nearest] == wanted).mean()

    assert agreement(8.0) > 0.8
    assert agreement(0.0) < 0.2
