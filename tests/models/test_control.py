"""A trainable copy starts as nothing in every network, learns from its taps on, and refuses what it cannot follow."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_networks import LABELS, VARIANTS, T, drawn, make, normal, shapes_of, state, variant_id

from fm_jax.losses import flow_matching
from fm_jax.models import linen_apply, make_sequence_unet
from fm_jax.models.branched import Branched
from fm_jax.models.branches import CrossBranch
from fm_jax.models.control import Controlled, completed, routes, used
from fm_jax.models.grafting import base_of, trainable, with_base
from fm_jax.paths import AffinePath
from fm_jax.train import create_state, make_step

SLOW = pytest.mark.slow
QUICK = ("dit", True)
EVERY = [
    pytest.param(variant, marks=() if variant == QUICK else SLOW, id=variant_id(variant))
    for variant in VARIANTS
    if variant[0] != "mlp"
]


@functools.cache
def build(variant):
    """A controlled network, its state and condition, a trained network, first parameters, the field and a gradient."""
    net, told = make(*variant)
    x = state(variant[0])
    module = Controlled(net, channels=2, features=4)
    cond = {"network": told, "local": normal(6, *x.shape[:-1], 2)}
    base = drawn(shapes_of(net, x, told))
    params = with_base(jax.jit(module.init)(jax.random.key(0), T, x, cond)["params"], base)
    field = jax.jit(lambda params, cond: module.apply({"params": params}, T, x, cond))
    return module, x, cond, base, params, field


@functools.cache
def gradient_of(variant):
    module, x, cond, *_ = build(variant)
    return jax.jit(jax.grad(lambda params: (module.apply({"params": params}, T, x, cond) ** 3).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("variant", EVERY)
def test_starts_as_nothing_and_learns_from_its_taps_on(variant):
    """At first the taps alone have a gradient; a step later the copy too, and the network never."""
    module, x, cond, base, params, field = build(variant)
    alone = jax.jit(lambda base: module.network.apply({"params": base}, T, x, cond["network"]))(base)
    np.testing.assert_array_equal(field(params, cond), alone)
    jax.tree.map(np.testing.assert_array_equal, base_of(params), base)
    jax.tree.map(np.testing.assert_array_equal, params["control"], used(base))

    gradient = gradient_of(variant)
    found = gradient(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found["taps"]))
    assert not any(np.any(leaf) for name in ("control", "network") for leaf in jax.tree.leaves(found[name]))
    found = gradient(jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, found))
    for name in params["taps"]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(found["control"][name]):
            at = jax.tree_util.keystr(path)
            # The last block of an MMDiT has queries of the text that nothing asks for.
            assert "context_query" in at or np.abs(leaf).max() > 0, f"{name}{at}"
    assert np.abs(found["first"]["kernel"]).max() > 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(found["network"]))


@pytest.mark.parametrize("variant", EVERY)
def test_once_trained_follows_its_own_example(variant):
    module, x, cond, _, _, field = build(variant)
    params = drawn(shapes_of(module, x, cond), seed=1)
    out = field(params, cond)
    moved = field(params, cond | {"local": cond["local"].at[0].add(1.0)})
    assert np.abs(moved - out)[0].max() > 1e-4
    np.testing.assert_allclose(moved[1], out[1], rtol=1e-5, atol=1e-5)


@SLOW
def test_left_out_is_the_network_alone():
    module, x, cond, base, params, field = build(QUICK)
    trained = params | {"taps": drawn(params["taps"]), "first": drawn(params["first"])}
    alone = jax.jit(lambda base: module.network.apply({"params": base}, T, x, cond["network"]))(base)
    np.testing.assert_array_equal(field(trained, cond | {"local": None}), alone)


@SLOW
@pytest.mark.parametrize("name", ["dit", "flux"])
def test_a_loop_over_blocks_changes_nothing(name):
    """The same numbers, stacked: the taps of a loop stand where its blocks stand."""
    outs = []
    for scan in (False, True):
        _, x, cond, *_, field = build((name, scan))
        params = drawn(shapes_of(Controlled(make(name, False)[0], 2, 4), x, cond), seed=1)
        outs.append(field(stacked(params) if scan else params, cond))
    np.testing.assert_allclose(outs[1], outs[0], atol=2e-5)


def stacked(tree):
    """Any `name_0`, `name_1`, ... of a tree as `names`, stacked."""
    if not isinstance(tree, dict):
        return tree
    runs = {}
    for name in sorted(tree):
        if re.fullmatch(r"(block|double|single)_\d+", name):
            runs.setdefault(name.split("_")[0] + "s", []).append(tree[name])
    rest = {
        name: stacked(value) for name, value in tree.items() if not re.fullmatch(r"(block|double|single)_\d+", name)
    }
    return rest | {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) for name, each in runs.items()}


@SLOW
def test_training_changes_all_but_the_network():
    """By an ordinary loss and step; the copy moves from the second step on, the hint's own features from the third."""
    module, x, cond, _, params, _ = build(QUICK)
    labels = jax.tree.map(lambda new: "new" if new else "base", trainable(params))
    optimizer = optax.multi_transform({"new": optax.sgd(0.1), "base": optax.set_to_zero()}, labels)
    step = jax.jit(make_step(flow_matching(linen_apply(module), AffinePath()), optimizer, axis_name=None))
    trained = create_state(params, optimizer)
    for i in range(3):
        trained, _ = step(trained, jax.random.key(i), {"x1": x, "cond": cond})
    jax.tree.map(np.testing.assert_array_equal, base_of(trained.params), base_of(params))
    for name in ("taps", "first", "local"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, trained.params[name], params[name])
        assert all(jax.tree.leaves(moved)), name
    assert (
        np.abs(
            trained.params["control"]["blocks"]["mlp_in"]["kernel"] - params["control"]["blocks"]["mlp_in"]["kernel"]
        ).max()
        > 0
    )


