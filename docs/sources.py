"""Collects the sources of the site into one folder, in the order and under the names that its addresses have.

On the code host a page links to the files of the repository. Here every such link is turned into one to the page that
shows the file, so that the same text works in both places.
"""

import inspect
import json
import os
import re
import shutil
from pathlib import Path

import docstrings
import equations
import public

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "experiments/README.md": "experiments.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "docs/equations.py": "equations.md",
    "docs/howto/README.md": "howto/index.md",
}
"""Pages that are not Markdown in docs/. The README is a part of the first page; that of the equations is made below."""

MARKUP = re.compile(
    r"(?P<code>^ *(?P<fence>`{3,}|~{3,}).*?^ *(?P=fence)`*$|`[^`\n]+`)"
    r"|(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s]+)\)"
    r'|^<a id="(?P<anchor>[\w-]+)"></a>$',
    re.MULTILINE | re.DOTALL,
)
TITLE = re.compile(r'(?:title=|set_title\()f?"([^"]+)"')
MODULE = re.compile(r"^```\{module\} ([\w.]+)\n```$", re.MULTILINE)


class Sources:
    """The repository's pages and notebooks, as the site shows them.

    Args:
        out: the folder to write to; what was there is removed.
        notebooks: where the executed notebooks are.
    """

    def __init__(self, out: Path, notebooks: Path = equations.NOTEBOOKS) -> None:
        self.out = out
        self.equations = equations.read(notebooks)
        self.notebooks = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
        docs = [path.relative_to(ROOT / "docs") for path in sorted((ROOT / "docs").rglob("*.md"))]
        self.pages = {f"docs/{page}": str(page) for page in docs}
        self.pages |= {path: page for path, page in ELSEWHERE.items() if (ROOT / path).exists()}
        self.pages |= {f"notebooks/{path.name}": f"notebooks/{path.name}" for path in self.notebooks}
        self.page_of_module = {each.module: f"docs/reference/{each.page}.md" for each in public.documented()}

    def write(self) -> None:
        """Writes all pages, and every file that they show or offer."""
        shutil.rmtree(self.out, ignore_errors=True)
        for path, page in self.pages.items():
            if page == "equations.md" or page.startswith("notebooks/"):
                continue
            text = (ROOT / path).read_text()
            if path == "README.md":  # what docs/index.md includes: all but its title, and where to go next
                page = "readme.part"
                text = text[text.index("\n## ") :].partition("\n## Where to go next")[0]
            self._write(page, self.markdown(text, path, page))
        for notebook in self.notebooks:
            self._write(f"notebooks/{notebook.name}", self._notebook(notebook))
        self._write("equations.md", self._equations())

    def _write(self, page: str, text: str) -> None:
        path = self.out / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def markdown(self, text: str, path: str, page: str) -> str:
        """The text of the file at `path` in the repository, as it is on `page` of the site."""

        def replace(match: re.Match[str]) -> str:
            if match["code"]:
                return match[0]
            if match["anchor"]:  # MyST finds its own targets only
                return f"({match['anchor']})="
            target = self._target(match["target"], path, page)
            if target is None:
                return match["text"][1:-1]
            # Where a link shows the name of a file, the site shows the title of its page.
            return f"{'[]' if match['text'].endswith('.md]') else match['text']}({target})"

        text = MARKUP.sub(replace, text)
        text = MODULE.sub(lambda fence: _module(fence[1], text[fence.end() :]), text)
        return public.FENCE.sub(self._objects, text)

    def _target(self, target: str, path: str, page: str) -> str | None:
        """Where a link of the file at `path` leads on the site; `None` for a folder, of which there is no page."""
        target, hash_, anchor = target.partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return target + hash_ + anchor
        file = os.path.normpath(os.path.join(os.path.dirname(path), target))
        if (ROOT / file).is_dir():
            if f"{file}/README.md" not in self.pages:
                return None
            file += "/README.md"
        elif re.fullmatch(r"notebooks/\d\d_\w+\.py", file):
            file = file[:-2] + "ipynb"
        elif file.startswith("fm_jax/"):
            module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            while module and module not in self.page_of_module:
                module = module.rpartition(".")[0]
            file = self.page_of_module.get(module, file)
        shown = self.pages.get(file, file.removeprefix("docs/"))
        if file not in self.pages and (ROOT / file).is_file():  # a picture, or a file to download
            (self.out / shown).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, self.out / shown)
        return os.path.relpath(shown, os.path.dirname(page) or ".") + hash_ + anchor

    def _notebook(self, path: Path) -> str:
        """A notebook whose links work on the site, and whose equations say where they are implemented."""
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                text = equations.DISPLAY.sub(_with_implementers, "".join(cell["source"]))
                cell["source"] = self.markdown(text, f"notebooks/{path.name}", f"notebooks/{path.name}")
            elif titles := TITLE.findall("".join(cell["source"])):  # what there is to see, for who cannot see it
                cell["metadata"]["mystnb"] = {"image": {"alt": "Figure: " + "; ".join(titles)}}
        return json.dumps(notebook)

    def _objects(self, fence: re.Match[str]) -> str:
        """What stands for a list of objects: a description of each."""
        lines = []
        for name in fence["names"].split():
            path = f"{fence['module']}.{name}"
            if assigned := docstrings.assignment(fence["module"], name):
                lines += _value(fence["module"], name, assigned, equations.implemented_by(path, self.equations))
            else:
                lines += _autodoc(path, public.Documented("", fence["module"], name).load())
        return "\n".join(["```{eval-rst}", *lines, "```"])

    def _equations(self) -> str:
        """The page that lists the equations of all notebooks."""
        out = [
            "# Equations",
            "Every numbered equation of the notebooks: where it is derived, and the functions that implement it.",
        ]
        notebook = section = ""
        for each in self.equations.values():
            page = f"notebooks/{each.notebook}.ipynb"
            if each.notebook != notebook:
                out.append(f"## [{each.title}]({page})")
            if each.section not in (section, each.title):
                out.append(f"### {each.section}")
            notebook, section = each.notebook, each.section
            out.append(f"$$\n{each.latex}\n$$")
            names = " · ".join([f"[Derivation]({page}#{each.anchor})", *_implementers(each.number)])
            out.append(f":::{{container}} in-code\n{names}\n:::")
        return "\n\n".join(out) + "\n"


