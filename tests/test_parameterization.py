import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import SCHEDULES, mixture

from fm_jax import oracles, schedules
from fm_jax.nfe import Counted, domain_of
from fm_jax.parameterization import convert, reschedule, reschedule_domain, score_fn, velocity_domain, velocity_fn
from fm_jax.samplers import RungeKutta, sample
from fm_jax.schedules import log_snr
from fm_jax.types import KINDS

T = np.array([0.05, 0.3, 0.6, 0.9])
X = np.array([[0.1, -0.4], [1.5, 0.3], [-1.0, 1.0], [0.4, -1.2]])


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_ordered_pair_against_the_oracle(schedule, x64):
    exact = jax.jit(lambda t, x: oracles.prediction(mixture(), schedule, t, x))(T, X)
    convert_all = jax.jit(lambda exact: {k: convert(k, getattr(exact, k), T, X, schedule) for k in KINDS})
    for kind, converted in convert_all(exact).items():
        for other in KINDS:
            np.testing.assert_allclose(
                getattr(converted, other), getattr(exact, other), rtol=1e-8, atol=1e-8, err_msg=f"{kind} to {other}"
            )


@pytest.mark.slow
def test_works_on_images_and_does_not_confuse_batch_with_features(x64):
    """t is [batch] and batch == width == channels: per-example results must equal one-by-one results."""
    schedule, t = schedules.Cosine(), jnp.array([0.2, 0.5, 0.8])
    x, value = (jax.random.normal(jax.random.key(i), (3, 2, 3, 3)) for i in range(2))
    together = convert("velocity", value, t, x, schedule)
    for i in range(3):
        alone = convert("velocity", value[i : i + 1], t[i : i + 1], x[i : i + 1], schedule)
        for a, b in zip(together, alone):
            np.testing.assert_allclose(a[i], b[0], rtol=1e-12)


@pytest.mark.slow
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


@pytest.mark.slow
def test_score_fn_is_grad_log_p(x64):
    gm, schedule = mixture(), schedules.Linear()
    score = score_fn(oracles.velocity(gm, schedule), schedule)(T, X)
    gradient = jax.grad(lambda x: oracles.log_prob(gm, schedule, T, x).sum())(X)
    np.testing.assert_allclose(score, gradient, rtol=1e-9)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("new", SCHEDULES, ids=str)
@pytest.mark.parametrize("old", [schedules.Linear(), schedules.Cosine(), schedules.VP()], ids=str)
def test_reschedule_gives_the_oracle_velocity_of_the_new_schedule(old, new, x64):
    gm = mixture()
    low, high = reschedule_domain(old, new)
    r = low + (high - low) * (T + 1e-4)
    v, expected = jax.jit(reschedule(oracles.velocity(gm, old), old, new)), jax.jit(oracles.velocity(gm, new))(r, X)
    np.testing.assert_allclose(v(r, X), expected, rtol=1e-6, atol=1e-8)


