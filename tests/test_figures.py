import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
figures = pytest.importorskip("experiments.lab.figures")

RNG = np.random.default_rng(0)


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _images(num, channels, size=8):
    return RNG.uniform(-1, 1, (num, size, size, channels)).astype(np.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image_enlarged_exactly(tmp_path, channels):
    """Constant images of distinct brightness: each makes 72 x 72 equal pixels, generated left of real."""
    values = np.linspace(-0.9, 0.6, 9)
    x = np.broadcast_to(values[:, None, None, None], (9, 8, 8, channels))
    path = tmp_path / "deep" / "grid.png"
    figures.save_grid(
        path, x[:6], np.arange(6) % 2, x[6:8], np.array([0, 1]), columns=3, real_columns=1, class_names=("zero", "one")
    )
    picture = _pixels(path)
    places = []
    for value in values[:8]:
        rows, columns = np.nonzero((picture == round((value + 1) * 127.5)).all(axis=-1))
        inside = (np.abs(rows - np.median(rows)) < 36.5) & (np.abs(columns - np.median(columns)) < 36.5)
        assert inside.sum() == 72 * 72
        places.append((np.median(rows), np.median(columns)))
    rows, columns = np.array(places).T
    # The edges of letters share some greys: a median may be a pixel off.
    assert max(np.ptp(rows[::2]), np.ptp(rows[1::2])) <= 1
    np.testing.assert_allclose(rows[1] - rows[0], 78, atol=1)
    np.testing.assert_allclose(np.diff(columns[[0, 2, 4]]), 78, atol=1)
    assert columns[6] - columns[4] > 2 * 60
    assert not (picture == round((values[8] + 1) * 127.5)).all(axis=-1).sum() > 1000


def test_grid_takes_a_class_without_real_images(tmp_path):
    figures.save_grid(tmp_path / "a.png", _images(4, 1), np.arange(4), _images(1, 1), np.array([2]), title="title")
    assert _pixels(tmp_path / "a.png").min() < 100


def test_grid_refuses_two_channels(tmp_path):
    with pytest.raises(ValueError, match=r"images must have 1 or 3 channels, got 2\."):
        figures.save_grid(tmp_path / "a.png", _images(2, 2), np.arange(2), _images(2, 2), np.arange(2))


def test_animation_runs_from_noise_to_data_and_holds(tmp_path):
    path = tmp_path / "a.gif"
    frames = np.linspace(-1, 1, 5)[:, None, None, None, None] * np.ones((1, 12, 8, 8, 1))
    figures.save_animation(path, frames, hold=1.5)
    gif = Image.open(path)
    assert gif.n_frames == 5
    seen, durations, bar = [], [], []
    for index in range(5):
        gif.seek(index)
        picture = np.asarray(gif.convert("RGB")).astype(int)
        seen.append(picture[20, 20, 0])
        durations.append(gif.info["duration"])
        bar.append((picture[-20] == [0, 0x72, 0xB2]).all(axis=-1).sum())
    np.testing.assert_allclose(seen, [0, 64, 128, 191, 255], atol=2)
    assert durations == [600, 600, 600, 600, 1500]
    assert all(np.diff(bar) > 100)


def test_loss_curve_draws_raw_and_smoothed(tmp_path):
    steps = np.arange(500)
    path = tmp_path / "loss.png"
    figures.save_loss_curve(path, steps, np.exp(-steps / 100) + RNG.uniform(0.1, 0.2, 500), title="title")
    picture = _pixels(path)
    blue = (np.abs(picture - [0, 0x72, 0xB2]).sum(axis=-1) < 30).sum(axis=0)
    # The smoothed curve spans the picture, falling to the right.
    columns = np.nonzero(blue)[0]
    assert columns.max() - columns.min() > 0.7 * picture.shape[1]


def test_scatter_draws_three_panels(tmp_path):
    source, data = RNG.normal(size=(50, 2)), RNG.normal((3, 0), size=(300, 2))
    way = np.linspace(0, 1, 6)[:, None, None]
    figures.save_scatter(tmp_path / "a.png", source, data, (1 - way) * source + way * data[:50], data, title="title")
    picture = _pixels(tmp_path / "a.png")
    third = picture.shape[1] // 3
    orange = (np.abs(picture - [0xE6, 0x9F, 0]).sum(axis=-1) < 30).sum(axis=0)
    assert orange[:third].sum() == orange[-third:].sum() == 0
    assert orange[third:-third].sum() > 100


@pytest.mark.slow
def test_importing_leaves_pyplot_alone():
    code = "import sys, experiments.lab.figures; assert 'matplotlib.pyplot' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stderr
