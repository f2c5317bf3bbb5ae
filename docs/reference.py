"""What the reference says of an object: its signature as the source has it, and its docstring, as MyST.

The docstrings are Google style with Markdown inside, so that only their sections have to be translated.
"""

import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import is_dataclass
from typing import Any

import equations
import pages
import public

SECTION = re.compile(r"^(Args|Attributes|Example|Raises|References|Returns|Yields):\n", re.MULTILINE)
FIELDS = {"Args": "param", "Attributes": "param", "Raises": "raises", "Returns": "returns", "Yields": "yields"}
ENTRY = re.compile(r"^\*{0,2}(\w[\w., ]*):", re.MULTILINE)
MODULE = re.compile(r"^```\{module\} ([\w.]+)\n```$", re.MULTILINE)
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def described(text: str) -> str:
    """A page of the reference, with descriptions in place of its fences."""
    text = MODULE.sub(lambda fence: _module(fence[1], MODULE.split(text[fence.end() :])[0]), text)
    return public.FENCE.sub(lambda fence: "".join(map(_object, public.paths(fence[0]))), text)


def _module(name: str, rest: str) -> str:
    """What a module says of itself, and a table of the objects that the rest of the page describes."""
    out = [f"```{{py:module}} {name}\n```\n\n{markdown(inspect.getdoc(importlib.import_module(name)) or '', name)}\n"]
    for path in public.paths(rest):
        first = public.doc(path).partition("\n")[0]
        out.append(f"* - {{py:obj}}`{path.rpartition('.')[2]} <{path}>`\n  - {pages.markdown(first, '', name)}")
    if len(out) > 1:
        out.insert(1, ":::{list-table}\n:class: summary\n:widths: auto\n")
        out.append(":::")
    return "\n".join(out)


def _object(path: str) -> str:
    """The directive that describes an object, with those of its methods inside."""
    module, _, name = path.rpartition(".")
    obj, doc = public.load(path), public.doc(path)
    if assigned := public.assignment(path):
        node = assigned[0]
        if isinstance(node, ast.Assign) or ast.unparse(node.annotation) == "TypeAlias":
            return _directive("type", module, name, doc, f":canonical: {ast.unparse(node.value)}")
        return _directive("data", module, name, doc, f":type: {ast.unparse(node.annotation)}")
    option = f":canonical: {obj.__module__}.{obj.__qualname__}"
    if not inspect.isclass(obj):
        return _directive("function", module, name + signature(obj), doc, option)
    methods = ""
    for member, value in vars(obj).items():
        is_shown = not member.startswith("_") or member in ("__call__", "__next__")
        # What has to be implemented is shown even without a docstring. Fields are arguments.
        if is_shown and (value.__doc__ or getattr(obj, "_is_protocol", False)):
            text = inspect.cleandoc(value.__doc__ or "")
            if isinstance(value, property):
                methods += _directive("property", module, member, text, f":type: {signature(value.fget)[6:]}")
            elif inspect.isfunction(value):
                methods += _directive("method", module, member + signature(value), text)
    kind = "exception" if issubclass(obj, Exception) else "class"
    return _directive(kind, module, name + signature(obj), doc, option, methods)


def _directive(kind: str, module: str, head: str, doc: str, option: str = "", inside: str = "") -> str:
    fence = ":" * (5 if inside else 4)
    body = markdown(doc, module, head)
    return f"\n\n{fence}{{py:{kind}}} {head}\n:module: {module}\n{option}\n\n{body}\n{inside}\n{fence}\n"


def markdown(doc: str, module: str, signature: str = "") -> str:
    """The docstring of a module, or of an object in it, as MyST."""
    text, *sections = SECTION.split(doc)
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        body = textwrap.dedent(body).strip()
        if title in ("Returns", "Yields"):
            text += f"\n:{FIELDS[title]}:\n{textwrap.indent(body, '    ')}\n"
        elif title in FIELDS:  # the attributes of a Flax module are the arguments of its constructor
            body = ENTRY.sub(lambda names: f":{names[1].replace(' ', '')}:", body)
            text += "\n" + re.sub(r"^:", f":{FIELDS[title]} ", body, flags=re.MULTILINE) + "\n"
        else:
            text += f"\n:::{{rubric}} {title}\n:::\n\n{body}\n"
    text = DOCTEST.sub(lambda code: f"```pycon\n{code[0]}\n```", text)
    text = pages.markdown(text, "", module, signature)
    links = r"{ref}`(\1.\2) <eq-\1-\2>`"
    return equations.LINE.sub(lambda line: f"{{.derived}}\n{equations.NUMBER.sub(links, line[0])}", text)


def signature(obj: Any) -> str:
    """Parameters and result of what can be called, as they stand in the source; "" for a protocol."""
    if inspect.isclass(obj):
        if getattr(obj, "_is_protocol", False):
            return ""
        if "__init__" not in vars(obj) or hasattr(obj, "_fields") or is_dataclass(obj):
            fields = [ast.unparse(node) for node in _definition(obj).body if isinstance(node, ast.AnnAssign)]
            return f"({', '.join(fields)})" if fields else ""
    function = _definition(obj.__init__ if inspect.isclass(obj) else inspect.unwrap(obj))
    parameters = re.sub(r"^(self|cls)(, /)?(, |$)", "", ast.unparse(function.args))
    returns = f" -> {ast.unparse(function.returns)}" if function.returns and not inspect.isclass(obj) else ""
    return f"({parameters}){returns}"


def _definition(obj: Any) -> Any:
    return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
