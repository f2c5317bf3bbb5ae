"""An experiment as objects: what a configuration stands for, and what is restored from the folder of a run."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.lab.data import class_names_of
from experiments.lab.levels import to_pixels
from experiments.lab.training import CONFIG, from_json, restore, sampling_params
from experiments.lab.vocabulary import Vocabulary
from fm_jax.checks import why_no_folder
from fm_jax.conditions import DropCondition
from fm_jax.latents import PIXELS, LatentSpace
from fm_jax.models import init_params
from fm_jax.paths import MixturePath
from fm_jax.types import ApplyFn, Array, Cond, Key, Params, Source, TokenSource

MODULES = {
    "images": "experiments.lab.images",
    "toy2d": "experiments.toy2d",
    "text_to_image": "experiments.text_to_image",
    "text_to_video": "experiments.text_to_video",
    "text": "experiments.text",
    "token_images": "experiments.token_images",
}
"""Where the `Config` and the `build` of a run are, by the name that its `config.json` has."""


_EMBEDDING = "embed/"
"""What the parameters of a network's embedding of labels begin with."""


class Experiment(NamedTuple):
    """The objects that a configuration stands for."""

    model: nn.Module
    apply_fn: ApplyFn
    source: Source | TokenSource
    event_shape: tuple[int, ...]
    num_classes: int | None = None
    """`None` for an unconditional network."""
    drop: DropCondition | None = None
    """Takes labels away in training, for classifier-free guidance."""
    space: LatentSpace = PIXELS
    """What the network sees of latents; the identity for what is trained on as it is."""
    tell: Callable[[list[str]], Cond] | None = None
    """From prompts to what the network is told, [n, ...]; refuses what it cannot be told. `None` without prompts."""
    path: MixturePath | None = None
    """Of a network of tokens; `None` for one of points."""
    vocabulary: Vocabulary | None = None
    """What text the tokens are; `None` where they are none."""
    levels: int | None = None
    """How many grey levels the tokens are; `None` where they are none."""
    causal: bool = False
    """Whether a token is told by those before it alone."""

    @property
    def null_cond(self) -> Cond:
        """What stands for no condition: the number of no class, the empty prompt, or `None`."""
        return self.num_classes if self.tell is None else self.tell([""])

    def told(self, prompts: list[str]) -> Cond:
        """What the network is told of prompts, [n, ...]; refuses what it cannot be told, and where it takes none."""
        if self.tell is None:
            raise ValueError("This run has no prompts: it was not trained on sentences.")
        return self.tell(prompts)

    def init_params(self, key: Key) -> Params:
        """The initial parameters of the network."""
        return init_params(self.model, key, self.event_shape, None if self.tell is None else self.null_cond)

    def draw_x0(self, key: Key, num: int) -> Array:
        """Points [num, ...] of the source."""
        dtype = jnp.float32 if self.path is None else jnp.int32
        return self.source.draw(key, jax.ShapeDtypeStruct((num, *self.event_shape), dtype))

    def to_data(self, x: Any) -> Any:
        """Samples, an array or a traced one, as the data are: latents with the mean and variance that they had."""
        return x if self.space == PIXELS else self.space.to_latent(jnp.asarray(x)).astype(jnp.float32)

    def written(self, x: Any) -> list[str]:
        """The texts that samples of tokens [n, length] are."""
        assert self.vocabulary is not None
        return [self.vocabulary.decode(row) for row in np.asarray(x).tolist()]

    def visible(self, x: np.ndarray) -> np.ndarray:
        """What a picture can show of images [n, h, w, c]: 1 or 3 channels in [-1, 1]; of latents three deviations."""
        if self.levels is not None:
            x = to_pixels(x, self.levels)
        channels = x.shape[-1] if x.shape[-1] in (1, 3) else 3 if x.shape[-1] > 3 else 1
        return x[..., :channels] if self.space == PIXELS else np.clip(x[..., :channels] / 3, -1, 1)


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
    shapes = jax.eval_shape(experiment.init_params, jax.random.key(0))
    state = restore(config, shapes)
    params = sampling_params(state, config.training)
    if bad := [name for name, leaf in _named(params) if not bool(jnp.isfinite(leaf).all())]:
        raise SystemExit(
            f"{option} {run_dir} has parameters that are not finite at step {int(state.step):,}: {bad[0]}."
        )
    return Restored(config, experiment, int(state.step), params)


def refuse_sentences(run_dir: Path, experiment: Experiment, what: str) -> None:
    """`SystemExit` for a run on sentences or tokens, where only points with classes, or without, will do."""
    on = "sentences" if experiment.tell is not None else None if experiment.path is None else "tokens"
    if on is not None:
        raise SystemExit(f"--run {run_dir} was trained on {on}, and {what} knows runs with classes, or without.")


def begin_with(config: Any, class_names: tuple[str, ...], params: Params) -> Params:
    """The parameters that a new run begins with: those of `--init-from`, where that is given.

    Of the embedding of labels each class has the row of the class of its name; the others have `params`' own.

    Args:
        config: with a `training` and a `method`.
        class_names: of the new run.
        params: its parameters, as they were drawn.

    Raises:
        SystemExit: if there is no such run, or it has another network.
    """
    run_dir = config.training.init_from
    if run_dir is None:
        return params
    restored = restore_run(run_dir, "--init-from")
    theirs, own = dict(_named(restored.params)), dict(_named(params))
    wrong = [
        name
        for name in theirs.keys() | own.keys()
        if not name.startswith(_EMBEDDING)
        and (name not in theirs or name not in own or theirs[name].shape != own[name].shape)
    ]
    if wrong:
        some = ", ".join(sorted(wrong)[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise SystemExit(f"--init-from {run_dir} has another network: {some} differ. Give its --model.")
    told = [f"Begins with the parameters of {run_dir} at step {restored.step:,}."]
    for field in dataclasses.fields(config.method):
        before, now = (getattr(each.method, field.name) for each in (restored.config, config))
        if before != now and field.name in ("path", "prediction"):
            told.append(f"They were trained with --{field.name} {before}, and go on with {now}.")
    begun = {name: jnp.asarray(theirs[name], leaf.dtype) for name, leaf in own.items() if name in theirs}
    if table := next((name for name in own if name.startswith(_EMBEDDING)), None):
        begun[table], anew = _rows(own[table], theirs.get(table), class_names, class_names_of(run_dir))
        if anew:
            told.append(f"The embedding begins anew for {', '.join(anew[:5])}{', ...' * (len(anew) > 5)}.")
    elif any(name.startswith(_EMBEDDING) for name in theirs):
        told.append("Its embedding of labels is left out.")
    print(" ".join(told))
    return jax.tree_util.tree_map_with_path(lambda path, _: begun[_name(path)], params)


def _rows(own: Array, theirs: Array | None, names: tuple[str, ...], their_names: tuple[str, ...] | None) -> Any:
    """A table [classes + 1, ...] of which the classes that were there have their rows, and which ones had none."""
    if theirs is None:
        return own, ["all classes"]
    if their_names is None:  # of an older version: by their numbers
        return (jnp.asarray(theirs, own.dtype), []) if theirs.shape == own.shape else (own, ["all classes"])
    table, anew = np.array(own), []
    table[-1] = theirs[-1]  # no class
    for row, name in enumerate(names):
        if name in their_names:
            table[row] = theirs[their_names.index(name)]
        else:
            anew.append(name)
    return jnp.asarray(table), anew


def _named(params: Params) -> list[tuple[str, Array]]:
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
