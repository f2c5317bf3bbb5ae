"""Gaussian fields under a condition: against conditioning by NumPy, sampling, and a linear network that learns."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import optimised
from scipy.integrate import quad

from fm_jax.losses import flow_matching
from fm_jax.models import Conditions, linen_apply
from fm_jax.oracles.field import (
    field_covariance,
    field_posterior,
    field_prediction,
    field_velocity,
    loss_floor,
    observe,
    posterior_mean,
    power_law_spectrum,
    sample_field,
    sample_posterior,
    stationary_field,
)
from fm_jax.oracles.observation import block_means, blur, channel_means, known_values
from fm_jax.paths import AffinePath
from fm_jax.samplers import RungeKutta, sample
from fm_jax.schedules import VP, Cosine, Linear, coefficients
from fm_jax.times import LogitNormal, Stratified
from fm_jax.train import create_state, make_step

GRID, CHANNELS = (2, 4), [[1.0, 0.4], [0.4, 0.7]]
KNOWN = np.array([[True, False, True, True], [True, False, False, True]])
OPERATORS = {
    "hole": (known_values(KNOWN, 2), 0.2),
    "exact hole": (known_values(KNOWN, 2), 0.0),
    "low resolution": (block_means(GRID, 2, 2), 0.3),
    "grey": (channel_means(GRID, 2), 0.1),
    "blur": (blur(GRID, 0.8, 2), 0.5),
}
each_operator = pytest.mark.parametrize("name", OPERATORS)
D = 16


COVARIANCE, FLOOR = jax.jit(field_covariance), jax.jit(loss_floor, static_argnums=1)
PREDICT, OBSERVE = jax.jit(field_prediction, static_argnums=1), jax.jit(observe)
COEFFICIENTS = jax.jit(coefficients, static_argnums=0)


def field():
    return stationary_field(power_law_spectrum(GRID, 2.0), CHANNELS)


def posterior(name):
    return field_posterior(field(), *OPERATORS[name])


def flat(array, rows=D):
    return np.asarray(array, dtype=np.float64).reshape(rows, -1)


def test_covariance_is_the_sum_over_waves(x64):
    """Of a spectrum of no particular form on a grid of two sizes, one odd: Wiener and Khinchin, wave by wave."""
    spectrum = np.random.default_rng(0).uniform(0.1, 2, (3, 4))
    spectrum += spectrum[np.ix_(-np.arange(3) % 3, -np.arange(4) % 4)]
    covariance = np.asarray(COVARIANCE(stationary_field(spectrum, CHANNELS)))
    rows, columns = np.indices((3, 4))
    for i, j in ((0, 0), (1, 3), (2, 2)):
        waves = np.cos(2 * np.pi * (rows * (i - 1) / 3 + columns * (j - 2) / 4))
        expected = (spectrum * waves).mean() * np.array(CHANNELS)
        np.testing.assert_allclose(covariance[i, j, :, 1, 2, :], expected, atol=1e-12)


def test_a_power_law_has_unit_variance(x64):
    spectrum = power_law_spectrum((6, 5), 3.0)
    np.testing.assert_allclose(spectrum[2, 1] / spectrum[0, 0], 6**-1.5)
    np.testing.assert_allclose(np.diag(flat(COVARIANCE(stationary_field(spectrum)), 30)), 1, atol=1e-12)


def test_operators_are_what_they_say():
    x = np.random.default_rng(0).normal(size=(*GRID, 2))
    seen = {name: np.tensordot(operator, x, 3) for name, (operator, _) in OPERATORS.items()}
    np.testing.assert_array_equal(seen["hole"], np.where(KNOWN[..., None], x, 0))
    np.testing.assert_allclose(seen["low resolution"], x.reshape(1, 2, 2, 2, 2).mean(axis=(1, 3)))
    np.testing.assert_allclose(seen["grey"], x.mean(axis=2, keepdims=True))
    np.testing.assert_allclose(np.tensordot(channel_means(GRID, 2, [0.3, 0.5]), x, 3)[..., 0], x @ [0.3, 0.5])
    kernel = np.outer(np.exp(-0.5 * (np.array([0, 1]) / 0.8) ** 2), np.exp(-0.5 * (np.array([0, 1, 2, 1]) / 0.8) ** 2))
    transfer = np.fft.fft2(kernel / kernel.sum())[..., None]
    np.testing.assert_allclose(seen["blur"], np.fft.ifft2(np.fft.fft2(x, axes=(0, 1)) * transfer, axes=(0, 1)).real)


@each_operator
def test_posterior_is_kalmans(name, x64):
    """G = K A' (A K A' + noise^2)^-1 and S = K - G A K, by the pseudo-inverse."""
    law, (operator, noise) = posterior(name), OPERATORS[name]
    k, a = flat(COVARIANCE(field())), operator.reshape(-1, D)
    gain = k @ a.T @ np.linalg.pinv(a @ k @ a.T + noise**2 * np.diag(a.any(axis=1)), rcond=1e-10)
    np.testing.assert_allclose(flat(law.gain), gain, atol=1e-10)
    np.testing.assert_allclose(flat(COVARIANCE(law)), k - gain @ a @ k, atol=1e-10)


@pytest.mark.slow
def test_what_is_seen_exactly_is_known(x64):
    """As many directions are left as there are unseen numbers; in single precision too, in which they come as 0."""
    for double in (True, False):
        with jax.enable_x64(double):
            law = posterior("exact hole")
            assert (law.eigenvalues == 0).sum() == 2 * KNOWN.sum()
            x1 = np.random.default_rng(0).normal(size=(5, *GRID, 2)).astype(law.gain.dtype)
            y = OBSERVE(law, jax.random.key(1), x1)
            found = np.asarray(jax.jit(sample_posterior)(law, jax.random.key(2), y))
            np.testing.assert_allclose(found[:, KNOWN], x1[:, KNOWN], atol=1e-12 if double else 2e-6)
            assert np.isfinite(FLOOR(law, Linear(), np.array([0.0, 0.5, 1.0]))).all()


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP()], ids=str)
@each_operator
def test_conditional_means_by_numpy(name, schedule, x64):
    """Regression on (x_t, y) in the joint law of x1, x0 and the noise on y; and what it leaves is the floor."""
    law, (operator, noise), t = posterior(name), OPERATORS[name], 0.6
    alpha, sigma, d_alpha, d_sigma = map(float, COEFFICIENTS(schedule, t))
    a = operator.reshape(-1, D)
    root_x1, root_x0, root_z = np.split(np.eye(2 * D + len(a)), [D, 2 * D])
    root_x1 = np.linalg.cholesky(flat(COVARIANCE(field()))) @ root_x1
    root = np.concatenate([alpha * root_x1 + sigma * root_x0, a @ root_x1 + noise * a.any(axis=1)[:, None] * root_z])
    rng = np.random.default_rng(1)
    white = rng.normal(size=(3, root.shape[1]))
    x, y = np.split(white @ root.T, [D], axis=1)
    got = PREDICT(law, schedule, t, x.reshape(3, *GRID, 2), y.reshape(3, *operator.shape[:3]))
    wanted = {"data": root_x1, "noise": root_x0, "velocity": d_alpha * root_x1 + d_sigma * root_x0}
    for kind, each in wanted.items():
        slope = np.linalg.lstsq(root.T, each.T, rcond=1e-10)[0]
        np.testing.assert_allclose(flat(getattr(got, kind), 3), white @ root.T @ slope, atol=1e-8)
    np.testing.assert_allclose(flat(got.score, 3), -flat(got.noise, 3) / sigma, atol=1e-12)
    rest = wanted["velocity"] - slope.T @ root
    np.testing.assert_allclose(FLOOR(law, schedule, t), (rest**2).sum() / D, rtol=1e-8)


def test_a_field_is_what_there_is_without_a_condition(x64):
    """The unconditional velocity is that of an observation drowned in noise, and its floor is higher."""
    nothing = field_posterior(field(), OPERATORS["grey"][0], 1e6)
    x, t = np.random.default_rng(0).normal(size=(3, *GRID, 2)), np.array([0.1, 0.5, 0.9])
    drowned = PREDICT(nothing, Linear(), t, x, np.zeros((3, *GRID, 1))).velocity
    np.testing.assert_allclose(PREDICT(field(), Linear(), t, x).velocity, drowned, rtol=1e-8)
    floors = {name: FLOOR(posterior(name), Linear(), t) for name in OPERATORS}
    assert all((floor < FLOOR(field(), Linear(), t)).all() for floor in floors.values())
    assert (floors["exact hole"] < floors["hole"]).all()


@each_operator
def test_floor_over_uniform_times(name, x64):
    """On straight lines the integral over t is pi / 2 sqrt(c), by SciPy and by the library's own draws."""
    law = posterior(name)
    closed = np.pi / 2 * np.sqrt(law.eigenvalues).mean()
    integral = np.mean(
        [quad(lambda t, c=c: c / (t**2 * c + (1 - t) ** 2), 0, 1)[0] for c in np.asarray(law.eigenvalues)]
    )
    np.testing.assert_allclose(closed, integral, rtol=1e-8)
    drawn = FLOOR(law, Linear(), Stratified()(jax.random.key(0), 4096)).mean()
    np.testing.assert_allclose(drawn, closed, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("time_sampler", [Stratified(), LogitNormal()], ids=str)
def test_loss_of_the_exact_velocity_is_the_floor(time_sampler, key):
    """Through the library's loss, 20,000 examples of 16 numbers: one part in 250, at z below 4.5."""
    law, num = posterior("low resolution"), 20_000
    key_t, key_x1, key_y, key_loss = jax.random.split(key, 4)
    v = field_velocity(law, Linear())
    loss = flow_matching(lambda params, t, x, cond, **_: v(t, x, cond), AffinePath(), time_sampler=time_sampler)
    t, x1 = time_sampler(key_t, num), sample_field(field(), key_x1, num)
    got = jax.jit(loss)(None, key_loss, {"x1": x1, "cond": observe(law, key_y, x1), "t": t})[0]
    floor = FLOOR(law, Linear(), t).mean()
    assert abs(got / floor - 1) < 4.5 * math.sqrt(2 / (num * D)) * 1.5  # directions of unequal variance count for fewer


def test_draws_have_the_joint_law(key):
    """Drawn from the posterior of its own y, x has with y the covariance that x1 has: 40,000 draws, z below 4.5."""
    law, num = posterior("low resolution"), 40_000
    keys = jax.random.split(key, 3)
    x1 = sample_field(field(), keys[0], num)
    y = OBSERVE(law, keys[1], x1)
    k, a = flat(COVARIANCE(field())), OPERATORS["low resolution"][0].reshape(-1, D)
    root = np.block([[np.linalg.cholesky(k), np.zeros((D, 4))], [a @ np.linalg.cholesky(k), 0.3 * np.eye(4)]])
    cov = root @ root.T
    for x in (x1, sample_posterior(law, keys[2], y)):
        both = np.concatenate([flat(x, num), flat(y, num)], axis=1)
        z = (both.T @ both / num - cov) / np.sqrt((np.outer(np.diag(cov), np.diag(cov)) + cov**2) / num)
        assert abs(z).max() < 4.5


@pytest.mark.slow_but_one
@each_operator
def test_the_flow_ends_in_the_posterior(name):
    """The flow is linear: where it carries 0 and the unit vectors says all, without an error of sampling."""
    law = posterior(name)
    map_x0, _ = linear_maps(field_velocity(law, Linear()), law, 80)
    s = flat(COVARIANCE(law))
    np.testing.assert_allclose(map_x0 @ map_x0.T, s, atol=0.02 * abs(s).max())


def linear_maps(v, law, times):
    """M0 and M1 of `x(1) = M0 x0 + M1 y` under a velocity v(t, x, y) that is linear, by the ODE sampler."""
    axes = law.operator.ndim // 2
    event, seen = law.operator.shape[axes:], law.operator.shape[:axes]
    d, m = math.prod(event), math.prod(seen)
    x0 = jnp.eye(d + m)[:, :d].reshape(-1, *event)
    y = jnp.eye(d + m)[:, d:].reshape(-1, *seen)
    # Midpoint's last call is short of t = 1, where what is known exactly has no velocity.
    end = jax.jit(lambda x0, y: sample(lambda t, x: v(t, x, y), x0, RungeKutta("midpoint"), times=times).x)(x0, y)
    return np.split(flat(end, d + m).T, [d], axis=1)


class LinearField(nn.Module):
    """Linear in (x, cond.local), with weights that are polynomials of t: Legendre's, orthonormal for uniform times."""

    terms: int

    @nn.compact
    def __call__(self, t, x, cond, *, train=False):
        told = jnp.concatenate([x.reshape(len(x), -1), cond.local.reshape(len(x), -1)], axis=1)
        powers = [jnp.ones_like(t), 2 * t - 1]
        for k in range(1, self.terms - 1):
            powers.append(((2 * k + 1) * powers[1] * powers[-1] - k * powers[-2]) / (k + 1))
        basis = jnp.stack([power * math.sqrt(2 * k + 1) for k, power in enumerate(powers)], axis=1)
        features = (basis[:, :, None] * told[:, None, :]).reshape(len(x), -1)
        out = nn.Dense(math.prod(x.shape[1:]), use_bias=False, kernel_init=nn.initializers.zeros)(features)
        return out.reshape(x.shape)


def learn(law, prior, *, terms, num_steps, batch_size, rate):
    """Trains a `LinearField` by the ordinary loss: loss / floor, twice, and errors of the covariance and the mean."""
    network, path = LinearField(terms), AffinePath()
    apply_fn = linen_apply(network)

    def draw(key, num):
        key_x1, key_y = jax.random.split(key)
        x1 = sample_field(prior, key_x1, num)
        return {"x1": x1, "cond": Conditions(local=observe(law, key_y, x1))}

    example, optimizer = draw(jax.random.key(0), 1), optax.adam(optax.cosine_decay_schedule(rate, num_steps))
    params = network.init(jax.random.key(0), jnp.zeros(1), **{"x": example["x1"], "cond": example["cond"]})["params"]
    loss = flow_matching(apply_fn, path, time_sampler=Stratified())
    step = make_step(loss, optimizer, axis_name=None)

    def one(state, key):
        return step(state, key, draw(jax.random.fold_in(key, 1), batch_size))[0], None

    keys = jax.random.split(jax.random.key(1), num_steps)
    state, _ = optimised(lambda state: jax.lax.scan(one, state, keys))(create_state(params, optimizer))

    def v(t, x, y):
        t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
        return apply_fn(state.params, t, x, Conditions(local=y), train=False, rngs=None)

    # On the same draws, how much more than the exact velocity loses: the floor is known, and needs no draws.
    batch, exact = draw(jax.random.key(2), 20_000), field_velocity(law, path.schedule)
    reached, best = (
        jax.jit(flow_matching(f, path, time_sampler=Stratified()))(None, jax.random.key(3), batch)[0]
        for f in (lambda p, t, x, c, **_: v(t, x, c.local), lambda p, t, x, c, **_: exact(t, x, c.local))
    )
    floor = math.pi / 2 * float(jnp.sqrt(law.eigenvalues).mean())
    maps = linear_maps(v, law, 40)
    d = len(law.eigenvalues)
    wanted = flat(COVARIANCE(law), d), flat(law.gain, d)
    errors = [
        np.linalg.norm(got - want) / np.linalg.norm(want)
        for got, want in zip((maps[0] @ maps[0].T, maps[1]), wanted, strict=True)
    ]
    return 1 + float(reached - best) / floor, float(reached) / floor, *errors


@pytest.mark.slow
def test_a_linear_network_learns_to_fill_a_hole():
    """On a line of 4 points: the floor within 2%, posterior covariance and mean within 5%."""
    prior = stationary_field(power_law_spectrum((4,), 1.5))
    law = field_posterior(prior, known_values(np.arange(4) < 2), 0.5)
    excess, loss, cov, mean = learn(law, prior, terms=4, num_steps=300, batch_size=512, rate=0.03)
    assert excess < 1.02
    assert abs(loss - 1) < 0.02
    assert max(cov, mean) < 0.05, (cov, mean)


HOLE = np.ones((6, 6), bool)
HOLE[2:5, 2:5] = False
COLOURS = [[1.0, 0.6, 0.4], [0.6, 1.0, 0.6], [0.4, 0.6, 1.0]]
TASKS = {
    "inpainting": ((6, 6), [[1.0]], known_values(HOLE), 0.4),
    "super-resolution": ((8, 8), [[1.0]], block_means((8, 8), 4), 0.1),
    "colourising": ((4, 4), COLOURS, channel_means((4, 4), 3), 0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_linear_network_reaches_the_floor(task):
    grid, channels, operator, noise = TASKS[task]
    prior = stationary_field(power_law_spectrum(grid, 2.0), channels)
    law = field_posterior(prior, operator, noise)
    excess, loss, cov, mean = learn(law, prior, terms=6, num_steps=2000, batch_size=512, rate=0.01)
    print(f"{task}: loss {loss:.4f} of the floor, by pairs {excess:.4f}; covariance off by {cov:.1%}, mean {mean:.1%}")
    assert excess < 1.02
    assert abs(loss - 1) < 0.02
    assert max(cov, mean) < 0.05, (cov, mean)


X = jnp.zeros((2, *GRID, 2))
Y = jnp.zeros((2, *GRID, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power_law_spectrum(8), r"grid must be the points along each axis, such as \(8, 8\), got 8"),
        (lambda: power_law_spectrum((8, 0)), r"grid\[1\] must be at least 1, got 0"),
        (lambda: stationary_field([1.0, -1.0]), "spectrum must be variances, not negative, got -1"),
        (lambda: stationary_field([1.0, 2.0, 3.0]), "spectrum must be that of a real field, the same at k and -k"),
        (lambda: stationary_field(1.0), r"spectrum must be \[\*grid\], with an axis and not empty, got shape \(\)"),
        (lambda: stationary_field(np.ones(4), np.ones(3)), r"channels must be a covariance \[c, c\], got shape \(3,\)"),
        (
            lambda: stationary_field(np.ones(4), [[1, 2], [2, 1]]),
            "channels must be symmetric and positive semi-definite",
        ),
        (lambda: field_posterior(field(), np.ones((3, D))), r"operator must be \[\*grid_y, c_y, \*grid, c\] of 6 axes"),
        (lambda: field_posterior(field(), known_values(KNOWN)), r"the last ones \(2, 4, 2\), got shape"),
        (
            lambda: field_posterior(field(), known_values(KNOWN, 2), -0.1),
            "noise must be finite and not negative, got -0.1",
        ),
        (lambda: field_posterior(field(), known_values(KNOWN & False, 2)), "operator must see something of the field"),
        (lambda: field_posterior(field(), blur(GRID, 9.0, 2)), "noise must be positive where an operator sees some of"),
        (lambda: field_posterior("K", np.ones(2)), "field must be a GaussianField, as from stationary_field, got 'K'"),
        (lambda: known_values(np.ones(3)), r"known must be bool \[\*grid\], true where x is told, got float64"),
        (lambda: block_means((6, 4), 4), r"factor must divide the grid \(6, 4\), got 4"),
        (lambda: channel_means((4,), 3, [0.5, 0.5]), r"weights must be \[c\] = \[3\], got shape \(2,\)"),
        (lambda: blur((4,), 0.0), "width must be positive and finite, got 0.0"),
        (
            lambda: field_velocity(field(), Linear())(0.5, X, Y),
            "y must be None for a GaussianField, which has no condition",
        ),
        (lambda: field_velocity(posterior("grey"), Linear())(0.5, X), "y must be given to a FieldPosterior, got None"),
        (lambda: field_velocity(posterior("grey"), Linear())(0.5, X, X), r"y must be \[batch, \*grid_y, c_y\] with"),
        (lambda: field_velocity(posterior("grey"), Linear())(0.5, X[:1], Y), "y must be of the batch of x, 1, got 2"),
        (
            lambda: field_velocity(field(), Linear())(0.5, X[..., :1]),
            r"x must be \[batch, \*grid, c\] with \(2, 4, 2\) of",
        ),
        (lambda: posterior_mean(field(), Y), "posterior must be a FieldPosterior, as from field_posterior"),
        (lambda: loss_floor(0.5, Linear(), 0.5), "law must be a GaussianField or a FieldPosterior"),
        (lambda: sample_field(field(), 0, 3), "key must be one typed key"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
