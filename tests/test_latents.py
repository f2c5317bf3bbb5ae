"""Latent spaces: inverses, published constants, configurations, squares of latent pixels, the check of the variance."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import latents
from fm_jax.latents import LatentSpace, check_latents, flux2_latents, latent_space_of

Z = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 6, 3)), jnp.float32)
SPACES = {
    "scalar": LatentSpace(0.0609, 1.5305),
    "channels": LatentSpace((0.1, -0.2, 0.3), (1.0, 2.0, 0.5)),
    "mixed": LatentSpace(0.5, (1.0, 2.0, 0.5)),
    "squares": flux2_latents(np.linspace(-1, 1, 12), np.linspace(0.5, 2, 12)),
}


@pytest.mark.parametrize("name", SPACES)
def test_there_and_back(name):
    space = SPACES[name]
    assert space.to_model(Z).shape == Z.shape
    assert float(jnp.abs(space.to_model(Z) - Z).max()) > 0.01
    np.testing.assert_allclose(jax.jit(space.to_latent)(jax.jit(space.to_model)(Z)), Z, rtol=1e-5, atol=1e-6)
    assert hash(space) == hash(LatentSpace(space.shift, space.scale, space.square))


def test_formulas():
    np.testing.assert_array_equal(latents.FLUX.to_model(Z), (Z - np.float32(0.1159)) * np.float32(0.3611))
    np.testing.assert_array_equal(latents.SD3.to_latent(Z), Z / np.float32(1.5305) + np.float32(0.0609))
    expected = (np.asarray(Z) - np.float32([0.1, -0.2, 0.3])) * np.float32([1.0, 2.0, 0.5])
    np.testing.assert_allclose(SPACES["channels"].to_model(Z), expected, rtol=1e-6)


def test_pixels_are_handed_on():
    for each in (Z, Z.astype(jnp.bfloat16)):
        assert latents.PIXELS.to_model(each) is each
        assert latents.PIXELS.to_latent(each) is each


def test_bfloat16_is_scaled_in_float32_and_float64_as_it_is(x64):
    half = Z.astype(jnp.bfloat16)
    assert latents.SD.to_model(half).dtype == jnp.float32
    np.testing.assert_array_equal(latents.SD.to_model(half), half.astype(jnp.float32) * np.float32(0.18215))
    double = jnp.asarray(np.asarray(Z), jnp.float64)
    np.testing.assert_allclose(latents.FLUX.to_model(double), (np.asarray(double) - 0.1159) * 0.3611, rtol=1e-15)


def test_squares_are_channels_first():
    """Packed in the order (channel, row, column), each number has a mean and a variance of its own."""
    mean, variance = np.arange(12) / 10, 1 + np.arange(12) / 5
    packed = np.asarray(Z, np.float64).reshape(2, 2, 2, 3, 2, 3).transpose(0, 1, 3, 5, 2, 4).reshape(2, 2, 3, 12)
    normal = (packed - mean) / np.sqrt(variance + 1e-4)
    expected = normal.reshape(2, 2, 3, 3, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(Z.shape)
    np.testing.assert_allclose(flux2_latents(mean, variance).to_model(Z), expected, rtol=1e-5, atol=1e-6)


def test_a_video_has_the_constants_of_its_channels():
    video = jnp.stack([Z, Z], axis=1)
    for space in SPACES.values():
        np.testing.assert_array_equal(space.to_model(video)[:, 1], space.to_model(Z))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"_class_name": "AutoencoderKL"}, latents.SD),
        ({"_class_name": "AutoencoderKL", "scaling_factor": 0.13025, "shift_factor": None}, latents.SDXL),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, latents.SD3),
        ({"_class_name": "AutoencoderTiny"}, latents.PIXELS),
        (
            {"_class_name": "AutoencoderKLWan", "latents_mean": [0.5, 1.0], "latents_std": [2.0, 4.0]},
            LatentSpace((0.5, 1.0), (0.5, 0.25)),
        ),
        (
            {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "latents_mean": [1.0], "latents_std": [2.0]},
            LatentSpace((1.0,), (0.25,)),
        ),
    ],
)
def test_of_a_configuration(config, expected):
    assert latent_space_of(config) == expected


def test_variance_is_measured():
    assert check_latents(Z) == pytest.approx(float(np.std(np.asarray(Z, np.float64))))
    assert check_latents(np.float16([-1, 1])) == 1.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: LatentSpace(scale=0.0), "scale must be positive and finite, got 0.0."),
        (lambda: LatentSpace(shift=float("nan")), "shift must be a finite number, got nan."),
        (lambda: LatentSpace(scale=(1.0, -1.0)), "scale[1] must be positive and finite, got -1.0."),
        (lambda: LatentSpace((1.0, 2.0), (1.0,)), "shift and scale must be of one length, got 2 and 1."),
        (
            lambda: LatentSpace((1.0,) * 6, square=2),
            "shift and scale must have a number for each channel and each place",
        ),
        (lambda: LatentSpace(shift=()), "squares, got 0."),
        (lambda: LatentSpace(square=0), "square must be at least 1, got 0."),
        (
            lambda: SPACES["channels"].to_model(jnp.ones((1, 2, 2, 4))),
            "z must be [..., height, width, 3] for this space, got shape (1, 2, 2, 4).",
        ),
        (
            lambda: SPACES["squares"].to_latent(jnp.ones((1, 3, 2, 3))),
            "height and width must be divisible by 2, got 3x2.",
        ),
        (lambda: latents.SD.to_model(None), "z must be an array, as jnp.asarray makes, got None."),
        (lambda: latents.SD.to_model(jnp.arange(3)), "z must be floating point, got int32."),
        (lambda: latent_space_of(None), "config must be a mapping, as config.json holds, got None."),
        (lambda: flux2_latents(np.zeros(4), np.zeros(3)), "mean and variance must be vectors of one length"),
        (lambda: flux2_latents(np.zeros(4), -np.ones(4)), "variance must be positive, got -1."),
        (lambda: flux2_latents(np.full(4, np.inf), np.ones(4)), "mean must be finite"),
        (lambda: latent_space_of({"batch_norm_eps": 1e-4}), "is in its file, not in its config: see flux2_latents."),
        (
            lambda: latent_space_of({"_class_name": "VQModel"}),
            "The config of 'VQModel' has neither scaling_factor nor latents_mean and latents_std.",
        ),
        (lambda: latent_space_of({"latents_mean": [0.0]}), "both latents_mean and latents_std, or neither."),
        (
            lambda: latent_space_of({"latents_mean": [0.0], "latents_std": [1.0], "shift_factor": 0.1}),
            "A config must have latents_mean or shift_factor, got both: [0.0] and 0.1.",
        ),
        (lambda: latent_space_of({"latents_mean": [0.0], "latents_std": [0.0]}), "latents_std[0] must be positive"),
        (
            lambda: check_latents(5.5 * Z),
            "latents must be of unit variance, with a standard deviation from 0.5 to 2, got",
        ),
        (lambda: check_latents(Z / 5, "the latents of x.npz"), "the latents of x.npz must be of unit variance"),
        (lambda: check_latents(jnp.zeros((0, 2))), "got nan"),
        (lambda: check_latents(Z.at[0].set(jnp.nan)), "latents must be finite"),
        (lambda: jax.jit(check_latents)(Z), "latents must be known to be measured, got a traced value."),
    ],
)
def test_wrong_calls(call, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call()
