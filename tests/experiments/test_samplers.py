"""Samplers by name: which there are, what they say of themselves, and which options reach them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments.lab.method import Method
from experiments.lab.samplers import SAMPLERS, load_solver, make_sampler, needs_schedule, save_solver, table
from experiments.lab.sampling import Given, Sampling, check_interval, make_generate, make_grid, sampler_and_times
from fm_jax.samplers import DDIM, Adaptive, DiffraxSDE, RungeKutta, sample
from fm_jax.samplers.learned import from_method
from fm_jax.schedules import VP, Linear

OPTIONS = {"tolerance": 1e-2, "diffusion": 0.5, "eta": 0.25, "churn": 7.0}


def test_table_has_a_line_for_each():
    lines = table().splitlines()
    assert len(lines) == len(SAMPLERS)
    for line in (
        "heun: order 2, 2 NFE a step",
        "ddpm: weak order 1, 1 NFE a step, random",
        "unipc_3: order 4, 1 NFE a step",
        "tsit5: order 5, adaptive steps",
        "adaptive_shark: weak order 2, adaptive steps, random",
    ):
        assert line in lines


def test_a_schedule_goes_to_whoever_has_one():
    for name in SAMPLERS:
        sampler = make_sampler(name, VP())
        assert needs_schedule(name) == hasattr(sampler, "schedule"), name
        assert getattr(sampler, "schedule", VP()) == VP()


def test_options_reach_the_samplers_that_have_them():
    """And no other: a name that says the value, such as ddpm, keeps it, and None is the sampler's own default."""
    made = {name: make_sampler(name, Linear(), **OPTIONS) for name in SAMPLERS}
    assert (made["ddim"].eta, made["ddpm"].eta) == (0.25, 1.0)
    assert made["churn"].churn == 7.0
    assert {name for name, each in made.items() if getattr(each, "diffusion", None) == 0.5} == {
        *("euler_maruyama", "stochastic_heun", "predictor_corrector"),
        *("sea", "shark", "sra1", "adaptive_shark", "adaptive_sra1"),
    }
    adaptive = {name for name, each in made.items() if each.nfe_per_step is None}
    assert {name for name, each in made.items() if getattr(each, "rtol", None) == 1e-2} == adaptive
    assert {name for name, each in made.items() if getattr(each, "atol", None) == 1e-2} == adaptive
    for name in SAMPLERS:
        assert make_sampler(name, Linear(), diffusion=None) == make_sampler(name, Linear())


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("heun", RungeKutta("heun")),
        ("ddim", DDIM(Linear(), 0.25)),
        ("dopri5", Adaptive("dopri5", 1e-2, 1e-2)),
        ("adaptive_shark", DiffraxSDE(Linear(), 0.5, solver="shark", rtol=1e-2, atol=1e-2)),
    ],
)
def test_the_options_of_sampling(name, sampler):
    made, times = sampler_and_times(Sampling(solver=name, steps=2, **OPTIONS), Method())
    assert made == sampler
    np.testing.assert_allclose(times, [0.0, 0.5, 1.0])


def test_times_of_frames():
    """They are the steps of a sampler; random steps that adapt have none, and give way to an ODE's."""
    frames = np.linspace(0, 1, 4)
    for name, by in (("heun", "heun"), ("dopri5", "dopri5"), ("shark", "shark"), ("adaptive_shark", "tsit5")):
        made, times = sampler_and_times(Sampling(solver=name, **OPTIONS), Method(), frames)
        assert made == make_sampler(by, Linear(), **OPTIONS)
        assert times is frames


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"solver must be one of 'euler', .*, got 'eular'\."):
        make_sampler("eular", Linear())
    with pytest.raises(ValueError, match=r"solver must be one of 'euler', .*, got 'eular'\."):
        Sampling(solver="eular")


def test_a_learned_solver_survives_its_file(tmp_path):
    solver = from_method("midpoint", 2, 0.1, 0.9)
    solver = dataclasses.replace(solver, log_steps=jnp.array([0.3, -0.2, 0.0, 0.1]))
    params = {"w": jnp.arange(3.0)}
    save_solver(tmp_path / "a.npz", solver, params)
    x0 = jax.random.normal(jax.random.key(0), (3, 2))
    ends = [sample(lambda t, x: t * x, x0, each).x for each in (solver, load_solver(tmp_path / "a.npz", params))]
    np.testing.assert_array_equal(*ends)
    with pytest.raises(SystemExit, match=r"no.npz does not exist: python -m experiments.learned_solver writes"):
        load_solver(tmp_path / "no.npz", params)
    with pytest.raises(SystemExit, match="was learned for another network"):
        load_solver(tmp_path / "a.npz", {"w": jnp.arange(3.0) + 1})


