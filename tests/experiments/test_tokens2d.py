"""Two tokens on a checkerboard: the table, how draws are counted, and a smoke run from data to picture."""

import dataclasses
import itertools
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


def test_draws_are_counted_where_they_are():
    found = tokens2d.counts(jnp.array([[0, 0], [0, 0], [127, 3], [3, 127]]))
    assert (found[0, 0], found[127, 3], found[3, 127], found.sum()) == (2, 1, 1, 4)
    table = np.zeros((128, 128))
    table[0, 0] = 1
    np.testing.assert_allclose(tokens2d.total_variation(found, 4, table), 0.5 * (0.5 + 0.5))


@pytest.mark.parametrize(("x", "got"), [([[0, 0], [128, 5]], "from 0 to 128"), ([[0, -1], [2, 5]], "from -1 to 5")])
def test_a_draw_that_is_no_place_is_no_number(x, got):
    with pytest.raises(ValueError, match=f"the points drawn must be tokens from 0 to 127, got some {got}"):
        tokens2d.counts(np.array(x))


def exact(kappa):
    """The law of each token of the data given both at kappa, from even noise: [128, 128, 2, 128], by Bayes' rule."""
    table, here = tokens2d.checkerboard(), (1 - kappa) / 128 + kappa * np.eye(128)
    first, second = here[:, None] * (here @ table.T)[None], here[None] * (here @ table)[:, None]
    found = np.stack([first, second], axis=2)
    return found / found.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("name", "wanted"), [("ours", 0.03456), ("even", 0.1687)])
def test_steps_that_are_short_at_the_end(name, wanted):
    """The total variation of 8 steps with the exact posterior, by pushing the law of both tokens through each."""
    kappa = np.asarray(tokens2d.times(8) if name == "ours" else np.linspace(0, 1, 9), np.float64) ** 2
    law = np.full((128, 128), 1 / 128**2)
    for now, then in itertools.pairwise(kappa):
        stay = (1 - then) / (1 - now)
        step = (1 - stay) * exact(now)
        step[np.arange(128), :, 0, np.arange(128)] += stay
        step[:, np.arange(128), 1, np.arange(128)] += stay
        law = (law[..., None] * step[:, :, 0]).reshape(-1, 128).T @ step[:, :, 1].reshape(-1, 128)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-4)
    np.testing.assert_allclose(tokens2d.total_variation(law, 1, tokens2d.checkerboard()), wanted, rtol=0.02)


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
