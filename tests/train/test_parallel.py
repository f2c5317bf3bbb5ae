import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from small_networks import drawn as drawn_params

from fm_jax.losses import masked_elbo
from fm_jax.models import TokenTransformer, init_params, linen_apply
from fm_jax.paths import MixturePath
from fm_jax.schedules import Linear
from fm_jax.sources import Masked
from fm_jax.train.parallel import fsdp_step, pmap_step, shard_map_step, split_batch
from fm_jax.train.sharding import data_mesh, fsdp_mesh, fsdp_sharding
from fm_jax.train.state import create_state
from fm_jax.train.step import make_step, scan_steps

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four (simulated) devices")

RNG = np.random.default_rng(0)
BATCH = {
    "x1": RNG.normal(size=(16, 3)).astype(np.float32),
    "x0": RNG.normal(size=(16, 3)).astype(np.float32),
    "t": RNG.uniform(size=(16,)).astype(np.float32),
}
PARAMS = {"w1": RNG.normal(size=(3, 8)).astype(np.float32), "w2": RNG.normal(size=(8, 3)).astype(np.float32)}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def given(params, key, batch):
    """Flow matching with x0 and t in the batch: nothing random."""
    t = batch["t"].reshape(-1, 1)
    x_t = t * batch["x1"] + (1 - t) * batch["x0"]
    return jnp.mean((jnp.tanh(x_t @ params["w1"]) @ params["w2"] - batch["x1"] + batch["x0"]) ** 2), {}


def drawn(params, key, batch):
    return given(params, key, {**batch, "x0": jax.random.normal(key, batch["x1"].shape)})


@functools.cache
def masks(num_tokens, **options):
    """The bound of masked tokens, of which the last is the mask; parameters none of which are zero."""
    model = TokenTransformer(num_tokens, mask=num_tokens - 1, num_layers=1, num_heads=2, **options)
    params = drawn_params(jax.eval_shape(lambda key: init_params(model, key, (6,)), jax.random.key(0)))
    return masked_elbo(linen_apply(model), MixturePath(Linear(), Masked(num_tokens, num_tokens - 1))), params


def of_kind(kind):
    """A loss of which nothing is random, its parameters and its batch.

    Of tokens, int32, those at t = 0 are given, with as many masks in each example: metrics are means over masks.
    """
    if kind == "points":
        return given, PARAMS, BATCH
    rng = np.random.default_rng(1)
    x1 = rng.integers(4, size=(16, 6)).astype(np.int32)
    x0 = np.where(rng.permuted(np.tile(np.arange(6) < 3, (16, 1)), axis=1), 4, x1)
    return *masks(5, hidden=8), {"x1": x1, "x0": x0, "t": 0 * BATCH["t"]}


KINDS = pytest.mark.parametrize("kind", ["points", pytest.param("tokens", marks=pytest.mark.slow)])


def train(step, batch, num_steps=5, params=PARAMS):
    state = create_state(params, OPTIMIZER, (0.9,))
    for _ in range(num_steps):
        state, metrics = step(state, jax.random.key(1), batch)
    return state, metrics


def mesh(num_devices):
    return Mesh(np.array(jax.devices()[:num_devices]), ("data",))


@KINDS
def test_four_devices_equal_one_and_plain_jit(kind):
    loss_fn, params, batch = of_kind(kind)
    plain = train(jax.jit(make_step(loss_fn, OPTIMIZER, axis_name=None)), batch, params=params)
    for num_devices in (1, 4):
        step = pmap_step(make_step(loss_fn, OPTIMIZER), jax.devices()[:num_devices])
        found = train(step, split_batch(batch, num_devices), params=params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), found, plain)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_pmap_and_shard_map_agree_bit_for_bit(accumulate):
    step = make_step(drawn, OPTIMIZER, accumulate=accumulate)
    # The axes of a mesh are automatic when made by Mesh, explicit when made by jax.make_mesh.
    grid = mesh(4) if accumulate == 1 else jax.make_mesh((4,), ("data",))
    one = train(pmap_step(step), split_batch(BATCH, 4))
    other = train(shard_map_step(step, grid), BATCH)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("make", [pmap_step, lambda step: shard_map_step(step, mesh(4))], ids=["pmap", "shard_map"])
