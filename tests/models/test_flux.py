"""FLUX.1: published sizes, loops over blocks, masks, order of the streams, derivatives, refusals."""

import functools
import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.losses import flow_matching
from fm_jax.models import Compute, linen_apply
from fm_jax.models.attention import rope_angles, rotation
from fm_jax.models.conditioning import Conditions
from fm_jax.models.flux import FLUX_CONFIGS, Flux, fill_local, joint_ids, make_flux, rotated_attention
from fm_jax.paths import AffinePath
from fm_jax.weights.flux import flux_config, flux_from_config, flux_rules

SMALL = {"channels": 3, "hidden": 16, "num_heads": 2, "axes": (2, 2, 4), "num_double": 2, "num_single": 3}
SMALL |= {"token_dim": 6, "vector_dim": 5}
MODULE = Flux(**SMALL)
T = jnp.array([0.25, 0.75])


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X = normal(0, 2, 4, 6, 3)
COND = Conditions(vector=normal(1, 2, 5), tokens=normal(2, 2, 8, 6), guidance=jnp.array([3.5, 1.0]))
SEEN = COND._replace(mask=jnp.asarray(np.arange(8) < np.array([[8], [3]])))


def drawn(module, cond=COND):
    """Parameters none of which are zero or alike."""
    rng = np.random.default_rng(0)
    template = jax.eval_shape(module.init, jax.random.key(0), T, X, cond)["params"]
    draw = lambda leaf: rng.normal(size=leaf.shape) / np.sqrt(max(1, math.prod(leaf.shape[:-1])))  # noqa: E731
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf), leaf.dtype), template)


PARAMS = drawn(MODULE)


FIELD = jax.jit(lambda params, *args: MODULE.apply({"params": params}, *args))
run = functools.partial(FIELD, PARAMS)


# Sizes: parameters, tensors of diffusers' layout, the beginning of the hash of their names and shapes.
PUBLISHED = {
    "dev": (11_901_408_320, 1160, "6b4a404547a7"),
    "schnell": (11_891_178_560, 1156, "4bb8eba7b393"),
    "fill": (11_902_391_360, 1160, "8f36bd9bf1fc"),
    "canny": (11_901_604_928, 1160, "dbaa12ecb9b9"),
}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    module = make_flux(name)
    rules = flux_rules(module)
    lines = sorted(f"{key} {list(shape)}" for key, shape in rules.shapes.items())
    manifest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    assert (sum(map(math.prod, rules.shapes.values())), len(lines), manifest) == PUBLISHED[name]
    assert sum(leaf.size for leaf in jax.tree.leaves(rules.template)) == PUBLISHED[name][0]


