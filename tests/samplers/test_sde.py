import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fm_jax import oracles
from fm_jax.guidance import classifier_free
from fm_jax.parameterization import score_fn
from fm_jax.samplers.fixed import sample_ode
from fm_jax.samplers.sde import sample_sde, sde_step
from fm_jax.schedules import VP, Cosine, Linear

NUM_STEPS = [32, 64, 128, 256]
DIFFUSIONS = {
    "constant": 0.8,
    "vanishing at the data": lambda t: jnp.sqrt(2 * (1 - t)),
    "growing": lambda t: 0.3 + t,
}


def gaussian():
    return oracles.gaussian_mixture([[0.5, -1.0]], [[[0.5, 0.2], [0.2, 0.3]]])


def slope(errors):
    return -np.polyfit(np.log(NUM_STEPS), np.log(errors), 1)[0]


@pytest.fixture(scope="module")
def moments():
    """Mean and covariance errors of Euler-Maruyama at t = 1, without Monte Carlo error.

    On a single Gaussian a step is affine in the state and in the noise, so that the law at the end is a Gaussian whose
    moments follow from the step's Jacobians: {diffusion: (mean errors, covariance errors)} over NUM_STEPS.
    """
    with jax.enable_x64(True):
        mixture, schedule = gaussian(), Linear()
        v = oracles.velocity(mixture, schedule)

        def law(g):
            def step(carry, times):
                mean, cov = carry

                def f(x, n):
                    return sde_step(v, None, g, *times, x[None], n[None], schedule=schedule)[0]

                by_x, by_noise = jax.jacfwd(f, argnums=(0, 1))(mean, jnp.zeros(2))
                return (f(mean, jnp.zeros(2)), by_x @ cov @ by_x.T + by_noise @ by_noise.T), None

            return lambda grid: jax.lax.scan(step, (jnp.zeros(2), jnp.eye(2)), (grid[:-1], grid[1:]))[0]

        # Steps of length 0 at the start pad the grids to one length, so that they compile once.
        grids = jnp.stack([jnp.pad(jnp.linspace(0, 1, n + 1), (NUM_STEPS[-1] - n, 0), mode="edge") for n in NUM_STEPS])
        laws = jax.jit(lambda grids: {name: jax.vmap(law(g))(grids) for name, g in DIFFUSIONS.items()})(grids)
        exact_cov = np.array([[0.5, 0.2], [0.2, 0.3]])
        return {
            name: (
                np.linalg.norm(mean - np.array([[0.5, -1.0]]), axis=1),
                np.linalg.norm(cov - exact_cov[None], axis=(1, 2)),
            )
            for name, (mean, cov) in laws.items()
        }


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_weak_order_one_towards_the_data_distribution(moments, name):
    mean_errors, cov_errors = moments[name]
    assert mean_errors[-1] < 0.02
    assert cov_errors[-1] < 0.02
    np.testing.assert_allclose(slope(cov_errors), 1, atol=0.15)
    # The mean of a Gaussian is carried almost exactly along straight lines: an error to fit is not always left.
    assert mean_errors[-1] < 1e-10 or abs(slope(mean_errors) - 1) < 0.15


