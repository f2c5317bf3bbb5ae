import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from fm_jax import oracles
from fm_jax.conditions import without
from fm_jax.guidance import ZeroStar, classifier_free, classifier_free_batched, compose
from fm_jax.guidance.classifier_free import nested
from fm_jax.models.conditioning import Conditions
from fm_jax.nfe import Counted, cost
from fm_jax.parameterization import convert
from fm_jax.samplers import RungeKutta, sample
from fm_jax.samplers.grids import uniform
from fm_jax.schedules import VP, Linear

X = jnp.array([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])
T = jnp.array([0.1, 0.5, 0.9])
LINEAR, RK4 = Linear(), RungeKutta("rk4")


def v_cond(t, x):
    return 2 * x + 1


def v_uncond(t, x):
    return x * x


@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, -1.0])
def test_extrapolates_from_the_unconditional_velocity(scale):
    guided = classifier_free(v_cond, v_uncond, scale)
    expected = v_uncond(T, X) + scale * (v_cond(T, X) - v_uncond(T, X))
    np.testing.assert_allclose(guided(T, X), expected, rtol=1e-6)
    assert guided.nfe is None  # functions of your own


def test_scale_one_is_off_and_free():
    assert classifier_free(v_cond, v_uncond, 1.0, rule=ZeroStar()) is v_cond
    model_fn = class_model("velocity", LINEAR)
    off = classifier_free_batched(model_fn, "velocity", LINEAR, CLASSES, 2, 1, rule=ZeroStar())
    np.testing.assert_array_equal(off(T, X), model_fn(T, X, CLASSES))
    assert model_fn.batches == [3, 3]
    assert cost(off) is None
    off = classifier_free_batched(Counted(model_fn, 1), "velocity", LINEAR, CLASSES, 2, 1)
    assert cost(off) == 1


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


def test_no_rule_acts_outside_the_interval():
    """Zero-init neither: t = 0.1 is before `zero_until`, and outside."""
    guided = classifier_free(v_cond, v_uncond, 3.0, interval=(0.2, 1.0), rule=ZeroStar(zero_until=0.6))(T, X)
    np.testing.assert_array_equal(guided[:2], jnp.stack([v_cond(T, X)[0], jnp.zeros(2)]))


def test_costs_add_up_through_nesting():
    once, model_fn = Counted(v_cond, 1), class_model("velocity", LINEAR)
    inner = classifier_free(once, once, 2.0)
    assert inner.nfe == 2
    assert classifier_free(inner, once, 2.0).nfe == 3
    assert classifier_free(inner, v_uncond, 2.0).nfe is None
    for model, each in ((model_fn, None), (Counted(model_fn, 1), 1), (Counted(model_fn, 2), 2)):
        batched = classifier_free_batched(model, "velocity", LINEAR, CLASSES, 0, 2.0)
        composed = compose(model, "velocity", LINEAR, [CLASSES] * 3, 0, [1.0, 2.0, 3.0])
        assert (batched.nfe, composed.nfe) == ((None, None) if each is None else (2 * each, 4 * each))


CLASSES = np.array([0, 1, 1])


def class_model(kind, schedule):
    """A network of any kind with another velocity for each class."""

    def model_fn(t, x, cond=None):
        model_fn.batches.append(x.shape[0])
        rate = jnp.array([0.5, -2.0, 1.0])[cond][:, None]
        velocity = rate * x + jnp.sin(rate)
        return velocity if kind == "velocity" else getattr(convert("velocity", velocity, t, x, schedule), kind)

    model_fn.batches = []
    return model_fn


def test_the_network_is_called_once():
    model_fn = class_model("velocity", LINEAR)
    classifier_free_batched(model_fn, "velocity", LINEAR, CLASSES, 2, 2.5)(T, X)
    compose(model_fn, "velocity", LINEAR, [CLASSES, 1 - CLASSES], 2, [2.5, 1.0])(T, X)
    assert model_fn.batches == [6, 9]


