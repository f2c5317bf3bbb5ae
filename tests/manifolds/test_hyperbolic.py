"""Hyperbolic spaces in the Lorentz model, against closed forms in extended precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.manifolds import Hyperbolic, from_ball, tangent_velocity, to_ball

KEY, SPACE = jax.random.key(0), Hyperbolic(3)
METRIC = np.diag([-1.0, 1, 1, 1])


def lorentz(x, y):
    return (x[..., 1:] * y[..., 1:]).sum(axis=-1) - x[..., 0] * y[..., 0]


def extended(x):
    """The point with those coordinates after the first, in extended precision."""
    x = np.asarray(x).astype(np.longdouble)
    return np.concatenate([np.sqrt(1 + (x[..., 1:] ** 2).sum(axis=-1, keepdims=True)), x[..., 1:]], axis=-1)


def closed_forms(x, y):
    """log and distance, by `(d / sinh d) (y - cosh(d) x)` and `4 sinh^2(d / 2) = <y - x, y - x>_L`."""
    x, y = extended(x), extended(y)
    d = 2 * np.arcsinh(np.sqrt(lorentz(y - x, y - x)) / 2)[..., None]
    more = 2 * np.sinh(d / 2) ** 2  # cosh d - 1
    return d / np.sinh(d) * (y - x - more * x), d[..., 0]


def points(num, scale=0.7, seed=0, n=3, dtype=jnp.float64):
    """At distances of about `scale sqrt(n)` from the origin."""
    origin = jnp.zeros((num, n + 1), dtype).at[:, 0].set(1)
    return move(Hyperbolic(n), origin, scale * Hyperbolic(n).normal(jax.random.key(seed), origin))


move = jax.jit(Hyperbolic.exp, static_argnums=0)


def frame(x):
    """Orthonormal tangent vectors at one point, [n, n + 1], by Gram and Schmidt in the Lorentz product."""
    x, vectors = np.asarray(x), []
    for u in np.random.default_rng(0).normal(size=(len(x) - 1, len(x))):
        for _ in range(2):
            u = u + lorentz(x, u) * x - sum((lorentz(b, u) * b for b in vectors), np.zeros_like(u))
        vectors.append(u / np.sqrt(lorentz(u, u)))
    return np.stack(vectors)


def test_there_and_back(x64):
    x, y = points(40), points(40, 1.0, 1)
    u = SPACE.log(x, y)
    wanted, distance = closed_forms(x, y)
    np.testing.assert_allclose(u, wanted.astype(float), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(SPACE.distance(x, y), distance.astype(float), rtol=1e-13)
    np.testing.assert_allclose(SPACE.distance(x, y), np.arccosh(-lorentz(x, y)), rtol=1e-12)
    np.testing.assert_allclose(SPACE.exp(x, u), y, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(SPACE.squared_norm(x, u), distance.astype(float) ** 2, rtol=1e-12)
    np.testing.assert_allclose(SPACE.squared_norm(x, u), lorentz(u, u), rtol=1e-11)
    np.testing.assert_allclose(lorentz(x, u), 0, atol=1e-12)
    np.testing.assert_array_equal(SPACE.log(x, x), 0)
    np.testing.assert_allclose(SPACE.exp(x, 0 * x), x, rtol=1e-15)
    length = np.sqrt(lorentz(u, u))[:, None]
    half = np.cosh(length / 2) * x + np.sinh(length / 2) / length * u
    np.testing.assert_allclose(SPACE.exp(x, u / 2), half, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.float64, 1e-14)])
def test_exp_stays_on_the_manifold(dtype, tolerance, x64):
    """In relation to the size of the coordinates; -1 is a difference of their squares."""
    x = points(200, 1.0, dtype=dtype)
    y = SPACE.exp(x, 1.5 * SPACE.normal(KEY, x))
    assert y.dtype == dtype
    y = np.asarray(y, float)
    assert y[:, 0].max() > 50
    assert (np.abs(lorentz(y, y) + 1) / y[:, 0] ** 2).max() < tolerance
    SPACE.check("y", jnp.asarray(y, dtype))


@pytest.mark.parametrize("n", [2, 10])
@pytest.mark.parametrize("radius", [0.0, 1.0])
def test_float32_is_right_at_all_distances(n, radius):
    """log, distance and exp of the float32 coordinates themselves, from 1e-6 to 5."""
    rng, size = np.random.default_rng(n), np.geomspace(1e-6, 5, 80)

    def point(directions, lengths):
        spatial = np.sinh(lengths)[:, None] * directions / np.linalg.norm(directions, axis=1)[:, None]
        return extended(np.concatenate([np.ones((80, 1)), spatial], axis=1))

    x = np.asarray(point(rng.normal(size=(80, n)), np.full(80, radius)), np.float32)
    space, base = Hyperbolic(n), extended(x)
    u = rng.normal(size=(80, n + 1)).astype(np.longdouble)
    u = u + lorentz(base, u)[:, None] * base
    u = u / np.sqrt(lorentz(u, u))[:, None] * size[:, None]
    y = np.asarray(np.cosh(size)[:, None] * base + np.sinh(size)[:, None] / size[:, None] * u, np.float32)
    wanted, distance = closed_forms(x, y)
    for log, dist in ((space.log, space.distance), (jax.jit(space.log), jax.jit(space.distance))):
        found = np.asarray(log(jnp.asarray(x), jnp.asarray(y)))
        assert found.dtype == np.float32
        error = np.linalg.norm((found - wanted).astype(float), axis=1) / np.linalg.norm(wanted.astype(float), axis=1)
        assert error.max() < 1e-6, error.max()
        error = np.abs(np.asarray(dist(jnp.asarray(x), jnp.asarray(y))) - distance) / distance
        assert error.max() < 1e-6, error.max()
    u = np.asarray(u, np.float32)
    moved, there = np.asarray(space.exp(jnp.asarray(x), jnp.asarray(u)), np.longdouble), extended(y)
    error = np.linalg.norm((moved - there).astype(float), axis=1) / np.linalg.norm(there.astype(float), axis=1)
    assert error.max() < 1e-6, error.max()


def test_float32_far_out_keeps_what_its_coordinates_say():
    """At 5 from the origin, where projecting along a ray moves a rounded point by up to cosh(5)^2 roundings."""
    origin = jnp.zeros((200, 4)).at[:, 0].set(1)
    u = SPACE.normal(KEY, origin)
    x = SPACE.exp(origin, 5 * u / jnp.linalg.norm(u, axis=1, keepdims=True))
    np.testing.assert_allclose(x[:, 0], np.cosh(5), rtol=1e-5)
    np.testing.assert_array_equal(SPACE.project(x), x)
    y = SPACE.exp(x, 0.01 * SPACE.normal(KEY, x))
    wanted, distance = closed_forms(x, y)
    error = np.abs(np.asarray(SPACE.distance(x, y)) - distance) / distance
    assert error.max() < 3e-5, error.max()
    error = np.linalg.norm((np.asarray(SPACE.log(x, y)) - wanted).astype(float), axis=1) / np.asarray(x[:, 0])
    assert error.max() < 1e-6, error.max()


@pytest.mark.slow
def test_projection_is_along_rays(x64):
    x = points(20)
    for scale in (0.3, 1 + 1e-6, 5.0):
        np.testing.assert_allclose(SPACE.project(scale * x), x, rtol=1e-12, atol=1e-12)
    v = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)))
    _, found = jax.jvp(SPACE.project, (x,), (v,))
    np.testing.assert_allclose(found, SPACE.tangent(x, v), atol=1e-12)
    np.testing.assert_allclose(SPACE.tangent(x, v), v + lorentz(x, v)[:, None] * x, atol=1e-12)
    np.testing.assert_allclose(jax.jvp(SPACE.project, (x,), (x,))[1], 0, atol=1e-12)
    # The second derivative too, against that off the manifold, where nothing is done about rounding.
    hessian = jax.jit(jax.hessian(lambda x: SPACE.project(x).sum()))
    twice = [hessian(s * x[0]) for s in (1.0, 1 + 1e-9)]
    np.testing.assert_allclose(*twice, rtol=1e-6, atol=1e-6)
    assert bool(jnp.isnan(SPACE.project(jnp.array([[1.0, 2.0, 0.0, 0.0]]))).all())


@pytest.mark.slow
def test_derivatives_at_coincidence(x64):
    """Of both modes: log's is the projection onto the tangent space, in the Lorentz product."""
    x, v = points(5), jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
    tangent = v + lorentz(x, v)[:, None] * x
    forth = jax.jit(jax.jacfwd(SPACE.log, 1))
    back = jax.jit(lambda x, y: jax.jacrev(SPACE.log, (0, 1))(x, y))
    projection = np.eye(4) + np.asarray(x[0])[:, None] * (METRIC @ x[0])[None]
    np.testing.assert_allclose(forth(x[0], x[0]), projection, atol=1e-12)
    np.testing.assert_allclose(back(x[0], x[0]), (-projection, projection), atol=1e-12)
    origin = jnp.array([1.0, 0, 0, 0])
    np.testing.assert_allclose(forth(origin, origin), np.diag([0.0, 1, 1, 1]), atol=1e-15)

    @jax.jit
    def others(x):
        _, of_exp = jax.jvp(lambda u: SPACE.exp(x, u), (0 * x,), (tangent,))
        of_all = lambda u: SPACE.exp(x, u).sum() + SPACE.log_jacobian(x, u).sum() + SPACE.squared_norm(x, u).sum()  # noqa: E731
        return of_exp, jax.grad(lambda x, y: SPACE.distance(x, y).sum(), (0, 1))(x, x), jax.grad(of_all)(0 * x)

    of_exp, of_distance, slope = others(x)
    np.testing.assert_allclose(of_exp, tangent, atol=1e-12)
    np.testing.assert_array_equal(of_distance, np.zeros((2, 5, 4)))
    assert jnp.isfinite(slope).all()


