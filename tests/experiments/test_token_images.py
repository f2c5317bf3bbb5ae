"""Images as tokens: levels and back, and a run from the images to samples with a class and a part that is given."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import sample, token_images
from experiments.lab.data import Data, load
from experiments.lab.images import in_unit_range
from experiments.lab.levels import to_levels, to_pixels
from experiments.lab.token_sampling import TokenSampling
from experiments.lab.training import from_json
from fm_jax.data.arrays import to_float
from fm_jax.train.log import read_metrics


@pytest.mark.parametrize("levels", [2, 3, 17, 255, 256])
def test_levels_come_back(levels):
    every = np.arange(levels)
    np.testing.assert_array_equal(to_levels(to_pixels(every, levels), levels), every)
    assert to_pixels(every, levels)[[0, -1]].tolist() == [-1, 1]


def test_bytes_are_256_levels_and_digits_17():
    grey = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_levels(to_float(grey), 256), grey)
    digits = load(Data(dataset="digits")).train
    found = to_levels(in_unit_range(digits), 17)
    np.testing.assert_allclose(to_pixels(found, 17), in_unit_range(digits), atol=1e-6)
    assert found.min() == 0
    assert found.max() == 16


def test_black_and_white_are_cut_at_one_half():
    np.testing.assert_array_equal(to_levels(np.array([-1, -0.01, 0, 0.01, 1]), 2), [0, 0, 1, 1, 1])


@pytest.mark.slow
@pytest.mark.parametrize("levels", [2, 17])
def test_smoke(levels, tmp_path, capsys):
    training = dataclasses.replace(token_images.CONFIG.training, run_dir=tmp_path / "run")
    options = {"data": Data(dataset="digits"), "levels": levels, "smoke": True}
    config = dataclasses.replace(token_images.CONFIG, training=training, **options)
    results = token_images.run(config)
    run_dir = tmp_path / "run-smoke"
    for name in (*token_images.PICTURES, "samples/step_000004.png", "data.json", "results.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert [row["step"] for row in read_metrics(run_dir)] == [2, 4]
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert results["classifier_accuracy_on_real"] > 0.8
    assert (results["guided"]["nfe"], results["unguided"]["nfe"]) == (4, 2)
    assert 0 < results["bits_per_pixel"] < np.log2(levels) + 0.2
    np.testing.assert_allclose(results["nats_per_image"], 64 * np.log(2) * results["bits_per_pixel"], rtol=1e-6)
    assert f"8x8x1 in {levels} levels, 10 classes, 297 held out" in capsys.readouterr().out
    record = json.loads((run_dir / "config.json").read_text())
    assert record.pop("experiment") == "token_images"
    assert from_json(token_images.Config, record).sampling == TokenSampling(
        solver="mixture_steps", steps=2, guidance=2.0, sample_batch=20
    )

    image = pytest.importorskip("PIL.Image")
    real, arrays = np.zeros((8, 8), np.uint8), tmp_path / "drawn.npz"
    real[2:5], mask = 255, np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, pixels in (("real", real), ("mask", mask)):
        image.fromarray(pixels).save(tmp_path / f"{name}.png")
    options = {"image": tmp_path / "real.png", "mask": tmp_path / "mask.png", "num": 4, "label": 3, "guidance": 3.0}
    sample.run(sample.Config(run=run_dir, out=arrays, solver="first_hitting", **options))
    with np.load(arrays) as found:
        assert found["labels"].tolist() == [3] * 4
        np.testing.assert_array_equal(
            found["samples"][:, :, :4, 0], np.repeat(real[None, :, :4] // 255, 4, 0) * (levels - 1)
        )
        assert found["samples"].max() < levels
    sample.run(sample.Config(run=run_dir, out=tmp_path / "drawn.png", num=4))
    assert image.open(tmp_path / "drawn.png").size[0] > 8
    with pytest.raises(SystemExit, match="--class must be one of the run's 10 classes, from 0, got 10"):
        sample.run(sample.Config(run=run_dir, label=10))
