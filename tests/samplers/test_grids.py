import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.samplers.grids import check_state, time_dtype, time_grid, uniform

X = jnp.zeros((2, 3))


@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_uniform_is_equally_spaced_between_exact_ends(num_steps):
    times = np.asarray(uniform(num_steps, 0.1, 0.9))
    assert times.shape == (num_steps + 1,)
    assert times[0] == np.float32(0.1)
    assert times[-1] == np.float32(0.9)
    np.testing.assert_allclose(np.diff(times), 0.8 / num_steps, atol=2e-7)


def test_uniform_is_correctly_rounded():
    # A running sum of float32 steps would be off by many units in the last place after 1000 steps.
    np.testing.assert_array_equal(uniform(1000), (np.arange(1001) / 1000).astype(np.float32))


def test_backward_is_the_mirror_image():
    np.testing.assert_allclose(uniform(5, 1.0, 0.0), uniform(5)[::-1], atol=1e-7)


def test_grid_is_kept_in_the_dtype_of_the_state_but_at_least_float32():
    assert time_grid(10, None, 0.0, 1.0, X).dtype == jnp.float32
    assert time_dtype(X.astype(jnp.bfloat16)) == jnp.float32
    assert time_grid(1000, None, 0.0, 1.0, X.astype(jnp.bfloat16)).dtype == jnp.float32


def test_float64(x64):
    times = time_grid(3, None, 0.0, 1.0, jnp.zeros((1, 1)))
    assert times.dtype == jnp.float64
    np.testing.assert_array_equal(times, np.arange(4) / 3)


def test_a_traced_grid_passes_unchecked():
    traced = jax.jit(lambda grid: time_grid(None, grid, 0.0, 1.0, X))
    np.testing.assert_array_equal(traced(jnp.array([0.0, 0.25, 1.0])), [0.0, 0.25, 1.0])


BAD = [
    ({"num_steps": None, "grid": None}, "Exactly one of num_steps and grid must be given."),
    ({"num_steps": 2, "grid": [0.0, 1.0]}, "Exactly one of num_steps and grid must be given."),
    ({"num_steps": 0}, "num_steps must be at least 1, got 0."),
    ({"num_steps": -3}, "num_steps must be at least 1, got -3."),
    ({"num_steps": 2.0}, "num_steps must be an integer, got 2.0."),
    ({"num_steps": True}, "num_steps must be an integer, got True."),
    ({"num_steps": 2, "t1": 0.0}, "t0 and t1 must differ, both are 0.0."),
    ({"num_steps": 2, "t1": float("nan")}, "t0 and t1 must be finite, got 0.0 and nan."),
    ({"num_steps": 2, "t0": 1.0, "t1": 1.0 + 1e-9}, "grid must be finite and strictly monotone in float32"),
    ({"grid": [0.0]}, r"grid must be \[num_steps \+ 1\] with at least two times, got shape \(1,\)."),
    ({"grid": [[0.0, 1.0]]}, r"got shape \(1, 2\)."),
    ({"grid": [0.0, 0.5, 0.5, 1.0]}, "grid must be finite and strictly monotone"),
    ({"grid": [0.0, 0.7, 0.5, 1.0]}, "grid must be finite and strictly monotone"),
    ({"grid": [0.0, float("nan"), 1.0]}, "grid must be finite and strictly monotone"),
    ({"grid": [0.0, 0.5], "t1": 0.5}, "t0 and t1 go with num_steps"),
    ({"grid": [1.0, 0.0], "forward": True}, "Time must run forward, got a grid from 1.0 to 0.0."),
    ({"num_steps": 2, "t0": 1.0, "t1": 0.0, "forward": True}, "Time must run forward"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_grids_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        time_grid(**{"num_steps": None, "grid": None, "t0": 0.0, "t1": 1.0, "x": X, **options})


@pytest.mark.parametrize(
    ("x0", "message"),
    [
        (jnp.zeros((2, 2), dtype=int), "x0 must be floating point, got int32."),
        (jnp.float32(1.0), r"x0 must be \[batch, ...\], got a scalar."),
    ],
)
def test_bad_states_are_refused(x0, message):
    with pytest.raises(ValueError, match=message):
        check_state(x0)
