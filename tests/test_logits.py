"""Temperature and nucleus change the law of each token; what is sampled then is not the tempered joint law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import schedules, sources
from fm_jax.logits import top_p, with_temperature
from fm_jax.nfe import Counted, domain_of
from fm_jax.oracles import tokens
from fm_jax.paths.mixture import MixturePath
from fm_jax.samplers import FirstHitting, MixtureSteps, sample

PAIRS = np.array([[0.30, 0.05, 0.02], [0.02, 0.20, 0.13], [0.10, 0.05, 0.13]])
PATH = MixturePath(schedules.Linear(), sources.Masked(4, 3))
DENOISER = tokens.exact_denoiser(tokens.with_mask(tokens.token_table(PAIRS)), PATH)
P = jnp.array([[[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]]])
X = jnp.zeros((1, 2), int)


def network(t, x):
    return jnp.log(P)


def tempered(p, temperature):
    """In proportion to `p^(1 / temperature)`, along the last axis."""
    power = p ** (1 / temperature)
    return power / power.sum(axis=-1, keepdims=True)


def law_of_conditionals(temperature):
    """Of two tokens, one drawn after the other in either order, each with its tempered conditional."""
    first, second = PAIRS.sum(axis=1), PAIRS.sum(axis=0)
    forth = tempered(first, temperature)[:, None] * tempered(PAIRS / first[:, None], temperature)
    back = tempered(second, temperature)[:, None] * tempered((PAIRS / second).T, temperature)
    return (forth + back.T) / 2


@pytest.mark.parametrize("temperature", [0.5, 0.25])
def test_what_is_sampled_is_tempered_token_by_token(temperature):
    """To 4 standard errors; it is another law than the tempered joint one, by more than 20 of them somewhere."""
    x0 = jnp.full((20_000, 2), 3)
    f = with_temperature(DENOISER, temperature)
    x = jax.jit(lambda key: sample(f, x0, FirstHitting(PATH), key=key).x)(jax.random.key(0))
    found = np.bincount(x[:, 0] * 3 + x[:, 1], minlength=9).reshape(3, 3) / len(x)
    wanted = law_of_conditionals(temperature)
    joint = tempered((PAIRS / PAIRS.sum()).ravel(), temperature).reshape(3, 3)
    error = np.sqrt(wanted * (1 - wanted) / len(x))
    assert (np.abs(found - wanted) < 4 * error).all()
    assert (np.abs(wanted - joint) / error).max() > 20
    assert 0.5 * np.abs(wanted - joint).sum() > 0.02


def test_temperature_of_time():
    """A function of t, with one time for all or one for each; at 1 the same to the bit."""
    f = with_temperature(network, lambda t: 2 - t)
    np.testing.assert_allclose(jax.nn.softmax(f(0.5, X)), tempered(P, 1.5), rtol=1e-6)
    np.testing.assert_array_equal(f(jnp.array([1.0]), X), network(None, X))
    np.testing.assert_array_equal(with_temperature(network, 1.0)(0.3, X), network(None, X))


@pytest.mark.parametrize(
    ("p", "kept"),
    [(0.1, [1]), (0.4, [1]), (0.41, [1, 2]), (0.7, [1, 2]), (0.71, [1, 2, 3]), (0.95, [0, 1, 2, 3]), (1.0, range(4))],
)
def test_the_likeliest_tokens_that_have_p_together(p, kept):
    found = jax.nn.softmax(top_p(network, p - 1e-6 if p < 1 else p)(0.5, X))
    wanted = np.where(np.isin(np.arange(4), kept), P[0, 0], 0)
    np.testing.assert_allclose(found[0, 0], wanted / wanted.sum(), rtol=1e-5)
    np.testing.assert_allclose(found[0, 1], 0.25, rtol=1e-6)  # all alike: all stay


def test_p_of_1_is_the_same_to_the_bit():
    """Also with a tail that is less than all rounding of the sum."""
    logits = jnp.log(jnp.tile(jnp.array([1.0, 1e-9, 1e-12, 0.0]), (*X.shape, 1)))
    np.testing.assert_array_equal(top_p(lambda t, x: logits, 1.0)(0.5, X), logits)


def test_what_is_cut_is_never_drawn():
    x0 = jnp.full((5000, 2), 3)
    f = top_p(lambda t, x: jnp.log(jnp.array([0.6, 0.3, 0.1, 0.0]))[None, None] + 0.0 * x[..., None], 0.8)
    x = jax.jit(lambda key: sample(f, x0, MixtureSteps(PATH), times=4, key=key).x)(jax.random.key(0))
    assert abs((x == 0).mean() - 2 / 3) < 4 * np.sqrt(2 / 9 / x.size)
    assert set(np.unique(x)) == {0, 1}


@pytest.mark.parametrize("make", [lambda f: with_temperature(f, 0.5), lambda f: top_p(f, 0.5)])
def test_costs_and_domains_are_carried(make):
    f = make(Counted(network, 3, (0.0, 0.9)))
    assert (f.nfe, domain_of(f)) == (3, (0.0, 0.9))
    x0 = jnp.full((1, 2), 2)
    assert int(sample(f, x0, MixtureSteps(PATH), times=[0.0, 0.9], key=jax.random.key(0)).nfe) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_temperature(network, 0.0), "temperature must be positive and finite, got 0.0"),
        (lambda: with_temperature(network, lambda: 1.0), "temperature must be a number or a function of time"),
        (lambda: with_temperature(3, 1.0), "denoiser must be a denoiser"),
        (lambda: top_p(network, 0.0), r"p must be in \(0, 1\], got 0.0"),
        (lambda: top_p(network, 1.5), r"p must be in \(0, 1\], got 1.5"),
        (lambda: top_p(None, 0.5), "denoiser must be a denoiser"),
        (lambda: top_p(lambda t, x: None, 0.5)(0.5, X), r"denoiser\(t, x\) must be an array"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_lowest_temperatures_take_the_likeliest(dtype):
    logits = jnp.array([[[3.0, 5.0, -jnp.inf, 4.9], [-800.0, -900.0, -jnp.inf, -840.0]]], dtype)
    f = with_temperature(lambda t, x: logits, 1e-38)
    assert (jax.nn.softmax(f(0.5, X)) == jnp.array([[[0, 1, 0, 0], [1, 0, 0, 0]]])).all()
    np.testing.assert_array_equal(with_temperature(lambda t, x: logits, 1.0)(0.5, X), logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_function_that_is_no_temperature_gives_no_logits(temperature):
    assert jnp.isnan(with_temperature(network, lambda t: temperature + 0 * t)(0.5, X)).all()
