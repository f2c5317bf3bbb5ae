import os
import socket
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest

from fm_jax.data.arrays import NoSplitError, check_dataset
from fm_jax.data.folder import find_pictures, load_folder
from fm_jax.data.picture import PictureError

pytest.importorskip("PIL")
sys.path.insert(0, str(Path(__file__).parent))

import pictures

CASES = pictures.cases()
GREY = np.arange(30, dtype=np.uint8).reshape(5, 6)
COLOUR = np.dstack([GREY, GREY + 50, GREY + 100])
PNG = pictures.saved(GREY, "PNG")
COLOURED = pictures.saved(COLOUR, "PNG")
NEEDS_LINKS = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")


def of_value(value, size=(5, 6)):
    return pictures.saved(np.full(size, value, dtype=np.uint8), "PNG")


def write(folder, *names, data=PNG, **files):
    for name in names:
        files[name] = data
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def loaded(folder, *args, **options):
    return load_folder(folder, *args, progress=False, **options)


# What lies in a folder.


def test_every_case_is_read_or_listed(tmp_path):
    """All files of the table in one folder: what is right is right there too, what is not is named, once."""
    for case in CASES:
        write(tmp_path, **{case.name: case.data})
    with pytest.raises(PictureError, match=r"skip_broken=True"):
        loaded(tmp_path, size=(5, 7))
    said = []
    dataset = loaded(tmp_path, size=(5, 7), skip_broken=True, say=said.append)
    refused = [case.name for case in CASES if isinstance(case.right, str)]
    listed = next(text for text in said if text.startswith("Left out")).splitlines()
    assert listed[0] == f"Left out {len(refused)} files:"
    assert sorted(line.split(" cannot be read: ")[0] for line in listed[1:]) == sorted(refused)
    found = find_pictures(tmp_path, skip_broken=True)
    rights = {case.name: case for case in CASES if not isinstance(case.right, str)}
    names = [name for name in found.names if name in rights]
    assert len(dataset.images) == len(names) == len(rights)
    for name, image in zip(names, dataset.images, strict=True):
        case = rights[name]
        if case.right.shape == (5, 7, 3):
            assert np.abs(image.astype(int) - case.right).max() <= case.within, name
    turned = sum(pictures.TURNED in case.notes for case in rights.values())
    assert f"{turned} pictures turned as their EXIF says." in said
    sixteen = sum(pictures.SIXTEEN in case.notes for case in rights.values())
    assert f"{sixteen} pictures brought from 16 bits to 8." in said


def test_natural_order_of_classes_and_files(tmp_path):
    write(tmp_path, "c10/x.png", "c2/b10.png", "c2/b9.png", "c2/deep/er/a.png", "C1/x")
    found = find_pictures(tmp_path)
    assert found.class_names == ("C1", "c2", "c10")
    assert found.names == ("C1/x", "c2/b9.png", "c2/b10.png", "c2/deep/er/a.png", "c10/x.png")
    assert found.labels.tolist() == [0, 1, 1, 1, 2]
    assert found.labels.dtype == np.int32
    assert [str(path.relative_to(tmp_path).as_posix()) for path in found.paths] == list(found.names)
    assert found.is_test is None
    assert found.left_out == ()


