import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fm_jax.sources import Categorical, Masked, Normal, Sampled, Uniform, UniformTokens

LAWS = [
    (Normal(), scipy.stats.norm()),
    (Normal(3.0), scipy.stats.norm(scale=3.0)),
    (Uniform(), scipy.stats.uniform()),
    (Uniform(-2.0, 0.5), scipy.stats.uniform(-2.0, 2.5)),
]
IDS = ["normal", "wide", "interval", "box"]
SHAPES = [(5,), (4, 3), (2, 3, 4, 2)]


def ramp(key, num):
    """2 y dy on [0, 1], in the plane."""
    return jnp.sqrt(jax.random.uniform(key, (num, 2)))


@pytest.mark.parametrize(("source", "law"), [*LAWS, (Sampled(ramp), scipy.stats.beta(2, 1))], ids=[*IDS, "sampled"])
def test_draws_have_the_law(source, law, key):
    """Kolmogorov-Smirnov of 20,000 numbers, refused below 1e-4; and those of two columns are independent."""
    x = np.asarray(source.draw(key, jnp.zeros((10_000, 2))))
    assert scipy.stats.kstest(x.ravel(), law.cdf).pvalue > 1e-4
    assert scipy.stats.kstest(x.ravel(), lambda y: law.cdf(1.05 * y)).pvalue < 1e-4
    assert abs(np.corrcoef(x.T)[0, 1]) < 0.05


