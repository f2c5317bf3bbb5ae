import itertools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

from fm_jax.couplings import ExactOT, minibatch_ot, paired
from fm_jax.couplings.costs import squared_euclidean
from fm_jax.data.coupled import CoupledBatches
from fm_jax.losses import flow_matching
from fm_jax.paths import AffinePath
from fm_jax.sources import Normal, Sampled, Uniform
from fm_jax.train import create_state, make_step
from fm_jax.types import Pairing

KEY = jax.random.key(3)


class Numbered:
    """Batches of four rows that name themselves, in a position that can be saved; optionally the end after `stop`."""

    def __init__(self, labels=False, x0=False, stop=10**9):
        self.position, self.labels, self.x0, self.stop = 0, labels, x0, stop

    def __iter__(self):
        return self

    def __next__(self):
        if self.position >= self.stop:
            raise StopIteration
        rng = np.random.default_rng(self.position)
        rows = np.arange(4, dtype=np.float32) + 4 * self.position
        self.position += 1
        batch = {"x1": np.stack([rows, rng.standard_normal(4).astype(np.float32)], axis=1)}
        if self.labels:
            batch["cond"] = (rows % 2).astype(np.int32)
        if self.x0:
            batch["x0"] = rng.standard_normal((4, 2)).astype(np.float32)
        return batch

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def take(batches, num):
    return list(itertools.islice(batches, num))


def rows(batches):
    return np.concatenate([batch["x1"][:, 0] for batch in batches])


@pytest.mark.parametrize("group", [1, 3])
def test_pairs_are_optimal_over_the_group_and_data_stay_in_place(group):
    batches = take(CoupledBatches(Numbered(x0=True), minibatch_ot, KEY, group=group), 2 * group)
    plain = take(Numbered(x0=True), 2 * group)
    np.testing.assert_array_equal(rows(batches), np.arange(8 * group))
    for block in range(2):
        span = slice(group * block, group * (block + 1))
        x0, x1, before = (
            np.concatenate([batch[name] for batch in source[span]])
            for source, name in ((batches, "x0"), (batches, "x1"), (plain, "x0"))
        )
        cost = squared_euclidean(before, x1)
        np.testing.assert_allclose(((x0 - x1) ** 2).sum(), cost[linear_sum_assignment(cost)].sum(), rtol=1e-4)
        np.testing.assert_array_equal(np.sort(x0, axis=0), np.sort(before, axis=0))  # a permutation


def test_classes_are_kept():
    data = Numbered(labels=True)
    batch = next(CoupledBatches(data, minibatch_ot, KEY, group=4))
    np.testing.assert_array_equal(batch["cond"], batch["x1"][:, 0] % 2)


def test_each_pair_is_used_as_often_as_asked_in_batches_of_another_order():
    batches = take(CoupledBatches(Numbered(), minibatch_ot, KEY, group=2, reuse=3), 36)
    for block in (batches[:18], batches[18:]):
        pairs = np.concatenate([np.stack([b["x1"][:, 0], b["x0"][:, 0]], axis=1) for b in block])
        unique, counts = np.unique(pairs, axis=0, return_counts=True)
        assert len(unique) == len(np.unique(unique[:, 0])) == 24  # six batches of four, always the same partner
        assert set(counts) == {3}
        in_order, *others = ([*rows(block[i : i + 6])] for i in range(0, 18, 6))
        assert in_order == sorted(in_order)
        assert all(len(set(other)) == 24 and other != in_order for other in others)


def test_a_function_of_key_and_position_alone():
    once, again = (take(CoupledBatches(Numbered(), minibatch_ot, KEY, reuse=2, ahead=a), 7) for a in (1, 5))
    other = take(CoupledBatches(Numbered(), minibatch_ot, jax.random.key(4), reuse=2), 7)
    for a, b, c in zip(once, again, other, strict=True):
        np.testing.assert_array_equal(a["x0"], b["x0"])
        assert (a["x0"] != c["x0"]).any()


