import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marginals import p_values, source_cdf, two_gaussians

from fm_jax import oracles
from fm_jax.guidance import classifier_free
from fm_jax.parameterization import score_fn
from fm_jax.samplers.fixed import sample_ode
from fm_jax.samplers.sde import METHODS, sample_sde, sde_step
from fm_jax.schedules import VP, Cosine, Linear, Polynomial

NUM_STEPS = [32, 64, 128, 256]
DIFFUSIONS = {
    "vanishing at the data": lambda t: jnp.sqrt(2 * (1 - t)),
    "growing": lambda t: 0.3 + t,
}


def gaussian():
    return oracles.gaussian_mixture([[0.5, -1.0]], [[[0.5, 0.2], [0.2, 0.3]]])


def slope(errors):
    return -np.polyfit(np.log(NUM_STEPS), np.log(errors), 1)[0]


UNITS = np.concatenate([np.zeros((1, 4)), np.eye(4)])
MEAN, COVARIANCE = np.array([0.5, -1.0]), np.array([[0.5, 0.2], [0.2, 0.3]])
LAWS = {
    (method, name, ends)
    for method in METHODS
    for name in DIFFUSIONS
    for ends in [(0.0, 1.0), (0.95, 0.0)]
    if ends[0] == 0 or name == "growing"
}


def law_at(t):
    """Mean and covariance of the single Gaussian's marginal on `Linear`."""
    return t * MEAN, t**2 * COVARIANCE + (1 - t) ** 2 * np.eye(2)


@pytest.fixture(scope="module")
def moments():
    """Errors of mean and covariance at the end, without Monte Carlo error.

    On a single Gaussian a step is affine in the state and in the noise, so that the law at the end is a Gaussian whose
    moments follow from the step's two Jacobians: {(method, diffusion, ends): (mean errors, covariance errors)} over
    NUM_STEPS. Forward into t = 1, where sigma = 0, and backward to the source.
    """
    with jax.enable_x64(True):
        mixture, schedule = gaussian(), Linear()
        v = oracles.velocity(mixture, schedule)

        def law(method, g, start):
            def step(carry, times):
                mean, cov = carry
                # Unit steps in the state and in the noise show both Jacobians of an affine map.
                x, noise = mean[None] + UNITS[:, :2], jnp.asarray(UNITS[:, 2:])
                moved = sde_step(v, None, g, *times, x, noise, schedule=schedule, method=method)
                by_x, by_noise = jnp.split((moved[1:] - moved[:1]).T, 2, axis=1)
                return (moved[0], by_x @ cov @ by_x.T + by_noise @ by_noise.T), None

            return lambda grid: jax.lax.scan(step, law_at(start), (grid[:-1], grid[1:]))[0]

        # Steps of length 0 at the start pad the grids to one length, so that they compile once.
        grids = jnp.stack([jnp.pad(jnp.linspace(0, 1, n + 1), (NUM_STEPS[-1] - n, 0), mode="edge") for n in NUM_STEPS])
        laws = jax.jit(
            lambda grids: {
                (method, name, (t0, t1)): jax.vmap(law(method, DIFFUSIONS[name], t0))(t0 + (t1 - t0) * grids)
                for method, name, (t0, t1) in LAWS
            }
        )(grids)
        out = {}
        for case, (mean, cov) in laws.items():
            exact_mean, exact_cov = law_at(case[2][1])
            errors = np.linalg.norm(mean - exact_mean[None], axis=1), np.linalg.norm(cov - exact_cov[None], axis=(1, 2))
            out[case] = errors
        return out


