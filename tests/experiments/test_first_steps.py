"""The first steps of a training, whose times may lean towards noise more than later ones."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from experiments import coloured_mnist
from experiments.lab import images
from experiments.lab.method import Method, check_first_steps, couple_ahead
from experiments.lab.smoke import smoke
from fm_jax.sources import Normal

KEY = jax.random.key(5)
NUM, FIRST = 2048, 3
METHOD = Method(times="logit_normal", time_shift=2.0, first_steps=FIRST, first_shift=8.0)


class Numbers:
    """Batches of numbers that count up, a share of so many."""

    def __init__(self, index=0, count=1):
        self.index, self.size, self.position = index, NUM // count, 0

    def __next__(self):
        self.position += 1
        return {"x1": np.full((self.size, 1), self.position, np.float32)}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def batches(method=METHOD):
    return couple_ahead(method, Numbers, KEY, Normal())


def median_shift(t):
    """s of a logit-normal time shifted by s."""
    return float(np.exp(-np.median(np.log(t / (1 - t)))))


@pytest.mark.parametrize("coupling", ["independent", "minibatch_ot"])
def test_the_first_steps_have_the_first_shift_and_the_others_have_theirs(coupling):
    method = dataclasses.replace(METHOD, coupling=coupling)
    data = batches(method) if coupling == "independent" else couple_ahead(method, lambda *_: Few(), KEY, Normal())
    drawn = [next(data) for _ in range(6)]
    times = [batch["t"] for batch in drawn]
    assert {(t.shape, t.dtype) for t in times} == {(drawn[0]["x1"].shape[:1], np.dtype(np.float32))}
    assert not np.array_equal(times[0], times[1])
    for wanted, several in ((8.0, times[:FIRST]), (2.0, times[FIRST:])):
        found = median_shift(np.concatenate(several))
        assert found == pytest.approx(wanted, rel=0.08 if coupling == "independent" else 0.5)


class Few(Numbers):
    """Few enough to be paired in no time."""

    def __init__(self):
        super().__init__(count=NUM // 64)


def test_without_first_steps_the_loss_draws_the_times():
    assert "t" not in next(batches(Method()))


def test_they_go_on_where_they_were():
    data, again = batches(), batches()
    next(data)
    state = json.loads(json.dumps(data.get_state()))
    expected = [next(data) for _ in range(4)]
    for _ in range(5):
        next(again)
    again.set_state(state)
    for wanted in expected:
        found = next(again)
        np.testing.assert_array_equal(found["t"], wanted["t"])
        np.testing.assert_array_equal(found["x1"], wanted["x1"])


def test_processes_have_the_rows_of_the_whole_batch(monkeypatch):
    whole = [next(data)["t"] for data in [batches()] for _ in range(FIRST + 1)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        data = batches()
        shares.append([next(data)["t"] for _ in range(FIRST + 1)])
    for wanted, *parts in zip(whole, *shares, strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), wanted)


def test_a_shift_without_first_steps_has_no_effect():
    assert [name for name, _ in Method().unused()][-1] == "method.first_shift"
    assert "method.first_shift" not in [name for name, _ in METHOD.unused()]


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_times_stay_where_the_target_is_finite(prediction):
    method = Method(times="uniform", prediction=prediction, first_steps=1, first_shift=50.0)
    low, high = method.time_sampler.domain
    t = next(batches(method))["t"]
    assert low <= t.min()
    assert t.max() <= high


@pytest.mark.parametrize("name", ["toy2d", "digits", "text_to_image", "text_to_video"])
def test_first_steps_are_not_all_steps(name, tmp_path):
    module = importlib.import_module(f"experiments.{name}")
    training = dataclasses.replace(
        module.CONFIG.training, total_steps=30, warmup_steps=0, decay="cosine", run_dir=tmp_path / "run"
    )
    method = dataclasses.replace(module.CONFIG.method, first_steps=30)
    run = getattr(module, "run", images.run)
    with pytest.raises(ValueError, match="--first-steps must be below --total-steps 30, got 30: the steps after them"):
        run(dataclasses.replace(module.CONFIG, training=training, method=method))
    assert not (tmp_path / "run").exists()
    check_first_steps(dataclasses.replace(method, first_steps=29), training)
    check_first_steps(method, dataclasses.replace(training, decay="constant"))  # a part of a longer run


def test_a_smoke_run_has_steps_of_both_kinds(tmp_path):
    training = dataclasses.replace(coloured_mnist.CONFIG.training, run_dir=tmp_path / "run")
    config = smoke(dataclasses.replace(coloured_mnist.CONFIG, smoke=True, training=training))
    assert 0 < config.method.first_steps < config.training.total_steps
