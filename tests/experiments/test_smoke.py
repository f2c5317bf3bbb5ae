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
    place = {"run_dir": tmp_path / "run"}
    if config is toy2d.CONFIG:
        place = {"training": dataclasses.replace(config.training, **place)}
        small = smoke(dataclasses.replace(config, smoke=True, **place), width=8, sampling={"steps": 2})
        assert (small.width, small.sampling.steps, small.sampling.guidance) == (8, 2, config.sampling.guidance)
        assert (small.training.total_steps, small.training.batch_size) == (4, 32)
        assert small.training.learning_rate == config.training.learning_rate
        assert small.training.run_dir == old.parent
    else:
        small = smoke(dataclasses.replace(config, smoke=True, **place), recipe={"steps": 7})
        assert (small.recipe.steps, small.recipe.sigma, small.run_dir) == (7, config.recipe.sigma, old.parent)
    assert not old.exists()
    assert jax.config.read("jax_disable_most_optimizations")
