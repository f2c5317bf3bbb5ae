"""Pictures of densities and places on the globe, and of angles."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation

from experiments.lab.figures import _DPI, _STYLE, BLUE, GREY, INK, ORANGE, PALE, SKY, _save
from experiments.lab.processes import by_first

VIEWS = {"the Americas": (0.0, -90.0), "Europe and Africa": (0.0, 15.0), "Asia and the Pacific": (0.0, 135.0)}
"""The latitude and longitude in the middle of each hemisphere that is drawn."""


def even_points(num: int) -> np.ndarray:
    """Points [num, 3] of the sphere of which each has as much of it around: Fibonacci's spiral."""
    i = np.arange(num) + 0.5
    height, angle = 1 - 2 * i / num, math.pi * (1 + math.sqrt(5)) * i
    around = np.sqrt(1 - height**2)
    return np.stack([around * np.cos(angle), around * np.sin(angle), height], axis=1)


def seen_from(x: np.ndarray, latitude: float, longitude: float) -> np.ndarray:
    """Points [n, 3] as they are seen from above a place: to the right, up and towards the eye, [n, 3]."""
    a, b = math.radians(latitude), math.radians(longitude)
    right = [-math.sin(b), math.cos(b), 0.0]
    up = [-math.sin(a) * math.cos(b), -math.sin(a) * math.sin(b), math.cos(a)]
    towards = [math.cos(a) * math.cos(b), math.cos(a) * math.sin(b), math.sin(a)]
    return np.asarray(x, np.float64) @ np.array([right, up, towards]).T


@by_first
def save_globe(path: Path, points: np.ndarray, log_density: np.ndarray, data: np.ndarray) -> None:
    """Draws a density on the globe and places over it, from three sides.

    Args:
        path: the file to write.
        points: of the sphere, [n, 3], all over it.
        log_density: at these, [n], in nats.
        data: places [m, 3].
    """
    most = float(np.max(log_density))
    levels = (most - 8, most)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 2.9), dpi=_DPI, layout="constrained")
        for axes, (title, view) in zip(figure.subplots(1, len(VIEWS)), VIEWS.items(), strict=True):
            x, y, towards = seen_from(points, *view).T
            near = towards > -0.15  # a little behind the rim, so that triangles reach it
            size = np.where(towards > 0, 1, 2 - np.hypot(x, y))[near]
            triangles = Triangulation(x[near] * size, y[near] * size)
            shown = np.clip(log_density[near], *levels)
            picture = axes.tripcolor(
                triangles, shown, vmin=levels[0], vmax=levels[1], cmap="Blues", shading="gouraud", rasterized=True
            )
            rim = mpl.patches.Circle((0, 0), 1, transform=axes.transData, facecolor="none", edgecolor=GREY, lw=0.6)
            axes.add_patch(rim)
            picture.set_clip_path(rim)
            _draw_lattice(axes, view)
            x, y, towards = seen_from(data, *view).T
            axes.scatter(x[towards > 0], y[towards > 0], s=2.5, color=ORANGE, linewidths=0, zorder=3)
            axes.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), aspect="equal", title=title)
            axes.set_axis_off()
        bar = figure.colorbar(picture, ax=figure.axes, shrink=0.8, pad=0.01)
        bar.set_label("log-density, nats")
        bar.outline.set_visible(False)
        _save(figure, path)


def _draw_lattice(axes, view: tuple[float, float]) -> None:
    """Meridians every 60 degrees and parallels every 30."""
    fine = np.radians(np.linspace(-180, 180, 181))
    for angle in np.radians(np.arange(-90, 90, 30)):
        for latitude, longitude in ((fine / 2, np.full_like(fine, 2 * angle)), (np.full_like(fine, angle), fine)):
            around = np.cos(latitude)
            lines = np.stack([around * np.cos(longitude), around * np.sin(longitude), np.sin(latitude)], axis=1)
            x, y, towards = seen_from(lines, *view).T
            axes.plot(np.where(towards > 0, x, np.nan), y, color=GREY, linewidth=0.3, alpha=0.5)


@by_first
def save_angles(path: Path, samples: np.ndarray, angles: np.ndarray, density: np.ndarray) -> None:
    """Draws a histogram of angles in [-pi, pi) and the density that they should have.

    Args:
        path: the file to write.
        samples: any number of angles.
        angles: where the density is known [n], ascending.
        density: there, [n].
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        bins = np.linspace(-math.pi, math.pi, 121).tolist()
        axes.hist(np.ravel(samples), bins=bins, density=True, color=SKY, alpha=0.6, label="samples")
        axes.plot(angles, density, color=BLUE, linewidth=1.4, label="exact")
        axes.set(xlabel="angle", ylabel="density", xlim=(-math.pi, math.pi))
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper right", labelcolor=INK)
        _save(figure, path)
