import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exponential import (
    calls_and_nfe,
    end_to_end,
    field,
    gaussian_moments,
    one_draw_an_example,
    orders,
    p_values,
    point_errors,
    slope,
    traces,
)

from fm_jax.guidance import classifier_free
from fm_jax.samplers import dpm_solver
from fm_jax.samplers.ddim import sample_ddim
from fm_jax.samplers.dpm_solver import STAGES, sample_dpm_solver
from fm_jax.samplers.levels import phi
from fm_jax.schedules import DDPM, VE, Cosine, Linear

KEY = jax.random.key(3)
ORDERS = {"dpm_solver_2": 2, "dpm_solver_3": 3, "dpm_solver++_2m": 2, "dpm_solver++_3m": 3}
SAMPLERS = {method: functools.partial(sample_dpm_solver, method=method) for method in ORDERS}


def published_3m(*args, **options):
    """3M as its authors' code and diffusers have it, with phi_3 in the place of 2 phi_3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpm_solver, "phi", lambda k, z: phi(k, z) / (2 if k == 3 else 1))
        return sample_dpm_solver(*args, method="dpm_solver++_3m", **options)


@pytest.fixture(scope="module")
def measured():
    with jax.enable_x64(True):
        return orders({**SAMPLERS, "published 3m": published_3m}, ["vp"])


@pytest.mark.parametrize("field", ["mixture", "guided"])
@pytest.mark.parametrize("method", ORDERS)
def test_order_of_convergence(measured, method, field):
    np.testing.assert_allclose(measured[method, "vp", "slow start", field], ORDERS[method], atol=0.2)
    if not method.endswith("3m"):  # whose first steps count on even grids
        np.testing.assert_allclose(measured[method, "vp", "even", field], ORDERS[method], atol=0.2)


@pytest.mark.parametrize("field", ["mixture", "guided"])
def test_3m_as_published_misses_order_three_by_one_factor_of_two(measured, field):
    np.testing.assert_allclose(measured["published 3m", "vp", "slow start", field], 2, atol=0.2)


def test_exact_where_all_data_is_one_point(x64):
    assert point_errors(list(zip(SAMPLERS.values(), [Linear(), DDPM(), VE(), Linear()], strict=True))).max() < 1e-9


def test_weak_order_two_of_the_sde_on_a_gaussian(x64, monkeypatch):
    monkeypatch.setattr(dpm_solver, "step_noise", one_draw_an_example)
    sampler = functools.partial(sample_dpm_solver, method="dpm_solver++_2m_sde")
    means, variances = gaussian_moments({"sde": sampler}, ["linear"])["sde", "linear"]
    assert means.max() < 1e-12
    assert variances[-1] < 1e-3
    np.testing.assert_allclose(slope(variances), 2, atol=0.15)


def sde(*args, **options):
    return sample_dpm_solver(*args, method="dpm_solver++_2m_sde", key=KEY, **options)


def test_the_sde_reaches_the_marginal():
    """Refused at p < 1e-4 on any of four projections: a right sampler fails with probability below 4e-4."""
    assert min(p_values(sde)) > 1e-4


def test_the_marginal_test_refuses_half_of_the_noise(monkeypatch):
    monkeypatch.setattr(dpm_solver, "step_noise", lambda key, i, x: 0.5 * jax.random.normal(key, x.shape))
    assert min(p_values(sde)) < 1e-6


def test_a_first_step_is_ddim_or_ancestral_sampling():
    options = {"schedule": Cosine(), "num_steps": 1, "t0": 0.2, "t1": 0.5}

    @jax.jit
    def pairs(x0):
        ddim, ancestral = (sample_ddim(field, x0, eta=eta, key=key, **options).x for eta, key in ((0, None), (1, KEY)))
        multistep = [sample_dpm_solver(field, x0, method=f"dpm_solver++_{m}m", **options).x for m in (2, 3)]
        return [*((x, ddim) for x in multistep), (sde(field, x0, **options).x, ancestral)]

    for ours, first_order in pairs(jax.random.normal(jax.random.key(0), (4, 2))):
        np.testing.assert_allclose(ours, first_order, rtol=1e-6)


def test_from_end_to_end_and_back(x64):
    for method, (errors, (by_start, by_time)) in end_to_end(
        {m: SAMPLERS[m] for m in ("dpm_solver_3", "dpm_solver++_3m")}
    ).items():
        assert errors[1] < 1e-3
        assert np.log2(errors[0] / errors[1]) > 1.6, method
        assert np.isfinite(by_start).all()
        assert np.isfinite(by_time)


@pytest.mark.parametrize("method", ["dpm_solver_2", "dpm_solver_3", "dpm_solver++_2m_sde"])
def test_nfe_counts_the_calls_that_happen(method):
    sampler = functools.partial(sample_dpm_solver, method=method, key=KEY if method.endswith("sde") else None)
    stages = STAGES[method]
    # From 0 to 1 the first and the last step have infinite length in log-SNR.
    finite, infinite = calls_and_nfe(sampler, np.linspace(0.1, 0.9, 5), np.linspace(0, 1, 5))
    assert finite == (4 * stages,) * 2
    assert infinite == (2 + 2 * stages,) * 2


def test_nfe_counts_both_branches_of_guidance():
    v = classifier_free(lambda t, x: x, lambda t, x: -x, 2.0)
    options = {"schedule": Linear(), "method": "dpm_solver_3", "grid": [0.0, 0.3, 0.6, 0.8]}
    assert int(jax.jit(lambda x: sample_dpm_solver(v, x, **options).nfe)(jnp.ones((1, 1)))) == 2 * (1 + 3 + 3)


def test_traced_once():
    assert traces(sample_dpm_solver) == ["trace", "v"]


def test_single_precision_loses_little(x64):
    x0 = jax.random.normal(KEY, (4, 2), dtype=jnp.float32)

    @jax.jit
    def pairs():
        return {
            method: [sampler(field, x, schedule=Linear(), num_steps=200).x for x in (x0, x0.astype(float))]
            for method, sampler in SAMPLERS.items()
            if "3" in method
        }

    for method, (single, double) in pairs().items():
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, double, atol=3e-5, err_msg=method)


BAD = [
    ({"num_steps": 0}, "num_steps must be at least 1, got 0."),
    ({"grid": [0.0, 0.5, 0.2], "num_steps": None}, "grid must be finite and strictly monotone"),
    ({"method": "dpm++"}, "method must be one of 'dpm_solver_2', 'dpm_solver_3', .*, got 'dpm\\+\\+'."),
    ({"method": "dpm_solver++_2m_sde"}, "key must be one typed key, as from jax.random.key"),
    ({"key": KEY}, r"key must be None for method 'dpm_solver\+\+_2m', which draws no noise, got Array"),
    ({"method": "dpm_solver++_2m_sde", "key": KEY, "t0": 1.0, "t1": 0.0}, "Time must run forward"),
    ({"x0": jnp.ones((2, 2), dtype=int)}, "x0 must be floating point, got int32."),
    ({"v": lambda t, x: x[:, :1]}, "value and x_t must have the same shape"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    options = {"v": lambda t, x: x, "x0": jnp.ones((2, 2)), "schedule": Linear(), "num_steps": 3, **options}
    with pytest.raises(ValueError, match=message):
        sample_dpm_solver(**options)
