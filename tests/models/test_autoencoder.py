"""Both autoencoders: published sizes, configurations and layouts, moments, statistics, refusals."""

import hashlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import latents
from fm_jax.latents import LatentSpace
from fm_jax.models import Compute
from fm_jax.models.autoencoder import (
    AUTOENCODER_CONFIGS,
    Autoencoder,
    Moments,
    latent_space,
    make_autoencoder,
    sample_moments,
)
from fm_jax.models.tiny_autoencoder import TINY_AUTOENCODER_CONFIGS, TinyAutoencoder, make_tiny_autoencoder
from fm_jax.weights.autoencoder import autoencoder_config, autoencoder_from_config, autoencoder_rules
from fm_jax.weights.tiny_autoencoder import (
    tiny_autoencoder_config,
    tiny_autoencoder_from_config,
    tiny_autoencoder_rules,
)

SMALL = Autoencoder((8, 16), 1, latent_channels=3, num_groups=4)
TINY = TinyAutoencoder(8, (1, 1), (1, 1), latent_channels=3, pooled=True)
X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 6, 4, 3)), jnp.float32)


def drawn(rules):
    """Parameters none of which are zero or alike."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape) / np.sqrt(max(1, math.prod(leaf.shape[:-1])))  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(draw(leaf), np.float32), rules.template)


PARAMS = drawn(autoencoder_rules(SMALL))


def manifest(shapes):
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


# Parameters, tensors of diffusers' layout, the beginning of the hash of their names and shapes.
PUBLISHED = {
    "sd": (83_653_863, 248, "a8eb73562262"),
    "flux": (83_819_683, 244, "0287a108a616"),
    "flux2": (84_046_115, 251, "74826184e79d"),
}
PUBLISHED_TINY = {"sd": (2_445_063, 134, "64fdb3c0c1d5"), "16ch": (2_458_899, 134, "2ab347cc962c")}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    rules = autoencoder_rules(make_autoencoder(name))
    shapes, buffers = dict(rules.shapes), 0
    if name == "flux2":
        shapes["bn.num_batches_tracked"] = ()
        buffers = 256
    assert (sum(leaf.size for leaf in rules.leaves.values()) - buffers, len(shapes), manifest(shapes)) == PUBLISHED[
        name
    ]


def test_those_that_differ_in_their_latents_alone():
    for one, other in (("sd", "sdxl"), ("sd3", "flux")):
        assert make_autoencoder(one).clone(latents=latents.PIXELS) == make_autoencoder(other, latents=latents.PIXELS)
        assert make_autoencoder(one) != make_autoencoder(other)


@pytest.mark.parametrize("name", PUBLISHED_TINY)
def test_published_sizes_of_tiny_ones(name):
    rules = tiny_autoencoder_rules(make_tiny_autoencoder(name))
    found = (sum(leaf.size for leaf in rules.leaves.values()), len(rules.shapes), manifest(rules.shapes))
    assert found == PUBLISHED_TINY[name]


def test_size_of_taef2():
    rules = tiny_autoencoder_rules(make_tiny_autoencoder("taef2"), "official")
    sizes = dict.fromkeys(("encoder", "decoder"), 0)
    for path, leaf in rules.leaves.items():
        sizes[path.partition("/")[0]] += leaf.size
    assert sizes == {"encoder": 1_338_528, "decoder": 1_338_499}  # of the published files, of 79 tensors each
    assert len(rules.shapes) == 2 * 79
    assert rules.shapes["encoder.11.pool.3.weight"] == (64, 256, 1, 1)
    assert rules.shapes["decoder.17.weight"] == (64, 64, 3, 3)
    assert "encoder.2.bias" not in rules.shapes


@pytest.mark.parametrize("name", AUTOENCODER_CONFIGS)
def test_configurations_there_and_back(name):
    module = make_autoencoder(name)
    assert autoencoder_from_config(autoencoder_config(module)) == module


@pytest.mark.parametrize("name", TINY_AUTOENCODER_CONFIGS)
def test_configurations_of_tiny_ones_there_and_back(name):
    module = make_tiny_autoencoder(name)
    assert tiny_autoencoder_from_config(tiny_autoencoder_config(module)) == module


def test_configurations_of_other_kinds_there_and_back():
    measured = LatentSpace((0.5, -1.0, 0.0), (2.0, 0.5, 4.0))
    for module in (
        SMALL.clone(latents=measured, attention=False, image_channels=1),
        SMALL.clone(statistics=True, decoder_channels=(4, 8)),
        SMALL.clone(latents=LatentSpace(shift=(1.0, 2.0, 3.0), scale=2.0)).clone(
            latents=LatentSpace((1.0, 2.0, 3.0), (2.0, 2.0, 2.0))
        ),
    ):
        assert autoencoder_from_config(autoencoder_config(module)) == module


@pytest.mark.parametrize("layout", ["diffusers", "diffusers_old", "ldm"])
def test_layouts_are_bijections(layout):
    rules = autoencoder_rules(SMALL, layout)
    tensors = rules.to_theirs(PARAMS)
    back = rules.to_ours(tensors)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), back, PARAMS))
    first = PARAMS["decoder"]["up_1_0"]["conv_in"]["kernel"]  # the first that is run, at the lowest resolution
    key = "decoder.up.1.block.0.conv1.weight" if layout == "ldm" else "decoder.up_blocks.0.resnets.0.conv1.weight"
    np.testing.assert_array_equal(tensors[key], first.transpose(3, 2, 0, 1))
    shortcut = (
        "encoder.down.1.block.0.nin_shortcut" if layout == "ldm" else "encoder.down_blocks.1.resnets.0.conv_shortcut"
    )
    assert tensors[f"{shortcut}.weight"].shape == (16, 8, 1, 1)


@pytest.mark.parametrize("layout", ["diffusers", "official"])
def test_halves_of_tiny_ones_join(layout):
    params = drawn(tiny_autoencoder_rules(TINY, layout))
    whole = tiny_autoencoder_rules(TINY, layout).to_theirs(params)
    found, tensors = {}, {}
    for half in ("encoder", "decoder"):
        rules = tiny_autoencoder_rules(TINY, layout, half)
        part = rules.to_theirs({half: params[half]})
        found |= rules.to_ours(part)
        tensors |= {f"{half}.{key}": value for key, value in part.items()}
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, params))
    assert tensors.keys() == whole.keys()


ENCODE = jax.jit(lambda params: SMALL.apply({"params": params}, X, method="encode"))


@pytest.mark.slow
def test_moments_are_clipped_and_drawn_from():
    params = jax.tree.map(jnp.asarray, PARAMS)
    out = params["encoder_out"]
    for shift, expected in ((1e3, 20.0), (-1e3, -30.0)):
        moments = ENCODE(params | {"encoder_out": out | {"bias": out["bias"].at[3:].set(shift)}})
        assert (moments.log_variance == expected).all()
    mean = jnp.broadcast_to(jnp.array([1.0, -2.0]), (50, 20, 20, 2))
    log_variance = jnp.broadcast_to(jnp.log(jnp.array([4.0, 0.25])), mean.shape)
    z = sample_moments(jax.random.key(0), Moments(mean, log_variance))
    np.testing.assert_allclose(z.mean((0, 1, 2)), [1.0, -2.0], atol=4 * 2 / 141)
    np.testing.assert_allclose(z.std((0, 1, 2)), [2.0, 0.5], rtol=4 / 200)
    same = sample_moments(jax.random.key(0), Moments(mean, jnp.full_like(mean, -30.0)))
    np.testing.assert_allclose(same, mean, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "rules"), [(SMALL, autoencoder_rules), (TINY, tiny_autoencoder_rules)], ids=["full", "tiny"]
)
def test_rematerialised_blocks_have_the_same_names(module, rules):
    remat = module.clone(compute=Compute(remat=True))
    assert rules(remat).template == rules(module).template
    program = lambda module: str(  # noqa: E731
        jax.make_jaxpr(lambda params: module.apply({"params": params}, X))(rules(module).template)
    )
    assert ("remat" in program(remat), "remat" in program(module)) == (True, False)


def test_statistics_say_what_a_model_sees():
    module = SMALL.clone(statistics=True)
    template = autoencoder_rules(module).template
    assert template["latent_mean"].shape == template["latent_variance"].shape == (12,)
    params = PARAMS | {"latent_mean": np.arange(12.0), "latent_variance": np.ones(12)}
    space = latent_space(module, params)
    assert space.shift == tuple(np.arange(12.0))
    np.testing.assert_allclose(space.scale, 1 / np.sqrt(1 + 1e-4))
    assert (ENCODE(params).mean == ENCODE(PARAMS).mean).all()  # they take no part
    assert latent_space(make_autoencoder("sd"), {}) == latents.SD
    assert latent_space(TINY, {}) == latents.PIXELS


def test_published_latents():
    found = {name: make_autoencoder(name).latents for name in AUTOENCODER_CONFIGS}
    assert found["sd"].scale == 0.18215 and found["sdxl"].scale == 0.13025  # noqa: PT018
    assert (found["sd3"].shift, found["sd3"].scale) == (0.0609, 1.5305)
    assert (found["flux"].shift, found["flux"].scale) == (0.1159, 0.3611)


# What is wrong, and what is said of it.


def encode(module, shape):
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, method="encode"), jnp.zeros(shape))


def decode(module, shape):
    return jax.eval_shape(lambda z: module.init_with_output(jax.random.key(0), z, method="decode"), jnp.zeros(shape))


@pytest.mark.parametrize("module", [SMALL, TINY], ids=["full", "tiny"])
@pytest.mark.parametrize(
    ("call", "shape", "said"),
    [
        (encode, (1, 7, 8, 3), "height and width must be divisible by 2, got 7x8."),
        (encode, (1, 8, 8, 1), "x must be images of 3 channels, got shape (1, 8, 8, 1)."),
        (encode, (8, 8, 3), "x must be [batch, height, width, channels], got shape (8, 8, 3)."),
        (decode, (1, 4, 4, 4), "z must be [batch, height, width, 3], got float32 of shape (1, 4, 4, 4)."),
    ],
)
def test_wrong_arrays(module, call, shape, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call(module, shape)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: make_autoencoder("sd4"),
            "name must be one of 'tiny', 'sd', 'sdxl', 'sd3', 'flux', 'flux2', got 'sd4'.",
        ),
        (lambda: Autoencoder((16, 24)), "num_groups must divide the channels of every level, 16, got 32."),
        (lambda: Autoencoder(()), "channels must be a tuple of at least one positive integer, got ()."),
        (lambda: SMALL.clone(decoder_channels=(8,)), "decoder_channels must have as many levels as channels=(8, 16)"),
        (
            lambda: SMALL.clone(latents=0.18215),
            "latents must be a LatentSpace, such as fm_jax.latents.SD, got 0.18215.",
        ),
        (lambda: SMALL.clone(quantize=1), "quantize must be"),
        (
            lambda: latent_space(Compute(), {}),
            "module must be an autoencoder, such as make_autoencoder('sd'), got Compute(",
        ),
        (
            lambda: latent_space(make_autoencoder("flux2"), {"decoder": 0}),
            "params must hold latent_mean and latent_variance, got ['decoder'].",
        ),
        (lambda: sample_moments(0, Moments(X, X)), "key must be one typed key, as from jax.random.key(0), got 0."),
        (
            lambda: sample_moments(jax.random.key(0), X),
            "moments must be Moments, as Autoencoder.encode gives, got",
        ),
        (lambda: autoencoder_rules(TINY), "module must be an Autoencoder, got TinyAutoencoder("),
        (lambda: autoencoder_config(None), "module must be an Autoencoder, got None."),
        (lambda: autoencoder_from_config(None), "config must be a mapping, as config.json holds, got None."),
        (lambda: tiny_autoencoder_rules(SMALL), "module must be a TinyAutoencoder, got Autoencoder("),
        (lambda: tiny_autoencoder_config(None), "module must be a TinyAutoencoder, got None."),
        (lambda: tiny_autoencoder_from_config([]), "config must be a mapping, as config.json holds, got []."),
        (lambda: make_tiny_autoencoder("taesd"), "name must be one of 'sd', '16ch', 'taef2', got 'taesd'."),
        (lambda: TinyAutoencoder(8, (1, 1), (1,)), "encoder_blocks and decoder_blocks must have as many levels"),
        (lambda: TinyAutoencoder(latents=None), "latents must be a LatentSpace"),
        (
            lambda: autoencoder_rules(SMALL, "bfl"),
            "layout must be one of 'diffusers', 'diffusers_old', 'ldm', got 'bfl'.",
        ),
        (lambda: tiny_autoencoder_rules(TINY, "ldm"), "layout must be one of 'diffusers', 'official', got 'ldm'."),
        (lambda: tiny_autoencoder_rules(TINY, half="both"), "half must be one of 'encoder', 'decoder', got 'both'."),
        (lambda: autoencoder_from_config({"_class_name": "VQModel"}), "_class_name must be one of 'AutoencoderKL', "),
        (lambda: autoencoder_from_config({"act_fn": "gelu"}), "act_fn must be 'silu' for this network, got 'gelu'."),
        (
            lambda: autoencoder_from_config({"down_block_types": ["AttnDownEncoderBlock2D"]}),
            "down_block_types must be ('DownEncoderBlock2D',) for this network, got ('AttnDownEncoderBlock2D',).",
        ),
        (
            lambda: autoencoder_from_config({"use_post_quant_conv": False}),
            "use_post_quant_conv must be True for this network, got False.",
        ),
        (
            lambda: tiny_autoencoder_from_config({"decoder_block_out_channels": [64, 64, 32, 32]}),
            "decoder_block_out_channels must be (64, 64, 64, 64) for this network, got (64, 64, 32, 32).",
        ),
        (
            lambda: tiny_autoencoder_from_config({"act_fn": "silu"}),
            "act_fn must be 'relu' for this network, got 'silu'.",
        ),
        (
            lambda: autoencoder_config(SMALL.clone(decoder_channels=(4, 8))),
            "AutoencoderKL has no decoder_channels, got (4, 8).",
        ),
        (
            lambda: autoencoder_config(SMALL.clone(latents=latents.flux2_latents(np.zeros(12), np.ones(12)))),
            "AutoencoderKL has no constants for squares of latents",
        ),
        (
            lambda: tiny_autoencoder_config(TINY.clone(latents=LatentSpace((1.0, 2.0, 3.0)))),
            "AutoencoderTiny has one shift and one scale",
        ),
    ],
)
def test_wrong_calls(call, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        call()
