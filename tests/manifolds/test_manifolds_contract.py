"""What every manifold claims, measured on each that contracts.py lists, in float64 against what defines it."""

import functools
import math

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import manifolds
from fm_jax.likelihood import log_prob
from fm_jax.manifolds import tangent_velocity
from fm_jax.paths import GeodesicPath
from fm_jax.samplers import Adaptive, Ambient, RungeKutta, sample
from fm_jax.samplers.runge_kutta import TABLEAUX

KEY = jax.random.key(0)
MANIFOLDS = contracts.MANIFOLDS


def every(test):
    """Each manifold; but for the first they are slow."""
    return pytest.mark.slow_but_one(pytest.mark.parametrize("manifold", MANIFOLDS, ids=repr)(test))


def like(manifold, num, dtype=jnp.float64):
    return jnp.zeros((num, *manifold.shape), dtype)


def origin(manifold, num, dtype=jnp.float64):
    """The same point `num` times: the projection of ones, or of the unit matrix."""
    eye = jnp.eye(manifold.shape[0]) if len(manifold.shape) == 2 else None
    start = {"Hyperbolic": jnp.zeros(manifold.shape).at[0].set(1.0)}.get(type(manifold).__name__, eye)
    if hasattr(manifold, "parts"):
        start = manifold.join([origin(part, 1, dtype)[0] for part in manifold.parts])
    start = manifold.project(jnp.ones(manifold.shape, dtype) if start is None else start.astype(dtype))
    return jnp.broadcast_to(start[None], (num, *manifold.shape))


def drawn(manifold, num, seed=0, scale=0.5, dtype=jnp.float64):
    """Points around the origin, by normal vectors."""
    start = origin(manifold, num, dtype)
    return manifold.exp(start, scale * manifold.normal(jax.random.key(seed), start))


@functools.partial(jax.jit, static_argnums=0)
def _tangent(manifold, x, u):
    return manifold.tangent(x, u)


def basis(manifold, x):
    """Tangent vectors at one point, orthonormal in the metric, [dim, *shape]."""
    vectors, num = [], math.prod(manifold.shape)
    inner = jax.jit(lambda a, b: (manifold.squared_norm(x, a + b) - manifold.squared_norm(x, a - b)) / 4)
    for each in np.random.default_rng(0).normal(size=(num, *manifold.shape)):
        u = _tangent(manifold, x, jnp.asarray(each))
        for other in vectors * 2:
            u = u - inner(u, other) * other
        size = float(manifold.squared_norm(x, u))
        if size > 1e-10 and len(vectors) < manifold.dim:
            vectors.append(u / size**0.5)
    assert len(vectors) == manifold.dim
    return jnp.stack(vectors)


def coordinates(manifold, x, vectors, u):
    """Of a tangent vector, in an orthonormal basis."""
    inner = lambda b: (manifold.squared_norm(x, u + b) - manifold.squared_norm(x, u - b)) / 4  # noqa: E731
    return jax.vmap(inner)(vectors)


def field(manifold):
    """A smooth velocity on it, of moderate size; on a simplex one that does not cross its faces."""
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(math.prod(manifold.shape),) * 2))

    def velocity(t, x):
        flat = x.reshape(len(x), -1)
        v = 0.4 * jnp.sin(flat @ matrix.astype(x.dtype) + 2 * t).reshape(x.shape)
        return manifold.gradient(x, v) if isinstance(manifold, manifolds.Simplex) else v

    return velocity


@every
def test_there_and_back(manifold):
    with jax.enable_x64(True):
        x, y = drawn(manifold, 20), drawn(manifold, 20, 1)
        u = jax.jit(manifold.log)(x, y)
        np.testing.assert_allclose(manifold.exp(x, u), y, atol=1e-10)
        np.testing.assert_allclose(manifold.squared_norm(x, u), manifold.distance(x, y) ** 2, rtol=1e-10)
        np.testing.assert_allclose(manifold.distance(x, y), manifold.distance(y, x), rtol=1e-10)
        np.testing.assert_allclose(manifold.tangent(x, u), u, atol=1e-12)
        np.testing.assert_allclose(manifold.project(y), y, atol=1e-13)
        np.testing.assert_array_equal(manifold.distance(x, x), 0)
        np.testing.assert_allclose(manifold.exp(x, 0 * x), x, atol=1e-14)
        # Half of the way, and then the other half.
        half = manifold.exp(x, u / 2)
        np.testing.assert_allclose(manifold.distance(half, y), manifold.distance(x, y) / 2, rtol=1e-9)
        manifold.check("y", y)


