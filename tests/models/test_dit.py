import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import (
    Conditions,
    DiT,
    LabelEmbedding,
    LightningDiT,
    TokenEmbedding,
    VectorEmbedding,
    forward_flops,
    init_params,
    make_dit,
    num_params,
    stack_layers,
)
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


@pytest.mark.slow_but_one
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


@pytest.mark.slow
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


# Tokens in the sequence of patches

TOKEN_DIM, CLASSES, NUM_TOKENS = 5, 3, 8
SMALL = {"hidden": 16, "num_layers": 2, "num_heads": 2, "patch_size": 2, "embed": LabelEmbedding(CLASSES)}
FAMILIES = {"dit": DiT, "lightning": LightningDiT}
T = jnp.array([0.3, 0.8])
X = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
LABEL = jnp.array([1, CLASSES])
TOKENS = jax.random.normal(jax.random.key(1), (2, NUM_TOKENS, TOKEN_DIM))
MASK = jnp.arange(NUM_TOKENS)[None, :] < jnp.array([[3], [5]])
COND = Conditions(label=LABEL, tokens=TOKENS, mask=MASK)


@pytest.fixture(scope="module", params=FAMILIES)
def worded(request):
    """A network with tokens and random parameters, and its jitted field."""
    module = FAMILIES[request.param](**SMALL, token_dim=TOKEN_DIM, scan_layers=False)
    template = jax.eval_shape(lambda: module.init(jax.random.key(0), T, X, COND)["params"])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), "float32"), template)
    return module, params, jax.jit(lambda params, cond: module.apply({"params": params}, T, X, cond))


@pytest.mark.slow
def test_tokens_are_seen_and_masked_ones_have_no_influence(worded):
    _, params, f = worded
    out = f(params, COND)
    assert out.shape == X.shape
    assert jnp.abs(f(params, COND._replace(tokens=TOKENS.at[0, 1].add(1.0))) - out)[0].max() > 1e-3
    for other in (TOKENS + 9.0, jnp.full_like(TOKENS, jnp.nan)):
        noise = jnp.where(MASK[:, :, None], TOKENS, other)
        np.testing.assert_array_equal(f(params, COND._replace(tokens=noise)), out)


def test_padding_is_immaterial(worded):
    _, params, f = worded
    width = 64 - NUM_TOKENS
    longer = COND._replace(
        tokens=jnp.pad(TOKENS, ((0, 0), (0, width), (0, 0)), constant_values=3.0),
        mask=jnp.pad(MASK, ((0, 0), (0, width))),
    )
    out = f(params, COND)
    np.testing.assert_allclose(f(params, longer), out, rtol=0, atol=1e-6 * float(jnp.abs(out).max()))


def test_order_of_tokens_is_what_they_say_themselves(worded):
    _, params, f = worded
    order = jax.random.permutation(jax.random.key(2), NUM_TOKENS)
    shuffled = COND._replace(tokens=TOKENS[:, order], mask=MASK[:, order])
    out = f(params, COND)
    np.testing.assert_allclose(f(params, shuffled), out, rtol=0, atol=1e-6 * float(jnp.abs(out).max()))


@pytest.mark.slow
def test_no_tokens_are_masked_tokens_and_the_network_without(worded):
    module, params, f = worded
    alone = f(params, Conditions(label=LABEL))
    masked = f(params, COND._replace(mask=jnp.zeros_like(MASK)))
    np.testing.assert_allclose(masked, alone, rtol=0, atol=1e-6 * float(jnp.abs(alone).max()))
    seen = f(params, COND._replace(mask=None))
    everywhere = f(params, COND._replace(mask=jnp.ones_like(MASK)))
    np.testing.assert_allclose(seen, everywhere, rtol=0, atol=1e-6 * float(jnp.abs(seen).max()))
    plain, rest = module.clone(token_dim=None), {name: leaf for name, leaf in params.items() if name != "tokens"}
    field = jax.jit(lambda params, cond: plain.apply({"params": params}, T, X, cond))
    np.testing.assert_array_equal(alone, field(rest, LABEL))
    np.testing.assert_array_equal(alone, field(rest, Conditions(label=LABEL)))


