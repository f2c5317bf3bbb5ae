"""What a file is, by its content: one that is not safetensors is told what it is. Nothing is unpacked or unpickled."""

import json
import re
from pathlib import Path
from typing import Any

LOOK = 2**16
"""Bytes at the beginning and at the end of a file that are looked at."""
CONVERT = "python -m fm_jax.weights.convert"
_AGAIN = "download the file itself"
_UNPACK = "unpack it, and give what was in it"
_OTHERS = (
    (b"GGUF", "is quantised, in the format GGUF: give the safetensors of the same model, in bfloat16 or float32"),
    (b"version https://git-lfs", f"is a pointer of Git LFS, not what it points to: git lfs pull, or {_AGAIN}"),
    (b"/annex/objects/", f"is a pointer of git-annex, not what it points to: git annex get, or {_AGAIN}"),
    (b"\x1f\x8b", f"is compressed with gzip: {_UNPACK}"),
    (b"BZh", f"is compressed with bzip2: {_UNPACK}"),
    (b"\xfd7zXZ", f"is compressed with xz: {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"is compressed with zstd: {_UNPACK}"),
    (b"\x89HDF", "is HDF5, as Keras and MATLAB write: it is not read here"),
    (b"\x93NUMPY", "is one array of NumPy, as np.load reads: it has no names"),
    (b"\x1f\x9d", f"is compressed: {_UNPACK}"),
)
_NO_PICKLE_READ = "is a pickle, which can run any code when it is read, and is refused"
_SCALES = re.compile(
    r"\.(weight_scale|weight_scale_inv|scale_weight|scale_input|input_scale|absmax|quant_map|nested_absmax|"
    r"nested_quant_map|quant_state\.\w+|SCB|weight_format|qweight|qzeros|scales|g_idx|comfy_quant)$"
    r"|(^|\.)scaled_fp8$"
)


class WeightsError(ValueError):
    """A file of weights cannot be read, or does not fit the network; the message names the file and the fault."""


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors do: the length of a header, below 4 GB, and a JSON object."""
    return len(head) > 8 and head[4:9] == b"\0\0\0\0{"


def read_ends(path: Path) -> tuple[bytes, bytes]:
    """The first and the last bytes of a file."""
    with open(path, "rb") as file:
        head = file.read(LOOK)
        size = file.seek(0, 2)
        file.seek(max(0, size - LOOK))
        return head, file.read(LOOK)


def what_it_is(path: Path, head: bytes, tail: bytes) -> str:
    """A sentence on a file that is not safetensors: what it is instead, and what to do.

    Args:
        path: of the file.
        head: its first bytes.
        tail: its last ones.
    """
    if not head:
        return f"{path} is empty: {_AGAIN} again."
    convert = f"{CONVERT} {path} {path.with_suffix('.safetensors').name} makes safetensors of it"
    for magic, what in _OTHERS:
        if head.startswith(magic):
            return f"{path} {what}."
    if head.startswith(b"PK"):
        if b".pkl" in head or b".pkl" in tail:
            return f"{path} {_NO_PICKLE_READ}: {convert}."
        numpy = ", of NumPy's arrays: their names say nothing here" if b".npy" in head else ""
        return f"{path} is a zip archive{numpy}; what is read is safetensors."
    if head[257:262] == b"ustar":
        return (
            f"{path} is a tar archive, PyTorch's oldest form of a pickle, which is not read: save it anew with "
            f"PyTorch, and {CONVERT} makes safetensors of that."
        )
    if is_embedded(head):
        return f"{path} {_NO_PICKLE_READ}; {EMBEDDED}"
    if (head[0] == 0x80 and head[1:2] <= b"\x05") or (head[:1] in b"(c}])" and tail.endswith(b".")):
        return f"{path} {_NO_PICKLE_READ}: {convert}."
    text = head[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path} is a web page, most likely the error of a download: {_AGAIN} again."
    if text.startswith(b"{"):
        return f"{path} is JSON; weights are in *.safetensors, or named by a *.safetensors.index.json."
    if head[0] == 0x08 and head[2:3] in b"\x12\x1a\x22\x3a\x42":
        return f"{path} is a graph of ONNX: give the weights of the model that it was made from."
    if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):
        return f"{path} is msgpack, as Flax has written parameters; flax.serialization.msgpack_restore reads it."
    return f"{path} is not safetensors: it does not begin with the length of a header and a JSON object."


EMBEDDED = (
    "it holds source code, as those of EDM and EDM2 do: load it with NVIDIA's own code, where you trust it, and save "
    "the state_dict of its 'ema' with torch.save."
)


def is_embedded(head: bytes) -> bool:
    """Whether a pickle begins as those that hold the source code of their classes."""
    return b"torch_utils.persistence" in head or b"_reconstruct_persistent_obj" in head


def scales_of_quantised(keys: Any) -> list[str]:
    """The keys that stand for scales, codes and tables of quantised tensors: fp8 with scales, NF4, GPTQ and others."""
    return [key for key in keys if _SCALES.search(key)]


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object of a file.

    Args:
        path: of the file.
        what: says what the file is, for refusals.

    Raises:
        WeightsError: if it is none, if a name comes twice, or if it is a pointer or a page that took its place.
        OSError: if it cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise WeightsError(f"{path} is not there.") from None
    try:
        found = parse_json(content)
    except ValueError as error:
        other = next((what for magic, what in _OTHERS if content.startswith(magic)), None)
        raise WeightsError(f"{path} {other}." if other else f"{path} is no {what}: {error}.") from None
    if not isinstance(found, dict):
        raise WeightsError(f"{path} is no {what}: it must be a JSON object, got a {type(found).__name__}.")
    return found


def parse_json(content: bytes) -> Any:
    """JSON in which no object has the same name twice.

    Raises:
        ValueError: if it is none; says why.
    """
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_without_repeats)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at character {error.pos})") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is in it twice")
        found[name] = value
    return found
