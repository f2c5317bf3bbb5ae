"""Losses of tokens: against sums over all tokens, against the rates, at their ends, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import each_at, each_bound

from fm_jax import losses, rates, sources, times
from fm_jax.conditions import DropCondition
from fm_jax.couplings import ExactOT, paired
from fm_jax.losses import tokens as of_tokens
from fm_jax.oracles.tokens import exact_denoiser, token_posterior, token_table, with_mask
from fm_jax.paths import AffinePath, MetricPath, MixturePath
from fm_jax.schedules import Linear, Polynomial, coefficients

Q4 = np.array([0.55, 0.25, 0.15, 0.05])
Q = np.array([[0.30, 0.05, 0.02], [0.02, 0.20, 0.13], [0.10, 0.05, 0.13]])
SOURCES = {
    "mask": sources.Masked(4, 3),
    "uniform": sources.UniformTokens(3),
    "any": sources.Categorical((0.6, 0.3, 0.1)),
    "one never drawn": sources.Categorical((0.6, 0.4, 0.0)),
}
MAKE = {
    "cross_entropy": (losses.cross_entropy, of_tokens.cross_entropy_of),
    "masked_elbo": (losses.masked_elbo, of_tokens.masked_elbo_of),
    "generalized_kl": (losses.generalized_kl, of_tokens.generalized_kl_of),
    "reversal_elbo": (losses.reversal_elbo, of_tokens.reversal_elbo_of),
}
ON_ALL = [(name, source) for name in MAKE for source in SOURCES if name != "masked_elbo" or source == "mask"]
every_loss = pytest.mark.parametrize(("name", "source"), ON_ALL)
KEY = jax.random.key(0)
X1 = jnp.ones((2, 3), int)
MASKED = MixturePath(Linear(), SOURCES["mask"])


def path_of(source, schedule=None):
    return MixturePath(Linear() if schedule is None else schedule, SOURCES[source])


def table_of(q, path):
    return token_table(q) if path.source.mask is None else with_mask(token_table(q))


def entropy(q):
    return -(q * np.log(q)).sum()


def network(params, t, x, cond, *, train, rngs):
    """The same logits [K] for every token."""
    return jnp.broadcast_to(params, (*x.shape, len(params)))


class Seen:
    """A network of fixed logits that depend on the tokens, and what it was last given."""

    def __init__(self, k):
        self.table = jnp.asarray(np.random.default_rng(0).normal(size=(k, k)).astype(np.float32))

    def __call__(self, params, t, x, cond, *, train, rngs):
        self.t, self.x, self.cond, self.train, self.rngs = t, x, cond, train, rngs
        return params * self.table[x]


# ---- Bounds, in full.


@pytest.mark.parametrize("schedule", [Linear(), Polynomial(2.0)], ids=str)
def test_which_bounds_are_tight(schedule, x64):
    """One token of four with the exact posterior: the entropy, but for the forward rates of a uniform source."""
    masked, uniform = MixturePath(schedule, sources.Masked(5, 4)), MixturePath(schedule, sources.UniformTokens(4))
    for path, integrand, expected in (
        (masked, of_tokens.masked_elbo_of, 1.10974),
        (masked, of_tokens.generalized_kl_of, 1.10974),
        (masked, of_tokens.reversal_elbo_of, 1.10974),
        (uniform, of_tokens.reversal_elbo_of, 1.10974),
        (uniform, of_tokens.generalized_kl_of, 1.44081),
    ):
        table = table_of(Q4, path)
        each = each_bound(integrand, path, table, exact_denoiser(table, path))
        assert abs(table.probs @ each - expected) < 5e-6
        if expected == 1.10974:  # of each token too
            np.testing.assert_allclose(each, -np.log(Q4), atol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
def test_of_two_dependent_tokens(source, x64):
    path = path_of(source)
    table = table_of(Q, path)
    each = each_bound(of_tokens.reversal_elbo_of, path, table, exact_denoiser(table, path))
    np.testing.assert_allclose(each, -np.log(table.probs), atol=1e-6)
    forward = table.probs @ each_bound(of_tokens.generalized_kl_of, path, table, exact_denoiser(table, path))
    assert (forward > entropy(Q) + 0.05) == (source != "mask")


@pytest.mark.slow_but_one
@pytest.mark.parametrize("t", [0.2, 0.7])
@every_loss
def test_the_minimiser_is_the_posterior(name, source, t, x64):
    """The gradient by all logits of all states vanishes there, and not beside it."""
    path = path_of(source)
    table, integrand = table_of(Q, path), MAKE[name][1]
    k = table.num_tokens

    @jax.jit
    @jax.grad
    def gradient(logits):  # [K^D, D, K]
        return each_at(integrand, path, table, t, lambda x: logits[k * x[:, 0] + x[:, 1]]) @ table.probs

    states = np.argwhere(np.ones((k, k)))
    with np.errstate(divide="ignore"):
        best = np.log(token_posterior(table, path, t, states))
    best = np.where(np.isfinite(best), best, -50.0)  # of the mask, and of what is known to be data
    assert np.abs(gradient(best)).max() < 1e-12
    assert np.abs(gradient(best + np.linspace(0, 1, k))).max() > 1e-3


def test_cross_entropy_on_a_metric_path(x64):
    path, table = MetricPath(np.abs(np.arange(3)[:, None] - np.arange(3))), token_table(Q)

    @jax.jit
    @jax.grad
    def gradient(logits):
        each = each_at(of_tokens.cross_entropy_of, path, table, 0.3, lambda x: logits[3 * x[:, 0] + x[:, 1]])
        return each @ table.probs

    best = np.log(token_posterior(table, path, 0.3, np.argwhere(np.ones((3, 3)))))
    assert np.abs(gradient(best)).max() < 1e-12
    found = jax.jit(losses.cross_entropy(network, path))(jnp.zeros(3), KEY, {"x1": jnp.ones((4, 5), int)})[0]
    np.testing.assert_allclose(found, np.log(3), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^path must be a MixturePath, .* has no 'schedule'"):
        losses.reversal_elbo(network, path)


# ---- The losses themselves.


@pytest.mark.slow_but_one
@every_loss
def test_value_by_the_rates(name, source):
    """What the loss says of the tokens that the network was given, in NumPy, by the rates of `fm_jax.rates`."""
    path, seen = path_of(source, Polynomial(2.0)), Seen(SOURCES[source].num_tokens)
    x1, t, weight = np.arange(12).reshape(4, 3) % 3, np.array([0.1, 0.4, 0.7, 0.9]), np.array([0.5, 1.0, 1.5, 1.0])
    loss, metrics = MAKE[name][0](seen, path)(1.0, KEY, {"x1": x1, "t": t, "weight": weight})
    x, log_p = np.asarray(seen.x), np.asarray(path.log_posterior(seen.table[seen.x], seen.x), np.float64)
    log_right = np.take_along_axis(log_p, x1[..., None], axis=-1)[..., 0]
    _, sigma, d_alpha, _ = (np.asarray(each, np.float64)[:, None] for each in coefficients(path.schedule, jnp.array(t)))
    if name == "cross_entropy":
        each = -log_right
    elif name == "masked_elbo":
        each = np.where(x == 3, d_alpha / sigma * -log_right, 0)
    else:
        of = rates.forward_rates if name == "generalized_kl" else rates.reversal_rates
        sure = jnp.where(jax.nn.one_hot(x1, path.num_tokens) > 0, 0, -jnp.inf)
        u, u_network = (
            np.asarray(of(lambda t, x, logits=logits: logits, path)(t, seen.x), np.float64)
            for logits in (sure, seen.table[seen.x])
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            each = (u_network - u + np.where(u > 0, u * np.log(u / u_network), 0)).sum(axis=-1)
    np.testing.assert_allclose(loss, (weight * each.mean(axis=1)).mean(), rtol=1e-4)
    assert metrics["loss"] == loss
    open_ = x != x1
    assert 0 < open_.sum() < open_.size
    np.testing.assert_allclose(metrics["cross_entropy"], -log_right[open_].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (log_p.argmax(axis=-1) == x1)[open_].mean(), rtol=1e-6)


def test_where_all_tokens_are_known_the_metrics_are_0():
    loss, metrics = losses.cross_entropy(network, MASKED)(
        jnp.zeros(4), KEY, {"x1": jnp.ones((2, 3), int), "t": np.ones(2)}
    )
    assert [float(each) for each in (loss, *metrics.values())] == [0.0] * 4


ENDS = np.array([0.0, 1e-30, 1e-7, 0.5, 1 - 2.0**-24, 1.0], np.float32)


@pytest.mark.slow_but_one
@every_loss
def test_finite_at_all_times(name, source):
    """The value and its gradient: at both ends, at a token of which the network thinks nothing, or is sure of."""
    batch = {"x1": np.tile(np.arange(3), (len(ENDS), 20)), "t": ENDS}
    logits = jnp.zeros((5, SOURCES[source].num_tokens)).at[:, 1].set(np.array([0.0, -200.0, -1e9, 200.0, 1e9]))

    made = [
        MAKE[name][0](network, path_of(source, schedule)) for schedule in (Linear(), Polynomial(2.0), Polynomial(3.0))
    ]
    found = [jax.vmap(jax.value_and_grad(each, has_aux=True), (0, None, None)) for each in made]
    for (loss, metrics), gradient in jax.jit(lambda: [each(logits, KEY, batch) for each in found])():
        assert np.isfinite(gradient).all()
        assert all(np.isfinite(each).all() for each in (loss, *metrics.values()))


@pytest.mark.parametrize("name", ["generalized_kl", "reversal_elbo"])
def test_at_the_end_nothing_is_left_to_say(name):
    loss_fn = jax.jit(MAKE[name][0](network, path_of("uniform")))
    assert loss_fn(jnp.arange(3.0), KEY, {"x1": X1, "t": jnp.ones(2)})[0] == 0


def test_at_the_start_the_reversal_is_its_limit(x64):
    """Beside a uniform source nothing is left at t = 0; of a mask the cross entropy is."""
    batch = {"x1": jnp.ones((1, 5), int)}
    for source, factor in (("uniform", 0.0), ("any", 0.0), ("mask", 1.0)):
        path = path_of(source)
        params = jnp.arange(1.0, 1 + path.num_tokens)
        found = jax.jit(lambda t, path=path: losses.reversal_elbo(network, path)(params, KEY, {**batch, "t": t})[0])  # noqa: B023
        expected = -jax.nn.log_softmax(params[:3])[1] * factor
        np.testing.assert_allclose(found(jnp.zeros(1)), expected, atol=1e-12)
        np.testing.assert_allclose(found(jnp.full(1, 1e-6)), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["generalized_kl", "reversal_elbo"])
def test_of_a_mask_they_are_the_masked_elbo(name):
    batch, params = {"x1": np.arange(40).reshape(8, 5) % 3}, jnp.arange(4.0)
    one, other = (jax.jit(make(network, MASKED)) for make in (losses.masked_elbo, MAKE[name][0]))
    np.testing.assert_allclose(one(params, KEY, batch)[0], other(params, KEY, batch)[0], rtol=1e-5)


def test_times_are_stratified():
    seen, num = Seen(3), 64
    batch = {"x1": jnp.zeros((num, 2), int)}
    losses.cross_entropy(seen, path_of("uniform"))(1.0, KEY, batch)
    np.testing.assert_array_equal(np.floor(np.asarray(seen.t) * num), np.arange(num))
    losses.reversal_elbo(seen, path_of("uniform"))(1.0, KEY, batch)
    np.testing.assert_array_equal(np.floor(np.asarray(seen.t) * num / 0.999), np.arange(num))
    losses.cross_entropy(seen, path_of("uniform"), time_sampler=times.Uniform(0.2, 0.3))(1.0, KEY, batch)
    assert ((seen.t >= 0.2) & (seen.t <= 0.3)).all()
    with pytest.raises(ValueError, match=r"^time_sampler draws from \[0.0, 1.0\], but the loss on .* \[1e-05, 1.0\]"):
        losses.masked_elbo(network, path_of("mask", Polynomial(0.5)), time_sampler=times.Uniform())
    losses.cross_entropy(network, path_of("mask", Polynomial(0.5)), time_sampler=times.Uniform())


@pytest.mark.slow_but_one
@pytest.mark.parametrize("event", [(), (6,), (2, 3), (1, 2, 3)])
def test_events_of_any_rank(event):
    """A loss of masks at one time does not see how tokens are arranged."""
    x1, t = jnp.ones((2, *event), int), jnp.zeros(2)
    loss, _ = jax.jit(losses.masked_elbo(network, MASKED))(jnp.arange(4.0), KEY, {"x1": x1, "t": t})
    np.testing.assert_allclose(loss, -jax.nn.log_softmax(jnp.arange(3.0))[1], rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.int8])
def test_integers_of_all_kinds(dtype):
    """Also those that have no room for the mask."""
    path, x1 = MixturePath(Linear(), sources.Masked(300, 299)), np.arange(6, dtype=dtype).reshape(2, 3)
    loss, _ = losses.cross_entropy(network, path)(jnp.zeros(300), KEY, {"x1": x1, "t": jnp.zeros(2)})
    np.testing.assert_allclose(loss, np.log(299), rtol=1e-6)


def test_pairs_of_optimal_transport():
    """Each token of the source is that of the data already, in another order."""
    seen, x1 = Seen(3), np.array([[0, 1], [2, 2], [1, 0]])
    batch = {"x1": x1, "x0": x1[::-1], "t": np.full(3, 0.5)}
    losses.cross_entropy(seen, path_of("uniform"), coupling=ExactOT())(1.0, KEY, batch)
    np.testing.assert_array_equal(seen.x, x1)


def test_logits_of_bfloat16():
    half = lambda *args, **options: network(*args, **options).astype(jnp.bfloat16)  # noqa: E731
    batch, params = {"x1": np.arange(40).reshape(8, 5) % 3}, jnp.linspace(0.0, 1.1, 4)
    made = [[make(each, MASKED) for each in (half, network)] for make, _ in MAKE.values()]
    for found, expected in jax.jit(lambda: [[each(params, KEY, batch) for each in pair] for pair in made])():
        assert {each.dtype for each in jax.tree.leaves(found)} == {jnp.dtype("float32")}
        np.testing.assert_allclose(found[0], expected[0], rtol=0.02)


def test_x0_conditions_and_dropout_reach_the_network():
    """A prompt: its tokens are there from the start, and cost nothing."""
    seen = Seen(4)
    x1 = np.array([[0, 1, 2, 1]] * 8)
    batch = {"x1": x1, "x0": np.where(np.arange(4) < 2, x1, 3), "t": np.zeros(8), "cond": np.arange(8)}
    drop = DropCondition(0.5, 99)
    loss, metrics = losses.masked_elbo(seen, MASKED, coupling=paired, drop=drop)(1.0, KEY, batch)
    np.testing.assert_array_equal(seen.x, batch["x0"])
    assert seen.train
    assert set(seen.rngs) == {"dropout"}
    assert set(np.asarray(seen.cond)) == {99, *np.arange(8)[np.asarray(seen.cond) != 99]}
    assert 0 < (np.asarray(seen.cond) == 99).sum() < 8
    np.testing.assert_allclose(loss, metrics["cross_entropy"] / 2, rtol=1e-6)
    losses.masked_elbo(seen, MASKED)(1.0, KEY, batch)
    np.testing.assert_array_equal(seen.cond, batch["cond"])


# ---- What they refuse.


def loss_of(make=losses.masked_elbo, apply_fn=network, path=MASKED, params=None, key=KEY, batch=None, **changed):
    params = jnp.zeros(4) if params is None else params
    return make(apply_fn, path)(params, key, {"x1": X1, **changed} if batch is None else batch)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_of(x1=X1 * 1.0), r"^x1 must be tokens, integers from 0 to 3, got float32"),
        (lambda: loss_of(x1=X1 + 3), r"^x1 must be tokens from 0 to 3, got some from 4 to 4"),
        (lambda: loss_of(x1=X1 - 2), r"^x1 must be tokens from 0 to 3, got some from -1 to -1"),
        (lambda: loss_of(x1=X1 + 2), r"^x1 must be data, got 3 in it, the mask of Masked\(num_tokens=4, mask=3\)"),
        (lambda: loss_of(x1=X1 > 0), r"^x1 must be tokens, integers from 0 to 3, got bool"),
        (lambda: loss_of(x1=[[1, 2]]), r"^x1 must be an array, .* got a list"),
        (lambda: loss_of(x1=X1[:0]), r"^x1 must be \[batch, ...\], not empty, got shape \(0, 3\)"),
        (lambda: loss_of(x1=X1[0, 0]), r"^x1 must be \[batch, ...\], got a scalar"),
        (lambda: loss_of(x0=X1 * 0.5), r"^x0 must be tokens, integers from 0 to 3, got float32"),
        (lambda: loss_of(x0=X1 + 3), r"^x0 must be tokens from 0 to 3, got some from 4 to 4"),
        (lambda: loss_of(x0=X1[:1]), r"^x0 and x1 must have"),
        (
            lambda: loss_of(t=jnp.full(2, 1.5)),
            r"^t must be within \[0.0, 1.0\], where the loss on MixturePath.* finite",
        ),
        (lambda: loss_of(t=jnp.array([3, 4])), r"^t must be real numbers from 0, the source, to 1"),
        (lambda: loss_of(batch={"x": X1}), r"^the batch must hold 'x1', got \['x'\]"),
        (lambda: loss_of(batch=X1), r"^the batch must be a dict with 'x1'"),
        (lambda: loss_of(key=None), r"^key must be one typed key, as from jax.random.key\(0\), got None"),
        (lambda: loss_of(key=0), r"^key must be one typed key"),
        (
            lambda: loss_of(params=jnp.zeros(5)),
            r"^what the network returns must be \[2, 3, 4\], .* got shape \(2, 3, 5\)",
        ),
        (
            lambda: loss_of(apply_fn=lambda p, t, x, c, **_: x),
            r"^what the network returns must be \[2, 3, 4\], one for",
        ),
        (
            lambda: loss_of(path=path_of("uniform")),
            r"^path must have a mask, .* got UniformTokens\(num_tokens=3\); reversal",
        ),
        (
            lambda: loss_of(path=AffinePath()),
            r"^path must be a MixturePath.* has no 'num_tokens'",
        ),
        (lambda: losses.cross_entropy(None, MASKED), r"^apply_fn must be a function apply_fn"),
        (lambda: losses.cross_entropy(network, MASKED, coupling="ot"), r"^coupling must be a coupling"),
        (lambda: losses.cross_entropy(network, MASKED, drop=0.1), r"^drop must be a function drop\(key, cond\)"),
        (lambda: losses.cross_entropy(network, MASKED, time_sampler=0.5), r"^time_sampler must be a time sampler"),
    ],
)
def test_wrong_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_traced_is_told_by_its_dtype():
    with pytest.raises(ValueError, match=r"^x1 must be tokens, integers from 0 to 3, got float32"):
        jax.jit(lambda x1: loss_of(x1=x1))(X1 * 1.0)
    assert np.isfinite(jax.jit(lambda x1: loss_of(x1=x1)[0])(X1))


def test_losses_of_numbers_still_refuse_integers():
    scaled = lambda params, t, x, cond, **_: params * x  # noqa: E731
    for name in ("flow_matching", "noise_prediction"):
        with pytest.raises(ValueError, match=r"^x1 must be floating point, got int32"):
            getattr(losses, name)(scaled, AffinePath())(1.0, KEY, {"x1": X1})
        with pytest.raises(ValueError, match=r"^x0 must be floating point, got int32"):
            getattr(losses, name)(scaled, AffinePath())(1.0, KEY, {"x1": X1 * 1.0, "x0": X1})
