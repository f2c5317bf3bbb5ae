"""The input-convex network: convex whatever its parameters, near the identity map at first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from fm_jax.models.icnn import ICNN, linen_potential

MODULES = {
    "rank 0": ICNN(features=(6,), rank=0, strong_convexity=0.05),
    "rank 1": ICNN(features=(5, 7), strong_convexity=0.0),
    "rank 3": ICNN(features=(5, 4, 3), rank=3, strong_convexity=0.3),
    "sharp": ICNN(features=(5, 7), sharpness=4.0),
}
DIM = 3


def any_params(module, seed=0):
    """Parameters with nothing special about them, in double precision: kernels of every sign, far from the start."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, DIM)))["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), shapes)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_hessian_is_at_least_the_strong_convexity(module, x64):
    psi = linen_potential(module)
    params = any_params(module)
    x = 3 * np.random.default_rng(1).standard_normal((64, DIM))
    hessian = jax.jit(jax.vmap(jax.hessian(lambda x: psi(params, x[None])[0])))(x)
    np.testing.assert_allclose(hessian, hessian.transpose(0, 2, 1), atol=1e-12)
    # A kernel drawn at random is far from singular only beside |A x|^2, so take that away: the rest must be convex too.
    params = {**params, "square": {"kernel": jnp.zeros((DIM, DIM))}}
    hessian = jax.jit(jax.vmap(jax.hessian(lambda x: psi(params, x[None])[0])))(x)
    smallest = np.linalg.eigvalsh(hessian).min(axis=1)
    assert (smallest >= module.strong_convexity - 1e-12).all()
    # Nor is it convex only for being quadratic.
    assert np.ptp(np.trace(hessian, axis1=1, axis2=2)) > 1e-2


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_lies_below_its_chords(module, x64):
    """Psi(s x + (1 - s) y) <= s Psi(x) + (1 - s) Psi(y) - strong_convexity s (1 - s) |x - y|^2 / 2, far apart."""
    psi = jax.jit(functools.partial(linen_potential(module), any_params(module)))
    x, y = 5 * np.random.default_rng(2).standard_normal((2, 256, DIM))
    s = np.random.default_rng(3).uniform(size=256)
    chord = s * psi(x) + (1 - s) * psi(y)
    bound = chord - module.strong_convexity * s * (1 - s) * ((x - y) ** 2).sum(axis=1) / 2
    assert (psi(s[:, None] * x + (1 - s[:, None]) * y) <= bound + 1e-10 * np.abs(chord)).all()


@pytest.mark.slow
@pytest.mark.parametrize("dim", [2, 50])
def test_starts_near_the_identity_map(dim):
    module = ICNN()
    x = jax.random.normal(jax.random.key(1), (100, dim))
    params = module.init(jax.random.key(0), x)["params"]
    moved = jax.jit(jax.grad(lambda x: linen_potential(module)(params, x).sum()))(x) - x
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert 0 < jnp.sqrt((moved**2).mean() / (x**2).mean()) < 0.1


@pytest.mark.slow
def test_holds_the_maps_between_gaussians(x64):
    """With the layers off, grad Psi(x) = (strong_convexity + A' A) x + b."""
    module = ICNN(features=(4,), strong_convexity=0.1)
    params = any_params(module)
    params["out"]["kernel"] = jnp.full((4, 1), -jnp.inf)
    x = np.random.default_rng(4).standard_normal((5, DIM))
    kernel, b = np.asarray(params["square"]["kernel"]), np.asarray(params["linear"]["kernel"])[:, 0]
    expected = x @ (0.1 * np.eye(DIM) + kernel @ kernel.T) + b
    actual = jax.grad(lambda x: linen_potential(module)(params, x).sum())(jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.slow
def test_sharpness_is_that_of_the_bend(x64):
    """One unit, Psi(x) = |A x|^2 / 2 + b x + w softplus(s (a x + c)) / s, adds w expit(s (a x + c)) a to the map."""
    module = ICNN(features=(1,), rank=0, strong_convexity=0.0, sharpness=7.0)
    params = any_params(module)
    x = np.random.default_rng(5).standard_normal((20, DIM))
    kernel, b = np.asarray(params["square"]["kernel"]), np.asarray(params["linear"]["kernel"])[:, 0]
    a, c = np.asarray(params["input_0"]["affine"]["kernel"])[:, 0], float(params["input_0"]["affine"]["bias"][0])
    w = np.log1p(np.exp(float(params["out"]["kernel"][0, 0])))
    expected = x @ kernel @ kernel.T + b + w * np.outer(scipy.special.expit(7 * (x @ a + c)), a)
    actual = jax.grad(lambda x: linen_potential(module)(params, x).sum())(jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("event_shape", [(), (1,), (4, 4, 2)])
def test_any_event_shape(event_shape):
    module, x = ICNN(features=(4, 4)), jnp.ones((3, *event_shape), dtype=jnp.bfloat16)
    potential, _ = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), x))
    assert (potential.shape, potential.dtype) == ((3,), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_derivatives_are_finite_at_the_origin_and_far_out(scale):
    module = ICNN(features=(4, 4))
    x = jnp.full((2, 2), scale)
    params = module.init(jax.random.key(0), x)["params"]
    loss = lambda params, x: linen_potential(module)(params, x).sum()  # noqa: E731
    gradients = jax.jit(lambda p, x: (jax.grad(loss, (0, 1))(p, x), jax.jvp(jax.grad(loss, 1), (p, x), (p, x))[1]))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients(params, x)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": ()}, r"features must be a tuple of at least one positive integer, got \(\)"),
        ({"features": (4, 0)}, r"features\[1\] must be at least 1, got 0"),
        ({"rank": -1}, "rank must be at least 0, got -1"),
        ({"strong_convexity": 1.0}, r"strong_convexity must be in \[0, 1\), got 1.0"),
        ({"sharpness": 0.0}, "sharpness must be positive and finite, got 0.0"),
        ({"sharpness": float("inf")}, "sharpness must be positive and finite, got inf"),
        ({"strong_convexity": -0.1}, r"strong_convexity must be in \[0, 1\), got -0.1"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        ICNN(**options)
