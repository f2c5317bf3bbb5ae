import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import guided_by_half

from fm_jax import oracles
from fm_jax.guidance import classifier_free
from fm_jax.samplers.fixed import METHODS, Method, ode_step, sample_ode
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import Cosine, Linear

NUM_STEPS = [16, 32, 64, 128]
CASES = [*itertools.product(METHODS, ["mixture", "guided"]), ("heun", "gaussian"), ("rk4", "gaussian")]
EULER_SOLD_AS_HEUN = Method(order=2, a=((), (1.0,)), b=(1.0, 0.0), c=(0.0, 1.0))


def gaussian():
    """A single Gaussian: its velocity, and the exact end points."""
    mixture = oracles.gaussian_mixture([[0.5, -1.0]], [[[0.5, 0.2], [0.2, 0.3]]])
    return oracles.velocity(mixture, Cosine()), lambda x: oracles.flow_map(mixture, Cosine(), 0.0, 1.0, x)


def measured_order(errors):
    return -np.polyfit(np.log(NUM_STEPS), np.log(errors), 1)[0]


def warp(times):
    return times + 0.4 * times * (1 - times)


@pytest.fixture(scope="module")
def orders():
    """Measured order of every method on every field, on a uniform and on a warped grid: {(method, field): [2]}."""
    with jax.enable_x64(True):
        x0 = jax.random.normal(jax.random.key(0), (8, 2))
        v_half, (v_gaussian, exact) = guided_by_half(Linear(), len(x0)), gaussian()
        on_half = dict(METHODS)
        on_gaussian = {"heun": METHODS["heun"], "rk4": METHODS["rk4"], "fake": EULER_SOLD_AS_HEUN}

        @jax.jit
        def ends(grids):
            def end(v, methods):
                return {
                    name: jax.vmap(lambda grid, m=m: sample_ode(v, x0, grid=grid, method=m).x)(grids)
                    for name, m in methods.items()
                }

            return end(v_half, on_half), end(v_gaussian, on_gaussian)

        # All grids have the same length, so that they compile once: steps of length 0 at the end change nothing.
        grids = jnp.stack([jnp.pad(uniform(n), (0, NUM_STEPS[-1] - n), mode="edge") for n in NUM_STEPS])
        half, whole = ends(jnp.concatenate([grids, warp(grids)]))
        reference = jax.jit(lambda: sample_ode(v_half, x0, num_steps=1000, method="rk4").x)()

        def fit(x, reference):
            errors = np.abs(x - reference[None]).mean(axis=(1, 2)).reshape(2, -1)
            return [measured_order(e) for e in errors]

        out = {(name, "gaussian"): fit(x, exact(x0)) for name, x in whole.items()}
        for name, x in half.items():
            for field, part in (("mixture", slice(4)), ("guided", slice(4, None))):
                out[name, field] = fit(x[:, part], reference[part])
        return out


@pytest.mark.parametrize(("method", "field"), CASES)
def test_order_of_convergence(orders, method, field):
    np.testing.assert_allclose(orders[method, field], METHODS[method].order, atol=0.15)


def test_order_of_convergence_unmasks_a_heun_that_is_euler(orders):
    np.testing.assert_allclose(orders["fake", "gaussian"], 1, atol=0.15)


@pytest.mark.parametrize("name", METHODS)
def test_tableau_satisfies_the_order_conditions(name):
    """Hairer, Norsett & Wanner 1993, table II.2.1: one condition for each tree with up to four nodes."""
    method = METHODS[name]
    s = method.stages
    a = np.zeros((s, s))
    for i, row in enumerate(method.a):
        a[i, :i] = row
    b, c = np.array(method.b), np.array(method.c)
    conditions = [
        (1, b.sum(), 1),
        (2, b @ c, 1 / 2),
        (3, b @ c**2, 1 / 3),
        (3, b @ a @ c, 1 / 6),
        (4, b @ c**3, 1 / 4),
        (4, (b * c) @ a @ c, 1 / 8),
        (4, b @ a @ c**2, 1 / 12),
        (4, b @ a @ a @ c, 1 / 24),
    ]
    np.testing.assert_allclose(a.sum(axis=1), c, atol=1e-14)
    for order, value, expected in conditions:
        if order <= method.order:
            np.testing.assert_allclose(value, expected, atol=1e-14)


