"""Which key of a file is which of a network's: prefixes, averages, and what is missing, unused or of another shape."""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from fm_jax.checks import shown
from fm_jax.weights.formats import WeightsError, scales_of_quantised
from fm_jax.weights.rules import Rules
from fm_jax.weights.safetensors import Tensors

AVERAGES = ("ema", "model_ema", "model")
"""What a file may hold of one network, the first that is there taken: averages, and the parameters themselves."""
_WRAPPERS = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
PREFIXES = (
    "",
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.",
    "text_encoders.clip_l.transformer.",
    "vae.",
)
"""What files of several networks put before the keys of one."""
_COUNTERS = {"model_ema.decay", "model_ema.num_updates"}


@dataclass(frozen=True)
class _View:
    """One way in which a file may name the tensors of a network."""

    average: str
    prefix: str
    without_dots: str | None = None

    def name(self, key: str) -> str:
        flat = key if self.without_dots is None else (self.without_dots + key).replace(".", "")
        return self.prefix + flat


_VIEWS = (
    *(_View("model", wrapper + prefix) for wrapper in _WRAPPERS for prefix in PREFIXES),
    *(_View(average, f"{average}.{wrapper}") for average in AVERAGES for wrapper in _WRAPPERS),
    *(_View("model_ema", "model_ema.", network) for network in ("diffusion_model.", "")),
)


def names_of(tensors: Mapping[str, Any], rules: Rules, prefix: str | None, average: str | None) -> dict[str, str]:
    """The key of ours for each key of the file that is this network's; warns of choices and refuses what is unused."""
    wanted = {*rules.shapes, *rules.tables}
    if average is not None and average not in AVERAGES:
        raise ValueError(f"average must be one of {', '.join(map(repr, AVERAGES))} or None, got {shown(average)}.")
    if prefix is not None:
        if not isinstance(prefix, str) or average is not None:
            what = f"got {shown(prefix)}" if average is None else "and then average is left out"
            raise ValueError(f"prefix must be a string that the keys of the network begin with, {what}.")
        if prefix and not any(key.startswith(prefix) for key in tensors):
            raise WeightsError(f"No key of {where(tensors)} begins with {prefix!r}.")
        return {key: key[len(prefix) :] for key in tensors if key.startswith(prefix)}
    view, present = _choose(tensors, wanted, average)
    mine = {view.name(key): key for key in wanted}
    if view.without_dots is not None and len(mine) < len(wanted):
        raise WeightsError(
            f"{where(tensors)} names its average without dots, in which keys of this network coincide; take "
            "average='model'."
        )
    others = {other.name(key) for other in present if other != view for key in wanted} - mine.keys()
    names, left = {}, []
    for key in tensors:
        if not key.startswith(view.prefix) or key in others or (key in _COUNTERS and view.average != "model"):
            left.append(key)
        elif not (key in _COUNTERS and any(other.average == "model_ema" for other in present)):
            names[key] = mine.get(key, key if view.without_dots else key[len(view.prefix) :])
    _say(tensors, view, present, left)
    return names


def _choose(tensors: Mapping[str, Any], wanted: Collection[str], average: str | None) -> tuple[_View, list[_View]]:
    """The view under which most keys are there, of the average that is wanted; and those of all averages."""
    best: dict[str, tuple[int, _View]] = {}
    for view in _VIEWS:
        found = sum(view.name(key) in tensors for key in wanted)
        if found > best.get(view.average, (0, view))[0]:
            best[view.average] = found, view
    if average is not None and average not in best:
        have = ", ".join(repr(name) for name in AVERAGES if name in best) or "none of its keys"
        raise WeightsError(f"{where(tensors)} has no {average!r} of this network: it has {have}.")
    name = average or next((each for each in AVERAGES if each in best), None)
    return best[name][1] if name else _View("model", ""), [view for _, view in best.values()]


def _say(tensors: Mapping[str, Any], view: _View, present: list[_View], left: list[str]) -> None:
    said = []
    if len(present) > 1 or view.average != "model":
        there = " and ".join(repr(each) for each in AVERAGES if any(each == other.average for other in present))
        said.append(f"{view.average!r} is taken, of {there}")
    if view.prefix:
        said.append(f"the prefix {view.prefix!r} is dropped from the keys")
    if left:
        said.append(f"{len(left)} keys are left alone: {_groups(left)}")
    if said:
        warnings.warn(f"{where(tensors)}: {'; '.join(said)}.", stacklevel=4)


