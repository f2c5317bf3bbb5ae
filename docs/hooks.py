"""What Sphinx is told beyond its options: docstrings, signatures, links of code, and numbered equations."""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import docstrings
import equations
import public
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)

DOCUMENTED = public.documented()
BY_PATH = {each.path: each.path for each in DOCUMENTED}
BY_NAME: dict[str, list[str]] = {}
BY_OBJECT: dict[tuple[str, int], str] = {}
for _each in DOCUMENTED:
    _loaded = _each.load()
    BY_NAME.setdefault(_each.name, []).append(_each.path)
    BY_OBJECT[_each.name, id(_loaded)] = _each.path
    if inspect.isclass(_loaded) or inspect.isfunction(_loaded):
        BY_PATH[f"{_loaded.__module__}.{_loaded.__qualname__}"] = _each.path
PREFERRED = {"log_prob": "fm_jax.likelihood.log_prob", "Polynomial": "fm_jax.schedules.Polynomial"}
"""What a name that two modules use means where nothing else tells."""
ELSE = ("log_snr",)
"""Names that the pages use for something else: values of options."""
WORDS = ("convert", "distillation", "reschedule", "straightness", "wasserstein")
"""Names of one word that mean the function wherever they are code."""


def process_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Before Napoleon: a docstring as reST, with the equations that the object implements after its formula."""
    text = docstrings.to_rest(lines)
    if what in ("attribute", "property"):  # of which Napoleon takes what is before a colon for the type
        text = [line.replace(":", docstrings.COLON) for line in text]
    at = min((i for i, line in enumerate(text) if line in docstrings.SECTIONS), default=len(text))
    text[at:at] = equations.implemented_by(name, _equations(app.config.notebooks))
    lines[:] = text


@cache
def _equations(notebooks: str) -> dict[str, equations.Equation]:
    return equations.read(Path(notebooks))


def restore_colons(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """After Napoleon."""
    lines[:] = [line.replace(docstrings.COLON, ":") for line in lines]


def process_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str] | None:
    """The signature as it is written in the source: short names of types, defaults by name."""
    if what in ("function", "method", "class", "exception"):
        written = docstrings.signature(obj, BY_OBJECT)
        return written if written or signature is None else ("", "")
    return None


def resolve_type(app: Sphinx, env: Any, node: addnodes.pending_xref, contnode: nodes.Element) -> nodes.Node | None:
    """Types of other libraries stay plain text; names of ours that Sphinx knows by another path get their link."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    path = BY_PATH.get(target) or _short(target)
    if path and path != target:
        node["reftarget"] = path
        return env.domains.python_domain.resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], path, node, contnode
        )
    return None if target.startswith("fm_jax.") else contnode


def _short(name: str) -> str | None:
    """The only object, or the preferred one, whose path ends in the name."""
    found = [path for path in BY_NAME.get(name.rpartition(".")[2], ()) if path.endswith("." + name)]
    return found[0] if len(found) == 1 else PREFERRED.get(name)


class LinkCode(SphinxPostTransform):
    """Inline code that names an object becomes a link to it, and an arXiv number one to the paper."""

    default_priority = 500  # after references are resolved
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for literal in list(self.document.findall(nodes.literal)):
            if _inside(literal, nodes.reference, nodes.title, addnodes.desc_signature):
                continue
            if uri := self.uri(_name(literal.astext()), literal):
                literal.replace_self(nodes.reference("", "", literal.deepcopy(), internal=True, refuri=uri))
        for text in list(self.document.findall(nodes.Text)):
            pieces = re.split(r"(arXiv:\d{4}\.\d{4,5})", text.astext())
            if len(pieces) > 1 and not _inside(text, nodes.reference, nodes.literal, nodes.literal_block, nodes.raw):
                new: list[nodes.Node] = []
                for piece in pieces:
                    uri = f"https://arxiv.org/abs/{piece[6:]}"
                    is_link = piece.startswith("arXiv:") and piece in pieces[1::2]
                    new.append(nodes.reference("", piece, refuri=uri) if is_link else nodes.Text(piece))
                text.parent.replace(text, new)

    def uri(self, text: str, literal: nodes.literal) -> str | None:
        """Where what is named here is described."""
        path = self.meant(text, literal) if text else None
        entry = self.env.domains.python_domain.objects.get(path) if path else None
        if entry is None:
            return None
        here = self.env.docname
        page = "" if entry.docname == here else self.app.builder.get_relative_uri(here, entry.docname)
        return f"{page}#{entry.node_id}"

    def meant(self, text: str, literal: nodes.literal) -> str | None:
        """The full path of the object that is meant, if it is one of ours."""
        if text.startswith("fm_jax."):
            if not _exists(text):
                logger.warning("%s does not exist", text, location=literal)
            return _described(text)
        if signature := _signature_around(literal):
            own = f"{signature['module']}.{signature['fullname']}"
            if text in {node.astext() for node in _parameters(signature)} or own.endswith("." + text):
                return None
            obj = importlib.import_module(signature["module"])
            for name in signature["fullname"].split("."):
                obj = getattr(obj, name)
            scope = vars(importlib.import_module(getattr(obj, "__module__", None) or signature["module"]))
            head, _, tail = text.partition(".")
            if head in scope:
                path = BY_OBJECT.get((head, id(scope[head])))
                if path or not inspect.ismodule(scope[head]):
                    return path and path + ("." + tail if tail else "")
        if text in ELSE or (text not in WORDS and re.fullmatch(r"_*[a-z\d]*_*", text)):
            return None  # most words are something else
        return _short(text) or (_described("fm_jax." + text) if "." in text and _exists("fm_jax." + text) else None)


