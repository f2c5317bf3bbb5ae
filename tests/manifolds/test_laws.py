"""Distributions on manifolds against SciPy, quadrature and their own draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from fm_jax.manifolds import (
    SO3,
    Euclidean,
    FlatTorus,
    Hyperbolic,
    Product,
    Simplex,
    Sphere,
    UniformOn,
    VonMisesFisher,
    WrappedNormal,
)
from fm_jax.manifolds.laws import log_wrapped
from fm_jax.sources import Normal
from fm_jax.types import Source

KEY = jax.random.key(0)
NORTH = (0.0, 0.0, 1.0)


def points(num, n=2, seed=0, dtype=jnp.float64):
    return Sphere(n).uniform(jax.random.key(seed), jnp.zeros((num, n + 1), dtype))


def unit(n, seed=3):
    x = np.random.default_rng(seed).normal(size=n + 1)
    return x / np.linalg.norm(x)


def at_angle(mean, angle):
    """Points of a sphere at angles from the mean, in one direction."""
    mean = np.asarray(mean)
    way = np.eye(len(mean))[np.argmin(np.abs(mean))]
    way = way - way @ mean * mean
    angle = np.asarray(angle, np.float64)[:, None]
    return jnp.asarray(np.cos(angle) * mean[None] + np.sin(angle) * (way / np.linalg.norm(way))[None])


def mass(law, n):
    """The integral of a density that is one of the angle from the mean: by area of the S^(n-1) at that angle."""
    area = 2 * np.pi ** (n / 2) / special.gamma(n / 2)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    angle = (nodes + 1) * np.pi / 2
    density = np.exp(np.asarray(jax.jit(law.log_prob)(at_angle(law.mean, angle))))
    return float((density * np.sin(angle) ** (n - 1) * area * weights).sum() * np.pi / 2)


LAWS = [
    UniformOn(Sphere(2)),
    WrappedNormal(Sphere(3), unit(3), 0.4),
    WrappedNormal(Euclidean(2), (1.0, 2.0), 3.0),
    WrappedNormal(FlatTorus(2), (1.0, 2.0), 0.7),
    WrappedNormal(Hyperbolic(2), (1.25, 0.75, 0.0), 0.5),
    WrappedNormal(SO3(), np.eye(3), 0.5),
    WrappedNormal(Simplex(2), (0.5, 0.3, 0.2), 0.1),
    VonMisesFisher(NORTH, 2.0),
    VonMisesFisher(unit(4), 5.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS, ids=lambda law: str(law)[:30])
def test_each_is_a_source(law):
    """Of any shape, under jit and vmap, in both precisions, hashable, and a sum over the points of an example."""
    assert isinstance(law, Source)
    assert law == eval(repr(law))
    assert hash(law) == hash(eval(repr(law)))
    shape = law.manifold.shape

    def everything(keys, like):
        x = jax.vmap(lambda key: law.draw(key, like))(keys)
        log_p, slope = jax.jvp(jax.vmap(law.log_prob), (x,), (x[::-1],))
        return x, log_p, law.log_prob(x.reshape(-1, *shape)), slope, jax.grad(lambda x: law.log_prob(x).sum())(x)

    with jax.enable_x64(True):
        precise = jax.jit(law.log_prob)
        for dtype in (jnp.float32, jnp.float64):
            like = jnp.zeros((5, 3, *shape), dtype)
            x, log_p, each, *slopes = jax.jit(everything)(jax.random.split(KEY, 2), like)
            law.manifold.check("x", x)
            assert x.shape == (2, 5, 3, *shape)
            assert {x.dtype, log_p.dtype, each.dtype} == {jnp.dtype(dtype)}
            np.testing.assert_allclose(each.reshape(2, 5, 3).sum(axis=2), log_p, rtol=1e-5)
            np.testing.assert_allclose(each, precise(x.reshape(-1, *shape).astype(jnp.float64)), rtol=3e-6, atol=3e-6)
            assert all(jnp.isfinite(slope).all() for slope in slopes)
        assert law.draw(KEY, jax.ShapeDtypeStruct((2, *shape), jnp.float32)).dtype == jnp.float32


def test_uniform_is_minus_the_volume():
    x = jnp.broadcast_to(jnp.eye(3), (2, 3, 3))
    np.testing.assert_allclose(UniformOn(Sphere(2)).log_prob(x), -3 * np.log(4 * np.pi), rtol=1e-6)


# ---- Wrapped normals.


def test_wrapped_in_r_n_it_is_the_normal():
    x = jax.random.normal(KEY, (5, 3))
    np.testing.assert_allclose(
        WrappedNormal(Euclidean(3), (0.0, 0.0, 0.0), 2.0).log_prob(x), Normal(2.0).log_prob(x), rtol=1e-6
    )


@pytest.mark.parametrize("scale", [0.1, 0.4, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_wrapped_is_the_sum_over_windings(n, scale):
    """Each winding by itself, in NumPy."""
    with jax.enable_x64(True):
        law = WrappedNormal(Sphere(n), unit(n), scale)
        angle = np.array([1e-3, 0.3, 1.0, 2.0, 3.0, 3.14])
        rho = angle[:, None] + 2 * np.pi * np.arange(-400, 401)[None]
        normal = np.exp(-0.5 * (rho / scale) ** 2) / (2 * np.pi * scale**2) ** (n / 2)
        density = (normal * np.abs(rho / np.sin(rho)) ** (n - 1)).sum(axis=1)
        np.testing.assert_allclose(jax.jit(law.log_prob)(at_angle(law.mean, angle)), np.log(density), atol=1e-11)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_wrapped_has_mass_one(scale):
    with jax.enable_x64(True):
        assert abs(mass(WrappedNormal(Sphere(1), (0.0, 1.0), scale), 1) - 1) < 1e-12
        # On S^2 the density times sin of the angle has no pole, so that quadrature sees all of it.
        assert abs(mass(WrappedNormal(Sphere(2), NORTH, scale), 2) - 1) < 1e-12


@pytest.mark.parametrize("scale", [0.3, 2.0, 6.0])
def test_wrapped_on_a_torus(scale):
    """All images, two coordinates at once."""
    with jax.enable_x64(True):
        x = np.random.default_rng(0).uniform(-np.pi, np.pi, (20, 2))
        u = (x - np.array([[1.0, -3.0]]))[..., None] + 2 * np.pi * np.arange(-40, 41)
        wanted = np.log(stats.norm.pdf(u, scale=scale).sum(axis=-1)).sum(axis=-1)
        law = WrappedNormal(FlatTorus(2), (1.0, -3.0), scale)
        np.testing.assert_allclose(jax.jit(law.log_prob)(jnp.asarray(x)), wanted, atol=1e-12)


def test_wrapped_has_mass_one_where_the_volume_grows():
    """On the hyperboloid by polar coordinates; on the simplex by its map to the sphere of radius 2."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    with jax.enable_x64(True):
        r = 4 * (nodes + 1)[:, None, None]
        angle = (np.arange(64) * 2 * np.pi / 64)[None, :, None]
        x = np.concatenate(np.broadcast_arrays(np.cosh(r), np.sinh(r) * np.cos(angle), np.sinh(r) * np.sin(angle)), -1)
        law = WrappedNormal(Hyperbolic(2), (np.sqrt(1.25), 0.5, 0.0), 0.6)
        density = np.exp(jax.jit(law.log_prob)(jnp.asarray(x.reshape(-1, 3)))).reshape(60, 64)
        total = (density * np.sinh(r[..., 0]) * 4 * weights[:, None]).sum() * 2 * np.pi / 64
        assert abs(total - 1) < 1e-9
        z, a = (nodes + 1)[:, None, None] / 2, (nodes + 1)[None, :, None] * np.pi / 4
        x = np.concatenate(np.broadcast_arrays(z**2, (1 - z**2) * np.cos(a) ** 2, (1 - z**2) * np.sin(a) ** 2), axis=-1)
        law = WrappedNormal(Simplex(2), (0.4, 0.3, 0.3), 0.2)
        density = np.exp(jax.jit(law.log_prob)(jnp.asarray(x.reshape(-1, 3)))).reshape(60, 60)
        assert abs((density * weights[:, None] * weights[None]).sum() * np.pi / 8 * 4 - 1) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.3, 1.5])
