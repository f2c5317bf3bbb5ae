"""Which of the ways of training on many devices a name stands for."""

from collections.abc import Sequence
from typing import Any, Literal

import jax

from fm_jax.train import make_step
from fm_jax.train.parallel import ParallelStep, fsdp_step, pmap_step, shard_map_step
from fm_jax.train.sharding import data_mesh, fsdp_mesh
from fm_jax.train.step import AXIS
from fm_jax.types import LossFn

Parallel = Literal["pmap", "shard_map", "fsdp"]


def make_parallel(
    parallel: Parallel,
    loss_fn: LossFn,
    optimizer: Any,
    devices: Sequence[jax.Device] | None = None,
    *,
    accumulate: int = 1,
    shards: int | None = None,
    stacked: bool = False,
) -> ParallelStep:
    """The training step on these devices, by default all that `parallel` can join."""
    axis_name = None if parallel == "fsdp" else AXIS
    step = make_step(loss_fn, optimizer, accumulate=accumulate, axis_name=axis_name)
    match parallel:
        case "pmap":
            return pmap_step(step, devices, stacked=stacked)
        case "shard_map":
            return shard_map_step(step, data_mesh(devices), stacked=stacked)
    return fsdp_step(step, fsdp_mesh(shards, devices), stacked=stacked)
