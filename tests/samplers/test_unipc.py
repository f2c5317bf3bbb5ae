import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exponential import end_to_end, field, orders, point_errors, single_and_double

from fm_jax.parameterization import convert
from fm_jax.samplers import DDIM, UniPC, sample
from fm_jax.schedules import DDPM, VE, VP, Linear

# The variants of order 3 differ in the start alone.
CASES = [(1, "bh1"), (2, "bh1"), (2, "bh2"), (3, "bh2")]
SAMPLERS = {case: lambda schedule, case=case: UniPC(schedule, *case) for case in CASES}


@pytest.fixture(scope="module")
def measured():
    with jax.enable_x64(True):
        return orders(SAMPLERS, ["linear"])


@pytest.mark.slow
@pytest.mark.parametrize("field", ["mixture", "guided"])
@pytest.mark.parametrize("case", CASES)
def test_the_order_is_one_more_than_that_of_the_predictor(measured, case, field):
    order = SAMPLERS[case](Linear()).order
    assert order == case[0] + 1
    np.testing.assert_allclose(measured[case, "linear", "slow start", field], order, atol=0.2)


@pytest.mark.parametrize("field", ["mixture", "guided"])
@pytest.mark.parametrize("case", CASES)
def test_the_start_limits_the_order_to_three_on_even_grids(measured, case, field):
    order = measured[case, "linear", "even", field]
    if case[0] < 3:
        np.testing.assert_allclose(order, case[0] + 1, atol=0.2)
    else:
        assert 2.8 < order < 4.2


@pytest.mark.slow
def test_exact_where_all_data_is_one_point(x64):
    assert point_errors([UniPC(Linear(), 1, "bh1"), UniPC(VE()), UniPC(DDPM(), 3)]).max() < 1e-9


@pytest.mark.slow
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
    solution = jax.jit(lambda x: sample(field, x, UniPC(schedule, 1, "bh2"), times=grid, trajectory=True))(x0)
    np.testing.assert_allclose(solution.trajectory, jnp.stack(states), rtol=1e-10)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.x)


@pytest.mark.slow
def test_from_end_to_end_and_back(x64):
    errors, (by_start, by_time) = end_to_end({"unipc": SAMPLERS[3, "bh2"]})["unipc"]
    assert errors[1] < 1e-3
    assert np.log2(errors[0] / errors[1]) > 1.5
    assert np.isfinite(by_start).all()
    assert np.isfinite(by_time)


def test_infinite_steps_are_ddim():
    @jax.jit
    def ends(grid, x0):
        return [sample(field, x0, sampler, times=grid).x for sampler in (UniPC(Linear(), 3), DDIM(Linear()))]

    for grid in ([0.0, 0.4, 1.0], [1.0, 0.4, 0.0]):
        np.testing.assert_allclose(*ends(jnp.array(grid), jnp.ones((1, 2))), rtol=1e-5)


@pytest.mark.slow
def test_single_precision_loses_little(x64):
    single, double = single_and_double({"unipc": SAMPLERS[3, "bh2"]})["unipc"]
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, atol=3e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 4}, "p must be from 1 to 3, got 4."),
        ({"p": "2"}, "p must be an integer, got '2'."),
        ({"variant": "vary"}, "variant must be one of 'bh1', 'bh2', got 'vary'."),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UniPC(Linear(), **options)
