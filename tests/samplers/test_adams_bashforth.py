import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.guidance import classifier_free
from fm_jax.samplers.adams_bashforth import START, sample_adams_bashforth
from fm_jax.samplers.fixed import sample_ode
from fm_jax.samplers.grids import cosine, uniform
from fm_jax.schedules import Linear

NUM_STEPS = [32, 64, 128, 256]
FIELDS = ["mixture", "guided"]


@pytest.fixture(scope="module")
def orders():
    """Measured orders on a uniform and on a warped grid, and back in time: {(order, field): [3]}."""
    with jax.enable_x64(True):
        cats = oracles.gaussian_mixture([[-1.0, 0.0], [1.0, 0.5]], [0.6, 0.8], [0.3, 0.7])
        everything = oracles.gaussian_mixture([[0.0, 0.0], [0.5, -0.5]], [1.0, 0.7])
        v_cats, v_everything = oracles.velocity(cats, Linear()), oracles.velocity(everything, Linear())
        fields = dict(zip(FIELDS, [v_cats, classifier_free(v_cats, v_everything, 2.0)], strict=True))
        x0 = jax.random.normal(jax.random.key(0), (8, 2))
        grids = [jnp.stack([g, g + 0.4 * g * (1 - g), g[::-1]]) for g in map(uniform, NUM_STEPS)]

        @jax.jit
        def errors():
            out = {}
            for field, v in fields.items():
                forward = sample_ode(v, x0, num_steps=800, method="rk4").x
                backward = sample_ode(v, x0, num_steps=800, method="rk4", t0=1.0, t1=0.0).x
                exact = jnp.stack([forward, forward, backward])
                for order in START:
                    ends = [
                        jax.vmap(lambda g, v=v, k=order: sample_adams_bashforth(v, x0, grid=g, order=k).x)(grid)
                        for grid in grids
                    ]
                    out[order, field] = jnp.stack([jnp.abs(x - exact).mean(axis=(1, 2)) for x in ends])
            return out

        return {name: -np.polyfit(np.log(NUM_STEPS), np.log(e), 1)[0] for name, e in errors().items()}


@pytest.mark.parametrize("order", START)
@pytest.mark.parametrize("field", FIELDS)
def test_order_of_convergence(orders, order, field):
    np.testing.assert_allclose(orders[order, field], order, atol=0.25)


def test_is_exact_on_polynomials_of_its_order_on_any_grid(x64):
    """A velocity t^(k-1), whatever x, is integrated exactly once k velocities are known; the start has order k - 1."""
    grid = np.sort(np.random.default_rng(0).uniform(size=9))
    for order in START:
        solution = sample_adams_bashforth(
            lambda t, x, p=order: p * t ** (p - 1) + 0 * x, jnp.zeros((1, 1)), grid=grid, order=order, trajectory=True
        )
        increments = np.diff(solution.trajectory[:, 0, 0])
        np.testing.assert_allclose(increments[order - 1 :], np.diff(grid**order)[order - 1 :], rtol=1e-10)


def test_textbook_weights():
    """Hairer, Norsett & Wanner 1993, III.1: 3/2, -1/2 and 23/12, -16/12, 5/12 and 55/24, -59/24, 37/24, -9/24."""
    known = {2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}
    for order, weights in known.items():

        def last_step(at, order=order):
            def impulse(t, x):
                return jnp.where(jnp.round(t) == at, 1.0, 0.0) * jnp.ones_like(x)

            x0 = jnp.zeros((1, 1))
            x = sample_adams_bashforth(impulse, x0, num_steps=6, t1=6.0, order=order, trajectory=True).trajectory
            return (x[6] - x[5])[0, 0]

        # A velocity that is 1 at one time and 0 at the others reads its weight off.
        read = jax.jit(jax.vmap(last_step))(5.0 - np.arange(order))
        np.testing.assert_allclose(read, np.array(weights) / sum(weights), atol=1e-5)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("order", START)
def test_nfe_counts_the_calls_that_happen(order, num_steps):
    calls = []

    def network(t, x):
        jax.debug.callback(lambda: calls.append(1))
        return x

    v = classifier_free(network, network, 2.0)
    solution = jax.jit(lambda x: sample_adams_bashforth(v, x, num_steps=num_steps, order=order))(jnp.ones((3, 1)))
    jax.block_until_ready(solution)
    jax.effects_barrier()
    assert int(solution.nfe) == len(calls)


def test_gradients_also_of_the_grid():
    def end(a, bend):
        grid = uniform(8) + bend * cosine(8)
        return sample_adams_bashforth(lambda t, x: a * x, jnp.ones((1, 1)), grid=grid / (1 + bend), order=4).x[0, 0]

    by_rate, by_grid = jax.jit(jax.grad(end, argnums=(0, 1)))(1.0, 0.5)
    np.testing.assert_allclose(by_rate, np.e, rtol=1e-3)
    assert np.isfinite(by_grid)


X = jnp.ones((2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 4, "order": 1}, "order must be one of 2, 3, 4, got 1."),
        ({"num_steps": 4, "order": "2"}, "order must be one of 2, 3, 4, got '2'."),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0."),
        ({}, "Exactly one of num_steps and grid must be given."),
        ({"grid": [0.0, 0.6, 0.5]}, "grid must be finite and strictly monotone"),
        ({"num_steps": 4, "v": lambda t, x: x[:, :1]}, r"v\(t, x\) must have the shape of x, \(2, 3\), got \(2, 1\)."),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sample_adams_bashforth(**{"v": lambda t, x: x, "x0": X, **options})