def _name(code: str) -> str:
    """The dotted name that the code is, or that it calls; "" if it is anything else."""
    try:
        node = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError):
        return ""
    name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    return name if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name) else ""


def _exists(path: str) -> bool:
    """Whether it can be imported, or is an attribute of what can."""
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        try:
            obj: Any = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for name in parts[i:]:
            fields = getattr(obj, "__dataclass_fields__", {}) if inspect.isclass(obj) else {}
            if not hasattr(obj, name) and name not in fields:
                return False
            obj = getattr(obj, name, None)
        return True
    return False


def _described(path: str) -> str | None:
    """The object or module of that path; for an attribute that has no place of its own, the class that has it."""
    if path in BY_PATH:
        return BY_PATH[path]
    owner, _, name = path.rpartition(".")
    if owner in BY_PATH and inspect.isclass(public.Documented("", *BY_PATH[owner].rpartition(".")[::2]).load()):
        return f"{BY_PATH[owner]}.{name}"
    return path


def _inside(node: nodes.Node, *kinds: type[nodes.Element]) -> bool:
    while node := node.parent:
        if isinstance(node, kinds):
            return True
    return False


def _signature_around(node: nodes.Node) -> addnodes.desc_signature | None:
    """Of the object whose description the node is in."""
    while node := node.parent:
        if isinstance(node, addnodes.desc) and node.get("domain") == "py":
            return node[0]
    return None


def _parameters(signature: addnodes.desc_signature) -> list[nodes.Node]:
    return [each[0] for each in signature.findall(addnodes.desc_parameter) if len(each)]


class NumberedEquations(SphinxPostTransform):
    """Displayed mathematics as it stands: Sphinx would put several lines in an environment that knows no tags."""

    default_priority = 900  # after Furo put each display into a container that scrolls, and that has its id
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for node in self.document.findall(nodes.math_block):
            text = node.astext()
            node["ids"] = [id_ for id_ in node["ids"] if id_ not in node.parent.get("ids", ())]
            node["no-wrap"] = node["nowrap"] = True
            node.children = [nodes.Text(f"\\[{text}\\]")]


def alias_anchors(app: Sphinx, doctree: nodes.document) -> None:
    """From a file's source, viewcode links back as if all of it were imported from where the first object of it is."""
    for signature in doctree.findall(addnodes.desc_signature):
        package, _, file = (signature.get("module") or "").rpartition(".")
        if file and package.startswith("fm_jax."):
            signature["ids"].append(f"{package}.{signature['fullname']}")


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_config_value("notebooks", str(equations.NOTEBOOKS), "env", str)
    app.connect("autodoc-process-docstring", process_docstring, priority=400)
    app.connect("autodoc-process-docstring", restore_colons, priority=600)
    app.connect("autodoc-process-signature", process_signature)
    app.connect("missing-reference", resolve_type)
    app.connect("doctree-read", alias_anchors)
    app.add_post_transform(LinkCode)
    app.add_post_transform(NumberedEquations)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
