"""Guidance of tokens: the laws that are really sampled, by the master equation on all states of two tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import guidance, oracles, rates, schedules, sources
from fm_jax.nfe import Counted
from fm_jax.paths import MixturePath

Q = np.array([[0.30, 0.05, 0.04], [0.02, 0.20, 0.09], [0.10, 0.05, 0.15]])
SAYS = np.array([[0.9, 0.2, 0.3], [0.1, 0.6, 0.05], [0.4, 0.8, 0.3]])
"""p(c | x1)."""
UNIFORM = MixturePath(schedules.Linear(), sources.UniformTokens(3))
MASK = MixturePath(schedules.Linear(), sources.Masked(4, 3))
ONE_TOKEN = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.6, 0.3])


def table_of(path, q):
    table = oracles.token_table(q)
    return oracles.with_mask(table) if path.source.mask is not None else table


def rates_of(make, path, q):
    return make(oracles.exact_denoiser(table_of(path, q), path), path)


def predictor_of(path):
    """log p(c | x_t) of noised data, by Bayes' rule."""

    def log_prob(t, x):
        each = jax.vmap(lambda t: path.probs(t, jnp.arange(3)))(t)  # [batch, a, y]
        one, two = (jnp.take_along_axis(each, x[:, None, i : i + 1], axis=2)[..., 0] for i in (0, 1))
        joint = jnp.einsum("ba,bc,ac->bac", one, two, jnp.asarray(Q))
        return jnp.log((joint * jnp.asarray(SAYS)[None]).sum(axis=(1, 2)) / joint.sum(axis=(1, 2)))

    return log_prob


def distance(law, other):
    return 0.5 * np.abs(law - other).sum()


def law_after(u, path, q, t0=0.05, t1=0.9):
    """That of the chain which starts from the law of the path of data q."""
    table = table_of(path, q)
    states = oracles.all_states(table)
    start = oracles.path_law(table, path, t0)
    return oracles.chain_law(u, start, states, table.num_tokens, t0=t0, t1=t1, num_steps=200)


def off(u, path):
    """Total variation from the law of the path of the data given c."""
    return distance(law_after(u, path, Q * SAYS), oracles.path_law(table_of(path, Q * SAYS), path, 0.9))


@pytest.mark.parametrize("path", [UNIFORM, MASK], ids=["uniform", "mask"])
def test_a_predictor_and_rates_of_the_reversal_sample_the_data_given_c(path, x64):
    u = guidance.predictor(rates_of(rates.reversal_rates, path, Q), predictor_of(path), 1.0)
    assert off(u, path) < 1e-8
    assert off(rates_of(rates.reversal_rates, path, Q), path) > 0.05  # without it


def test_a_predictor_and_forward_rates_do_not(x64):
    """Of a uniform source, as the docstring says; of a mask the two rates are one."""
    forward = guidance.predictor(rates_of(rates.forward_rates, UNIFORM, Q), predictor_of(UNIFORM), 1.0)
    assert 0.01 < off(forward, UNIFORM) < 0.1
    assert off(guidance.predictor(rates_of(rates.forward_rates, MASK, Q), predictor_of(MASK), 1.0), MASK) < 1e-8


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_two_rates_of_the_reversal_imply_the_exact_predictor(scale, x64):
    x = jnp.asarray(oracles.all_states(table_of(UNIFORM, Q)))
    led, plain = (rates_of(rates.reversal_rates, UNIFORM, q) for q in (Q * SAYS, Q))
    found = guidance.classifier_free_rates(led, plain, scale)(0.4, x)
    expected = guidance.predictor(plain, predictor_of(UNIFORM), scale)(0.4, x)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    led, plain = (rates_of(rates.forward_rates, UNIFORM, q) for q in (Q * SAYS, Q))
    found = guidance.classifier_free_rates(led, plain, scale)(0.4, x)
    assert np.abs(found - guidance.predictor(plain, predictor_of(UNIFORM), scale)(0.4, x)).max() > 1e-2


def of_one_token(make):
    """At scale 2, with a mask: the law at t = 0.9 of the tokens that are seen, and how often there is none."""
    q, says = ONE_TOKEN
    law = law_after(make(q * says, q, 2.0), MASK, q, t0=0.0)
    return distance(law[:3] / law[:3].sum(), q * says**2 / (q * says**2).sum()), law[3]


def of_logits(q_cond, q, scale):
    f_cond, f = (oracles.exact_denoiser(table_of(MASK, each), MASK) for each in (q_cond, q))
    return rates.forward_rates(guidance.classifier_free_logits(f_cond, f, scale), MASK)


def of_rates(q_cond, q, scale):
    u_cond, u = (rates_of(rates.forward_rates, MASK, each) for each in (q_cond, q))
    return guidance.classifier_free_rates(u_cond, u, scale)


