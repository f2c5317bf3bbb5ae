"""Linear layers of tokens: products of two matrices, equal to those of Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models.dense import Dense, DenseGeneral, matrix_product

KEY = jax.random.key(0)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("shape", "kernel", "numbers"),
    [
        ((2, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),
        ((2, 3, 4), (4, 5, 6), (((2,), (0,)), ((), ()))),
        ((2, 3, 4, 5), (4, 5, 6), (((2, 3), (0, 1)), ((), ()))),
        ((0, 3, 4), (4, 5), (((2,), (0,)), ((), ()))),
        ((4,), (4, 5), (((0,), (0,)), ((), ()))),
        # Not of features with a kernel: handed on.
        ((4, 3), (4, 5), (((0,), (0,)), ((), ()))),
        ((2, 3, 4, 5), (5, 4, 6), (((2, 3), (1, 0)), ((), ()))),
        ((2, 3, 4), (2, 4, 5), (((2,), (1,)), ((0,), (0,)))),
    ],
)
def test_a_product_is_that_of_jax(shape, kernel, numbers):
    x, w = jax.random.normal(KEY, shape), jax.random.normal(jax.random.fold_in(KEY, 1), kernel)
    found, wanted = matrix_product(x, w, numbers), jax.lax.dot_general(x, w, numbers)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (Dense(5), nn.Dense(5), (2, 3, 4)),
        (Dense(5, dtype=jnp.bfloat16), nn.Dense(5, dtype=jnp.bfloat16), (2, 3, 4)),
        (DenseGeneral((2, 3)), nn.DenseGeneral((2, 3)), (2, 3, 4)),
        (DenseGeneral(5, axis=(-2, -1)), nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, 2, 2)),
    ],
    ids=["dense", "bfloat16", "to_heads", "from_heads"],
)
def test_a_layer_is_that_of_flax(ours, theirs, shape):
    x = jax.random.normal(KEY, shape)
    params = ours.init(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, params, theirs.init(KEY, x))
    loss = lambda layer, p, x: jnp.square(layer.apply(p, x).astype(jnp.float32)).sum()  # noqa: E731
    found, wanted = (jax.grad(loss, argnums=(1, 2))(layer, params, x) for layer in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2 if ours.dtype else 1e-5), found, wanted)


def test_the_gradient_of_a_kernel_sums_over_one_axis():
    """What it is for: see `matrix_product`."""
    x = jnp.ones((2, 3, 4))
    layers = {"ours": Dense(5), "theirs": nn.Dense(5)}
    params = layers["ours"].init(KEY, x)
    lines = {
        name: str(jax.make_jaxpr(jax.grad(lambda p, layer=layer: layer.apply(p, x).sum()))(params))
        for name, layer in layers.items()
    }
    assert "([0, 1], [0, 1])" in lines["theirs"]
    assert "([0, 1], [0, 1])" not in lines["ours"]
    assert "([0], [0])" in lines["ours"]