@SLOW
def test_branches_are_copied_with_their_network():
    net, told = make(*QUICK)
    module = Controlled(Branched(net, {"words": CrossBranch(6, 2)}), channels=2, features=4)
    x = state("dit")
    cond = {"network": {"network": told, "words": normal(5, 2, 3, 6)}, "local": normal(6, 2, 8, 8, 2)}
    params = jax.jit(module.init)(jax.random.key(0), T, x, cond)["params"]
    base = drawn(shapes_of(net, x, told))
    params = with_base(params, {"network": base})
    jax.tree.map(np.testing.assert_array_equal, base_of(params), base)
    out = jax.jit(lambda params: module.apply({"params": params}, T, x, cond))(params)
    np.testing.assert_array_equal(out, jax.jit(lambda base: net.apply({"params": base}, T, x, told))(base))
    assert "branch_words" in params["control"]["network"]["blocks"]


def test_skips_of_a_u_net_lead_to_the_way_up():
    """The stack of `UNet`: stem, then blocks and halvings of each level; taken from behind."""
    names = "stem down_0_0 down_0_1 down_0_resample down_1_0 down_1_0_attention down_1_1 down_1_1_attention middle_1"
    found = {path[-1]: to[-1] for path, to in routes([("network", name) for name in names.split()]).items()}
    assert found == {
        "down_1_1_attention": "up_1_0",
        "down_1_0_attention": "up_1_1",
        "down_0_resample": "up_1_2",
        "down_0_1": "up_0_0",
        "down_0_0": "up_0_1",
        "stem": "up_0_2",
        "middle_1": "middle_1",
    }


@SLOW
@pytest.mark.parametrize("name", ["unet", "song_unet", "unet_condition"])
def test_a_tap_reaches_the_skip_that_it_stands_for(name):
    """The copy of a trained U-Net is the network: taps that are the identity double every skip, and the middle."""
    variant = (name, None if name != "unet_condition" else True)
    module, x, cond, base, params, field = build(variant)
    taps = {path: {"kernel": jnp.eye(len(tap["bias"])), "bias": tap["bias"]} for path, tap in params["taps"].items()}
    found = {to[-1]: len(taps[path[-1]]["bias"]) for path, to in routes([(name,) for name in taps]).items()}
    assert {"up_0_1", "up_0_0", "up_1_1", "up_1_0", "middle_1"} == set(found)

    def doubled(next_fun, args, kwargs, context):
        name = context.module.name
        if context.method_name != "__call__" or name not in found:
            return next_fun(*args, **kwargs)
        if name == "middle_1":
            return 2 * next_fun(*args, **kwargs)
        factor = jnp.ones((1, 1, 1, args[0].shape[-1])).at[..., -found[name] :].set(2.0)
        return next_fun(args[0] * factor, *args[1:], **kwargs)

    def wanted(base):
        with nn.intercept_methods(doubled):
            return module.network.apply({"params": base}, T, x, cond["network"])

    np.testing.assert_allclose(field(params | {"taps": taps}, cond), jax.jit(wanted)(base), atol=1e-5)


def test_what_a_copy_has_no_use_for_is_not_copied():
    params = {"down_0_0": T, "up_0_0": T, "norm": T, "out": T, "time": T}
    assert sorted(used(params)) == ["down_0_0", "time"]
    assert jax.tree.map(jnp.shape, completed(used(params), params)) == jax.tree.map(jnp.shape, params)


NET = make(*QUICK)[0]
X = state("dit")


def refused(cond, net=NET):
    return jax.eval_shape(Controlled(net, 2).init, jax.random.key(0), T, X, cond)


LOCAL = normal(6, 2, 4, 4, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: refused(LOCAL),
            "cond must be a dict of 'local' and, if the network takes one, 'network', got float32",
        ),
        (lambda: refused({"network": LABELS}), "got a dict of ['network']."),
        (lambda: refused({"local": LOCAL, "depth": LOCAL}), "got a dict of ['depth', 'local']."),
        (lambda: refused({"local": None}), "cond['local'] must be there where parameters are made, got None."),
        (lambda: refused({"local": LOCAL[..., :1]}), "cond['local'] must be [2, 4, 4, 2], with the sides of x, multip"),
        (lambda: refused({"local": LOCAL[:, :3]}), "divisors of them, got shape (2, 3, 4, 2)."),
        (lambda: refused({"local": LOCAL}, make("mlp", None)[0]), "MLP has no blocks that control could join."),
        (
            lambda: jax.eval_shape(
                Controlled(make_sequence_unet("tiny"), 2).init,
                jax.random.key(0),
                T,
                normal(0, 2, 4, 3),
                {"local": normal(6, 2, 4, 2)},
            ),
            "SequenceUNet has no first layer that control could join.",
        ),
        (lambda: Controlled(3, 2), "network must be an instance of flax.linen.Module, got a builtins.int."),
        (lambda: Controlled(Controlled(NET, 2), 2), "network must have no control yet, got a Controlled one."),
        (lambda: Controlled(NET, 0), "channels must be at least 1, got 0."),
        (lambda: Controlled(NET, 2, scale=float("inf")), "scale must be a finite number, got inf."),
        (lambda: Branched(Controlled(NET, 2), {"a": CrossBranch(6)}), "network must have no branches or control yet"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