def _with_implementers(display: re.Match[str]) -> str:
    names = " · ".join(_implementers(f"{display[1]}.{display[2]}"))
    return f"{display[0]}\n\n:::{{container}} in-code\nIn code: {names}\n:::" if names else display[0]


def _implementers(number: str) -> list[str]:
    """Links to what implements an equation."""
    return [f"{{py:obj}}`{name.removeprefix('fm_jax.')} <{name}>`" for name in equations.implementers(number)]


def _module(name: str, rest: str) -> str:
    """What a module says of itself, and a table of what the page shows of it: the objects up to the next module."""
    rest = rest[: match.start()] if (match := MODULE.search(rest)) else rest
    rows = []
    for fence in public.FENCE.finditer(rest):
        for each in fence["names"].split():
            path = f"{fence['module']}.{each}"
            rows += [f"   * - :py:obj:`{each} <{path}>`", f"     - {docstrings.summary(_doc(fence['module'], each))}"]
    table = ["", ".. list-table::", "   :class: summary", "   :widths: auto", "", *rows] if rows else []
    return "\n".join(["```{eval-rst}", f".. automodule:: {name}", *table, "```"])


def _doc(module: str, name: str) -> str:
    assigned = docstrings.assignment(module, name)
    loaded = public.Documented("", module, name).load()
    if assigned:
        return assigned.doc or f"`{loaded if assigned.annotation.startswith('tuple') else assigned.value}`"
    return inspect.getdoc(loaded) or ""


def _value(module: str, name: str, assigned: docstrings.Assignment, more: list[str]) -> list[str]:
    """The directive that describes an alias or a constant; autodoc would describe what it is an alias of."""
    if assigned.annotation in ("", "TypeAlias"):
        head = [f".. py:type:: {name}", f"   :canonical: {assigned.value}"]
    else:
        head = [f".. py:data:: {name}", f"   :type: {assigned.annotation}"]
    text = [line.replace(docstrings.COLON, ":") for line in docstrings.to_rest(assigned.doc.split("\n"))]
    return [f".. py:currentmodule:: {module}", "", *head, "", *(f"   {line}" for line in [*text, *more]), ""]


def _autodoc(path: str, loaded: object) -> list[str]:
    """The directive that has autodoc describe a function or class."""
    if not inspect.isclass(loaded):
        return [f".. autofunction:: {path}", ""]
    kind = "exception" if issubclass(loaded, Exception) else "class"
    # What has to be implemented is shown even without a docstring. Fields are arguments, which autodoc cannot tell.
    is_protocol = getattr(loaded, "_is_protocol", False)
    members = [
        member
        for member, value in vars(loaded).items()
        if (inspect.isfunction(value) or isinstance(value, property))
        and (value.__doc__ or is_protocol)
        and (not member.startswith("_") or member in ("__call__", "__next__"))
    ]
    options = [f"   :members: {', '.join(members)}", "   :undoc-members:"] if members else []
    return [f".. auto{kind}:: {path}", *options, ""]
