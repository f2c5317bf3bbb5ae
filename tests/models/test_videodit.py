import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import stack_layers
from fm_jax.models.conditioning import Conditions
from fm_jax.models.videodit import (
    VIDEODIT_CONFIGS,
    VideoDiT,
    make_videodit,
    patchify_video,
    unpatchify_video,
)
from fm_jax.weights.videodit import videodit_config, videodit_from_config, videodit_rules

T = jnp.asarray([0.25, 0.625])
X = jax.random.normal(jax.random.key(1), (2, 3, 4, 6, 3))
WORDS, LETTERS = (jax.random.normal(jax.random.key(seed), (2, n, d)) for seed, n, d in ((2, 5, 20), (3, 4, 12)))
TOKENS = {"words": WORDS, "letters": LETTERS}
MASK = {"words": jnp.asarray(np.arange(5) < np.asarray([[4], [2]]))}


def build(**options):
    defaults = {"hidden": 24, "num_layers": 2, "num_heads": 2, "mlp_hidden": 40, "positions": (4, 2, 3), "channels": 3}
    return VideoDiT(**(defaults | {"encoders": (("words", 20), ("letters", 12))} | options))


def drawn(module):
    """Parameters none of which are zero or alike, and with which numbers stay of order one."""
    rules, rng = videodit_rules(module), np.random.default_rng(0)
    draw = lambda shape: 0.7 * rng.normal(size=shape) / math.sqrt(math.prod(shape[1:]))  # noqa: E731
    tensors = {key: draw(shape).astype(np.float32) for key, shape in rules.shapes.items()}
    return jax.tree.map(jnp.asarray, rules.to_ours(tensors))


def assert_close(a, b, tolerance):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.linalg.norm(one - other) <= tolerance * jnp.linalg.norm(other)


def closed_form_count(width, layers, inner, channels, positions, features):
    block = 8 * width**2 + 3 * width * inner + 8 * width  # two attentions, SwiGLU, table and two norms
    time = 256 * width + width**2 + 6 * width**2
    text = sum(features) * width + 2 * len(features) * width
    ends = 2 * 4 * channels * width + 3 * width
    return layers * block + time + text + ends + sum(positions) * width


@pytest.mark.parametrize(
    ("name", "widths", "count"),
    [
        ("1B", (1536, 24, 4096), 934_098_432),
        ("5B", (3072, 32, 8192), 4_921_322_496),
        ("30B", (6144, 48, 16384), 29_302_904_832),
    ],
)
def test_sizes(name, widths, count):
    """The paper says 30B; a modulation for each block would make it 40B."""
    shapes = videodit_rules(make_videodit(name)).shapes
    total = sum(map(math.prod, shapes.values()))
    assert total == count == closed_form_count(*widths, 16, (32, 48, 48), (4096, 1280, 1472))
    in_blocks = sum(math.prod(shape) for key, shape in shapes.items() if key.startswith("blocks") and "norm" not in key)
    assert in_blocks == widths[1] * (8 * widths[0] ** 2 + 3 * widths[0] * widths[2] + 6 * widths[0])
    assert not [key for key in shapes if key.endswith("bias") and not key.startswith("text")]