def test_devices_draw_different_noise(make):
    key = jax.random.key(4)

    def reports(params, key, batch):
        # Every device fills its own place; the mean over devices divides by four.
        index = jax.lax.axis_index("data")
        noise = jax.random.normal(key, ())
        return jnp.sum(params["w1"]) * 0.0 + noise, {f"noise{i}": jnp.where(index == i, noise, 0.0) for i in range(4)}

    batch = split_batch(BATCH, 4) if make is pmap_step else BATCH
    _, metrics = make(make_step(reports, OPTIMIZER))(create_state(PARAMS, OPTIMIZER), key, batch)
    found = [4 * float(metrics[f"noise{i}"]) for i in range(4)]
    step_key = jax.random.fold_in(key, 0)
    expected = [float(jax.random.normal(jax.random.fold_in(step_key, i), ())) for i in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert len(set(found)) == 4


@KINDS
@pytest.mark.parametrize("make", [pmap_step, lambda step: shard_map_step(step, mesh(4))], ids=["pmap", "shard_map"])
def test_state_is_replicated_donated_and_traced_once(make, kind):
    loss_fn, params, batch = of_kind(kind)
    traces = []

    def counted(params, key, batch):
        traces.append(1)
        return loss_fn(params, key, batch)

    batch = split_batch(batch, 4) if make is pmap_step else batch
    step, key = make(make_step(counted, OPTIMIZER)), jax.random.key(0)
    state, _ = step(create_state(params, OPTIMIZER, (0.9,)), key, batch)
    before = state
    for _ in range(3):
        state, metrics = step(state, key, batch)
    assert len(traces) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    for leaf, before in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        assert leaf.shape == before.shape
        assert leaf.is_fully_replicated
        assert len(leaf.devices()) == 4
    assert metrics["loss"].shape == ()


def test_one_process_does_not_train_beside_the_others(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="one process, got 2 processes: use shard_map_step"):
        pmap_step(make_step(given, OPTIMIZER))


def test_bad_input():
    with pytest.raises(ValueError, match=r"num_devices=3 must divide the batch axis of 'x1', .* shape \(16, 3\)"):
        split_batch({"x1": BATCH["x1"]}, 3)
    with pytest.raises(ValueError, match=r"num_devices=4 must divide the batch axis of 'cond.scale', .* shape \(\)"):
        split_batch({"cond": {"scale": np.float32(1)}, "x1": BATCH["x1"]}, 4)
    with pytest.raises(ValueError, match="num_devices must be at least 1, got 0"):
        split_batch(BATCH, 0)
    with pytest.raises(ValueError, match=r"axis_name='data' .* got None"):
        pmap_step(make_step(given, OPTIMIZER, axis_name=None))
    with pytest.raises(ValueError, match=r"axis_name='data' .* got 'batch'"):
        shard_map_step(make_step(given, OPTIMIZER, axis_name="batch"), mesh(4))
    with pytest.raises(ValueError, match=r"one axis 'data', got \('model',\)"):
        shard_map_step(make_step(given, OPTIMIZER), Mesh(np.array(jax.devices()), ("model",)))
    with pytest.raises(ValueError, match=r"axis_name=None, as it sees the whole batch, got 'data'"):
        fsdp_step(make_step(given, OPTIMIZER), fsdp_mesh())
    with pytest.raises(ValueError, match=r"axes \('data', 'fsdp'\), got \('data',\)"):
        fsdp_step(make_step(given, OPTIMIZER, axis_name=None), mesh(4))
    with pytest.raises(ValueError, match="shards must divide the 4 devices, got 3"):
        fsdp_mesh(3)
    with pytest.raises(ValueError, match="stacked must be True or False, got 3"):
        pmap_step(make_step(given, OPTIMIZER), stacked=3)
    whole = make_step(given, OPTIMIZER, axis_name=None)
    for step in (fsdp_step(whole, fsdp_mesh()), shard_map_step(make_step(given, OPTIMIZER), mesh(4))):
        with pytest.raises(ValueError, match=r"the number of devices of this process=4 must divide .* \(6, 3\)"):
            step.batch_to_device({"x1": BATCH["x1"][:6]})
        with pytest.raises(ValueError, match=r"the number of devices=4 must divide .* \(6, 3\)"):
            step(create_state(PARAMS, OPTIMIZER), jax.random.key(0), {"x1": BATCH["x1"][:6]})
    stacked = pmap_step(make_step(given, OPTIMIZER), stacked=True)
    with pytest.raises(ValueError, match=r"must be \[steps, 4, batch per device"):
        stacked(create_state(PARAMS, OPTIMIZER), jax.random.key(0), split_batch(BATCH, 2))
    with pytest.raises(ValueError, match="state must be a TrainState"):
        stacked({"w": 1}, jax.random.key(0), BATCH)


# ---- The state cut over devices.

WIDE = {"w1": RNG.normal(size=(3, 8192)).astype(np.float32), "w2": RNG.normal(size=(8192, 3)).astype(np.float32)}


def wide(kind):
    """A loss that draws its noise, parameters with leaves that are cut, and a batch."""
    if kind == "points":
        return drawn, WIDE, BATCH
    return *masks(8192, hidden=4), {"x1": np.arange(96, dtype=np.int32).reshape(16, 6)}


def train_wide(step, params=WIDE, batch=BATCH, num_steps=3):
    return train(step, batch, num_steps, params)


@functools.cache
def on_one(kind):
    """On one device, with the batch."""
    loss_fn, params, batch = wide(kind)
    return train_wide(jax.jit(make_step(loss_fn, OPTIMIZER, axis_name=None)), params, batch), batch


@pytest.mark.slow_but_one
@pytest.mark.parametrize("kind", ["points", "tokens"])
@pytest.mark.parametrize(("devices", "shards"), [(1, 1), (2, 2), (4, 4), (4, 2), (4, 1)])
def test_a_cut_state_draws_and_learns_the_same_on_any_number_of_devices(kind, devices, shards):
    (wanted, batch), (loss_fn, params, _) = on_one(kind), wide(kind)
    step = fsdp_step(make_step(loss_fn, OPTIMIZER, axis_name=None), fsdp_mesh(shards, jax.devices()[:devices]))
    state, metrics = train_wide(step, params, batch)
    for name, axis in (("w1", 1), ("w2", 0)) if kind == "points" else (("table", 0),):
        for leaf in (state.params[name], state.ema["0.9"][name], state.opt_state[1][0].mu[name]):
            held = leaf.addressable_shards[0].data.shape
            assert held[axis] == 8192 // shards, name
            assert held[1 - axis] == params[name].shape[1 - axis]
    found, wanted = jax.device_get((state, metrics)), jax.device_get(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-4, atol=2e-6), found, wanted)


