"""One loss, four network libraries: with the same weights all gradients agree, and each drops its own units."""

import math
import sys
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fm_jax.losses import flow_matching
from fm_jax.models import MLP, from_equinox, from_nnx, linen_apply
from fm_jax.paths import AffinePath
from fm_jax.types import ApplyFn

WIDTH, MEAN = 64, 2.0
# The data are N(MEAN, I). In every dimension the conditional velocity then has variance 1 / (t^2 + (1 - t)^2) around
# the marginal one; the integral of that over t is the least loss that any network can reach.
LEAST_LOSS = math.pi / 2


# The same network in each: out(dropout(silu(hidden([x, t])))).


def plain_apply(params, t, x, cond, *, train, rngs):
    h = jnp.concatenate([x, t[:, None]], axis=1)
    h = jax.nn.silu(h @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return h @ params["out"]["kernel"] + params["out"]["bias"][None]


class LinenNet(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, t, x, cond=None, *, train=False):
        h = nn.silu(nn.Dense(WIDTH, name="hidden")(jnp.concatenate([x, t[:, None]], axis=1)))
        return nn.Dense(2, name="out")(nn.Dropout(self.dropout, deterministic=not train)(h))


class NNXNet(nnx.Module):
    def __init__(self, dropout=0.0, *, rngs):
        self.hidden = nnx.Linear(3, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, t, x, cond=None):
        h = nnx.silu(self.hidden(jnp.concatenate([x, t[:, None]], axis=1)))
        return self.out(self.dropout(h))


class EquinoxNet(eqx.Module):
    """For one example, as is Equinox's habit."""

    hidden: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, dropout=0.0, *, key):
        key_hidden, key_out = jax.random.split(key)
        self.hidden = eqx.nn.Linear(3, WIDTH, key=key_hidden)
        self.dropout = eqx.nn.Dropout(dropout)
        self.out = eqx.nn.Linear(WIDTH, 2, key=key_out)

    def __call__(self, t, x, cond=None, key=None):
        h = jax.nn.silu(self.hidden(jnp.append(x, t)))
        return self.out(self.dropout(h, key=key))


class Network(NamedTuple):
    apply_fn: ApplyFn
    params: Any
    weights: Any  # from the plain function's parameters to those of this library


def plain_params():
    keys = jax.random.split(jax.random.key(7), 4)
    shapes = {"hidden": {"bias": (WIDTH,), "kernel": (3, WIDTH)}, "out": {"bias": (2,), "kernel": (WIDTH, 2)}}
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda shape: isinstance(shape, tuple))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(key, s) for key, s in zip(keys, leaves, strict=True)])


def network(library, dropout=0.0) -> Network:
    def in_order(plain, transpose=False):
        """The leaves in the order of `params`; Equinox has the weight, transposed, before the bias."""
        pairs = [(layer["bias"], layer["kernel"]) for layer in (plain["hidden"], plain["out"])]
        leaves = [leaf for bias, kernel in pairs for leaf in ((kernel.T, bias) if transpose else (bias, kernel))]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    match library:
        case "function":
            params = plain_params()
            return Network(plain_apply, params, in_order)
        case "linen":
            module = LinenNet(dropout)
            params = module.init(jax.random.key(1), jnp.zeros(1), jnp.zeros((1, 2)))["params"]
            return Network(linen_apply(module), params, in_order)
        case "nnx":
            params, apply_fn = from_nnx(NNXNet(dropout, rngs=nnx.Rngs(1)))
            return Network(apply_fn, params, in_order)
        case "equinox":
            params, apply_fn = from_equinox(EquinoxNet(dropout, key=jax.random.key(1)))
            return Network(apply_fn, params, lambda plain: in_order(plain, transpose=True))


def batch_of(key, size):
    return {"x1": MEAN + jax.random.normal(key, (size, 2))}


@pytest.mark.slow
@pytest.mark.parametrize("library", ["function", "linen", "nnx", "equinox"])
def test_trains_to_the_least_loss(library):
    """After 150 steps the loss is at its minimum over all networks, known in closed form, and not below it."""
    apply_fn, params, _ = network(library)
    loss_fn, optimizer = flow_matching(apply_fn, AffinePath()), optax.adam(optax.cosine_decay_schedule(0.05, 150))

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            key_data, key_loss = jax.random.split(key)
            grads, metrics = jax.grad(loss_fn, has_aux=True)(params, key_loss, batch_of(key_data, 256))
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), metrics["loss"]

        carry = params, optimizer.init(params)
        (params, _), losses = jax.lax.scan(step, carry, jax.random.split(jax.random.key(2), 150))
        key_data, key_loss = jax.random.split(jax.random.key(3))
        return losses[0], loss_fn(params, key_loss, batch_of(key_data, 16384))[0]

    first, last = train(params)
    # The mean over 16384 examples has a standard error of 0.8%; 150 steps leave about 7% to learn.
    assert first > 2.5 * LEAST_LOSS
    assert 0.97 * LEAST_LOSS < last < 1.12 * LEAST_LOSS


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_gradients_agree(library):
    """Same weights, same key, same batch: the loss and its gradient are those of the plain function."""
    batch, key = batch_of(jax.random.key(4), 32), jax.random.key(5)

    def value_and_grad(library):
        apply_fn, _, weights = network(library)
        loss_fn = flow_matching(apply_fn, AffinePath())
        return jax.jit(jax.value_and_grad(lambda plain: loss_fn(weights(plain), key, batch)[0]))(plain_params())

    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        value_and_grad(library),
        value_and_grad("function"),
    )


