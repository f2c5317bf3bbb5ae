"""Paths, losses, samplers and likelihoods on manifolds: what R^n has, by the manifold that a path names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fm_jax import likelihood, schedules
from fm_jax.couplings import ExactOT, independent
from fm_jax.guidance import classifier_free
from fm_jax.likelihood import Exact, Hutchinson, log_prob, sample_and_log_prob
from fm_jax.losses import flow_matching
from fm_jax.manifolds import SE3, SO3, Euclidean, FlatTorus, Sphere, SquaredDistance, geodesic, tangent_velocity
from fm_jax.nfe import Counted
from fm_jax.paths import AffinePath, GeodesicPath
from fm_jax.samplers import Adaptive, Ambient, EulerMaruyama, GeodesicRandomWalk, RungeKutta, ode_step, sample
from fm_jax.samplers.runge_kutta import TABLEAUX
from fm_jax.sources import Normal

SPHERE, KEY = Sphere(2), jax.random.key(0)
W = np.random.default_rng(0).normal(size=(3, 3))
HALF_A_TURN = jnp.diag(jnp.array([1.0, -1.0, -1.0]))[None]
NORTH = jnp.array([[0.0, 0.0, 1.0]])


class Uniform:
    """On a sphere."""

    def __init__(self, manifold):
        self.manifold = manifold

    def draw(self, key, like):
        return self.manifold.uniform(key, like)

    def log_prob(self, x):
        return jnp.full(len(x), -self.manifold.log_total)


def points(num, n=2, seed=0, dtype=jnp.float32):
    return Sphere(n).uniform(jax.random.key(seed), jnp.zeros((num, n + 1), dtype))


def field(t, x):
    return jnp.sin(3 * x @ W + 2 * t) + (x**2) @ W.T


# ---- The path and its loss.


@pytest.mark.parametrize("schedule", [schedules.Linear(), schedules.Polynomial(2.0)])
def test_the_path_is_the_geodesic_at_the_speed_of_its_schedule(schedule):
    with jax.enable_x64(True):
        x0, x1 = points(5, dtype=jnp.float64), points(5, seed=1, dtype=jnp.float64)
        t = jnp.linspace(0.1, 0.9, 5)
        found = GeodesicPath(SPHERE, schedule).sample(None, t, x0, x1)
        kappa, angle = np.asarray(schedule.alpha(t)), np.arccos(np.sum(np.asarray(x0) * np.asarray(x1), axis=1))
        a, b = np.sin((1 - kappa) * angle) / np.sin(angle), np.sin(kappa * angle) / np.sin(angle)  # slerp
        np.testing.assert_allclose(found.x_t, a[:, None] * x0 + b[:, None] * x1, atol=1e-14)
        speed = np.asarray(jax.vmap(jax.grad(schedule.alpha))(t)) * angle
        np.testing.assert_allclose(np.linalg.norm(found.u_t, axis=1), speed, rtol=1e-13)
        # Chen & Lipman's target: kappa' / (1 - kappa) log_{x_t}(x1).
        wanted = (speed / angle / (1 - kappa))[:, None] * SPHERE.log(found.x_t, x1)
        np.testing.assert_allclose(found.u_t, wanted, atol=1e-13)


def test_on_r_n_it_is_the_affine_path():
    x0, x1, t = jnp.ones((4, 3)), jnp.arange(12.0).reshape(4, 3), jnp.linspace(0, 0.9, 4)
    ours = GeodesicPath(Euclidean(3), schedules.Polynomial(2.0)).sample(None, t, x0, x1)
    affine = AffinePath(schedules.Polynomial(2.0)).sample(None, t, x0, x1)
    np.testing.assert_allclose(ours.x_t, affine.x_t, rtol=1e-6)
    np.testing.assert_allclose(ours.u_t, affine.u_t, rtol=1e-6)


@pytest.mark.slow
def test_an_event_may_be_of_several_points():
    x0, x1 = points(6).reshape(2, 3, 3), points(6, seed=1).reshape(2, 3, 3)
    t = jnp.array([0.2, 0.7])
    found = GeodesicPath(SPHERE).sample(None, t, x0, x1)
    each = GeodesicPath(SPHERE).sample(None, jnp.repeat(t, 3), x0.reshape(6, 3), x1.reshape(6, 3))
    np.testing.assert_allclose(found.x_t.reshape(6, 3), each.x_t, atol=1e-6)
    np.testing.assert_allclose(found.u_t.reshape(6, 3), each.u_t, atol=1e-6)


def test_the_loss_is_over_the_tangent_space_and_its_dimension():
    """A prediction that is off by a normal vector is right; of a tangent error the mean is over n, not n + 1."""
    x0, x1, t = points(4), points(4, seed=1), jnp.linspace(0.1, 0.9, 4)
    path = GeodesicPath(SPHERE)
    sample_t = path.sample(None, t, x0, x1)
    across = jnp.cross(sample_t.x_t, sample_t.u_t)

    def apply_fn(params, t, x, cond, *, train, rngs):
        return sample_t.u_t + params["along"] * across + 7.0 * x

    loss_fn = flow_matching(apply_fn, path)
    batch = {"x0": x0, "x1": x1, "t": t}
    loss, metrics = loss_fn({"along": 0.0}, None, batch)
    assert float(loss) < 1e-10
    loss, metrics = loss_fn({"along": 0.5}, None, batch)
    np.testing.assert_allclose(loss, 0.25 * (jnp.linalg.norm(sample_t.u_t, axis=1) ** 2).mean() / 2, rtol=1e-5)
    assert metrics["mse"] == loss


def test_a_loss_without_a_source_says_so():
    loss_fn = flow_matching(lambda params, t, x, cond, **_: x, GeodesicPath(SPHERE))
    with pytest.raises(ValueError, match="the path has no source to draw x0 from"):
        loss_fn({}, KEY, {"x1": points(4)})
    drawn, _ = flow_matching(lambda params, t, x, cond, **_: x, GeodesicPath(SPHERE, source=Uniform(SPHERE)))(
        {}, KEY, {"x1": points(4)}
    )
    assert jnp.isfinite(drawn)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeodesicPath(Normal()), "manifold must be a manifold, such as Sphere"),
        (lambda: GeodesicPath(SPHERE, schedules.Cosine()), "schedule must be convex"),
        (lambda: GeodesicPath(SPHERE, source=3), "source must be"),
        (lambda: GeodesicPath(SPHERE).sample(None, 0.5, points(2), 1.01 * points(2)), r"x1 must be points of Sphere"),
        (lambda: GeodesicPath(SPHERE).sample(None, 0.5, points(2, 3), points(2, 3)), r"\[..., 3\], got shape \(2, 4\)"),
        (lambda: GeodesicPath(SPHERE).sample(None, 0.5, points(2), points(3)), "the same shape"),
        (lambda: GeodesicPath(SPHERE).sample(None, 0.5, jnp.nan * NORTH, NORTH), "1 of 1 off it, by up to nan"),
        (lambda: GeodesicPath(SPHERE).sample(None, 0.5, points(2), -points(2)), "got 2 of 2 pairs with several"),
        (
            lambda: GeodesicPath(FlatTorus(1)).sample(None, 0.5, jnp.zeros((1, 1)), jnp.full((1, 1), -jnp.pi)),
            "one shortest",
        ),
        (lambda: GeodesicPath(SO3()).sample(None, 0.5, jnp.eye(3)[None], HALF_A_TURN), "one shortest way"),
        (
            lambda: GeodesicPath(SE3()).sample(
                None, 0.5, *(SE3().join([r, jnp.zeros((1, 3))]) for r in (jnp.eye(3)[None], HALF_A_TURN))
            ),
            "one shortest way",
        ),
        (lambda: GeodesicPath(SPHERE).sample(None, 0.5, NORTH.astype(int), NORTH.astype(int)), "floating point"),
        (lambda: RungeKutta("heun", manifold=2), "manifold must be a manifold"),
        (lambda: sample(field, 2 * NORTH, RungeKutta("heun", SPHERE)), "x0 must be points of Sphere"),
        (lambda: sample(field, 2 * NORTH, Ambient(SPHERE, Adaptive())), "x0 must be points of Sphere"),
        (lambda: Ambient(SPHERE, EulerMaruyama(schedules.Linear())), "sampler must be one of R"),
        (lambda: Ambient(SPHERE, RungeKutta("heun", SPHERE)), "sampler must be one of R"),
        (lambda: GeodesicRandomWalk(SPHERE, -1.0), "diffusion must"),
        (lambda: log_prob(field, NORTH, manifold=SPHERE), "source must be one on Sphere"),
        (lambda: log_prob(field, 2 * NORTH, manifold=SPHERE, source=Uniform(SPHERE)), "x1 must be points of Sphere"),
        (
            lambda: log_prob(
                field, NORTH, manifold=SPHERE, source=Uniform(SPHERE), sampler=RungeKutta("heun", SPHERE), times=3
            ),
            "sampler must be one of R",
        ),
        (lambda: tangent_velocity(SPHERE, 3), "v must be a velocity"),
        (lambda: tangent_velocity(SPHERE, field)(0.0, jnp.zeros((2, 4))), r"\[..., 3\], got shape \(2, 4\)"),
        (lambda: SquaredDistance(SPHERE)(points(2), points(2).reshape(1, 2, 3)), "same event shape"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- Transport.


def test_exact_transport_by_squared_geodesic_distance():
    x0, x1 = points(40), points(40, seed=1)
    angles = np.arccos(np.clip(np.asarray(x0, np.float64) @ np.asarray(x1, np.float64).T, -1, 1))
    np.testing.assert_allclose(SquaredDistance(SPHERE)(x0, x1), angles**2, atol=1e-5)
    rows, columns = linear_sum_assignment(angles**2)
    index0 = np.empty(40, int)
    index0[columns] = rows
    pairing = ExactOT(cost=SquaredDistance(SPHERE))(None, x0, x1)
    np.testing.assert_array_equal(pairing.index0, index0)
    assert independent(None, x0, x1).index0.tolist() != index0.tolist()
    x0, x1 = np.asarray(x0), np.asarray(x1)
    np.testing.assert_array_equal(ExactOT(cost=SquaredDistance(SPHERE))(None, x0, x1).index0, index0)
    two = SquaredDistance(SPHERE)(x0.reshape(20, 2, 3), x1.reshape(20, 2, 3))
    np.testing.assert_allclose(two, (angles**2).reshape(20, 2, 20, 2)[:, [0, 1], :, [0, 1]].sum(axis=0), atol=1e-4)


def test_halfway_is_as_far_from_both_ends():
    x0, x1 = points(5), points(5, seed=1)
    half = geodesic(SPHERE, x0, x1, 0.5)
    np.testing.assert_allclose(SPHERE.distance(x0, half), SPHERE.distance(half, x1), rtol=1e-5)


# ---- Samplers.


@pytest.mark.parametrize("method", [*TABLEAUX])
def test_runge_kutta_keeps_its_order_and_the_manifold(method):
    with jax.enable_x64(True):
        x0 = points(8, dtype=jnp.float64)

        def solve(method, num):
            return sample(field, x0, RungeKutta(method, SPHERE), times=num)

        exact, errors = solve("rk4", 1024).x, []
        for num in (48, 96):
            solution = solve(method, num)
            errors.append(float(jnp.abs(solution.x - exact).max()))
            assert float(jnp.abs(jnp.linalg.norm(solution.x, axis=1) - 1).max()) < 1e-14
            assert int(solution.calls) == num * TABLEAUX[method].stages
        assert abs(np.log2(errors[0] / errors[1]) - TABLEAUX[method].order) < 0.1


def test_euler_is_the_exponential_map():
    x0 = points(8)
    found = ode_step(field, 0.3, 0.5, x0, "euler", manifold=SPHERE)
    h = jnp.asarray(0.5, jnp.float32) - jnp.asarray(0.3, jnp.float32)
    np.testing.assert_array_equal(found, SPHERE.exp(x0, h * SPHERE.tangent(x0, field(jnp.float32(0.3), x0))))


def test_there_and_back():
    with jax.enable_x64(True):
        x0 = points(8, dtype=jnp.float64)
        there = sample(field, x0, RungeKutta("rk4", SPHERE), times=100).x
        back = sample(field, there, RungeKutta("rk4", SPHERE), times=jnp.linspace(1, 0, 101)).x
        np.testing.assert_allclose(back, x0, atol=1e-6)


@pytest.mark.slow
def test_adaptive_steps_in_the_ambient_space():
    with jax.enable_x64(True):
        x0 = points(8, dtype=jnp.float64)
        exact = sample(field, x0, RungeKutta("rk4", SPHERE), times=500).x
        solution = sample(Counted(field, 1), x0, Ambient(SPHERE, Adaptive(rtol=1e-8, atol=1e-8)), trajectory=True)
        np.testing.assert_allclose(solution.x, exact, atol=1e-6)
        np.testing.assert_allclose(jnp.linalg.norm(solution.trajectory, axis=2), 1, atol=1e-14)
        assert int(solution.nfe) == int(solution.calls) > 10


def test_guidance_of_tangent_vectors():
    """Combined in the ambient space, then projected: what guides along the normal has no effect."""
    x0 = points(8)
    guided = classifier_free(field, lambda t, x: field(t, x) + 5 * x, 3.0)
    np.testing.assert_allclose(
        sample(guided, x0, RungeKutta("heun", SPHERE), times=8).x,
        sample(field, x0, RungeKutta("heun", SPHERE), times=8).x,
        atol=1e-5,
    )


def test_on_r_n_the_random_walk_is_euler_maruyama():
    score = lambda t, x: -x  # noqa: E731
    v, x0 = (lambda t, x: x), jnp.ones((4, 3))
    ours = sample(v, x0, GeodesicRandomWalk(Euclidean(3), 0.7, score), times=10, key=KEY)
    theirs = sample(v, x0, EulerMaruyama(diffusion=0.7, score=score), times=10, key=KEY)
    np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-6)
    assert int(ours.calls) == int(theirs.calls)


@pytest.mark.parametrize("backward", [False, True])
def test_brownian_motion_on_the_sphere(backward):
    """E cos of the angle from the start is exp(-g^2 t), E P_2 of it exp(-3 g^2 t): 4 standard errors."""
    x0 = jnp.tile(NORTH, (20_000, 1))
    times = jnp.linspace(1, 0, 65) if backward else 64
    walk = GeodesicRandomWalk(SPHERE, 0.8)
    z = jax.jit(lambda key: sample(lambda t, x: 0 * x, x0, walk, times=times, key=key).x[:, 2])(KEY)
    z = np.asarray(z, np.float64)
    for values, exact in ((z, np.exp(-0.64)), (1.5 * z**2 - 0.5, np.exp(-3 * 0.64))):
        assert abs(values.mean() - exact) < 4 * values.std() / np.sqrt(len(z)) + 0.002  # weak order 1, 64 steps


def test_the_score_keeps_a_law():
    """Von Mises and Fisher's law is kept by v = 0 with its score, and is not without."""
    kappa = 3.0
    u = np.linspace(0, 1, 20_002)[1:-1]
    z = 1 + np.log(u + (1 - u) * np.exp(-2 * kappa)) / kappa
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, len(z))
    r = np.sqrt(1 - z**2)
    x0 = jnp.asarray(np.stack([r * np.cos(angle), r * np.sin(angle), z], axis=1), jnp.float32)
    score = lambda t, x: kappa * jnp.broadcast_to(NORTH, x.shape)  # noqa: E731

    def mean(score):
        walk = GeodesicRandomWalk(SPHERE, 0.7, score)
        return float(jax.jit(lambda key: sample(lambda t, x: 0 * x, x0, walk, times=64, key=key).x[:, 2].mean())(KEY))

    assert abs(mean(score) - z.mean()) < 4 * z.std() / np.sqrt(len(z)) + 0.002
    assert mean(None) < z.mean() - 0.05


