"""Refusals that several files share: each a `ValueError` with the name of the argument, what it must be, and what came.

They run when things are built or traced, never in a compiled step; a value that is traced passes. NaN passes none.
"""

import importlib
import inspect
import math
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fm_jax.types import AnyArray, ArrayTree, Cond, Diffusion, Key

_ABSENT = object()


def is_traced(value: Any) -> bool:
    """Whether the values of an array are not known yet."""
    return isinstance(value, jax.core.Tracer)


def is_number(dtype: Any) -> bool:
    """Whether an array of that dtype holds numbers, complex ones and bools among them."""
    return any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_))


def is_real(dtype: Any) -> bool:
    """Whether an array of that dtype holds real numbers, floating point or integers; bools are none."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def shown(value: Any) -> str:
    """A value as a refusal quotes it: arrays by dtype and shape, classes by name, others cut to 100 characters."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic):
        unknown = (
            value.shape or is_traced(value) or isinstance(value, jax.ShapeDtypeStruct) or not is_number(value.dtype)
        )
        return f"{value.dtype} of shape {tuple(value.shape)}" if unknown else f"the {value.dtype} array {value}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def check_member(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuses what is not in a closed set, and lists the set."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}.")


def check_integer(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuses what is not an integer from `least` to `most`; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {shown(value)}.")
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {wanted}, got {value}.")


def check_seed(name: str, seed: Any) -> None:
    """Refuses what is not an integer from 0 to 2^32 - 1: JAX takes any other modulo 2^32, and so as another seed."""
    check_integer(name, seed, least=0, most=2**32 - 1)


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
    number = as_number(value)
    above = number > low if within[0] == "(" else number >= low
    below = number < high if within[-1] == ")" else number <= high
    if not (above and below):
        words = {
            "(0, inf)": "positive and finite",
            "[0, inf)": "finite and not negative",
            "(-inf, inf)": "a finite number",
        }
        raise ValueError(f"{name} must be {words.get(within, f'in {within}')}, got {shown(value)}.")


def check_setting(instance: Any, name: str, within: str) -> None:
    """`check_number` of a field of a value; what is a JAX array becomes a float, known in every trace."""
    value = getattr(instance, name)
    check_number(name, value, within)
    if isinstance(value, jax.Array) and not is_traced(value):
        object.__setattr__(instance, name, float(value))


def check_known(name: str, value: Any) -> None:
    """Refuses what is traced, of which it must be known beforehand what it is."""
    if is_traced(value):
        raise ValueError(
            f"{name} must be known when it is built, got a traced value: make it a static argument of jit."
        )


def as_number(value: Any) -> float:
    """A real number as a float, and NaN for everything else: strings, arrays, complex numbers, `None`."""
    no_number = (
        not is_real(value.dtype) if hasattr(value, "dtype") else isinstance(value, str | bytes | bool | list | tuple)
    )
    if no_number or np.ndim(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def check_increasing(within: str, **numbers: Any) -> None:
    """Refuses numbers that do not increase strictly within an interval, written as in `check_number`.

    Example:
        >>> check_increasing("(0, inf)", sigma_min=2.0, sigma_max=1.0)
        Traceback (most recent call last):
        ValueError: 0 < sigma_min < sigma_max < inf must hold, got sigma_min=2.0 and sigma_max=1.0.
    """
    if any(map(is_traced, numbers.values())):
        return
    low, high = (end.strip() for end in within[1:-1].split(","))
    signs = ["<=" if within[0] == "[" else "<", *["<"] * (len(numbers) - 1), "<=" if within[-1] == "]" else "<"]
    values = [float(low), *map(as_number, numbers.values()), float(high)]
    holds = (a < b or (sign == "<=" and a == b) for sign, (a, b) in zip(signs, pairwise(values), strict=True))
    if not all(holds):
        wanted = low + "".join(f" {sign} {each}" for sign, each in zip(signs, [*numbers, high], strict=True))
        got = _listed([f"{name}={shown(value)}" for name, value in numbers.items()])
        raise ValueError(f"{wanted} must hold, got {got}.")


def check_pair(name: str, value: Any, within: str) -> tuple[Any, Any]:
    """The two ends of an interval such as (0.2, 0.8); refuses what is not two numbers that increase within another."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ValueError(f"{name} must be a pair (low, high), got {shown(value)}.")
    try:
        check_increasing(within, low=value[0], high=value[1])
    except ValueError as error:
        raise ValueError(f"{name} must be a pair (low, high): {error}") from None
    return value[0], value[1]


def check_bool(name: str, value: Any) -> None:
    """Refuses what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}.")


def check_range(t_min: float, t_max: float) -> None:
    """Refuses what is not a range of times within [0, 1]."""
    check_increasing("[0, 1]", t_min=t_min, t_max=t_max)


def check_ends(t0: float, t1: float) -> None:
    """Refuses two times that are equal or not finite."""
    check_number("t0", t0, "(-inf, inf)")
    check_number("t1", t1, "(-inf, inf)")
    if not (is_traced(t0) or is_traced(t1)) and t0 == t1:
        raise ValueError(f"t0 and t1 must differ, both are {t0}.")


def check_key(key: Key | None, name: str = "key") -> None:
    """Refuses what is not one typed PRNG key."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise ValueError(f"{name} must be one typed key, as from jax.random.key(0), got {shown(key)}.")


def check_array(name: str, value: Any, wanted: str = "an array, as jnp.asarray makes") -> None:
    """Refuses what is no array: lists, numbers, strings, `None`."""
    if isinstance(value, type) or not (hasattr(value, "shape") and hasattr(value, "dtype")):
        got = f"a {type(value).__name__}" if isinstance(value, list | tuple | dict) else shown(value)
        raise ValueError(f"{name} must be {wanted}, got {got}.")


def check_real(name: str, value: Any) -> None:
    """Refuses what is no array of real numbers, floating point or integers."""
    check_array(name, value)
    if not is_real(value.dtype):
        raise ValueError(f"{name} must be real numbers, got {value.dtype}.")


def check_state(x: AnyArray, name: str = "x0") -> None:
    """Refuses a state that is not a real floating-point array with a batch axis."""
    check_array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize < 2:
        advice = "; fm_jax.data.images.to_float brings pixels to [-1, 1]" if x.dtype == np.uint8 else ""
        raise ValueError(f"{name} must be floating point, got {x.dtype}{advice}.")
    if len(x.shape) == 0:
        raise ValueError(f"{name} must be [batch, ...], got a scalar.")


def check_event(x: AnyArray, name: str = "x") -> None:
    """Refuses a state of nothing: [batch, ...] in which an axis of the event has length 0."""
    check_state(x, name)
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} must be [batch, ...] with an event that is not empty, got shape {tuple(x.shape)}.")


def check_tokens(name: str, x: AnyArray, num_tokens: int | None = None) -> None:
    """Refuses what is not [batch, ...] of integers from 0 to `num_tokens` - 1; of traced ones the values pass."""
    check_array(name, x)
    upward = "from 0 on" if num_tokens is None else f"from 0 to {num_tokens - 1}"
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be tokens, integers {upward}, got {x.dtype}.")
    if len(x.shape) == 0:
        raise ValueError(f"{name} must be [batch, ...], got a scalar.")
    if is_traced(x) or isinstance(x, jax.ShapeDtypeStruct) or not getattr(x, "is_fully_addressable", True):
        return
    values = np.asarray(x)
    if values.size and not (values.min() >= 0 and (num_tokens is None or values.max() < num_tokens)):
        raise ValueError(f"{name} must be tokens {upward}, got some from {values.min()} to {values.max()}.")


def check_logits(name: str, logits: AnyArray, x: AnyArray, num_tokens: int | None = None) -> None:
    """Refuses what is not real numbers [batch, ..., K], K for each token of `x` [batch, ...]; by default any K."""
    check_array(name, logits)
    if num_tokens is None:
        num_tokens = logits.shape[-1] if logits.shape else 0
    if logits.shape != (*x.shape, num_tokens):
        raise ValueError(f"{name} must be {[*x.shape, num_tokens]}, one for each token, got shape {logits.shape}.")
    check_real(name, logits)


def check_estimate(estimate: AnyArray, x: AnyArray, num_tokens: int) -> None:
    """Refuses what is not [batch, ..., K], or known to be neither probabilities nor zeros: logits, most of all."""
    check_logits("estimate", estimate, x, num_tokens)
    if is_traced(estimate) or not getattr(estimate, "is_fully_addressable", True):
        return
    values = np.asarray(estimate, np.float64)
    total = values.sum(axis=-1)
    if not ((values >= 0).all() and (np.isclose(total, 1, atol=0.02) | (total == 0)).all()):
        raise ValueError(f"estimate must be probabilities of the tokens, or zeros, got {shown(estimate)}.")


def check_where(name: str, value: Any, x: AnyArray) -> None:
    """Refuses what is not bools, an array that broadcasts to the shape of `x`."""
    check_array(name, value)
    try:
        fits = jnp.broadcast_shapes(value.shape, x.shape) == x.shape
    except ValueError:
        fits = False
    if value.dtype != bool or not value.shape or not fits:
        raise ValueError(f"{name} must be bool and broadcast to the state {x.shape}, got {shown(value)}.")


def check_data(name: str, x: AnyArray) -> None:
    """Refuses a state without an example, or with nothing in it."""
    check_state(x, name)
    if 0 in x.shape:
        raise ValueError(f"{name} must be [batch, ...], not empty, got shape {tuple(x.shape)}.")


def check_shape(name: str, value: AnyArray, x: AnyArray, like: str = "x") -> None:
    """Refuses what a function such as "v(t, x)" returns if it is not real numbers in the shape of `x`, named `like`."""
    check_array(name, value, f"an array of the shape of {like}, {tuple(x.shape)}")
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of {like}, {x.shape}, got {value.shape}.")
    check_real(name, value)


def check_same_shape(**arrays: AnyArray) -> None:
    """Refuses what is no array, and arrays of different shapes."""
    for name, array in arrays.items():
        check_array(name, array)
    shapes = [array.shape for array in arrays.values()]
    if len(set(shapes)) > 1:
        raise ValueError(f"{_listed(arrays)} must have the same shape, got {_listed(shapes)}.")


def check_per_example(x: AnyArray, **values: AnyArray | None) -> None:
    """Refuses the first of the values that is there and not [batch], a real number for each example."""
    for name, value in values.items():
        if value is not None:
            check_numbers_of(name, value, x, scalar=False)


def check_numbers_of(name: str, value: Any, x: AnyArray, *, scalar: bool = True) -> None:
    """Refuses what is not [batch], a real number for each example, or one for all where `scalar`."""
    if scalar and not is_traced(value) and not math.isnan(as_number(value)):
        return
    check_array(name, value)
    if value.shape != x.shape[:1] and not (scalar and value.shape == ()):
        raise ValueError(f"{name} must be {'a number or ' * scalar}[batch] = {x.shape[:1]}, got shape {value.shape}.")
    check_real(name, value)


def check_times(name: str, t: Any, domain: tuple[float, float], what: str) -> None:
    """Refuses times, unless they are traced, that are not within a domain; `what` says whose that is.

    A rounding error of float32 beyond an end is none.
    """
    if is_traced(t):
        return
    check_finite(name, t)
    low, high = domain
    values, eps = np.asarray(t, dtype=np.float64), float(np.finfo(np.float32).eps)
    if not ((values >= low - eps) & (values <= high + eps)).all():
        least, most = (float(each) for each in (values.min(), values.max()))
        got = f"{least:g}" if values.size == 1 else f"times from {least:g} to {most:g}"
        raise ValueError(f"{name} must be within {[low, high]}, {what}, got {got}.")


def check_condition(x: ArrayTree, cond: Cond) -> None:
    """Refuses a condition of another batch than that of `x`, and one that is no pytree of arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(cond):
        name = "cond" + jax.tree_util.keystr(path)
        if not hasattr(leaf, "shape"):
            raise ValueError(f"{name} must be an array [batch, ...] with batch = {x.shape[0]}, got {shown(leaf)}.")
        if leaf.shape[:1] != x.shape[:1]:
            raise ValueError(f"{name} must be [batch, ...] with batch = {x.shape[0]}, got shape {leaf.shape}.")


def check_finite(name: str, value: ArrayTree) -> None:
    """Refuses numbers that are not real and finite everywhere, unless they are traced."""
    if is_traced(value):
        return
    try:
        numbers = np.asarray(value)
    except (TypeError, ValueError):  # keys, a ragged list
        numbers = np.asarray(None)
    if numbers.dtype.kind not in "iufV":  # V: bfloat16 and its like
        raise ValueError(f"{name} must be real numbers, got {shown(value)}.")
    if not np.isfinite(numbers.astype(np.float64)).all():
        raise ValueError(f"{name} must be finite, got {value}.")


def check_diffusion(diffusion: Diffusion) -> None:
    """Refuses a noise coefficient that is neither a function nor a finite number, not negative."""
    if callable(diffusion):
        check_function("diffusion", diffusion, "a number or a function of a scalar time", 1)
    else:
        check_number("diffusion", diffusion, "[0, inf)")


def check_tolerances(rtol: float | None, atol: float | None, max_steps: int) -> None:
    """Refuses tolerances and a number of steps with which no adaptive steps can be taken."""
    check_number("rtol", rtol, "[0, inf)")
    check_number("atol", atol, "(0, inf)")  # with 0, steps towards a component that is 0 become ever smaller
    check_integer("max_steps", max_steps)


def check_has(name: str, value: Any, attributes: tuple[str, ...], wanted: str) -> None:
    """Refuses an object without the attributes of its noun, and a class in place of an object; `wanted` says which."""
    if isinstance(value, type):
        raise ValueError(f"{name} must be {wanted}, got the class {value.__name__}: make one, {value.__name__}(...).")
    for attribute in attributes:
        # Not hasattr alone, which would take the error of a property for its absence.
        if inspect.getattr_static(value, attribute, _ABSENT) is _ABSENT and not hasattr(value, attribute):
            raise ValueError(f"{name} must be {wanted}, got {shown(value)}, which has no {attribute!r}.")


def check_schedule(schedule: Any, name: str = "schedule") -> None:
    """Refuses what is not a schedule."""
    check_has(name, schedule, ("alpha", "sigma", "t_from_log_snr", "domain"), "a schedule, such as Linear()")


def check_source(source: Any) -> None:
    """Refuses what is not a source."""
    check_has("source", source, ("draw", "log_prob"), "a source, such as Normal()")


def check_function(name: str, value: Any, wanted: str, num: int | None = None, **keywords: Any) -> None:
    """Refuses what cannot be called, and a class in place of its instance.

    Args:
        name: of the argument.
        value: the function.
        wanted: says what is expected.
        num: of the arguments, by position, that it has to take, where that can be told; `None` tells nothing.
        keywords: that it has to take too.
    """
    if isinstance(value, type) or not callable(value):
        raise ValueError(f"{name} must be {wanted}, got {shown(value)}.")
    if num is None:
        return
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # some are not known
        return
    try:
        signature.bind(*[None] * num, **keywords)
    except TypeError:
        raise ValueError(f"{name} must be {wanted}, got one with the arguments {signature}.") from None


def check_velocity(v: Any, name: str = "v") -> None:
    """Refuses what is not a velocity function."""
    check_function(name, v, "a velocity function v(t, x)", 2)


def check_network(
    name: str, apply_fn: Any, wanted: str = "a function apply_fn(params, t, x, cond, train=, rngs=)"
) -> None:
    """Refuses what is not a network as the losses see it, a module of a library among them."""
    of_module = hasattr(apply_fn, "apply") and hasattr(apply_fn, "init") and not isinstance(apply_fn, type)
    if of_module and getattr(apply_fn, "scope", None) is None:  # one that is bound can be called
        raise ValueError(f"{name} must be {wanted}, got a Linen module: linen_apply(module) makes one of it.")
    if name.startswith("apply"):
        check_function(name, apply_fn, wanted, 4, train=True, rngs=None)
    else:
        check_function(name, apply_fn, wanted, 3)


def check_coupling(coupling: Any) -> None:
    """Refuses what is not a coupling."""
    check_function("coupling", coupling, "a coupling, such as ExactOT() or fm_jax.couplings.independent", 4)


def check_holds(batch: Any, *names: str) -> None:
    """Refuses what is not a batch, a dict with these arrays."""
    if not isinstance(batch, Mapping):
        if isinstance(batch, tuple | list):  # a pair (x, y)
            wanted = f'{{"{names[-1] if names else "x1"}": data, "cond": labels}}'
            raise ValueError(f"the batch must be a dict, {wanted}, got a {type(batch).__name__} of {len(batch)}.")
        held = f" with {' and '.join(map(repr, names))}" if names else ""
        raise ValueError(f"the batch must be a dict{held}, got {shown(batch)}.")
    for name in names:
        if name not in batch:
            raise ValueError(f"the batch must hold {name!r}, got {sorted(map(str, batch))}.")


def why_no_folder(folder: str | os.PathLike[str]) -> str | None:
    """What is in the way of a folder, in words: a file, or a link that leads nowhere; `None` if nothing is."""
    for each in (Path(folder), *Path(folder).parents):
        if os.path.exists(each):
            return None if os.path.isdir(each) else f"{each} is a file"
        if os.path.islink(each):
            return f"{each} is a symbolic link to nothing"
    return None


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
