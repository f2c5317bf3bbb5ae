import functools
import hashlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import Compute, stack_layers
from fm_jax.models.conditioning import Conditions
from fm_jax.models.crossdit import CROSSDIT_CONFIGS, CrossDiT, make_crossdit, position_table
from fm_jax.models.dit import position_features
from fm_jax.weights.crossdit import crossdit_config, crossdit_from_config, crossdit_rules

T = jnp.asarray([0.25, 0.625])
X = jax.random.normal(jax.random.key(1), (2, 4, 6, 4))
TOKENS = jax.random.normal(jax.random.key(2), (2, 8, 20))
MASK = jnp.asarray(np.arange(8) < np.asarray([[6], [2]]))
SIZES = jnp.asarray([[512.0, 768.0, 512 / 768], [1024.0, 640.0, 1.6]])


def build(**options):
    defaults = {"hidden": 24, "num_layers": 2, "num_heads": 2, "text_features": 20, "sample_size": 8}
    return CrossDiT(**(defaults | options))


def drawn(module):
    """Parameters none of which are zero or alike, and with which numbers stay of order one."""
    rules, rng = crossdit_rules(module), np.random.default_rng(0)
    draw = lambda shape: 0.7 * rng.normal(size=shape) / math.sqrt(math.prod(shape[1:]))  # noqa: E731
    tensors = {key: draw(shape).astype(np.float32) for key, shape in rules.shapes.items()}
    return jax.tree.map(jnp.asarray, rules.to_ours(tensors))


def assert_close(a, b, tolerance):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.linalg.norm(one - other) <= tolerance * jnp.linalg.norm(other)


