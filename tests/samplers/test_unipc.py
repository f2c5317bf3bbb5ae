import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exponential import calls_and_nfe, end_to_end, field, orders, point_errors, traces

from fm_jax.guidance import classifier_free
from fm_jax.parameterization import convert
from fm_jax.samplers.ddim import sample_ddim
from fm_jax.samplers.unipc import sample_unipc
from fm_jax.schedules import DDPM, VE, VP, Linear

# The variants of order 3 differ in the start alone.
CASES = [(1, "bh1"), (2, "bh1"), (2, "bh2"), (3, "bh2")]
SAMPLERS = {case: functools.partial(sample_unipc, order=case[0], variant=case[1]) for case in CASES}


@pytest.fixture(scope="module")
def measured():
    with jax.enable_x64(True):
        return orders(SAMPLERS, ["linear"])


@pytest.mark.parametrize("field", ["mixture", "guided"])
@pytest.mark.parametrize("case", CASES)
def test_the_order_is_one_more_than_that_of_the_predictor(measured, case, field):
    np.testing.assert_allclose(measured[case, "linear", "slow start", field], case[0] + 1, atol=0.2)


@pytest.mark.parametrize("field", ["mixture", "guided"])
@pytest.mark.parametrize("case", CASES)
def test_the_start_limits_the_order_to_three_on_even_grids(measured, case, field):
    order = measured[case, "linear", "even", field]
    if case[0] < 3:
        np.testing.assert_allclose(order, case[0] + 1, atol=0.2)
    else:
        assert 2.8 < order < 4.2


def test_exact_where_all_data_is_one_point(x64):
    cases = [(SAMPLERS[1, "bh1"], Linear()), (SAMPLERS[2, "bh2"], VE()), (SAMPLERS[3, "bh2"], DDPM())]
    assert point_errors(cases).max() < 1e-9


def test_steps_are_those_of_the_paper(x64):
    """UniPC-1, bh2, written out for three steps: predict, evaluate, correct by half the change of the data, go on."""
    schedule, grid = VP(), np.array([0.3, 0.4, 0.55, 0.6])
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    x = x0 = jax.random.normal(jax.random.key(0), (4, 2), dtype=float)

    @jax.jit
    def data_at(t, x):
        return convert("velocity", field(t, x), t, x, schedule).data

    before, states = data_at(grid[0], x), [x0]
    for i in range(3):
        weight = alpha[i + 1] - alpha[i] * sigma[i + 1] / sigma[i]  # alpha_n (1 - e^-h)
        predicted = sigma[i + 1] / sigma[i] * x + weight * before
        after = data_at(grid[i + 1], predicted)
        x, before = predicted + weight / 2 * (after - before), after
        states.append(predicted)
    sample = functools.partial(
        sample_unipc, field, order=1, variant="bh2", schedule=schedule, grid=grid, trajectory=True
    )
    solution = jax.jit(sample)(x0)
    np.testing.assert_allclose(solution.trajectory, jnp.stack(states), rtol=1e-10)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.x)


def test_from_end_to_end_and_back(x64):
    errors, (by_start, by_time) = end_to_end({"unipc": SAMPLERS[3, "bh2"]})["unipc"]
    assert errors[1] < 1e-3
    assert np.log2(errors[0] / errors[1]) > 1.5
    assert np.isfinite(by_start).all()
    assert np.isfinite(by_time)


def test_infinite_steps_are_ddim():
    @jax.jit
    def ends(grid, x0):
        return [sampler(field, x0, schedule=Linear(), grid=grid).x for sampler in (SAMPLERS[3, "bh2"], sample_ddim)]

    for grid in ([0.0, 0.4, 1.0], [1.0, 0.4, 0.0]):
        np.testing.assert_allclose(*ends(jnp.array(grid), jnp.ones((1, 2))), rtol=1e-5)


def test_nfe_counts_the_calls_that_happen():
    assert calls_and_nfe(SAMPLERS[3, "bh2"], np.linspace(0, 1, 6)) == [(5, 5)]
    guided = classifier_free(lambda t, x: x, lambda t, x: -x, 2.0)
    assert int(sample_unipc(guided, jnp.ones((1, 1)), schedule=Linear(), num_steps=5).nfe) == 10


def test_traced_once():
    assert traces(sample_unipc) == ["trace", "v"]


def test_single_precision_loses_little(x64):
    x0 = jax.random.normal(jax.random.key(3), (4, 2), dtype=jnp.float32)
    sample = functools.partial(SAMPLERS[3, "bh2"], field, schedule=Linear(), num_steps=200)
    single, double = jax.jit(lambda: [sample(x).x for x in (x0, x0.astype(float))])()
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, atol=3e-5)


BAD = [
    ({"num_steps": 0}, "num_steps must be at least 1, got 0."),
    ({"grid": [0.0, 0.5, 0.2], "num_steps": None}, "grid must be finite and strictly monotone"),
    ({"order": 4}, "order must be 1, 2 or 3, got 4."),
    ({"variant": "vary"}, "variant must be one of 'bh1', 'bh2', got 'vary'."),
    ({"x0": jnp.ones((2, 2), dtype=int)}, "x0 must be floating point, got int32."),
    ({"v": lambda t, x: x[:, :1]}, "value and x_t must have the same shape"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    options = {"v": lambda t, x: x, "x0": jnp.ones((2, 2)), "schedule": Linear(), "num_steps": 3, **options}
    with pytest.raises(ValueError, match=message):
        sample_unipc(**options)
