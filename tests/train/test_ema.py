import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax.train.ema import update_ema
from fm_jax.train.state import create_state


def run(decay, values, **options):
    update = jax.jit(lambda ema, p, step: update_ema(ema, p, step, **options))
    ema = {str(decay): {"w": jnp.zeros((2,))}}
    for step, value in enumerate(values):
        ema = update(ema, {"w": jnp.full((2,), value)}, jnp.int32(step))
    return np.asarray(ema[str(decay)]["w"])


def test_without_warmup_is_the_geometric_sum():
    values = np.linspace(-1.0, 2.0, 30)
    weights = (1 - 0.9) * 0.9 ** np.arange(29, -1, -1)
    np.testing.assert_allclose(run(0.9, values, warmup=False), np.full(2, weights @ values), rtol=1e-6)


def test_constant_parameters_leave_one_minus_the_product_of_decays():
    # From 0 towards 1: 1 - prod decay_t, with prod_{t<n} (1+t)/(10+t) = n! 9! / (n+9)!.
    n = 20
    product = np.prod([(1 + t) / (10 + t) for t in range(n)])
    np.testing.assert_allclose(run(0.999, np.ones(n)), np.full(2, 1 - product), rtol=1e-6)
    # (1+t)/(10+t) passes 0.5 at t = 8, after which the decay is constant.
    product = np.prod([min(0.5, (1 + t) / (10 + t)) for t in range(n)])
    np.testing.assert_allclose(run(0.5, np.ones(n)), np.full(2, 1 - product), rtol=1e-6)


def test_several_at_once_and_fixed_point():
    params = {"w": jnp.arange(3.0)}
    ema = {"0.9": params, "0.99": {"w": jnp.zeros(3)}}
    new = update_ema(ema, params, jnp.int32(10_000))
    np.testing.assert_array_equal(new["0.9"]["w"], params["w"])
    np.testing.assert_allclose(new["0.99"]["w"], 0.01 * params["w"], rtol=1e-5)


def test_half_precision_parameters_are_averaged_in_single():
    state = create_state({"w": jnp.ones(2, jnp.bfloat16)}, optax.sgd(0.1), (0.9999,))
    assert state.params["w"].dtype == jnp.bfloat16
    assert state.ema["0.9999"]["w"].dtype == jnp.float32
    ema = update_ema(state.ema, {"w": jnp.full(2, 2.0, jnp.bfloat16)}, jnp.int32(10**6), warmup=False)
    np.testing.assert_allclose(ema["0.9999"]["w"], np.full(2, 1.0001), rtol=1e-6)


def test_state_owns_its_memory():
    params = {"w": jnp.ones(3)}
    state = create_state(params, optax.adam(0.1), (0.9, 0.99))
    leaves = jax.tree.leaves((params, state))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(pointers)) == len(pointers)
    jax.jit(lambda s: s, donate_argnums=0)(state)
    assert not params["w"].is_deleted()


@pytest.mark.parametrize(
    ("decays", "message"),
    [
        ((1.0,), r"ema_decays\[0\] must be in \(0, 1\), got 1.0"),
        ((0.9, 0.0), r"ema_decays\[1\] must be in \(0, 1\), got 0.0"),
        ((float("nan"),), r"ema_decays\[0\] must be in \(0, 1\), got nan"),
        ((0.9, 0.9), r"distinct, got \(0.9, 0.9\)"),
    ],
)
def test_bad_decays(decays, message):
    with pytest.raises(ValueError, match=message):
        create_state({"w": jnp.ones(2)}, optax.sgd(0.1), decays)
