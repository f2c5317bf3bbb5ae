"""What each `embed` says of a condition, and of none."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.conditions import null_like
from fm_jax.models import Conditions, LabelEmbedding, TokenEmbedding, VectorEmbedding
from fm_jax.models.embed import add_condition

FEATURES = 5
LABELS = jnp.array([2, 0, 1, 2])
VECTORS = jax.random.normal(jax.random.key(0), (4, 3))
TOKENS = {
    "tokens": jnp.array([[1, 0, 3], [2, 7, 7], [0, 0, 7], [3, 1, -1]]),
    "mask": jnp.array([[True, True, True], [True, False, False], [True, True, False], [True, True, False]]),
}
EMBEDS = {
    "label": (LabelEmbedding(3), LABELS, 3),
    "vector": (VectorEmbedding(3), VECTORS, 0.0),
    "tokens": (TokenEmbedding(4), TOKENS, {"tokens": 0, "mask": False}),
}


def random_params(module):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), None, FEATURES, 4)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), "float32"), shapes)


@pytest.mark.parametrize("name", EMBEDS)
class TestEveryEmbed:
    @pytest.mark.slow_but_one
    def test_float32_of_the_shape_that_was_asked_for(self, name):
        module, cond, _ = EMBEDS[name]
        for given in (cond, None):
            out = module.init_with_output(jax.random.key(0), given, FEATURES, 4)[0]
            assert (out.shape, out.dtype) == ((4, FEATURES), jnp.float32)

    def test_parameters_are_those_that_no_condition_draws(self, name):
        """`init_params` knows no condition."""
        module, cond, _ = EMBEDS[name]
        with_it, without = (module.init(jax.random.key(0), given, FEATURES, 4) for given in (cond, None))
        jax.tree.map(np.testing.assert_array_equal, with_it, without)

    def test_null_cond_is_no_condition_for_one_example(self, name):
        """And every other example keeps its own, which is another one."""
        module, cond, null_cond = EMBEDS[name]
        apply = lambda cond: module.apply({"params": random_params(module)}, cond, FEATURES, 4)  # noqa: E731
        last_dropped = jax.tree.map(lambda leaf, null: leaf.at[3].set(null[3]), cond, null_like(cond, null_cond))
        out, dropped, none = apply(cond), apply(last_dropped), apply(None)
        np.testing.assert_allclose(dropped[3], none[3], rtol=1e-6)
        np.testing.assert_allclose(dropped[:3], out[:3], rtol=1e-6)
        np.testing.assert_array_equal(none, jnp.broadcast_to(none[:1], none.shape))
        assert (jnp.abs(out - none).max(axis=1) > 0.1).all()

    @pytest.mark.slow_but_one
    def test_gradients_are_finite_without_a_condition(self, name):
        module, cond, null_cond = EMBEDS[name]

        def loss(params, cond):
            return (module.apply({"params": params}, cond, FEATURES, 4) ** 2).sum()

        for given in (None, null_like(cond, null_cond)):
            gradient = jax.grad(loss)(random_params(module), given)
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
            assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 0.1


def test_labels_are_rows_the_last_is_none_and_outside_is_nan():
    module, table = LabelEmbedding(3), jnp.arange(8.0).reshape(4, 2)
    look_up = lambda labels: module.apply({"params": {"table": table}}, labels, 2, 4)  # noqa: E731
    np.testing.assert_array_equal(look_up(jnp.array([2, 0, 1, 3])), table[jnp.array([2, 0, 1, 3])])
    np.testing.assert_array_equal(look_up(None), jnp.broadcast_to(table[-1:], (4, 2)))
    outside = jax.jit(look_up)(jnp.array([-1, 4, 0, 1]))
    np.testing.assert_array_equal(jnp.isnan(outside).all(axis=1), [True, True, False, False])
    for labels, got in (([-1, 0, 0, 1], "-1 to 1"), ([0, 4, 0, 1], "0 to 4")):
        with pytest.raises(ValueError, match=f"cond must be from 0 to 3, got {got}"):
            look_up(np.array(labels))


@pytest.mark.parametrize("stddev", [1.0, 0.02])
def test_the_table_starts_as_wide_as_was_asked_for(stddev):
    table = LabelEmbedding(99, stddev).init(jax.random.key(0), None, 100, 1)["params"]["table"]
    # 10,000 draws: five standard errors are 3.5%.
    assert float(table.std()) == pytest.approx(stddev, rel=0.035)


def test_vectors_by_hand():
    module = VectorEmbedding(3)
    params = random_params(module)
    numpy = jax.tree.map(np.asarray, params)
    h = np.asarray(VECTORS) @ numpy["in"]["kernel"] + numpy["in"]["bias"][None]
    h = h / (1 + np.exp(-h))
    expected = h @ numpy["out"]["kernel"] + numpy["out"]["bias"][None]
    np.testing.assert_allclose(module.apply({"params": params}, VECTORS, FEATURES, 4), expected, rtol=1e-4, atol=1e-5)


def test_only_the_zero_vector_is_none():
    """Not one with a zero among its coordinates, nor one near zero; and NaN is not hidden."""
    module, none = VectorEmbedding(2), jnp.array([0.0, 0.0])
    cond = jnp.stack([none, jnp.array([0.0, 1e-3]), jnp.array([jnp.nan, 0.0])])
    out = module.apply({"params": random_params(module)}, cond, FEATURES, 3)
    null = random_params(module)["null"]
    np.testing.assert_array_equal(out[0], null)
    assert jnp.abs(out[1] - null).max() > 0.1
    assert jnp.isnan(out[2]).all()


def test_tokens_are_averaged_and_padding_is_not_read():
    module = TokenEmbedding(4)
    params = random_params(module)
    table = np.asarray(params["table"])
    sets = [[1, 0, 3], [2], [0, 0], [3, 1]]
    expected = np.stack([table[each].mean(axis=0) for each in sets])
    np.testing.assert_allclose(module.apply({"params": params}, TOKENS, FEATURES, 4), expected, rtol=1e-5)
    unmasked = TOKENS | {"mask": jnp.ones((4, 3), bool)}
    out = jax.jit(lambda cond: module.apply({"params": params}, cond, FEATURES, 4))(unmasked)
    np.testing.assert_array_equal(jnp.isnan(out).all(axis=1), [False, True, True, True])


@pytest.mark.parametrize("last", [4, -1])
def test_the_row_of_none_is_no_token(last):
    cond = {"tokens": jnp.array([[last]]), "mask": jnp.array([[True]])}
    module = TokenEmbedding(4)
    params = random_params(module)
    assert jnp.isnan(jax.jit(lambda cond: module.apply({"params": params}, cond, FEATURES, 1))(cond)).all()
    with pytest.raises(ValueError, match=r"cond\['tokens'\] must be from 0 to 3, got "):
        module.apply({"params": params}, cond, FEATURES, 1)


@pytest.mark.parametrize(
    ("build", "cond", "message"),
    [
        (lambda: LabelEmbedding(0), None, "num_classes must be at least 1, got 0"),
        (lambda: LabelEmbedding(3), jnp.ones(4), "cond must hold integer labels, got dtype float32"),
        (lambda: LabelEmbedding(3), LABELS[:3], r"cond must be \[batch\] = \(4,\), got shape \(3,\)"),
        (lambda: LabelEmbedding(3), LABELS[:, None], r"cond must be \[batch\] = \(4,\), got shape \(4, 1\)"),
        (lambda: VectorEmbedding(0), None, "dim must be at least 1, got 0"),
        (lambda: VectorEmbedding(2), VECTORS, r"cond must be \[batch, dim\] = \(4, 2\), got shape \(4, 3\)"),
        (lambda: VectorEmbedding(3), VECTORS > 0, "cond must hold real numbers, got dtype bool"),
        (lambda: TokenEmbedding(0), None, "num_tokens must be at least 1, got 0"),
        (lambda: TokenEmbedding(4), LABELS, "cond must be a dict of 'tokens' and 'mask', got ArrayImpl"),
        (
            lambda: TokenEmbedding(4),
            {"tokens": LABELS},
            r"cond must be a dict of 'tokens' and 'mask', got \['tokens'\]",
        ),
        (
            lambda: TokenEmbedding(4),
            TOKENS | {"tokens": VECTORS},
            r"cond\['tokens'\] must hold integer tokens, got dtype float32",
        ),
        (
            lambda: TokenEmbedding(4),
            TOKENS | {"mask": jnp.ones((4, 3))},
            r"cond\['mask'\] must be bool, got dtype float32",
        ),
        (
            lambda: TokenEmbedding(4),
            TOKENS | {"mask": jnp.ones((4, 2), bool)},
            r"tokens and mask must both be \[batch, n\] = \(4, n\), got shapes \(4, 3\), \(4, 2\)",
        ),
    ],
)
def test_refuses(build, cond, message):
    with pytest.raises(ValueError, match=message):
        build().init(jax.random.key(0), cond, FEATURES, 4)


class Joined(nn.Module):
    """An `embed` of one's own that reads two fields."""

    reads = ("label", "vector")

    def __call__(self, cond, features, batch_size):
        return jnp.ones((batch_size, features)) * (cond["label"][:, None] + cond["vector"].sum(axis=1, keepdims=True))


