import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models.autoencoder import Autoencoder
from fm_jax.models.compute import Compute
from fm_jax.models.temporal_autoencoder import (
    TemporalAutoencoder,
    inflate,
    make_temporal_autoencoder,
    outlier_penalty,
)
from fm_jax.models.temporal_blocks import TimeAttention, TimeConv

SMALL = {"channels": (8, 16), "num_blocks": 1, "latent_channels": 3, "num_groups": 4}
IMAGES = Autoencoder(**SMALL)
VIDEOS = TemporalAutoencoder(**SMALL, halve_frames=(True,), quantize=True)
X = jnp.tanh(jax.random.normal(jax.random.key(1), (2, 5, 4, 6, 3)))


def drawn(params, seed=0):
    """Parameters none of which are zero or alike."""
    rng = np.random.default_rng(seed)
    scale = lambda leaf: 0.5 / np.sqrt(max(1, leaf.size / leaf.shape[-1]))  # noqa: E731
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * scale(leaf), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, params)


@pytest.fixture(scope="module")
def images():
    return drawn(jax.eval_shape(IMAGES.init, jax.random.key(0), X[:, 0])["params"])


@pytest.fixture(scope="module")
def inflated(images):
    return inflate(VIDEOS, images, jax.random.key(2))


def calls(module, params):
    run = lambda method: jax.jit(lambda x, **options: module.apply({"params": params}, x, method=method, **options))  # noqa: E731
    return run("encode"), run("decode")


def test_what_is_over_frames_does_nothing_at_first():
    """To the bit."""
    x = jax.random.normal(jax.random.key(3), (2, 5, 2, 3, 8))
    for layer, wanted in ((TimeConv(jnp.float32), x), (TimeConv(jnp.float32, 2), x[:, ::2]), (TimeAttention(4), x)):
        np.testing.assert_array_equal(jax.jit(layer.init_with_output)(jax.random.key(4), x)[0], wanted)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_at_first_every_frame_is_what_the_autoencoder_of_images_makes_of_it(images, inflated):
    encode, decode = calls(VIDEOS, inflated)
    encode_image, decode_image = calls(IMAGES, images)
    moments = encode(X)
    assert moments.mean.shape == (2, 3, 2, 3, 3)
    for i in range(3):  # each second frame
        of_image = encode_image(X[:, 2 * i])
        close(moments.mean[:, i], of_image.mean)
        close(moments.log_variance[:, i], of_image.log_variance)
    x = decode(moments.mean)
    assert x.shape == (2, 6, 4, 6, 3)
    for i in range(6):  # each twice
        close(x[:, i], decode_image(moments.mean[:, i // 2]))


@pytest.mark.slow
def test_an_image_is_a_video_of_one_frame(images, inflated):
    there_and_back = jax.jit(lambda x: VIDEOS.apply({"params": inflated}, x))
    out = there_and_back(X[:, :1])
    assert out.shape == (2, 1, 4, 6, 3)
    close(out[:, 0], jax.jit(lambda x: IMAGES.apply({"params": images}, x))(X[:, 0]))
    assert there_and_back(X).shape == X.shape


@pytest.mark.slow
def test_frames_see_each_other_once_it_is_trained(inflated):
    params = jax.tree.map(lambda a, b: a + 0.2 * b, inflated, drawn(inflated, 3))
    encode, decode = calls(VIDEOS, params)
    z = encode(X).mean
    changed = encode(X.at[:, 2].add(1)).mean - z
    assert jnp.abs(changed).max(axis=(0, 2, 3, 4)).min() > 1e-4  # every frame of latents
    assert jnp.abs(decode(z.at[:, 1].add(1)) - decode(z)).max(axis=(0, 2, 3, 4)).min() > 1e-4
    # The end of a video is replicated, so a still one stays still however long it is.
    still = jnp.broadcast_to(X[:, :1], X.shape)
    np.testing.assert_allclose(encode(still).mean, jnp.broadcast_to(encode(X[:, :1]).mean, z.shape), atol=2e-6)


@pytest.mark.slow
def test_movie_gens_is_eight_times_smaller_on_every_axis():
    module = make_temporal_autoencoder("moviegen")
    x = jax.ShapeDtypeStruct((1, 256, 768, 768, 3), jnp.float32)
    call = lambda key, x: module.init_with_output(key, x, method="encode")  # noqa: E731
    moments, _ = jax.eval_shape(call, jax.random.key(0), x)
    assert moments.mean.shape == (1, 32, 96, 96, 16)
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))["params"]
    number = lambda leaves: sum(leaf.size for leaf in jax.tree.leaves(leaves))  # noqa: E731
    over_frames = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "_time" in str(path)]
    assert number(params) - number(over_frames) == 83_819_683  # the autoencoder of images with as many channels


