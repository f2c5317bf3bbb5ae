"""Training data from a folder of pictures, as they come."""

from __future__ import annotations

import csv
import io
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np

from fm_jax.checks import (
    check_bool,
    imported,
    shown,
    why_no_folder,
)
from fm_jax.data.arrays import Say, Split, natural
from fm_jax.data.picture import (
    Background,
    Colour,
    Fit,
    PictureError,
    kind_unread,
    shown_path,
)
from fm_jax.data.reading import Found, count, gather, listed_errors, named, quoted

T = TypeVar("T")

_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")
_OF_SYSTEMS = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
_RUN = {"config.json", "checkpoints"}
"""What the folder of a run holds, whose pictures are no data."""
_FOLDERS_OF_SYSTEMS = ("__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "__pycache__")
_ALONE = (
    "txt json jsonl csv tsv xml md rst yaml yml toml html htm css js url webloc lnk npy npz mat pkl pt pth parquet "
    "arrow tfrecord db sqlite ini cfg log py pyc ipynb sh aae xmp thm zip gz tar tgz bz2 xz 7z rar lock md5 sha256 "
    "mp3 wav srt bak tmp part crdownload download swp"
)
_NAMES_OF_TEXTS = ("readme", "license", "licence", "copying", "notice", "changelog", "makefile", "checksums")
_NO_PICTURES = frozenset(_ALONE.split())
"""Endings of what commonly lies beside pictures, and is left alone."""
_FILE_COLUMNS = (
    "filename",
    "file_name",
    "file",
    "filepath",
    "path",
    "image",
    "image_path",
    "picture",
    "image_id",
    "id",
)
_SPLIT_COLUMNS = ("split", "subset", "partition", "set", "fold")
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "label_name", "category", "target", "species", "breed")


class _File(NamedTuple):
    path: Path
    parts: tuple[str, ...]


class _Tree(NamedTuple):
    """What a folder holds: candidates, folders, refused names with their reasons, endings of what was left alone."""

    files: list[_File]
    folders: list[tuple[str, ...]]
    refused: dict[str, str]
    alone: Counter[str]
    loops: list[str]
    runs: list[str]


def find_pictures(
    folder: str | os.PathLike[str], *, labels: str | os.PathLike[str] = "folders", skip_broken: bool = False
) -> Found:
    """Lists the pictures of a folder with their classes; decodes none of them.

    * Classes are the first folders below `folder`, however deep the pictures lie. Without such folders there are no
      labels. If there are only folders named train, test, val and the like, with train among them, they are the splits,
      and the classes are below. If there is a single folder that holds nothing but folders, it is gone into.
    * Names of classes are in natural order, 2 before 10, the same everywhere.
    * Hidden files and those of operating systems are ignored; endings that are no pictures (.txt, .json, ...) are
      counted in the notes; all else must be a picture: a .heic, a film or a broken link is refused by name.

    Args:
        folder: with the pictures.
        labels: "folders", "none", or the path of a CSV file: columns for the file (filename, file, path, image, id) and
            the label (label, class, category, target), or two columns without a header, separated by commas,
            semicolons or tabs. Files are named relative to the folder, or by what only one of them is called, with or
            without the ending.
        skip_broken: leave out what is refused by name, instead of refusing all.

    Raises:
        FileNotFoundError: if there is no such folder, or CSV file.
        PictureError: names the files that are in the way.
        ValueError: if there is no picture, or the classes are not clear.
    """
    imported("PIL.Image", "find_pictures", "pillow")
    check_bool("skip_broken", skip_broken)
    table = _table_of(labels)
    folder = _checked_folder(folder)
    tree = _walk(folder)
    if tree.refused and not skip_broken:
        refused = [f"{name} cannot be read: {why}." for name, why in _in_order(tree.refused.items())]
        raise PictureError(listed_errors(refused, len(tree.files) + len(refused)))
    if not tree.files:
        raise ValueError(f"{shown_path(folder)} has no pictures: {_contents(tree)}.")

    files = sorted(tree.files, key=lambda file: [natural(_text(part)) for part in file.parts])
    names = tuple("/".join(map(_text, file.parts)) for file in files)
    depth, has_splits, notes = _structure(files)
    is_test = np.array([f.parts[depth - 1].lower() not in _TRAIN for f in files]) if has_splits else None
    if is_test is not None and not is_test.any():  # of which a share may be for testing
        is_test = None
    if labels == "folders" and not has_splits:
        _refuse_splits_within(files, depth)
    by_class: list[str] | None = None
    if table is not None:
        by_class = _classes_of_table(table, folder, names, tree)
    elif labels == "folders":
        by_class = _classes_of_folders(files, depth)
    if labels != "folders" and not has_splits:
        notes = []  # about where the classes are
    numbers: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    if by_class is not None:
        class_names = tuple(sorted(set(by_class), key=natural))
        place = {name: number for number, name in enumerate(class_names)}
        numbers = np.array([place[name] for name in by_class], dtype=np.int32)
        if is_test is not None and (missing := set(numbers[is_test].tolist()) - set(numbers[~is_test].tolist())):
            raise ValueError(
                f"every class must have pictures for training, got {quoted(class_names[i] for i in sorted(missing))} "
                "with some for testing alone."
            )
    elif labels == "folders":
        notes.append("There are no folders of classes, so the pictures have no labels.")
    if empty := _without_pictures(tree, files, depth, class_names):
        notes.append(f"Left out {count(len(empty), 'folder')} without pictures: {quoted(empty)}.")
    if tree.alone:
        kinds = ", ".join(f"{num} {ending}" for ending, num in sorted(tree.alone.items()))
        num = tree.alone.total()
        which = "file that is no picture was" if num == 1 else "files that are no pictures were"
        notes.append(f"{num} {which} left alone: {kinds}.")
    if loops := sorted(tree.loops, key=natural):
        notes.append(f"Not followed: {count(len(loops), 'link')} to a folder around it, {quoted(loops)}.")
    if tree.runs:
        notes.append(f"Not gone into: {count(len(tree.runs), 'run')} of a training, {quoted(tree.runs)}.")
    left_out = tuple(f"{name} cannot be read: {why}." for name, why in _in_order(tree.refused.items()))
    return Found(tuple(f.path for f in files), names, numbers, class_names, is_test, tuple(notes), left_out)


