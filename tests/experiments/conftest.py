"""What every test of an experiment starts from and leaves behind."""

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _defaults(monkeypatch):
    """Smoke mode turns XLA's optimisations off for the process; prepared data may lie beside the checkout."""
    if "TFDS_DATA_DIR" not in os.environ and (ROOT.parent / "shared" / "tfds").is_dir():
        monkeypatch.setenv("TFDS_DATA_DIR", str(ROOT.parent / "shared" / "tfds"))
    yield
    jax.config.update("jax_disable_most_optimizations", False)
