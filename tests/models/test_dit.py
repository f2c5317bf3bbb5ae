import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import DiT, LabelEmbedding, forward_flops, make_dit, num_params
from fm_jax.models.dit import patchify, position_features, unpatchify


def shapes(module, event_shape):
    """Parameters and output as shapes, for one example; nothing is computed."""
    t, x = jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, *event_shape), jnp.float32)
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), t, x)
    return variables["params"], out


def test_patches_are_row_major_and_come_back():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(2):
        for column in range(3):
            square = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(patches[:, 3 * row + column], square.reshape(2, -1))
    np.testing.assert_array_equal(unpatchify(patches, 2, 4, 6), x)


def test_a_product_with_patches_is_the_strided_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    kernel = jax.random.normal(jax.random.key(1), (2, 2, 3, 5))
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 2), "VALID", dimension_numbers=layout).reshape(2, 6, 5)
    np.testing.assert_allclose(patchify(x, 2) @ kernel.reshape(12, 5), expected, rtol=1e-4, atol=1e-4)


def test_position_features_closed_form():
    features = position_features(2, 3, 8)
    assert features.shape == (6, 8)
    row, column, w = 1, 2, np.array([1.0, 0.01])
    expected = np.concatenate([np.sin(column * w), np.cos(column * w), np.sin(row * w), np.cos(row * w)])
    np.testing.assert_allclose(features[row * 3 + column], expected, rtol=1e-6)
    assert len(np.unique(features, axis=0)) == 6


def closed_form_count(width, layers, patch, channels, out_channels, classes):
    linear = lambda n_in, n_out: n_in * n_out + n_out  # noqa: E731
    block = linear(width, 3 * width) + linear(width, width)  # attention
    block += linear(width, 4 * width) + linear(4 * width, width)  # MLP
    block += linear(width, 6 * width)  # modulation
    ends = linear(patch**2 * channels, width) + linear(width, 2 * width) + linear(width, patch**2 * out_channels)
    return layers * block + ends + linear(256, width) + linear(width, width) + (classes + 1) * width


@pytest.mark.parametrize(
    ("name", "width", "layers", "patch", "millions"),
    [
        # Peebles & Xie 2022, tables 1 and 4.
        ("S/2", 384, 12, 2, 33),
        ("B/2", 768, 12, 2, 130),
        ("L/2", 1024, 24, 2, 458),
        ("XL/2", 1152, 28, 2, 675),
        ("S/8", 384, 12, 8, 33),
    ],
)
def test_published_parameter_counts(name, width, layers, patch, millions):
    params, out = shapes(make_dit(name, embed=LabelEmbedding(1000, stddev=0.02), out_channels=8), (32, 32, 4))
    count = num_params(params)
    assert count == closed_form_count(width, layers, patch, 4, 8, 1000)
    assert round(count / 1e6) == millions
    assert out.shape == (1, 32, 32, 8)
    if name == "XL/2":
        # The count of the PyTorch model less its positional table of 16 x 16 patches, which is a constant here.
        assert count == 675_129_632 - 256 * 1152


def test_published_operation_count():
    """Table 1: 6.06 "Gflops" for S/2, multiply-adds of the products."""
    flops = forward_flops(make_dit("S/2", embed=LabelEmbedding(1000, stddev=0.02), out_channels=8), (32, 32, 4))
    assert flops / 2e9 == pytest.approx(6.06, rel=0.02)


def test_position_matters():
    """Equal patches get different outputs: the field is not equivariant to permutations of patches."""
    module = DiT(hidden=8, num_layers=1, num_heads=1)
    x = jnp.ones((1, 4, 4, 1))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), shapes(module, (4, 4, 1))[0]
    )
    patches = patchify(jax.jit(module.apply)({"params": params}, 0.5, x), 2)[0]
    assert jnp.abs(patches - patches[:1]).max(axis=1)[1:].min() > 1e-3


@pytest.mark.parametrize(
    ("options", "event_shape", "message"),
    [
        ({"patch_size": 4}, (8, 6, 1), "height and width must be divisible by 4, got 8x6"),
        ({}, (8, 8), r"x must be \[batch, height, width, channels\], got shape \(1, 8, 8\)"),
        ({"hidden": 18}, None, "hidden must be divisible by 4 .*, got 18"),
        ({"num_heads": 5}, None, "num_heads must divide hidden=16, got 5"),
        ({"num_layers": 0}, None, "num_layers must be at least 1, got 0"),
    ],
)
def test_refuses(options, event_shape, message):
    with pytest.raises(ValueError, match=message):
        shapes(DiT(**({"hidden": 16, "num_heads": 2, "num_layers": 1} | options)), event_shape or (8, 8, 1))


def test_make_dit_lists_its_names():
    with pytest.raises(ValueError, match=r"name must be one of 'tiny', 'S/2', .*, 'XL/8', got 'XXL/2'"):
        make_dit("XXL/2")
