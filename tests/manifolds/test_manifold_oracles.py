"""Closed forms on manifolds against quadrature, the continuity equation and draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.linalg import expm

from fm_jax.likelihood import log_prob
from fm_jax.manifolds import SO3, FlatTorus, Hyperbolic, Sphere, UniformOn, VonMisesFisher, WrappedNormal
from fm_jax.manifolds import tangent_velocity as tangent
from fm_jax.oracles import heat_kernel_circle, heat_kernel_sphere, killing, moebius, point_mixture
from fm_jax.paths import GeodesicPath
from fm_jax.samplers import Adaptive, Ambient, RungeKutta, sample
from fm_jax.schedules import Linear, Polynomial

KEY, SPHERE = jax.random.key(0), Sphere(2)
NORTH = np.array([[0.0, 0.0, 1.0]])
WEIGHTS = (0.5, 0.3, 0.2)


def some(manifold, num, spread=0.4, seed=0):
    """Points not far from one, as float64."""
    with jax.enable_x64(True):
        x = jnp.broadcast_to(origin(manifold), (num, *manifold.shape))
        return np.asarray(manifold.exp(x, spread * manifold.normal(jax.random.key(seed), x)))


def origin(manifold):
    """One point, which is not special."""
    if isinstance(manifold, SO3):
        return jnp.eye(3)[np.array([1, 2, 0])]
    if isinstance(manifold, FlatTorus):
        return jnp.array([2.8, -1.0])
    return jnp.array([1.25, 0.75, 0.0]) if isinstance(manifold, Hyperbolic) else jnp.array([0.6, 0.0, 0.8])


def mixture_on(manifold, scale=0.35):
    source = WrappedNormal(manifold, np.asarray(some(manifold, 1, seed=9)[0]), scale)
    return point_mixture(manifold, some(manifold, 3), WEIGHTS, Polynomial(1.5), source)


MANIFOLDS = [Sphere(2), FlatTorus(2), Hyperbolic(2), SO3()]


# ---- Mixtures of points.


def sphere_grid(num=48):
    """Gauss and Legendre in z times even angles: points [n, 3] and weights."""
    z, weights = np.polynomial.legendre.leggauss(num)
    angle = np.arange(2 * num) * np.pi / num
    r = np.sqrt(1 - z**2)[:, None]
    x = np.stack(np.broadcast_arrays(r * np.cos(angle), r * np.sin(angle), z[:, None]), axis=-1)
    return x.reshape(-1, 3), np.repeat(weights * np.pi / num, 2 * num)


def torus_grid(num=96):
    angle = np.arange(num) * 2 * np.pi / num - np.pi
    return np.stack(np.meshgrid(angle, angle), axis=-1).reshape(-1, 2), np.full(num**2, (2 * np.pi / num) ** 2)


def hyperbolic_grid(num=100, far=7.0):
    """Polar about the origin."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    r, angle = far * (nodes[:, None] + 1) / 2, np.arange(num) * 2 * np.pi / num
    x = np.broadcast_arrays(np.cosh(r), np.sinh(r) * np.cos(angle), np.sinh(r) * np.sin(angle))
    each = np.broadcast_to(np.sinh(r) * weights[:, None] * far / 2 * 2 * np.pi / num, (num, num))
    return np.stack(x, axis=-1).reshape(-1, 3), each.reshape(-1)


def rotation_grid(num=28):
    """Euler's angles, R_z(a) R_y(b) R_z(c), of volume sin b."""
    z, weights = np.polynomial.legendre.leggauss(num)
    angle = np.arange(num) * 2 * np.pi / num
    a, z, c = np.meshgrid(angle, z, angle, indexing="ij")

    def turn(cosine, sine, i, j):
        matrix = np.zeros((*cosine.shape, 3, 3))
        matrix[..., 3 - i - j, 3 - i - j] = 1
        matrix[..., i, i], matrix[..., j, j], matrix[..., j, i], matrix[..., i, j] = cosine, cosine, sine, -sine
        return matrix

    first, last = (turn(np.cos(each), np.sin(each), 0, 1) for each in (a, c))
    x = first @ turn(z, np.sqrt(1 - z**2), 2, 0) @ last
    each = np.broadcast_to(weights[None, :, None] * (2 * np.pi / num) ** 2, z.shape)
    return x.reshape(-1, 3, 3), each.reshape(-1)


