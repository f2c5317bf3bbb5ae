"""Tensors of safetensors files, in one or in many, mapped one by one rather than read."""

import math
import mmap
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from fm_jax.checks import shown
from fm_jax.weights.files import check_path
from fm_jax.weights.formats import WeightsError, is_safetensors, parse_json, read_ends, read_json, what_it_is

PathLike: TypeAlias = str | os.PathLike[str]

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(each)
    for name, each in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""Bytes of the largest header that is read, as in the safetensors library."""
INDEX = ".safetensors.index.json"
USUAL = ("diffusion_pytorch_model", "model")
"""The names, before their endings, that diffusers and transformers give to the weights in a folder."""
SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
"""What the name of one of several files ends with."""
_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
_NOT_READ = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".h5", ".msgpack")


class _File:
    """An open file: what takes its name later is another one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise WeightsError(f"{path} is not a file that can be mapped.")
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError:
            raise WeightsError(f"{path} is not there.") from None

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def map(self, start: int, size: int) -> np.ndarray:
        """The bytes of a part; the map ends with the last view of it."""
        if size == 0:
            return np.empty(0, np.uint8)
        skipped = start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self.file.fileno(), skipped + size, access=mmap.ACCESS_READ, offset=start - skipped)
        return np.frombuffer(mapped, np.uint8, size, skipped)


@dataclass(frozen=True)
class _Entry:
    file: _File
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by key, as `open_tensors` returns them. One is mapped when asked for, and read from disk when used.

    Attributes:
        metadata: what the files say of themselves, strings by name.
        where: words for the whole, for refusals: the file or the folder.
    """

    def __init__(self, entries: Mapping[str, _Entry], metadata: Mapping[str, str], where: str):
        self._entries = dict(entries)
        self.metadata = dict(metadata)
        self.where = where

    def __getitem__(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        return entry.file.map(entry.start, entry.size).view(entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Tensors({len(self)} of {self.where})"

    def file_of(self, key: str) -> Path:
        """The file that holds a tensor."""
        return self._entries[key].file.path


def open_tensors(path: PathLike | Sequence[PathLike]) -> Tensors:
    """The tensors of a file, of several, or of a folder, without reading more than the headers.

    Every header is checked before: its length, names, dtypes and shapes, and that the tensors tile the rest of the
    file. bfloat16 and float8 are those of `ml_dtypes`.

    Args:
        path: a file of safetensors under any name; an index, `*.safetensors.index.json`; a list of files, none with a
            key of another; or a folder that holds one file or index. Of several the one called
            `diffusion_pytorch_model` or `model` is taken.

    Returns:
        A mapping from key to array, read-only: a view of the file, which is kept open.

    Raises:
        WeightsError: names the file and the fault: one that is no safetensors, among them pickles, of which nothing is
            unpickled; that is cut off or malformed; a shard that is missing or outside of the folder; a key that comes
            twice or that its shard lacks.
        OSError: if a file cannot be read.

    References:
        https://huggingface.co/docs/safetensors, "Format".
    """
    if isinstance(path, list | tuple):
        if not path:
            raise WeightsError("path must be a file, a folder or a list of files, got an empty list.")
        files = [check_path("Each of several paths", each) for each in path]
        return _joined(dict.fromkeys(files), f"{files[0]} and {len(files) - 1} more")
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise WeightsError(f"path must be a file, a folder or a list of files, got {shown(path)}.")
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.name.endswith(".json") and path.is_file():
        return _of_index(path)
    return _joined({path: None}, str(path))


def _in_folder(folder: Path) -> Path:
    """The file or index of a folder."""
    names = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    found = [
        name for name in names if _INDEX.search(name) or (name.endswith(".safetensors") and not SHARD.search(name))
    ]
    usual = [name for name in found if name in {f"{stem}{end}" for stem in USUAL for end in (".safetensors", INDEX)}]
    taken = usual or found
    if len(taken) > 1:
        raise WeightsError(f"{folder} holds {', '.join(taken)}: give one of them.")
    if taken:
        if len(found) > 1:
            warnings.warn(f"Of {', '.join(found)} in {folder}, {taken[0]} is taken.", stacklevel=3)
        elif not usual and any(re.match(rf"{stem}\.(safetensors\.index\.)?\w+\.", taken[0]) for stem in USUAL):
            warnings.warn(f"{folder} holds a variant alone, {taken[0]}, which is taken.", stacklevel=3)
        return folder / taken[0]
    if shards := [name for name in names if SHARD.search(name)]:
        raise WeightsError(f"{folder} holds shards, {shards[0]} and others, without their index: give a list of files.")
    if others := [name for name in names if name.endswith(_NOT_READ)]:
        head, tail = read_ends(folder / others[0])
        raise WeightsError(f"{folder} holds no safetensors. {what_it_is(folder / others[0], head, tail)}")
    raise WeightsError(f"{folder} holds no safetensors: it has {', '.join(names[:10]) or 'nothing in it'}.")


def _of_index(path: Path) -> Tensors:
    held = _File(path)
    index = read_json(path, "index of shards")
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(each, str) for each in places.values()) or not places:
        raise WeightsError(f"{path} is no index of shards: it has no 'weight_map' of keys to files.")
    shards: dict[Path, list[str]] = {}
    for name in dict.fromkeys(places.values()):
        shards[_inside(path, name)] = [key for key, place in places.items() if place == name]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise WeightsError(f"{path} names shards that are not there: {', '.join(missing)}.")
    tensors = _joined(shards, str(path))
    # Whoever writes the shards anew removes the index before: if it is there still, all of them belong to it.
    try:
        is_same = os.path.samestat(os.fstat(held.file.fileno()), path.stat())
    except FileNotFoundError:
        is_same = False
    if not is_same:
        raise WeightsError(f"{path} was written anew while it was opened: open it again.")
    return tensors


def _inside(index: Path, name: str) -> Path:
    """The file that an index names, if it is in the folder of the index."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts or "\\" in name or "\0" in name or not relative.parts:
        raise WeightsError(f"{index} names a shard outside of its folder, {name!r}.")
    folder, path = index.parent, index.parent / relative
    roots = [folder.resolve()]
    for above in folder.absolute().parents:
        if above.name == "snapshots":  # the cache of the Hugging Face Hub: links to the files of the same repository
            roots.append((above.parent / "blobs").resolve())
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise WeightsError(f"{index} names a shard outside of its folder: {name} is a link to {path.resolve()}.")
    return path


