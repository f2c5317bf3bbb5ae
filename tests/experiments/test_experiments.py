"""Every experiment from data to pictures in smoke mode, its command line, and its checkpoints."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import (
    autoencoder,
    cifar10,
    coloured_mnist,
    digits,
    fashion_mnist,
    learned_solver,
    mnist,
    sample,
    text_to_image,
    text_to_video,
    toy2d,
)
from experiments.lab import images, sampling
from experiments.lab.command_line import parse
from experiments.lab.data import Data
from experiments.lab.experiment import restore_run
from experiments.lab.method import Method
from experiments.lab.smoke import smoke as shrink
from experiments.lab.training import Training, _missing_lines, config_to_json, from_json, restore, write_config
from fm_jax.train.checkpoint import CheckpointError
from fm_jax.train.folder import FolderInUseError, lock_folder
from fm_jax.train.log import MetricsWriter, read_metrics

ROOT = Path(__file__).parents[2]


def smoke(config, run_dir, **changes):
    training = dataclasses.replace(config.training, run_dir=run_dir)
    return dataclasses.replace(config, smoke=True, training=training, **changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [digits, *(pytest.param(module, marks=pytest.mark.slow) for module in (mnist, fashion_mnist, cifar10))],
    ids=lambda m: m.__name__.split(".")[-1],
)
def test_images(module, tmp_path, capsys):
    config = smoke(module.CONFIG, tmp_path / "run")
    try:
        results = images.run(config)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    run_dir = tmp_path / "run-smoke"
    pictures = (*images.PICTURES, "samples/step_000004.png")
    for name in (*pictures, "metrics.jsonl", "config.json", "data.json", "results.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["2", "4"]
    assert [row["step"] for row in read_metrics(run_dir)] == [2, 4]
    assert (results["guided"]["nfe"], results["unguided"]["nfe"]) == (4, 2)  # two Euler steps, guided ones cost double
    assert json.loads((run_dir / "results.json").read_text()) == results
    out = capsys.readouterr().out
    assert str(run_dir) in out
    assert "time per image sampled" in out
    assert "examples/s" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "config"),
    [
        (text_to_image, coloured_mnist.CONFIG),
        (text_to_video, dataclasses.replace(text_to_video.CONFIG, dataset="mnist")),
        (autoencoder, dataclasses.replace(autoencoder.CONFIG, data=Data(dataset="mnist"))),
    ],
    ids=["coloured_mnist", "text_to_video", "autoencoder"],
)
def test_digits_of_mnist(module, config, tmp_path):
    try:
        results = module.run(smoke(config, tmp_path / "run"))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert json.loads((tmp_path / "run-smoke" / "results.json").read_text()) == results


@pytest.mark.slow
def test_one_option_changes_the_network_and_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    few = {"solver": "euler", "steps": 2, "sample_batch": 20}
    small = shrink(smoke(digits.CONFIG, tmp_path / "run"), model="smoke_dit", sampling=few, num_samples=20, frames=3)
    small = dataclasses.replace(small, smoke=False)  # an experiment that happens to be small
    results = images.run(small)
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run-smoke"))

    monkeypatch.setattr(images, "train", trained_again)
    assert images.run(small) == results
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        images.run(dataclasses.replace(small, num_samples=10))


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        Method(path="vp", prediction="noise", weight="min_snr"),
        Method(path="cosine", prediction="data", coupling="minibatch_ot", times="logit_normal"),
        Method(path="ddpm", prediction="score", times="edm"),
    ],
    ids=lambda method: f"{method.path} {method.prediction}",
)
def test_one_option_changes_the_method(method, tmp_path):
    results = toy2d.run(smoke(toy2d.CONFIG, tmp_path / "run", method=method))
    assert np.isfinite(results["wasserstein2"])
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run-smoke"))


@pytest.mark.slow
def test_sample_draws_from_a_run(tmp_path, capsys):
    images.run(smoke(digits.CONFIG, tmp_path / "run"))
    run = tmp_path / "moved"
    (tmp_path / "run-smoke").rename(run)
    draw = lambda **options: sample.run(sample.Config(run=run, num=5, steps=3, solver="heun", **options))  # noqa: E731
    draw(out=tmp_path / "a.npz", label=3, guidance=2.0)
    draw(out=tmp_path / "b.npz", label=3, guidance=2.0)
    draw(out=tmp_path / "c.npz", label=3, guidance=1.0)
    a, b, c = (np.load(tmp_path / f"{name}.npz") for name in "abc")
    assert a["samples"].shape == (5, 8, 8, 1)
    np.testing.assert_array_equal(a["labels"], 3)
    np.testing.assert_array_equal(a["samples"], b["samples"])
    assert np.abs(a["samples"] - c["samples"]).max() > 0
    out = capsys.readouterr().out
    assert "5 samples from step 4 with heun, NFE 12" in out  # three steps of two evaluations, guided
    assert "NFE 6" in out
    draw(out=tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 0
    draw(out=tmp_path / "d.npz", label=3, avoid=5, guidance_rule="projected", guidance=2.0)
    draw(out=tmp_path / "e.npz", label=3, weak_run=run, guidance=2.0)
    draw(out=tmp_path / "f.npz", label=3, also=8, guidance=2.0)
    assert "NFE 18" in capsys.readouterr().out  # three branches
    d, e, f = (np.load(tmp_path / f"{name}.npz") for name in "def")
    assert np.abs(f["samples"] - a["samples"]).max() > 0
    assert np.abs(d["samples"] - a["samples"]).max() > 0
    # Leading away from a network by itself leads nowhere.
    np.testing.assert_allclose(e["samples"], c["samples"], atol=1e-5)
    for options, message in [
        ({"label": 10}, "--class must be one of the run's 10 classes, from 0, got 10"),
        ({"avoid": 10}, "--avoid must be one of the run's 10 classes, from 0, got 10"),
    ]:
        with pytest.raises(SystemExit, match=message):
            draw(**options)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    config = smoke(toy2d.CONFIG, tmp_path_factory.mktemp("toy") / "run")
    toy2d.run(config)
    return config.training.run_dir.with_name("run-smoke")


@pytest.mark.slow
def test_samplers_by_name(toy_run, tmp_path, capsys):
    """One of each family; `--help` lists all of them."""
    nfe = {"ab3": 5, "ddim": 3, "ddpm": 3, "unipc_2": 3, "churn": 6, "predictor_corrector": 5, "tsit5": None}
    for name, expected in nfe.items():
        out = tmp_path / f"{name}.npz"
        sample.run(sample.Config(run=toy_run, num=8, out=out, solver=name, steps=3, grid="edm", tolerance=1e-2))
        assert np.isfinite(np.load(out)["samples"]).all()
        assert expected is None or f"with {name}, NFE {expected}" in capsys.readouterr().out, name


def test_help_lists_the_samplers_with_order_and_cost(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["sample", "--help"])
    with pytest.raises(SystemExit):
        parse(sample.Config)
    out = capsys.readouterr().out
    for line in ("dpm_solver_3: order 3, 3 NFE a step", "ddpm: weak order 1, 1 NFE a step, random"):
        assert line in out


@pytest.mark.slow
def test_learned_solver_of_a_run(toy_run, tmp_path, capsys):
    config = learned_solver.Config(run=toy_run, calls=(2, 3), num=32, fine_steps=5, iterations=3, batch_size=16)
    results = learned_solver.run(config)
    assert results.keys() == {"2", "3"}
    assert np.isfinite([value for found in results.values() for value in found.values()]).all()
    solver = toy_run / "learned_solver_3.npz"
    sample.run(sample.Config(run=toy_run, num=8, out=tmp_path / "b.npz", learned_solver=solver))
    assert "NFE 3" in capsys.readouterr().out


@pytest.mark.slow
def test_toy2d(tmp_path, capsys):
    results = toy2d.run(smoke(toy2d.CONFIG, tmp_path / "run", source="moons"))
    assert results["wasserstein2_floor"] > 0
    assert (tmp_path / "run-smoke" / "samples.png").exists()
    sample.run(sample.Config(run=tmp_path / "run-smoke", num=16, out=tmp_path / "points.npz"))
    assert np.load(tmp_path / "points.npz")["samples"].shape == (16, 2)
    with pytest.raises(ValueError, match="--source moons needs --prediction velocity and a solver such as heun"):
        toy2d.run(smoke(toy2d.CONFIG, tmp_path / "run", source="moons", method=Method(prediction="noise")))


def short(run_dir, total_steps, **changes):
    training = dataclasses.replace(
        toy2d.CONFIG.training, run_dir=run_dir, total_steps=total_steps, batch_size=16, decay="constant", save_every=3
    )
    sampling = dataclasses.replace(toy2d.CONFIG.sampling, solver="euler", steps=2)
    training = dataclasses.replace(training, log_every=1, **changes)
    return dataclasses.replace(toy2d.CONFIG, training=training, sampling=sampling, width=8, depth=1, num_samples=32)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Method(), Method(first_steps=4)], ids=["", "first steps"])
def test_a_longer_run_continues_bit_for_bit_and_another_config_is_refused(method, tmp_path):
    for name, total_steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        toy2d.run(dataclasses.replace(short(tmp_path / name, total_steps), method=method))
    whole, parts = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert len(whole) == 6
    assert whole == parts
    before = (tmp_path / "parts" / "config.json").read_text()
    with pytest.raises(
        CheckpointError, match=r"--learning-rate=0.002, and this run has --learning-rate=0.1.*another --run-dir"
    ):
        toy2d.run(dataclasses.replace(short(tmp_path / "parts", 6, learning_rate=0.1), method=method))
    assert (tmp_path / "parts" / "config.json").read_text() == before


def test_config_survives_json():
    for module in (images, toy2d):
        config = cifar10.CONFIG if module is images else toy2d.CONFIG
        assert from_json(module.Config, json.loads(json.dumps(config_to_json(config)))) == config
    record = config_to_json(toy2d.CONFIG)
    for damaged, message in [
        (record | {"depht": 3}, r"config.json has \['depht'\], which Config has not"),
        ({}, r"config.json lacks \['training'\], which Config needs"),
        (record | {"training": [1]}, r"config.json has \[1\] for Training"),
        (record | {"width": "8"}, "--width must be an integer, got '8'"),
    ]:
        with pytest.raises(ValueError, match=message):
            from_json(toy2d.Config, damaged)


def test_every_field_is_an_option_with_help(capsys, monkeypatch):
    for config in (digits.CONFIG, toy2d.CONFIG):
        monkeypatch.setattr(sys, "argv", ["prog", "--help"])
        with pytest.raises(SystemExit):
            parse(type(config), config)
        text = capsys.readouterr().out
        kinds = [type(config), *(type(getattr(config, f.name)) for f in dataclasses.fields(config))]
        for kind in filter(dataclasses.is_dataclass, kinds):
            for f in dataclasses.fields(kind):
                if not dataclasses.is_dataclass(getattr(config, f.name, None)):
                    assert f"--{f.name.replace('_', '-')}" in text, f.name


@pytest.mark.slow
def test_a_typo_is_an_error_that_names_the_nearest_field():
    command = [sys.executable, "-m", "experiments.digits", "--bath-size", "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "--batch-size" in done.stderr + done.stdout


def test_batch_must_divide_by_the_devices(tmp_path):
    training = dataclasses.replace(digits.CONFIG.training, run_dir=tmp_path, batch_size=127)
    with pytest.raises(ValueError, match="--batch-size must be a multiple of 4, the devices of this process, got 127"):
        images.run(dataclasses.replace(digits.CONFIG, training=training))


def small_digits(run_dir, **changes):
    """A run that is no smoke run, and as small as one."""
    few = {"solver": "euler", "steps": 2, "sample_batch": 20}
    small = shrink(smoke(digits.CONFIG, run_dir), model="smoke_dit", sampling=few, num_samples=20, frames=3)
    training = dataclasses.replace(small.training, run_dir=run_dir, **changes)
    return dataclasses.replace(small, smoke=False, training=training)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = small_digits(tmp_path_factory.mktemp("finished") / "run")
    images.run(config)
    return config


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run in a folder of its own, and what its results.json holds."""
    shutil.copytree(finished.training.run_dir, tmp_path / "run")
    config = small_digits(tmp_path / "run")
    write_config(config)
    return config, (tmp_path / "run" / "results.json").read_bytes()


