"""No token comes of NaN: what a sampler draws from it is no token, and stays so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import rates, schedules, sources
from fm_jax.draws import NONE
from fm_jax.paths.mixture import MixturePath
from fm_jax.samplers import Cap, Confidence, FirstHitting, MixtureSteps, TauLeaping, sample, tau_leap
from fm_jax.samplers.chain import mixture_step

MASKED = MixturePath(schedules.Linear(), sources.Masked(4, 3))
UNIFORM = MixturePath(schedules.Linear(), sources.UniformTokens(4))


def nan_in_the_second(t, x):
    """Logits; those of the second example are NaN."""
    return jnp.zeros((*x.shape, 4)).at[1].set(jnp.nan)


def nan_for_a_while(t, x):
    """Logits; NaN at times in the middle."""
    return jnp.zeros((*x.shape, 4)) + jnp.where((t > 0.4) & (t < 0.7), jnp.nan, 0.0)


SAMPLERS = {
    "tau leaping": (MASKED, TauLeaping()),
    "tau leaping, uniform": (UNIFORM, TauLeaping()),
    "mixture steps": (MASKED, MixtureSteps(MASKED)),
    "mixture steps, uniform": (UNIFORM, MixtureSteps(UNIFORM)),
    "remasking": (MASKED, MixtureSteps(MASKED, Cap(0.2))),
    "remasking by confidence": (MASKED, MixtureSteps(MASKED, Confidence(Cap(0.2)))),
    "first hitting": (MASKED, FirstHitting(MASKED)),
    "surest first": (MASKED, FirstHitting(MASKED, "confidence")),
    "margin": (MASKED, FirstHitting(MASKED, "margin", per_step=2)),
}


def drawn(name, denoiser, *, jit=True, num=3, dtype=jnp.int32, keep=None):
    path, sampler = SAMPLERS[name]
    v = rates.forward_rates(denoiser, path) if "tau" in name else denoiser
    x0 = jnp.full((num, 8), 3, dtype)
    times = None if isinstance(sampler, FirstHitting) else 5
    draw = lambda key: sample(v, x0, sampler, times=times, key=key, keep=keep).x  # noqa: E731
    return np.asarray((jax.jit(draw) if jit else draw)(jax.random.key(0)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_nan_gives_no_token_in_its_example_alone(name):
    x = drawn(name, nan_in_the_second)
    assert (x[1] == NONE).all()
    assert ((x[::2] >= 0) & (x[::2] < 4)).all()
    np.testing.assert_array_equal(x[::2], drawn(name, lambda t, x: jnp.zeros((*x.shape, 4)))[::2])


@pytest.mark.parametrize("name", ["tau leaping", "mixture steps", "first hitting"])
def test_without_jit_too(name):
    np.testing.assert_array_equal(drawn(name, nan_in_the_second, jit=False), drawn(name, nan_in_the_second))


@pytest.mark.parametrize("name", ["tau leaping, uniform", "mixture steps, uniform", "remasking"])
def test_what_was_lost_stays_lost(name):
    """NaN at one of five steps: with a source without a mask, or with remasking, later ones would hide it."""
    x = drawn(name, nan_for_a_while, num=100)
    assert (x == NONE).mean() > 0.1
    assert x.max() < 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_kept_is_kept(name):
    x = drawn(name, nan_in_the_second, keep=jnp.arange(8) < 3)
    assert (x[:, :3] == 3).all()
    assert (x[1, 3:] == NONE).all()


@pytest.mark.parametrize("name", ["tau leaping", "mixture steps", "mixture steps, uniform", "first hitting"])
def test_as_an_unsigned_integer_it_is_the_largest(name):
    x = drawn(name, nan_in_the_second, dtype=jnp.uint8)
    assert (x[1] == 255).all()
    assert x[::2].max() < 4


def test_there_is_room_for_it():
    """Of 256 tokens an unsigned byte has none left, and one of 255 is 254 at most."""
    path = MixturePath(schedules.Linear(), sources.UniformTokens(256))
    f, x0 = lambda t, x: jnp.zeros((*x.shape, 256)), jnp.zeros((2, 3), jnp.uint8)
    with pytest.raises(ValueError, match="x0 must be of integers that hold 256 tokens, such as int32, got uint8"):
        sample(f, x0, MixtureSteps(path), times=2, key=jax.random.key(0))
    path = MixturePath(schedules.Linear(), sources.UniformTokens(255))
    f = lambda t, x: jnp.zeros((*x.shape, 255))  # noqa: E731
    assert sample(f, x0, MixtureSteps(path), times=2, key=jax.random.key(0)).x.max() < 255


def test_a_negative_rate_to_another_token_gives_no_token():
    """At the token that is there it is the minus of a generator, and is none of its rates."""
    x = jnp.array([[0], [1]])
    u = lambda t, x: jnp.broadcast_to(jnp.array([-3.0, 1.0, 2.0]), (*x.shape, 3))  # noqa: E731
    end = jax.jit(lambda x: sample(u, x, TauLeaping(), times=np.array([0.0, 0.5]), key=jax.random.key(0)).x)(x)
    assert end[0, 0] in (1, 2)
    assert end[1, 0] == NONE
    with pytest.raises(ValueError, match="rates"):
        tau_leap(u, 0.0, 0.5, x)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_of_a_step_by_itself(jit):
    def step(x):
        return mixture_step(nan_in_the_second, MASKED, 0.0, 1.0, x).draw(jax.random.key(0), x)

    x = (jax.jit(step) if jit else step)(jnp.array([[3, 3], [3, 0]]))
    assert ((x[0] >= 0) & (x[0] < 3)).all()
    np.testing.assert_array_equal(x[1], [NONE, 0])  # what is seen is known without the network
