import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.data import toy

NUM = 100_000
# Half circles: E x = 0 (outer), 1 (inner); E y = 2/pi, 1/2 - 2/pi; E y^2 = 1/2, 3/4 - 2/pi; E xy = 0, 1/2 - 2/pi.
_MOONS_XY = 4 * ((0.5 - 2 / np.pi) / 2 - 0.5 * 0.25)
_MOONS_YY = 4 * ((1.25 - 2 / np.pi) / 2 - 0.25**2 + 0.05**2)
# E sin^2 = 1/2; E (cos - 1)^2 = 3/2 + 4/(3 pi); E sin sign (cos - 1) = -1/(3 pi), on [-3 pi/2, 3 pi/2].
_S_XY = -(1.5**2) / (3 * np.pi)
_S_YY = 1.5**2 * (1.5 + 4 / (3 * np.pi) + 0.05**2)
MOMENTS = {
    "eight_gaussians": ([0, 0], [[13.5, 0], [0, 13.5]]),
    "moons": ([0, 0.5], [[4 * (0.75 + 0.05**2), _MOONS_XY], [_MOONS_XY, _MOONS_YY]]),
    "checkerboard": ([0, 0], [[16 / 3, 1], [1, 16 / 3]]),
    "s_curve": ([0, 0], [[1.5**2 * (0.5 + 0.05**2), _S_XY], [_S_XY, _S_YY]]),
    "circles": ([0, 0], 3.5**2 * (1.25 / 4 + 0.05**2) * np.eye(2)),
    "pinwheel": ([0, 0], 2**2 * (1 + 0.3**2 + 0.1**2) / 2 * np.eye(2)),
}


@pytest.fixture(scope="module")
def samples():
    return {name: np.asarray(jax.jit(f, static_argnums=1)(jax.random.key(0), NUM)) for name, f in toy.TOYS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", toy.TOYS)
def test_moments_equal_closed_form(samples, name):
    mean, covariance = map(np.asarray, MOMENTS[name])
    x = samples[name]
    scale = np.sqrt(np.trace(covariance))
    assert x.shape == (NUM, 2)
    assert x.dtype == np.float32
    # Five standard errors: false alarms below 1e-5 for the fixed key.
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * scale / np.sqrt(NUM))
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=8 * scale**2 / np.sqrt(NUM))


@pytest.mark.parametrize("name", ["moons", "s_curve", "circles"])
def test_distribution_equals_scikit_learn(samples, name):
    datasets = pytest.importorskip("sklearn.datasets")
    num = 20_000
    if name == "moons":
        expected = 2 * datasets.make_moons(num, noise=0.05, random_state=0)[0] - [1, 0]
    elif name == "s_curve":
        expected = 1.5 * datasets.make_s_curve(num, noise=0.05, random_state=0)[0][:, [0, 2]]
    else:
        expected = 3.5 * datasets.make_circles(num, noise=0.05, factor=0.5, random_state=0)[0]
    from scipy import stats

    for angle in np.linspace(0, np.pi, 8, endpoint=False):
        direction = np.array([np.cos(angle), np.sin(angle)])
        # 1e-4 in each of 24 tests, with fixed keys.
        assert stats.ks_2samp(samples[name][:num] @ direction, expected @ direction).pvalue > 1e-4


def test_eight_gaussians_have_eight_equal_round_modes(samples):
    x = samples["eight_gaussians"]
    tight = np.asarray(toy.eight_gaussians(jax.random.key(1), 40_000, radius=3.0, std=0.1))
    mode = np.rint(np.arctan2(tight[:, 1], tight[:, 0]) / (np.pi / 4)).astype(int) % 8
    np.testing.assert_allclose(np.bincount(mode) / len(tight), 1 / 8, atol=0.008)
    centers = 3 * np.stack([np.cos(mode * np.pi / 4), np.sin(mode * np.pi / 4)], axis=-1)
    np.testing.assert_allclose((tight - centers).std(0), 0.1, rtol=0.02)
    assert not np.array_equal(x[: len(tight)], tight)


def test_checkerboard_is_uniform_on_black(samples):
    x = samples["checkerboard"] / 2
    field = np.floor(x).astype(int)
    assert (field.sum(1) % 2 == 0).all()
    _, counts = np.unique(field, axis=0, return_counts=True)
    assert len(counts) == 8
    np.testing.assert_allclose(counts / NUM, 1 / 8, atol=0.006)


def test_circles_and_s_curve_without_noise_lie_on_their_curves():
    radius = np.linalg.norm(toy.circles(jax.random.key(0), 1000, noise=0.0, factor=0.3, scale=2.0), axis=1)
    np.testing.assert_allclose(np.minimum(abs(radius - 2), abs(radius - 0.6)), 0, atol=1e-5)
    x = np.asarray(toy.s_curve(jax.random.key(0), 1000, noise=0.0, scale=1.0))
    # Two unit circles around (0, -1) and (0, 1).
    np.testing.assert_allclose(np.hypot(x[:, 0], np.abs(x[:, 1]) - 1), 1, atol=1e-5)


def test_pinwheel_has_the_right_symmetry():
    """Turned back by rate exp(r), the arms point in the five directions."""
    x = np.asarray(toy.pinwheel(jax.random.key(0), 5000, tangential_std=0.0, scale=1.0))
    radius = np.linalg.norm(x, axis=1)
    keep = radius > 0.3  # The first coordinate is negative, and so the angle turned by pi, with probability 4e-4.
    angle = np.arctan2(x[:, 1], x[:, 0]) - 0.25 * np.exp(radius)
    arm = (angle / (2 * np.pi / 5))[keep]
    assert np.mean(np.abs(arm - np.rint(arm)) < 1e-4) > 0.998
    assert np.bincount(np.rint(arm[np.abs(arm - np.rint(arm)) < 1e-4]).astype(int) % 5).min() > 850


@pytest.mark.slow_but_one
@pytest.mark.parametrize("name", toy.TOYS)
def test_float32_under_x64_and_keys_matter(name):
    with jax.enable_x64(True):
        x = toy.TOYS[name](jax.random.key(0), 4)
    assert x.dtype == jnp.float32
    assert not np.array_equal(x, toy.TOYS[name](jax.random.key(1), 4))


def test_make_toy():
    assert toy.make_toy("moons") is toy.moons
    with pytest.raises(ValueError, match=r"name must be one of 'eight_gaussians', 'moons', .*, got 'spiral'\."):
        toy.make_toy("spiral")
