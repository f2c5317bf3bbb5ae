import subprocess
import sys

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.guidance import classifier_free
from fm_jax.nfe import Counted
from fm_jax.samplers import Adaptive, DiffraxSDE, sample
from fm_jax.samplers.adaptive import SOLVERS
from fm_jax.schedules import Linear

EXPLICIT = [name for name, solver in SOLVERS.items() if not solver.implicit]

# NumPy, so that they become float64 under the x64 fixture.
RATES = np.array([0.1, 1.0, 2.0, 5.0])
X = np.array([[1.0, -2.0], [0.5, 0.1], [-1.0, 0.3], [0.2, 2.0]])


def solve(v, x0, sampler, times=(0.0, 1.0), trajectory=False):
    return jax.jit(lambda x0: sample(v, x0, sampler, times=times, trajectory=trajectory))(x0)


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


@pytest.mark.slow_but_one
@pytest.mark.parametrize("solver", [*EXPLICIT, diffrax.Ralston()])
def test_calls_are_those_that_happen(x64, solver):
    calls = []

    def network(t, x):
        jax.debug.callback(lambda: calls.append(1))
        # Flat at first, so that the first step is too long and is refused; then fast.
        return 10 * jnp.cos(40 * t) * (t > 1e-3) * jnp.ones_like(x) + 1e-3 * x

    v = network if isinstance(solver, str) else classifier_free(Counted(network, 1), Counted(network, 1), 2.0)
    solution = solve(v, X, Adaptive(solver, rtol=1e-3, atol=1e-3))
    jax.block_until_ready(solution)
    jax.effects_barrier()
    assert int(solution.calls if v is network else solution.nfe) == len(calls)
    assert (solution.nfe is None) == (v is network)
    exact = X + np.sin(40.0) / 4 - np.sin(0.04) / 4
    np.testing.assert_allclose(solution.x, exact, atol=0.1)


@pytest.mark.slow
def test_error_follows_the_tolerance(x64):
    exact = swung(RATES, X)
    solutions = [solve(swing(RATES), X, Adaptive(rtol=tol, atol=tol)) for tol in (1e-3, 1e-9)]
    errors = [float(jnp.abs(s.x - exact).max()) for s in solutions]
    assert 1e-5 < errors[0] < 0.02
    assert errors[1] < 1e-5 * errors[0]
    assert solutions[0].calls < solutions[1].calls


@pytest.mark.slow
def test_backward_returns_to_the_start():
    back = solve(swing(RATES), swung(RATES, X), Adaptive(), [1.0, 0.5, 0.0], trajectory=True)
    half = X * jnp.exp(jnp.sin(1.5 * RATES) / 3)[:, None]
    np.testing.assert_allclose(back.x, X, atol=1e-3)
    np.testing.assert_allclose(back.trajectory, jnp.stack([swung(RATES, X), half, back.x]), atol=1e-3)


@pytest.mark.slow
def test_per_sample_lines_up_with_the_condition_and_counts_for_each_example(x64):
    calls = []

    def v(t, x):
        jax.debug.callback(lambda: calls.append(1))
        assert t.shape == (4,)
        return swing(RATES)(t, x)

    options, times = {"rtol": 1e-7, "atol": 1e-7}, [0.0, 0.5, 1.0]
    own = solve(Counted(v, 2), X, Adaptive(**options, per_sample=True), times, trajectory=True)
    jax.block_until_ready(own)
    jax.effects_barrier()
    np.testing.assert_allclose(own.x, swung(RATES, X), atol=1e-5)
    half = X * jnp.exp(jnp.sin(3 * RATES * 0.5) / 3)[:, None]
    np.testing.assert_allclose(own.trajectory, jnp.stack([X, half, own.x]), atol=1e-5)
    assert own.calls.shape == (4,)
    assert list(own.calls) == sorted(own.calls)  # the fast ones need more
    assert own.calls[3] > 2 * own.calls[0]
    assert len(calls) == own.calls.max()  # one call for the whole batch, until the last is done
    np.testing.assert_array_equal(own.nfe, 2 * own.calls)

    alone = solve(swing(RATES[2:3]), X[2:3], Adaptive(**options), times, trajectory=True)
    np.testing.assert_allclose(alone.x, own.x[2:3], rtol=1e-12)
    assert int(alone.calls) == int(own.calls[2])


@pytest.mark.slow
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradient(x64, per_sample):
    def end(rates):
        sampler = Adaptive(rtol=1e-7, atol=1e-7, per_sample=per_sample, max_steps=256)
        x = sample(swing(rates), X, sampler, times=(0.0, 1.0)).x
        return x.sum(), x

    (_, x), gradient = jax.jit(jax.value_and_grad(end, has_aux=True))(RATES)
    np.testing.assert_allclose(x, swung(RATES, X), atol=1e-5)
    np.testing.assert_allclose(gradient, jax.grad(lambda rates: swung(rates, X).sum())(RATES), atol=1e-4)