@pytest.mark.parametrize("case", sorted(LAWS), ids=str)
def test_weak_order(moments, case):
    order = {"euler_maruyama": 1, "heun": 2}[case[0]]
    mean_errors, cov_errors = moments[case]
    assert mean_errors[-1] < 0.02
    assert cov_errors[-1] < 0.02
    np.testing.assert_allclose(slope(cov_errors), order, atol=0.15)
    # The mean of a Gaussian is carried almost exactly along straight lines: an error to fit is not always left.
    assert mean_errors[-1] < 1e-10 or abs(slope(mean_errors) - order) < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_strong_order_one_on_a_shared_brownian_path(x64, method):
    mixture, schedule, finest = gaussian(), Linear(), 4096
    v = oracles.velocity(mixture, schedule)

    def score(t, x):
        return oracles.prediction(mixture, schedule, t, x).score

    fine = jax.random.normal(jax.random.key(3), (finest, 64, 2)) / np.sqrt(finest)  # Brownian increments
    x0 = jax.random.normal(jax.random.key(4), (64, 2))

    @jax.jit
    def end(grid, increments):
        def step(x, inputs):
            t, t_next, dw = inputs
            h = t_next - t
            noise = jnp.where(h > 0, dw / jnp.sqrt(jnp.where(h > 0, h, 1)), 0)
            return sde_step(v, score, DIFFUSIONS["growing"], t, t_next, x, noise, method=method), None

        return jax.lax.scan(step, x0, (grid[:-1], grid[1:], increments))[0]

    ends = [end(jnp.linspace(0, 1, finest + 1), fine)]
    for n in NUM_STEPS:
        grid = jnp.pad(jnp.linspace(0, 1, n + 1), (finest - n, 0), mode="edge")
        coarse = fine.reshape(n, finest // n, 64, 2).sum(axis=1)
        ends.append(end(grid, jnp.pad(coarse, ((finest - n, 0), (0, 0), (0, 0)))))
    errors = [np.sqrt(np.mean((x - ends[0]) ** 2)) for x in ends[1:]]
    np.testing.assert_allclose(slope(errors), 1, atol=0.15)


MARGINALS = {
    "vanishing at the data": (Linear(), lambda t: jnp.sqrt(1 - t), "heun", 100),
    "song": (VP(), lambda t: jnp.sqrt(0.1 + (1 - t) * 19.9), "euler_maruyama", 400),
}
KEY_START, KEY_DATA, KEY_PATH = (jax.random.key(i) for i in (5, 7, 6))


def sampler(schedule, g, method, num_steps, **options):
    """`sample(x, factor)` on the mixture, with `factor` times the true score."""
    mixture = two_gaussians()
    v = oracles.velocity(mixture, schedule)

    def sample(x, factor=None):
        score = None if factor is None else lambda t, x: factor * oracles.prediction(mixture, schedule, t, x).score
        by = schedule if factor is None else None
        return sample_sde(v, score, g, KEY_PATH, x, schedule=by, num_steps=num_steps, method=method, **options).x

    return jax.jit(sample)


@pytest.mark.parametrize("name", MARGINALS)
def test_every_diffusion_reaches_the_same_marginal(name):
    """Each of four p-values is refused below 1e-4: a right sampler fails with probability below 4e-4 under a fresh key.

    Power: a drift without the score term, or with half of it, is refused below.
    """
    schedule = MARGINALS[name][0]
    x = sampler(*MARGINALS[name], t1=schedule.domain[1])(jax.random.normal(KEY_START, (4000, 2)))
    assert min(p_values(x)) > 1e-4


def test_the_marginal_test_refuses_a_wrong_score_term():
    sample, x0 = sampler(Linear(), 0.7, "euler_maruyama", 400), jax.random.normal(KEY_START, (4000, 2))
    assert min(p_values(sample(x0, 1.0))) > 1e-4
    assert min(p_values(sample(x0, 0.5))) < 1e-6
    assert min(p_values(sample(x0, 0.0))) < 1e-6


def test_backward_reaches_the_source():
    """False-alarm rate as above; the sign that the score term has in forward time is refused."""
    mixture = two_gaussians()
    x = 0.95 * oracles.sample(mixture, KEY_DATA, 4000) + 0.05 * jax.random.normal(KEY_START, (4000, 2))
    sample = sampler(Linear(), 0.7, "heun", 50, t0=0.95, t1=0.0)
    assert min(p_values(sample(x, 1.0), source_cdf)) > 1e-4
    assert min(p_values(sample(x, -1.0), source_cdf)) < 1e-6


def swing(t, x):
    return jnp.sin(3 * t) * x - t


@pytest.mark.parametrize(("method", "ode_method"), [("euler_maruyama", "euler"), ("heun", "heun")])
def test_no_diffusion_is_the_method_for_the_flow(method, ode_method):
    options = {"num_steps": 7, "t1": 0.9, "trajectory": True}
    x0 = jax.random.normal(jax.random.key(0), (5, 2))
    sde = sample_sde(swing, None, 0.0, jax.random.key(1), x0, schedule=Cosine(), method=method, **options)
    ode = sample_ode(swing, x0, method=ode_method, **options)
    np.testing.assert_allclose(sde.trajectory, ode.trajectory, atol=1e-6)


@pytest.mark.parametrize(("t_next", "sign"), [(0.75, 1), (0.25, -1)])
def test_a_step_is_the_formula(t_next, sign):
    x, noise = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, -1.0]])

    def drift(t, x):
        return t + x + sign * (3 * t) ** 2 / 2 * (-2 * x)

    functions = (lambda t, x: t + x, lambda t, x: -2 * x, lambda t: 3 * t)
    stepped = sde_step(*functions, 0.5, t_next, x, noise)
    expected = x + sign * 0.25 * drift(0.5, x) + 1.5 * 0.5 * noise
    np.testing.assert_allclose(stepped, expected, rtol=1e-6)

    stepped = sde_step(*functions, 0.5, t_next, x, noise, method="heun")
    scale = np.sqrt((1.5**2 + (3 * t_next) ** 2) / 2)
    predicted = x + sign * 0.25 * drift(0.5, x) + scale * 0.5 * noise
    expected = x + sign * 0.125 * (drift(0.5, x) + drift(t_next, predicted)) + scale * 0.5 * noise
    np.testing.assert_allclose(stepped, expected, rtol=1e-6)


