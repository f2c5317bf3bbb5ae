"""What is public in fm_jax, and which objects the pages of the reference describe, by their dotted paths.

A page names its objects in fences, in the order of the theory. Sphinx is not needed here.

    ```{objects} fm_jax.losses
    flow_matching
    score_matching
    ```
"""

import ast
import importlib
import inspect
import pkgutil
import pydoc
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import fm_jax

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
FENCE = re.compile(r"^```\{objects\} (?P<module>[\w.]+)\n(?P<names>[^`]*?)^```$", re.MULTILINE)


def paths(page: str) -> list[str]:
    """The objects that the text of a page names, each by where a user imports it from."""
    return [f"{fence['module']}.{name}" for fence in FENCE.finditer(page) for name in fence["names"].split()]


@cache
def documented(folder: Path = REFERENCE) -> list[str]:
    """The objects that all pages name."""
    return [path for page in sorted(folder.glob("*.md")) for path in paths(page.read_text())]


def load(path: str) -> Any:
    """The object of that path, also where a file has the same name."""
    return pkgutil.resolve_name(":".join(path.rsplit(".", 1)))


def doc(path: str) -> str:
    """The docstring of an object; of a constant or an alias the string that follows it, or else its value."""
    if assigned := assignment(path):
        return assigned[1] or f"`{ast.unparse(assigned[0].value)}`"
    return inspect.getdoc(load(path)) or ""


def assignment(path: str) -> tuple[Any, str] | None:
    """Of a constant or an alias: its assignment in the module or a file of it, and the string that follows."""
    load(path)
    module, _, name = path.rpartition(".")
    files = sorted(file for file in sys.modules if f"{file}.".startswith(f"{module}."))
    return next((found[name] for file in files if name in (found := _assignments(file))), None)


@cache
def _assignments(module: str) -> dict[str, tuple[Any, str]]:
    found = {}
    body: list[Any] = ast.parse(inspect.getsource(sys.modules[module])).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            has_doc = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            found[ast.unparse(target)] = node, inspect.cleandoc(after.value.value) if has_doc else ""
    return found


def modules() -> dict[str, list[str]]:
    """The public names of every module by which users import.

    Of a package with `__all__` nothing else is public. One without passes on what it imports from its files, which have
    public functions and classes beside.
    """
    found: dict[str, list[str]] = {}
    closed: tuple[str, ...] = ()
    for info in pkgutil.walk_packages(fm_jax.__path__, "fm_jax."):
        if info.name.startswith(closed) or info.name.rpartition(".")[2].startswith("_"):
            continue
        members = vars(importlib.import_module(info.name))
        if info.ispkg and "__all__" in members:
            closed += (info.name + ".",)
        found[info.name] = members.get("__all__") or [
            name
            for name, member in members.items()
            if not name.startswith("_") and callable(member)
            if f"{getattr(member, '__module__', '')}.".startswith(info.name + ".")
        ]
    return found


def problems(folder: Path = REFERENCE) -> list[str]:
    """Names on the pages of what does not exist, public names that no page has, and objects without a docstring."""
    objects = {path: load(path) for path in documented(folder) if pydoc.locate(path)}
    absent = [path for path in documented(folder) if path not in objects]
    shown = {id(obj) for obj in objects.values()}  # under this or another path
    public = [f"{module}.{name}" for module, names in modules().items() for name in names]
    missing = [path for path in public if id(load(path)) not in shown]
    callables = [path for path, obj in objects.items() if inspect.isclass(obj) or inspect.isfunction(obj)]
    silent = [path for path in callables if not inspect.getdoc(objects[path])]
    found = {"is in docs/reference but not in fm_jax": absent, "is not in docs/reference": missing}
    return [f"{path} {what}" for what, paths in (found | {"has no docstring": silent}).items() for path in paths]


def find(name: str, module: str = "") -> str | None:
    """The path of what a dotted name, or that of a member, means: in that module, or the only object so called."""
    found = [path for path in documented() if f".{path}".endswith(f".{name}")]
    if f"{module}.{name}" in found:
        return f"{module}.{name}"
    if not found and "." in name:
        return find(name.rpartition(".")[0], module)
    return found[0] if len(found) == 1 else None
