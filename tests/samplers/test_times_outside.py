"""Times that lead out of where the velocity is: refused before anything is computed, by whatever takes times."""

import functools

import contracts
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.fewstep import make_pairs
from fm_jax.guidance import classifier, classifier_free
from fm_jax.likelihood import Exact, bits_per_dim, log_prob, sample_and_log_prob
from fm_jax.metrics import path_energy, straightness
from fm_jax.models import MLP
from fm_jax.nfe import Counted, domain_of
from fm_jax.parameterization import convert, reschedule, score_fn, velocity_fn
from fm_jax.paths import AffinePath, BrownianBridge
from fm_jax.samplers import (
    Adaptive,
    Churn,
    DiffraxSDE,
    RungeKutta,
    ddim_step,
    langevin_step,
    renoise,
    sample,
    sde_step,
)
from fm_jax.schedules import VP, Cosine, Linear

KEY, X = jax.random.key(0), jnp.ones((2, 2))
HALF = (0.25, 0.75)
OUTSIDE = [[0.0, 0.5, 1.5], [-0.5, 0.5, 1.0], [80.0, 40.0, 0.0], [0.0, 1.0, np.nan], [0.2, 0.4, np.inf]]


def v(t, x):
    return -x


def solved(sampler, times, function=v):
    return sample(function, X, sampler, times=times, key=KEY if sampler.stochastic else None)


@pytest.mark.parametrize("times", OUTSIDE, ids=str)
@pytest.mark.parametrize("name", contracts.SAMPLERS)
def test_every_sampler_stays_between_source_and_data(name, times):
    with pytest.raises(ValueError, match=r"^times must be (within \[0.0, 1.0\], from source to data .*, got|finite)"):
        solved(contracts.SAMPLERS[name](Linear()), times)


WITH_SCHEDULE = [name for name, make in contracts.FIXED_STEPS.items() if "schedule" in vars(make(VP()))]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", WITH_SCHEDULE)
def test_no_sampler_starts_where_the_schedule_has_an_infinite_slope(name):
    """On VP at t = 1, from where it goes back to noise."""
    sampler = contracts.FIXED_STEPS[name](VP())
    if sampler.stochastic and name not in ("euler_maruyama", "stochastic_heun", "predictor_corrector"):
        pytest.skip("runs forward alone")
    with pytest.raises(ValueError, match=r"^the first of times must be within \[0.0, 0.99999\], the domain of VP"):
        solved(sampler, [1.0, 0.5, 0.1])
    assert np.isfinite(solved(sampler, [0.999, 0.5, 0.1]).x).all()


def test_churn_does_not_end_there_where_heun_looks_at_the_end():
    with pytest.raises(ValueError, match=r"^times must be within \[0.0, 0.99999\], the domain of VP"):
        solved(Churn(VP()), [0.0, 0.5, 1.0])


def test_a_rounding_error_is_none():
    times = np.linspace(0, 1, 8, dtype=np.float32)
    times[-1] = np.nextafter(np.float32(1), np.float32(2))
    assert np.isfinite(solved(RungeKutta("euler"), times).x).all()


MEASURES = {
    "log_prob": lambda v, **options: log_prob(v, X, **options),
    "sample_and_log_prob": lambda v, **options: sample_and_log_prob(v, X, **options)[1],
    "bits_per_dim": lambda v, **options: bits_per_dim(v, KEY, np.ones((2, 2), int), levels=4, tolerance=1.0, **options),
    "path_energy": lambda v, **options: path_energy(v, X, **options),
    "straightness": lambda v, **options: straightness(v, X, **options),
    "make_pairs": lambda v, **options: make_pairs(v, KEY, (2, 2), **options)[0]["x1"],
}


@pytest.mark.parametrize("name", MEASURES)
def test_everything_that_solves_refuses_them_too(name):
    euler = RungeKutta("euler")
    assert np.isfinite(MEASURES[name](v, sampler=euler, times=[0.0, 0.5, 1.0])).all()
    with pytest.raises(
        ValueError, match=r"^times must be within \[0.0, 1.0\], from source to data .*, got times from 0 to 2"
    ):
        MEASURES[name](v, sampler=euler, times=[0.0, 1.0, 2.0])
    known = Counted(v, 1, HALF)
    with pytest.raises(
        ValueError, match=r"^times must be within \[0.25, 0.75\], the domain of v, got times from 0 to 1"
    ):
        MEASURES[name](known, sampler=euler, times=[0.0, 0.5, 1.0])


def test_a_velocity_may_carry_a_longer_time():
    """Of an equation that is no path from source to data."""
    long = Counted(lambda t, x: -x, None, (0.0, 16.0))
    np.testing.assert_allclose(solved(RungeKutta("rk4"), np.linspace(0, 16, 161), long).x, np.exp(-16), rtol=1e-3)
    with pytest.raises(
        ValueError, match=r"^times must be within \[0.0, 16.0\], the domain of v, got times from 0 to 17"
    ):
        solved(RungeKutta("rk4"), [0.0, 17.0], long)


