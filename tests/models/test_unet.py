import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import Compute, LabelEmbedding, UNet, make_unet, num_params
from fm_jax.models.conditioning import DDPM
from fm_jax.models.layers import double, halve
from fm_jax.models.unet import ResBlock
from fm_jax.models.unet_blocks import ClassEmbedding


def shapes(module, event_shape):
    """Parameters and output as shapes, for one example; nothing is computed."""
    t, x = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, *event_shape), jnp.float32)
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), t, x)
    return variables["params"], out


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("name", "event_shape", "expected"),
    [
        # Counted in the PyTorch sources of TorchCFM and of Meta's flow_matching.
        ("cifar10", (32, 32, 3), 35_746_307),
        ("cifar10_edm", (32, 32, 3), 55_676_419),
    ],
)
def test_published_parameter_counts(name, event_shape, expected):
    params, out = shapes(make_unet(name), event_shape)
    assert num_params(params) == expected
    assert out.shape == (1, *event_shape)


@pytest.mark.parametrize(
    ("name", "event_shape", "low", "high"), [("tiny", (8, 8, 1), 0.4e6, 0.8e6), ("mnist", (28, 28, 1), 1.0e6, 1.2e6)]
)
def test_small_sizes(name, event_shape, low, high):
    params, out = shapes(make_unet(name, embed=LabelEmbedding(10)), event_shape)
    assert low < num_params(params) < high
    assert out.shape == (1, *event_shape)


def conv(n_in, n_out, size=3):
    return size * size * n_in * n_out + n_out


def res(n_in, n_out, emb, film):
    skip = 0 if n_in == n_out else conv(n_in, n_out, 1)
    return 2 * n_in + conv(n_in, n_out) + conv(emb, n_out * (1 + film), 1) + 2 * n_out + conv(n_out, n_out) + skip


def attention(n):
    return 2 * n + conv(n, 3 * n, 1) + conv(n, n, 1)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("resample", ["conv", "pool", "resblock"])
def test_parameter_count_block_by_block(resample, film):
    """Two levels of 8 and 16 channels, one block each, attention below, 3 channels in and 5 out."""
    module = UNet(
        channels=8,
        channel_mults=(1, 2),
        num_blocks=1,
        attention_levels=(1,),
        num_heads=2,
        film=film,
        resample=resample,
        out_channels=5,
        embed=LabelEmbedding(4),
    )
    params, out = shapes(module, (4, 6, 3))
    emb = 32
    change = {"conv": conv, "pool": lambda *_: 0, "resblock": lambda n, m: res(n, m, emb, film)}[resample]
    expected = conv(8, emb, 1) + conv(emb, emb, 1) + 5 * emb  # time; labels with the null class
    # Down: the skips have 8, 8, 8 and 16 channels. Then the middle, and up.
    expected += conv(3, 8) + res(8, 8, emb, film) + change(8, 8) + res(8, 16, emb, film) + attention(16)
    expected += 2 * res(16, 16, emb, film) + attention(16)
    expected += res(16 + 16, 16, emb, film) + res(16 + 8, 16, emb, film) + 2 * attention(16) + change(16, 16)
    expected += res(16 + 8, 8, emb, film) + res(8 + 8, 8, emb, film)
    expected += 2 * 8 + conv(8, 5)
    assert num_params(params) == expected
    assert out.shape == (1, 4, 6, 5)


def res_block(resize=None):
    return ResBlock(features=4, film=True, dropout=0.0, num_groups=2, resize=resize)


@pytest.mark.slow
def test_residual_block_starts_as_the_identity():
    x, emb = jax.random.normal(jax.random.key(0), (2, 4, 4, 4)), jnp.ones((2, 3))
    variables = jax.jit(lambda: res_block().init(jax.random.key(1), x, emb, False))()
    for resize in (None, halve, double):
        out = jax.jit(lambda resize=resize: res_block(resize).apply(variables, x, emb, False))()
        np.testing.assert_allclose(out, x if resize is None else resize(x), rtol=1e-6)


