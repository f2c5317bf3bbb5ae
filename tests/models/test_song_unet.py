import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import Compute
from fm_jax.models.conditioning import REPA, Conditions
from fm_jax.models.song_blocks import filtered
from fm_jax.models.song_unet import SongUNet, make_song_unet

SIZES = {"channels": 16, "channel_mults": (1, 2), "num_blocks": 1, "in_channels": 3}


def shapes(module, cond=None, event_shape=(4, 8, 3)):
    t, x = jnp.zeros(2), jax.ShapeDtypeStruct((2, *event_shape), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), t, x, cond), x)


@pytest.fixture(scope="module")
def network():
    """NCSN++ with classes and augmentations and random parameters, and what it is called with."""
    options = {"time_features": "fourier", "encoder": "residual", "resample_filter": (1, 3, 3, 1)}
    module = SongUNet(**SIZES, **options, num_classes=4, augment_dim=9)
    rng = np.random.default_rng(0)
    _, variables = shapes(module)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), "float32"), variables["params"])
    x = jnp.asarray(rng.normal(size=(2, 4, 8, 3)), jnp.float32)
    t = jnp.array([-0.8, 0.3])
    return module, params, t, x, jax.jit(module.apply)({"params": params}, t, x)


@pytest.mark.slow
def test_no_condition_is_a_condition_for_each_example(network):
    module, params, t, x, out = network
    cond = Conditions(label=jnp.array([4, 2]), vector=jnp.zeros((2, 9)))
    one = jax.jit(module.apply)({"params": params}, t, x, cond)
    np.testing.assert_allclose(one[0], out[0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(one[1], out[1], atol=1e-2)


@pytest.mark.slow
def test_bfloat16_stays_close(network):
    module, params, t, x, out = network
    near = jax.jit(module.clone(compute=Compute("bfloat16", remat=True)).apply)({"params": params}, t, x)
    assert near.dtype == jnp.float32
    assert np.linalg.norm(near - out) <= 2e-2 * np.linalg.norm(out)


@pytest.mark.slow
def test_the_border_stands_before_the_frequencies_and_behind_the_output(network):
    module, params, t, x, out = network
    turned = jax.jit(module.clone(border=REPA).apply)({"params": params}, 1 - t, x)
    np.testing.assert_allclose(turned, -out, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_random_frequencies_get_no_gradient(network):
    module, params, t, x, _ = network
    grads = jax.jit(jax.grad(lambda p: (module.apply({"params": p}, t, x) ** 2).sum()))(params)
    assert not grads["frequencies"].any()
    assert grads["time_in"]["kernel"].any()


def test_filters_keep_constants_inside():
    """A filter sums to one; beyond the image are zeros, which [1, 3, 3, 1] sees and [1, 1] does not."""
    x = jnp.ones((1, 8, 8, 2))
    np.testing.assert_array_equal(filtered(x, (1, 1), up=True), jnp.ones((1, 16, 16, 2)))
    np.testing.assert_array_equal(filtered(x, (1, 1), up=False), jnp.ones((1, 4, 4, 2)))
    down, up = filtered(x, (1, 3, 3, 1), up=False), filtered(x, (1, 3, 3, 1), up=True)
    np.testing.assert_allclose(down[:, 1:-1, 1:-1], 1.0, rtol=1e-6)
    np.testing.assert_allclose(down[0, 0, 1], 7 / 8, rtol=1e-6)
    np.testing.assert_allclose(up[:, 1:-1, 1:-1], 1.0, rtol=1e-6)
    np.testing.assert_allclose(up[0, 0, 1], 3 / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "deep"}, "encoder must be one of 'standard', 'skip', 'residual', got 'deep'"),
        ({"decoder": "residual"}, "decoder must be one of 'standard', 'skip', got 'residual'"),
        ({"time_features": "cosine"}, "time_features must be one of 'positional', 'fourier', got 'cosine'"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter must have an even number of weights, got \(1, 2, 1\)"),
        ({"attention_levels": (2,)}, r"attention_levels\[0\] must be from 0 to 1, got 2"),
        ({"channels": 18}, "channels must be divisible by 4, the least of a group, got 18"),
        ({"border": "sigma"}, "border must be a Border, such as RECTIFIED, got 'sigma'"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        SongUNet(**SIZES | options)


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (np.array([0, 1]), "cond must be Conditions with a label or a vector, got"),
        (Conditions(tokens=np.zeros((2, 3, 4))), "cond must have no tokens: the network does not take it"),
        (Conditions(vector=np.zeros((2, 9))), "cond must have no vector: the network does not take it"),
        (Conditions(label=np.array([0.0, 1.0])), "cond.label must hold integer labels, got dtype float"),
        (Conditions(label=np.array([0])), r"cond.label must be \[batch\] = \(2,\), got shape \(1,\)"),
        (Conditions(label=np.array([0, 5])), "cond.label must be from 0 to 4, got 0 to 5"),
    ],
)
def test_refuses_conditions(cond, message):
    with pytest.raises(ValueError, match=message):
        shapes(SongUNet(**SIZES, num_classes=4), cond)


def test_refuses_images():
    with pytest.raises(ValueError, match="height and width must be divisible by 2, got 5x8"):
        shapes(SongUNet(**SIZES), event_shape=(5, 8, 3))
    with pytest.raises(ValueError, match=r"x must have 3 channels, got shape \(2, 4, 8, 1\)"):
        shapes(SongUNet(**SIZES), event_shape=(4, 8, 1))


def test_make_song_unet_lists_its_names():
    with pytest.raises(ValueError, match="name must be one of 'ddpmpp', 'ncsnpp', got 'adm'"):
        make_song_unet("adm")
