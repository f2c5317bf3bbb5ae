import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marginals import p_values, source_cdf, two_gaussians

from fm_jax import oracles
from fm_jax.nfe import Counted
from fm_jax.parameterization import score_fn
from fm_jax.samplers import EulerMaruyama, RungeKutta, StochasticHeun, falling_noise, sample, sde_step
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import VP, Cosine, Linear, Polynomial

METHODS = {"euler_maruyama": EulerMaruyama, "heun": StochasticHeun}

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


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted(LAWS), ids=str)
def test_weak_order(moments, case):
    order = METHODS[case[0]].order
    mean_errors, cov_errors = moments[case]
    assert mean_errors[-1] < 0.02
    assert cov_errors[-1] < 0.02
    np.testing.assert_allclose(slope(cov_errors), order, atol=0.15)
    # The mean of a Gaussian is carried almost exactly along straight lines: an error to fit is not always left.
    assert mean_errors[-1] < 1e-10 or abs(slope(mean_errors) - order) < 0.15


@pytest.mark.slow
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
    "vanishing at the data": (StochasticHeun(Linear(), lambda t: jnp.sqrt(1 - t)), 100),
    "song": (EulerMaruyama(VP(), lambda t: jnp.sqrt(0.1 + (1 - t) * 19.9)), 400),
}
KEY_START, KEY_DATA, KEY_PATH = (jax.random.key(i) for i in (5, 7, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", MARGINALS)
def test_every_diffusion_reaches_the_same_marginal(name):
    """Each of four p-values is refused below 1e-4: a right sampler fails with probability below 4e-4 under a fresh key.

    Power: a drift without the score term, or with half of it, is refused below.
    """
    sampler, num_steps = MARGINALS[name]
    v, times = oracles.velocity(two_gaussians(), sampler.schedule), uniform(num_steps, *sampler.schedule.domain)
    end = jax.jit(lambda x: sample(v, x, sampler, times=times, key=KEY_PATH).x)
    assert min(p_values(end(jax.random.normal(KEY_START, (4000, 2))))) > 1e-4


def with_a_multiple_of_the_score(make, times):
    """`end(x, factor)` on the mixture and `Linear`, with `factor` times the true score."""
    mixture = two_gaussians()
    v = oracles.velocity(mixture, Linear())

    @jax.jit
    def end(x, factor):
        sampler = make(diffusion=0.7, score=lambda t, x: factor * oracles.prediction(mixture, Linear(), t, x).score)
        return sample(v, x, sampler, times=times, key=KEY_PATH).x

    return end


@pytest.mark.slow
def test_the_marginal_test_refuses_a_wrong_score_term():
    end, x0 = with_a_multiple_of_the_score(EulerMaruyama, 400), jax.random.normal(KEY_START, (4000, 2))
    assert min(p_values(end(x0, 1.0))) > 1e-4
    assert min(p_values(end(x0, 0.5))) < 1e-6
    assert min(p_values(end(x0, 0.0))) < 1e-6


@pytest.mark.slow
def test_backward_reaches_the_source():
    """False-alarm rate as above; the sign that the score term has in forward time is refused."""
    mixture = two_gaussians()
    x = 0.95 * oracles.sample(mixture, KEY_DATA, 4000) + 0.05 * jax.random.normal(KEY_START, (4000, 2))
    end = with_a_multiple_of_the_score(StochasticHeun, uniform(50, 0.95, 0.0))
    assert min(p_values(end(x, 1.0), source_cdf)) > 1e-4
    assert min(p_values(end(x, -1.0), source_cdf)) < 1e-6


def swing(t, x):
    return jnp.sin(3 * t) * x - t


@pytest.mark.slow_but_one
@pytest.mark.parametrize(("make", "method"), [(EulerMaruyama, "euler"), (StochasticHeun, "heun")])
def test_no_diffusion_is_the_method_for_the_flow(make, method):
    x0, times = jax.random.normal(jax.random.key(0), (5, 2)), uniform(7, 0.0, 0.9)
    sde = sample(swing, x0, make(Cosine(), 0.0), times=times, key=jax.random.key(1), trajectory=True)
    ode = sample(swing, x0, RungeKutta(method), times=times, trajectory=True)
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


@pytest.mark.parametrize("method", METHODS)
def test_sampling_is_steps_with_the_documented_noise(method):
    v, score, g = (lambda t, x: x - t), (lambda t, x: -x), (lambda t: 1 + t)
    key, x, times = jax.random.key(2), jnp.ones((2, 3)), [0.0, 0.2, 0.7]
    solution = sample(v, x, METHODS[method](diffusion=g, score=score), times=times, key=key, trajectory=True)
    for i in range(2):
        noise = jax.random.normal(jax.random.fold_in(key, i), (2, 3))
        x = sde_step(v, score, g, times[i], times[i + 1], x, noise, method=method)
        np.testing.assert_allclose(solution.trajectory[i + 1], x, rtol=1e-5)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("make", "t0", "t1", "calls"),
    [
        (EulerMaruyama, 0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8]),
        (StochasticHeun, 0.0, 1.0, [0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]),
        (StochasticHeun, 0.5, 0.0, [0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5]),
    ],
)
def test_calls_are_those_that_happen_and_none_at_sigma_zero(make, t0, t1, calls):
    times = []

    def v(t, x):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return x

    solution = sample(v, jnp.ones((1, 1)), make(Linear(), 1.0), times=uniform(5, t0, t1), key=jax.random.key(0))
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(times), calls, atol=1e-6)
    assert int(solution.calls) == len(calls)  # the score came from the same evaluations
    assert np.isfinite(solution.x).all()


