"""PremetricPath against geodesics and against the premetric's own fall; spectral distances against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import schedules
from fm_jax.losses import flow_matching
from fm_jax.manifolds import Euclidean, SpectralPremetric, Sphere, biharmonic, commute_time, diffusion
from fm_jax.paths import GeodesicPath, PremetricPath
from fm_jax.samplers import RungeKutta, sample
from fm_jax.sources import Normal

SPHERE = Sphere(2)
COORDINATES = SpectralPremetric(lambda x: x, biharmonic([2.0] * 3))  # half the chord


def smooth(x):
    """Harmonics of S^2 of the first two degrees, by formulas that hold off the sphere too."""
    a, b, c = x[..., 0], x[..., 1], x[..., 2]
    second = [a * b, b * c, c * a, (a**2 - b**2) / 2, (3 * c**2 - 1) / (2 * 3**0.5)]
    return jnp.stack([a, b, c, *second], axis=-1)


HARMONICS = SpectralPremetric(smooth, biharmonic([2.0] * 3 + [6.0] * 5))


def points(num, seed=0, dtype=jnp.float64):
    return SPHERE.uniform(jax.random.key(seed), jnp.zeros((num, 3), dtype))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [schedules.Linear(), schedules.Polynomial(2.0)], ids=str)
def test_with_the_geodesic_distance_it_is_the_geodesic(schedule, x64):
    x0, x1, t = points(6), points(6, 1), jnp.array([0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
    found = PremetricPath(SPHERE, SPHERE.distance, schedule, num_steps=20).sample(None, t, x0, x1)
    wanted = GeodesicPath(SPHERE, schedule).sample(None, t, x0, x1)
    np.testing.assert_allclose(found.x_t, wanted.x_t, atol=1e-9)
    np.testing.assert_allclose(found.u_t[:5], wanted.u_t[:5], atol=1e-9)
    assert jnp.isfinite(found.u_t).all()
    found = PremetricPath(SPHERE, SPHERE.distance, schedule, num_steps=20).sample(None, 0.3, x0, x1)
    np.testing.assert_allclose(found.u_t, GeodesicPath(SPHERE, schedule).sample(None, 0.3, x0, x1).u_t, atol=1e-9)


@pytest.mark.parametrize("premetric", [COORDINATES, HARMONICS], ids=["3", "8"])
def test_the_premetric_falls_as_the_schedule_says(premetric, x64):
    x0, x1, t = points(64), points(64, 1), jnp.tile(jnp.array([0.2, 0.5, 0.8, 0.95]), 16)
    path = PremetricPath(SPHERE, premetric, schedules.Polynomial(2.0), num_steps=400)
    found = jax.jit(path.sample)(None, t, x0, x1)
    share = np.asarray(premetric(found.x_t, x1) / premetric(x0, x1))
    np.testing.assert_allclose(share, 1 - np.asarray(t) ** 2, atol=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(found.x_t, axis=1), 1, atol=1e-14)
    # And the velocity makes it fall so, by a difference along it.
    h = 1e-5
    there, here = (premetric(SPHERE.exp(found.x_t, each * found.u_t), x1) for each in (h, -h))
    slope = np.asarray((there - here) / (2 * h) / premetric(x0, x1))
    np.testing.assert_allclose(slope, -2 * np.asarray(t), rtol=1e-5)
    # It is the least such velocity: along the gradient, which differences give too.
    across = jnp.cross(found.x_t, found.u_t)
    there, here = (premetric(SPHERE.exp(found.x_t, each * across), x1) for each in (h, -h))
    np.testing.assert_allclose((there - here) / (2 * h), 0, atol=1e-8)


@pytest.mark.slow
def test_the_simulation_is_of_first_order_and_follows_its_own_velocity(x64):
    """Against a Runge-Kutta solution of the field `-kappa' / (1 - kappa) d grad d / |grad d|^2` itself."""
    x0, x1 = points(8), points(8, 1)

    def field(t, x):
        d, slope = jax.vmap(jax.value_and_grad(HARMONICS))(x, x1)
        slope = SPHERE.tangent(x, slope)
        return -(d / (1 - t) / (slope**2).sum(axis=1))[:, None] * slope

    exact = jax.jit(lambda x0: sample(field, x0, RungeKutta("rk4", SPHERE), times=jnp.linspace(0, 0.7, 201)).x)(x0)
    errors = []
    for num in (25, 50, 100):
        path = PremetricPath(SPHERE, HARMONICS, num_steps=num)
        errors.append(float(jnp.abs(jax.jit(path.sample)(None, 0.7, x0, x1).x_t - exact).max()))
    order = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (abs(order - 1) < 0.15).all(), (errors, order)


def test_several_points_an_example(x64):
    x0, x1, t = points(6).reshape(2, 3, 3), points(6, 1).reshape(2, 3, 3), jnp.array([0.2, 0.7])
    path = PremetricPath(SPHERE, HARMONICS, num_steps=5)
    found = jax.jit(path.sample)(None, t, x0, x1)
    each = jax.jit(path.sample)(None, jnp.repeat(t, 3), x0.reshape(6, 3), x1.reshape(6, 3))
    np.testing.assert_allclose(found.x_t.reshape(6, 3), each.x_t, atol=1e-12)
    np.testing.assert_allclose(found.u_t.reshape(6, 3), each.u_t, atol=1e-12)


@pytest.mark.parametrize("premetric", [SPHERE.distance, HARMONICS], ids=["geodesic", "spectral"])
@pytest.mark.parametrize("t", [0.0, 0.5, 1.0])
def test_finite_where_the_ends_are_the_same(premetric, t):
    x = points(3, dtype=jnp.float32)
    found = jax.jit(PremetricPath(SPHERE, premetric, num_steps=4).sample)(None, t, x, x)
    np.testing.assert_allclose(found.x_t, x, atol=1e-6)
    np.testing.assert_allclose(found.u_t, 0, atol=1e-5)
    assert found.x_t.dtype == found.u_t.dtype == jnp.float32


def test_on_r_n_float32_and_constant_to_differentiation():
    x0, x1 = jnp.zeros((2, 3)), jnp.array([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0]])
    path = PremetricPath(Euclidean(3), Euclidean(3).distance)
    found = jax.jit(path.sample)(None, jnp.array([0.25, 1.0]), x0, x1)
    np.testing.assert_allclose(found.x_t, [[0.75, 0.0, 1.0], [0.0, 2.0, 0.0]], atol=1e-5)
    np.testing.assert_allclose(found.u_t[0], x1[0], rtol=1e-5)
    slope = jax.grad(lambda x1: sum(each.sum() for each in path.sample(None, 0.5, x0, x1)[1:3]))(x1)
    np.testing.assert_array_equal(slope, 0)


def test_what_a_path_says_of_itself():
    path = PremetricPath(SPHERE, HARMONICS, schedules.Polynomial(2.0))
    assert path.kinds == ("velocity",)
    assert path.source is None
    assert path.target_domain("velocity") == path.domain == schedules.Polynomial(2.0).domain
    assert path == type(path)(**vars(path))
    assert hash(path) == hash(type(path)(**vars(path)))
    x0, x1 = points(2, dtype=jnp.float32), points(2, 1, jnp.float32)
    found = jax.jit(path.sample)(None, 0.5, x0, x1)
    assert [*path.targets(found)] == ["velocity"]
    assert path.targets(found)["velocity"] is found.u_t
    with pytest.raises(ValueError, match=r"kind must be one of 'velocity'.*, got 'data'"):
        path.target_domain("data")
    # Its loss is that of a manifold.
    loss_fn = flow_matching(lambda params, t, x, cond, **_: found.u_t + 7.0 * found.x_t, path)
    assert float(loss_fn({}, None, {"x0": x0, "x1": x1, "t": jnp.full(2, 0.5)})[0]) < 1e-10


def test_weights():
    eigenvalues = np.array([2.0, 6.0, 12.0])
    np.testing.assert_allclose(biharmonic(eigenvalues), 1 / eigenvalues**2)
    np.testing.assert_allclose(commute_time(eigenvalues), 1 / eigenvalues)
    np.testing.assert_allclose(diffusion(eigenvalues, 0.25), np.exp(-0.5 * eigenvalues))
    x, y = points(9, dtype=jnp.float32), points(9, 1, jnp.float32)
    np.testing.assert_allclose(COORDINATES(x, y), jnp.linalg.norm(x - y, axis=1) / 2, rtol=1e-6)
    # On S^2 all harmonics of a degree make a function of the angle: sum_m (Y(x) - Y(y))^2 ~ P_l(1) - P_l(cos).
    cosine = np.asarray((x * y).sum(axis=1), np.float64)
    second = (2 / 3) * (1 - (3 * cosine**2 - 1) / 2)  # sum of squares of the five is 1/3 on the diagonal
    np.testing.assert_allclose(HARMONICS(x, y) ** 2, (2 - 2 * cosine) / 4 + second / 36, rtol=1e-5)
    assert SpectralPremetric(COORDINATES.features, np.full(3, 0.25)) == COORDINATES
    assert hash(COORDINATES) == hash(SpectralPremetric(COORDINATES.features, [0.25] * 3))
    slope = jax.grad(lambda x: COORDINATES(x, y).sum())(y)
    np.testing.assert_array_equal(slope, 0)


NORTH = jnp.array([[0.0, 0.0, 1.0]])


def path(premetric):
    return lambda: PremetricPath(SPHERE, premetric).sample(None, 0.5, NORTH, -NORTH)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PremetricPath(Normal(), HARMONICS), "manifold must be a manifold, such as Sphere"),
        (lambda: PremetricPath(SPHERE, 3.0), "premetric must be a premetric d"),
        (lambda: PremetricPath(SPHERE, lambda x: x), "premetric must be a premetric d"),
        (lambda: PremetricPath(SPHERE, HARMONICS, schedules.Cosine()), "schedule must be convex"),
        (lambda: PremetricPath(SPHERE, HARMONICS, source=3), "source must be"),
        (lambda: PremetricPath(SPHERE, HARMONICS, num_steps=0), "num_steps must be at least 1, got 0"),
        (path(lambda x, y: -SPHERE.distance(x, y)), "must not be negative nor NaN, got -3.14"),
        (path(lambda x, y: jnp.nan * SPHERE.distance(x, y)), "must not be negative nor NaN, got nan"),
        (path(lambda x, y: (x - y) ** 2), r"must be a number a point, \(1,\), got shape \(1, 3\)"),
        (path(lambda x, y: ((x - y) ** 2).sum()), r"must be a number a point, \(1,\), got shape \(\)"),
        (path(lambda x, y: 1.0), r"premetric\(x0, x1\) must be an array"),
        (lambda: PremetricPath(SPHERE, HARMONICS).sample(None, 0.5, NORTH, 1.1 * NORTH), "x1 must be points of Sphere"),
        (lambda: PremetricPath(SPHERE, HARMONICS).sample(None, jnp.zeros(2), NORTH, NORTH), "t must be a scalar or"),
        (lambda: PremetricPath(SPHERE, HARMONICS).sample(None, 0.5, NORTH, jnp.zeros((2, 3))), "the same shape"),
        (lambda: SpectralPremetric(3, [1.0]), "features must be a function of points"),
        (lambda: SpectralPremetric(smooth, [1.0, -1.0]), "weights must not be negative, nor all 0"),
        (lambda: SpectralPremetric(smooth, [0.0]), "weights must not be negative, nor all 0"),
        (lambda: SpectralPremetric(smooth, [np.nan]), "weights must be finite"),
        (lambda: SpectralPremetric(smooth, []), "weights must be .k., at least one number"),
        (lambda: SpectralPremetric(smooth, "abc"), "weights must be real numbers"),
        (lambda: SpectralPremetric(smooth, [1.0] * 3)(NORTH, NORTH), r"features\(x\) must be \[..., 3\]"),
        (lambda: biharmonic([0.0, 2.0]), "eigenvalues must be positive, the 0 of the constant"),
        (lambda: commute_time([-1.0]), "eigenvalues must be positive"),
        (lambda: diffusion([2.0], 0.0), "tau must be positive and finite, got 0.0"),
        (lambda: diffusion([2.0], 1e6), "tau must leave some weight"),
        (lambda: jax.jit(biharmonic)(jnp.ones(2)), "eigenvalues must be known when it is built"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
