"""The table of two-dimensional flows, and reflow, in smoke mode."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro", reason="experiments need the extra fm_jax[experiments]")

from experiments import reflow, torchcfm_table
from experiments.torchcfm_table.methods import METHODS, Recipe


@pytest.mark.slow
def test_torchcfm_table(tmp_path, capsys, monkeypatch):
    """Every method in two columns, as tables and a figure."""
    pytest.importorskip("ott", reason="SB-CFM needs the extra fm_jax[ot]")
    monkeypatch.chdir(tmp_path)
    results = torchcfm_table.run(torchcfm_table.Config(smoke=True))
    run_dir = Path("runs/torchcfm_table-smoke")
    cells = results["cells"]
    assert set(METHODS) <= set(cells)
    assert "moons to 8gaussians" not in cells["FM"]  # FM has no source but noise
    values = [v for row in cells.values() for cell in row.values() for measured in cell.values() for v in measured]
    assert np.isfinite(values).all()
    assert cells["OFM"]["N to 8gaussians"]["nfe"] == [1.0]
    text = (run_dir / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| floor |") == 2
    assert all(text.count(f"| {method} |") == 4 for method in METHODS)
    assert (run_dir / "trajectories.png").stat().st_size > 0


@pytest.mark.slow
def test_reflow(tmp_path, capsys):
    results = reflow.run(reflow.Config(run_dir=tmp_path / "run", smoke=True))
    run_dir = tmp_path / "run-smoke"
    assert list(results) == ["1-rectified flow", "2-rectified flow", "distilled"]
    assert np.isfinite([value for row in results.values() for value in row.values()]).all()
    text = (run_dir / "reflow.md").read_text()
    assert text in capsys.readouterr().out
    assert "floor" in text
    assert (run_dir / "reflow.png").stat().st_size > 0
    with pytest.raises(ValueError, match=r"problem must be one of 'N to 8gaussians', .*, got 'N to N'"):
        reflow.Config(problem="N to N")


@pytest.mark.slow
def test_torchcfm_table_goes_on_where_it_was(tmp_path):
    recipe = Recipe(steps=100, batch_size=8)
    config = torchcfm_table.Config(
        run_dir=tmp_path,
        seeds=(1,),
        problems=("N to moons",),
        methods=("I-CFM",),
        recipe=recipe,
        num_test=32,
        num_reference=32,
    )
    first = torchcfm_table.run(config)
    (cell,) = (path for path in (tmp_path / "cells").iterdir() if path.name.startswith("I_CFM"))
    written = cell.stat().st_mtime_ns
    assert torchcfm_table.run(config)["cells"]["I-CFM"] == first["cells"]["I-CFM"]
    assert cell.stat().st_mtime_ns == written
    # What a killed process, or a full disk, left half written is made again.
    cell.write_bytes(cell.read_bytes()[:300])
    (tmp_path / "results.json").write_text("{")
    again = torchcfm_table.run(config)
    assert [again["cells"]["I-CFM"]["N to moons"][name] for name in ("w2", "npe", "nfe")] == [
        first["cells"]["I-CFM"]["N to moons"][name] for name in ("w2", "npe", "nfe")
    ]
    assert json.loads((tmp_path / "results.json").read_text()) == again
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    with pytest.raises(SystemExit, match="holds another table: give another --run-dir"):
        torchcfm_table.run(dataclasses.replace(config, seeds=(2,)))
