"""What the site is made of: `make docs` builds it and checks the rest. Sphinx is not needed here."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

THEORY = """
1.3 1.5 1.6 2.1 2.4 2.5 2.6 2.7 2.8 2.10 2.11 4.1 4.2 4.3 4.5 4.6 4.9 5.1 5.4 6.1 6.5 6.6 6.7 6.8 7.2 7.3 8.3 8.4 9.8
9.9 10.5 10.6 11.2 12.4 13.4 13.5
"""
"""Definitions, steps of proofs, bounds and examples: equations that no function computes."""

sys.path.insert(0, str(DOCS))  # which is no package
build, equations, pages, public, reference = map(
    importlib.import_module, ("build", "equations", "pages", "public", "reference")
)
sys.path.remove(str(DOCS))


def test_every_public_name_is_on_one_page_and_has_a_docstring():
    assert len(public.documented()) > 200
    assert len(public.documented()) == len(set(public.documented()))
    assert public.problems() == []


def test_a_name_that_is_missing_is_found(tmp_path):
    (tmp_path / "losses.md").write_text("```{objects} fm_jax.losses\nflow_matching\n```\n")
    problems = public.problems(tmp_path)
    assert "fm_jax.losses.score_matching is not in docs/reference" in problems
    assert "fm_jax.losses.flow_matching is not in docs/reference" not in problems


def test_a_name_of_nothing_is_found(tmp_path):
    (tmp_path / "losses.md").write_text("```{objects} fm_jax.losses\nflow_matching\nflow_matched\n```\n")
    assert public.problems(tmp_path)[0] == "fm_jax.losses.flow_matched is in docs/reference but not in fm_jax"


@pytest.mark.slow
def test_docstrings_name_equations_that_exist(monkeypatch):
    assert equations.problems() == []
    assert "fm_jax.losses.flow_matching" in equations.implementers()["5.3"]
    known = {number: each for number, each in equations.read().items() if number != "5.3"}
    monkeypatch.setattr(equations, "read", lambda: known)
    (problem,) = equations.problems()
    assert problem.endswith(": there is no equation (5.3)")


def test_an_equation_is_implemented_or_theory():
    """A new one is named by the docstring of what implements it, or listed here."""
    assert [number for number in equations.read() if number not in equations.implementers()] == THEORY.split()


def test_a_line_that_the_reference_does_not_show_is_found(monkeypatch):
    shown = [path for path in public.documented() if path != "fm_jax.losses.flow_matching"]
    monkeypatch.setattr(public, "documented", lambda: shown)
    assert "of which the reference shows" in equations.problems()[-1]


@pytest.mark.parametrize("tag", ["1.2", "1.1} \\end{aligned"])
def test_a_number_that_is_not_that_of_its_anchor_is_refused(monkeypatch, tmp_path, tag):
    (tmp_path / "notebooks").mkdir()
    cell = (
        f'{{"cell_type": "markdown", "source": ["# 1\\n\\n<a id=\\"eq-1-1\\"></a>\\n\\n$$\\nx \\\\tag{{{tag}}}\\n$$"]}}'
    )
    (tmp_path / "notebooks" / "01_a.ipynb").write_text(f'{{"cells": [{cell}]}}'.replace(" \\end", " \\\\end"))
    monkeypatch.setattr(public, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="must end one display"):
        equations.read.__wrapped__()


def test_every_page_is_in_a_toctree():
    listed = {"docs/index"}
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.splitlines():
                if line and not line.startswith(":"):
                    entry = line.rpartition("<")[2].rstrip(">")
                    listed.add(entry[1:] if entry[0] == "/" else str((page.parent / entry).relative_to(ROOT)))
    assert {str(page.relative_to(ROOT).with_suffix("")) for page in DOCS.rglob("*.md")} <= listed
    assert "notebooks/*" in listed


def test_links_lead_to_the_pages_of_the_site():
    """From the README, from a folder and from a notebook: pages, the first page, and folders that have none."""
    assert pages.link("docs/samplers.md#what-there-is", "README.md") == "/docs/samplers.md#what-there-is"
    assert pages.link("../../README.md", "docs/howto/extend.md") == "/docs/index.md"
    assert pages.link("../experiments", "notebooks/01_flows.ipynb") == "/experiments/README.md"
    assert pages.link("../tests", "docs/samplers.md") is None
    assert pages.link("https://arxiv.org", "README.md") == "https://arxiv.org"
    assert pages.link("#here", "README.md") == "#here"


def test_texts_get_their_links():
    text = "[a](samplers.md), [tests](../tests), `[b](c.md)`, `losses.flow_matching(...)`, `jnp.exp`, arXiv:2210.02747"
    assert pages.markdown(text, "docs/couplings.md") == (
        "[a](/docs/samplers.md), tests, `[b](c.md)`, "
        "{py:obj}`losses.flow_matching(...) <fm_jax.losses.flow_matching>`, `jnp.exp`, "
        "[arXiv:2210.02747](https://arxiv.org/abs/2210.02747)"
    )
    assert pages.markdown("```\n[a](b.md)\n```\n# `AffinePath`", "docs/couplings.md") == (
        "```\n[a](b.md)\n```\n# `AffinePath`"
    )
    assert pages.markdown("[samplers.md](samplers.md)", "docs/couplings.md") == "[](/docs/samplers.md)"


def test_code_means_what_its_module_means_by_it():
    assert public.find("log_prob") is None  # of two modules
    assert public.find("log_prob", "fm_jax.oracles") == "fm_jax.oracles.log_prob"
    assert public.find("AffinePath.sample") == "fm_jax.paths.AffinePath"
    assert pages.code("apply_fn", signature="f(apply_fn: ApplyFn)") == "`apply_fn`"


def example(x: float, *, scale: float = 2.0) -> float:
    """Multiplies, see `AffinePath`.

    Notebooks: (5.2), (5.3).

    Args:
        x: a number,
            and more.

    Returns:
        The product: a number.

    Example:
        >>> example(1.0)
        2.0
    """
    return scale * x


def test_a_docstring_as_markdown():
    assert reference.signature(example) == "(x: float, *, scale: float=2.0) -> float"
    text = reference.markdown(inspect.getdoc(example), "fm_jax.paths")
    assert re.split(r"\n{2,}", text.strip()) == [
        "Multiplies, see {py:obj}`AffinePath <fm_jax.paths.AffinePath>`.",
        "{.derived}\nNotebooks: {ref}`(5.2) <eq-5-2>`, {ref}`(5.3) <eq-5-3>`.",
        ":param x: a number,\n    and more.",
        ":returns:\n    The product: a number.",
        ":::{rubric} Example\n:::",
        "```pycon\n>>> example(1.0)\n2.0\n```",
    ]


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="#here"></a><a href="b.html#there"></a><img src="c.png">'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#here"></a><a href="https://a.b#c"></a><b id="x" /><b id="x">')
    assert build.broken_links(tmp_path) == [
        "a.html: b.html#there has no such anchor",
        "a.html: c.png does not exist",
        "b.html: the id x is there twice",
    ]
