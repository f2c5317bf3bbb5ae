"""Builds the site into site/ and checks it: `python docs/build.py`, which is `make docs`.

Every failure is shown before the exit status is 1: warnings of Sphinx, public names that no page describes, equations
that do not exist, and links, anchors, images, scripts and stylesheets that lead nowhere.
"""

import argparse
import shutil
import sys
from pathlib import Path

import check
import equations
import public
from sources import ROOT, Sources
from sphinx.cmd.build import build_main


def main() -> int:
    """Builds and checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=Path, default=equations.NOTEBOOKS, help="executed notebooks")
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="where the site goes")
    options = parser.parse_args()

    work = ROOT / "build" / "site"
    try:
        sources = Sources(work / "source", options.notebooks)
    except ValueError as error:  # an equation that cannot be shown or found
        print(error, file=sys.stderr)
        return 1
    sources.write()
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.rmtree(work / "doctrees", ignore_errors=True)
    folders = ["-c", ROOT / "docs", "-d", work / "doctrees", sources.out, options.out]
    settings = ["-q", "-W", "--keep-going", "-b", "html", "-D", f"notebooks={options.notebooks.resolve()}"]
    status = build_main([*settings, *map(str, folders)])
    if status > 1:  # not for warnings alone
        return status
    (options.out / ".nojekyll").touch()  # GitHub's pages would leave out folders that begin with _
    problems = [*check.symbols(), *check.equations_named(sources.equations), *check.links(options.out)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(
        f"{len(list(options.out.rglob('*.html')))} pages, {len(public.documented())} objects, "
        f"{len(sources.equations)} equations in {options.out}: {len(problems)} problems"
    )
    return int(bool(status or problems))


if __name__ == "__main__":
    sys.exit(main())
