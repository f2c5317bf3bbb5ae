"""Branches start as nothing in every network, say what they are told and nothing else, and refuse the rest."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_networks import LABELS, VARIANTS, T, bfloat16, drawn, make, normal, shapes_of, state, variant_id

from fm_jax.losses import flow_matching
from fm_jax.models import Conditions, PlainMLP, crossdit, dit, linen_apply, make_sequence_unet
from fm_jax.models.attention import attend
from fm_jax.models.branched import Branched
from fm_jax.models.branches import ChannelConcat, CrossBranch, ImagePrompt, LocalBranch, VectorBranch
from fm_jax.models.grafting import base_of, trainable, with_base
from fm_jax.models.places import Seen, at_attention, resized
from fm_jax.paths import AffinePath
from fm_jax.train import create_state, make_step

SLOW = pytest.mark.slow
QUICK = ("dit", True)
EVERY = [pytest.param(variant, marks=() if variant == QUICK else SLOW, id=variant_id(variant)) for variant in VARIANTS]
BRANCHES = {
    "sizes": VectorBranch(5),
    "words": CrossBranch(6, 2),
    "depth": LocalBranch(2, 4),
    "style": ImagePrompt(6),
}
MASK = jnp.array([[True, True, False], [True, False, False]])


def told_of(x, names):
    """Conditions of the branches."""
    sets = {name: Conditions(tokens=normal(seed, 2, 3, 6), mask=MASK) for name, seed in (("words", 5), ("style", 7))}
    every = sets | {"sizes": normal(4, 2, 5), "depth": normal(6, *x.shape[:-1], 2)}
    return {name: every[name] for name in names}


def is_zero_at_first(path):
    """Whether a parameter is the last of a branch before it joins the network."""
    names = [key.key for key in path]
    at = next((i for i, name in enumerate(names) if name.startswith("branch_")), None)
    if not at:  # none, or the features of a branch, which stand beside the network
        return False
    last = {"branch_sizes": "out", "branch_words": "out", "branch_style": "value"}.get(names[at])
    return last is None or names[at + 1] == last


@functools.cache
def build(variant, **options):
    """A network with all branches that it has places for, its state, condition, trained base and first parameters."""
    net, told = make(*variant, **options)
    x = state(variant[0])
    names = ("sizes", "words") if variant[0] == "mlp" else tuple(BRANCHES)
    module = Branched(net, {name: BRANCHES[name] for name in names})
    cond = {"network": told} | told_of(x, names)
    base = drawn(shapes_of(net, x, told))
    field = jax.jit(lambda params, cond: module.apply({"params": params}, T, x, cond))
    return net, module, x, cond, base, field


@functools.cache
def first(variant, **options):
    """Parameters as at first, by the module's own `init`, with a trained network in them."""
    _, module, x, cond, base, _ = build(variant, **options)
    return with_base(jax.jit(module.init)(jax.random.key(0), T, x, cond)["params"], base)


@functools.cache
def alone(variant, **options):
    """What the network alone gives."""
    net, _, x, cond, base, _ = build(variant, **options)
    return jax.jit(lambda params: net.apply({"params": params}, T, x, cond["network"]))(base)


@pytest.mark.slow
@pytest.mark.parametrize("variant", EVERY)
def test_starts_as_nothing_and_learns(variant):
    _, module, x, cond, base, field = build(variant)
    params = first(variant)
    if variant[0] == "song_unet":  # operation by operation: XLA fuses what stands around a branch otherwise
        net = module.network
        found, wanted = (
            each.apply({"params": p}, T, x, c) for each, p, c in ((module, params, cond), (net, base, None))
        )
    else:
        found, wanted = field(params, cond), alone(variant)
    np.testing.assert_array_equal(found, wanted)
    jax.tree.map(np.testing.assert_array_equal, base_of(params), base)

    gradient = jax.jit(jax.grad(lambda params: (module.apply({"params": params}, T, x, cond) ** 3).sum()))(params)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    starting = [path for path, _ in leaves if is_zero_at_first(path)]
    assert len(starting) >= len(module.branches)
    for path, leaf in leaves:
        if is_zero_at_first(path):
            assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", EVERY)