def test_batched_interval_and_scale_for_each_example():
    model_fn = class_model("velocity", LINEAR)
    scale = jnp.array([2.0, 3.0, 4.0])
    guided = classifier_free_batched(model_fn, "velocity", LINEAR, CLASSES, jnp.full(3, 2), scale, interval=(0.4, 1.0))
    conditional, unconditional = model_fn(T, X, CLASSES), model_fn(T, X, jnp.full(3, 2))
    expected = unconditional + jnp.array([1.0, 3.0, 4.0])[:, None] * (conditional - unconditional)
    np.testing.assert_allclose(guided(T, X), expected, rtol=1e-4, atol=1e-5)


def test_pytree_condition_and_scalar_time():
    def model_fn(t, x, cond):
        return x * cond["scale"][:, None] + cond["text"].sum(axis=1) + t[:, None]

    cond = {"scale": jnp.array([1.0, 2.0, 3.0]), "text": jnp.ones((3, 4, 2))}
    null = {"scale": 0.0, "text": jnp.zeros(2)}
    guided = classifier_free_batched(model_fn, "velocity", LINEAR, cond, null, 2.0)
    np.testing.assert_allclose(guided(0.5, X), 2 * (X * cond["scale"][:, None] + 4) + 0.5, rtol=1e-6)


def test_a_negative_condition_takes_the_place_of_none():
    """`null_cond` is then one condition for each example."""
    model_fn, negative = class_model("velocity", LINEAR), np.array([1, 0, 2])
    guided = classifier_free_batched(model_fn, "velocity", LINEAR, CLASSES, negative, 3.0)(T, X)
    towards, away = model_fn(T, X, CLASSES), model_fn(T, X, negative)
    np.testing.assert_allclose(guided, away + 3 * (towards - away), rtol=1e-5)


def test_jit_vmap_and_grad():
    model_fn = class_model("data", LINEAR)

    def value(scale, x):
        v = classifier_free_batched(model_fn, "data", LINEAR, CLASSES, 2, scale)
        return compose(model_fn, "data", LINEAR, [CLASSES], 2, [scale])(0.5, x).sum() + v(0.5, x).sum()

    velocities = class_model("velocity", LINEAR)
    by_scale = 2 * (velocities(0.5, X, CLASSES) - velocities(0.5, X, jnp.full(3, 2))).sum()
    gradients = jax.jit(jax.vmap(jax.grad(value), in_axes=(0, None)))(jnp.array([1.0, 2.0]), X)
    np.testing.assert_allclose(gradients, [by_scale] * 2, rtol=1e-4)


# Several conditions


def three_velocities():
    model_fn = class_model("velocity", LINEAR)
    return [model_fn(T, X, cond) for cond in (CLASSES, 1 - CLASSES, np.full(3, 2))]


@pytest.mark.parametrize("kind", ["velocity", "noise"])
def test_compose_adds_what_each_condition_adds(kind):
    first, second, none = three_velocities()
    scales = [2.0, jnp.array([-1.0, 0.0, 0.5])]
    v = compose(class_model(kind, LINEAR), kind, LINEAR, [CLASSES, 1 - CLASSES], 2, scales)
    expected = none + 2 * (first - none) + scales[1][:, None] * (second - none)
    np.testing.assert_allclose(v(T, X), expected, rtol=1e-4, atol=1e-5)


def test_compose_outside_the_interval_exaggerates_nothing():
    first, second, none = three_velocities()
    conds, scales = [CLASSES, 1 - CLASSES], [3.0, jnp.array([-2.0, -2.0, 0.5])]
    v = compose(class_model("velocity", LINEAR), "velocity", LINEAR, conds, 2, scales, interval=(0.4, 0.6))
    expected = none + jnp.array([1, 3, 1])[:, None] * (first - none)
    expected = expected + jnp.array([-1, -2, 0.5])[:, None] * (second - none)
    np.testing.assert_allclose(v(T, X), expected, rtol=1e-5, atol=1e-6)


