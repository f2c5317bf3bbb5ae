import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import guided_by_half
from exponential import even

from fm_jax.guidance import classifier_free
from fm_jax.samplers.adams_bashforth import START, sample_adams_bashforth
from fm_jax.samplers.fixed import sample_ode
from fm_jax.samplers.grids import cosine, uniform
from fm_jax.schedules import Linear

NUM_STEPS = [32, 64, 128, 256]
FIELDS = ["mixture", "guided"]


def continued(grid):
    """The grid with short steps after its end, so that all have one length and compile once."""
    further = np.arange(1, NUM_STEPS[-1] + 2 - len(grid)) / NUM_STEPS[-1]
    return np.concatenate([grid, grid[-1] + np.sign(grid[-1] - grid[0]) * further])


@pytest.fixture(scope="module")
def orders():
    """Measured orders on an even and on a warped grid, and back in time: {(order, field): [3]}."""
    with jax.enable_x64(True):
        x0 = jax.random.normal(jax.random.key(0), (8, 2), dtype=float)
        v = guided_by_half(Linear(), len(x0))
        kinds = (lambda g: g, lambda g: g + 0.4 * g * (1 - g), lambda g: g[::-1])
        grids = np.stack([[continued(kind(even(n))) for n in NUM_STEPS] for kind in kinds])

        @jax.jit
        def ends(grids):
            def end(order):
                def at_end(grid, n):
                    return sample_adams_bashforth(v, x0, grid=grid, order=order, trajectory=True).trajectory[n]

                return jax.vmap(jax.vmap(at_end), in_axes=(0, None))(grids, jnp.array(NUM_STEPS))

            return {order: end(order) for order in START}

        @jax.jit
        def exact(ends):
            return jax.vmap(lambda grid: sample_ode(v, x0, grid=grid, method="rk4").x)(ends)

        reference = np.asarray(exact(np.stack([even(800), even(800)[::-1]])))[[0, 0, 1]]
        out = {}
        for order, x in ends(grids).items():
            # [kind, num_steps, field]
            errors = np.abs(x - reference[:, None]).reshape(3, len(NUM_STEPS), 2, -1).mean(axis=-1)
            for i, field in enumerate(FIELDS):
                out[order, field] = -np.polyfit(np.log(NUM_STEPS), np.log(errors[..., i].T), 1)[0]
        return out


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