def test_reschedule_is_finite_at_both_ends(x64):
    gm, (old, new) = mixture(), (schedules.Linear(), schedules.Cosine())
    v, expected = jax.jit(reschedule(oracles.velocity(gm, old), old, new)), jax.jit(oracles.velocity(gm, new))
    for r in (0.0, 1.0):
        np.testing.assert_allclose(v(r, X), expected(r, X), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("new", SCHEDULES, ids=str)
@pytest.mark.parametrize("old", [schedules.Linear(), schedules.VP(), schedules.VE()], ids=str)
def test_reschedule_domain_is_where_the_old_schedule_has_the_snr(old, new, x64):
    """An end of it is an end of the new schedule, within the old one's SNR, or has the SNR of the old one's end."""
    domain = reschedule_domain(old, new)
    assert new.domain[0] <= domain[0] < domain[1] <= new.domain[1]
    for r, new_end, old_end, sign in zip(domain, new.domain, old.domain, (1, -1)):
        reached = log_snr(old, old_end)
        if r == new_end:
            assert sign * log_snr(new, r) >= sign * reached
        else:
            np.testing.assert_allclose(log_snr(new, r), reached, rtol=1e-6)


def test_reschedule_domain():
    linear, cosine, vp, ve = schedules.Linear(), schedules.Cosine(), schedules.VP(), schedules.VE()
    assert reschedule_domain(linear, cosine) == (0.0, 1.0)
    assert reschedule_domain(linear, ve) == ve.domain
    np.testing.assert_allclose(reschedule_domain(ve, linear), (0.02 / 1.02, 1 / 1.01), rtol=1e-5)  # alpha / sigma
    np.testing.assert_allclose(reschedule_domain(vp, linear)[0], 0.006529, rtol=1e-3)
    assert reschedule_domain(schedules.Polynomial(2.0), linear)[0] > 0  # at t = 0 its log-SNR stands still
    loud, quiet = schedules.VE(1.0, 2.0), schedules.VE(0.1, 0.2)
    with pytest.raises(ValueError, match=r"^VE\(.*=0.2\) and VE\(.*=2.0\) have no signal-to-noise ratio in common.$"):
        reschedule_domain(loud, quiet)
    with pytest.raises(ValueError, match=r"^new_schedule must be a schedule, .* got the class VP: make one"):
        reschedule_domain(linear, schedules.VP)
    with pytest.raises(ValueError, match=r"^old_schedule must be a schedule, .* got None, which has no 'alpha'"):
        reschedule_domain(None, linear)


@pytest.mark.slow
def test_outside_of_its_domain_a_rescheduled_velocity_is_refused():
    old, new = schedules.VP(), schedules.Linear()
    v = reschedule(oracles.velocity(mixture(), old), old, new)
    x = jnp.asarray(X, jnp.float32)
    domain = domain_of(v)
    assert domain == reschedule_domain(old, new)
    for r in (*domain, jnp.full(4, 0.5)):
        assert np.isfinite(v(r, x)).all()
    for r in (0.0, 0.9999, np.array([0.5, 0.5, 0.0, 0.5])):
        with pytest.raises(ValueError, match=r"^r must be within \[0.0065.*, where the old schedule has its SNR, got "):
            v(r, x)
    for r, inside in ((0.0, 0), (0.9999, 0), (np.array([0.5, 0.0, 1.0, 0.5]), np.array([1, 0, 0, 1]))):
        finite = np.isfinite(jax.jit(v)(r, x))
        np.testing.assert_array_equal(finite, np.broadcast_to(np.reshape(inside, (-1, 1)), finite.shape))


def test_sampling_keeps_to_the_domain_of_a_rescheduled_velocity():
    old, new = schedules.VP(), schedules.Linear()
    v, seen = reschedule(oracles.velocity(mixture(), old), old, new), []

    def noted(t, x):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return v(t, x)

    low, high = reschedule_domain(old, new)
    x0 = jnp.asarray(X, jnp.float32)
    found = jax.jit(lambda x0: sample(Counted(noted, None, domain_of(v)), x0, RungeKutta("heun"), times=20).x)(x0)
    jax.effects_barrier()
    np.testing.assert_allclose(sorted({*seen}), np.linspace(low, high, 21), rtol=1e-5)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, sample(v, x0, RungeKutta("heun"), times=20).x, rtol=1e-4, atol=1e-5)
    for times in (np.linspace(0, high, 5), np.linspace(1, low, 5)):
        with pytest.raises(ValueError, match=r"^times must be within \[0.0065.*\], the domain of v, got times from "):
            sample(v, x0, times=times)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("new", [schedules.Linear(), schedules.Cosine(), schedules.EDM()], ids=str)
@pytest.mark.parametrize("old", [schedules.VP(), schedules.VE(), schedules.DDPM()], ids=str)
def test_clipped_reschedule(old, new, x64):
    """Within the domain as without; outside x only scales, with the norm of (alpha, sigma), and the model stays in."""
    gm, seen = mixture(), []

    def model(t, x):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return oracles.velocity(gm, old)(t, x)

    low, high = reschedule_domain(old, new)
    clipped = jax.jit(reschedule(model, old, new, clip=True))
    inside = low + (high - low) * T
    expected = jax.jit(reschedule(oracles.velocity(gm, old), old, new))(inside, X)
    np.testing.assert_allclose(clipped(inside, X), expected, rtol=1e-12)

    def log_norm(r):
        return jnp.log(jnp.hypot(new.alpha(r), new.sigma(r)))

    outside = [r for r in (0.0, low / 2, (1 + high) / 2, 1.0) if not low <= r <= high]
    assert outside
    for r in outside:
        np.testing.assert_allclose(clipped(r, X), jax.grad(log_norm)(r) * X, rtol=1e-9, atol=1e-15)
    jax.effects_barrier()
    assert all(((t >= old.domain[0]) & (t <= old.domain[1])).all() for t in seen)
    assert len(seen) == 1 + len(outside)


@pytest.mark.slow
def test_a_clipped_reschedule_is_sampled_from_noise_to_data():
    old, new = schedules.VP(), schedules.Linear()
    x0 = jax.random.normal(jax.random.key(0), (64, 2))
    velocity = oracles.velocity(mixture(), old)
    clipped, exact = (reschedule(velocity, old, new, clip=clip) for clip in (True, False))
    assert domain_of(clipped) is None
    for times in (20, np.linspace(0, 1, 21), np.linspace(1, 0, 21)):
        assert np.isfinite(sample(clipped, x0, times=times).x).all()
    # Outside x only scales: from r = 0 to 1 is what it is over the domain, between two changes of the norm.
    low, high = reschedule_domain(old, new)
    inner = [low, *np.linspace(0.05, 0.99, 40), high]
    start, end = (jnp.hypot(new.alpha(r), new.sigma(r)) for r in (low, high))
    found = sample(clipped, x0, RungeKutta("rk4"), times=[0.0, low - 1e-6, *inner, high + 1e-6, 1.0]).x
    expected = sample(exact, start * x0, RungeKutta("rk4"), times=inner).x / end
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    for r in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"^r must be within \[0.0, 1.0\], the domain of Linear\(.*\), got {r}.$"):
            clipped(r, x0)
    with pytest.raises(ValueError, match=r"^clip must be True or False, got 1.$"):
        reschedule(velocity, old, new, clip=1)


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
