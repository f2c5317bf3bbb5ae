"""Bounds on the likelihood of tokens: against sums over all states, and the law that a chain of the denoiser has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from enumerated import each_at, each_bound

from fm_jax import rates, sources
from fm_jax.likelihood import any_order_log_prob, bits_per_token, perplexity, token_bound
from fm_jax.losses.tokens import cross_entropy_of, generalized_kl_of, masked_elbo_of, reversal_elbo_of
from fm_jax.oracles import tokens
from fm_jax.paths import MixturePath
from fm_jax.schedules import Linear, Polynomial
from fm_jax.shapes import batch_time, expand_time

Q = np.array([[0.30, 0.05, 0.02], [0.02, 0.20, 0.13], [0.10, 0.05, 0.13]])
MASKED = MixturePath(Linear(), sources.Masked(4, 3))
UNIFORM = MixturePath(Linear(), sources.UniformTokens(3))
OF = {"mask": masked_elbo_of, "reversal": reversal_elbo_of, "forward": generalized_kl_of}
RATES = {"mask": rates.forward_rates, "reversal": rates.reversal_rates, "forward": rates.forward_rates}
KEY = jax.random.key(0)
SUDOKU = tokens.with_mask(tokens.sudoku4())
ON_SUDOKU = MixturePath(Linear(), sources.Masked(5, 4))


def table_of(path):
    table = tokens.token_table(Q)
    return tokens.with_mask(table) if path.source.mask is not None else table


def doubting(path):
    """A denoiser that is wrong, by less of the truth and by time, and leaves doubts at t = 1."""
    exact = tokens.exact_denoiser(table_of(path), path)

    def denoiser(t, x):
        guess = jax.nn.softmax(
            jnp.arange(path.num_tokens)[None, None] * (1 - 0.5 * expand_time(batch_time(t, x), x[..., None])), axis=-1
        )
        return jnp.log(0.7 * jax.nn.softmax(exact(t, x), axis=-1) + 0.3 * guess)

    return denoiser


def exact_bound(bound, path, denoiser, end):
    """What `token_bound` estimates, of each x1 of the table."""
    table = table_of(path)
    chain = each_bound(OF[bound], path, table, denoiser, end)
    last = jax.jit(lambda: each_at(cross_entropy_of, path, table, end, lambda x: denoiser(end, x)))
    return chain + np.asarray(last()) * (end < 1)


def law_of_the_chain(bound, path, denoiser, end):
    """Of all states, by the master equation from the source to `end`, and one draw of each token there."""
    table = table_of(path)
    states, k = tokens.all_states(table), table.num_tokens
    u = jax.jit(RATES[bound](denoiser, path))
    start = np.exp(path.source.log_prob(states)).astype(np.float64)
    slope = lambda t, p: p @ tokens.rate_matrix(u, t, states, k)  # noqa: E731
    p = scipy.integrate.solve_ivp(slope, (1e-9, end), start, method="LSODA", rtol=1e-8, atol=1e-11).y[:, -1]
    return p @ tokens.transition_matrix(path.posterior(denoiser(end, jnp.asarray(states)), states), states)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("bound", "path"), [("reversal", UNIFORM), ("mask", MASKED), ("forward", UNIFORM)], ids=lambda p: str(p)[:20]
)
def test_bounds_the_likelihood_of_the_chain_of_any_denoiser(bound, path, x64):
    """Each bound is above what the chain really draws, for every example; the estimate is that of the sum."""
    denoiser, table, end = doubting(path), table_of(path), 0.95
    states = tokens.all_states(table)
    law = law_of_the_chain(bound, path, denoiser, end)
    assert abs(law.sum() - 1) < 1e-6
    drawn = law[[int(np.argwhere((states == each).all(axis=1))[0, 0]) for each in table.states]]
    expected = exact_bound(bound, path, denoiser, end)
    assert (expected > -np.log(drawn) - 1e-6).all()
    x1 = np.repeat(table.states, 200, axis=0)
    estimate = lambda key: token_bound(denoiser, path, key, x1, bound=bound, num_times=16, end=end)  # noqa: E731
    nats, error = (np.asarray(each).reshape(-1, 200) for each in jax.jit(estimate)(KEY))
    z = (nats.mean(axis=1) - expected) / (nats.std(axis=1, ddof=1) / np.sqrt(200))
    assert np.abs(z).max() < 4.5  # of nine: by chance at 6e-5
    # The error is what the estimates differ by: of 1,800 of them, to some percent.
    assert abs(np.sqrt((error**2).mean() / nats.var(axis=1, ddof=1).mean()) - 1) < 0.15


@pytest.mark.parametrize("path", [MASKED, UNIFORM], ids=["mask", "uniform"])
def test_tight_with_the_exact_posterior(path, x64):
    """But for what the tokens of the last step tell of each other: of second order in its length."""
    table = table_of(path)
    denoiser = tokens.exact_denoiser(table, path)
    excess = [table.probs @ (exact_bound("reversal", path, denoiser, end) + np.log(table.probs)) for end in (0.9, 0.95)]
    assert 3 < excess[0] / excess[1] < 5
    assert 0 < excess[1] < 5e-3


@pytest.mark.slow
def test_a_last_step_keeps_the_bound_finite(x64):
    """Of a network that has doubts at t = 1: to 1 the integral has no end, and each digit of the time adds as much."""
    denoiser = doubting(UNIFORM)
    near = [exact_bound("reversal", UNIFORM, denoiser, 1 - 10.0**-n).mean() for n in (1, 2, 3, 4, 5)]
    assert np.diff(near)[-1] > 0.2
    assert min(near) == near[0] or min(near) == near[1]


@pytest.mark.slow_but_one
@pytest.mark.parametrize("source", [sources.UniformTokens(3), sources.Masked(4, 3)], ids=["uniform", "mask"])
def test_schedules_agree(source):
    """With the posterior of each, to 3.3 standard errors: by chance at 1e-3 each."""
    table, found = table_of(MixturePath(Linear(), source)), []
    for schedule in (Linear(), Polynomial(2.0)):
        path = MixturePath(schedule, source)
        denoiser, x1 = tokens.exact_denoiser(table, path), np.repeat(table.states, 50, axis=0)
        found.append(jax.jit(lambda key, f=denoiser, path=path: token_bound(f, path, key, x1))(KEY))  # noqa: B023
    means = [each.nats.mean() for each in found]
    errors = [np.sqrt((each.error**2).sum()) / len(each.error) for each in found]
    assert abs(means[0] - means[1]) < 3.3 * np.hypot(*errors)
    assert abs(means[0] + np.log(Q).mean()) < 3.3 * errors[0]


@pytest.mark.slow
def test_sudoku():
    """log 288 = 5.663 nats for each of the 288 solutions; stratified times have at most half the variance of others."""
    exact, num = np.log(288), 32
    denoiser, x1 = tokens.exact_denoiser(SUDOKU, ON_SUDOKU), jnp.asarray(SUDOKU.states)

    @jax.jit
    def by_strata(key):
        return token_bound(denoiser, ON_SUDOKU, key, x1, bound="mask", num_times=num, end=1.0)

    @jax.jit
    def by_chance(key):
        def one(key):
            key_t, key_path = jax.random.split(key)
            t = jax.random.uniform(key_t, (len(x1),))
            sample = ON_SUDOKU.sample(key_path, t, jnp.full_like(x1, 4), x1)
            log_posterior = ON_SUDOKU.log_posterior(denoiser(t, sample.x_t), sample.x_t)
            return masked_elbo_of(ON_SUDOKU, sample, log_posterior).sum(axis=1)

        return jax.lax.map(one, jax.random.split(key, num)).mean(axis=0)

    keys = jax.random.split(KEY, 4)
    found = [by_strata(key) for key in keys]
    nats, error = (np.concatenate([np.asarray(each) for each in part]) for part in zip(*found, strict=True))
    uniform = np.concatenate([np.asarray(by_chance(key)) for key in keys])
    assert abs(nats.mean() - exact) < 4 * nats.std() / np.sqrt(nats.size)
    variances = np.square(nats - exact).mean(), np.square(uniform - exact).mean()
    print(f"variance by strata {variances[0]:.3f}, by independent times {variances[1]:.3f}")
    assert variances[0] < variances[1] / 2
    assert abs(np.sqrt((error**2).mean() / variances[0]) - 1) < 0.15


def test_any_order_is_the_likelihood_itself():
    """With the exact posterior, of every solution in whatever order."""
    denoiser = tokens.exact_denoiser(SUDOKU, ON_SUDOKU)
    found = jax.jit(lambda key, x1: any_order_log_prob(denoiser, ON_SUDOKU, key, x1))(KEY, SUDOKU.states[:32])
    np.testing.assert_allclose(found, -np.log(288), rtol=1e-5)


@pytest.mark.parametrize("schedule", [Linear(), Polynomial(2.0)], ids=str)
def test_any_order_is_the_masked_bound_of_a_network_that_sees_the_time(schedule):
    path = MixturePath(schedule, sources.Masked(4, 3))
    denoiser, table = doubting(path), table_of(path)
    with jax.enable_x64(True):
        expected = each_bound(masked_elbo_of, path, table, denoiser)
    x1 = np.repeat(table.states, 500, axis=0).reshape(-1, 1, 2)

    def flat(t, x):
        return denoiser(t, x.reshape(-1, 2)).reshape(*x.shape, 4)

    found = -np.asarray(jax.jit(lambda key: any_order_log_prob(flat, path, key, x1))(KEY)).reshape(-1, 500)
    z = (found.mean(axis=1) - expected) / (found.std(axis=1, ddof=1) / np.sqrt(500))
    assert np.abs(z).max() < 4.5


def test_units():
    np.testing.assert_allclose(bits_per_token(np.log([16.0, 4.0]), 2), [2.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(perplexity(jnp.log(jnp.array([16.0, 81.0])), 2), 6.0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_tokens_of_all_kinds_of_integers(dtype):
    path = MixturePath(Linear(), sources.Masked(300, 299))
    even, x1 = lambda t, x: jnp.zeros((*x.shape, 300)), np.ones((2, 1, 3), dtype)
    np.testing.assert_allclose(any_order_log_prob(even, path, KEY, x1), -3 * np.log(299), rtol=1e-6)
    found = token_bound(even, path, KEY, x1, num_times=64)
    assert (np.abs(found.nats - 3 * np.log(299)) < 5 * found.error).all()
    assert found.nats.dtype == found.error.dtype == jnp.float32


X1 = jnp.ones((2, 3), int)


def denoiser4(t, x):
    return jnp.zeros((*x.shape, 4))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bound": "elbo"}, "bound must be one of 'mask', 'reversal', 'forward', got 'elbo'"),
        ({"path": UNIFORM, "bound": "mask"}, 'path must have a mask, .*; bound="reversal" is for all sources'),
        ({"num_times": 5}, "num_times must be even, two draws in each stratum, got 5"),
        ({"num_times": 0}, "num_times must be at least 2, got 0"),
        ({"end": 1.5}, r"end must be in \(0, 1\], got 1.5"),
        ({"end": 0.0}, r"end must be in \(0, 1\], got 0.0"),
        ({"x1": X1 * 1.0}, "x1 must be tokens, integers from 0 to 3, got float32"),
        ({"x1": X1 + 2}, "x1 must be data, got 3 in it, the mask"),
        ({"x1": X1[:0]}, r"x1 must be \[batch, ...\], not empty"),
        ({"key": 0}, "key must be one typed key"),
        ({"denoiser": lambda t, x: x}, r"logits must be \[2, 3, 4\], one for each token, got shape \(2, 3\)"),
        ({"denoiser": None}, r"denoiser must be a denoiser f\(t, x\)"),
        ({"path": 3}, "path must be a MixturePath"),
    ],
)
def test_wrong_calls(changed, message):
    arguments = {"denoiser": denoiser4, "path": MASKED, "key": KEY, "x1": X1} | changed
    with pytest.raises(ValueError, match=f"^{message}"):
        token_bound(**arguments)
    if not changed.keys() & {"bound", "num_times", "end"}:
        with pytest.raises(ValueError, match=f"^{message}"):
            any_order_log_prob(**arguments)


def test_an_order_needs_a_mask():
    with pytest.raises(ValueError, match=r"^path must have a mask, .*; an order needs masks to write over"):
        any_order_log_prob(denoiser4, UNIFORM, KEY, X1)


def test_data_that_the_denoiser_excludes():
    """An infinite bound, whose error is infinite too: an average over data is not a number less."""
    table = tokens.with_mask(tokens.token_table([[0.5, 0.5], [0.0, 0.0]]))
    path = MixturePath(Linear(), sources.Masked(3, 2))
    found = token_bound(tokens.exact_denoiser(table, path), path, jax.random.key(0), jnp.array([[1, 0]]), bound="mask")
    assert jnp.isposinf(found.nats).all()
    assert jnp.isposinf(found.error).all()
