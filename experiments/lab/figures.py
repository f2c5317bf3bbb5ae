"""Pictures of samples, training and trajectories, in one style: quiet, crisp, safe for colour-blind readers and print.

Nothing here touches pyplot or the backend, so it may be imported in a notebook. A path's ending decides the format.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import ticker
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from experiments.lab.processes import by_first
from fm_jax.data.images import to_uint8
from fm_jax.train.folder import replacing

# Okabe and Ito's palette; these also differ in lightness, so they survive a grey printer.
BLUE, ORANGE, SKY = "#0072B2", "#E69F00", "#56B4E9"
_CURVES = ("#000000", ORANGE, "#D55E00", SKY, BLUE, "#009E73", "#CC79A7", "#777777")
INK, GREY, PALE = "#222222", "#9A9A9A", "#E8E8E8"
_STYLE: dict = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK)
_STYLE |= {"font.size": 9.0, "axes.titlesize": 10.0, "axes.edgecolor": GREY, "axes.linewidth": 0.6}
_DPI = 220
PathLike = str | os.PathLike


@by_first
def save_grid(
    path: PathLike,
    images: np.ndarray,
    labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    columns: int = 10,
    real_columns: int = 3,
) -> None:
    """Draws one row a class: generated images, a gap, and a few real ones of that class.

    Args:
        path: the file to write.
        images: generated images [n, h, w, c] in [-1, 1], c being 1 or 3.
        labels: their classes [n].
        real: real images [m, h, w, c] in [-1, 1].
        real_labels: their classes [m].
        class_names: the name of every class; by default its number.
        title: written above.
        columns: generated images in a row.
        real_columns: real images in a row.
    """
    classes = np.unique(np.asarray(labels))
    names = [str(label) if class_names is None else class_names[label] for label in classes]
    left, right = (
        _montage([np.asarray(pictures)[np.asarray(kinds) == label][:count] for label in classes], count)
        for pictures, kinds, count in ((images, labels, columns), (real, real_labels, real_columns))
    )
    margin, gap, line = 20, 60, 40
    left_x = 2 * margin + 18 * max(len(name) for name in names)
    right_x = left_x + left.shape[1] + gap
    width = right_x + right.shape[1] + margin
    height = margin + left.shape[0] + line + margin // 2 + (0 if title is None else line + margin)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        for montage, x, header in ((left, left_x, "generated"), (right, right_x, "real")):
            # figimage copies pixels one to one: no resampling, whatever the size.
            figure.figimage(montage, xo=x, yo=margin, origin="upper")
            center, top = (x + montage.shape[1] / 2) / width, (margin + left.shape[0] + 12) / height
            figure.text(center, top, header, ha="center", va="bottom", size=8.5)
        for row, name in enumerate(names):
            y = (margin + left.shape[0] * (1 - (row + 0.5) / len(names))) / height
            figure.text((left_x - margin * 0.8) / width, y, name, ha="right", va="center_baseline")
        figure.text(0.5, 1 - margin * 0.7 / height, title or "", ha="center", va="top", size=11)
        _save(figure, path)


@by_first
def save_neighbours(path: PathLike, images: np.ndarray, neighbours: np.ndarray) -> None:
    """Draws generated images beside the training images that are nearest to them.

    Args:
        path: the file to write.
        images: [n, h, w, c] in [-1, 1], c being 1 or 3.
        neighbours: [n, k, h, w, c], likewise, the nearest first.
    """
    left, right = _montage([image[None] for image in images], 1), _montage([*neighbours], neighbours.shape[1])
    margin, gap, line = 20, 40, 40
    width, height = 2 * margin + gap + left.shape[1] + right.shape[1], margin + left.shape[0] + line + margin // 2
    width = max(width, 420)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        right_x = margin + left.shape[1] + gap
        for montage, x, header in ((left, margin, "sample"), (right, right_x, "nearest training images")):
            figure.figimage(montage, xo=x, yo=margin, origin="upper")
            figure.text(x / width, (margin + left.shape[0] + 12) / height, header, ha="left", va="bottom", size=8.5)
        _save(figure, path)


@by_first
def save_sheet(path: PathLike, images: np.ndarray, *, columns: int = 8) -> None:
    """Draws images [n, h, w, c] in [-1, 1], row by row and nothing else."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    with _whole(path) as unfinished:
        Image.fromarray(_montage(rows, min(columns, len(images)))).save(unfinished)