def test_wrapped_on_rotations(scale):
    """Mass 1 by Haar's density of the angle, 4 pi (2 sin(w / 2))^2; draws by their angle, that of u folded."""
    law = WrappedNormal(SO3(), np.eye(3)[[1, 2, 0]], scale)
    with jax.enable_x64(True):
        nodes, weights = np.polynomial.legendre.leggauss(100)
        angle = (nodes + 1) * np.pi / 2
        mean = jnp.broadcast_to(jnp.asarray(law.mean), (100, 3, 3))
        axis = jnp.asarray([[0.0, -0.8, 0.6], [0.8, 0.0, 0.0], [-0.6, 0.0, 0.0]])
        log_p = jax.jit(lambda angle: law.log_prob(SO3().exp(mean, angle[:, None, None] * (mean @ axis))))(angle)
        total = (np.exp(log_p) * 4 * np.pi * (2 * np.sin(angle / 2)) ** 2 * weights).sum() * np.pi / 2
        assert abs(total - 1) < 1e-12
    x = law.draw(KEY, jnp.zeros((4000, 3, 3)))
    angle = SO3().distance(jnp.broadcast_to(jnp.asarray(law.mean), x.shape), x)
    u = scale * np.linalg.norm(np.random.default_rng(0).normal(size=(20_000, 3)), axis=1)
    assert stats.ks_2samp(angle, np.arccos(np.cos(u))).pvalue > 1e-3


