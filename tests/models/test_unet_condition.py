import functools
import hashlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import DDPM, Conditions
from fm_jax.models.stack import stack_layers, unstack_layers
from fm_jax.models.unet_condition import (
    UNET_CONDITION_CONFIGS,
    SpatialTransformer,
    UNetCondition,
    make_unet_condition,
)
from fm_jax.weights.rules import template_of
from fm_jax.weights.unet_condition import (
    _layers,
    unet_condition_config,
    unet_condition_from_config,
    unet_condition_rules,
)

SMALL = UNetCondition(
    widths=(8, 16),
    num_blocks=1,
    attention_levels=(1,),
    num_heads=(1, 2),
    num_layers=(1, 2),
    token_width=6,
    num_groups=4,
    vector_width=5,
    num_sizes=2,
    size_features=4,
)
# A transformer in the middle alone, for what has to be compiled.
ONE = replace(SMALL, widths=(8,), attention_levels=(), num_heads=(2,), num_layers=(2,))
RNG = np.random.default_rng(0)
T = np.array([0.25, 0.875], np.float32)
X = RNG.standard_normal((2, 4, 6, 4)).astype(np.float32)
COND = Conditions(
    tokens=RNG.standard_normal((2, 3, 6)).astype(np.float32),
    vector=np.concatenate([RNG.standard_normal((2, 5)), [[512, 64], [32, 600]]], axis=1).astype(np.float32),
)
CONFIGS = {
    "sd1.5": {"cross_attention_dim": 768},
    "sd2": {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "upcast_attention": None,
        "use_linear_projection": True,
    },
}


def random_params(template):
    """Numbers for all parameters, so that no zero hides what is before it."""
    leaves, tree = jax.tree.flatten(template)
    rng = np.random.default_rng(0)
    fan_in = lambda leaf: max(1.0, float(np.prod(leaf.shape[:-1])) ** 0.5)  # noqa: E731
    return jax.tree.unflatten(
        tree, [np.asarray(rng.standard_normal(leaf.shape) / fan_in(leaf), np.float32) for leaf in leaves]
    )


@functools.cache
def params(module=ONE):
    return random_params(unet_condition_rules(module).template)