@pytest.mark.parametrize("taken", [0, 1, 17, 18, 19])
def test_goes_on_from_a_saved_position(taken):
    """In the middle of a block, at its end, before the first; through JSON, in another object."""
    options = {"group": 2, "reuse": 3}
    whole = CoupledBatches(Numbered(), minibatch_ot, KEY, **options)
    take(whole, taken)
    state = json.loads(json.dumps(whole.get_state()))
    expected = take(whole, 9)
    resumed = CoupledBatches(Numbered(), minibatch_ot, KEY, **options)
    take(resumed, 2)
    resumed.set_state(state)
    for a, b in zip(expected, take(resumed, 9), strict=True):
        np.testing.assert_array_equal(a["x0"], b["x0"])
        np.testing.assert_array_equal(a["x1"], b["x1"])


def test_several_workers_make_the_same_batches():
    """Also where the first blocks take longest, up to the end of the data, and after a saved position."""
    waits = itertools.count(3, -1)

    def slow_first(key, x0, x1, cond=None):
        time.sleep(0.02 * max(next(waits), 0))
        return minibatch_ot(key, x0, x1, cond)

    options = {"group": 2, "reuse": 2}
    expected = list(CoupledBatches(Numbered(stop=21), minibatch_ot, KEY, **options))
    batches = CoupledBatches(Numbered(stop=21), slow_first, KEY, workers=3, ahead=4, **options)
    found = take(batches, 5)
    state = batches.get_state()
    found += list(batches)
    assert len(found) == len(expected) == 42
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a["x0"], b["x0"])
        np.testing.assert_array_equal(a["x1"], b["x1"])
    batches.set_state(state)
    np.testing.assert_array_equal(rows(batches), rows(expected[5:]))


def test_weights_and_drawn_sources_travel():
    def coupling(key, x0, x1, cond=None):
        return Pairing(x0, x1, cond, np.arange(len(x1)), weight=np.linspace(0, 2, len(x1)))

    batch = next(CoupledBatches(Numbered(), coupling, KEY, source=Sampled(lambda key, num: jnp.full((num, 2), 7.0))))
    np.testing.assert_array_equal(batch["x0"], 7.0)
    np.testing.assert_allclose(batch["weight"], np.linspace(0, 2, 4))


def test_default_source_is_standard_normal():
    """Mean and variance of 4,000 numbers within 4.5 standard errors: a false alarm in 1e5."""
    x0 = np.concatenate([b["x0"] for b in take(CoupledBatches(Numbered(), ExactOT(), KEY), 500)])
    assert abs(x0.mean()) < 4.5 / np.sqrt(x0.size)
    assert abs(x0.var() - 1) < 4.5 * np.sqrt(2 / x0.size)


@pytest.mark.parametrize("source", [Uniform(2.0, 3.0), Normal(100.0)], ids=str)
def test_another_source_is_drawn_in_the_shape_of_the_data_and_not_asked_where_they_bring_x0(source):
    drawn = next(CoupledBatches(Numbered(), paired, KEY, source=source))["x0"]
    assert drawn.shape == (4, 2)
    assert drawn.dtype == np.float32
    assert (np.abs(drawn) > 2).mean() > 0.9
    brought = next(CoupledBatches(Numbered(x0=True), paired, KEY, source=source))["x0"]
    np.testing.assert_array_equal(brought, next(Numbered(x0=True))["x0"])


def test_nothing_is_lost_at_the_end_of_the_data():
    batches = list(CoupledBatches(Numbered(stop=5), minibatch_ot, KEY, group=2))
    np.testing.assert_array_equal(rows(batches), np.arange(20))


def test_an_error_in_the_thread_is_raised_by_next():
    class Broken(Numbered):
        def __next__(self):
            batch = super().__next__()
            return batch | {"x1": np.full_like(batch["x1"], np.nan)} if self.position > 2 else batch

    batches = CoupledBatches(Broken(), minibatch_ot, KEY)
    take(batches, 2)
    with pytest.raises(ValueError, match="costs must be finite, got 16 of 16 that are not"):
        next(batches)
    with pytest.raises(ValueError, match=r"reuse must be at least 1, got 0\."):
        CoupledBatches(Numbered(), minibatch_ot, KEY, reuse=0)


