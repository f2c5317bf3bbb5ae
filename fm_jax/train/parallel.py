"""The per-device step on many devices. This is the only file that names `pmap`.

`pmap_step` and `shard_map_step` run the same function on the same shares of the batch and give the same parameters,
bit for bit. Their state is replicated without an extra axis: it can be saved, sampled from and passed back as it is.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fm_jax.checks import check_function, check_has, check_holds, check_integer, shown
from fm_jax.train.state import TrainState
from fm_jax.train.step import AXIS, Step, split_leading
from fm_jax.types import Batch, Key, Metrics

STEP = "a step(state, key, batch), as from make_step"


def pmap_step(step: Step, devices: Sequence[jax.Device] | None = None) -> Step:
    """Runs a per-device step under `jax.pmap`, with the state replicated and donated.

    Args:
        step: from `make_step` with its default `axis_name`.
        devices: all local devices by default.

    Returns:
        `step(state, key, batch)` where the leaves of `batch` are [devices, batch per device, ...], as from
        `split_batch`; `state` comes back replicated, the metrics as scalars.

    Raises:
        ValueError: if `step` was made for another axis, or for none; if there are several processes, each of which
            would train a model of its own (`shard_map_step` joins them); when called, for a batch that is not split.
    """
    check_function("step", step, STEP, 3)
    _check_axis(step)
    if devices is not None and not (
        isinstance(devices, Sequence) and devices and all(isinstance(each, jax.Device) for each in devices)
    ):
        raise ValueError(f"devices must be a list of devices, such as jax.local_devices(), got {shown(devices)}.")
    if jax.process_count() > 1:
        raise ValueError(
            f"pmap_step joins the devices of one process, got {jax.process_count()} processes: use shard_map_step with "
            f"Mesh(jax.devices(), ({AXIS!r},))."
        )
    devices = jax.local_devices() if devices is None else list(devices)
    mapped = jax.pmap(
        step, axis_name=AXIS, in_axes=(None, None, 0), out_axes=(None, None), donate_argnums=(0,), devices=devices
    )
    return _replicating(mapped, Mesh(np.array(devices), (AXIS,)), _check_split)


def shard_map_step(step: Step, mesh: Mesh) -> Step:
    """Runs the same per-device step under `jax.jit(jax.shard_map(...))`, the form that JAX develops further.

    Args:
        step: from `make_step` with its default `axis_name`.
        mesh: of one axis, named `"data"`.

    Returns:
        `step(state, key, batch)` where the leaves of `batch` are [global batch, ...].

    Raises:
        ValueError: if `step` or `mesh` has another axis; when called, if the devices do not divide the batch.
    """
    check_function("step", step, STEP, 3)
    check_has("mesh", mesh, ("axis_names", "devices"), f"a mesh, such as Mesh(jax.devices(), ({AXIS!r},))")
    _check_axis(step)
    if mesh.axis_names != (AXIS,):
        raise ValueError(f"mesh must have the one axis {AXIS!r}, got {mesh.axis_names}.")
    # A mesh from jax.make_mesh has explicit axes, which would put the sharding into the type of every input.
    mesh = Mesh(mesh.devices, mesh.axis_names)
    whole, split = PartitionSpec(), PartitionSpec(AXIS)
    # The step averages its gradients itself; under check_vma JAX would already have summed them.
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, whole, split), out_specs=(whole, whole), check_vma=False)
    shardings = (NamedSharding(mesh, whole), NamedSharding(mesh, whole), NamedSharding(mesh, split))
    return _replicating(jax.jit(mapped, in_shardings=shardings, donate_argnums=(0,)), mesh, _check_divisible)


def split_batch(batch: Batch, num_devices: int) -> Batch:
    """Cuts a global batch into one share a device, in order: [batch, ...] -> [num_devices, batch / num_devices, ...].

    Args:
        batch: a pytree of arrays with a leading batch axis.
        num_devices: must divide the batch.

    Returns:
        The same pytree, every leaf with one more axis.

    Raises:
        ValueError: if `num_devices` is less than 1 or does not divide the batch.

    Example:
        >>> split_batch({"x1": np.zeros((8, 3))}, 4)["x1"].shape
        (4, 2, 3)
    """
    check_holds(batch)
    check_integer("num_devices", num_devices)
    return split_leading(batch, num_devices, "num_devices")


def _check_split(batch: Batch, num_devices: int) -> None:
    """Raises `ValueError` unless every leaf has one share for each device, as from `split_batch`."""
    check_holds(batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if np.shape(leaf)[:1] != (num_devices,):
            raise ValueError(
                f"the batch must be [{num_devices}, batch per device, ...], a share for each device: "
                f"split_batch(batch, {num_devices}) makes it so, got {jax.tree_util.keystr(path)} of shape "
                f"{np.shape(leaf)}."
            )


def _check_divisible(batch: Batch, num_devices: int) -> None:
    """Raises `ValueError` unless every leaf can be cut into equal shares for the devices."""
    check_holds(batch)
    split_leading(batch, num_devices, "the number of devices")


def _replicating(mapped: Step, mesh: Mesh, check_batch: Callable[[Batch, int], None]) -> Step:
    replicated = NamedSharding(mesh, PartitionSpec())
    # XLA's collectives on simulated CPU devices deadlock when several steps are in flight on fewer cores.
    lockstep = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"

    def step(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        # A new or restored state lies on one device; passed as it is, it would compile the step a second time.
        if getattr(getattr(state, "step", None), "sharding", None) != replicated:
            check_has("state", state, ("step", "params", "opt_state", "ema"), "a TrainState, as from create_state")
            check_batch(batch, mesh.size)
            state = jax.device_put(state, replicated)
        state, metrics = mapped(state, key, batch)
        return state, jax.block_until_ready(metrics) if lockstep else metrics

    return step


def _check_axis(step: Step) -> None:
    axis_name = getattr(step, "axis_name", AXIS)
    if axis_name != AXIS:
        raise ValueError(f"step must be made with axis_name={AXIS!r} to average over devices, got {axis_name!r}.")
