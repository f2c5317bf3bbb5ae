"""An experiment as objects: what a configuration stands for, and what is restored from the folder of a run."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.training import CONFIG, Training, from_json, restore, sampling_params
from fm_jax.checks import why_no_folder
from fm_jax.conditions import DropCondition
from fm_jax.models import init_params
from fm_jax.types import ApplyFn, Array, Key, Params, Source

MODULES = {"images": "experiments.lab.images", "toy2d": "experiments.toy2d"}
"""Where the `Config` and the `build` of a run are, by the name that its `config.json` has."""


_EMBEDDING = "embed/"
"""What the parameters of a network's embedding of labels begin with."""


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
    scale: tuple[np.ndarray, np.ndarray] | None = None
    """Of latents, mean and standard deviation [c] of each channel; `None` for what is trained on as it is."""

    def draw_x0(self, key: Key, num: int) -> Array:
        """Points [num, ...] of the source."""
        return self.source.draw(key, jax.ShapeDtypeStruct((num, *self.event_shape), jnp.float32))

    def to_data(self, x: np.ndarray) -> np.ndarray:
        """Samples as the data are: latents with the mean and variance that they had."""
        if self.scale is None:
            return x
        mean, std = self.scale
        return (x * std + mean).astype(np.float32)

    def visible(self, x: np.ndarray) -> np.ndarray:
        """What a picture can show of images [n, h, w, c]: 1 or 3 channels in [-1, 1]; of latents three deviations."""
        channels = x.shape[-1] if x.shape[-1] in (1, 3) else 3 if x.shape[-1] > 3 else 1
        return x[..., :channels] if self.scale is None else np.clip(x[..., :channels] / 3, -1, 1)


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
    params = sampling_params(state, config.training)
    if bad := [name for name, leaf in _named(params) if not bool(jnp.isfinite(leaf).all())]:
        raise SystemExit(
            f"{option} {run_dir} has parameters that are not finite at step {int(state.step):,}: {bad[0]}."
        )
    return Restored(config, experiment, int(state.step), params)


def begin_with(training: Training, params: Params) -> Params:
    """The parameters that a new run begins with: those of `--init-from`, where that is given.

    Another number of classes, or none, has another embedding of labels, which is `params`' own.

    Raises:
        SystemExit: if there is no such run, or it has another network.
    """
    if training.init_from is None:
        return params
    restored = restore_run(training.init_from, "--init-from")
    theirs = dict(_named(restored.params))
    new: list[str] = []
    wrong: list[str] = []
    for name, own in _named(params):
        if name not in theirs or theirs[name].shape != own.shape:
            (new if name.startswith(_EMBEDDING) else wrong).append(name)
    wrong += [name for name in theirs.keys() - dict(_named(params)).keys() if not name.startswith(_EMBEDDING)]
    if wrong:
        some = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise SystemExit(f"--init-from {training.init_from} has another network: {some} differ. Give its --model.")
    told = f", but for {', '.join(new)}, which begin anew" if new else ""
    print(f"Begins with the parameters of {training.init_from} at step {restored.step:,}{told}.")
    return jax.tree_util.tree_map_with_path(
        lambda path, own: own if _name(path) in new else jnp.asarray(theirs[_name(path)], own.dtype), params
    )


def _named(params: Params) -> list[tuple[str, Array]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
