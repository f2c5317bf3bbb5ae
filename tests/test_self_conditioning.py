"""A network that is told its own estimate, by hand: what it is told is known to the last digit, in training and after.

Without an estimate it takes tokens for `P`, one law for each place; from an estimate e it makes `e TURN`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import losses
from fm_jax.guidance import classifier_free_logits
from fm_jax.likelihood import token_bound
from fm_jax.logits import top_p, with_temperature
from fm_jax.models import MLP, TokenTransformer, init_params, linen_apply
from fm_jax.nfe import Counted, cost
from fm_jax.oracles import exact_denoiser, token_table, with_mask
from fm_jax.parameterization import bind
from fm_jax.paths import MixturePath
from fm_jax.rates import forward_rates
from fm_jax.samplers import Confidence, FirstHitting, Loop, MixtureSteps, Rescale, TauLeaping, sample
from fm_jax.schedules import Linear
from fm_jax.self_conditioning import estimate_of, no_estimate, self_conditioned
from fm_jax.sources import Masked, UniformTokens

K, MASK, KEY = 4, 3, jax.random.key(0)
PATH = MixturePath(Linear(), Masked(K, MASK))
UNIFORM = MixturePath(Linear(), UniformTokens(K))
P = np.array([[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1]])
TURN = np.array([[0.1, 0.6, 0.2, 0.1], [0.2, 0.1, 0.6, 0.1], [0.6, 0.2, 0.1, 0.1], [0.3, 0.3, 0.3, 0.1]])
RNGS = {"dropout": jax.random.key(7)}
FIRST, SECOND = np.log(P), np.log(P @ TURN)


def network(params, t, x, cond, *, train, rngs, estimate=None):
    estimate = jnp.zeros((*x.shape, K)) if estimate is None else estimate
    none = estimate.sum(axis=-1, keepdims=True) == 0
    return jnp.log(jnp.where(none, P, estimate @ TURN))


def plain(params, t, x, cond, *, train, rngs):
    return jnp.zeros((*x.shape, K))


def masks(num):
    return jnp.full((num, 2), MASK)


def applied(rate=0.5, num=2000, rngs=RNGS, train=True, apply_fn=network):
    f = self_conditioned(apply_fn, rate)
    call = lambda params, rngs: f(params, jnp.zeros(num), masks(num), None, train=train, rngs=rngs)  # noqa: E731
    return jax.jit(call)({}, rngs)


# ---- Training.


@pytest.mark.parametrize("rate", [0.25, 0.5, 1.0])
def test_each_example_is_told_its_own_estimate_at_the_rate(rate):
    """All of an example or nothing of it; how many, to 4 standard errors."""
    out = applied(rate)
    told = np.isclose(out, SECOND, atol=1e-5).all(axis=(1, 2))
    assert np.isclose(out[~told], FIRST, atol=1e-5).all()
    assert abs(told.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / len(told))
    if rate < 1:
        np.testing.assert_array_equal(out, applied(rate))
        other = np.isclose(applied(rate, rngs={"dropout": jax.random.key(8)}), SECOND, atol=1e-5).all(axis=(1, 2))
        both = (told & other).mean()
        assert abs(both - rate**2) < 4 * np.sqrt(rate**2 * (1 - rate**2) / len(told))


def test_a_loss_is_the_mean_over_the_rate():
    """Of a known x1 and masks alone it is one of two numbers for each example: how many are told can be read off it."""
    num, rate = 20_000, 0.3
    batch = {"x1": jnp.tile(jnp.array([[0, 1]]), (num, 1)), "t": jnp.zeros(num)}

    @jax.jit
    def value(key):
        return losses.cross_entropy(self_conditioned(network, rate), PATH)({}, key, batch)[0]

    def alone(logits):
        log_p = logits[:, :MASK] - np.log(np.exp(logits[:, :MASK]).sum(axis=1, keepdims=True))  # the mask is no data
        return -(log_p[0, 0] + log_p[1, 1]) / 2

    share = (float(value(KEY)) - alone(FIRST)) / (alone(SECOND) - alone(FIRST))
    assert abs(share * num - round(share * num)) < 0.2
    assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / num)


def test_out_of_training_all_are_told_and_nothing_is_drawn():
    for rngs in (None, RNGS):
        np.testing.assert_allclose(applied(0.01, 3, rngs, train=False), np.tile(SECOND, (3, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(applied(1.0, 3, None), np.tile(SECOND, (3, 1, 1)), atol=1e-5)


def test_no_gradient_goes_through_the_estimate():
    """It is that of the second evaluation, of an estimate that does not move; with the first it would be another."""
    params = {"a": jnp.array([0.3, -0.2, 0.5, 0.1]), "b": jax.random.normal(KEY, (K, K))}

    def smooth(params, t, x, cond, *, train, rngs, estimate=None):
        return params["a"][None, None] * (1 + x[..., None]) + (0 if estimate is None else estimate @ params["b"])

    def loss(params, apply_fn):
        x = jnp.array([[0, 2], [1, 3]])
        logits = apply_fn(params, jnp.zeros(2), x, None, train=True, rngs=RNGS)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    def second(of, params, t, x, cond, **keywords):
        said = smooth(of(params), t, x, cond, **keywords)
        return smooth(params, t, x, cond, **keywords, estimate=jax.nn.softmax(said))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    found = gradient(params, self_conditioned(smooth, 1.0))
    still, moving = (gradient(params, functools.partial(second, of)) for of in (lambda _: params, lambda each: each))
    for name in params:
        np.testing.assert_allclose(found[name], still[name], atol=1e-6)
    assert np.abs(moving["a"] - still["a"]).max() > 1e-2


def test_no_key_is_used_twice():
    """Neither evaluation gets the key that examples are chosen by, nor that of the other."""
    seen = []

    def looking(params, t, x, cond, *, train, rngs, estimate=None):
        seen.append({name: tuple(jax.random.key_data(key).tolist()) for name, key in rngs.items()})
        return network(params, t, x, cond, train=train, rngs=rngs, estimate=estimate)

    given = {"dropout": jax.random.key(7), "other": jax.random.key(8)}
    self_conditioned(looking)({}, jnp.zeros(2), masks(2), None, train=True, rngs=given)
    assert [sorted(each) for each in seen] == [["dropout", "other"]] * 2
    keys = [key for each in seen for key in each.values()]
    keys += [tuple(jax.random.key_data(key).tolist()) for key in given.values()]
    keys += [tuple(jax.random.key_data(jax.random.fold_in(given["dropout"], 0)).tolist())]  # of the choice
    assert len(set(keys)) == len(keys) == 7


def test_a_training_step_costs_one_forward_evaluation_more():
    """Not the backward one of the first evaluation too: what has no gradient is not derived."""
    model = TokenTransformer(
        K, mask=MASK, hidden=32, num_layers=2, num_heads=2, scan_layers=False, self_conditioned=True
    )
    f, params = linen_apply(model), init_params(model, KEY, (8,))
    batch = {"x1": jnp.zeros((4, 8), int)}

    def flops(apply_fn):
        loss_fn = losses.masked_elbo(apply_fn, PATH)
        step = jax.jit(jax.grad(lambda params: loss_fn(params, KEY, batch)[0]))
        return step.lower(params).compile().cost_analysis()["flops"]

    def forward(params):
        return f(params, jnp.zeros(4), batch["x1"], None, train=False, rngs=None)

    once = jax.jit(forward).lower(params).compile().cost_analysis()["flops"]
    without, both = flops(f), flops(self_conditioned(f))
    assert 0.7 * once < both - without < 1.5 * once, (once, without, both)


# ---- One denoiser, at two evaluations.


def test_a_bound_is_that_of_what_it_says_the_second_time():
    """Told nothing it knows nothing, told something it is the exact posterior: the bound is the exact one's."""
    table = with_mask(token_table([[0.3, 0.1], [0.2, 0.4]]))
    path = MixturePath(Linear(), Masked(3, 2))
    exact = exact_denoiser(table, path)

    def late(params, t, x, cond, *, train, rngs, estimate=None):
        return jnp.zeros((*x.shape, 3)) if estimate is None else exact(t, x)

    bound = lambda f: jax.jit(lambda x1: token_bound(f, path, KEY, x1, num_times=8).nats)(table.states)  # noqa: E731
    found = bound(bind(self_conditioned(late), {}))
    np.testing.assert_array_equal(found, bound(exact))
    assert np.abs(found - bound(bind(late, {}))).max() > 0.1


