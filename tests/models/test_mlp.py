import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax.models import MLP, LabelEmbedding, PlainMLP, init_params


@pytest.mark.slow
def test_learns_a_translation():
    """x1 = x0 + shift[label], paired: the velocity is the shift, everywhere."""
    shifts = jnp.array([[2.0, -1.0], [-1.0, 0.5]])
    module = MLP(features=(32, 32), time_features=16, embed=LabelEmbedding(2))
    params, optimizer = init_params(module, jax.random.key(0), (2,)), optax.adam(1e-2)

    def loss(params, key):
        key_x, key_t, key_y = jax.random.split(key, 3)
        x0, t = jax.random.normal(key_x, (64, 2)), jax.random.uniform(key_t, (64,))
        labels = jax.random.randint(key_y, (64,), 0, 2)
        v = module.apply({"params": params}, t, x0 + t[:, None] * shifts[labels], labels)
        return jnp.mean((v - shifts[labels]) ** 2)

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 400))

    _, losses = train(params)
    np.testing.assert_allclose(losses[0], 1.5625, rtol=0.3)  # the mean of shifts^2: the field starts at zero
    assert losses[-20:].mean() < 5e-3


@pytest.mark.parametrize("event_shape", [(), (1,), (7,), (2, 3, 2)])
def test_any_event_shape(event_shape):
    module = MLP(features=(4,))
    x = jnp.ones((3, *event_shape))
    out = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), 0.5, x)[0])
    assert out.shape == x.shape


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ((), r"features must be a tuple of at least one positive integer, got \(\)."),
        (8, "features must be a tuple of at least one positive integer, got 8."),
        ((8, 0), r"features\[1\] must be at least 1, got 0."),
        ((8.0,), r"features\[0\] must be an integer, got 8.0."),
    ],
)
def test_refuses_features(features, message):
    with pytest.raises(ValueError, match=message):
        MLP(features=features)


@pytest.mark.slow
def test_plain_mlp_by_hand():
    """Layer by layer in numpy, on x and t side by side."""
    model = PlainMLP(features=(5, 4))
    t, x = np.array([0.1, 0.7], dtype=np.float32), np.arange(4, dtype=np.float32).reshape(2, 1, 2) - 1.5
    params = model.init(jax.random.key(0), 0.0, x)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    h = np.concatenate([x.reshape(2, 2), t[:, None]], axis=1)
    for i in range(3):
        h = h @ np.asarray(params[f"Dense_{i}"]["kernel"]) + np.asarray(params[f"Dense_{i}"]["bias"])
        if i < 2:
            h = 1.0507009873554805 * np.where(h > 0, h, 1.6732632423543772 * np.expm1(h))
    np.testing.assert_allclose(model.apply({"params": params}, t, x), h.reshape(2, 1, 2), rtol=1e-5)


def test_plain_mlp_starts_like_pytorchs():
    """Kernels uniform within 1 / sqrt(inputs): the bound, and the variance within 5 standard errors (chance 6e-7)."""
    params = PlainMLP().init(jax.random.key(0), 0.0, np.zeros((1, 2)))["params"]
    for layer, inputs in (("Dense_0", 3), ("Dense_1", 64), ("Dense_3", 64)):
        kernel = np.asarray(params[layer]["kernel"])
        assert np.abs(kernel).max() <= inputs**-0.5 * (1 + 1e-6)
        variance = 1 / (3 * inputs)
        assert abs((kernel**2).mean() / variance - 1) < 5 * np.sqrt(0.8 / kernel.size)


def test_plain_mlp_refuses_conditions():
    with pytest.raises(ValueError, match=r"PlainMLP takes no cond; MLP\(embed=...\) does"):
        PlainMLP().init(jax.random.key(0), 0.0, np.zeros((1, 2)), np.zeros(1, dtype=np.int32))
