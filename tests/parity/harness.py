"""The same network twice, here and in PyTorch, with the same random weights; and what PyTorch said, recorded.

Every tensor is drawn from its key and shape alone, so that a small file of outputs (kilobytes, `records/`) guards the
parity where PyTorch is not installed. `FM_JAX_WRITE_RECORDS=1 pytest -m parity tests/parity` writes the records.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fm_jax.weights.rules import Rules

RECORDS = Path(__file__).parent / "records"
RELATIVE = 5e-6
"""Largest relative L2 distance in float32."""
LARGEST = 5e-5
"""Largest distance of one number, in units of the largest number of the output if that is above 1."""

Arrays = dict[str, np.ndarray]


def random_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that hide nothing: no gate is zero, no scale one, no bias zero; and rounding is not blown up."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    x = rng.standard_normal(shape)
    if len(shape) < 2:
        scale = key.endswith(("weight", "scale", "gamma")) or "norm" in key.rsplit(".", 2)[-1]
        return np.asarray(1 + 0.2 * x if scale else 0.2 * x, np.float32)
    if "embed" in key and len(shape) == 2 and not key.endswith(("proj.weight", "linear_1.weight", "linear_2.weight")):
        return np.asarray(0.5 * x, np.float32)
    return np.asarray(0.7 * x / np.sqrt(np.prod(shape[1:])), np.float32)


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """A random tensor for every key."""
    return {key: random_tensor(key, shape) for key, shape in shapes.items()}


def random_input(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, a function of name and shape."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def tensors_of(rules: Rules) -> Arrays:
    """A random tensor for every key of a layout, and what it repeats and computes."""
    tables = {key: np.asarray(table(), np.float32) for key, table in rules.tables.items()}
    random = random_tensors({key: shape for key, shape in rules.shapes.items() if key not in rules.copies})
    return random | {key: random[original] for key, original in rules.copies.items()} | tables


@dataclass(frozen=True)
class Case:
    """One network in one configuration.

    Attributes:
        name: of the record.
        rules: makes the rules of our network.
        inputs: makes the arrays that both sides see, as PyTorch wants them (channels first) or as we do, by name.
        ours: `(params, inputs) -> outputs by name`, in our layout (channels last), traced with jit.
        theirs: `(tensors, inputs) -> outputs by name`, in our layout; imports PyTorch inside. `tensors` is all of the
            layout, tables included; it loads them strictly.
        blocks: pairs (ours, theirs) of names of blocks in order, for the report of a failure: see `first_difference`.
        trace_ours, trace_theirs: the same as `ours` and `theirs`, giving the outputs of the blocks by name.
    """

    name: str
    rules: Callable[[], Rules]
    inputs: Callable[[], Arrays]
    ours: Callable[[Any, Arrays], Mapping[str, Any]]
    theirs: Callable[[Arrays, Arrays], Arrays]
    blocks: tuple[tuple[str, str], ...] = ()
    trace_ours: Callable[[Any, Arrays], Mapping[str, Any]] | None = None
    trace_theirs: Callable[[Arrays, Arrays], Arrays] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.name

    def tensors(self) -> Arrays:
        return tensors_of(self.rules())

    def outputs(self, dtype: Any = None) -> Arrays:
        """What our network gives."""
        params = self.rules().to_ours(self.tensors())
        if dtype is not None:
            params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        with jax.default_matmul_precision("highest"):
            # Arrays of words and switches are constants, as a user's would be; numbers are arguments.
            outputs = jax.jit(lambda params, inputs: dict(self.ours(params, inputs)))(params, self.inputs())
        return {name: np.asarray(value, np.float32) for name, value in outputs.items()}

    @property
    def record(self) -> Path:
        return RECORDS / f"{self.name}.npz"

    def recorded(self) -> Arrays:
        with np.load(self.record) as file:
            return dict(file)


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative L2 distance."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert np.isfinite(theirs).all(), "a comparison with inf or nan proves nothing"
    assert np.std(theirs) > 1e-3, "a comparison with a constant proves nothing"
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs))


def distances(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {name: distance(ours[name], theirs[name]) for name in theirs}


def assert_close(ours: Arrays, theirs: Arrays) -> None:
    far = {name: value for name, value in distances(ours, theirs).items() if not value <= RELATIVE}
    assert not far, f"relative L2 distance above {RELATIVE:g}: {far}"
    for name, value in theirs.items():
        largest = np.abs(ours[name] - value).max() / max(1.0, np.abs(value).max())
        assert largest <= LARGEST, f"{name}: a number is off by {largest:g}"


def check_record(case: Case) -> None:
    """Our outputs against those that PyTorch gave."""
    assert_close(case.outputs(), case.recorded())


def check_peer(case: Case) -> None:
    """Our outputs against PyTorch's, and those against the record; on failure names the first block that differs."""
    pytest.importorskip("torch", reason="torch is not installed; see 'Parity with PyTorch peers' in CONTRIBUTING.md")
    theirs = case.theirs(case.tensors(), case.inputs())
    if os.environ.get("FM_JAX_WRITE_RECORDS"):
        RECORDS.mkdir(exist_ok=True)
        np.savez_compressed(case.record, **theirs)
        assert case.record.stat().st_size < 64_000, f"{case.record.name} is too large for a record: smaller shapes"
    try:
        assert_close(case.outputs(), theirs)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{first_difference(case)}") from None
    # Between processors PyTorch rounds otherwise, by 1e-6 or two.
    assert max(distances(case.recorded(), theirs).values()) < RELATIVE, (
        "the record is of another network: write it anew"
    )


def first_difference(case: Case) -> str:
    """The first pair of blocks whose outputs differ, and the last that agree."""
    if case.trace_ours is None or case.trace_theirs is None:
        return "no trace of the blocks is defined"
    with jax.default_matmul_precision("highest"):
        ours = case.trace_ours(case.rules().to_ours(case.tensors()), case.inputs())
    theirs = case.trace_theirs(case.tensors(), case.inputs())
    agreed = "nothing"
    for mine, other in case.blocks:
        found = distance(np.asarray(ours[mine], np.float32), np.asarray(theirs[other], np.float32))
        if not found <= RELATIVE:
            return f"first difference: {mine} and {other} differ by {found:.2g}; {agreed} agreed"
        agreed = f"{mine} and {other}"
    return f"all blocks agree, the last {agreed}: the difference is behind them"


def check_mutation(case: Case) -> None:
    """A mistake that the caller has made must show against the record."""
    if all(value <= RELATIVE for value in distances(case.outputs(), case.recorded()).values()):
        raise AssertionError(f"{case.name} does not see this mistake")


def to_torch(tensors: Arrays) -> dict[str, Any]:
    """A state dict."""
    import torch

    return {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}


def first_last(x: Any) -> np.ndarray:
    """A PyTorch tensor or array with channels on axis 1 as one with channels last."""
    return np.moveaxis(np.asarray(x), 1, -1)


def manifest(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A fingerprint of keys and shapes."""
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