def test_a_cut_step_donates_and_is_traced_once():
    traces = []

    def counted(params, key, batch):
        traces.append(1)
        return given(params, key, batch)

    step, key = fsdp_step(make_step(counted, OPTIMIZER, axis_name=None), fsdp_mesh()), jax.random.key(0)
    state, _ = step(create_state(WIDE, OPTIMIZER, (0.9,)), key, step.batch_to_device(BATCH))
    before, num = state, len(traces)
    for _ in range(2):
        state, metrics = step(state, key, step.batch_to_device(BATCH))
    assert len(traces) == num
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert metrics["loss"].shape == ()


# ---- Several steps in a call.

STACK = jax.tree.map(lambda x: np.stack([x, x[::-1], 0.5 * x, -x]), BATCH)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("kind", ["pmap", "shard_map", "fsdp"])
def test_a_stack_of_steps_has_the_bits_of_one_at_a_time(kind):
    def make(stacked):
        if kind == "fsdp":
            return fsdp_step(make_step(drawn, OPTIMIZER, axis_name=None), fsdp_mesh(), stacked=stacked)
        step = make_step(drawn, OPTIMIZER)
        return pmap_step(step, stacked=stacked) if kind == "pmap" else shard_map_step(step, mesh(4), stacked=stacked)

    one, key = make(False), jax.random.key(3)
    state = create_state(PARAMS, OPTIMIZER, (0.9,))
    for i in range(4):
        batch = jax.tree.map(lambda x: x[i], STACK)  # noqa: B023
        state, metrics = one(state, key, one.batch_to_device(batch))
    many = make(True)
    found = many(create_state(PARAMS, OPTIMIZER, (0.9,)), key, many.batch_to_device(STACK))
    jax.tree.map(np.testing.assert_array_equal, found, (state, metrics))


