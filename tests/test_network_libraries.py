"""One loss, four network libraries: each adapter is a few lines, and with the same weights all gradients agree."""

import math
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
from fm_jax.models import linen_apply
from fm_jax.paths import AffinePath
from fm_jax.types import ApplyFn

WIDTH, MEAN = 64, 2.0
# The data are N(MEAN, I). In every dimension the conditional velocity then has variance 1 / (t^2 + (1 - t)^2) around
# the marginal one; the integral of that over t is the least loss that any network can reach.
LEAST_LOSS = math.pi / 2


# The adapters, as in README.md.


def from_nnx(model: nnx.Module) -> tuple[Any, ApplyFn]:
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def apply_fn(params, t, x, cond, *, train, rngs):
        module = nnx.merge(graph, params, rest, copy=True)
        module.set_attributes(deterministic=not train, raise_if_not_found=False)
        if train:
            nnx.reseed(module, default=rngs["dropout"], dropout=rngs["dropout"])
        return module(t, x, cond)

    return params, apply_fn


def from_equinox(model: eqx.Module) -> tuple[Any, ApplyFn]:
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def apply_fn(params, t, x, cond, *, train, rngs):
        module = eqx.nn.inference_mode(eqx.combine(params, static), value=not train)
        keys = jax.random.split(rngs["dropout"], len(x)) if train else None
        return jax.vmap(module)(t, x, cond, keys)

    return params, apply_fn


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
