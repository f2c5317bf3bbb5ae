"""The sources of the site: `make docs` builds it and checks the rest. Sphinx is not needed here."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load(name):
    """A file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


public, equations, docstrings = load("public"), load("equations"), load("docstrings")
DOCUMENTED = public.documented()


def test_every_public_name_is_on_a_page():
    assert len(DOCUMENTED) > 200
    assert public.missing() == []


def test_no_name_is_on_two_pages():
    paths = [each.path for each in DOCUMENTED]
    assert sorted(paths) == sorted(set(paths))


def test_a_name_that_is_missing_is_found(tmp_path):
    (tmp_path / "losses.md").write_text("```{objects} fm_jax.losses\nflow_matching\n```\n")
    missing = public.missing(tmp_path)
    assert "fm_jax.losses.score_matching" in missing
    assert "fm_jax.losses.flow_matching" not in missing


@pytest.mark.parametrize("page", sorted({each.page for each in DOCUMENTED}))
def test_objects_have_docstrings(page):
    objects = {each.path: each.load() for each in DOCUMENTED if each.page == page}
    described = {path: obj for path, obj in objects.items() if inspect.isclass(obj) or inspect.isfunction(obj)}
    assert [path for path, obj in described.items() if not inspect.getdoc(obj)] == []


def test_the_table_of_equations_names_objects_and_equations():
    assert equations.TABLE.keys() <= {each.path for each in DOCUMENTED}
    named = {number for numbers in equations.TABLE.values() for number in numbers}
    assert named <= equations.read().keys()


def test_every_page_is_in_a_toctree():
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")}
    listed = set()
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if line and not line.startswith(":"):
                    entry = line.rpartition("<")[2].rstrip(">")
                    listed.add(str((page.parent / entry).relative_to(DOCS)))
    assert {page.replace("howto/README", "howto/index") for page in pages - {"index"}} <= listed
    assert "notebooks/*" in listed


def test_markdown_in_docstrings_becomes_rest():
    text = """`a | b`s mean |x|, s* and x_ of *this*.

    v = a* x_

| a | b |
|---|---|
| `c` | 1 |

* one
Returns:
    `v(t, x)`: a function.
"""
    rest = docstrings.to_rest(text.split("\n"))
    assert rest[0] == r"``a | b``\ s mean \|x\|, s\* and x\_ of *this*."
    assert rest[2:5] == [".. code-block:: text", "", "    v = a* x_"]
    assert "   * - ``c``" in rest
    assert "* one" in rest
    assert rest[-2] == f"    ``v(t, x)``{docstrings.COLON} a function."


def test_links_lead_to_the_pages_of_the_site(monkeypatch, tmp_path):
    """From the README and from two folders: pages, notebooks, modules, and folders that have no page."""
    monkeypatch.syspath_prepend(DOCS)
    sources = load("sources").Sources(tmp_path)

    def link(target, path, page):
        return sources.markdown(f"[text]({target})", path, page)

    assert link("docs/samplers.md#what-there-is", "README.md", "index.md") == "[text](samplers.md#what-there-is)"
    assert link("../../README.md", "docs/howto/extend.md", "howto/extend.md") == "[text](../index.md)"
    assert link("../samplers.md", "docs/howto/extend.md", "howto/extend.md") == "[text](../samplers.md)"
    assert link("../fm_jax/oracles/mixture.py", "docs/samplers.md", "samplers.md") == "[text](reference/oracles.md)"
    assert link("../experiments", "notebooks/01_flows.ipynb", "notebooks/01_flows.ipynb") == "[text](../experiments.md)"
    assert link("../tests", "docs/samplers.md", "samplers.md") == "text"
    assert link("https://arxiv.org", "README.md", "index.md") == "[text](https://arxiv.org)"
    assert sources.markdown("`[text](README.md)`", "README.md", "index.md") == "`[text](README.md)`"


def test_links_that_lead_nowhere_are_found(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(DOCS)
    check = load("check")
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="#here"></a><a href="b.html#there"></a><img src="c.png">'
    )
    (tmp_path / "b.html").write_text(
        '<a href="a.html#here"></a><a href="https://example.org"></a><b id="x" /><b id="x">'
    )
    assert check.links(tmp_path) == [
        "a.html: b.html#there has no such anchor",
        "a.html: c.png does not exist",
        "b.html: the id x is there twice",
    ]
