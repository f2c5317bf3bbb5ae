"""What is public in fm_jax, and which names the pages of the reference show. Needs neither Sphinx nor a built site.

A page of the reference names its objects in fences, in the order of the theory:

    ```{objects} fm_jax.losses
    flow_matching
    score_matching
    ```
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import fm_jax

PAGES = Path(__file__).parent / "reference"
FENCE = re.compile(r"^```\{objects\} (?P<module>[\w.]+)\n(?P<names>[^`]*?)^```$", re.MULTILINE)


class Documented(NamedTuple):
    """An object as a page names it: `module` is where a user imports `name` from."""

    page: str
    module: str
    name: str

    @property
    def path(self) -> str:
        """The dotted path, the object's name in the reference."""
        return f"{self.module}.{self.name}"

    def load(self) -> object:
        """The object itself."""
        return getattr(importlib.import_module(self.module), self.name)


def documented(folder: Path = PAGES) -> list[Documented]:
    """Every object that a page of the reference names, page by page."""
    return [
        Documented(page.stem, fence["module"], name)
        for page in sorted(folder.glob("*.md"))
        for fence in FENCE.finditer(page.read_text())
        for name in fence["names"].split()
    ]


def modules() -> dict[str, list[str]]:
    """The public names of every module by which users import.

    A package with `__all__` is its own interface, and what is in its files without being in `__all__` is not public. A
    package without one passes on what it imports from its files, which have public functions and classes beside.
    """
    found = {}
    closed: tuple[str, ...] = ()
    for info in pkgutil.walk_packages(fm_jax.__path__, "fm_jax."):
        if info.name.startswith(closed) or info.name.rpartition(".")[2].startswith("_"):
            continue
        module = importlib.import_module(info.name)
        names = getattr(module, "__all__", None)
        if info.ispkg and names is not None:
            closed += (info.name + ".",)
        elif names is None:
            names = [name for name, member in vars(module).items() if _is_own(name, member, info.name, info.ispkg)]
        found[info.name] = list(names)
    return found


def _is_own(name: str, member: object, module: str, is_package: bool) -> bool:
    if name.startswith("_") or not (inspect.isclass(member) or callable(member)):
        return False
    origin = getattr(member, "__module__", None) or ""
    return origin == module or (is_package and origin.startswith(module + "."))


def missing(folder: Path = PAGES) -> list[str]:
    """Public names that no page shows. What a package passes on counts as shown under either path."""
    shown = {id(each.load()) for each in documented(folder)}
    return [
        f"{module}.{name}"
        for module, names in modules().items()
        for name in names
        if id(getattr(importlib.import_module(module), name)) not in shown
    ]
