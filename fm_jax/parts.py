"""Parts of a condition by their names: fields of NamedTuples, keys of dicts, and paths such as `"tokens.t5"`.

A group is one name, or a tuple of names, `("tokens", "mask")`, of what comes and goes together.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

from fm_jax.checks import check_number, shown
from fm_jax.types import Cond

Group: TypeAlias = str | tuple[str, ...]
"""The name of a part of a condition, or the names of several."""


def group_of(what: str, group: Any) -> tuple[str, ...]:
    """A group as a tuple of names in order."""
    names = (group,) if isinstance(group, str) else group
    if not isinstance(names, tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{what} must be a name, or a tuple of names, of parts of cond, got {shown(group)}.")
    return tuple(sorted(set(names)))


def rates_of(rates: Any) -> tuple[tuple[tuple[str, ...], Any], ...]:
    """Groups and their rates, in an order that does not depend on how they are written."""
    if not isinstance(rates, Mapping) or not rates:
        raise ValueError(f"rates must be a mapping such as {{'label': 0.1}}, got {shown(rates)}.")
    found = [(group_of("rates", group), rate) for group, rate in rates.items()]
    for group, rate in found:
        check_number(f"rates[{group[0] if len(group) == 1 else group!r}]", rate, "[0, 1]")
    if len(dict(found)) < len(found):
        raise ValueError(f"rates must have one rate for each group, got {shown(rates)}.")
    return tuple(sorted(found, key=lambda pair: pair[0]))


def names_of(cond: Cond) -> list[str]:
    """Paths of the leaves in the order of `jax.tree.leaves`, `"tokens.t5"`."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(cond)]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]


def places_of(cond: Cond, group: tuple[str, ...], argument: str) -> set[int]:
    """Which leaves belong to a group, which an argument of that name named."""
    names, found = names_of(cond), set()
    for name in group:
        at = {i for i, each in enumerate(names) if f"{each}.".startswith(f"{name}.")}
        if not at:
            there = ", ".join(map(repr, names)) if any(names) else "none with a name"
            raise ValueError(f"{argument} must name parts of cond that there are, {there}, got {name!r}.")
        found |= at
    return found