class Plain(nn.Module):
    """An `embed` of one's own that does not say what it reads."""

    def __call__(self, cond, features, batch_size):
        return jnp.ones((batch_size, features)) * (0 if cond is None else cond[:, None])


@pytest.mark.parametrize("name", EMBEDS)
def test_of_conditions_an_embed_reads_its_fields(name):
    module, cond, _ = EMBEDS[name]
    told = Conditions(**cond) if name == "tokens" else Conditions(**{name: cond})
    params, emb = random_params(module), jnp.ones((4, FEATURES))
    call = nn.apply(lambda module, cond: add_condition(emb, module, cond), module)
    np.testing.assert_array_equal(call({"params": params}, told), call({"params": params}, cond))
    np.testing.assert_array_equal(call({"params": params}, Conditions()), call({"params": params}, None))
    beside = told._replace(guidance=jnp.ones(4))
    with pytest.raises(ValueError, match=f"cond must have no guidance: embed reads {' and '.join(told_names(told))}"):
        call({"params": params}, beside)
    taken = nn.apply(lambda module, cond: add_condition(emb, module, cond, ("guidance",)), module)
    np.testing.assert_array_equal(taken({"params": params}, beside), call({"params": params}, cond))


def told_names(cond):
    return [name for name, value in cond._asdict().items() if value is not None]


def test_an_embed_of_ones_own_reads_what_it_says_and_else_the_label():
    told, emb = Conditions(label=LABELS, vector=VECTORS), jnp.zeros((4, FEATURES))
    np.testing.assert_allclose(add_condition(emb, Joined(), told)[:, 0], LABELS + VECTORS.sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(add_condition(emb, Plain(), Conditions(label=LABELS))[:, 0], LABELS)
    with pytest.raises(ValueError, match="cond must have no vector: embed reads label"):
        add_condition(emb, Plain(), told)
    with pytest.raises(ValueError, match=r"cond must have no vector, no label: the model is unconditional"):
        add_condition(emb, None, told)
    assert add_condition(emb, None, Conditions()) is emb