GRIDS = {Sphere: sphere_grid, FlatTorus: torus_grid, Hyperbolic: hyperbolic_grid, SO3: rotation_grid}


@pytest.mark.slow
@pytest.mark.parametrize("manifold", MANIFOLDS, ids=lambda manifold: type(manifold).__name__)
def test_the_mass_is_one(manifold):
    x, weights = GRIDS[type(manifold)]()
    with jax.enable_x64(True):
        log_p = jax.jit(mixture_on(manifold).log_prob)
        for t in (0.0, 0.3):
            total = (np.exp(log_p(jnp.asarray(t), jnp.asarray(x))) * weights).sum()
            assert abs(total - 1) < 1e-6


@pytest.mark.parametrize(("t", "edge"), [(0.2, 0.8), (0.7, 0.3)])
def test_the_mass_is_one_from_the_uniform_source(t, edge):
    """Up to its edge, at (1 - kappa) pi, by polar coordinates; beyond it there is nothing."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    with jax.enable_x64(True):
        mixture = point_mixture(SPHERE, NORTH, None, Linear(), UniformOn(SPHERE))
        r = edge * np.pi * (nodes + 1) / 2
        x = jnp.asarray(np.stack([np.sin(r), 0 * r, np.cos(r)], axis=1))
        log_p = jax.jit(mixture.log_prob)(t, x)
        # sin(r / (1 - kappa)) / sin(r) / (1 - kappa) / 4 pi
        np.testing.assert_allclose(log_p, np.log(np.sin(r / edge) / np.sin(r) / edge / 4 / np.pi), atol=1e-10)
        assert abs((np.exp(log_p) * np.sin(r) * weights).sum() * edge * np.pi**2 - 1) < 1e-12
        beyond = jnp.asarray([[np.sin(edge * np.pi + 0.01), 0.0, np.cos(edge * np.pi + 0.01)]])
        np.testing.assert_array_equal(jax.jit(mixture.log_prob)(t, beyond), -np.inf)
        # There the velocity is that to the nearest point, at the speed of the path.
        v = jax.jit(mixture.velocity)(t, beyond)
        np.testing.assert_allclose(jnp.linalg.norm(v), (edge * np.pi + 0.01) / edge, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("manifold", MANIFOLDS, ids=lambda manifold: type(manifold).__name__)
def test_the_continuity_equation(manifold):
    """d/dt log p + div v + <v, grad log p> = 0; derivatives in the ambient space, of extensions along fibres."""
    with jax.enable_x64(True):
        mixture = mixture_on(manifold)
        x, size = jnp.asarray(some(manifold, 6, seed=4)), int(np.prod(manifold.shape))
        v = tangent(manifold, mixture.velocity)

        def residual(t, x):
            flat = x.reshape(-1)
            back = lambda flat: flat.reshape(1, *manifold.shape)  # noqa: E731
            log_p = lambda t, flat: mixture.log_prob(t, manifold.project(back(flat)))[0]  # noqa: E731
            u = v(t, back(flat)).reshape(-1)
            change = jax.jvp(log_p, (t, flat), (jnp.ones_like(t), u))[1]
            jacobian = jax.jacfwd(lambda flat: v(t, back(flat)).reshape(-1))(flat)
            return change + jnp.trace(jacobian.reshape(size, size))

        residuals = jax.jit(jax.vmap(residual, (None, 0)))
        for t in (0.1, 0.4):
            assert float(jnp.abs(residuals(jnp.asarray(t), x)).max()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("manifold", MANIFOLDS, ids=lambda manifold: type(manifold).__name__)
def test_velocity_and_draws_are_those_of_the_path(manifold):
    """Near x, the mean of u_t is v(t, x) and the number of draws p_t(x), within 4 standard errors."""
    num, t = 100_000, 0.4
    mixture = mixture_on(manifold)
    keys = jax.random.split(KEY)
    like = jax.ShapeDtypeStruct((num, *manifold.shape), jnp.float32)
    x = jnp.asarray(some(manifold, 4, 0.2, seed=5), jnp.float32)[2:3]

    @jax.jit
    def pairs():
        which = jax.random.choice(keys[0], 3, (num,), p=jnp.asarray(WEIGHTS))
        x1 = jnp.asarray(mixture.points, jnp.float32)[which]
        found = GeodesicPath(manifold, Polynomial(1.5)).sample(None, t, mixture.path.source.draw(keys[1], like), x1)
        off = [manifold.distance(jnp.broadcast_to(x, found.x_t.shape), each) for each in (found.x_t, drawn(keys[0]))]
        return mixture.velocity(t, found.x_t), mixture.log_prob(t, found.x_t), found.u_t, off

    def drawn(key):
        return mixture.sample(key, t, num)

    v, log_p, u, off = jax.tree.map(lambda each: np.asarray(each, np.float64), pairs())
    assert np.isfinite(log_p).all()
    close = off[0] < 0.3
    error = (u - v)[close].reshape(close.sum(), -1)  # each against the velocity where it is: no bias by the width
    assert close.sum() > 300
    assert (np.abs(error.mean(axis=0)) <= 4 * error.std(axis=0) / np.sqrt(close.sum()) + 1e-5).all()
    assert (error.std(axis=0) > 1e-3).any()
    # Of the volume of the ball, by draws of 1 / p: E[1(close) / p] is that volume.
    volume = (close / np.exp(log_p)).mean()
    exact = {Sphere: 2 * np.pi * (1 - np.cos(0.3)), FlatTorus: np.pi * 0.09, Hyperbolic: 2 * np.pi * (np.cosh(0.3) - 1)}
    exact = exact.get(type(manifold), 8 * np.pi * (0.3 - np.sin(0.3)))
    assert abs(volume - exact) < 4 * (close / np.exp(log_p)).std() / np.sqrt(num) + 1e-6
    # `draw` draws from the same law.
    assert abs(close.mean() - (off[1] < 0.3).mean()) < 4 * np.sqrt(2 * close.mean() / num)


def test_draws_have_the_density():
    """A histogram over bands of z."""
    mixture = point_mixture(
        SPHERE, [[0.0, 0.6, 0.8], [0.0, 0.0, -1.0]], (0.7, 0.3), Linear(), VonMisesFisher(NORTH[0], 2)
    )
    z = np.asarray(jax.jit(lambda: mixture.sample(KEY, 0.3, 20_000))()[:, 2])
    nodes, weights = np.polynomial.legendre.leggauss(24)
    edges, angle = np.linspace(-1, 1, 11), np.arange(48) * np.pi / 24
    height = (edges[:-1, None] + (nodes + 1)[None] / 10).reshape(-1, 1)
    r = np.sqrt(1 - height**2)
    x = np.stack(np.broadcast_arrays(r * np.cos(angle), r * np.sin(angle), height), axis=-1)
    p = np.exp(jax.jit(mixture.log_prob)(0.3, jnp.asarray(x.reshape(-1, 3), jnp.float32))).reshape(10, 24, 48)
    share = (p.mean(axis=2) * 2 * np.pi * weights[None]).sum(axis=1) / 10
    assert abs(share.sum() - 1) < 2e-3  # the kinks
    assert stats.chisquare(np.histogram(z, edges)[0], share / share.sum() * len(z)).pvalue > 1e-3


@pytest.mark.slow
def test_it_is_a_velocity_for_samplers_and_likelihoods():
    """The flow carries the source to the points, and the likelihood of the library is the closed form."""
    with jax.enable_x64(True):
        mixture = point_mixture(
            SPHERE, some(SPHERE, 3), None, Linear(), VonMisesFisher(some(SPHERE, 1, seed=9)[0], 30.0)
        )
        x0 = mixture.path.source.draw(KEY, jnp.zeros((40, 3)))
        solve = jax.jit(
            lambda x0: sample(mixture.velocity, x0, RungeKutta("rk4", SPHERE), times=jnp.linspace(0, 0.99, 60))
        )
        x = solve(x0).x
        apart = jnp.arccos(jnp.clip(x @ mixture.points.T, -1, 1)).min(axis=1)
        assert float(apart.max()) < 0.1
        half = mixture.sample(KEY, 0.3, 5)
        found = jax.jit(
            lambda x: log_prob(
                lambda t, x: 0.3 * mixture.velocity(0.3 * t, x),
                x,
                manifold=SPHERE,
                source=mixture.path.source,
                sampler=Adaptive(rtol=1e-10, atol=1e-10),
            )
        )(half)
        np.testing.assert_allclose(found, mixture.log_prob(0.3, half), atol=1e-7)


@pytest.mark.slow
def test_events_of_several_points():
    """Of independent components the density is a product, and the velocities stand side by side."""
    with jax.enable_x64(True):
        one, two = (some(SPHERE, 1, seed=seed) for seed in (1, 2))
        source = VonMisesFisher(NORTH[0], 2.0)
        joint = point_mixture(SPHERE, np.stack([one, two], axis=1), None, Linear(), source)
        x = joint.sample(KEY, jnp.array([0.1, 0.3, 0.6, 0.0]), 4)
        t = jnp.array([0.1, 0.3, 0.6, 0.0])
        assert x.shape == (4, 2, 3)
        each = [point_mixture(SPHERE, points, None, Linear(), source) for points in (one, two)]
        wanted = sum(mixture.log_prob(t, x[:, i]) for i, mixture in enumerate(each))
        np.testing.assert_allclose(joint.log_prob(t, x), wanted, rtol=1e-10)
        v = jnp.stack([mixture.velocity(t, x[:, i]) for i, mixture in enumerate(each)], axis=1)
        np.testing.assert_allclose(joint.velocity(t, x), v, rtol=1e-10)


@pytest.mark.slow
def test_single_precision():
    for manifold in MANIFOLDS:
        mixture = mixture_on(manifold)
        f = jax.jit(lambda x, mixture=mixture: (mixture.log_prob(0.4, x), mixture.velocity(0.4, x)))
        x = some(manifold, 20, seed=4)
        coarse = f(jnp.asarray(x, jnp.float32))
        with jax.enable_x64(True):
            fine = f(jnp.asarray(np.asarray(x, np.float32), jnp.float64))
        for a, b in zip(coarse, fine):
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# ---- Flows.


def points(num, n=2, seed=0):
    return Sphere(n).uniform(jax.random.key(seed), jnp.zeros((num, n + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 5])
def test_moebius(n):
    """The density by its published form; the map solves the equation, and its inverse is the map of minus the time."""
    with jax.enable_x64(True):
        a = np.asarray(points(1, n, 3))[0]
        flow, x = moebius(a), points(6, n)
        s = np.arctanh(np.asarray(x) @ a)
        for t in (0.0, 0.4, 1.0):
            wanted = -Sphere(n).log_total + n * (np.log(np.cosh(s)) - np.log(np.cosh(s - t)))
            np.testing.assert_allclose(flow.log_prob(t, x), wanted, atol=1e-12)
        moved, slope = jax.jvp(lambda t: flow.flow_map(t, x), (0.7,), (1.0,))
        np.testing.assert_allclose(slope, flow.velocity(0.7, moved), atol=1e-12)
        np.testing.assert_allclose(jnp.linalg.norm(moved, axis=1), 1, atol=1e-14)
        np.testing.assert_allclose(flow.flow_map(-0.7, moved), x, atol=1e-14)
        solution = sample(flow.velocity, x, Ambient(Sphere(n), Adaptive(rtol=1e-11, atol=1e-11)))
        np.testing.assert_allclose(solution.x, flow.flow_map(1.0, x), atol=1e-9)
        times = jnp.linspace(0, 1, 6)
        np.testing.assert_allclose(flow.log_prob(times, x)[2], flow.log_prob(0.4, x)[2], atol=1e-12)
        two = x.reshape(3, 2, n + 1)
        np.testing.assert_allclose(flow.log_prob(0.4, two), flow.log_prob(0.4, x).reshape(3, 2).sum(axis=1), atol=1e-12)
        assert flow.flow_map(0.4, two).shape == flow.velocity(0.4, two).shape == two.shape


@pytest.mark.slow
def test_killing():
    """Tangent, of divergence 0, and its flow is the rotation."""
    with jax.enable_x64(True):
        w = np.random.default_rng(0).normal(size=(4, 4))
        w = w - w.T
        v, x = killing(w), points(5, 3)
        np.testing.assert_allclose((v(0.0, x) * x).sum(axis=1), 0, atol=1e-14)
        field = tangent(Sphere(3), v)
        jacobian = jax.vmap(jax.jacfwd(lambda x: field(0.0, x[None])[0]))(x)
        np.testing.assert_allclose(jnp.trace(jacobian, axis1=1, axis2=2), 0, atol=1e-13)
        moved = jnp.asarray(np.asarray(x) @ expm(0.3 * w).T)
        slope = (jnp.asarray(np.asarray(x) @ expm((0.3 + 1e-6) * w).T) - moved) / 1e-6
        np.testing.assert_allclose(v(0.3, moved), slope, atol=1e-4)
        assert killing(w.tolist())(0.0, x.astype(jnp.float32)).dtype == jnp.float32


# ---- Heat kernels.


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.02, 1.0, 5.0, 7.0, 30.0])
def test_heat_on_the_circle(t):
    """Mass 1, both series, and the heat equation."""
    with jax.enable_x64(True):
        angle = np.arange(256) * 2 * np.pi / 256 - np.pi
        log_p = heat_kernel_circle(t, angle)
        assert abs(np.exp(log_p).sum() * 2 * np.pi / 256 - 1) < 1e-12
        k = np.arange(1, 200)[:, None]
        fourier = (1 + 2 * (np.exp(-0.5 * k**2 * t) * np.cos(k * angle)).sum(axis=0)) / 2 / np.pi
        np.testing.assert_allclose(np.exp(log_p), fourier, atol=1e-13)
        p = lambda t, angle: jnp.exp(heat_kernel_circle(t, angle))  # noqa: E731
        laplacian = jax.grad(jax.grad(p, 1), 1)(t, 0.7)
        np.testing.assert_allclose(jax.grad(p)(t, 0.7), laplacian / 2, atol=1e-12)


@pytest.mark.parametrize("t", [0.02, 0.3, 2.0, 20.0])
def test_heat_on_the_sphere(t):
    """Mass 1; E P_l of the angle is exp(-l (l + 1) t / 2); near the start flat space with its correction."""
    z, weights = np.polynomial.legendre.leggauss(200)
    with jax.enable_x64(True):
        p = np.exp(np.asarray(jax.jit(lambda angle: heat_kernel_sphere(t, angle))(np.arccos(z)))) * 2 * np.pi * weights
        assert abs(p.sum() - 1) < 1e-12
        for degree in (1, 2, 7):
            harmonic = np.polynomial.legendre.Legendre.basis(degree)(z)
            np.testing.assert_allclose((p * harmonic).sum(), np.exp(-degree * (degree + 1) * t / 2), atol=1e-12)
    if t < 0.1:
        angle = jnp.array([0.1, 0.3])
        flat = -(angle**2) / 2 / t - jnp.log(2 * jnp.pi * t) + 0.5 * jnp.log(angle / jnp.sin(angle)) + t / 8
        np.testing.assert_allclose(heat_kernel_sphere(t, angle), flat, atol=2e-3)


@pytest.mark.slow
def test_heat_is_brownian_motion():
    """Steps of variance 1/200 along geodesics, to t = 0.5, against both kernels, in ten bins."""
    num, rng = 20_000, np.random.default_rng(0)
    x, circle = np.tile(NORTH, (num, 1)), np.zeros(num)
    for _ in range(100):
        u = rng.normal(size=(num, 3)) * np.sqrt(0.5 / 100)
        circle += u[:, 0] * 2
        u -= (u * x).sum(axis=1, keepdims=True) * x
        r = np.linalg.norm(u, axis=1, keepdims=True)
        x = np.cos(r) * x + np.sin(r) * u / r
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(0, np.pi, 11)
    angle = (edges[:-1, None] + np.pi / 20 * (nodes + 1)[None]).ravel()
    for found, log_p, area in (
        (np.arccos(x[:, 2]), heat_kernel_sphere(0.5, angle), 2 * np.pi * np.sin(angle)),
        (np.abs((circle + np.pi) % (2 * np.pi) - np.pi), heat_kernel_circle(2.0, angle), 2 + 0 * angle),
    ):
        share = (np.exp(log_p) * area).reshape(10, 20) @ weights * np.pi / 20
        keep = share * num > 5
        counts = np.histogram(found, edges)[0]
        assert abs(share.sum() - 1) < 1e-5
        pooled = [np.append(each[keep], each[~keep].sum()) if (~keep).any() else each for each in (counts, share * num)]
        assert ((pooled[0] - pooled[1]) ** 2 / np.maximum(pooled[1], 1)).sum() < stats.chi2.isf(1e-4, len(pooled[0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: point_mixture(3, NORTH, None, Linear(), None), "manifold must be a manifold"),
        (lambda: point_mixture(SPHERE, NORTH, None, Linear(), None), "source must be a source"),
        (lambda: point_mixture(SPHERE, NORTH[0], None, Linear(), UniformOn(SPHERE)), r"points must be \[k, ..., 3\]"),
        (
            lambda: point_mixture(SPHERE, 2 * NORTH, None, Linear(), UniformOn(SPHERE)),
            "points must be points of Sphere",
        ),
        (
            lambda: point_mixture(SPHERE, NORTH, (1.0, 2.0), Linear(), UniformOn(SPHERE)),
            r"weights must be \[k\] = \[1\]",
        ),
        (
            lambda: mixture_on(SPHERE).log_prob(0.5, jnp.zeros((2, 2, 3))),
            r"x must be \[batch, ...\] with events \(3,\)",
        ),
        (lambda: mixture_on(SPHERE).velocity(0.5, jnp.zeros((2, 4))), r"\[..., 3\], got shape \(2, 4\)"),
        (lambda: mixture_on(SPHERE).sample(KEY, 0.5, 0), "num must be at least 1"),
        (lambda: moebius([1.0, 1.0]), "a must be a unit vector"),
        (lambda: moebius([1.0, 0.0]).velocity(0.0, jnp.zeros((1, 3))), r"\[..., 2\], got shape \(1, 3\)"),
        (lambda: killing(np.eye(2)), "matrix must be antisymmetric"),
        (lambda: killing(np.zeros((2, 2)))(0.0, jnp.zeros((1, 3))), r"\[..., 2\], got shape \(1, 3\)"),
        (lambda: heat_kernel_circle(0.0, 1.0), "t must be positive and finite"),
        (lambda: heat_kernel_sphere(np.array([1.0, -1.0]), 1.0), "t must be positive and finite"),
        (lambda: jax.jit(heat_kernel_sphere)(1.0, 1.0), "t must be known when it is built"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
