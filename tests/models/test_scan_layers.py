"""A transformer by a loop over one block is the transformer written out, and parameters go from one to the other."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from fm_jax.models import Compute, DiT, LabelEmbedding, forward_flops, make_dit, stack_layers, unstack_layers
from fm_jax.train import create_state, make_step

LAYERS, EVENT = 3, (4, 4, 2)
T = jnp.array([0.2, 0.7])
X = jax.random.normal(jax.random.key(1), (2, *EVENT))
LABELS = jnp.array([1, 3])


def build(scan_layers, **options):
    defaults = {"patch_size": 2, "hidden": 16, "num_layers": LAYERS, "num_heads": 2, "embed": LabelEmbedding(3)}
    return DiT(**(defaults | options), scan_layers=scan_layers)


def shapes(module):
    return jax.eval_shape(module.init, jax.random.key(0), T, X)["params"]


def drawn(module):
    """Parameters none of which are zero or alike."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(leaf.shape[0]), leaf.dtype), shapes(module)
    )


def assert_close(a, b, tol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(one, other, rtol=tol, atol=tol * (float(jnp.abs(other).max()) + 1e-6))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cond"),
    [
        ({"num_layers": 2}, LABELS),
        pytest.param({"compute": Compute(remat=True)}, LABELS, marks=pytest.mark.slow),
        pytest.param({"embed": None}, None, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_derivatives_are_those_of_the_unrolled_blocks(options, cond):
    unrolled, scanned = build(False, **options), build(True, **options)
    params = drawn(unrolled)
    assert jax.tree.map(jnp.shape, stack_layers(params)) == jax.tree.map(jnp.shape, shapes(scanned))

    def derivatives(module, params):
        field = lambda params, t, x: module.apply({"params": params}, t, x, cond)  # noqa: E731
        out, pullback = jax.vjp(functools.partial(field, t=T, x=X), params)
        _, tangent = jax.jvp(functools.partial(field, params), (T, X), (jnp.ones_like(T), X))
        per_example = jax.vmap(lambda x: module.apply({"params": params}, 0.5, x[None])[0])(X)
        return out, tangent, per_example, pullback(jnp.cos(out))[0]

    found = jax.jit(functools.partial(derivatives, scanned))(stack_layers(params))
    wanted = jax.jit(functools.partial(derivatives, unrolled))(params)
    assert jnp.abs(wanted[0]).min() > 0
    assert_close(found, (*wanted[:3], stack_layers(wanted[3])), 2e-5)


@pytest.mark.slow
def test_second_derivatives_pass():
    """Of the divergence, as of a likelihood that is differentiated."""
    unrolled, scanned = build(False, num_layers=2), build(True, num_layers=2)
    params = drawn(unrolled)

    def divergence(module, params):
        field = lambda x: module.apply({"params": params}, T, x)  # noqa: E731
        return jnp.vdot(X, jax.jvp(field, (X,), (X,))[1])

    found = jax.jit(jax.grad(functools.partial(divergence, scanned)))(stack_layers(params))
    assert_close(found, stack_layers(jax.jit(jax.grad(functools.partial(divergence, unrolled)))(params)), 1e-4)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_outputs_have_the_same_bits_operation_by_operation(dtype):
    """Compiled, they differ by what is fused."""
    params = drawn(build(False, num_layers=2))
    modules = [build(scan, num_layers=2, compute=Compute(dtype)) for scan in (False, True)]
    with jax.disable_jit():
        unrolled, scanned = (
            m.apply({"params": p}, T, X, LABELS) for m, p in zip(modules, (params, stack_layers(params)))
        )
    np.testing.assert_array_equal(scanned, unrolled)


@pytest.mark.slow
def test_layers_and_their_dropout_are_drawn_one_by_one():
    module = build(True, dropout=0.5)
    params = jax.jit(module.init)(jax.random.key(0), T, X)["params"]
    for name in ("qkv", "out"):
        kernel = np.asarray(params["blocks"]["attention"][name]["kernel"])
        assert kernel.std(axis=(1, 2)) == pytest.approx(np.sqrt(2 / sum(kernel.shape[1:])), rel=0.15)
        assert np.abs(np.corrcoef(kernel.reshape(LAYERS, -1)) - np.eye(LAYERS)).max() < 0.2
    params = stack_layers(drawn(build(False)))

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, train):
        out = module.apply({"params": params}, T, X, train=train, rngs={"dropout": key}, capture_intermediates=True)
        return out[0], out[1]["intermediates"]["blocks"]["Dropout_0"]["__call__"]

    (one, dropped), (other, _), (off, _) = (
        run(jax.random.key(seed), train) for seed, train in ((0, True), (1, True), (0, False))
    )
    assert min(jnp.abs(one - other).max(), jnp.abs(one - off).max()) > 1e-2
    zeros = np.asarray(dropped[0]) == 0  # [layers, batch, tokens, hidden]
    assert 0.4 < zeros.mean() < 0.6
    assert not any((zeros[i] == zeros[j]).all() for i, j in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.slow
def test_the_program_does_not_grow_with_the_layers():
    def lines(scan_layers, num_layers):
        module = build(scan_layers, num_layers=num_layers)
        loss = lambda params: module.apply({"params": params}, T, X).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(shapes(module)).as_text().count("\n")

    assert lines(True, 2) == lines(True, 7)
    assert lines(False, 3) > 1.2 * lines(False, 2)


@pytest.mark.slow
def test_the_loop_keeps_products_alone_for_its_backward_pass():
    """Less than everything, and more than the input of the blocks, which is what `remat` keeps."""

    def kept(**options):
        module = build(True, embed=None, **options)
        _, pullback = jax.eval_shape(lambda p: jax.vjp(lambda p: module.apply({"params": p}, T, X), p), shapes(module))
        return sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.shape[:2] == (LAYERS, len(X)))

    tokens, hidden, heads = 4, 16, 2
    block_input, embedding = len(X) * tokens * hidden, len(X) * hidden
    products = len(X) * tokens * (3 + 1 + 1 + 4 + 1) * hidden + len(X) * 6 * hidden + len(X) * heads * tokens**2
    assert kept(compute=Compute(remat=True)) == LAYERS * block_input
    assert LAYERS * block_input < kept() <= LAYERS * (block_input + embedding + products)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(("num_layers", "remat"), [(4, False), (2, True)])
def test_operations_are_those_of_the_unrolled_blocks(num_layers, remat):
    options = {"num_layers": num_layers, "compute": Compute(remat=remat)}
    assert forward_flops(build(True, **options), EVENT) == forward_flops(build(False, **options), EVENT)


@pytest.mark.parametrize("scan_layers", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_published_operation_count_of_xl(scan_layers):
    """Twice the multiply-adds of the products, counted by hand: 237.2 billion for 32 x 32 x 4 latents."""
    d, layers, tokens, patch, features = 1152, 28, 256, 16, 256
    block = tokens * (12 * d * d + 2 * tokens * d) + 6 * d * d
    products = layers * block + tokens * (patch * d + d * 2 * patch) + features * d + d * d + 2 * d * d
    assert 2 * products == pytest.approx(237.2e9, rel=1e-3)
    module = make_dit("XL/2", embed=LabelEmbedding(1000), out_channels=8, scan_layers=scan_layers)
    # XLA counts what is between the products too.
    assert 2 * products < forward_flops(module, (32, 32, 4)) < 1.005 * 2 * products


OPTIMIZER = optax.adamw(1e-3, mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 2, params))


def numbered_state(module):
    """A training state no two of whose numbers are alike within a leaf, nor two leaves."""
    state = jax.eval_shape(lambda params: create_state(params, OPTIMIZER, (0.9, 0.99)), shapes(module))
    starts = iter(range(0, 10**9, 10**4))
    number = lambda leaf: next(starts) + np.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)  # noqa: E731
    return jax.tree.map(number, state)


@pytest.mark.slow
def test_a_whole_training_state_goes_there_and_back():
    state = numbered_state(build(False))
    stacked = stack_layers(state)
    assert jax.tree.structure(stacked) == jax.tree.structure(numbered_state(build(True)))
    assert_same(unstack_layers(stacked), state)
    for one, other in ((stacked.params, state.params), (stacked.ema["0.9"], state.ema["0.9"])):
        for i in range(LAYERS):
            assert_same(jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], one["blocks"]), other[f"block_{i}"])
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, jax.eval_shape(stack_layers, state))
    again = jax.eval_shape(unstack_layers, stacked)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, state)


