"""The command that draws from a published system."""

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


def test_smoke_draws_a_picture(call, tmp_path, capsys):
    call("--smoke", "--num", 2, "--out", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 100
    assert "2 pictures of 16x16 by DiTPipeline, 2 steps, NFE 4" in capsys.readouterr().out


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
        (("--prompt", "a boat"), r"prompts\[0\] must be a class from 0 to 9 for DiTPipeline, got 'a boat'"),
        (("--class", 10), "must be a class from 0 to 9"),
        (("--class", 1, "--steps", 1001), "num_steps must be from 1 to 1000, got 1001"),
        (("--class", 1, "--height", 17), "height must be a multiple of 4 for DiTPipeline, got 17"),
        (("--class", 1, "--truncate"), "truncate must be False for a DiTPipeline"),
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
        ({"smoke": True, "guidance": -1.0}, "--guidance must be"),
    ],
)
def test_options_that_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        sample_pretrained.Config(**options)


def test_a_picture_must_have_its_ending(tmp_path):
    with pytest.raises(ValueError, match=r"--out must end in .png or .npz"):
        sample_pretrained.Config(smoke=True, out=tmp_path / "a.jpg")