@pytest.mark.slow_but_one
@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_dropout_follows_the_key(library):
    """In training dropout is drawn from the key of the step; without a key there is none."""
    apply_fn, params, _ = network(library, dropout=0.5)
    batch = {"x1": jnp.ones((8, 2)), "x0": jnp.zeros((8, 2)), "t": jnp.full(8, 0.5)}
    loss_fn = jax.jit(flow_matching(apply_fn, AffinePath()))
    one, same, other, off, again = (
        float(loss_fn(params, key, batch)[0]) for key in (*map(jax.random.key, (0, 0, 1)), None, None)
    )
    assert one == same
    assert one != other
    assert off == again
    assert off == pytest.approx(float(flow_matching(network(library).apply_fn, AffinePath())(params, None, batch)[0]))


# What the adapters promise.

T, X = jnp.linspace(0.1, 0.9, 8), jnp.ones((8, 2))
KEY = jax.random.key(3)


def evaluate(params, apply_fn, key=None, cond=None, x=X):
    return apply_fn(params, T, x, cond, train=key is not None, rngs=None if key is None else {"dropout": key})


class Masks(nnx.Module):
    """Two dropouts, on streams of their own names, and a third noise: what each draws is in a column of the output."""

    def __init__(self, rngs):
        self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.other = nnx.Dropout(0.5, rng_collection="other", rngs=rngs)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, t, x, cond=None):
        ones = self.scale * jnp.ones((64, 64))
        return jnp.stack([self.one(ones), self.two(ones), self.other(ones), self.one(ones)])


@pytest.mark.parametrize("rngs", [nnx.Rngs(0), nnx.Rngs(params=0, dropout=1, other=2)], ids=["default", "named"])
def test_nnx_draws_each_mask_for_itself(rngs):
    """In one call no two masks agree, and another key changes all of them."""
    params, apply_fn = from_nnx(Masks(rngs))
    masks, again, others = (np.asarray(evaluate(params, apply_fn, key)) > 0 for key in (KEY, KEY, jax.random.key(4)))
    np.testing.assert_array_equal(masks, again)
    for i, mask in enumerate(masks):
        for other in (*masks[i + 1 :], others[i]):
            # 4,096 pairs of fair coins: half agree, within 5 standard errors of 0.8%.
            assert abs((mask == other).mean() - 0.5) < 0.04
    np.testing.assert_array_equal(evaluate(params, apply_fn), 1.0)


def test_nnx_layers_under_vmap_draw_for_themselves():
    class Stacked(nnx.Module):
        def __init__(self, rngs):
            make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Dropout(0.5, rngs=rngs)))
            self.layers = make(rngs)
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, t, x, cond=None):
            return nnx.vmap(lambda layer, x: layer(x))(self.layers, self.scale * jnp.ones((3, 64, 64)))

    masks = np.asarray(evaluate(*from_nnx(Stacked(nnx.Rngs(0))), KEY)) > 0
    assert all(abs((masks[i] == masks[i - 1]).mean() - 0.5) < 0.04 for i in range(3))


def test_nnx_leaves_the_module_alone_and_is_left_alone():
    """Neither training mode nor draws reach the module, and what becomes of it does not reach the function."""
    model = NNXNet(0.5, rngs=nnx.Rngs(1))
    count = int(model.dropout.rngs.count[...])
    params, apply_fn = from_nnx(model)
    before = evaluate(params, apply_fn)
    assert jnp.abs(evaluate(params, apply_fn, KEY) - before).max() > 1e-3
    assert (int(model.dropout.rngs.count[...]), model.dropout.deterministic) == (count, False)
    model.out.bias[...] += 1.0
    np.testing.assert_array_equal(evaluate(params, apply_fn), before)
    nnx.update(model, jax.tree.map(lambda leaf: 0 * leaf, params))
    model.eval()
    np.testing.assert_array_equal(model(T, X), 0.0)


