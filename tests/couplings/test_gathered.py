import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from fm_jax.couplings import ExactOT, independent
from fm_jax.couplings.gathered import Gathered
from fm_jax.couplings.partial import PartialOT
from fm_jax.losses import flow_matching
from fm_jax.paths import AffinePath
from fm_jax.train.parallel import pmap_step, shard_map_step, split_batch
from fm_jax.train.state import create_state
from fm_jax.train.step import make_step
from fm_jax.types import Pairing

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs four (simulated) devices")

RNG = np.random.default_rng(0)
X0, X1 = (RNG.normal(size=(32, 3)).astype(np.float32) for _ in range(2))
LABELS = RNG.integers(0, 2, 32).astype(np.int32)


def mesh():
    return Mesh(np.array(jax.devices()[:4]), ("data",))


def split(tree):
    return jax.tree.map(lambda x: x.reshape(4, x.shape[0] // 4, *x.shape[1:]), tree)


def in_pmap(coupling, *args):
    found = jax.pmap(coupling, axis_name="data")(*split(args))
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), found)


def in_shard_map(coupling, *args, check_vma=True):
    specs = PartitionSpec("data")
    mapped = jax.shard_map(coupling, mesh=mesh(), in_specs=specs, out_specs=specs, check_vma=check_vma)
    return jax.jit(mapped)(*args)


def unchecked(coupling, *args):
    return in_shard_map(coupling, *args, check_vma=False)


def shuffled(key, x0, x1, cond=None):
    """A coupling on the device, random, with weights."""
    index0 = jax.random.permutation(key, len(x1))
    weight = jax.random.uniform(key, (len(x1),))
    return Pairing(x0[index0], x1, cond, index0, weight / weight.mean())


@pytest.mark.slow_but_one
@pytest.mark.parametrize("run", [in_pmap, in_shard_map, unchecked], ids=["pmap", "shard_map", "unchecked"])
@pytest.mark.parametrize("coupling", [ExactOT(), PartialOT(0.7), independent], ids=["exact", "partial", "independent"])
def test_the_shares_are_the_coupling_of_the_union(run, coupling):
    found = run(lambda x0, x1, cond: Gathered(coupling)(None, x0, x1, cond), X0, X1, LABELS)
    jax.tree.map(np.testing.assert_array_equal, found, coupling(None, X0, X1, LABELS))


@pytest.mark.slow_but_one
@pytest.mark.parametrize("run", [in_pmap, in_shard_map], ids=["pmap", "shard_map"])
def test_all_devices_use_the_first_ones_key(run):
    keys = jax.random.split(jax.random.key(3), 4)
    call = lambda key, x0, x1: Gathered(shuffled)(key.reshape(()), x0, x1)  # noqa: E731
    expected = shuffled(keys[0], X0, X1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), run(call, keys, X0, X1), expected)


@pytest.mark.slow
def test_with_entropic_transport():
    pytest.importorskip("ott")
    from fm_jax.couplings.entropic import EntropicOT

    call = lambda key, x0, x1: Gathered(EntropicOT(0.5))(key.reshape(()), x0, x1)  # noqa: E731
    found = in_pmap(call, jax.random.split(jax.random.key(4), 4), X0, X1)
    np.testing.assert_array_equal(np.sort(found.index0), np.arange(32))
    np.testing.assert_array_equal(found.x0, X0[found.index0])
    np.testing.assert_array_equal(found.x1, X1)
    np.testing.assert_array_equal(found.weight, np.ones(32))
    exact = ExactOT()(None, X0, X1).x0
    assert np.square(found.x0 - X1).sum() < 1.4 * np.square(exact - X1).sum() < 0.6 * np.square(X0 - X1).sum()


def test_costs_less_than_pairing_on_each_device():
    cost = lambda pairing: np.square(pairing.x0 - pairing.x1).sum(-1).mean()  # noqa: E731
    whole = in_pmap(lambda x0, x1: Gathered(ExactOT())(None, x0, x1), X0, X1)
    each = in_pmap(lambda x0, x1: ExactOT()(None, x0, x1), X0, X1)
    assert cost(whole) < 0.8 * cost(each)


def test_large_batches_do_not_deadlock():
    """A callback's inputs are copied on XLA's threads, which the devices that wait occupy; see `call_host`."""
    x0, x1 = (RNG.normal(size=(512, 3)).astype(np.float32) for _ in range(2))
    call = lambda x0, x1: jax.lax.psum(Gathered(ExactOT())(None, x0, x1).x0, "data")  # noqa: E731
    expected = ExactOT()(None, x0, x1).x0.reshape(4, 128, 3).sum(0)
    for _ in range(3):
        np.testing.assert_allclose(in_pmap(call, x0, x1)[:128], expected, rtol=1e-4, atol=1e-5)


def apply_fn(params, t, x, cond, *, train, rngs):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("make", [pmap_step, lambda step: shard_map_step(step, mesh())], ids=["pmap", "shard_map"])
@pytest.mark.parametrize("coupling", [ExactOT(), PartialOT(0.7)], ids=["exact", "partial"])
def test_a_training_step_on_four_devices_equals_one_on_one(make, coupling):
    """Pairs and weights of the union, in the loss: the parameters after a few steps are those of one device."""
    params = {"w1": RNG.normal(size=(3, 8)).astype(np.float32), "w2": RNG.normal(size=(8, 3)).astype(np.float32)}
    batch = {"x0": X0, "x1": X1, "t": RNG.uniform(size=32).astype(np.float32), "cond": LABELS}
    optimizer, key = optax.adam(1e-2), jax.random.key(0)

    def train(step, batch):
        state = create_state(params, optimizer)
        for _ in range(3):
            state, metrics = step(state, key, batch)
        return state.params, metrics["loss"]

    one = jax.jit(make_step(flow_matching(apply_fn, AffinePath(), coupling=coupling), optimizer, axis_name=None))
    four = make(make_step(flow_matching(apply_fn, AffinePath(), coupling=Gathered(coupling)), optimizer))
    found = train(four, split_batch(batch, 4) if make is pmap_step else batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, train(one, batch))


def test_bad_input():
    with pytest.raises(ValueError, match="needs a device axis named 'data': run it under pmap_step"):
        Gathered(ExactOT())(None, X0, X1)
    with pytest.raises(ValueError, match="needs a device axis named 'model'"):
        in_pmap(lambda x0, x1: Gathered(ExactOT(), axis_name="model")(None, x0, x1), X0, X1)
    with pytest.raises(ValueError, match="the same batch"):
        in_pmap(lambda x0, x1: Gathered(ExactOT())(None, x0[:2], x1), X0, X1)
