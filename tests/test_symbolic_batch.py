"""Networks and guidance are traced for any batch at once, as `jax.export` does with a batch that is a symbol."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import MODELS
from jax import export

from fm_jax.conditions import null_like
from fm_jax.guidance import Extrapolate, Projected, Rescale, ZeroStar, classifier_free_batched, compose
from fm_jax.models import LabelEmbedding, init_params, linen_apply
from fm_jax.parameterization import bind
from fm_jax.schedules import Linear

EVENT, CLASSES = (4, 4, 2), 3
(B,) = export.symbolic_shape("b")
X, LABELS = jax.ShapeDtypeStruct((B, *EVENT), jnp.float32), jax.ShapeDtypeStruct((B,), jnp.int32)


def check_any_batch(function):
    """`function(x, labels)` gives the same by one trace for all batches as when it is traced for each."""
    exported = export.export(jax.jit(function))(X, LABELS)
    assert exported.out_avals[0].shape == X.shape
    for num in (1, 3):
        x, labels = jax.random.normal(jax.random.key(num), (num, *EVENT)), jnp.arange(num) % CLASSES
        expected = jax.jit(function)(x, labels)
        assert jnp.abs(expected).max() > 0.1
        np.testing.assert_allclose(exported.call(x, labels), expected, rtol=1e-5, atol=1e-5)


def model_fn_of(name):
    """With parameters in NumPy's arrays, as files of parameters are read."""
    module = MODELS[name](embed=LabelEmbedding(CLASSES))
    rng = np.random.default_rng(0)
    initial = init_params(module, jax.random.key(0), EVENT)
    params = jax.tree.map(lambda leaf: np.float32(0.3) * rng.standard_normal(leaf.shape, dtype=np.float32), initial)
    return bind(linen_apply(module), params)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_network(name):
    model_fn = model_fn_of(name)
    check_any_batch(lambda x, labels: model_fn(jnp.float32(0.4), x, labels))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Extrapolate(), Rescale(), ZeroStar(), Projected(Linear())], ids=repr)
def test_every_rule_of_guidance(rule):
    model_fn = model_fn_of("mlp")

    def guided(x, labels):
        return classifier_free_batched(model_fn, "velocity", Linear(), labels, CLASSES, 2.0, rule=rule)(
            jnp.float32(0.4), x
        )

    check_any_batch(guided)


@pytest.mark.slow
def test_composed_guidance():
    model_fn = model_fn_of("mlp")

    def guided(x, labels):
        return compose(model_fn, "velocity", Linear(), [labels, 0 * labels], CLASSES, [1.5, 2.0])(jnp.float32(0.4), x)

    check_any_batch(guided)


def test_a_null_of_another_shape_is_refused_for_any_batch():
    with pytest.raises(
        ValueError, match=r"null_cond must broadcast to cond, \[batch, ...\] = \(b,\), got shape \(2,\)"
    ):
        export.export(jax.jit(lambda x, labels: null_like(labels, np.array([1, 2]))))(X, LABELS)