def test_derivatives_elsewhere(x64):
    """The gradient of half the squared distance to y is -log_x(y): by differences, and in the metric."""
    x, y = points(5), points(5, seed=1)
    slope = jax.jit(jax.grad(lambda x: (SPACE.distance(x, y) ** 2).sum() / 2))(x)
    np.testing.assert_allclose(SPACE.gradient(x, slope), -SPACE.log(x, y), rtol=1e-9, atol=1e-10)
    u, h = SPACE.normal(KEY, x), 1e-6
    found = jax.jit(lambda x, u: jax.jvp(lambda x: SPACE.log(x, y), (x,), (u,))[1])(x, u)
    ahead, behind = (closed_forms(move(SPACE, x, s * u), y)[0] for s in (h, -h))
    np.testing.assert_allclose(found, ((ahead - behind) / (2 * h)).astype(float), atol=1e-8)


def test_gradients_are_those_of_the_metric(x64):
    x = points(5)
    f = lambda x: jnp.sin(x @ jnp.array([0.3, 1.0, -0.5, 0.2])).sum()  # noqa: E731
    g = SPACE.gradient(x, jax.grad(f)(x))
    np.testing.assert_allclose(lorentz(x, g), 0, atol=1e-12)
    u = SPACE.normal(KEY, x)
    np.testing.assert_allclose(lorentz(g, u).sum(), jax.jvp(f, (x,), (u,))[1], rtol=1e-11)


