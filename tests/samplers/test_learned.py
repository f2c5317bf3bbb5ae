import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.nfe import Counted
from fm_jax.samplers import RungeKutta, learned, sample
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import Linear
from fm_jax.train.learned import fit_solver

MIXTURE = oracles.gaussian_mixture(np.array([[-1.0, 0.0], [1.0, 0.5]]), np.array([0.3, 0.5]), np.array([0.3, 0.7]))


def v(t, x):
    return oracles.velocity(MIXTURE, Linear())(t, x)


@pytest.mark.slow
@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (0.9, 0.1)])
def test_starts_as_the_method_it_is_made_from(t0, t1):
    x0 = jax.random.normal(jax.random.key(0), (8, 2))

    @jax.jit
    def both(x0):
        out = []
        for method, num_steps in [("euler", 5), ("midpoint", 3), ("ralston", 2), ("heun3", 2)]:
            solver = learned.from_method(method, num_steps, t0, t1)
            ours = sample(Counted(v, 2), x0, solver, trajectory=True)
            out.append((ours, sample(v, x0, RungeKutta(method), times=uniform(num_steps, t0, t1))))
        return out

    for ours, theirs in both(x0):
        np.testing.assert_allclose(ours.x, theirs.x, atol=2e-6)
        assert int(ours.calls) == int(theirs.calls) == int(ours.nfe) / 2
        assert theirs.nfe is None
        assert len(ours.trajectory) == int(ours.calls) + 1
        np.testing.assert_array_equal(ours.trajectory[0], x0)
        np.testing.assert_array_equal(ours.trajectory[-1], ours.x)


def test_number_of_parameters():
    """n (n + 5) / 2: times, a and the lower triangle of b."""
    n = 7
    solver = learned.from_method("euler", n)

    def end(solver):
        return sample(lambda t, x: jnp.cos(t) * x + t**2, jnp.ones((2, 2)), solver).x.sum()

    gradient = jax.jit(jax.grad(end))(solver)
    used = sum(int((jnp.abs(g) > 0).sum()) for g in jax.tree.leaves(gradient))
    # Softmax has one number too many, and the times do not depend on the ends.
    assert used == n * (n + 5) // 2
    np.testing.assert_array_equal(gradient.ends, 0)


def test_times_stay_in_order_whatever_the_numbers():
    log_steps = jnp.array([3.0, -2.0, 0.0, 1.0, -4.0, 2.0])
    solver = dataclasses.replace(learned.from_method("euler", 6, 0.1, 0.8), log_steps=log_steps)
    times = np.asarray(solver.own_times)
    np.testing.assert_allclose(times[[0, -1]], [0.1, 0.8], rtol=1e-6)
    assert (np.diff(times) > 0).all()


@pytest.fixture(scope="module")
def pairs():
    x0 = jax.random.normal(jax.random.key(1), (1024, 2))
    x1 = jax.jit(lambda x0: sample(v, x0, RungeKutta("rk4"), times=100).x)(x0)
    return x0, x1


@pytest.mark.slow
def test_training_beats_the_method_it_starts_from_on_new_points(pairs):
    """Four evaluations, fitted on one half of the pairs, as `make_pairs` gives them, and judged on the other."""
    x0, x1 = pairs
    start, fitted = learned.from_method("midpoint", 2), (np.asarray(x0[:512]), np.asarray(x1[:512]))
    solver, losses = fit_solver(lambda _: v, start, jax.random.key(2), *fitted, num_iterations=300, learning_rate=1e-2)
    chex.assert_shape(losses, (300,))
    judge = jax.jit(lambda s: learned.loss(v, s, x0[512:], x1[512:]))
    gain = float(learned.decibels(judge(solver)) - learned.decibels(judge(start)))
    assert gain > 6  # half the root mean square error
    np.testing.assert_allclose(judge(start), losses[0], atol=0.5)


def test_loss_in_decibels():
    """A constant error e is 20 log10(peak / e) dB."""
    x0 = jnp.zeros((3, 4))
    value = learned.loss(lambda t, x: 0 * x, learned.from_method("euler", 1), x0, x0 + 0.02)
    np.testing.assert_allclose(learned.decibels(value, peak=2.0), 40, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learned.from_method("rk5", 2), "method must be one of 'euler'"),
        (lambda: learned.from_method("heun", 2), "The stages of the method must come one after the other"),
        (lambda: learned.from_method("euler", 0), "num_steps must be at least 1, got 0."),
        (
            lambda: sample(v, jnp.ones((2, 2)), learned.from_method("euler", 2), times=2),
            r"times must be None: LearnedSolver\(.*\) has its own, got 2.",
        ),
        (
            lambda: fit_solver(
                lambda _: v,
                learned.from_method("euler", 2),
                jax.random.key(0),
                *[jnp.ones((2, 2))] * 2,
                batch_size=2,
                num_iterations=0,
            ),
            "num_iterations must be at least 1, got 0.",
        ),
        (
            lambda: fit_solver(
                lambda _: v, learned.from_method("euler", 2), jax.random.key(0), jnp.ones((2, 2)), jnp.ones((3, 2))
            ),
            r"x0 and x1 must have the same shape, got \(2, 2\) and \(3, 2\).",
        ),
        (
            lambda: fit_solver(
                lambda _: v, learned.from_method("euler", 2), jax.random.key(0), jnp.ones((2, 2)), jnp.ones((2, 2))
            ),
            "batch_size must be from 1 to 2, got 64.",
        ),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