@every
def test_derivatives_at_coincidence(manifold):
    """Both modes, of log and exp: the projection onto the tangent space."""
    with jax.enable_x64(True):

        @jax.jit
        def derivatives(x, u):
            _, of_log = jax.jvp(lambda y: manifold.log(x, y), (x,), (u,))
            _, of_exp = jax.jvp(lambda w: manifold.exp(x, w), (0 * x,), (u,))
            there = lambda x, y: manifold.exp(x, manifold.log(x, y))  # noqa: E731
            sums = [lambda x, y, f=f: f(x, y).sum() for f in (manifold.log, manifold.distance, there)]
            return of_log, of_exp, [jax.grad(f, (0, 1))(x, x) for f in sums]

        x = drawn(manifold, 3)
        u = manifold.normal(KEY, x)
        of_log, of_exp, slopes = derivatives(x, u)
        np.testing.assert_allclose(of_log, u, atol=1e-12)
        np.testing.assert_allclose(of_exp, u, atol=1e-12)
        assert all(jnp.isfinite(slope).all() for slope in jax.tree.leaves(slopes))


@every
def test_what_exp_does_to_volumes(manifold):
    """log_jacobian is the log-determinant of the derivative of exp in orthonormal bases."""
    with jax.enable_x64(True):
        x, u = drawn(manifold, 1)[0], manifold.normal(KEY, drawn(manifold, 1))[0]
        y, at_x = manifold.exp(x, u), basis(manifold, x)
        at_y = basis(manifold, y)
        moved = jax.jit(jax.vmap(lambda b: jax.jvp(lambda w: manifold.exp(x, w), (u,), (b,))[1]))(at_x)
        matrix = jax.vmap(lambda v: coordinates(manifold, y, at_y, v))(moved)
        wanted = np.linalg.slogdet(np.asarray(matrix))[1]
        np.testing.assert_allclose(manifold.log_jacobian(x[None], u[None])[0], wanted, atol=1e-9)


@every
def test_gradients_are_those_of_the_metric(manifold):
    """<grad f, u> is the derivative of f along u."""
    with jax.enable_x64(True):
        x = drawn(manifold, 1)
        u = manifold.normal(KEY, x)
        weights = jnp.asarray(np.random.default_rng(2).normal(size=x.shape))
        f = lambda x: (weights * jnp.sin(x)).sum()  # noqa: E731
        g = manifold.gradient(x, jax.grad(f)(x))
        inner = (manifold.squared_norm(x, g + u) - manifold.squared_norm(x, g - u)) / 4
        np.testing.assert_allclose(inner[0], jax.jvp(f, (x,), (u,))[1], rtol=1e-9)
        np.testing.assert_allclose(manifold.tangent(x, g), g, atol=1e-12)


@every
def test_normal_vectors_are_standard(manifold):
    x = jnp.broadcast_to(drawn(manifold, 1, dtype=jnp.float32), (20_000, *manifold.shape))
    u = manifold.normal(KEY, x)
    vectors = basis(manifold, x[0])
    found = jax.vmap(lambda u: coordinates(manifold, x[0], vectors.astype(x.dtype), u))(u)
    np.testing.assert_allclose(np.cov(np.asarray(found).T), np.eye(manifold.dim), atol=0.06)


@every
def test_runge_kutta_has_its_order(manifold):
    """Every method, and it stays on the manifold. By two numbers of steps, against rk4 with many."""
    with jax.enable_x64(True):
        x0, v = drawn(manifold, 4), field(manifold)
        exact = sample(v, x0, RungeKutta("rk4", manifold), times=400).x
        for method, tableau in TABLEAUX.items():
            errors = []
            for num in (24, 48):
                x = sample(v, x0, RungeKutta(method, manifold), times=num).x
                errors.append(float(jnp.abs(x - exact).max()))
                off = jnp.abs(x - manifold.project(x)).max() / (1 + jnp.abs(x).max())
                assert float(off) < 1e-14
            order = np.log2(errors[0] / errors[1])
            assert abs(order - tableau.order) < 0.15, (method, order)


@every
def test_ambient_and_intrinsic_solvers_agree(manifold):
    with jax.enable_x64(True):
        x0, v = drawn(manifold, 4), field(manifold)
        one = sample(v, x0, RungeKutta("rk4", manifold), times=200).x
        other = sample(v, x0, Ambient(manifold, Adaptive(rtol=1e-9, atol=1e-9))).x
        np.testing.assert_allclose(one, other, atol=1e-7)


