"""Samplers of tokens draw from the law that they say, found without drawing: the vector of all states, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import rates, schedules, sources
from fm_jax.oracles import tokens
from fm_jax.paths.mixture import MixturePath
from fm_jax.samplers.chain import mixture_step, tau_leap

Q5 = np.array([0.45, 0.25, 0.15, 0.1, 0.05])


def law_of(step_of, table, path, times):
    states = tokens.all_states(table)
    x = jnp.asarray(states)
    law = tokens.path_law(table, path, float(times[0]))
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        step = step_of(float(t), float(t_next), x)
        law = law @ tokens.transition_matrix(step.probs(x), states)
    return law


def distance(law, other):
    return 0.5 * np.abs(law - other).sum()


def errors(step_of, table, path, nums, t1):
    wanted = tokens.path_law(table, path, t1)
    return [distance(law_of(step_of, table, path, np.linspace(0, t1, num + 1)), wanted) for num in nums]


def test_steps_that_are_exact_in_the_schedule(x64):
    table, path = tokens.token_table(Q5), MixturePath(schedules.Linear(), sources.UniformTokens(5))
    f = tokens.exact_denoiser(table, path)
    found = errors(lambda t, s, x: mixture_step(f, path, t, s, x), table, path, [1, 2, 7, 64], 0.9)
    print(found)
    assert max(found) < 1e-12


@pytest.mark.parametrize("kind", [rates.forward_rates, rates.reversal_rates])
def test_tau_leaping_is_of_order_one(kind, x64):
    table, path = tokens.token_table(Q5), MixturePath(schedules.Linear(), sources.UniformTokens(5))
    u = kind(tokens.exact_denoiser(table, path), path)
    found = errors(lambda t, s, x: tau_leap(u, t, s, x), table, path, [8, 16, 32, 64], 0.9)
    print(found, -np.polyfit(np.log([8, 16, 32, 64]), np.log(found), 1)[0])


def test_sudoku_parallel():
    pass


SUDOKU = tokens.with_mask(tokens.sudoku4())
MASKED = MixturePath(schedules.Linear(), sources.Masked(5, 4))


def valid(x):
    known = {tuple(row) for row in SUDOKU.states.tolist()}
    return np.array([tuple(row) in known for row in np.asarray(x).tolist()])


def test_sudoku():
    from fm_jax.samplers import sample
    from fm_jax.samplers.chain import MixtureSteps
    from fm_jax.samplers.first_hitting import FirstHitting

    f = tokens.exact_denoiser(SUDOKU, MASKED)
    x0 = jnp.full((4000, 16), 4)
    import functools

    for s, times in [
        (MixtureSteps(MASKED), 16),
        (MixtureSteps(MASKED), 64),
        (FirstHitting(MASKED), None),
        (FirstHitting(MASKED, "confidence"), None),
        (FirstHitting(MASKED, "confidence", 2), None),
        (FirstHitting(MASKED, "confidence", 4), None),
        (FirstHitting(MASKED, per_step=4), None),
    ]:
        out = jax.jit(lambda key: sample(f, x0, s, times=times, key=key))(jax.random.key(0))
        ok = valid(out.x)
        line = [s.__class__.__name__, times, ok.mean(), int(out.calls), int((out.x == 4).sum())]
        if ok.all():
            lookup = {tuple(r): i for i, r in enumerate(SUDOKU.states.tolist())}
            counts = np.bincount([lookup[tuple(r)] for r in np.asarray(out.x).tolist()], minlength=288)
            line.append(((counts - 4000 / 288) ** 2 / (4000 / 288)).sum())
        print(line)
