"""The two layouts of a transformer's parameters: a subtree for each block, and one subtree of stacked blocks."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.checks import check_array, shown
from fm_jax.types import Array, Params

STACKED = "blocks"
"""The name of the stacked blocks. That of a single one is `block_0`, `block_1`, ..."""


def place_of_block(i: int, *, scan: bool, name: str = "block") -> tuple[str, int | None]:
    """Where `run_blocks` keeps the parameters of a block: the name of its subtree, and its place in the stack if any.

    Example:
        >>> place_of_block(3, scan=True), place_of_block(3, scan=False)
        (('blocks', 3), ('block_3', None))
    """
    return (f"{name}s", i) if scan else (f"{name}_{i}", None)


def run_blocks(
    block: type[nn.Module],
    options: Mapping[str, Any],
    length: int,
    h: Any,
    *args: Any,
    train: bool,
    scan: bool,
    remat: bool,
    name: str = "block",
) -> Any:
    """Runs blocks of one kind one after another, in a compact method: `h = block(h, *args, train)`.

    Args:
        block: Linen module.
        options: its attributes, the same in every block.
        length: number of blocks.
        h: what goes from block to block, a pytree.
        *args: what every block sees: pytrees of arrays.
        train: last argument of a block.
        scan: trace and compile one block, whose parameters are stacked in `{name}s`; otherwise `{name}_0`, ...
        remat: recompute a block in the backward pass.
        name: of a single block.

    Returns:
        What the last block gives.
    """
    static = (len(args) + 2,)
    if scan:
        # A loop keeps for its backward pass whatever that wants, where unrolled blocks fuse some of it away again:
        # keep products alone. And it tells the passes apart by itself.
        policy = None if remat else jax.checkpoint_policies.dots_saveable
        block = nn.remat(block, static_argnums=static, prevent_cse=False, policy=policy)
    elif remat:
        block = nn.remat(block, static_argnums=static)
    if not scan:
        for i in range(length):
            h = block(**options, name=place_of_block(i, scan=False, name=name)[0])(h, *args, train)
        return h

    def layer(block: nn.Module, h: Any, *args: Any) -> tuple[Any, None]:
        return block(h, *args, train), None

    layers = nn.scan(
        layer,
        variable_axes={"params": 0, "intermediates": 0, "control": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=length,
    )
    return layers(block(**options, name=place_of_block(0, scan=True, name=name)[0]), h, *args)[0]


def stack_layers(params: Params) -> Params:
    """Stacks `block_0`, `block_1`, ... on a new first axis of `blocks`, as a `DiT` with `scan_layers` wants them.

    What has been learned stays: outputs, and updates by an optimiser that treats numbers one by one, as Adam does.

    Args:
        params: the parameters of a `DiT` without `scan_layers`, or any pytree that holds such parameters: averages, a
            state of Adam, a whole `TrainState`. The rest of it is handed on.

    Returns:
        The same tree, with `blocks` in place of the single blocks.

    Raises:
        ValueError: if there are no such blocks, one is missing, or they differ in structure, shape or dtype.

    Example:
        >>> stacked = stack_layers({"block_0": {"bias": jnp.zeros(3)}, "block_1": {"bias": jnp.ones(3)}})
        >>> stacked["blocks"]["bias"].shape
        (2, 3)
    """
    return _replace(params, _is_unrolled, _stack, "block_0, ...")


def unstack_layers(params: Params) -> Params:
    """Cuts `blocks` into `block_0`, `block_1`, ..., as a `DiT` without `scan_layers` wants them.

    The inverse of `stack_layers`, to the bit.

    Args:
        params: the parameters of a `DiT` with `scan_layers`, or any pytree that holds such parameters.

    Returns:
        The same tree, with a subtree for each block in place of `blocks`.

    Raises:
        ValueError: if there is no `blocks`, or its leaves do not stack the same number of blocks.

    Example:
        >>> sorted(unstack_layers({"blocks": {"bias": jnp.zeros((2, 3))}}))
        ['block_0', 'block_1']
    """
    return _replace(params, _is_stacked, _unstack, repr(STACKED))


def _replace(params: Params, is_found: Callable[[Any], bool], convert: Callable[[Any], Any], wanted: str) -> Params:
    found = 0

    def one(node: Any) -> Any:
        nonlocal found
        if not is_found(node):
            return node
        found += 1
        return convert(node)

    converted = jax.tree.map(one, params, is_leaf=is_found)
    if not found:
        got = f"a dict of {sorted(map(str, params))}" if isinstance(params, Mapping) else shown(params)
        raise ValueError(f"params must be, or hold, a dict with {wanted}, got {got}.")
    return converted


def _index(name: Any) -> int | None:
    found = re.fullmatch(r"block_(0|[1-9]\d*)", name) if isinstance(name, str) else None
    return None if found is None else int(found[1])


def _is_unrolled(node: Any) -> bool:
    return isinstance(node, Mapping) and any(_index(name) is not None for name in node)


def _is_stacked(node: Any) -> bool:
    return isinstance(node, Mapping) and STACKED in node


def _stack(node: Any) -> Any:
    if STACKED in node:
        raise ValueError(f"params must hold single blocks or {STACKED!r}, got both: {sorted(map(str, node))}.")
    found = {index: name for name in node if (index := _index(name)) is not None}
    names = [found[index] for index in sorted(found)]
    if names != [f"block_{i}" for i in range(len(names))]:
        raise ValueError(f"params must hold block_0, block_1, ... without a gap, got {', '.join(names)}.")
    first, *others = (node[name] for name in names)
    for name, other in zip(names[1:], others, strict=True):
        if jax.tree.structure(first) != jax.tree.structure(other):
            raise ValueError(f"params must hold blocks of one structure, got another in {name} than in block_0.")

    def stacked(path: Any, *leaves: Any) -> Array:
        at = jax.tree_util.keystr(path)
        for name, leaf in zip(names, leaves, strict=True):
            check_array(f"params, in {name}{at},", leaf)
            if (leaf.shape, leaf.dtype) != (leaves[0].shape, leaves[0].dtype):
                raise ValueError(
                    f"params must hold blocks of one shape and dtype, got {shown(leaves[0])} in block_0{at} and "
                    f"{shown(leaf)} in {name}{at}."
                )
        return jnp.stack(leaves)

    blocks = jax.tree_util.tree_map_with_path(stacked, first, *others)
    return type(node)({name: value for name, value in node.items() if name not in names} | {STACKED: blocks})


def _unstack(node: Any) -> Any:
    if _is_unrolled(node):
        raise ValueError(f"params must hold single blocks or {STACKED!r}, got both: {sorted(map(str, node))}.")
    blocks = node[STACKED]
    sizes: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(blocks):
        at = STACKED + jax.tree_util.keystr(path)
        check_array(f"params, in {at},", leaf)
        if not leaf.shape or not leaf.shape[0]:
            raise ValueError(f"params must hold blocks stacked on a first axis, got shape {leaf.shape} in {at}.")
        sizes.setdefault(leaf.shape[0], at)
    if len(sizes) != 1:
        got = " and ".join(f"{size} in {at}" for size, at in sizes.items()) or "nothing"
        raise ValueError(f"params must stack the same number of blocks in every leaf of {STACKED!r}, got {got}.")
    (size,) = sizes
    single = {f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(size)}
    return type(node)({name: value for name, value in node.items() if name != STACKED} | single)
