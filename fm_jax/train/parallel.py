"""The training step on many devices. This is the only file that names `pmap`.

`pmap_step` and `shard_map_step` run the same per-device step on the same shares of the batch and give the same
parameters, bit for bit, with the state on every device. `fsdp_step` runs the step of the whole batch and leaves its
division to the compiler, with the state cut over devices; it draws the same noise on any number of them. No state has
an extra axis: it can be saved, sampled from and passed back as it is.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fm_jax.checks import check_bool, check_function, check_has, check_holds, check_integer
from fm_jax.train.sharding import FSDP, data_mesh, fsdp_sharding
from fm_jax.train.state import TrainState
from fm_jax.train.step import AXIS, Step, scan_steps, split_leading
from fm_jax.types import Batch, Key, Metrics

STEP = "a step(state, key, batch), as from make_step"
WHOLE = PartitionSpec()


@dataclass(frozen=True)
class ParallelStep:
    """A step on many devices: `step(state, key, batch) -> (state, metrics)`, which donates the state.

    A new or restored state is placed as it is needed; one that comes from the step stays where it is.

    Attributes:
        run: the step, compiled; it expects its arguments in place.
        mesh: the devices.
        stacked: whether a batch has a leading axis of steps, to be taken in one call.
        shardings: `shardings(state)`, where each leaf of a state, or of shapes, belongs.
        batch_to_device: makes the step's batch of this process's share of the global batch, [batch, ...], or
            [steps, batch, ...] if stacked, and sends it to the devices.
        check_batch: refuses a batch that is not the step's.
    """

    run: Any
    mesh: Mesh
    stacked: bool
    shardings: Callable[[Any], Any]
    batch_to_device: Callable[[Batch], Batch]
    check_batch: Callable[[Batch], None]

    def place(self, state: TrainState) -> TrainState:
        """Sends a state to where the step wants it."""
        check_has("state", state, ("step", "params", "opt_state", "ema"), "a TrainState, as from create_state")
        return jax.device_put(state, self.shardings(state))

    def __call__(self, state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes one step, or a stack of them; the metrics are scalars, of the last."""
        # A new or restored state lies on one device; passed as it is, it would compile the step a second time.
        if getattr(getattr(state, "step", None), "sharding", None) != self._whole:
            state = self.place(state)
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
        if shapes != self._seen:
            self.check_batch(batch)
            self._seen[:] = shapes
        state, metrics = self.run(state, key, batch)
        return state, jax.block_until_ready(metrics) if self._lockstep else metrics

    @functools.cached_property
    def _seen(self) -> list[tuple[int, ...]]:
        """Shapes of the last batch, which was right."""
        return []

    @functools.cached_property
    def _whole(self) -> NamedSharding:
        return NamedSharding(self.mesh, WHOLE)

    @functools.cached_property
    def _lockstep(self) -> bool:
        # XLA's collectives on simulated CPU devices deadlock when several steps are in flight on fewer cores.
        return self.mesh.size > 1 and self.mesh.devices.flat[0].platform == "cpu"


def pmap_step(step: Step, devices: Sequence[jax.Device] | None = None, *, stacked: bool = False) -> ParallelStep:
    """Runs a per-device step under `jax.pmap`, with the state replicated and donated.

    Args:
        step: from `make_step` with its default `axis_name`.
        devices: all local devices by default.
        stacked: if so, a call takes as many steps as the leading axis of its batch is long, in one `lax.scan`, with
            the same bits as one by one. On CPU gradients of convolutions are some 50 times slower in there.

    Returns:
        `step(state, key, batch)` where the leaves of `batch` are [devices, batch per device, ...], as from
        `split_batch`, after the axis of steps if stacked; `state` comes back replicated, the metrics as scalars.

    Raises:
        ValueError: if `step` was made for another axis, or for none; if there are several processes, each of which
            would train a model of its own (`shard_map_step` joins them); when called, for a batch that is not split.
    """
    check_function("step", step, STEP, 3)
    check_bool("stacked", stacked)
    _check_axis(step, AXIS)
    if jax.process_count() > 1:
        raise ValueError(
            f"pmap_step joins the devices of one process, got {jax.process_count()} processes: use shard_map_step with "
            f"Mesh(jax.devices(), ({AXIS!r},))."
        )
    mesh, axis = data_mesh(jax.local_devices() if devices is None else devices), int(stacked)
    devices = list(mesh.devices)
    run = jax.pmap(
        scan_steps(step) if stacked else step,
        axis_name=AXIS,
        in_axes=(None, None, axis),
        out_axes=(None, None),
        donate_argnums=(0,),
        devices=devices,
    )
    split = NamedSharding(mesh, _batch_spec(mesh, stacked))

    def batch_to_device(batch: Batch) -> Batch:
        check_holds(batch)
        return jax.device_put(split_leading(batch, len(devices), "the number of devices", axis=axis), split)

    def check_batch(batch: Batch) -> None:
        check_holds(batch)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if np.shape(leaf)[axis : axis + 1] != (len(devices),):
                shares = f"{'steps, ' if stacked else ''}{len(devices)}"
                raise ValueError(
                    f"the batch must be [{shares}, batch per device, ...], a share for each device: "
                    f"split_batch(batch, {len(devices)}) makes it so, got {jax.tree_util.keystr(path)} of shape "
                    f"{np.shape(leaf)}."
                )

    return ParallelStep(run, mesh, stacked, _replicated(mesh), batch_to_device, check_batch)


