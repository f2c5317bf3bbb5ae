"""The autoencoder from data to a folder that is opened again, and what it refuses."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import autoencoder
from experiments.lab import reconstruction
from experiments.lab.data import PRESETS, Data, Facts, Loaded
from experiments.lab.options import refuse_unused
from experiments.lab.perceptual import fit_features
from experiments.lab.smoke import smoke as shrink
from experiments.lab.training import from_json, restore, sampling_params
from fm_jax.data.digits import load_digits
from fm_jax.data.images import ImageDataset, to_float
from fm_jax.models import num_params
from fm_jax.models.autoencoder import Autoencoder, latent_space
from fm_jax.train.log import read_metrics
from fm_jax.weights import open_model

DIGITS = dataclasses.replace(autoencoder.CONFIG, data=Data(dataset="digits"))


def with_training(config, **changes):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **changes))


@pytest.fixture(scope="module")
def untrained():
    """A network of the smallest size, and what the judge says of it with 70 images to train on and 40 held out."""
    model = Autoencoder(channels=(4, 4), num_blocks=1, image_channels=1, num_groups=4, attention=False)
    pixels = np.random.default_rng(0).integers(0, 256, (110, 4, 4, 1), dtype=np.uint8)
    train, test = ImageDataset(pixels[:70]), ImageDataset(pixels[70:])
    params = autoencoder._init(model, jax.random.key(1), (4, 4, 1))
    params = jax.tree.map(lambda x: 1.5 * np.asarray(x) + np.float32(0.1), params)
    loaded = Loaded(train, test, Facts("noise", 70, 40, (4, 4, 1)))
    return model, params, loaded, reconstruction.judge(model, params, loaded, 1000)


def moments_of(model, params, dataset):
    encode = jax.jit(lambda x: model.apply({"params": params}, x, method="encode"))
    moments = encode(to_float(dataset.images))
    return np.asarray(moments.mean, np.float64), np.exp(np.asarray(moments.log_variance, np.float64))


@pytest.mark.slow
def test_what_is_judged_is_numpys_in_double_precision(untrained):
    model, params, loaded, results = untrained
    mean, variance = moments_of(model, params, loaded.train)
    axes = (0, 1, 2)
    np.testing.assert_allclose(results["latent_mean"], mean.mean(axes), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(results["latent_noise"], np.sqrt(variance.mean(axes)), rtol=1e-6)
    np.testing.assert_allclose(results["latent_std"], np.sqrt(mean.var(axes) + variance.mean(axes)), rtol=1e-6)
    mean, variance = moments_of(model, params, loaded.test)
    kl = 0.5 * (mean**2 + variance - 1 - np.log(variance)).sum(axis=(1, 2, 3)).mean()
    np.testing.assert_allclose(results["kl"], kl, rtol=1e-5)
    x = to_float(loaded.test.images)
    decode = jax.jit(lambda z: model.apply({"params": params}, z, method="decode"))
    decoded = np.clip(decode(mean.astype(np.float32)), -1, 1)
    np.testing.assert_allclose(results["absolute_error"], np.abs(x - decoded).mean(), rtol=1e-5)
    np.testing.assert_allclose(results["psnr"], reconstruction.psnr(x, decoded), rtol=1e-5)
    assert results["judged_images"] == 40
    assert "classifier_accuracy" not in results  # there are no labels


def test_the_folder_has_the_constants_that_bring_the_latents_to_unit_variance(untrained, tmp_path):
    model, params, loaded, results = untrained
    autoencoder._save(tmp_path / "autoencoder", model.clone(latents=autoencoder._space(results)), params)
    module, opened = open_model(tmp_path / "autoencoder")
    jax.tree.map(np.testing.assert_array_equal, opened, jax.device_get(params))
    space = latent_space(module, opened)
    np.testing.assert_array_equal(space.shift, results["latent_mean"])
    np.testing.assert_allclose(space.scale, 1 / np.array(results["latent_std"]), rtol=1e-15)
    mean, variance = moments_of(model, params, loaded.train)
    draws = np.concatenate([mean + np.sqrt(variance), mean - np.sqrt(variance)])  # which have the moments of all draws
    z = (draws - np.array(space.shift)) * np.array(space.scale)
    np.testing.assert_allclose(z.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(z.std((0, 1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose(space.to_model(jnp.asarray(draws, jnp.float32)), z, rtol=1e-4, atol=1e-4)


def test_an_odd_last_chunk_is_restored_like_the_others(untrained):
    model, params, loaded, _ = untrained
    x = to_float(loaded.train.images)
    whole = reconstruction.restore(model, params, x)
    assert [len(each) for each in whole] == [70] * 4
    part = reconstruction.restore(model, params, x[60:])
    for each, of_all in zip(part, whole, strict=True):
        np.testing.assert_allclose(each, of_all[60:], atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A smoke run: its folder, configuration and results."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    config = with_training(dataclasses.replace(DIGITS, smoke=True, perceptual=0.1), run_dir=folder)
    results = autoencoder.run(config)
    folder = folder.with_name("run-smoke")
    record = json.loads((folder / "config.json").read_text())
    assert record.pop("experiment") == "autoencoder"
    return folder, from_json(autoencoder.Config, record), results


@pytest.mark.slow
def test_a_run_leaves_pictures_numbers_and_a_folder(run):
    folder, _, results = run
    for name in ("reconstructions.png", "loss.png", "samples/step_000004.png", "config.json", "data.json"):
        assert (folder / name).stat().st_size > 0, name
    assert [row["step"] for row in read_metrics(folder)] == [2, 4]
    row = read_metrics(folder)[-1]
    expected = row["error"] + 1e-6 / 64 * row["kl"] + 0.1 * row["features"]
    np.testing.assert_allclose(row["loss"], expected, rtol=1e-5)
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["judged_images"] == 64
    assert results["held_out"]
    for name in ("classifier_accuracy", "classifier_accuracy_on_real", "features_accuracy_on_real"):
        assert 0 <= results[name] <= 1
    assert results["classifier_accuracy_on_real"] > 0.8  # a support vector machine of 512 digits


@pytest.mark.slow
def test_the_folder_is_the_autoencoder_that_was_trained(run):
    folder, config, _ = run
    module, params = open_model(folder / "autoencoder")
    assert module.factor == 2
    built = autoencoder.build(config, PRESETS["digits"])
    shapes = jax.eval_shape(built.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    trained = sampling_params(restore(config, shapes), config.training)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(trained))


def test_the_picture_has_each_image_above_what_becomes_of_it(tmp_path):
    from PIL import Image

    x = np.linspace(-1, 1, 20, dtype=np.float32)[:, None, None, None] * np.ones((1, 8, 8, 1), np.float32)
    reconstruction.save_rows(tmp_path / "rows.png", x, -x)
    sheet = np.asarray(Image.open(tmp_path / "rows.png"))[..., 0]
    side, gap = 72, 6
    corners = sheet[:: side + gap, :: side + gap]
    assert corners.shape == (4, 10)
    of = lambda values: np.rint((values + 1) * 127.5)  # noqa: E731
    flat = x[:, 0, 0, 0]
    np.testing.assert_array_equal(corners, of(np.stack([flat[:10], -flat[:10], flat[10:], -flat[10:]])))


def test_psnr_is_the_mean_over_images():
    x = np.zeros((2, 4, 4, 1), np.float32)
    y = x + np.array([0.2, 0.02], np.float32)[:, None, None, None]  # a tenth and a hundredth of the range
    assert reconstruction.psnr(x, y) == pytest.approx((20 + 40) / 2, abs=1e-4)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("name", "latents", "millions"),
    [("mnist", (7, 7, 4), 2.7), ("digits", (4, 4, 4), 0.66)],
)
def test_sizes_by_default(name, latents, millions):
    facts = PRESETS[name]
    model = autoencoder.build(DIGITS, facts)
    x = jax.ShapeDtypeStruct((1, *facts.shape), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    moments = jax.eval_shape(lambda params, x: model.apply(params, x, method="encode"), params, x)
    assert moments.mean.shape == (1, *latents)
    assert num_params(params) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.slow
def test_a_run_is_continued_bit_for_bit_and_not_run_twice(tmp_path, monkeypatch):
    def small(name, **changes):
        config = with_training(dataclasses.replace(DIGITS, smoke=True), run_dir=tmp_path / name)
        config = dataclasses.replace(shrink(config, **autoencoder.SMOKE, data={"num_images": 64}), smoke=False)
        return with_training(config, decay="constant", **changes)

    unbroken = small("unbroken")
    results = autoencoder.run(unbroken)
    autoencoder.run(small("broken", total_steps=2))
    continued = autoencoder.run(with_training(small("other"), run_dir=tmp_path / "broken-smoke"))
    for one, other in zip(*(open_model(tmp_path / f"{name}-smoke" / "autoencoder") for name in ("unbroken", "broken"))):
        if isinstance(one, dict):
            jax.tree.map(np.testing.assert_array_equal, one, other)
    rates = "training_images_per_second"
    assert {**continued, rates: 0} == {**results, rates: 0}

    def trained_again(*args, **kwargs):
        pytest.fail("trained again")

    monkeypatch.setattr(autoencoder, "train", trained_again)
    assert autoencoder.run(unbroken) == results
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        autoencoder.run(dataclasses.replace(unbroken, num_samples=10))


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another(run, tmp_path, capsys):
    folder, config, _ = run
    begun = dataclasses.replace(config, smoke=True, perceptual=0.0)
    begun = with_training(begun, run_dir=tmp_path / "run", init_from=folder, learning_rate=1e-30)
    autoencoder.run(begun)
    assert "Begins with the parameters of" in capsys.readouterr().out
    first, again = (open_model(each / "autoencoder")[1] for each in (folder, tmp_path / "run-smoke"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), first, again)
    with pytest.raises(ValueError, match=r"^--init-from .* has another network: give its --base-channels"):
        autoencoder.run(dataclasses.replace(begun, latent_channels=2))


@pytest.mark.slow
def test_the_features_are_those_of_a_classifier_that_is_right(key):
    fitted = fit_features(key, load_digits("train"), num_steps=300, seed=0)
    test = load_digits("test")
    images, labels = reconstruction.some_images(test, 297)
    assert (fitted.classify(images) == labels).mean() > 0.9
    maps = fitted.features(images)
    assert [each.shape for each in maps] == [(297, 4, 4, 16), (297, 2, 2, 32)]
    assert all(float((each**2).sum(-1).max()) <= 1 + 1e-5 for each in maps)


@pytest.mark.slow
def test_a_few_hundred_steps_learn_digits(tmp_path):
    config = with_training(DIGITS, run_dir=tmp_path / "run", total_steps=300, learning_rate=2e-3)
    results = autoencoder.run(dataclasses.replace(config, base_channels=16))
    assert results["psnr"] > 18
    assert results["classifier_accuracy"] > 0.9


ODD = Facts("odd ones", 100, 10, (30, 28, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dataclasses.replace(DIGITS, data=Data(npz=Path("a.npz"), latents=True)),
            r"^--latents must be left out: an autoencoder takes images, which lie in \[-1, 1\]\.$",
        ),
        (
            lambda: dataclasses.replace(DIGITS, data=Data(encoded=Path("a"))),
            r"^--encoded must be left out: an autoencoder takes images",
        ),
        (
            lambda: autoencoder._begin(with_training(DIGITS, init_from=Path("elsewhere")), {}),
            r"^--init-from must be a finished run of this experiment, got elsewhere without autoencoder/\.$",
        ),
        (
            lambda: dataclasses.replace(DIGITS, perceptual=0.1, data=Data(folder=Path("a"), labels="none")),
            r"^--perceptual fits a classifier to the labels, and --labels none takes none: give one\.$",
        ),
        (lambda: dataclasses.replace(DIGITS, error="huber"), r"^--error must be one of 'l1', 'l2', got 'huber'\.$"),
        (lambda: dataclasses.replace(DIGITS, beta=-1e-6), r"^--beta must be finite and not negative, got -1e-06\.$"),
        (lambda: dataclasses.replace(DIGITS, levels=9), r"^--levels must be from 1 to 8, got 9\.$"),
        (lambda: dataclasses.replace(DIGITS, base_channels=0), r"^--base-channels must be at least 1|from 1 to"),
        (
            lambda: autoencoder.build(DIGITS, ODD),
            r"^--levels 3 halves the sides 2 times: they must be divisible by 4, got the images of odd ones, 30x28x1",
        ),
        (
            lambda: refuse_unused(dataclasses.replace(DIGITS, classifier_steps=7), DIGITS),
            r"^--classifier-steps 7 would have no effect: a classifier is fitted only with --perceptual\. Leave it out",
        ),
        (
            lambda: refuse_unused(dataclasses.replace(DIGITS, smoke=True, base_channels=64), DIGITS),
            r"^--base-channels 64 would have no effect: --smoke has its own\. Leave it out\.$",
        ),
        (
            lambda: autoencoder.run(with_training(DIGITS, steps_per_call=4)),
            r"^--steps-per-call must be 1 on CPU, where gradients of convolutions",
        ),
        (
            lambda: autoencoder.run(
                with_training(
                    dataclasses.replace(DIGITS, data=Data(folder=Path("pictures"))), run_dir=Path("pictures/run")
                )
            ),
            r"^--run-dir must lie outside of --folder pictures, whose pictures are data, got pictures/run\.$",
        ),
    ],
    ids=lambda value: value[1:40] if isinstance(value, str) else "",
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_run_of_another_experiment_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"experiment": "images"}')
    config = with_training(DIGITS, run_dir=tmp_path, batch_size=64)
    with pytest.raises(ValueError, match=r"holds a run of images: give another --run-dir\. Nothing was overwritten\.$"):
        autoencoder.run(config)


def test_fewer_images_than_a_batch(tmp_path):
    config = with_training(DIGITS, run_dir=tmp_path / "run", batch_size=128)
    config = dataclasses.replace(config, data=Data(dataset="digits", num_images=100))
    with pytest.raises(ValueError, match=r"^--batch-size must be at most 100, the images to train on, got 128\.$"):
        autoencoder.run(config)
