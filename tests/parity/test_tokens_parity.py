"""Rates and generalised KL divergence of tokens, the same as those of the package `flow_matching`, in float64.

Only its public functions are called. See "Parity with PyTorch peers" in CONTRIBUTING.md for the environment.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.losses.tokens import generalized_kl_of
from fm_jax.paths import MixturePath
from fm_jax.rates import forward_rates
from fm_jax.schedules import Linear, Polynomial
from fm_jax.sources import UniformTokens
from fm_jax.types import TokenSample

pytestmark = pytest.mark.parity

DOUBLE = 1e-12
NUM = 20
# Our schedule, and the name and arguments of the peer's.
SCHEDULERS = [
    (Linear(), "CondOTScheduler", {}),
    (Polynomial(2.0), "PolynomialConvexScheduler", {"n": 2.0}),
    (Polynomial(3.0), "PolynomialConvexScheduler", {"n": 3.0}),
]


class Case:
    """Tokens, times and logits, drawn by a number, and the paths of both sides; skips where there is no peer."""

    def __init__(self, number):
        reason = "flow_matching is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md"
        self.peer = pytest.importorskip("flow_matching", reason=reason)
        path, scheduler = (pytest.importorskip(f"flow_matching.{name}") for name in ("path", "path.scheduler"))
        rng = np.random.default_rng(number)
        schedule, name, options = SCHEDULERS[number % len(SCHEDULERS)]
        k, event = int(rng.integers(2, 12)), tuple(rng.integers(1, 6, size=number % 3))
        self.t = rng.uniform(0.01, 0.99, size=5)
        self.logits = rng.normal(scale=4.0, size=(5, *event, k))
        self.x, self.x1 = rng.integers(k, size=(2, 5, *event))
        self.x = np.where(rng.random(self.x.shape) < 0.3, self.x1, self.x)
        self.ours = MixturePath(schedule, UniformTokens(k))
        self.theirs = path.MixtureDiscreteProbPath(getattr(scheduler, name)(**options))


def tensor(x):
    return pytest.importorskip("torch").from_numpy(np.array(x))


def assert_close(ours, theirs):
    """To 1e-12 of the number, or of the largest where numbers cancel."""
    theirs = theirs.numpy()
    assert ours.dtype == theirs.dtype == np.float64
    assert np.isfinite(theirs).all(), "a comparison with inf or nan proves nothing"
    assert np.abs(theirs).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, rtol=DOUBLE, atol=DOUBLE * np.abs(theirs).max())


@pytest.mark.parametrize("number", range(NUM))
def test_rates(number, x64):
    """The peer's velocity has the rate of staying too, minus the sum of the others."""
    case = Case(number)
    rates = np.asarray(forward_rates(lambda t, x: jnp.asarray(case.logits), case.ours)(case.t, jnp.asarray(case.x)))
    here = np.eye(case.ours.num_tokens)[case.x]
    theirs = case.theirs.posterior_to_velocity(tensor(case.logits), tensor(case.x), tensor(case.t))
    assert_close(rates - here * rates.sum(axis=-1, keepdims=True), theirs)


@pytest.mark.parametrize("number", range(NUM))
def test_generalised_kl(number, x64):
    case = Case(number)
    loss = pytest.importorskip("flow_matching.loss").MixturePathGeneralizedKL(case.theirs, reduction="none")
    theirs = loss(tensor(case.logits), tensor(case.x1), tensor(case.x), tensor(case.t))
    sample = TokenSample(jnp.asarray(case.t), *map(jnp.asarray, (case.x, case.x, case.x1)))
    log_posterior = case.ours.log_posterior(jnp.asarray(case.logits), sample.x_t)
    assert_close(np.asarray(generalized_kl_of(case.ours, sample, log_posterior)), theirs)
