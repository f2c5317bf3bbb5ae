"""The transformer of Stable Diffusion 3: its sizes, its two forms, what padding may do, and what it refuses."""

import functools
import hashlib
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.harness import random_tensors

from fm_jax.models.compute import Compute
from fm_jax.models.conditioning import Conditions
from fm_jax.models.mmdit import MMDIT_CONFIGS, MMDiT, make_mmdit, position_table
from fm_jax.weights.mmdit import mmdit_config, mmdit_from_config, mmdit_rules

SIZES = {"channels": 4, "hidden": 32, "num_heads": 2, "token_dim": 12, "vector_dim": 10, "table_size": 9}
SD35 = SIZES | {"table_base": 4, "num_layers": 3, "num_dual": 1, "qk_norm": True}
T = jnp.array([0.2, 0.7])
X = jax.random.normal(jax.random.key(1), (2, 8, 6, 4))
COND = Conditions(
    vector=jax.random.normal(jax.random.key(2), (2, 10)), tokens=jax.random.normal(jax.random.key(3), (2, 8, 12))
)
LENGTHS = jnp.array([5, 8])
MASK = jnp.arange(8)[None, :] < LENGTHS[:, None]


rules_of = functools.cache(mmdit_rules)


@functools.cache
def tensors(module):
    return random_tensors(rules_of(module.clone(scan_layers=True, skip_layers=(), compute=Compute())).shapes)


@functools.cache
def drawn(module):
    """The same parameters, none of which is zero, for every form of the network."""
    return jax.tree.map(jnp.asarray, rules_of(module).to_ours(tensors(module)))


@functools.cache
def compiled(module):
    return jax.jit(lambda params, x, cond: module.apply({"params": params}, T, x, cond))


def call(module, params, cond=COND, x=X):
    return compiled(module)(params, x, cond)


def relative(a, b):
    return float(jnp.linalg.norm(jnp.ravel(a - b)) / jnp.linalg.norm(jnp.ravel(b)))


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("name", "size", "num_keys", "manifest"),
    [
        ("medium", 2_028_328_000, 683, "31ad5dd89c24"),
        ("3.5-medium", 2_243_171_520, 909, "1bd0302601c8"),
        ("3.5-large", 8_056_627_520, 1227, "d22aabe26200"),
    ],
)
def test_the_published_networks_have_their_published_parameters(name, size, num_keys, manifest):
    module = make_mmdit(name)
    rules = rules_of(module)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(rules.template)) == size
    shapes = dict(rules.shapes) | {"pos_embed.pos_embed": (1, module.table_size**2, module.hidden)}
    assert rules.tables.keys() == {"pos_embed.pos_embed"}
    lines = "\n".join(sorted(f"{key} {list(shape)}" for key, shape in shapes.items()))
    assert len(shapes) == num_keys
    assert hashlib.sha256(lines.encode()).hexdigest()[:12] == manifest
    assert sum(map(math.prod, mmdit_rules(module, "stability").shapes.values())) == size


def test_the_blocks_of_the_published_networks_run_in_loops():
    runs = {name: make_mmdit(name).runs for name in MMDIT_CONFIGS}
    assert runs["medium"] == (("block", 0, 23),)
    assert runs["3.5-medium"] == (("dual_block", 0, 13), ("block", 13, 10))
    assert runs["3.5-large"] == (("block", 0, 37),)


@pytest.mark.parametrize("name", MMDIT_CONFIGS)
def test_a_network_is_what_its_configuration_says(name):
    module = make_mmdit(name)
    assert mmdit_from_config(mmdit_config(module) | {"_diffusers_version": "0.42.1"}) == module


@pytest.mark.slow
def test_a_program_does_not_grow_with_depth():
    module = make_mmdit("tiny", num_layers=38, num_dual=13)
    x, cond = jnp.zeros((1, 8, 8, 3)), Conditions(vector=jnp.zeros((1, 128)), tokens=jnp.zeros((1, 4, 128)))
    grad = jax.grad(lambda params: module.apply({"params": params}, jnp.zeros(1), x, cond).sum())
    program = jax.jit(grad).lower(rules_of(module).template).as_text()
    assert len(program.splitlines()) < 5000  # three kinds of block, forwards and backwards


