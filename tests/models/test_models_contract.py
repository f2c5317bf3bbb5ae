"""What every vector field promises: `module(t, x, cond)`, float32, zero at first, per example, differentiable."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import MODELS

from fm_jax.models import (
    MLP,
    Compute,
    LabelEmbedding,
    VectorEmbedding,
    forward_flops,
    init_params,
    linen_apply,
    num_params,
)

BATCH, EVENT, CLASSES = 8, (4, 4, 2), 3


class Constant(nn.Module):
    """An `embed` of one vector for all."""

    rows: int

    def __call__(self, cond, features, batch_size):
        return jnp.ones((self.rows, 8))


T = jnp.linspace(0.05, 0.95, BATCH)
X = jax.random.normal(jax.random.key(1), (BATCH, *EVENT))
LABELS = jnp.arange(BATCH) % CLASSES
NULL = jnp.full((BATCH,), CLASSES)
# Compiling is most of the time of these tests, and nothing here runs long.


def trained(module):
    """Parameters as after training: nothing is zero, and activations stay of order one."""
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        values = rng.standard_normal(leaf.shape)
        if leaf.ndim == 1:
            values = 0.2 * values + (path[-1].key == "scale")
        elif path[-1].key == "kernel":
            values = values / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(values, dtype=leaf.dtype)

    shapes = jax.eval_shape(lambda key: module.init(key, T, X)["params"], jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def build(name):
    """Module, parameters and the jitted field."""
    module = MODELS[name](embed=LabelEmbedding(CLASSES))
    field = jax.jit(lambda params, t, x, cond: module.apply({"params": params}, t, x, cond))
    return module, trained(module), field


@pytest.mark.parametrize("name", MODELS)
class TestContract:
    @pytest.mark.slow_but_one
    def test_starts_at_zero_in_float32(self, name):
        module, _, field = build(name)
        initial = init_params(module, jax.random.key(0), EVENT)
        assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
        out = field(initial, T, X, LABELS)
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, jnp.zeros_like(X))

    def test_depends_on_time_label_and_state_of_its_own_example_only(self, name):
        _, params, field = build(name)
        out = field(params, T, X, LABELS)
        others = {
            "t": field(params, T.at[0].add(0.3), X, LABELS),
            "x": field(params, T, X.at[0].add(1.0), LABELS),
            "label": field(params, T, X, LABELS.at[0].add(1)),
            "null": field(params, T, X, LABELS.at[0].set(CLASSES)),
        }
        for other in others.values():
            assert jnp.abs(other - out)[0].max() > 1e-2
            np.testing.assert_allclose(other[1:], out[1:], rtol=1e-5, atol=1e-5)

    @pytest.mark.slow
    def test_no_condition_is_the_null_label_and_a_scalar_time_is_repeated(self, name):
        _, params, field = build(name)
        expected = field(params, jnp.full(BATCH, 0.4), X, NULL)
        np.testing.assert_allclose(field(params, jnp.asarray(0.4), X, None), expected, rtol=1e-4, atol=1e-5)

    def test_parameters_of_time_and_condition_have_their_names(self, name):
        """The parameters of a network without a condition are those of one with, less `embed`."""
        labelled, plain = (
            jax.eval_shape(lambda module=module: module.init(jax.random.key(0), T, X)["params"])
            for module in (MODELS[name](embed=LabelEmbedding(CLASSES)), MODELS[name]())
        )
        assert set(labelled["time"]) == {"in", "out"}
        width = labelled["time"]["out"]["bias"].shape[0]
        assert jax.tree.map(jnp.shape, labelled.pop("embed")) == {"table": (CLASSES + 1, width)}
        assert jax.tree.map(jnp.shape, labelled) == jax.tree.map(jnp.shape, plain)

    @pytest.mark.slow_but_one
    def test_any_module_is_an_embed(self, name):
        """What it returns is all that the network hears of the condition: of two embeds with one vector, one field."""
        module = MODELS[name](embed=VectorEmbedding(2))
        params, (other, _, _) = trained(module), build(name)
        out = jax.jit(module.apply)({"params": params}, T, X, jnp.zeros((BATCH, 2)))
        table = jnp.broadcast_to(params["embed"]["null"], (CLASSES + 1, len(params["embed"]["null"])))
        expected = jax.jit(other.apply)({"params": params | {"embed": {"table": table}}}, T, X, LABELS)
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_dropout_acts_only_in_training_and_remat_changes_nothing(self, name):
        smaller = {"mlp": {}, "unet": {"channel_mults": (1,), "attention_levels": (0,)}, "dit": {"num_layers": 1}}
        options = {"embed": LabelEmbedding(CLASSES), "dropout": 0.3} | smaller[name]
        plain, remat = (linen_apply(MODELS[name](**options, compute=Compute(remat=on))) for on in (False, True))
        params = trained(MODELS[name](**options))

        def loss(apply_fn, params, key):
            out = apply_fn(params, T, X, LABELS, train=True, rngs={"dropout": key})
            return jnp.mean(out**2), out

        step, again = (
            jax.jit(jax.value_and_grad(functools.partial(loss, apply_fn), has_aux=True)) for apply_fn in (plain, remat)
        )
        key, other_key = jax.random.split(jax.random.key(4))
        assert "remat" in str(jax.make_jaxpr(functools.partial(loss, remat))(params, key))
        (_, out), gradient = step(params, key)
        (_, out_again), gradient_again = again(params, key)
        np.testing.assert_allclose(out_again, out, rtol=1e-4, atol=1e-4)
        assert jax.tree.structure(gradient) == jax.tree.structure(gradient_again)
        for leaf, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again), strict=True):
            np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=1e-4 * float(jnp.abs(leaf).max()) + 1e-6)
        assert jnp.abs(out - step(params, other_key)[0][1]).max() > 1e-2
        jax.eval_shape(lambda: plain(params, T, X, LABELS, train=False, rngs=None))

    @pytest.mark.slow_but_one
    def test_bfloat16_computes_close_to_float32(self, name):
        _, params, field = build(name)
        module = MODELS[name](embed=LabelEmbedding(CLASSES), compute=Compute(jnp.bfloat16))
        shapes = jax.eval_shape(lambda key: module.init(key, T, X)["params"], jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        out, exact = jax.jit(module.apply)({"params": params}, T, X, LABELS), field(params, T, X, LABELS)
        assert out.dtype == jnp.float32
        error = jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2))
        assert 1e-5 < error < 0.03

    @pytest.mark.slow_but_one
    def test_forward_derivative_in_time_and_state(self, name):
        module, params, field = build(name)
        x_dot = jax.random.normal(jax.random.key(5), X.shape)

        @jax.jit
        def forward(t_dot, x_dot):
            call = lambda t, x: module.apply({"params": params}, t, x, LABELS)  # noqa: E731
            return jax.jvp(call, (T, X), (t_dot, x_dot))[1]

        # Steps small against the fastest time feature (a period of 0.006), large against rounding.
        for t_dot, x_dot_, h in ((jnp.ones(BATCH), jnp.zeros_like(X), 1e-4), (jnp.zeros(BATCH), x_dot, 1e-2)):
            plus, minus = (field(params, T + s * t_dot, X + s * x_dot_, LABELS) for s in (h, -h))
            difference = (plus - minus) / (2 * h)
            assert jnp.linalg.norm(forward(t_dot, x_dot_) - difference) < 0.02 * jnp.linalg.norm(difference)
            assert jnp.linalg.norm(difference) > 0.1

    @pytest.mark.parametrize(
        ("options", "cond", "message"),
        [
            ({}, LABELS, r"cond must be None: the model is unconditional \(embed=None\)"),
            ({"embed": LabelEmbedding(3)}, LABELS[:-1], r"cond must be \[batch\] = \(8,\), got shape \(7,\)"),
            ({"embed": 3}, None, r"embed must be None or a Linen module such as LabelEmbedding\(10\), got 3"),
            ({"embed": LabelEmbedding}, None, "embed must be None or a Linen module .*, got the class LabelEmbedding"),
            ({"embed": Constant(1)}, None, r"embed must return \[batch, features\] = .*, got shape \(1, 8\)"),
            ({"dropout": -0.1}, None, r"dropout must be in \[0, 1\], got -0.1"),
            ({"compute": "bfloat16"}, None, r"compute must be a Compute, .*, got 'bfloat16'"),
        ],
    )
    def test_refuses(self, name, options, cond, message):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: MODELS[name](**options).init(jax.random.key(0), T, X, cond))


@pytest.mark.slow
def test_init_params_is_the_modules_own_init():
    module = MODELS["mlp"](embed=LabelEmbedding(CLASSES))
    expected = jax.jit(lambda key: module.init(key, 0.5, X)["params"])(jax.random.key(0))
    params = init_params(module, jax.random.key(0), EVENT)
    # Rounding differs between levels of optimisation.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), params, expected)


def test_num_params_and_forward_flops_by_hand():
    module = MLP(features=(5,), time_features=4)
    params = init_params(module, jax.random.key(0), (3,))
    # Two embedding layers, the hidden layer's product with state and with embedding, the output.
    products = [(4, 4), (4, 4), (3, 5), (4, 5), (5, 3)]
    biases = 4 + 4 + 5 + 3
    assert num_params(params) == sum(a * b for a, b in products) + biases
    multiply_add = 2 * sum(a * b for a, b in products)
    assert multiply_add < forward_flops(module, (3,)) < multiply_add + 200
