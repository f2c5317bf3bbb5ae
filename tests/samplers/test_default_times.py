"""Networks of every kind, on every schedule, through every sampler: finite and right without a word about times.

The data are N(MEAN, SCALE^2), of which all four predictions and the flow have closed forms.
"""

import dataclasses

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.guidance import classifier, classifier_free, classifier_free_batched, compose
from fm_jax.likelihood import encode_and_log_prob, log_prob, sample_and_log_prob
from fm_jax.metrics import straightness
from fm_jax.nfe import Counted, domain_of, reach_of
from fm_jax.parameterization import reschedule, score_fn, velocity_domain, velocity_fn
from fm_jax.samplers import DDIM, AdamsBashforth, Adaptive, DiffraxSDE, RungeKutta, StochasticHeun, sample
from fm_jax.samplers.learned import from_method
from fm_jax.samplers.sample import times_of
from fm_jax.schedules import DDPM, VP, Cosine, Linear, LinearVP, Polynomial, coefficients, linear_betas
from fm_jax.types import KINDS

MEAN, SCALE = 0.5, 0.6
KEY = jax.random.key(0)
SCHEDULES = {
    "Linear": Linear(),
    "Cosine": Cosine(),
    "Polynomial": Polynomial(2.0),
    "VP": VP(),
    "LinearVP": LinearVP(),
    "DDPM": DDPM(linear_betas(50, 2e-3, 0.4)),
}
FIXED = ["euler", "heun", "ddim", "dpm_solver_2", "unipc_2", "euler_maruyama", "stochastic_heun", "churn"]
FIXED += ["predictor_corrector"]
OF_DIFFRAX = ["bosh3", pytest.param("shark", marks=pytest.mark.slow)]
X0 = np.linspace(-2, 2, 9, dtype=np.float32)[:, None]
EVEN = [0.0, 0.25, 0.5, 0.75, 1.0]


def network(kind, schedule):
    """A perfect network."""

    def predict(t, x, cond=None):
        alpha, sigma, d_alpha, d_sigma = coefficients(schedule, t[:, None])
        score = -(x - alpha * MEAN) / (alpha**2 * SCALE**2 + sigma**2)
        data, noise = MEAN - alpha * SCALE**2 * score, -sigma * score
        return {"data": data, "noise": noise, "score": score, "velocity": d_alpha * data + d_sigma * noise}[kind]

    return Counted(predict, 1)


def velocity(kind, schedule):
    return velocity_fn(network(kind, schedule), kind, schedule)


def draw(sampler, v, x0=X0, times=None):
    return sample(v, x0, sampler, times=times, key=KEY if sampler.stochastic else None)


def agrees_with_the_exact_flow(name, kind, schedule):
    """The samples are those of the exact velocity on the times that were taken, which are finite."""
    sampler, v = contracts.SAMPLERS[name](schedule), velocity(kind, schedule)
    grid = times_of(v, sampler, 4, X0)
    expected = draw(sampler, lambda t, x: network("velocity", schedule)(jnp.full(len(x), t), x), times=grid).x
    assert np.isfinite(expected).all(), (name, grid)
    np.testing.assert_allclose(draw(sampler, v, times=4).x, expected, atol=0.02, err_msg=name)
    assert schedule.alpha(grid[0]) < 0.01, name
    assert grid[-1] >= min(schedule.domain[1], 1 - 1.001e-3) - 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "DDPM"])
def test_a_number_of_steps_is_right_for_every_kind(kind, schedule):
    with jax.disable_jit():  # quicker than to compile each
        for name in FIXED:
            agrees_with_the_exact_flow(name, kind, SCHEDULES[schedule])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heun", "ddim", "dpm_solver_2", "stochastic_heun"])
