"""The XLA flags of the experiments."""

import os
import subprocess
import sys

import pytest

from experiments.lab import xla

FLAG = "--xla_cpu_experimental_ynn_fusion_type="


@pytest.mark.parametrize(
    ("given", "expected"),
    [("", FLAG), ("--a=1", f"--a=1 {FLAG}"), (f"{FLAG}dot --a=1", f"{FLAG}dot --a=1"), (FLAG[:-1], FLAG[:-1])],
)
def test_flags_are_added_to_those_of_the_user(monkeypatch, given, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    for _ in range(2):  # the second time adds nothing
        xla.use_flags()
        assert os.environ["XLA_FLAGS"] == expected


@pytest.mark.parametrize(
    ("jaxlib", "smoke", "expected"),
    [
        ("0.12.0", True, None),
        ("0.11.1", True, FLAG),
        ("0.10.2", False, FLAG),
        ("0.10.2", True, f"{FLAG} --xla_cpu_use_fusion_emitters=false"),
    ],
)
def test_a_jaxlib_gets_the_flags_that_it_knows(monkeypatch, jaxlib, smoke, expected):
    monkeypatch.setattr(xla, "version", lambda _: jaxlib)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    xla.use_flags(smoke=smoke)
    assert os.environ.get("XLA_FLAGS") == expected


@pytest.mark.slow
def test_jaxlib_takes_the_flags_and_lowers_convolutions_without_ynnpack():
    code = """
from experiments.lab.xla import use_flags
import jax, jax.numpy as jnp
if {use}:
    use_flags()
conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
print(jax.jit(conv).lower(jnp.ones((8, 28, 28, 32)), jnp.ones((3, 3, 32, 32))).compile().as_text().count("ynn"))
"""
    counts = []
    for use in (True, False):
        env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{use}", str(use))], env=env, capture_output=True, text=True, check=True
        )
        counts.append(int(done.stdout))
    assert counts[0] == 0
    if not counts[1]:
        pytest.skip("this jaxlib has no YNNPACK for this processor: the flag has no effect.")