def test_what_exp_does_to_volumes(x64):
    """log_jacobian is the log-determinant of the derivative of exp in orthonormal frames."""
    for n in (1, 3):
        space, x = Hyperbolic(n), points(1, n=n)[0]
        slope = jax.jit(jax.jacfwd(space.exp, 1))
        for size in (1e-3, 0.7, 4.0):
            u = size * frame(x)[0]
            moved = frame(x) @ slope(x, u).T
            at_y = frame(space.exp(x, u))
            matrix = np.array([[lorentz(a, np.asarray(b)) for a in at_y] for b in moved])
            found = space.log_jacobian(x, u)
            np.testing.assert_allclose(found, np.linalg.slogdet(matrix)[1], atol=1e-9)
            np.testing.assert_allclose(found, (n - 1) * np.log(np.sinh(size) / size), atol=1e-12)


def test_the_trace_in_the_ambient_space_is_the_divergence(x64):
    """div grad f = n f for f = <a, x>_L, of which the gradient is a + f x; boosts and turns have divergence 0."""
    a = jnp.array([0.3, 1.0, -0.5, 0.2])
    x = points(6)
    np.testing.assert_array_equal(SPACE.log_volume(x), np.zeros(6))
    generator = jnp.zeros((4, 4)).at[0, 1].set(1).at[1, 0].set(1).at[2, 3].set(1).at[3, 2].set(-1)
    product = lambda x: x @ (METRIC @ a)  # noqa: E731
    for field, wanted in (
        (lambda t, x: jnp.broadcast_to(a[None], x.shape), 3 * product(x)),
        (lambda t, x: x @ generator.T, np.zeros(6)),
        (lambda t, x: product(x)[:, None] * a[None], 3 * product(x) ** 2 + lorentz(a, a) + product(x) ** 2),
    ):
        v = tangent_velocity(SPACE, field)
        one = lambda x: v(0.0, x[None])[0]  # noqa: B023, E731
        found = jax.jit(jax.vmap(lambda x: jnp.trace(jax.jacfwd(one)(x))))(x)  # noqa: B023
        np.testing.assert_allclose(found, wanted, atol=1e-10)