@pytest.mark.slow
def test_wrapped_on_a_product():
    """The sum over the parts, each with its windings; one that has none is refused by itself."""
    manifold, scale = Product((Sphere(2), FlatTorus(1), Euclidean(2))), 1.3
    law = WrappedNormal(manifold, (*NORTH, 0.5, 1.0, 2.0), scale)
    x = law.draw(KEY, jnp.zeros((7, 6)))
    parts = [WrappedNormal(Sphere(2), NORTH, scale), WrappedNormal(FlatTorus(1), (0.5,), scale)]
    parts = [*parts, WrappedNormal(Euclidean(2), (1.0, 2.0), scale)]
    wanted = sum(part.log_prob(y) for part, y in zip(parts, manifold.split(x)))
    np.testing.assert_allclose(law.log_prob(x), wanted, rtol=1e-6)
    jax.jit(lambda x: WrappedNormal(Product((Simplex(2), Euclidean(1))), (0.4, 0.3, 0.3, 0.0), 0.1).log_prob(x))(
        jnp.array([[0.2, 0.3, 0.5, 1.0]])
    )  # made while tracing
    with pytest.raises(ValueError, match=r"on Simplex\(n=2\)"):
        WrappedNormal(Product((Simplex(2), Euclidean(1))), (0.4, 0.3, 0.3, 0.0), 0.4)


def test_wrapped_draws():
    """The angle between mean and draw is |u|, folded: its distribution is that of the density."""
    law = WrappedNormal(Sphere(2), NORTH, 1.2)
    x = np.asarray(law.draw(KEY, jnp.zeros((20_000, 3))), np.float64)
    u = 1.2 * np.sqrt(-2 * np.log(np.random.default_rng(0).uniform(size=20_000)))
    assert stats.ks_2samp(np.arccos(x[:, 2]), np.arccos(np.cos(u))).pvalue > 1e-3
    with jax.enable_x64(True):
        edges = np.linspace(0, np.pi, 9)
        nodes, weights = np.polynomial.legendre.leggauss(40)
        half = np.pi / 16
        angle = (edges[:-1, None] + half * (nodes + 1)[None]).ravel()
        density = np.exp(jax.jit(law.log_prob)(at_angle(NORTH, angle))) * 2 * np.pi * np.sin(angle)
        share = (np.asarray(density).reshape(8, 40) * weights[None]).sum(axis=1) * half
    counts = np.histogram(np.arccos(x[:, 2]), edges)[0]
    assert stats.chisquare(counts, share / share.sum() * counts.sum()).pvalue > 1e-3


def test_wrapped_at_the_mean_and_beside_it():
    """Finite at the mean, with derivatives, whatever the scale."""
    north = jnp.asarray([NORTH])
    for scale in (0.2, 2.0):
        law = WrappedNormal(Sphere(2), NORTH, scale)
        value, slope = jax.jit(jax.value_and_grad(lambda x, law=law: law.log_prob(x).sum()))(north)
        np.testing.assert_allclose(value, -np.log(2 * np.pi * scale**2), rtol=1e-6)
        assert jnp.isfinite(slope).all()
    near = jnp.eye(11)[:1] + 1e-7 * jnp.eye(11)[1:2]
    assert jnp.isfinite(jax.jit(WrappedNormal(Sphere(10), np.eye(11)[0], 1.0).log_prob)(near)).all()


@pytest.mark.parametrize("variance", [0.01, 1.0, 6.28, 6.29, 40.0])
def test_a_wrapped_angle(variance):
    with jax.enable_x64(True):
        angle = np.linspace(-4, 7, 23)
        images = np.exp(-0.5 * (angle[:, None] + 2 * np.pi * np.arange(-60, 61)[None]) ** 2 / variance).sum(axis=1)
        value = jax.jit(jax.vmap(jax.value_and_grad(log_wrapped, (0, 1)), (None, 0)))
        found, slopes = value(jnp.asarray(variance), jnp.asarray(angle))
        np.testing.assert_allclose(found, np.log(images / np.sqrt(2 * np.pi * variance)), atol=1e-12)
        assert all(jnp.isfinite(slope).all() for slope in slopes)


# ---- Von Mises and Fisher.


