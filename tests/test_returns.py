"""What a function of (t, x) returns goes with it, so that rates, denoisers and causal denoisers are not mixed up."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import losses, rates, schedules, sources
from fm_jax.guidance import classifier_free_logits, classifier_free_rates, predictor, predictor_taylor
from fm_jax.likelihood import any_order_log_prob, next_token_log_prob, token_bound
from fm_jax.logits import top_p, with_temperature
from fm_jax.models import TokenTransformer, init_params, linen_apply
from fm_jax.nfe import Counted, cost, returns_of
from fm_jax.oracles import tokens
from fm_jax.parameterization import bind
from fm_jax.paths import MetricPath, MixturePath
from fm_jax.samplers import FirstHitting, MixtureSteps, TauLeaping, mixture_step, sample, tau_leap
from fm_jax.self_conditioning import self_conditioned

KEY, T = jax.random.key(0), jnp.full(2, 0.5)
PATH = MixturePath(schedules.Linear(), sources.Masked(4, 3))
X0, X1 = jnp.full((2, 3), 3), jnp.zeros((2, 3), int)


def apply_fn(params, t, x, cond, *, train, rngs):
    return jnp.zeros((*x.shape, 4))


def telling(params, t, x, cond, *, train, rngs, estimate=None):
    return jnp.zeros((*x.shape, 4))


def unknown(t, x):
    return jnp.zeros((*x.shape, 4))


def log_prob_fn(t, x):
    return jnp.zeros(len(x))


NETWORK, CAUSAL = bind(apply_fn, {}), bind(losses.one_late(apply_fn, PATH), {})
DENOISERS = {
    "network": NETWORK,
    "tempered": with_temperature(unknown, 0.5),
    "cut": top_p(unknown, 0.5),
    "guided": classifier_free_logits(unknown, NETWORK, 2.0),
    "self-conditioned": bind(self_conditioned(telling), {}),
    "exact": tokens.exact_denoiser(tokens.with_mask(tokens.token_table(np.full((3, 3, 3), 1 / 27))), PATH),
    "jitted": jax.jit(with_temperature(unknown, 0.5)),
    "partial": functools.partial(NETWORK, cond=None),
}
CAUSALS = {
    "bound": CAUSAL,
    "tempered": with_temperature(CAUSAL, 0.5),
    "cut": top_p(CAUSAL, 0.5),
    "guided": classifier_free_logits(unknown, CAUSAL, 2.0),
    "self-conditioned": bind(losses.one_late(self_conditioned(telling), PATH), {}),
    "conditioned late": bind(self_conditioned(losses.one_late(telling, PATH)), {}),
}
RATES = {
    "forward": rates.forward_rates(unknown, PATH),
    "reversal": rates.reversal_rates(unknown, PATH),
    "kinetic": rates.kinetic_rates(unknown, PATH),
    "backward": rates.backward_rates(PATH),
    "corrected": rates.with_corrector(unknown, PATH, 1.0),
    "guided": classifier_free_rates(unknown, unknown, 2.0),
    "predicted": predictor(unknown, log_prob_fn, 2.0),
    "to first order": predictor_taylor(unknown, log_prob_fn, 2.0),
}
TAKE_ANY_ORDER = {
    "FirstHitting": lambda f: sample(f, X0, FirstHitting(PATH), key=KEY),
    "FirstHitting confidence": lambda f: sample(f, X0, FirstHitting(PATH, "confidence"), key=KEY),
    "MixtureSteps": lambda f: sample(f, X0, MixtureSteps(PATH), key=KEY, times=2),
    "mixture_step": lambda f: mixture_step(f, PATH, 0.5, 0.6, X0),
    "forward_rates": lambda f: rates.forward_rates(f, PATH),
    "reversal_rates": lambda f: rates.reversal_rates(f, PATH),
    "kinetic_rates": lambda f: rates.kinetic_rates(f, PATH),
    "token_bound": lambda f: token_bound(f, PATH, KEY, X1),
    "any_order_log_prob": lambda f: any_order_log_prob(f, PATH, KEY, X1),
}
TAKE_CAUSAL = {
    "FirstHitting": lambda f: sample(f, X0, FirstHitting(PATH, "first"), key=KEY),
    "next_token_log_prob": lambda f: next_token_log_prob(f, PATH, X1),
    "with_temperature": lambda f: with_temperature(f, 0.5),
    "top_p": lambda f: top_p(f, 0.5),
    "classifier_free_logits": lambda f: classifier_free_logits(f, unknown, 1.0),
    "classifier_free_logits of none": lambda f: classifier_free_logits(unknown, f, 0.0),
}
TAKE_RATES = {
    "TauLeaping": lambda u: sample(u, X0, TauLeaping(), key=KEY, times=(0.1, 0.5)),
    "tau_leap": lambda u: tau_leap(u, 0.5, 0.6, X0),
    "with_corrector": lambda u: rates.with_corrector(u, PATH, 0.5),
    "classifier_free_rates": lambda u: classifier_free_rates(u, unknown, 1.0),
    "classifier_free_rates of none": lambda u: classifier_free_rates(unknown, u, 0.0),
    "predictor": lambda u: predictor(u, log_prob_fn, 0.0),
    "predictor_taylor": lambda u: predictor_taylor(u, log_prob_fn, 0.0),
    "rate_matrix": lambda u: tokens.rate_matrix(u, 0.5, np.arange(4)[:, None], 4),
    "chain_law": lambda u: tokens.chain_law(u, np.eye(4)[3], np.arange(4)[:, None], 4, t0=0.2, t1=0.5, num_steps=1),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_is_no_rates(name):
    assert returns_of(DENOISERS[name]) in ("prediction", "logits")
    for take in TAKE_RATES.values():
        with pytest.raises(ValueError, match=r"must be rates u\(t, x\), .*, got (a denoiser|what a network predicts)"):
            take(DENOISERS[name])


@pytest.mark.parametrize("name", RATES)
def test_rates_are_no_denoiser(name):
    assert returns_of(RATES[name]) == "rates"
    for take in (TAKE_ANY_ORDER | TAKE_CAUSAL).values():
        with pytest.raises(
            ValueError, match=r"must be a denoiser f\(t, x\) .*, got rates, which a denoiser has become"
        ):
            take(RATES[name])


@pytest.mark.parametrize("name", CAUSALS)
def test_a_causal_denoiser_goes_from_left_to_right_alone(name):
    assert returns_of(CAUSALS[name]) == "next_logits"
    for take in TAKE_ANY_ORDER.values():
        with pytest.raises(ValueError, match=r'a causal denoiser.*FirstHitting\(path, "first"\) draws from it'):
            take(CAUSALS[name])
    for take in TAKE_RATES.values():
        with pytest.raises(ValueError, match="must be rates"):
            take(CAUSALS[name])
    for take in TAKE_CAUSAL.values():
        take(CAUSALS[name])


@pytest.mark.slow
def test_what_does_not_say_serves_as_any():
    assert returns_of(unknown) is None
    for take in (TAKE_ANY_ORDER | TAKE_CAUSAL | TAKE_RATES).values():
        take(unknown)
    for take in (TAKE_ANY_ORDER | TAKE_CAUSAL).values():
        take(NETWORK)
    for take in TAKE_RATES.values():
        take(Counted(NETWORK, 1, returns="rates"))


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("x0", "per_step", "message"),
    [
        ([[3, 3, 3], [3, 0, 3]], 1, "x0 must be masked from some place on .* got tokens after masks"),
        ([[3, 3, 3], [3, 3, 3]], 2, "per_step must be 1 for a causal denoiser"),
        ([[0, 3, 3], [0, 0, 0]], 1, None),
    ],
)
def test_a_causal_denoiser_is_blind_to_what_comes_after(x0, per_step, message, jit):
    x0 = jnp.array(x0)
    draw = lambda key: sample(CAUSAL, x0, FirstHitting(PATH, "first", per_step), key=key).x  # noqa: E731
    draw = jax.jit(draw) if jit else draw
    if message is None:
        assert (draw(KEY)[x0 != 3] == x0[x0 != 3]).all()
        return
    with pytest.raises(ValueError, match=message):
        draw(KEY)


@pytest.mark.parametrize("cost_of", [1, 2])
def test_one_late_costs_what_the_network_costs(cost_of):
    late = losses.one_late(Counted(apply_fn, cost_of) if cost_of > 1 else apply_fn, PATH)
    assert cost(late) == cost(bind(late, {})) == cost_of


def test_one_late_takes_no_estimate_that_the_network_does_not_take():
    with pytest.raises(ValueError, match="apply_fn must be a self-conditioned network"):
        self_conditioned(losses.one_late(apply_fn, PATH))


@pytest.mark.parametrize("path", [PATH, MixturePath(schedules.Linear(), sources.UniformTokens(4))])
@pytest.mark.parametrize(
    "make",
    [
        losses.cross_entropy,
        losses.generalized_kl,
        lambda network, path: losses.reversal_elbo(self_conditioned(network), path),
        losses.one_late,
    ],
)
def test_a_network_with_another_mask_is_refused(make, path):
    network = linen_apply(TokenTransformer(4, mask=1, hidden=8, num_layers=1, num_heads=1, self_conditioned=True))
    message = f"apply_fn must be a network with the mask of {path.source}, got one with mask=1"
    with pytest.raises(ValueError, match=re.escape(message)):
        make(network, path)


@pytest.mark.slow
def test_a_mask_that_is_the_network_own_or_none():
    for mask in (3, None):
        module = TokenTransformer(4, mask=mask, hidden=8, num_layers=1, num_heads=1)
        params = init_params(module, KEY, (3,))
        loss, _ = losses.cross_entropy(linen_apply(module), PATH)(params, KEY, {"x1": X1})
        assert jnp.isfinite(loss)
    with pytest.raises(ValueError, match="got one with mask=3"):
        losses.cross_entropy(
            linen_apply(TokenTransformer(4, mask=3, hidden=8, num_layers=1, num_heads=1)),
            MetricPath(1.0 - np.eye(4)),
        )


def test_returns_is_one_of_them():
    with pytest.raises(ValueError, match="returns must be one of 'prediction', 'logits', 'next_logits', 'rates'"):
        Counted(unknown, 1, returns="score")
