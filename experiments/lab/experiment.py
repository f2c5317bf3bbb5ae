"""An experiment as objects: what a configuration stands for, and what is restored from the folder of a run."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.lab.training import CONFIG, from_json, restore, sampling_params
from fm_jax.checks import why_no_folder
from fm_jax.conditions import DropCondition
from fm_jax.models import init_params
from fm_jax.types import ApplyFn, Array, Key, Params, Source

MODULES = {"images": "experiments.lab.images", "toy2d": "experiments.toy2d"}
"""Where the `Config` and the `build` of a run are, by the name that its `config.json` has."""


class Experiment(NamedTuple):
    """The objects that a configuration stands for."""

    model: nn.Module
    apply_fn: ApplyFn
    source: Source
    event_shape: tuple[int, ...]
    num_classes: int | None = None
    """`None` for an unconditional network."""
    drop: DropCondition | None = None
    """Takes labels away in training, for classifier-free guidance."""

    def draw_x0(self, key: Key, num: int) -> Array:
        """Points [num, ...] of the source."""
        return self.source.draw(key, jax.ShapeDtypeStruct((num, *self.event_shape), jnp.float32))


class Restored(NamedTuple):
    """A run as it was left."""

    config: Any
    experiment: Experiment
    step: int
    params: Params


def read_run(run_dir: Path, option: str = "--run") -> tuple[Any, Experiment]:
    """The configuration and the network of a run; `SystemExit` says what is wrong with the folder."""
    path = run_dir / CONFIG
    if not path.is_file():
        no_config = f"its {CONFIG} is a folder" if path.is_dir() else f"it has no {CONFIG}"
        wrong = no_config if run_dir.is_dir() else why_no_folder(run_dir) or "there is no such folder"
        raise SystemExit(f"{option} {run_dir} is not the folder of a run: {wrong}.")
    again = "The command that trained the run writes it anew."
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise SystemExit(f"{path} is damaged, it is not JSON ({error}). {again}") from error
    if not isinstance(record, dict) or record.get("experiment") not in MODULES:
        raise SystemExit(f"{path} was not written by one of the experiments {', '.join(MODULES)}.")
    module = importlib.import_module(MODULES[record.pop("experiment")])
    try:
        # The folder may have been moved since it was written.
        config = from_json(module.Config, record)
    except ValueError as error:
        raise SystemExit(f"{path} cannot be used: {error} {again}") from error
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, run_dir=run_dir))
    return config, module.build(config)


def restore_run(run_dir: Path, option: str = "--run") -> Restored:
    """The configuration, network and parameters of a run; `SystemExit` says what is wrong with the folder."""
    config, experiment = read_run(run_dir, option)
    shapes = jax.eval_shape(lambda key: init_params(experiment.model, key, experiment.event_shape), jax.random.key(0))
    state = restore(config, shapes)
    return Restored(config, experiment, int(state.step), sampling_params(state, config.training))