# ---- Likelihood.


def moebius(a):
    """v(x) = a - <a, x> x, and the log-density at t = 1 of what was uniform at t = 0."""

    def velocity(t, x):
        return a[None] - (x @ a)[:, None] * x

    def log_density(n, x):
        s = np.arctanh(np.asarray(x @ a))
        return -Sphere(n).log_total + n * (np.log(np.cosh(s)) - np.log(np.cosh(s - 1)))

    return velocity, log_density


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 5])
def test_likelihood_of_the_moebius_flow(n):
    with jax.enable_x64(True):
        a = jnp.eye(n + 1)[0]
        velocity, log_density = moebius(a)
        x1 = points(6, n, dtype=jnp.float64)
        sphere = Sphere(n)
        options = {"manifold": sphere, "source": Uniform(sphere), "sampler": Adaptive(rtol=1e-11, atol=1e-11)}
        # A normal part of the velocity does not count.
        found = log_prob(lambda t, x: velocity(t, x) + 3.0 * x, x1, **options)
        np.testing.assert_allclose(found, log_density(n, x1), atol=1e-8)
        x0 = points(6, n, 1, jnp.float64)
        solution, there = sample_and_log_prob(velocity, x0, **options)
        np.testing.assert_allclose(there, log_density(n, solution.x), atol=1e-8)
        np.testing.assert_allclose(jnp.linalg.norm(solution.x, axis=1), 1, atol=1e-14)


