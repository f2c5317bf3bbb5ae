import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import cnf
from fm_jax.data.toy import moons
from fm_jax.train.log import read_metrics


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    training = dataclasses.replace(cnf.CONFIG.training, run_dir=tmp_path / "run")
    results = cnf.run(dataclasses.replace(cnf.CONFIG, smoke=True, training=training))
    run_dir = tmp_path / "run-smoke"
    assert (run_dir / "density.png").stat().st_size > 0
    assert json.loads((run_dir / "results.json").read_text()) == results
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [2, 4]
    assert all(np.isfinite(row["loss"]) for row in rows)
    # The network is zero at first: a standard normal.
    x1 = moons(jax.random.split(jax.random.key(training.seed), 5)[4], 64)
    np.testing.assert_allclose(
        results["nll_untrained"], (0.5 * (x1**2).sum(axis=1) + np.log(2 * np.pi)).mean(), rtol=1e-4
    )
    assert "held-out points of moons" in capsys.readouterr().out


@pytest.mark.slow
def test_maximum_likelihood_reaches_the_entropy():
    """From N(0, 1) to N(2, 0.25) in 60 steps of a linear field: the loss ends within 0.05 nats of the entropy."""

    def apply_fn(params, t, x, cond, *, train, rngs):
        return params[0] * x + params[1]

    loss_fn, optimizer = cnf.negative_log_likelihood(apply_fn, 5), optax.adam(0.1)
    x1 = 2 + 0.5 * jax.random.normal(jax.random.key(0), (256, 1))
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.25)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            (loss, _), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, None, {"x1": x1})
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), length=60)

    (params, _), losses = train(jnp.zeros(2))
    assert losses[0] > entropy + 1
    assert abs(losses[-1] - entropy) < 0.05
    # x(1) = exp(a) x(0) + b (exp(a) - 1) / a
    scale = np.exp(params[0])
    np.testing.assert_allclose([scale, params[1] * (scale - 1) / params[0]], [x1.std(), x1.mean()], atol=0.1)


@pytest.mark.slow
def test_entropy_of_the_moons():
    """The number that the experiment is to approach, by quadrature over the two half circles."""
    x1 = np.asarray(moons(jax.random.key(0), 2000), dtype=float)
    angle = np.linspace(0, np.pi, 500)
    outer = np.stack([2 * np.cos(angle) - 1, 2 * np.sin(angle)], axis=1)
    centers = np.concatenate([outer, np.array([0, 1]) - outer])
    squares = np.concatenate([((part[:, None] - centers[None]) ** 2).sum(-1) for part in np.split(x1, 20)])
    density = np.exp(-squares / (2 * 0.1**2)).mean(axis=1) / (2 * np.pi * 0.1**2)
    np.testing.assert_allclose(-np.log(density).mean(), 1.67, atol=0.05)
