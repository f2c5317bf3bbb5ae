"""What a solution costs: counted where it is known, `None` where it is not, and never half of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import nfe
from fm_jax.guidance import classifier_free, classifier_free_batched
from fm_jax.nfe import Counted, cost, total
from fm_jax.parameterization import bind, reschedule, score_fn, velocity_fn
from fm_jax.samplers import Adaptive, DPMSolver, EulerMaruyama, RungeKutta, sample
from fm_jax.schedules import Cosine, Linear

LINEAR, KEY, X = Linear(), jax.random.key(0), jnp.ones((3, 2))


def plain(t, x):
    return -x


def network(t, x, cond=None):
    return -x


def apply_fn(params, t, x, cond, *, train, rngs):
    return -x


ONE = Counted(plain, 1)
GUIDED = classifier_free(ONE, ONE, 2.0)


@pytest.mark.parametrize(
    ("v", "expected"),
    [
        (plain, None),
        (ONE, 1),
        (Counted(plain, 7), 7),
        (Counted(plain, None), None),
        (velocity_fn(network, "velocity", LINEAR), None),
        (velocity_fn(bind(apply_fn, None), "velocity", LINEAR), 1),
        (velocity_fn(lambda t, x, cond: GUIDED(t, x), "velocity", LINEAR), None),
        (velocity_fn(Counted(network, 3), "data", LINEAR), 3),
        (bind(Counted(apply_fn, 2), None), 2),
        (score_fn(ONE, LINEAR), 1),
        (score_fn(plain, LINEAR), None),
        (reschedule(GUIDED, LINEAR, Cosine()), 2),
        (GUIDED, 2),
        (classifier_free(GUIDED, ONE, 2.0), 3),
        (classifier_free(ONE, plain, 2.0), None),
        (classifier_free(plain, ONE, 2.0), None),
        (classifier_free_batched(network, "velocity", LINEAR, jnp.zeros(3), 1, 2.0), None),
        (classifier_free_batched(bind(apply_fn, None), "velocity", LINEAR, jnp.zeros(3), 1, 2.0), 2),
        (lambda t, x: GUIDED(t, x), None),
        (functools.partial(GUIDED), None),
        (jax.jit(lambda t, x: GUIDED(t, x)), None),
    ],
)
def test_cost_is_carried_or_unknown(v, expected):
    assert cost(v) == expected
    solution = sample(v, X, RungeKutta("heun"), times=3)
    assert int(solution.calls) == 6
    assert solution.nfe is None if expected is None else int(solution.nfe) == 6 * expected


def test_costs_add_up_and_an_unknown_one_makes_the_sum_unknown():
    assert total() == 0
    assert total(1, 2, 3) == 6
    assert total(1, None, 3) is None


def test_spent_is_that_of_each_function():
    calls, evaluations = nfe.spent(5, ONE, GUIDED)
    assert (int(calls), int(evaluations)) == (10, 15)
    calls, evaluations = nfe.spent(jnp.array([1, 4]), ONE, plain)
    np.testing.assert_array_equal(calls, [2, 8])
    assert evaluations is None


def test_a_counted_function_is_that_function():
    v = Counted(lambda t, x, *, twice=False: (1 + twice) * x, 1)
    assert v(0.0, 3.0) == 3.0
    assert v(0.0, 3.0, twice=True) == 6.0
    assert Counted(plain, 1) == ONE
    assert hash(Counted(plain, 1)) == hash(ONE)
    assert jax.jit(ONE)(0.0, 2.0) == -2.0


def test_counts_come_out_of_jit_and_vmap():
    """A count that the times decide, and one that is the same for all."""
    solve = jax.jit(lambda times: sample(GUIDED, X, DPMSolver(LINEAR), times=times)._replace(x=None))
    inside, infinite = (solve(jnp.asarray(times)) for times in ([0.1, 0.5, 0.9], [0.0, 0.5, 1.0]))
    assert (int(inside.calls), int(inside.nfe)) == (4, 8)
    assert (int(infinite.calls), int(infinite.nfe)) == (2, 4)
    each = jax.vmap(lambda x: sample(GUIDED, x, times=3))(jnp.ones((4, 3, 2)))
    np.testing.assert_array_equal(each.nfe, np.full(4, 12))


def test_each_example_has_its_own_count_under_its_own_steps():
    rates = jnp.array([0.1, 1.0, 20.0])
    v = Counted(lambda t, x: rates[:, None] * jnp.cos(rates * t)[:, None] * x, 2)
    solution = jax.jit(lambda x: sample(v, x, Adaptive("bosh3", 1e-4, 1e-4, per_sample=True)))(X)
    assert solution.calls.shape == (3,)
    assert len(set(solution.calls.tolist())) > 1
    np.testing.assert_array_equal(solution.nfe, 2 * solution.calls)


@pytest.mark.parametrize(
    ("v", "score", "expected"),
    [(ONE, score_fn(ONE, LINEAR), 8), (GUIDED, score_fn(ONE, LINEAR), 12), (GUIDED, plain, None), (plain, ONE, None)],
)
def test_an_sde_pays_for_its_score_too(v, score, expected):
    solution = sample(v, X, EulerMaruyama(diffusion=1.0, score=score), times=4, key=KEY)
    assert int(solution.calls) == 8
    assert solution.nfe is None if expected is None else int(solution.nfe) == expected


def test_a_score_from_the_schedule_costs_nothing():
    assert int(sample(GUIDED, X, EulerMaruyama(LINEAR), times=4, key=KEY).nfe) == 8
