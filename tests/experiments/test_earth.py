"""Places on the earth: how they are read and split, kernel density estimates, the network, and a smoke run."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import vonmises_fisher

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import earth
from experiments.lab.earth import (
    FILES,
    KAPPAS,
    UNIFORM_NLL,
    kernel_log_density,
    kernel_nll,
    mixture_weights,
    read_places,
    share_seen,
    split,
    to_degrees,
    to_sphere,
)
from experiments.lab.globe import VIEWS, even_points, seen_from
from fm_jax.models import init_params

PLACES = Path(__file__).parents[3] / "shared" / "data" / "earth"
"""The four files, where they lie beside the checkout."""


def points_of(num, seed=0):
    x = np.random.default_rng(seed).normal(size=(num, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def folder_with(tmp_path, text, data="volcano"):
    (tmp_path / FILES[data]).write_text(text)
    return tmp_path


def rows(num=30):
    """`num` rows of half as many places."""
    degrees = to_degrees(points_of(num // 2)).round(3)
    return "# from somewhere\nLatitude,Longitude\r\n" + "".join(f"{a},{b}\n" for a, b in [*degrees, *degrees])


def test_places_are_read_with_what_is_around_them(tmp_path):
    degrees, facts = read_places(folder_with(tmp_path, rows()), "volcano")
    assert degrees.shape == (30, 2)
    assert (facts.source, facts.rows, facts.distinct) == ("volerup.csv", 30, 15)
    np.testing.assert_allclose(to_degrees(to_sphere(degrees)), degrees, atol=1e-12)


def test_places_without_a_line_of_names(tmp_path):
    degrees, _ = read_places(folder_with(tmp_path, rows().replace("Latitude,Longitude\r\n", ""), "fire"), "fire")
    assert len(degrees) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no volerup.csv. The four files are at https://github.com/oxcsml"),
        (rows() + "1.5\n", "must have a latitude and a longitude in each line, got '1.5' in line 33"),
        (rows() + "a,b\n", "must have a latitude and a longitude in each line, got 'a,b' in line 33"),
        ("a,b\nc,d\n" + rows(), "got 'c,d' in line 2"),
        (rows() + "91,0\n", "must have latitudes from -90 to 90 and .* got '91,0' in line 33"),
        (rows() + "nan,0\n", "must have latitudes from -90 to 90 and .* got 'nan,0' in line 33"),
        (rows(8), "must have at least 10 distinct places, got 4"),
        ("", "must have at least 10 distinct places, got 0"),
    ],
)
def test_what_is_no_file_of_places_is_refused(text, message, tmp_path):
    folder = tmp_path if text is None else folder_with(tmp_path, text)
    with pytest.raises(SystemExit, match=message):
        read_places(folder, "volcano")


def test_the_poles_and_the_meridians():
    wanted = [[0, 0, 1], [0, 0, -1], [1, 0, 0], [0, 1, 0], [0, -1, 0], [-1, 0, 0]]
    found = to_sphere(np.array([[90, 5], [-90, 70], [0, 0], [0, 90], [0, -90], [0, 180]]))
    np.testing.assert_allclose(found, wanted, atol=1e-15)


def test_the_published_split_repeats_places_and_the_other_does_not():
    degrees = np.repeat(to_degrees(points_of(100)), 5, axis=0)
    for splitting, sizes, seen in (("published", (400, 50, 50), 1), ("places", (80, 10, 10), 0)):
        parts = split(degrees, splitting, 3)
        assert tuple(map(len, parts)) == sizes
        assert abs(share_seen(parts) - seen) < 0.1
        every = np.concatenate(parts)
        wanted = to_sphere(degrees) if splitting == "published" else np.unique(to_sphere(degrees), axis=0)
        np.testing.assert_array_equal(every[np.lexsort(every.T)], wanted[np.lexsort(wanted.T)])
        np.testing.assert_array_equal(split(degrees, splitting, 3).test, parts.test)
        assert not np.array_equal(split(degrees, splitting, 4).test, parts.test)


def test_kernels_against_scipy_and_a_direct_sum():
    points, x = points_of(40), points_of(7, 1)
    found = kernel_log_density(points, x, np.array([3.0, 100.0]))
    for k, kappa in enumerate((3.0, 100.0)):
        direct = np.mean([vonmises_fisher(y, kappa).pdf(x) for y in points], axis=0)
        np.testing.assert_allclose(found[:, k], np.log(direct), rtol=1e-10)


def test_narrow_kernels_by_the_angle():
    """At a place itself, and at 1 and 50 km from one, where 1 - cos has lost most of its digits."""
    angles = np.array([0, 1 / 6371, 50 / 6371])
    x = np.stack([np.sin(angles), 0 * angles, np.cos(angles)], axis=1)
    y = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    found = kernel_log_density(y, x, KAPPAS)
    height = np.stack([2 * np.sin(angles / 2) ** 2, 2 * np.cos(angles / 2) ** 2], axis=1)
    peak = np.log(KAPPAS / (2 * np.pi)) - np.log1p(-np.exp(-2 * KAPPAS))
    wanted = logsumexp(-height[:, None] * KAPPAS[None, :, None], axis=2) + peak - np.log(2)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)
    assert found[0, -1] > 17


def test_kernels_integrate_to_one():
    x = even_points(20_000)
    mass = 4 * np.pi * np.exp(kernel_log_density(points_of(9), x, KAPPAS[:5])).mean(axis=0)
    np.testing.assert_allclose(mass, 1, rtol=2e-3)


def test_weights_are_the_likeliest():
    """Of two densities, by the derivative of the likelihood, which at an inner maximum is 0."""
    log_density = np.random.default_rng(0).normal(size=(50, 2))
    weights = mixture_weights(log_density)
    density = np.exp(log_density)
    np.testing.assert_allclose(weights.sum(), 1)
    assert 0.01 < weights[0] < 0.99
    np.testing.assert_allclose(((density[:, 0] - density[:, 1]) / (density @ weights)).mean(), 0, atol=1e-6)


def test_estimates_of_an_even_density_are_at_best_even():
    parts = split(to_degrees(points_of(1500)), "published", 0)
    found = kernel_nll(parts)
    assert all(abs(nll - UNIFORM_NLL) < 0.08 for nll in found.values()), found
    np.testing.assert_allclose(UNIFORM_NLL, 2.531, atol=1e-3)


def test_estimates_of_what_is_repeated_are_sharp():
    found = kernel_nll(split(np.repeat(to_degrees(points_of(50)), 20, axis=0), "published", 0))
    # A point of fifty, each with a kernel of kappa 1e9.
    np.testing.assert_allclose([*found.values()], math.log(50) - math.log(1e9 / (2 * math.pi)), atol=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not PLACES.is_dir(), reason="the places are not there")
@pytest.mark.parametrize(
    ("data", "splitting", "one", "all_of_them", "within"),
    [
        ("volcano", "published", -10.54, -11.00, 0.5),
        ("volcano", "places", -0.07, -0.25, 0.5),
        ("earthquake", "published", -0.21, -1.37, 0.1),
        ("earthquake", "places", -0.08, -0.19, 0.1),
        ("flood", "published", 0.52, 0.38, 0.1),
        ("flood", "places", 0.61, 0.50, 0.1),
    ],
)
def test_estimates_of_the_places_of_the_earth(data, splitting, one, all_of_them, within):
    """Means over five splits, beside those over five others that were computed by another program."""
    degrees, _ = read_places(PLACES, data)
    found = [kernel_nll(split(degrees, splitting, seed)) for seed in range(5)]
    mean = {name: np.mean([each[name] for each in found]) for name in found[0]}
    assert abs(mean["kde_1"] - one) < within, mean
    assert abs(mean["kde_18"] - all_of_them) < within, mean


def test_points_of_the_spiral_are_even():
    x = even_points(2000)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=2e-3)
    np.testing.assert_allclose(x.T @ x / len(x), np.eye(3) / 3, atol=2e-3)


def test_what_is_seen_from_above_a_place():
    for latitude, longitude in [*VIEWS.values(), (40.0, -70.0)]:
        here = to_sphere(np.array([[latitude, longitude]]))
        east, north = to_sphere(np.array([[latitude, longitude + 1], [latitude + 1, longitude]]))
        np.testing.assert_allclose(seen_from(here, latitude, longitude), [[0, 0, 1]], atol=1e-12)
        assert seen_from(east, latitude, longitude)[0] > 0.01
        assert seen_from(north, latitude, longitude)[1] > 0.01


@pytest.mark.slow
def test_short_waves_are_seen_late():
    """Two places 50 km apart are one to the network until the flow is near its end."""
    network = earth.Network(16, 1, 32, 400.0)
    x = to_sphere(np.array([[10.0, 20.0], [10.4, 20.0]])).astype(np.float32)
    params = init_params(network, jax.random.key(0), (3,))
    params["out"]["kernel"] = jax.random.normal(jax.random.key(1), params["out"]["kernel"].shape)

    def apart(t):
        v = network.apply({"params": params}, jnp.full(2, t), x)
        return float(jnp.abs(v[0] - v[1]).max())

    assert apart(0.0) < 0.05 < 0.5 < apart(1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "splitting"), [("volcano", "published"), ("fire", "places")])
def test_a_smoke_run(data, splitting, tmp_path, capsys):
    folder = folder_with(tmp_path, rows(60), data)
    training = dataclasses.replace(earth.CONFIG.training, run_dir=tmp_path / "run")
    config = dataclasses.replace(earth.CONFIG, folder=folder, data=data, split=splitting, smoke=True, training=training)
    results = earth.run(config)
    run_dir = tmp_path / "run-smoke"
    for name in (*earth.PICTURES, "metrics.jsonl", "config.json", "data.json", "checkpoints"):
        assert (run_dir / name).stat().st_size > 0, name
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert abs(results["nll"] - UNIFORM_NLL) < 0.2  # the network is zero at first
    assert results["left"] in earth.LEFT
    assert (results["share_seen"] == 0) == (splitting == "places")
    out = capsys.readouterr().out
    assert f"held-out places, {data}, --split {splitting}" in out
    assert "even density: 2.531" in out


@pytest.mark.slow
def test_a_solve_that_fails_is_an_error_and_no_number(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, rows(60))
    training = dataclasses.replace(earth.CONFIG.training, run_dir=tmp_path / "run")
    monkeypatch.setattr(earth, "JUDGE", dataclasses.replace(earth.JUDGE, max_steps=1))
    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        earth.run(dataclasses.replace(earth.CONFIG, folder=folder, smoke=True, training=training))
    assert not (tmp_path / "run-smoke" / "results.json").exists()


def test_a_network_that_is_not_finite_is_an_error_and_no_number():
    with pytest.raises(ValueError, match="the negative log-likelihood must be finite"):
        earth.check_finite("the negative log-likelihood", np.array([1.0, np.nan]))