def test_once_trained_says_what_it_is_told(variant):
    """Each branch to its own example alone, and nothing of what is masked."""
    _, module, x, cond, _, field = build(variant)
    params = drawn(shapes_of(module, x, cond), seed=1)
    out = field(params, cond)
    for name in module.branches:
        other = jax.tree.map(lambda leaf: leaf if leaf.dtype == bool else leaf.at[0].mul(-1.0), cond[name])
        moved = field(params, cond | {name: other})
        assert np.abs(moved - out)[0].max() > 1e-4, name
        np.testing.assert_allclose(moved[1], out[1], rtol=1e-5, atol=1e-5)
    for name in ("words", "style")[: len(module.branches) // 2]:
        tokens = cond[name].tokens
        noise = jnp.where(MASK[..., None], tokens, jnp.nan)
        np.testing.assert_array_equal(field(params, cond | {name: cond[name]._replace(tokens=noise)}), out)
    unseen = {
        name: cond[name]._replace(mask=jnp.zeros_like(MASK)) for name in ("words", "style") if name in module.branches
    }
    left_out = field(params, cond | dict.fromkeys(unseen))
    np.testing.assert_allclose(field(params, cond | unseen), left_out, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_branches_join_a_network_of_sequences():
    """At every level of it, with fewer places than the sequence has."""
    net = make_sequence_unet("tiny", channels=(8, 16), time_channels=8, local_dim=1)
    branches = {"sizes": VectorBranch(5), "words": CrossBranch(6, 2), "depth": LocalBranch(2, 4)}
    module, x = Branched(net, branches), normal(0, 2, 8, 3)
    cond = {"network": Conditions(local=normal(1, 2, 8, 1))} | told_of(x, branches)
    base = drawn(shapes_of(net, x, cond["network"]))
    params = with_base(jax.jit(module.init)(jax.random.key(0), T, x, cond)["params"], base)
    field = jax.jit(lambda params, cond: module.apply({"params": params}, T, x, cond))
    alone = jax.jit(lambda params: net.apply({"params": params}, T, x, cond["network"]))(base)
    np.testing.assert_allclose(field(params, cond), alone, rtol=1e-5, atol=1e-6)
    assert all("branch_depth" in params["network"][name] for name in ("down_0_0", "down_1_0", "middle_0", "up_1_1"))
    params = drawn(shapes_of(module, x, cond), seed=1)
    for name in branches:
        assert np.abs(field(params, cond) - field(params, cond | {name: None})).max() > 1e-4, name


@SLOW
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_left_out_is_the_network_alone(variant):
    _, module, _, cond, _, field = build(variant)
    params = first(variant)
    nothing = cond | dict.fromkeys(module.branches)
    np.testing.assert_array_equal(field(params, nothing), alone(variant))


@SLOW
@pytest.mark.parametrize("variant", [QUICK, ("unet", None), ("flux", True)], ids=variant_id)
def test_in_bfloat16(variant):
    _, module, x, cond, base, field = build(variant)
    params = drawn(shapes_of(module, x, cond), seed=1)
    net, _ = make(*variant, compute=bfloat16())
    half = module.clone(network=net)
    out = jax.jit(lambda params: half.apply({"params": params}, T, x, cond))(params)
    exact = field(params, cond)
    assert out.dtype == jnp.float32
    assert 1e-5 < np.linalg.norm(out - exact) / np.linalg.norm(exact) < 0.1
    params = with_base(params, base)
    nothing = cond | dict.fromkeys(module.branches)
    wanted = jax.jit(lambda base: net.apply({"params": base}, T, x, cond["network"]))(base)
    np.testing.assert_array_equal(jax.jit(lambda p: half.apply({"params": p}, T, x, nothing))(params), wanted)


@functools.cache
def dit_with(branches, **options):
    """A scanned DiT with one branch, trained: a field of parameters that are its own."""
    net, _ = make(*QUICK, **options)
    return Branched(net, dict(branches))


def field_of(module, x, cond, params=None):
    params = drawn(shapes_of(module, x, cond), seed=2) if params is None else params
    return jax.jit(lambda cond, x: module.apply({"params": params}, T, x, cond))(cond, x)


X = state("dit")
PROMPT = {"style": normal(7, 2, 3, 6), "network": LABELS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "branch"),
    [
        ("style", ImagePrompt(6, scale=0.0)),
        pytest.param("depth", LocalBranch(2, 4, scale=0.0), marks=SLOW),
        pytest.param("words", CrossBranch(6, 2, scale=0.0), marks=SLOW),
        pytest.param("sizes", VectorBranch(5, scale=0.0), marks=SLOW),
    ],
)
def test_a_scale_of_zero_is_none(name, branch):
    module = dit_with(((name, branch),))
    cond = {"network": LABELS} | told_of(X, (name,))
    params = drawn(shapes_of(module, X, cond), seed=2)
    with_scale = field_of(module, X, cond, params)
    np.testing.assert_array_equal(with_scale, field_of(module, X, cond | {name: None}, params))


@SLOW
@pytest.mark.parametrize("name", ["words", "style"])
def test_padding_is_immaterial(name):
    module = dit_with(((name, BRANCHES[name]),))
    tokens = normal(5, 2, 8, 6)
    outs = []
    for length in (8, 64):
        padded = jnp.concatenate([tokens, normal(6, 2, length - 8, 6)], axis=1)
        mask = jnp.broadcast_to(jnp.arange(length) < 8, (2, length))
        outs.append(field_of(module, X, {"network": LABELS, name: Conditions(tokens=padded, mask=mask)}))
    np.testing.assert_allclose(outs[1], outs[0], atol=1e-6 * float(np.abs(outs[0]).max()))


@SLOW
def test_a_global_condition_knows_no_place(monkeypatch):
    """Without a table of positions, patches that change places change those of the output alike."""
    monkeypatch.setattr(
        dit, "position_features", lambda rows, columns, dim: np.zeros((rows * columns, dim), np.float32)
    )
    module = dit_with((("sizes", BRANCHES["sizes"]), ("words", BRANCHES["words"])))
    cond = {"network": LABELS} | told_of(X, ("sizes", "words"))
    turned = lambda x: jnp.roll(x[:, ::-1].reshape(2, 2, 2, 4, 2)[:, :, ::-1].reshape(x.shape), 2, axis=2)  # noqa: E731
    out, moved = field_of(module, X, cond), field_of(module, turned(X), cond)
    np.testing.assert_allclose(moved, turned(out), atol=1e-5)


@SLOW
@pytest.mark.parametrize("variant", [QUICK, ("unet", None)], ids=variant_id)
def test_a_local_condition_is_heard_most_where_it_is(variant):
    """Attention carries some of it elsewhere."""
    net, told = make(*variant)
    module = Branched(net, {"depth": LocalBranch(1, 4)})
    x = normal(3, 2, 16, 16, 2)
    cond = {"network": told, "depth": normal(4, 2, 16, 16, 1)}
    params = drawn(shapes_of(module, x, cond), seed=2)
    field = jax.jit(lambda depth: module.apply({"params": params}, T, x, cond | {"depth": depth}))
    moved = field(cond["depth"].at[:, 4:6, 10:12].add(1.0)) - field(cond["depth"])
    squares = np.square(moved).sum(axis=(0, 3)).reshape(4, 4, 4, 4).sum(axis=(1, 3))
    assert np.unravel_index(squares.argmax(), squares.shape) == (1, 2)


@pytest.mark.slow
def test_an_image_prompt_is_the_formula():
    """`(attend(q, k_text, v_text) + scale attend(q, k_image, v_image)) W`, with the queries that there are."""

    class Alone(nn.Module):
        @nn.compact
        def __call__(self, x, text):
            return crossdit.Attention(2, name="cross")(x, text)

    x, text, k, v = normal(0, 2, 5, 8), normal(1, 2, 3, 8), normal(2, 2, 4, 2, 4), normal(3, 2, 4, 2, 4)
    mask = jnp.array([[True] * 4, [True, False, True, False]])
    params = drawn(jax.eval_shape(Alone().init, jax.random.key(0), x, text)["params"])
    with nn.intercept_methods(at_attention((), 5, lambda module, head: [Seen(k, v, mask, 0.5)])):
        out = Alone().apply({"params": params}, x, text)
    weights = params["cross"]
    q, k_text, v_text = (
        jnp.einsum("bnd,dhe->bnhe", h, weights[name]["kernel"]) + weights[name]["bias"][None, None]
        for name, h in (("query", x), ("key", text), ("value", text))
    )
    h = attend(q, k_text, v_text) + 0.5 * attend(q, k, v, mask=mask)
    wanted = jnp.einsum("bnhe,hed->bnd", h, weights["out"]["kernel"]) + weights["out"]["bias"][None, None]
    np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_features_come_to_the_grid_of_a_block():
    features = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(resized(features, (2, 2))[0, :, :, 0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(resized(features, (8, 4))[0, :, 1, 0], np.repeat([1.0, 5.0, 9.0, 13.0], 2))
    with pytest.raises(ValueError, match=r"must be multiples or divisors of those of blocks, got blocks of \(3, 4\)"):
        resized(features, (3, 4))


@SLOW
def test_channels_join_those_of_the_state():
    net, _ = make(*QUICK)
    module = Branched(net, {"before": ChannelConcat(3)})
    before = normal(4, 2, 4, 4, 3)
    joined = jnp.concatenate([X, before], axis=-1)
    params = drawn(shapes_of(net, joined, LABELS))
    apply = jax.jit(lambda p: module.apply({"params": {"network": p}}, T, X, {"network": LABELS, "before": before}))
    wanted = jax.jit(lambda p: net.apply({"params": p}, T, joined, LABELS)[..., :2])(params)
    np.testing.assert_array_equal(apply(params), wanted)


@SLOW
def test_training_changes_branches_alone():
    """By an ordinary loss and step, with an optimiser that knows what is trainable."""
    net, _ = make(*QUICK)
    module = Branched(net, {"style": ImagePrompt(6, num_tokens=2)})
    cond = {"network": LABELS, "style": normal(5, 2, 6)}
    params = drawn(shapes_of(module, X, cond), seed=2)
    labels = jax.tree.map(lambda new: "new" if new else "base", trainable(params))
    optimizer = optax.multi_transform({"new": optax.adamw(1e-2), "base": optax.set_to_zero()}, labels)
    step = jax.jit(make_step(flow_matching(linen_apply(module), AffinePath()), optimizer, axis_name=None))
    after, _ = step(create_state(params, optimizer), jax.random.key(0), {"x1": X, "cond": cond})
    jax.tree.map(np.testing.assert_array_equal, base_of(after.params), base_of(params))
    moved = jax.tree.map(lambda a, b: bool(np.abs(a - b).max() > 0), after.params, params)
    assert moved == trainable(params)


NET = make(*QUICK)[0]
SHAPE = jax.ShapeDtypeStruct


def refused(branches, cond, net=NET, x=X):
    module = Branched(net, branches)
    return jax.eval_shape(module.init, jax.random.key(0), T, x, cond)


@pytest.mark.parametrize(
    ("branch", "value", "message"),
    [
        (VectorBranch(5), jnp.zeros((2, 4)), "cond['a'] must be [batch, dim] = (2, 5), got shape (2, 4)."),
        (VectorBranch(5), [0.0], "cond['a'] must be an array, as jnp.asarray makes, got a list."),
        (VectorBranch(5), None, "cond must have 'a' where parameters are made, got None."),
        (LocalBranch(2), jnp.zeros((2, 4, 3, 2)), "cond['a'] must be [2, 4, 4, 2], with the sides of x, multiples or"),
        (LocalBranch(2), jnp.zeros((2, 4, 4, 1)), "divisors of them, got shape (2, 4, 4, 1)."),
        (CrossBranch(6, 2), jnp.zeros((2, 3, 5)), "cond['a'] must be tokens [2, n, 6], got shape (2, 3, 5)."),
        (
            CrossBranch(6, 2),
            Conditions(tokens=jnp.zeros((2, 3, 6)), mask=jnp.ones((2, 4), bool)),
            "cond['a'].mask must be bool [2, 3], true for a token, got bool of shape (2, 4).",
        ),
        (
            ImagePrompt(6),
            Conditions(tokens=jnp.zeros((2, 3, 6)), vector=jnp.zeros((2, 3))),
            "cond must be Conditions(tokens=..., mask=...), got vector too.",
        ),
        (ImagePrompt(6, num_tokens=2), jnp.zeros((2, 3, 6)), "cond['a'] must be [batch, dim] = (2, 6)"),
        (CrossBranch(6, 3), jnp.zeros((2, 3, 6)), "num_heads must divide the 16 channels of every block, got 3."),
        (ChannelConcat(1), None, "cond['a'] must be there, for the network was made for its channels, got None."),
        (ChannelConcat(1), jnp.zeros((2, 8, 8, 1)), "cond['a'] must be [2, 4, 4, 1], on the grid of x, got shape"),
    ],
)
def test_refuses_a_condition_that_does_not_fit(branch, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        refused({"a": branch}, {"network": LABELS, "a": value})


VECTOR = {"a": VectorBranch(5)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: refused(VECTOR, {"network": LABELS}), "cond must be a dict of 'network', 'a', got one of 'network'."),
        (lambda: refused(VECTOR, {"a": T, "b": T}), "cond must be a dict of 'network', 'a', got one of 'a', 'b'."),
        (lambda: refused(VECTOR, LABELS), "cond must be a dict of 'network', 'a', got int32 of shape (2,)."),
        (lambda: refused(VECTOR, {"a": jnp.zeros((2, 5))}, PlainMLP()), "PlainMLP has no embedding of time that a"),
        (
            lambda: refused({"a": ImagePrompt(6)}, {"a": normal(0, 2, 3, 6)}, make("mlp", None)[0]),
            "MLP has no attention that a could join.",
        ),
        (
            lambda: refused({"a": LocalBranch(2)}, {"a": normal(0, 2, 4, 4, 2)}, make("mlp", None)[0]),
            "A LocalBranch needs blocks with a grid, which an MLP has not.",
        ),
        (lambda: Branched(3, VECTOR), "network must be an instance of flax.linen.Module, got a builtins.int."),
        (lambda: Branched(Branched(NET, VECTOR), VECTOR), "network must have no branches or control yet"),
        (lambda: Branched(NET, (VectorBranch(5),)), 'branches must be a dict, such as {"depth": LocalBranch(1)}'),
        (lambda: Branched(NET, {"network": VectorBranch(5)}), "identifiers, not 'network', got 'network'."),
        (lambda: Branched(NET, {"a": NET}), "branches['a'] must be a branch, such as LocalBranch(1), got "),
        (lambda: VectorBranch(0), "dim must be at least 1, got 0."),
        (lambda: LocalBranch(1, scale=float("nan")), "scale must be a finite number, got nan."),
        (lambda: ImagePrompt(4, num_tokens=2.5), "num_tokens must be an integer, got 2.5."),
        (lambda: base_of({"out": T}), "params must be those of a Branched or Controlled network, with 'network', got"),
        (lambda: base_of({"network": {"out": T}, "encoder": {}}), "got a dict of ['encoder', 'network']."),
        (lambda: trainable(T), "with 'network', got float32 of shape (2,)."),
        (lambda: with_base({"network": {"a": T}}, {"b": T}), "base must have ['a'], as the network has, got ['b']."),
        (lambda: with_base({"network": {"a": T}}, {"a": T[:1]}), "base['a'] must have shape (2,), as the network's"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
