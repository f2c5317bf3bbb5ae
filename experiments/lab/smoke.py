"""A smoke run: the whole path of an experiment once, with next to no computation."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax

from experiments.lab.processes import by_first, wait_for_all
from fm_jax.train.folder import LOCK, lock_folder

TRAINING = {"total_steps": 4, "warmup_steps": 0, "log_every": 2, "save_every": 2, "sample_every": 4}
FIRST_STEPS = 2  # of the four
MARK = ".smoke"
"""The file that says that a folder was made by a smoke run, and may go."""


def smoke(config: Any, **smaller: Any) -> Any:
    """The configuration of a smoke run if `config.smoke` asks for one, else `config` itself.

    Its training has a few steps, and the folder of its results is one of its own beside that of the run, started
    afresh. No time is spent on optimising compilation.

    Args:
        config: dataclass with `smoke`, and with `training: Training`, `run_dir: Path`, or `out: Path`, a folder too.
        smaller: what makes the experiment small: new values of fields, and for a dataclass among them a dict.

    Raises:
        ValueError: if there is something else where the folder of its results is to be.
    """
    if not config.smoke:
        return config
    jax.config.update("jax_disable_most_optimizations", True)
    if hasattr(config, "training"):
        folder = {"run_dir": _afresh(config.training.run_dir)}
        batch_size = 8 * jax.device_count() * config.training.accumulate
        smaller["training"] = TRAINING | {"batch_size": batch_size} | folder
        if first_steps := getattr(getattr(config, "method", None), "first_steps", 0):
            smaller["method"] = smaller.get("method", {}) | {"first_steps": min(first_steps, FIRST_STEPS)}
    else:
        place = "run_dir" if hasattr(config, "run_dir") else "out"
        smaller[place] = _afresh(getattr(config, place))
    return _replace(config, smaller)


def _replace(config: Any, values: dict[str, Any]) -> Any:
    new = {k: _replace(getattr(config, k), v) if isinstance(v, dict) else v for k, v in values.items()}
    return dataclasses.replace(config, **new)


def _afresh(run_dir: Path) -> Path:
    run_dir = run_dir if run_dir.name not in ("", "..") else run_dir.resolve()
    folder = run_dir.with_name(run_dir.name + "-smoke")
    _clear(folder)
    wait_for_all("the folder of the smoke run")
    return folder


@by_first
def _clear(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder}, where --smoke would put its results, is not a folder: give another --run-dir.")
    with lock_folder(folder):
        if not _is_ours(folder):
            raise ValueError(
                f"{folder}, where --smoke would put its results and remove what is there, was not made by a smoke run: "
                "move it away, or give another --run-dir."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def _is_ours(folder: Path) -> bool:
    if (folder / MARK).exists() or not {path.name for path in folder.iterdir()} - {LOCK}:
        return True
    try:
        return json.loads((folder / "config.json").read_bytes())["smoke"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False
