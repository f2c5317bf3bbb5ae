"""Rates of every kind carry the law of the path: the Kolmogorov equation, on all states of two dependent tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import oracles, rates, schedules, sources
from fm_jax.nfe import Counted
from fm_jax.paths import MetricPath, MixturePath, check_convex
from fm_jax.samplers import sample
from fm_jax.samplers.chain import TauLeaping

Q = np.array([[0.30, 0.05, 0.0], [0.02, 0.20, 0.13], [0.10, 0.05, 0.15]])
UNIFORM = MixturePath(schedules.Linear(), sources.UniformTokens(3))
MASK = MixturePath(schedules.Linear(), sources.Masked(4, 3))
METRIC = MetricPath([[0.0, 1.0, 2.5], [1.0, 0.0, 1.0], [2.5, 1.0, 0.0]])
MIXTURES = {
    "mask": MASK,
    "mask, kinetic-optimal": MixturePath(schedules.SineSquared(), sources.Masked(4, 3)),
    "uniform": UNIFORM,
    "uniform, kinetic-optimal": MixturePath(schedules.SineSquared(1 / 3), sources.UniformTokens(3)),
    "any": MixturePath(schedules.Polynomial(2.0), sources.Categorical((0.6, 0.3, 0.1))),
    "with one that is never drawn": MixturePath(schedules.MaskCosine(), sources.Categorical((0.6, 0.4, 0.0))),
}
KINDS = {
    "forward": rates.forward_rates,
    "reversal": rates.reversal_rates,
    "kinetic": rates.kinetic_rates,
    "corrector": lambda f, path: rates.with_corrector(rates.forward_rates(f, path), path, 3.0),
    "corrector of time": lambda f, path: rates.with_corrector(rates.reversal_rates(f, path), path, lambda t: 2 * t),
    "kinetic corrector": lambda f, path: rates.with_corrector(rates.kinetic_rates(f, path), path, 0.5),
}
CASES = {f"{kind}, {name}": (KINDS[kind], path) for kind in KINDS for name, path in MIXTURES.items()}
CASES["kinetic, metric"] = rates.kinetic_rates, METRIC
CASES["kinetic, slow metric"] = rates.kinetic_rates, MetricPath(METRIC.distances, c=1.0, a=1.5)


def table_of(path):
    table = oracles.token_table(Q)
    return oracles.with_mask(table) if path.source.mask is not None else table


def residual(make, path, t):
    """How far the rates are from the Kolmogorov equation, and the smallest of them."""
    table = table_of(path)
    states, law = oracles.all_states(table), lambda s: oracles.path_law(table, path, s)
    u = make(oracles.exact_denoiser(table, path), path)
    h = 1e-4
    slope = (8 * (law(t + h) - law(t - h)) - (law(t + 2 * h) - law(t - 2 * h))) / (12 * h)
    matrix = oracles.rate_matrix(jax.jit(u), t, states, table.num_tokens)
    np.testing.assert_allclose(matrix.sum(axis=1), 0, atol=1e-10)
    return np.abs(law(t) @ matrix - slope).max(), matrix[~np.eye(len(states), dtype=bool)].min()


@pytest.mark.parametrize("name", CASES)
def test_carry_the_law_of_the_path(name, x64):
    for t in (0.1, 0.5, 0.9):
        error, least = residual(*CASES[name], t)
        assert error < 1e-9
        assert least >= 0


def test_rates_that_do_not_carry_the_law_are_found(x64):
    def late(f, path):
        return lambda t, x: rates.forward_rates(f, path)(1.01 * t, x)

    assert residual(late, UNIFORM, 0.5)[0] > 1e-3


@pytest.mark.parametrize("path", MIXTURES.values(), ids=MIXTURES)
def test_kinetic_rates_of_mixtures_are_those_that_jump_least_often(path, x64):
    x = jnp.asarray(oracles.all_states(table_of(path)))
    t = jnp.linspace(0.0, 0.95, len(x))
    logits = jax.random.normal(jax.random.key(0), (*x.shape, path.num_tokens))
    forward, kinetic = (make(lambda t, x: logits, path)(t, x) for make in (rates.forward_rates, rates.kinetic_rates))
    if path.source.mask is None:  # from where the data cannot come, the denoiser may not say what it likes
        t, forward, kinetic = t[1:], forward[1:], kinetic[1:]
    np.testing.assert_allclose(kinetic, forward, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("path", MIXTURES.values(), ids=MIXTURES)
def test_the_reversal_undoes_the_noising(path, x64):
    """As many jumps from x to y as the noising process makes from y to x: `p_t(x) u(y, x) = p_t(y) b(x, y)`."""
    table, t = table_of(path), 0.3
    states, law = oracles.all_states(table), oracles.path_law(table, path, t)
    f = oracles.exact_denoiser(table, path)
    kinds = rates.reversal_rates(f, path), rates.backward_rates(path), rates.forward_rates(f, path)
    reversal, noising, forward = (
        law[:, None] * oracles.rate_matrix(u, t, states, table.num_tokens) * (1 - np.eye(len(states))) for u in kinds
    )
    np.testing.assert_allclose(reversal, noising.T, atol=1e-14)
    assert path.source.mask is not None or np.abs(forward - noising.T).max() > 1e-3


def test_for_a_mask_reversal_is_forward(x64):
    x = jnp.asarray(oracles.all_states(table_of(MASK)))
    logits = jax.random.normal(jax.random.key(0), (*x.shape, 4))
    forward, reversal = (
        make(lambda t, x: logits, MASK)(0.3, x) for make in (rates.forward_rates, rates.reversal_rates)
    )
    np.testing.assert_allclose(reversal, forward, atol=1e-12)


def test_kinetic_rates_of_a_metric_go_to_what_is_nearer(x64):
    """By the closed form `p_t(y | a) beta' [d(x, a) - d(y, a)]_+` of one a."""
    t, a = 0.6, 2
    x = jnp.arange(3)[:, None]
    certain = jnp.broadcast_to(jnp.array([-jnp.inf, -jnp.inf, 0.0]), (3, 1, 3))
    found = rates.kinetic_rates(lambda t, x: certain, METRIC)(t, x)
    slope = jax.grad(lambda t: METRIC.c * (t / (1 - t)) ** METRIC.a)(t)
    distances = np.asarray(METRIC.distances)[:, a]
    expected = METRIC.probs(t, jnp.array([[a]]))[0] * slope * np.maximum(distances[:, None] - distances, 0)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-12)
    assert found[0, 0, 1] > 0


@pytest.mark.parametrize("name", CASES)
def test_are_finite_in_the_domain_that_they_carry_in_float32(name):
    """Also of what cannot be: logits of a network that knows nothing, at states that do not occur."""
    make, path = CASES[name]
    x = jnp.asarray(oracles.all_states(table_of(path)))
    u = make(lambda t, x: jnp.zeros((*x.shape, path.num_tokens)), path)
    assert u.reach == (u.domain[0], 1.0)
    for t in (u.domain[0], 0.99, u.domain[1]):
        # At t = 0 a mask is all there is.
        found = jax.jit(u)(t, x if t else x[-1:])
        assert np.isfinite(found).all()
        assert (found >= 0).all()
        assert (jnp.take_along_axis(found, x[-len(found) :, :, None], axis=-1) == 0).all()


def test_a_metric_says_where_to_go_also_from_where_the_law_is_0_in_float32():
    path = MetricPath(100.0 * (1 - np.eye(2)))
    assert path.probs(0.9, jnp.array([[0]]))[0, 0, 1] == 0
    u = rates.kinetic_rates(lambda t, x: jnp.array([[[9.0, -9.0]]]), path)
    assert u(0.9, jnp.array([[1]]))[0, 0, 0] > 100


@pytest.mark.slow
def test_chains_end_in_the_data():
    """From times that the rates carry: `reversal_rates` of a uniform source from t > 0 on, all of them up to 1."""
    table = oracles.token_table(Q)
    for make, path in ((rates.reversal_rates, UNIFORM), (rates.kinetic_rates, METRIC), (rates.forward_rates, UNIFORM)):
        u = make(oracles.exact_denoiser(table, path), path)
        x0 = path.source.draw(jax.random.key(0), jnp.zeros((20_000, 2), int))
        draw = jax.jit(lambda key, u=u, x0=x0: sample(u, x0, TauLeaping(), times=40, key=key).x)
        x = draw(jax.random.key(1))
        often = np.zeros((3, 3))
        np.add.at(often, tuple(np.asarray(x).T), 1 / len(x))
        assert 0.5 * np.abs(often - Q).sum() < 0.03


def test_what_a_call_costs_and_its_times_are_carried():
    f = Counted(lambda t, x: jnp.zeros((*x.shape, 3)), 1, (0.25, 0.75))
    u = rates.with_corrector(rates.reversal_rates(f, UNIFORM), UNIFORM, 2.0)
    assert (u.nfe, u.domain, u.reach) == (1, (0.25, 0.75), (1e-5, 1.0))
    assert rates.forward_rates(f, MASK).domain == (0.25, 0.75)
    assert rates.backward_rates(MASK).nfe == 0
    assert rates.with_corrector(lambda t, x: x, MASK, 1.0).domain == (0.0, 1.0)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (schedules.VP(), "got VP(beta_min=0.1, beta_max=20.0) with alpha from 0.006572 to 1."),
        (schedules.Cosine(), "got Cosine() with alpha + sigma from 1 to 1.414."),
        (schedules.Linear(0.1), "got Linear(sigma_min=0.1) with alpha + sigma from 1 to 1.1."),
        (schedules.VE(), "with alpha from 1 to 1."),
    ],
    ids=str,
)
def test_schedules_that_are_not_convex_are_refused(schedule, said):
    for refuse in (check_convex, lambda schedule: MixturePath(schedule, sources.UniformTokens(3))):
        with pytest.raises(
            ValueError, match=r"^schedule must be convex, alpha \+ sigma = 1 with alpha rising"
        ) as error:
            refuse(schedule)
        assert said in str(error.value)


def test_any_schedule_that_is_convex_is_taken():
    class Half(schedules.Linear):
        def alpha(self, t):
            return t / 2

        def sigma(self, t):
            return 1 - t / 2

    class Falling(schedules.Linear):
        def alpha(self, t):
            return t + jnp.sin(2 * jnp.pi * t)

        def sigma(self, t):
            return 1 - self.alpha(t)

    class Own(schedules.Linear):
        def alpha(self, t):
            return t**2 * (3 - 2 * t)

        def sigma(self, t):
            return 1 - self.alpha(t)

    check_convex(Own())
    with pytest.raises(ValueError, match=r"alpha rising from 0 to 1, .* with alpha from 0 to 0.5.$"):
        check_convex(Half())
    with pytest.raises(ValueError, match=r"with an alpha that falls.$"):
        check_convex(Falling())


X1 = jnp.array([[0, 1]])
REFUSED = {
    "x1 must be data, got 3 in it, the mask of Masked": lambda: MASK.probs(0.5, jnp.array([[0, 3]])),
    "x1 must be tokens from 0 to 3, got some from 0 to 4": lambda: MASK.probs(0.5, jnp.array([[0, 4]])),
    "x1 must be tokens, integers from 0 to 2, got float32": lambda: METRIC.probs(0.5, jnp.array([[0.0, 1.0]])),
    "x1 must be tokens from 0 to 2, got some from -1 to 0": lambda: METRIC.check_data(jnp.array([[-1, 0]])),
    "x must be tokens, integers from 0 to 2, got float32": lambda: rates.forward_rates(
        lambda t, x: jnp.zeros((*x.shape, 3)), UNIFORM
    )(0.5, jnp.zeros((1, 2))),
    "x must be tokens from 0 to 2, got some from 3 to 3": lambda: rates.kinetic_rates(
        lambda t, x: jnp.zeros((*x.shape, 3)), METRIC
    )(0.5, jnp.full((1, 2), 3)),
    r"denoiser\(t, x\) must be \[1, 2, 3\], one for each token, got shape \(1, 2\)": lambda: rates.forward_rates(
        lambda t, x: x, UNIFORM
    )(0.5, X1),
    r"distances must be \[K, K\] with K at least 2, got shape \(2, 3\)": lambda: MetricPath(np.ones((2, 3))),
    "distances must be 0 from a token to itself and positive to every other, got 1 and 1": lambda: MetricPath(
        np.ones((2, 2))
    ),
    "distances must be numbers of float32, got some from 1e-50": lambda: MetricPath([[0.0, 1e-50], [1e-50, 0.0]]),
    r"distances must be numbers of float32, got some from 1 to 1e\+39": lambda: MetricPath([[0.0, 1e39], [1.0, 0.0]]),
    "distances must be finite numbers": lambda: MetricPath([[0.0, np.nan], [1.0, 0.0]]),
    r"distances must be finite numbers \[K, K\], got \[\[0.0\], \[1.0, 0.0\]\]": lambda: MetricPath(
        [[0.0], [1.0, 0.0]]
    ),
    "c must be positive and finite, got 0": lambda: MetricPath(METRIC.distances, c=0),
    "strength must not be negative, got -1": lambda: rates.with_corrector(
        rates.forward_rates(lambda t, x: jnp.zeros((*x.shape, 4)), MASK), MASK, lambda t: t - 1.5
    )(0.5, jnp.full((1, 2), 3)),
    "strength must be finite and not negative, got -1": lambda: rates.with_corrector(lambda t, x: x, MASK, -1.0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        REFUSED[message]()
