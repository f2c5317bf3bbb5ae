import dataclasses

import jax
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import reflow, toy2d
from experiments.lab.smoke import smoke


def test_only_where_it_is_asked_for():
    assert smoke(toy2d.CONFIG, width=8) is toy2d.CONFIG


@pytest.mark.parametrize("config", [toy2d.CONFIG, reflow.Config()], ids=["training", "run_dir"])
def test_next_to_no_computation_in_a_folder_started_afresh(config, tmp_path):
    old = tmp_path / "run-smoke" / "results.json"
    old.parent.mkdir()
    old.touch()
    (old.parent / "config.json").write_text('{"smoke": true}')
    place = {"run_dir": tmp_path / "run"}
    if config is toy2d.CONFIG:
        place = {"training": dataclasses.replace(config.training, **place)}
        small = smoke(dataclasses.replace(config, smoke=True, **place), width=8, sampling={"steps": 2})
        assert (small.width, small.sampling.steps, small.sampling.guidance) == (8, 2, config.sampling.guidance)
        assert (small.training.total_steps, small.training.batch_size) == (4, 32)
        assert small.training.learning_rate == config.training.learning_rate
        assert small.training.run_dir == old.parent
    else:
        small = smoke(dataclasses.replace(config, smoke=True, **place), recipe={"steps": 700})
        assert (small.recipe.steps, small.recipe.sigma, small.run_dir) == (700, config.recipe.sigma, old.parent)
    assert not old.exists()
    assert jax.config.read("jax_disable_most_optimizations")
    assert [path.name for path in old.parent.iterdir()] == [".smoke"]
    smoke(dataclasses.replace(config, smoke=True, **place))  # which the next one knows it by


@pytest.mark.parametrize("what", ["files", "another run", "a file", "a link"])
def test_what_no_smoke_run_made_is_not_removed(what, tmp_path):
    folder = tmp_path / "run-smoke"
    match what:
        case "files":
            folder.mkdir()
            (folder / "thesis.tex").write_text("mine")
        case "another run":
            folder.mkdir()
            (folder / "config.json").write_text('{"smoke": false}')
        case "a file":
            folder.write_text("mine")
        case "a link":
            (tmp_path / "mine").mkdir()
            folder.symlink_to(tmp_path / "mine")
    before = sorted((path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"run-smoke, where --smoke would put its results.*another --run-dir"):
        smoke(reflow.Config(run_dir=tmp_path / "run", smoke=True))
    assert sorted((path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*")) == before
