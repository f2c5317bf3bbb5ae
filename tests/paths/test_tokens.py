"""Paths of tokens: what is known without a network, where they start and end, and that they are values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.paths import MetricPath, MixturePath
from fm_jax.schedules import Linear, MaskCosine, Polynomial
from fm_jax.sources import Categorical, Masked, UniformTokens
from fm_jax.types import TokenPath

MASK = MixturePath(MaskCosine(), Masked(4, 1))
UNIFORM = MixturePath(Linear(), UniformTokens(3))
NEVER = MixturePath(Polynomial(2.0), Categorical((0.7, 0.0, 0.3)))
DISTANCES = np.array([[0.0, 1.0, 4.0], [1.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
METRIC = MetricPath(DISTANCES, c=2.0, a=1.5)
PATHS = {"mask": MASK, "uniform": UNIFORM, "never": NEVER, "metric": METRIC}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_are_paths_of_tokens(path):
    assert isinstance(path, TokenPath)


def test_of_a_mixture_the_law_is_that_of_the_share_that_has_arrived(x64):
    t, x1 = jnp.array([0.0, 0.3, 1.0]), jnp.array([[0, 2], [3, 0], [0, 0]])
    kappa = 1 - np.cos(np.pi * np.asarray(t) / 2)
    expected = kappa[:, None, None] * np.eye(4)[x1] + (1 - kappa)[:, None, None] * np.eye(4)[1]
    np.testing.assert_allclose(MASK.probs(t, x1), expected, atol=1e-15)
    np.testing.assert_allclose(jnp.exp(MASK.log_probs(t, x1)), expected, atol=1e-15)
    assert MASK.log_probs(0.5, x1)[0, 0, 2] == -jnp.inf


def test_of_a_metric_the_law_is_a_softmax_of_distances(x64):
    t, x1 = jnp.array([0.0, 0.3, 0.8]), jnp.array([[0, 2], [1, 0], [2, 1]])
    beta = 2.0 * (np.asarray(t) / (1 - np.asarray(t))) ** 1.5
    weights = np.exp(-beta[:, None, None] * DISTANCES.T[np.asarray(x1)])  # from row x to column x1
    np.testing.assert_allclose(METRIC.probs(t, x1), weights / weights.sum(axis=-1, keepdims=True), rtol=1e-12)
    np.testing.assert_array_equal(METRIC.probs(1.0, x1), np.eye(3)[x1])


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_a_sample_is_the_source_the_data_or_of_the_law_between(path):
    x1 = jnp.zeros((5, 2000), jnp.uint8)
    x0 = path.source.draw(jax.random.key(0), x1)
    time = jnp.array([0.0, 0.2, 0.5, 0.8, 1.0])
    drawn = path.sample(jax.random.key(1), time, x0, x1)
    assert drawn.x_t.dtype == jnp.uint8
    np.testing.assert_array_equal(drawn.x_t[-1], 0)
    np.testing.assert_array_equal(drawn.x0, x0)
    np.testing.assert_array_equal(drawn.x1, x1)
    if path is not METRIC:
        np.testing.assert_array_equal(drawn.x_t[0], x0[0])
        assert ((drawn.x_t == x0) | (drawn.x_t == x1)).all()
    often = np.stack([np.bincount(row, minlength=path.num_tokens) / row.size for row in np.asarray(drawn.x_t)])
    law = path.probs(time, x1[:, 0])
    assert np.abs(often - law).max() < 4 * 0.5 / np.sqrt(2000)


def test_a_mask_is_never_data_and_what_is_seen_is_known():
    """Whatever the network says; in bfloat16 too."""
    x = jnp.array([[1, 0, 3]])
    logits = jnp.array([[[0.0, 50.0, 1.0, -1.0]] * 3], jnp.bfloat16)
    found = MASK.posterior(logits, x)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found[0, 1:], np.eye(4)[[0, 3]])
    np.testing.assert_allclose(
        found[0, 0], np.exp([0.0, -np.inf, 1.0, -1.0]) / np.exp([0.0, 1.0, -1.0]).sum(), rtol=1e-6
    )
    assert MASK.log_posterior(logits, x)[0, 0, 1] == -jnp.inf


def test_what_the_source_never_draws_is_data():
    logits = jnp.zeros((1, 3, 3))
    found = NEVER.posterior(logits, jnp.array([[0, 1, 2]]))
    np.testing.assert_array_equal(found[0, 1], [0, 1, 0])
    np.testing.assert_allclose(found[0, jnp.array([0, 2])], 1 / 3, rtol=1e-6)


def test_a_loss_of_a_posterior_has_a_gradient():
    """Also beside logits that are minus infinity."""

    def loss(logits):
        found = MASK.log_posterior(logits, jnp.array([[1, 0]]))
        return found[0, 0, 2] + found[0, 1, 0]

    gradient = jax.grad(loss)(jnp.zeros((1, 2, 4)))
    assert np.isfinite(gradient).all()
    assert gradient[0, 0, 2] > 0
    assert (gradient[0, 1] == 0).all()


def test_metric_paths_are_values():
    assert MetricPath(DISTANCES.tolist(), c=jnp.float32(2.0), a=1.5) == METRIC
    assert hash(METRIC) == hash(MetricPath(jnp.asarray(DISTANCES), 2, 1.5))
    assert MetricPath(DISTANCES, c=2.0, a=1.0) != METRIC
    assert str(METRIC) == "MetricPath(3 tokens, c=2.0, a=1.5)"
    f = jax.jit(lambda path, x1: path.probs(0.5, x1), static_argnums=0)
    np.testing.assert_allclose(f(METRIC, jnp.array([[0]])), METRIC.probs(0.5, jnp.array([[0]])), rtol=1e-6)


def test_the_metric_may_be_that_of_grey_levels():
    """256 levels, of which those near to the data are as likely as they are near."""
    levels = np.arange(256) / 255
    path = MetricPath(np.abs(levels[:, None] - levels))
    law = path.probs(0.9, jnp.array([[128]]))[0, 0]
    assert law.argmax() == 128
    assert (np.diff(law[:129]) > 0).all()
    assert (np.diff(law[128:]) < 0).all()
    assert path.source == UniformTokens(256)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_integer_times_and_tokens_do_not_mix(path):
    """A time beside tokens is no integer, and so not always 0."""
    x1 = jnp.zeros((2, 3), jnp.int32)
    assert (path.probs(0.5, x1) != path.probs(0.0, x1)).any()
    assert path.probs(0.5, x1).dtype == jnp.float32
    np.testing.assert_array_equal(path.probs(jnp.array([0.5, 0.25]), x1)[:1], path.probs(0.5, x1[:1]))
    with pytest.raises(ValueError, match=r"^t must be a scalar or "):
        path.probs(jnp.zeros(3), x1)


def test_shapes_that_differ_are_refused():
    for path in PATHS.values():
        with pytest.raises(ValueError, match=r"^x0 and x1 must have the same shape"):
            path.sample(jax.random.key(0), 0.5, jnp.zeros((2, 3), int), jnp.zeros((2, 4), int))


def test_a_path_is_made_within_a_compiled_function():
    made = jax.jit(lambda x1: MixturePath(Linear(), UniformTokens(4)).probs(0.5, x1))(jnp.array([[1]]))
    np.testing.assert_allclose(made, [[[0.125, 0.625, 0.125, 0.125]]])
