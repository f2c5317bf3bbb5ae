"""Remasking keeps the marginals of the path, by exact kernels; what is shared out by confidence goes to the unsure."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax import schedules, sources
from fm_jax.oracles import tokens
from fm_jax.paths.mixture import MixturePath
from fm_jax.samplers import Cap, Confidence, Loop, MixtureSteps, Rescale, mixture_step, sample
from fm_jax.samplers.remasking import most

MASK = 3
TABLE = tokens.with_mask(tokens.token_table([0.6, 0.3, 0.1]))
PATH = MixturePath(schedules.Linear(), sources.Masked(4, MASK))
SQUARE = MixturePath(schedules.Polynomial(2.0), sources.Masked(4, MASK))
KEY = jax.random.key(0)
TIMES = np.array([0.0, 0.2, 0.45, 0.5, 0.8, 1.0])
RULES = {
    "cap": Cap(0.3),
    "cap at 1": Cap(1.0),
    "rescale": Rescale(0.5),
    "rescale by 1": Rescale(1.0),
    "loop": Loop(Rescale(1.0), at=0.8),
    "more than there may be": lambda kappa, kappa_next: 5.0 * jnp.ones_like(kappa),
    "negative": lambda kappa, kappa_next: -jnp.ones_like(kappa),
}
X = jnp.asarray(tokens.all_states(TABLE))


def denoiser(t, x):
    """Of independent tokens of the table: what is seen is of no account."""
    return jnp.log(jnp.array([0.6, 0.3, 0.1, 0.0]))[(None,) * x.ndim] + 0.0 * x[..., None]


def laws(rule, path, times):
    """The law of one token after each step, [num, K], by its exact kernel; every probability is looked at."""
    found = [tokens.path_law(TABLE, path, float(times[0]))]
    probs = jax.jit(lambda t, t_next: mixture_step(denoiser, path, t, t_next, X, remask=rule).probs(X))
    for t, t_next in itertools.pairwise(times):
        kernel = probs(t, t_next)
        assert (kernel >= 0).all()
        np.testing.assert_allclose(kernel.sum(axis=-1), 1, atol=1e-12)
        found.append(found[-1] @ tokens.transition_matrix(kernel, X))
    return np.stack(found)


@pytest.mark.parametrize("path", [PATH, SQUARE], ids=["Linear", "Polynomial"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_keeps_the_marginals_of_the_path(rule, path, x64):
    wanted = np.stack([tokens.path_law(TABLE, path, float(t)) for t in TIMES])
    assert np.abs(laws(rule, path, TIMES) - wanted).sum(axis=1).max() / 2 < 1e-12


def test_standing_still_keeps_them_too(x64):
    times = np.array([0.0, 0.5, 0.5, 0.5, 0.9])
    found = laws(Loop(Rescale(1.0), at=0.5), PATH, times)
    np.testing.assert_allclose(found[-1], tokens.path_law(TABLE, PATH, 0.9), atol=1e-12)
    step = mixture_step(denoiser, PATH, 0.5, 0.5, X, remask=Loop(Rescale(1.0)))
    np.testing.assert_allclose(step.chance[:, 0], 1, atol=1e-12)


def test_tokens_are_masked_again(x64):
    masked = {name: mixture_step(denoiser, PATH, 0.5, 0.6, X, remask=rule).chance[0, 0] for name, rule in RULES.items()}
    wanted = {"cap": 0.3, "cap at 1": 0.8, "rescale": 0.4, "rescale by 1": 0.8, "loop": 0, "negative": 0}
    assert masked.pop("more than there may be") == pytest.approx(0.8)
    assert masked == pytest.approx(wanted)


def test_the_most_there_may_be():
    """Above it a mask would have to fall with more than probability 1."""
    kappa, kappa_next = jnp.array([0.0, 0.2, 0.5, 0.9]), jnp.array([0.1, 0.4, 0.9, 1.0])
    np.testing.assert_allclose(most(kappa, kappa_next), [1.0, 1.0, 0.2, 0.0], atol=1e-6)


# ---- By draws: as `sample` takes the steps.

NUM = 20_000


@pytest.mark.parametrize("rule", [Loop(Rescale(1.0), at=0.5, num=3), Confidence(Rescale(0.9)), Cap(0.5)], ids=str)
def test_the_chain_has_as_many_masks_as_the_path_at_each_time(rule):
    """And of the two tokens, each as often, but under `Confidence`; to 4 standard errors."""
    x0 = jnp.full((NUM, 2), MASK)
    run = jax.jit(lambda key: sample(denoiser, x0, MixtureSteps(PATH, rule), times=TIMES, key=key, trajectory=True))
    solution = run(jax.random.key(0))
    assert int(solution.calls) == 5 + (3 if isinstance(rule, Loop) else 0)
    assert solution.trajectory.shape == (6, NUM, 2)
    np.testing.assert_array_equal(solution.trajectory[-1], solution.x)
    for t, x in zip(TIMES, solution.trajectory, strict=True):
        found, wanted = np.bincount(x.ravel(), minlength=4) / x.size, tokens.path_law(TABLE, PATH, float(t))
        near = np.abs(found - wanted) <= 4 * np.sqrt(np.clip(wanted * (1 - wanted), 0, 1) / x.size) + 1e-12
        assert near[MASK] if isinstance(rule, Confidence) else near.all()
    seen = solution.trajectory[1:-1] != MASK
    assert (seen & (solution.trajectory[2:] == MASK)).any()


@pytest.mark.parametrize(("at", "place"), [(0.5, 3), (0.49, 2), (0.1, 0), (0.99, 4)])
def test_time_stands_still_at_the_last_time_that_is_not_after(at, place):
    assert int(Loop(at=at).place(jnp.asarray(TIMES))) == place
    x0 = jnp.full((2, 1), MASK)
    seen = []

    def watched(t, x):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return denoiser(t, x)

    loop = MixtureSteps(PATH, Loop(at=at, num=2))
    solution = sample(watched, x0, loop, times=TIMES, key=jax.random.key(0), trajectory=True)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, sorted([*TIMES[:-1], *TIMES[[place, place]]]), rtol=1e-6)
    np.testing.assert_array_equal(solution.trajectory[0], x0)


def test_a_loop_changes_what_is_drawn_and_not_how_much():
    """Of what stands at 0.5 in the trajectory: the state after the loop, of which most has been drawn anew."""
    x0, key = jnp.full((4000, 1), MASK), jax.random.key(0)
    chain = lambda rule: sample(denoiser, x0, MixtureSteps(PATH, rule), times=[0, 0.5], key=key).x  # noqa: E731
    still, moved = chain(None), chain(Loop(Rescale(0.7), at=0.5, num=4))
    assert abs((moved == MASK).mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)
    assert (still != moved).mean() > 0.5  # 0.635 if they had nothing to do with each other


# ---- By confidence.


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6, 0.8, 0.95, 1.0])
def test_as_many_are_masked_as_by_the_rule_alone(sigma):
    """Also where the unsure would be masked with more than certainty: then the others take it over."""
    rng = np.random.default_rng(0)
    confidence = rng.random((6, 3, 4)).astype(np.float32) * np.array([0.1, 1, 3, 9, 9, 9], np.float32)[:, None, None]
    confidence[3:][rng.random((3, 3, 4)) < 0.4] = np.inf
    confidence[5] = np.inf
    chances = np.asarray(Confidence().chances(jnp.full((6, 1, 1), sigma), jnp.asarray(confidence)))
    drawn = np.isfinite(confidence)
    np.testing.assert_allclose(chances.sum(axis=(1, 2)), sigma * drawn.sum(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    assert ((chances >= 0) & (chances <= 1)).all()
    assert (chances[~drawn] == 0).all()
    for chance, c in zip(chances, confidence, strict=True):  # in proportion to e^-c, but for those that are certain
        free = np.isfinite(c) & (chance < 1)
        if free.any() and sigma:
            np.testing.assert_allclose(np.ptp(np.log(chance[free]) + c[free]), 0, atol=1e-4)


@pytest.mark.slow
def test_confidence_keeps_the_share_of_masks():
    x0, logits = jnp.full((4000, 8), MASK), jnp.log(jnp.array([0.7, 0.2, 0.1, 1.0]))
    rule = MixtureSteps(PATH, Confidence(Rescale(1.0)))
    draw = jax.jit(
        lambda key: (
            sample(
                lambda t, x: jnp.broadcast_to(logits.reshape(1, 1, 4), (*x.shape, 4)),
                x0,
                rule,
                times=(0, 0.3, 0.5, 0.6, 0.7, 0.8),
                key=key,
                trajectory=True,
            ).trajectory
        )
    )
    found = np.asarray((draw(KEY) == MASK).mean(axis=(1, 2)))
    np.testing.assert_allclose(found, [1, 0.7, 0.5, 0.4, 0.3, 0.2], atol=4 * 0.5 / np.sqrt(32_000))


@pytest.mark.slow
def test_the_unsure_are_masked_sooner():
    """And those that were given never; the mean is that of the rule."""
    confidence = jnp.array([[0.1, 0.9, jnp.inf, 0.5]])
    chances = Confidence().chances(jnp.float32(0.4), confidence)
    np.testing.assert_allclose(chances.sum(), 3 * 0.4, rtol=1e-6)
    np.testing.assert_allclose(chances[0, 0] / chances[0, 1], np.exp(0.8), rtol=1e-6)
    assert chances[0, 2] == 0
    np.testing.assert_array_equal(Confidence().chances(jnp.float32(0.4), jnp.full((1, 2), jnp.inf)), [[0, 0]])
    step = mixture_step(
        lambda t, x: jnp.zeros((1, 4, 4)),
        PATH,
        0.5,
        0.6,
        jnp.array([[0, 1, 2, MASK]]),
        remask=Confidence(Cap(0.1)),
        confidence=confidence,
    )
    np.testing.assert_allclose(step.chance[0, :2], 0.2 * jax.nn.softmax(-confidence[0, :2]), rtol=1e-5)
    assert step.chance[0, 2] == 0
    np.testing.assert_allclose(step.chance[0, 3], (0.6 - 0.9 * 0.5) / 0.5, rtol=1e-5)


def test_the_confidence_is_that_of_the_draw():
    """Likely tokens become more, rare ones fewer than under the rule alone; given ones stay."""
    x0 = jnp.full((NUM, 4), MASK).at[:, 0].set(2)
    alone, shared = (
        jax.jit(lambda key, rule=rule: sample(denoiser, x0, MixtureSteps(PATH, rule), times=8, key=key).x)(KEY)
        for rule in (Rescale(1.0), Confidence(Rescale(1.0)))
    )
    assert (shared[:, 0] == 2).all()
    assert (alone[:, 0] != 2).any()
    for token, sign in ((0, 1), (2, -1)):
        change = (shared[:, 1:] == token).mean() - (alone[:, 1:] == token).mean()
        assert sign * change > 4 * np.sqrt(0.25 / NUM / 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cap(1.5), r"eta must be in \[0, 1\]"),
        (lambda: Rescale(-0.1), r"eta must be in \[0, 1\]"),
        (lambda: Loop(at=1.0), r"at must be in \(0, 1\)"),
        (lambda: Loop(num=0), "num must be at least 1"),
        (lambda: Loop(0.5), "rule must be a rule of remasking"),
        (lambda: Loop(Confidence()), "rule must say sigma alone"),
        (lambda: Confidence(Confidence()), "rule must say sigma alone"),
        (
            lambda: mixture_step(denoiser, PATH, 0.1, 0.2, X, remask=Confidence()),
            "confidence must be given for Confidence",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