@by_first
def save_captioned(path: PathLike, images: np.ndarray, captions: Sequence[str], *, columns: int = 4) -> None:
    """Draws images [n, h, w, c] in [-1, 1] row by row, each above its caption."""
    width, margin, font = 200, 12, ImageFont.load_default(size=13)
    pictures = [Image.fromarray(_montage([image[None]], 1, size=128)) for image in np.asarray(images)]
    lines = [_wrapped(caption, font, width) for caption in captions]
    height = margin // 2 + 17 * max(map(len, lines))
    columns = min(columns, len(pictures))
    rows, side = -(-len(pictures) // columns), pictures[0].size
    sheet = Image.new(
        "RGB", (columns * (width + margin) + margin, rows * (side[1] + height + margin) + margin), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, lines, strict=True)):
        x, y = margin + (i % columns) * (width + margin), margin + (i // columns) * (side[1] + height + margin)
        sheet.paste(picture, (x + (width - side[0]) // 2, y))
        for j, line in enumerate(text):
            draw.text((x + width // 2, y + side[1] + margin // 2 + 17 * j), line, fill=INK, font=font, anchor="ma")
    with _whole(path) as unfinished:
        sheet.save(unfinished)


@by_first
def save_clips(
    path: PathLike, clips: np.ndarray, captions: Sequence[str], *, columns: int = 4, rate: float = 6.0
) -> None:
    """Writes a GIF of clips [n, frames, h, w, c] in [-1, 1] side by side, each above its caption.

    Args:
        path: the `.gif` to write.
        clips: shown together, over and over; the last frame stays for a while.
        captions: n of them.
        columns: clips in a row.
        rate: frames a second.
    """
    width, margin, line, font = 150, 10, 15, ImageFont.load_default(size=12)
    pictures = [[Image.fromarray(_montage([frame[None]], 1, size=96)) for frame in clip] for clip in np.asarray(clips)]
    lines, side = [_wrapped(caption, font, width) for caption in captions], pictures[0][0].size
    columns, height = min(columns, len(pictures)), side[1] + margin // 2 + line * max(map(len, lines))
    places = [
        (margin + i % columns * (width + margin), margin + i // columns * (height + margin))
        for i in range(len(pictures))
    ]
    sheet = Image.new("RGB", (columns * (width + margin) + margin, places[-1][1] + height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    for (x, y), text in zip(places, lines, strict=True):
        for j, each in enumerate(text):
            at = (x + width // 2, y + side[1] + margin // 2 + line * j)
            draw.text(at, each, fill=INK, font=font, anchor="ma")
    frames = []
    for k in range(len(pictures[0])):
        for (x, y), clip in zip(places, pictures, strict=True):
            sheet.paste(clip[k], (x + (width - side[0]) // 2, y))
        frames.append(sheet.quantize(32, dither=Image.Dither.NONE))
    duration = [max(20, round(1000 / rate))] * (len(frames) - 1) + [800]
    with _whole(path) as unfinished:
        frames[0].save(unfinished, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """A text in lines that are no wider than so many pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@by_first
def save_points(path: PathLike, points: np.ndarray) -> None:
    """Draws points [n, 2]."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        x, y = np.asarray(points).T
        axes.scatter(x, y, s=2.0, color=BLUE, linewidths=0)
        axes.set(aspect="equal")
        _save(figure, path)


@by_first
def save_animation(
    path: PathLike, frames: np.ndarray, *, times: np.ndarray | None = None, columns: int = 10, hold: float = 2.0
) -> None:
    """Writes a GIF of samples on their way from noise (t = 0) to data (t = 1), with a clock, in three seconds.

    Args:
        path: the `.gif` to write.
        frames: [num_times, n, h, w, c] in about [-1, 1]; values outside are clipped.
        times: the time of each frame [num_times]; by default evenly spaced on [0, 1].
        columns: images in a row.
        hold: for how many seconds the last frame stays.
    """
    frames, times = np.asarray(frames), np.linspace(0.0, 1.0, len(frames)) if times is None else times
    columns = min(columns, frames.shape[1])
    font, pictures = ImageFont.load_default(size=18), []
    for t, frame in zip(times, frames, strict=True):
        montage = _montage([frame[i : i + columns] for i in range(0, len(frame), columns)], columns, size=56)
        height, width = montage.shape[:2]
        picture = Image.new("RGB", (width + 24, height + 52), "white")
        picture.paste(Image.fromarray(montage), (12, 12))
        draw = ImageDraw.Draw(picture)
        draw.text((12, height + 32), f"t = {t:.2f}", fill=INK, font=font, anchor="lm")
        for fraction, color in ((1.0, PALE), (float(np.clip(t, 0, 1)), BLUE)):
            draw.rectangle((96, height + 30, 96 + (width - 85) * fraction, height + 34), fill=color)
        pictures.append(picture.quantize(256, dither=Image.Dither.NONE))
    # GIF counts in hundredths of a second, and browsers slow down anything below two.
    duration = [max(20, 10 * round(300 / len(frames)))] * (len(frames) - 1) + [round(1000 * hold)]
    with _whole(path) as unfinished:
        pictures[0].save(unfinished, save_all=True, append_images=pictures[1:], duration=duration, loop=0)


@by_first
def save_loss_curve(
    path: PathLike, steps: Sequence[int], losses: Sequence[float], *, label: str = "loss", title: str | None = None
) -> None:
    """Draws a training loss on a log scale: every value lightly, a centred moving average over it.

    Args:
        path: the file to write.
        steps: training steps [n], ascending.
        losses: positive losses [n].
        label: what the loss is, for the axis.
        title: written above.
    """
    x, y = np.asarray(steps), np.asarray(losses, dtype=np.float64)
    window = np.ones(min(len(y), max(5, len(y) // 30)))
    smooth = np.convolve(y, window, mode="same") / np.convolve(np.ones_like(y), window, mode="same")
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(x, y, color=SKY, alpha=0.45, linewidth=0.6, label="each value")
        axes.plot(x, smooth, color=BLUE, linewidth=1.6, label="moving average")
        axes.annotate(f" {smooth[-1]:.3g}", (x[-1], smooth[-1]), va="center", color=BLUE, annotation_clip=False)
        axes.set_yscale("log")
        decade = np.nanmax(y) > 10 * np.nanmin(y)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)) if decade else ticker.MaxNLocator(6))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=PALE, linewidth=0.6)
        axes.set(xlabel="training step", ylabel=label, title=title or "", xmargin=0.01)
        axes.legend(loc="upper right", framealpha=0.85, edgecolor="none")
        _save(figure, path)


@by_first
def save_scatter(
    path: PathLike,
    source: np.ndarray,
    samples: np.ndarray,
    trajectories: np.ndarray,
    data: np.ndarray,
    *,
    title: str | None = None,
) -> None:
    """Draws a two-dimensional flow: the data, the way of 250 samples to it, and the density of all samples.

    Args:
        path: the file to write.
        source: where the trajectories start [n, 2].
        samples: generated points [m, 2].
        trajectories: [num_times, n, 2].
        data: real points [k, 2].
        title: written above.
    """
    source, trajectories = np.asarray(source)[:250], np.asarray(trajectories)[:, :250]
    samples, data = np.asarray(samples), np.asarray(data)
    limit = 1.08 * np.quantile(np.abs(np.concatenate([data, samples, source])), 0.999)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 2.8 if title is None else 3.1), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        left.scatter(*data[:4000].T, s=1.6, color=INK, alpha=0.45, linewidths=0)
        ways = list(np.swapaxes(trajectories, 0, 1))
        middle.add_collection(LineCollection(ways, colors=GREY, linewidths=0.4, alpha=0.6))
        for points, color, name in ((source, ORANGE, "t = 0"), (trajectories[-1], BLUE, "t = 1")):
            middle.scatter(*points.T, s=5, color=color, linewidths=0, label=name, zorder=3)
        middle.legend(frameon=False, loc="upper left", handletextpad=0.0, borderpad=0.0, markerscale=2)
        density = LinearSegmentedColormap.from_list("density", ["white", SKY, BLUE, "#00263D"])
        right.hist2d(*samples.T, bins=96, range=[[-limit, limit]] * 2, cmap=density, rasterized=True)
        for axes, header in ((left, "data"), (middle, "trajectories"), (right, "samples")):
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=header, xticks=[], yticks=[])
        figure.suptitle(title or "", size=11)
        _save(figure, path)


@by_first
def save_trajectory_table(path: PathLike, panels: dict[str, dict[str, np.ndarray]], rows: Sequence[str]) -> None:
    """Draws two-dimensional flows side by side: a column a method, a row a pair of distributions.

    Args:
        path: the file to write.
        panels: {column: {row: trajectories [num_times, n, 2]}}; a row that a column lacks stays empty.
        rows: their order.
    """
    with mpl.rc_context(_STYLE):
        size = (1.55 * len(panels) + 0.3, 1.55 * len(rows) + 0.25)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(rows), len(panels), squeeze=False)
        for axes_of_row, row in zip(grid, rows, strict=True):
            ends = np.concatenate([column[row][[0, -1]] for column in panels.values() if row in column])
            limit = 1.05 * np.quantile(np.abs(ends), 0.999)
            for axes, (name, column) in zip(axes_of_row, panels.items(), strict=True):
                axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
                axes.set_title(name if row == rows[0] else None)
                axes.spines[:].set_visible(row in column)
                if row in column:
                    ways = np.swapaxes(column[row], 0, 1)
                    length = np.linalg.norm(np.diff(ways, axis=1), axis=2).sum()
                    # Of ways that wander, as an SDE's do, a few fill the picture.
                    drawn = ways[:20] if length > 3 * np.linalg.norm(ways[:, -1] - ways[:, 0], axis=1).sum() else ways
                    axes.add_collection(LineCollection([*drawn], colors=GREY, linewidths=0.35, alpha=0.55))
                    for points, color in ((ways[:, 0], ORANGE), (ways[:, -1], BLUE)):
                        axes.scatter(*points.T, s=2.0, color=color, linewidths=0, zorder=3)
            axes_of_row[0].set_ylabel(row)
        _save(figure, path)


@by_first
def save_density(path: PathLike, data: np.ndarray, density: np.ndarray, samples: np.ndarray, limit: float) -> None:
    """Draws two-dimensional data, the density of a model and its samples, side by side.

    Args:
        path: the file to write.
        data: [n, 2].
        density: on a square lattice over [-limit, limit]^2, rows along the second coordinate.
        samples: [n, 2].
        limit: half the side of the square.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.6, 2.8), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for axes, points, title in ((left, data, "data"), (right, samples, "samples")):
            axes.scatter(*points[:4000].T, s=1.6, color=INK, alpha=0.45, linewidths=0)
            axes.set_title(title)
        middle.imshow(density, extent=(-limit, limit, -limit, limit), origin="lower", cmap="Blues")
        middle.set_title("density of the model")
        for axes in (left, middle, right):
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
        _save(figure, path)


@by_first
def save_error_curves(path: PathLike, panels: dict[str, dict[str, dict[int, float]]]) -> None:
    """Draws error against network evaluations, both on logarithmic axes, a panel for each problem.

    Args:
        path: the file to write.
        panels: {title: {name of a sampler: {evaluations: error}}}, the samplers of the first panel in all of them.
    """
    names = list(next(iter(panels.values())))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.9), layout="constrained")
        for axes, (title, curves) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
            for name, colour, marker in zip(names, _CURVES, "os^vDPX*", strict=False):
                nfe = sorted(curves[name])
                axes.loglog(
                    nfe, [curves[name][n] for n in nfe], color=colour, marker=marker, ms=4.5, lw=1.2, label=name
                )
            ticks = sorted({n for curve in curves.values() for n in curve})
            axes.set(title=title, xlabel="network evaluations", ylabel="RMS error against the exact flow")
            axes.set_xticks([n for n in ticks if n in (5, 10, 20, 50)])
            axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
            axes.xaxis.set_minor_formatter(ticker.NullFormatter())
            axes.grid(color=PALE, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best", fontsize=8)
        _save(figure, path)


@by_first
def save_tables(path: PathLike, tables: Mapping[str, np.ndarray]) -> None:
    """Draws tables of numbers [rows, columns], not negative, side by side under their names, in one scale."""
    most = max(float(np.quantile(table, 0.99)) for table in tables.values())
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(2.8 * len(tables), 3.0), dpi=_DPI, layout="constrained")
        for ax, (name, table) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
            ax.imshow(table, vmin=0, vmax=most, cmap="Greys", interpolation="nearest")
            ax.set(title=name, xticks=[], yticks=[])
        _save(figure, path)


@by_first
def save_shares(path: PathLike, network: dict[str, dict[str, float]], exact: dict[str, dict[str, float]]) -> None:
    """Draws how many samples are right against network evaluations: of a network, and dashed of what it should be.

    Args:
        path: the file to write.
        network: {name of a sampler: {evaluations: share}}.
        exact: the same of the exact posterior, with the same names.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for name, colour, marker in zip(network, _CURVES, "os^vDPX*", strict=False):
            for curve, line, label in ((network[name], "-", name), (exact[name], "--", None)):
                nfe = sorted(curve, key=int)
                shares = [curve[each] for each in nfe]
                fill = colour if line == "-" else "white"
                axes.plot(
                    [int(each) for each in nfe], shares, line, color=colour, marker=marker, ms=4.5, mfc=fill, lw=1.2,
                    label=label,
                )  # fmt: skip
        axes.plot([], [], "--", color=GREY, lw=1.2, label="dashed: exact posterior")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
        axes.set(xlabel="network evaluations", ylabel="solutions among the samples", ylim=(-0.02, 1.02))
        axes.grid(color=PALE, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(frameon=False, loc="outside right center", fontsize=8)
        _save(figure, path)


def _montage(rows: Sequence[np.ndarray], columns: int, size: int = 72, gap: int = 6) -> np.ndarray:
    """Lays images [k, h, w, c] out in rows, enlarged to about `size` pixels, on white: uint8 [height, width, 3]."""
    h, w, c = rows[0].shape[1:]
    if c not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {c}.")
    scale = max(1, round(size / h))
    sheet = np.full((len(rows) * (h * scale + gap) - gap, columns * (w * scale + gap) - gap, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(to_uint8(row)):
            y, x = i * (h * scale + gap), j * (w * scale + gap)
            sheet[y : y + h * scale, x : x + w * scale] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return sheet


def _save(figure: Figure, path: PathLike) -> None:
    with _whole(path) as unfinished:
        figure.savefig(unfinished, dpi=_DPI, facecolor="white")


@contextlib.contextmanager
def _whole(path: PathLike) -> Iterator[Path]:
    """A file to write to, which takes its name when it is whole."""
    Path(path).parent.mkdir(exist_ok=True)  # that of a run which was removed is not made anew
    with replacing(path) as unfinished:
        yield unfinished
