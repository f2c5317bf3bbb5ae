import hashlib
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import random_tensors

from fm_jax.models.compute import Compute
from fm_jax.text.clip import ClipText, make_clip_text
from fm_jax.text.encoder import check_ids
from fm_jax.text.t5 import T5Encoder, distance_buckets, make_t5
from fm_jax.weights.clip import clip_config, clip_from_config, clip_layout, clip_rules
from fm_jax.weights.load import load
from fm_jax.weights.t5 import t5_config, t5_from_config, t5_rules

CLIP = ClipText(vocabulary=50, max_tokens=16, hidden=32, num_layers=2, num_heads=2, mlp=64, end=49, projection=8)
T5 = T5Encoder(vocabulary=50, hidden=32, num_layers=2, num_heads=2, head_dim=8, mlp=64, keep_hidden=2)
UMT5 = T5.clone(shared_bias=False)
ENCODERS = [CLIP, T5, UMT5]
RULES = {ClipText: clip_rules, T5Encoder: t5_rules}
every_encoder = pytest.mark.parametrize("module", ENCODERS, ids=["clip", "t5", "umt5"])
IDS = np.random.default_rng(0).integers(0, 49, (2, 10)).astype(np.int32)
IDS[:, [5, 9]] = 49


def rules(module, *args):
    return RULES[type(module)](module, *args)


@cache
def tensors(module):
    return random_tensors(rules(module).shapes)


def params_of(module):
    return rules(module).to_ours(tensors(module.clone(compute=Compute(), scan_layers=True)))


@partial(jax.jit, static_argnums=0)
def run(module, params, ids, mask):
    return module.apply({"params": params}, ids, mask)


def encode(module, ids, mask=None, params=None):
    return run(module, params_of(module) if params is None else params, ids, mask)


def relative(a, b):
    a, b = (np.asarray(each, np.float64) for each in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


# Published sizes: parameters, and what transformers calls the tensors, and their shapes.
PUBLISHED = [
    (make_clip_text, "L", {}, "bare", 123_060_480, "a49bc0b832a1"),
    (make_clip_text, "L", {"projection": 768}, "transformers", 123_650_304, "7cc0c21420e5"),
    (make_clip_text, "bigG", {}, "transformers", 694_659_840, "840e360189d0"),
    (make_t5, "v1.1-small", {}, "transformers", 35_332_800, "5cd32ed304f2"),
    (make_t5, "v1.1-base", {}, "transformers", 109_628_544, "d196211547b0"),
    (make_t5, "v1.1-large", {}, "transformers", 341_231_104, "3f6db34453e6"),
    (make_t5, "v1.1-xl", {}, "transformers", 1_223_527_424, "045957ab2b92"),
    (make_t5, "v1.1-xxl", {}, "transformers", 4_762_310_656, "199ec5269655"),
    (make_t5, "ul2", {}, "transformers", 8_721_797_632, "2f107e1e5b9d"),
    (make_t5, "byt5-small", {}, "transformers", 217_657_472, "168367b933b4"),
    (make_t5, "byt5-large", {}, "transformers", 864_204_800, "4936def90d15"),
    (make_t5, "umt5-xxl", {}, "transformers", 5_680_910_336, "1d865ca90bb8"),
]


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("make", "name", "options", "layout", "count", "manifest"), PUBLISHED, ids=lambda p: getattr(p, "__name__", str(p))
)
def test_published_sizes(make, name, options, layout, count, manifest):
    found = rules(make(name, **options), layout)
    assert sum(math.prod(leaf.shape) for leaf in found.leaves.values()) == count
    lines = sorted(f"{key} {list(shape)}" for key, shape in found.shapes.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12] == manifest


def test_the_encoder_of_stable_diffusion_2():
    found = clip_rules(make_clip_text("H"))
    assert sum(math.prod(leaf.shape) for leaf in found.leaves.values()) == 340_387_840


@every_encoder
@pytest.mark.slow
def test_scanned_and_unrolled_blocks_agree(module):
    @partial(jax.jit, static_argnums=0)
    def both(module, params):
        def loss(params):
            out = module.apply({"params": params}, IDS)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

        return jax.grad(loss, has_aux=True)(params)

    unrolled = module.clone(scan_layers=False)
    (found, out), (wanted, other) = (both(each, params_of(each)) for each in (module, unrolled))
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(other), strict=True):
        assert relative(a, b) < 1e-6
    found, wanted = rules(module).to_theirs(found), rules(unrolled).to_theirs(wanted)
    # Biases of keys have no gradient: softmax does not see them.
    assert all(relative(found[key], wanted[key]) < 1e-6 for key in found if not key.endswith("k_proj.bias"))


