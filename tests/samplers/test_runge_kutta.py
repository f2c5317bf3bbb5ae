import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import guided_by_half

from fm_jax import oracles
from fm_jax.samplers import RungeKutta, Tableau, ode_step, sample
from fm_jax.samplers.grids import uniform
from fm_jax.samplers.runge_kutta import TABLEAUX
from fm_jax.schedules import Cosine, Linear

NUM_STEPS = [16, 32, 64, 128]
CASES = [*itertools.product(TABLEAUX, ["mixture", "guided"]), ("heun", "gaussian"), ("rk4", "gaussian")]
EULER_SOLD_AS_HEUN = Tableau(order=2, a=((), (1.0,)), b=(1.0, 0.0), c=(0.0, 1.0))


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
        on_half = {name: RungeKutta(name) for name in TABLEAUX}
        on_gaussian = {"heun": on_half["heun"], "rk4": on_half["rk4"], "fake": RungeKutta(EULER_SOLD_AS_HEUN)}

        @jax.jit
        def ends(grids):
            def end(v, samplers):
                return {
                    name: jax.vmap(lambda grid, sampler=sampler: sample(v, x0, sampler, times=grid).x)(grids)
                    for name, sampler in samplers.items()
                }

            return end(v_half, on_half), end(v_gaussian, on_gaussian)

        # All grids have the same length, so that they compile once: steps of length 0 at the end change nothing.
        grids = jnp.stack([jnp.pad(uniform(n), (0, NUM_STEPS[-1] - n), mode="edge") for n in NUM_STEPS])
        half, whole = ends(jnp.concatenate([grids, warp(grids)]))
        reference = jax.jit(lambda: sample(v_half, x0, RungeKutta("rk4"), times=1000).x)()

        def fit(x, reference):
            errors = np.abs(x - reference[None]).mean(axis=(1, 2)).reshape(2, -1)
            return [measured_order(e) for e in errors]

        out = {(name, "gaussian"): fit(x, exact(x0)) for name, x in whole.items()}
        for name, x in half.items():
            for field, part in (("mixture", slice(4)), ("guided", slice(4, None))):
                out[name, field] = fit(x[:, part], reference[part])
        return out


@pytest.mark.slow
@pytest.mark.parametrize(("method", "field"), CASES)
def test_order_of_convergence(orders, method, field):
    np.testing.assert_allclose(orders[method, field], RungeKutta(method).order, atol=0.15)


def test_order_of_convergence_unmasks_a_heun_that_is_euler(orders):
    np.testing.assert_allclose(orders["fake", "gaussian"], 1, atol=0.15)


@pytest.mark.parametrize("name", TABLEAUX)
def test_tableau_satisfies_the_order_conditions(name):
    """Hairer, Norsett & Wanner 1993, table II.2.1: one condition for each tree with up to four nodes."""
    method = TABLEAUX[name]
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


@pytest.mark.slow
def test_backward_returns_to_the_start(x64):
    v = guided_by_half(Linear(), 4)
    x0 = jax.random.normal(jax.random.key(1), (4, 2))

    @jax.jit
    def there_and_back(x0):
        x1 = sample(v, x0, RungeKutta("rk4"), times=64).x
        return x1, sample(v, x1, RungeKutta("rk4"), times=uniform(64, 1.0, 0.0)).x

    x1, back = there_and_back(x0)
    assert np.abs(x1 - x0).max() > 0.3
    np.testing.assert_allclose(back, x0, atol=1e-7)


@pytest.mark.parametrize("method", TABLEAUX)
def test_stepping_one_by_one_is_the_same(method):
    def v(t, x):
        return jnp.sin(3 * t) * x - t

    x0 = jnp.array([[1.0, -2.0], [0.5, 0.1]])
    grid = jnp.array([0.0, 0.1, 0.4, 1.0])
    x = x0
    for t, t_next in itertools.pairwise(grid):
        x = ode_step(v, t, t_next, x, method)
    np.testing.assert_allclose(sample(v, x0, RungeKutta(method), times=grid).x, x, rtol=1e-6)


def test_a_step_takes_one_time_for_each_example():
    def v(t, x):
        return jnp.broadcast_to(t[:, None], x.shape)

    x = ode_step(v, jnp.array([0.0, 0.5]), jnp.array([1.0, 0.0]), jnp.zeros((2, 3)), "heun")
    np.testing.assert_allclose(x, jnp.array([[0.5] * 3, [-0.125] * 3]))


