"""Files of safetensors, written tensor by tensor, as a whole or not at all."""

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fm_jax.checks import check_number, shown
from fm_jax.weights.files import check_path, replace_files
from fm_jax.weights.formats import WeightsError
from fm_jax.weights.safetensors import INDEX, MAX_HEADER, NAMES, SHARD, PathLike


@dataclass(frozen=True)
class Lazy:
    """A tensor that is made when it is written.

    Attributes:
        shape: of the array that `make` returns.
        dtype: of it.
        make: returns the array.
    """

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]


def write_tensors(
    path: PathLike,
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: float | None = None,
) -> list[Path]:
    """Writes a file of safetensors, or several with an index, tensor by tensor.

    The old files stay as they are until the new ones are complete, and what was not completed is removed. Of processes
    that write the same file at once, the last one to finish has written it.

    Args:
        path: ends with `.safetensors`. Its folder is made if need be.
        tensors: arrays or `Lazy` by key.
        metadata: strings by name; PyTorch's readers want `{"format": "pt"}`.
        max_shard_bytes: when the tensors have more bytes than this, they go to `<name>-00001-of-00003.safetensors` and
            so on, with `<name>.safetensors.index.json`; a tensor is never cut. `None` writes one file.

    Returns:
        The files that were written.

    Raises:
        WeightsError: for a name, a key, a dtype or a tensor that cannot be written.
        OSError: if the disk is full or cannot be written to; nothing is left behind.
    """
    path = check_path("path", path)
    if not isinstance(tensors, Mapping):
        raise ValueError(f"tensors must be arrays by key, got {shown(tensors)}.")
    contents = contents_of(path, tensors, metadata, max_shard_bytes)
    replace_files(contents, old_files(path))
    return list(contents)


def contents_of(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None, max_shard_bytes: float | None
) -> dict[Path, Callable[[Any], Any]]:
    """For each file of `write_tensors` what writes to it."""
    if path.suffix != ".safetensors":
        raise WeightsError(f"path must end with .safetensors, got {path}.")
    if max_shard_bytes is not None:
        check_number("max_shard_bytes", max_shard_bytes, "(0, inf)")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise WeightsError(f"metadata must be strings by name, got {shown(metadata)}.")
    metadata = dict(metadata or {})
    if not all(isinstance(each, str) for pair in metadata.items() for each in pair):
        raise WeightsError(f"metadata must be strings by name, got {shown(metadata)}.")
    sizes = {key: _size_of(key, each) for key, each in tensors.items()}
    shards = _cut(sizes, math.inf if max_shard_bytes is None else max_shard_bytes)
    stem = path.name.removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    contents: dict[Path, Callable[[Any], Any]] = {}
    for name, keys in zip([path.name] if len(shards) == 1 else names, shards, strict=True):
        part = {key: tensors[key] for key in keys}
        contents[path.with_name(name)] = functools.partial(_write, tensors=part, metadata=metadata)
    if len(shards) > 1:
        places = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))}
        contents[path.with_name(stem + INDEX)] = lambda file: file.write(json.dumps(index, indent=2).encode() + b"\n")
    return contents


def _size_of(key: str, tensor: Any) -> int:
    if not isinstance(key, str) or key == "__metadata__":
        raise WeightsError(f"A key must be a string, other than '__metadata__', got {shown(key)}.")
    if not hasattr(tensor, "shape") or np.dtype(getattr(tensor, "dtype", object)) not in NAMES:
        raise WeightsError(f"{key!r} must be an array of {', '.join(NAMES.values())}, got {shown(tensor)}.")
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def _cut(sizes: Mapping[str, int], most: float) -> list[list[str]]:
    """The keys of each shard, in their order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def _write(file: Any, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    # The widest first: whatever the length of a tensor, all are aligned.
    ordered = sorted(tensors.items(), key=lambda item: -np.dtype(item[1].dtype).itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, tensor in ordered:
        start, end = end, end + _size_of(key, tensor)
        shape = [int(each) for each in tensor.shape]
        header[key] = {"dtype": NAMES[np.dtype(tensor.dtype)], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise WeightsError(f"The names of {len(ordered)} tensors have {len(text)} bytes, more than {MAX_HEADER}.")
    file.write(len(text).to_bytes(8, "little") + text)
    for key, tensor in ordered:
        array = np.asarray(tensor.make() if isinstance(tensor, Lazy) else tensor)
        if array.shape != tuple(tensor.shape) or array.dtype != np.dtype(tensor.dtype):
            raise WeightsError(f"{key!r} was to be {tensor.dtype} {tuple(tensor.shape)}, and is {shown(array)}.")
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def old_files(path: PathLike) -> Callable[[], list[Path]]:
    """A function that finds what a reader might mistake for the file at `path`: index, file, then shards."""
    folder, stem = Path(path).parent, Path(path).stem

    def find() -> list[Path]:
        shard = re.compile(re.escape(stem) + SHARD.pattern)
        shards = sorted(each for each in folder.iterdir() if shard.match(each.name))
        return [folder / (stem + INDEX), folder / (stem + ".safetensors"), *shards]

    return find
