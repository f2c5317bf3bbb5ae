"""Beside tokens, which are integers, times stay what they are: taken for integers, t = 0.5 would be 0 in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import guidance, likelihood, losses, models, parameterization, paths, rates, samplers, schedules, shapes
from fm_jax.guidance.scale import scale_at
from fm_jax.samplers.grids import time_grid
from fm_jax.sources import Masked, UniformTokens

X = jnp.array([[0, 1, 2], [2, 2, 0]])
KEY = jax.random.key(0)
LINEAR = schedules.Linear()
MASKED = paths.MixturePath(LINEAR, Masked(4, 3))
UNIFORM = paths.MixturePath(LINEAR, UniformTokens(4))
TIMES = [0.5, np.float64(0.5), np.full(2, 0.5), jnp.float32(0.5), jnp.full(2, 0.5)]


class Seen:
    """What a network is called with."""

    def __init__(self, like_x=False):
        self.like_x, self.times = like_x, []

    def __call__(self, *arguments, **options):
        t, x = arguments[-2:] if len(arguments) == 2 else arguments[-3:-1]
        self.times.append(np.asarray(t))
        return jnp.zeros(x.shape if self.like_x else (*x.shape, 4))

    def check(self, expected=None):
        assert self.times
        for t in self.times:
            assert np.issubdtype(t.dtype, np.floating)
        if expected is not None:
            assert all((t == expected).all() for t in self.times)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8])
@pytest.mark.parametrize("t", TIMES, ids=lambda t: f"{type(t).__name__}{np.shape(t)}")
def test_a_half_is_a_half(t, dtype):
    x = X.astype(dtype)
    for function in (shapes.batch_time, shapes.time_of, shapes.expand_time):
        found = function(t, x)
        assert jnp.issubdtype(found.dtype, jnp.floating)
        assert (found == 0.5).all()
    assert (scale_at(1.5, t, x, interval=(0.2, 0.8), outside=1) == 1.5).all()
    assert (scale_at(jnp.full(2, 1.5), t, x, interval=(0.0, 1.0), outside=1) == 1.5).all()
    for wrap in (
        lambda f: parameterization.velocity_fn(f, "velocity", LINEAR),
        lambda f: parameterization.velocity_fn(f, "data", LINEAR),
        lambda f: guidance.classifier_free_batched(f, "velocity", LINEAR, jnp.zeros(2), 1.0, 1.5),
        lambda f: parameterization.reschedule(lambda t, x: f(t, x, None), LINEAR, LINEAR),
    ):
        seen = Seen(like_x=True)
        wrap(lambda t, x, cond=None, seen=seen: seen(t, x, cond))(t, x)
        seen.check(0.5)


@pytest.mark.parametrize("make", [rates.forward_rates, rates.reversal_rates])
def test_rates(make):
    """Those of a denoiser that says nothing, by hand: forward, kappa' / (1 - kappa) = 2 times a quarter."""
    for t in TIMES:
        seen = Seen()
        found = make(seen, UNIFORM)(t, X)
        seen.check(0.5)
        np.testing.assert_allclose(found, make(seen, UNIFORM)(jnp.float32(0.5), X))
        if make is rates.forward_rates:
            np.testing.assert_allclose(found, np.where(np.arange(4) == np.asarray(X)[..., None], 0, 0.5))


def test_losses():
    for make in (losses.cross_entropy, losses.generalized_kl, losses.masked_elbo, losses.reversal_elbo):
        seen = Seen()
        apply_fn = lambda params, t, x, cond, *, train, rngs, seen=seen: seen(t, x)  # noqa: E731
        make(apply_fn, MASKED)(None, KEY, {"x1": X % 3, "t": jnp.full(2, 0.5)})
        seen.check(0.5)
        make(apply_fn, MASKED)(None, KEY, {"x1": X % 3})
        seen.check()
        assert 0 < seen.times[-1].min() < seen.times[-1].max() < 1


@pytest.mark.slow
def test_bounds_and_samplers():
    """By calls without tracing, in which times are numbers."""
    x0 = jnp.full((2, 3), 3)
    for run in (
        lambda f: likelihood.token_bound(f, MASKED, KEY, X % 3, num_times=4),
        lambda f: likelihood.any_order_log_prob(f, MASKED, KEY, X % 3),
        lambda f: samplers.sample(rates.forward_rates(f, MASKED), x0, samplers.TauLeaping(), times=4, key=KEY),
        lambda f: samplers.sample(f, x0, samplers.MixtureSteps(MASKED), times=4, key=KEY),
        lambda f: samplers.sample(f, x0, samplers.FirstHitting(MASKED), key=KEY),
    ):
        seen = Seen()
        with jax.disable_jit():
            run(seen)
        seen.check()
        assert len({float(t.ravel()[0]) for t in seen.times}) >= 3
        assert any(0 < t.ravel()[0] < 1 for t in seen.times)


def test_grids():
    for x in (X, X.astype(jnp.uint8), jax.ShapeDtypeStruct((2, 3), jnp.int32)):
        np.testing.assert_array_equal(time_grid(4, (0.0, 1.0), x), [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.slow
def test_networks_see_the_time():
    module = models.make_token_transformer("tiny", num_tokens=4)
    params = module.init(KEY, 0.5, X)["params"]
    params = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(KEY, leaf.shape), params)
    call = jax.jit(lambda t: module.apply({"params": params}, t, X))
    assert jnp.abs(call(0.5) - call(0.0)).max() > 1e-2
    np.testing.assert_array_equal(call(0.5), call(jnp.full(2, 0.5)))