def test_blocks_are_in_the_order_of_their_numbers():
    """In an alphabet, block_10 comes before block_2."""
    params = {f"block_{i}": {"bias": jnp.full(2, float(i))} for i in range(11)}
    np.testing.assert_array_equal(stack_layers(params)["blocks"]["bias"][:, 0], np.arange(11))
    assert_same(unstack_layers(stack_layers(params)), params)


@pytest.mark.slow
def test_training_goes_on_in_the_other_layout():
    """Adam treats numbers one by one: a step before and after the change of layout is the same step."""
    optimizer, states = optax.adam(1e-2), {}
    state = create_state(drawn(build(False, num_layers=2)), optimizer, (0.9,))
    batch = {"t": T, "x": X}
    for scan in (False, True):
        module = build(scan, num_layers=2)

        def loss(params, key, batch, module=module):
            return jnp.mean((module.apply({"params": params}, batch["t"], batch["x"]) - 1) ** 2), {}

        step = jax.jit(make_step(loss, optimizer, axis_name=None))
        states[scan], _ = step(stack_layers(state) if scan else state, jax.random.key(0), batch)
    assert_close(states[True].params, stack_layers(states[False].params), 1e-3)
    assert_close(states[True].ema, stack_layers(states[False].ema), 1e-3)


A, B, HALF = jnp.zeros(3), jnp.zeros(4), jnp.zeros(3, jnp.bfloat16)


