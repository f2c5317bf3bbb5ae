"""Geodesics of `flow_matching` (spheres, tori) and `geoopt` (hyperbolic spaces, definite matrices), in float64.

Only their public functions are called. See "Parity with PyTorch peers" in CONTRIBUTING.md for the environment.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import manifolds
from fm_jax.paths import GeodesicPath
from fm_jax.schedules import Linear, Polynomial

pytestmark = pytest.mark.parity

DOUBLE = 1e-12


def peer(name):
    reason = f"{name} is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md"
    return pytest.importorskip(name, reason=reason)


def tensor(x):
    return peer("torch").from_numpy(np.array(x))


def assert_close(ours, theirs, tolerance=DOUBLE):
    """Of the number, or of the largest where numbers cancel."""
    theirs = theirs.numpy()
    assert ours.dtype == theirs.dtype == np.float64
    assert np.isfinite(theirs).all(), "a comparison with inf or nan proves nothing"
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * max(np.abs(theirs).max(), 1))


def of_flow_matching(name):
    """Both sides, and how to draw points of them."""
    theirs = peer("flow_matching.utils.manifolds")
    if name == "sphere":
        return manifolds.Sphere(3), theirs.Sphere()
    if name == "torus":
        return manifolds.FlatTorus(4), theirs.FlatTorus()
    return manifolds.Euclidean(3), theirs.Euclidean()


def points(manifold, num=32):
    like = jnp.zeros((num, *manifold.shape))
    if manifold.log_total is None:
        return jax.random.normal(jax.random.key(0), like.shape), jax.random.normal(jax.random.key(1), like.shape)
    return manifold.uniform(jax.random.key(0), like), manifold.uniform(jax.random.key(1), like)


def on_circle(x):
    """Angles as points of the plane: the peer's are from 0 to 2 pi."""
    return np.stack([np.cos(x), np.sin(x)], axis=-1)


@pytest.mark.parametrize("name", ["euclidean", "sphere", "torus"])
def test_exp_log_and_projections(name, x64):
    ours, theirs = of_flow_matching(name)
    x, y = points(ours)
    u = ours.tangent(x, jax.random.normal(jax.random.key(2), x.shape))
    assert_close(np.asarray(ours.log(x, y)), theirs.logmap(tensor(x), tensor(y)), 1e-9)  # by acos there
    assert_close(np.asarray(ours.tangent(x, y)), theirs.proju(tensor(x), tensor(y)))
    found, wanted = np.asarray(ours.exp(x, u)), theirs.expmap(tensor(x), tensor(u))
    if name == "torus":
        np.testing.assert_allclose(on_circle(found), on_circle(wanted.numpy()), atol=DOUBLE)
        np.testing.assert_allclose(
            on_circle(np.asarray(ours.project(9 * x))), on_circle(theirs.projx(tensor(9 * x)).numpy()), atol=DOUBLE
        )
    else:
        assert_close(found, wanted)
        assert_close(np.asarray(ours.project(9 * x)), theirs.projx(tensor(9 * x)))


@pytest.mark.parametrize("name", ["euclidean", "sphere", "torus"])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_path(name, power, x64):
    ours, theirs = of_flow_matching(name)
    path, schedulers = peer("flow_matching.path"), peer("flow_matching.path.scheduler")
    scheduler = schedulers.CondOTScheduler() if power == 1 else schedulers.PolynomialConvexScheduler(n=power)
    x, y = points(ours)
    t = jnp.linspace(0.05, 0.95, len(x))
    found = GeodesicPath(ours, Linear() if power == 1 else Polynomial(power)).sample(None, t, x, y)
    wanted = path.GeodesicProbPath(scheduler=scheduler, manifold=theirs).sample(
        x_0=tensor(x), x_1=tensor(y), t=tensor(t)
    )
    assert_close(np.asarray(found.u_t), wanted.dx_t.detach(), 1e-8)
    if name == "torus":
        np.testing.assert_allclose(on_circle(found.x_t), on_circle(wanted.x_t.detach().numpy()), atol=1e-9)
    else:
        assert_close(np.asarray(found.x_t), wanted.x_t.detach(), 1e-9)


def test_hyperbolic_space(x64):
    theirs, ours = peer("geoopt").Lorentz(), manifolds.Hyperbolic(3)
    origin = jnp.zeros((32, 4)).at[:, 0].set(1.0)
    x, y = (ours.exp(origin, ours.normal(jax.random.key(i), origin)) for i in range(2))
    u = ours.normal(jax.random.key(2), x)
    assert_close(np.asarray(ours.log(x, y)), theirs.logmap(tensor(x), tensor(y)), 1e-7)  # by acosh there
    assert_close(np.asarray(ours.exp(x, u)), theirs.expmap(tensor(x), tensor(u)), 1e-11)
    assert_close(np.asarray(ours.distance(x, y)), theirs.dist(tensor(x), tensor(y)), 1e-9)
    ball = peer("geoopt").PoincareBall()
    flat = [manifolds.to_ball(each) for each in (x, y)]
    assert_close(np.asarray(ours.distance(x, y)), ball.dist(*map(tensor, flat)), 1e-9)


def test_positive_definite_matrices(x64):
    theirs, ours = peer("geoopt").SymmetricPositiveDefinite(), manifolds.SPD(3)
    one = jnp.broadcast_to(jnp.eye(3)[None], (32, 3, 3))
    x, y = (ours.exp(one, 0.5 * ours.normal(jax.random.key(i), one)) for i in range(2))
    u = 0.5 * ours.normal(jax.random.key(2), x)
    assert_close(np.asarray(ours.log(x, y)), theirs.logmap(tensor(x), tensor(y)), 1e-10)
    assert_close(np.asarray(ours.exp(x, u)), theirs.expmap(tensor(x), tensor(u)), 1e-10)
    assert_close(np.asarray(ours.distance(x, y)), theirs.dist(tensor(x), tensor(y)), 1e-10)