@pytest.mark.parametrize(
    "options",
    [
        {"num_dual": 2},
        pytest.param({"num_dual": 2, "compute": Compute(remat=True)}, marks=pytest.mark.slow),
        pytest.param({"num_dual": 2, "num_layers": 5}, marks=pytest.mark.slow),
        pytest.param({"num_dual": 2, "num_layers": 5, "skip_layers": (1, 3)}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_loops_give_outputs_and_derivatives_of_the_unrolled_blocks(options):
    def run(scan_layers):
        module = MMDiT(**(SD35 | options), scan_layers=scan_layers)

        def loss(params, x):
            out = module.apply({"params": params}, T, x, COND._replace(mask=MASK))
            return (out * X).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(drawn(module), X)
        return out, rules_of(module).to_theirs(grads[0]), grads[1]

    (out, grads, slope), other = run(False), run(True)
    assert relative(other[0], out) < 1e-6
    assert relative(other[2], slope) < 1e-6
    largest = max(np.abs(value).max() for value in grads.values())
    for key, value in grads.items():
        assert np.abs(other[1][key] - value).max() < 1e-6 * largest, key


@pytest.mark.slow
def test_a_new_network_is_zero_and_has_small_numbers():
    module = MMDiT(**SD35 | {"num_layers": 1})
    out, params = jax.jit(module.init_with_output)(jax.random.key(0), T, X, COND)
    params = params["params"]
    assert not out.any()
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(params)) <= 1.0 + 1e-6
    assert jax.tree.structure(params) == jax.tree.structure(rules_of(module).template)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    module, other = MMDiT(**SD35), MMDiT(**SD35, compute=Compute("bfloat16"))
    out = call(module, drawn(module))
    found = call(other, drawn(module))
    assert found.dtype == jnp.float32
    assert relative(found, out) < 2e-2


@pytest.mark.slow
def test_padding_has_no_influence():
    module = MMDiT(**SD35)
    params = drawn(module)
    out = call(module, params, COND._replace(mask=MASK))
    noise = jnp.where(MASK[..., None], COND.tokens, 1e3 * jax.random.normal(jax.random.key(9), COND.tokens.shape))
    np.testing.assert_array_equal(call(module, params, COND._replace(mask=MASK, tokens=noise)), out)
    assert relative(call(module, params, COND), out) > 1e-3  # what is masked would count

    longer = COND._replace(
        tokens=jnp.pad(COND.tokens, ((0, 0), (0, 56), (0, 0)), constant_values=3.0),
        mask=jnp.pad(MASK, ((0, 0), (0, 56))),
    )
    assert relative(call(module, params, longer), out) < 1e-6
    whole = call(module, params, COND._replace(mask=jnp.ones_like(MASK)))
    assert relative(whole, call(module, params)) < 1e-6


def test_the_context_is_a_set():
    module = MMDiT(**SD35)
    params, order = drawn(module), jnp.array([3, 1, 7, 0, 2, 6, 5, 4])
    turned = COND._replace(tokens=COND.tokens[:, order])
    assert relative(call(module, params, turned), call(module, params)) < 1e-6


def test_the_middle_of_the_table_is_taken():
    table = position_table(9, 9, 9, 4, 32).reshape(9, 9, 32)
    np.testing.assert_array_equal(position_table(4, 3, 9, 4, 32).reshape(4, 3, 32), table[2:6, 3:6])
    np.testing.assert_array_equal(position_table(4, 3, 9, 4, 32, numpy=jnp), position_table(4, 3, 9, 4, 32))
    # Column first, and its places 4 / 9 apart.
    np.testing.assert_allclose(table[5, 2, 0], np.sin(2 * 4 / 9), rtol=1e-6)
    np.testing.assert_allclose(table[5, 2, 16], np.sin(5 * 4 / 9), rtol=1e-6)


@pytest.mark.slow
def test_blocks_that_are_skipped_might_hold_anything():
    module = MMDiT(**SD35, skip_layers=(0, 2))
    params = drawn(module)
    out = call(module, params)
    assert relative(out, call(MMDiT(**SD35), params)) > 1e-2
    skipped = ("transformer_blocks.0.", "transformer_blocks.2.")
    other = {key: 2 * value if key.startswith(skipped) else value for key, value in tensors(module).items()}
    np.testing.assert_array_equal(call(module, rules_of(module).to_ours(other)), out)
    init = jax.eval_shape(module.init, jax.random.key(0), T, X, COND)["params"]
    assert jax.tree.structure(init) == jax.tree.structure(params)


@pytest.mark.slow
def test_it_can_be_differentiated_along_a_path():
    module = make_mmdit("tiny")
    params = drawn(module)
    cond = Conditions(
        vector=jax.random.normal(jax.random.key(4), (2, 128)), tokens=jax.random.normal(jax.random.key(5), (2, 4, 128))
    )
    x, v = jax.random.normal(jax.random.key(6), (2, 2, 4, 4, 3))

    def along(s):
        # Time enters times 1000.
        return module.apply({"params": params}, T + 1e-3 * s, x + s * v, cond)

    _, slope = jax.jit(lambda s: jax.jvp(along, (s,), (1.0,)))(0.0)
    step, value = 0.02, jax.jit(along)
    quotient = (8 * (value(step) - value(-step)) - value(2 * step) + value(-2 * step)) / (12 * step)
    assert relative(slope, quotient) < 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 30}, "hidden must be divisible by 4 and by num_heads=2, got 30"),
        ({"num_heads": 3}, "hidden must be divisible by 4 and by num_heads=3, got 32"),
        ({"num_dual": 6}, "num_dual must be from 0 to 3, got 6"),
        ({"skip_layers": (5,)}, r"skip_layers\[0\] must be from 0 to 2, got 5"),
        ({"skip_layers": 3}, "skip_layers must be a tuple of integers, got 3"),
        ({"table_size": 0}, "table_size must be at least 1, got 0"),
        ({"qk_norm": "rms_norm"}, "qk_norm must be"),
        ({"compute": "bfloat16"}, "compute must be a Compute"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MMDiT(**(SD35 | options))


@pytest.mark.parametrize(
    ("x", "cond", "message"),
    [
        (X[..., :3], COND, r"x must have channels=4, got shape \(2, 8, 6, 3\)"),
        (X[:, :7], COND, "height and width must be divisible by 2, got 7x6"),
        (jnp.zeros((2, 20, 6, 4)), COND, "An image must have at most 9x9 patches, as the positions, got 10x3"),
        (X, None, r"cond must be Conditions\(vector=..., tokens=...\), got None"),
        (X, COND._replace(tokens=None), r"cond.tokens must be an array of shape \(2, n, 12\), got None"),
        (X, COND._replace(vector=None), r"cond.vector must be an array of shape \(2, 10\), got None"),
        (
            X,
            COND._replace(tokens=jnp.zeros((2, 8, 13))),
            r"cond.tokens must have shape \(2, 8, 12\), got .*\(2, 8, 13\)",
        ),
        (
            X,
            COND._replace(tokens=jnp.zeros((2, 0, 12))),
            r"cond.tokens must have shape \(2, n, 12\), got .*\(2, 0, 12\)",
        ),
        (X, COND._replace(vector=jnp.zeros((1, 10))), r"cond.vector must have shape \(2, 10\), got shape \(1, 10\)"),
        (X, COND._replace(mask=jnp.ones((2, 8))), r"cond.mask must be bool of shape \(2, 8\), got float32"),
        (X, COND._replace(mask=jnp.ones((2, 7), bool)), r"cond.mask must be bool of shape \(2, 8\), got bool of .*7"),
        (X, COND._replace(guidance=jnp.ones(2)), "cond.guidance must be None: this network has no use for it, got"),
    ],
)
def test_inputs_that_are_refused(x, cond, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(MMDiT(**SD35).init, jax.random.key(0), T, x, cond)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"_class_name": "FluxTransformer2DModel"},
            "must be of an SD3Transformer2DModel, got 'FluxTransformer2DModel'",
        ),
        ({"qk_norm": "layer_norm"}, "qk_norm must be None or 'rms_norm', got 'layer_norm'"),
        ({"dual_attention_layers": [0, 2]}, r"dual_attention_layers must be the first ones, 0, 1, ..., got \[0, 2\]"),
        ({"caption_projection_dim": 64}, "caption_projection_dim must be 1536, got 64"),
        ({"dual_attention_layers": 2}, "dual_attention_layers must be the first ones, 0, 1, ..., got 2"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size must be an integer, got None"),
        ({"guidance_embeds": True}, "fields that are not known: guidance_embeds"),
    ],
)
def test_configurations_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        mmdit_from_config(mmdit_config(make_mmdit("medium")) | fields)


