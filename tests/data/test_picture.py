import io
import os
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fm_jax.data.picture import PictureError, PictureReader, kind_unread, read_header, shown_path

pytest.importorskip("PIL")
sys.path.insert(0, str(Path(__file__).parent))

import pictures
from PIL import Image, ImageFile

CASES = pictures.cases()
READ = [case for case in CASES if not isinstance(case.right, str)]
REFUSED = [case for case in CASES if isinstance(case.right, str)]


def names(cases):
    return [case.name for case in cases]


@pytest.mark.parametrize("case", READ, ids=names(READ))
def test_read_rightly(case):
    pixels, notes = PictureReader()(case.data, case.name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == case.right.shape
    assert np.abs(pixels.astype(int) - case.right).max() <= case.within
    assert notes == set(case.notes)


@pytest.mark.parametrize("case", REFUSED, ids=names(REFUSED))
def test_refused_by_name_with_the_reason(case):
    with pytest.raises(PictureError, match=case.right) as caught:
        PictureReader()(case.data, case.name)
    assert str(caught.value).startswith(f"{case.name} cannot be read: ")


@pytest.mark.parametrize("case", READ, ids=names(READ))
def test_header_agrees_with_the_picture(case):
    header = read_header(io.BytesIO(case.data), case.name)
    assert header == (case.right.shape[:2], case.grey)


def read(image, **settings):
    data = image if isinstance(image, bytes) else pictures.saved(image, "PNG")
    return PictureReader(**settings)(data, "it.png")


def test_what_is_transparent_is_laid_on_the_background():
    pixels, notes = read(np.dstack([pictures.RGB, pictures.ALPHA]), background="black")
    np.testing.assert_array_equal(pixels, pictures.laid(pictures.RGB, pictures.ALPHA, 0))
    assert notes == {"transparent, laid on black"}


def test_transparent_is_laid_before_it_is_resized():
    """What hides behind alpha 0 must not bleed into what is seen: a green that is not there."""
    hidden = np.zeros((16, 16, 4), dtype=np.uint8)
    hidden[..., 1] = 255
    hidden[:, 8:] = (255, 255, 255, 255)
    assert (read(hidden, size=(8, 8)).pixels == 255).all()


def test_grey_is_by_itu_r_601():
    pixels = read(pictures.RGB, colour="grey").pixels
    assert pixels.shape == (5, 7, 1)
    assert np.abs(pixels[..., 0] - pictures.RGB @ [0.299, 0.587, 0.114]).max() <= 0.51


@pytest.mark.parametrize("case", [case for case in READ if case.grey], ids=[case.name for case in READ if case.grey])
def test_greys_stay_what_they_are_in_one_channel(case):
    np.testing.assert_array_equal(
        PictureReader(colour="grey")(case.data, case.name).pixels, PictureReader()(case.data, case.name).pixels[..., :1]
    )


@pytest.mark.parametrize(("shape", "size"), [((8, 20), (4, 4)), ((20, 8), (4, 4)), ((9, 9), (3, 6)), ((4, 8), (8, 4))])
def test_crop_keeps_the_centre_and_the_proportions(shape, size):
    """Coordinates as colours: where output pixel i comes from is known, whatever antialiases a ramp."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    ramps = np.dstack([10 * y, 10 * x, 0 * x]).astype(np.uint8)
    pixels = read(ramps, size=size).pixels.astype(float)
    scale = min(shape[0] / size[0], shape[1] / size[1])
    for axis in (0, 1):
        centres = (np.arange(size[axis]) + 0.5 - size[axis] / 2) * scale + shape[axis] / 2 - 0.5
        got = pixels[..., axis].mean(axis=1 - axis) / 10
        inner = (centres > 2 * scale) & (centres < shape[axis] - 1 - 2 * scale)  # at the border there is no ramp
        assert np.abs(got - centres)[inner].max(initial=0) < 0.15
        assert np.abs(got + got[::-1] - (shape[axis] - 1)).max() < 0.2


@pytest.mark.parametrize("shape", [(8, 9), (8, 11), (13, 8)])
def test_crop_that_needs_no_scaling_copies(shape):
    noise = pictures.RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    top, left = (shape[0] - 8) // 2, (shape[1] - 8) // 2
    np.testing.assert_array_equal(read(noise, size=(8, 8)).pixels, noise[top : top + 8, left : left + 8])


def test_resize_changes_both_sides():
    halves = np.zeros((4, 32), dtype=np.uint8)
    halves[:, 16:] = 200
    pixels, notes = read(halves, size=(8, 8), fit="resize")
    assert (pixels[:, :3] <= 5).all()
    assert np.abs(pixels[:, 5:].astype(int) - 200).max() <= 12
    assert notes == {"smaller than the size, and enlarged"}
    assert read(halves, size=(4, 8), fit="resize").notes == frozenset()


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize(
    ("shape", "size", "inside"),
    [
        ((10, 20), (8, 8), (slice(2, 6), slice(0, 8))),
        ((20, 10), (8, 8), (slice(0, 8), slice(2, 6))),
        ((6, 6), (3, 6), (slice(0, 3), slice(1, 4))),
    ],
)
def test_pad_puts_the_background_around(shape, size, inside, background):
    pixels = read(np.full(shape, 100, dtype=np.uint8), size=size, fit="pad", background=background).pixels
    right = np.full((*size, 3), 255 if background == "white" else 0)
    right[inside] = 100
    np.testing.assert_array_equal(pixels, right)


@pytest.mark.parametrize("fit", ["crop", "resize", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 2), (5, 7)])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 64)])
def test_any_shape_comes_to_any_size(shape, size, fit):
    pixels = read(np.full(shape, 77, dtype=np.uint8), size=size, fit=fit, colour="grey", background="black").pixels
    assert pixels.shape == (*size, 1)
    assert set(np.unique(pixels)) <= {0, 77}
    assert 77 in pixels


def test_downscaling_is_antialiased():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    assert np.abs(read(stripes, size=(8, 8)).pixels.astype(int) - 128).max() < 20


def smooth(height, width):
    y, x = np.mgrid[:height, :width]
    return np.dstack([200 * y / height + 20, 200 * x / width + 20, 120 + 60 * np.sin(x / width * 6)]).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", ["crop", "resize", "pad"])
def test_large_jpegs_are_drafted_to_the_same(orientation, fit):
    """A JPEG that is decoded at an eighth shows what the same picture as PNG does, not shifted; sides that are odd."""
    whole = smooth(333, 501)
    options = {"exif": pictures.exif(orientation)}
    jpeg = pictures.saved(whole, "JPEG", quality=98, subsampling=0, **options)
    png = pictures.saved(whole, "PNG", **options)
    settings = {"size": (18, 12), "fit": fit, "background": "black"}
    one, other = read(jpeg, **settings).pixels.astype(int), read(png, **settings).pixels
    difference = one - other
    if fit == "pad":  # nothing of the row in between, where the picture ends
        difference = difference[3:-3, 3:-3]
    assert np.abs(difference).max() <= 4
    assert np.abs(difference.mean()) < 0.5


def test_a_large_jpeg_is_decoded_small(monkeypatch):
    drafts = []
    draft = Image.Image.draft
    plugin = pytest.importorskip("PIL.JpegImagePlugin").JpegImageFile
    draft = plugin.draft

    def noted(self, mode, size):
        found = draft(self, mode, size)
        drafts.append(self.size)
        return found

    monkeypatch.setattr(plugin, "draft", noted)
    jpeg = pictures.saved(smooth(400, 640), "JPEG", exif=pictures.exif(6))
    assert read(jpeg, size=(20, 20)).pixels.shape == (20, 20, 3)
    assert drafts == [(80, 50)]  # at least twice the 32 x 20 that is needed


def test_each_time_the_same():
    jpeg = pictures.saved(smooth(400, 640), "JPEG")
    np.testing.assert_array_equal(read(jpeg, size=(20, 20)).pixels, read(jpeg, size=(20, 20)).pixels)


def test_threads_read_the_same_as_one(tmp_path):
    reader = PictureReader(size=(6, 6))
    alone = [reader(case.data, case.name).pixels for case in READ]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            together = pool.map(lambda case: reader(case.data, case.name).pixels, READ)
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_array_equal(one, other)


def test_filling_up_of_damaged_pictures_is_refused(monkeypatch):
    """With the switch of Pillow a truncated picture is grey below, and no error: nobody could tell."""
    truncated = next(case for case in CASES if case.name == "truncated.jpg")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES must be False"):
        PictureReader()(truncated.data, truncated.name)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.98])
@pytest.mark.parametrize("case", READ, ids=names(READ))
def test_truncated_is_refused_or_the_same(case, cut):
    """Whatever is missing was not needed, or it is said that something is missing."""
    whole = PictureReader()(case.data, case.name).pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = PictureReader()(case.data[: int(len(case.data) * cut)], case.name).pixels
        except PictureError:
            return
    np.testing.assert_array_equal(pixels, whole)


@pytest.mark.parametrize("case", READ, ids=names(READ))
def test_any_damage_is_a_picture_error(case):
    rng = np.random.default_rng(len(case.data))
    whole = PictureReader()(case.data, case.name).pixels
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in rng.integers(0, len(case.data), 8):
            data = bytearray(case.data)
            data[place] ^= 1 << rng.integers(8)
            try:
                pixels = PictureReader()(bytes(data), case.name).pixels
            except PictureError:
                continue
            if data[:4] == b"\x89PNG":  # which has a checksum for everything
                np.testing.assert_array_equal(pixels, whole)


@pytest.mark.parametrize(
    "error",
    [
        *(OSError, SyntaxError, ValueError, IndexError, EOFError, MemoryError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError, ZeroDivisionError, NotImplementedError, AssertionError, UnicodeError),
    ],
)
def test_whatever_pillow_raises_is_a_picture_error(monkeypatch, error):
    def fail(self):
        raise error("of its own")

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(PictureError, match=r"^it\.png cannot be read: ") as caught:
        read(pictures.RGB)
    assert isinstance(caught.value.__cause__, error)


def test_many_pixels_are_refused_by_the_limit_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(PictureError, match="MAX_IMAGE_PIXELS"):
        read(pictures.RGB)


def test_paths(tmp_path):
    path = tmp_path / "a%s {b}\n.png"
    path.write_bytes(pictures.saved(pictures.RGB, "PNG"))
    for source in (path, str(path)):
        np.testing.assert_array_equal(PictureReader()(source).pixels, pictures.RGB)
    path.write_bytes(b"")
    with pytest.raises(PictureError) as caught:
        PictureReader()(path)
    assert str(caught.value) == f"{shown_path(tmp_path)}/a%s {{b}}\\n.png cannot be read: it is empty."
    with pytest.raises(PictureError, match=r"^x cannot be read: No such file"):
        PictureReader()(tmp_path / "none.png", "x")
    with pytest.raises(PictureError, match="it is a folder"):
        PictureReader()(tmp_path)
    assert shown_path(os.fsdecode(b"caf\xe9\t.png")) == "caf\\xe9\\t.png"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(PictureError, match="it is a pipe"):
        PictureReader()(tmp_path / "pipe.png")


def test_no_file_stays_open(tmp_path):
    for case in CASES:
        (tmp_path / case.name).write_bytes(case.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        warnings.simplefilter("ignore", UserWarning)
        for case in CASES:
            try:
                PictureReader()(tmp_path / case.name)
            except PictureError:
                assert isinstance(case.right, str)


def test_readers_can_be_sent_to_other_processes():
    reader = PictureReader((3, 4), "pad", "grey", "black")
    assert pickle.loads(pickle.dumps(reader)) == reader


def test_endings_that_a_plugin_registers_are_no_longer_refused(monkeypatch):
    assert kind_unread("a/b.HEIC") == "a HEIF picture (.heic)"
    assert kind_unread("a.b/c.png") is None
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert kind_unread("b.heic") is None
    assert kind_unread("b.mpg") == "a film (.mpg)"


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"size": 3}, r"size must be a pair \(height, width\) or None, got 3"),
        ({"size": (3, 4, 5)}, "size must be a pair"),
        ({"size": (0, 4)}, "the height of size must be at least 1"),
        ({"size": (3, 4.0)}, "the width of size must be an integer"),
        ({"fit": "cover"}, "fit must be one of 'crop', 'resize', 'pad', got 'cover'"),
        ({"colour": None}, "colour must be one of 'rgb', 'grey', got None"),
        ({"background": "red"}, "background must be one of 'white', 'black', got 'red'"),
    ],
)
def test_wrong_settings_are_refused(settings, pattern):
    with pytest.raises(ValueError, match=pattern):
        PictureReader(**settings)


def test_wrong_sources_are_refused():
    with pytest.raises(ValueError, match="source must be a path or bytes, got 3"):
        PictureReader()(3)


def jpeg(**options):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}], ids=str)
def test_a_jpeg_filled_up_with_zeros_is_truncated(options):
    """As a download that was broken off; the decoder may take the zeros for pixels."""
    data = jpeg(**options)
    assert PictureReader()(data, "a.jpg").pixels.shape == (64, 64, 3)
    assert PictureReader()(data + bytes(500), "a.jpg").pixels.shape == (64, 64, 3)  # behind the end
    cut = data[: len(data) * 2 // 3]
    with pytest.raises(PictureError, match=r"a\.jpg cannot be read: it is truncated"):
        PictureReader()(cut + bytes(len(data) - len(cut)), "a.jpg")


@pytest.mark.parametrize("most", [1, 255, 4095])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_of_which_few_are_used_have_no_known_range(kind, most):
    """As of a camera or a microscope with 12 bits: nearly black."""

    def stored(top):
        file = io.BytesIO()
        Image.fromarray(np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)).save(file, kind)
        return file.getvalue()

    with pytest.raises(PictureError, match=f"its pixels reach to {most} only, so that its range is not known"):
        PictureReader(colour="grey")(stored(most), "a")
    assert PictureReader(colour="grey")(stored(4096), "a").pixels.max() == 16
    assert PictureReader(colour="grey")(stored(0), "a").pixels.max() == 0