def load_folder(
    folder: str | os.PathLike[str],
    split: Split | tuple[Split, ...] = "all",
    *,
    size: int | tuple[int, int] | None = None,
    fit: Fit = "crop",
    colour: Colour | None = None,
    background: Background = "white",
    labels: str | os.PathLike[str] = "folders",
    test_share: float | None = 0.0,
    skip_broken: bool = False,
    stream: bool | None = None,
    num_images: int | None = None,
    say: Say | None = None,
    progress: bool | None = None,
) -> Any:
    """Makes training data of a folder of pictures.

    The pictures are decoded into memory by as many threads as there are cores, or, streamed, whenever they are drawn.
    Classes, size and channels are those of the whole folder, whichever split is loaded.

    Args:
        folder: with the pictures, as `find_pictures` understands it.
        split: "all"; "train" or "test", by the folder's own folders of these names, or by `test_share`; or
            ("train", "test") for both at once, which looks at every file once.
        size: of all pictures, a side or (height, width); `None` if they have one size already.
        fit: "crop", "resize" or "pad", as in `PictureReader`.
        colour: "rgb" or "grey"; `None` for grey if all files of the folder hold greys, and RGB otherwise. That goes by
            what a file says it holds: grey pixels stored as RGB are RGB.
        background: "white" or "black": behind what is transparent, and around in "pad".
        labels: "folders", "none" or a CSV file, as in `find_pictures`.
        test_share: share of every class for testing, of a folder without splits of its own; `None` for a tenth of such
            a folder. Who belongs to it goes by the names of the files alone.
        skip_broken: leave out what cannot be read, instead of refusing all. A class is dropped if none of its pictures
            in the folder can be read.
        stream: decode the pictures only when they are drawn; `None` for that if they would take more than half of the
            memory that is left. A damaged one is then refused when it is drawn, unless `skip_broken` reads all of them
            once before.
        num_images: use at most so many of the split, chosen by their names.
        say: called with each sentence about what was understood, changed and left out; by default only what is left
            out is said, by a warning.
        progress: `None` shows how far reading is, `False` does not.

    Returns:
        uint8 images [n, h, w, 1 or 3], in natural order of their names; labels and names of the classes; a fingerprint
        of names, labels, the begin of each file and the settings, the same with and without `stream`. For several
        splits a tuple, with `None` for one without pictures.

    Raises:
        FileNotFoundError: if there is no such folder, or CSV file.
        PictureError: names up to ten of the pictures that cannot be read, with the reasons.
        NoSplitError: if there are no pictures in the split.
        ValueError: if an argument is not what its name says, or the pictures have several sizes and `size` is `None`.
        ImportError: if Pillow is not installed.
    """
    check_bool("skip_broken", skip_broken)
    found = find_pictures(folder, labels=labels, skip_broken=skip_broken)
    return gather(
        found,
        shown_path(folder),
        split,
        size=size,
        fit=fit,
        colour=colour,
        background=background,
        test_share=test_share,
        skip_broken=skip_broken,
        stream=stream,
        num_images=num_images,
        say=say,
        progress=progress,
    )