@pytest.mark.parametrize("sampler", [MixtureSteps(PATH), FirstHitting(PATH), TauLeaping()], ids=str)
def test_two_evaluations_a_call_are_counted(sampler):
    f = bind(self_conditioned(network), {})
    assert (cost(f), cost(bind(self_conditioned(Counted(network, 3)), {})), cost(bind(network, {}))) == (2, 6, 1)
    v = forward_rates(f, PATH) if isinstance(sampler, TauLeaping) else f
    found = sample(v, masks(2), sampler, times=np.linspace(0, 0.9, 3), key=KEY)
    assert (int(found.calls), int(found.nfe)) == (2, 4)


# ---- The estimate of the step before, at one evaluation.


def recording():
    """A denoiser that looks at x and the estimate, and all that it was told, in order."""
    seen: list = []
    of_place = jax.random.normal(KEY, (1, 4, K))
    of_x = jax.random.normal(jax.random.fold_in(KEY, 1), (1, 1, K))

    def logits(x, estimate):
        return of_place + of_x * x[..., None] + 2 * estimate @ TURN

    def f(t, x, *, estimate=None):
        jax.debug.callback(lambda *told: seen.append(jax.tree.map(np.array, told)), x, estimate, ordered=True)
        return logits(x, estimate)

    def told_next(x, estimate):
        return jax.nn.softmax(logits(x, estimate))

    return Counted(f, 1), seen, told_next


