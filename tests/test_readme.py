"""The code in the README runs, and its first example really goes from data to samples."""

import re
from pathlib import Path

import jax
import numpy as np

from fm_jax.data.toy import moons

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_code_runs():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(block, names)
    assert names["samples"].shape == (1000, 2)
    # Half of the samples are on either moon, as far as the line between their middles tells.
    real = np.asarray(moons(jax.random.key(99), 1000))
    np.testing.assert_allclose(np.mean(names["samples"], axis=0), real.mean(axis=0), atol=0.3)
    np.testing.assert_allclose(np.std(names["samples"], axis=0), real.std(axis=0), atol=0.3)
    assert np.isfinite(names["loss"])


def test_links_lead_somewhere():
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (root / target).exists(), target