@pytest.mark.parametrize(("schedule", "t", "t_next"), [(Linear(), 0.9, 1.0), (Polynomial(2.0), 0.1, 0.0)])
def test_heun_to_where_there_is_no_score_is_euler_maruyama(schedule, t, t_next):
    x, noise = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, -1.0]])
    stepped = {
        method: sde_step(swing, None, lambda t: 1 + t, t, t_next, x, noise, schedule=schedule, method=method)
        for method in METHODS
    }
    np.testing.assert_array_equal(stepped["heun"], stepped["euler_maruyama"])
    assert np.isfinite(stepped["heun"]).all()


def test_low_precision_states_keep_the_last_steps_finite():
    # 0.999 is 1 in bfloat16, where sigma is 0.
    x = jnp.ones((1, 2), dtype=jnp.bfloat16)
    for method in METHODS:
        stepped = sde_step(lambda t, x: x, None, 0.1, 0.999, 1.0, x, x, schedule=Linear(), method=method)
        assert stepped.dtype == jnp.bfloat16
        assert np.isfinite(np.asarray(stepped, dtype=float)).all()


def test_sampling_is_steps_with_the_documented_noise():
    v, score, g = (lambda t, x: x - t), (lambda t, x: -x), (lambda t: 1 + t)
    key, x = jax.random.key(2), jnp.ones((2, 3))
    grid = [0.0, 0.2, 0.7]
    solution = sample_sde(v, score, g, key, x, grid=grid, trajectory=True)
    assert solution.trajectory.shape == (3, 2, 3)
    np.testing.assert_array_equal(solution.trajectory[0], x)
    for i in range(2):
        noise = jax.random.normal(jax.random.fold_in(key, i), (2, 3))
        x = sde_step(v, score, g, grid[i], grid[i + 1], x, noise)
        np.testing.assert_allclose(solution.trajectory[i + 1], x, rtol=1e-5)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.x)


@pytest.mark.parametrize(
    ("method", "t0", "t1", "calls"),
    [
        ("euler_maruyama", 0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8]),
        ("heun", 0.0, 1.0, [0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]),
        ("heun", 0.5, 0.0, [0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5]),
    ],
)
def test_nfe_counts_the_calls_that_happen_and_none_at_sigma_zero(method, t0, t1, calls):
    times = []

    def v(t, x):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return x

    solution = sample_sde(
        v, None, 1.0, jax.random.key(0), jnp.ones((1, 1)), schedule=Linear(), num_steps=5, method=method, t0=t0, t1=t1
    )
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(times), calls, atol=1e-6)
    assert int(solution.nfe) == len(calls)  # the score came from the same evaluations
    assert np.isfinite(solution.x).all()


