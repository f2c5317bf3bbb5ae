"""The repository's pages and notebooks as the site shows them, under the paths that they have in the repository.

On the code host a page links to files. On the site such a link leads to the page of the file, code that names an object
of the library to its description, and an arXiv number to the paper; so the same text works in both places.
"""

import json
import os
import re

import equations
import public

MARKUP = re.compile(
    r"(?P<kept>^ *(?P<fence>`{3,}|~{3,}|\$\$).*?^ *(?P=fence)`*$|^#+ [^\n]*$|\{[\w:]+\}`[^`]+`)"
    r"|(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^()\s]+)\)"
    r"|(?P<ticks>`+)(?P<code>[^`]+)(?P=ticks)"
    r"|(?P<paper>arXiv:(?P<id>\d{4}\.\d{4,5}))"
    r'|^<a id="(?P<anchor>[\w-]+)"></a>$',
    re.MULTILINE | re.DOTALL,
)
NAME = re.compile(r"(?P<name>[A-Za-z_]\w*(?:\.\w+)*)(?:\(.*\))?")
WORD = re.compile(r"_*[a-z\d]*_*")
TITLE = re.compile(r'(?:title=|set_title\()f?"([^"]+)"')


def page(path: str, text: str) -> str:
    """The text of a page or notebook for the site; `path` is that of its file in the repository."""
    if not path.endswith(".ipynb"):
        readme = (public.ROOT / "README.md").read_text()  # on the first page: all but its title, and where to go next
        readme = readme[readme.index("\n## ") :].partition("\n## Where to go next")[0]
        text = markdown(text, path).replace("```{readme}\n```", markdown(readme, "README.md"))
        return text.replace("```{equations}\n```", all_equations())
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = markdown(equations.DISPLAY.sub(_numbered, source), path)
        elif titles := TITLE.findall(source):  # what there is to see, for who cannot see it
            cell["metadata"]["mystnb"] = {"image": {"alt": "Figure: " + "; ".join(titles)}}
    return json.dumps(notebook)


def markdown(text: str, path: str, module: str = "", signature: str = "") -> str:
    """A text of the file at `path`, or of an object of `module` with that signature, with links for the site."""

    def replace(match: re.Match[str]) -> str:
        if match["target"]:
            target = link(match["target"], path)
            # Where a link shows the name of a file, the site shows the title of its page.
            shown = "[]" if match["text"].endswith(".md]") else match["text"]
            return f"{shown}({target})" if target else match["text"][1:-1]
        if match["ticks"] == "`":
            return code(match["code"], module, signature)
        if match["paper"]:
            return f"[{match['paper']}](https://arxiv.org/abs/{match['id']})"
        return f"({match['anchor']})=" if match["anchor"] else match[0]  # MyST finds its own targets only

    return MARKUP.sub(replace, text)


def link(target: str, path: str) -> str | None:
    """Where a link of the file at `path` leads on the site; `None` for a folder, of which there is no page."""
    target, hash_, anchor = target.partition("#")
    if not target or re.match(r"[a-z]+:", target):
        return target + hash_ + anchor
    file = os.path.normpath(os.path.join(os.path.dirname(path), target))
    if (public.ROOT / file).is_dir():
        return f"/{file}/README.md" if (public.ROOT / file / "README.md").exists() else None
    return f"/{'docs/index.md' if file == 'README.md' else file}{hash_}{anchor}"


def code(text: str, module: str = "", signature: str = "") -> str:
    """Code as a link if it names an object or calls it, and is neither a common word nor a parameter."""
    match = NAME.fullmatch(text)
    if match is None or WORD.fullmatch(match["name"]) or re.search(rf"\b{match['name']}[:=]", signature):
        return f"`{text}`"
    # What begins with fm_jax is a module, or what Sphinx has to warn of.
    path = public.find(match["name"], module) or (match["name"] if text.startswith("fm_jax.") else None)
    return f"{{py:obj}}`{text} <{path}>`" if path else f"`{text}`"


def all_equations() -> str:
    """Every numbered equation: where it is derived, and the functions that implement it."""
    out: list[str] = []
    for number, (title, latex) in equations.read().items():
        out += [f"## {title}"] * (f"## {title}" not in out)
        out.append(_display(number, latex, f"{{ref}}`Derivation <eq-{number.replace('.', '-')}>`"))
    return "\n\n".join(out)


def _display(number: str, latex: str, below: str = "") -> str:
    """A numbered equation as it stands: Sphinx would put several lines in an environment that knows no tags."""
    paths = equations.implementers().get(number, [])
    links = " · ".join(f"{{py:obj}}`{path.removeprefix('fm_jax.')} <{path}>`" for path in paths)
    if below := " · ".join(filter(None, [below, links and f"In code: {links}"])):
        below = f":::{{container}} in-code\n{below}\n:::"
    return f"::::{{container}} equation\n```{{math}}\n:no-wrap:\n\n\\[{latex}\\]\n```\n{below}\n::::"


def _numbered(each: re.Match[str]) -> str:
    """An equation of a notebook. A box has the anchor, since Furo would give that of a display to two elements."""
    return f"(eq-{each[1]}-{each[2]})=\n\n{_display(each['number'], each['latex'])}"
