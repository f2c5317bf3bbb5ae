"""Dropping conditions: how many, which, what takes their place, and that guidance has what it needs afterwards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import optimised

from fm_jax import oracles
from fm_jax.conditions import DropCondition, DropConditions, drop_condition, drop_conditions, null_like, without
from fm_jax.guidance import classifier_free_batched
from fm_jax.losses import flow_matching
from fm_jax.models.conditioning import Conditions
from fm_jax.paths import AffinePath
from fm_jax.schedules import Linear

LABELS, VECTORS = jnp.arange(4), jnp.arange(12.0).reshape(4, 3)
NULLS = {
    "label": (LABELS, 7),
    "label, each its own": (LABELS, np.array([7, 8, 9, 7])),
    "label, as a real number": (LABELS, 7.0),
    "small label": (LABELS.astype(jnp.uint8), 255),
    "vector": (VECTORS, 0),
    "vector, by coordinates": (VECTORS, np.array([1.0, 2.0, 0.1])),
    "vector, each its own": (VECTORS, -VECTORS - 1),
    "vector, NaN": (VECTORS, np.nan),
    "half precision": (VECTORS.astype(jnp.bfloat16), 0.1),
    "grid": (jnp.ones((4, 2, 2, 3)), np.zeros(3)),
    "mask": (LABELS >= 0, False),
    "NumPy": (np.arange(4), np.int64(7)),
    "pytree": ({"a": LABELS, "b": (VECTORS, LABELS >= 0)}, {"a": 7, "b": (np.full(3, -1.0), False)}),
}


def holds(leaf, null):
    """Per example, whether a leaf is the null one."""
    same = np.asarray(leaf == null) | (np.asarray(leaf != leaf) & np.asarray(null != null))
    return same.reshape(len(leaf), -1).all(axis=1)


@pytest.mark.parametrize("name", NULLS)
def test_nulls_have_the_form_of_the_condition(name):
    """In structure, shape and dtype, and the value is that of NumPy's own broadcasting."""
    cond, null_cond = NULLS[name]
    for leaf, null, value in zip(*map(jax.tree.leaves, (cond, null_like(cond, null_cond), null_cond)), strict=True):
        leaf = jnp.asarray(leaf)
        assert (null.shape, null.dtype) == (leaf.shape, leaf.dtype)
        np.testing.assert_allclose(null.astype(float), np.broadcast_to(np.asarray(value, float), leaf.shape), rtol=1e-2)


@pytest.mark.parametrize("name", NULLS)
def test_an_example_keeps_all_or_nothing(name):
    cond, null_cond = NULLS[name]
    nulls = null_like(cond, null_cond)
    drop = jax.jit(lambda key: drop_condition(key, cond, null_cond, 0.5))
    counts = np.zeros(4)
    for seed in range(8):
        out = drop(jax.random.key(seed))
        assert jax.tree.map(lambda a: a.dtype, out) == jax.tree.map(lambda a: jnp.asarray(a).dtype, cond)
        lost = [holds(leaf, null) for leaf, null in zip(*map(jax.tree.leaves, (out, nulls)), strict=True)]
        kept = [holds(leaf, given) for leaf, given in zip(*map(jax.tree.leaves, (out, cond)), strict=True)]
        for each_lost, each_kept in zip(lost, kept, strict=True):
            np.testing.assert_array_equal(each_lost, lost[0])
            np.testing.assert_array_equal(each_kept, ~lost[0])
        counts += lost[0]
    # 32 fair coins, fewer than 4 or more than 28 with probability 2e-6; and not one for the whole batch.
    assert 4 <= counts.sum() <= 28
    assert len(set(counts)) > 1


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.75, 1.0])
def test_the_share_that_is_dropped(rate):
    n = 40_000
    cond = {"label": jnp.zeros(n, int), "vector": jnp.zeros((n, 2))}
    drop = DropCondition(rate, {"label": 1, "vector": 1.0})
    out = jax.jit(drop)(jax.random.key(0), cond)
    np.testing.assert_array_equal(out["label"][:, None], out["vector"].astype(int)[:, :1])
    # Five standard errors: a false alarm in 2e6 keys; none at both ends.
    assert abs(float(out["label"].mean()) - rate) <= 5 * np.sqrt(rate * (1 - rate) / n)
    other = drop(jax.random.key(1), cond)
    assert bool((out["label"] != other["label"]).any()) == (0 < rate < 1)