def test_nnx_other_state_is_constant():
    class Shifted(nnx.Module):
        def __init__(self):
            self.scale, self.calls = nnx.Param(jnp.ones(2)), nnx.Variable(jnp.zeros(()))

        def __call__(self, t, x, cond=None):
            self.calls[...] += 1.0
            return x * self.scale[None] + self.calls

    params, apply_fn = from_nnx(Shifted())
    assert len(jax.tree.leaves(params)) == 1
    for _ in range(2):
        np.testing.assert_array_equal(evaluate(params, apply_fn), 2.0)


class Keyless(eqx.Module):
    """Without a parameter `key`, with a constant, and with a condition of two leaves."""

    weight: jax.Array
    steps: jax.Array
    name: str

    def __call__(self, t, x, cond):
        shift = 0.0 if cond is None else cond["a"] + cond["b"].sum()
        return self.weight * x + t + shift + self.steps


def test_equinox_maps_every_leaf_over_the_batch():
    model = Keyless(jnp.array([2.0, 3.0]), jnp.arange(2), "keyless")
    params, apply_fn = from_equinox(model)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(2,)]  # integers and names are no parameters
    cond = {"a": jnp.arange(8.0), "b": jnp.ones((8, 3))}
    plain = jnp.array([[2.0, 3.0]]) * X + T[:, None] + jnp.arange(2)[None]
    for key in (None, KEY):
        np.testing.assert_allclose(evaluate(params, apply_fn, key, cond), plain + cond["a"][:, None] + 3, rtol=1e-6)
        np.testing.assert_allclose(evaluate(params, apply_fn, key), plain, rtol=1e-6)


def test_equinox_draws_for_each_example():
    params, apply_fn = from_equinox(EquinoxNet(0.5, key=jax.random.key(1)))
    same = jnp.full(8, 0.5)
    off = apply_fn(params, same, X, None, train=False, rngs=None)
    np.testing.assert_allclose(off, jnp.broadcast_to(off[:1], off.shape), rtol=1e-6)
    on = apply_fn(params, same, X, None, train=True, rngs={"dropout": KEY})
    assert len(np.unique(np.round(on, 5), axis=0)) == 8


class NNXBatchNorm(nnx.Module):
    def __init__(self):
        self.inner = nnx.List([nnx.BatchNorm(2, rngs=nnx.Rngs(0))])

    def __call__(self, t, x, cond=None):
        return self.inner[0](x)


class EquinoxBatchNorm(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __init__(self):
        self.norm = eqx.nn.BatchNorm(2, axis_name="batch", mode="batch")

    def __call__(self, t, x, cond=None):
        return x


@pytest.mark.parametrize(
    ("adapter", "model", "message"),
    [
        (linen_apply, MLP, "module must be an instance of flax.linen.Module, got the class fm_jax.models.mlp.MLP"),
        (
            linen_apply,
            lambda: NNXNet(rngs=nnx.Rngs(0)),
            "module must be an instance of flax.linen.Module, got a .*NNXNet",
        ),
        (from_nnx, lambda: NNXNet, "model must be an instance of nnx.Module, got the class .*NNXNet"),
        (from_nnx, MLP, "model must be an instance of nnx.Module, got a fm_jax.models.mlp.MLP"),
        (from_nnx, NNXBatchNorm, "model must have no running statistics, got nnx.BatchStat at inner.0.mean"),
        (
            from_nnx,
            lambda: nnx.Embed(2, 2, rngs=nnx.Rngs(0)),
            r"model must be called as model\(t, x, cond\) on a batch, got the signature \(inputs",
        ),
        (from_equinox, lambda: EquinoxNet, "model must be an instance of equinox.Module, got the class .*EquinoxNet"),
        (from_equinox, lambda: plain_apply, "model must be an instance of equinox.Module, got a builtins.function"),
        (
            from_equinox,
            lambda: eqx.nn.Linear(2, 2, key=KEY),
            r"model must be called as model\(t, x, cond\) on one example, got the signature \(x",
        ),
        (from_equinox, EquinoxBatchNorm, "model must have no state, got an equinox.nn.StateIndex, as of BatchNorm"),
    ],
)
def test_adapters_refuse(adapter, model, message):
    with pytest.raises(ValueError, match=message):
        adapter(model if adapter is linen_apply and model is MLP else model())


@pytest.mark.parametrize("library", ["nnx", "equinox"])
def test_training_at_random_needs_a_key(library):
    apply_fn, params, _ = network(library, dropout=0.5)
    with pytest.raises(ValueError, match=r"train=True needs rngs=\{'dropout': key\} .*, got rngs=None"):
        apply_fn(params, T, X, None, train=True, rngs=None)


@pytest.mark.parametrize(("adapter", "module"), [(from_nnx, "flax.nnx"), (from_equinox, "equinox")])
def test_a_missing_library_is_named(adapter, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "flax.nnx":
        monkeypatch.delattr("flax.nnx")
    with pytest.raises(ImportError, match=f"{adapter.__name__} needs .*: pip install"):
        adapter(None)
