import subprocess
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.guidance import classifier_free
from fm_jax.samplers.adaptive import EXPLICIT, sample_adaptive

# NumPy, so that they become float64 under the x64 fixture.
RATES = np.array([0.1, 1.0, 2.0, 5.0])
X = np.array([[1.0, -2.0], [0.5, 0.1], [-1.0, 0.3], [0.2, 2.0]])


def solve(v, x0, **options):
    return jax.jit(lambda x0: sample_adaptive(v, x0, **options))(x0)


def swing(rates):
    """dx/dt = r cos(3 r t) x, one rate an example, closed over like a condition; x(1) = x(0) exp(sin(3 r) / 3)."""
    rates = jnp.asarray(rates, dtype=float)

    def v(t, x):
        assert x.shape == (len(rates), 2)
        t = jnp.broadcast_to(t, rates.shape)
        return (rates * jnp.cos(3 * rates * t))[:, None] * x

    return v


def swung(rates, x0):
    return x0 * jnp.exp(jnp.sin(3 * rates) / 3)[:, None]


@pytest.mark.parametrize("solver", [*EXPLICIT, diffrax.Ralston()])
def test_nfe_counts_the_calls_that_happen(x64, solver):
    calls = []

    def network(t, x):
        jax.debug.callback(lambda: calls.append(1))
        # Flat at first, so that the first step is too long and is refused; then fast.
        return 10 * jnp.cos(40 * t) * (t > 1e-3) * jnp.ones_like(x) + 1e-3 * x

    v = network if isinstance(solver, str) else classifier_free(network, network, 2.0)
    solution = solve(v, X, rtol=1e-3, atol=1e-3, solver=solver)
    jax.block_until_ready(solution)
    jax.effects_barrier()
    assert int(solution.nfe) == len(calls)
    exact = X + np.sin(40.0) / 4 - np.sin(0.04) / 4
    np.testing.assert_allclose(solution.x, exact, atol=0.1)


def test_error_follows_the_tolerance(x64):
    exact = swung(RATES, X)
    solutions = [solve(swing(RATES), X, rtol=tol, atol=tol) for tol in (1e-3, 1e-9)]
    errors = [float(jnp.abs(s.x - exact).max()) for s in solutions]
    assert 1e-5 < errors[0] < 0.02
    assert errors[1] < 1e-5 * errors[0]
    assert solutions[0].nfe < solutions[1].nfe


def test_backward_returns_to_the_start():
    back = solve(swing(RATES), swung(RATES, X), t0=1.0, t1=0.0, times=[1.0, 0.5, 0.0])
    half = X * jnp.exp(jnp.sin(1.5 * RATES) / 3)[:, None]
    np.testing.assert_allclose(back.x, X, atol=1e-3)
    np.testing.assert_allclose(back.trajectory, jnp.stack([swung(RATES, X), half, back.x]), atol=1e-3)


def test_per_sample_lines_up_with_the_condition_and_counts_for_each_example(x64):
    calls = []

    def v(t, x):
        jax.debug.callback(lambda: calls.append(1))
        assert t.shape == (4,)
        return swing(RATES)(t, x)

    options = {"rtol": 1e-7, "atol": 1e-7, "times": [0.5]}
    own = solve(v, X, per_sample=True, **options)
    jax.block_until_ready(own)
    jax.effects_barrier()
    np.testing.assert_allclose(own.x, swung(RATES, X), atol=1e-5)
    half = X * jnp.exp(jnp.sin(3 * RATES * 0.5) / 3)[:, None]
    np.testing.assert_allclose(own.trajectory, half[None], atol=1e-5)
    assert own.nfe.shape == (4,)
    assert list(own.nfe) == sorted(own.nfe)  # the fast ones need more
    assert own.nfe[3] > 2 * own.nfe[0]
    assert len(calls) == own.nfe.max()  # one call for the whole batch, until the last is done

    alone = solve(swing(RATES[2:3]), X[2:3], **options)
    np.testing.assert_allclose(alone.x, own.x[2:3], rtol=1e-12)
    assert int(alone.nfe) == int(own.nfe[2])


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient(x64, per_sample):
    def end(rates):
        solution = sample_adaptive(swing(rates), X, rtol=1e-7, atol=1e-7, per_sample=per_sample, max_steps=256)
        return solution.x.sum(), solution.x

    (_, x), gradient = jax.jit(jax.value_and_grad(end, has_aux=True))(RATES)
    np.testing.assert_allclose(x, swung(RATES, X), atol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(lambda rates: swung(rates, X).sum())(RATES), atol=1e-4)


