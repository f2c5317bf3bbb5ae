"""Parameters from the tensors of published files: leaf by leaf, onto devices, with nothing left out unsaid."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from fm_jax.checks import check_array, check_function, shown
from fm_jax.types import Params
from fm_jax.weights.formats import WeightsError
from fm_jax.weights.keys import check_keys, is_float, known_dtype, listed, names_of, where
from fm_jax.weights.rules import Piece, Rules, nested, path_of
from fm_jax.weights.safetensors import NAMES, PathLike, Tensors, open_tensors

_CHUNK = 2**22  # elements that are compared at a time
_TABLE = 1e-4  # of a table's largest number: how far a copy in float32 may be from ours


def load(
    path: PathLike | Sequence[PathLike] | Mapping[str, Any],
    rules: Rules,
    *,
    dtype: Any = None,
    sharding: Any = None,
    prefix: str | None = None,
    average: str | None = None,
) -> Params:
    """Parameters of a network from files of safetensors.

    One leaf after another is filled from maps of its tensors, layer by layer where it is stacked, cast and put on its
    devices. Beside the parameters the host holds twice the largest leaf at most; where each device has a part of a
    leaf, a process reads the parts of its own.

    What a file has besides is accounted for: a key that nobody asks for is an error, copies must be equal to the bit
    and tables equal to what the network computes. Prefixes such as `module.`, and `PREFIXES` of files that hold several
    networks, are found by the keys behind them. A warning says which prefix, which average and whose other keys there
    were.

    Args:
        path: what `open_tensors` takes; or tensors by key.
        rules: of the network, in the layout of the file.
        dtype: of the floating-point leaves; by default that of the file, in which tensors of one leaf agree on the
            wider one. Without `jax_enable_x64`, 64 bits become 32.
        sharding: where the leaves go: one `jax.sharding.Sharding` or device for all, a pytree of them as of
            `rules.template`, or a function that returns one for the path of a leaf, "a/b/kernel". By default JAX's
            default device.
        prefix: of the keys of this network; others in the file are left alone.
        average: "ema" (keys `ema.*`), "model_ema" (`model_ema.*`, also without dots, as latent diffusion has them) or
            "model"; by default the first of these that is there.

    Returns:
        Nested dicts of arrays, as of `rules.template`.

    Raises:
        WeightsError: names the file and the fault: all keys that are missing, unused or of another shape; a copy or a
            table that differs; a number too large for `dtype`; quantised tensors; what `open_tensors` refuses.
        ValueError: if an argument is wrong, or `rules` do not tile the network.
    """
    if not isinstance(rules, Rules):
        raise ValueError(f"rules must be Rules, such as dit_rules(module), got {shown(rules)}.")
    if dtype is not None and not is_float(dtype):
        raise ValueError(f"dtype must be a floating-point dtype or None, got {shown(dtype)}.")
    shapes = rules.shapes
    places = _shardings(rules, sharding)
    tensors = _arrays(path) if isinstance(path, Mapping) else open_tensors(path)
    names = names_of(tensors, rules, prefix, average)
    sources = check_keys(tensors, rules, shapes, names)
    _check_copies(tensors, rules, sources)
    _check_tables(tensors, rules, names)
    leaves = {}
    for leaf in rules.by_path:
        leaves[leaf] = _load_leaf(leaf, rules, tensors, sources, dtype, places[leaf])
    return nested(leaves)


def _arrays(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in () if isinstance(tensors, Tensors) else tensors:
        check_array(repr(key), tensors[key])
        if known_dtype(tensors[key].dtype) not in NAMES:
            raise WeightsError(f"{key!r} must be an array of {', '.join(NAMES.values())}, got {shown(tensors[key])}.")
    return tensors


# Where the leaves go.


def _shardings(rules: Rules, sharding: Any) -> dict[str, Sharding | None]:
    """The sharding of each leaf, which can be cut so."""
    if sharding is None or isinstance(sharding, Sharding | jax.Device):
        found = dict.fromkeys(rules.leaves, sharding)
    elif isinstance(sharding, Mapping):
        every = jax.tree_util.tree_leaves_with_path(sharding, is_leaf=lambda each: each is None)
        given = {path_of(path): each for path, each in every}
        if given.keys() != rules.leaves.keys():
            lacking, unknown = rules.leaves.keys() - given.keys(), given.keys() - rules.leaves.keys()
            wrong = f"it lacks {listed(lacking)}, and has {listed(unknown)}"
            raise ValueError(f"sharding must have the leaves of the network: {wrong}.")
        found = given
    else:
        wanted = "a Sharding, a pytree of them or a function of the path of a leaf"
        check_function("sharding", sharding, wanted, 1)
        found = {path: sharding(path) for path in rules.leaves}
    places = {
        path: SingleDeviceSharding(each) if isinstance(each, jax.Device) else each for path, each in found.items()
    }
    for path, each in places.items():
        if each is None:
            continue
        if not isinstance(each, Sharding):
            raise ValueError(f"The sharding of {path!r} must be a jax.sharding.Sharding, got {shown(each)}.")
        try:
            each.shard_shape(rules.leaves[path].shape)
        except ValueError as error:
            raise ValueError(f"{path!r} of shape {rules.leaves[path].shape} cannot be cut so: {error}") from None
    return places


# What a file repeats, and what the network computes.


def _check_copies(tensors: Mapping[str, Any], rules: Rules, sources: Mapping[str, str]) -> None:
    for key, original in rules.copies.items():
        if key in sources and sources[key] != sources[original]:
            copy, first = tensors[sources[key]], tensors[sources[original]]
            if copy.dtype != first.dtype or not _same_bits(copy, first):
                names = f"{sources[key]!r} of {where(tensors)} must be a copy of {sources[original]!r}"
                raise WeightsError(f"{names}, and differs from it.")


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = (np.ascontiguousarray(each).reshape(-1).view(np.uint8) for each in (a, b))
    return all(np.array_equal(a[i : i + _CHUNK], b[i : i + _CHUNK]) for i in range(0, a.size, _CHUNK))


def _check_tables(tensors: Mapping[str, Any], rules: Rules, names: Mapping[str, str]) -> None:
    for name, key in names.items():
        if key not in rules.tables:
            continue
        ours, theirs = np.asarray(rules.tables[key]()), np.asarray(tensors[name])
        if ours.shape != theirs.shape:
            raise WeightsError(
                f"{name!r} of {where(tensors)} is a table of shape {list(theirs.shape)}; the network computes one of "
                f"{list(ours.shape)}."
            )
        rounding = 0.0 if not is_float(theirs.dtype) else max(_TABLE, float(jnp.finfo(theirs.dtype).eps))
        far, largest = _largest_distance(ours, theirs)
        if not far <= rounding * largest:
            raise WeightsError(
                f"{name!r} of {where(tensors)} is a table that the network computes, and is {far:.2g} from what it "
                f"computes, of which the largest number is {largest:.2g}."
            )


def _largest_distance(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The largest distance of two numbers, and our largest number; NaN passes on."""
    ours, theirs = ours.reshape(-1), theirs.reshape(-1)
    far = largest = 0.0
    for i in range(0, ours.size, _CHUNK):
        a, b = (each[i : i + _CHUNK].astype(np.float64) for each in (ours, theirs))
        far, largest = float(np.maximum(far, np.abs(a - b).max())), max(largest, float(np.abs(a).max()))
    return far, largest


