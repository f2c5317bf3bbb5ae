"""Products: what their parts say by themselves, put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.likelihood import log_prob
from fm_jax.manifolds import SE3, SO3, Euclidean, Product, Sphere, tangent_velocity
from fm_jax.samplers import RungeKutta

KEY = jax.random.key(0)
CIRCLE_AND_SPHERE = Product((Sphere(1), Sphere(2)))
NESTED = Product((CIRCLE_AND_SPHERE, SO3(), Euclidean(2)))


def drawn(num, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 3)
    like = lambda *shape: jax.ShapeDtypeStruct((num, *shape), dtype)  # noqa: E731
    parts = (CIRCLE_AND_SPHERE.uniform(keys[0], like(5)), SO3().uniform(keys[1], like(3, 3)))
    return NESTED.join((*parts, jax.random.normal(keys[2], (num, 2), dtype)))


class UniformTimesNormal:
    """On the circle times the line."""

    def draw(self, key, like):
        raise NotImplementedError

    def log_prob(self, x):
        return -np.log(2 * np.pi) - x[:, 2] ** 2 / 2 - np.log(2 * np.pi) / 2


def test_its_numbers_add():
    assert NESTED.dim == 3 + 3 + 2
    assert NESTED.shape == (5 + 9 + 2,)
    assert NESTED.log_total is None
    np.testing.assert_allclose(CIRCLE_AND_SPHERE.log_total, np.log(2 * np.pi) + np.log(4 * np.pi))
    assert SE3() == Product((SO3(), Euclidean(3)))
    assert hash(NESTED) == hash(Product((Product((Sphere(1), Sphere(2))), SO3(), Euclidean(2))))


@pytest.mark.slow
def test_points_are_taken_apart_and_put_together_with_any_leading_axes():
    x = drawn(6).reshape(2, 3, 16)
    parts = NESTED.split(x)
    assert [each.shape for each in parts] == [(2, 3, 5), (2, 3, 3, 3), (2, 3, 2)]
    np.testing.assert_array_equal(NESTED.join(parts), x)
    np.testing.assert_array_equal(parts[1][1, 2].reshape(9), x[1, 2, 5:14])
    assert NESTED.join(NESTED.split(x[:0])).shape == (0, 3, 16)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exp", "log", "tangent", "gradient"])
def test_vectors_are_those_of_the_parts(method):
    x, y = drawn(4), drawn(4, 1)
    second = y if method == "log" else NESTED.log(x, y)
    found = jax.jit(getattr(NESTED, method))(x, second)
    for part, each, *arguments in zip(NESTED.parts, NESTED.split(found), NESTED.split(x), NESTED.split(second)):
        np.testing.assert_allclose(each, getattr(part, method)(*arguments), atol=1e-6)


@pytest.mark.slow
def test_there_and_back(x64):
    x, y = drawn(20, dtype=jnp.float64), drawn(20, 1, jnp.float64)
    u = NESTED.log(x, y)
    np.testing.assert_allclose(NESTED.exp(x, u), y, atol=1e-14)
    np.testing.assert_allclose(NESTED.squared_norm(x, u), NESTED.distance(x, y) ** 2, rtol=1e-13)
    of_parts = [part.distance(*each) for part, *each in zip(NESTED.parts, NESTED.split(x), NESTED.split(y))]
    np.testing.assert_allclose(NESTED.distance(x, y), np.sqrt(sum(np.square(each) for each in of_parts)), rtol=1e-14)
    of_parts = [part.log_jacobian(*each) for part, *each in zip(NESTED.parts, NESTED.split(x), NESTED.split(u))]
    np.testing.assert_allclose(NESTED.log_jacobian(x, u), np.sum(of_parts, axis=0), rtol=1e-13)
    np.testing.assert_array_equal(NESTED.log_volume(x), np.zeros(20))
    assert NESTED.project(x).dtype == jnp.float64


@pytest.mark.slow
def test_derivatives_at_coincidence_are_the_projection(x64):
    x = drawn(1, dtype=jnp.float64)[0]
    wanted = jax.jit(jax.jacfwd(lambda u: NESTED.tangent(x, u)))(x)
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(NESTED.log, 1))(x, x), wanted, atol=1e-14)
        np.testing.assert_array_equal(jax.jit(jacobian(NESTED.distance, 1))(x, x), 0)


def test_divergences_add(x64):
    """On SE(3), of a field that turns, -2 tr(A^T R), and one that grows, 3 / 2."""
    manifold, a = SE3(), np.random.default_rng(0).normal(size=(3, 3))
    x = manifold.join((SO3().uniform(KEY, jnp.zeros((1, 3, 3))), jnp.ones((1, 3))))

    def field(t, x):
        turn, move = manifold.split(x)
        return manifold.join((SO3().gradient(turn, jnp.broadcast_to(jnp.asarray(a), turn.shape)), move / 2))

    v = tangent_velocity(manifold, field)
    found = jnp.trace(jax.jit(jax.jacfwd(lambda z: v(0.0, z[None])[0]))(x[0]))
    np.testing.assert_allclose(found, -2 * np.sum(a * np.asarray(manifold.split(x)[0][0])) + 1.5, rtol=1e-12)


@pytest.mark.slow
def test_draws_are_independent_in_the_parts():
    x = jnp.broadcast_to(drawn(1), (20_000, 16))
    u = NESTED.normal(KEY, x)
    np.testing.assert_allclose(NESTED.squared_norm(x, u).mean(), NESTED.dim, atol=0.15)
    circle, _, move = NESTED.split(u)
    assert abs(np.corrcoef(circle[:, 0], move[:, 0])[0, 1]) < 0.03
    two = Product((Sphere(1), Sphere(1))).uniform(KEY, jnp.zeros((20_000, 4)))
    assert np.abs(np.cov(two.T) - np.eye(4) / 2).max() < 0.02


def test_the_likelihood_of_a_product_is_that_of_its_parts(x64):
    """Rotation of the circle, and growth of the line by e: the density is 1 / (2 pi) N(x / e) / e."""
    manifold = Product((Sphere(1), Euclidean(1)))
    x = jnp.array([[0.6, 0.8, 0.3], [0.0, -1.0, -2.0]])

    def v(t, x):
        circle, line = manifold.split(x)
        return manifold.join((jnp.stack([-circle[:, 1], circle[:, 0]], axis=1), line))

    found = log_prob(v, x, manifold=manifold, source=UniformTimesNormal(), sampler=RungeKutta("rk4"), times=40)
    wanted = -np.log(2 * np.pi) - (x[:, 2] / np.e) ** 2 / 2 - np.log(2 * np.pi) / 2 - 1
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), r"parts must be a tuple of manifolds, .* got \(\)"),
        ([Sphere(1)], r"got \[Sphere"),
        ((Sphere(1), 3), "manifold must be a manifold, .* got 3"),
        ((Sphere,), "got the class Sphere"),
    ],
)
def test_what_are_no_parts_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        Product(parts)


def test_what_is_no_point_is_refused():
    x = np.array(drawn(3))
    NESTED.check("x", x)
    with pytest.raises(ValueError, match=r"x must be points of Product.*, \[..., 16\], got shape \(3, 15\)"):
        NESTED.check("x", x[:, 1:])
    with pytest.raises(ValueError, match="in floating point, got int64"):
        NESTED.check("x", x.astype(int))
    off = x.copy()
    off[1, 5:14] *= -1
    with pytest.raises(ValueError, match=r"part 1 of x must be points of SO3\(\), got 1 of 3 off it"):
        NESTED.check("x", off)
    off = x.copy()
    off[2, 3] = np.nan
    with pytest.raises(ValueError, match=r"part 1 of part 0 of x must be points of Sphere\(n=2\), got 1 of 3 off it"):
        NESTED.check("x", off)
    with pytest.raises(ValueError, match="no uniform distribution, its volume is infinite"):
        SE3().uniform(KEY, jnp.zeros((2, 12)))
    with pytest.raises(ValueError, match="one array for each of the 3 parts, got 2"):
        NESTED.join(NESTED.split(x)[:2])
    with pytest.raises(ValueError, match=r"points\[1\] must be points of SO3\(\)"):
        NESTED.join((x[:, :5], x[:, 5:14], x[:, 14:]))
    with pytest.raises(ValueError, match="same leading axes"):
        NESTED.join((x[:1, :5], x[:, 5:14].reshape(3, 3, 3), x[:, 14:]))
    with pytest.raises(ValueError, match="key must be one typed key"):
        NESTED.normal(0, x)