def test_backward_returns_to_the_start(x64):
    v = guided_by_half(Linear(), 4)
    x0 = jax.random.normal(jax.random.key(1), (4, 2))

    @jax.jit
    def there_and_back(x0):
        x1 = sample_ode(v, x0, num_steps=64, method="rk4").x
        return x1, sample_ode(v, x1, num_steps=64, method="rk4", t0=1.0, t1=0.0).x

    x1, back = there_and_back(x0)
    assert np.abs(x1 - x0).max() > 0.3
    np.testing.assert_allclose(back, x0, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_stepping_one_by_one_is_the_same(method):
    def v(t, x):
        return jnp.sin(3 * t) * x - t

    x0 = jnp.array([[1.0, -2.0], [0.5, 0.1]])
    grid = jnp.array([0.0, 0.1, 0.4, 1.0])
    x = x0
    for t, t_next in itertools.pairwise(grid):
        x = ode_step(v, t, t_next, x, method)
    solution = sample_ode(v, x0, grid=grid, method=method)
    np.testing.assert_allclose(solution.x, x, rtol=1e-6)
    assert solution.trajectory is None


def test_a_step_takes_one_time_for_each_example():
    def v(t, x):
        return jnp.broadcast_to(t[:, None], x.shape)

    x = ode_step(v, jnp.array([0.0, 0.5]), jnp.array([1.0, 0.0]), jnp.zeros((2, 3)), "heun")
    np.testing.assert_allclose(x, jnp.array([[0.5] * 3, [-0.125] * 3]))


@pytest.mark.parametrize(("method", "stages"), [(name, method.stages) for name, method in METHODS.items()])
def test_nfe_counts_the_calls_that_happen(method, stages):
    calls = []

    def network(t, x):
        jax.debug.callback(lambda t: calls.append(float(t)), t)
        return x

    solution = jax.jit(lambda x: sample_ode(network, x, num_steps=5, method=method))(jnp.ones((3, 1)))
    jax.block_until_ready(solution)
    jax.effects_barrier()
    assert int(solution.nfe) == len(calls) == 5 * stages
    assert min(calls) == 0
    assert max(calls) <= 1
    assert (max(calls) == 1) == (METHODS[method].c[-1] == 1)


def test_nfe_counts_both_branches_of_guidance():
    def v(t, x):
        return x

    guided = classifier_free(v, v, 3.0)
    assert int(sample_ode(guided, jnp.ones((1, 1)), num_steps=4, method="heun").nfe) == 16


def test_last_stage_is_at_the_end_exactly():
    # t + (t_next - t) would round past t_next for some of these.
    times = np.random.default_rng(0).uniform(size=(500, 2)).astype(np.float32)
    seen = jax.vmap(lambda t, t_next: ode_step(lambda t, x: jnp.broadcast_to(t, x.shape), t, t_next, jnp.zeros(1)))
    h, mean = times[:, 1] - times[:, 0], (times[:, 0] + times[:, 1]) / 2
    np.testing.assert_allclose(seen(*times.T)[:, 0], h * mean, atol=1e-7)
    last = Method(order=1, a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0))
    stages = []
    for t, t_next in times[:50]:
        ode_step(lambda t, x: stages.append(np.asarray(t)) or x, t, t_next, jnp.zeros((1, 1)), last)
    np.testing.assert_array_equal(np.array(stages).reshape(50, 2), times[:50])


def test_traced_once():
    calls = []

    @jax.jit
    def sample(x):
        calls.append("trace")
        return sample_ode(lambda t, x: calls.append("v") or -x, x, num_steps=10, method="euler").x

    for i in range(3):
        sample(jnp.full((2, 2), float(i)))
    assert calls == ["trace", "v"]