def test_a_number_of_steps_is_right_on_a_table(name):
    for kind in ("data", "score"):
        agrees_with_the_exact_flow(name, kind, SCHEDULES["DDPM"])


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_DIFFRAX)
@pytest.mark.parametrize(
    ("kind", "schedule"), [("data", "Linear"), ("noise", "Cosine"), ("score", "Polynomial"), ("velocity", "VP")]
)
def test_a_number_of_steps_is_right_by_diffrax(name, kind, schedule):
    agrees_with_the_exact_flow(name, kind, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_default_ends_at_the_data(schedule):
    """The flow takes x0 to m + s x0, but for the noise that is left at the end and the signal in the source."""
    x = draw(RungeKutta("heun"), velocity("data", SCHEDULES[schedule])).x
    np.testing.assert_allclose(x, MEAN + SCALE * X0, atol=0.12 if schedule == "DDPM" else 0.03)


SINGULAR = {"data": EVEN, "noise": EVEN, "score": EVEN}
"""Times from 0 to 1, which the velocity of a network of these kinds on `Linear` has not."""


@pytest.mark.slow_but_one
@pytest.mark.parametrize("kind", SINGULAR)
@pytest.mark.parametrize("name", contracts.SAMPLERS)
def test_times_at_which_the_velocity_is_infinite_are_refused(kind, name):
    """Before anything is computed; but for the last, where the sampler does not call the velocity there."""
    sampler = contracts.SAMPLERS[name](Linear())
    if kind == "data" and times_of(velocity(kind, Linear()), sampler, 4, X0)[-1] == 1:
        if name in contracts.FIXED_STEPS:
            assert np.isfinite(draw(sampler, velocity(kind, Linear()), times=EVEN).x).all()
        return
    with pytest.raises(
        ValueError, match=r"^times must be within \[0.*, the velocity_domain of the network in v, .*got"
    ):
        draw(sampler, velocity(kind, Linear()), times=EVEN)


def test_which_samplers_end_at_the_data_by_data_predictions():
    """Those that never call the velocity at their last time: to t = 1, where nothing of the noise is left."""
    v = velocity("data", Linear())
    ends = {name: times_of(v, make(Linear()), 8, X0)[-1] for name, make in contracts.SAMPLERS.items()}
    short = {name for name, end in ends.items() if end < 1}
    assert {"heun", "rk4", "churn", "tsit5", "bosh3", "kvaerno3"} <= short
    assert not {"euler", "midpoint", "ab2", "ab3", "ddim", "dpm_solver_3", "unipc_3", "euler_maruyama", "sea"} & short
    np.testing.assert_allclose([ends[name] for name in sorted(short)], 0.999)
    fine = np.linspace(0, 1, 3001)
    assert times_of(v, RungeKutta("euler"), 3000, X0)[-1] == np.float32(0.999)  # steps beyond it would not be finite
    with pytest.raises(ValueError, match="velocity_domain"):
        draw(RungeKutta("euler"), v, times=fine)
    assert times_of(v, AdamsBashforth(3), 2, X0)[-1] == np.float32(0.999)  # which start with Heun's method


def test_backward_the_other_end_is_the_last():
    """To t = 0 by noise predictions: Euler's method does not call the velocity there, a corrector does."""
    v = velocity("noise", Linear())
    x1 = MEAN + SCALE * X0
    assert np.isfinite(draw(RungeKutta("euler"), v, x1, EVEN[::-1]).x).all()
    for sampler in (RungeKutta("heun"), contracts.FIXED_STEPS["predictor_corrector"](Linear()), Adaptive()):
        with pytest.raises(ValueError, match="velocity_domain"):
            draw(sampler, v, x1, EVEN[::-1])
    with pytest.raises(ValueError, match="velocity_domain"):
        draw(StochasticHeun(Linear()), v, x1, [0.9, 0.5, 0.0])
    with pytest.raises(ValueError, match="velocity_domain"):
        draw(RungeKutta("euler"), velocity("data", Linear()), x1, EVEN[::-1])


def test_noise_of_the_schedule_ends_with_its_domain():
    """Diffrax asks for g at the last time too, and on VP it is not finite at t = 1."""
    with pytest.raises(
        ValueError, match=r"^times must be within \[0.0, 0.99999\], the domain of VP.*where g is finite"
    ):
        draw(DiffraxSDE(VP()), velocity("velocity", VP()), times=EVEN)
    assert DiffraxSDE(VP(), diffusion=1.0).domain == (0.0, 1.0)


def test_another_margin():
    v = velocity("noise", Linear())
    closer = dataclasses.replace(v, domain=velocity_domain("noise", Linear(), margin=1e-4))
    with pytest.raises(ValueError, match="velocity_domain"):
        draw(DDIM(Linear()), v, times=[2e-4, 0.5, 1.0])
    assert np.isfinite(draw(DDIM(Linear()), closer, times=[2e-4, 0.5, 1.0]).x).all()
    assert times_of(closer, DDIM(Linear()), 4, X0)[0] == np.float32(1e-4)


def test_a_learned_solver_keeps_to_it_as_well():
    v = velocity("score", Linear())
    with pytest.raises(ValueError, match=r"^the sampler's times must be within .*velocity_domain"):
        sample(v, X0, from_method("euler", 3))
    assert np.isfinite(sample(v, X0, from_method("euler", 3, *domain_of(v))).x).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_made_of_a_network_carries_its_domain(kind, schedule):
    schedule = SCHEDULES[schedule]
    v, model_fn = velocity(kind, schedule), network(kind, schedule)
    domain, cond = velocity_domain(kind, schedule), jnp.zeros(9)
    expected = (None, None) if domain == (0.0, 1.0) else (domain, (0.0, 1.0))
    plain = Counted(lambda t, x: x, 1)
    made = {
        "velocity_fn": v,
        "score_fn": score_fn(v, schedule),
        "classifier_free": classifier_free(plain, v, 2.0),
        "off": classifier_free_batched(model_fn, kind, schedule, cond, 0.0, 1.0),
        "batched": classifier_free_batched(model_fn, kind, schedule, cond, 0.0, 2.0),
        "compose": compose(model_fn, kind, schedule, [cond, cond], 0.0, [1.0, 2.0]),
        "classifier": classifier(v, lambda t, x: x.sum(axis=1), 2.0, schedule),
    }
    for name, each in made.items():
        assert (domain_of(each), reach_of(each)) == expected, name


def test_a_new_schedule_has_the_signal_to_noise_ratios_of_the_domain():
    v = velocity("noise", Linear())
    new = reschedule(v, Linear(), Cosine())
    low, high = domain_of(new)
    np.testing.assert_allclose([np.tan(np.pi / 2 * low), high], [1e-3 / 0.999, 1.0], rtol=1e-4)
    np.testing.assert_allclose(draw(RungeKutta("heun"), new).x, MEAN + SCALE * X0, atol=0.01)
    clipped = reschedule(v, Linear(), Cosine(), clip=True)
    assert domain_of(clipped) is None
    assert np.isfinite(draw(RungeKutta("heun"), clipped).x).all()
    of_data = reschedule(velocity("data", Linear()), Linear(), Cosine())
    assert domain_of(of_data)[1] < 1
    assert reach_of(of_data) == (0.0, 1.0)
    np.testing.assert_allclose(draw(RungeKutta("euler"), of_data).x, MEAN + SCALE * X0, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_keeps_to_it(kind):
    """Against the density of the data; the ends that are left out are worth less than 0.02."""
    v, x1 = velocity(kind, Linear()), MEAN + SCALE * X0
    expected = -0.5 * X0[:, 0] ** 2 - 0.5 * np.log(2 * np.pi) - np.log(SCALE)
    for sampler in (Adaptive("bosh3", 1e-3, 1e-3), RungeKutta("midpoint")):
        np.testing.assert_allclose(log_prob(v, x1, sampler=sampler), expected, atol=0.02)
    solution, log_p = sample_and_log_prob(v, X0, sampler=RungeKutta("heun"))
    np.testing.assert_allclose(solution.x, x1, atol=0.01)
    np.testing.assert_allclose(log_p, expected, atol=0.02)
    np.testing.assert_allclose(encode_and_log_prob(v, x1, sampler=RungeKutta("heun"))[0].x, X0, atol=0.01)
    if kind == "data":
        with pytest.raises(ValueError, match="velocity_domain"):  # the solve begins there
            log_prob(v, x1, sampler=RungeKutta("euler"), times=EVEN)
    assert np.isfinite(straightness(v, X0, sampler=RungeKutta("midpoint")))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused_where_it_is_known(value):
    x0 = X0.copy()
    x0[2] = value
    for given in (x0, jnp.asarray(x0), x0.tolist(), jnp.asarray(x0, jnp.bfloat16)):
        with pytest.raises(ValueError, match=r"^x0 must be finite"):
            draw(RungeKutta("euler"), lambda t, x: -x, given)
    known = jnp.asarray(x0)
    with pytest.raises(ValueError, match=r"^x0 must be finite, got NaN or infinity in 1 of 9 examples"):
        jax.jit(lambda: draw(RungeKutta("euler"), lambda t, x: -x, known))()
    assert not np.isfinite(jax.jit(lambda x0: draw(RungeKutta("euler"), lambda t, x: -x, x0).x)(x0)).all()


def test_where_the_signal_is_faint_its_prediction_says_nothing():
    """alpha = t^2 is 1e-6 at 0.001; the other schedules begin where they did."""
    for kind in ("noise", "score"):
        np.testing.assert_allclose(velocity_domain(kind, Polynomial(2.0)), (1e-3**0.5, 1.0), rtol=1e-3)
        for schedule in (Linear(), Cosine(), LinearVP()):
            assert velocity_domain(kind, schedule)[0] == 1e-3
