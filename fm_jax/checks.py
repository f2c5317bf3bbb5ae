"""Refusals that several files share: each a `ValueError` with the name of the argument, what it must be, and what came.

They run when things are built or traced, never in a compiled step; a value that is traced passes. NaN passes none.
"""

import importlib
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.types import AnyArray, ArrayTree, Cond, Diffusion, Key

_ABSENT = object()


def is_traced(value: Any) -> bool:
    """Whether the values of an array are not known yet."""
    return isinstance(value, jax.core.Tracer)


def check_member(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuses what is not in a closed set, and lists the set."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_integer(name: str, value: Any, least: int = 1) -> None:
    """Refuses what is not an integer of at least `least`; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_number(name: str, value: Any, within: str) -> None:
    """Refuses a number outside of an interval.

    Args:
        name: of the argument.
        value: a number; a traced one passes.
        within: the interval as it is written, such as "(0, 1]" or "[0, inf)".

    Example:
        >>> check_number("sigma", 0.0, "(0, inf)")
        Traceback (most recent call last):
        ValueError: sigma must be positive and finite, got 0.0.
    """
    if is_traced(value):
        return
    low, high = (float(end) for end in within[1:-1].split(","))
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    above = number > low if within[0] == "(" else number >= low
    below = number < high if within[-1] == ")" else number <= high
    if not (above and below):
        words = {"(0, inf)": "positive and finite", "[0, inf)": "finite and not negative", "(-inf, inf)": "finite"}
        raise ValueError(f"{name} must be {words.get(within, f'in {within}')}, got {value!r}.")


def check_bool(name: str, value: Any) -> None:
    """Refuses what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")


def check_range(t_min: float, t_max: float) -> None:
    """Refuses what is not a range of times within [0, 1]."""
    if not 0 <= t_min < t_max <= 1:
        raise ValueError(f"0 <= t_min < t_max <= 1 must hold, got t_min={t_min} and t_max={t_max}.")


def check_ends(t0: float, t1: float) -> None:
    """Refuses two times that are equal or not finite."""
    if not (math.isfinite(t0) and math.isfinite(t1)):
        raise ValueError(f"t0 and t1 must be finite, got {t0} and {t1}.")
    if t0 == t1:
        raise ValueError(f"t0 and t1 must differ, both are {t0}.")


def check_key(key: Key | None) -> None:
    """Refuses what is not one typed PRNG key."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise ValueError(f"key must be one typed key, as from jax.random.key(0), got {key!r}.")


def check_state(x: AnyArray, name: str = "x0") -> None:
    """Refuses a state that is not real floating point with a batch axis."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {x.dtype}.")
    if x.ndim == 0:
        raise ValueError(f"{name} must be [batch, ...], got a scalar.")


def check_shape(name: str, value: AnyArray, x: AnyArray) -> None:
    """Refuses what a function such as "v(t, x)" returns if it has not the shape of `x`."""
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {x.shape}, got {value.shape}.")


def check_same_shape(**arrays: AnyArray) -> None:
    """Refuses arrays of different shapes."""
    shapes = [array.shape for array in arrays.values()]
    if len(set(shapes)) > 1:
        raise ValueError(f"{_listed(arrays)} must have the same shape, got {_listed(shapes)}.")


def check_per_example(x: AnyArray, **values: AnyArray | None) -> None:
    """Refuses the first of the values that is there and not [batch], a number for each example."""
    for name, value in values.items():
        if value is not None and value.shape != x.shape[:1]:
            raise ValueError(f"{name} must be [batch] = {x.shape[:1]}, got shape {value.shape}.")


def check_condition(x: ArrayTree, cond: Cond) -> None:
    """Refuses a condition of another batch than that of `x`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        if np.shape(leaf)[:1] != x.shape[:1]:
            name = "cond" + jax.tree_util.keystr(path)
            raise ValueError(f"{name} must be [batch, ...] with batch = {x.shape[0]}, got shape {np.shape(leaf)}.")


def check_finite(name: str, value: ArrayTree) -> None:
    """Refuses an array that is not finite everywhere, unless it is traced."""
    if not is_traced(value) and not np.isfinite(value).all():
        raise ValueError(f"{name} must be finite, got {value}.")


def check_diffusion(diffusion: Diffusion) -> None:
    """Refuses a noise coefficient that is neither a function nor a finite number, not negative."""
    if not callable(diffusion):
        check_number("diffusion", diffusion, "[0, inf)")


def check_tolerances(rtol: float | None, atol: float | None, max_steps: int) -> None:
    """Refuses tolerances and a number of steps with which no adaptive steps can be taken."""
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is None or not 0 <= tolerance < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {tolerance}.")
    if rtol == 0 and atol == 0:
        raise ValueError("rtol and atol must not both be 0.")
    check_integer("max_steps", max_steps)


def check_has(name: str, value: Any, attributes: tuple[str, ...], wanted: str) -> None:
    """Refuses an object without the attributes of its noun, and a class in place of an object; `wanted` says which."""
    if isinstance(value, type):
        raise ValueError(f"{name} must be {wanted}, got the class {value.__name__}.")
    for attribute in attributes:
        # Not hasattr alone, which would take the error of a property for its absence.
        if inspect.getattr_static(value, attribute, _ABSENT) is _ABSENT and not hasattr(value, attribute):
            raise ValueError(f"{name} must be {wanted}, got {value!r}, which has no {attribute!r}.")


def check_schedule(schedule: Any) -> None:
    """Refuses what is not a schedule."""
    check_has("schedule", schedule, ("alpha", "sigma", "t_from_log_snr", "domain"), "a schedule, such as Linear()")


def check_source(source: Any) -> None:
    """Refuses what is not a source."""
    check_has("source", source, ("draw", "log_prob"), "a source, such as Normal()")


def imported(package: str, caller: str, install: str | None = None) -> Any:
    """A package that is slow to import or not always there, when `caller` needs it.

    Raises:
        ImportError: that says who needs it and how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{caller} needs {package}: pip install {install or package}.") from error


def _listed(names: Any) -> str:
    *first, last = map(str, names)
    return f"{', '.join(first)} and {last}"