def _groups(keys: Iterable[str]) -> str:
    """Keys by what they begin with, and how many there are of each."""
    counts: dict[str, int] = {}
    for key in keys:
        first = key.partition(".")[0] + "." * ("." in key)
        counts[first] = counts.get(first, 0) + 1
    return ", ".join(name if not name.endswith(".") else f"{name}* ({count})" for name, count in counts.items())


def check_keys(
    tensors: Mapping[str, Any], rules: Rules, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]
) -> dict[str, str]:
    """The key of the file for each key of the rules; a copy stands in for an original that a file may lack."""
    there = {key: name for name, key in names.items()}
    for copy, original in rules.copies.items():
        if original not in there and copy in there and {copy, original} & rules.optional:
            there[original] = there[copy]
    missing = [key for key in [*shapes, *rules.tables] if key not in there and key not in rules.optional]
    wanted = {*shapes, *rules.tables}
    unused = [
        name
        for name, key in names.items()
        if key not in wanted and not any(re.fullmatch(each, key) for each in rules.ignored)
    ]
    if scales := scales_of_quantised(unused):
        raise WeightsError(
            f"{where(tensors)} is quantised: {listed(scales)} are scales and codes of its numbers. Give the "
            "safetensors of the same model in bfloat16 or float32."
        )
    wrong = [
        f"{there[key]} is {list(tensors[there[key]].shape)}, must be {list(shape)}{_of(tensors, there[key])}"
        for key, shape in shapes.items()
        if key in there and tuple(tensors[there[key]].shape) != shape
    ]
    kinds = [
        f"{there[key]} is {tensors[there[key]].dtype}, must be {'floating point' if real else 'integers'}"
        for key, real in _kinds(rules).items()
        if key in there and is_float(tensors[there[key]].dtype) != real
    ]
    lines = [
        f"{len(keys)} {what}: {', '.join(keys)}"
        for keys, what in (
            (missing, "missing"),
            ([f"{name}{_of(tensors, name)}" for name in unused], "unused"),
            (wrong, "of another shape"),
            (kinds, "of another kind"),
        )
        if keys
    ]
    if lines:
        raise WeightsError(
            "\n  ".join([f"{where(tensors)} does not fit the network. Of its keys are", *lines])
            + _elsewhere(tensors, missing)
        )
    return there


def _kinds(rules: Rules) -> dict[str, bool]:
    """Whether each tensor holds floating-point numbers."""
    kinds = {piece.key: is_float(rules.leaves[piece.path].dtype) for piece in rules.pieces}
    return kinds | {copy: kinds[original] for copy, original in rules.copies.items()}


def _of(tensors: Mapping[str, Any], key: str) -> str:
    """Which of several files a key is in."""
    if not isinstance(tensors, Tensors) or str(tensors.file_of(key)) == tensors.where:
        return ""
    return f" ({tensors.file_of(key).name})"


def _elsewhere(tensors: Mapping[str, Any], missing: list[str]) -> str:
    """Where the missing keys are, if it is behind one prefix."""
    if not missing:
        return ""
    prefixes = [key[: -len(missing[0])] for key in tensors if key.endswith(missing[0])]
    found = [prefix for prefix in prefixes if prefix and all(prefix + key in tensors for key in missing)]
    return f"\nThose that are missing are there behind {listed(found)}: give one as prefix." if found else ""


def where(tensors: Mapping[str, Any]) -> str:
    """What refusals call the tensors: the file or the folder."""
    return tensors.where if isinstance(tensors, Tensors) else "the mapping of tensors"


def listed(names: Iterable[str]) -> str:
    """Names in quotes, one after another."""
    return ", ".join(map(repr, sorted(names))) or "nothing else"


def is_float(dtype: Any) -> bool:
    """Whether a dtype is that of floating-point numbers, the short ones among them."""
    return jnp.issubdtype(known_dtype(dtype), jnp.floating)


def known_dtype(dtype: Any) -> np.dtype:
    """A dtype of NumPy or of JAX; of another library, that of objects."""
    try:
        return np.dtype(dtype)
    except TypeError:
        return np.dtype(object)