def test_examples_are_dropped_independently():
    """Neighbours lose theirs together as often as chance has it, rate^2."""
    lost = drop_condition(jax.random.key(0), jnp.zeros(40_000), 1.0, 0.3)
    both = float((lost[1:] * lost[:-1]).mean())
    assert abs(both - 0.09) < 5 * np.sqrt(0.09 * 0.91 / 40_000) * 1.5  # neighbouring pairs share an example


def test_the_value_is_the_function():
    drop, key = DropCondition(0.5, null_cond=9), jax.random.key(3)
    values = [{"a": np.zeros(2), "b": 3}, {"a": np.ones(2), "b": 3}, {"a": np.zeros(2)}, 9, np.nan]
    for i, value in enumerate(values):
        one, same = DropCondition(0.5, value), DropCondition(0.5, jax.tree.map(lambda leaf: leaf + 0, value))
        assert one == same
        assert hash(one) == hash(same)
        assert one != DropCondition(0.4, value)
        assert all(one != DropCondition(0.5, other) for other in values[:i])
    assert drop != 9
    np.testing.assert_array_equal(drop(key, LABELS), drop_condition(key, LABELS, 9, 0.5))
    assert drop_condition(key, np.zeros(0, int), 9, 0.5).shape == (0,)


def test_rate_and_null_may_be_traced():
    drop = jax.jit(lambda rate, null: drop_condition(jax.random.key(0), VECTORS, null, rate))
    np.testing.assert_array_equal(drop(1.0, 5), jnp.full_like(VECTORS, 5.0))
    np.testing.assert_array_equal(drop(0.0, 5), VECTORS)
    with pytest.raises(ValueError, match="null_cond must be a value of the dtype of cond, int32, got dtype float32"):
        jax.jit(lambda null: null_like(LABELS, null))(7.0)


REFUSED = [
    (None, 0, r"cond must be a pytree of \[batch, ...\], got None: there is no condition"),
    ({}, {}, r"cond must be a pytree of \[batch, ...\], got \{\}: there is no condition"),
    (3, 0, r"cond must be a pytree of \[batch, ...\] with one batch axis, got shapes \{'cond': \(\)\}"),
    (
        {"a": LABELS, "b": VECTORS[:2]},
        {"a": 0, "b": 0.0},
        r"with one batch axis, got shapes \{\"cond\['a'\]\": \(4,\), \"cond\['b'\]\": \(2, 3\)\}",
    ),
    ({"a": LABELS}, 0, r"null_cond must have the structure of cond, PyTreeDef\(\{'a': \*\}\), got PyTreeDef\(\*\)"),
    ({"a": LABELS}, {"b": 0}, r"null_cond must have the structure of cond, PyTreeDef\(\{'a': \*\}\), got .*'b'"),
    (LABELS, None, r"null_cond must have the structure of cond, PyTreeDef\(\*\), got PyTreeDef\(None\)"),
    (
        {"a": VECTORS},
        {"a": np.zeros(4)},
        r"null_cond\['a'\] must broadcast to cond\['a'\], \[batch, ...\] = \(4, 3\), got shape \(4,\)",
    ),
    (LABELS, np.zeros((4, 1), int), r"null_cond must broadcast to cond, \[batch, ...\] = \(4,\), got shape \(4, 1\)"),
    (LABELS, 10.5, "null_cond must be a value of the dtype of cond, int32, got 10.5"),
    (LABELS, np.nan, "null_cond must be a value of the dtype of cond, int32, got nan"),
    (LABELS.astype(jnp.uint8), 256, "null_cond must be a value of the dtype of cond, uint8, got 256"),
    (LABELS.astype(jnp.uint8), -1, "null_cond must be a value of the dtype of cond, uint8, got -1"),
    (LABELS > 1, 2, "null_cond must be a value of the dtype of cond, bool, got 2"),
    (VECTORS, 1e300, r"null_cond must be a value of the dtype of cond, float32, got 1e\+300"),
    (VECTORS, 1j, "null_cond must be a value of the dtype of cond, float32, got 1j"),
    (VECTORS, "none", "null_cond must be a value of the dtype of cond, float32, got none"),
]