def trained_again(*_, **__):
    pytest.fail("trained again")


@pytest.mark.slow_but_one
@pytest.mark.parametrize(
    "content",
    [None, b"", b"{", b"[]", b"null", b"{}", b'{"guided": 3}', b"\xff\x00", b'{"guided": {}, "unguided": {}}'],
    ids=str,
)
def test_results_that_are_ruined_count_as_absent(content, copied, monkeypatch):
    config, whole = copied
    path = config.training.run_dir / "results.json"
    monkeypatch.setattr(images, "train", trained_again)
    assert images.run(config) == json.loads(whole)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        images.run(config)


@pytest.mark.slow
def test_ruined_results_are_made_again(copied):
    config, whole = copied
    path = config.training.run_dir / "results.json"
    path.write_text('{"guided": ')
    (config.training.run_dir / "config.json").write_text("{")  # a copy, which the run writes anew
    results = images.run(config)
    assert json.loads(path.read_text()) == results
    untimed = lambda r: (r["guided"]["agreement"], r["unguided"]["agreement"], r["classifier_accuracy_on_real"])  # noqa: E731
    assert untimed(results) == untimed(json.loads(whole))


@pytest.mark.parametrize("wrong", ["another rate", "too many in a batch", "a damaged checkpoint"])
def test_a_refused_run_leaves_the_results_of_a_finished_one(wrong, copied):
    config, _ = copied
    run_dir = config.training.run_dir
    changes = {"another rate": {"learning_rate": 0.5}, "too many in a batch": {"batch_size": 2000}}.get(wrong, {})
    config = small_digits(run_dir, **changes)
    if wrong == "a damaged checkpoint":
        (run_dir / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
        config = dataclasses.replace(config, num_samples=10)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"--learning-rate=0.5|--batch-size must be at most 1500|4 is damaged"):
        images.run(config)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_foreign_lines_among_the_metrics_stop_no_experiment(copied):
    config, _ = copied
    metrics = config.training.run_dir / "metrics.jsonl"
    with metrics.open("ab") as file:
        file.write(b'{"step": 4}\nnote\n{"step": "a", "loss": 3}\n\xff\n')
    before = metrics.read_bytes()
    images.run(dataclasses.replace(config, num_samples=10))
    assert metrics.read_bytes() == before


