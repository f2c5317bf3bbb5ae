"""Angles: the exact density, its entropy, how angles are drawn, the network, and a smoke run."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, norm

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import torus
from fm_jax.models import init_params

TICKS = np.linspace(-math.pi, math.pi, 2001)


@pytest.mark.parametrize("scale", [0.05, 0.2, 2.0, 30.0])
def test_the_density_is_a_sum_over_turns(scale):
    direct = sum(norm.pdf(TICKS + 2 * math.pi * k, scale=scale) for k in range(-200, 201))
    seen = direct > 1e-290
    np.testing.assert_allclose(
        torus.wrapped_log_density(TICKS[seen], scale), np.log(direct[seen]), rtol=1e-9, atol=1e-9
    )
    np.testing.assert_allclose(np.trapezoid(np.exp(torus.wrapped_log_density(TICKS, scale)), TICKS), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "wanted"), [(0.2, 0.5 * math.log(2 * math.pi * math.e * 0.04)), (30.0, math.log(2 * math.pi))]
)
def test_the_entropy_is_that_of_the_line_or_of_the_circle(scale, wanted):
    np.testing.assert_allclose(torus.wrapped_entropy(scale), wanted, rtol=1e-10)


def test_the_entropy_in_between_by_draws():
    x = torus.draw_angles(np.random.default_rng(0), (200_000,), 1.5)
    values = -torus.wrapped_log_density(x, 1.5)
    assert abs(values.mean() - torus.wrapped_entropy(1.5)) < 4 * values.std() / len(x) ** 0.5


def test_angles_are_drawn_within_a_turn():
    x = torus.draw_angles(np.random.default_rng(0), (5000, 2), 2.0)
    assert x.dtype == np.float32
    assert -3.1416 < x.min() < -3 < 3 < x.max() < 3.1416
    below = lambda x: sum(  # noqa: E731
        norm.cdf(x + 2 * math.pi * k, scale=2.0) - norm.cdf(-math.pi + 2 * math.pi * k, scale=2.0)
        for k in range(-9, 10)
    )
    assert kstest(x[:, 0], below).pvalue > 1e-3


@pytest.mark.slow
def test_the_network_is_one_on_both_sides_of_the_seam():
    network = torus.Network(8, 2)
    params = init_params(network, jax.random.key(0), (3,))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([leaf + 0.3 * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys)])
    x = jax.random.uniform(jax.random.key(2), (4, 3), minval=-3, maxval=3)
    v = network.apply({"params": params}, jnp.full(4, 0.3), x)
    np.testing.assert_allclose(network.apply({"params": params}, jnp.full(4, 0.3), x + 2 * math.pi), v, atol=1e-3)
    assert not np.allclose(network.apply({"params": params}, jnp.full(4, 0.6), x), v, atol=1e-2)
    # Each angle is told of the others.
    moved = network.apply({"params": params}, jnp.full(4, 0.3), x.at[:, 2].add(1.0))
    assert float(jnp.abs(moved - v)[:, 0].max()) > 1e-2


@pytest.mark.slow
def test_a_smoke_run(tmp_path, capsys):
    training = dataclasses.replace(torus.CONFIG.training, run_dir=tmp_path / "run")
    results = torus.run(dataclasses.replace(torus.CONFIG, smoke=True, training=training))
    run_dir = tmp_path / "run-smoke"
    for name in (*torus.PICTURES, "metrics.jsonl", "config.json", "checkpoints"):
        assert (run_dir / name).stat().st_size > 0, name
    assert json.loads((run_dir / "results.json").read_text()) == results
    # The network is zero at first: an even density.
    np.testing.assert_allclose(results["nll_per_dim"], results["uniform_per_dim"], atol=0.3)
    np.testing.assert_allclose(results["excess_per_dim"], results["nll_per_dim"] - results["entropy_per_dim"], atol=0.5)
    assert "a dimension" in capsys.readouterr().out