def test_normal_vectors_are_standard():
    num = 20_000
    x = jnp.broadcast_to(points(1, dtype=jnp.float32), (num, 4))
    u = np.asarray(SPACE.normal(KEY, x), float)
    np.testing.assert_allclose(lorentz(np.asarray(x, float), u), 0, atol=1e-4)
    found = lorentz(u[:, None], frame(np.asarray(x[0], float))[None])
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=5 / num**0.5)
    np.testing.assert_allclose(np.cov(found.T), np.eye(3), atol=5 * (2 / num) ** 0.5)


@pytest.mark.slow
def test_the_ball(x64):
    """Its metric is 4 |dy|^2 / (1 - |y|^2)^2, and its distance that of Poincare."""
    x, z = points(20), points(20, seed=1)
    y, w = to_ball(x), to_ball(z)
    assert y.shape == (20, 3)
    np.testing.assert_allclose(from_ball(y), x, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), np.tanh(np.arccosh(x[:, 0]) / 2), rtol=1e-12)
    gap, room = ((y - w) ** 2).sum(axis=1), (1 - (y**2).sum(axis=1)) * (1 - (w**2).sum(axis=1))
    np.testing.assert_allclose(SPACE.distance(x, z), np.arccosh(1 + 2 * gap / room), rtol=1e-11)
    u = SPACE.normal(KEY, x)
    _, moved = jax.jvp(lambda x: x[..., 1:] / (1 + x[..., :1]), (x,), (u,))
    found = 4 * (moved**2).sum(axis=1) / (1 - (y**2).sum(axis=1)) ** 2
    np.testing.assert_allclose(found, SPACE.squared_norm(x, u), rtol=1e-11)
    assert jnp.isfinite(jax.jit(jax.jacrev(from_ball))(jnp.zeros(3))).all()
    for wrong in (jnp.array([[1.0, 0.0]]), jnp.array([[0.2, jnp.nan]]), jnp.zeros((2, 2), int), jnp.zeros(())):
        with pytest.raises(ValueError, match="y must"):
            from_ball(wrong)
    for wrong in (jnp.zeros((2, 3)), jnp.zeros(()), jnp.ones((2, 1)), jnp.ones((2, 3), int)):
        with pytest.raises(ValueError, match="x must"):
            to_ball(wrong)


def test_bad_input_is_refused():
    good = points(4, dtype=jnp.float32)
    SPACE.check("x", good)
    for wrong, message in (
        (2 * good, "got 4 of 4 off it, by up to .*; manifold.project brings them there"),
        (good.at[:, 0].multiply(-1), "got 4 of 4 off it"),
        (good.at[1, 0].set(0.5), "got 1 of 4 off it"),
        (good.at[1].set(jnp.nan), "got 1 of 4 off it"),
        (good[:, 1:], r"x must be points of Hyperbolic\(n=3\), \[..., 4\], got shape \(4, 3\)"),
        (good.astype(int), "in floating point, got int32"),
        (1.0, "x must be"),
    ):
        with pytest.raises(ValueError, match=message):
            SPACE.check("x", wrong)
    for n in (0, 2.0, True):
        with pytest.raises(ValueError, match="n must be"):
            Hyperbolic(n)
    with pytest.raises(ValueError, match=r"Hyperbolic\(n=3\) has no uniform distribution"):
        SPACE.uniform(KEY, good)
    assert SPACE.log_total is None
    with pytest.raises(ValueError, match="key must be"):
        SPACE.normal(None, good)