@pytest.mark.slow
def test_forward_mode(x64):
    def end(rate):
        sampler = Adaptive(rtol=1e-7, atol=1e-7, adjoint=diffrax.ForwardMode(), per_sample=True)
        return sample(swing(rate * RATES), X, sampler, times=(0.0, 1.0)).x.sum()

    def derivative(f):
        return jax.jit(lambda rate: jax.jvp(f, (rate,), (1.0,)))(1.0)

    expected = derivative(lambda rate: swung(rate * RATES, X).sum())
    np.testing.assert_allclose(derivative(end), expected, atol=1e-4)


@pytest.mark.slow
def test_an_implicit_solver_takes_long_steps_where_the_field_is_stiff(x64):
    """dx/dt = r (cos t - x) with r = 3,000: explicit steps are held to 3 / r, over 1,000 of them."""

    def v(t, x):
        return 3000.0 * (jnp.cos(t)[:, None] - x)

    solution = solve(Counted(v, 1), X, Adaptive("kvaerno3", per_sample=True, max_steps=100))
    np.testing.assert_allclose(solution.x, np.full(X.shape, np.cos(1.0)), atol=1e-3)
    assert solution.calls is None  # Diffrax does not say how many
    assert solution.nfe is None


@pytest.mark.slow
def test_too_few_steps_is_an_error():
    with pytest.raises(RuntimeError, match="maximum number of solver steps was reached"):
        jax.block_until_ready(solve(swing(RATES), X, Adaptive(max_steps=3)))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["everywhere", "from 0.5 on", "infinite", "x0"])
@pytest.mark.parametrize(
    "sampler",
    [
        Adaptive(max_steps=50),
        Adaptive("dopri5", per_sample=True, max_steps=100),
        Adaptive("kvaerno3", per_sample=True, max_steps=50),
        DiffraxSDE(Linear(), rtol=1e-2, atol=1e-2, max_steps=50),
    ],
    ids=lambda sampler: f"{type(sampler).__name__} {sampler.solver}",
)
def test_a_velocity_that_is_not_finite_is_not_told_to_take_more_steps(sampler, where):
    def v(t, x):
        value = {"everywhere": jnp.nan, "from 0.5 on": jnp.where(jnp.mean(t) > 0.5, jnp.nan, -1.0), "infinite": jnp.inf}
        return x * value.get(where, 1.0)

    def end(x0):
        return sample(v, x0, sampler, times=[0.0, 0.9], key=jax.random.key(0) if sampler.stochastic else None).x

    x0 = jnp.full((2, 1), jnp.nan if where == "x0" else 1.0)
    with pytest.raises(RuntimeError, match=r"The velocity v\(t, x\) is not finite, or x0 is not") as caught:
        jax.block_until_ready(jax.jit(end)(x0))
    assert "max_steps" not in str(caught.value).partition("---")[0]


@pytest.mark.slow
def test_importing_the_samplers_does_not_import_diffrax():
    code = "import sys, fm_jax.samplers; assert not {'diffrax', 'equinox'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_diffrax_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match="Adaptive needs diffrax: pip install diffrax"):
        sample(swing(RATES), X, Adaptive())


@pytest.mark.slow
def test_a_number_of_steps_says_where_to_save():
    """The solver chooses its own steps between."""
    solution = solve(lambda t, x: x, X, Adaptive(), 4, trajectory=True)
    np.testing.assert_allclose(solution.trajectory, X[None] * np.exp(np.linspace(0, 1, 5))[:, None, None], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": -1.0}, "rtol must be finite and not negative, got -1.0."),
        ({"atol": float("nan")}, "atol must be positive and finite, got nan."),
        ({"atol": 0.0}, "atol must be positive and finite, got 0.0."),
        ({"solver": "rk45"}, "solver must be one of 'tsit5', 'dopri5', 'dopri8', .*, 'kvaerno5', got 'rk45'."),
        ({"solver": diffrax.SemiImplicitEuler()}, "solver must be a name or a Runge-Kutta solver of Diffrax"),
        ({"solver": "kvaerno5"}, "An implicit solver needs per_sample=True"),
        ({"solver": diffrax.Kvaerno5()}, "An implicit solver needs per_sample=True"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0."),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(**options)


def test_low_precision_is_refused():
    with pytest.raises(ValueError, match="x0 must be float32 or float64"):
        sample(swing(RATES), jnp.asarray(X, dtype=jnp.bfloat16), Adaptive())


def test_the_order_is_that_of_the_solver():
    orders = [Adaptive(solver, per_sample=True).order for solver in (*SOLVERS, diffrax.Bosh3())]
    assert orders == [5, 5, 8, 3, 2, 3, 5, 3]


def test_loosened_is_the_same_with_larger_tolerances():
    assert Adaptive("bosh3", 1e-4, 1e-6, max_steps=9).loosened(2) == Adaptive("bosh3", 2e-4, 2e-6, max_steps=9)