@pytest.mark.slow_but_one
@pytest.mark.parametrize(("source", "law"), LAWS, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_prob_is_scipys(source, law, shape, x64):
    x = np.random.default_rng(0).uniform(-3, 1.5, size=shape)
    expected = law.logpdf(x).reshape(shape[0], -1).sum(axis=1)
    np.testing.assert_allclose(source.log_prob(jnp.asarray(x)), expected, rtol=1e-12)
    x = source.draw(jax.random.key(1), x)
    np.testing.assert_allclose(source.log_prob(x), law.logpdf(x).reshape(shape[0], -1).sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("source", [source for source, _ in LAWS], ids=IDS)
def test_the_density_integrates_to_one(source):
    grid = jnp.linspace(-25, 25, 200_001)
    np.testing.assert_allclose(jnp.trapezoid(jnp.exp(source.log_prob(grid[:, None])), grid), 1, atol=1e-3)


@pytest.mark.slow_but_one
@pytest.mark.parametrize("source", [*(source for source, _ in LAWS), Sampled(ramp)], ids=[*IDS, "sampled"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_draws_are_in_the_shape_and_dtype_of_what_they_are_like(source, dtype, key):
    for like in (jnp.zeros((3, 2), dtype), jax.ShapeDtypeStruct((3, 2), dtype), np.zeros((3, 2), dtype)):
        x = jax.jit(lambda key, like=like: source.draw(key, like))(key)
        assert x.shape == (3, 2)
        assert x.dtype == dtype
        assert np.isfinite(np.asarray(x, dtype=float)).all()


def test_the_standard_normal_is_that_of_jax_to_the_last_bit(key):
    np.testing.assert_array_equal(Normal().draw(key, jnp.zeros((4, 3))), jax.random.normal(key, (4, 3)))


def test_log_probs_are_summed_precisely_and_of_any_numbers():
    """Bfloat16 has 8 bits: a sum of 10,000 terms in it would be off by tens of nats."""
    x = jnp.full((2, 10_000), 0.5, jnp.bfloat16)
    for source in (Normal(), Uniform(-1.0, 2.0)):
        log_p = source.log_prob(x)
        assert log_p.dtype == jnp.float32
        np.testing.assert_allclose(log_p, source.log_prob(x.astype(jnp.float32)))
    np.testing.assert_allclose(Uniform(0.0, 3.0).log_prob(np.array([[1.0, 2.0]])), -2 * np.log(3), rtol=1e-6)
    assert Normal().log_prob(jnp.zeros((0, 3))).shape == (0,)


@pytest.mark.slow
def test_tokens_that_are_rare_are_as_rare_as_they_should_be(key):
    """1e-6 of 8 million; one of probability 0 never."""
    x = Categorical((1 - 1e-6, 1e-6, 0.0)).draw(key, jax.ShapeDtypeStruct((8_000_000,), jnp.int32))
    num = np.bincount(x, minlength=3)
    assert abs(num[1] - 8) < 4 * 8**0.5
    assert num[2] == 0


def test_sources_of_tokens_are_values():
    assert Masked(5, 4) == Masked(5, 4) != Masked(5, 3)
    assert Categorical(np.array([0.5, 0.5])) == Categorical([0.5, 0.5]) == Categorical((0.5, 0.5))
    assert len({UniformTokens(2), UniformTokens(2), Categorical((0.5, 0.5)), Masked(2, 0)}) == 3
    assert (Masked(5, 4).mask, UniformTokens(3).mask, Categorical((0.5, 0.5)).mask) == (4, None, None)


def test_log_probs_of_tokens_are_over_the_whole_event():
    x = jnp.array([[[2, 2], [2, 2]], [[2, 0], [2, 2]]])
    np.testing.assert_array_equal(Masked(3, 2).log_prob(x), [0.0, -np.inf])
    np.testing.assert_allclose(UniformTokens(3).log_prob(x), [-4 * np.log(3)] * 2, rtol=1e-6)
    np.testing.assert_allclose(
        Categorical((0.2, 0.3, 0.5)).log_prob(x), [4 * np.log(0.5), 3 * np.log(0.5) + np.log(0.2)], rtol=1e-6
    )


def test_sources_are_values():
    assert Normal() == Normal(1.0) != Normal(2.0)
    assert len({Normal(), Normal(1.0), Uniform(), Uniform(0.0, 1.0), Sampled(ramp), Sampled(ramp)}) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Normal(0.0), "scale must be positive and finite, got 0.0."),
        (lambda: Normal(float("nan")), "scale must be positive and finite, got nan."),
        (lambda: Uniform(1.0, 1.0), "-inf < low < high < inf must hold, got low=1.0 and high=1.0."),
        (lambda: Uniform(0.0, float("inf")), "-inf < low < high < inf must hold, got low=0.0 and high=inf."),
        (lambda: Uniform(float("nan"), 1.0), "-inf < low < high < inf must hold, got low=nan and high=1.0."),
        (lambda: Masked(5, 5), "mask must be from 0 to 4, got 5."),
        (lambda: Masked(5, -1), "mask must be from 0 to 4, got -1."),
        (lambda: Masked(5.0, 4), "num_tokens must be an integer, got 5.0."),
        (lambda: UniformTokens(1), "num_tokens must be at least 2, got 1."),
        (lambda: Categorical((0.5, 0.6)), "probs must be at least two numbers, not negative and of sum 1, got"),
        (lambda: Categorical((1.5, -0.5)), "probs must be at least two numbers, not negative and of sum 1, got"),
        (lambda: Categorical([[0.5, 0.5]]), "probs must be at least two numbers, not negative and of sum 1, got"),
        (
            lambda: Masked(5, 4).draw(jax.random.key(0), jnp.zeros((2, 3))),
            "like must be tokens, integers from 0 to 4, got float32.",
        ),
        (
            lambda: UniformTokens(3).log_prob(jnp.array([[0, 3]])),
            "x must be tokens from 0 to 2, got some from 0 to 3.",
        ),
        (
            lambda: Sampled(ramp).log_prob(jnp.zeros((2, 2))),
            "has no density: a likelihood needs a source such as Normal",
        ),
        (
            lambda: Sampled(ramp).draw(jax.random.key(0), jnp.zeros((4, 3))),
            r"what Sampled\(ramp\) draws must have the shape of like, \(4, 3\), got \(4, 2\).",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
