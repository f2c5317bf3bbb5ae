import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import layers


def test_sinusoidal_features_closed_form():
    t = np.array([0.0, 0.25, 1.0])
    frequencies = 1000.0 * 10_000.0 ** (-np.arange(3) / 3)
    angles = t[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(layers.sinusoidal_features(jnp.asarray(t), 6), expected, atol=2e-4)
    # The features of two times differ although both are near: half a step of a thousand.
    near = layers.sinusoidal_features(jnp.array([0.5, 0.5005]), 64)
    assert jnp.abs(near[0] - near[1]).max() > 0.1


def test_sinusoidal_features_refuses_odd():
    with pytest.raises(ValueError, match="must be even, got 5"):
        layers.sinusoidal_features(jnp.zeros(2), 5)


def test_time_embedding_by_hand():
    module, t = layers.TimeEmbedding(4, 3, time_scale=10.0), np.array([0.2, 0.9], np.float32)
    params = jax.tree.map(lambda leaf: leaf + 0.1, module.init(jax.random.key(0), t)["params"])
    angles = 10.0 * t[:, None] * np.array([1.0, 0.01])
    h = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    h = h @ np.asarray(params["in"]["kernel"]) + np.asarray(params["in"]["bias"])[None]
    h = h / (1 + np.exp(-h))
    expected = h @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])[None]
    np.testing.assert_allclose(module.apply({"params": params}, t), expected, rtol=1e-5)


@pytest.mark.slow
def test_self_attention_against_numpy():
    batch, tokens, width, heads = 2, 5, 6, 3
    module = layers.SelfAttention(num_heads=heads)
    x = jax.random.normal(jax.random.key(0), (batch, tokens, width))
    rng = np.random.default_rng(0)
    weight = {"qkv": rng.normal(size=(width, 3 * width)), "out": rng.normal(size=(width, width))}
    bias = {"qkv": rng.normal(size=(1, 1, 3 * width)), "out": rng.normal(size=(1, 1, width))}
    params = {name: {"kernel": weight[name], "bias": bias[name].reshape(-1)} for name in weight}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), params)

    qkv = np.asarray(x) @ weight["qkv"] + bias["qkv"]
    q, k, v = (qkv[..., i * width : (i + 1) * width].reshape(batch, tokens, heads, -1) for i in range(3))
    expected = np.zeros((batch, tokens, heads, width // heads))
    for b in range(batch):
        for head in range(heads):
            logits = q[b, :, head] @ k[b, :, head].T / np.sqrt(width / heads)
            weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            expected[b, :, head] = weights @ v[b, :, head]
    expected = expected.reshape(batch, tokens, width) @ weight["out"] + bias["out"]
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-4)


class Wrapped(nn.Module):
    """A layer made by a function, bound to a parent as Linen wants it."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make()(x)


def test_conv3x3_stride_keeps_even_pixels():
    x = jax.random.normal(jax.random.key(0), (1, 4, 6, 1))
    for stride in (1, 2):
        module = Wrapped(lambda s=stride: layers.conv3x3(1, jnp.float32, "conv", stride=s))
        kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
        out = module.apply({"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(1)}}}, x)
        np.testing.assert_allclose(out, x[:, ::stride, ::stride], rtol=1e-6)


def test_group_norm_statistics_are_float32():
    # A mean 64 standard deviations away: bfloat16 statistics would lose the signal.
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    x = 64.0 + noise.astype(jnp.bfloat16).astype(jnp.float32)
    module = Wrapped(lambda: layers.group_norm(8, 4, jnp.bfloat16, "norm"))
    params = {"norm": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    out = jax.jit(module.apply)({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    groups = np.asarray(x, np.float64).reshape(2, 16, 4, 2)
    centred = groups - groups.mean(axis=(1, 3), keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(out.astype(jnp.float32).reshape(expected.shape), expected, atol=0.03)


def test_halve_averages_and_double_repeats():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    halved = layers.halve(x)
    np.testing.assert_allclose(halved[1, 1, 2], x[1, 2:4, 4:6].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(layers.double(x), np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))
    np.testing.assert_allclose(layers.halve(layers.double(x)), x, rtol=1e-6)


def test_space_to_depth_cuts_squares_and_comes_back():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    deep = layers.space_to_depth(x, 2)
    assert deep.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(deep[:, 1, 2], x[:, 2:4, 4:6].reshape(2, 12))
    np.testing.assert_array_equal(layers.depth_to_space(deep, 2), x)
