"""What is known stays, and what is independent of it does not notice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import samplers
from fm_jax.guidance import keep_known
from fm_jax.nfe import Counted
from fm_jax.oracles import mixture
from fm_jax.schedules import Cosine, Linear

X0, X1 = jax.random.normal(jax.random.key(0), (5, 4)), jax.random.normal(jax.random.key(1), (5, 4))
MASK = jnp.array([True, False, True, False])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_what_is_known_goes_its_own_way_and_the_rest_as_by_itself(schedule):
    # Independent coordinates: each velocity depends on its own alone.
    v = mixture.velocity(mixture.gaussian_mixture(np.zeros((1, 4)), 0.5), schedule)
    times = np.linspace(0.0, 1.0, 65)
    kept = samplers.sample(keep_known(v, schedule, X0, X1, MASK), X0, samplers.RungeKutta("rk4"), times=times).x
    alone = samplers.sample(v, X0, samplers.RungeKutta("rk4"), times=times).x
    np.testing.assert_allclose(kept[:, ::2], X1[:, ::2], atol=1e-5)
    np.testing.assert_array_equal(kept[:, 1::2], alone[:, 1::2])


def test_the_network_sees_the_known_part_in_its_place():
    seen = []
    keep_known(lambda t, x: seen.append(x) or x, Linear(), X0, X1, MASK)(jnp.full(5, 0.25), jnp.full((5, 4), 9.0))
    np.testing.assert_allclose(seen[0][:, ::2], (0.25 * X1 + 0.75 * X0)[:, ::2], rtol=1e-6)
    np.testing.assert_array_equal(seen[0][:, 1::2], 9.0)


def test_a_call_costs_what_one_of_the_velocity_does():
    kept = keep_known(Counted(lambda t, x: x, 2), Linear(), X0, X1, MASK)
    assert kept.nfe == 2
    assert kept(0.5, X0.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask": MASK.astype(jnp.float32)}, "mask must be bool"),
        ({"mask": jnp.ones(3, bool)}, r"broadcast to the state \(5, 4\)"),
        ({"mask": jnp.ones((2, 5, 4), bool)}, r"broadcast to the state \(5, 4\)"),
        ({"x0": X0[:2]}, "must have the same shape"),
        ({"v": 3}, "v must be a velocity function"),
    ],
    ids=["mask dtype", "mask shape", "mask axes", "x0", "v"],
)
def test_what_does_not_fit_is_refused(wrong, message):
    arguments = {"v": lambda t, x: x, "schedule": Linear(), "x0": X0, "x1": X1, "mask": MASK} | wrong
    with pytest.raises(ValueError, match=message):
        keep_known(**arguments)