@functools.cache
def call(module=ONE):
    """Compiled once."""
    return jax.jit(lambda params, x, cond: module.apply({"params": params}, T, x, cond))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "manifest"),
    [
        ("sd1.5", 859_520_964, "06ab0a594a10"),
        ("sd2", 865_910_724, "102cedebfb24"),
        ("sdxl", 2_567_463_684, "1252d970e552"),
    ],
)
def test_published_sizes(name, count, manifest):
    module = make_unet_condition(name)
    assert unet_condition_from_config(CONFIGS[name]) == module
    assert unet_condition_from_config(unet_condition_config(module)) == module
    rules = unet_condition_rules(module)
    assert sum(leaf.size for leaf in jax.tree.leaves(rules.template)) == count
    lines = "\n".join(sorted(f"{key} {list(shape)}" for key, shape in rules.shapes.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:12] == manifest


@pytest.mark.parametrize("name", UNET_CONDITION_CONFIGS)
def test_names_of_the_two_layouts_are_a_bijection(name):
    module = make_unet_condition(name)
    _, paths, diffusers, ldm = zip(*_layers(module), strict=True)
    for names in (paths, diffusers, ldm):
        assert len(set(names)) == len(paths)
    # LDM numbers what follows one another without a gap.
    each, levels = module.num_blocks + 1, len(module.widths)
    for kind, last in (("input_blocks", levels * each), ("output_blocks", levels * each), ("middle_block", 3)):
        assert {int(name.split(".")[1]) for name in ldm if name.startswith(kind)} == set(range(last))


def test_ldm_names_of_stable_diffusion():
    names = {diffusers: ldm for _, _, diffusers, ldm in _layers(make_unet_condition("sd1.5"))}
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["down_blocks.2.attentions.1"] == "input_blocks.8.1"
    assert names["down_blocks.3.resnets.1"] == "input_blocks.11.0"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert names["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert names["up_blocks.3.attentions.2"] == "output_blocks.11.1"


def test_rules_go_both_ways():
    for layout in ("diffusers", "ldm"):
        rules = unet_condition_rules(ONE, layout)
        back = rules.to_ours(rules.to_theirs(params()))
        jax.tree.map(np.testing.assert_array_equal, back, params())


def test_zero_at_initialisation():
    out = jax.jit(lambda key: ONE.init(key, T, X, COND)["params"]["out"])(jax.random.key(0))
    assert not any(leaf.any() for leaf in jax.tree.leaves(out))


@pytest.mark.slow
def test_scanned_and_unrolled_are_equal():
    x, tokens, mask = RNG.standard_normal((2, 2, 3, 8)).astype(np.float32), COND.tokens, np.ones((2, 3), bool)
    weights = random_params(template_of(SpatialTransformer(3, 2, 4), x, tokens, mask, train=False))

    def square(module, params):
        return jnp.sum(module.apply({"params": params}, x, tokens, mask, train=False) ** 2)

    def value_and_grad(scan, params):
        module = SpatialTransformer(3, 2, 4, scan_layers=scan)
        return jax.jit(jax.value_and_grad(functools.partial(square, module)))(params)

    one, grad = value_and_grad(True, weights)
    other, grad_other = value_and_grad(False, unstack_layers(weights))
    flat = lambda tree: np.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    np.testing.assert_allclose(one, other, rtol=1e-6)
    gap = np.linalg.norm(flat(grad) - flat(stack_layers(grad_other))) / np.linalg.norm(flat(grad))
    assert gap < 1e-6, gap


@pytest.mark.slow
def test_bfloat16_and_remat():
    expected = call()(params(), X, COND)
    assert (expected.shape, expected.dtype) == ((2, 4, 6, 4), jnp.float32)
    out = call(replace(ONE, compute=Compute("bfloat16", remat=True)))(params(), X, COND)
    assert out.dtype == jnp.float32
    assert 1e-4 < jnp.linalg.norm(out - expected) / jnp.linalg.norm(expected) < 2e-2


@pytest.mark.slow
def test_masked_tokens_and_padding_have_no_influence():
    mask = np.array([[True, True, False], [True, False, False]])
    noise = np.where(mask[..., None], COND.tokens, 100.0).astype(np.float32)
    out = call()(params(), X, COND._replace(mask=mask))
    np.testing.assert_array_equal(out, call()(params(), X, COND._replace(tokens=noise, mask=mask)))
    assert jnp.abs(out - call()(params(), X, COND)).max() > 1e-3
    longer = Conditions(
        tokens=jnp.pad(noise, ((0, 0), (0, 5), (0, 0))), mask=jnp.pad(mask, ((0, 0), (0, 5))), vector=COND.vector
    )
    np.testing.assert_allclose(call()(params(), X, longer), out, atol=1e-6 * float(jnp.abs(out).max()))


@pytest.mark.slow
def test_jvp_is_the_derivative():
    f = lambda t, x: ONE.apply({"params": params()}, t, x, COND)  # noqa: E731
    step, dt, dx = 2.0**-7, np.array([2.0**-10, -(2.0**-10)], np.float32), X[::-1]
    compiled = jax.jit(f)
    there, back = (compiled(T + sign * step * dt, X + sign * step * dx) for sign in (1, -1))
    _, derivative = jax.jit(lambda: jax.jvp(f, (T, X), (dt, dx)))()
    quotient = (there - back) / (2 * step)
    assert jnp.linalg.norm(quotient - derivative) / jnp.linalg.norm(derivative) < 1e-3


def test_time_is_a_step_of_ddpm():
    np.testing.assert_array_equal(DDPM.time(T), [749.0, 124.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (1, 3)}, r"num_heads\[1\] must divide widths\[1\]=16, got 3"),
        ({"num_heads": 2}, "num_heads must be a tuple"),
        ({"num_layers": (1,)}, r"num_layers must be as many numbers as widths, got \(1,\)"),
        ({"widths": (8, 18)}, "widths must be even and divisible by num_groups=4, got 18"),
        ({"attention_levels": (2,)}, r"attention_levels\[0\] must be from 0 to 1, got 2"),
        ({"attention_levels": 1}, "attention_levels must be a tuple of levels, got 1"),
        ({"border": "ddpm"}, "border must be a Border, such as DDPM, got 'ddpm'"),
        ({"vector_width": 0}, "vector_width must be at least 1, got 0"),
        ({"scan_layers": 1}, "scan_layers must be"),
    ],
)
def test_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


