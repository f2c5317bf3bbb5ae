"""Command lines made from frozen dataclasses."""

import os
import sys
from pathlib import Path
from typing import Any

import jax


def parse(kind: type, default: Any = None, description: str | None = None) -> Any:
    """Reads the command line into a configuration: an option for every field, `--help` explains each.

    Args:
        kind: dataclass of the configuration.
        default: values of the fields that are not given.
        description: shown by `--help`.

    Raises:
        ImportError: if tyro is not installed.
    """
    try:
        import tyro
    except ImportError as error:
        raise ImportError("experiments need their extra: pip install 'fm_jax[experiments]'.") from error
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a second run starts at once
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fm_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
    options: dict[str, Any] = {} if default is None else {"default": default}
    if spec := sys.modules["__main__"].__spec__:
        options["prog"] = f"python -m {spec.name.removesuffix('.__main__')}"
    # One flat list of options: --batch-size rather than --training.batch-size.
    try:
        return tyro.cli(kind, description=description, config=(tyro.conf.OmitArgPrefixes,), **options)
    except ValueError as error:  # a configuration that refuses its values
        raise SystemExit(str(error)) from error
