"""What every vector field promises: called `module(t, x, cond)`, float32, zero at first, per-example, differentiable."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.models import MLP, DiT, UNet, forward_flops, init_params, linen_apply, num_params

BATCH, EVENT, CLASSES = 8, (4, 4, 2), 3
MODELS = {
    "mlp": functools.partial(MLP, features=(16, 16), time_features=8),
    "unet": functools.partial(UNet, channels=8, channel_mults=(1, 2), num_blocks=1, num_heads=2, num_groups=4),
    "dit": functools.partial(DiT, patch_size=2, hidden=16, num_layers=2, num_heads=2),
}
T = jnp.linspace(0.05, 0.95, BATCH)
X = jax.random.normal(jax.random.key(1), (BATCH, *EVENT))
LABELS = jnp.arange(BATCH) % CLASSES
NULL = jnp.full((BATCH,), CLASSES)


@functools.cache
def build(name):
    """Module, initial parameters, parameters far from initialisation, and the jitted field."""
    module = MODELS[name](num_classes=CLASSES)
    initial = init_params(module, jax.random.key(0), EVENT)
    leaves, tree = jax.tree.flatten(initial)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    field = jax.jit(lambda params, t, x, cond: module.apply({"params": params}, t, x, cond))
    return module, initial, tree.unflatten(moved), field


@pytest.mark.parametrize("name", MODELS)
class TestContract:
    def test_starts_at_zero_in_float32(self, name):
        _, initial, _, field = build(name)
        assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
        out = field(initial, T, X, LABELS)
        assert out.dtype == jnp.float32
        np.testing.assert_array_equal(out, jnp.zeros_like(X))

    def test_depends_on_time_label_and_state_of_its_own_example_only(self, name):
        _, _, params, field = build(name)
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

    def test_no_condition_is_the_null_label_and_a_scalar_time_is_repeated(self, name):
        _, _, params, field = build(name)
        expected = field(params, jnp.full(BATCH, 0.4), X, NULL)
        np.testing.assert_allclose(field(params, jnp.asarray(0.4), X, None), expected, rtol=1e-4, atol=1e-5)

    def test_label_dropout_is_per_example_and_only_in_training(self, name):
        _, _, params, field = build(name)
        apply_fn = linen_apply(MODELS[name](num_classes=CLASSES, label_dropout=0.5))
        train = jax.jit(lambda key: apply_fn(params, T, X, LABELS, train=True, rngs={"dropout": key}))
        labelled, null = field(params, T, X, LABELS), field(params, T, X, NULL)
        kept = np.zeros(BATCH)
        for seed in range(4):
            out = train(jax.random.key(seed))
            to_labelled, to_null = (np.abs(out - ref).max(axis=(1, 2, 3)) for ref in (labelled, null))
            np.testing.assert_allclose(np.minimum(to_labelled, to_null), 0.0, atol=1e-4)
            kept += to_labelled < to_null
        # 32 fair coins: outside 4..28 with probability 2e-6; and one key must not decide for the whole batch.
        assert 4 <= kept.sum() <= 28
        assert len(set(kept)) > 1
        evaluated = jax.jit(lambda: apply_fn(params, T, X, LABELS, train=False, rngs=None))()
        np.testing.assert_allclose(evaluated, labelled, rtol=1e-5, atol=1e-5)

    def test_dropout_acts_only_in_training_and_remat_changes_nothing(self, name):
        _, _, params, field = build(name)
        plain, remat = (linen_apply(MODELS[name](num_classes=CLASSES, dropout=0.3, remat=on)) for on in (False, True))

        def loss(apply_fn, params, x):
            out = apply_fn(params, T, x, LABELS, train=True, rngs={"dropout": jax.random.key(4)})
            return jnp.mean(out**2), out

        (_, out), gradient = jax.jit(jax.value_and_grad(functools.partial(loss, plain), has_aux=True))(params, X)
        assert jnp.abs(out - field(params, T, X, LABELS)).max() > 1e-2
        (_, out_remat), gradient_remat = jax.jit(jax.value_and_grad(functools.partial(loss, remat), has_aux=True))(
            params, X
        )
        np.testing.assert_allclose(out_remat, out, rtol=1e-4, atol=1e-4)
        assert jax.tree.structure(gradient) == jax.tree.structure(gradient_remat)
        for path, leaf in flax.traverse_util.flatten_dict(gradient).items():
            other = flax.traverse_util.flatten_dict(gradient_remat)[path]
            np.testing.assert_allclose(other, leaf, rtol=1e-3, atol=1e-4 * float(jnp.abs(leaf).max()) + 1e-6)
        jaxpr = str(jax.make_jaxpr(functools.partial(loss, remat))(params, X))
        assert "remat" in jaxpr or "checkpoint" in jaxpr

    def test_bfloat16_computes_close_to_float32(self, name):
        _, _, params, field = build(name)
        module = MODELS[name](num_classes=CLASSES, dtype=jnp.bfloat16)
        shapes = jax.eval_shape(lambda key: module.init(key, T, X)["params"], jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        out, exact = jax.jit(module.apply)({"params": params}, T, X, LABELS), field(params, T, X, LABELS)
        assert out.dtype == jnp.float32
        error = jnp.sqrt(jnp.mean((out - exact) ** 2) / jnp.mean(exact**2))
        assert 1e-5 < error < 0.03

    def test_forward_derivative_in_time_and_state(self, name):
        _, _, params, field = build(name)
        x_dot = jax.random.normal(jax.random.key(5), X.shape)
        call = functools.partial(field, params)

        @jax.jit
        def forward(t_dot, x_dot):
            return jax.jvp(lambda t, x: call(t, x, LABELS), (T, X), (t_dot, x_dot))[1]

        # Central differences; steps of 1e-4 in 1000 t, small against the fastest feature, large against rounding.
        for t_dot, x_dot_, h in ((jnp.ones(BATCH), jnp.zeros_like(X), 1e-4), (jnp.zeros(BATCH), x_dot, 1e-2)):
            difference = (call(T + h * t_dot, X + h * x_dot_, LABELS) - call(T - h * t_dot, X - h * x_dot_, LABELS)) / (
                2 * h
            )
            derivative = forward(t_dot, x_dot_)
            assert jnp.linalg.norm(derivative - difference) < 0.02 * jnp.linalg.norm(difference)
            assert jnp.linalg.norm(difference) > 0.1

    @pytest.mark.parametrize(
        ("options", "cond", "message"),
        [
            ({}, LABELS, r"cond must be None: the model is unconditional \(num_classes=None\)"),
            ({"num_classes": 3}, LABELS.astype(float), "cond must hold integer labels, got dtype float32"),
            ({"num_classes": 3}, LABELS[:-1], r"cond must be \[batch\] = \(8,\), got shape \(7,\)"),
            ({"num_classes": 3}, LABELS[:, None], r"cond must be \[batch\] = \(8,\), got shape \(8, 1\)"),
            ({"num_classes": 0}, None, "num_classes must be None or at least 1, got 0"),
            ({"label_dropout": 0.1}, None, "label_dropout=0.1 needs num_classes"),
            ({"num_classes": 3, "label_dropout": 1.5}, None, "label_dropout must be between 0 and 1, got 1.5"),
            ({"dropout": -0.1}, None, "dropout must be between 0 and 1, got -0.1"),
            ({"dtype": jnp.float16}, None, "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        ],
    )
    def test_refuses(self, name, options, cond, message):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda: MODELS[name](**options).init(jax.random.key(0), T, X, cond))


def test_init_params_is_the_modules_own_init():
    module, initial, _, _ = build("mlp")
    expected = module.init(jax.random.key(0), 0.5, X)["params"]
    jax.tree.map(np.testing.assert_array_equal, initial, expected)


def test_num_params_and_forward_flops_by_hand():
    module = MLP(features=(5,), time_features=4)
    params = init_params(module, jax.random.key(0), (3,))
    # Two embedding layers, the hidden layer's product with state and with embedding, the output.
    products = [(4, 4), (4, 4), (3, 5), (4, 5), (5, 3)]
    biases = 4 + 4 + 5 + 3
    assert num_params(params) == sum(a * b for a, b in products) + biases
    multiply_add = 2 * sum(a * b for a, b in products)
    assert multiply_add < forward_flops(module, (3,)) < multiply_add + 200
