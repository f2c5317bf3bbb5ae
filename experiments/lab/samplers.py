"""Files of trained solvers."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fm_jax.samplers import BespokeSolver


def save_solver(path: Path, solver: BespokeSolver) -> None:
    """Writes the numbers of a learned solver, for `load_solver`."""
    arrays: dict[str, Any] = {name: np.asarray(value) for name, value in solver._asdict().items()}
    np.savez(path, **arrays)


def load_solver(path: Path) -> BespokeSolver:
    """A learned solver from the file that `experiments.learned_solver` wrote."""
    if not path.exists():
        raise SystemExit(f"{path} does not exist: python -m experiments.learned_solver writes such a file.")
    with np.load(path) as arrays:
        return BespokeSolver(**{name: jnp.asarray(arrays[name]) for name in BespokeSolver._fields})