@pytest.mark.parametrize("kappa", [1e-3, 0.7, 5.0, 300.0, 1e5])
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_von_mises_fisher_is_scipys(n, kappa):
    with jax.enable_x64(True):
        mean, x = unit(n), points(20, n)
        x = jnp.concatenate([x, Sphere(n).project(jnp.asarray(mean)[None] + x / np.sqrt(kappa))])
        wanted = stats.vonmises_fisher(mean, kappa).logpdf(np.asarray(x))
        np.testing.assert_allclose(jax.jit(VonMisesFisher(mean, kappa).log_prob)(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("n", "kappa"), [(1, 2.0), (2, 5.0), (6, 3.0), (2, 1e-9), (300, 1.0), (300, 1e4), (3, 1e-12)])
def test_von_mises_fisher_has_mass_one(n, kappa):
    """By adaptive quadrature in the angle, in logarithms: also where the Bessel function underflows."""
    law = VonMisesFisher(np.eye(n + 1)[0], kappa)
    log_area = np.log(2) + n / 2 * np.log(np.pi) - special.gammaln(n / 2)

    def density(angle):
        return np.exp(law.log_peak - 2 * kappa * np.sin(angle / 2) ** 2 + (n - 1) * np.log(np.sin(angle)) + log_area)

    total = integrate.quad(density, 0, np.pi, points=[0.1, 0.3, np.pi / 2], limit=200, epsabs=1e-12)[0]
    assert abs(total - 1) < 1e-10


@pytest.mark.parametrize(("n", "kappa"), [(1, 2.0), (2, 0.5), (2, 1e5), (3, 4.0), (9, 0.01), (9, 50.0)])
def test_von_mises_fisher_draws(n, kappa):
    """1 - <mean, x> has SciPy's distribution, in float32 too; around the mean no direction is preferred."""
    num, mean = 8000, unit(n)
    x = np.asarray(VonMisesFisher(mean, kappa).draw(KEY, jnp.zeros((num, n + 1))), np.float64)
    theirs = stats.vonmises_fisher(mean, kappa).rvs(num, random_state=np.random.default_rng(0))
    heights = [((each - mean[None]) ** 2).sum(axis=1) / 2 for each in (x, theirs)]
    assert stats.ks_2samp(*heights).pvalue > 1e-3
    # E x = A mean, A = I_(v + 1) / I_v: 4 standard errors in each direction.
    ratio = special.ive((n + 1) / 2, kappa) / special.ive((n - 1) / 2, kappa)
    error = x.std(axis=0) / np.sqrt(num)
    assert (np.abs(x.mean(axis=0) - ratio * mean) < 4 * error + 1e-6).all()
    way = (x - (x @ mean)[:, None] * mean[None]) / np.sqrt(heights[0] * (2 - heights[0]))[:, None]
    assert (np.abs(way.mean(axis=0)) < 4 / np.sqrt(num)).all()
    np.testing.assert_allclose((way**2).mean(axis=0), (1 - mean**2) / n, atol=4 / np.sqrt(num))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformOn(Euclidean(2)), "manifold must have a finite volume, got Euclidean"),
        (lambda: UniformOn(Normal()), "manifold must be a manifold, such as Sphere"),
        (
            lambda: WrappedNormal(Sphere(2), (1.0, 0.0), 1.0),
            r"mean must be one point of Sphere\(n=2\), of sha",
        ),
        (lambda: WrappedNormal(Sphere(2), (1.0, 0.0, "a"), 1.0), "mean must be one point"),
        (lambda: WrappedNormal(Sphere(2), (1.0, 1.0, 0.0), 1.0), "mean must be points of Sphere"),
        (lambda: WrappedNormal(Sphere(2), NORTH, 0.0), "scale must be positive and finite"),
        (
            lambda: jax.jit(lambda s: WrappedNormal(Sphere(2), NORTH, s).log_prob(jnp.eye(3)))(1.0),
            "scale must be known",
        ),
        (lambda: jax.jit(lambda m: WrappedNormal(Sphere(2), m, 1.0).log_prob(jnp.eye(3)))(jnp.eye(3)[0]), "mean must"),
        (lambda: WrappedNormal(Simplex(2), (0.4, 0.3, 0.3), 0.4), "a vector as long as 2.1 is not the shortest"),
        (lambda: VonMisesFisher(NORTH, -1.0), "kappa must be positive and finite"),
        (lambda: VonMisesFisher((1.0,), 1.0), "mean must be a unit vector"),
        (lambda: VonMisesFisher((2.0, 0.0), 1.0), "mean must be points of Sphere"),
        (lambda: VonMisesFisher(NORTH, 1.0).log_prob(jnp.eye(3)[0]), r"x must be \[batch, ..., 3\], got one point"),
        (lambda: VonMisesFisher(NORTH, 1.0).log_prob(2 * jnp.eye(3)), "x must be points of Sphere"),
        (lambda: UniformOn(Sphere(2)).draw(KEY, jnp.zeros((2, 4))), r"\[..., 3\], got shape \(2, 4\)"),
        (lambda: UniformOn(Sphere(2)).draw(0, jnp.zeros((2, 3))), "key must be one typed key"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