def test_a_rotation_keeps_densities():
    with jax.enable_x64(True):
        x1 = points(6, dtype=jnp.float64)
        turn = jnp.asarray(W - W.T)
        options = {"manifold": SPHERE, "source": Uniform(SPHERE), "sampler": RungeKutta("rk4"), "times": 20}
        found = log_prob(lambda t, x: x @ turn, x1, **options)
        np.testing.assert_allclose(found, -np.log(4 * np.pi), atol=1e-10)


def test_a_density_of_any_field_integrates_to_one():
    """Gauss and Legendre in z, 40 nodes, times 56 even angles."""
    with jax.enable_x64(True):
        z, weights = np.polynomial.legendre.leggauss(40)
        angle = np.arange(56) * 2 * np.pi / 56
        r = np.sqrt(1 - z**2)[:, None]
        grid = np.stack([r * np.cos(angle), r * np.sin(angle), np.broadcast_to(z[:, None], (40, 56))], axis=-1)
        mild = lambda t, x: 0.2 * field(t, x)  # noqa: E731
        options = {"manifold": SPHERE, "source": Uniform(SPHERE), "sampler": RungeKutta("rk4"), "times": 40}
        log_p = log_prob(mild, jnp.asarray(grid.reshape(-1, 3)), **options)
        assert np.ptp(log_p) > 0.5
        total = (np.exp(log_p).reshape(40, 56).sum(axis=1) * 2 * np.pi / 56 * weights).sum()
        assert abs(total - 1) < 1e-6


