"""Words, the encoder that learns them, and a network behind it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import Branched, Controlled, LocalBranch, init_params, linen_apply, make_mmdit
from fm_jax.models.grafting import base_of, with_base
from fm_jax.text import TextConditioned, Tokens, WordEncoder, WordTokenizer

TOKENIZER = WordTokenizer(("a", "red", "seven", "three"), length=6)
ENCODER = WordEncoder(TOKENIZER.vocabulary, 6, hidden=16, num_heads=2, num_layers=2)


def test_words_are_numbered_and_the_empty_text_is_its_end():
    ids, mask = TOKENIZER(["A RED, three!", ""])
    np.testing.assert_array_equal(ids, [[2, 3, 5, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask, ids != 0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a thre", "'thre': did you mean 'three'"),
        ("a dög", "prompt 0 has a word that the network has never seen, 'dög'"),
        ("...", "prompt 0 must have words"),
        ("a red red red red three", "prompt 0 has 7 tokens"),
        (7, "prompts must be a string"),
        ([], "at least one"),
    ],
)
def test_what_is_no_sentence_of_its_words_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        TOKENIZER(prompt)


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "tuple of words"), (("a", "a"), "twice"), (("A",), "lower case"), (("a b",), "one word"), ((1,), "one word")],
)
def test_what_is_no_vocabulary_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        WordTokenizer(words)


@pytest.fixture(scope="module")
def trained():
    """Parameters that are nowhere zero."""
    params = ENCODER.init(jax.random.key(0), *TOKENIZER("a red three"))
    return jax.tree.map(lambda leaf: leaf + 0.1, params)


@pytest.mark.slow
def test_padding_is_not_seen_however_much_there_is(trained):
    ids, mask = TOKENIZER(["a red three"])
    whole = ENCODER.apply(trained, ids, mask)
    noisy = ENCODER.apply(trained, np.where(mask, ids, 4), mask)
    np.testing.assert_array_equal(whole.last[mask], noisy.last[mask])
    np.testing.assert_array_equal(whole.pooled, noisy.pooled)
    short = ENCODER.apply(trained, ids[:, :4], mask[:, :4])
    np.testing.assert_allclose(short.pooled, whole.pooled, atol=1e-6)


def test_the_order_of_words_counts(trained):
    one, other = (ENCODER.apply(trained, *TOKENIZER(text)).pooled for text in ("a red three", "three red a"))
    assert float(jnp.abs(one - other).max()) > 0.01


NETWORK = make_mmdit("tiny", channels=1, hidden=16, num_layers=2, num_heads=2, token_dim=16, vector_dim=16)


def loss_of(model):
    tokens = TOKENIZER(["a red three", "a"])
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    params = init_params(model, jax.random.key(0), (4, 4, 1), TOKENIZER(""))
    # At first the network gives zero whatever it is told.
    params = jax.tree.map(lambda leaf: leaf + 0.05, params)
    apply_fn = linen_apply(model)

    def loss(params, tokens=tokens):
        return (apply_fn(params, jnp.full(2, 0.5), x, tokens, train=True, rngs=None) ** 2).mean()

    return loss, params


@pytest.mark.slow
def test_a_frozen_encoder_gets_no_gradient_and_gives_the_same():
    (joint, params), (frozen, _) = (loss_of(TextConditioned(NETWORK, ENCODER, frozen=each)) for each in (False, True))
    (value, of_joint), (same, of_frozen) = (jax.jit(jax.value_and_grad(each))(params) for each in (joint, frozen))
    assert float(value) == pytest.approx(float(same), rel=1e-6)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(of_joint["encoder"])) > 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_frozen["encoder"]))
    assert abs(float(value) - float(jax.jit(joint)(params, TOKENIZER(["a seven", "a"])))) > 1e-6


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (None, "cond must be Tokens"),
        (jnp.ones((2, 3), int), "cond must be Tokens"),
        (Tokens(np.ones((2, 7), int), np.ones((2, 7), bool)), "at most 6 tokens"),
        (Tokens(np.ones((2, 3), int), np.ones((2, 4), bool)), "mask must be bool"),
        (Tokens(np.full((2, 3), 99), np.ones((2, 3), bool)), "from 0 to 5"),
        (Tokens(np.ones((2, 3), np.float32), np.ones((2, 3), bool)), "ids must be integers"),
    ],
    ids=["none", "ids", "long", "mask", "vocabulary", "dtype"],
)
def test_what_a_tokenizer_does_not_make_is_refused(cond, message):
    model = TextConditioned(NETWORK, ENCODER)
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.zeros(2), jnp.zeros((2, 4, 4, 1)), cond)


@pytest.mark.slow
@pytest.mark.parametrize("make", [Controlled, lambda net, channels: Branched(net, {"local": LocalBranch(channels)})])
def test_a_network_with_its_encoder_takes_branches_and_control(make):
    """They join the network alone, and start as nothing; an encoder is not copied."""
    model, tokens = TextConditioned(NETWORK, ENCODER), TOKENIZER(["a red three", "a"])
    x, t = jax.random.normal(jax.random.key(1), (2, 4, 4, 1)), jnp.full(2, 0.5)
    base = jax.tree.map(lambda leaf: leaf + 0.05, jax.jit(model.init)(jax.random.key(0), t, x, tokens)["params"])
    whole, cond = make(model, 1), {"network": tokens, "local": x}
    params = jax.jit(whole.init)(jax.random.key(0), t, x, cond)["params"]
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert sum("encoder" in name for name in names) == len(jax.tree.leaves(base["encoder"]))
    assert not any("encoder" in name and ("branch_" in name or "control" in name) for name in names)
    params = with_base(params, base)
    jax.tree.map(np.testing.assert_array_equal, base_of(params), base)
    found = jax.jit(lambda params: whole.apply({"params": params}, t, x, cond))
    wanted = jax.jit(lambda params: model.apply({"params": params}, t, x, tokens))(base)
    np.testing.assert_array_equal(found(params), wanted)
    assert np.abs(found(jax.tree.map(lambda leaf: leaf + 0.05, params)) - found(params)).max() > 1e-3


def test_an_id_that_is_none_is_never_another_word(trained):
    """Traced, it cannot be refused."""
    for number in (-1, TOKENIZER.vocabulary):
        ids = jnp.array([[number, 1], [3, 1]])
        last = jax.jit(lambda ids: ENCODER.apply(trained, ids).last)(ids)
        assert np.isnan(last[0]).all()
        assert np.isfinite(last[1]).all()


def test_several_encoders_are_told_by_name():
    model = TextConditioned(NETWORK, {"words": ENCODER, "more": ENCODER})
    with pytest.raises(ValueError, match=r"one for each of 'words', 'more', got Tokens|got a dict of 'words'"):
        model.init(jax.random.key(0), jnp.zeros(1), jnp.zeros((1, 4, 4, 1)), {"words": TOKENIZER("a")})