@pytest.mark.parametrize(("cond", "null_cond", "message"), REFUSED)
def test_refuses_what_does_not_fit(cond, null_cond, message):
    with pytest.raises(ValueError, match=message):
        drop_condition(jax.random.key(0), cond, null_cond, 0.1)


@pytest.mark.parametrize(("cond", "null_cond", "message"), REFUSED[3:])
def test_guidance_has_the_same_rule(cond, null_cond, message):
    with pytest.raises(ValueError, match=message):
        classifier_free_batched(lambda t, x, cond: x, "velocity", Linear(), cond, null_cond, 2.0)


def test_whole_numbers_are_rates():
    for rate, expected in ((0, LABELS), (1, np.zeros_like(LABELS))):
        np.testing.assert_array_equal(DropCondition(rate, 0)(jax.random.key(0), LABELS), expected)


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_refuses_rates(rate):
    for build in (lambda: DropCondition(rate, 0), lambda: drop_condition(jax.random.key(0), LABELS, 0, rate)):
        with pytest.raises(ValueError, match=rf"rate must be in \[0, 1\], got {rate}"):
            build()


# Parts of a condition, group by group

NUM = 4000


def parts(num):
    """Tokens of two encoders with one mask, a label, a vector, and a guidance scale that is always told."""
    return Conditions(
        vector=jnp.ones((num, 2)),
        label=jnp.zeros(num, int),
        tokens={"clip": jnp.ones((num, 1, 3)), "t5": jnp.ones((num, 2, 3))},
        mask=jnp.ones((num, 2), bool),
        guidance=jnp.full(num, 3.5),
    )


NO_PARTS = Conditions(vector=0.0, label=1, tokens={"clip": 0.0, "t5": -1.0}, mask=False, guidance=0.0)
RATES = {"vector": 0.1, "label": 0.5, "tokens.clip": 0.3, ("tokens.t5", "mask"): 0.25}
NULL_OF = {
    "vector": lambda cond: cond.vector == 0,
    "label": lambda cond: cond.label == 1,
    "tokens.clip": lambda cond: cond.tokens["clip"] == 0,
    "tokens.t5": lambda cond: cond.tokens["t5"] == -1,
    "mask": lambda cond: ~cond.mask,
}


@pytest.fixture(scope="module")
def lost():
    """Which examples lost which part, over 20 keys of one traced program: {name: bool [20, NUM]}."""
    traces = []

    @jax.jit
    def drop(key, cond):
        traces.append(key)
        return DropConditions(RATES, NO_PARTS)(key, cond)

    cond, rows = parts(NUM), []
    for seed in range(20):
        out = drop(jax.random.key(seed), cond)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), out) == jax.tree.map(lambda a: (a.shape, a.dtype), cond)
        np.testing.assert_array_equal(out.guidance, cond.guidance)
        whole = {name: np.asarray(null(out)).reshape(NUM, -1) for name, null in NULL_OF.items()}
        for values in whole.values():
            np.testing.assert_array_equal(values, values[:, :1].repeat(values.shape[1], axis=1))  # all or nothing
        rows.append({name: values[:, 0] for name, values in whole.items()})
    assert len(traces) == 1
    return {name: np.stack([row[name] for row in rows]) for name in NULL_OF}


def test_groups_lose_their_shares(lost):
    np.testing.assert_array_equal(lost["tokens.t5"], lost["mask"])
    for group, rate in RATES.items():
        share = lost[group if isinstance(group, str) else group[0]].mean()
        assert abs(share - rate) <= 3 * np.sqrt(rate * (1 - rate) / (20 * NUM))


def test_groups_are_dropped_independently(lost):
    """Of each other, and of those of the neighbours: as often together as the product of the rates says."""
    rates = {group if isinstance(group, str) else group[0]: rate for group, rate in RATES.items()}
    for a in rates:
        for b in rates:
            first, second = (lost[a], lost[b]) if a != b else (lost[a][:, 1:], lost[b][:, :-1])
            both = rates[a] * rates[b]
            assert abs((first & second).mean() - both) <= 4 * np.sqrt(both * (1 - both) / first.size), (a, b)