def test_gradients_in_both_modes(x64):
    # Heun on x' = a x multiplies by 1 + z + z^2 / 2 with z = a h, each step.
    def end(a):
        return sample_ode(lambda t, x: a * x, jnp.ones((1, 1)), num_steps=4, method="heun").x[0, 0]

    z = 0.7 / 4
    np.testing.assert_allclose(end(0.7), (1 + z + z**2 / 2) ** 4, rtol=1e-12)
    expected = (1 + z + z**2 / 2) ** 3 * (1 + z)
    np.testing.assert_allclose(jax.grad(end)(0.7), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jvp(end, (0.7,), (1.0,))[1], expected, rtol=1e-12)


def test_gradient_with_respect_to_the_grid():
    # Euler on x' = 2t over (0, s, 1) gives 2 s (1 - s).
    def end(s):
        return sample_ode(
            lambda t, x: 2 * t + 0 * x, jnp.zeros((1, 1)), grid=jnp.stack([0 * s, s, 1 + 0 * s]), method="euler"
        ).x[0, 0]

    np.testing.assert_allclose(jax.value_and_grad(end)(0.3), (0.42, 0.8), rtol=1e-5)


def test_vmap_over_a_further_axis():
    def v(t, x):
        return x * t

    x0 = jax.random.normal(jax.random.key(0), (3, 2, 4))
    batched = jax.vmap(lambda x: sample_ode(v, x, num_steps=3).x)(x0)
    np.testing.assert_allclose(batched[1], sample_ode(v, x0[1], num_steps=3).x, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"num_steps": 5}, {"grid": [0.0, 0.3, 1.0]}, {"num_steps": 3, "t0": 1.0, "t1": 0.2}]
)
def test_trajectory_is_exact_where_the_method_is(options):
    # rk4 integrates 3 t^2 exactly.
    def v(t, x):
        return 3 * t**2 + 0 * x

    grid = jnp.asarray(options["grid"]) if "grid" in options else uniform(**options)
    x0 = jnp.full((2, 2), grid[0] ** 3)
    solution = sample_ode(v, x0, method="rk4", trajectory=True, **options)
    assert solution.trajectory.shape == (len(grid), 2, 2)
    np.testing.assert_allclose(solution.trajectory[:, 0, 1], grid**3, atol=1e-6)
    np.testing.assert_array_equal(solution.trajectory[0], x0)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.x)


def test_low_precision_states_keep_exact_steps():
    seen = []

    def v(t, x):
        seen.append(t.dtype)
        return jnp.ones_like(x)

    solution = sample_ode(v, jnp.zeros((1, 1), dtype=jnp.bfloat16), num_steps=512, method="euler")
    assert solution.x.dtype == jnp.bfloat16
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    # Adding 1/512 to bfloat16 numbers stalls at 0.5: the steps themselves are not lost, which would give 0.
    assert 0.4 < float(solution.x[0, 0]) <= 1


X = jnp.ones((2, 3))
BAD = [
    ({"num_steps": 0}, "num_steps must be at least 1, got 0."),
    (
        {"num_steps": 4, "method": "rk5"},
        "method must be one of 'euler', 'midpoint', 'heun', 'ralston', 'heun3', 'rk4', got 'rk5'.",
    ),
    ({}, "Exactly one of num_steps and grid must be given."),
    ({"num_steps": 4, "x0": jnp.ones((2, 3), dtype=int)}, "x0 must be floating point, got int32."),
    ({"num_steps": 4, "v": lambda t, x: x[:, :1]}, r"v\(t, x\) must have the shape of x, \(2, 3\), got \(2, 1\)."),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    options = {"v": lambda t, x: x, "x0": X, **options}
    with pytest.raises(ValueError, match=message):
        sample_ode(options.pop("v"), options.pop("x0"), **options)


@pytest.mark.parametrize(
    ("tableau", "message"),
    [
        ({"a": ((), (0.5,)), "b": (1.0,), "c": (0.0,)}, "a must have rows of 0, 1, 2"),
        ({"a": ((), (0.5,)), "b": (0.0, 1.0), "c": (0.0, 1.0)}, "b must sum to 1 and each row of a to its c."),
        ({"a": ((),), "b": (0.5,), "c": (0.0,)}, "b must sum to 1"),
    ],
)
def test_bad_tableaux_are_refused(tableau, message):
    with pytest.raises(ValueError, match=message):
        Method(order=1, **tableau)
