"""What the notebooks share: one style of figure, films with a slider for t, and a smoke mode.

Jupyter runs a notebook in the notebook's own folder, so that `import lab` finds this file. Importing it sets the style.
"""

import base64
import hashlib
import html
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

SMOKE = os.environ.get("FM_JAX_SMOKE", "") not in ("", "0")
"""Whether trainings are cut down to a few steps, as in continuous integration. What has a closed form never is."""

BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#9A9A9A", "#E8E8E8"

plt.style.use(Path(__file__).with_name("lab.mplstyle"))
if SMOKE:
    plt.rcParams.update({"figure.dpi": 40, "savefig.dpi": 40})

_PAGE = """\
<figure id="{name}" style="margin: 0; max-width: {width}px">
<img class="still" alt="{alt}" src="data:image/webp;base64,{still}" style="width: 100%; background: white">
<script>(() => {{
  const film = document.getElementById("{name}"), frames = {frames}, captions = {captions};
  film.insertAdjacentHTML("beforeend", `<style>
    #{name} .still {{ display: none }}
    @media print {{ #{name} .still {{ display: block }} #{name} .live {{ display: none }} }}
  </style><div class="live">
    <img alt="{alt}" style="width: {frame_width}px; max-width: 100%; background: white">
    <div style="display: flex; align-items: center; gap: 0.6em; max-width: {frame_width}px">
      <button aria-label="play" style="width: 2.4em; cursor: pointer">&#9654;</button>
      <input type="range" min="0" max="${{frames.length - 1}}" value="0" aria-label="time" style="flex: 1">
      <output style="min-width: 6em; font-variant-numeric: tabular-nums"></output>
    </div></div>`);
  const find = (selector) => film.querySelector(".live " + selector);
  const picture = find("img"), button = find("button"), range = find("input"), caption = find("output");
  const show = () => {{
    picture.src = "data:image/webp;base64," + frames[range.value];
    caption.textContent = captions[range.value];
  }};
  let timer = null;
  const stop = () => {{ clearInterval(timer); timer = null; button.innerHTML = "&#9654;"; }};
  const step = () => {{
    if (+range.value >= frames.length - 1) return stop();
    range.value = +range.value + 1; show();
  }};
  range.oninput = () => {{ stop(); show(); }};
  button.onclick = () => {{
    if (timer) return stop();
    if (+range.value >= frames.length - 1) range.value = 0;
    button.innerHTML = "&#10073;&#10073;"; timer = setInterval(step, 90); show();
  }};
  show();
}})();</script>
</figure>"""


@dataclass(frozen=True)
class Film:
    """A moving picture that Jupyter shows with a slider, and as a strip of stills wherever scripts do not run."""

    frames: tuple[bytes, ...]
    captions: tuple[str, ...]
    still: bytes
    alt: str

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """Both forms in one output: a page chooses the richest that it can show."""
        frames = [base64.b64encode(frame).decode() for frame in self.frames]
        still = Image.open(io.BytesIO(self.still))
        page = _PAGE.format(
            name="film-" + hashlib.sha256(b"".join(self.frames)).hexdigest()[:12],
            alt=html.escape(self.alt, quote=True),
            still=base64.b64encode(self.still).decode(),
            frames=json.dumps(frames),
            captions=json.dumps(self.captions),
            width=still.width // 2,
            frame_width=Image.open(io.BytesIO(self.frames[0])).width // 2,
        )
        picture = io.BytesIO()
        still.quantize(64, dither=Image.Dither.NONE).save(picture, "png", optimize=True)
        return {
            "text/html": page,
            "image/png": base64.b64encode(picture.getvalue()).decode(),
            "text/plain": f"<Film of {len(frames)} frames: {self.alt}>",
        }


def film(
    draw: Callable[..., None],
    times: Sequence[float] | np.ndarray,
    *,
    alt: str,
    panels: int = 1,
    size: tuple[float, float] = (3.2, 3.2),
    stills: int = 5,
    caption: str = "t = {:.2f}",
) -> Film:
    """Draws a moving picture; as the last value of a cell it shows itself.

    Args:
        draw: `draw(t, *axes)` draws the frame at t into fresh axes, one for each panel, limits and all. In the strip
            the title of the first panel is the caption; what names a panel belongs beside or below it.
        times: the time of each frame, ascending; about 25 play in two seconds.
        alt: what there is to see, in words.
        panels: axes in a frame, side by side; one above the other in the strip of stills.
        size: of a panel, in inches.
        stills: how many of the times, evenly spread from first to last, the strip shows. In smoke mode the first and
            the last are all that there is.
        caption: a format of t, beside the slider and above the stills.
    """

    def webp(picture: Image.Image, *, lossless: bool = False) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "webp", lossless=lossless, quality=80, method=0 if SMOKE else 4)
        return buffer.getvalue()

    def render(figure: plt.Figure) -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=plt.rcParams["savefig.dpi"])
        plt.close(figure)
        picture = Image.open(buffer).convert("RGB")
        few_colours = picture.quantize(32, dither=Image.Dither.NONE).convert("RGB")
        return min(webp(few_colours, lossless=True), webp(picture), key=len)

    if SMOKE:
        times, stills = [times[0], times[-1]], 2
    frames = []
    for t in times:
        figure, axes = plt.subplots(1, panels, figsize=(size[0] * panels, size[1]), squeeze=False)
        draw(t, *axes[0])
        frames.append(render(figure))
    chosen = [times[round(i)] for i in np.linspace(0, len(times) - 1, stills)]
    strip_size = 0.62 * size[0] * stills, 0.62 * size[1] * panels
    strip, axes = plt.subplots(panels, stills, figsize=strip_size, squeeze=False)
    for t, column in zip(chosen, axes.T, strict=True):
        draw(t, *column)
        column[0].set_title(caption.format(t))
    captions = tuple(caption.format(t) for t in times)
    return Film(tuple(frames), captions, render(strip), alt)
