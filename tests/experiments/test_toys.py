"""Batches of two-dimensional data: one at a time, many at once, and shared by processes."""

import functools
import importlib.metadata
import json
from typing import get_args

import jax
import numpy as np
import pytest

from experiments.lab.toys import Batches, Toy
from fm_jax.data.toy import TOYS, make_toy
from fm_jax.sources import Normal, Sampled

KEY = jax.random.key(3)
ONE = {"process_index": 0, "process_count": 1}


def _stacked(batches, num):
    drawn = [next(batches) for _ in range(num)]
    return {name: np.stack([batch[name] for batch in drawn]) for name in drawn[0]}


def _assert_equal(a, b):
    assert a.keys() == b.keys() == {"x0", "x1"}
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def test_every_toy_has_a_name_on_the_command_line():
    assert set(get_args(Toy)) == set(TOYS)


@pytest.fixture
def optimised(monkeypatch):
    """XLA's defaults in place of the tests' quick compilation: what it optimises decides how numbers are rounded."""
    options = {
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    }
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # the others do not know it
        options["xla_cpu_use_fusion_emitters"] = True
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "toy", ["eight_gaussians", *(pytest.param(toy, marks=pytest.mark.slow) for toy in get_args(Toy)[1:])]
)
def test_many_at_once_are_the_bits_of_one_at_a_time(toy):
    source = Normal() if toy == "moons" else Sampled(make_toy("pinwheel"))
    one_by_one, at_once = (Batches(KEY, source, toy, 67, **ONE) for _ in range(2))
    expected = _stacked(one_by_one, 12)
    assert expected["x0"].shape == expected["x1"].shape == (12, 67, 2)
    assert len(np.unique(expected["x1"][..., 0])) > 0.99 * 12 * 67  # fresh every time
    first, _, *_ = parts = [at_once.take(5), at_once.take(5), jax.tree.map(lambda x: x[None], next(at_once))]
    assert first["x1"].shape == (5, 67, 2)
    _assert_equal(
        {name: np.concatenate([part[name] for part in parts]) for name in first},
        {name: x[:11] for name, x in expected.items()},
    )
    assert at_once.get_state() == {"position": 11}


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    ("toy", "process_count"), [("eight_gaussians", 4), pytest.param("circles", 2, marks=pytest.mark.slow)]
)
def test_rows_of_all_processes_are_those_of_one(toy, process_count):
    """Wherever the others stopped: a position means the same on any number of processes."""
    one = Batches(KEY, Normal(), toy, 128, **ONE)
    next(one)
    state = json.loads(json.dumps(one.get_state()))
    expected = _stacked(one, 3)
    share = 128 // process_count
    for p in (0, process_count - 1):
        batches = Batches(KEY, Normal(), toy, share, process_index=p, process_count=process_count)
        batches.set_state(state)
        first, many = next(batches), batches.take(2)
        _assert_equal(
            {name: np.concatenate([first[name][None], many[name]]) for name in first},
            {name: x[:, p * share : (p + 1) * share] for name, x in expected.items()},
        )
        assert batches.get_state() == one.get_state()


def test_processes_default_to_jax(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    expected = Batches(KEY, Normal(), "moons", 4, process_index=1, process_count=2)
    _assert_equal(next(Batches(KEY, Normal(), "moons", 4)), next(expected))


def test_nothing_is_compiled_twice():
    traced = []

    def draw(key, num):
        traced.append(num)
        return jax.random.normal(key, (num, 2))

    batches = Batches(KEY, Sampled(draw), "checkerboard", 4, **ONE)
    for _ in range(3):
        next(batches), batches.take(2)
    batches.set_state({"position": 1_000_000})
    next(batches), batches.take(2)
    assert traced == [4, 4]


def test_bad_input_is_refused():
    batches = Batches(KEY, Normal(), "moons", 4, **ONE)
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        batches.take(0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Batches(KEY, Normal(), "moons", 0, **ONE)
    with pytest.raises(ValueError, match="process_index must be from 0 to 1, got 2"):
        Batches(KEY, Normal(), "moons", 4, process_index=2, process_count=2)
