import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.data.toy import eight_gaussians, moons, s_curve
from fm_jax.metrics import (
    Floor,
    Measured,
    energy_distance,
    floor,
    measure,
    mmd,
    normalised_path_energy_floor,
    wasserstein,
)

# W_2 of two draws of 512 points, mean and standard deviation over 20 pairs, from scikit-learn's and NumPy's draws and
# SciPy's assignment.
FLOORS = {eight_gaussians: (0.741, 0.085), moons: (0.281, 0.097), s_curve: (0.349, 0.137)}


@pytest.mark.slow
@pytest.mark.parametrize("draw", FLOORS, ids=lambda draw: draw.__name__)
def test_the_floor_of_w2(draw, key):
    """Within four standard errors of the difference of two means of 20."""
    mean, std = FLOORS[draw]
    measured = floor(wasserstein, draw, key, 512)
    assert abs(measured.mean - mean) < 4 * math.hypot(std, measured.std) / math.sqrt(20)
    assert 0.4 * std < measured.std < 2.5 * std
    assert len(set(measured.values)) == 20


def test_the_two_samples_are_disjoint(key):
    """A data set drawn from without replacement is split, not sampled twice."""
    data = jnp.arange(40.0)
    pairs = []

    def metric(x, y):
        pairs.append((np.asarray(x), np.asarray(y)))
        return x.sum() - y.sum()

    measured = floor(metric, lambda key, num: jax.random.choice(key, data, (num,), replace=False), key, 20, repeats=3)
    for x, y in pairs:
        np.testing.assert_array_equal(np.sort(np.concatenate([x, y])), data)
    values = [x.sum() - y.sum() for x, y in pairs]
    np.testing.assert_allclose(measured.values, values)
    np.testing.assert_allclose(measured[:2], [np.mean(values), np.std(values, ddof=1)])


@pytest.mark.slow_but_one
@pytest.mark.parametrize("metric", [energy_distance, functools.partial(mmd, bandwidths=1.0)], ids=["energy", "mmd"])
def test_unbiased_metrics_have_their_floor_at_zero(metric, key):
    """Within four standard errors: 1 in 2,000 with Student's t of 29 degrees of freedom."""
    measured = floor(metric, moons, key, 64, repeats=30)
    assert abs(measured.mean) < 4 * measured.std / math.sqrt(30)
    assert measured.std > 0


def test_measure(key):
    """Real samples lie among the floor's values, shifted ones at the length of the shift."""
    real = measure(wasserstein, moons, key, moons(jax.random.key(7), 128), repeats=10)
    assert abs(real.value - real.floor.mean) < 5 * real.floor.std
    assert real.floor.num == 128
    shifted = measure(wasserstein, moons, key, moons(jax.random.key(7), 128) + jnp.array([[30.0, 40.0]]), repeats=2)
    np.testing.assert_allclose(shifted.value, 50, atol=1)


@pytest.mark.parametrize(
    ("value", "mean", "std", "num", "text"),
    [
        (0.612, 0.547, 0.127, 1000, "0.612 (floor 0.547 +- 0.127, n = 1,000)"),
        (0.000345, 0.00001, 0.00012, 64, "0.000345 (floor 0.000010 +- 0.000120, n = 64)"),
        (4321.5, 30.2, 13.7, 512, "4,321.5 (floor 30.2 +- 13.7, n = 512)"),
        (1234.5, 5000.0, 1234.5, 512, "1,234 (floor 5,000 +- 1,234, n = 512)"),
        (1.25, 0.0, 0.0, 8, "1.250 (floor 0.000 +- 0.000, n = 8)"),
        (1.25, math.nan, math.nan, 8, "1.250 (floor nan +- nan, n = 8)"),
    ],
)
def test_printed_with_the_floor(value, mean, std, num, text):
    assert str(Measured(value, Floor(mean, std, np.array([]), num))) == text


def test_the_floor_of_the_normalised_path_energy(key):
    """From a point, W_2^2 is the mean of |x1|^2 over n; of two, relative to each other, E|A / B - 1| = 2 / sqrt(pi n).

    |x1|^2 has mean 2 and standard deviation 2 here. Within four standard errors and what is of order 1 / n.
    """
    n, repeats = 100, 200
    point = lambda key, num: jnp.zeros((num, 2))  # noqa: E731
    measured = normalised_path_energy_floor(
        point, lambda key, num: jax.random.normal(key, (num, 2)), key, n, repeats=repeats
    )
    assert abs(measured.mean - 2 / math.sqrt(math.pi * n)) < 4 * measured.std / math.sqrt(repeats) + 1 / n
    assert normalised_path_energy_floor(point, lambda key, num: point(key, num) + 1, key, 8).mean == 0


def test_bad_input(key):
    with pytest.raises(ValueError, match="num must be at least 1, got 0"):
        floor(wasserstein, moons, key, 0)
    with pytest.raises(ValueError, match="repeats must be at least 2, got 1"):
        floor(wasserstein, moons, key, 8, repeats=1)
    with pytest.raises(ValueError, match=r"num = 16, got shape \(8, 2\)"):
        floor(wasserstein, lambda key, num: moons(key, 8), key, 8)
    with pytest.raises(ValueError, match="key must be one typed key"):
        measure(wasserstein, moons, 0, jnp.zeros((8, 2)))
