"""What is no safetensors is told what it is, by its content, at once; no pickle is unpickled."""

import io
import pickle
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from weights import toy

from fm_jax.weights.formats import WeightsError
from fm_jax.weights.rules import Rules
from fm_jax.weights.safetensors import open_tensors

NAMES = ("weights.pt", "model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "x")


class Bomb:
    """What writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/big", bytes(200_000))
        archive.writestr(name, content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("pickle")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


PICKLES = {
    **{f"protocol {protocol}": lambda x, protocol=protocol: pickle.dumps(x, protocol) for protocol in range(6)},
    "zip": lambda x: zipped("archive/data.pkl", pickle.dumps(x)),
    "a large one": lambda x: pickle.dumps([x, bytes(10_000_000)]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_refused_under_any_name(tmp_path, kind, name):
    path, trap = tmp_path / name, tmp_path / "trap"
    path.write_bytes(PICKLES[kind](Bomb(trap)))
    pickle.loads(pickle.dumps(Bomb(trap)))
    assert trap.exists()  # it would
    trap.unlink()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises(WeightsError, match=r"is a pickle.* refused") as caught:
            open_tensors(path)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01
    assert f"python -m fm_jax.weights.convert {path} {path.stem}.safetensors makes" in str(caught.value)
    assert not trap.exists()
    if name != "x":
        with pytest.raises(WeightsError, match="is a pickle"):
            open_tensors(tmp_path)


OTHERS = {
    "empty": (b"", "is empty"),
    "tar": (tarred(b"x"), "is a tar archive, PyTorch's oldest form"),
    "EDM": (b"\x80\x04\x95\x00ctorch_utils.persistence\n_reconstruct_persistent_obj", "NVIDIA's own code"),
    "GGUF": (b"GGUF\x03\0\0\0\0\0\0\0", "is quantised, in the format GGUF"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "is a pointer of Git LFS"),
    "annex": (b"/annex/objects/MD5-s3--1\n", "is a pointer of git-annex"),
    "HTML": (b"<!DOCTYPE html><html>", "is a web page"),
    "HTML after a blank": (b"\n <html lang=en>", "is a web page"),
    "XML": (b"<?xml version='1.0'?><Error>AccessDenied", "is a web page"),
    "JSON": (b'{"error": "Repository not found"}', "is JSON"),
    "gzip": (b"\x1f\x8b\x08\0", "compressed with gzip"),
    "xz": (b"\xfd7zXZ\0", "compressed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\0", "compressed with zstd"),
    "npz": (
        zipped("a.npy", b"")[-400:] and zipped("a.npy", b"").replace(b"archive/big", b"archive.npy"),
        "NumPy's arrays",
    ),
    "npy": (b"\x93NUMPY\x01\0", "one array of NumPy"),
    "zip": (zipped("readme", b""), "is a zip archive; what is read"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "is HDF5"),
    "ONNX": (b"\x08\x07\x12\x07pytorch\x1a\x051.13", "is a graph of ONNX"),
    "msgpack": (b"\x82\xa6params\x81", "is msgpack"),
    "text": (b"hello, world", "is not safetensors"),
    "zeros": (bytes(100), "is not safetensors"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_it_is(tmp_path, kind):
    content, message = OTHERS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        open_tensors(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.mlp.weight_scale",
        "blocks.0.mlp.scale_weight",
        "blocks.0.mlp.weight.absmax",
        "blocks.0.mlp.weight.quant_map",
        "blocks.0.mlp.weight.quant_state.bitsandbytes__nf4",
        "scaled_fp8",
        "blocks.0.mlp.SCB",
        "blocks.0.mlp.qweight",
    ],
)
def test_quantised(key):
    from fm_jax.weights.load import load

    with pytest.raises(WeightsError, match=f"is quantised: {key!r}"):
        load(toy.tensors() | {key: np.ones(1, np.float32)}, toy.rules())


def test_a_key_that_is_wanted_is_no_scale():
    import jax

    from fm_jax.weights.load import load
    from fm_jax.weights.rules import Piece, nested

    template = nested({"a": jax.ShapeDtypeStruct((2,), np.float32)})
    rules = Rules(template, (Piece("a", "x.weight_scale", "n -> n"),))
    assert load({"x.weight_scale": np.ones(2, np.float32)}, rules)["a"].shape == (2,)