def test_compose_of_one_is_classifier_free():
    model_fn, options = class_model("velocity", LINEAR), {"interval": (0.4, 0.6)}
    one = compose(model_fn, "velocity", LINEAR, [CLASSES], 2, [3.0], **options)(T, X)
    same = classifier_free_batched(model_fn, "velocity", LINEAR, CLASSES, 2, 3.0, **options)(T, X)
    np.testing.assert_allclose(one, same, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compose_samples_the_product_of_gaussians(x64):
    """p_u (p_1 / p_u)^s1 (p_2 / p_u)^s2 for Gaussians of one covariance: a Gaussian, reached exactly."""
    covariance = np.array([[0.5, 0.2], [0.2, 0.3]])
    means = np.array([[2.0, 0.0], [0.0, 1.0], [-0.5, 0.5]])
    models = [oracles.velocity(oracles.gaussian_mixture([m], [covariance]), LINEAR) for m in means]

    def model_fn(t, x, cond):
        return jnp.where(cond[:, None] == 0, models[0](t, x), 0) + sum(
            jnp.where(cond[:, None] == i, models[i](t, x), 0) for i in (1, 2)
        )

    x0 = np.asarray(X, dtype=float)
    conds = [np.zeros(3, dtype=int), np.ones(3, dtype=int)]
    v = compose(model_fn, "velocity", LINEAR, conds, 2, [1.5, -1.0])
    product = oracles.gaussian_mixture([means[2] + 1.5 * (means[0] - means[2]) - (means[1] - means[2])], [covariance])
    end = jax.jit(lambda x: sample(v, x, RK4, times=200).x)(x0)
    np.testing.assert_allclose(end, oracles.flow_map(product, LINEAR, 0.0, 1.0, x0), atol=1e-6)


# Conditions each of which adds to the one before


@pytest.mark.parametrize("kind", ["velocity", "noise"])
def test_nested_scales_what_each_condition_adds(kind):
    first, second, none = three_velocities()
    scales = [1.5, jnp.array([-1.0, 0.0, 7.5])]
    model_fn = Counted(class_model(kind, LINEAR), 1)
    v = nested(model_fn, kind, LINEAR, [CLASSES, 1 - CLASSES], 2, scales)
    expected = none + 1.5 * (first - none) + scales[1][:, None] * (second - first)
    np.testing.assert_allclose(v(T, X), expected, rtol=1e-4, atol=1e-5)
    assert v.nfe == 3


def test_nested_is_the_equation_of_instruct_pix2pix():
    """v(0, 0) + s_I (v(c_I, 0) - v(0, 0)) + s_T (v(c_I, c_T) - v(c_I, 0)), with parts left out by name."""

    def model_fn(t, x, cond):
        told = jnp.where(cond.mask, cond.tokens[..., 0], 0.0).sum(axis=1, keepdims=True)
        return jnp.sin(x + cond.local + 3 * told * jnp.cos(cond.local) + t[:, None])

    cond = Conditions(local=X + 1, tokens=jnp.array([[[2.0], [1.0]]] * 3), mask=jnp.array([[True, False]] * 3))
    null_cond = Conditions(local=0.0, tokens=0.0, mask=False)
    image = without(cond, null_cond, ("tokens", "mask"))
    v = nested(model_fn, "velocity", LINEAR, [image, cond], null_cond, [1.2, 7.5])
    t, c_i, c_t = T[:, None], X + 1, 2.0
    field = lambda c_i, c_t: jnp.sin(X + c_i + 3 * c_t * jnp.cos(c_i) + t)  # noqa: E731
    expected = field(0, 0) + 1.2 * (field(c_i, 0) - field(0, 0)) + 7.5 * (field(c_i, c_t) - field(c_i, 0))
    np.testing.assert_allclose(v(T, X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("one", [1.0, jnp.ones(3)], ids=["number", "batch"])
def test_nested_scales_of_one_are_the_last_condition_to_the_bit(one):
    model_fn = class_model("noise", LINEAR)
    conds = [CLASSES, 1 - CLASSES]
    v = nested(Counted(model_fn, 1), "noise", LINEAR, conds, 2, [one, one])
    expected = nested(model_fn, "noise", LINEAR, [1 - CLASSES], 2, [1])(T, X)
    np.testing.assert_array_equal(v(T, X), expected)
    assert cost(v) == (1 if isinstance(one, float) else 3)


def test_nested_outside_the_interval_is_the_last_condition():
    first, second, none = three_velocities()
    v = nested(
        class_model("velocity", LINEAR), "velocity", LINEAR, [CLASSES, 1 - CLASSES], 2, [3.0, 2.0], interval=(0.4, 0.6)
    )
    inside = none + 3 * (first - none) + 2 * (second - first)
    expected = jnp.where((T == 0.5)[:, None], inside, second)
    np.testing.assert_allclose(v(T, X), expected, rtol=1e-5, atol=1e-6)


def test_nested_of_one_is_classifier_free_and_is_called_once():
    model_fn, options = class_model("velocity", LINEAR), {"interval": (0.4, 0.6)}
    one = nested(model_fn, "velocity", LINEAR, [CLASSES], 2, [3.0], **options)(T, X)
    same = classifier_free_batched(model_fn, "velocity", LINEAR, CLASSES, 2, 3.0, **options)(T, X)
    np.testing.assert_allclose(one, same, rtol=1e-5, atol=1e-6)
    nested(model_fn, "velocity", LINEAR, [CLASSES, 1 - CLASSES], 2, [3.0, 2.0])(T, X)
    assert model_fn.batches == [6, 6, 9]


@pytest.mark.slow_but_one
@pytest.mark.parametrize(("guide", "weights"), [(compose, (1.5, 7.0)), (nested, (1.5 - 7.0, 7.0))])
def test_samples_the_tilted_gaussian_of_several_conditions(guide, weights, x64):
    """Of one covariance: v_0 + sum_i w_i (v_i - v_0) is the velocity of the mean m_0 + sum_i w_i (m_i - m_0)."""
    covariance = np.array([[0.5, 0.2], [0.2, 0.3]])
    means = np.array([[2.0, 0.0], [2.0, 0.5], [-0.5, 0.5]])
    law = lambda mean: oracles.gaussian_mixture([mean], [covariance])  # noqa: E731
    models = [oracles.velocity(law(mean), LINEAR) for mean in means]

    def model_fn(t, x, cond):
        return sum(jnp.where(cond[:, None] == i, model(t, x), 0) for i, model in enumerate(models))

    x0, conds = np.asarray(X, dtype=float), [np.zeros(3, dtype=int), np.ones(3, dtype=int)]
    v = guide(model_fn, "velocity", LINEAR, conds, 2, [1.5, 7.0])
    tilted = law(means[2] + weights[0] * (means[0] - means[2]) + weights[1] * (means[1] - means[2]))
    end = jax.jit(lambda x: sample(v, x, RK4, times=200).x)(x0)
    np.testing.assert_allclose(end, oracles.flow_map(tilted, LINEAR, 0.0, 1.0, x0), atol=1e-6)


# What guidance samples: p_c^scale p_u^(1 - scale), and when not


@pytest.mark.slow_but_one
@pytest.mark.parametrize("schedule", [Linear(), VP()], ids=str)
def test_samples_the_tilted_law_of_gaussians_with_one_covariance(schedule, x64):
    """Then p_c^s p_u^(1 - s) is N(m_u + s (m_c - m_u), C), at every t, and the guided field is its velocity."""
    m_c, m_u, covariance, scale = np.array([1.0, -0.5]), np.array([-0.5, 0.2]), np.array([[0.5, 0.2], [0.2, 0.3]]), 2.5
    cond, uncond, tilted = (
        oracles.gaussian_mixture([mean], [covariance]) for mean in (m_c, m_u, m_u + scale * (m_c - m_u))
    )
    x0, t1 = np.asarray(X, dtype=float), schedule.domain[1] - 1e-3
    guided = classifier_free(oracles.velocity(cond, schedule), oracles.velocity(uncond, schedule), scale)

    @jax.jit
    def check(x):
        logs = [oracles.log_prob(each, schedule, 0.6, x) for each in (cond, uncond, tilted)]
        end = sample(guided, x, RK4, times=uniform(400, 0.0, t1)).x
        return guided(0.6, x), oracles.velocity(tilted, schedule)(0.6, x), logs, end

    field, exact, (log_c, log_u, log_tilted), end = check(x0)
    np.testing.assert_allclose(field, exact, rtol=1e-9)
    assert np.ptp(scale * log_c + (1 - scale) * log_u - log_tilted) < 1e-9  # equal up to normalisation
    np.testing.assert_allclose(end, oracles.flow_map(tilted, schedule, 0.0, t1, x0), atol=1e-6)


def end_moments(mean_c, std_c, mean_u, std_u, scale):
    """Mean and standard deviation of the guided samples on the line, by the ODE; its map is affine."""
    v_c, v_u = (
        oracles.velocity(oracles.gaussian_mixture([[m]], s), LINEAR) for m, s in ((mean_c, std_c), (mean_u, std_u))
    )
    guided = classifier_free(v_c, v_u, scale)
    low, high = jax.jit(lambda x: sample(guided, x, RK4, times=200).x[:, 0])(np.array([[-1.0], [1.0]]))
    return (low + high) / 2, (high - low) / 2


@pytest.mark.slow
def test_does_not_sample_the_tilted_law_of_gaussians_with_two_covariances(x64):
    """v_i = m_i + A_i (x - t m_i) with A_i = S_i' / (2 S_i), S_i = t^2 std_i^2 + (1 - t)^2, so that the guided field is
    affine too: its samples have std std_c^s std_u^(1 - s), and a mean by quadrature. The guided score at t = 1 is that
    of the tilted law all the same: the law at t = 1 is not the one whose score is followed there.
    """
    means, stds, weights = np.array([1.0, 0.0]), np.array([0.5, 1.0]), np.array([2.0, -1.0])
    mean, std = end_moments(means[0], stds[0], means[1], stds[1], weights[0])
    np.testing.assert_allclose(std, 0.5**2, rtol=1e-6)

    def variances(t):
        return t**2 * stds**2 + (1 - t) ** 2

    def source(t):
        growth_left = np.prod((variances(1.0) / variances(t)) ** (weights / 2))
        rates = (t * stds**2 - (1 - t)) / variances(t)
        return growth_left * (weights * means * (1 - t * rates)).sum()

    np.testing.assert_allclose(mean, scipy.integrate.quad(source, 0, 1, epsabs=1e-10)[0], atol=1e-6)

    precision = (weights / stds**2).sum()
    tilted = scipy.stats.norm((weights * means / stds**2).sum() / precision, precision**-0.5)
    np.testing.assert_allclose([mean, tilted.mean()], [1.380, 1.143], atol=1e-3)
    np.testing.assert_allclose([std, tilted.std()], [0.250, 0.378], atol=1e-3)

    x = np.array([[0.3], [1.7]])
    cond, uncond = (oracles.gaussian_mixture([[m]], s) for m, s in zip(means, stds, strict=True))
    t = 0.9999
    v = classifier_free(oracles.velocity(cond, LINEAR), oracles.velocity(uncond, LINEAR), 2.0)
    score = convert("velocity", v(t, x), t, x, LINEAR).score
    np.testing.assert_allclose(score, (tilted.mean() - x) / tilted.var(), atol=2e-3)


def test_does_not_sample_the_tilted_law_of_a_mixture(x64):
    """One of two equal Gaussians, with their mixture as unconditional: guidance overshoots and narrows."""
    centres, width, scale = np.array([1.0, -1.0]), 0.7, 3.0
    cond, uncond = oracles.gaussian_mixture([centres[:1]], width), oracles.gaussian_mixture(centres[:, None], width)
    grid = np.linspace(-6, 8, 4001)[:, None]
    quantiles = scipy.stats.norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]
    guided = classifier_free(oracles.velocity(cond, LINEAR), oracles.velocity(uncond, LINEAR), scale)

    @jax.jit
    def both(grid, x0):
        log_c, log_u = (oracles.log_prob(each, LINEAR, 1.0, grid) for each in (cond, uncond))
        return scale * log_c + (1 - scale) * log_u, sample(guided, x0, RK4, times=100).x[:, 0]

    log_tilted, samples = both(grid, quantiles)
    density = np.exp(log_tilted)
    density /= density.sum()
    mean = (density * grid[:, 0]).sum()
    std = np.sqrt((density * (grid[:, 0] - mean) ** 2).sum())
    np.testing.assert_allclose([mean, samples.mean()], [1.185, 1.734], atol=5e-3)
    np.testing.assert_allclose([std, samples.std()], [0.587, 0.443], atol=5e-3)


def test_autoguidance_sharpens(x64):
    """A weaker model of the same data, here one that blurs it from 0.5 to 0.8: the mean stays, the spread shrinks."""
    mean, std = end_moments(1.0, 0.5, 1.0, 0.8, 2.0)
    np.testing.assert_allclose([mean, std], [1.0, 0.5**2 / 0.8], rtol=1e-6)


INTERVAL = r"interval must be a pair \(low, high\)"
BAD = [
    ({"scale": float("nan")}, "scale must be finite, got nan."),
    ({"scale": float("inf")}, "scale must be finite, got inf."),
    ({"scale": jnp.array([1.0, jnp.inf])}, "scale must be finite"),
    ({"scale": jnp.ones((2, 2))}, r"scale must be a number or \[batch\], got float32 of shape \(2, 2\)."),
    ({"interval": (0.5, 0.2)}, rf"{INTERVAL}: 0 <= low < high <= 1 must hold, got low=0.5 and high=0.2."),
    ({"interval": (0.5, 0.5)}, rf"{INTERVAL}: .* got low=0.5 and high=0.5."),
    ({"interval": (-0.1, 0.5)}, rf"{INTERVAL}: .* got low=-0.1 and high=0.5."),
    ({"interval": (0.0, 1.1)}, rf"{INTERVAL}: .* got low=0.0 and high=1.1."),
    ({"interval": (0.0, float("nan"))}, rf"{INTERVAL}: .* got low=0.0 and high=nan."),
    ({"interval": 0.5}, rf"{INTERVAL}, got 0.5."),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_refused(options, message):
    options = {"scale": 2.0, **options}
    scale = options.pop("scale")
    with pytest.raises(ValueError, match=message):
        classifier_free(v_cond, v_uncond, scale, **options)
    with pytest.raises(ValueError, match=message):
        classifier_free_batched(v_cond, "velocity", LINEAR, CLASSES, 0, scale, **options)
    for guide in (compose, nested):
        with pytest.raises(ValueError, match=message):
            guide(v_cond, "velocity", LINEAR, [CLASSES] * 2, 0, [1.0, scale], **options)


def test_branches_of_another_shape_are_refused():
    """[batch, 1] would be broadcast."""
    thin = lambda t, x: x[:, :1]  # noqa: E731
    for branches, name in (((thin, v_uncond), "v_cond"), ((v_cond, thin), "v_uncond")):
        with pytest.raises(ValueError, match=rf"{name}\(t, x\) must have the shape of x, \(3, 2\), got \(3, 1\)"):
            classifier_free(*branches, 2.0)(T, X)


def test_a_scale_of_another_batch_is_refused():
    message = r"scale must be a number or \[batch\] = \(3,\), got shape \(2,\)."
    for v in (
        classifier_free(v_cond, v_uncond, jnp.ones(2)),
        classifier_free_batched(class_model("velocity", LINEAR), "velocity", LINEAR, CLASSES, 2, jnp.ones(2)),
        compose(class_model("velocity", LINEAR), "velocity", LINEAR, [CLASSES], 2, [jnp.ones(2)]),
        nested(class_model("velocity", LINEAR), "velocity", LINEAR, [CLASSES], 2, [jnp.ones(2)]),
    ):
        with pytest.raises(ValueError, match=message):
            v(T, X)


def test_bad_conditions_are_refused():
    message = "cond must be given: classifier-free guidance needs a condition to guide towards."
    with pytest.raises(ValueError, match=message):
        classifier_free_batched(v_cond, "velocity", LINEAR, None, 0, 2.0)
    for guide in (compose, nested):
        with pytest.raises(ValueError, match=message):
            guide(v_cond, "velocity", LINEAR, [CLASSES, None], 0, [2.0, 1.0])
        with pytest.raises(ValueError, match="of one length, at least 1, got 0 conditions and 0 scales"):
            guide(v_cond, "velocity", LINEAR, [], 0, [])
        with pytest.raises(ValueError, match="of one length, at least 1, got 2 conditions and 1 scales"):
            guide(v_cond, "velocity", LINEAR, [CLASSES] * 2, 0, [1.0])
        with pytest.raises(ValueError, match=r"scales must be a list, with one for each condition, got 2.0"):
            guide(v_cond, "velocity", LINEAR, [CLASSES], 0, 2.0)
    with pytest.raises(ValueError, match=r"got another in conds\[1\] than in conds\[0\]"):
        nested(v_cond, "velocity", LINEAR, [CLASSES, X], 0, [2.0, 1.0])
    with pytest.raises(ValueError, match="kind must be one of"):
        classifier_free_batched(lambda t, x, cond: x, "x0", LINEAR, CLASSES, 0, 2.0)
