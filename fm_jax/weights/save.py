"""Parameters as the files of a published layout, which diffusers and transformers load: the inverse of `load`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.checks import shown
from fm_jax.types import Params
from fm_jax.weights.files import check_path, replace_files
from fm_jax.weights.formats import WeightsError
from fm_jax.weights.keys import is_float, listed
from fm_jax.weights.load import common, put
from fm_jax.weights.rules import Piece, Rules, path_of
from fm_jax.weights.safetensors import PathLike
from fm_jax.weights.write import Lazy, contents_of, old_files

METADATA = {"format": "pt"}
"""What diffusers and transformers want to read in a file."""


def save(
    path: PathLike,
    params: Params,
    rules: Rules,
    *,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: float = 5e9,
    dtype: Any = None,
) -> list[Path]:
    """Writes parameters in the layout of the rules; `load` returns the same ones, bit for bit.

    Tensors are made and written one at a time, from arrays that may be cut over the devices of this process. The
    layout's copies and tables are written too. Files take their names when all are complete; until then the old ones
    stay, and of what was not completed nothing is left.

    Args:
        path: a folder, made if need be, in which the file is called as diffusers (`diffusion_pytorch_model`) or, where
            `config` names no class of diffusers, transformers (`model`) call it; or a file, `*.safetensors`.
        params: as of `rules.template`.
        rules: of the network, in the layout to write.
        config: of the network in that layout, as `<family>_config(module)` returns it; written as `config.json`.
        max_shard_bytes: beyond it the tensors go to several files with an index.
        dtype: of the floating-point parameters; by default those that they have. Tables keep their own.

    Returns:
        The files that were written.

    Raises:
        WeightsError: if `params` are not those of the network, or `dtype` has not one of their numbers.
        ValueError: if another argument is wrong.
        OSError: as the system says, such as that the disk is full.
    """
    path = check_path("path", path)
    if not isinstance(rules, Rules):
        raise ValueError(f"rules must be Rules, such as dit_rules(module), got {shown(rules)}.")
    if dtype is not None and not is_float(dtype):
        raise ValueError(f"dtype must be a floating-point dtype or None, got {shown(dtype)}.")
    if config is not None and not isinstance(config, Mapping):
        raise ValueError(f"config must be a dict, such as dit_config(module) returns, got {shown(config)}.")
    leaves = _leaves(params, rules)
    tensors = {key: _tensor(key, shape, rules, leaves, dtype) for key, shape in rules.shapes.items()}
    for key, function in rules.tables.items():
        table = np.asarray(function())
        tensors[key] = Lazy(table.shape, table.dtype, function)
    if path.suffix != ".safetensors":
        diffusers = config is not None and "_class_name" in config
        path = path / f"{'diffusion_pytorch_model' if diffusers else 'model'}.safetensors"
    contents = contents_of(path, tensors, METADATA, max_shard_bytes)
    if config is not None:
        text = _json(config)
        contents = {path.with_name("config.json"): lambda file: file.write(text)} | contents
    replace_files(contents, old_files(path))
    return list(contents)


def _json(config: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(dict(config), indent=2, sort_keys=True).encode() + b"\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"config must be what JSON can hold: {error}.") from None


def _leaves(params: Params, rules: Rules) -> dict[str, Any]:
    """The leaves by path, which are those of the network."""
    if not isinstance(params, Mapping):
        raise WeightsError(f"params must be nested dicts of arrays, as load returns, got {shown(params)}.")
    leaves = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    missing, unknown = rules.leaves.keys() - leaves.keys(), leaves.keys() - rules.leaves.keys()
    wrong = [
        f"{path} is {list(np.shape(leaves[path]))}, must be {list(leaf.shape)}"
        for path, leaf in rules.leaves.items()
        if path in leaves and np.shape(leaves[path]) != leaf.shape
    ]
    if missing or unknown or wrong:
        found = [f"{what} {listed(names)}" for what, names in (("lack", missing), ("have besides", unknown)) if names]
        raise WeightsError(f"params are not those of the network: {'; '.join([*found, *wrong])}.")
    for path, leaf in leaves.items():
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if is_float(rules.leaves[path].dtype) and not is_float(dtype):
            raise WeightsError(f"{path!r} of params must be of a floating-point dtype, got {shown(leaf)}.")
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise WeightsError(
                f"{path!r} is cut over several processes, and none has the whole of it: replicate it, or gather it "
                "with jax.experimental.multihost_utils.process_allgather."
            )
    return leaves


def _tensor(key: str, shape: tuple[int, ...], rules: Rules, leaves: Mapping[str, Any], dtype: Any) -> Lazy:
    pieces = rules.by_key[rules.copies.get(key, key)]
    dtypes = [np.dtype(leaves[piece.path].dtype) for piece in pieces]
    wanted = common(dtypes) if dtype is None or not all(map(is_float, dtypes)) else np.dtype(dtype)

    def make() -> np.ndarray:
        tensor = np.empty(shape, wanted)
        for piece in pieces:
            rows = tensor if piece.rows is None else tensor[slice(*piece.rows)]
            put(rows, _theirs(piece, leaves[piece.path]), repr(piece.path))
        return tensor

    return Lazy(shape, wanted, make)


def _theirs(piece: Piece, leaf: Any) -> np.ndarray:
    """What a piece takes of a leaf, on the host; of a leaf on a device no more than that is copied."""
    if isinstance(leaf, jax.Array):
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        if len(leaf.devices()) > 1 or next(iter(leaf.devices())).platform != "cpu":
            # An array remembers its copy on the host: one that is dropped at once does not fill it.
            part = jnp.copy(leaf) if piece.layer is None and piece.part is None else leaf[piece.index]
            return replace(piece, layer=None, part=None).to_theirs(np.asarray(part))
    return piece.to_theirs(np.asarray(leaf))