def _checked_folder(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
        raise ValueError(f"folder must be the path of a folder with pictures, got {shown(folder)}.")
    path = Path(os.path.expanduser(folder))
    if path.is_dir():
        return path
    if why := why_no_folder(path):
        raise ValueError(f"folder must be a folder with pictures, got {shown_path(path)}: {why}.")
    raise FileNotFoundError(f"there is no folder {shown_path(path)}: give one with pictures.")


def _walk(folder: Path) -> _Tree:
    tree = _Tree([], [], {}, Counter(), [], [])
    status = os.stat(folder)
    # Not by recursion, which ends at a depth of 1000.
    waiting: list[tuple[str, tuple[str, ...], frozenset[tuple[int, int]]]] = [
        (str(folder), (), frozenset({(status.st_dev, status.st_ino)}))
    ]
    while waiting:
        place, parts, above = waiting.pop()
        try:
            with os.scandir(place) as entries:
                inside = sorted(entry.name for entry in entries)
        except OSError as error:
            if not parts:
                raise ValueError(f"folder {shown_path(folder)} cannot be listed: {error.strerror}.") from error
            tree.refused[_shown(parts)] = f"the folder cannot be listed ({error.strerror})"
            continue
        if set(inside) >= _RUN and parts:
            tree.runs.append(_shown(parts))
            continue
        for name in inside:
            if not name.startswith(".") and name.lower() not in _OF_SYSTEMS:
                _enter(tree, waiting, os.path.join(place, name), (*parts, name), above)
    return tree


def _enter(
    tree: _Tree,
    waiting: list[tuple[str, tuple[str, ...], frozenset[tuple[int, int]]]],
    path: str,
    parts: tuple[str, ...],
    above: frozenset[tuple[int, int]],
) -> None:
    try:
        status = os.stat(path)
    except OSError as error:
        broken = os.path.islink(path)
        tree.refused[_shown(parts)] = "it is a symbolic link to nothing" if broken else str(error.strerror)
        return
    name = parts[-1]
    if stat.S_ISDIR(status.st_mode):
        if name.lower() in _FOLDERS_OF_SYSTEMS:
            return
        this = (status.st_dev, status.st_ino)
        if this in above and status.st_ino:
            tree.loops.append(_shown(parts))
            return
        tree.folders.append(parts)
        waiting.append((path, parts, above | {this}))
    elif (ending := os.path.splitext(name)[1].lower())[1:] in _NO_PICTURES and stat.S_ISREG(status.st_mode):
        tree.alone[ending] += 1
    elif name.lower() in _NAMES_OF_TEXTS and stat.S_ISREG(status.st_mode):
        tree.alone[name] += 1
    elif not stat.S_ISREG(status.st_mode):
        tree.refused[_shown(parts)] = "it is a pipe, a socket or a device"
    elif kind_unread(name) and (kind := kind_unread(name, _beginning(path))):
        tree.refused[_shown(parts)] = f"it is {kind}, which Pillow cannot open"
    elif not os.access(path, os.R_OK):
        tree.refused[_shown(parts)] = "Permission denied"
    else:
        tree.files.append(_File(Path(path), parts))


def _beginning(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError:
        return b""


def _structure(files: list[_File]) -> tuple[int, bool, list[str]]:
    """At which depth the classes are, whether splits are above them, and what to say of that."""
    depth, notes = 0, []
    while True:
        beside = any(len(file.parts) == depth + 1 for file in files)
        tops = sorted({file.parts[depth] for file in files if len(file.parts) > depth + 1})
        kinds = {top.lower() for top in tops}
        if not beside and kinds <= {*_TRAIN, *_TEST} and kinds & {*_TRAIN}:
            for_test = [top for top in tops if top.lower() in _TEST]
            said = f"{quoted(for_test)} for testing" if for_test else "and nothing is for testing"
            for_train = quoted(top for top in tops if top.lower() in _TRAIN)
            notes.append(f"Folders taken as splits: {for_train} for training, {said}.")
            return depth + 1, True, notes
        if beside or len(tops) != 1 or any(len(file.parts) == depth + 2 for file in files):
            return depth, False, notes
        notes.append(f"The folder {quoted(tops)} is around all others, and was gone into.")
        depth += 1


def _refuse_splits_within(files: list[_File], depth: int) -> None:
    """Refuses splits that lie within the classes, which would be mixed."""
    inner = {file.parts[depth + 1].lower() for file in files if len(file.parts) > depth + 2}
    if inner & {*_TRAIN} and inner & {*_TEST}:
        splits = quoted(sorted(inner & {*_TRAIN, *_TEST}))
        raise ValueError(
            f"the folders {splits} lie within those of the classes, and would be taken together: put them above, as in "
            "train/CLASS and test/CLASS, or give labels='none'."
        )


def _classes_of_folders(files: list[_File], depth: int) -> list[str] | None:
    beside = [file for file in files if len(file.parts) == depth + 1]
    if len(beside) == len(files):
        return None
    if beside:
        raise ValueError(
            f"{named(_shown(file.parts) for file in beside)}: {count(len(beside), 'picture')} beside the folders of "
            "the classes, and so of no class. Move them into a folder, or give labels='none' or a CSV file."
        )
    spelt: dict[tuple[tuple[str, ...], str], str] = {}
    for file in files:
        name = file.parts[depth]
        other = spelt.setdefault((file.parts[:depth], _text(name)), name)
        if other != name:
            raise ValueError(
                f"the folders {other!a} and {name!a} have one name, {_text(name)!r}, in two spellings of Unicode: "
                "rename one of them, or put their pictures together."
            )
    return [_text(file.parts[depth]) for file in files]


def _without_pictures(tree: _Tree, files: list[_File], depth: int, class_names: tuple[str, ...]) -> list[str]:
    """The outermost folders without a picture, down to those of the classes."""
    filled = {file.parts[:length] for file in files for length in range(depth + 2)}
    return [
        _shown(parts)
        for parts in sorted(tree.folders)
        if len(parts) <= depth + 1
        and parts not in filled
        and parts[:-1] in filled
        and not (len(parts) == depth + 1 and _text(parts[-1]) in class_names)
    ]


def _table_of(labels: Any) -> Path | None:
    if labels in ("folders", "none"):
        return None
    wanted = "labels must be 'folders', 'none' or the path of a CSV file"
    if not isinstance(labels, str | os.PathLike) or not os.fspath(labels):
        raise ValueError(f"{wanted}, got {shown(labels)}.")
    path = Path(os.path.expanduser(labels))
    if path.is_file():
        return path
    if path.exists():
        raise ValueError(f"{wanted}, got {shown_path(path)}, which is no file.")
    if isinstance(labels, str) and not path.suffix and path.name == labels:
        raise ValueError(f"{wanted}, got {labels!r}.")
    raise FileNotFoundError(f"there is no file {shown_path(path)}: {wanted}.")


def _classes_of_table(table: Path, folder: Path, names: tuple[str, ...], tree: _Tree) -> list[str]:
    """The class of each picture, as a CSV file says."""
    rows, file_column, label_column = _read_table(table)
    find = _finder(names)
    known_apart = {_key(name) for name in tree.refused}
    classes: dict[int, tuple[str, int]] = {}
    missing, unclear, short, twice = [], [], [], []
    for line, row in rows:
        if len(row) <= max(file_column, label_column) or not row[file_column].strip() or not row[label_column].strip():
            short.append(f"line {line}")
            continue
        cell, label = _key(_within(row[file_column], folder)), unicodedata.normalize("NFC", row[label_column].strip())
        found = find(cell)
        if not found and cell not in known_apart:
            missing.append(f"{shown_path(cell)} (line {line})")
        elif len(found) > 1:
            unclear.append(f"{shown_path(cell)} (line {line}: {', '.join(names[i] for i in found[:3])})")
        elif found:
            before = classes.setdefault(found[0], (label, line))
            if before[0] != label:
                twice.append(f"{names[found[0]]} ({before[0]!r} in line {before[1]}, {label!r} in line {line})")
    without = [shown_path(name) for i, name in enumerate(names) if i not in classes]
    for wrong, what in (
        (short, "without a file or a label"),
        (missing, "of a file that is not in the folder"),
        (unclear, "that could mean several pictures"),
        (twice, "with another label than before"),
    ):
        if wrong:
            raise ValueError(
                f"{shown_path(table)} must name pictures and labels, got {_count_rows(wrong)} {what}: {named(wrong)}."
            )
    if without:
        raise ValueError(
            f"{shown_path(table)} must have a row for every picture, got {count(len(without), 'picture')} without "
            f"one: {named(without)}."
        )
    return [classes[i][0] for i in range(len(names))]


def _finder(names: tuple[str, ...]) -> Callable[[str], list[int]]:
    """Finds pictures by their whole names, and else by what only one is called, without folders or ending."""
    whole: dict[str, list[int]] = {}
    parts: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        whole.setdefault(name, []).append(i)
        path = PurePosixPath(name)
        for part in {str(path.with_suffix("")), path.name, path.stem} - {name}:
            parts.setdefault(part, []).append(i)
    return lambda cell: whole.get(cell) or parts.get(cell) or []


def _within(cell: str, folder: Path) -> str:
    """A path relative to the folder, where it is given from the root."""
    inside = os.path.isabs(cell) and Path(cell).is_relative_to(folder.absolute())
    return os.path.relpath(cell, folder.absolute()) if inside else cell


def _key(cell: str) -> str:
    path = unicodedata.normalize("NFC", cell.strip()).replace("\\", "/")
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _read_table(table: Path) -> tuple[list[tuple[int, list[str]]], int, int]:
    """Rows with their numbers of line, and which columns hold files and labels."""
    where = shown_path(table)
    data = table.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{where} must be text in UTF-8, got other bytes: save it as CSV UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"{where} must be text in UTF-8, got zero bytes: save it as CSV UTF-8.")
    lines = io.StringIO(text, newline=None).readlines()  # of old systems too
    first = next((line for line in lines if line.strip()), "").rstrip("\n")
    delimiter = max(",;\t", key=first.count)
    if delimiter not in first:
        raise ValueError(
            f"{where} must have a column of files and one of labels, separated by commas, semicolons or tabs, got "
            f"{shown(first)} as its first line."
        )
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise ValueError(f"{where} cannot be read as CSV: {error} in line {reader.line_num}.") from error
    head = [cell.strip().lower() for cell in rows[0][1]]
    for word in _SPLIT_COLUMNS:
        if word in head and len({row[head.index(word)] for _, row in rows[1:] if len(row) > head.index(word)}) > 1:
            raise ValueError(
                f"{where} has a column {word!r}, which is not heeded: put the pictures into folders train and test, or "
                "take the column out."
            )
    files = next((head.index(word) for word in _FILE_COLUMNS if word in head), None)
    kinds = next((head.index(word) for word in _LABEL_COLUMNS if word in head), None)
    if files is not None and kinds is not None:
        return rows[1:], files, kinds
    if files is not None or kinds is not None or len(head) != 2:
        lacks = "labels, such as label or class" if files is not None else "files, such as filename or path"
        if files is None and kinds is None:
            lacks = "files and one of labels, such as filename and label"
        raise ValueError(f"{where} must have a column of {lacks}, got the columns {quoted(rows[0][1])}.")
    return rows, 0, 1


def _contents(tree: _Tree) -> str:
    inside = [f"{num} {ending} " + ("file" if num == 1 else "files") for ending, num in sorted(tree.alone.items())]
    if tree.folders:
        inside.append(f"{len(tree.folders)} folder{'s' * (len(tree.folders) > 1)}")
    if tree.refused:
        inside.append(
            "what cannot be read: " + named(f"{name} ({why})" for name, why in _in_order(tree.refused.items()))
        )
    return f"in it there are {', '.join(inside)}" if inside else "it is empty"


def _text(name: str) -> str:
    """A name as every system writes it: NFC, and bytes that are no UTF-8 as escapes."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _shown(parts: Iterable[str]) -> str:
    return shown_path("/".join(map(_text, parts)))


def _in_order(pairs: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    return sorted(pairs, key=lambda pair: natural(pair[0]))


def _count_rows(rows: Sequence[str]) -> str:
    return count(len(rows), "row")
