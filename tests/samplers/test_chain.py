"""Samplers of tokens draw from the law that they say, found without drawing: the vector of all states, step by step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rare_bits import RARE, WEIGHT, rare_key

from fm_jax import rates, schedules, sources
from fm_jax.nfe import Counted
from fm_jax.oracles import tokens
from fm_jax.paths.mixture import MixturePath
from fm_jax.samplers import Cap, FirstHitting, MixtureSteps, Rescale, RungeKutta, TauLeaping, sample
from fm_jax.samplers.chain import mixture_step, tau_leap

Q5 = np.array([0.45, 0.25, 0.15, 0.1, 0.05])
PAIRS = np.array([[0.30, 0.05, 0.0], [0.02, 0.20, 0.13], [0.10, 0.05, 0.15]])
UNIFORM = MixturePath(schedules.Linear(), sources.UniformTokens(5))
SQUARE = MixturePath(schedules.Polynomial(2.0), sources.UniformTokens(5))
MASKED = MixturePath(schedules.Linear(), sources.Masked(4, 3))


def law_of(step_of, table, path, times):
    """The law at the last time of a chain that starts with the right one, by the exact kernel of each step."""
    states = tokens.all_states(table)
    x, law = jnp.asarray(states), tokens.path_law(table, path, float(times[0]))
    probs = jax.jit(lambda t, t_next: step_of(t, t_next, x).probs(x))
    for t, t_next in itertools.pairwise(times):
        law = law @ tokens.transition_matrix(probs(t, t_next), states)
    return law


def distance(law, other):
    return 0.5 * np.abs(law - other).sum()


def errors(step_of, table, path, nums, t1, t0=0.0):
    """The total variation to the law of the path, by the number of even steps."""
    wanted = tokens.path_law(table, path, t1)
    return [distance(law_of(step_of, table, path, np.linspace(t0, t1, num + 1)), wanted) for num in nums]


def order(nums, found):
    return -np.polyfit(np.log(nums), np.log(found), 1)[0]


def mixture_of(table, path):
    f = tokens.exact_denoiser(table, path)
    return lambda t, t_next, x: mixture_step(f, path, t, t_next, x)


def leaps_of(kind, table, path, schedule=None):
    u = kind(tokens.exact_denoiser(table, path), path)
    return lambda t, t_next, x: tau_leap(u, t, t_next, x, schedule=schedule)


# ---- Laws.


@pytest.mark.parametrize("path", [UNIFORM, SQUARE], ids=["Linear", "Polynomial"])
def test_mixture_steps_are_exact_for_one_token(path, x64):
    table = tokens.token_table(Q5)
    assert max(errors(mixture_of(table, path), table, path, [1, 2, 3, 8, 16, 64], 0.9)) < 1e-12


def test_mixture_steps_are_of_order_one_in_the_law_of_two(x64):
    table, nums = tokens.with_mask(tokens.token_table(PAIRS)), [8, 16, 32, 64]
    found = errors(mixture_of(table, MASKED), table, MASKED, nums, 1.0)
    assert abs(order(nums, found) - 1) < 0.05, found
    assert found[0] > 1e-3


def test_tau_leaping_is_exact_on_linear_for_one_token(x64):
    table = tokens.token_table(Q5)
    assert max(errors(leaps_of(rates.forward_rates, table, UNIFORM), table, UNIFORM, [1, 8, 64], 0.9)) < 1e-12


@pytest.mark.parametrize("kind", [rates.forward_rates, rates.reversal_rates])
def test_tau_leaping_in_kappa_is_exact_for_one_token(kind, x64):
    table = tokens.token_table(Q5)
    leaps = leaps_of(kind, table, SQUARE, SQUARE.schedule)
    assert max(errors(leaps, table, SQUARE, [16, 64], 0.9, 0.4)) < 1e-12


SCHEDULES = [schedules.Linear(), schedules.Polynomial(2.0), schedules.MaskCosine(), schedules.SineSquared()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_step_to_the_end_leaves_no_mask(schedule):
    """The chance is 1 in single precision, where sums of many probabilities and their quotients are rounded."""
    path, x = MixturePath(schedule, sources.Masked(200, 199)), jnp.full((300, 1), 199)
    logits = 5 * jax.random.normal(jax.random.key(0), (300, 1, 200))
    t, f = jnp.linspace(0.01, 0.999, 300), lambda t, x: logits
    steps = [mixture_step(f, path, t, 1.0, x, remask=remask) for remask in (None, Cap(), Rescale(0.5))]
    for step in (*steps, tau_leap(rates.forward_rates(f, path), t, 1.0, x, schedule=schedule)):
        assert (step.chance == 1).all()


def test_without_the_schedule_some_are_left(x64):
    """Of the order of one in the square of the number of steps, as `TauLeaping` says."""
    table, path = tokens.with_mask(tokens.token_table(Q5)), MixturePath(SQUARE.schedule, sources.Masked(6, 5))
    times = np.linspace(0, 1, 33)
    left = law_of(leaps_of(rates.forward_rates, table, path), table, path, times)[5]
    assert 0.5 / 32**2 < left < 2 / 32**2
    assert law_of(leaps_of(rates.forward_rates, table, path, path.schedule), table, path, times)[5] == 0


@pytest.mark.parametrize("kind", [rates.forward_rates, rates.reversal_rates])
def test_tau_leaping_is_of_order_one(kind, x64):
    """On a schedule that is not linear; from 0.1 on, since reversal rates are infinite at 0."""
    table, nums = tokens.token_table(Q5), [16, 32, 64, 128]
    found = errors(leaps_of(kind, table, SQUARE), table, SQUARE, nums, 0.9, 0.1)
    assert abs(order(nums, found) - 1) < 0.05, found
    assert found[0] < 1.5e-2


def test_jumps_under_rates_that_stand_still_would_be_worse(x64):
    """`1 - exp(-h u)` in place of `min(1, h u)`: 1.41e-2 where that is exact, and masks are left over at t = 1."""
    table = tokens.token_table(Q5)

    def exponential(leap):
        return lambda t, t_next, x: (step := leap(t, t_next, x))._replace(chance=1 - jnp.exp(-step.chance))

    leaps = exponential(leaps_of(rates.forward_rates, table, UNIFORM))
    assert abs(errors(leaps, table, UNIFORM, [8], 0.9)[0] - 1.41e-2) < 5e-5
    masked = tokens.with_mask(table)
    path = MixturePath(schedules.Linear(), sources.Masked(6, 5))
    left = law_of(exponential(leaps_of(rates.forward_rates, masked, path)), masked, path, np.linspace(0, 1, 9))[5]
    assert left > 0.02
    assert law_of(leaps_of(rates.forward_rates, masked, path), masked, path, np.linspace(0, 1, 9))[5] == 0


@pytest.mark.parametrize("strength", [1.0, lambda t: 3 * t * (1 - t)], ids=["number", "function"])
@pytest.mark.parametrize("path", [SQUARE, MASKED], ids=["uniform", "mask"])
def test_correctors_keep_the_law_as_steps_become_short(path, strength, x64):
    """Two tokens with a mask, one without; below order 1 would be a bias that stays."""
    table = tokens.with_mask(tokens.token_table(PAIRS)) if path is MASKED else tokens.token_table(Q5)
    kind = lambda f, path: rates.with_corrector(rates.forward_rates(f, path), path, strength)  # noqa: E731
    nums = [32, 64, 128]
    found = errors(leaps_of(kind, table, path), table, path, nums, 0.9, 0.1)
    assert abs(order(nums, found) - 1) < 0.15, found
    assert found[-1] < 5e-3


def test_steps_of_no_length_change_nothing(x64):
    table = tokens.token_table(Q5)
    x = jnp.asarray(tokens.all_states(table))
    for step_of in (mixture_of(table, UNIFORM), leaps_of(rates.forward_rates, table, UNIFORM)):
        np.testing.assert_array_equal(step_of(0.5, 0.5, x).probs(x), jax.nn.one_hot(x, 5, dtype=float))


def test_infinite_rates_jump_to_any_of_them(x64):
    x = jnp.array([[1]])
    u = jnp.array([[[jnp.inf, 0.0, 2.0, jnp.inf]]])
    np.testing.assert_allclose(tau_leap(lambda t, x: u, 0.0, 0.1, x).probs(x), [[[0.5, 0, 0, 0.5]]], atol=1e-12)


def test_a_whole_row_of_a_generator_serves(x64):
    x, row = jnp.array([[1]]), jnp.array([[[1.0, -3.0, 2.0]]])
    np.testing.assert_allclose(tau_leap(lambda t, x: row, 0.0, 0.1, x).probs(x), [[[0.1, 0.7, 0.2]]], atol=1e-12)


# ---- By draws.

PAIR = tokens.with_mask(tokens.token_table(PAIRS))
DENOISER = tokens.exact_denoiser(PAIR, MASKED)
RATES = rates.forward_rates(DENOISER, MASKED)
SAMPLERS = {
    "tau leaping": (RATES, TauLeaping()),
    "mixture steps": (DENOISER, MixtureSteps(MASKED)),
    "first hitting": (DENOISER, FirstHitting(MASKED)),
}
REMASKED = (DENOISER, MixtureSteps(MASKED, Rescale(0.5)))


def drawn(f, sampler, x0, times, seed=0, **options):
    return jax.jit(lambda x0, key: sample(f, x0, sampler, times=times, key=key, **options))(x0, jax.random.key(seed))


@pytest.mark.parametrize("name", SAMPLERS)
def test_as_many_tokens_change_in_the_last_step_as_in_any(name):
    """1 / 8 of them; 4 standard errors are exceeded by chance 6 times in 1e5."""
    states = drawn(*SAMPLERS[name], jnp.full((20_000, 2), 3), 8, trajectory=True).trajectory
    changed = (states[1:] != states[:-1]).mean(axis=(1, 2))
    assert np.abs(changed - 1 / 8).max() < 4 * np.sqrt(1 / 8 * 7 / 8 / 40_000)
    assert not (states[-1] == 3).any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_stopping_returns_the_tokens_of_that_time(name):
    """Half of the tokens at t = 1/2, on whatever grid, and in the proportions of the data."""
    x = drawn(*SAMPLERS[name], jnp.full((20_000, 2), 3), np.array([0.0, 0.3, 0.5])).x
    found = np.bincount(np.asarray(x)[:, 0], minlength=4) / len(x)
    wanted = np.append(PAIRS.sum(axis=1) / 2 / PAIRS.sum(), 0.5)
    assert (np.abs(found - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / len(x))).all()


def test_one_token_of_a_uniform_source_stops_at_half():
    table = tokens.token_table(np.eye(5)[2])
    x = drawn(tokens.exact_denoiser(table, UNIFORM), MixtureSteps(UNIFORM), jnp.zeros((20_000, 1), int), [0.0, 0.5]).x
    assert abs((x == 2).mean() - 0.5) < 4 * 0.5 / np.sqrt(20_000)


def hostile(t, x):
    """A network that would have nothing but the mask, everywhere."""
    return jnp.where(jnp.arange(4) == 3, 50.0, jnp.zeros((*x.shape, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_masks_are_never_drawn_and_tokens_never_change(name):
    """1e5 draws of four tokens, of which some are given, and no exception."""
    f = rates.forward_rates(hostile, MASKED) if name == "tau leaping" else hostile
    x0 = jnp.where(jax.random.bernoulli(jax.random.key(1), 0.3, (100_000, 2, 2)), 1, 3)
    states = drawn(f, SAMPLERS[name][1], x0, 5, trajectory=True).trajectory
    assert not (states[-1] == 3).any()
    assert ((states[1:] == states[:-1]) | (states[:-1] == 3)).all()
    assert set(np.unique(states[-1])) == {0, 1, 2}


def rare_steps(denoiser, remask=None):
    """Tokens of which the last is rare; the mask is the first."""
    return denoiser, MixtureSteps(MixturePath(schedules.Linear(), sources.Masked(3, 0)), remask)


def rare_logits(t, x):
    return jnp.broadcast_to(jnp.log(jnp.array([0.0, 1 - RARE, RARE])), (*x.shape, 3))


def never(t, x):
    return jnp.broadcast_to(jnp.array([0.0, 0.0, -jnp.inf]), (*x.shape, 3))


RARE_TOKENS = {
    "tau leaping": (lambda t, x: jnp.exp(rare_logits(t, x)), TauLeaping()),
    "mixture steps": rare_steps(rare_logits),
    "remasking": rare_steps(rare_logits, Rescale(0.5)),
    "first hitting": (rare_logits, FirstHitting(rare_steps(rare_logits)[1].path)),
}
RARE_EVENTS = {
    "tau leaping": (lambda t, x: jnp.zeros((*x.shape, 3)).at[..., 2].set(RARE), TauLeaping(), [0.0, 1.0], 0),
    "mixture steps": (*rare_steps(never), [0.0, RARE], 0),
    "remasking": (*rare_steps(never, Cap(RARE)), [0.5, 0.50000006], 1),
}


def rate(changed):
    return float(changed.sum()) * WEIGHT / changed.size / RARE


@pytest.mark.parametrize("name", RARE_TOKENS)
def test_a_token_of_one_in_a_million_is_drawn_as_often(name):
    """To 5%, in single precision; `tests/test_draws.py` sees that `jax.random.categorical` does not."""
    f, sampler = RARE_TOKENS[name]
    end = jax.jit(lambda key: sample(f, jnp.zeros((2**16, 1), int), sampler, times=1, key=key).x)(rare_key(3))
    assert not (end == 0).any()
    assert abs(rate(end == 2) - 1) < 0.05


@pytest.mark.parametrize("name", RARE_EVENTS)
def test_what_stays_with_all_but_one_in_a_million_jumps_as_often(name):
    f, sampler, times, token = RARE_EVENTS[name]
    x0, key = jnp.full((2**16, 1), token), rare_key(4, events=True)
    end = jax.jit(lambda key: sample(f, x0, sampler, times=np.array(times), key=key).x)(key)
    assert abs(rate(end != token) - 1) < 0.05


# ---- Given tokens.

UNIFORM3 = MixturePath(schedules.Linear(), sources.UniformTokens(3))
KEPT = {
    "corrector": (rates.with_corrector(RATES, MASKED, lambda t: 5 * t), TauLeaping()),
    "remasking": REMASKED,
    "uniform": (tokens.exact_denoiser(tokens.token_table(PAIRS), UNIFORM3), MixtureSteps(UNIFORM3)),
    **SAMPLERS,
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_tokens_never_change(name):
    f, sampler = KEPT[name]
    x0 = jnp.where(jnp.array([True, False]), jax.random.randint(jax.random.key(1), (4000, 2), 0, 3), 2)
    x0 = x0 if name == "uniform" else x0.at[:, 1].set(3)
    keep = jnp.array([True, False])
    states = drawn(f, sampler, x0, np.linspace(0.0, 0.999, 7), trajectory=True, keep=keep).trajectory
    assert (states[:, :, 0] == x0[None, :, 0]).all()
    assert (states[-1, :, 1] != x0[:, 1]).mean() > 0.2


@pytest.mark.parametrize("name", ["corrector", "remasking", "uniform"])
def test_without_keep_they_do(name):
    f, sampler = KEPT[name]
    x0 = jnp.zeros((4000, 2), int)
    states = drawn(f, sampler, x0, np.linspace(0.0, 0.999, 7), trajectory=True).trajectory
    assert (states[:, :, 0] != 0).any()


def test_kept_masks_stay_too():
    for f, sampler in SAMPLERS.values():
        x = drawn(f, sampler, jnp.full((100, 2), 3), 4, keep=jnp.array([[True, False]])).x
        assert (x[:, 0] == 3).all()
        assert (x[:, 1] != 3).all()


def test_the_rest_is_drawn_given_what_is_kept():
    """With a mask, from the conditional law, here of the second token; 4 standard errors."""
    for f, sampler in SAMPLERS.values():
        x = drawn(f, sampler, jnp.broadcast_to(jnp.array([1, 3]), (10_000, 2)), np.linspace(0.001, 1, 5)).x
        found, wanted = np.bincount(x[:, 1], minlength=3) / len(x), PAIRS[1] / PAIRS[1].sum()
        assert (np.abs(found - wanted) <= 4 * np.sqrt(wanted * (1 - wanted) / len(x))).all()


# ---- The contract.


def counted(f, seen=None):
    def network(t, x):
        if seen is not None:
            jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return f(t, x)

    return Counted(network, 3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_are_counted(name):
    f, sampler = SAMPLERS[name]
    seen = []
    solution = drawn(counted(f, seen), sampler, jnp.full((5, 2), 3), [0.1, 0.2, 0.5, 0.9])
    jax.block_until_ready(solution)
    jax.effects_barrier()
    assert (int(solution.calls), int(solution.nfe)) == (len(seen), 3 * len(seen))
    assert len(seen) == (2 if name == "first hitting" else 3)
    assert min(map(np.min, seen)) >= 0.1 - 1e-6
    assert max(map(np.max, seen)) <= 0.9


@pytest.mark.parametrize("name", SAMPLERS)
def test_events_of_any_rank_and_integers_of_any_width(name):
    f = {"tau leaping": rates.forward_rates(hostile, MASKED)}.get(name, hostile)
    for shape, dtype in (((3,), jnp.uint8), ((3, 2, 2, 2), jnp.int16)):
        x0 = jnp.full(shape, 3, dtype)
        solution = drawn(f, SAMPLERS[name][1], x0, 2, trajectory=True)
        assert (solution.x.shape, solution.x.dtype) == (shape, dtype)
        assert (solution.trajectory.shape, solution.trajectory.dtype) == ((3, *shape), dtype)
        np.testing.assert_array_equal(solution.trajectory[0], x0)
        np.testing.assert_array_equal(solution.trajectory[-1], solution.x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_under_vmap_each_is_drawn_as_alone(name):
    f, sampler = SAMPLERS[name]
    keys, x0 = jax.random.split(jax.random.key(0), 3), jnp.full((3, 4, 2), 3).at[1, :, 0].set(1)
    end = jax.jit(lambda key, x0: sample(f, x0, sampler, times=4, key=key).x)
    np.testing.assert_array_equal(jax.vmap(end)(keys, x0), jnp.stack([*map(end, keys, x0)]))
    assert (end(keys[0], x0[0]) != end(keys[1], x0[0])).any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_may_be_traced(name):
    f, sampler = SAMPLERS[name]
    x0, times = jnp.full((4, 2), 3), jnp.linspace(0.0, 1.0, 5)
    end = lambda times: sample(f, x0, sampler, times=times, key=jax.random.key(0)).x  # noqa: E731
    np.testing.assert_array_equal(jax.jit(end)(times), end(np.asarray(times)))


X0, KEY = jnp.full((2, 2), 3), jax.random.key(0)
WRONG = {
    "float tokens": (DENOISER, jnp.ones((2, 2)), MixtureSteps(MASKED), {}, "x0 must be tokens, .* RungeKutta"),
    "tokens in a flow": (DENOISER, X0, RungeKutta("heun"), {"key": None}, "x0 must be floating .* TauLeaping"),
    "no key": (DENOISER, X0, MixtureSteps(MASKED), {"key": None}, "key must be given"),
    "times beyond 1": (DENOISER, X0, MixtureSteps(MASKED), {"times": [0.0, 1.5]}, r"times must be within \[0"),
    "backward": (DENOISER, X0, MixtureSteps(MASKED), {"times": [1.0, 0.0]}, "Time must run forward"),
    "backward, hitting": (DENOISER, X0, FirstHitting(MASKED), {"times": [1.0, 0.0]}, "Time must run forward"),
    "backward, leaping": (RATES, X0, TauLeaping(), {"times": [0.9, 0.0]}, "Time must run forward"),
    "out of range": (DENOISER, X0 + 1, MixtureSteps(MASKED), {}, "x0 must be tokens from 0 to 3, got some from 4"),
    "out of range, hitting": (DENOISER, X0 + 1, FirstHitting(MASKED), {}, "x0 must be tokens from 0 to 3"),
    "out of range, leaping": (lambda t, x: jnp.ones((2, 2, 4)), X0 + 1, TauLeaping(), {}, "x0 must be tokens from 0"),
    "negative": (DENOISER, X0 - 4, MixtureSteps(MASKED), {}, "x0 must be tokens from 0 on, got some from -1"),
    "rates without an axis": (lambda t, x: jnp.ones((2, 2)), X0, TauLeaping(), {}, r"rates\(t, x\) must be \[2, 2, 2"),
    "rates of no array": (lambda t, x: None, X0, TauLeaping(), {}, r"rates\(t, x\) must be an array"),
    "a scalar rate": (lambda t, x: jnp.ones(()), X0, TauLeaping(), {}, r"rates\(t, x\) must be \[2, 2, 0\]"),
    "logits of others": (lambda t, x: jnp.ones((2, 2, 3)), X0, MixtureSteps(MASKED), {}, r"\) must be \[2, 2, 4\]"),
    "narrow integers": (
        lambda t, x: jnp.ones((2, 2, 300)), X0.astype(jnp.uint8), TauLeaping(), {}, "integers that hold 300 tokens"
    ),
    "keep of a flow": (RATES, jnp.ones((2, 2)), RungeKutta("heun"), {"key": None, "keep": X0 == 3}, "keep must be N"),
    "keep of numbers": (DENOISER, X0, MixtureSteps(MASKED), {"keep": X0}, "keep must be bool and broadcast"),
    "keep of another shape": (DENOISER, X0, MixtureSteps(MASKED), {"keep": jnp.ones(3, bool)}, "keep must be bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_refuses(name):
    f, x0, sampler, options, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        sample(f, x0, sampler, **{"times": 2, "key": KEY, **options})


def test_refuses_rates_that_are_known_to_be_negative():
    x = jnp.array([[0, 1]])
    for bad in (-1.0, jnp.nan):
        with pytest.raises(ValueError, match=r"rates\(t, x\) must not be negative, got some from (-1.0|nan) on"):
            tau_leap(lambda t, x, bad=bad: jnp.ones((1, 2, 3)).at[0, 0, 2].set(bad), 0.0, 0.1, x)


def step_without_mask(remask):
    x = jnp.zeros((1, 1), int)
    return mixture_step(lambda t, x: jnp.zeros((1, 1, 5)), UNIFORM, 0.1, 0.2, x, remask=remask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixtureSteps(UNIFORM, Cap()), "path must have a mask"),
        (lambda: MixtureSteps(MASKED, 0.1), "remask must be a rule"),
        (lambda: MixtureSteps(schedules.Linear()), "path must be a MixturePath"),
        (lambda: step_without_mask(Cap()), "path must have a mask"),
        (lambda: step_without_mask(3), "remask must be a rule"),
    ],
)
def test_refuses_to_be_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_samplers_are_values():
    assert MixtureSteps(MASKED, Cap()) == MixtureSteps(MixturePath(schedules.Linear(), sources.Masked(4, 3)), Cap())
    compiled = functools.partial(jax.jit, static_argnames="sampler")(
        lambda sampler, key: sample(DENOISER, X0, sampler, times=2, key=key).x
    )
    assert compiled(MixtureSteps(MASKED), KEY).shape == (2, 2)