SAMPLERS = [
    (MixtureSteps(PATH, carry_estimate=True), 5),
    (MixtureSteps(UNIFORM, carry_estimate=True), 5),
    (MixtureSteps(PATH, Confidence(Rescale(0.5)), carry_estimate=True), 5),
    (MixtureSteps(PATH, Loop(Rescale(0.5), 0.5, 3), carry_estimate=True), 8),
    (FirstHitting(PATH, carry_estimate=True), 4),
    (FirstHitting(PATH, "confidence", per_step=2, carry_estimate=True), 2),
]


@pytest.mark.parametrize(("sampler", "num"), SAMPLERS, ids=str)
def test_each_step_is_told_what_was_said_in_the_one_before(sampler, num):
    """Zeros in the first; one evaluation a step, and no more."""
    f, seen, told_next = recording()
    draw = jax.jit(lambda x0, key: sample(f, x0, sampler, times=np.linspace(0, 1, 6), key=key))
    x0 = jnp.array([[3, 3, 3, 3], [3, 3, 3, 3], [0, 3, 3, 1]])
    found = draw(x0, KEY) if not isinstance(sampler, FirstHitting) else sample(f, x0, sampler, key=KEY)
    jax.effects_barrier()
    assert len(seen) == num == int(found.calls) == int(found.nfe)
    wanted = np.zeros((3, 4, K))
    for x, estimate in seen:
        np.testing.assert_allclose(estimate, wanted, atol=1e-6)
        wanted = told_next(x, estimate)


def test_what_falls_later_is_what_was_said_later():
    """Said in step i is token i, for sure: it is what falls then."""

    def counting(t, x, *, estimate=None):
        said = jnp.where(estimate.sum(axis=-1) > 0, estimate.argmax(axis=-1) + 1, 0) % MASK
        return jnp.log(jax.nn.one_hot(said, K))

    sampler = MixtureSteps(PATH, carry_estimate=True)
    draw = jax.jit(lambda key: sample(counting, masks(100), sampler, times=5, key=key, trajectory=True).trajectory)
    states = draw(KEY)
    for i in range(5):
        falls = states[i + 1][states[i] == MASK]
        assert set(np.unique(falls)) == {i % MASK, MASK} if i < 4 else {i % MASK}