@pytest.mark.slow
@pytest.mark.parametrize("module", [CLIP, T5], ids=["clip", "t5"])
def test_rematerialised_blocks_agree(module):
    again = module.clone(compute=Compute(remat=True))
    assert relative(encode(again, IDS).last, encode(module, IDS).last) < 1e-6


@pytest.mark.slow_but_one
@every_encoder
def test_bfloat16_is_near_float32(module):
    low = module.clone(compute=Compute("bfloat16"))
    found, wanted = encode(low, IDS), encode(module, IDS)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == jnp.float32
        assert relative(a, b) < 2e-2


@pytest.mark.slow_but_one
@every_encoder
def test_masked_tokens_have_no_influence(module):
    mask = np.arange(10) < np.array([[6], [9]])
    others = np.where(mask, IDS, 7)
    seen = np.nonzero(mask)
    a, b = encode(module, IDS, mask), encode(module, others, mask)
    np.testing.assert_array_equal(a.last[seen], b.last[seen])
    if module is not CLIP:  # whose tokens do not see what follows anyway
        assert relative(encode(module, IDS).last[seen], encode(module, others).last[seen]) > 1e-3
    # More of them change no more than rounding does.
    longer, more = np.pad(others, ((0, 0), (0, 6))), np.pad(mask, ((0, 0), (0, 6)))
    assert relative(encode(module, longer, more).last[:, :10][seen], a.last[seen]) < 1e-6


def test_clip_looks_back_only():
    later = np.array(IDS)
    later[:, 6:] = 3
    a, b = encode(CLIP, IDS), encode(CLIP, later)
    np.testing.assert_array_equal(a.last[:, :6], b.last[:, :6])
    np.testing.assert_array_equal(a.projected, b.projected)
    assert relative(a.last[:, 6:], b.last[:, 6:]) > 0.1


def test_t5_is_told_distances_only():
    # Of two equal texts the later one, where nothing else is seen, gives the same.
    ids = np.concatenate([IDS, IDS], axis=1)
    first = np.repeat(np.arange(20)[None] < 10, 2, axis=0)
    a, b = encode(T5, ids, first), encode(T5, ids, ~first)
    assert relative(b.last[:, 10:], a.last[:, :10]) < 1e-6


@pytest.mark.slow_but_one
@every_encoder
def test_the_states_that_are_kept(module):
    every = encode(module.clone(keep_hidden=3), IDS).hidden
    assert len(every) == 3
    none = encode(module.clone(keep_hidden=0), IDS)
    assert none.hidden == ()
    found = encode(module, IDS)
    assert len(found.hidden) == 2
    assert all(relative(a, b) < 1e-6 for a, b in zip(found.hidden, every[1:], strict=True))
    assert relative(found.last, none.last) < 1e-6


def test_cudnn_is_not_asked_for_a_bias():
    module = T5.clone(compute=Compute("bfloat16", attention="cudnn"))
    with pytest.warns(UserWarning, match="cuDNN's attention does not take a bias"):
        jax.eval_shape(lambda params: module.apply({"params": params}, IDS), params_of(T5))


def test_where_clip_is_read_out():
    out = encode(CLIP, IDS)
    np.testing.assert_array_equal(out.pooled, out.last[:, 5])
    largest = CLIP.clone(end=None)
    ids = np.where(IDS == 49, 3, IDS)
    ids[0, 2], ids[1, 7] = 48, 49
    out = encode(largest, ids)
    np.testing.assert_array_equal(out.pooled, out.last[[0, 1], [2, 7]])


@pytest.mark.slow
def test_a_derivative_along_the_parameters():
    module, params = T5, jax.tree.map(jnp.asarray, params_of(T5))
    rng = np.random.default_rng(0)
    tangent = jax.tree.map(lambda leaf: jnp.float32(0.1 * rng.standard_normal(leaf.shape)), params)
    _, found = jax.jit(
        lambda params, tangent: jax.jvp(lambda p: module.apply({"params": p}, IDS).last, (params,), (tangent,))
    )(params, tangent)
    step = 1e-3
    a, b = (
        encode(module, IDS, params=jax.tree.map(lambda p, v, h=h: p + h * v, params, tangent)).last
        for h in (step, -step)
    )
    assert relative(found, (np.asarray(a, np.float64) - b) / (2 * step)) < 1e-3