def test_names_and_layouts_that_are_refused():
    with pytest.raises(ValueError, match=r"name must be one of 'tiny', 'medium', .*, got 'large'"):
        make_mmdit("large")
    with pytest.raises(ValueError, match="layout must be one of 'diffusers', 'stability', got 'bfl'"):
        mmdit_rules(make_mmdit("tiny"), "bfl")
    for function in (mmdit_rules, mmdit_config):
        with pytest.raises(ValueError, match=r"module must be an MMDiT, such as make_mmdit\('medium'\), got None"):
            function(None)
    with pytest.raises(ValueError, match=r"The configuration must be a dict, as config.json holds, got None"):
        mmdit_from_config(None)
    with pytest.raises(ValueError, match="dim must be divisible by 4, got 6"):
        position_table(2, 2, 4, 4, 6)


def mmdit_sharding(path, shape, mesh):
    """Heads and hidden units over `model`; of other axes, the largest that `data` divides over `data`."""
    axes = [None] * len(shape)
    leaf = path.split("/")[-1]
    name = path.split("/")[-2]
    if name.endswith(("query", "key", "value")) and "norm" not in name:
        axes[-2] = "model"
    elif name.endswith("mlp_in"):
        axes[-1] = "model"
    elif name.endswith("mlp_out") and leaf == "kernel":
        axes[-2] = "model"
    elif name.endswith("out") and "attention/" in path and leaf == "kernel":
        axes[-3] = "model"
    free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % mesh.shape["data"] == 0]
    if leaf == "kernel" and free:
        axes[max(free, key=lambda i: shape[i])] = "data"
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))


