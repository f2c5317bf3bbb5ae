import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.shapes import batch_time, expand_time, mean_over_event, time_dtype


def test_time_of_length_batch_never_meets_the_event_axis():
    """With batch == d, a careless `t * x` would silently broadcast along the wrong axis."""
    t, x = jnp.array([1.0, 2.0, 3.0]), jnp.ones((3, 3))
    np.testing.assert_array_equal(expand_time(t, x) * x, [[1, 1, 1], [2, 2, 2], [3, 3, 3]])


@pytest.mark.parametrize("shape", [(4,), (4, 2), (4, 8, 8, 3)])
def test_ranks(shape):
    x = jnp.ones(shape)
    assert expand_time(jnp.ones(4), x).ndim == len(shape)
    assert expand_time(0.5, x).ndim == 0
    assert batch_time(0.5, x).shape == (4,)
    assert mean_over_event(x).shape == (4,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "uint8"])
def test_times_beside_a_state_are_float32(dtype):
    """In bfloat16 there are 128 times in [0.5, 1)."""
    assert time_dtype(jnp.ones((2, 1), dtype)) == jnp.float32
    t = batch_time(jnp.asarray(0.999), jnp.ones((2, 1), dtype))
    assert t.dtype == jnp.float32
    np.testing.assert_array_equal(t, np.float32([0.999, 0.999]))


def test_times_beside_a_double_state_are_double(x64):
    assert batch_time(0.1, jnp.ones((2, 1))).dtype == jnp.float64
    assert batch_time(0.1, jnp.ones((2, 1), jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("t_shape", [(3,), (4, 1), (1,)])
def test_wrong_time(t_shape):
    with pytest.raises(ValueError, match=r"t must be a scalar or \[batch\] = \(4,\)"):
        expand_time(jnp.zeros(t_shape), jnp.zeros((4, 2)))