def shard_map_step(step: Step, mesh: Mesh, *, stacked: bool = False) -> ParallelStep:
    """Runs the same per-device step under `jax.jit(jax.shard_map(...))`, the form that JAX develops further.

    Args:
        step: from `make_step` with its default `axis_name`.
        mesh: of one axis, named `"data"`, as from `data_mesh`; of the devices of several processes too.
        stacked: as in `pmap_step`.

    Returns:
        `step(state, key, batch)` where the leaves of `batch` are [global batch, ...], after the axis of steps if
        stacked.

    Raises:
        ValueError: if `step` or `mesh` has another axis; when called, if the devices do not divide the batch.
    """
    mesh = _checked(step, AXIS, mesh, (AXIS,), stacked)
    split = _batch_spec(mesh, stacked)
    # The step averages its gradients itself; under check_vma JAX would already have summed them.
    mapped = jax.shard_map(
        scan_steps(step) if stacked else step,
        mesh=mesh,
        in_specs=(WHOLE, WHOLE, split),
        out_specs=(WHOLE, WHOLE),
        check_vma=False,
    )
    shardings = tuple(NamedSharding(mesh, spec) for spec in (WHOLE, WHOLE, split))
    return _on_mesh(jax.jit(mapped, in_shardings=shardings, donate_argnums=(0,)), mesh, stacked, _replicated(mesh))


def fsdp_step(step: Step, mesh: Mesh, *, stacked: bool = False) -> ParallelStep:
    """Runs the step of the whole batch under `jax.jit`, with parameters, optimiser state and averages cut over devices.

    Cut by the rule of `fsdp_sharding`. Each step gathers the parameters and reduces the gradients, of which each device
    updates its part. The batch is divided over all devices of the mesh. With one device along `"fsdp"` the state is
    replicated, and this is data parallelism by the compiler.

    Whatever is random is drawn for the whole batch, by JAX's partitionable generator: a run continues on another number
    of devices with the same noise. Couplings within the loss pair the whole batch.

    Args:
        step: from `make_step` with `axis_name=None`.
        mesh: of the axes `("data", "fsdp")`, as from `fsdp_mesh`.
        stacked: as in `pmap_step`.

    Returns:
        As `shard_map_step`; `state` comes back cut.

    Raises:
        ValueError: if `step` was made for a device axis, or `mesh` has other axes; when called, if the devices do not
            divide the batch.

    References:
        Rajbhandari et al. 2019, "ZeRO" (arXiv:1910.02054).
    """
    mesh = _checked(step, None, mesh, (AXIS, FSDP), stacked)
    whole = NamedSharding(mesh, WHOLE)

    def cut(state: TrainState, key: Key, batch: Batch) -> tuple[TrainState, Metrics]:
        # Left to itself the partitioner would move activations where they are smaller than parameters.
        params = jax.lax.with_sharding_constraint(state.params, whole)
        new, metrics = step(state._replace(params=params), key, batch)
        return jax.lax.with_sharding_constraint(new, fsdp_sharding(new, mesh)), metrics

    shardings = (None, whole, NamedSharding(mesh, _batch_spec(mesh, stacked)))
    run = jax.jit(scan_steps(cut) if stacked else cut, in_shardings=shardings, donate_argnums=(0,))
    return _on_mesh(run, mesh, stacked, lambda state: fsdp_sharding(state, mesh))


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


def _on_mesh(run: Any, mesh: Mesh, stacked: bool, shardings: Callable[[Any], Any]) -> ParallelStep:
    """A step whose batches are global arrays."""
    split, axis = NamedSharding(mesh, _batch_spec(mesh, stacked)), int(stacked)
    local_devices = len(mesh.local_devices)

    def batch_to_device(batch: Batch) -> Batch:
        check_holds(batch)
        split_leading(batch, local_devices, "the number of devices of this process", axis=axis)
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x), batch)

    def check_batch(batch: Batch) -> None:
        check_holds(batch)
        split_leading(batch, mesh.size, "the number of devices", axis=axis)

    return ParallelStep(run, mesh, stacked, shardings, batch_to_device, check_batch)


def _replicated(mesh: Mesh) -> Callable[[Any], Any]:
    whole = NamedSharding(mesh, WHOLE)
    return lambda state: jax.tree.map(lambda _: whole, state)


def _batch_spec(mesh: Mesh, stacked: bool) -> PartitionSpec:
    """The batch axis goes over all devices; of stacked batches it is the second."""
    axes = mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]
    return PartitionSpec(None, axes) if stacked else PartitionSpec(axes)


def _checked(step: Any, axis_name: str | None, mesh: Any, axes: tuple[str, ...], stacked: bool) -> Mesh:
    check_function("step", step, STEP, 3)
    check_has("mesh", mesh, ("axis_names", "devices"), f"a mesh, such as Mesh(jax.devices(), ({AXIS!r},))")
    check_bool("stacked", stacked)
    _check_axis(step, axis_name)
    if mesh.axis_names != axes:
        what = f"the one axis {axes[0]!r}" if len(axes) == 1 else f"the axes {axes}"
        raise ValueError(f"mesh must have {what}, got {mesh.axis_names}.")
    # A mesh from jax.make_mesh has explicit axes, which would put the sharding into the type of every input.
    return Mesh(mesh.devices, mesh.axis_names)


def _check_axis(step: Any, wanted: str | None) -> None:
    axis_name = getattr(step, "axis_name", wanted)
    if axis_name != wanted and wanted is None:
        raise ValueError(f"step must be made with axis_name=None, as it sees the whole batch, got {axis_name!r}.")
    if axis_name != wanted:
        raise ValueError(f"step must be made with axis_name={wanted!r} to average over devices, got {axis_name!r}.")