def test_buckets():
    found = distance_buckets(np.arange(-130, 131), 32, 128)
    np.testing.assert_array_equal(found[130:139], [0, 17, 18, 19, 20, 21, 22, 23, 24])
    assert (np.diff(found[131:]) >= 0).all()
    assert (found[:130][::-1] + 16 == found[131:]).all()
    # Exactly at powers of two, as PyTorch rounds.
    np.testing.assert_array_equal(
        distance_buckets(-np.array([15, 16, 31, 32, 63, 64, 90, 91, 500]), 32, 128), [9, 10, 11, 12, 13, 14, 14, 15, 15]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide hidden=32, got 5"),
        ({"activation": "gelu_new"}, "activation must be one of 'quick_gelu', 'gelu', got 'gelu_new'"),
        ({"end": 50}, "end must be from 0 to 49, got 50"),
        ({"keep_hidden": 4}, "keep_hidden must be from 0 to 3, got 4"),
        ({"projection": 0}, "projection must be at least 1, got 0"),
        ({"compute": "bfloat16"}, "compute must be a Compute"),
    ],
)
def test_clip_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        CLIP.clone(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "activation must be one of 'relu', 'gated-gelu', 'gated-silu', got 'gelu'"),
        ({"buckets": 30}, "buckets must be divisible by 4"),
        ({"max_distance": 8}, "buckets / 4 below max_distance, got 32 and 8"),
        ({"shared_bias": 1}, "shared_bias must be True or False"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
    ],
)
def test_t5_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        T5.clone(**options)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([1, 2], None, r"ids must be integers \[batch, n\]"),
        (np.zeros(3, int), None, r"ids must be integers \[batch, n\], .*shape \(3,\)"),
        (np.zeros((2, 3), np.float32), None, "ids must be integers .* got float32"),
        (np.full((1, 3), 50), None, "ids must be from 0 to 49, got ids from 50 to 50"),
        (np.full((1, 3), -1), None, "ids must be from 0 to 49"),
        (IDS, np.ones((2, 10), int), "mask must be bool"),
        (IDS, np.ones((2, 9), bool), r"mask must be bool, .* \(2, 10\), got bool of shape \(2, 9\)"),
    ],
)
@pytest.mark.parametrize("module", [CLIP, T5], ids=["clip", "t5"])
def test_inputs_are_refused(module, ids, mask, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), ids, mask))


def test_clip_refuses_texts_that_are_too_long_or_never_end():
    with pytest.raises(ValueError, match=r"at most 16 tokens, the table of positions, got \(1, 17\)"):
        jax.eval_shape(CLIP.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 17), jnp.int32))
    with pytest.raises(ValueError, match=r"each row of ids must hold the end of the text, 49, got none in \[1\]"):
        CLIP.init(jax.random.key(0), np.array([[1, 49], [1, 2]]))


@pytest.mark.parametrize("make", [make_clip_text, make_t5])
def test_unknown_names(make):
    with pytest.raises(ValueError, match="name must be one of 'tiny', "):
        make("huge")


# Configurations and files.


@pytest.mark.parametrize(
    "module", [CLIP, CLIP.clone(projection=None, end=None, activation="gelu"), make_clip_text("L")]
)
def test_configurations_of_clip(module):
    assert clip_from_config(clip_config(module)) == module.clone(keep_hidden=2)


@pytest.mark.parametrize("module", [T5, UMT5, T5.clone(activation="relu"), make_t5("ul2")])
def test_configurations_of_t5(module):
    assert t5_from_config(t5_config(module)) == module.clone(keep_hidden=0)