def test_groups_are_drawn_by_name_and_not_by_order():
    key, cond = jax.random.key(5), parts(16)
    backwards = {("mask", "tokens.t5"): 0.25, "tokens.clip": 0.3, "label": 0.5, "vector": 0.1}
    one, other = DropConditions(RATES, NO_PARTS), DropConditions(backwards, NO_PARTS)
    assert one == other
    assert hash(one) == hash(other)
    jax.tree.map(np.testing.assert_array_equal, one(key, cond), other(key, cond))
    jax.tree.map(np.testing.assert_array_equal, one(key, cond), drop_conditions(key, cond, NO_PARTS, backwards))
    assert one != DropConditions(RATES | {"label": 0.4}, NO_PARTS)
    assert one != DropConditions(RATES, NO_PARTS._replace(label=2))
    assert one != DropCondition(0.1, NO_PARTS)
    assert DropConditions({"label": jnp.float32(0.5)}, 1) == DropConditions({"label": 0.5}, 1)


def test_a_part_is_all_that_is_in_it():
    """The field of several encoders is one group, and names of dicts work as those of fields."""
    key, cond = jax.random.key(0), parts(8)
    out = drop_conditions(key, cond, NO_PARTS, {"tokens": 1.0})
    np.testing.assert_array_equal(out.tokens["clip"], jnp.zeros((8, 1, 3)))
    np.testing.assert_array_equal(out.tokens["t5"], -jnp.ones((8, 2, 3)))
    np.testing.assert_array_equal(out.label, cond.label)
    out = drop_conditions(key, cond._asdict(), NO_PARTS._asdict(), {"label": 1.0, "mask": 0.0})
    assert out["label"].all()
    assert out["mask"].all()


def test_without_a_part():
    cond = parts(3)
    out = without(cond, NO_PARTS, ("tokens", "label"))
    kept = {"vector": False, "label": True, "tokens.clip": True, "tokens.t5": True, "mask": False}
    assert {name: bool(null(out).all()) for name, null in NULL_OF.items()} == kept
    np.testing.assert_array_equal(out.guidance, cond.guidance)


def test_groups_are_dropped_in_the_loss():
    """Beside what the loss does with keys, as `DropCondition`."""
    seen = []

    def apply_fn(params, t, x, cond, *, train, rngs):
        seen.append(cond)
        return params * x

    cond = parts(4)
    loss_fn = flow_matching(apply_fn, AffinePath(), drop=DropConditions({"label": 1.0, "vector": 0.0}, NO_PARTS))
    loss_fn(1.0, jax.random.key(0), {"x1": jnp.ones((4, 2)), "cond": cond})
    jax.tree.map(np.testing.assert_array_equal, seen[-1], cond._replace(label=jnp.ones(4, int)))


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"image": 0.1}, "rates must name parts of cond that there are, 'vector', 'label', .*, got 'image'"),
        ({"local": 0.1}, "rates must name parts of cond that there are, .*'guidance', got 'local'"),  # None
        ({"token": 0.1}, "rates must name parts of cond that there are, .*, got 'token'"),
        ({"tokens.": 0.1}, "rates must name parts of cond that there are, .*, got 'tokens.'"),
        (
            {"label": 0.1, ("vector", "label"): 0.2},
            "rates must have one rate for each part of cond, got two for 'label'",
        ),
        ({"tokens": 0.1, "tokens.t5": 0.2}, "one rate for each part of cond, got two for 'tokens.t5'"),
        ({("label", "mask"): 0.1, ("mask", "label"): 0.1}, "rates must have one rate for each group, got "),
        ({"label": 1.5}, r"rates\['label'\] must be in \[0, 1\], got 1.5"),
        ({("label", "mask"): "a"}, r"rates\[\('label', 'mask'\)\] must be in \[0, 1\], got 'a'"),
        ({}, r"rates must be a mapping such as \{'label': 0.1\}, got \{\}"),
        (0.1, r"rates must be a mapping such as \{'label': 0.1\}, got 0.1"),
        ({3: 0.1}, "rates must be a name, or a tuple of names, of parts of cond, got 3"),
        ({(): 0.1}, r"rates must be a name, or a tuple of names, of parts of cond, got \(\)"),
    ],
)
def test_refuses_groups(rates, message):
    with pytest.raises(ValueError, match=message):
        DropConditions(rates, NO_PARTS)(jax.random.key(0), parts(2))


