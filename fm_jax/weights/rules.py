"""Rules between the parameters of a network and the tensors of a published file: a bijection, piece by piece.

A `Piece` says that a part of one leaf of ours is a part of one tensor of theirs with its axes in another order, in a
notation that reads in both directions: `"(h d) i -> i h d"` is a projection to `h` heads, whose export is
`"i h d -> (h d) i"`. Stacked blocks, fused projections and halves that a format swaps are pieces of a leaf or a tensor.
Since pieces have to tile every leaf and every tensor, nothing can be forgotten and nothing is written twice.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fm_jax.types import Params

Shape = tuple[int, ...]


def _groups(side: str) -> list[list[str]]:
    """`"(h d) i"` as `[["h", "d"], ["i"]]`."""
    return [found.strip("()").split() for found in re.findall(r"\([^)]*\)|\S+", side)]


def _sizes(groups: list[list[str]], shape: Shape, known: dict[str, int], pattern: str) -> dict[str, int]:
    """The length of every named axis of an array of this shape."""
    if len(groups) != len(shape):
        raise ValueError(f"{pattern!r} takes {len(groups)} axes, got shape {shape}.")
    sizes = {"1": 1} | known
    for names, size in zip(groups, shape, strict=True):
        unknown = [name for name in names if name not in sizes]
        rest = math.prod(sizes[name] for name in names if name in sizes)
        if len(unknown) > 1 or size % rest or (not unknown and size != rest):
            raise ValueError(f"{pattern!r} with {known} does not fit shape {shape}.")
        if unknown:
            sizes[unknown[0]] = size // rest
    return sizes


def rearrange(x: Any, pattern: str, **known: int) -> Any:
    """Reorders, splits and joins the axes of an array.

    Notebooks: (12.10).

    Args:
        x: array.
        pattern: `"old -> new"`, axes by name, those that are one axis of the array in parentheses, `1` for an axis of
            length one.
        **known: lengths that `x` leaves open: all but one of each group of the left side.

    Returns:
        A view where NumPy can give one.

    Raises:
        ValueError: if the pattern does not fit the shape.

    Example:
        >>> rearrange(np.zeros((6, 5)), "(h d) i -> i h d", h=2).shape
        (5, 2, 3)
    """
    left, right = (_groups(side) for side in pattern.split("->"))
    sizes = _sizes(left, tuple(x.shape), known, pattern)
    axes = [name for names in left for name in names]
    order = [axes.index(name) for names in right for name in names if name != "1"]
    missing = [i for i, name in enumerate(axes) if i not in order]
    x = x.reshape([sizes[name] for name in axes]).transpose(order + missing)
    return x.reshape([math.prod(sizes[name] for name in names) for names in right])


def reverse(pattern: str) -> str:
    """The pattern that undoes another: `"o i -> i o"` of `"i o -> o i"`."""
    left, right = pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


def _rearranged_shape(shape: Shape, pattern: str, known: dict[str, int]) -> Shape:
    left, right = (_groups(side) for side in pattern.split("->"))
    sizes = _sizes(left, shape, known, pattern)
    return tuple(math.prod(sizes[name] for name in names) for names in right)


@dataclass(frozen=True)
class Piece:
    """`ours[path][layer][..., part] = rearrange(theirs[key][rows], axes)`.

    Attributes:
        path: of the leaf, names joined by `/`.
        key: of the tensor.
        axes: pattern of `rearrange` from theirs to ours.
        sizes: lengths that the pattern leaves open, in either direction.
        layer: index on the first axis of a stacked leaf; `None` for a leaf that is not stacked.
        rows: `(start, stop)` on the first axis of the tensor; `None` for the whole of it.
        part: `(start, stop)` on the last axis of the leaf; `None` for the whole of it.
    """

    path: str
    key: str
    axes: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    layer: int | None = None
    rows: tuple[int, int] | None = None
    part: tuple[int, int] | None = None

    def shape_of_ours(self, leaf: Shape) -> Shape:
        """The shape of what this piece fills of a leaf."""
        shape = leaf if self.layer is None else leaf[1:]
        return shape if self.part is None else (*shape[:-1], self.part[1] - self.part[0])

    def shape_of_theirs(self, leaf: Shape) -> Shape:
        """The shape of what this piece takes of a tensor, from the shape of the leaf."""
        return _rearranged_shape(self.shape_of_ours(leaf), reverse(self.axes), dict(self.sizes))

    @property
    def index(self) -> tuple[Any, ...]:
        """Where the piece lies in its leaf."""
        layer = () if self.layer is None else (self.layer,)
        return (*layer, ...) if self.part is None else (*layer, ..., slice(*self.part))

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """What goes into the leaf."""
        return rearrange(tensor if self.rows is None else tensor[slice(*self.rows)], self.axes, **self.sizes)

    def to_theirs(self, leaf: Any) -> Any:
        """What goes into the tensor: the inverse of `to_ours`."""
        return rearrange(leaf[self.index], reverse(self.axes), **self.sizes)


@dataclass(frozen=True)
class Rules:
    """The bijection between a network's parameters and the tensors of one published layout.

    Attributes:
        template: the parameters as `jax.ShapeDtypeStruct`, nested dicts, as `template_of` makes them.
        pieces: tile every leaf and every tensor.
        copies: `{key: original}`: tensors that the layout repeats. Compared when loading, written when saving.
        tables: `{key: function}`: tensors that are no parameters but computed, such as position tables: a file that
            has one must have the same; the layout's files are written with it.
        optional: keys of `tables` and `copies` that a file may lack.
        ignored: regular expressions of keys that a file may hold and that say nothing, such as `position_ids`.
    """

    template: Params
    pieces: tuple[Piece, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()

    @cached_property
    def leaves(self) -> dict[str, Any]:
        """The leaves of the template by path."""
        return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(self.template)}

    @cached_property
    def by_path(self) -> dict[str, list[Piece]]:
        """The pieces of each leaf."""
        return _grouped(self.pieces, lambda piece: piece.path)

    @cached_property
    def by_key(self) -> dict[str, list[Piece]]:
        """The pieces of each tensor."""
        return _grouped(self.pieces, lambda piece: piece.key)

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor of the layout that holds parameters, copies among them.

        Raises:
            ValueError: if the pieces do not tile the leaves or the tensors: the rules are wrong, not a file.
        """
        self._check_leaves()
        shapes = {}
        for key, pieces in self.by_key.items():
            parts = [(piece.rows, piece.shape_of_theirs(self.leaves[piece.path].shape)) for piece in pieces]
            if len(parts) == 1 and parts[0][0] is None:
                shapes[key] = parts[0][1]
                continue
            if any(rows is None or rows[1] - rows[0] != shape[0] for rows, shape in parts):
                raise ValueError(f"The rules of {key!r} do not say which rows are whose: {parts}.")
            ordered = sorted(parts)
            ends = [0, *(rows[1] for rows, _ in ordered)]
            if [rows[0] for rows, _ in ordered] != ends[:-1] or len({shape[1:] for _, shape in ordered}) != 1:
                raise ValueError(f"The rules of {key!r} do not tile it: {ordered}.")
            shapes[key] = (ends[-1], *ordered[0][1][1:])
        return shapes | {key: shapes[original] for key, original in self.copies.items()}

    def _check_leaves(self) -> None:
        unknown = sorted(set(self.by_path) - set(self.leaves))
        missing = sorted(set(self.leaves) - set(self.by_path))
        if unknown or missing:
            raise ValueError(f"The rules name leaves that the network lacks {unknown}, or leave out {missing}.")
        for path, pieces in self.by_path.items():
            shape = self.leaves[path].shape
            filled = sum(math.prod(piece.shape_of_ours(shape)) for piece in pieces)
            places = {(piece.layer, piece.part) for piece in pieces}
            if filled != math.prod(shape) or len(places) != len(pieces):
                raise ValueError(f"The rules do not tile {path!r} of shape {shape}: {sorted(map(str, places))}.")

    def to_ours(self, tensors: Mapping[str, np.ndarray]) -> Params:
        """Parameters from tensors in memory; `fm_jax.weights.load` reads files and checks them.

        Args:
            tensors: all of `shapes`.

        Returns:
            Nested dicts of NumPy arrays in the dtype of the tensors.
        """
        params = {}
        for path, pieces in self.by_path.items():
            first = tensors[pieces[0].key]
            leaf = np.empty(self.leaves[path].shape, first.dtype)
            for piece in pieces:
                leaf[piece.index] = piece.to_ours(tensors[piece.key])
            params[path] = leaf
        return nested(params)

    def to_theirs(self, params: Params) -> dict[str, np.ndarray]:
        """Tensors from parameters: the inverse of `to_ours`, with the layout's copies, without its tables."""
        leaves = {path_of(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        tensors = {}
        for key, pieces in self.by_key.items():
            tensor = np.empty(self.shapes[key], leaves[pieces[0].path].dtype)
            for piece in pieces:
                tensor[... if piece.rows is None else slice(*piece.rows)] = piece.to_theirs(leaves[piece.path])
            tensors[key] = tensor
        return tensors | {key: tensors[original] for key, original in self.copies.items()}


def _grouped(pieces: Iterable[Piece], name: Callable[[Piece], str]) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(name(piece), []).append(piece)
    return groups


def path_of(path: tuple[Any, ...]) -> str:
    """`"a/b/kernel"` of a path of `jax.tree_util`."""
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)


def nested(leaves: Mapping[str, Any]) -> Params:
    """Nested dicts of leaves by path: `{"a/b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def template_of(module: nn.Module, *args: Any, **options: Any) -> Params:
    """The parameters of a module as shapes and dtypes; nothing is computed or allocated.

    Args:
        module: Linen module.
        *args: what it is called with, arrays or `jax.ShapeDtypeStruct`.
        **options: static keyword arguments of the call.
    """
    leaves, structure = jax.tree.flatten(args)
    shapes = tuple((tuple(leaf.shape), np.dtype(leaf.dtype)) for leaf in leaves)
    key = (module, shapes, structure, tuple(sorted(options.items())), jax.dtypes.canonicalize_dtype(float))
    try:
        template = _traced(*key)
    except TypeError:  # a module that has no hash
        template = _traced.__wrapped__(*key)
    return jax.tree.map(lambda leaf: leaf, template)  # dicts of one's own


@lru_cache(maxsize=64)
def _traced(module: nn.Module, shapes: Any, structure: Any, options: Any, float_dtype: Any) -> Params:
    """Tracing takes seconds, and one network is asked for when its rules are made for loading and for saving."""
    args = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*each) for each in shapes])
    init = jax.eval_shape(lambda key, *args: module.init(key, *args, **dict(options)), jax.random.key(0), *args)
    return init["params"]


# What most pieces are. Each yields the kernel and the bias of one layer; options: layer, rows, part of `Piece`.


def _layer(path: str, key: str, kernel: str, bias: str | None, sizes: dict[str, int], where: Any) -> Iterator[Piece]:
    yield Piece(f"{path}/kernel", f"{key}.weight", kernel, sizes, **where)
    if bias is not None:
        names = {name for name in sizes if re.search(rf"\b{name}\b", bias)}
        yield Piece(f"{path}/bias", f"{key}.bias", bias, {name: sizes[name] for name in names}, **where)


def dense(path: str, key: str, *, bias: bool = True, **where: Any) -> Iterator[Piece]:
    """A linear layer: [out, in] -> [in, out]."""
    return _layer(path, key, "o i -> i o", "o -> o" if bias else None, {}, where)


def to_heads(path: str, key: str, heads: int, *, bias: bool = True, **where: Any) -> Iterator[Piece]:
    """A projection to heads: [h d, in] -> [in, h, d]."""
    return _layer(path, key, "(h d) i -> i h d", "(h d) -> h d" if bias else None, {"h": heads}, where)


def from_heads(path: str, key: str, heads: int, *, bias: bool = True, **where: Any) -> Iterator[Piece]:
    """A projection from heads: [out, h d] -> [h, d, out]."""
    return _layer(path, key, "o (h d) -> h d o", "o -> o" if bias else None, {"h": heads}, where)


def conv(path: str, key: str, *, bias: bool = True, axes: str = "h w", **where: Any) -> Iterator[Piece]:
    """A convolution: [out, in, h, w] -> [h, w, in, out]; `axes="t h w"` for one over three axes."""
    return _layer(path, key, f"o i {axes} -> {axes} i o", "o -> o" if bias else None, {}, where)


def conv1x1(path: str, key: str, *, bias: bool = True, axes: str = "1 1", **where: Any) -> Iterator[Piece]:
    """A pointwise convolution as a linear layer: [out, in, 1, 1] -> [in, out]."""
    return _layer(path, key, f"o i {axes} -> i o", "o -> o" if bias else None, {}, where)


def patches(path: str, key: str, patch_size: int, *, bias: bool = True, **where: Any) -> Iterator[Piece]:
    """A strided convolution as a linear layer on our patches: [out, c, p, q] -> [p q c, out]."""
    sizes = {"p": patch_size, "q": patch_size}
    return _layer(path, key, "o c p q -> (p q c) o", "o -> o" if bias else None, sizes, where)


def norm(path: str, key: str, *, bias: bool = True, **where: Any) -> Iterator[Piece]:
    """A normalisation: weight -> scale."""
    yield Piece(f"{path}/scale", f"{key}.weight", "d -> d", {}, **where)
    if bias:
        yield Piece(f"{path}/bias", f"{key}.bias", "d -> d", {}, **where)


def shifted(pieces: Iterable[Piece], prefix: str, path: str = "") -> tuple[Piece, ...]:
    """The same pieces, their keys behind `prefix` and their paths behind `path`."""
    return tuple(replace(piece, key=prefix + piece.key, path=path + piece.path) for piece in pieces)