def test_fields_that_are_left_out_are_those_of_transformers():
    text = clip_from_config({"architectures": ["CLIPTextModel"]})
    assert (text.hidden, text.num_heads, text.mlp, text.end, text.projection) == (512, 8, 2048, 49407, None)
    whole = {
        "architectures": ["CLIPModel"],
        "projection_dim": 768,
        "text_config": {"hidden_size": 768, "eos_token_id": 2},
    }
    text = clip_from_config(whole)
    assert (text.hidden, text.projection, text.end) == (768, 768, None)
    assert t5_from_config({"model_type": "t5"}).activation == "relu"
    assert t5_from_config({"model_type": "mt5"}) == T5Encoder(vocabulary=250112)
    assert t5_from_config({"model_type": "umt5"}) == T5Encoder(vocabulary=250112, shared_bias=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            clip_config(CLIP) | {"hidden_act": "gelu_new"},
            "hidden_act must be one of 'quick_gelu', 'gelu', got 'gelu_new'",
        ),
        (clip_config(CLIP) | {"architectures": ["SiglipTextModel"]}, "architectures .* got 'SiglipTextModel'"),
        (clip_config(CLIP) | {"eos_token_id": [1]}, "eos_token_id must be an integer"),
        ({}, "architectures .* must be one of 'CLIPTextModel', "),
    ],
)
def test_configurations_that_clip_refuses(config, message):
    with pytest.raises(ValueError, match=message):
        clip_from_config(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "gated-relu"}, "feed_forward_proj must be one of .* got 'gated-relu'"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn must be 'gelu_new' with 'gated-gelu', got 'gelu'"),
        ({"model_type": "bert"}, "model_type .* must be one of 't5', 'mt5', 'umt5', got 'bert'"),
        ({"is_decoder": True}, "is_decoder must be false"),
    ],
)
def test_configurations_that_t5_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        t5_from_config(t5_config(T5) | change)


@every_encoder
def test_layouts_that_are_not_there_are_refused(module):
    with pytest.raises(ValueError, match=r"layout must be one of 'transformers', .*got 'ldm'"):
        rules(module, "ldm")


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_a_file_of_a_whole_clip_and_what_says_nothing():
    file = tensors(CLIP) | {
        "logit_scale": np.zeros((), np.float32),
        "text_model.embeddings.position_ids": np.zeros((1, 16), np.float32),
        "vision_model.embeddings.class_embedding": np.zeros(4, np.float32),
        "visual_projection.weight": np.zeros((8, 4), np.float32),
    }
    assert clip_layout(file) == "transformers"
    assert equal(load(file, clip_rules(CLIP)), params_of(CLIP))
    with pytest.raises(ValueError, match="logit_bias"):
        load(file | {"logit_bias": np.zeros((), np.float32)}, clip_rules(CLIP))


def test_a_file_without_the_prefix():
    module = CLIP.clone(projection=None)
    file = {key.removeprefix("text_model."): value for key, value in tensors(module).items()}
    assert clip_layout(file) == "bare"
    assert equal(load(file, clip_rules(module, "bare")), params_of(module))


@pytest.mark.parametrize("module", [T5, UMT5, T5.clone(scan_layers=False)], ids=["t5", "umt5", "unrolled"])
def test_the_table_of_tokens_under_either_name_or_both(module):
    params, both = params_of(module), rules(module).to_theirs(params_of(module))
    names = {"shared.weight", "encoder.embed_tokens.weight"}
    assert names < both.keys()
    for absent in [None, *names]:
        file = {key: value for key, value in both.items() if key != absent}
        assert equal(load(file, rules(module)), params)
    with pytest.raises(ValueError, match=r"shared\.weight"):
        load({key: value for key, value in both.items() if key not in names}, rules(module))
    with pytest.raises(ValueError, match="copy"):
        load(both | {"shared.weight": both["shared.weight"] + 1}, rules(module))


def test_a_file_of_a_whole_t5():
    file = tensors(T5) | {"encoder.embed_tokens.weight": tensors(T5)["shared.weight"]}
    file |= {
        "decoder.final_layer_norm.weight": np.zeros(32, np.float32),
        "lm_head.weight": np.zeros((50, 32), np.float32),
    }
    assert equal(load(file, t5_rules(T5)), params_of(T5))


def test_ids_may_be_arrays_of_jax_that_a_jitted_function_closes_over():
    ids = jnp.array([[3, 49]])
    jax.jit(lambda x: check_ids(ids, None, 50) or x)(1.0)
    with pytest.raises(ValueError, match="got ids from 3 to 49"):
        jax.jit(lambda x: check_ids(ids, None, 9) or x)(1.0)