def test_of_one_masked_token_the_law_is_the_tilted_one(x64):
    error, unseen = of_one_token(of_logits)
    assert error < 1e-10
    np.testing.assert_allclose(unseen, 0.1, rtol=1e-6)  # as without guidance
    error, unseen = of_one_token(of_rates)
    assert error < 1e-10
    q, says = ONE_TOKEN
    total = (q * (says / (q * says).sum()) ** 2).sum()  # of p_cond^2 / p_uncond
    np.testing.assert_allclose(unseen, 0.1**total, rtol=1e-6)  # when tokens appear is another matter
    assert abs(unseen - 0.1) > 0.01


@pytest.mark.parametrize("make", [of_logits, of_rates])
def test_of_two_tokens_it_is_not(make, x64):
    law = law_after(make(Q * SAYS, Q, 2.0), MASK, Q, t0=0.0, t1=0.95).reshape(4, 4)[:3, :3]
    tilted = Q * SAYS**2
    assert 1e-3 < distance(law / law.sum(), tilted / tilted.sum()) < 0.1


def test_to_first_order_is_exact_where_the_predictor_is_linear(x64):
    weights = jax.random.normal(jax.random.key(0), (2, 3))
    x = jnp.asarray(oracles.all_states(table_of(UNIFORM, Q)))
    u = rates_of(rates.reversal_rates, UNIFORM, Q)

    def of_one_hot(t, z):
        return t * (z * weights[None]).sum(axis=(1, 2))

    found = guidance.predictor_taylor(u, of_one_hot, 1.7)(0.4, x)
    expected = guidance.predictor(u, lambda t, x: of_one_hot(t, jax.nn.one_hot(x, 3)), 1.7)(0.4, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    bent = guidance.predictor_taylor(u, lambda t, z: of_one_hot(t, z) ** 2, 1.7)(0.4, x)
    exact = guidance.predictor(u, lambda t, x: of_one_hot(t, jax.nn.one_hot(x, 3)) ** 2, 1.7)(0.4, x)
    assert np.abs(bent - exact).max() > 1e-2


X = jnp.array([[0, 1], [2, 2], [1, 0], [3, 3]])


LOGITS = np.random.default_rng(0).normal(size=(3, *X.shape, 4)).astype(np.float32)
RATES = np.where(np.eye(4, dtype=bool)[X], 0, np.exp(LOGITS))
PAIRS = {
    "logits": (guidance.classifier_free_logits, lambda i: lambda t, x: jnp.asarray(LOGITS[i])),
    "rates": (guidance.classifier_free_rates, lambda i: lambda t, x: jnp.asarray(RATES[i])),
}


@pytest.mark.parametrize("name", PAIRS)
def test_scales_of_1_and_0_are_the_two_inputs_to_the_bit(name):
    make, of = PAIRS[name]
    one, two = of(1), of(2)
    assert make(one, two, 1.0) is one
    np.testing.assert_array_equal(make(one, two, 0.0)(0.5, X), two(0.5, X))
    scale = jnp.array([1.0, 0.0, 1.0, 2.0])
    guided = jax.jit(lambda scale: make(one, two, scale)(0.5, X))(scale)
    for i, expected in enumerate((one, two, one)):
        np.testing.assert_array_equal(guided[i], expected(0.5, X)[i])
    assert (guided[3] != one(0.5, X)[3]).any()


@pytest.mark.parametrize("name", PAIRS)
def test_a_denoiser_that_excludes_a_token_excludes_it_from_both(name):
    make, of = PAIRS[name]
    nothing = -jnp.inf if name == "logits" else 0.0
    found = make(
        lambda t, x: of(1)(t, x).at[..., 3].set(nothing), lambda t, x: of(2)(t, x).at[..., 2].set(nothing), 2.0
    )
    assert (found(0.5, X)[..., 2:] == nothing).all()
    assert np.isfinite(found(0.5, X)[..., :2]).all()


@pytest.mark.parametrize("name", PAIRS)
def test_outside_the_interval_the_condition_stands_alone(name):
    make, of = PAIRS[name]
    one, two = of(1), of(2)
    guided = make(one, two, 2.0, interval=(0.2, 0.6))
    t = jnp.array([0.1, 0.2, 0.6, 0.7])
    np.testing.assert_array_equal(guided(t, X)[0], one(t, X)[0])
    np.testing.assert_array_equal(guided(t, X)[3], one(t, X)[3])
    np.testing.assert_array_equal(guided(t, X)[1:3], make(one, two, 2.0)(t, X)[1:3])


@pytest.mark.parametrize("make", [guidance.predictor, guidance.predictor_taylor])
def test_a_predictor_is_off_at_scale_0_and_outside_the_interval(make):
    u = PAIRS["rates"][1](1)
    assert make(u, lambda t, x: x.reshape(len(x), -1).sum(axis=1), 0.0) is u
    log_prob = lambda t, x: x.reshape(len(x), -1)[:, 1] * 0.5  # noqa: E731
    guided = make(u, log_prob, jnp.array([0.0, 1.0, 1.0, 2.0]), interval=(0.2, 0.6))
    t = jnp.array([0.4, 0.7, 0.1, 0.4])
    np.testing.assert_array_equal(guided(t, X)[:3], u(t, X)[:3])
    assert (guided(t, X)[3] != u(t, X)[3]).any()


def test_what_the_predictor_excludes_is_not_jumped_to_and_left_as_without_it():
    u = lambda t, x: 1.0 - jax.nn.one_hot(x, 4)  # noqa: E731
    found = guidance.predictor(u, lambda t, x: jnp.where(x[:, 0] == 2, -jnp.inf, 0.0), 1.5)(0.5, X)
    assert (found[jnp.array([0, 2, 3]), 0, 2] == 0).all()
    np.testing.assert_array_equal(found[1], u(0.5, X)[1])
    assert np.isfinite(found).all()


def test_a_call_costs_both_and_times_are_kept():
    f = Counted(PAIRS["logits"][1](0), 2, (0.1, 0.9))
    guided = guidance.classifier_free_logits(f, f, 2.0)
    assert (guided.nfe, guided.domain) == (4, (0.1, 0.9))
    u = rates.forward_rates(f, MASK)
    assert guidance.classifier_free_rates(u, u, 2.0).reach == (0.0, 1.0)
    assert guidance.predictor(u, lambda t, x: 0.0 * t, 2.0).domain == (0.1, 0.9)


def _two(*values):
    """Functions of (t, x) that return the same at each token."""

    def of(each):
        return lambda t, x: jnp.broadcast_to(jnp.array(each).reshape(1, 1, -1), (*x.shape, len(each)))

    return map(of, values)


@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_the_derivative_in_the_scale_is_the_same_at_1_and_0(scale, shape):
    """Of a scale that is learned; also where a token is excluded by one or both."""
    x, inf = jnp.zeros((2, 1), int), jnp.inf
    given = jnp.full(shape, scale)

    def slope(make):
        found = jax.jacobian(lambda s: make(s)(0.5, x)[:, 0])(given)  # [batch, K, *shape]
        return found if shape == () else jnp.stack([found[i, :, i] for i in range(2)])

    f_cond, f_uncond = _two([2.0, 0.0, -inf, 1.0], [0.0, 1.0, -inf, -inf])
    found = slope(lambda s: guidance.classifier_free_logits(f_cond, f_uncond, s))
    np.testing.assert_allclose(found[:, :2], [[2.0, -1.0]] * 2)
    assert (found[:, 2:] == 0).all()
    u_cond, u_uncond = _two([4.0, 2.0, 0.0, 3.0], [2.0, 3.0, 0.0, 0.0])
    found = slope(lambda s: guidance.classifier_free_rates(u_cond, u_uncond, s))
    ratio = np.array([2.0, 2 / 3])
    np.testing.assert_allclose(found[:, :2], [np.array([2.0, 3.0]) * ratio**scale * np.log(ratio)] * 2, rtol=1e-5)
    assert (found[:, 2:] == 0).all()
    says = lambda t, x: jnp.where(x[:, 0] == 3, -inf, 2.0 * x[:, 0])  # noqa: E731
    u = lambda t, x: 1.0 - jax.nn.one_hot(x, 4)  # noqa: E731
    found = slope(lambda s: guidance.predictor(u, says, s))
    np.testing.assert_allclose(found[:, 1:3], [[2 * np.exp(2 * scale), 4 * np.exp(4 * scale)]] * 2, rtol=1e-5)
    assert (found[:, jnp.array([0, 3])] == 0).all()


def test_the_derivative_passes_through_what_is_excluded():
    f_cond, f_uncond = _two([2.0, 0.0, -jnp.inf], [0.0, 1.0, -jnp.inf])
    x = jnp.zeros((1, 1), int)
    drawn = lambda s: jax.nn.softmax(guidance.classifier_free_logits(f_cond, f_uncond, s)(0.5, x))[0, 0, 0]  # noqa: E731
    p = float(drawn(2.0))
    np.testing.assert_allclose(jax.grad(drawn)(2.0), 3 * p * (1 - p), rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
def test_rows_of_a_generator_and_what_is_no_rate(scale):
    """What is negative stays so at the token that is there; NaN is not made 0."""
    u_cond, u_uncond = _two([-3.0, 1.5, 1.5, jnp.nan], [-2.0, 1.0, 1.0, 1.0])
    u = guidance.classifier_free_rates(u_cond, u_uncond, jnp.float32(scale))
    for found in (u(0.1, jnp.zeros((1, 1), int)), jax.jit(u)(0.1, jnp.zeros((1, 1), int))):
        np.testing.assert_allclose(found[0, 0, 1:3], 1.5**scale, rtol=1e-6)
        assert found[0, 0, 0] <= 0
        assert jnp.isnan(found[0, 0, 3]) or scale == 0