@pytest.mark.parametrize("make", [data_mesh, lambda devices: fsdp_mesh(1, devices)], ids=["data", "fsdp"])
@pytest.mark.parametrize("devices", [[], ["cpu"], 2, [*jax.devices()[:1]] * 2], ids=["none", "name", "number", "twice"])
def test_a_mesh_is_of_devices_each_once(make, devices):
    with pytest.raises(ValueError, match="devices must be a list of devices, each once"):
        make(devices)


def test_only_arrays_are_cut():
    with pytest.raises(ValueError, match=r"the leaf \"\['a'\]\" must be an array"):
        fsdp_sharding({"a": 3.0}, fsdp_mesh())


@pytest.mark.parametrize("make", ["pmap", "shard_map", "fsdp"])
def test_every_batch_is_checked_not_the_first_alone(make, key):
    step = {
        "pmap": lambda: pmap_step(make_step(given, OPTIMIZER)),
        "shard_map": lambda: shard_map_step(make_step(given, OPTIMIZER), data_mesh()),
        "fsdp": lambda: fsdp_step(make_step(given, OPTIMIZER, axis_name=None), fsdp_mesh()),
    }[make]()
    state, _ = step(create_state(PARAMS, OPTIMIZER), key, step.batch_to_device(BATCH))
    if make == "pmap":
        wrong = [split_batch(BATCH, 2), BATCH]
        message = r"the batch must be \[4, batch per device, ...\]"
    else:
        wrong = [jax.tree.map(lambda x: x[:15], BATCH)]
        message = "the number of devices=4 must divide the batch axis"
    for each in wrong:
        with pytest.raises(ValueError, match=message):
            step(state, key, each)
    step(state, key, step.batch_to_device(BATCH))


def test_a_mesh_of_all_devices_is_the_default():
    assert data_mesh().shape == {"data": jax.device_count()}
    assert fsdp_mesh().shape == {"data": 1, "fsdp": jax.device_count()}


def test_a_stack_must_hold_batches():
    with pytest.raises(ValueError, match="step must be a step"):
        scan_steps(3)


EIGHT = """
import jax, numpy as np, test_parallel as t
from fm_jax.train.parallel import fsdp_step, pmap_step, shard_map_step, split_batch
from fm_jax.train.sharding import data_mesh, fsdp_mesh, fsdp_sharding
from fm_jax.train.step import make_step
assert jax.device_count() == 8
per_device, whole = make_step(t.given, t.OPTIMIZER), make_step(t.given, t.OPTIMIZER, axis_name=None)
plain = jax.device_get(t.train(jax.jit(whole), t.BATCH))
for n in (1, 2, 4, 8):
    devices = jax.devices()[:n]
    for step, batch in (
        (pmap_step(per_device, devices), split_batch(t.BATCH, n)),
        (shard_map_step(per_device, data_mesh(devices)), t.BATCH),
        (fsdp_step(whole, fsdp_mesh(devices=devices)), t.BATCH),
    ):
        found = jax.device_get(t.train(step, batch))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-7), found, plain)
print("equal")
"""


@pytest.mark.slow
def test_one_two_four_and_eight_devices_are_equal_under_all_three():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", EIGHT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == "equal\n", done.stderr
