"""Sudoku: what counts as a solution, that every sampler draws, and a smoke run from data to picture."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import sudoku
from experiments.lab.training import from_json
from fm_jax.oracles import exact_denoiser, sudoku4, with_mask
from fm_jax.samplers import FirstHitting, MixtureSteps, TauLeaping
from fm_jax.train.log import TIMING_FIELDS, read_metrics

TABLE = with_mask(sudoku4())
SOLVED = np.array([[0, 1, 2, 3], [2, 3, 0, 1], [1, 0, 3, 2], [3, 2, 1, 0]])


def is_solution(grid):
    """By the rules: every row, column and block holds each of the four."""
    blocks = [grid[i : i + 2, j : j + 2].ravel() for i in (0, 2) for j in (0, 2)]
    return all(sorted(group) == [0, 1, 2, 3] for group in [*grid, *grid.T, *blocks])


def test_solutions_are_those_of_the_rules():
    rng = np.random.default_rng(0)
    grids = [SOLVED, SOLVED[:, ::-1], SOLVED[[0, 2, 1, 3]], np.where(SOLVED == 3, 4, SOLVED), np.full((4, 4), 4)]
    for _ in range(20):
        right = TABLE.states[rng.integers(288)].reshape(4, 4)
        wrong = right.copy()
        wrong.flat[rng.integers(16)] = rng.integers(5)
        grids += [right, wrong]
    expected = [is_solution(grid) for grid in grids]
    assert 20 < sum(expected) < len(grids) - 10
    np.testing.assert_array_equal(sudoku.are_solutions(TABLE, np.reshape(grids, (-1, 16))), expected)


def test_every_sampler_is_there_at_every_number_of_evaluations():
    found = sudoku.ways(sudoku.Steps(steps=(4, 9), per_step=(2,)))
    assert {type(way.sampler) for ways in found.values() for way in ways} == {MixtureSteps, TauLeaping, FirstHitting}
    assert {way.sampler.position for ways in found.values() for way in ways if way.times is None} == {
        "random",
        "confidence",
        "margin",
    }
    for ways in found.values():
        assert [None if way.times is None else len(way.times) for way in ways] in ([None], [5, 10])
        assert all(way.times is None or (way.times[0], way.times[-1]) == (0, 1) for way in ways)
    assert [way.of_rates for ways in found.values() for way in ways].count(True) == 2


@pytest.mark.slow
def test_the_exact_posterior_is_right_by_first_hitting_and_not_in_few_steps():
    steps = sudoku.Steps(steps=(4,), per_step=(1, 4))
    draw = sudoku.validity(
        lambda _: exact_denoiser(TABLE, sudoku.path()), None, table=TABLE, steps=steps, key=jax.random.key(0), num=500
    )
    shares, drawn = draw
    assert {name: list(each) for name, each in shares.items() if "first" not in name} == {
        "exact steps, even": ["4"],
        "exact steps, cosine": ["4"],
        "tau-leaping": ["4"],
    }
    for position in ("random", "confidence", "margin"):
        assert shares[f"first hitting, {position}"]["16"] == 1
        assert shares[f"first hitting, {position}"]["4"] < 0.9
    assert all(shares[name]["4"] < 0.5 for name in ("exact steps, even", "tau-leaping"))
    assert sudoku.are_solutions(TABLE, drawn).all()
    assert len(np.unique(drawn, axis=0)) > 200  # of 288, of which 500 draws miss about 51


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    training = dataclasses.replace(sudoku.CONFIG.training, run_dir=tmp_path / "run")
    results = sudoku.run(dataclasses.replace(sudoku.CONFIG, training=training, smoke=True))
    run_dir = tmp_path / "run-smoke"
    for name in (*sudoku.PICTURES, "metrics.jsonl", "config.json", "results.json"):
        assert (run_dir / name).stat().st_size > 0, name
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["2", "4"]
    assert [row["step"] for row in read_metrics(run_dir)] == [2, 4]
    assert json.loads((run_dir / "results.json").read_text()) == results
    assert results["network"].keys() == results["exact"].keys() == sudoku.ways(sudoku.Steps()).keys()
    assert results["mask_bound_floor"] == pytest.approx(5.663, abs=1e-3)
    assert results["mask_bound"] > results["mask_bound_floor"] + 5  # four steps are none
    out = capsys.readouterr().out
    assert "288 solutions of the sudoku of 4 by 4" in out
    assert str(run_dir) in out
    record = json.loads((run_dir / "config.json").read_text())
    assert record.pop("experiment") == "sudoku"
    assert from_json(sudoku.Config, record).sampling == sudoku.Steps(**sudoku.SMOKE["sampling"])


@pytest.mark.slow
def test_a_run_in_parts_is_the_whole_one_bit_for_bit(tmp_path):
    """What it is left with, what it logs, and what it draws."""

    def run(name, total_steps):
        changes = {"total_steps": total_steps, "batch_size": 8, "decay": "constant", "log_every": 1, "save_every": 3}
        training = dataclasses.replace(sudoku.CONFIG.training, run_dir=tmp_path / name, steps_per_call=2, **changes)
        small = {**sudoku.SMOKE, "sampling": sudoku.Steps(**sudoku.SMOKE["sampling"])}
        return sudoku.run(dataclasses.replace(sudoku.CONFIG, training=training, **small))

    whole, _, parts = run("whole", 6), run("parts", 3), run("parts", 6)
    timed = "training_grids_per_second"
    assert {**parts, timed: 0} == {**whole, timed: 0}
    rows, again = (
        [{each: x for each, x in row.items() if each not in TIMING_FIELDS} for row in read_metrics(tmp_path / name)]
        for name in ("whole", "parts")
    )
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows == again
