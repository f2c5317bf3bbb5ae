import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.guidance import classifier_free, classifier_free_model
from fm_jax.nfe import nfe_per_call
from fm_jax.parameterization import convert, velocity_fn
from fm_jax.schedules import Cosine, Linear
from fm_jax.types import KINDS

X = jnp.array([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
T = jnp.array([0.1, 0.5, 0.9])


def v_cond(t, x):
    return 2 * x + 1


def v_uncond(t, x):
    return x * x


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -1.0])
def test_extrapolates_from_the_unconditional_velocity(scale):
    guided = classifier_free(v_cond, v_uncond, scale)
    expected = v_uncond(T, X) + scale * (v_cond(T, X) - v_uncond(T, X))
    np.testing.assert_allclose(guided(T, X), expected, rtol=1e-6)
    assert guided.nfe_per_call == 2


def test_scale_one_is_off_and_free():
    assert classifier_free(v_cond, v_uncond, 1.0) is v_cond
    assert classifier_free_model(v_cond, 0, 1) is v_cond


def test_scale_one_in_an_array_is_the_conditional_velocity_to_the_last_bit():
    x = jax.random.normal(jax.random.key(0), (100, 2)) * 100
    guided = classifier_free(v_cond, v_uncond, jnp.ones(100))
    np.testing.assert_array_equal(guided(0.5, x), v_cond(0.5, x))


def test_one_scale_for_each_example():
    guided = classifier_free(v_cond, v_uncond, jnp.array([0.0, 1.0, 2.0]))(T, X)
    c, u = v_cond(T, X), v_uncond(T, X)
    np.testing.assert_allclose(guided, jnp.stack([u[0], c[1], 2 * c[2] - u[2]]), rtol=1e-6)


@pytest.mark.parametrize("scale", [3.0, jnp.full(3, 3.0)])
def test_interval_guides_only_inside(scale):
    guided = classifier_free(v_cond, v_uncond, scale, interval=(0.2, 0.5))
    everywhere = classifier_free(v_cond, v_uncond, scale)
    expected = jnp.where(jnp.array([False, True, False])[:, None], everywhere(T, X), v_cond(T, X))
    np.testing.assert_array_equal(guided(T, X), expected)
    for t, row in zip(T, range(3), strict=True):  # a scalar time does the same
        np.testing.assert_array_equal(guided(t, X)[row], expected[row])


def test_nfe_adds_up_through_nesting():
    inner = classifier_free(v_cond, v_uncond, 2.0)
    assert nfe_per_call(classifier_free(inner, v_uncond, 2.0)) == 3
    assert nfe_per_call(classifier_free_model(classifier_free_model(v_cond, 0, 2.0), 0, 2.0)) == 4


def class_model(kind, schedule):
    """A network of any kind with another velocity for each class."""

    def model_fn(t, x, cond=None):
        model_fn.batches.append(x.shape[0])
        rate = jnp.array([0.5, -2.0, 1.0])[cond][:, None]
        return getattr(convert("velocity", rate * x + jnp.sin(rate), t, x, schedule), kind)

    model_fn.batches = []
    return model_fn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_one_batch_for_both_branches_works_for_every_kind(kind, schedule):
    cond, null = jnp.array([0, 1, 1]), jnp.full(3, 2)
    velocities = class_model("velocity", schedule)
    expected = classifier_free(
        velocity_fn(velocities, "velocity", schedule, cond), velocity_fn(velocities, "velocity", schedule, null), 2.5
    )(T, X)
    model_fn = class_model(kind, schedule)
    guided = velocity_fn(classifier_free_model(model_fn, 2, 2.5), kind, schedule, cond)(T, X)
    np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-5)
    assert model_fn.batches == [6]


def test_model_interval_and_scale_for_each_example():
    model_fn = class_model("data", Linear())
    scale, cond = jnp.array([2.0, 3.0, 4.0]), jnp.array([0, 1, 0])
    guided = classifier_free_model(model_fn, jnp.full(3, 2), scale, interval=(0.4, 1.0))(T, X, cond)
    conditional, unconditional = model_fn(T, X, cond), model_fn(T, X, jnp.full(3, 2))
    expected = unconditional + jnp.array([1.0, 3.0, 4.0])[:, None] * (conditional - unconditional)
    np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-5)


def test_model_with_a_pytree_condition_and_a_scalar_time():
    def model_fn(t, x, cond):
        return x * cond["scale"][:, None] + cond["text"].sum(axis=1) + t

    cond = {"scale": jnp.array([1.0, 2.0, 3.0]), "text": jnp.ones((3, 4, 2))}
    null = {"scale": 0.0, "text": jnp.zeros(2)}
    guided = classifier_free_model(model_fn, null, 2.0)
    np.testing.assert_allclose(guided(0.5, X, cond), 2 * (X * cond["scale"][:, None] + 4) + 0.5, rtol=1e-6)


def test_nfe_survives_velocity_fn():
    assert nfe_per_call(velocity_fn(classifier_free_model(v_cond, 0, 2.0), "velocity", Linear())) == 2


def test_model_without_a_condition_is_refused():
    with pytest.raises(ValueError, match="cond must be given"):
        classifier_free_model(lambda t, x, cond: x, 0, 2.0)(0.5, X)


BAD = [
    ({"scale": float("nan")}, "scale must be finite, got nan."),
    ({"scale": float("inf")}, "scale must be finite, got inf."),
    ({"scale": jnp.array([1.0, jnp.inf])}, "scale must be finite"),
    ({"scale": jnp.ones((2, 2))}, r"scale must be a number or \[batch\], got shape \(2, 2\)."),
    ({"interval": (0.5, 0.2)}, r"interval must be \(start, end\) with 0 <= start < end <= 1, got \(0.5, 0.2\)."),
    ({"interval": (0.5, 0.5)}, "interval must be"),
    ({"interval": (-0.1, 0.5)}, "interval must be"),
    ({"interval": (0.0, 1.1)}, "interval must be"),
    ({"interval": (0.0, float("nan"))}, "interval must be"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    options = {"scale": 2.0, **options}
    scale = options.pop("scale")
    with pytest.raises(ValueError, match=message):
        classifier_free(v_cond, v_uncond, scale, **options)
    with pytest.raises(ValueError, match=message):
        classifier_free_model(v_cond, 0, scale, **options)