@pytest.mark.slow
def test_rematerialised_in_bfloat16_it_is_close(inflated):
    out = jax.jit(lambda x: VIDEOS.apply({"params": inflated}, x))(X)
    other = VIDEOS.clone(compute=Compute("bfloat16", remat=True))
    half = jax.jit(lambda x: other.apply({"params": inflated}, x))(X)
    assert half.dtype == jnp.float32
    assert jnp.linalg.norm(half - out) <= 3e-2 * jnp.linalg.norm(out)


@pytest.mark.slow
def test_the_outlier_penalty_is_what_is_beyond_r_deviations():
    z = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 6)).astype(np.float32)
    z[0, 1, 2, 3] += 20
    total = 0.0
    for frame in z.reshape(-1, 4, 5, 6).astype(np.float64):
        mean, deviation = frame.mean((0, 1)), frame.std((0, 1))
        far = np.linalg.norm(frame - mean, axis=-1) - 3 * np.linalg.norm(deviation)
        total += np.maximum(far, 0).mean()
    np.testing.assert_allclose(outlier_penalty(jnp.asarray(z)), total / 6, rtol=1e-6)
    assert total > 0
    assert outlier_penalty(jnp.asarray(z[1])) == 0
    gradient = jax.grad(outlier_penalty)(jnp.asarray(z))
    assert jnp.all((gradient != 0).any(axis=(2, 3, 4)) == np.asarray([[False, True, False], [False] * 3]))
    assert gradient[0, 1, 2, 3].min() > 0  # the one that is far is drawn back
    assert jnp.isfinite(jax.grad(outlier_penalty)(jnp.ones((4, 4, 2)))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TemporalAutoencoder(halve_frames=(True,)), "halve_frames must be 3 of True and False, got (True,)."),
        (lambda: TemporalAutoencoder(halve_frames=(1, True, True)), "halve_frames[0] must be True or False, got 1."),
        (
            lambda: TemporalAutoencoder((8, 12, 16, 16)),
            "num_groups must divide the channels of every level, 8, got 32.",
        ),
        (lambda: TemporalAutoencoder(latents=2), "latents must be a LatentSpace, such as fm_jax.latents.SD, got 2."),
        (
            lambda: make_temporal_autoencoder("30B"),
            "name must be one of 'tiny', 'moviegen', got '30B'.",
        ),
        (lambda: outlier_penalty(jnp.ones((2, 3))), "z must be [..., height, width, channels], got shape (2, 3)."),
        (lambda: outlier_penalty(jnp.ones((2, 3, 1)), -1.0), "r must be"),
    ],
)
def test_what_is_wrong_is_told(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("method", "value", "options", "message"),
    [
        ("encode", X[:, 0], {}, "x must be [batch, frames, height, width, 3], got shape (2, 4, 6, 3)."),
        ("encode", X[:, :, :3], {}, "height and width must be divisible by 2, got 3x6."),
        ("decode", X[..., :2], {}, "z must be [batch, frames, height, width, 3], got float32"),
        ("decode", X, {"frames": 8}, "frames of 5 frames of latents must be more than 8 and at most 10, got 8."),
        ("decode", X, {"frames": 11}, "frames of 5 frames of latents must be more than 8 and at most 10, got 11."),
    ],
)
def test_calls_are_checked(method, value, options, message):
    call = functools.partial(VIDEOS.init, method=method, **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(call, jax.random.key(0), value)


@pytest.mark.slow
def test_only_the_same_autoencoder_is_inflated(images):
    with pytest.raises(ValueError, match=r"params/.* must be float32 of shape .*, got float32 of shape"):
        inflate(VIDEOS.clone(channels=(16, 16)), images, jax.random.key(0))
    with pytest.raises(ValueError, match="only one of the two has decoder_in, encoder_out"):
        inflate(VIDEOS.clone(quantize=False), images, jax.random.key(0))
    with pytest.raises(ValueError, match="module must be a TemporalAutoencoder, got "):
        inflate(IMAGES, images, jax.random.key(0))
    with pytest.raises(ValueError, match="key must be"):
        inflate(VIDEOS, images, 0)
