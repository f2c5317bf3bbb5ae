"""Every notebook is paired with its outputs, all of them, and keeps to the form that its readers rely on.

That they run is for `make notebooks`, and in continuous integration for `python -m notebooks --smoke`.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs the extra fm_jax[notebooks]")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
NUMBERS = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def cells_of(source, kind):
    return [cell for cell in paired(source).cells if cell.cell_type == kind]


def paired(source):
    return nbformat.read(source.with_suffix(".ipynb"), as_version=4)


def prose(source):
    return "\n\n".join(cell.source for cell in jupytext.read(source).cells if cell.cell_type == "markdown")


def anchors(source):
    return re.findall(r'<a id="([^"]+)"></a>', prose(source))


def test_all_are_there():
    assert [source.stem[:2] for source in SOURCES] == [f"{number:02}" for number in range(1, 16)]


@each_notebook
def test_outputs_belong_to_the_source(source):
    """`make notebooks` was run after the last change, and from top to bottom."""
    want = [(cell.cell_type, cell.source) for cell in jupytext.read(source).cells]
    assert [(cell.cell_type, cell.source) for cell in paired(source).cells] == want
    code = cells_of(source, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert source.with_suffix(".ipynb").stat().st_size < 1_200_000, "too large to be read on a code host"


@each_notebook
def test_ends_with_one_figure_and_one_number(source):
    outputs = cells_of(source, "code")[-1].outputs
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    lines = "".join(output.get("text", "") for output in outputs).splitlines()
    assert len(lines) == 1, lines
    assert re.search(NUMBERS, lines[0])


@each_notebook
def test_code_is_short_and_checks_itself(source):
    code = "\n".join(cell.source for cell in cells_of(source, "code"))
    lines = [line for line in code.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(lines) < 200
    assert re.search(r"^\s*assert ", code, flags=re.MULTILINE)


@each_notebook
def test_prose_leads_on(source):
    """A numbered title; a link to the next notebook; equations numbered in order, each with an anchor of its number."""
    number = int(source.stem[:2])
    cells = [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "markdown"]
    assert cells[0].startswith(f"# {number}. ")
    following = next((other.stem for other in SOURCES if int(other.stem[:2]) == number + 1), SOURCES[0].stem)
    assert f"({following}.ipynb)" in cells[-1]
    tags = re.findall(r"\\tag\{(\d+)\.(\d+)\}", prose(source))
    assert tags == [(str(number), str(k)) for k in range(1, len(tags) + 1)]
    assert [anchor for anchor in anchors(source) if anchor.startswith("eq-")] == [f"eq-{n}-{k}" for n, k in tags]


@pytest.mark.slow_but_one
@each_notebook
def test_links_lead_somewhere(source):
    for target in re.findall(r"\]\(([^)]+)\)", prose(source)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        page = FOLDER / path if path else source.with_suffix(".ipynb")
        assert page.exists(), target
        if anchor and page.suffix == ".ipynb":
            assert anchor in anchors(page.with_suffix(".py")), target


@pytest.mark.slow
def test_film_is_a_slider_and_a_strip_of_stills():
    script = (
        "import numpy as np, lab\n"
        "film = lab.film(lambda t, axes: axes.plot([0, t]), np.linspace(0, 1, 4), alt='a \"line\"', stills=3)\n"
        "data = film._repr_mimebundle_()\n"
        "assert len(film.frames) == 4 and film.captions[1] == 't = 0.33', film.captions\n"
        "assert 'type=\"range\"' in data['text/html'] and 'a &quot;line&quot;' in data['text/html']\n"
        "still = data['text/html'].index('class=\"still\"')\n"
        "assert still < data['text/html'].index('<script>')\n"
        "assert data['image/png'].startswith('iVBOR') and '4 frames' in data['text/plain']\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=FOLDER, check=True, timeout=100)
