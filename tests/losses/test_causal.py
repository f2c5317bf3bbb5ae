"""A causal network: its loss is the likelihood itself, and it is drawn from from left to right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import losses, schedules, sources
from fm_jax.conditions import DropCondition
from fm_jax.likelihood import next_token_log_prob
from fm_jax.models import TokenTransformer, init_params, linen_apply
from fm_jax.parameterization import bind
from fm_jax.paths import MixturePath
from fm_jax.samplers import FirstHitting, sample

KEY = jax.random.key(0)
PATH = MixturePath(schedules.Linear(), sources.Masked(4, 3))
JOINT = np.random.default_rng(0).dirichlet(np.full(27, 0.5)).reshape(3, 3, 3)
ALL = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)


def conditionals(params, t, x, cond, *, train, rngs):
    """log q(x_i | x_<i) from tokens one place late, [mask, x_0, x_1]; t counts, to see what it is told."""
    first = jnp.broadcast_to(JOINT.sum((1, 2)), (len(x), 3))
    second = jnp.asarray(JOINT.sum(2))[x[:, 1] % 3]
    third = jnp.asarray(JOINT)[x[:, 1] % 3, x[:, 2] % 3]
    each = [first, second / second.sum(-1, keepdims=True), third / third.sum(-1, keepdims=True)]
    logits = jnp.log(jnp.stack(each, axis=1))
    assert x.shape[1] == 3
    # The mask has a logit of its own, which must not count.
    return jnp.concatenate([logits, jnp.full((*x.shape, 1), 7.0)], axis=-1) + jnp.where(jnp.all(t == 1), 0, jnp.nan)


LATE = losses.one_late(conditionals, PATH)


@pytest.mark.slow
def test_the_loss_is_minus_the_log_likelihood():
    loss_fn = losses.next_token(LATE, PATH)
    for x1 in ALL[[0, 5, 14]]:
        loss, metrics = loss_fn({}, KEY, {"x1": x1[None]})
        np.testing.assert_allclose(loss, -np.log(JOINT[tuple(x1)]) / 3, rtol=1e-5)
    weight = np.array([3.0, 0.0])
    weighted, _ = loss_fn({}, KEY, {"x1": ALL[:2], "weight": weight})
    np.testing.assert_allclose(weighted, -1.5 * np.log(JOINT[tuple(ALL[0])]) / 3, rtol=1e-5)
    assert metrics["loss"] == loss
    assert 0 <= metrics["accuracy"] <= 1


def test_the_log_likelihood_of_everything():
    found = next_token_log_prob(bind(LATE, {}), PATH, ALL)
    np.testing.assert_allclose(found, np.log(JOINT).ravel(), rtol=1e-5)


def test_drawn_from_left_to_right():
    """By its law; chi2 of 26 degrees of freedom is above 62 by chance once in 1e4."""
    x0 = jnp.full((20_000, 3), 3)
    solution = jax.jit(lambda key: sample(bind(LATE, {}), x0, FirstHitting(PATH, "first"), key=key))(KEY)
    assert int(solution.calls) == 3
    counts = np.bincount(np.ravel_multi_index(np.asarray(solution.x).T, (3, 3, 3)), minlength=27)
    wanted = 20_000 * JOINT.ravel()
    kept = wanted > 1
    assert (((counts - wanted) ** 2 / wanted)[kept]).sum() < 62


@pytest.mark.slow
def test_a_causal_transformer_does_not_see_what_it_is_to_say():
    network = TokenTransformer(4, mask=3, hidden=16, num_layers=2, num_heads=2, causal=True, scan_layers=False)
    params = init_params(network, KEY, (5,))
    params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(KEY, p.shape), params)
    f = bind(losses.one_late(linen_apply(network), PATH), params)
    x = jnp.array([[0, 1, 2, 0, 1]])
    for i in range(5):
        changed = (f(0.5, x.at[0, i].set((x[0, i] + 1) % 3)) != f(0.5, x)).any(axis=-1)[0]
        assert not changed[: i + 1].any()
        assert changed[i + 1 :].all()


def test_conditions_are_dropped_as_in_every_loss():
    told = lambda params, t, x, cond, *, train, rngs: jnp.zeros((*x.shape, 4)).at[..., 0].set(cond[:, None])  # noqa: E731
    loss_fn = losses.next_token(losses.one_late(told, PATH), PATH, drop=DropCondition(1.0, null_cond=0))
    loss, _ = loss_fn({}, KEY, {"x1": ALL, "cond": jnp.full(27, 9)})
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.one_late(conditionals, MixturePath(schedules.Linear(), sources.UniformTokens(4))), "a mask"),
        (lambda: losses.next_token(LATE, schedules.Linear()), "path must be a MixturePath"),
        (lambda: LATE({}, 0.0, jnp.zeros((2, 3, 1), int), None), r"x must be tokens \[batch, n\]"),
        (lambda: LATE({}, 0.0, jnp.zeros((2, 3)), None), "x must be tokens"),
        (lambda: losses.next_token(LATE, PATH)({}, KEY, {"x1": jnp.full((1, 3), 3)}), "x1 must be"),
        (lambda: losses.next_token(LATE, PATH)({}, None, {"x1": jnp.zeros((1, 3), int)}), "key must be"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