@pytest.mark.parametrize(("method", "evaluations"), [("euler_maruyama", 5), ("heun", 10)])
def test_nfe_adds_velocity_and_score(method, evaluations):
    v = classifier_free(lambda t, x: x, lambda t, x: -x, 2.0)
    options = {"key": jax.random.key(0), "x0": jnp.ones((1, 1)), "num_steps": 5, "method": method}
    assert int(sample_sde(v, lambda t, x: x, 1.0, **options).nfe) == 3 * evaluations
    assert int(sample_sde(v, None, 1.0, schedule=Linear(), t1=0.9, **options).nfe) == 2 * evaluations


def test_score_from_the_schedule_equals_a_separate_score():
    schedule = Linear()
    options = {"key": jax.random.key(0), "x0": jnp.ones((3, 2)), "num_steps": 5}
    shared = sample_sde(swing, None, 0.7, schedule=schedule, **options).x
    np.testing.assert_allclose(shared, sample_sde(swing, score_fn(swing, schedule), 0.7, **options).x, rtol=1e-5)


def test_gradient_through_the_path():
    # X_1 = x0 prod(1 + a h) + noise, so that dX_1 / da = x0 n h (1 + a h)^(n - 1) where the noise vanishes.
    def end(a):
        return sample_sde(
            lambda t, x: a * x, lambda t, x: 0 * x, 0.0, jax.random.key(0), jnp.ones((1, 1)), num_steps=4
        ).x[0, 0]

    np.testing.assert_allclose(jax.grad(end)(0.5), (1 + 0.5 / 4) ** 3, rtol=1e-5)


SCHEDULE = Linear()
BAD = [
    ({"num_steps": 0}, "num_steps must be at least 1, got 0."),
    ({"t0": 1.0, "t1": 0.0}, "The score is infinite where sigma = 0, at t = 1.0: start or end short of it"),
    ({"num_steps": None, "grid": [1.0, 0.5, 0.0]}, "The score is infinite where sigma = 0"),
    (
        {"schedule": Polynomial(2.0)},
        "The velocity says nothing of data and noise where the log-SNR stands still, at t = 0.0",
    ),
    ({"num_steps": None, "grid": [0.5, 0.0, 0.2]}, "grid must be finite and strictly monotone"),
    ({"method": "euler"}, "method must be one of 'euler_maruyama', 'heun', got 'euler'."),
    ({"diffusion": -1.0}, "diffusion must be finite and not negative, got -1.0."),
    ({"diffusion": float("nan")}, "diffusion must be finite and not negative, got nan."),
    ({"diffusion": lambda t: jnp.ones(2)}, r"diffusion\(t\) must be a scalar, got shape \(2,\)."),
    ({"key": None}, "key must be one typed key, as from jax.random.key"),
    ({"key": 0}, "key must be one typed key"),
    ({"key": jax.random.PRNGKey(0)}, "key must be one typed key"),
    ({"key": jax.random.split(jax.random.key(0))}, "key must be one typed key"),
    ({"schedule": None}, "Exactly one of score and schedule must be given"),
    ({"score": lambda t, x: x}, "Exactly one of score and schedule must be given"),
    (
        {"schedule": None, "score": lambda t, x: x[:, :1]},
        r"score\(t, x\) must have the shape of x, \(2, 2\), got \(2, 1\).",
    ),
    ({"v": lambda t, x: x[:, :1]}, r"v\(t, x\) must have the shape of x, \(2, 2\), got \(2, 1\)."),
    ({"x0": jnp.ones((2, 2), dtype=int)}, "x0 must be floating point, got int32."),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    options = {
        "v": lambda t, x: x,
        "score": None,
        "diffusion": 1.0,
        "key": jax.random.key(0),
        "x0": jnp.ones((2, 2)),
        "schedule": SCHEDULE,
        "num_steps": 3,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        sample_sde(**options)
