"""Rates of every kind carry the law of the path: the Kolmogorov equation, on all states of two dependent tokens."""

import numpy as np
import pytest

from fm_jax import rates, schedules, sources
from fm_jax.oracles import tokens
from fm_jax.paths.mixture import MixturePath

Q = np.array([[0.30, 0.05, 0.0], [0.02, 0.20, 0.13], [0.10, 0.05, 0.15]])
PATHS = {
    "mask": MixturePath(schedules.Linear(), sources.Masked(4, 3)),
    "uniform": MixturePath(schedules.Linear(), sources.UniformTokens(3)),
    "any": MixturePath(schedules.Polynomial(2.0), sources.Categorical((0.6, 0.3, 0.1))),
    "with one that is never drawn": MixturePath(schedules.Linear(), sources.Categorical((0.6, 0.4, 0.0))),
}
KINDS = {
    "forward": rates.forward_rates,
    "reversal": rates.reversal_rates,
    "corrector": lambda f, path: rates.with_corrector(rates.forward_rates(f, path), path, 3.0),
    "corrector of time": lambda f, path: rates.with_corrector(rates.reversal_rates(f, path), path, lambda t: 2 * t),
}


def table_of(path):
    table = tokens.token_table(Q)
    return tokens.with_mask(table) if path.source.mask is not None else table


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_carry_the_law_of_the_path(path, kind, t, x64):
    table = table_of(path)
    states = tokens.all_states(table)
    u = kind(tokens.exact_denoiser(table, path), path)
    law, h = tokens.path_law(table, path, t), 1e-4
    f = lambda s: tokens.path_law(table, path, s)  # noqa: E731
    slope = (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)
    matrix = tokens.rate_matrix(u, t, states, table.num_tokens)
    # States that never occur have a posterior that means nothing.
    assert np.abs((law @ matrix) - slope).max() < 1e-9
    assert (matrix[~np.eye(len(states), dtype=bool)] >= 0).all()
