"""What the reference says of an object, read from its source: its signature as written, and its docstring as reST.

The docstrings are Google style with Markdown inside: single backticks are code, `*`, `_` and `|` are mathematics, four
spaces are a displayed formula, and a table is a table. Each of these means something else in reST, or nothing.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

SECTIONS = ("Args:", "Attributes:", "Example:", "Raises:", "References:", "Returns:", "Yields:")
FREE_TEXT = ("Returns:", "Yields:")
MARKDOWN = re.compile(
    r"`(?P<code>[^`]+)`|(?<!\S)\*\*(?P<strong>[^\s*][^*]*)\*\*(?!\w)|(?<!\S)\*(?P<emphasis>[A-Za-z]{2,})\*(?!\w)"
    r"|(?P<bullet>^ *\* )|(?P<special>[\\*|`]|(?<=\w)_(?!\w))",
    re.MULTILINE,
)
COLON = "\ue000"
"""Stands for a colon that Napoleon must not see."""


def to_rest(lines: list[str]) -> list[str]:
    """A docstring as reST with Google's sections, for Napoleon; colons of its free text are `COLON`."""
    out: list[str] = []
    section = ""
    for block in _blocks(lines):
        if block[0].strip() in SECTIONS and block[0] == block[0].lstrip():
            section = block[0].strip()
            # The attributes of a Flax module are the arguments of its constructor.
            out += ["", "Args:" if section == "Attributes:" else section]
            block = block[1:]
        if not block:
            continue
        indent = len(block[0]) - len(block[0].lstrip())
        margin = " " * indent
        if block[0].lstrip().startswith(">>>"):
            converted = block
        elif len(block) > 1 and re.fullmatch(r"[|:\- ]+", block[1]):
            converted = textwrap.indent("\n".join(_table(block)), margin).split("\n")
        elif not section and indent >= 4:
            converted = [".. code-block:: text", "", *block]
        else:
            converted = _escape("\n".join(block)).split("\n")
            if section in FREE_TEXT:
                converted = [line.replace(":", COLON) for line in converted]
        out += [*converted, ""]
    return out


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """The lines between blank lines; a heading of a section begins one too."""
    block: list[str] = []
    for line in [*lines, ""]:
        if block and (not line.strip() or line in SECTIONS):
            yield block
            block = []
        if line.strip():
            block.append(line)


def _escape(text: str) -> str:
    """A paragraph or list in reST: code between double backticks, and nothing else that means anything."""

    def replace(match: re.Match[str]) -> str:
        if match["strong"] or match["emphasis"]:
            return match[0]
        if code := match["code"]:
            before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
            glue = [r"\ " if each.isalnum() else "" for each in (before, after)]
            return f"{glue[0]}``{code}``{glue[1]}"
        return match["bullet"] or "\\" + match["special"]

    return MARKDOWN.sub(replace, text)


def _table(rows: list[str]) -> list[str]:
    cells = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in rows]
    out = [".. list-table::", "   :header-rows: 1", ""]
    for row in (row for i, row in enumerate(cells) if i != 1):
        out += [f"   {'* -' if j == 0 else '  -'} {_escape(cell)}" for j, cell in enumerate(row)]
    return out


def summary(doc: str | None) -> str:
    """The first paragraph's first line, as reST."""
    return _escape((doc or "").strip().split("\n")[0])


class Assignment(NamedTuple):
    """`name: annotation = value` at the top of a module, and the string that follows it."""

    annotation: str
    value: str
    doc: str


@cache
def assignment(module: str, name: str) -> Assignment | None:
    """How a module, or a file of that package, defines a constant or an alias."""
    loaded = importlib.import_module(module)
    files = [each for each in vars(loaded).values() if inspect.ismodule(each) and each.__name__.startswith(module)]
    for each in (loaded, *files):
        for target, node, doc in _assignments(each):
            if target == name:
                annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
                return Assignment(annotation, ast.unparse(node.value), doc)
    return None


def _assignments(module: ModuleType) -> Iterator[tuple[str, Any, str]]:
    """Of every assignment at the top of a module: the name, the node, and the string that follows."""
    body = _tree(module).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            doc = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            yield getattr(target, "id", ""), node, inspect.cleandoc(str(doc))


@cache
def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))


@cache
def _aliases() -> dict[tuple[str, int], tuple[str, ModuleType]]:
    """The types of fm_jax that are names for others: what is assigned to each, and where."""
    return {
        (name, id(getattr(module, name))): (ast.unparse(node.value), module)
        for path, module in sorted(sys.modules.items())
        if path.startswith("fm_jax.")
        for name, node, _ in _assignments(module)
        if name[:1].isupper() and isinstance(node.value, ast.Subscript | ast.Name)
    }


def signature(obj: Any, names: Mapping[tuple[str, int], str]) -> tuple[str, str] | None:
    """Parameters and result of what can be called, with the annotations that stand in the source.

    Args:
        obj: a function, method or class.
        names: what to write for a name that means the object of that id, so that Sphinx can link it.

    Returns:
        "(parameters)" and the annotation of the result, or "". `None` for a protocol, which nobody calls.
    """
    scope = vars(importlib.import_module(inspect.unwrap(obj).__module__))
    qualify = _Qualify(scope, names)
    if inspect.isclass(obj):
        if getattr(obj, "_is_protocol", False):
            return None
        if "__init__" not in vars(obj) or hasattr(obj, "_fields") or is_dataclass(obj):
            fields = [node for node in _definition(obj).body if isinstance(node, ast.AnnAssign)]
            return (f"({', '.join(map(qualify.field, fields))})", "") if fields else None
        obj = obj.__init__
    function = _definition(inspect.unwrap(obj))
    arguments = function.args
    for group in (arguments.posonlyargs, arguments.args):
        if group and group[0].arg in ("self", "cls"):
            del group[0]
    positional = [*arguments.posonlyargs, *arguments.args]
    for argument in [*positional, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None and argument.annotation is not None:
            argument.annotation = qualify.visit(argument.annotation)
    arguments.defaults = [qualify.default(node) for node in arguments.defaults]
    arguments.kw_defaults = [node and qualify.default(node) for node in arguments.kw_defaults]
    returns = "" if function.returns is None else ast.unparse(qualify.visit(function.returns))
    return f"({ast.unparse(arguments)})", "" if function.name == "__init__" else returns


def _definition(obj: Any) -> Any:
    """The syntax of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]


class _Qualify(ast.NodeTransformer):
    """Names by their full paths where the reference has them, and what aliases stand for where it has not."""

    def __init__(self, scope: Mapping[str, Any], names: Mapping[tuple[str, int], str]) -> None:
        self.scope, self.names = scope, names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        key = node.id, id(self.scope.get(node.id))
        if key in self.names:
            return ast.Name(self.names[key])
        if key in _aliases():
            value, module = _aliases()[key]
            return _Qualify(vars(module), self.names).visit(ast.parse(value, mode="eval").body)
        return node

    def field(self, node: ast.AnnAssign) -> str:
        """A field of a class as a parameter of its constructor."""
        text = f"{ast.unparse(node.target)}: {ast.unparse(self.visit(node.annotation))}"
        return text if node.value is None else f"{text} = {ast.unparse(self.default(node.value))}"

    def default(self, node: ast.expr) -> ast.expr:
        """A default as a reader would write it: nothing private, and no `field`."""
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "field":
            keyword = node.keywords[0]
            return ast.Call(keyword.value, [], []) if keyword.arg == "default_factory" else keyword.value
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            return ast.Name(repr(self.scope[node.id]))
        return node
