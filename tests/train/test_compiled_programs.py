"""What each training step compiles to: FLOP, bytes and collectives of one device, against committed figures.

They depend on jax and on the tests' XLA flags, and not on how fast a machine is today. Where a change is meant, write
them anew, with each jax that has figures, and look at the difference:

    FM_JAX_WRITE_PROGRAMS=1 python -m pytest tests/train/test_compiled_programs.py
"""

import json
import os
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.compiled import collectives, cost, lower_step, operations, products, shape_bytes
from fm_jax.losses import flow_matching
from fm_jax.models import MLP, DiT, init_params, linen_apply, make_unet
from fm_jax.paths import AffinePath
from fm_jax.train import create_state, make_optimizer
from fm_jax.train.sharding import MIN_SIZE

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four (simulated) devices")

FIGURES = Path(__file__).with_suffix(".json")
VERSION = ".".join(jax.__version__.split(".")[:2])
OPTIMIZER = make_optimizer(1e-3, total_steps=100)
# Each has a leaf that is cut over devices, hence of 2^14 elements or more, and little else: compiling takes the time.
UNET = {"channels": 48, "channel_mults": (1,), "attention_levels": (), "num_heads": 1, "patch_size": 2}
DIT = {"hidden": 64, "num_layers": 2, "num_heads": 2, "scan_layers": True}
NETWORKS = {
    "mlp": (MLP(features=(128, 128)), (2,)),
    "unet": (make_unet("tiny", **UNET), (8, 8, 1)),
    "dit": (DiT(**DIT), (4, 4, 3)),
}
# pmap and shard_map run the same program, as the figures of the first network show.
PROGRAMS = [
    ("mlp", "pmap"),
    ("mlp", "shard_map"),
    ("mlp", "fsdp"),
    ("dit", "shard_map"),
    ("dit", "fsdp"),
    *(pytest.param("unet", parallel, marks=pytest.mark.slow) for parallel in ("shard_map", "fsdp")),
]


@cache
def state_of(name):
    model, event_shape = NETWORKS[name]
    ema_decays = (0.999,) if name == "mlp" else ()
    return jax.eval_shape(
        lambda key: create_state(init_params(model, key, event_shape), OPTIMIZER, ema_decays), jax.random.key(0)
    )


def lowered(name, parallel, changed=lambda loss_fn: loss_fn):
    model, event_shape = NETWORKS[name]
    batch = {"x1": jax.ShapeDtypeStruct((16, *event_shape), jnp.float32)}
    loss_fn = changed(flow_matching(linen_apply(model), AffinePath()))
    return lower_step(loss_fn, OPTIMIZER, state_of(name), batch, parallel, jax.devices()[:4])


@cache
def compiled(name, parallel):
    program = lowered(name, parallel).compile()
    return program, collectives(program.as_text())


def figures(name, parallel):
    program, found = compiled(name, parallel)
    costs = cost(program)
    counts = {kind: each["count"] for kind, each in found.items()}
    return {"flops": costs["flops"], "bytes": costs["bytes accessed"], "collectives": counts}


def committed():
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "parallel"), PROGRAMS)
def test_compiles_to_the_committed_figures(name, parallel):
    found, key = figures(name, parallel), f"{name}, {parallel}"
    if os.environ.get("FM_JAX_WRITE_PROGRAMS"):
        everything = committed()
        everything.setdefault(VERSION, {})[key] = found
        FIGURES.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    if VERSION not in committed():
        pytest.skip(f"no figures for jax {VERSION}: FM_JAX_WRITE_PROGRAMS=1 writes them")
    wanted = committed()[VERSION][key]
    assert found["collectives"] == wanted["collectives"]
    assert found["flops"] == pytest.approx(wanted["flops"], rel=0.02)
    assert found["bytes"] == pytest.approx(wanted["bytes"], rel=0.02)


@pytest.mark.parametrize("name", ["mlp", "dit", pytest.param("unet", marks=pytest.mark.slow)])
def test_gradients_are_reduced_at_once_and_nothing_else(name):
    """Bytes of one device; scalars are reduced beside, and gradients that are known to be 0 are not."""
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(state_of(name).params))
    found = compiled(name, "shard_map")[1]
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"]["count"] == 1
    assert 0.99 * gradients < found["all-reduce"]["bytes"] <= gradients + 64


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_cut_parameters_are_gathered_once(name):
    cut = sum(4 * leaf.size for leaf in jax.tree.leaves(state_of(name).params) if leaf.size >= MIN_SIZE)
    found = compiled(name, "fsdp")[1]
    assert found.keys() <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-gather"]["bytes"] == cut > 0


@pytest.mark.slow
def test_a_further_collective_and_a_further_product_are_seen():
    def further(loss_fn):
        def loss(params, key, batch):
            scale = jax.lax.pmean(jnp.mean(batch["x1"]), "data")  # before the gradients, so not in one with theirs
            extra = sum(jnp.mean(leaf @ leaf.T) for leaf in jax.tree.leaves(params) if leaf.shape == (128, 128))
            value, metrics = loss_fn(params, key, {**batch, "x1": batch["x1"] * scale})
            return value + 1e-3 * extra, metrics

        return loss

    program = lowered("mlp", "shard_map", further).compile()
    before = figures("mlp", "shard_map")
    assert collectives(program.as_text())["all-reduce"]["count"] > before["collectives"]["all-reduce"]
    assert cost(program)["flops"] > 1.02 * before["flops"]


def test_reads_the_text_of_programs():
    hlo = """
  %p = (f32[8,4]{1,0:T(8,128)}, /*index=1*/bf16[2]{0}) parameter(0)
  %a = bf16[2,3]{1,0} convert(%p)
  ROOT %dot.1 = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}
  %s = ((f32[2]{0}), (f32[8]{0})) all-gather-start(%dot.1), dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
  %r = (f32[4]{0}, s32[]) all-reduce(%d, %d), to_apply=%add
"""
    assert [op.opcode for op in operations(hlo)] == [
        "parameter",
        "convert",
        "dot",
        "all-gather-start",
        "all-gather-done",
        "all-reduce",
    ]
    assert shape_bytes("(f32[8,4]{1,0}, bf16[2]{0}, s32[])") == 128 + 4 + 4
    assert products(hlo) == {"dot bf16 x bf16 -> f32": 1}
    assert collectives(hlo) == {"all-gather": {"count": 1, "bytes": 32}, "all-reduce": {"count": 1, "bytes": 20}}
