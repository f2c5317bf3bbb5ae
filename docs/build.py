"""Builds the site into site/ and checks it: `python docs/build.py`, which is `make docs`.

Public names that no page describes and equations that do not exist are reported at once; then Sphinx's warnings, and
links, anchors, images, scripts and stylesheets of the site that lead nowhere.
"""

import shutil
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import equations
import public

SITE = public.ROOT / "site"


def main() -> int:
    """Builds and checks; returns the exit status. Arguments are passed on to Sphinx."""
    from sphinx.cmd.build import build_main

    if problems := public.problems() or equations.problems():
        print(*problems, sep="\n")
        return 1
    shutil.rmtree(SITE, ignore_errors=True)
    folders = ["-c", public.ROOT / "docs", "-d", public.ROOT / "build" / "doctrees", public.ROOT, SITE]
    status = build_main(["-q", "-E", "-W", "--keep-going", *sys.argv[1:], *map(str, folders)])
    if status > 1:  # not for warnings alone
        return status
    (SITE / ".nojekyll").touch()  # GitHub's pages would leave out folders that begin with _
    (SITE / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')
    problems = broken_links(SITE)
    numbers = f"{len(public.documented())} objects, {len(equations.read())} equations in {SITE}"
    print(*problems, f"{numbers}: {len(problems)} problems", sep="\n")
    return int(bool(status or problems))


def broken_links(site: Path) -> list[str]:
    """Links of any kind, between all pages of the site, whose file or anchor is not there; and ids that are twice."""
    attributes = {path: _attributes(path) for path in sorted(site.rglob("*.html"))}
    ids = {path: Counter(value for name, value in found if name == "id") for path, found in attributes.items()}
    lost = []
    for path, found in attributes.items():
        page = path.relative_to(site)
        lost += [f"{page}: the id {id_} is there twice" for id_, count in ids[path].items() if count > 1]
        for target in sorted({value for name, value in found if name in ("href", "src", "poster", "data")}):
            url = urlsplit(target)
            file = (path.parent / unquote(url.path)).resolve() if url.path else path
            if url.scheme or url.netloc:
                continue
            if not file.is_file():
                lost.append(f"{page}: {target} does not exist")
            elif url.fragment and file in ids and unquote(url.fragment) not in ids[file]:
                lost.append(f"{page}: {target} has no such anchor")
    return lost


def _attributes(path: Path) -> list[tuple[str, str]]:
    """The attributes of all elements of a page."""
    found: list[tuple[str, str]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: found.extend((name, value or "") for name, value in attrs)  # type: ignore
    parser.feed(path.read_text())
    return found


if __name__ == "__main__":
    sys.exit(main())