def test_strong_order_one_on_a_shared_brownian_path(x64):
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
            return sde_step(v, score, 0.8, t, t_next, x, noise), None

        return jax.lax.scan(step, x0, (grid[:-1], grid[1:], increments))[0]

    ends = [end(jnp.linspace(0, 1, finest + 1), fine)]
    for n in NUM_STEPS:
        grid = jnp.pad(jnp.linspace(0, 1, n + 1), (finest - n, 0), mode="edge")
        coarse = fine.reshape(n, finest // n, 64, 2).sum(axis=1)
        ends.append(end(grid, jnp.pad(coarse, ((finest - n, 0), (0, 0), (0, 0)))))
    errors = [np.sqrt(np.mean((x - ends[0]) ** 2)) for x in ends[1:]]
    np.testing.assert_allclose(slope(errors), 1, atol=0.15)


MIXTURE_MEANS, MIXTURE_SCALES, MIXTURE_WEIGHTS = np.array([[-1.5, 0.0], [1.0, 0.5]]), [0.4, 0.7], [0.3, 0.7]
MARGINALS = {
    "ode": (Linear(), 0.0),
    "constant": (Linear(), 0.7),
    "vanishing at the data": (Linear(), lambda t: jnp.sqrt(1 - t)),
    "song": (VP(), lambda t: jnp.sqrt(0.1 + (1 - t) * 19.9)),
}


@pytest.mark.parametrize("name", MARGINALS)
def test_every_diffusion_reaches_the_same_marginal(name):
    """Kolmogorov-Smirnov on four projections against the exact distribution functions, 4,000 samples.

    Each is refused at p < 1e-4, so that a right sampler fails with probability below 4e-4 under a fresh key. Power: a
    drift without the score term, or with half of it, is refused below.
    """
    assert min(p_values(*MARGINALS[name])) > 1e-4


def p_values(schedule, g, wrong=None):
    mixture = oracles.gaussian_mixture(MIXTURE_MEANS, MIXTURE_SCALES, MIXTURE_WEIGHTS)
    v = oracles.velocity(mixture, schedule)
    score = None if wrong is None else lambda t, x: wrong * score_fn(v, schedule)(t, x)
    x0 = jax.random.normal(jax.random.key(5), (4000, 2))
    t1 = min(schedule.domain[1], 1.0)
    sample = jax.jit(
        lambda key, x0: (
            sample_sde(v, score, g, key, x0, schedule=schedule if score is None else None, num_steps=400, t1=t1).x
        )
    )
    x = np.asarray(sample(jax.random.key(6), x0))

    def projected(direction):
        def cdf(y):
            components = zip(MIXTURE_WEIGHTS, MIXTURE_MEANS @ direction, MIXTURE_SCALES, strict=True)
            return sum(w * scipy.stats.norm.cdf(y, mean, scale) for w, mean, scale in components)

        return scipy.stats.kstest(x @ direction, cdf).pvalue

    angles = np.pi * np.arange(4) / 4
    return [projected(np.array([np.cos(a), np.sin(a)])) for a in angles]


@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_the_marginal_test_refuses_a_wrong_score_term(wrong):
    assert min(p_values(Linear(), 0.7, wrong=wrong)) < 1e-6


def test_no_diffusion_is_the_euler_method():
    schedule = Cosine()
    v = oracles.velocity(gaussian(), schedule)
    x0 = jax.random.normal(jax.random.key(0), (5, 2))
    sde = sample_sde(v, None, 0.0, jax.random.key(1), x0, schedule=schedule, num_steps=7, trajectory=True)
    ode = sample_ode(v, x0, num_steps=7, method="euler", trajectory=True)
    np.testing.assert_allclose(sde.trajectory, ode.trajectory, atol=1e-6)


def test_a_step_is_the_formula():
    x, noise = jnp.array([[1.0, 2.0]]), jnp.array([[0.5, -1.0]])
    stepped = sde_step(lambda t, x: t + x, lambda t, x: -2 * x, lambda t: 3 * t, 0.5, 0.75, x, noise)
    expected = x + 0.25 * (0.5 + x + 1.5**2 / 2 * (-2 * x)) + 1.5 * 0.5 * noise
    np.testing.assert_allclose(stepped, expected, rtol=1e-6)


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


def test_never_evaluated_at_the_end():
    times = []

    def v(t, x):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return x

    solution = sample_sde(v, None, 1.0, jax.random.key(0), jnp.ones((1, 1)), schedule=Linear(), num_steps=5)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(times), [0, 0.2, 0.4, 0.6, 0.8], atol=1e-6)
    assert int(solution.nfe) == 5  # the score came from the same evaluation


def test_nfe_adds_velocity_and_score():
    v = classifier_free(lambda t, x: x, lambda t, x: -x, 2.0)
    options = {"key": jax.random.key(0), "x0": jnp.ones((1, 1)), "num_steps": 5}
    assert int(sample_sde(v, lambda t, x: x, 1.0, **options).nfe) == 15
    assert int(sample_sde(v, None, 1.0, schedule=Linear(), **options).nfe) == 10


def test_score_from_the_schedule_equals_a_separate_score():
    schedule = Linear()
    v = oracles.velocity(gaussian(), schedule)
    options = {"key": jax.random.key(0), "x0": jnp.ones((3, 2)), "num_steps": 5}
    shared = sample_sde(v, None, 0.7, schedule=schedule, **options).x
    np.testing.assert_allclose(shared, sample_sde(v, score_fn(v, schedule), 0.7, **options).x, rtol=1e-5)


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
    ({"t0": 1.0, "t1": 0.0}, "Time must run forward, got a grid from 1.0 to 0.0."),
    ({"num_steps": None, "grid": [0.5, 0.0]}, "Time must run forward"),
    ({"method": "heun"}, "method must be one of 'euler_maruyama', got 'heun'."),
    ({"diffusion": -1.0}, "diffusion must be finite and not negative, got -1.0."),
    ({"diffusion": float("nan")}, "diffusion must be finite and not negative, got nan."),
    ({"diffusion": lambda t: jnp.ones(2)}, r"diffusion\(t\) must be a scalar, got shape \(2,\)."),
    ({"key": None}, "key must be one typed key, as from jax.random.key"),
    ({"key": 0}, "key must be one typed key"),
    ({"key": jax.random.PRNGKey(0)}, "key must be one typed key"),
    ({"key": jax.random.split(jax.random.key(0))}, "key must be one typed key"),
    ({"schedule": None}, "Exactly one of score and schedule must be given"),
    ({"score": lambda t, x: x}, "Exactly one of score and schedule must be given"),
    ({"schedule": None, "score": lambda t, x: x[:, :1]}, "v and score must have the shape of x"),
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
