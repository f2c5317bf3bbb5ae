"""The code of the how-to page does what the page says."""

import re
import warnings
from pathlib import Path

import jax
import pytest
from weights.toy import same_bits

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "weights.md"


@pytest.mark.slow
def test_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "weights"}
    with warnings.catch_warnings(record=True) as said:
        for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE):
            exec(compile(block, "weights.md", "exec"), names)
    assert "other.safetensors: the prefix 'module.' is dropped" in str(said[-1].message)
    assert names["module"] == names["dit"]
    assert same_bits(names["loaded"], names["params"])
    assert same_bits(names["again"], names["params"])
    assert same_bits(names["spread"], names["params"])
    assert len(names["spread"]["blocks"]["mlp_in"]["kernel"].devices()) == jax.device_count()
    assert "1 missing: final_layer.linear.bias\n  1 unused: module.extra" in names["refused"]
