import functools
import hashlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.latents import LatentSpace, latent_space_of
from fm_jax.models import Compute
from fm_jax.models.wan_autoencoder import WAN, WAN_AUTOENCODER_CONFIGS, WanAutoencoder, make_wan_autoencoder
from fm_jax.weights.wan_autoencoder import (
    wan_autoencoder_config,
    wan_autoencoder_from_config,
    wan_autoencoder_rules,
)

X = jnp.tanh(jax.random.normal(jax.random.key(1), (2, 5, 4, 6, 3)))


def build(**options):
    defaults = {"channels": (8, 16), "num_blocks": 1, "latent_channels": 4, "halve_frames": (True,)}
    return WanAutoencoder(**(defaults | options))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "keys", "manifest"),
    [("2.1", 126_892_531, 194, "6157cf3f708d"), ("2.2-5B", 704_688_668, 196, "cb562a5311e9")],
)
def test_published_sizes(name, count, keys, manifest):
    shapes = wan_autoencoder_rules(make_wan_autoencoder(name)).shapes
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == (count, keys)
    lines = "\n".join(sorted(f"{key} {list(shape)}" for key, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:12] == manifest


@pytest.mark.parametrize("name", WAN_AUTOENCODER_CONFIGS)
def test_configs_come_back(name):
    module = make_wan_autoencoder(name)
    config = wan_autoencoder_config(module)
    assert wan_autoencoder_from_config(config) == module
    assert config["scale_factor_spatial"] == module.factor
    if module.latents != LatentSpace():
        assert latent_space_of(config) == module.latents


def test_constants_are_the_published_ones():
    module = wan_autoencoder_from_config({"_class_name": "AutoencoderKLWan"})
    assert module == make_wan_autoencoder("2.1")
    assert module.latents.shift[:2] == (-0.7571, -0.7089)
    assert wan_autoencoder_config(module)["latents_std"][-2:] == [2.8251, 1.916]
    z = WAN.to_model(jnp.full((1, 2, 1, 1, 16), -0.7571))
    np.testing.assert_allclose(z[0, 0, 0, 0, :2], [0.0, (-0.7571 + 0.7089) / 1.4541], atol=1e-7)


def drawn(module):
    """Parameters none of which are zero or alike."""
    rules, rng = wan_autoencoder_rules(module), np.random.default_rng(0)
    draw = lambda shape: rng.normal(size=shape) / math.sqrt(math.prod(shape[1:]))  # noqa: E731
    return jax.tree.map(
        jnp.asarray, rules.to_ours({key: draw(shape).astype(np.float32) for key, shape in rules.shapes.items()})
    )


@pytest.fixture(scope="module")
def model():
    module = build()
    variables = {"params": drawn(module)}
    encode = jax.jit(lambda x: module.apply(variables, x, method="encode"))
    return encode, jax.jit(lambda z: module.apply(variables, z, method="decode", clip=False))


def assert_close(a, b, tolerance=1e-6):
    assert jnp.linalg.norm(a - b) <= tolerance * jnp.linalg.norm(b)


@pytest.mark.slow
def test_what_follows_is_not_seen(model):
    encode, decode = model
    z = encode(X).mean
    assert z.shape == (2, 3, 2, 3, 4)
    assert_close(encode(X[:, :1]).mean, z[:, :1])
    assert_close(encode(X[:, :3]).mean, z[:, :2])
    x = decode(z)
    assert x.shape == X.shape
    assert_close(decode(z[:, :1]), x[:, :1])
    assert_close(decode(z[:, :2]), x[:, :3])
    assert jnp.abs(encode(X.at[:, 0].add(1)).mean - z)[:, -1].max() > 1e-3  # and what precedes is


@pytest.mark.slow
def test_only_decoded_pixels_in_range_are_given_unless_a_loss_asks(model):
    module = build()
    z = jax.random.normal(jax.random.key(2), (2, 3, 2, 3, 4))
    clipped = jax.jit(lambda z: module.apply({"params": drawn(module)}, z, method="decode"))(z)
    whole = model[1](z)
    assert_close(clipped, jnp.clip(whole, -1, 1))
    assert jnp.abs(whole).max() > 1


@pytest.mark.slow
def test_gradients_are_finite_where_all_channels_are_zero():
    module = build(compute=Compute(remat=True))
    zeros = jax.tree.map(jnp.zeros_like, drawn(module))
    gradient = jax.jit(jax.grad(lambda params: module.apply({"params": params}, X).sum()))(zeros)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_rules_are_a_bijection():
    module = build(channels=(8, 16, 16), halve_frames=(True, False), residual=True, decoder_channels=(12, 24, 24))
    rules, params = wan_autoencoder_rules(module), drawn(module)
    back = rules.to_ours(rules.to_theirs(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halve_frames": (True, False)}, "halve_frames must be 1 of True and False, got (True, False)."),
        ({"halve_frames": (1,)}, "halve_frames[0] must be True or False, got 1."),
        ({"channels": (8, 15)}, "channels of the decoder must be even but for the first, got 15 in level 1."),
        ({"decoder_channels": (8,)}, "decoder_channels must have 2 levels, as channels, got (8,)."),
        ({"residual": True}, "channels 16 must divide 8 x 1, a cell averaged, got (8, 16)."),
        (
            {"residual": True, "channels": (8,) * 3, "halve_frames": (True,) * 2, "decoder_channels": (8, 8, 12)},
            "channels 12 must divide 8 x 8, a cell filled, got (8, 8, 12).",
        ),
        ({"latents": 0.5}, "latents must be a LatentSpace, such as fm_jax.latents.SD, got 0.5."),
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0."),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("encode", X[:, 0], "x must be [batch, frames, height, width, 3], got shape (2, 4, 6, 3)."),
        ("encode", X[..., :2], "x must be [batch, frames, height, width, 3], got shape (2, 5, 4, 6, 2)."),
        ("encode", X[:, :4], "frames must be one more than a multiple of 2, got 4."),
        ("encode", X[:, :, :3], "height and width must be divisible by 2, got 3x6."),
        ("decode", X, "z must be [batch, frames, height, width, 4], got float32"),
        ("decode", X[0], "z must be [batch, frames, height, width, 4], got float32"),
    ],
)
def test_calls_are_checked(method, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(functools.partial(build().init, method=method), jax.random.key(0), value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name must be 'AutoencoderKLWan' in AutoencoderKLWan, got 'Auto"),
        ({"attn_scales": [0.5]}, "attn_scales must be [] in AutoencoderKLWan, got"),
        ({"scaling_factor": 1.0}, "config must have fields of AutoencoderKLWan, got scaling_factor too."),
        ({"dim_mult": [1, 2]}, "halve_frames must be 1 of True and False, got (False, True, True)."),
        ({"dim_mult": [2, 4, 4, 4]}, "dim_mult must begin with 1, got"),
        ({"out_channels": 4}, "out_channels must be in_channels=3, a multiple of 1, got 4."),
    ],
)
def test_configs_of_other_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wan_autoencoder_from_config(wan_autoencoder_config(make_wan_autoencoder("2.1")) | change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8, 12)}, "Levels must be multiples of the first, the decoder's the same, in AutoencoderKLWan"),
        (
            {"channels": (8,) * 4, "halve_frames": (True,) * 3},
            "AutoencoderKLWan takes four frames at a time, got halve_frames=(True, True, True).",
        ),
        ({"latents": LatentSpace((0.0,) * 4, 1.0, square=2)}, "AutoencoderKLWan has no constants for squares of lat"),
    ],
)
def test_what_has_no_place_in_the_layout_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wan_autoencoder_config(build(**options))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="layout must be one of 'diffusers', got 'wan'"):
        wan_autoencoder_rules(build(), "wan")
    with pytest.raises(ValueError, match=re.escape("name must be one of 'tiny', '2.1', '2.2-5B', got '2.2'")):
        make_wan_autoencoder("2.2")
