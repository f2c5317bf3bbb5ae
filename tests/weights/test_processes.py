"""Several processes load one file, each the parts of its own devices."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CODE = """
import sys
sys.path.insert(0, sys.argv[3])
import jax
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from weights import toy
from fm_jax.weights.load import load
from fm_jax.weights.rules import Piece
from fm_jax.weights.save import save

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("process", "device"))
layers, original = [], Piece.to_ours
def noted(piece, tensor):
    if piece.path == "blocks/mlp/kernel":
        layers.append(piece.layer)
    return original(piece, tensor)
Piece.to_ours = noted

def sharding(path):
    cut = PartitionSpec("process", None, "device") if path == "blocks/mlp/kernel" else PartitionSpec()
    return NamedSharding(mesh, cut)

folder, want = sys.argv[4], toy.params()
params = load(folder, toy.rules(), sharding=sharding)
assert set(layers) == {jax.process_index()}, layers
for leaf, whole in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
    assert all((np.asarray(shard.data) == whole[shard.index]).all() for shard in leaf.addressable_shards)
try:
    save(folder + "/refused", params, toy.rules())
except ValueError as error:
    assert "'blocks/mlp/kernel' is cut over several processes" in str(error)
    print("refused")
params = load(folder, toy.rules(), sharding=NamedSharding(mesh, PartitionSpec()))
save(folder + "/saved", params, toy.rules())  # the same files by both
assert toy.same_bits(load(folder + "/saved", toy.rules()), want)
"""


@pytest.mark.slow
def test_two_processes(tmp_path):
    from weights import toy

    from fm_jax.weights.write import write_tensors

    write_tensors(tmp_path / "model.safetensors", toy.tensors())
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(CODE), str(i), str(port), str(TESTS), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for i in range(2)
    ]
    for each in processes:
        out, err = each.communicate(timeout=300)
        assert each.returncode == 0, err
        assert out == "refused\n"
    assert not (tmp_path / "refused").exists()