@pytest.mark.slow
def test_results_of_an_older_configuration_are_not_taken_for_those_of_a_newer_one(copied, monkeypatch):
    """Killed between the new configuration and its results: there are none."""
    config, _ = copied
    config = dataclasses.replace(config, num_samples=10)
    monkeypatch.setattr(images, "judge", trained_again)
    for _ in range(2):
        with pytest.raises(pytest.fail.Exception):
            images.run(config)
        assert not (config.training.run_dir / "results.json").exists()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "loss.png", "results.json", "samples"])
def test_a_name_that_is_taken_in_a_finished_run(name, copied):
    config, _ = copied
    run_dir = config.training.run_dir
    shutil.rmtree(run_dir / name) if name == "samples" else (run_dir / name).unlink()
    (run_dir / name).touch() if name == "samples" else (run_dir / name).mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in run_dir.rglob("*")}
    wanted = "a file, and must be a folder" if name == "samples" else "a folder, and must be a file"
    with pytest.raises(OSError, match=rf"{name} is {wanted}: move it away. Nothing was overwritten"):
        images.run(config)
    assert {path: path.is_file() and path.read_bytes() for path in run_dir.rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, b"", b"note\n"])
def test_a_finished_run_without_its_metrics_is_judged_without_a_picture_of_them(content, copied, capsys):
    config, whole = copied
    run_dir = config.training.run_dir
    for name in ("results.json", "metrics.jsonl", "loss.png"):
        (run_dir / name).unlink()
    if content is not None:
        (run_dir / "metrics.jsonl").write_bytes(content)
    results = images.run(config)
    assert results["guided"]["agreement"] == json.loads(whole)["guided"]["agreement"]
    assert results["training_images_per_second"] is None
    out = capsys.readouterr().out
    assert "metrics.jsonl has no lines of steps before 5: loss.png goes without them" in out
    assert "metrics.jsonl has no losses: loss.png is left out" in out
    files = "samples.png, neighbours.png, animation.gif, metrics.jsonl, config.json, data.json, results.json"
    assert f"{run_dir}: {files}, checkpoints/" in out
    assert not (run_dir / "loss.png").exists()


