"""What the annotations say of shapes holds, for all that contracts.py lists and in the examples of the docstrings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found():
    """What `annotated.py` finds in a process of its own, in which every function of fm_jax is checked."""
    pytest.importorskip("beartype", reason="needs beartype, of the extra fm_jax[test]")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / "tests" / "annotated.py")]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.xdist_group("annotations")
def test_annotations_hold(found):
    assert len(found["called"]) > 800
    assert sum(name.endswith("(doctest)") for name in found["called"]) > 50
    assert found["failed"] == {}


@pytest.mark.slow
@pytest.mark.xdist_group("annotations")
def test_wrong_shapes_are_found(found):
    assert len(found["refused"]) >= 10
    assert set(found["refused"].values()) == {"TypeCheckError"}, found["refused"]
