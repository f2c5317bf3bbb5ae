"""The code in the README runs, and its first example really goes from data to samples."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from fm_jax.data.toy import moons

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
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


@pytest.mark.slow
def test_code_of_the_page_on_couplings_runs():
    pytest.importorskip("ott", reason="needs the extra fm_jax[ot]")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "couplings.md").read_text(), flags=re.DOTALL):
        exec(block, names)
    assert np.isfinite(names["loss"])
    assert names["forward"].shape == names["backward"].shape == (128, 2)
    assert names["pairs"]["x1"].shape == (256, 2)


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md", "docs/couplings.md", "docs/samplers.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target