def test_hutchinson_is_unbiased():
    x1 = points(2)
    options = {"manifold": SPHERE, "source": Uniform(SPHERE), "sampler": RungeKutta("rk4"), "times": 10}
    exact = log_prob(field, x1, divergence=Exact(), **options)
    draw = jax.jit(jax.vmap(lambda key: log_prob(field, x1, key=key, divergence=Hutchinson(), **options)))
    found = np.asarray(draw(jax.random.split(KEY, 400)), np.float64)
    assert (np.abs(found.mean(axis=0) - exact) < 4 * found.std(axis=0) / 20).all()
    assert (found.std(axis=0) > 0.01).all()


@pytest.mark.slow
def test_a_flow_can_be_trained_by_its_likelihood():
    """The gradient passes through the solve, the projections and the divergence."""
    x1 = points(4)

    def nll(scale):
        v = lambda t, x: scale * field(t, x)  # noqa: E731
        options = {"manifold": SPHERE, "source": Uniform(SPHERE), "sampler": RungeKutta("rk4"), "times": 8}
        return -likelihood.log_prob(v, x1, **options).mean()

    with jax.enable_x64(True):
        x1 = x1.astype(jnp.float64)
        x1 = x1 / jnp.linalg.norm(x1, axis=1, keepdims=True)
        slope, h = jax.grad(nll)(0.4), 1e-5
        np.testing.assert_allclose(slope, (nll(0.4 + h) - nll(0.4 - h)) / (2 * h), rtol=1e-6)
