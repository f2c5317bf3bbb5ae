import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import guided_by_half
from exponential import even

from fm_jax.samplers import AdamsBashforth, RungeKutta, sample
from fm_jax.samplers.adams_bashforth import START
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
                    return sample(v, x0, AdamsBashforth(order), times=grid, trajectory=True).trajectory[n]

                return jax.vmap(jax.vmap(at_end), in_axes=(0, None))(grids, jnp.array(NUM_STEPS))

            return {order: end(order) for order in START}

        @jax.jit
        def exact(ends):
            return jax.vmap(lambda grid: sample(v, x0, RungeKutta("rk4"), times=grid).x)(ends)

        reference = np.asarray(exact(np.stack([even(800), even(800)[::-1]])))[[0, 0, 1]]
        out = {}
        for order, x in ends(grids).items():
            # [kind, num_steps, field]
            errors = np.abs(x - reference[:, None]).reshape(3, len(NUM_STEPS), 2, -1).mean(axis=-1)
            for i, field in enumerate(FIELDS):
                out[order, field] = -np.polyfit(np.log(NUM_STEPS), np.log(errors[..., i].T), 1)[0]
        return out


@pytest.mark.slow
@pytest.mark.parametrize("order", START)
@pytest.mark.parametrize("field", FIELDS)
def test_order_of_convergence(orders, order, field):
    np.testing.assert_allclose(orders[order, field], order, atol=0.25)


@pytest.mark.slow
def test_is_exact_on_polynomials_of_its_order_on_any_grid(x64):
    """A velocity t^(k-1), whatever x, is integrated exactly once k velocities are known; the start has order k - 1."""
    grid = np.sort(np.random.default_rng(0).uniform(size=9))
    for order in START:
        v, x0 = (lambda t, x, p=order: p * t ** (p - 1) + 0 * x), jnp.zeros((1, 1))
        solution = sample(v, x0, AdamsBashforth(order), times=grid, trajectory=True)
        increments = np.diff(solution.trajectory[:, 0, 0])
        np.testing.assert_allclose(increments[order - 1 :], np.diff(grid**order)[order - 1 :], rtol=1e-10)


def test_textbook_weights():
    """Hairer, Norsett & Wanner 1993, III.1: 3/2, -1/2 and 23/12, -16/12, 5/12 and 55/24, -59/24, 37/24, -9/24."""
    known = {2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}
    for order, weights in known.items():

        def last_step(at, order=order):
            def impulse(t, x):
                return jnp.where(jnp.round(6 * t) == at, 6.0, 0.0) * jnp.ones_like(x)

            x = sample(impulse, jnp.zeros((1, 1)), AdamsBashforth(order), times=6, trajectory=True).trajectory
            return (x[6] - x[5])[0, 0]

        # A velocity that is 1 over the step at one time and 0 at the others reads its weight off.
        read = jax.jit(jax.vmap(last_step))(5.0 - np.arange(order))
        np.testing.assert_allclose(read, np.array(weights) / sum(weights), atol=1e-5)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("order", START)
def test_few_steps_cost_what_the_start_costs(order):
    stages = {2: 1, 3: 2, 4: 3}[order]
    for num_steps in (1, 2, 7):
        calls = []

        def network(t, x, calls=calls):
            jax.debug.callback(lambda: calls.append(1))
            return x

        solution = jax.jit(lambda x, v=network, n=num_steps: sample(v, x, AdamsBashforth(order), times=n))(
            jnp.ones((3, 1))
        )
        jax.block_until_ready(solution)
        jax.effects_barrier()
        assert int(solution.calls) == len(calls) == num_steps + min(num_steps, order - 1) * (stages - 1)


def test_gradients_also_of_the_times():
    def end(a, bend):
        times = (uniform(8) + bend * cosine(8)) / (1 + bend)
        return sample(lambda t, x: a * x, jnp.ones((1, 1)), AdamsBashforth(4), times=times).x[0, 0]

    by_rate, by_times = jax.jit(jax.grad(end, argnums=(0, 1)))(1.0, 0.5)
    np.testing.assert_allclose(by_rate, np.e, rtol=1e-3)
    assert np.isfinite(by_times)


@pytest.mark.parametrize(("order", "wanted"), [(1, "from 2 to 4"), (5, "from 2 to 4"), ("2", "an integer")])
def test_other_orders_are_refused(order, wanted):
    with pytest.raises(ValueError, match=f"order must be {wanted}, got {order!r}."):
        AdamsBashforth(order)
