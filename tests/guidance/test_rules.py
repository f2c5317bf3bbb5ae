"""Every rule: its formula, and that it works for every kind of network, every sampler and every derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles
from fm_jax.guidance import (
    Extrapolate,
    FirstChannels,
    Projected,
    Rescale,
    ZeroStar,
    classifier,
    classifier_free,
    classifier_free_batched,
    compose,
)
from fm_jax.nfe import Counted
from fm_jax.parameterization import convert, velocity_fn
from fm_jax.samplers import Adaptive, sample
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import Cosine, Linear, Polynomial
from fm_jax.types import KINDS

RNG = np.random.default_rng(0)
T, SCALE = np.array([0.02, 0.3, 0.9]), np.array([0.0, 2.5, -1.0])
X, C, U = RNG.normal(size=(3, 3, 2, 4))
RULES = [
    Extrapolate(),
    Rescale(),
    ZeroStar(),
    Projected(Cosine()),
    Projected(Cosine(), parallel=0.3, norm=0.5),
]


def data_prediction(t, x, v):
    """Cosine schedule: the solution of alpha d + sigma n = x, alpha' d + sigma' n = v."""
    angle = np.pi / 2 * t
    matrix = np.array([[np.sin(angle), np.cos(angle)], np.pi / 2 * np.array([np.cos(angle), -np.sin(angle)])])
    return np.linalg.solve(matrix, np.stack([x.ravel(), v.ravel()]))[0].reshape(x.shape), matrix


def projected(t, x, c, u, s, parallel, norm):
    (d_c, matrix), (d_u, _) = data_prediction(t, x, c), data_prediction(t, x, u)
    difference = d_c - d_u
    difference = difference * min(1, norm / np.sqrt((difference**2).sum()))
    unit = d_c / np.sqrt((d_c**2).sum())
    along = (difference * unit).sum() * unit
    data = d_c + (s - 1) * (difference - along + parallel * along)
    noise = (x - matrix[0, 0] * data) / matrix[0, 1]
    return matrix[1, 0] * data + matrix[1, 1] * noise


def formula(rule, t, x, c, u, s):
    """What the papers say, in NumPy, for one example."""
    match rule:
        case Extrapolate():
            return u + s * (c - u)
        case Rescale(phi=phi):
            guided = u + s * (c - u)
            return phi * guided * c.std(ddof=1) / guided.std(ddof=1) + (1 - phi) * guided
        case ZeroStar(zero_until=zero_until):
            best = np.linalg.lstsq(u.reshape(-1, 1), c.ravel())[0][0]
            return 0 * c if t < zero_until else best * u + s * (c - best * u)
        case Projected(parallel=parallel, norm=norm):
            return projected(t, x, c, u, s, parallel, norm)


@jax.jit
def every_rule(t, x, conditional, unconditional, scale):
    return [rule(t, x, conditional, unconditional, scale) for rule in RULES]


def test_formula(x64):
    for rule, value, at_one_time in zip(
        RULES, every_rule(T, X, C, U, SCALE), every_rule(0.3, X, C, U, 2.0), strict=True
    ):
        expected = [formula(rule, *each) for each in zip(T, X, C, U, SCALE, strict=True)]
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12, err_msg=str(rule))
        expected = [formula(rule, 0.3, *each, 2.0) for each in zip(X, C, U, strict=True)]
        np.testing.assert_allclose(at_one_time, expected, rtol=1e-9, err_msg=str(rule))


def test_the_norm_is_reached_by_some_and_not_by_others(x64):
    """So that the formula is checked on both sides of the limit."""
    lengths = [np.linalg.norm(data_prediction(t, x, c - u + x)[0] - x) for t, x, c, u in zip(T, 0 * X, C, U)]
    assert min(lengths) < 0.5 < max(lengths)


def test_scale_one_is_the_conditional_velocity_to_the_last_bit():
    x, c, u = 100 * jax.random.normal(jax.random.key(0), (3, 50, 3))
    for rule, value in zip(RULES, every_rule(jnp.linspace(0, 1, 50), x, c, u, jnp.ones(50)), strict=True):
        np.testing.assert_array_equal(value, c, err_msg=str(rule))


def test_relatives(x64):
    @jax.jit
    def relatives(*arguments):
        rules = Extrapolate(), Rescale(0.0), Projected(Cosine(), parallel=1.0), Rescale(1.0)
        return [rule(*arguments) for rule in rules], ZeroStar(0.0)(*arguments[:3], -3 * arguments[2], arguments[4])

    (plain, *same, rescaled), multiple = relatives(T, X, C, U, SCALE)
    for each in same:
        np.testing.assert_allclose(each, plain, rtol=1e-10)
    np.testing.assert_allclose(rescaled.std(axis=(1, 2)), C.std(axis=(1, 2)))
    np.testing.assert_allclose(multiple, C, rtol=1e-10)  # where v_u is a multiple of v_c nothing is left to add


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), Polynomial(2.0)], ids=str)
def test_projected_is_continuous_up_to_both_ends(schedule, x64):
    """Also where alpha, sigma or (Polynomial at 0) the determinant of the conversion is 0."""
    mixtures = [oracles.gaussian_mixture([[m, 1.0, 0.0]], 0.5) for m in (2.0, -1.0)]
    rule, x = Projected(schedule, norm=0.5), X[:, 0, :3]
    v_cond, v_uncond = (oracles.velocity(mixture, schedule) for mixture in mixtures)
    guided = jax.jit(classifier_free(v_cond, v_uncond, 3.0, rule=rule))
    for end, near in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
        assert np.isfinite(guided(end, x)).all()
        np.testing.assert_allclose(guided(end, x), guided(near, x), atol=2e-4)


@pytest.mark.slow
def test_gradients_are_finite_where_velocities_vanish_or_agree():
    zero, one, c = jnp.zeros((1, 3)), jnp.ones((1, 3)), jnp.array([[1.0, -2.0, 0.5]])
    cases = [(c, zero), (zero, c), (zero, zero), (c, c), (c, 2 * c), (one, c), (c, one)]
    conditional, unconditional = (jnp.stack(each) for each in zip(*cases, strict=True))
    x = jnp.stack([c] * len(cases))
    times, scales = (each.ravel() for each in np.meshgrid([0.0, 0.02, 0.5, 1.0], [0.0, 1.0, 2.0]))

    def gradients(*arguments):
        return [jax.grad(lambda *a, r=rule: (r(*a) ** 2).sum(), argnums=(0, 1, 2, 3, 4))(*arguments) for rule in RULES]

    over_cases = jax.vmap(gradients, in_axes=(None, 0, 0, 0, None))
    over_all = jax.jit(jax.vmap(over_cases, in_axes=(0, None, None, None, 0)))
    for rule, leaves in zip(RULES, over_all(times, x, conditional, unconditional, scales), strict=True):
        assert all(np.isfinite(leaf).all() for leaf in leaves), rule


def class_model(kind, schedule):
    """A network of any kind with another velocity for each class."""

    def model_fn(t, x, cond=None):
        rate = jnp.array([0.5, -2.0, 1.0])[cond][:, None]
        return getattr(convert("velocity", rate * x + jnp.sin(rate + x), t, x, schedule), kind)

    return model_fn


@pytest.mark.slow
def test_one_batch_is_the_same_as_two_functions_for_every_kind(x64):
    schedule, cond, null, x = Cosine(), np.array([0, 1, 1]), np.full(3, 2), X[:, 0]
    velocities = class_model("velocity", schedule)
    v_cond, v_uncond = (lambda t, x, c=c: velocities(t, x, c) for c in (cond, null))

    @jax.jit
    def both(x):
        two, one = [], []
        for rule in RULES:
            options = {"interval": (0.2, 0.95), "rule": rule}
            two.append(classifier_free(v_cond, v_uncond, SCALE, **options)(T, x))
            models = [(class_model(kind, schedule), kind) for kind in KINDS]
            batched = [classifier_free_batched(*each, schedule, cond, 2, SCALE, **options) for each in models]
            one.append(jnp.stack([v(T, x) for v in batched]))
        return two, one

    for rule, two, one in zip(RULES, *both(x), strict=True):
        np.testing.assert_allclose(one, np.stack([two] * len(KINDS)), rtol=1e-9, atol=1e-12, err_msg=str(rule))


def guided_fields():
    """One of everything that guides, on fields that are quick to compile."""

    def model_fn(t, x, cond):
        sign = 1.0 - cond[:, None]  # classes 0 and 2, and 1 for none
        return jnp.cos(3 * t)[:, None] * sign - x + jnp.sin(x[:, ::-1])

    model_fn = Counted(model_fn, 1)
    v_cond, v_uncond = (velocity_fn(model_fn, "velocity", Linear(), jnp.full(4, c)) for c in (0, 1))
    cond = jnp.zeros(4, dtype=int)
    return {
        **{str(rule): classifier_free(v_cond, v_uncond, 2.0, rule=rule) for rule in RULES},
        "batched": classifier_free_batched(model_fn, "velocity", Linear(), cond, 1, 2.0),
        "compose": compose(model_fn, "velocity", Linear(), [cond, cond + 2], 1, [2.0, -0.5]),
        "classifier": classifier(v_uncond, lambda t, x: -jnp.abs(x - 1).sum(axis=1), 2.0, Linear()),
    }


@pytest.mark.slow
def test_every_guided_field_goes_through_every_sampler(x64):
    """Fixed and adaptive, joint and per example, agree. A switch among the fields makes them one compilation."""
    fields = guided_fields()
    assert [v.nfe for v in fields.values()] == [2] * len(RULES) + [2, 3, 1]
    x0, t0 = X[0][:, :2].repeat(2, axis=0), 0.04

    @jax.jit
    def ends(i):
        v = Counted(jax.jit(lambda t, x: jax.lax.switch(i, list(fields.values()), t, x)), 2)
        joint, own = (Adaptive("bosh3", 1e-4, 1e-4, per_sample=per_sample) for per_sample in (False, True))
        return sample(v, x0, times=uniform(200, t0)), *(sample(v, x0, each, times=(t0, 1.0)) for each in (joint, own))

    for i, name in enumerate(fields):
        fixed, joint, own = ends(i)
        assert np.abs(fixed.x - x0).max() > 0.1, name
        np.testing.assert_allclose(joint.x, fixed.x, atol=3e-3, err_msg=name)
        np.testing.assert_allclose(own.x, fixed.x, atol=3e-3, err_msg=name)
        assert int(fixed.nfe) == 200 * 2 * 2
        assert int(joint.nfe) % 2 == 0
        assert own.nfe.shape == (4,)


BAD = [
    (Rescale, {"phi": -0.1}, r"phi must be in \[0, 1\], got -0.1."),
    (Rescale, {"phi": 1.1}, r"phi must be in \[0, 1\], got 1.1."),
    (Rescale, {"phi": float("nan")}, r"phi must be in \[0, 1\], got nan."),
    (ZeroStar, {"zero_until": -0.1}, r"zero_until must be in \[0, 1\), got -0.1."),
    (ZeroStar, {"zero_until": 1.0}, r"zero_until must be in \[0, 1\), got 1.0."),
    (Projected, {"schedule": Linear(), "parallel": float("inf")}, "parallel must be a finite number, got inf."),
    (Projected, {"schedule": Linear(), "norm": 0.0}, r"norm must be in \(0, inf\], got 0.0."),
    (Projected, {"schedule": Linear(), "norm": float("nan")}, r"norm must be in \(0, inf\], got nan."),
]


@pytest.mark.parametrize(("rule", "options", "message"), BAD)
def test_bad_input_is_refused(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(**options)


def test_first_channels_leaves_the_others_conditional():
    t, x, conditional, unconditional = 0.5, *np.random.default_rng(0).normal(size=(3, 2, 4, 4, 5)).astype(np.float32)
    rule = FirstChannels(3, Extrapolate())
    guided = rule(t, x, conditional, unconditional, 4.0)
    first = (slice(None),) * 3 + (slice(3),)
    np.testing.assert_array_equal(
        guided[first], Extrapolate()(t, x[first], conditional[first], unconditional[first], 4.0)
    )
    np.testing.assert_array_equal(guided[..., 3:], conditional[..., 3:])
    with pytest.raises(ValueError, match="x must have at least 6 channels"):
        FirstChannels(6)(t, x, conditional, unconditional, 4.0)
