"""Mixtures whose means are told: against the oracle of fixed mixtures, and as the attention of the library."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.models import Conditions, attend
from fm_jax.oracles.token_set import attention_of, sample_points, token_mixture, token_prediction, token_velocity
from fm_jax.schedules import VP, Cosine, Linear, coefficients

STD, T = 0.4, np.array([0.2, 0.9])
MASK = np.array([[True, True, True, True], [True, False, True, False]])
TOKENS, POINTS = (np.random.default_rng(i).normal(size=(2, n, 3)).astype(np.float32) for i, n in ((0, 4), (1, 5)))
PREDICT = jax.jit(token_prediction, static_argnums=1)


@jax.jit
def velocity(tokens, mask=None):
    return token_velocity(STD, Linear())(T, POINTS, Conditions(tokens=tokens, mask=mask))


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP()], ids=str)
def test_each_example_is_a_mixture_of_its_own(schedule, x64):
    got = PREDICT(token_mixture(TOKENS.astype(np.float64), STD, MASK), schedule, T, POINTS)
    for i in range(2):
        of_one = oracles.gaussian_mixture(TOKENS[i][MASK[i]], STD)
        expected = jax.jit(lambda m, t, x: oracles.prediction(m, schedule, t, x))(of_one, T[i], POINTS[i])
        for kind, value in expected._asdict().items():
            np.testing.assert_allclose(getattr(got, kind)[i], value, rtol=1e-8, atol=1e-9, err_msg=kind)


@pytest.mark.parametrize("schedule", [Linear(), VP()], ids=str)
def test_the_velocity_is_a_cross_attention(schedule):
    """Points ask, tokens are keys and values: `attend` with the scale and the bias of the docstring, to 1e-6."""

    @jax.jit
    def both(t, x):
        mixture = token_mixture(TOKENS, STD, MASK)
        alpha, sigma, d_alpha, d_sigma = (each[:, None, None] for each in coefficients(schedule, t))
        variance = alpha**2 * STD**2 + sigma**2
        bias = -(alpha**2) * jnp.square(mixture.tokens).sum(axis=-1)[:, None] / (2 * variance)  # [batch, 1, m]
        q, k = (each[:, :, None] for each in (alpha / variance * x, mixture.tokens))  # one head
        looked_up = attend(q, k, k, mask=MASK, bias=bias[:, None], scale=1.0)[:, :, 0]
        mean = jnp.einsum("bnk,bkd->bnd", attention_of(mixture, schedule, t, x), mixture.tokens)
        # The rest is a skip connection, with weights of t alone.
        slope = (d_alpha * alpha * STD**2 + d_sigma * sigma) / variance
        by_attention = slope * x + (d_alpha - slope * alpha) * looked_up
        exact = token_velocity(STD, schedule)(t, x, Conditions(tokens=TOKENS, mask=MASK))
        return (looked_up, mean), (by_attention, exact)

    for one, other in both(T.astype(np.float32), POINTS):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_keys_of_one_length_need_no_bias():
    unit = TOKENS / np.linalg.norm(TOKENS, axis=-1, keepdims=True)

    @jax.jit
    def both(x):
        r = attention_of(token_mixture(unit, STD, MASK), Linear(), 0.7, x)
        q, k = (each[:, :, None] for each in (x, jnp.asarray(unit)))
        looked_up = attend(q, k, k, mask=MASK, scale=0.7 / (0.7**2 * STD**2 + 0.3**2))[:, :, 0]
        return jnp.einsum("bnk,bkd->bnd", r, unit), looked_up

    np.testing.assert_allclose(*both(POINTS), atol=1e-6)


def test_a_set_has_no_order():
    order = np.array([2, 0, 3, 1])
    one, unmasked = velocity(TOKENS, MASK), velocity(TOKENS)
    np.testing.assert_allclose(one, velocity(TOKENS[:, order], MASK[:, order]), atol=1e-6)
    np.testing.assert_allclose(one[0], unmasked[0], atol=1e-6)  # without a mask all are seen
    assert abs(np.asarray(one)[1] - np.asarray(unmasked)[1]).max() > 0.1


@jax.jit
def velocity_and_gradient(tokens):
    pull = jax.grad(lambda each: jnp.square(velocity(each, MASK)).sum())
    return velocity(tokens, MASK), pull(tokens)


@pytest.mark.parametrize("junk", [1e6, np.inf, np.nan])
def test_masked_tokens_change_no_bit_and_have_no_gradient(junk):
    (one, pull), (other, pulled) = map(
        velocity_and_gradient, (TOKENS, np.where(MASK[:, :, None], TOKENS, np.float32(junk)))
    )
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(pull, pulled)
    assert (np.asarray(pull)[~MASK] == 0).all()


def test_points_without_an_axis_of_their_own():
    mixture = token_mixture(TOKENS, STD, MASK)
    many, one = (PREDICT(mixture, Linear(), T, x).velocity for x in (POINTS, POINTS[:, 0]))
    np.testing.assert_allclose(many[:, 0], one, atol=1e-6)
    for x in (POINTS, POINTS[:, 0]):
        r = np.asarray(jax.jit(lambda x: attention_of(mixture, Linear(), 0.5, x))(x))
        assert r.shape == (*x.shape[:-1], 4)
        np.testing.assert_allclose(r.sum(axis=-1), 1, atol=1e-6)


def test_draws_have_the_moments(key):
    """Mean and variance of 20,000 points around two tokens, never around a masked one: z below 4.5."""
    mixture = token_mixture(np.array([[[-2.0], [1.0], [50.0]]], np.float32), STD, np.array([[True, True, False]]))
    x = np.asarray(jax.jit(sample_points, static_argnums=2)(mixture, key, 20_000)).ravel()
    assert x.max() < 1 + 6 * STD
    near = x < -0.5
    assert abs(near.mean() - 0.5) < 4.5 * 0.5 / 20_000**0.5
    for part, mean in ((x[near], -2), (x[~near], 1)):
        assert abs(part.mean() - mean) < 4.5 * STD / len(part) ** 0.5
        assert abs(part.var() / STD**2 - 1) < 4.5 * (2 / len(part)) ** 0.5


X, MIXTURE = np.zeros((2, 3), np.float32), token_mixture(np.zeros((2, 4, 3), np.float32), STD)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: token_mixture(np.zeros((4, 3)), STD),
            r"tokens must be \[batch, m, d\], not empty, got shape \(4, 3\)",
        ),
        (lambda: token_mixture(np.zeros((2, 4, 3), int), STD), "tokens must be floating point, got int64"),
        (lambda: token_mixture(MIXTURE.tokens, 0.0), "std must be positive and finite, got 0.0"),
        (
            lambda: token_mixture(MIXTURE.tokens, STD, np.ones((2, 4))),
            r"mask must be bool \[batch, m\] = \(2, 4\), got flo",
        ),
        (
            lambda: token_mixture(MIXTURE.tokens, STD, MASK[:, :3]),
            r"mask must be bool \[batch, m\] = \(2, 4\), got bool",
        ),
        (lambda: token_mixture(MIXTURE.tokens, STD, MASK & False), "mask must leave each example a token"),
        (
            lambda: token_prediction(MIXTURE, Linear(), 0.5, X[:, :2]),
            r"x must be \[2, 3\] or \[2, points, 3\] of the tokens",
        ),
        (lambda: token_prediction(X, Linear(), 0.5, X), "mixture must be a TokenMixture, as from token_mixture"),
        (lambda: attention_of(MIXTURE, "linear", 0.5, X), r"schedule must be a schedule, such as Linear\(\)"),
        (lambda: sample_points(MIXTURE, jax.random.key(0), 0), "num must be at least 1, got 0"),
        (lambda: token_velocity(STD, Linear())(0.5, X), "cond must be conditions with tokens and their mask, got None"),
        (lambda: token_velocity(-1.0, Linear()), "std must be positive and finite, got -1.0"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()
