"""Settings that are traced, or JAX arrays: they work inside `jit`, or are refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import guidance, losses, paths, samplers, schedules, sources, times
from fm_jax.parameterization import reschedule, reschedule_domain
from fm_jax.samplers import sample
from fm_jax.schedules import EDM, VE, VP, Cosine, Linear, Polynomial

KEY = jax.random.key(0)
TENTH = jnp.float32(0.05)
X, Y = (jax.random.normal(jax.random.key(seed), (4, 2)) for seed in (0, 1))
TIMES = np.linspace(0.2, 0.8, 3)


def v(t, x):
    return -x


def network(params, t, x, cond, *, train, rngs):
    return params * x


def drawn(sampler):
    return sample(v, X, sampler, times=TIMES, key=KEY if sampler.stochastic else None).x


def loss(**options):
    path = options.pop("path", paths.AffinePath())
    return losses.flow_matching(network, path, **options)(0.5, KEY, {"x0": X, "x1": Y})[0]


WORKS = {
    "weight": (0.5, lambda s: loss(weight=lambda t, kind, schedule: jnp.exp(-s * t))),
    "SNRWeight": (0.5, lambda s: loss(weight=losses.SNRWeight(s), path=paths.AffinePath(VP()))),
    "EDMWeight": (0.5, lambda s: loss(weight=losses.EDMWeight(s))),
    "time_sampler": (0.9, lambda t: loss(time_sampler=times.Uniform(0.0, t))),
    "Rescale": (0.9, lambda t: loss(time_sampler=times.Rescale(times.LogitNormal(), 0.0, t))),
    "LogitNormal": (0.5, lambda s: loss(time_sampler=times.LogitNormal(std=s))),
    "Linear": (0.1, lambda s: loss(path=paths.AffinePath(Linear(s)))),
    "SineSquared": (0.2, lambda s: loss(path=paths.AffinePath(schedules.SineSquared(s)))),
    "source": (2.0, lambda s: loss(path=paths.AffinePath(source=sources.Normal(s)))),
    "BrownianBridge": (0.5, lambda s: loss(path=paths.BrownianBridge(s))),
    "Normal.log_prob": (2.0, lambda s: sources.Normal(s).log_prob(X)),
    "Uniform.log_prob": (5.0, lambda s: sources.Uniform(-s, s).log_prob(X)),
    "start": (40.0, lambda s: paths.start(VE(0.01, s)).scale),
    "start, t0": (0.1, lambda t: paths.start(VE(), t).scale),
    "DDIM, Linear": (0.1, lambda s: drawn(samplers.DDIM(Linear(s)))),
    "UniPC, EDM": (40.0, lambda s: drawn(samplers.UniPC(EDM(s)))),
    "DDIM, VE": (0.02, lambda s: drawn(samplers.DDIM(VE(sigma_min=s)))),
    "DDIM, VP": (15.0, lambda b: drawn(samplers.DDIM(VP(beta_max=b)))),
    "DDIM, VP, both": (0.2, lambda b: drawn(samplers.DDIM(VP(b, 20 * b)))),
    "Churn": (1.0, lambda c: drawn(samplers.Churn(Linear(), c))),
    "PredictorCorrector": (0.5, lambda g: drawn(samplers.PredictorCorrector(Linear(), diffusion=g))),
    "EulerMaruyama": (0.5, lambda g: drawn(samplers.EulerMaruyama(Linear(), g))),
    "interval": (0.4, lambda t: guidance.classifier_free(v, lambda t, x: x, 2.0, interval=(t, 0.9))(0.5, X)),
    "times": (0.8, lambda t: sample(v, X, times=(0.2, t)).x),
    "reschedule": (0.1, lambda s: reschedule(v, Linear(s), Cosine())(0.5, X)),
}


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", WORKS)
def test_a_traced_setting_gives_what_a_number_does(name):
    value, call = WORKS[name]
    np.testing.assert_allclose(jax.jit(call)(value), call(value), rtol=2e-5, atol=2e-6)


REFUSED = {
    "eta": lambda a: drawn(samplers.DDIM(Linear(), a)),
    "n": lambda a: drawn(samplers.DDIM(Polynomial(a))),
    "old_schedule and new_schedule": lambda a: reschedule_domain(Linear(a), Cosine())[0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_be_known_is_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"^{name} must (be known|have known settings)"):
        jax.jit(REFUSED[name])(0.5)


ARRAYS = {
    "DDIM": lambda a: drawn(samplers.DDIM(Linear(), a)),
    "Linear": lambda a: drawn(samplers.DDIM(Linear(a))),
    "SineSquared": lambda a: loss(path=paths.AffinePath(schedules.SineSquared(a))),
    "VE": lambda a: drawn(samplers.DDIM(VE(sigma_min=a))),
    "VP": lambda a: loss(path=paths.AffinePath(VP(a))),
    "Polynomial": lambda a: loss(path=paths.AffinePath(Polynomial(a))),
    "Normal": lambda a: loss(path=paths.AffinePath(source=sources.Normal(a))),
    "ConstantNoise": lambda a: loss(path=paths.StochasticInterpolant(gamma=paths.ConstantNoise(a))),
    "BrownianBridge": lambda a: loss(
        path=paths.BrownianBridge(1.0, a / 10) if isinstance(a, float) else paths.BrownianBridge(1.0, TENTH)
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_setting_that_is_an_array_is_what_its_number_is(name):
    value = jnp.float32(0.5)
    found = jax.jit(lambda: ARRAYS[name](value))()
    np.testing.assert_allclose(found, ARRAYS[name](0.5), rtol=2e-5, atol=2e-6)


def test_values_of_arrays_are_equal_and_hashable():
    for make in (schedules.Linear, schedules.EDM, sources.Normal, losses.MinSNRWeight, times.LogitNormal):
        assert make(jnp.float32(0.5)) == make(0.5)
        assert hash(make(jnp.float32(0.5))) == hash(make(0.5))