def test_a_number_of_steps_goes_over_the_domain_that_v_carries():
    times = []

    def seen(t, x):
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return -x

    x = solved(RungeKutta("euler"), 4, Counted(seen, 1, HALF)).x
    jax.block_until_ready(x)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted(times), [0.25, 0.375, 0.5, 0.625])


def test_what_is_made_of_a_velocity_has_its_domain():
    known, narrow = Counted(v, 1, HALF), Counted(v, 1, (0.5, 1.0))
    assert domain_of(v) is None
    assert domain_of(known, v, narrow) == (0.5, 0.75)
    assert domain_of(score_fn(known, Linear())) == HALF
    assert domain_of(classifier_free(known, narrow, 2.0)) == (0.5, 0.75)
    assert domain_of(classifier(known, lambda t, x: x.sum(axis=1), 2.0, Linear())) == HALF


OF_TIMES = {
    "velocity_fn": lambda t: velocity_fn(lambda t, x, cond: x, "velocity", Linear())(t, X),
    "score_fn": lambda t: score_fn(velocity_fn(lambda t, x, cond: x, "velocity", Linear()), Linear())(t, X),
    "convert": lambda t: convert("data", X, t, X, Linear()),
    "reschedule": lambda t: reschedule(v, Linear(), Cosine(), clip=True)(t, X),
    "classifier": lambda t: classifier(v, lambda t, x: x.sum(axis=1), 2.0, Linear())(t, X),
    "path": lambda t: AffinePath().sample(None, t, X, X),
    "bridge": lambda t: BrownianBridge(1.0).sample(KEY, t, X, X),
    "model": lambda t: MLP((8,)).init(KEY, t, X),
    "ddim_step": lambda t: ddim_step(v, t[0], 1.0, X, schedule=Linear()),
    "renoise": lambda t: renoise(t[0], 0.1, X, X, schedule=Linear()),
    "sde_step": lambda t: sde_step(v, None, 1.0, t[0], 0.5, X, X, schedule=Linear()),
    "langevin_step": lambda t: langevin_step(v, t, X, X, 0.1),
    "divergence": lambda t: Exact()(v, None, t, X),
}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", OF_TIMES)
def test_numbers_of_steps_are_no_times(name):
    """As DDPM's code has them, 0 to 999; traced ones too, of which nobody can say that they are 0 and 1."""
    said = r"^[tr] must be real numbers from 0, the source, to 1, the data, got .* t = 1 - n / 1000"
    for t in (jnp.array([999, 0]), np.array([7, 500])):
        with pytest.raises(ValueError, match=said):
            OF_TIMES[name](t)
    with pytest.raises(ValueError, match=said):
        jax.jit(OF_TIMES[name])(jnp.zeros(2, int))
    OF_TIMES[name](jnp.array([0.25, 0.75]))


@pytest.mark.parametrize(
    "times", [np.arange(1000), list(range(10)), np.arange(3, dtype=np.uint8), jnp.arange(5)], ids=len
)
def test_numbers_of_steps_are_no_times_of_a_sampler(times):
    with pytest.raises(ValueError, match=r"^times must be real numbers from 0, the source, .* t = 1 - n / 1000"):
        solved(RungeKutta("euler"), times)
    with pytest.raises(ValueError, match=r"^times must be real numbers from 0, the source, "):
        jax.jit(lambda times: solved(RungeKutta("euler"), times).x)(jnp.asarray(times))


def test_zero_and_one_are_times():
    for times in ([0, 1], np.array([0, 1]), jnp.array([1, 0]), (0, 1)):
        assert np.isfinite(solved(RungeKutta("euler"), times).x).all()
    long = Counted(v, 1, (0.0, 16.0))
    assert np.isfinite(solved(RungeKutta("euler"), np.arange(17), long).x).all()
    assert np.isfinite(jax.jit(lambda t: solved(RungeKutta("euler"), [0.0, t, 1.0]).x)(0.5)).all()
    for t in (0, 1, np.array([0, 1]), np.int32(1)):
        convert("velocity", X, t, X, Linear())


@pytest.mark.parametrize("atol", [0, 0.0, -1e-3, np.nan, np.inf, None, "1e-3"])
def test_without_an_absolute_tolerance_steps_would_never_end(atol):
    for make in (lambda: Adaptive(rtol=1e-3, atol=atol), lambda: DiffraxSDE(Linear(), rtol=1e-3, atol=atol)):
        with pytest.raises(ValueError, match=r"^atol must be positive and finite, got "):
            make()


@pytest.mark.parametrize(
    "wrapped", [jax.jit, functools.partial, lambda v: jax.jit(functools.partial(v))], ids=["jit", "partial", "both"]
)
def test_a_domain_is_carried_through_what_changes_nothing(wrapped):
    """Else heun would ask a network of data at t = 1, and give NaN."""
    v = velocity_fn(lambda t, x, cond: 0.5 * x, "data", Linear())
    x0 = jnp.ones((3, 2))
    expected = sample(v, x0, RungeKutta("heun"), times=8).x
    assert jnp.isfinite(expected).all()
    assert jnp.allclose(sample(wrapped(v), x0, RungeKutta("heun"), times=8).x, expected, atol=1e-6)
    assert domain_of(functools.partial(v, 0.5)) is None  # of which the time is given
