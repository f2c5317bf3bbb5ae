import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.likelihood import Exact, Hutchinson, HutchPlusPlus
from fm_jax.shapes import expand_time

D = 7
RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(D, D)) + 0.5 * np.eye(D)
ESTIMATORS = [Exact(), Exact(chunk=2), Hutchinson(3), Hutchinson(2, "gaussian"), HutchPlusPlus(6)]
STOCHASTIC = [each for each in ESTIMATORS if each.stochastic]


def curved(t, x):
    """A field with another Jacobian for each example and time; of any event shape and time scalar or [batch]."""
    flat = x.reshape(len(x), -1)
    t = jnp.broadcast_to(jnp.asarray(t), len(x))[:, None]
    return (jnp.tanh(flat @ jnp.asarray(MATRIX, x.dtype).T + t) + t * jnp.sin(flat)).reshape(x.shape)


def traces(v, t, x):
    """The trace of the Jacobian of each example, from the whole Jacobian."""
    jacobian = jax.jacfwd(lambda x: v(t, x))(x).reshape(len(x), x[0].size, len(x), x[0].size)
    return jnp.einsum("bibi->b", jacobian)


def linear(matrix):
    return lambda t, x: x @ matrix.T


@functools.cache
def estimator(divergence, dim, change_probes):
    """`estimate(matrix, keys)`: 40,000 independent estimates of the trace of one matrix, one an example."""
    x = jnp.zeros((40_000, dim))

    @jax.jit
    def estimate(matrix, key):
        return divergence(linear(matrix), change_probes(divergence.draw(key, x)), 0.0, x)[1]

    return estimate


def keep(probes):
    return probes


def estimates(divergence, matrix, change_probes=keep):
    estimate = estimator(divergence, len(matrix), change_probes)
    return np.asarray(estimate(jnp.asarray(matrix, jnp.float32), jax.random.key(0)), dtype=float)


def test_exact_is_the_trace_of_the_jacobian(x64):
    chunks = [1, 3, D, 100]  # dividing D, not dividing it, and larger

    @jax.jit
    def both(x, t):
        return curved(t, x), traces(curved, t, x), [Exact(chunk)(curved, None, t, x) for chunk in chunks]

    x = jax.random.normal(jax.random.key(0), (3, 1, D, 1))
    for t in (0.3, jnp.array([0.1, 0.5, 0.9])):
        expected_velocity, expected, computed = both(x, t)
        assert np.ptp(expected) > 0.1
        for velocity, div in computed:
            np.testing.assert_allclose(velocity, expected_velocity, rtol=1e-12)
            np.testing.assert_allclose(div, expected, rtol=1e-12)


def test_images_and_one_evaluation_for_both():
    """Estimators that are exact here: Rademacher on a diagonal Jacobian, Hutch++ with a full sketch."""
    calls = []

    def network(name):
        def v(t, x):
            jax.debug.callback(lambda: calls.append(name))
            return expand_time(t, x) * x**2

        return v

    exact = [Exact(chunk=3), Hutchinson(), HutchPlusPlus(3 * D + 3)]
    image, t = jax.random.normal(jax.random.key(0), (3, 1, D, 1)), jnp.array([0.1, 0.5, 0.9])
    results = jax.jit(lambda x: [v(network(str(v)), v.draw(jax.random.key(1), x), t, x) for v in exact])(image)
    for velocity, div in results:
        np.testing.assert_allclose(velocity, expand_time(t, image) * image**2, rtol=1e-5)
        np.testing.assert_allclose(div, 2 * t * image.sum(axis=(1, 2, 3)), rtol=1e-3)
    jax.effects_barrier()
    assert sorted(calls) == sorted(map(str, exact))


def z_score(values, expected):
    return (values.mean() - expected) / (values.std() / np.sqrt(len(values)))


@pytest.mark.parametrize("divergence", STOCHASTIC, ids=str)
def test_stochastic_estimates_are_unbiased(divergence):
    """40,000 estimates for one asymmetric matrix. |z| > 4 has probability 6e-5 for an unbiased estimator."""
    values = estimates(divergence, MATRIX)
    assert values.std() > 0.1
    assert abs(z_score(values, np.trace(MATRIX))) < 4


def same_probes_twice(probes):
    sketch, _ = probes
    return sketch, sketch


def too_long(probes):
    return 1.05 * probes


@pytest.mark.parametrize(("divergence", "mistake"), [(STOCHASTIC[-1], same_probes_twice), (STOCHASTIC[0], too_long)])
def test_the_bias_test_refuses_mistakes(divergence, mistake):
    """Power: a sketch that shares its probes with the rest, and probes 5% too long."""
    assert abs(z_score(estimates(divergence, MATRIX, mistake), np.trace(MATRIX))) > 6


@pytest.mark.parametrize("divergence", STOCHASTIC[:-1], ids=str)
def test_variance_of_hutchinson_is_the_formula(divergence):
    symmetric = (MATRIX + MATRIX.T) / 2
    expected = 2 * (symmetric**2).sum()
    if divergence.distribution == "rademacher":
        expected -= 2 * (np.diag(symmetric) ** 2).sum()
    # The relative error of a variance of 40,000 values is about sqrt(kurtosis / 40,000), below 0.02 here.
    np.testing.assert_allclose(estimates(divergence, MATRIX).var(), expected / divergence.num_probes, rtol=0.08)


def test_rademacher_is_exact_on_a_diagonal_jacobian():
    np.testing.assert_allclose(estimates(STOCHASTIC[0], np.diag(np.arange(D))), np.arange(D).sum(), rtol=1e-6)