def test_carrying_nothing_is_what_it_was():
    """To the bit: a denoiser that is told and does not listen."""
    deaf = lambda t, x, *, estimate=None: jnp.broadcast_to(FIRST, (*x.shape, K))  # noqa: E731
    for make in (MixtureSteps, FirstHitting):
        found, told = (sample(deaf, masks(50), make(PATH, carry_estimate=each), key=KEY).x for each in (False, True))
        np.testing.assert_array_equal(found, told)


def test_in_double_precision(x64):
    f, seen, _ = recording()
    sample(f, jnp.full((3, 4), MASK), MixtureSteps(PATH, carry_estimate=True), times=2, key=KEY)
    jax.effects_barrier()
    assert {estimate.dtype for _, estimate in seen} == {np.dtype("float64")}
    assert no_estimate(masks(1), K).dtype == estimate_of(jnp.zeros((1, K), jnp.float32)).dtype == np.dtype("float64")


# ---- Refusals.

CARRYING = MixtureSteps(PATH, carry_estimate=True)
TOLD, TWICE = bind(network, {}), bind(self_conditioned(network), {})
NOT_TOLD = r"denoiser must be a denoiser f\(t, x, \*, estimate=None\), .*, got one with the arguments \(t: .*, x: "
NO_NETWORK = r"apply_fn must be a self-conditioned network .*, got one with the arguments \(params"


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda t, x: FIRST, r"denoiser must be a denoiser f\(t, x, \*, estimate=None\)"),
        (lambda t, x, cond=None: FIRST, r"denoiser must be a denoiser f\(t, x, \*, estimate=None\)"),
        (with_temperature(TOLD, 0.5), NOT_TOLD),
        (top_p(TOLD, 0.5), NOT_TOLD),
        (classifier_free_logits(TOLD, TOLD, 2.0), NOT_TOLD),
        (TWICE, NO_NETWORK),
        (bind(plain, {}), NO_NETWORK),
    ],
)
@pytest.mark.parametrize("sampler", [CARRYING, FirstHitting(PATH, carry_estimate=True)], ids=str)
def test_an_estimate_is_never_dropped(f, message, sampler):
    with pytest.raises(ValueError, match=message):
        sample(f, masks(2), sampler, key=KEY)


MODEL = TokenTransformer(K, mask=MASK, hidden=8, num_layers=1, num_heads=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: self_conditioned(plain), NO_NETWORK),
        (lambda: self_conditioned(self_conditioned(network)), NO_NETWORK),
        (lambda: self_conditioned(MODEL), r"apply_fn must be .*: linen_apply\(module\) makes one of it"),
        (lambda: self_conditioned(network, 0.0), r"rate must be in \(0, 1\], got 0.0"),
        (lambda: self_conditioned(network, 1.5), r"rate must be in \(0, 1\], got 1.5"),
        (lambda: applied(rngs=None), r"rngs must be {'dropout': key}: estimates are given at random"),
        (lambda: applied(apply_fn=lambda *args, train, rngs, estimate=None: jnp.zeros(3)), "what the network returns"),
        (lambda: MixtureSteps(PATH, carry_estimate=1), "carry_estimate must be True or False, got 1"),
        (lambda: FirstHitting(PATH, carry_estimate=1), "carry_estimate must be True or False, got 1"),
        (
            lambda: bind(linen_apply(MODEL), init_params(MODEL, KEY, (2,)))(
                0.5, masks(1), estimate=jnp.zeros((1, 2, K))
            ),
            "estimate must be None as self_conditioned=False",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_module_that_takes_no_estimate_says_so():
    model = MLP(features=(4,))
    f = bind(linen_apply(model), init_params(model, KEY, (2,)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'estimate'"):
        f(jnp.zeros(1), jnp.zeros((1, 2)), estimate=jnp.zeros((1, 2, K)))
