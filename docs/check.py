"""What must hold of the site: it describes all that is public, and nothing in it leads nowhere."""

import inspect
from collections import defaultdict
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import equations
import public


def symbols() -> list[str]:
    """Public names without a place in the reference, and objects without a docstring."""
    found = [f"{name} is public, and no page of docs/reference names it" for name in public.missing()]
    for each in public.documented():
        loaded = each.load()
        if (inspect.isclass(loaded) or inspect.isfunction(loaded)) and not inspect.getdoc(loaded):
            found.append(f"{each.path} has no docstring")
    return found


def equations_named(known: Iterable[str]) -> list[str]:
    """Entries of the table of equations that name no equation, or no object of the reference."""
    paths = {each.path for each in public.documented()}
    found = [f"docs/equations.py names {name}, which the reference does not" for name in {*equations.TABLE} - paths]
    for name, numbers in equations.TABLE.items():
        found += [f"docs/equations.py: there is no ({number}) for {name}" for number in {*numbers} - {*known}]
    return sorted(found)


class _Page(HTMLParser):
    """The ids of a page and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.twice: set[str] = set()
        self.targets: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (tag == "a" and name == "name"):
                self.twice |= self.ids & {value or ""}
                self.ids.add(value or "")
            elif name in ("href", "src", "poster", "data") and tag != "base":
                self.targets.add(value or "")


def links(site: Path) -> list[str]:
    """Links of any kind, between all pages of the site, whose file or anchor is not there."""
    pages = {path: _Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    lost: dict[str, set[str]] = defaultdict(set)
    for path, page in pages.items():
        name = str(path.relative_to(site))
        for id_ in sorted(page.twice):
            lost[f"the id {id_} is there twice"].add(name)
        for target in sorted(page.targets):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not file.is_file():
                lost[f"{target} does not exist"].add(name)
            elif url.fragment and file in pages and unquote(url.fragment) not in pages[file].ids:
                lost[f"{target} has no such anchor"].add(name)
    return [f"{', '.join(sorted(where)[:3])}{' ...' if len(where) > 3 else ''}: {what}" for what, where in lost.items()]