UPDATE = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from parity.harness import random_input, random_tensors
    from models.test_mmdit import mmdit_sharding
    from fm_jax.models.conditioning import Conditions
    from fm_jax.models.mmdit import make_mmdit
    from fm_jax.weights.mmdit import mmdit_rules
    from fm_jax.weights.rules import path_of

    assert len(jax.devices()) == 8
    module = make_mmdit("tiny", num_dual=2, qk_norm=True)
    rules = mmdit_rules(module)
    params = rules.to_ours(random_tensors(rules.shapes))
    batch = {
        "t": np.linspace(0.1, 0.9, 8, dtype=np.float32),
        "x": random_input("x", (8, 4, 4, 3)),
        "u": random_input("u", (8, 4, 4, 3)),
        "cond": Conditions(
            vector=random_input("vector", (8, 128)),
            tokens=random_input("tokens", (8, 6, 128)),
            mask=np.arange(6)[None, :] < np.arange(1, 9)[:, None],
        ),
    }

    def update(params, batch):
        def loss(params):
            out = module.apply({"params": params}, batch["t"], batch["x"], batch["cond"])
            return jnp.square(out - batch["u"]).mean()
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))

    def run(shardings, data):
        put = jax.device_put(params, shardings), jax.device_put(batch, data)
        with jax.default_matmul_precision("highest"):
            new = jax.jit(update, out_shardings=shardings)(*put)
        parts = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(new)]
        return jax.tree.map(np.asarray, new), sum(p == 1 / 8 for p in parts), sum(p == 1 for p in parts)

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    line = Mesh(np.array(jax.devices()), ("data",))
    grid = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    shardings = jax.tree_util.tree_map_with_path(lambda path, p: mmdit_sharding(path_of(path), p.shape, grid), params)
    expected, *_ = run(jax.tree.map(lambda _: one, params), one)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), expected, params)
    results = {
        "data": run(jax.tree.map(lambda _: NamedSharding(line, P()), params), NamedSharding(line, P("data"))),
        "model": run(shardings, NamedSharding(grid, P("data"))),
    }
    for name, (new, eighths, wholes) in results.items():
        far = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*map(jax.tree.leaves, (new, expected)))]
        print(name, max(far), eighths, wholes)
    print("moved", max(jax.tree.leaves(moved)))
"""


@pytest.mark.slow
def test_an_update_is_the_same_on_one_device_and_on_eight():
    root = Path(__file__).parents[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(root),
    }
    script = textwrap.dedent(UPDATE)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: list(map(float, rest)) for name, *rest in map(str.split, done.stdout.splitlines())}
    assert found["moved"][0] > 1e-3
    assert found["data"][0] < 1e-5
    assert found["model"][0] < 1e-5
    assert found["model"][1] >= 20  # kernels that every device has an eighth of