def _joined(files: Mapping[Path, Sequence[str] | None], where: str) -> Tensors:
    """The tensors of all files, each with the keys that it must have."""
    entries: dict[str, _Entry] = {}
    metadata: dict[str, str] = {}
    for path, keys in files.items():
        own, said = _read_header(path)
        lacking = sorted(set(keys or ()) - own.keys())
        if lacking:
            raise WeightsError(f"{path} lacks what the index says that it holds: {', '.join(lacking)}.")
        for key in own.keys() & entries.keys():
            raise WeightsError(f"{key!r} is in two files, {entries[key].file.path} and {path}.")
        entries |= own
        metadata |= said
    return Tensors(entries, metadata, where)


def _read_header(path: Path) -> tuple[dict[str, _Entry], dict[str, str]]:
    file = _File(path)
    size = os.fstat(file.file.fileno()).st_size
    head = file.file.read(9)
    length = int.from_bytes(head[:8], "little")
    if not is_safetensors(head):
        raise WeightsError(what_it_is(path, *read_ends(path)))
    if length > MAX_HEADER:
        raise WeightsError(f"{path} says that its header has {length} bytes; more than {MAX_HEADER} are not read.")
    if 8 + length > size:
        raise WeightsError(f"{path} is cut off: its header has {length} bytes, and the file {size}.")
    try:
        header = parse_json(file.map(8, length).tobytes())
    except ValueError as error:
        raise WeightsError(f"The header of {path} is malformed: {error}.") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
        raise WeightsError(f"The header of {path} is malformed: '__metadata__' must be strings by name.")
    entries = {key: _entry(file, key, said, 8 + length) for key, said in header.items()}
    _check_tiling(path, entries, 8 + length, size)
    return entries, metadata


def _entry(file: _File, key: str, said: Any, data: int) -> _Entry:
    bad = f"The header of {file.path} is malformed: {key!r} "
    if not isinstance(said, dict) or said.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{bad}must have dtype, shape and data_offsets, got {shown(said)}.")
    shape, offsets = said["shape"], said["data_offsets"]
    if not isinstance(said["dtype"], str) or said["dtype"] not in DTYPES:
        raise WeightsError(f"{key!r} of {file.path} is {shown(said['dtype'])}; what is read is {', '.join(DTYPES)}.")
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or any(type(each) is not int or each < 0 for each in numbers):
            raise WeightsError(f"{bad}has the {name} {shown(numbers)}, which are no lengths.")
    if len(shape) > 32:
        raise WeightsError(f"{bad}has {len(shape)} axes; NumPy takes 32.")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError(f"{bad}has data_offsets {shown(offsets)}: they must be a beginning and an end.")
    dtype = DTYPES[said["dtype"]]
    if math.prod(each for each in shape if each) * dtype.itemsize >= 2**63:
        raise WeightsError(f"{bad}has the shape {shown(shape)}, which is too large.")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise WeightsError(
            f"{bad}has {offsets[1] - offsets[0]} bytes, and {size} in the shape {shape} of {said['dtype']}."
        )
    return _Entry(file, dtype, tuple(shape), data + offsets[0], size)


def _check_tiling(path: Path, entries: Mapping[str, _Entry], data: int, size: int) -> None:
    end, before = data, "the header"
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start < end:
            raise WeightsError(f"The header of {path} is malformed: {before!r} and {key!r} overlap.")
        if entry.start > end:
            raise WeightsError(
                f"The header of {path} is malformed: {entry.start - end} bytes before {key!r} are no one's."
            )
        end, before = entry.start + entry.size, key
    if end > size:
        raise WeightsError(f"{path} is cut off: its tensors end at byte {end}, and the file at {size}.")
    if end < size:
        raise WeightsError(f"{path} is malformed: {size - end} bytes behind its last tensor are no one's.")