def test_forward_mode(x64):
    def end(rate):
        v = swing(rate * RATES)
        return sample_adaptive(v, X, rtol=1e-7, atol=1e-7, adjoint=diffrax.ForwardMode(), per_sample=True).x.sum()

    def derivative(f):
        return jax.jit(lambda rate: jax.jvp(f, (rate,), (1.0,)))(1.0)

    expected = derivative(lambda rate: swung(rate * RATES, X).sum())
    np.testing.assert_allclose(derivative(end), expected, atol=1e-4)


def test_an_implicit_solver_takes_long_steps_where_the_field_is_stiff(x64):
    """dx/dt = r (cos t - x) with r = 3,000: explicit steps are held to 3 / r, over 1,000 of them."""

    def v(t, x):
        return 3000.0 * (jnp.cos(t)[:, None] - x)

    solution = solve(v, X, rtol=1e-5, atol=1e-5, solver="kvaerno3", per_sample=True, max_steps=100)
    np.testing.assert_allclose(solution.x, np.full(X.shape, np.cos(1.0)), atol=1e-3)
    assert solution.nfe.shape == (4,)
    assert np.isnan(solution.nfe).all()


def test_too_few_steps_is_an_error():
    with pytest.raises(RuntimeError, match="maximum number of solver steps was reached"):
        jax.block_until_ready(solve(swing(RATES), X, max_steps=3))


def test_importing_the_samplers_does_not_import_diffrax():
    code = "import sys, fm_jax.samplers; assert not {'diffrax', 'equinox'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_diffrax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match="sample_adaptive needs Diffrax: pip install diffrax"):
        sample_adaptive(swing(RATES), X)


BAD = [
    ({"rtol": -1.0}, "rtol must be finite and not negative, got -1.0."),
    ({"atol": float("nan")}, "atol must be finite and not negative, got nan."),
    ({"rtol": 0.0, "atol": 0.0}, "rtol and atol must not both be 0."),
    ({"solver": "rk45"}, "solver must be one of 'tsit5', 'dopri5', 'dopri8', .*, 'kvaerno5', got 'rk45'."),
    ({"solver": diffrax.SemiImplicitEuler()}, "solver must be a name or a Runge-Kutta solver of Diffrax"),
    ({"solver": "kvaerno5"}, "An implicit solver needs per_sample=True"),
    ({"max_steps": 0}, "max_steps must be at least 1, got 0."),
    ({"t1": 0.0}, "t0 and t1 must differ, both are 0.0."),
    ({"times": [[0.5]]}, r"times must be \[num_times\], got shape \(1, 1\)."),
    ({"times": [0.5, 0.2]}, "times must run from t0 = 0.0 towards t1 = 1.0"),
    ({"times": [0.5, 1.2]}, "times must run from t0 = 0.0 towards t1 = 1.0"),
    ({"times": [0.2, 0.5], "t0": 1.0, "t1": 0.0}, "times must run from t0 = 1.0 towards t1 = 0.0"),
    ({"x0": jnp.asarray(X, dtype=jnp.bfloat16)}, "x0 must be float32 or float64"),
    ({"x0": jnp.ones((4, 2), dtype=int)}, "x0 must be floating point, got int32."),
    ({"v": lambda t, x: x[:, :1]}, r"v\(t, x\) must have the shape of x, \(4, 2\), got \(4, 1\)."),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample_adaptive(**{"v": swing(RATES), "x0": X, **options})