@pytest.mark.parametrize("method", TABLEAUX)
def test_evaluates_from_the_start_to_the_end_and_nowhere_else(method):
    times = []

    def v(t, x):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return x

    jax.block_until_ready(jax.jit(lambda x: sample(v, x, RungeKutta(method), times=5))(jnp.ones((3, 1))))
    jax.effects_barrier()
    assert len(times) == 5 * RungeKutta(method).nfe_per_step
    assert min(times) == 0
    assert max(times) <= 1
    assert (max(times) == 1) == (TABLEAUX[method].c[-1] == 1)


def test_last_stage_is_at_the_end_exactly():
    # t + (t_next - t) would round past t_next for some of these.
    times = np.random.default_rng(0).uniform(size=(500, 2)).astype(np.float32)
    seen = jax.vmap(lambda t, t_next: ode_step(lambda t, x: jnp.broadcast_to(t, x.shape), t, t_next, jnp.zeros(1)))
    h, mean = times[:, 1] - times[:, 0], (times[:, 0] + times[:, 1]) / 2
    np.testing.assert_allclose(seen(*times.T)[:, 0], h * mean, atol=1e-7)
    last = Tableau(order=1, a=((), (1.0,)), b=(0.5, 0.5), c=(0.0, 1.0))
    stages = []
    for t, t_next in times[:50]:
        ode_step(lambda t, x: stages.append(np.asarray(t)) or x, t, t_next, jnp.zeros((1, 1)), last)
    np.testing.assert_array_equal(np.array(stages).reshape(50, 2), times[:50])


def test_gradients_in_both_modes(x64):
    # Heun on x' = a x multiplies by 1 + z + z^2 / 2 with z = a h, each step.
    def end(a):
        return sample(lambda t, x: a * x, jnp.ones((1, 1)), RungeKutta("heun"), times=4).x[0, 0]

    z = 0.7 / 4
    np.testing.assert_allclose(end(0.7), (1 + z + z**2 / 2) ** 4, rtol=1e-12)
    expected = (1 + z + z**2 / 2) ** 3 * (1 + z)
    np.testing.assert_allclose(jax.grad(end)(0.7), expected, rtol=1e-12)
    np.testing.assert_allclose(jax.jvp(end, (0.7,), (1.0,))[1], expected, rtol=1e-12)


def test_gradient_with_respect_to_the_times():
    # Euler on x' = 2t over (0, s, 1) gives 2 s (1 - s).
    def end(s):
        times = jnp.stack([0 * s, s, 1 + 0 * s])
        return sample(lambda t, x: 2 * t + 0 * x, jnp.zeros((1, 1)), RungeKutta("euler"), times=times).x[0, 0]

    np.testing.assert_allclose(jax.value_and_grad(end)(0.3), (0.42, 0.8), rtol=1e-5)


def test_vmap_over_a_further_axis():
    def v(t, x):
        return x * t

    x0 = jax.random.normal(jax.random.key(0), (3, 2, 4))
    batched = jax.vmap(lambda x: sample(v, x, times=3).x)(x0)
    np.testing.assert_allclose(batched[1], sample(v, x0[1], times=3).x, rtol=1e-6)


@pytest.mark.parametrize("times", [5, [0.0, 0.3, 1.0], [1.0, 0.6, 0.2]])
def test_trajectory_is_exact_where_the_method_is(times):
    # rk4 integrates 3 t^2 exactly.
    grid = uniform(times) if isinstance(times, int) else jnp.asarray(times)
    x0 = jnp.full((2, 2), grid[0] ** 3)
    solution = sample(lambda t, x: 3 * t**2 + 0 * x, x0, RungeKutta("rk4"), times=times, trajectory=True)
    assert solution.trajectory.shape == (len(grid), 2, 2)
    np.testing.assert_allclose(solution.trajectory[:, 0, 1], grid**3, atol=1e-6)


def test_low_precision_states_keep_exact_steps():
    # Adding 1/512 to bfloat16 numbers stalls at 0.5: the steps themselves are not lost, which would give 0.
    x0 = jnp.zeros((1, 1), dtype=jnp.bfloat16)
    solution = sample(lambda t, x: jnp.ones_like(x), x0, RungeKutta("euler"), times=512)
    assert 0.4 < float(solution.x[0, 0]) <= 1


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of 'euler', .*, 'heun3', 'rk4', got 'rk5'\."):
        RungeKutta("rk5")


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
        Tableau(order=1, **tableau)
