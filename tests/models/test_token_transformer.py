"""A transformer over tokens: integers in, times as they are, a mask that is never data, and no look ahead if causal."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_networks import drawn

from fm_jax.losses import masked_elbo
from fm_jax.models import (
    Compute,
    LabelEmbedding,
    TokenTransformer,
    forward_flops,
    init_params,
    linen_apply,
    make_token_transformer,
    num_params,
    stack_layers,
)
from fm_jax.models.layers import TimeEmbedding
from fm_jax.paths import MixturePath
from fm_jax.schedules import Linear
from fm_jax.self_conditioning import self_conditioned
from fm_jax.sources import Masked

K, MASK, LENGTH, CLASSES = 6, 5, 7, 3
X = jax.random.randint(jax.random.key(0), (3, LENGTH), 0, K)
T = jnp.array([0.2, 0.5, 0.9])
LABELS = jnp.array([0, 2, CLASSES])
DATA = np.array([token for token in range(K) if token != MASK])


def make(**options):
    small = {"mask": MASK, "hidden": 16, "num_layers": 2, "num_heads": 2, "embed": LabelEmbedding(CLASSES)}
    return TokenTransformer(K, **(small | options))


def shapes(module, length=LENGTH):
    return jax.eval_shape(module.init, jax.random.key(0), T[:1], jax.ShapeDtypeStruct((1, length), jnp.int32))["params"]


@functools.cache
def trained():
    """Parameters none of which are zero: those of every module here, but for its layout."""
    return drawn(shapes(make(scan_layers=False)))


@functools.cache
def field_of(**options):
    module = make(**options)
    params = trained() if options.get("scan_layers") is False else stack_layers(trained())
    return jax.jit(lambda t, x, cond=None: module.apply({"params": params}, t, x, cond))


def finite_parts(*logits):
    return [each[..., DATA] for each in logits]


def test_the_mask_is_never_data_and_all_else_may_be():
    out = field_of()(T, X, LABELS)
    assert out.shape == (3, LENGTH, K)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(jnp.isneginf(out), jnp.broadcast_to(jnp.arange(K) == MASK, out.shape))
    assert jnp.isfinite(out[..., DATA]).all()
    assert jnp.isfinite(field_of(mask=None)(T, X, LABELS)).all()


def test_begins_with_all_data_equally_likely_in_float32():
    module = make()
    params = init_params(module, jax.random.key(0), (LENGTH,))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.nn.softmax(module.apply({"params": params}, T, X), axis=-1)
    np.testing.assert_allclose(out, jnp.where(jnp.arange(K) == MASK, 0.0, 1 / (K - 1))[None, None] + 0 * out, atol=1e-6)


def test_gradients_of_a_cross_entropy_are_finite():
    module, params = make(), stack_layers(trained())

    @jax.jit
    def gradient(params):
        def loss(params):
            log_p = jax.nn.log_softmax(module.apply({"params": params}, T, jnp.full_like(X, MASK), LABELS), axis=-1)
            return -jnp.take_along_axis(log_p, X[..., None] % MASK, axis=-1).mean()

        return jax.value_and_grad(loss)(params)

    value, found = gradient(params)
    assert jnp.isfinite(value)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        assert jnp.isfinite(leaf).all(), jax.tree_util.keystr(path)
        assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    np.testing.assert_array_equal(found["out"]["kernel"][:, MASK], 0)


@pytest.mark.parametrize("causal", [True, False])
def test_a_causal_network_does_not_see_later_tokens(causal):
    """And an ordinary one does, at every place."""
    field = field_of(causal=causal)
    (out,) = finite_parts(field(T, X, LABELS))
    for place in range(LENGTH):
        (other,) = finite_parts(field(T, X.at[:, place].set((X[:, place] + 1) % K), LABELS))
        moved = np.abs(other - out).max(axis=(0, 2))
        assert (moved[place:] > 1e-3).all()
        assert (moved[:place] == 0).all() if causal else (moved[:place] > 1e-3).all()


def test_positions_are_relative_and_any_length_will_do():
    """Rotary: what is around a token counts, not where in the sequence that is."""
    field = field_of(causal=True)
    (short, long) = finite_parts(field(T, X[:, :4], LABELS), field(T, X, LABELS))
    np.testing.assert_allclose(long[:, :4], short, atol=1e-5)
    swapped = field_of()(T, X[:, ::-1], LABELS)[:, ::-1]
    assert np.abs(swapped - field_of()(T, X, LABELS))[..., DATA].max() > 1e-2


def test_places_of_their_own_tell_where_a_token_is():
    """Where all tokens are alike, rotary positions do not, but through how many there are on each side."""
    module = make(length=LENGTH, num_layers=1, embed=None)
    params = drawn(shapes(module))
    assert params["places"].shape == (LENGTH, 16)
    assert "places" not in shapes(make())
    alone = jax.jit(
        lambda places: module.apply({"params": params | {"places": places}}, 0.5, jnp.full((1, LENGTH), MASK))
    )
    (out, without) = finite_parts(alone(params["places"]), alone(jnp.zeros((LENGTH, 16))))
    assert np.abs(out[0, 1:] - out[0, :1]).max(axis=1).min() > 1e-2
    np.testing.assert_allclose(without[0, 1:], np.repeat(without[0, :1], LENGTH - 1, axis=0), atol=1e-5)


@pytest.mark.slow
def test_the_time_is_seen_as_it_is_given():
    """Not in the dtype of the tokens, in which it would be 0."""
    seen = []

    def look(call, args, kwargs, context):
        seen.extend(args if type(context.module) is TimeEmbedding and context.method_name == "__call__" else ())
        return call(*args, **kwargs)

    module, params = make(), stack_layers(trained())
    with nn.intercept_methods(look), jax.disable_jit():
        for t in (T, 0.5):
            module.apply({"params": params}, t, X)
    np.testing.assert_array_equal(seen[0], T)
    np.testing.assert_array_equal(seen[1], np.full(3, 0.5))
    assert {each.dtype for each in seen} == {jnp.dtype("float32")}


@pytest.mark.parametrize("timed", [True, False])
def test_time_matters_to_a_timed_network_alone(timed):
    field = field_of(timed=timed)
    out, other = finite_parts(field(T, X, LABELS), field(T.at[0].add(0.3), X, LABELS))
    assert (np.abs(other - out)[0].max() > 1e-2) == timed
    np.testing.assert_allclose(other[1:], out[1:], atol=1e-5)
    (zero,) = finite_parts(field_of()(0.0, X, LABELS))
    if not timed:
        np.testing.assert_allclose(out, zero, atol=1e-5)


def test_depends_on_label_and_tokens_of_its_own_example():
    field = field_of()
    (out,) = finite_parts(field(T, X, LABELS))
    for others in ((T, X, LABELS.at[0].add(1)), (T, X.at[0, 2].set((X[0, 2] + 1) % K), LABELS)):
        (other,) = finite_parts(field(*others))
        assert np.abs(other - out)[0].max() > 1e-2
        np.testing.assert_allclose(other[1:], out[1:], atol=1e-5)
    null = jnp.full(3, CLASSES)
    np.testing.assert_allclose(*finite_parts(field(T, X, None), field(T, X, null)), atol=1e-5)


ESTIMATE = jax.random.dirichlet(jax.random.key(6), jnp.ones(K), (3, LENGTH))


def told(params, estimate, x=X):
    """The logits of a self-conditioned network, for data."""
    module = make(self_conditioned=True)
    (out,) = finite_parts(jax.jit(module.apply)({"params": params}, T, x, LABELS, estimate=estimate))
    return out


def test_an_estimate_adds_the_embedding_that_it_expects():
    """Of x all alike and told for sure: as if the token there had that embedding too; of doubts the mean of these."""
    params = stack_layers(trained()) | drawn({"estimate": {"kernel": jnp.zeros((16, 16))}})
    table, kernel = params["table"], params["estimate"]["kernel"]
    x, sure = jnp.full_like(X, 1), jnp.broadcast_to(jax.nn.one_hot(2, K), (*X.shape, K))
    half = 0.25 * sure + 0.75 * jnp.broadcast_to(jax.nn.one_hot(3, K), sure.shape)
    for estimate, expected in ((sure, table[2]), (half, 0.25 * table[2] + 0.75 * table[3])):
        without = {name: each for name, each in params.items() if name != "estimate"}
        (wanted,) = finite_parts(field_of()(T, x, LABELS))
        found = told(params, estimate, x)
        assert np.abs(found - wanted).max() > 1e-2
        without["table"] = table.at[1].add(expected @ kernel)
        (wanted,) = finite_parts(make().apply({"params": without}, T, x, LABELS))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_no_estimate_and_zeros_are_the_network_without_to_the_bit():
    """And at first any estimate is: what is trained without one can be trained on with one."""
    params = stack_layers(trained()) | drawn({"estimate": {"kernel": jnp.zeros((16, 16))}})
    (plain,) = finite_parts(jax.jit(make().apply)({"params": stack_layers(trained())}, T, X, LABELS))
    for estimate in (None, jnp.zeros(ESTIMATE.shape)):
        np.testing.assert_array_equal(told(params, estimate), plain)
    np.testing.assert_array_equal(told(params | {"estimate": {"kernel": jnp.zeros((16, 16))}}, ESTIMATE), plain)
    module = make(self_conditioned=True)
    more = init_params(module, jax.random.key(0), (LENGTH,))
    kernel = more.pop("estimate")["kernel"]
    np.testing.assert_array_equal(kernel, jnp.zeros((16, 16)))
    jax.tree.map(np.testing.assert_array_equal, more, init_params(make(), jax.random.key(0), (LENGTH,)))


def test_it_learns_from_its_estimates():
    """From zero on: of a masked bound the layer of the estimate has a gradient."""
    path, apply_fn = MixturePath(Linear(), Masked(K, MASK)), linen_apply(make(self_conditioned=True))
    loss_fn = masked_elbo(self_conditioned(apply_fn), path)
    params = stack_layers(trained()) | {"estimate": {"kernel": jnp.zeros((16, 16))}}
    gradient = jax.jit(jax.grad(lambda params: loss_fn(params, jax.random.key(0), {"x1": X % MASK, "cond": LABELS})[0]))
    found = gradient(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert jnp.abs(found["estimate"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["plain", "causal"])
def test_a_loop_over_blocks_changes_nothing(options):
    assert jax.tree.map(jnp.shape, stack_layers(trained())) == jax.tree.map(jnp.shape, shapes(make(**options)))
    scanned, unrolled = (field_of(**options, scan_layers=scan)(T, X, LABELS) for scan in (True, False))
    np.testing.assert_allclose(*finite_parts(scanned, unrolled), atol=2e-5)


def test_bfloat16_computes_close_to_float32():
    module = make(compute=Compute("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(module))} == {jnp.dtype("float32")}
    half, exact = field_of(compute=Compute("bfloat16"))(T, X, LABELS), field_of()(T, X, LABELS)
    assert half.dtype == jnp.float32
    half, exact = finite_parts(half, exact)
    assert 1e-5 < np.linalg.norm(half - exact) / np.linalg.norm(exact) < 0.05


def test_dropout_acts_in_training_alone_and_remat_changes_nothing():
    plain, remat = (linen_apply(make(dropout=0.3, compute=Compute(remat=on))) for on in (False, True))
    params, key = stack_layers(trained()), jax.random.key(4)

    def step(apply_fn, key):
        def loss(params):
            (out,) = finite_parts(apply_fn(params, T, X, LABELS, train=True, rngs={"dropout": key}))
            return (out**2).mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    (value, gradient), (again, gradient_again) = step(plain, key), step(remat, key)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again), strict=True):
        np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=1e-4 * float(np.abs(leaf).max()))
    assert abs(step(plain, jax.random.key(5))[0] - value) > 1e-4
    off = plain(params, T, X, LABELS, train=False, rngs=None)
    np.testing.assert_allclose(*finite_parts(off, field_of()(T, X, LABELS)), atol=1e-5)


def test_sizes():
    """`base` is as wide and as deep as GPT-2 small, of 124 million parameters."""
    counts = {
        name: num_params(shapes(make_token_transformer(name, 257, mask=256))) for name in ("tiny", "small", "base")
    }
    assert counts["tiny"] < counts["small"] < counts["base"]
    width, layers = 768, 12
    gated, heads, modulation = 3 * width * 2048, 4 * width**2, 6 * width**2
    assert counts["base"] == pytest.approx(layers * (gated + heads + modulation), rel=0.02)
    assert 124e6 < counts["base"] < 131e6
    flops = forward_flops(make(), (LENGTH,))
    assert flops > 2 * LENGTH * 2 * (4 * 16**2 + 3 * 16 * 42)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.astype(jnp.float32), "x must be tokens, integers from 0 to 5, got float32."),
        (X > 2, "x must be tokens, integers from 0 to 5, got bool."),
        (X.at[0, 0].set(K), "x must be tokens from 0 to 5, got some from 0 to 6."),
        (X.at[0, 0].set(-1), "x must be tokens from 0 to 5, got some from -1 to 5."),
        (X[..., None], "x must be tokens [batch, n], n at least 1, got shape (3, 7, 1)."),
        (X[0], "x must be tokens [batch, n], n at least 1, got shape (7,)."),
        (X[:, :0], "x must be tokens [batch, n], n at least 1, got shape (3, 0)."),
        ([[0, 1]], "x must be an array"),
        (X[:, :4], "x must be tokens [batch, 7], as length=7, got shape (3, 4)."),
    ],
)
def test_refuses_what_is_no_sequence_of_tokens(x, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(length=LENGTH).apply({"params": stack_layers(trained())}, 0.5, x)


@pytest.mark.parametrize(
    ("estimate", "message"),
    [
        (ESTIMATE[..., :-1], "estimate must be [3, 7, 6], one for each token, got shape (3, 7, 5)."),
        (ESTIMATE[:1], "estimate must be [3, 7, 6], one for each token, got shape (1, 7, 6)."),
        (X, "estimate must be [3, 7, 6], one for each token, got shape (3, 7)."),
        (jnp.log(ESTIMATE), "estimate must be probabilities of the tokens, or zeros, got float32 of shape (3, 7, 6)."),
        ([[0.5, 0.5]], "estimate must be an array"),
    ],
)
def test_refuses_what_is_no_estimate(estimate, message):
    """And any without the attribute."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make(self_conditioned=True).apply({"params": stack_layers(trained())}, T, X, estimate=estimate)
    with pytest.raises(ValueError, match="estimate must be None as self_conditioned=False, got"):
        make().apply({"params": stack_layers(trained())}, T, X, estimate=estimate)