@pytest.mark.slow_but_one
def test_scanned_blocks_with_tokens_are_the_unrolled_ones(worded):
    module, params, f = worded
    scanned = module.clone(scan_layers=True)
    field = jax.jit(lambda params: scanned.apply({"params": params}, T, X, COND))
    out = f(params, COND)
    np.testing.assert_allclose(field(stack_layers(params)), out, rtol=0, atol=2e-6 * float(jnp.abs(out).max()))


@pytest.mark.slow
def test_tokens_are_among_the_initial_parameters_whether_there_are_any():
    module = DiT(**SMALL, token_dim=TOKEN_DIM)
    base = init_params(module.clone(token_dim=None), jax.random.key(0), (4, 4, 3))
    for cond in (None, Conditions(tokens=TOKENS[:1])):
        params = init_params(module, jax.random.key(0), (4, 4, 3), cond)
        assert params.pop("tokens")["kernel"].shape == (TOKEN_DIM, 16)
        jax.tree.map(np.testing.assert_array_equal, params, base)


def test_tokens_lie_behind_the_patches_and_do_not_turn():
    module, seen = LightningDiT(**(SMALL | {"num_layers": 1}), token_dim=TOKEN_DIM, scan_layers=False), []

    def look(call, args, kwargs, context):
        seen.extend(args[2:3] if type(context.module).__name__ == "LightningBlock" else ())
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        angles = jax.jit(lambda: (module.init(jax.random.key(0), T, X, COND), seen[-1])[1])()
    assert angles.shape == (6 + NUM_TOKENS, 4)
    np.testing.assert_array_equal(angles[6:], 0)
    assert (jnp.abs(angles[1:6]).max(axis=1) > 0.5).all()


def test_a_vector_beside_tokens():
    """What a text encoder gives in all: tokens in the sequence, the pooled vector beside time."""
    module = DiT(**(SMALL | {"embed": VectorEmbedding(4)}), token_dim=TOKEN_DIM)
    told = Conditions(tokens=TOKENS, mask=MASK, vector=jnp.ones((2, 4)))
    assert jax.eval_shape(module.init_with_output, jax.random.key(0), T, X, told)[0].shape == X.shape


NO_EMBED = {"embed": None}


@pytest.mark.parametrize(
    ("options", "cond", "message"),
    [
        ({"token_dim": 0}, None, "token_dim must be at least 1, got 0"),
        ({"embed": TokenEmbedding(4)}, None, r"embed must not read tokens that stand in the sequence \(token_dim=5\)"),
        ({}, LABEL, r"cond must be Conditions\(tokens=..., mask=...\), as token_dim=5, got int32 of shape \(2,\)"),
        (
            NO_EMBED,
            LABEL,
            r"cond must be Conditions\(tokens=..., mask=...\), as token_dim=5, got int32 of shape \(2,\)",
        ),
        (NO_EMBED, COND, r"cond must have no label: the model is unconditional \(embed=None\)"),
        ({}, COND._replace(local=X, guidance=T), "cond must have no local, no guidance: embed reads label"),
        ({"token_dim": None}, COND, "cond must have no tokens, no mask: embed reads label"),
        ({}, Conditions(mask=MASK), r"cond.mask must come with cond.tokens, got a mask alone"),
        ({}, Conditions(tokens=TOKENS[:1]), r"cond.tokens must be .* = \[2, m, 5\], got shape \(1, 8, 5\)"),
        ({}, Conditions(tokens=TOKENS[..., :4]), r"cond.tokens must be .* = \[2, m, 5\], got shape \(2, 8, 4\)"),
        ({}, Conditions(tokens=TOKENS[..., 0]), r"cond.tokens must be .* = \[2, m, 5\], got shape \(2, 8\)"),
        ({}, Conditions(tokens=jnp.ones((2, 8), int)), "cond.tokens must be floating point, got int32"),
        ({}, COND._replace(mask=MASK[:, :4]), r"cond.mask must be bool \[2, 8\], true for tokens, got bool of shape"),
        ({}, COND._replace(mask=MASK.astype(int)), r"cond.mask must be bool \[2, 8\], true for tokens, got int32"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_refuses_tokens(family, options, cond, message):
    options = SMALL | {"token_dim": TOKEN_DIM} | options
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: FAMILIES[family](**options).init(jax.random.key(0), T, X, cond))
