"""What every path says of itself: its source, its kinds, and where their targets are finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import BRIDGES, SCHEDULES

from fm_jax.paths import AffinePath, ConstantNoise, SplinePath, StochasticInterpolant
from fm_jax.schedules import VP, Cosine, Linear
from fm_jax.sources import Normal, Uniform

AFFINE = [AffinePath(schedule) for schedule in SCHEDULES]
DIFFERENT = [
    AffinePath(source=Uniform()),
    StochasticInterpolant(VP()),
    StochasticInterpolant(Cosine(), ConstantNoise(0.5)),
]
SPLINE = SplinePath((0.0, 0.3, 1.0))
PATHS = [*AFFINE, *BRIDGES, *DIFFERENT]
X0, X1 = np.random.default_rng(0).normal(size=(2, 4, 2)).astype(np.float32)


def targets(path, t):
    """At time t, from x0, x1 and, where the path draws one, a z that are nowhere 0."""
    return path.targets(path.sample(jax.random.key(0), jnp.float32(t), X0, X1))


@pytest.mark.parametrize("path", [*PATHS, SPLINE], ids=str)
def test_kinds_are_the_targets_in_the_shape_of_the_data(path):
    x = (X0, X1) if path is not SPLINE else (np.stack([X0, X0, X1], axis=1),)
    found = path.targets(path.sample(jax.random.key(0), jnp.linspace(0.2, 0.8, 4), *x))
    assert sorted(found) == sorted(path.kinds)
    assert all(value.shape == X1.shape for value in found.values())


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_targets_are_finite_up_to_the_ends_of_their_domain(path):
    for kind in path.kinds:
        for t in path.target_domain(kind):
            assert np.isfinite(targets(path, t)[kind]).all(), (kind, t)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_beyond_its_domain_a_target_is_infinite_or_the_time_is_no_time(path):
    for kind in path.kinds:
        for t, end in zip((0.0, 1.0), path.target_domain(kind), strict=True):
            if t != end:
                assert not np.isfinite(targets(path, t)[kind]).any(), (kind, t)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_velocity_is_finite_on_the_domain_and_a_path_is_a_value(path):
    assert path.target_domain("velocity") == path.domain
    assert path == type(path)(**vars(path))
    assert hash(path) == hash(type(path)(**vars(path)))


def test_a_schedule_is_there_where_kinds_convert():
    assert all(path.schedule is not None for path in AFFINE)
    assert all(path.schedule is None for path in (*BRIDGES, SPLINE))


def test_sources():
    assert AffinePath().source == BRIDGES[0].source == Normal()
    assert AffinePath(source=Uniform()).source == Uniform()
    assert SPLINE.source is None


@pytest.mark.parametrize("path", [AffinePath(), BRIDGES[0], SPLINE], ids=str)
def test_an_unknown_kind_is_refused(path):
    with pytest.raises(ValueError, match=r"kind must be one of 'velocity'.*, got 'x0'"):
        path.target_domain("x0")


@pytest.mark.parametrize("margin", [1e-3, 0.1])
def test_the_score_is_kept_off_by_a_margin(margin):
    assert AffinePath(Linear()).target_domain("score", margin=margin) == (0.0, 1 - margin)
    assert AffinePath(Linear(sigma_min=0.01)).target_domain("score", margin=margin) == (0.0, 1.0)
