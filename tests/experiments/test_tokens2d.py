"""Two tokens on a checkerboard: the table, how draws are counted, and a smoke run from data to picture."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import tokens2d
from fm_jax.models import init_params


def test_the_table_is_even_on_black_squares():
    table = tokens2d.checkerboard()
    assert np.count_nonzero(table) == 8192
    np.testing.assert_allclose(table[table > 0], 1 / 8192)
    assert [bool(table[at] > 0) for at in ((0, 0), (0, 32), (32, 32), (31, 127), (127, 127))] == [1, 0, 1, 0, 1]


def test_draws_are_counted_where_they_are_and_one_with_a_mask_nowhere():
    x = np.array([[0, 0], [0, 0], [127, 3], [128, 5], [5, 128]])
    found = tokens2d.counts(x)
    assert (found[0, 0], found[127, 3], found.sum()) == (2, 1, 3)
    table = np.zeros((128, 128))
    table[0, 0] = 1
    np.testing.assert_allclose(tokens2d.total_variation(found, 5, table), 0.5 * (0.6 + 0.2))


def test_the_network_sees_time_and_both_tokens():
    network = tokens2d.Network(5, 8, 2)
    params = init_params(network, jax.random.key(0), (2,))
    x = jnp.array([[0, 1], [0, 2], [3, 1]])
    logits = network.apply({"params": params}, jnp.zeros(3), x)
    assert logits.shape == (3, 2, 5)
    assert not np.allclose(logits[0], logits[1])
    assert not np.allclose(logits[0], logits[2])
    assert not np.allclose(logits, network.apply({"params": params}, jnp.full(3, 0.5), x))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_a_smoke_run(tmp_path, source):
    training = dataclasses.replace(tokens2d.CONFIG.training, run_dir=tmp_path / "run")
    results = tokens2d.run(dataclasses.replace(tokens2d.CONFIG, source=source, smoke=True, training=training))
    folder = tmp_path / "run-smoke"
    for name in (*tokens2d.PICTURES, "metrics.jsonl", "config.json", "checkpoints"):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "results.json").read_text()) == results
    assert 0 < results["total_variation_floor"] < results["total_variation"] <= 1
