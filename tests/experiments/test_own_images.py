"""One's own images on the command line: from a folder, an array or latents to samples, and on other data no further."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro", reason="needs the extra fm_jax[experiments]")
pytest.importorskip("grain", reason="needs the extra fm_jax[data]")
Image = pytest.importorskip("PIL.Image", reason="needs the extra fm_jax[data]")

from experiments import images as command  # noqa: E402
from experiments import sample, toy2d  # noqa: E402
from experiments.lab import images  # noqa: E402
from experiments.lab.data import Data, Facts, load, read_facts  # noqa: E402
from experiments.lab.experiment import read_run, restore_run  # noqa: E402
from experiments.lab.sampling import Sampling  # noqa: E402
from experiments.lab.training import write_config  # noqa: E402
from fm_jax.data.lazy import LazyImages  # noqa: E402
from fm_jax.train.checkpoint import CheckpointError  # noqa: E402

ROOT = Path(__file__).parents[2]
SMALL = {
    "total_steps": 4,
    "warmup_steps": 0,
    "batch_size": 8,
    "log_every": 2,
    "save_every": 2,
    "sample_every": 4,
    "decay": "constant",
}


def disc(colour, rng, size):
    """A disc on a dark ground: what there is to learn."""
    height, width = size
    y, x = np.mgrid[:height, :width]
    inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(size) * rng.uniform(0.2, 0.45)) ** 2
    return np.where(inside[..., None], np.array(colour) * rng.uniform(0.7, 1), 30).astype(np.uint8)


def make_folder(folder, num=12, classes=("rose", "tulip")):
    rng, colours = np.random.default_rng(0), [(220, 30, 60), (240, 200, 20), (40, 60, 230)]
    for name, colour in zip(classes, colours, strict=False):
        (folder / name).mkdir(parents=True)
        for i in range(num):
            pixels = disc(colour, rng, tuple(rng.integers(9, 40, 2)))
            Image.fromarray(pixels).save(folder / name / f"{i}.{'jpg' if i % 2 else 'png'}")
    return folder


def small(run_dir, data, **changes):
    """A run as small as a smoke run, that is none: it keeps its folder."""
    training = dataclasses.replace(command.CONFIG.training, run_dir=run_dir, **(SMALL | changes.pop("training", {})))
    few = {"num_samples": 20, "frames": 2, "model": "smoke_unet"} | changes
    sampling = Sampling(solver="euler", steps=2, sample_batch=20)
    return dataclasses.replace(command.CONFIG, data=data, training=training, **({"sampling": sampling} | few))


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("own") / "flowers")


@pytest.fixture(scope="module")
def finished(flowers, tmp_path_factory):
    config = small(tmp_path_factory.mktemp("own") / "run", Data(folder=flowers, size=8))
    return config, images.run(config)


@pytest.fixture
def again(finished, flowers, tmp_path):
    """Copies of a run and of its folder, for a test to change."""
    config, results = finished
    shutil.copytree(config.training.run_dir, tmp_path / "run")
    shutil.copytree(flowers, tmp_path / "flowers")

    def config_of(**training):
        data = dataclasses.replace(config.data, folder=tmp_path / "flowers")
        return small(tmp_path / "run", data, training=training)

    write_config(config_of())
    return config_of, results


@pytest.mark.slow
def test_a_folder_of_odd_sizes_becomes_samples(finished):
    config, results = finished
    run_dir = config.training.run_dir
    for name in (*images.PICTURES, "data.json", "samples/step_000004.png"):
        assert (run_dir / name).stat().st_size > 0, name
    facts = json.loads((run_dir / "data.json").read_text())
    assert (facts["num_images"], facts["num_test"], facts["shape"]) == (22, 2, [8, 8, 3])
    assert facts["class_names"] == ["rose", "tulip"]
    assert results["nearest"]["samples"] > results["nearest"]["held_out"] > 0
    _, experiment = read_run(run_dir)
    assert (experiment.num_classes, experiment.event_shape) == (2, (8, 8, 3))


@pytest.mark.slow
def test_streamed_it_is_the_same_run(finished, flowers, tmp_path):
    config, results = finished
    assert isinstance(load(dataclasses.replace(config.data, stream=True)).train.images, LazyImages)
    streamed = images.run(small(tmp_path / "run", dataclasses.replace(config.data, stream=True)))
    assert streamed["nearest"] == results["nearest"]
    lines = [(each / "metrics.jsonl").read_text().splitlines() for each in (config.training.run_dir, tmp_path / "run")]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == losses[1]


def test_the_same_command_on_the_same_data_prints_the_results(again, monkeypatch):
    config_of, results = again
    monkeypatch.setattr(images, "train", lambda *_, **__: pytest.fail("trained again"))
    assert images.run(config_of()) == results


def add(folder):
    shutil.copy(folder / "rose" / "0.png", folder / "rose" / "new.png")


def swap(folder):
    (folder / "rose").rename(folder / "other")
    (folder / "tulip").rename(folder / "rose")
    (folder / "other").rename(folder / "tulip")


def rename(folder):
    (folder / "rose").rename(folder / "a rose")


def edit(folder):
    for path in folder.glob("*/*.png"):  # of which some are not held out
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0] = 255 - pixels[0, 0]
        Image.fromarray(pixels).save(path)


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    ("change", "message"),
    [(add, "there and"), (swap, "checksum"), (rename, "a rose"), (edit, "checksum")],
    ids=["a picture added", "labels swapped", "a class renamed", "pictures changed"],
)
@pytest.mark.parametrize("total_steps", [4, 6])
def test_other_data_are_refused(change, message, total_steps, again, tmp_path):
    config_of, _ = again
    change(tmp_path / "flowers")
    before = (tmp_path / "run" / "results.json").read_bytes()
    with pytest.raises(CheckpointError, match="other data") as error:
        images.run(config_of(total_steps=total_steps))
    assert message in str(error.value)
    assert "--init-from" in str(error.value)
    assert (tmp_path / "run" / "results.json").read_bytes() == before


@pytest.mark.slow
def test_a_folder_may_move(again, tmp_path, monkeypatch):
    config_of, results = again
    (tmp_path / "flowers").rename(tmp_path / "elsewhere")
    monkeypatch.setattr(images, "begin_with", lambda *_: pytest.fail("began anew"))
    data = dataclasses.replace(config_of().data, folder=tmp_path / "elsewhere")
    found = images.run(dataclasses.replace(config_of(), data=data))
    assert found["nearest"] == results["nearest"]


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_another(finished, tmp_path, capsys):
    config, _ = finished
    first = restore_run(config.training.run_dir)
    make_folder(tmp_path / "more", classes=("rose", "tulip", "iris"))
    options = {"init_from": config.training.run_dir, "learning_rate": 1e-12, "decay": "constant", "ema_decays": ()}
    images.run(small(tmp_path / "run", Data(folder=tmp_path / "more", size=8), training=options))
    assert "Begins with the parameters of" in (out := capsys.readouterr().out)
    assert "at step 4." in out
    assert "The embedding begins anew for iris." in out
    second = restore_run(tmp_path / "run")
    for name in ("stem", "out"):
        for a, b in zip(*(list(r.params[name].values()) for r in (first, second)), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-9)
    assert second.experiment.num_classes == 3
    tables = [np.asarray(run.params["embed"]["table"]) for run in (first, second)]
    # iris, rose, tulip, none: each class has the row of its name.
    np.testing.assert_allclose(tables[1][1:], tables[0], atol=1e-9)
    # It goes on without the other run.
    moved = dataclasses.replace(options and small(tmp_path / "run", Data(folder=tmp_path / "more", size=8)))
    training = dataclasses.replace(moved.training, **options, total_steps=6)
    images.run(dataclasses.replace(moved, training=training))
    assert restore_run(tmp_path / "run").step == 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "model", "message"),
    [
        ({"init_from": Path("nowhere")}, "smoke_unet", "--init-from nowhere is not the folder of a run"),
        ({}, "smoke_dit", "has another network"),
    ],
)
def test_a_beginning_that_is_refused(training, model, message, finished, flowers, tmp_path):
    config, _ = finished
    training = {"init_from": config.training.run_dir} | training
    with pytest.raises(SystemExit, match=message):
        images.run(small(tmp_path / "run", config.data, training=training, model=model))
    with pytest.raises(ValueError, match="--init-from must be another run than --run-dir"):
        small(tmp_path / "run", config.data, training={"init_from": tmp_path / "run"})


@pytest.mark.slow
def test_what_a_beginning_changes_is_told(finished, flowers, tmp_path, capsys):
    config, _ = finished
    training = {"init_from": config.training.run_dir}
    method = dataclasses.replace(config.method, prediction="noise")
    images.run(small(tmp_path / "noise", config.data, training=training, method=method))
    assert "They were trained with --prediction velocity, and go on with noise." in capsys.readouterr().out
    images.run(small(tmp_path / "none", Data(folder=flowers, size=8, labels="none"), training=training, sampling=FEW))
    assert "Its embedding of labels is left out." in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_is_read_where_nothing_can_be_written(finished, tmp_path, monkeypatch):
    config, _ = finished
    monkeypatch.setattr("fm_jax.train.checkpoint.make_folder", lambda *_: pytest.fail("would write"))
    sample.run(sample.Config(config.training.run_dir, out=tmp_path / "a.npz", num=4))
    with np.load(tmp_path / "a.npz") as drawn:
        assert sorted(drawn) == ["labels", "samples"]


@pytest.mark.slow
def test_toy2d_begins_with_another_too(tmp_path, capsys):
    def config(name, **training):
        training = dataclasses.replace(toy2d.CONFIG.training, run_dir=tmp_path / name, **SMALL, **training)
        sampling = dataclasses.replace(toy2d.CONFIG.sampling, solver="euler", steps=2)
        few = {"width": 8, "depth": 1, "num_samples": 16, "frames": 2, "floor_repeats": 2}
        return dataclasses.replace(toy2d.CONFIG, training=training, sampling=sampling, **few)

    toy2d.run(config("first"))
    toy2d.run(config("second", init_from=tmp_path / "first"))
    assert "Begins with the parameters of" in capsys.readouterr().out


@pytest.mark.slow
def test_unlabelled_images_have_no_guidance(flowers, tmp_path, capsys):
    unlabelled = Data(folder=flowers, size=8, labels="none")
    results = images.run(small(tmp_path / "run", unlabelled, sampling=FEW))
    assert "guided" not in results
    assert "without" in capsys.readouterr().out
    config, experiment = read_run(tmp_path / "run")
    assert (experiment.num_classes, config.sampling.guidance) == (None, 1.0)
    sample.run(sample.Config(tmp_path / "run", out=tmp_path / "a.png", num=4))
    sample.run(sample.Config(tmp_path / "run", out=tmp_path / "a.npz", num=4))
    assert np.load(tmp_path / "a.npz").files == ["samples"]
    with pytest.raises(ValueError, match="--guidance 3 would have no effect: the images have no labels"):
        images.run(small(tmp_path / "run2", unlabelled, sampling=GUIDED))
    with pytest.raises(ValueError, match=re.escape("--label-dropout 0.5 would have no effect")):
        images.run(small(tmp_path / "run2", unlabelled, sampling=FEW, label_dropout=0.5))
    with pytest.raises(ValueError, match="--guidance-rule rescale would have no effect"):
        images.run(small(tmp_path / "run2", unlabelled, sampling=dataclasses.replace(FEW, guidance_rule="rescale")))


FEW = Sampling(solver="euler", steps=2, sample_batch=20)
GUIDED = dataclasses.replace(FEW, guidance=3.0)


@pytest.mark.slow
def test_latents_come_back_as_they_were(tmp_path):
    x = np.random.default_rng(0).normal([3.0, -1.0, 0.0, 10.0], [0.5, 2.0, 7.0, 1.0], (64, 8, 8, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", latents=np.moveaxis(x, -1, 1))
    data = Data(npz=tmp_path / "a.npz", latents=True, image_entry="latents", num_images=50)
    images.run(small(tmp_path / "run", data, model="smoke_dit", sampling=FEW))
    facts = read_facts(tmp_path / "run", data)
    np.testing.assert_allclose(facts.mean, x.mean((0, 1, 2)), atol=0.3)
    sample.run(sample.Config(tmp_path / "run", out=tmp_path / "a.npz", num=20))
    drawn = np.load(tmp_path / "a.npz")["samples"]
    # After four steps it is noise still: of the mean and the spread of the data.
    np.testing.assert_allclose(drawn.mean((0, 1, 2)), facts.mean, atol=1.0)
    assert (drawn.std((0, 1, 2)) / np.array(facts.std) > 0.3).all()
    sample.run(sample.Config(tmp_path / "run", out=tmp_path / "a.png", num=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "One of --dataset, --folder, --npz, --tfds, --array-record, --encoded must say which images: give one."),
        ({"npz": Path("a"), "tfds": "mnist"}, "must say which images, got --npz and --tfds"),
        ({"folder": Path("a"), "size": 0}, "--size must be from 1 to 65536, got 0."),
        ({"folder": Path("a"), "test_share": 1.0}, "--test-share must be in [0, 1), got 1.0."),
        ({"npz": Path("a"), "latents": True, "value_range": (0.0, 1.0)}, "--latents are used as they are"),
        ({"folder": Path("a"), "csv": Path("b"), "labels": "none"}, "--csv gives labels, and --labels none takes none"),
    ],
)
def test_data_that_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        list(Data(**options).unused())


@pytest.mark.parametrize(
    "source", [{"dataset": "digits"}, {"npz": Path("a")}, {"tfds": "a"}, {"array_record": Path("a")}]
)
def test_options_of_other_sources_have_no_effect(source):
    ineffective = {name.partition(".")[2] for name, _ in Data(**source).unused()}
    assert "csv" in ineffective
    assert ("size" in ineffective) == (not {"tfds", "array_record"} & source.keys())
    assert ("latents" in ineffective) == ("npz" not in source)
    assert ("data_dir" in ineffective) == ("tfds" not in source)


def test_facts_survive_json(tmp_path):
    facts = Facts("folder a", 3, 1, (8, 8, 4), ("é", "\n"), (0.5, 1.0), (1.0, 2.0), "9f3a")
    (tmp_path / "data.json").write_text(json.dumps(dataclasses.asdict(facts)))
    assert read_facts(tmp_path, Data(folder=tmp_path)) == facts
    (tmp_path / "data.json").write_text('{"source": 3')
    with pytest.raises(ValueError, match=r"data\.json is damaged"):
        read_facts(tmp_path, Data(folder=tmp_path))
    (tmp_path / "data.json").unlink()
    with pytest.raises(ValueError, match=r"has no data\.json"):
        read_facts(tmp_path, Data(folder=tmp_path))
    assert read_facts(tmp_path, Data(dataset="cifar10")).shape == (32, 32, 3)


@pytest.mark.slow
def test_one_command_on_200_pictures_of_odd_sizes(tmp_path):
    make_folder(tmp_path / "flowers", num=100)
    (tmp_path / "flowers" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "flowers" / "rose" / "Thumbs.db").write_bytes(b"\0")
    options = ["--folder", "flowers", "--size", "16", "--total-steps", "20", "--warmup-steps", "2"]
    options += ["--sample-every", "20", "--num-samples", "20", "--sample-batch", "20", "--steps", "4", "--frames", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.images", *options],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "folder flowers: 180 images 16x16x3, 2 classes, 20 held out" in done.stdout
    for name in images.PICTURES:
        assert (tmp_path / "runs" / "images" / name).stat().st_size > 0


@pytest.mark.slow
def test_a_network_of_nan_is_named(finished, tmp_path, monkeypatch):
    """Neither its tolerance nor its steps are to blame."""
    import jax

    from experiments.lab import experiment as module

    config, _ = finished
    run = restore_run(config.training.run_dir)
    whole = module.restore(config, jax.eval_shape(lambda: run.params))
    broken = whole._replace(ema=jax.tree.map(lambda x: x * np.nan, whole.ema))
    monkeypatch.setattr(module, "restore", lambda *_: broken)
    with pytest.raises(SystemExit, match="has parameters that are not finite at step 4: "):
        sample.run(sample.Config(config.training.run_dir, out=tmp_path / "a.png", num=4))


@pytest.mark.slow_but_one
@pytest.mark.parametrize("solver", ["heun", "euler_maruyama"])
def test_samples_that_are_not_finite_are_no_picture(solver, finished, tmp_path, monkeypatch):
    config, _ = finished
    run = restore_run(config.training.run_dir)

    def apply_fn(params, t, x, cond, **_):
        return x * np.nan

    monkeypatch.setattr(
        sample, "restore_run", lambda *_: run._replace(experiment=run.experiment._replace(apply_fn=apply_fn))
    )
    with pytest.raises(SystemExit, match="4 of 4 samples are not finite"):
        sample.run(sample.Config(config.training.run_dir, out=tmp_path / "a.png", num=4, solver=solver))
    assert not (tmp_path / "a.png").exists()


def test_a_network_that_does_not_fit_is_refused_before_the_data_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "load", lambda *_: pytest.fail("read the data"))
    with pytest.raises(ValueError, match="--model cifar10 does not fit the images of mnist, 28x28x1"):
        images.run(small(tmp_path / "run", Data(dataset="mnist"), model="cifar10"))


def test_a_background_behind_nothing_has_no_effect(flowers, tmp_path):
    with pytest.raises(ValueError, match="--background black would have no effect: no picture has transparent parts"):
        load(Data(folder=flowers, size=8, background="black"))
    assert load(Data(folder=flowers, size=8, fit="pad", background="black")).facts.num_images == 22
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (8, 8), (0, 255, 0, 255)).save(tmp_path / "b.png")
    found = load(Data(folder=tmp_path, size=8, background="black", test_share=0.0))
    assert found.train.images[0].max() == 0