@pytest.mark.parametrize(
    ("x", "cond", "message"),
    [
        (X, None, r"cond must be Conditions with tokens \[batch, n, 6\], got None"),
        (X, Conditions(vector=COND.vector), "got Conditions without them"),
        (X[:, :3], COND, "height and width must be divisible by 2, got 3x6"),
        (X[..., :3], COND, "x and cond.local must have 4 channels together, got 3"),
        (X, COND._replace(local=X[:, :2]), r"cond.local must be \[batch, h, w, c\] with the sides of x"),
        (X, COND._replace(local=X), "must have 4 channels together, got 8"),
        (X, COND._replace(tokens=COND.tokens[..., :5]), r"cond.tokens must be floating point \[batch, n, 6\], got"),
        (X, COND._replace(tokens=COND.tokens[:1]), r"cond.tokens must be \[batch, ...\] with batch = 2"),
        (X, COND._replace(mask=jnp.ones((2, 3))), r"cond.mask must be bool \[batch, n\] = \(2, 3\), got float32"),
        (X, COND._replace(mask=jnp.ones((2, 4), bool)), r"cond.mask must be bool \[batch, n\] = \(2, 3\)"),
        (X, COND._replace(vector=None), r"must be float32 \[batch, 5 of pooled text \+ 2 numbers\], got None"),
        (
            X,
            COND._replace(vector=COND.vector[:, :5]),
            r"5 of pooled text \+ 2 numbers\], got float32 of shape \(2, 5\)",
        ),
        (X, COND._replace(vector=COND.vector.astype(jnp.bfloat16)), "cond.vector must be float32"),
        (X, COND._replace(label=jnp.zeros(2, int)), "cond.label must be None, as this network takes none, got one"),
    ],
)
def test_conditions_are_refused(x, cond, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, cond: SMALL.init(jax.random.key(0), T, x, cond), x, cond)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name must be 'UNet2DConditionModel', got 'UNet2DModel'"),
        ({"class_embed_type": "timestep"}, "class_embed_type must be None, got 'timestep'"),
        ({"addition_embed_type": "text"}, "addition_embed_type must be None or 'text_time', got 'text'"),
        ({"downsample_padding": 0}, "downsample_padding must be 1, got 0"),
        ({"only_cross_attention": [True, False, False, False]}, "only_cross_attention must be False, got"),
        ({"layers_per_block": [2, 1, 2, 2]}, "layers_per_block must be the same number on every level, got"),
        ({"mid_block_type": None}, "mid_block_type must be 'UNetMidBlock2DCrossAttn', got None"),
        ({"reverse_transformer_layers_per_block": [[1]]}, "reverse_transformer_layers_per_block must be None, got"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types must be 4 of 'DownBlock2D' and"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "up_block_types must be down_block_types read backwards"),
        ({"time_embedding_dim": 5}, "time_embedding_dim must be None or 4 x 320 = 1280, got 5"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim must be the width of the pooled"),
        ({"block_out_channels": 320}, "block_out_channels must be a list, got 320"),
        ({"new": 1}, "fields that UNetCondition does not know: new"),
    ],
)
def test_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        unet_condition_from_config(CONFIGS["sd1.5"] | change)


def test_refiner_has_five_numbers():
    config = CONFIGS["sdxl"] | {"projection_class_embeddings_input_dim": 2560}
    assert unet_condition_from_config(config, num_sizes=5).vector_width == 1280


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"name must be one of 'tiny', 'sd1\.5', 'sd2', 'sdxl', got 'sd3'"):
        make_unet_condition("sd3")
    with pytest.raises(ValueError, match="layout must be one of 'diffusers', 'ldm', got 'official'"):
        unet_condition_rules(SMALL, "official")