def test_film_scales_and_shifts_after_the_norm():
    """A scale of -1 removes the features, whatever they are: silu(shift) alone reaches the second convolution."""
    block, rng = res_block(), np.random.default_rng(0)
    x, emb, shift = jax.random.normal(jax.random.key(0), (2, 4, 4, 4)), jnp.ones((2, 3)), 0.7
    params = jax.eval_shape(lambda: block.init(jax.random.key(1), x, emb, False)["params"])
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), params)
    params["embed"] = {"kernel": jnp.zeros((3, 8)), "bias": jnp.array([-1.0] * 4 + [shift] * 4)}
    centre = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    params["conv_out"] = {"kernel": centre, "bias": jnp.zeros(4)}
    out = jax.jit(lambda: block.apply({"params": params}, x, emb, False))()
    np.testing.assert_allclose(out, x + jax.nn.silu(shift), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "event_shape", "message"),
    [
        ({"channel_mults": (1, 1, 1)}, (6, 8, 1), "height and width must be divisible by 4, got 6x8"),
        ({"patch_size": 2}, (6, 8, 1), "height and width must be divisible by 4, got 6x8"),
        ({}, (8, 8), r"x must be \[batch, height, width, channels\], got shape \(1, 8, 8\)"),
        ({"resample": "stride"}, None, "resample must be one of 'conv', 'pool', 'resblock', got 'stride'"),
        ({"channel_mults": ()}, None, r"channel_mults must be a tuple of at least one positive integer, got \(\)"),
        ({"attention_levels": (2,)}, None, r"attention_levels must lie in 0, ..., 1, got \(2,\)"),
        ({"num_blocks": 0}, None, "num_blocks must be at least 1, got 0"),
        ({"num_heads": 3}, None, "num_heads must divide the 16 channels of level 1, got 3"),
        ({"head_channels": 5}, None, "head_channels must divide the 16 channels of level 1, got 5"),
    ],
)
def test_refuses(options, event_shape, message):
    with pytest.raises(ValueError, match=message):
        shapes(UNet(**({"channels": 8, "channel_mults": (1, 2)} | options)), event_shape or (8, 8, 1))


def test_make_unet_lists_its_names():
    with pytest.raises(
        ValueError, match="name must be one of 'tiny', 'mnist_fast', 'mnist', 'cifar10', 'cifar10_edm', got 'big'"
    ):
        make_unet("big")


@pytest.fixture(scope="module")
def published():
    """A network with all that published ones differ in and random parameters, compiled, and what it is called with."""
    module = UNet(
        channels=8,
        channel_mults=(1, 2),
        num_blocks=1,
        num_heads=2,
        num_groups=4,
        in_channels=3,
        out_channels=6,
        embed=ClassEmbedding(4),
        frequency_shift=1.0,
        sine_first=True,
        norm_epsilon=1e-6,
        down_padding=(0, 1),
        border=DDPM,
    )
    t, x, cond = jnp.array([0.25, 0.8]), jax.random.normal(jax.random.key(0), (2, 4, 8, 3)), jnp.array([3, 0])
    rng = np.random.default_rng(0)
    params = jax.eval_shape(lambda: module.init(jax.random.key(1), t, x, cond)["params"])
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), "float32"), params)
    return module, params, jax.jit(lambda t: module.apply({"params": params}, t, x, cond)), t, x, cond


@pytest.mark.slow
def test_bfloat16_stays_close(published):
    module, params, f, t, x, cond = published
    out, low = f(t), jax.jit(module.clone(compute=Compute("bfloat16")).apply)({"params": params}, t, x, cond)
    assert out.shape == (2, 4, 8, 6)
    assert low.dtype == jnp.float32
    assert np.linalg.norm(low - out) <= 2e-2 * np.linalg.norm(out)


@pytest.mark.slow
def test_forward_derivatives(published):
    _, _, f, t, _, _ = published
    _, tangent = jax.jvp(f, (t,), (jnp.ones_like(t),))
    step = 1e-4
    numeric = (f(t + step) - f(t - step)) / (2 * step)
    assert np.linalg.norm(tangent - numeric) <= 1e-2 * np.linalg.norm(tangent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"down_padding": (1, 0)}, r"down_padding must be \(1, 1\) or \(0, 1\), got \(1, 0\)"),
        ({"norm_epsilon": 0.0}, r"norm_epsilon must be positive and finite, got 0.0"),
        ({"frequency_shift": 2.0}, r"frequency_shift must be in \[0, 1\], got 2.0"),
        ({"sine_first": 1}, "sine_first must be .*got 1"),
        ({"border": 1000.0}, "border must be a Border, such as RECTIFIED, got 1000.0"),
        ({"time_channels": 0}, "time_channels must be at least 1, got 0"),
        ({"in_channels": 4}, r"x must have 4 channels, got shape \(1, 8, 8, 1\)"),
    ],
)
def test_refuses_published_options(options, message):
    with pytest.raises(ValueError, match=message):
        shapes(UNet(**({"channels": 8, "channel_mults": (1, 2)} | options)), (8, 8, 1))


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (None, r"cond must be labels \[batch\] = \(2,\): the network has no class for none, got None"),
        (np.array([0, 4]), "cond must be from 0 to 3, got 0 to 4"),
        (np.array([0, 1, 2]), r"cond must be \[batch\] = \(2,\), got shape \(3,\)"),
        (np.array([0.0, 1.0]), "cond must hold integer labels, got dtype float"),
    ],
)
def test_classes_without_none_refuse(cond, message):
    variables = {"params": {"table": jnp.zeros((4, 3))}}
    with pytest.raises(ValueError, match=message):
        ClassEmbedding(4).apply(variables, cond, 3, 2)


def test_classes_without_none_are_the_rows_of_labels():
    variables = {"params": {"table": jnp.arange(8.0).reshape(4, 2)}}
    labels = jnp.array([3, 0])
    out, same = (each.apply(variables, labels, 2, 2) for each in (ClassEmbedding(4), LabelEmbedding(3)))
    np.testing.assert_array_equal(out, same)
