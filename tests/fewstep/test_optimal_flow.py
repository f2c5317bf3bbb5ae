"""Optimal Flow Matching against linear algebra for quadratic potentials, differences, and the maps of Gaussians."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import optimised

from fm_jax.couplings import paired
from fm_jax.fewstep import (
    inverse_transport,
    invert,
    optimal_flow,
    optimal_flow_matching,
    straight_velocity,
    transport,
)
from fm_jax.models.icnn import ICNN, linen_potential
from fm_jax.samplers import RungeKutta, sample

RNG = np.random.default_rng(0)
A = np.array([[1.5, 0.4, 0.0], [0.4, 0.8, -0.3], [0.0, -0.3, 2.0]])
B = np.array([0.5, -1.0, 2.0])
FEATURES, SHIFTS = RNG.standard_normal((3, 6)), RNG.standard_normal(6)
X0, X1 = RNG.standard_normal((2, 4, 3))
T = np.array([1e-6, 0.3, 0.7, 1.0])
CURVED = {"a": 0.5, "w": np.linspace(0.2, 1.0, 6), "b": B}


def quadratic(params, x):
    return 0.5 * jnp.einsum("bi,ij,bj->b", x, A.astype(x.dtype), x) + params * x @ B.astype(x.dtype)


def curved(params, x):
    """a |x|^2 / 2 + w softplus(F x + s) + b x, convex and far from quadratic."""
    x = x.reshape(x.shape[0], -1)
    bends = jax.nn.softplus(x @ FEATURES.astype(x.dtype) + SHIFTS.astype(x.dtype)[None])
    return params["a"] / 2 * (x**2).sum(axis=1) + bends @ params["w"].astype(x.dtype) + x @ params["b"].astype(x.dtype)


def curved_gradient(params, z):
    return params["a"] * z + (params["w"] / (1 + np.exp(-(z @ FEATURES + SHIFTS)))) @ FEATURES.T + params["b"]


def curved_hessian(params, z):
    slope = 1 / (1 + np.exp(-(z @ FEATURES + SHIFTS)))
    return params["a"] * np.eye(3) + np.einsum("if,bf,jf->bij", FEATURES, slope * (1 - slope) * params["w"], FEATURES)


@pytest.fixture(params=[64, 0], ids=["dense", "cg"])
def solver(request, monkeypatch):
    """Both ways to solve the linear systems, whatever the dimension."""
    monkeypatch.setattr(optimal_flow, "_DENSE", request.param)


@pytest.mark.slow
def test_value_by_hand(solver, x64):
    """Quadratic Psi: z0 solves a linear system, and d times the loss is the paper's E |(z0 - x0) / t|^2."""
    x_t = (1 - T)[:, None] * X0 + T[:, None] * X1
    z0 = np.stack([np.linalg.solve((1 - t) * np.eye(3) + t * A, x - t * B) for t, x in zip(T, x_t)])
    paper = (((z0 - X0) / T[:, None]) ** 2).sum(axis=1)
    weight = np.array([0.5, 1.0, 2.0, 3.0])
    loss_fn = jax.jit(optimal_flow_matching(quadratic, tolerance=1e-10))
    loss, metrics = loss_fn(1.0, None, {"x0": X0, "x1": X1, "t": T, "weight": weight})
    np.testing.assert_allclose(3 * metrics["mse"], paper.mean(), rtol=1e-7)
    np.testing.assert_allclose(3 * loss, (weight * paper).mean(), rtol=1e-7)
    assert loss == metrics["loss"]
    assert metrics["residual"] < 1e-10
    assert metrics["unconverged"] == 0


