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
from fm_jax.models.wan import WAN_CONFIGS, Wan, make_wan
from fm_jax.models.wan_blocks import grid_angles, rope_axes
from fm_jax.weights.wan import wan_config, wan_from_config, wan_rules

T = jnp.asarray([0.25, 0.625])
X = jax.random.normal(jax.random.key(1), (2, 2, 4, 6, 3))
TOKENS = jax.random.normal(jax.random.key(2), (2, 8, 20))
MASK = jnp.asarray(np.arange(8) < np.asarray([[6], [2]]))
TEXT = Conditions(tokens=TOKENS)


def build(**options):
    defaults = {"hidden": 24, "num_layers": 2, "num_heads": 2, "mlp_hidden": 40, "text_features": 20, "channels": 3}
    return Wan(**(defaults | options))


def drawn(module):
    """Parameters none of which are zero or alike, and with which numbers stay of order one."""
    rules, rng = wan_rules(module), np.random.default_rng(0)
    draw = lambda shape: 0.7 * rng.normal(size=shape) / math.sqrt(math.prod(shape[1:]))  # noqa: E731
    tensors = {key: draw(shape).astype(np.float32) for key, shape in rules.shapes.items()}
    return jax.tree.map(jnp.asarray, rules.to_ours(tensors))


def assert_close(a, b, tolerance):
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.linalg.norm(one - other) <= tolerance * jnp.linalg.norm(other)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("name", "options", "count", "keys", "manifest"),
    [
        ("1.3B", {}, 1_418_996_800, 825, "9d8d318b706f"),
        ("14B", {}, 14_288_491_584, 1095, "ab252b4e983d"),
        ("14B", {"local_channels": 20}, 14_288_901_184, 1095, "f94b5ceec79c"),
        ("14B", {"local_channels": 20, "image_features": 1280}, 16_394_878_784, 1303, "6f9e922dc3f6"),
        ("2.2-5B", {}, 4_999_787_712, 825, "b18313d78017"),
    ],
)
def test_published_sizes(name, options, count, keys, manifest):
    shapes = wan_rules(make_wan(name, **options)).shapes
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == (count, keys)
    lines = "\n".join(sorted(f"{key} {list(shape)}" for key, shape in shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:12] == manifest


@pytest.mark.parametrize("name", WAN_CONFIGS)
def test_configs_come_back(name):
    module = make_wan(name, local_channels=5, image_features=12)
    assert wan_from_config(wan_config(module)) == module


@pytest.mark.slow
def test_rules_are_a_bijection():
    module = build(patch_size=(2, 1, 3), local_channels=2, image_features=5)
    rules, params = wan_rules(module), drawn(module)
    back = rules.to_ours(rules.to_theirs(params))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_positions_are_of_frame_row_and_column():
    assert rope_axes(128) == (44, 42, 42)
    angles = grid_angles((3, 4, 5), 14).reshape(3, 4, 5, 7)  # three pairs of frames, two of rows, two of columns
    assert angles.dtype == np.float64
    np.testing.assert_allclose(angles[2, 0, 0], [2, 2 * 10_000 ** (-2 / 6), 2 * 10_000 ** (-4 / 6), 0, 0, 0, 0])
    np.testing.assert_allclose(angles[0, 3, 4], [0, 0, 0, 3, 0.03, 4, 0.04])


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


@pytest.mark.slow
def test_masked_text_has_no_influence(network):
    out = network(T, X, Conditions(tokens=TOKENS, mask=MASK))
    noise = jnp.where(MASK[..., None], TOKENS, 100 * TOKENS[::-1, ::-1])
    np.testing.assert_array_equal(network(T, X, Conditions(tokens=noise, mask=MASK)), out)
    assert jnp.abs(network(T, X, Conditions(tokens=noise)) - out).max() > 1e-3


def test_padding_of_text_has_no_influence(network):
    tokens = jnp.concatenate([TOKENS, jnp.ones((2, 56, 20))], axis=1)
    mask = jnp.broadcast_to(jnp.arange(64) < 8, (2, 64))
    assert_close(network(T, X, Conditions(tokens=tokens, mask=mask)), network(T, X, TEXT), 1e-6)


def test_one_time_for_every_frame_is_the_time_of_the_video(network):
    assert_close(network(jnp.stack([T, T], axis=1), X, TEXT), network(T, X, TEXT), 1e-6)
    assert jnp.abs(network(jnp.stack([T, T + 0.1], axis=1), X, TEXT) - network(T, X, TEXT)).max() > 1e-3


@pytest.mark.slow
def test_zero_at_initialisation():
    out, _ = jax.jit(build(compute=Compute("bfloat16")).init_with_output)(jax.random.key(0), T, X, TEXT)
    np.testing.assert_array_equal(out, 0)


@pytest.mark.slow
def test_forward_derivatives_are_those_of_differences():
    """Along a direction in time and state, as MeanFlow takes them."""
    module = make_wan("tiny")
    params = drawn(module)
    x, direction = jax.random.normal(jax.random.key(3), (2, 2, 2, 4, 6, 4))
    cond = Conditions(tokens=jax.random.normal(jax.random.key(4), (2, 5, 64)), mask=MASK[:, :5])
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
        ({"num_heads": 8}, "hidden / num_heads must be even and at least 6, got 24 / 8."),
        ({"hidden": 18}, "hidden / num_heads must be even and at least 6, got 18 / 2."),
        ({"patch_size": 2}, "patch_size must be (frames, rows, columns), got 2."),
        ({"patch_size": (1, 0, 2)}, "patch_size[1] must be at least 1, got 0."),
        ({"time_features": 7}, "time_features must be even, got 7."),
        ({"local_channels": -1}, "local_channels must be at least 0, got -1."),
        ({"epsilon": 0.0}, "epsilon must be"),
        ({"scan_layers": 1}, "scan_layers must be True or False, got 1."),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(**options)


@pytest.mark.parametrize(
    ("options", "t", "x", "cond", "message"),
    [
        ({}, T, X, None, "cond must be Conditions(tokens=text), got None."),
        ({}, T, X, TOKENS, "cond must be Conditions(tokens=text), got float32"),
        ({}, T, X, Conditions(mask=MASK), "cond.tokens must be an array"),
        ({}, T, X, Conditions(tokens=TOKENS[..., :7]), "cond.tokens must be [2, n, 20], got shape (2, 8, 7)."),
        ({}, T, X, Conditions(tokens=TOKENS, mask=1.0 * MASK), "cond.mask must be bool [2, 8], true for text, got fl"),
        ({}, T, X, Conditions(tokens=TOKENS, local=X), "cond must be Conditions(tokens=text), got local too."),
        ({"local_channels": 2}, T, X, TEXT, "cond.local must be an array"),
        (
            {"local_channels": 2},
            T,
            X,
            Conditions(tokens=TOKENS, local=X),
            "cond.local must be [2, 2, 4, 6, 2], got shape (2, 2, 4, 6, 3).",
        ),
        ({"image_features": 5}, T, X, TEXT, 'cond.tokens must be a dict of "text" and "image", got float32'),
        (
            {"image_features": 5},
            T,
            X,
            Conditions(tokens={"text": TOKENS, "image": TOKENS}),
            'cond.tokens["image"] must be [2, n, 5], got shape (2, 8, 20).',
        ),
        ({"image_features": 5}, T, X, Conditions(tokens={"text": TOKENS}), "and \"image\", got ['text']."),
        ({"image_features": 5}, T, X, None, 'cond must be Conditions(tokens={"text": ..., "image": ...}), got None.'),
        ({}, T, X[:, 0], TEXT, "x must be [batch, frames, height, width, 3], got shape (2, 4, 6, 3)."),
        ({}, T, X[:, :, :3], TEXT, "frames, height and width must be tiled by patches of 1 x 2 x 2, got shape (2, 2"),
        ({}, jnp.ones((2, 3)), X, TEXT, "t must be a scalar, [batch] or [batch, frames] = (2, 2), got float32"),
        ({}, jnp.ones(3), X, TEXT, "t must be a scalar or [batch] = (2,), got float32"),
    ],
)
def test_calls_are_checked(options, t, x, cond, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(build(**options).init, jax.random.key(0), t, x, cond)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanVACETransformer3DModel"}, "_class_name must be 'WanTransformer3DModel' in"),
        ({"image_dim": 1280}, "added_kv_proj_dim must be None, or 5120 beside an image_dim, here 1280, got None."),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim must be None, or 5120 beside an image_dim, here None, got 51"),
        ({"pos_embed_seq_len": 514}, "pos_embed_seq_len must be None in WanTransformer3DModel, got 514."),
        ({"qk_norm": None}, "qk_norm must be 'rms_norm_across_heads' in WanTransformer3DModel, got None."),
        ({"cross_attn_norm": False}, "cross_attn_norm must be True in WanTransformer3DModel, got False."),
        ({"window_size": [-1, -1]}, "config must have fields of WanTransformer3DModel, got window_size too."),
        ({"in_channels": 8}, "in_channels must be at least out_channels=16, got 8."),
    ],
)
def test_configs_of_other_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        wan_from_config(wan_config(make_wan("14B")) | change)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="layout must be one of 'diffusers', got 'official'"):
        wan_rules(build(), "official")
    with pytest.raises(ValueError, match=re.escape("name must be one of 'tiny', '1.3B', '14B', '2.2-5B', got '5B'")):
        make_wan("5B")