@pytest.mark.parametrize(
    ("steps", "reached", "missing"),
    [
        ([], 3, None),  # stopped before the first line
        ([], 10, "before 11"),
        ([10, 20, 30], 30, None),
        ([10, 20, 30], 39, None),  # stopped by a signal
        ([20, 30], 30, "before 20"),
        ([10, 20], 40, "from 21 to 40"),
        ([20, 40, 60], 75, None),  # lines were further apart
        ([10, 20, 30, 40], 20, None),
    ],
)
def test_lines_that_are_missing_on_resuming(steps, reached, missing, tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in steps:
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert _missing_lines(Training(tmp_path, log_every=10), reached) == missing


@pytest.mark.slow
def test_without_an_average_samples_are_drawn_with_the_parameters(tmp_path):
    config = short(tmp_path / "run", 3, ema_decays=())
    assert np.isfinite(toy2d.run(config)["wasserstein2"])
    restored = restore_run(tmp_path / "run")
    state = restore(restored.config, restored.params)
    assert state.ema == {}
    for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(CheckpointError, match=r"with --ema-decays=\[\], and this run has --ema-decays=\[0.9\]"):
        toy2d.run(short(tmp_path / "run", 3, ema_decays=(0.9,)))


@pytest.mark.parametrize("run", [images.run, toy2d.run], ids=["images", "toy2d"])
def test_two_runs_at_once(run, copied, tmp_path):
    config, _ = copied
    config = config if run is images.run else short(config.training.run_dir, 3)
    with lock_folder(config.training.run_dir), pytest.raises(FolderInUseError, match=r"run is in use by process \d+"):
        run(config)


def test_what_cannot_be_sampled_is_found_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "train", trained_again)
    monkeypatch.setattr(sampling, "make_generate", refusing)
    with pytest.raises(ValueError, match="cannot be sampled"):
        images.run(small_digits(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def refusing(*_, **__):
    def generate(*_):
        raise ValueError("cannot be sampled")

    return generate