@pytest.mark.parametrize(
    ("name", "count", "keys", "manifest"),
    [
        ("alpha-1024", 611_349_152, 611, "eb2e4cde1f6e"),
        ("alpha-512", 610_856_096, 603, "34a9af03cb3e"),
        ("sigma-1024", 610_856_096, 603, "34a9af03cb3e"),
        ("sigma-512", 610_856_096, 603, "34a9af03cb3e"),
    ],
)
def test_published_sizes(name, count, keys, manifest):
    shapes = crossdit_rules(make_crossdit(name)).shapes
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == (count, keys)
    lines = "\n".join(sorted(f"{key} {list(shape)}" for key, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:12] == manifest


@pytest.mark.parametrize("name", CROSSDIT_CONFIGS)
def test_configs_come_back(name):
    module = make_crossdit(name)
    config = crossdit_config(module)
    assert crossdit_from_config(config) == module
    # As the first published files have it.
    older = {"_class_name": "Transformer2DModel", "double_self_attention": False, "num_vector_embeds": None}
    assert crossdit_from_config(config | older) == module


def test_rules_are_a_bijection():
    module = build(size_conditions=True)
    rules, params = crossdit_rules(module), drawn(module)
    back = rules.to_ours(rules.to_theirs(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_table_of_the_trained_size_is_the_plain_one():
    np.testing.assert_array_equal(position_table(6, 6, 8, 6, 1.0), position_features(6, 6, 8))
    # Twice as many patches span the same range; half the range at scale 2.
    np.testing.assert_array_equal(position_table(12, 12, 8, 6, 1.0)[::2][:6], position_features(6, 6, 8)[:6])
    np.testing.assert_array_equal(position_table(12, 12, 8, 12, 2.0), position_table(12, 12, 8, 6, 1.0))


@pytest.mark.slow
def test_blocks_in_a_loop_are_the_blocks_written_out():
    looped, written = build(size_conditions=True), build(size_conditions=True, scan_layers=False)
    params = drawn(written)
    cond = Conditions(tokens=TOKENS, mask=MASK, vector=SIZES)

    def derivatives(module, params):
        out, pullback = jax.vjp(lambda params: module.apply({"params": params}, T, X, cond), params)
        return out, pullback(jnp.cos(out))[0]

    found = jax.jit(functools.partial(derivatives, looped))(stack_layers(params))
    out, gradient = jax.jit(functools.partial(derivatives, written))(params)
    assert out.shape == (2, 4, 6, 8)
    assert out.dtype == jnp.float32
    assert_close(found, (out, stack_layers(gradient)), 1e-6)


@pytest.fixture(scope="module")
def network():
    module = build()
    return jax.jit(functools.partial(module.apply, {"params": drawn(module)}))


def test_masked_text_has_no_influence(network):
    out = network(T, X, Conditions(tokens=TOKENS, mask=MASK))
    noise = jnp.where(MASK[..., None], TOKENS, 100 * TOKENS[::-1, ::-1])
    np.testing.assert_array_equal(network(T, X, Conditions(tokens=noise, mask=MASK)), out)
    assert jnp.abs(network(T, X, Conditions(tokens=noise)) - out).max() > 1e-3


def test_padding_of_text_has_no_influence(network):
    out = network(T, X, Conditions(tokens=TOKENS))
    tokens = jnp.concatenate([TOKENS, jnp.ones((2, 56, 20))], axis=1)
    mask = jnp.broadcast_to(jnp.arange(64) < 8, (2, 64))
    assert_close(network(T, X, Conditions(tokens=tokens, mask=mask)), out, 1e-6)


@pytest.mark.slow
def test_zero_at_initialisation():
    cond = Conditions(tokens=TOKENS, mask=MASK)
    out, _ = jax.jit(build(compute=Compute("bfloat16")).init_with_output)(jax.random.key(0), T, X, cond)
    np.testing.assert_array_equal(out, 0)


@pytest.mark.slow
def test_forward_derivatives_are_those_of_differences():
    """Along a direction in time and state, as MeanFlow takes them."""
    module = make_crossdit("tiny", size_conditions=True)
    params = drawn(module)
    tokens = jax.random.normal(jax.random.key(3), (2, 5, 64))
    cond = Conditions(tokens=tokens, mask=MASK[:, :5], vector=SIZES)
    direction = jax.random.normal(jax.random.key(4), X.shape)
    field = lambda t, x: module.apply({"params": params}, t, x, cond)  # noqa: E731
    network = jax.jit(field)
    rate, step = 2.0**-9, 2.0**-5  # exact in float32: 1000 t moves by 0.06
    _, tangent = jax.jit(lambda t, x: jax.jvp(field, (t, x), (jnp.full_like(t, rate), direction)))(T, X)
    along = lambda s: network(T + s * rate, X + s * direction)  # noqa: E731
    central = lambda s: (along(s) - along(-s)) / (2 * s)  # noqa: E731
    assert_close((4 * central(step) - central(2 * step)) / 3, tangent, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 26}, "hidden must be divisible by 4 and num_heads=2, got 26."),
        ({"hidden": 32, "size_conditions": True}, "hidden must be divisible by 3 with size_conditions, got 32."),
        ({"sample_size": 9}, "patch_size must divide sample_size=9, got 2."),
        ({"interpolation_scale": 0.0}, "interpolation_scale must be"),
        ({"border": 1000.0}, "border must be a Border, such as DDPM, got 1000.0."),
        ({"scan_layers": 1}, "scan_layers must be True or False, got 1."),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


@pytest.mark.parametrize(
    ("options", "x", "cond", "message"),
    [
        ({}, X, None, "cond must be Conditions(tokens=text, mask=...), got None."),
        ({}, X, TOKENS, "cond must be Conditions(tokens=text, mask=...), got float32"),
        ({}, X, Conditions(mask=MASK), "cond.tokens must be an array"),
        ({}, X, Conditions(tokens=TOKENS[..., :7]), "cond.tokens must be [2, n, 20], got shape (2, 8, 7)."),
        ({}, X, Conditions(tokens=TOKENS[:1]), "cond.tokens must be [2, n, 20], got shape (1, 8, 20)."),
        ({}, X, Conditions(tokens=TOKENS, mask=MASK[:, :5]), "cond.mask must be bool [2, 8], true for text, got bool"),
        ({}, X, Conditions(tokens=TOKENS, mask=1.0 * MASK), "cond.mask must be bool [2, 8], true for text, got float"),
        ({}, X, Conditions(tokens=TOKENS, vector=SIZES), "cond must be Conditions(tokens=text, mask=...), got vector"),
        ({"size_conditions": True}, X, Conditions(tokens=TOKENS), "cond.vector must be an array"),
        (
            {"size_conditions": True},
            X,
            Conditions(tokens=TOKENS, vector=SIZES[:, :2]),
            "cond.vector must be [batch, 3] = (2, 3), height and width of the image in pixels and height / width",
        ),
        ({}, X[:, :3], Conditions(tokens=TOKENS), "height and width must be divisible by 2, got 3x6."),
        ({}, X[..., :3], Conditions(tokens=TOKENS), "x must have 4 channels, got shape (2, 4, 6, 3)."),
    ],
)
def test_calls_are_checked(options, x, cond, message):
    module = build(**options)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(module.init, jax.random.key(0), T, x, cond)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "DiTTransformer2DModel"}, "_class_name must be 'PixArtTransformer2DModel' or"),
        ({"norm_type": "ada_norm_zero"}, "norm_type must be 'ada_norm_single' in PixArt, got 'ada_norm_zero'."),
        ({"activation_fn": "gelu"}, "activation_fn must be 'gelu-approximate' in PixArt, got 'gelu'."),
        ({"qk_norm": "rms"}, "config must have fields of PixArtTransformer2DModel, got qk_norm too."),
        ({"cross_attention_dim": 768}, "cross_attention_dim must be num_attention_heads attention_head_dim = 1152"),
        ({"caption_channels": None}, "caption_channels must be the width of the text, 4096 in PixArt, got None."),
    ],
)
def test_configs_of_other_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        crossdit_from_config(crossdit_config(make_crossdit("alpha-512")) | change)


def test_what_has_no_place_in_the_layout_is_refused():
    with pytest.raises(ValueError, match=re.escape("mlp_ratio must be 4.0 in PixArtTransformer2DModel, got 3.0.")):
        crossdit_config(build(mlp_ratio=3.0))
    with pytest.raises(ValueError, match="layout must be one of 'diffusers', got 'bfl'"):
        crossdit_rules(build(), "bfl")
    with pytest.raises(ValueError, match="name must be one of 'tiny', 'alpha-512'"):
        make_crossdit("alpha")