@every
def test_divergences_in_the_ambient_space_are_riemannian(manifold):
    """The likelihood's change of density is that of volumes of normal coordinates, by the flow's own derivative."""
    with jax.enable_x64(True):
        v, x1 = field(manifold), drawn(manifold, 1)

        class Flat:
            def draw(self, key, like):
                raise NotImplementedError

            def log_prob(self, x):
                return jnp.zeros(len(x))

        options = {"sampler": RungeKutta("rk4"), "times": 60, "manifold": manifold, "source": Flat()}
        found = log_prob(v, x1, **options)[0]

        def back(x):
            return sample(v, x, RungeKutta("rk4", manifold), times=jnp.linspace(1, 0, 61)).x

        x0, at_x1 = back(x1), basis(manifold, x1[0])
        at_x0 = basis(manifold, x0[0])
        along = lambda b: jax.jvp(lambda w: back(manifold.exp(x1, w)), (0 * x1,), (b[None],))[1][0]  # noqa: E731
        moved = jax.jit(jax.vmap(along))(at_x1)
        matrix = jax.vmap(lambda u: coordinates(manifold, x0[0], at_x0, u))(moved)
        np.testing.assert_allclose(found, np.linalg.slogdet(np.asarray(matrix))[1], atol=1e-6)


@every
def test_the_path_regresses_the_conditional_velocity(manifold):
    """u_t is kappa' / (1 - kappa) log_{x_t}(x1), and the path ends where it should."""
    with jax.enable_x64(True):
        x0, x1, t = drawn(manifold, 6), drawn(manifold, 6, 1), jnp.linspace(0.05, 0.9, 6)
        path = GeodesicPath(manifold)
        found = path.sample(None, t, x0, x1)
        share = (1 / (1 - t)).reshape(6, *(1,) * len(manifold.shape))
        np.testing.assert_allclose(found.u_t, share * manifold.log(found.x_t, x1), atol=1e-8)
        np.testing.assert_allclose(path.sample(None, 1.0, x0, x1).x_t, x1, atol=1e-12)
        np.testing.assert_allclose(path.sample(None, 0.0, x0, x1).x_t, x0, atol=1e-12)


@every
def test_dtypes_leading_axes_and_transformations(manifold):
    x, y = drawn(manifold, 6, dtype=jnp.float32), drawn(manifold, 6, 1, dtype=jnp.float32)
    u = manifold.log(x, y)
    for value in (u, manifold.exp(x, u), manifold.distance(x, y), manifold.normal(KEY, x), manifold.log_jacobian(x, u)):
        assert value.dtype == jnp.float32
        assert jnp.isfinite(value).all()
    assert manifold.log_volume(x).shape == manifold.distance(x, y).shape == (6,)
    two = lambda a: a.reshape(2, 3, *manifold.shape)  # noqa: E731
    np.testing.assert_allclose(manifold.log(two(x), two(y)), two(u), atol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.vmap(manifold.log))(x, y), u, atol=1e-5)
    v = tangent_velocity(manifold, field(manifold))
    np.testing.assert_allclose(manifold.tangent(x, v(0.0, x)), v(0.0, x), atol=1e-4)
    assert hash(manifold) == hash(manifold)


@every
def test_points_that_are_none_are_refused(manifold):
    x = drawn(manifold, 3, dtype=jnp.float32)
    manifold.check("x", x)
    for wrong, message in (
        (x.at[1].set(jnp.nan), "x must be"),
        (x[..., :-1], "got shape"),
        (x.astype(int), "floating"),
    ):
        with pytest.raises(ValueError, match=message):
            manifold.check("x", wrong)


@every
def test_uniform_draws(manifold):
    if manifold.log_total is None:
        with pytest.raises(ValueError, match="its volume is infinite"):
            manifold.uniform(KEY, like(manifold, 2))
        return
    x = manifold.uniform(KEY, like(manifold, 4000, jnp.float32))
    manifold.check("x", x)
    assert x.dtype == jnp.float32
    # Volume of a small ball around any point: dim-dimensional, 1 + O(r^2) of the flat one.
    r = 0.4 if manifold.dim < 4 else 0.8
    share = float((manifold.distance(jnp.broadcast_to(x[:1], x.shape), x) < r).mean())
    ball = manifold.dim / 2 * math.log(math.pi) - math.lgamma(manifold.dim / 2 + 1) + manifold.dim * math.log(r)
    wanted = math.exp(ball - manifold.log_total)
    assert abs(share - wanted) < 5 * math.sqrt(wanted / 4000) + 0.15 * wanted