# One leaf.


def _load_leaf(
    path: str, rules: Rules, tensors: Mapping[str, Any], sources: Mapping[str, str], dtype: Any, place: Sharding | None
) -> jax.Array:
    shape, pieces = rules.leaves[path].shape, rules.by_path[path]
    dtypes = [tensors[sources[piece.key]].dtype for piece in pieces]
    cast = dtype is not None and is_float(rules.leaves[path].dtype)
    wanted = np.dtype(jax.dtypes.canonicalize_dtype(dtype if cast else common(dtypes)))

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [each.indices(size)[:2] for each, size in zip(index, shape, strict=True)]
        block = np.empty([stop - start for start, stop in bounds], wanted)
        for piece in pieces:
            _fill(block, bounds, piece, shape, tensors, sources[piece.key])
        return block

    if place is None:
        leaf = jax.device_put(part((slice(None),) * len(shape)))
    else:
        parts: dict[str, np.ndarray] = {}

        def once(index: tuple[slice, ...] | None) -> np.ndarray:
            index = (slice(None),) * len(shape) if index is None else index
            name = str([each.indices(size) for each, size in zip(index, shape, strict=True)])
            if name not in parts:
                parts[name] = part(index)
            return parts[name]

        leaf = jax.make_array_from_callback(shape, place, once, dtype=wanted)
    return leaf.block_until_ready()


def _fill(
    block: np.ndarray,
    bounds: list[tuple[int, int]],
    piece: Piece,
    shape: tuple[int, ...],
    tensors: Mapping[str, Any],
    name: str,
) -> None:
    """Writes what a piece gives to a part of a leaf; the rest of the piece is not read."""
    begins = [0] * len(shape)
    ends = list(shape)
    if piece.layer is not None:
        begins[0], ends[0] = piece.layer, piece.layer + 1
    if piece.part is not None:
        begins[-1], ends[-1] = piece.part
    overlap = [(max(a, c), min(b, d)) for a, b, (c, d) in zip(begins, ends, bounds, strict=True)]
    if any(start >= stop for start, stop in overlap):
        return
    value = piece.to_ours(np.asarray(tensors[name]))
    if piece.layer is not None:
        value = value[None]
    put(
        _at(block, overlap, [start for start, _ in bounds]),
        _at(value, overlap, begins),
        f"{name!r} of {where(tensors)}",
    )


def _at(x: np.ndarray, places: list[tuple[int, int]], begins: list[int]) -> np.ndarray:
    """The view of these places of a leaf, of an array that begins elsewhere in it."""
    index: list[Any] = [slice(a - begin, b - begin) for (a, b), begin in zip(places, begins, strict=True)]
    return x[(*index, ...)]


def put(target: np.ndarray, value: np.ndarray, name: str) -> None:
    """Writes numbers into an array of another dtype, and refuses those that it has not.

    Raises:
        WeightsError: names the number, and what `name` says they are.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        target[...] = value
    if is_float(target.dtype) and _largest(target.dtype) < _largest(value.dtype):
        infinite = ~np.isfinite(target)
        lost = infinite & np.isfinite(value) if infinite.any() else infinite
        if lost.any():
            raise WeightsError(
                f"{name} holds {float(value[lost][0]):.3g}, which {target.dtype} has not: its largest number is "
                f"{_largest(target.dtype):.3g}. Take bfloat16."
            )
    elif not is_float(target.dtype) and target.dtype != value.dtype and not np.array_equal(target, value):
        raise WeightsError(f"{name} holds integers that {target.dtype} has not.")


def _largest(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max) if is_float(dtype) else 0.0


def common(dtypes: list[np.dtype]) -> np.dtype:
    """The dtype that holds all of them."""
    first, *rest = dict.fromkeys(dtypes)
    for each in rest:
        try:
            first = np.dtype(jnp.promote_types(first, each))
        except Exception:  # float8 has no promotion
            first = np.dtype(np.float32)
    return first