@pytest.mark.slow
def test_gradient_is_the_implicit_one(solver, x64):
    """Against a dense Hessian in NumPy, and against central differences of the loss, also in forward mode."""
    batch = {"x0": X0, "x1": X1, "t": T}
    loss_fn = lambda params: optimal_flow_matching(curved, tolerance=1e-11)(params, None, batch)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss_fn))(CURVED)

    x_t = (1 - T)[:, None] * X0 + T[:, None] * X1
    z0, residual = jax.jit(functools.partial(invert, curved, tolerance=1e-11))(CURVED, T, x_t)
    z0 = np.asarray(z0)
    np.testing.assert_allclose((1 - T)[:, None] * z0 + T[:, None] * curved_gradient(CURVED, z0), x_t, atol=1e-10)
    assert residual.shape == (4,)
    matrix = T[:, None, None] * curved_hessian(CURVED, z0) + (1 - T)[:, None, None] * np.eye(3)
    error = curved_gradient(CURVED, z0) - z0 - (X1 - X0)
    q = 2 / X0.size * np.linalg.solve(matrix, error[..., None])[..., 0]
    slope = 1 / (1 + np.exp(-(z0 @ FEATURES + SHIFTS)))
    by_hand = {"a": (q * z0).sum(), "w": ((q @ FEATURES) * slope).sum(axis=0), "b": q.sum(axis=0)}
    for name, value in by_hand.items():
        np.testing.assert_allclose(gradient[name], value, rtol=1e-6, atol=1e-9)

    direction = {"a": 0.7, "w": np.linspace(-1, 1, 6), "b": np.array([0.3, -0.2, 0.1])}
    moved = lambda step: jax.tree.map(lambda p, d: p + step * d, CURVED, direction)  # noqa: E731
    loss = jax.jit(loss_fn)
    difference = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
    forward = jax.jit(lambda p, d: jax.jvp(loss_fn, (p,), (d,))[1])(CURVED, direction)
    reverse = sum(np.sum(gradient[name] * direction[name]) for name in direction)
    np.testing.assert_allclose([forward, reverse], difference, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_inverse_at_all_times_and_event_shapes(dtype, x64):
    x = RNG.standard_normal((4, 3, 1)).astype(dtype)
    t = np.array([0.0, 1e-6, 0.5, 1.0], dtype=dtype)
    params = jax.tree.map(lambda p: np.asarray(p, dtype=dtype), CURVED)
    z0, residual = jax.jit(functools.partial(invert, curved))(params, t, x)
    assert z0.dtype == residual.dtype == dtype
    z = np.asarray(z0, dtype=float)[..., 0]
    back = (1 - t)[:, None] * z + t[:, None] * curved_gradient(CURVED, z)
    np.testing.assert_allclose(back, x[..., 0], atol=2e-4)
    assert (residual <= 1e-4).all()
    np.testing.assert_array_equal(z0[0], x[0])
    at_zero = jax.jit(straight_velocity(curved, params))(dtype(0), x)
    np.testing.assert_allclose(at_zero[..., 0], curved_gradient(CURVED, x[..., 0]) - x[..., 0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_transport_and_back():
    params = jax.tree.map(lambda p: np.asarray(p, dtype=np.float32), CURVED)
    x0 = X0.astype(np.float32)
    x1 = transport(curved, params, x0)
    np.testing.assert_allclose(x1, curved_gradient(CURVED, X0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(functools.partial(inverse_transport, curved))(params, x1).z0, x0, atol=1e-3)


@pytest.mark.slow
def test_velocity_is_straight(x64):
    """One Euler step is the transport, and on the way the velocity stays what it was."""
    v = straight_velocity(curved, CURVED, tolerance=1e-9)
    x1 = transport(curved, CURVED, X0)
    np.testing.assert_allclose(sample(v, X0, RungeKutta("euler"), times=1).x, x1, rtol=1e-9)
    for t in (0.4, 1.0):
        np.testing.assert_allclose(jax.jit(v)(t, (1 - t) * X0 + t * x1), x1 - X0, atol=1e-7)


def steps(height, x):
    """A map with flat pieces and steep steps between, as between the modes of data."""
    return 0.05 * (x**2).sum(axis=1) + height * (jnp.logaddexp(20 * x, -20 * x) / 20).sum(axis=1)


@pytest.mark.slow
def test_newton_survives_steps_and_failures_show():
    """Full Newton steps never get there: from x = 2, t = 1 the first goes to -18 or so, where they turn back."""
    t, x = jnp.ones(5), jnp.array([[2.0], [0.5], [-0.9], [-2.0], [0.0]])
    z0, residual = jax.jit(functools.partial(invert, steps))(1.0, t, x)
    np.testing.assert_allclose(0.1 * z0 + jnp.tanh(20 * z0), x, atol=1e-4)
    assert (residual < 1e-4).all()
    batch = {"x0": jnp.zeros((5, 1)), "x1": x, "t": t}
    _, metrics = jax.jit(optimal_flow_matching(steps, max_iterations=2))(1.0, None, batch)
    assert 0 < metrics["unconverged"] < 1
    assert metrics["residual"] > 1e-4
    v = jax.jit(straight_velocity(steps, 1.0, max_iterations=2))(1.0, x)
    np.testing.assert_allclose(jnp.isnan(v).mean(), metrics["unconverged"])
    _, metrics = jax.jit(optimal_flow_matching(steps))(jnp.nan, None, batch)
    assert metrics["unconverged"] == 1


COVARIANCE = np.array([[2.0, 0.6], [0.6, 0.5]])
EIGENVALUES, EIGENVECTORS = np.linalg.eigh(COVARIANCE)
ROOT = EIGENVECTORS @ np.diag(EIGENVALUES**0.5) @ EIGENVECTORS.T
MEAN = np.array([1.0, -0.5])


def around_quadratic(params, x):
    """x S x / 2 + b x + c softplus(x_0 - x_1): at c = 0 the map between two Gaussians."""
    bend = jax.nn.softplus(x[:, 0] - x[:, 1])
    return 0.5 * jnp.einsum("bi,ij,bj->b", x, params["s"], x) + x @ params["b"] + params["c"] * bend


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["independent", "turned"])
def test_optimal_map_is_stationary_for_any_plan(plan):
    """At Brenier's potential from N(0, I) to N(m, C), C^(1/2) and m, the mean gradient of the loss is 0.

    z-scores of 7 parameters, 5 of them distinct, are within 4.5 under each of two plans: false alarms at 7e-5. Away
    from it they are not.
    """
    num = 8_000
    key_0, key_1, key_t = jax.random.split(jax.random.key(3), 3)
    x0 = jax.random.normal(key_0, (num, 2))
    z = jax.random.normal(key_1, (num, 2)) if plan == "independent" else x0[:, ::-1] * jnp.array([[1.0, -1.0]])
    batch = {"x0": x0, "x1": z @ ROOT + MEAN[None], "t": jax.random.uniform(key_t, (num,))}
    loss_fn = optimal_flow_matching(around_quadratic, coupling=paired)
    alone = lambda params, each: loss_fn(params, None, jax.tree.map(lambda leaf: leaf[None], each))[0]  # noqa: E731
    gradients = jax.jit(jax.vmap(jax.grad(alone), in_axes=(None, 0)))

    def z_scores(params):
        stacked = gradients(jax.tree.map(jnp.float32, params), batch)
        return [abs(g.mean(axis=0)) / (g.std(axis=0) / num**0.5) for g in jax.tree.leaves(stacked)]

    best = {"s": ROOT, "b": MEAN, "c": 0.0}
    assert max(score.max() for score in z_scores(best)) < 4.5
    for worse in ({"s": 1.2 * ROOT}, {"b": MEAN + 0.3}, {"c": 0.5}):
        assert max(score.max() for score in z_scores({**best, **worse})) > 10


@pytest.mark.slow
def test_training_finds_the_optimal_map():
    """An ICNN trained on independent pairs: the unexplained share E |T(x) - T*(x)|^2 / Var falls from 0.66 to 0.005."""
    module, optimizer = ICNN(features=(16,)), optax.adam(3e-2)
    potential = linen_potential(module)
    held_out = jax.random.normal(jax.random.key(9), (512, 2))
    best = held_out @ ROOT + MEAN[None]
    loss_fn = optimal_flow_matching(potential)

    def unexplained(params):
        return ((transport(potential, params, held_out) - best) ** 2).sum(axis=1).mean() / np.trace(COVARIANCE)

    @optimised
    def train(params):
        def step(carry, key):
            params, state = carry
            key_data, key_loss = jax.random.split(key)
            batch = {"x1": jax.random.normal(key_data, (256, 2)) @ ROOT + MEAN[None]}
            (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, key_loss, batch)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), metrics["unconverged"]

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 120))

    params = module.init(jax.random.key(0), held_out)["params"]
    (trained, _), unconverged = train(params)
    before, after = unexplained(params), unexplained(trained)
    assert before > 0.3
    assert after < 0.02
    assert unconverged.max() == 0


BATCH = {"x0": jnp.zeros((2, 3)), "x1": jnp.ones((2, 3)), "t": jnp.zeros(2)}


@pytest.mark.parametrize("make", [optimal_flow_matching, lambda f, **options: straight_velocity(f, 1.0, **options)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be positive and finite, got 0.0"),
        ({"tolerance": float("nan")}, "tolerance must be positive and finite, got nan"),
        ({"max_iterations": 0}, "max_iterations must be at least 1, got 0"),
    ],
)
def test_refuses_options(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(quadratic, **options)


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="the potential sees no condition: take 'cond' out of the batch"):
        optimal_flow_matching(quadratic)(1.0, None, {**BATCH, "cond": jnp.zeros(2, dtype=int)})
    with pytest.raises(ValueError, match=r"the potential must be \[batch\] = \(1,\), got shape \(\)"):
        optimal_flow_matching(lambda params, x: (x**2).sum())(1.0, None, BATCH)
    with pytest.raises(ValueError, match=r"the potential must be \[batch\] = \(2,\), got shape \(2, 1\)"):
        transport(lambda params, x: x[:, :1], None, BATCH["x1"])
