r"""The numbered equations of the notebooks, and the objects that implement them.

The docstring of what implements some has, before its sections, a line `Notebooks: (5.2), (5.3).` In a notebook there is
an anchor, a blank line and a display with the tag of the same number:

    <a id="eq-5-3"></a>

    $$
    L_{CFM} = L_{FM} + C \tag{5.3}
    $$
"""

import json
import re
from functools import cache

import public

DISPLAY = re.compile(
    r'^<a id="eq-(\d+)-(\d+)"></a>\n\n\$\$\n(?P<latex>[^$]*?\\tag\{(?P<number>\1\.\2)\})\n\$\$$', re.MULTILINE
)
LINE = re.compile(r"^Notebooks: (\(\d+\.\d+\)(?:, \(\d+\.\d+\))*)\.$", re.MULTILINE)
NUMBER = re.compile(r"\((\d+)\.(\d+)\)")
WRITTEN = re.compile(r'^ *(?:"{3})?Notebooks: ', re.MULTILINE)


@cache
def read() -> dict[str, tuple[str, str]]:
    """By numbers such as "5.3", in the order of the notebooks: a link to the notebook of an equation, and its LaTeX.

    Raises:
        ValueError: for a tag that is not that of the anchor, is used before, or is not at the end, as MathJax needs it.
    """
    found: dict[str, tuple[str, str]] = {}
    for path in sorted((public.ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        link = f"[{text.partition(chr(10))[0].lstrip('# ')}](/notebooks/{path.name})"
        displays = {each["number"]: (link, each["latex"]) for each in DISPLAY.finditer(text)}
        tags = re.findall(r"\\tag\{(.*?)\}", text)
        if lost := [tag for tag in tags if tag not in displays or tag in found or tags.count(tag) > 1]:
            raise ValueError(f"{path.name}: ({lost[0]}) must end one display, below the anchor of its number.")
        found |= displays
    return found


@cache
def implementers() -> dict[str, list[str]]:
    """By the number of an equation: the paths of the objects whose docstrings name it."""
    found: dict[str, list[str]] = {}
    for path in public.documented():
        for number in NUMBER.findall(" ".join(LINE.findall(public.doc(path)))):
            found.setdefault(".".join(number), []).append(path)
    return found


def problems() -> list[str]:
    """Numbers of no equation, and lines that name equations where the reference does not show them."""
    lost = {number: paths for number, paths in implementers().items() if number not in read()}
    found = [f"{', '.join(paths)}: there is no equation ({number})" for number, paths in lost.items()]
    written = sum(len(WRITTEN.findall(path.read_text())) for path in (public.ROOT / "fm_jax").rglob("*.py"))
    shown = sum(len(LINE.findall(public.doc(path))) for path in public.documented())
    if written != shown:
        found.append(f"{written} lines of fm_jax begin with 'Notebooks: ', of which the reference shows {shown}")
    return found