@pytest.mark.parametrize(
    ("function", "params", "message"),
    [
        (
            stack_layers,
            {"out": A},
            "params must be, or hold, a dict with block_0, ..., got a dict of ['out'].",
        ),
        (stack_layers, A, "got float32 of shape (3,)."),
        (stack_layers, {"blocks": A}, "got a dict of ['blocks']."),
        (stack_layers, {"block_0": A, "block_2": A}, "block_0, block_1, ... without a gap, got block_0, block_2."),
        (stack_layers, {"block_1": A}, "without a gap, got block_1."),
        (stack_layers, {"block_0": A, "blocks": A}, "single blocks or 'blocks', got both: ['block_0', 'blocks']."),
        (stack_layers, {"block_0": {"w": A}, "block_1": {"v": A}}, "blocks of one structure, got another in block_1"),
        (
            stack_layers,
            {"block_0": {"w": A}, "block_1": {"w": B}},
            "got float32 of shape (3,) in block_0['w'] and float32 of shape (4,) in block_1['w'].",
        ),
        (stack_layers, {"block_0": A, "block_1": HALF}, "got float32 of shape (3,) in block_0 and bfloat16"),
        (stack_layers, {"block_0": {"w": "a"}}, "params, in block_0['w'], must be an array"),
        (unstack_layers, {"block_0": A}, "params must be, or hold, a dict with 'blocks', got a dict of ['block_0']."),
        (unstack_layers, {"block_0": A, "blocks": A}, "got both: ['block_0', 'blocks']."),
        (
            unstack_layers,
            {"blocks": {"v": A, "w": B}},
            "the same number of blocks in every leaf of 'blocks', got 3 in blocks['v'] and 4 in blocks['w'].",
        ),
        (unstack_layers, {"blocks": {}}, "in every leaf of 'blocks', got nothing."),
        (unstack_layers, {"blocks": A[0]}, "stacked on a first axis, got shape () in blocks."),
        (unstack_layers, {"blocks": A[:0]}, "stacked on a first axis, got shape (0,) in blocks."),
        (unstack_layers, {"blocks": [1]}, "params, in blocks[0], must be an array"),
    ],
)
def test_refuses_what_is_no_such_tree(function, params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        function(params)


def test_refuses_an_option_that_is_no_bool():
    with pytest.raises(ValueError, match="scan_layers must be True or False, got 1"):
        DiT(scan_layers=1)
