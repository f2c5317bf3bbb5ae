"""Which device holds which part of a training state."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fm_jax.checks import check_has, check_integer, shown
from fm_jax.train.step import AXIS

FSDP = "fsdp"
"""The name of the mesh axis over which a state is cut."""
MIN_SIZE = 2**14
"""Leaves of fewer elements are not cut: gathering them costs more than it saves."""


def data_mesh(devices: Any = None) -> Mesh:
    """The mesh of one axis, `"data"`, over all devices of all processes, or over those given.

    Raises:
        ValueError: if `devices` are not devices, at least one, each once.

    Example:
        >>> data_mesh(jax.devices()[:1]).axis_names
        ('data',)
    """
    return Mesh(_array(devices), (AXIS,))


def fsdp_mesh(shards: int | None = None, devices: Any = None) -> Mesh:
    """The mesh of the axes `("data", "fsdp")`: each copy of the state is cut over `shards` neighbouring devices.

    Args:
        shards: by default all devices, so that there is one copy; the devices of a host keep the gathering within it.
        devices: all devices of all processes by default.

    Raises:
        ValueError: if `shards` does not divide the devices, or `devices` are not devices, each once.

    Example:
        >>> fsdp_mesh(1, jax.devices()[:1]).devices.shape
        (1, 1)
    """
    devices = _array(devices)
    shards = devices.size if shards is None else shards
    check_integer("shards", shards)
    if devices.size % shards:
        raise ValueError(f"shards must divide the {devices.size} devices, got {shards}.")
    return Mesh(devices.reshape(-1, shards), (AXIS, FSDP))


def _array(devices: Any) -> np.ndarray:
    if devices is None:
        return np.array(jax.devices())
    given = list(devices) if isinstance(devices, Sequence) else None
    if not given or not all(isinstance(each, jax.Device) for each in given) or len(set(given)) < len(given):
        raise ValueError(
            f"devices must be a list of devices, each once, such as jax.local_devices(), got {shown(devices)}."
        )
    return np.array(given)


def fsdp_sharding(tree: Any, mesh: Mesh, *, min_size: int = MIN_SIZE) -> Any:
    """The sharding of each leaf by one rule: it is cut along the longest axis that the devices of `"fsdp"` divide.

    Of axes of the same length it is the first. A leaf of fewer than `min_size` elements, or with no such axis, is
    replicated. Parameters, the optimiser's moments and averages have the same shapes, so they are cut alike.

    Args:
        tree: arrays or `jax.ShapeDtypeStruct`s, such as a `TrainState`.
        mesh: with an axis `"fsdp"`, as from `fsdp_mesh`.
        min_size: elements of the smallest leaf that is cut.

    Returns:
        The same pytree of `NamedSharding`s.

    Raises:
        ValueError: if the mesh has no such axis, or a leaf is no array.

    References:
        Rajbhandari et al. 2019, "ZeRO" (arXiv:1910.02054).
    """
    check_has("mesh", mesh, ("axis_names", "shape"), "a mesh, as from fsdp_mesh")
    if FSDP not in mesh.axis_names:
        raise ValueError(f"mesh must have an axis {FSDP!r}, as from fsdp_mesh, got {mesh.axis_names}.")
    check_integer("min_size", min_size, least=0)
    shards = mesh.shape[FSDP]

    def rule(path: Any, x: Any) -> NamedSharding:
        check_has(f"the leaf {jax.tree_util.keystr(path)!r}", x, ("shape",), "an array or a jax.ShapeDtypeStruct")
        axes = [i for i, length in enumerate(x.shape) if length and length % shards == 0]
        if shards == 1 or not axes or np.prod(x.shape) < min_size:
            return NamedSharding(mesh, PartitionSpec())
        longest = max(axes, key=lambda i: x.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, FSDP))

    return jax.tree_util.tree_map_with_path(rule, tree)