NETWORK = {"apply_fn": lambda params, t, x, cond, **_: params * x, "null_label": None}


@pytest.mark.parametrize("mask", [np.arange(6).reshape(3, 2) < 3, np.array([[True], [False], [False]])])
def test_a_learned_solver_keeps_what_is_known(mask):
    """As the solver does that it began from: a part of a picture, the first frame of a video."""
    given = Given(np.full((3, 2), 0.5, np.float32), mask)
    x0 = jax.random.normal(jax.random.key(0), (4, 3, 2))
    found = [
        make_generate(Sampling(solver="euler", steps=3), Method(), given=given, learned_solver=solver, **NETWORK)(
            jnp.float32(0.3), jax.random.key(1), x0, jnp.zeros(4, int)
        ).x
        for solver in (None, from_method("euler", 3))
    ]
    np.testing.assert_allclose(*found, rtol=1e-5)
    np.testing.assert_array_equal(found[1][:, np.broadcast_to(mask, (3, 2))], 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strength": 0.6, "learned_solver": from_method("euler", 3)},
            "--learned-solver goes the whole way from noise",
        ),
        ({"strength": 0.6, "frames": np.linspace(0, 1, 3)}, "frames are times of the whole way"),
        ({"frames": np.linspace(0, 1, 3), "learned_solver": from_method("euler", 3)}, "frames are times of the whole"),
        ({"strength": 0.6, "mask": np.array([True, False])}, "strength must be 1 where a part is known"),
    ],
)
def test_a_part_of_the_way_is_for_samplers_that_begin_on_it(options, message):
    given = Given(np.zeros((3, 2)), options.pop("mask", None), options.pop("strength", 1.0))
    with pytest.raises(ValueError, match=message):
        make_generate(Sampling(solver="euler"), Method(), given=given, **options, **NETWORK)


@pytest.mark.parametrize("grid", ["edm", "training_times", "uniform"])
def test_the_least_strength_has_times_and_too_many_steps_are_refused_in_words_of_options(grid):
    times = np.asarray(make_grid(Sampling(grid=grid), Method(), 0.01))
    assert (np.diff(times) > 0).all()
    assert times[0] == pytest.approx(0.99)
    with pytest.raises(ValueError, match=f"--strength 0.01 leaves no room for --steps 500000 of --grid {grid}: take"):
        make_grid(Sampling(grid=grid, steps=500_000), Method(), 0.01)


def test_an_interval_of_guidance_has_to_be_on_the_way():
    within = Sampling(solver="heun", guidance_interval=(0.3, 0.4))
    check_interval(within, Method(), 0.7)
    check_interval(dataclasses.replace(within, guidance_interval=(0.0, 0.3)), Method(), 0.7)  # the first of its times
    with pytest.raises(ValueError, match=r"would have no effect: with --strength 0\.5 sampling goes from 0.5 to 1"):
        check_interval(within, Method(), 0.5)
    check_interval(within, Method(), learned_solver=from_method("euler", 3))
    with pytest.raises(ValueError, match="--learned-solver never asks for the velocity within it"):
        check_interval(within, Method(), learned_solver=from_method("euler", 2))


@pytest.mark.parametrize("path", ["linear", "vp"])
def test_training_times_are_shifted_towards_noise(path):
    methods = [Method(path, times="stratified", time_shift=shift) for shift in (1.0, 3.0)]
    (low, high), domain = (method.time_sampler.domain for method in methods)
    assert domain == (low, high)
    plain, shifted = (np.asarray(m.time_sampler(jax.random.key(0), 4000), float) for m in methods)
    u = (plain - low) / (high - low)
    # Esser et al. 2024, eq. 23, of sigma = 1 - u.
    np.testing.assert_allclose(shifted, low + (high - low) * (1 - 3 * (1 - u) / (1 + 2 * (1 - u))), atol=2e-6)
    assert np.median(shifted) == pytest.approx(low + (high - low) / 4, abs=1e-3)