def test_hutch_plus_plus_is_exact_up_to_its_rank():
    low_rank = RNG.normal(size=(D, 2)) @ RNG.normal(size=(2, D))
    np.testing.assert_allclose(estimates(HutchPlusPlus(6), low_rank), np.trace(low_rank), atol=1e-2)
    np.testing.assert_array_equal(estimates(HutchPlusPlus(6), 0 * MATRIX), 0)  # a network at initialisation
    higher_rank = low_rank + np.outer(MATRIX[0], MATRIX[1])
    assert np.std(estimates(HutchPlusPlus(6), higher_rank)) > 0.1


def test_hutch_plus_plus_is_less_noisy_for_as_many_products():
    """Singular values 1 / i^2, 6 products: at most half the standard deviation (measured: 2.6 times less)."""
    left, _ = np.linalg.qr(RNG.normal(size=(D, D)))
    matrix = left @ np.diag(1.0 / np.arange(1, D + 1) ** 2) @ left.T
    spread = {type(each): estimates(each, matrix).std() for each in (Hutchinson(6), HutchPlusPlus(6))}
    assert 2 * spread[HutchPlusPlus] < spread[Hutchinson]


@pytest.mark.slow
def test_gradients_in_parameters_are_unbiased():
    """d trace(a M + a^2 N) / da with M of rank 1, which leaves Hutch++ a sketch whose derivative is infinite.

    20,000 gradients of each stochastic estimator. |z| > 4 has probability 6e-5 for each that is unbiased.
    """
    rank_one, other = np.outer(MATRIX[0], MATRIX[1]), 0.01 * MATRIX
    x = jnp.zeros((20_000, D))

    def gradient(divergence, a, key):
        def div(a):
            a = a[:, None]
            v = lambda t, x: a * linear(jnp.asarray(rank_one))(t, x) + a**2 * linear(jnp.asarray(other))(t, x)  # noqa: E731
            return divergence(v, divergence.draw(key, x), 0.0, x)[1].sum()

        return jax.grad(div)(jnp.full(len(x), a))

    gradients = jax.jit(lambda a, key: [gradient(each, a, key) for each in ESTIMATORS[1:]])
    for a in (0.7, 0.0):  # at 0 the Jacobian vanishes
        expected = np.trace(rank_one) + 2 * a * np.trace(other)
        for divergence, values in zip(ESTIMATORS[1:], gradients(a, jax.random.key(2)), strict=True):
            values = np.asarray(values, dtype=float)
            assert np.isfinite(values).all()
            if divergence.stochastic:
                assert abs(z_score(values, expected)) < 4, divergence
            else:
                np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_memory_of_exact_is_bounded_by_its_chunk():
    """At d = 2,000, temporary memory with chunk 1 is far below that with all products at once, in both directions."""
    d = 2000
    x = jnp.zeros((2, d))

    def v(t, x):
        return jnp.tanh(jnp.roll(x, 1, axis=1) * x)

    def megabytes(chunk, grad):
        f = lambda x: Exact(chunk)(v, None, 0.0, x)[1].sum()  # noqa: E731
        compiled = jax.jit(jax.grad(f) if grad else f).lower(x).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    for grad in (False, True):
        small, large = megabytes(1, grad), megabytes(d, grad)
        assert small < 0.5
        assert large > 2 * d * d * 4 / 1e6  # [d, batch, d] in float32: what a Jacobian takes


@pytest.mark.parametrize("divergence", STOCHASTIC, ids=str)
def test_probes_are_white(divergence):
    for probes in jax.tree.leaves(divergence.draw(jax.random.key(3), jnp.zeros((5000, 2, 2)))):
        rows = np.asarray(jnp.moveaxis(probes, 1, 0)).reshape(5000, -1)
        # Entries have a standard deviation of at most sqrt(2 / 5000) = 0.02: five of those.
        np.testing.assert_allclose(rows.T @ rows / 5000, np.eye(rows.shape[1]), atol=0.1)


def test_estimators_are_values():
    assert Exact() == Exact(chunk=16)
    assert Hutchinson() == Hutchinson(1, "rademacher")
    assert str(HutchPlusPlus()) == "HutchPlusPlus(num_probes=6)"
    assert len({*ESTIMATORS, Exact(), Hutchinson(3)}) == len(ESTIMATORS)
    assert Exact().draw(None, jnp.zeros((1, 1))) is None


X = jnp.zeros((2, 3))
BAD = [
    (lambda: Exact(0), "chunk must be at least 1, got 0."),
    (lambda: Hutchinson(0), "num_probes must be at least 1, got 0."),
    (lambda: Hutchinson(1, "cauchy"), "distribution must be one of 'rademacher', 'gaussian', got 'cauchy'."),
    (lambda: HutchPlusPlus(0), "num_probes must be at least 3, got 0."),
    (lambda: HutchPlusPlus(4), "num_probes must be a positive multiple of 3, got 4."),
    (lambda: Hutchinson().draw(None, X), r"Hutchinson\(.*\) draws random probes and needs a key"),
    (lambda: HutchPlusPlus().draw(None, X), r"HutchPlusPlus\(.*\) draws random probes and needs a key"),
    (lambda: Hutchinson().draw(0, X), "key must be one typed key"),
    (lambda: Exact()(lambda t, x: x[:, :1], None, 0.0, X), r"must have the shape of x, \(2, 3\), got \(2, 1\)."),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
