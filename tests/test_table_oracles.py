"""Tables of a few tokens: what the oracles say agrees with sums by hand, with each other, and with draws."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from fm_jax import oracles, rates, schedules, sources
from fm_jax.paths import MetricPath, MixturePath

Q = np.array([[0.30, 0.05, 0.0], [0.02, 0.20, 0.13], [0.10, 0.05, 0.15]])
TABLE = oracles.token_table(Q)
PATHS = {
    "mask": MixturePath(schedules.Polynomial(2.0), sources.Masked(4, 3)),
    "mask in front": MixturePath(schedules.Linear(), sources.Masked(4, 0)),
    "uniform": MixturePath(schedules.Linear(), sources.UniformTokens(3)),
    "any": MixturePath(schedules.MaskCosine(), sources.Categorical((0.6, 0.4, 0.0))),
    "metric": MetricPath([[0.0, 1.0, 2.5], [1.0, 0.0, 1.0], [2.5, 1.0, 0.0]]),
}


def table_of(path):
    if path.source.mask == 0:
        padded = np.zeros((4, 4))
        padded[1:, 1:] = Q
        return oracles.token_table(padded)
    return TABLE if path.source.mask is None else oracles.with_mask(TABLE)


def by_hand(table, path, t, x):
    """p_t(x) and p(x1_i = a | x) of one state, by loops."""
    each = np.asarray(path.probs(t, jnp.asarray(np.unique(table.states))))
    row = {a: each[i] for i, a in enumerate(np.unique(table.states))}
    law, posterior = 0.0, np.zeros((len(x), table.num_tokens))
    for x1, q in zip(table.states, table.probs, strict=True):
        joint = q * math.prod(row[a][token] for a, token in zip(x1, x, strict=True))
        law += joint
        posterior[np.arange(len(x)), x1] += joint
    return law, posterior


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_laws_and_posteriors_are_the_sums_that_they_are(path, x64):
    table, t = table_of(path), 0.4
    states = oracles.all_states(table)
    law, posterior = oracles.path_law(table, path, t), oracles.token_posterior(table, path, t, states)
    assert law.shape == (table.num_tokens**2,)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-14)
    np.testing.assert_allclose(posterior.sum(axis=-1), 1, rtol=1e-14)
    for i, x in enumerate(states):
        expected, joint = by_hand(table, path, t, x)
        np.testing.assert_allclose(law[i], expected, rtol=1e-12)
        np.testing.assert_allclose(law[i] * posterior[i], joint, atol=1e-15)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_law_goes_from_the_source_to_the_data(path):
    table = table_of(path)
    p0 = np.asarray(path.source.probs)
    np.testing.assert_allclose(oracles.path_law(table, path, 0.0), np.outer(p0, p0).ravel(), atol=1e-15)
    end = oracles.path_law(table, path, 1.0).reshape(table.num_tokens, -1)
    np.testing.assert_allclose(end[tuple(table.states.T)], table.probs, atol=1e-15)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_double_precision_is_there_without_x64(path):
    found = oracles.path_law(table_of(path), path, 0.4)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(found, oracles.path_law(table_of(path), path, 0.4))
    assert abs(found.sum() - 1) < 1e-14


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_perfect_network_knows_the_posterior_of_every_state(path, t):
    """Also of states that do not occur: it is finite, and says the data that explain most tokens."""
    table = table_of(path)
    x = oracles.all_states(table)
    f = oracles.exact_denoiser(table, path)
    found = jnp.exp(jax.jit(f)(t, x))
    np.testing.assert_allclose(found, oracles.token_posterior(table, path, t, x), atol=2e-6)
    np.testing.assert_allclose(jnp.exp(f(jnp.full(len(x), t), x)), found, atol=1e-6)


def test_each_example_has_its_own_time(x64):
    path = PATHS["uniform"]
    x = oracles.all_states(TABLE)[:2]
    found = jnp.exp(oracles.exact_denoiser(TABLE, path)(jnp.array([0.2, 0.8]), x))
    for i, t in enumerate((0.2, 0.8)):
        np.testing.assert_allclose(found[i], oracles.token_posterior(TABLE, path, t, x[i : i + 1])[0], rtol=1e-12)


def test_the_posterior_of_what_does_not_occur():
    """(0, 2) is not among the data: at t = 1 it is explained half by each row and column that it touches."""
    found = oracles.token_posterior(TABLE, PATHS["uniform"], 1.0, np.array([[0, 2]]))[0]
    near = [
        (i, x1, q) for i, (x1, q) in enumerate(zip(TABLE.states, TABLE.probs, strict=True)) if x1[0] == 0 or x1[1] == 2
    ]
    expected = np.zeros((2, 3))
    for _, x1, _ in near:  # beside what is impossible how likely the data are does not count
        expected[[0, 1], x1] += 1 / len(near)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_generators_and_their_chains(path, x64):
    table = table_of(path)
    states = oracles.all_states(table)
    u = rates.kinetic_rates(oracles.exact_denoiser(table, path), path)
    matrix = oracles.rate_matrix(u, 0.4, states, table.num_tokens)
    np.testing.assert_allclose(matrix.sum(axis=1), 0, atol=1e-12)
    changes = (states[:, None] != states).sum(axis=2)
    assert (matrix[changes > 1] == 0).all()  # one token at a time
    found = np.asarray(u(0.4, jnp.asarray(states)))
    i = table.num_tokens + 1
    assert matrix[i, i + 1] == found[i, 1, 2]  # from (1, 1) to (1, 2)
    law = oracles.chain_law(
        u, oracles.path_law(table, path, 0.1), states, table.num_tokens, t0=0.1, t1=0.8, num_steps=60
    )
    np.testing.assert_allclose(law, oracles.path_law(table, path, 0.8), atol=1e-7)


def test_a_chain_of_constant_rates_is_an_exponential(x64):
    states = oracles.all_states(TABLE)
    jumps = np.abs(np.random.default_rng(0).normal(size=(9, 2, 3)))
    u = lambda t, x: jnp.asarray(jumps)  # noqa: E731
    start = np.random.default_rng(1).dirichlet(np.ones(9))
    matrix = oracles.rate_matrix(u, 0.0, states, 3)
    law = oracles.chain_law(u, start, states, 3, t0=0.25, t1=1.0, num_steps=200)
    np.testing.assert_allclose(law, start @ scipy.linalg.expm(0.75 * matrix), atol=1e-9)


def test_the_kernel_of_a_step_is_that_of_its_tokens():
    states = oracles.all_states(TABLE)
    probs = np.random.default_rng(0).dirichlet(np.ones(3), size=(9, 2))
    kernel = oracles.transition_matrix(probs, states)
    np.testing.assert_allclose(kernel.sum(axis=1), 1, rtol=1e-12)
    assert kernel[3, 7] == probs[3, 0, 2] * probs[3, 1, 1]


def test_sudokus():
    table = oracles.sudoku4()
    assert table.states.shape == (288, 16)
    assert len({*map(tuple, table.states.tolist())}) == 288
    grids = table.states.reshape(-1, 4, 4)
    blocks = grids.reshape(-1, 2, 2, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4, 4)
    for parts in (grids, grids.transpose(0, 2, 1), blocks):
        assert (np.sort(parts, axis=2) == np.arange(4)).all()
    np.testing.assert_allclose(-(table.probs * np.log(table.probs)).sum(), 5.66296, atol=1e-5)


def test_a_sudoku_with_three_rows_has_one_solution():
    table = oracles.with_mask(oracles.sudoku4())
    path = MixturePath(schedules.Linear(), sources.Masked(5, 4))
    x = table.states[:7].copy()
    x[:, 12:] = 4
    posterior = oracles.token_posterior(table, path, 0.5, x)
    np.testing.assert_array_equal(posterior.argmax(axis=-1), table.states[:7])
    np.testing.assert_allclose(posterior.max(axis=-1), 1, rtol=1e-12)


def test_tables_leave_out_what_does_not_occur():
    assert TABLE.states.shape == (8, 2)
    assert (0, 2) not in map(tuple, TABLE.states.tolist())
    assert [*map(tuple, oracles.all_states(TABLE).tolist())] == [*itertools.product(range(3), repeat=2)]
    np.testing.assert_allclose(oracles.token_table(7 * Q).probs, TABLE.probs)


STATES = oracles.all_states(TABLE)
REFUSED = {
    "q must be \\[K, ..., K\\]": lambda: oracles.token_table(np.ones((2, 3))),
    "q must be \\[K, ..., K\\], not negative": lambda: oracles.token_table([0.5, -0.5]),
    "q must be finite": lambda: oracles.token_table([0.5, np.nan]),
    "path must be of 3 tokens, those of the table, got 4": lambda: oracles.path_law(TABLE, PATHS["mask"], 0.5),
    "x must be tokens from 0 to 2, got some from 3 to 3": lambda: oracles.token_posterior(
        TABLE, PATHS["uniform"], 0.5, np.full((1, 2), 3)
    ),
    "x must be \\[n, 2\\], as the table has it": lambda: oracles.token_posterior(
        TABLE, PATHS["uniform"], 0.5, np.zeros((1, 3), int)
    ),
    "states must be all 3\\^D": lambda: oracles.rate_matrix(lambda t, x: x, 0.5, STATES[:-1], 3),
    "law must be one number for each state": lambda: oracles.chain_law(
        lambda t, x: x, np.ones(4), STATES, 3, t0=0.0, t1=0.5
    ),
    "0 <= t0 < t1 <= 1 must hold": lambda: oracles.chain_law(lambda t, x: x, np.ones(9), STATES, 3, t0=0.6, t1=0.5),
    "probs must be \\[9, 2, 3\\], got shape \\(8, 2, 3\\)": lambda: oracles.transition_matrix(
        np.ones((8, 2, 3)), STATES
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        REFUSED[message]()
