"""The command that draws from a published system."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("PIL")

from experiments import sample_pretrained
from experiments.lab import command_line
from experiments.lab.small_system import write_small_system
from fm_jax.pretrained import open_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("system")
    write_small_system(folder)
    return folder


@pytest.fixture
def call(monkeypatch):
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["sample_pretrained", *map(str, arguments)])
        sample_pretrained.run(command_line.parse(sample_pretrained.Config))

    return call


@pytest.mark.slow
def test_smoke_draws_a_picture(call, tmp_path, capsys):
    call("--smoke", "--num", 2, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 100
    assert "2 pictures of 16x16 by DiTPipeline, 2 steps, NFE 4" in capsys.readouterr().out


@pytest.mark.slow
def test_arrays_are_those_of_the_library(call, folder, tmp_path):
    import jax

    out = tmp_path / "a.npz"
    call("--weights", folder, "--class", 7, "--steps", 2, "--seed", 3, "--guidance", 2, "--out", out)
    drawn = open_pretrained(folder).draw(7, key=jax.random.key(3), num_steps=2, guidance=2)
    with np.load(out) as file:
        np.testing.assert_allclose(file["images"], drawn.images, atol=1e-6)
        np.testing.assert_allclose(file["latents"], drawn.latents, atol=1e-5)
        assert file["images"].min() >= 0
        assert file["images"].max() <= 1


@pytest.mark.slow
def test_a_flow_of_classes_is_sampled_as_any_flow(tmp_path):
    import jax

    from fm_jax.guidance import FirstChannels, classifier_free_batched
    from fm_jax.samplers import RungeKutta, sample
    from fm_jax.schedules import Linear

    write_small_system(tmp_path, flow=True)
    system = open_pretrained(tmp_path)
    noise = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    drawn = system.draw([3, 9], noise=noise, num_steps=2, guidance=2.5)

    def network(t, x, cond):
        return system.module.apply({"params": system.params}, t, x, cond)[..., :4]

    v = classifier_free_batched(network, "velocity", Linear(), np.array([3, 9]), 10, 2.5, rule=FirstChannels(3))
    np.testing.assert_allclose(drawn.latents, sample(v, noise, RungeKutta("heun"), times=2).x, rtol=1e-4, atol=1e-5)
    assert (system.name, drawn.nfe) == ("SiTPipeline", 8)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--prompt", "a boat"), r"--prompt or --class must be a class from 0 to 9 for DiTPipeline, got 'a boat'"),
        (("--class", 10), "must be a class from 0 to 9"),
        (("--class", 1, "--steps", 1001), "--steps must be from 1 to 1000, got 1001"),
        (("--class", 1, "--guidance", 0.5), "--guidance must be"),
        (("--class", 1, "--height", 17), "--height must be a multiple of 4 for DiTPipeline, got 17"),
        (("--class", 1, "--truncate"), "--truncate must be False for a DiTPipeline"),
        (("--class", 1, "--weights", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_what_the_system_refuses(call, arguments, match, folder, tmp_path):
    given = () if "--weights" in arguments else ("--weights", folder)
    with pytest.raises(SystemExit, match=match):
        call(*given, *arguments, "--out", tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "--weights must be given"),
        (
            {"smoke": True, "weights": Path("a")},
            "--weights must be given, the folder of the system; or --smoke, and not both",
        ),
        ({"weights": Path("a")}, "--prompt must be given, or --class"),
        ({"weights": Path("a"), "prompt": "b", "label": 1}, "--prompt must be given, or --class"),
        ({"weights": Path("a"), "label": 1, "negative": "b"}, "--negative goes with --prompt"),
        ({"smoke": True, "num": 0}, "--num must be"),
        ({"smoke": True, "prompt": "a"}, "--prompt has no effect with --smoke"),
        ({"smoke": True, "label": 1}, "--class has no effect with --smoke"),
        ({"smoke": True, "guidance": -1.0}, "--guidance must be"),
    ],
)
def test_options_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        sample_pretrained.Config(**options)


def test_a_picture_must_have_its_ending(tmp_path):
    with pytest.raises(ValueError, match=r"--out must end in .png or .npz"):
        sample_pretrained.Config(smoke=True, out=tmp_path / "a.jpg")


def changed(folder, name, **fields):
    """The same folder with other fields in one of its JSON files."""
    import json

    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "fields", "match"),
    [
        ("scheduler/scheduler_config.json", {"beta_start": "a"}, "scheduler_config.json: beta_start of the scheduler"),
        ("scheduler/scheduler_config.json", {"beta_end": None}, "beta_end of the scheduler"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, "num_train_timesteps of the scheduler"),
        ("scheduler/scheduler_config.json", {"steps_offset": "1"}, "steps_offset of the scheduler"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding of the scheduler must be False"),
        ("scheduler/scheduler_config.json", {"_class_name": "LMSDiscreteScheduler"}, "scheduler is LMSDiscrete"),
        ("transformer/config.json", {"sample_size": [8, "a"]}, "sample_size of .*config.json must be one size or two"),
        ("model_index.json", {"_class_name": ["a"]}, r"must name one of .* as _class_name, got \['a'\]"),
    ],
)
def test_what_is_wrong_in_a_folder(name, fields, match, folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    changed(tmp_path, name, **fields)
    with pytest.raises(ValueError, match=match):
        open_pretrained(tmp_path)


@pytest.mark.slow
def test_parameters_that_are_not_finite_are_named(folder):
    import jax

    system = open_pretrained(folder)
    bad = {
        **system.params,
        "out": {**system.params["out"], "bias": np.full(system.params["out"]["bias"].shape, np.nan)},
    }
    with pytest.raises(ValueError, match="latents of DiTPipeline are not finite: the parameters of its network"):
        dataclasses.replace(system, params=bad).draw(1, key=jax.random.key(0), num_steps=1)
    decoder = jax.tree.map(lambda leaf: leaf * np.nan, system.autoencoder_params)
    with pytest.raises(ValueError, match="images of DiTPipeline are not finite: the parameters of its autoencoder"):
        dataclasses.replace(system, autoencoder_params=decoder).draw(1, key=jax.random.key(0), num_steps=1)


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        (None, {}, "prompts must be one or a list of at least one, got None"),
        ([], {}, "prompts must be one or a list"),
        (3.5, {}, "prompts must be one or a list"),
        (1, {"height": 0}, "height must be at least 1, got 0"),
        (1, {"negative": 3}, "negative must be one text or a list of them, got 3"),
        (1, {"noise": [[1]]}, "key or noise must be given, and not both"),
        (1, {"key": None, "noise": [[1]]}, r"noise must be \[1, 8, 8, 4\], got"),
    ],
)
def test_drawings_that_are_refused(prompts, options, match, folder):
    import jax

    with pytest.raises(ValueError, match=match):
        open_pretrained(folder).draw(prompts, **({"key": jax.random.key(0)} | options))


def test_a_folder_without_a_size_wants_one(folder):
    import jax

    system = dataclasses.replace(open_pretrained(folder), sizes=None)
    with pytest.raises(ValueError, match="height and width must be given"):
        system.draw(1, key=jax.random.key(0))
