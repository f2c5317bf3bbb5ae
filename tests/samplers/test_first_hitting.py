"""First hitting draws from the law of the data, without an error of steps; parallel draws do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import schedules, sources
from fm_jax.oracles import tokens
from fm_jax.paths.mixture import MixturePath
from fm_jax.samplers import FirstHitting, MixtureSteps, sample
from fm_jax.samplers.first_hitting import POSITIONS

GRID = tokens.with_mask(tokens.sudoku4())
SUDOKU = MixturePath(schedules.Linear(), sources.Masked(5, 4))
SOLVER = tokens.exact_denoiser(GRID, SUDOKU)
LOOKUP = {tuple(row): i for i, row in enumerate(GRID.states.tolist())}
PAIRS = np.array([[0.30, 0.05, 0.0], [0.02, 0.20, 0.13], [0.10, 0.05, 0.15]])
MASK = 3
PATH = MixturePath(schedules.Linear(), sources.Masked(4, MASK))
SQUARE = MixturePath(schedules.Polynomial(2.0), sources.Masked(4, MASK))
DENOISER = tokens.exact_denoiser(tokens.with_mask(tokens.token_table(PAIRS)), PATH)


def solved(sampler, times=None, num=4000):
    """The grids that were drawn from nothing, and which of them are solutions."""
    x0 = jnp.full((num, 16), 4)
    solution = jax.jit(lambda key: sample(SOLVER, x0, sampler, times=times, key=key))(jax.random.key(0))
    assert not (solution.x == 4).any()
    found = [LOOKUP.get(tuple(row), -1) for row in np.asarray(solution.x).tolist()]
    return np.array(found), int(solution.calls)


@pytest.mark.slow
@pytest.mark.parametrize("position", POSITIONS)
def test_every_sudoku_is_a_solution_and_each_as_often(position):
    """With 16 evaluations; chi2 of 287 degrees of freedom is above 384 by chance once in 1e4."""
    found, calls = solved(FirstHitting(SUDOKU, position))
    assert calls == 16
    assert (found >= 0).all()
    counts, wanted = np.bincount(found, minlength=288), len(found) / 288
    assert ((counts - wanted) ** 2 / wanted).sum() < 384


@pytest.mark.slow_but_one
@pytest.mark.parametrize(("num", "share", "within"), [(16, 0.61, 0.03), (64, 0.88, 0.02)])
def test_steps_have_an_error(num, share, within):
    found, calls = solved(MixtureSteps(SUDOKU), num)
    assert calls == num
    assert abs((found >= 0).mean() - share) < within


@pytest.mark.slow_but_one
@pytest.mark.parametrize(("num", "share"), [(2, 0.439), (4, 0.139), (8, 0.003)])
def test_several_at_once_by_confidence_have_a_larger_one(num, share):
    """As measured once for the same tokens by another program; 16 / num evaluations."""
    found, calls = solved(FirstHitting(SUDOKU, "confidence", num))
    assert calls == 16 // num
    assert abs((found >= 0).mean() - share) < 5 * np.sqrt(share * (1 - share) / len(found)) + 0.002


def run(sampler, x0, times=None, f=DENOISER, **options):
    return jax.jit(lambda key: sample(f, x0, sampler, times=times, key=key, **options))(jax.random.key(0))


def near(x, wanted):
    """Whether the frequencies of what is drawn are right, to 4 standard errors each."""
    found = np.bincount(np.asarray(x).ravel(), minlength=len(wanted)) / np.size(x)
    return (np.abs(found - wanted) <= 4 * np.sqrt(np.clip(wanted * (1 - wanted), 0, 1) / np.size(x)) + 1e-12).all()


@pytest.mark.parametrize("path", [PATH, SQUARE], ids=["Linear", "Polynomial"])
def test_stopping_at_any_time_is_the_path_at_that_time(path):
    """Of both tokens together, in the trajectory and at its end, whatever the grid."""
    times = np.array([0.0, 0.1, 0.5, 0.6, 0.9])
    f = tokens.exact_denoiser(tokens.with_mask(tokens.token_table(PAIRS)), path)
    solution = run(FirstHitting(path), jnp.full((20_000, 2), MASK), times, f, trajectory=True)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.x)
    for t, x in zip(times, solution.trajectory, strict=True):
        law = tokens.path_law(tokens.with_mask(tokens.token_table(PAIRS)), path, float(t))
        assert near(x[:, 0] * 4 + x[:, 1], law)
    assert ((solution.trajectory[1:] == solution.trajectory[:-1]) | (solution.trajectory[:-1] == MASK)).all()


def test_starting_later_goes_on_from_there():
    """From the path at 0.5, the path at 0.8."""
    table = tokens.with_mask(tokens.token_table(PAIRS))
    states = jnp.asarray(tokens.all_states(table))
    start = jax.random.choice(jax.random.key(1), 16, (20_000,), p=jnp.asarray(tokens.path_law(table, PATH, 0.5)))
    x = run(FirstHitting(PATH), states[start], np.array([0.5, 0.8])).x
    assert near(x[:, 0] * 4 + x[:, 1], tokens.path_law(table, PATH, 0.8))


def watched(seen):
    def network(t, x):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return DENOISER(t, x)

    return network


def test_the_network_is_asked_when_masks_fall():
    """The times are those of the next fall, from the first to the last; an example that is done is asked at that."""
    seen, x0 = [], jnp.full((1000, 2), MASK).at[0, 0].set(1)
    run(FirstHitting(PATH), x0, np.array([0.25, 0.75]), watched(seen))
    jax.effects_barrier()
    first, second = seen
    assert first.shape == (1000,)
    assert (first >= 0.25).all()
    assert (second >= first).all()
    assert second.max() == 0.75
    assert second[0] == 0.75
    wanted = 1 - (0.25 / 0.75) ** 2  # that one of two falls before 0.75
    assert abs((first[1:] < 0.75).mean() - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 999)


@pytest.mark.parametrize("x0", [[[0, 1], [1, 2]], [[0, 1], [MASK, 2]], [[MASK, MASK], [MASK, 2]]])
def test_as_many_evaluations_as_the_example_with_the_most_masks_has(x0):
    x0 = jnp.array(x0)
    most = int((x0 == MASK).sum(axis=1).max())
    solution = run(FirstHitting(PATH), x0, trajectory=True)
    assert int(solution.calls) == most
    assert solution.trajectory.shape == (21, 2, 2)
    assert (solution.x != MASK).all()
    assert ((solution.x == x0) | (x0 == MASK)).all()
    assert int(run(FirstHitting(PATH, per_step=2), x0).calls) == -(-most // 2)
    traced = jax.jit(lambda x0, key: sample(DENOISER, x0, FirstHitting(PATH), key=key))(x0, jax.random.key(0))
    assert int(traced.calls) == 2
    np.testing.assert_array_equal(traced.x, solution.x)


def test_a_prompt_is_kept_and_the_rest_fits_it():
    """The first row and the first column of a sudoku are given: every grid drawn is a solution with these."""
    wanted = jnp.asarray(GRID.states[100])
    given = (jnp.arange(16) < 4) | (jnp.arange(16) % 4 == 0)
    x0 = jnp.broadcast_to(jnp.where(given, wanted, 4), (500, 16))
    x = np.asarray(run(FirstHitting(SUDOKU), x0, f=SOLVER).x)
    assert (x[:, given] == np.asarray(wanted[given])).all()
    assert all(tuple(row) in LOOKUP for row in x.tolist())


def test_the_first_is_the_leftmost_mask():
    """One after the other from left to right, also of an event of several axes; what is given is passed over."""
    x0 = jnp.full((2, 2, 3), MASK).at[0, 0, 1].set(0)
    even = lambda t, x: jnp.zeros((*x.shape, 4))  # noqa: E731
    for stop in range(1, 6):
        x = np.asarray(run(FirstHitting(PATH, "first"), x0, [0.0, stop / 6], even).x).reshape(2, 6)
        left = x == MASK
        assert (np.diff(left.astype(int)[1]) >= 0).all()
        assert (np.diff(np.delete(left[0], 1).astype(int)) >= 0).all()


@pytest.mark.parametrize("position", POSITIONS)
def test_no_examples_are_none(position):
    assert run(FirstHitting(PATH, position), jnp.zeros((0, 2), int)).x.shape == (0, 2)


def test_tokens_that_are_kept_cost_no_evaluation():
    """Also where the state is traced, and which of them are masks is not known."""
    keep = np.array([True, False, True])
    even = lambda t, x: jnp.zeros((*x.shape, 4))  # noqa: E731
    of = lambda x0: sample(even, x0, FirstHitting(PATH), key=jax.random.key(0), keep=keep)  # noqa: E731
    solution = jax.jit(of)(jnp.array([[1, MASK, MASK]]))
    assert int(solution.calls) == 1
    assert (solution.x == jnp.array([[1, solution.x[0, 1], MASK]])).all()


@pytest.mark.parametrize("u", [2.0**-33, 1.0])
def test_the_ends_of_the_random_numbers_do_no_harm(u, monkeypatch):
    """No NaN, and no mask that stays, where all numbers are the smallest or the largest."""
    monkeypatch.setattr("fm_jax.samplers.first_hitting.uniform", lambda key, shape, dtype: jnp.full(shape, u, dtype))
    seen = []
    x = run(FirstHitting(PATH), jnp.full((3, 2), MASK), [0.0, 1.0], watched(seen)).x
    jax.effects_barrier()
    assert np.isfinite(seen).all()
    assert (x != MASK).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FirstHitting(MixturePath(schedules.Linear(), sources.UniformTokens(4))),
            "path must have a",
        ),
        (
            lambda: FirstHitting(PATH, "left"),
            "position must be one of 'random', 'confidence', 'margin', 'first', got 'left'",
        ),
        (lambda: FirstHitting(PATH, per_step=0), "per_step must be at least 1"),
        (lambda: FirstHitting(schedules.Linear()), "path must be a MixturePath"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
