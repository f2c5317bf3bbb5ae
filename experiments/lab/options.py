"""What the fields of a configuration may be, in the words of its command line."""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import numpy as np

from fm_jax.checks import check_bool, check_integer, check_member, check_number, check_pair, shown

Range = int | tuple[int, int] | str
"""The least of an integer, or the least and the most; of a real number the interval, as in `check_number`."""
SEED = (0, 2**32 - 1)
MOST = 10**6
"""Of an integer whose most is not given: memory and time end before that."""
STEPS = (1, 2**31 - 1)
"""Of training, which cost no memory."""


def option(path: str) -> str:
    """A field, or the path of one within nested configurations, as it is typed: `--batch-size`."""
    name = path.rpartition(".")[2]
    return "--" + {"label": "class"}.get(name, name).replace("_", "-")


def as_typed(message: str, words: Mapping[str, str]) -> str:
    """What the library says, in the words of a command line: patterns, if they have a backslash, or plain words."""
    for said, typed in words.items():
        message = re.sub(said if "\\" in said else re.escape(said), typed, message)
    return message


def path_of(text: str) -> Path:
    """The path that was meant, where a shell has not expanded it, or a job system has passed more than the path.

    "~/x" and "$HOME/x" are expanded, "file:///x" is /x, and quotation marks and blanks around it go, like the carriage
    return at the end of a line from Windows. What is there under the very text is taken as it is.

    Raises:
        ValueError: for what cannot be meant; the option's name is for the caller to say.
    """
    if os.path.lexists(text):
        return Path(text)
    path = text.strip()
    if len(path) > 1 and path[0] == path[-1] and path[0] in "\"'":
        path = path[1:-1].strip()
    elif path[:1] in ('"', "'") or path[-1:] in ('"', "'"):
        raise ValueError(f"must have both of its quotation marks or none, got {text}.")
    if not path:
        raise ValueError("must not be empty. Give a value, or leave it out.")
    if any(ord(each) < 32 or ord(each) == 127 for each in path):
        raise ValueError(f"must be a path without line breaks and other control characters, got {text!r}.")
    if "$(" in path or "`" in path:
        raise ValueError(f"must be a path, got a command that no shell has replaced, {text}.")
    if path.startswith("file:"):
        path = unquote(re.sub("^//(localhost)?(?=/)", "", path.removeprefix("file:")))
        if not path.startswith("/") or path.startswith("//"):
            raise ValueError(f"must be a path on this machine, such as file:///runs/a or /runs/a, got {text}.")
    if scheme := re.match("([A-Za-z][A-Za-z0-9+.-]+)://", path):
        raise ValueError(f"must be a path on this machine, got {text}: mount what {scheme[1]}:// stands for, or copy.")
    return Path(_with_home(re.sub(r"\$([A-Za-z_]\w*|\{\w+\})", _variable, path)))


def _variable(found: re.Match[str]) -> str:
    name = found[1].strip("{}")
    if not (value := os.environ.get(name)):
        kind = "is not set" if value is None else "is empty"
        raise ValueError(f"must be a path, got {found.string}, and the environment variable {name} {kind}.")
    return value


def _with_home(path: str) -> str:
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        user = path[1:].partition("/")[0]
        who = f"a user {user}, whose home that would be" if user else "a home directory"
        raise ValueError(f"must be a path, got {path}, and there is not {who}. A name that begins so is ./{path}.")
    return whole


def check_options(config: Any, **ranges: Range) -> None:
    """Refuses a configuration with a field that is not of its type, not in its range, or empty.

    Args:
        config: a dataclass whose fields are booleans, numbers, strings, literals, paths, tuples of them, or None.
        ranges: of the fields that are numbers, or tuples of them; by default integers are from 1 to `MOST`, and real
            numbers those of float32.

    Raises:
        ValueError: that names the option.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        _check(option(field.name), hints[field.name], getattr(config, field.name), ranges.get(field.name))


def _check(name: str, hint: Any, value: Any, allowed: Range | None) -> None:
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if value is not None:
            _check(name, kinds[0], value, allowed)
    elif typing.get_origin(hint) is Literal:
        check_member(name, value, kinds)
    elif hint is bool:
        check_bool(name, value)
    elif hint is int:
        least, most = allowed if isinstance(allowed, tuple) else (1 if allowed is None else int(allowed), MOST)
        check_integer(name, value, least, most)
    elif hint is float:
        check_number(name, value, "(-inf, inf)" if allowed is None else str(allowed))
        if abs(value) > np.finfo(np.float32).max:
            raise ValueError(f"{name} must be a number of float32, got {value}.")
    elif typing.get_origin(hint) is tuple:
        _check_tuple(name, kinds, value, allowed)
    elif not isinstance(value, hint):
        raise ValueError(f"{name} must be a {hint.__name__}, got {shown(value)}.")


def _check_tuple(name: str, kinds: tuple[Any, ...], value: Any, allowed: Range | None) -> None:
    if kinds == (float, float):
        check_pair(name, value, str(allowed))
        return
    if not isinstance(value, tuple):
        raise ValueError(f"{name} must be several values, got {shown(value)}.")
    for each in value:
        _check(f"each of {name}", kinds[0], each, allowed)
    if len(set(value)) < len(value):
        raise ValueError(f"{name} must be distinct, got {' '.join(map(str, value))}.")


def check_some(name: str, values: tuple[Any, ...]) -> None:
    """Refuses an option without values."""
    if not values:
        raise ValueError(f"{name} must have at least one value, got none.")


def check_multiple(name: str, value: int, of: int, what: str) -> None:
    """Refuses what does not divide by a number; `what` says of whom that is."""
    if value % of:
        raise ValueError(f"{name} must be a multiple of {of}, {what}, got {value}.")


def of_smoke(own: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, str]]:
    """The options whose values a smoke run replaces by its own, and why they have no effect.

    Args:
        own: the replacements as `smoke` takes them, of which the names count.
        within: what the fields are within.
    """
    for name, value in own.items():
        if isinstance(value, Mapping):
            yield from of_smoke(value, f"{within}{name}.")
        else:
            yield within + name, "--smoke has its own"


def refuse_unused(config: Any, default: Any = None) -> None:
    """Refuses what was asked for and would be ignored.

    Args:
        config: that may have a method `unused`, which yields pairs of a field, such as `sampling.eta`, and why it has
            no effect: "--solver heun has no such option".
        default: the configuration of an empty command line; by default the defaults of the fields.

    Raises:
        ValueError: for the first that differs from the default.
    """
    pairs: Iterator[tuple[str, str]] = config.unused() if hasattr(config, "unused") else iter(())
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for path, why in pairs:
        value, usual = _at(config, path), defaults[path] if default is None else _at(default, path)
        if value != usual:
            words = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise ValueError(f"{option(path)} {words} would have no effect: {why}. Leave it out.")


def _at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config
