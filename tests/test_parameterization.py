import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SCHEDULES, mixture

from fm_jax import oracles, schedules
from fm_jax.parameterization import convert, reschedule, score_fn, velocity_domain, velocity_fn
from fm_jax.types import KINDS

T = np.array([0.05, 0.3, 0.6, 0.9])
X = np.array([[0.1, -0.4], [1.5, 0.3], [-1.0, 1.0], [0.4, -1.2]])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_ordered_pair_against_the_oracle(schedule, x64):
    exact = jax.jit(lambda t, x: oracles.prediction(mixture(), schedule, t, x))(T, X)
    convert_all = jax.jit(lambda exact: {k: convert(k, getattr(exact, k), T, X, schedule) for k in KINDS})
    for kind, converted in convert_all(exact).items():
        for other in KINDS:
            np.testing.assert_allclose(
                getattr(converted, other), getattr(exact, other), rtol=1e-8, atol=1e-8, err_msg=f"{kind} to {other}"
            )


def test_works_on_images_and_does_not_confuse_batch_with_features(x64):
    """t is [batch] and batch == width == channels: per-example results must equal one-by-one results."""
    schedule, t = schedules.Cosine(), jnp.array([0.2, 0.5, 0.8])
    x, value = (jax.random.normal(jax.random.key(i), (3, 2, 3, 3)) for i in range(2))
    together = convert("velocity", value, t, x, schedule)
    for i in range(3):
        alone = convert("velocity", value[i : i + 1], t[i : i + 1], x[i : i + 1], schedule)
        for a, b in zip(together, alone):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-12)


@pytest.mark.parametrize("t", [0.3, T], ids=["scalar", "batch"])
def test_velocity_fn(t, x64):
    gm, schedule = mixture(), schedules.Cosine()
    expected = oracles.velocity(gm, schedule)(t, X)
    for kind in KINDS:
        model = lambda t, x, cond: getattr(oracles.prediction(gm, schedule, t, x), kind)  # noqa: B023, E731
        v = jax.jit(velocity_fn(model, kind, schedule))
        np.testing.assert_allclose(v(jnp.asarray(t), X), expected, rtol=1e-9)


def test_velocity_fn_gives_the_model_batched_time_and_the_condition():
    seen = {}

    def model(t, x, cond):
        seen.update(t=t.shape, cond=cond)
        return x

    velocity_fn(model, "velocity", schedules.Linear(), cond=jnp.arange(4))(jnp.asarray(0.5), jnp.asarray(X))
    assert seen["t"] == (4,)
    np.testing.assert_array_equal(seen["cond"], jnp.arange(4))


def test_score_fn_is_grad_log_p(x64):
    gm, schedule = mixture(), schedules.Linear()
    score = score_fn(oracles.velocity(gm, schedule), schedule)(T, X)
    gradient = jax.grad(lambda x: oracles.log_prob(gm, schedule, T, x).sum())(X)
    np.testing.assert_allclose(score, gradient, rtol=1e-9)


@pytest.mark.parametrize("new", SCHEDULES, ids=str)
@pytest.mark.parametrize("old", [schedules.Linear(), schedules.Cosine(), schedules.VP()], ids=str)
def test_reschedule_gives_the_oracle_velocity_of_the_new_schedule(old, new, x64):
    gm = mixture()
    r = T + 1e-4
    v, expected = jax.jit(reschedule(oracles.velocity(gm, old), old, new)), jax.jit(oracles.velocity(gm, new))(r, X)
    np.testing.assert_allclose(v(r, X), expected, rtol=1e-6, atol=1e-8)


def test_reschedule_is_finite_at_both_ends(x64):
    gm, (old, new) = mixture(), (schedules.Linear(), schedules.Cosine())
    v, expected = jax.jit(reschedule(oracles.velocity(gm, old), old, new)), jax.jit(oracles.velocity(gm, new))
    for r in (0.0, 1.0):
        np.testing.assert_allclose(v(r, X), expected(r, X), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_velocity_is_finite_on_the_declared_domain(schedule):
    value = np.ones((3, 2), dtype=np.float32)
    t = {kind: np.linspace(*velocity_domain(kind, schedule), 3, dtype=np.float32) for kind in KINDS}
    velocities = jax.jit(lambda t: {kind: convert(kind, value, t[kind], value, schedule).velocity for kind in KINDS})(t)
    assert all(np.isfinite(v).all() for v in velocities.values()), velocities


def test_singular_conversions_are_not_hidden():
    """Where a conversion has no solution the result is not finite, and `velocity_domain` leaves the time out."""
    value, x = jnp.ones((1, 2)), jnp.full((1, 2), 2.0)
    for kind, t in (("data", 1.0), ("noise", 0.0), ("score", 0.0)):
        low, high = velocity_domain(kind, schedules.Linear())
        assert not low <= t <= high
        assert not np.isfinite(convert(kind, value, t, x, schedules.Linear()).velocity).any()
    assert not np.isfinite(score_fn(lambda t, x: value, schedules.Linear())(1.0, x)).any()


def test_bad_input():
    with pytest.raises(ValueError, match="kind must be one of 'velocity', 'data', 'noise', 'score', got 'eps'"):
        convert("eps", X, T, X, schedules.Linear())
    with pytest.raises(ValueError, match="kind must be one of"):
        velocity_fn(lambda t, x, c: x, "x0", schedules.Linear())
    with pytest.raises(ValueError, match="kind must be one of"):
        velocity_domain("x1", schedules.Linear())
    with pytest.raises(ValueError, match="value and x_t must have the same shape"):
        convert("data", X[:2], T, X, schedules.Linear())
    with pytest.raises(ValueError, match=r"cond must be \[batch, ...\] with batch = 4, got shape \(3,\)"):
        velocity_fn(lambda t, x, c: x, "velocity", schedules.Linear(), cond=jnp.arange(3))(0.5, X)
    with pytest.raises(ValueError, match=r"schedule must be a schedule, .* got the class Linear"):
        velocity_fn(lambda t, x, c: x, "velocity", schedules.Linear)
    with pytest.raises(ValueError, match=r"t must be a scalar or \[batch\]"):
        convert("data", X, T[:3], X, schedules.Linear())