@pytest.mark.parametrize(("make", "times"), [(EulerMaruyama, 5), (StochasticHeun, 10)])
def test_a_score_of_its_own_is_called_and_paid_for_too(make, times):
    def counts(v, score):
        solution = sample(v, jnp.ones((1, 1)), make(diffusion=1.0, score=score), times=5, key=jax.random.key(0))
        return int(solution.calls), None if solution.nfe is None else int(solution.nfe)

    v, score = Counted(lambda t, x: x, 2), Counted(lambda t, x: -x, 1)
    assert make(diffusion=1.0, score=score).nfe_per_step == 2 * make(Linear()).nfe_per_step
    assert counts(v, score) == (2 * times, 3 * times)
    assert counts(v, score.function) == counts(v.function, score) == (2 * times, None)


def test_score_from_the_schedule_equals_a_separate_score():
    options = {"times": 5, "key": jax.random.key(0)}
    x0, own = jnp.ones((3, 2)), EulerMaruyama(diffusion=0.7, score=score_fn(swing, Linear()))
    shared = sample(swing, x0, EulerMaruyama(Linear(), 0.7), **options).x
    np.testing.assert_allclose(shared, sample(swing, x0, own, **options).x, rtol=1e-5)


def test_the_default_noise_is_the_falling_one():
    x0, options = jnp.ones((3, 2)), {"times": 5, "key": jax.random.key(0)}
    by_default, given = (sample(swing, x0, EulerMaruyama(VP(), g), **options).x for g in (None, falling_noise(VP())))
    np.testing.assert_array_equal(by_default, given)


def test_falling_noise_is_that_of_the_reverse_diffusion():
    """On the linear path -d sigma^2 / dt = 2 (1 - t)."""
    t = np.linspace(0, 1, 5)
    np.testing.assert_allclose(jax.vmap(falling_noise(Linear()))(t), np.sqrt(2 * (1 - t)), atol=1e-6)


def test_gradient_through_the_path():
    # X_1 = x0 prod(1 + a h) + noise, so that dX_1 / da = x0 n h (1 + a h)^(n - 1) where the noise vanishes.
    def end(a):
        sampler = EulerMaruyama(diffusion=0.0, score=lambda t, x: 0 * x)
        return sample(lambda t, x: a * x, jnp.ones((1, 1)), sampler, times=4, key=jax.random.key(0)).x[0, 0]

    np.testing.assert_allclose(jax.grad(end)(0.5), (1 + 0.5 / 4) ** 3, rtol=1e-5)


def minus(t, x):
    return -x


@pytest.mark.parametrize("make", METHODS.values())
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": Linear(), "diffusion": -1.0}, "diffusion must be finite and not negative, got -1.0."),
        ({"schedule": Linear(), "diffusion": float("nan")}, "diffusion must be finite and not negative, got nan."),
        ({}, "Exactly one of score and schedule must be given"),
        ({"schedule": Linear(), "score": minus}, "Exactly one of score and schedule must be given"),
        ({"score": minus}, "diffusion must be given with a score: its default is made of a schedule."),
    ],
)
def test_bad_options_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("make", METHODS.values())
@pytest.mark.parametrize(
    ("options", "times", "message"),
    [
        (
            {"schedule": Linear()},
            [1.0, 0.5, 0.0],
            "The score is infinite where sigma = 0, at t = 1.0: start or end short",
        ),
        ({"schedule": Polynomial(2.0)}, [0.0, 1.0], "The velocity says nothing of data and noise .*, at t = 0.0"),
        ({"schedule": Linear(), "diffusion": lambda t: jnp.ones(2)}, 3, r"diffusion\(t\) must be a scalar, got shape"),
        (
            {"score": lambda t, x: x[:, :1], "diffusion": 1.0},
            3,
            r"score\(t, x\) must have the shape of x, \(2, 2\), got",
        ),
    ],
)
def test_bad_paths_are_refused(make, options, times, message):
    with pytest.raises(ValueError, match=message):
        sample(minus, jnp.ones((2, 2)), make(**options), times=times, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, "method must be one of 'euler_maruyama', 'heun', got 'euler'."),
        ({"schedule": None}, "Exactly one of score and schedule must be given"),
        ({"diffusion": -1.0}, "diffusion must be finite and not negative, got -1.0."),
    ],
)
def test_bad_steps_are_refused(options, message):
    options = {"schedule": Linear(), "diffusion": 1.0, **options}
    x = jnp.ones((2, 2))
    with pytest.raises(ValueError, match=message):
        sde_step(minus, None, options.pop("diffusion"), 0.0, 0.1, x, x, **options)
