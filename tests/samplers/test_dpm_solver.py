import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exponential import (
    end_to_end,
    field,
    gaussian_moments,
    one_draw_an_example,
    orders,
    p_values,
    point_errors,
    run,
    single_and_double,
    slope,
)

from fm_jax.samplers import DDIM, DPMSolver, DPMSolverPlusPlus, dpm_solver
from fm_jax.samplers.grids import uniform
from fm_jax.samplers.levels import phi
from fm_jax.schedules import DDPM, VE, Cosine, Linear

SAMPLERS = {
    f"{make.__name__} {order}": lambda schedule, make=make, order=order: make(schedule, order)
    for make in (DPMSolver, DPMSolverPlusPlus)
    for order in (2, 3)
}


def sde(schedule):
    return DPMSolverPlusPlus(schedule, sde=True)


class Published3M(DPMSolverPlusPlus):
    """3M as its authors' code and diffusers have it, with phi_3 in the place of 2 phi_3."""

    def solve(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dpm_solver, "phi", lambda k, z: phi(k, z) / (2 if k == 3 else 1))
            return super().solve(*args)


@pytest.fixture(scope="module")
def measured():
    with jax.enable_x64(True):
        return orders({**SAMPLERS, "published 3m": lambda schedule: Published3M(schedule, 3)}, ["vp"])


@pytest.mark.slow
@pytest.mark.parametrize("field", ["mixture", "guided"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_order_of_convergence(measured, name, field):
    order = SAMPLERS[name](Linear()).order
    assert order == int(name[-1])
    np.testing.assert_allclose(measured[name, "vp", "slow start", field], order, atol=0.2)
    if name != "DPMSolverPlusPlus 3":  # whose first steps count on even grids
        np.testing.assert_allclose(measured[name, "vp", "even", field], order, atol=0.2)


@pytest.mark.parametrize("field", ["mixture", "guided"])
def test_3m_as_published_misses_order_three_by_one_factor_of_two(measured, field):
    np.testing.assert_allclose(measured["published 3m", "vp", "slow start", field], 2, atol=0.2)


@pytest.mark.slow
def test_exact_where_all_data_is_one_point(x64):
    schedules = [Linear(), DDPM(), VE(), Linear()]
    assert point_errors([make(s) for make, s in zip(SAMPLERS.values(), schedules, strict=True)]).max() < 1e-9


@pytest.mark.slow
def test_weak_order_two_of_the_sde_on_a_gaussian(x64, monkeypatch):
    monkeypatch.setattr(dpm_solver, "step_noise", one_draw_an_example)
    means, variances = gaussian_moments({"sde": sde}, ["linear"])["sde", "linear"]
    assert means.max() < 1e-12
    assert variances[-1] < 1e-3
    np.testing.assert_allclose(slope(variances), 2, atol=0.15)


def test_the_sde_reaches_the_marginal():
    """Refused at p < 1e-4 on any of four projections: a right sampler fails with probability below 4e-4."""
    assert min(p_values(sde(Linear()))) > 1e-4


def test_the_marginal_test_refuses_half_of_the_noise(monkeypatch):
    monkeypatch.setattr(dpm_solver, "step_noise", lambda key, i, x: 0.5 * jax.random.normal(key, x.shape))
    assert min(p_values(sde(Linear()))) < 1e-6


def test_a_first_step_is_ddim_or_ancestral_sampling():
    pluses = [(DPMSolverPlusPlus(Cosine(), order), DDIM(Cosine())) for order in (2, 3)]
    step = [*pluses, (sde(Cosine()), DDIM(Cosine(), eta=1.0))]

    @jax.jit
    def pairs(x0):
        return [[run(sampler, field, x0, uniform(1, 0.2, 0.5)).x for sampler in pair] for pair in step]

    for ours, first_order in pairs(jax.random.normal(jax.random.key(0), (4, 2))):
        np.testing.assert_allclose(ours, first_order, rtol=1e-6)


@pytest.mark.slow
def test_from_end_to_end_and_back(x64):
    third = {name: make for name, make in SAMPLERS.items() if "3" in name}
    for name, (errors, (by_start, by_time)) in end_to_end(third).items():
        assert errors[1] < 1e-3
        assert np.log2(errors[0] / errors[1]) > 1.6, name
        assert np.isfinite(by_start).all()
        assert np.isfinite(by_time)


@pytest.mark.parametrize("order", [2, 3])
def test_an_infinite_step_costs_one_call(order):
    """From 0 to 1 the first and the last step have infinite length in log-SNR; inside all are finite."""
    calls = []

    def network(t, x):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    solve = jax.jit(lambda times: run(DPMSolver(Linear(), order), network, jnp.ones((3, 1)), times))
    for times, expected in [(np.linspace(0.1, 0.9, 5), 4 * order), (np.linspace(0, 1, 5), 2 + 2 * order)]:
        calls.clear()
        solution = jax.block_until_ready(solve(jnp.asarray(times)))
        jax.effects_barrier()
        assert int(solution.calls) == len(calls) == expected


def test_single_precision_loses_little(x64):
    third = {name: make for name, make in SAMPLERS.items() if "3" in name}
    for name, (single, double) in single_and_double(third).items():
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, double, atol=3e-5, err_msg=name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPMSolver(Linear(), 4), "order must be from 2 to 3, got 4."),
        (lambda: DPMSolverPlusPlus(Linear(), 1), "order must be from 2 to 3, got 1."),
        (lambda: DPMSolverPlusPlus(Linear(), 3, sde=True), "order must be 2 with sde=True, got 3."),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
