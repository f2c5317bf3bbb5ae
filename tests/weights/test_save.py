"""Saving is the inverse of loading, bit for bit, whatever devices and files lie between."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from weights import toy
from weights.toy import same_bits

from fm_jax.weights.formats import WeightsError
from fm_jax.weights.load import load
from fm_jax.weights.safetensors import open_tensors
from fm_jax.weights.save import save

RULES = toy.rules()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("most", [5e9, 500])
def test_what_is_loaded_is_what_was_saved(tmp_path, dtype, most):
    params = toy.params(dtype)
    written = save(tmp_path, params, RULES, max_shard_bytes=most)
    assert (len(written) > 1) == (most == 500)
    assert same_bits(load(tmp_path, RULES), params)


def test_what_is_saved_is_what_was_loaded(tmp_path):
    tensors = toy.tensors()
    save(tmp_path / "a.safetensors", load(tensors, RULES), RULES)
    found = open_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert same_bits(dict(found), tensors)
    assert found.metadata == {"format": "pt"}
    assert not (tmp_path / "config.json").exists()


@pytest.mark.slow
def test_from_devices(tmp_path):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    for axes in ((), ("a",), (None, "b")):

        def sharding(path, axes=axes):
            fits = all(size % 2 == 0 for axis, size in zip(axes, toy.SHAPES[path], strict=False) if axis)
            return NamedSharding(
                mesh, PartitionSpec(*axes) if fits and len(toy.SHAPES[path]) >= len(axes) else PartitionSpec()
            )

        params = load(toy.tensors(), RULES, sharding=sharding)
        save(tmp_path, params, RULES)
        assert same_bits(load(tmp_path, RULES), toy.params())
        # No leaf has kept a copy of itself on the host.
        assert all(leaf._npy_value is None for leaf in jax.tree.leaves(params) if not leaf.is_fully_replicated)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (None, "model.safetensors"),
        ({"architectures": ["CLIPTextModel"]}, "model.safetensors"),
        ({"_class_name": "UNet2DModel", "b": [1], "a": None}, "diffusion_pytorch_model.safetensors"),
    ],
)
def test_names_and_config(tmp_path, config, name):
    written = save(tmp_path / "new" / "folder", toy.params(), RULES, config=config)
    assert written[-1] == tmp_path / "new" / "folder" / name
    assert [path.name for path in written[:-1]] == ["config.json"] * (config is not None)
    if config is not None:
        assert json.loads(written[0].read_text()) == config


def test_dtype(tmp_path):
    save(tmp_path, toy.params(), RULES, dtype=jnp.bfloat16)
    assert same_bits(load(tmp_path, RULES), load(toy.tensors(), RULES, dtype=jnp.bfloat16))
    assert open_tensors(tmp_path)["positions"].dtype == np.float32
    params = toy.params()
    params["image"]["bias"][0] = 1e6
    with pytest.raises(WeightsError, match=r"'image/bias' holds 1e\+06, which float16 has not"):
        save(tmp_path, params, RULES, dtype=np.float16)
    assert same_bits(load(tmp_path, RULES), load(toy.tensors(), RULES, dtype=jnp.bfloat16))


def test_leaves_of_one_tensor_with_several_dtypes(tmp_path):
    params = toy.params(ml_dtypes.bfloat16)
    params["blocks"]["key"]["kernel"] = params["blocks"]["key"]["kernel"].astype(np.float32)
    save(tmp_path, params, RULES)
    assert open_tensors(tmp_path)["blocks.0.qk.weight"].dtype == np.float32
    found = load(tmp_path, RULES)["blocks"]["key"]["kernel"]
    np.testing.assert_array_equal(found, params["blocks"]["key"]["kernel"])


def without(params, path):
    del params[path]
    return params


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"more": {"kernel": np.zeros(3)}}, "have besides 'more/kernel'"),
        (lambda x: without(x, "image"), "lack 'image/bias', 'image/kernel'"),
        (lambda x: x | {"count": np.zeros(4)}, r"count is \[4\], must be \[3\]"),
        (lambda x: {"params": x}, "lack .*; have besides"),
        (lambda x: None, "params must be nested dicts of arrays"),
        (lambda x: x | {"image": [1, 2]}, r"lack .*; have besides 'image/\[0\]'"),
    ],
)
def test_parameters_of_another_network(tmp_path, change, message):
    with pytest.raises(WeightsError, match=message):
        save(tmp_path / "new", change(toy.params()), RULES)
    assert not (tmp_path / "new").exists()


def test_arguments(tmp_path):
    for options, message in (
        ({"dtype": "int8"}, "dtype must be a floating-point dtype"),
        ({"config": "config.json"}, "config must be a dict"),
        ({"config": {"a": np.float32(3)}}, "config must be what JSON can hold"),
        ({"max_shard_bytes": 0}, "max_shard_bytes must be positive"),
        ({"max_shard_bytes": "5GB"}, "max_shard_bytes must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "new", toy.params(), RULES, **options)
    with pytest.raises(ValueError, match="rules must be Rules"):
        save(tmp_path / "new", toy.params(), None)
    assert not (tmp_path / "new").exists()


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder, and must be a file"):
        save(tmp_path, toy.params(), RULES)
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


# A network of linear layers, stacked by twos: leaves of 2 x 4 width^2 bytes, tensors of half of that.
MEMORY = """
import resource, sys
import jax, jax.numpy as jnp, ml_dtypes, numpy as np
from fm_jax.weights.load import load
from fm_jax.weights.rules import Rules, dense, nested
from fm_jax.weights.write import Lazy, write_tensors
from fm_jax.weights.save import save

folder, width, layers, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), np.dtype(sys.argv[4])
template = nested({
    f"block_{i // 2}/kernel": jax.ShapeDtypeStruct((2, width, width), jnp.float32) for i in range(layers)
})
pieces = [dense(f"block_{i // 2}", f"blocks.{i}", bias=False, layer=i % 2) for i in range(layers)]
rules = Rules(template, tuple(piece for each in pieces for piece in each))
rows = np.arange(width, dtype=np.float32)[:, None] % 251
make = lambda i: lambda: (i + rows + np.zeros((1, width), np.float32)).astype(dtype)
tensors = {key: Lazy(shape, dtype, make(i)) for i, (key, shape) in enumerate(rules.shapes.items())}
write_tensors(folder + "/model.safetensors", tensors, max_shard_bytes=width * width * 4 * 8)

def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def beside(function):
    start = now()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    result = function()
    high = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
    return result, high - start

jax.block_until_ready(jnp.zeros(3))
params, loading = beside(lambda: load(folder, rules))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(params))
last = params[f"block_{(layers - 1) // 2}"]["kernel"]
assert float(last[(layers - 1) % 2, 0, 3]) == float(np.asarray(layers + 2, dtype))
_, saving = beside(lambda: save(folder, params, rules, max_shard_bytes=width * width * 4 * 8))
print(size, loading - size, saving)
"""


def memory(tmp_path, width, layers, dtype):
    """Bytes of the parameters, and what the host held beside them at most when loading and when saving."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY), str(tmp_path), str(width), str(layers), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())


@pytest.mark.slow
def test_memory(tmp_path):
    size, *beside = memory(tmp_path, 1024, 16, "bfloat16")
    largest = size // 8
    assert max(beside) < 2 * largest + 16e6  # of the program itself


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_of_two_gigabytes(tmp_path, dtype):
    width, layers = 4096, 32 if dtype == "float32" else 64
    size, *beside = memory(tmp_path, width, layers, dtype)
    assert size > 2e9
    assert max(beside) < 300e6