def test_the_work_is_done_in_another_thread():
    threads = set()

    def coupling(key, x0, x1, cond=None):
        threads.add(threading.current_thread())
        return Pairing(x0, x1, cond, np.arange(len(x1)))

    take(CoupledBatches(Numbered(), coupling, KEY), 3)
    assert len(threads) == 1
    assert threading.main_thread() not in threads


def test_trains_like_the_coupling_inside_the_loss(key):
    """The same pairs whether they are made ahead or in the step: the same parameters after a step."""

    def network(params, t, x, cond, *, train, rngs):
        return x @ params

    ahead = flow_matching(network, AffinePath(), coupling=paired)
    inside = flow_matching(network, AffinePath(), coupling=minibatch_ot)
    batch = next(Numbered(x0=True))
    optimizer = optax.sgd(0.1)
    stepped = [
        jax.jit(make_step(loss, optimizer, axis_name=None))(create_state(jnp.eye(2), optimizer), key, each)[0].params
        for loss, each in ((ahead, next(CoupledBatches(Numbered(x0=True), minibatch_ot, KEY))), (inside, batch))
    ]
    np.testing.assert_allclose(*stepped, rtol=1e-6)


class NotIterable:
    """What `DataIterator` promises, and no more."""

    def __init__(self, stop=10**9):
        self._data = Numbered(stop=stop)
        self.get_state, self.set_state = self._data.get_state, self._data.set_state

    def __next__(self):
        return next(self._data)


def test_data_that_only_have_a_next_are_enough():
    batches, others = (CoupledBatches(data, minibatch_ot, KEY, group=2) for data in (NotIterable(), Numbered()))
    for one, other in zip(take(batches, 5), take(others, 5), strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    with pytest.raises(TypeError, match="not iterable"):
        iter(NotIterable())


@pytest.mark.parametrize("stop", [4, 5])
def test_the_end_is_a_position_too(stop):
    """A run that ends where the data do saves there, and goes on from there to no batch."""
    batches = CoupledBatches(Numbered(stop=stop), minibatch_ot, KEY, group=2)
    assert len(take(batches, 99)) == stop
    state = json.loads(json.dumps(batches.get_state()))
    assert state["data"] == {"position": stop}
    again = CoupledBatches(Numbered(stop=stop), minibatch_ot, KEY, group=2)
    again.set_state(state)
    assert take(again, 99) == []
    longer = CoupledBatches(Numbered(stop=stop + 1), minibatch_ot, KEY, group=2)
    longer.set_state(state)
    assert rows(take(longer, 99)).tolist() == [4.0 * stop + i for i in range(4)]


GOOD = {"x1": np.ones((4, 2), np.float32)}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"x0": GOOD["x1"]}], r"^the batch must hold 'x1', got \['x0'\]"),
        ([None], r"^the batch must be a dict with 'x1', got None"),
        ([{"x1": np.ones((4, 2), np.uint8)}], r"^x1 must be floating point, got uint8"),
        ([GOOD | {"cond": np.arange(3)}], r"^cond must be \[batch, ...\] with batch = 4, got shape \(3,\)"),
        ([GOOD, GOOD | {"cond": np.arange(4)}], r"^batches must hold the same entries of the same events, got "),
        ([GOOD, {"x1": np.ones((4, 3), np.float32)}], r"^batches must hold the same entries of the same events"),
        ([GOOD | {"name": "first"}], r"^'name' of a batch must be \[batch, ...\], as 'x1', got 'first'"),
    ],
)
def test_batches_that_cannot_be_coupled_are_refused_by_next(batches, message):
    with pytest.raises(ValueError, match=message):
        next(CoupledBatches(iter(batches * 4), minibatch_ot, KEY, group=2))


@pytest.mark.parametrize("state", [None, {"a": 1}, {"block": 0, "data": {}}])
def test_a_position_of_something_else(state):
    with pytest.raises(ValueError, match=r"^state must be a position, as get_state gives, got "):
        CoupledBatches(Numbered(), minibatch_ot, KEY).set_state(state)


def test_what_is_no_iterator():
    for data in ([GOOD], GOOD, None):
        with pytest.raises(ValueError, match=r"^data must be an iterator of batches, such as iter\(...\), got "):
            CoupledBatches(data, minibatch_ot, KEY)