def test_files_of_systems_are_ignored_and_others_counted(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png")
    silent = (
        ".DS_Store",
        "._1.png",
        "Thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "Icon\r",
        ".git/x",
        ".thumbnails/x.png",
    )
    silent += ("__MACOSX/a/1.png", "@eaDir/1.png", "$RECYCLE.BIN/1.png", "System Volume Information/x")
    for name in silent:
        write(tmp_path, name, f"a/{name}", data=b"?")
    assert find_pictures(tmp_path).notes == ()
    write(tmp_path, "readme.TXT", "a/1.txt", "a/1.json", "b/1.xmp", data=b"?")
    found = find_pictures(tmp_path)
    assert found.names == ("a/1.png", "b/1.png")
    assert found.notes == ("4 files that are no pictures were left alone: 1 .json, 2 .txt, 1 .xmp.",)


def test_flat_folder_has_no_labels(tmp_path):
    write(tmp_path, "2.png", "10.png", "1.png")
    found = find_pictures(tmp_path)
    assert (found.names, found.labels, found.class_names) == (("1.png", "2.png", "10.png"), None, ())
    dataset = loaded(tmp_path)
    assert dataset.labels is None
    assert dataset.class_names == ()


def test_pictures_beside_classes_are_refused_by_name(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png", "lost.png")
    with pytest.raises(ValueError, match=r"^lost\.png: 1 picture beside the folders"):
        find_pictures(tmp_path)
    assert find_pictures(tmp_path, labels="none").names == ("a/1.png", "b/1.png", "lost.png")


def test_splits(tmp_path):
    write(tmp_path, "Train/a/1.png", "Train/b/1.png", "test/a/2.png", "val/b/x/3.png")
    found = find_pictures(tmp_path)
    assert found.names == ("Train/a/1.png", "Train/b/1.png", "test/a/2.png", "val/b/x/3.png")
    assert found.is_test.tolist() == [False, False, True, True]
    assert found.labels.tolist() == [0, 1, 0, 1]
    assert found.notes == ("Folders taken as splits: 'Train' for training, 'test', 'val' for testing.",)
    assert [len(loaded(tmp_path, split).images) for split in ("train", "test", "all")] == [2, 2, 4]
    with pytest.raises(ValueError, match="test_share must be 0"):
        loaded(tmp_path, test_share=0.1)
    write(tmp_path, "test/c/1.png")
    with pytest.raises(ValueError, match=r"every class must have pictures for training, got 'c'"):
        find_pictures(tmp_path)


def test_splits_without_classes_or_labels(tmp_path):
    write(tmp_path, "train/1.png", "test/1.png")
    for labels in ("folders", "none"):
        found = find_pictures(tmp_path, labels=labels)
        assert found.labels is None
        assert found.is_test.tolist() == [True, False]  # test/1.png, train/1.png


def test_a_class_that_is_called_test_is_a_class(tmp_path):
    write(tmp_path, "train/1.png", "test/1.png", "plane/1.png")
    assert find_pictures(tmp_path).class_names == ("plane", "test", "train")


def test_only_a_train_folder_has_nothing_for_testing(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/1.png")
    assert find_pictures(tmp_path).class_names == ("a", "b")
    with pytest.raises(NoSplitError, match="test_share is 0"):
        loaded(tmp_path, "test")
    write(tmp_path, *(f"train/{name}/{i}.png" for name in "ab" for i in range(2, 6)))
    assert len(loaded(tmp_path, "test", test_share=0.2).images) == 2


def test_splits_within_the_classes_are_refused(tmp_path):
    write(tmp_path, *(f"{name}/{split}/good/{i}.png" for name in "ab" for split in ("train", "test") for i in "12"))
    with pytest.raises(ValueError, match="the folders 'test', 'train' lie within those of the classes"):
        find_pictures(tmp_path)
    assert find_pictures(tmp_path, labels="none").labels is None


def test_runs_below_the_folder_are_no_classes(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png", "runs/x/samples.png", "runs/x/checkpoints/4/nothing")
    (tmp_path / "runs" / "x" / "config.json").write_text("{}")
    found = find_pictures(tmp_path)
    assert found.class_names == ("a", "b")
    assert any("Not gone into: 1 run of a training, 'runs/x'" in note for note in found.notes)


def test_texts_without_an_ending_and_unfinished_downloads_are_left_alone(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png", "README", "a/LICENSE", "a/2.png.part", "b/c.png.bak", "lost+found/x.png")
    assert find_pictures(tmp_path).names == ("a/1.png", "b/1.png")


def test_a_table_with_splits_is_not_taken_without_them(tmp_path):
    write(tmp_path, "1.png", "2.png")
    table = tmp_path / "t.csv"
    table.write_text("file,label,split\n1.png,a,train\n2.png,b,test\n")
    with pytest.raises(ValueError, match="has a column 'split', which is not heeded"):
        find_pictures(tmp_path, labels=table)
    table.write_text(f"file,label\n{(tmp_path / '1.png').absolute()},a\n{(tmp_path / '2.png').absolute()},b\n")
    assert find_pictures(tmp_path, labels=table).class_names == ("a", "b")


def test_wrapper_is_gone_into(tmp_path):
    write(tmp_path, "data/set/train/a/1.png", "data/set/test/a/1.png", "notes.txt")
    found = find_pictures(tmp_path)
    assert found.class_names == ("a",)
    assert found.is_test.tolist() == [True, False]
    assert found.notes[:2] == (
        "The folder 'data' is around all others, and was gone into.",
        "The folder 'set' is around all others, and was gone into.",
    )


def test_one_class_is_no_wrapper(tmp_path):
    write(tmp_path, "cats/1.png", "cats/old/2.png")
    assert find_pictures(tmp_path).class_names == ("cats",)


def test_folders_without_pictures_are_said(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png", "c/readme.txt")
    (tmp_path / "d" / "e").mkdir(parents=True)
    found = find_pictures(tmp_path)
    assert found.class_names == ("a", "b")
    assert found.notes[0] == "Left out 2 folders without pictures: 'c', 'd'."


def test_nothing_there_is_refused_and_what_is_there_said(tmp_path):
    with pytest.raises(ValueError, match="has no pictures: it is empty"):
        find_pictures(tmp_path)
    write(tmp_path, "a/x.txt", "y.csv")
    with pytest.raises(ValueError, match=r"in it there are 1 \.csv file, 1 \.txt file, 1 folder"):
        find_pictures(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        find_pictures(tmp_path / "y.csv")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_pictures(tmp_path / "nowhere")
    for wrong in (None, 3, b"x", ""):
        with pytest.raises(ValueError, match="folder must be"):
            find_pictures(wrong)


def test_what_is_no_picture_for_pillow_is_refused_by_name(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png", "b/3.heic")  # the last has a wrong name, and is a PNG
    write(tmp_path, "a/2.HEIC", "b/film.mov", data=b"\0\0\0\x18ftyp")
    with pytest.raises(PictureError) as caught:
        find_pictures(tmp_path)
    assert str(caught.value).splitlines() == [
        "a/2.HEIC cannot be read: it is a HEIF picture (.heic), which Pillow cannot open.",
        "b/film.mov cannot be read: it is a film (.mov), which Pillow cannot open.",
        "2 of 5 files cannot be read: mend or remove them, or leave them out by skip_broken=True.",
    ]
    found = find_pictures(tmp_path, skip_broken=True)
    assert found.names == ("a/1.png", "b/1.png", "b/3.heic")
    assert found.left_out == tuple(str(caught.value).splitlines()[:2])


@NEEDS_LINKS
def test_pipes_sockets_and_links(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")
    os.symlink("nothing.png", tmp_path / "a" / "broken.png")
    os.symlink("self.png", tmp_path / "a" / "self.png")
    os.symlink("1.png", tmp_path / "a" / "same.png")
    os.symlink("..", tmp_path / "a" / "up")
    os.symlink("../b", tmp_path / "a" / "aside")
    os.symlink("../a", tmp_path / "b" / "back")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path / "b")  # names of sockets are short
        try:
            server.bind("s.png")
        finally:
            os.chdir(here)
        found = find_pictures(tmp_path, skip_broken=True)
    assert sorted(found.names) == [
        *("a/1.png", "a/aside/1.png", "a/same.png"),
        *("b/1.png", "b/back/1.png", "b/back/same.png"),
    ]
    reasons = dict(text.split(" cannot be read: ") for text in found.left_out if "/back/" not in text)
    assert reasons == {
        "a/broken.png": "it is a symbolic link to nothing.",
        "a/self.png": "it is a symbolic link to nothing.",
        "a/pipe.png": "it is a pipe, a socket or a device.",
        "a/aside/s.png": "it is a pipe, a socket or a device.",
        "b/s.png": "it is a pipe, a socket or a device.",
    }
    assert any(note.startswith("Not followed: 4 links to a folder around it, 'a/aside/back'") for note in found.notes)


def test_unreadable_files_and_folders(tmp_path, monkeypatch):
    """As another user sees them: nothing is closed to root."""
    write(tmp_path, "a/1.png", "a/2.png", "b/1.png", "b/closed/1.png")
    access, scandir = os.access, os.scandir

    def listed(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "access", lambda path, mode: not os.fspath(path).endswith("2.png") and access(path, mode))
    monkeypatch.setattr(os, "scandir", listed)
    found = find_pictures(tmp_path, skip_broken=True)
    assert found.names == ("a/1.png", "b/1.png")
    assert found.left_out == (
        "a/2.png cannot be read: Permission denied.",
        "b/closed cannot be read: the folder cannot be listed (Permission denied).",
    )
    with pytest.raises(PictureError, match=r"^a/2\.png cannot be read: Permission denied\.\nb/closed"):
        find_pictures(tmp_path)


@NEEDS_LINKS
def test_odd_names(tmp_path):
    write(tmp_path, "50% {x}/new\nline.png", "50% {x}/%s %d.png", "a b/ .png", "-rf/--.png")
    raw = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(raw)
    with open(raw + b"/\xff.png", "wb") as file:
        file.write(PNG)
    found = find_pictures(tmp_path)
    assert set(found.class_names) == {"50% {x}", "a b", "-rf", "caf\\xe9"}
    assert {"50% {x}/new\nline.png", "caf\\xe9/\\xff.png"} < set(found.names)
    assert len(loaded(tmp_path).images) == 5
    (tmp_path / "50% {x}" / "new\nline.png").write_bytes(b"")
    with open(raw + b"/\xff.png", "wb") as file:
        file.write(PNG[:40])
    with pytest.raises(PictureError) as caught:
        loaded(tmp_path)
    text = str(caught.value)
    assert "50% {x}/new\\nline.png cannot be read: it is empty.\n" in text
    assert "caf\\xe9/\\xff.png cannot be read: " in text
    text.encode()  # can be printed


def test_two_spellings_of_a_class_are_refused(tmp_path):
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    write(tmp_path, *(f"{name}/1.png" for name in names), "b/1.png")
    if len(os.listdir(tmp_path)) < 3:
        pytest.skip("the file system takes both for one")
    with pytest.raises(ValueError, match="two spellings of Unicode"):
        find_pictures(tmp_path)


def test_class_is_the_same_in_another_spelling_of_its_split(tmp_path):
    write(tmp_path, "train/café/1.png", "test/" + unicodedata.normalize("NFD", "café") + "/1.png")
    assert find_pictures(tmp_path).class_names == ("café",)


def test_deep_folders(tmp_path):
    write(tmp_path, "b/1.png", "a/2.png")
    here, depth = os.getcwd(), 0
    os.chdir(tmp_path / "a")
    try:
        while depth < 1010:  # beyond what Python recurses
            os.mkdir("d")
            os.chdir("d")
            depth += 1
        Path("1.png").write_bytes(PNG)
        found = find_pictures(tmp_path)
        assert found.class_names == ("a", "b")
        assert sorted(map(len, found.names)) == [7, 7, 2 * 1010 + 7]
        assert len(loaded(tmp_path).images) == 3
        Path("1.png").unlink()
    finally:
        for _ in range(depth):  # pytest would recurse to remove them
            os.chdir("..")
            os.rmdir("d")
        os.chdir(here)


# Labels of a CSV file.

TABLES = {
    "comma": "filename,label\na/1.png,dog\na/2.png,cat\nb/3.png,dog\n",
    "semicolon": "label;file\ndog;a/1.png\ncat;a/2.png\ndog;b/3.png\n",
    "tab": "id\tother\tclass\n1\tx\tdog\n2\ty\tcat\n3\tz\tdog\n",
    "no header": "a/1.png,dog\na\\2.png,cat\n./b/3.png,dog",
    "mark and lines": "\ufeffpath,target\r\n\r\na/1.png, dog \r\n2.png,cat\r\n3.png,dog\r\n3,dog\r\n",
    "old lines": "a/1.png,dog\ra/2.png,cat\rb/3.png,dog\r",
    "no line": "of\u2028what\x0b;label;file\nx;dog;a/1.png\nx;cat;a/2.png\nx;dog;b/3.png\n",
    "quoted": 'image,category\n"a/1.png","dog"\na/2,"cat"\n"b/3",dog\n',
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_labels_of_a_table(tmp_path, text):
    write(tmp_path, "a/1.png", "a/2.png", "b/3.png", **{"labels.csv": text})
    found = find_pictures(tmp_path, labels=tmp_path / "labels.csv")
    assert found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [1, 0, 1]
    assert find_pictures(tmp_path, labels=str(tmp_path / "labels.csv")).labels.tolist() == [1, 0, 1]


def test_labels_of_a_table_are_in_natural_order(tmp_path):
    write(tmp_path, "a.png", "b.png", "c.png", **{"l.csv": "a,10\nb,9\nc,-1\n"})
    assert find_pictures(tmp_path, labels=tmp_path / "l.csv").class_names[1:] == ("9", "10")


WRONG_TABLES = {
    "missing": (
        "a/1.png,x\na/2.png,x\nb/2.png,x\nno.png,x\nneither.png,y\n",
        r"got 2 rows of a file .*no\.png \(line 4\)",
    ),
    "no row": ("file,label\na/1.png,x\n", r"got 2 pictures without one: a/2\.png, b/2\.png"),
    "twice": ("a/1.png,x\na/1.png,y\n", r"another label than before: a/1\.png \('x' in line 1, 'y' in line 2\)"),
    "unclear": ("1,x\n2,y\n", r"could mean several pictures: 2 \(line 2: a/2\.png, b/2\.png\)"),
    "empty label": ("a/1.png,x\na/2.png,\nb/2.png\n", r"got 2 rows without a file or a label: line 2, line 3"),
    "no label column": ("file,size\na/1.png,3\n", r"a column of labels, such as label.*got the columns 'file', 'size'"),
    "no file column": ("what,label\na/1.png,3\n", r"a column of files, such as"),
    "three unknown": ("a/1.png,3,4\n", r"a column of files and one of labels"),
    "one column": ("a/1.png\n", "separated by commas"),
    "empty": ("", "separated by commas"),
    "bytes": (b"\xff\xfea\x00,\x00", "UTF-8"),
    "zeros": (b"a,b\0\n", "UTF-8"),
    "huge": (b"a," + b"b" * 200_000, "field larger"),
}


@pytest.mark.parametrize(("text", "pattern"), WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_wrong_tables_are_refused(tmp_path, text, pattern):
    write(tmp_path, "a/1.png", "a/2.png", "b/2.png", **{"labels.csv": text})
    with pytest.raises(ValueError, match=pattern) as caught:
        find_pictures(tmp_path, labels=tmp_path / "labels.csv")
    assert str(caught.value).startswith(str(tmp_path / "labels.csv"))


def test_wrong_labels_are_refused(tmp_path):
    write(tmp_path, "a.png")
    for wrong in (None, 3, "folder", tmp_path, ""):
        with pytest.raises(ValueError, match="labels must be 'folders', 'none' or the path of a CSV"):
            find_pictures(tmp_path, labels=wrong)
    for missing in ("no.csv", tmp_path / "no"):
        with pytest.raises(FileNotFoundError, match="labels must be"):
            find_pictures(tmp_path, labels=missing)


# Loading.


def test_images_labels_and_classes(tmp_path):
    for i in (10, 2, 1):
        write(tmp_path, f"{'ab'[i % 2]}/{i}.png", data=of_value(i))
    dataset = check_dataset(loaded(tmp_path))
    assert dataset.images.shape == (3, 5, 6, 1)
    assert dataset.images[:, 0, 0, 0].tolist() == [2, 10, 1]
    assert dataset.labels.tolist() == [0, 0, 1]
    assert dataset.class_names == ("a", "b")


def test_channels_are_those_of_the_whole_folder(tmp_path):
    write(tmp_path, "train/a/1.png", "test/a/1.png")
    assert loaded(tmp_path, "train").images.shape[-1] == 1
    write(tmp_path, "test/a/2.png", data=COLOURED)
    for stream in (False, True):
        images = loaded(tmp_path, "train", stream=stream).images[:]
        np.testing.assert_array_equal(images[0], np.repeat(GREY[..., None], 3, -1))
    assert loaded(tmp_path, colour="grey").images.shape == (3, 5, 6, 1)
    assert loaded(tmp_path, "train", colour="rgb").images.shape[-1] == 3


def test_several_sizes_need_a_size(tmp_path):
    write(tmp_path, "1.png", "2.png")
    write(tmp_path, "3.png", data=of_value(3, (64, 48)))
    for stream in (False, True):
        with pytest.raises(ValueError, match=r"the 3 pictures have 2 sizes, from 5 x 6 to 64 x 48 .*give size"):
            loaded(tmp_path, stream=stream)
        assert loaded(tmp_path, size=8, stream=stream).images.shape == (3, 8, 8, 1)
        assert loaded(tmp_path, size=(4, 2), fit="pad", stream=stream).images.shape == (3, 4, 2, 1)


def test_streamed_and_in_memory_are_the_same(tmp_path):
    for i in range(7):
        write(tmp_path, f"{'ab'[i % 2]}/{i}.png", data=of_value(i * 30, (5 + i, 9)))
    for options in ({}, {"split": "train", "test_share": 0.3}, {"split": "test", "test_share": 0.3}, {"num_images": 3}):
        held, streamed = (loaded(tmp_path, size=4, stream=stream, **options) for stream in (False, True))
        np.testing.assert_array_equal(held.images, streamed.images[:])
        np.testing.assert_array_equal(held.labels, streamed.labels)
        assert held.fingerprint == streamed.fingerprint
        assert held.class_names == streamed.class_names == ("a", "b")


def test_fingerprint_tells_data_and_settings_apart(tmp_path):
    write(tmp_path, "a/1.png", "b/1.png", data=of_value(1))
    seen = [loaded(tmp_path, size=4).fingerprint]
    assert loaded(tmp_path, size=(4, 4)).fingerprint == seen[0]
    for options in ({"size": 5}, {"fit": "pad"}, {"colour": "rgb"}, {"background": "black"}, {"labels": "none"}):
        seen.append(loaded(tmp_path, **{"size": 4, **options}).fingerprint)
    for text in ("a/1,x\nb/1,y\n", "a/1,y\nb/1,x\n"):
        write(tmp_path, **{"labels.csv": text})
        seen.append(loaded(tmp_path, size=4, labels=tmp_path / "labels.csv").fingerprint)
    write(tmp_path, "a/1.png", data=of_value(2))
    seen.append(loaded(tmp_path, size=4).fingerprint)
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "2.png")
    seen.append(loaded(tmp_path, size=4).fingerprint)
    (tmp_path / "a").rename(tmp_path / "c")
    seen.append(loaded(tmp_path, size=4).fingerprint)
    assert len(set(seen)) == len(seen)


def test_test_share_is_stratified_disjoint_and_stays(tmp_path):
    value = 0
    for name, num in zip("abcdefg", (20, 10, 5, 5, 5, 5, 1), strict=True):
        for i in range(num):
            write(tmp_path, f"{name}/{i}.png", data=of_value(value))
            value += 1
    train, test, both = (loaded(tmp_path, split, test_share=0.2) for split in ("train", "test", "all"))
    assert np.bincount(test.labels, minlength=7).tolist() == [4, 2, 1, 1, 1, 1, 0]
    assert train.class_names == test.class_names == tuple("abcdefg")

    def values(dataset):
        return dataset.images[:, 0, 0, 0].tolist()

    assert sorted(values(train) + values(test)) == sorted(values(both))
    write(tmp_path, "a/new.png", data=of_value(255))
    assert len(set(values(test)) ^ set(values(loaded(tmp_path, "test", test_share=0.2)))) <= 2
    with pytest.raises(NoSplitError, match="test_share is 0"):
        loaded(tmp_path, "test")


def test_num_images(tmp_path):
    for i in range(6):
        write(tmp_path, f"{i}.png", data=of_value(i))
    values = loaded(tmp_path, num_images=3).images[:, 0, 0, 0].tolist()
    assert len(values) == 3
    assert values == sorted(values)
    assert set(values) < set(loaded(tmp_path, num_images=4).images[:, 0, 0, 0].tolist())
    assert len(loaded(tmp_path, num_images=7).images) == 6


def test_broken_pictures_are_named_together(tmp_path):
    write(tmp_path, *(f"a/{i}.png" for i in range(3)))
    write(tmp_path, *(f"b/{i}.png" for i in range(12)), data=PNG[:-20])
    write(tmp_path, "b/12.png", data=b"")
    with pytest.raises(PictureError) as caught:
        loaded(tmp_path)
    lines = str(caught.value).splitlines()
    assert [line.split(" cannot be read: ")[0] for line in lines[:10]] == [f"b/{i}.png" for i in range(10)]
    assert lines[10] == "... and 3 more"
    assert lines[11].startswith("13 of 16 files cannot be read: ")
    assert lines[11].endswith("skip_broken=True.")


@pytest.mark.parametrize("stream", [False, True])
def test_skip_broken_leaves_out_and_says_so(tmp_path, stream):
    write(tmp_path, "a/1.png", "b/1.png", "b/2.png")
    write(tmp_path, "a/2.png", "c/1.png", data=PNG[:-20])
    write(tmp_path, "a/3.png", data=pictures.saved(np.zeros((40, 40, 3), np.uint8), "PNG")[:-20])  # must not decide
    said = []
    dataset = loaded(tmp_path, skip_broken=True, stream=stream, say=said.append)
    assert dataset.images.shape == (3, 5, 6, 1)
    assert dataset.labels.tolist() == [0, 1, 1]
    assert dataset.class_names == ("a", "b")
    left_out, dropped = said
    assert left_out.splitlines()[0] == "Left out 3 files:"
    assert [line.partition(" ")[0] for line in left_out.splitlines()[1:]] == ["a/2.png", "a/3.png", "c/1.png"]
    assert dropped == "Dropped 1 class of which nothing can be read: 'c'."
    with pytest.warns(UserWarning, match="Left out 3 files"):
        loaded(tmp_path, skip_broken=True, stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_classes_are_the_same_in_both_splits_though_some_are_broken(tmp_path, stream):
    write(tmp_path, "train/a/1.png", "train/d/1.png", "test/b/1.png", "test/d/1.png")
    write(tmp_path, "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/c/1.png", data=b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, test = (loaded(tmp_path, split, skip_broken=True, stream=stream) for split in ("train", "test"))
    assert train.class_names == test.class_names == ("a", "b", "d")
    assert train.labels.tolist() == [0, 2]
    assert test.labels.tolist() == [1, 2]


def test_nothing_left_is_refused(tmp_path):
    write(tmp_path, "1.png", "2.png", data=b"")
    with pytest.raises(PictureError, match=r"2 of 2 files cannot be read, and nothing is left"):
        loaded(tmp_path, skip_broken=True)
    write(tmp_path, "1.png", "2.png", data=PNG[:-20])
    with pytest.raises(PictureError, match=r"2 of 2 files cannot be read, and nothing is left"):
        loaded(tmp_path, skip_broken=True)


def test_streaming_names_a_damaged_picture_when_it_is_drawn(tmp_path):
    write(tmp_path, "1.png", "2.png")
    write(tmp_path, "2.png", data=PNG[:-20])
    images = loaded(tmp_path, stream=True).images
    assert images[np.array([0])].shape == (1, 5, 6, 1)
    with pytest.raises(PictureError, match=r"^2\.png cannot be read: it is truncated"):
        images[np.array([0, 1])]
    write(tmp_path, "1.png", data=of_value(1, (6, 5)))
    with pytest.raises(PictureError, match=r"^1\.png cannot be read: it is 6 x 5, its header says 5 x 6"):
        images[0]
    (tmp_path / "1.png").unlink()
    with pytest.raises(PictureError, match=r"^1\.png cannot be read: No such file"):
        images[0]


def test_nothing_is_printed_or_warned_of_unless_something_is_left_out(tmp_path, capsys):
    write(tmp_path, "a/1.png", "b/1.png", "b/x.txt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_folder(tmp_path)
    assert capsys.readouterr() == ("", "")
    said = []
    loaded(tmp_path, size=20, say=said.append)
    assert said == [
        "1 file that is no picture was left alone: 1 .txt.",
        "2 pictures smaller than the size, and enlarged.",
    ]


def test_too_large_for_memory_says_stream(tmp_path, monkeypatch):
    write(tmp_path, "1.png")

    def refuse(*args, **keywords):
        raise MemoryError

    monkeypatch.setattr("fm_jax.data.folder.np.empty", refuse)
    with pytest.raises(ValueError, match="stream=True"):
        loaded(tmp_path)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"split": "val"}, "split must be one of 'train', 'test', 'all'"),
        ({"size": 0}, "size must be at least 1"),
        ({"size": True}, "size must be an integer"),
        ({"size": (3,)}, "size must be a pair"),
        ({"size": (3, 0)}, "the width of size must be at least 1"),
        ({"fit": "stretch"}, "fit must be one of 'crop', 'resize', 'pad'"),
        ({"colour": "color"}, "colour must be one of 'rgb', 'grey'"),
        ({"background": "pink"}, "background must be one of"),
        ({"test_share": 1.0}, r"test_share must be in \[0, 1\)"),
        ({"skip_broken": 1}, "skip_broken must be True or False"),
        ({"stream": "yes"}, "stream must be True or False"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"say": "x"}, "say must be a function"),
        ({"progress": 1}, "progress must be True or False"),
        ({"labels": "folder"}, "labels must be"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, options, pattern):
    write(tmp_path, "1.png")
    with pytest.raises(ValueError, match=pattern):
        load_folder(tmp_path, **options)