def test_the_layout_of_the_authors_has_fewer_tensors():
    shapes = flux_rules(make_flux("dev"), "bfl").shapes
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == (PUBLISHED["dev"][0], 780)
    assert shapes["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert shapes["double_blocks.18.txt_attn.norm.key_norm.scale"] == (128,)


@pytest.mark.parametrize("layout", ["diffusers", "bfl"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_tensors_and_back_are_the_same_bits(layout, scan_layers):
    rules = flux_rules(MODULE.clone(scan_layers=scan_layers), layout)
    rng = np.random.default_rng(1)
    tensors = {key: rng.normal(size=shape).astype(np.float32) for key, shape in rules.shapes.items()}
    again = rules.to_theirs(rules.to_ours(tensors))
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("name", FLUX_CONFIGS)
def test_a_configuration_there_and_back(name):
    module = make_flux(name)
    assert flux_from_config(json.loads(json.dumps(flux_config(module)))) == module


@pytest.mark.slow
def test_the_initial_field_is_zero():
    params = jax.jit(MODULE.init)(jax.random.key(0), T, X, COND)["params"]
    out = FIELD(params, T, X, COND)
    assert (out.shape, out.dtype) == (X.shape, jnp.float32)
    assert not out.any()


@pytest.mark.slow
def test_every_condition_counts_for_its_own_example():
    base = run(T, X, COND)
    for name in ("vector", "tokens", "guidance"):
        value = getattr(COND, name)
        other = run(T, X, COND._replace(**{name: value.at[1].set(2 * value[1] + 1)}))
        np.testing.assert_array_equal(other[0], base[0])
        assert jnp.abs(other[1] - base[1]).max() > 1e-3, name
    assert jnp.abs(run(T.at[1].add(-0.125), X, COND)[1] - base[1]).max() > 1e-3


def test_one_time_for_all():
    np.testing.assert_array_equal(run(jnp.float32(0.25), X, COND)[0], run(T, X, COND)[0])


@pytest.mark.parametrize(
    "compute", [Compute(), pytest.param(Compute(remat=True), marks=pytest.mark.slow)], ids=["plain", "remat"]
)
@pytest.mark.slow
def test_loops_give_what_blocks_written_out_give(compute):
    scanned = MODULE.clone(num_single=2)
    params = drawn(scanned)
    rules = {scan: flux_rules(scanned.clone(scan_layers=scan)) for scan in (True, False)}
    written_out = rules[False].to_ours(rules[True].to_theirs(params))

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(module, params):
        out, pullback = jax.vjp(lambda params: module.apply({"params": params}, T, X, SEEN), params)
        return out, pullback(X)[0]

    out, found = derivatives(scanned.clone(compute=compute), params)
    wanted_out, wanted = derivatives(scanned.clone(scan_layers=False, compute=compute), written_out)
    found, wanted = rules[True].to_theirs(found), rules[False].to_theirs(wanted)
    for one, other in [(out, wanted_out), *((found[key], wanted[key]) for key in wanted)]:
        assert np.linalg.norm(other) > 0
        assert np.linalg.norm(one - other) <= 1e-6 * np.linalg.norm(other)


def lines(function, *args):
    return jax.jit(function).lower(*args).as_text().count("\n")


@pytest.mark.slow
def test_the_program_of_57_blocks_is_small():
    def programs(num_double, num_single):
        module = make_flux("tiny", num_double=num_double, num_single=num_single, guidance=True)
        shape = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
        x, cond = shape(2, 16, 16, 4), Conditions(vector=shape(2, 32), tokens=shape(2, 16, 64), guidance=shape(2))
        params = jax.eval_shape(module.init, jax.random.key(0), shape(2), x, cond)["params"]
        field = lambda *args: module.apply({"params": args[0]}, *args[1:])  # noqa: E731
        return [(function, params, shape(2), x, cond) for function in (field, jax.grad(lambda *a: field(*a).sum()))]

    forward, gradient = programs(19, 38)
    assert lines(*forward) == lines(*programs(2, 3)[0]) <= 1000
    assert lines(*gradient) <= 3500


@pytest.mark.slow
def test_what_is_masked_has_no_influence_to_the_bit():
    noise = SEEN.tokens.at[1, 3:].set(100 * normal(9, 5, 6))
    masked = run(T, X, SEEN)
    np.testing.assert_array_equal(run(T, X, SEEN._replace(tokens=noise)), masked)
    assert jnp.abs(run(T, X, COND)[1] - masked[1]).max() > 1e-3
    np.testing.assert_allclose(run(T, X, COND)[0], masked[0], atol=1e-6)  # all of it seen


def test_padding_changes_nothing():
    more = jnp.concatenate([SEEN.tokens, normal(8, 2, 56, 6)], axis=1)
    padded = SEEN._replace(tokens=more, mask=jnp.pad(SEEN.mask, ((0, 0), (0, 56))))
    wanted = run(T, X, SEEN)
    assert jnp.abs(run(T, X, padded) - wanted).max() <= 1e-6 * jnp.abs(wanted).max()


def test_text_first_or_last_is_the_same():
    """Positions go with the tokens."""
    image, text, heads = 6, 5, (2, 8)
    q, k, v = (np.asarray(normal(seed, 2, image + text, *heads)) for seed in (3, 4, 5))
    mask = np.arange(image + text) < np.array([[image + text], [image + 2]])
    ids = joint_ids(2, 3, text)
    order = np.r_[image : image + text, :image]

    @jax.jit
    def joint(q, k, v, mask, ids):
        return rotated_attention(q, k, v, rotation(rope_angles(ids, (2, 2, 4))), mask, Compute())

    last = joint(q, k, v, mask, ids)
    first = joint(*(part[:, order] for part in (q, k, v, mask)), ids[order])
    np.testing.assert_allclose(first, last[:, order], atol=1e-6)
    assert jnp.abs(joint(q, k, v, mask, 0 * ids) - last).max() > 1e-2  # the positions count


def test_positions_of_patches_and_text():
    wanted = [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(joint_ids(2, 3, 2), wanted)


@pytest.mark.slow
def test_derivatives_along_a_path_are_those_of_differences():
    v = normal(7, *X.shape)
    field = lambda s: run(T + s, X + s * v, SEEN)  # noqa: E731
    _, found = jax.jvp(field, (jnp.float32(0),), (jnp.float32(1),))
    h = 2.0**-12  # exact in float32, as the times are; the fastest feature turns by a quarter
    wanted = (8 * (field(h) - field(-h)) - (field(2 * h) - field(-2 * h))) / (12 * h)
    assert np.linalg.norm(found - wanted) <= 1e-3 * np.linalg.norm(wanted)


def test_the_condition_of_fill_holds_every_pixel_of_the_mask():
    latents, mask = normal(0, 2, 3, 2, 4), (normal(1, 2, 24, 16, 1) > 0).astype(jnp.float32)
    local = fill_local(latents, mask)
    assert local.shape == (2, 3, 2, 68)
    np.testing.assert_array_equal(local[..., :4], latents)
    for row in range(3):
        for column in range(2):
            square = mask[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8, 0]
            np.testing.assert_array_equal(local[:, row, column, 4:], square.reshape(2, 64))


@pytest.mark.slow
def test_local_conditions_count_where_they_are():
    module = MODULE.clone(local_channels=2, guidance=False)
    cond = COND._replace(local=normal(3, 2, 4, 6, 2), guidance=None)
    params = drawn(module, cond)
    field = jax.jit(lambda local: module.apply({"params": params}, T, X, cond._replace(local=local)))
    change = jnp.abs(field(cond.local.at[:, 0, 5].add(1.0)) - field(cond.local)).max(axis=(0, 3))
    assert np.unravel_index(change.argmax(), change.shape) in [(0, 4), (0, 5), (1, 4), (1, 5)]  # its patch


def test_it_trains_as_any_network():
    loss = flow_matching(linen_apply(MODULE), AffinePath())
    batch = {"x1": X, "cond": COND}
    grads, _ = jax.eval_shape(jax.grad(loss, has_aux=True), PARAMS, jax.random.key(0), batch)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.slow
def test_one_update_on_eight_devices_is_that_on_one():
    """Tensor parallel on two, cut over four."""
    script = Path(__file__).with_name("flux_sharded.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 8
    assert found["cut"] > 0.9  # of the numbers are on some devices alone
    assert found["difference"] <= 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 20}, "hidden must be num_heads times the sum of axes, 2 x 8, got 20."),
        ({"axes": (3, 3, 2)}, "dims must be even, as channels turn in pairs, got (3, 3, 2)."),
        ({"axes": (4, 4)}, "axes must be three even integers, got (4, 4)."),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0."),
        ({"local_channels": -1}, "local_channels must be at least 0, got -1."),
        ({"guidance": 3.5}, "guidance must be True or False, got 3.5."),
        ({"compute": "bfloat16"}, "compute must be a Compute"),
        ({"scan_layers": 1}, "scan_layers must be True or False, got 1."),
    ],
)
def test_refuses_options(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Flux(**(SMALL | changes))


@pytest.mark.parametrize(
    ("x", "cond", "message"),
    [
        (X[:, :3], COND, "height and width must be divisible by 2, got 3x6."),
        (X[0], COND, "x must be [batch, height, width, channels], got shape (4, 6, 3)."),
        (X[..., :2], COND, "x must have 3 channels, got shape (2, 4, 6, 2)."),
        (X, None, "cond must be Conditions(vector=..., tokens=...), got None."),
        (X, COND.tokens, "cond must be Conditions(vector=..., tokens=...), got float32 of shape (2, 8, 6)."),
        (X, COND._replace(tokens=None), "cond.tokens must be an array of shape (2, n, 6), got None."),
        (X, COND._replace(tokens=COND.tokens[..., :5]), "cond.tokens must have shape (2, 8, 6), got shape (2, 8, 5)."),
        (X, COND._replace(tokens=COND.tokens[0]), "cond.tokens must have shape (2, n, 6), got shape (8, 6)."),
        (X, COND._replace(vector=None), "cond.vector must be an array of shape (2, 5), got None."),
        (X, COND._replace(vector=COND.vector[:1]), "cond.vector must have shape (2, 5), got shape (1, 5)."),
        (X, COND._replace(guidance=None), "cond.guidance must be an array of shape (2,), got None."),
        (X, COND._replace(guidance=3.5), "cond.guidance must be an array of shape (2,), got 3.5."),
        (X, COND._replace(label=jnp.zeros(2, int)), "cond.label must be None: this network has no use for it"),
        (X, COND._replace(local=X), "cond.local must be None: this network has no use for it"),
        (X, COND._replace(mask=jnp.ones((2, 8))), "cond.mask must be bool of shape (2, 8), got float32 of shape"),
        (X, COND._replace(mask=SEEN.mask[:, :7]), "cond.mask must be bool of shape (2, 8), got bool of shape (2, 7)."),
    ],
)
def test_refuses_inputs(x, cond, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda params: MODULE.apply({"params": params}, T, x, cond), PARAMS)


def test_refuses_guidance_that_nobody_hears():
    module = MODULE.clone(guidance=False)
    with pytest.raises(ValueError, match=r"cond\.guidance must be None: this network has no use for it"):
        jax.eval_shape(module.init, jax.random.key(0), T, X, COND)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: make_flux("pro"), "name must be one of 'tiny', 'dev', 'schnell', 'fill', 'canny', got 'pro'."),
        (lambda: fill_local(X, X), "mask must be [batch, 8 h, 8 w, 1] = (2, 32, 48, 1), got shape (2, 4, 6, 3)."),
        (lambda: flux_rules(MODULE, "ldm"), "layout must be one of 'diffusers', 'bfl', got 'ldm'."),
        (lambda: flux_from_config([]), "config must be a dict, as config.json of diffusers holds, got []."),
        (lambda: flux_from_config({"_class_name": "UNet2DModel"}), "config must be of a FluxTransformer2DModel"),
        (lambda: flux_from_config({"mlp_ratio": 3}), "config has fields that this network does not know: mlp_ratio."),
        (lambda: flux_from_config({"patch_size": 2}), "patch_size must be 1, as the pipeline packs patches, got 2."),
        (lambda: flux_from_config({"in_channels": 63}), "in_channels and out_channels must be multiples of 4"),
        (
            lambda: flux_from_config({"attention_head_dim": 64}),
            "attention_head_dim must be the sum of axes_dims_rope=(16, 56, 56), got 64.",
        ),
    ],
)
def test_refuses_names_and_configurations(function, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function()