def test_a_traced_token_that_is_none_gives_nan_and_no_other_token():
    out = field_of()(T, X.at[0, 0].set(K).at[1, 0].set(-1), LABELS)
    assert jnp.isnan(out[:2][..., DATA]).all()
    assert jnp.isfinite(out[2][..., DATA]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(mask=K), "mask must be from 0 to 5, got 6"),
        (lambda: make(mask=-1), "mask must be from 0 to 5, got -1"),
        (lambda: TokenTransformer(1), "num_tokens must be at least 2, got 1"),
        (lambda: make(hidden=18, num_heads=4), "hidden must be divisible by 2 num_heads = 8"),
        (lambda: make(num_layers=0), "num_layers must be at least 1, got 0"),
        (lambda: make(length=0), "length must be at least 1, got 0"),
        (lambda: make(mlp_hidden=0.5), "mlp_hidden must be an integer, got 0.5"),
        (lambda: make(dropout=2.0), "dropout must be in [0, 1], got 2.0"),
        (lambda: make(timed=1), "timed must be True or False, got 1"),
        (lambda: make(causal=None), "causal must be True or False, got None"),
        (lambda: make(scan_layers=1), "scan_layers must be True or False, got 1"),
        (lambda: make(self_conditioned=1), "self_conditioned must be True or False, got 1"),
        (lambda: make(embed=3), "embed must be None or a Linen module"),
        (lambda: make(compute="bfloat16"), "compute must be a Compute"),
        (lambda: make(embed=None).init(jax.random.key(0), 0.5, X, LABELS), "cond must be None: the model is uncond"),
        (lambda: make().apply({}, jnp.zeros(2), X), "t must be a scalar or [batch] = (3,), got float32 of shape (2,)"),
        (lambda: make(timed=False).apply({}, jnp.zeros(2), X), "t must be a scalar or [batch] = (3,)"),
        (lambda: make_token_transformer("large", 5), "name must be one of 'tiny', 'small', 'base'"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
