"""Data sets of TFDS that may lie prepared beside the checkout."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def tfds_dir(monkeypatch):
    """A directory with the datasets prepared."""
    pytest.importorskip("tensorflow_datasets")
    beside = Path(__file__).parents[2].parent / "shared" / "tfds"
    directory = Path(os.environ.get("TFDS_DATA_DIR") or beside)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return directory


@pytest.fixture
def prepared(tfds_dir):
    """Skips unless a dataset is prepared there."""

    def need(name):
        if not (tfds_dir / name).is_dir():
            pytest.skip(f"{name} is not prepared: set TFDS_DATA_DIR, or run `python -m fm_jax.data.images {name}`")
        return tfds_dir

    return need
