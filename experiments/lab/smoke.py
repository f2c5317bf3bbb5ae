"""A smoke run: the whole path of an experiment once, with next to no computation."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax

TRAINING = {"total_steps": 4, "warmup_steps": 0, "log_every": 2, "save_every": 2, "sample_every": 4}


def smoke(config: Any, **smaller: Any) -> Any:
    """The configuration of a smoke run if `config.smoke` asks for one, else `config` itself.

    Its training has a few steps, and the folder of its results is one of its own beside that of the run, started
    afresh. No time is spent on optimising compilation.

    Args:
        config: dataclass with `smoke`, and with either `training: Training` or `run_dir: Path`.
        smaller: what makes the experiment small: new values of fields, and for a dataclass among them a dict.
    """
    if not config.smoke:
        return config
    jax.config.update("jax_disable_most_optimizations", True)
    if hasattr(config, "training"):
        folder = {"run_dir": _afresh(config.training.run_dir)}
        smaller["training"] = TRAINING | {"batch_size": 8 * jax.local_device_count()} | folder
    else:
        smaller["run_dir"] = _afresh(config.run_dir)
    return _replace(config, smaller)


def _replace(config: Any, values: dict[str, Any]) -> Any:
    new = {k: _replace(getattr(config, k), v) if isinstance(v, dict) else v for k, v in values.items()}
    return dataclasses.replace(config, **new)


def _afresh(run_dir: Path) -> Path:
    folder = run_dir.with_name(run_dir.name + "-smoke")
    shutil.rmtree(folder, ignore_errors=True)
    return folder