def test_refuses_groups_of_what_has_no_names():
    with pytest.raises(ValueError, match="rates must name parts of cond that there are, none with a name, got 'label'"):
        drop_conditions(jax.random.key(0), LABELS, 7, {"label": 0.1})
    with pytest.raises(ValueError, match="null_cond must have the structure of cond"):
        drop_conditions(jax.random.key(0), parts(2), NO_PARTS._replace(local=0.0), {"label": 0.1})
    with pytest.raises(ValueError, match=r"group must name parts of cond that there are, .*, got 'local'"):
        without(parts(2), NO_PARTS, "local")
    with pytest.raises(ValueError, match=r"group must be a name, or a tuple of names, .*, got None"):
        without(parts(2), NO_PARTS, None)


# A network that knows nothing of dropping, trained with and without it. The data are N(-1, 1/4) and N(1, 1/4).

NULL, SPREAD = 2, 0.5
ONE = [oracles.gaussian_mixture([[mean]], SPREAD) for mean in (-1.0, 1.0)]
BOTH = oracles.gaussian_mixture([[-1.0], [1.0]], SPREAD)


def network(params, t, x, cond, *, train, rngs):
    h = jnp.concatenate([x, t[:, None], jax.nn.one_hot(cond, 3)], axis=1)
    for w, b in params[:-1]:
        h = jax.nn.silu(h @ w + b[None])
    w, b = params[-1]
    return h @ w + b[None]


def draw(key, num):
    key_label, key_noise = jax.random.split(key)
    label = jax.random.randint(key_label, (num,), 0, 2)
    return {"x1": 2.0 * label[:, None] - 1 + SPREAD * jax.random.normal(key_noise, (num, 1)), "cond": label}


@functools.cache
def trained(rate):
    shapes = [(5, 64), (64, 64), (64, 1)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = [
        (jax.random.normal(key, shape) / np.sqrt(shape[0]), jnp.zeros(shape[1]))
        for key, shape in zip(keys, shapes, strict=True)
    ]
    loss_fn = flow_matching(network, AffinePath(), drop=DropCondition(rate, NULL))
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 600))

    @optimised
    def train(params):
        def step(carry, key):
            params, state = carry
            key_data, key_loss = jax.random.split(key)
            gradient = jax.grad(loss_fn, has_aux=True)(params, key_loss, draw(key_data, 512))[0]
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(1), 600))[0][0]

    return train(params)


def gaps(params):
    """RMS error of each branch against its oracle, where its own x_t are; and how far apart the oracles are."""
    num = 4000
    t = jnp.linspace(0.02, 0.9, num)
    sample = AffinePath().sample(
        None, t, jax.random.normal(jax.random.key(2), (num, 1)), draw(jax.random.key(3), num)["x1"]
    )
    rms = lambda a, b: float(jnp.sqrt(jnp.mean((a - b) ** 2)))  # noqa: E731
    x, both = sample.x_t, oracles.velocity(BOTH, Linear())(t, sample.x_t)
    found = {"none": rms(network(params, t, x, jnp.full(num, NULL), train=False, rngs=None), both)}
    for label in (0, 1):
        data = 2.0 * label - 1 + SPREAD * jax.random.normal(jax.random.key(4), (num, 1))
        x = AffinePath().sample(None, t, jax.random.normal(jax.random.key(5), (num, 1)), data).x_t
        one, both = (oracles.velocity(gm, Linear())(t, x) for gm in (ONE[label], BOTH))
        found[label] = rms(network(params, t, x, jnp.full(num, label), train=False, rngs=None), one)
        found[f"{label} apart"] = rms(one, both)
    return found


@pytest.mark.slow
def test_both_branches_are_learned():
    """Conditional and unconditional velocity agree with the oracles, far better than these with each other."""
    found = gaps(trained(0.3))
    assert min(found["0 apart"], found["1 apart"]) > 0.9
    assert max(found["none"], found[0], found[1]) < 0.22


@pytest.mark.slow
def test_without_dropping_there_is_no_unconditional_branch():
    found = gaps(trained(0.0))
    assert max(found[0], found[1]) < 0.22
    assert found["none"] > 0.4