def test_256_frames_at_768_pixels_are_73728_tokens():
    """After an autoencoder of 8 x 8 x 8."""
    module = make_videodit("30B")
    x = jax.ShapeDtypeStruct((1, 32, 96, 96, 16), jnp.float32)
    tokens = {name: jax.ShapeDtypeStruct((1, 8, width), jnp.float32) for name, width in module.encoders}
    call = lambda key, x, tokens: module.init_with_output(key, jnp.ones(1), x, Conditions(tokens=tokens))  # noqa: E731
    out, variables = jax.eval_shape(call, jax.random.key(0), x, tokens)
    assert out.shape == x.shape
    assert {name: leaf.shape[0] for name, leaf in variables["params"]["positions"].items()} == {
        "frames": 32,
        "rows": 48,
        "columns": 48,
    }
    assert math.prod(n // p for n, p in zip(x.shape[1:4], module.patch_size, strict=True)) == 73_728


@pytest.mark.parametrize("name", VIDEODIT_CONFIGS)
def test_configs_come_back(name):
    module = make_videodit(name)
    assert videodit_from_config(videodit_config(module)) == module


def test_rules_are_a_bijection():
    module = build(patch_size=(2, 1, 3))
    rules, params = videodit_rules(module), drawn(module)
    back = rules.to_ours(rules.to_theirs(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_patches_are_row_major_and_come_back():
    x = np.arange(2 * 4 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 4, 6, 3)
    patches = patchify_video(x, (2, 1, 3))
    assert patches.shape == (2, 2 * 4 * 2, 2 * 1 * 3 * 3)
    np.testing.assert_array_equal(patches[:, 1 * 8 + 2 * 2 + 1], x[:, 2:4, 2:3, 3:6].reshape(2, -1))
    np.testing.assert_array_equal(unpatchify_video(patches, (2, 1, 3), (2, 4, 2)), x)


@pytest.mark.slow
def test_blocks_in_a_loop_are_the_blocks_written_out():
    looped, written = build(), build(scan_layers=False)
    params = drawn(written)
    cond = Conditions(tokens=TOKENS, mask=MASK)

    def derivatives(module, params):
        out, pullback = jax.vjp(lambda params: module.apply({"params": params}, T, X, cond), params)
        return out, pullback(jnp.cos(out))[0]

    found = jax.jit(functools.partial(derivatives, looped))(stack_layers(params))
    out, gradient = jax.jit(functools.partial(derivatives, written))(params)
    assert out.shape == X.shape
    assert out.dtype == jnp.float32
    assert_close(found, (out, stack_layers(gradient)), 1e-6)


@pytest.fixture(scope="module")
def network():
    module = build()
    return jax.jit(functools.partial(module.apply, {"params": drawn(module)}))


def test_masked_text_has_no_influence(network):
    out = network(T, X, Conditions(tokens=TOKENS, mask=MASK))
    noise = {"words": jnp.where(MASK["words"][..., None], WORDS, 100 * WORDS[::-1, ::-1]), "letters": LETTERS}
    np.testing.assert_array_equal(network(T, X, Conditions(tokens=noise, mask=MASK)), out)
    assert jnp.abs(network(T, X, Conditions(tokens=noise)) - out).max() > 1e-3


def test_padding_of_text_has_no_influence(network):
    out = network(T, X, Conditions(tokens=TOKENS))
    words = jnp.concatenate([WORDS, jnp.ones((2, 56, 20))], axis=1)
    mask = {"words": jnp.broadcast_to(jnp.arange(61) < 5, (2, 61)), "letters": jnp.ones((2, 4), bool)}
    assert_close(network(T, X, Conditions(tokens={"words": words, "letters": LETTERS}, mask=mask)), out, 1e-6)


def test_a_frame_is_seen_by_all_others(network):
    """Attention goes both ways in time."""
    cond = Conditions(tokens=TOKENS)
    out = network(T, X, cond)
    for frame in range(3):
        moved = jnp.abs(network(T, X.at[:, frame].add(1.0), cond) - out).max(axis=(0, 2, 3, 4))
        assert moved.min() > 1e-4


@pytest.mark.slow
def test_zero_at_initialisation():
    out, _ = jax.jit(build().init_with_output)(jax.random.key(0), T, X, Conditions(tokens=TOKENS))
    np.testing.assert_array_equal(out, 0)


@pytest.mark.slow
def test_forward_derivatives_are_those_of_differences():
    """Along a direction in time and state, as MeanFlow takes them."""
    module = make_videodit("tiny")
    params = drawn(module)
    x = jax.random.normal(jax.random.key(5), (2, 2, 4, 6, 4))
    cond = Conditions(tokens={"words": jax.random.normal(jax.random.key(3), (2, 5, 32))}, mask=MASK)
    direction = jax.random.normal(jax.random.key(4), x.shape)
    field = lambda t, x: module.apply({"params": params}, t, x, cond)  # noqa: E731
    network = jax.jit(field)
    rate, step = 2.0**-9, 2.0**-5  # exact in float32: 1000 t moves by 0.06
    _, tangent = jax.jit(lambda t, x: jax.jvp(field, (t, x), (jnp.full_like(t, rate), direction)))(T, x)
    along = lambda s: network(T + s * rate, x + s * direction)  # noqa: E731
    central = lambda s: (along(s) - along(-s)) / (2 * s)  # noqa: E731
    assert_close((4 * central(step) - central(2 * step)) / 3, tangent, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide hidden=24, got 5."),
        ({"patch_size": 2}, "patch_size must be (frames, rows, columns), got 2."),
        ({"positions": (4, 0, 3)}, "positions[1] must be at least 1, got 0."),
        ({"encoders": {"ul2": 4096}}, 'encoders must be pairs of name and width, such as (("ul2", 4096),), got'),
        ({"encoders": (("ul2", 8), ("ul2", 8))}, 'encoders must be pairs of name and width, such as (("ul2", 4096),)'),
        ({"epsilon": 0.0}, "epsilon must be"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


@pytest.mark.parametrize(
    ("x", "cond", "message"),
    [
        (X, None, "cond must be Conditions(tokens={'words': ..., 'letters': ...}, mask=...), got None."),
        (X, Conditions(tokens=WORDS), "cond.tokens must be a dict of 'words', 'letters', got float32"),
        (X, Conditions(tokens={"words": WORDS}), "cond.tokens must be a dict of 'words', 'letters', got ['words']."),
        (X, Conditions(tokens=TOKENS | {"words": LETTERS}), "cond.tokens['words'] must be [2, n, 20], got shape"),
        (X, Conditions(tokens=TOKENS, mask=MASK["words"]), "cond.mask must be a dict of 'words', 'letters', got bool"),
        (X, Conditions(tokens=TOKENS, mask={"letters": MASK["words"]}), "cond.mask['letters'] must be bool [2, 4]"),
        (X[0], Conditions(tokens=TOKENS), "x must be [batch, frames, height, width, 3], got shape (3, 4, 6, 3)."),
        (X[:, :, :3], Conditions(tokens=TOKENS), "frames, height and width must be tiled by patches of 1 x 2 x 2"),
        (
            jnp.zeros((2, 5, 4, 6, 3)),
            Conditions(tokens=TOKENS),
            "x must have at most positions=(4, 2, 3) patches, got (5, 2, 3).",
        ),
    ],
)
def test_calls_are_checked(x, cond, message):
    module = build()
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(module.init, jax.random.key(0), T, x, cond)


def test_configs_and_layouts_are_checked():
    config = videodit_config(build())
    with pytest.raises(ValueError, match="_class_name must be 'VideoDiT', got 'WanTransformer3DModel'"):
        videodit_from_config(config | {"_class_name": "WanTransformer3DModel"})
    with pytest.raises(ValueError, match=re.escape("got none of ['hidden'] and ['width'] too.")):
        videodit_from_config({name: value for name, value in config.items() if name != "hidden"} | {"width": 24})
    with pytest.raises(ValueError, match="layout must be one of 'torch', got 'diffusers'"):
        videodit_rules(build(), "diffusers")
    with pytest.raises(ValueError, match="name must be one of 'tiny', '1B', '5B', '30B', got '13B'"):
        make_videodit("13B")
