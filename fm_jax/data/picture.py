"""One picture file, of whatever mode, depth and container, as uint8 pixels; or why it cannot be read."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from fm_jax.checks import check_integer, check_member, imported, shown

if TYPE_CHECKING:
    from PIL.Image import Image

Fit = Literal["crop", "resize", "pad"]
Colour = Literal["rgb", "grey"]
Background = Literal["white", "black"]

_ORIENTATION = 0x0112
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""What undoes each EXIF orientation."""
_SIXTEEN_BITS = ("PNG", "PPM", "TIFF", "JPEG2000")
"""Formats whose 16-bit greys are unsigned and reach from 0 to 65535."""
_BEGINNINGS = {
    "JPEG": b"\xff\xd8\xff",
    "PNG": b"\x89PNG",
    "GIF": b"GIF8",
    "WebP": b"RIFF....WEBP",
    "TIFF": b"II\\*\0|MM\0\\*|II\\+\0|MM\0\\+",
    "PPM": rb"P[1-6]\s",
}
_TAG_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of one value of each type of a TIFF."""
_OF_FRAMES = ("GIF", "PNG", "WEBP", "TIFF", "MPO", "AVIF", "FLI", "DCX", "IM")
_NO_PIXELS = {
    "EPS": "it is a vector drawing (EPS)",
    "WMF": "it is a vector drawing (WMF or EMF)",
    "MPEG": "it is a film (MPEG)",
    "BUFR": "it holds measurements (BUFR), no picture",
    "GRIB": "it holds measurements (GRIB), no picture",
    "HDF5": "it holds arrays (HDF5), no picture",
    "XBM": "it is a bitmap of X11 (XBM), in which Pillow takes black for white",
}
"""Formats that Pillow recognises, and cannot decode itself, or not rightly."""
_MAYBE_ALPHA = ("BMP", "DIB", "TGA")
"""Formats whose fourth byte is often left at 0, and then no alpha."""
_KINDS = {
    "a HEIF picture": "heic heif hif heics heifs",
    "a JPEG XL picture": "jxl",
    "a JPEG XR picture": "jxr wdp hdp",
    "a picture of high dynamic range": "exr hdr",
    "a drawing program's file": "xcf kra clip afphoto afdesign cdr sketch fig psb ai indd",
    "a vector drawing": "svg svgz",
    "a document": "pdf djvu doc docx ppt pptx odt odp xls xlsx",
    "a camera's raw file": "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 "
    "srf srw x3f",
    "a film": "mp4 m4v mov avi mkv webm wmv flv mpg mpeg mts m2ts 3gp ogv",
    "a medical or scientific volume": "dcm nii mha mhd nrrd czi lif nd2",
}
_KIND_OF = {ending: kind for kind, endings in _KINDS.items() for ending in endings.split()}


class PictureError(ValueError):
    """A picture that cannot be read, or not rightly; the message begins with its name, and then says why."""


class Picture(NamedTuple):
    """A picture as `PictureReader` reads it.

    `pixels` [h, w, c] are uint8. `notes` say what was done to it that may surprise, in phrases that follow on "3
    pictures", such as "turned as their EXIF says".
    """

    pixels: np.ndarray
    notes: frozenset[str]


class PictureHeader(NamedTuple):
    """What a file says of its picture before the pixels: (height, width) once it is upright, and whether it is grey."""

    size: tuple[int, int]
    grey: bool


@dataclass(frozen=True)
class PictureReader:
    """Reads picture files: upright, of 8 bits, in sRGB or grey, on a background, of one size.

    `reader(source, name)` reads a path or the bytes of a file and returns a `Picture`, or raises a `PictureError`.

    * Upright, as the EXIF or XMP orientation of any container says.
    * 8 bits: 16-bit greys v become `round(v / 257)` (of 12 bits `round(v / 4095 * 255)`), whatever their byte order and
      whether white is 0; of 16-bit colours Pillow keeps the upper byte. Signed and 32-bit integers and floating point
      numbers have no known range and are refused.
    * sRGB: a picture with another embedded profile is converted; CMYK without one naively, LAB and YCbCr by definition.
    * Grey from colours is `0.299 R + 0.587 G + 0.114 B` (ITU-R 601) of sRGB.
    * What is transparent is laid on the background, before anything is resized.
    * Of an animation, or several pages, the first is taken.
    * A damaged picture is refused as far as its format shows it: a truncated file, a wrong checksum of a PNG. JPEG has
      no checksums: changed bytes within it may go unnoticed.

    It is safe to call in several threads: nothing global is changed, and no file stays open.

    Args:
        size: (height, width) of what comes out; `None` leaves each picture as large as it is.
        fit: how that is reached: "crop" scales until the picture covers the size and keeps the centre, "resize" changes
            both sides and with it the proportions, "pad" scales until it fits and fills up with the background.
        colour: "rgb" for 3 channels, "grey" for 1.
        background: behind what is transparent, and around in "pad": "white" or "black".

    Raises:
        ValueError: if a setting is none of these.

    Example:
        >>> reader = PictureReader(size=(2, 2), colour="grey")
        >>> reader(b"P2 2 2 255 0 255 128 7", name="four.pgm").pixels[..., 0].tolist()
        [[0, 255], [128, 7]]
        >>> reader(b"no picture", name="a.png")
        Traceback (most recent call last):
        fm_jax.data.picture.PictureError: a.png cannot be read: it is no picture of a format that Pillow opens.
    """

    size: tuple[int, int] | None = None
    fit: Fit = "crop"
    colour: Colour = "rgb"
    background: Background = "white"

    def __post_init__(self) -> None:
        if self.size is not None:
            if not isinstance(self.size, tuple) or len(self.size) != 2:
                raise ValueError(f"size must be a pair (height, width) or None, got {shown(self.size)}.")
            for name, side in zip(("the height of size", "the width of size"), self.size, strict=True):
                check_integer(name, side)
            object.__setattr__(self, "size", (int(self.size[0]), int(self.size[1])))
        check_member("fit", self.fit, get_args(Fit))
        check_member("colour", self.colour, get_args(Colour))
        check_member("background", self.background, get_args(Background))

    def __call__(self, source: str | os.PathLike[str] | bytes, name: str | None = None) -> Picture:
        """Reads one picture.

        Args:
            source: the path of a file, or what is in it.
            name: of the picture, for the messages; by default the path.

        Raises:
            PictureError: if it cannot be read; begins with the name and says why.
            ValueError: if `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set, with which nobody could tell.
            ImportError: if Pillow is not installed.
        """
        _check_pillow()
        if not isinstance(source, str | os.PathLike | bytes):
            raise ValueError(f"source must be a path or bytes, got {shown(source)}.")
        if name is None:
            name = "the picture" if isinstance(source, bytes) else shown_path(source)
        with _named(name):
            if isinstance(source, bytes):
                return self._read(source, name)
            with open_picture(source, name) as file:
                return self._read(file.read(), name)

    def _read(self, data: bytes, name: str) -> Picture:
        from PIL import Image

        notes: set[str] = set()
        with _opened(io.BytesIO(data), name) as im:
            if im.format == "PNG":  # Pillow checks the sums of the pixels only here
                with Image.open(io.BytesIO(data)) as other:
                    other.verify()
            if im.format in ("JPEG", "MPO") and not _has_end(data):
                raise _Refusal("it is truncated: its end is missing")
            if _of_frames(im, data):
                notes.add("of several frames or pages, of which the first is taken")
            before = 1 if im.format == "PNG" else _orientation(im, notes)  # a PNG may tell after its pixels
            packing, bits, (width, height) = _packing(im), _bits(im), im.size
            region = (float(width), float(height))
            drafted = self._draft(im, before)
            if drafted is not None:
                region = drafted
            im.load()
            if 0 in im.size:
                raise _Refusal(f"it has no pixels: its size is {im.width} x {im.height}")
            if drafted is None:  # an icon may turn out larger than its header says, a TIFF is turned by Pillow
                width, height = im.size
                region = (float(width), float(height))
            after = _orientation(im, notes)
            if before in _TURNS or after in _TURNS:
                notes.add("turned as their EXIF says")
            if bits not in (1, 2, 4, 8):
                notes.add(f"brought from {bits} bits to 8")
            told = "icc_profile" in im.info or "srgb" in im.info
            if not told and im.info.get("gamma") and not 0.4 < im.info["gamma"] < 0.5:
                notes.add("with a gamma other than that of sRGB, which was not applied")
            colours, alpha = _split(im, packing, bits)
            if alpha is not None and im.format in _MAYBE_ALPHA and not alpha.getextrema()[1]:
                alpha = None
                notes.add("with an alpha of 0 everywhere, which was ignored")
            colours = _to_srgb(colours, im.info.get("icc_profile"), notes)
        colours = self._lay(colours, alpha, notes)
        colours = colours.convert("L" if self.colour == "grey" else "RGB")
        if after in _TURNS:
            colours = colours.transpose(Image.Transpose[_TURNS[after]])
        if after >= 5:
            width, height = height, width
        if self.size is not None:
            colours = self._fitted(colours, _turned(region, after, colours.size), (width, height), notes)
        pixels = np.array(colours, dtype=np.uint8)
        return Picture(pixels.reshape(*pixels.shape[:2], -1), frozenset(notes))

    def _draft(self, im: Image, orientation: int) -> tuple[float, float] | None:
        """Lets a large JPEG be decoded at a half, a quarter or an eighth; (width, height) of the picture in that."""
        if self.size is None or im.format not in ("JPEG", "MPO"):
            return None
        width, height = self.size[1], self.size[0]
        if orientation >= 5:
            width, height = height, width
        if self.fit != "resize":
            scale = _scale(self.fit, im.size, (width, height))
            width, height = math.ceil(im.width / scale), math.ceil(im.height / scale)
        drafted = im.draft(im.mode, (2 * width, 2 * height))
        return None if drafted is None else (drafted[1][2], drafted[1][3])

    def _lay(self, colours: Image, alpha: Image | None, notes: set[str]) -> Image:
        if alpha is None:
            return colours
        least, most = alpha.getextrema()
        if least == 255:
            return colours
        from PIL import Image

        # Often a file whose program left the alpha at 0, which then shows nothing at all.
        notes.add(f"transparent{' everywhere' * (most == 0)}, laid on {self.background}")
        ground = Image.new(colours.mode, colours.size, self.background)
        ground.paste(colours, mask=alpha)
        return ground

    def _fitted(
        self, im: Image, region: tuple[float, float, float, float], whole: tuple[int, int], notes: set[str]
    ) -> Image:
        from PIL import Image

        assert self.size is not None
        height, width = self.size
        left, top, right, bottom = region
        inner = (right - left, bottom - top)
        if self.fit == "resize":
            if whole[0] < width or whole[1] < height:
                notes.add("smaller than the size, and enlarged")
            return im.resize((width, height), Image.Resampling.BICUBIC, region)
        if _scale(self.fit, whole, (width, height)) < 1:
            notes.add("smaller than the size, and enlarged")
        scale = _scale(self.fit, inner, (width, height))
        if self.fit == "crop":
            x, y = (inner[0] - width * scale) / 2, (inner[1] - height * scale) / 2
            if scale == 1:  # else a half pixel to the side would blur what needs no scaling
                x, y = math.floor(x), math.floor(y)
            left, top = left + max(x, 0.0), top + max(y, 0.0)
            box = (left, top, min(left + width * scale, right), min(top + height * scale, bottom))
            return im.resize((width, height), Image.Resampling.BICUBIC, box)
        new = (_clipped(inner[0] / scale, width), _clipped(inner[1] / scale, height))
        ground = Image.new(im.mode, (width, height), self.background)
        ground.paste(im.resize(new, Image.Resampling.BICUBIC, region), ((width - new[0]) // 2, (height - new[1]) // 2))
        return ground


def read_header(file: io.BufferedIOBase, name: str) -> PictureHeader:
    """Size and kind of the picture in an open file, without decoding it.

    Args:
        file: at its begin.
        name: for the messages.

    Raises:
        PictureError: if it is no picture, or of a kind that is refused; damage shows only when it is decoded.
    """
    _check_pillow()
    with _named(name), _opened(file, name) as im:
        if im.format == "PNG" and _tells_late(file):
            im.load()
        width, height = im.size
        if im.format == "TIFF":  # some versions of Pillow give the size upright, some do not
            width, height = int(im.tag_v2[256]), int(im.tag_v2[257])  # type: ignore[attr-defined]
        if _orientation(im, set()) >= 5:
            width, height = height, width
        grey = im.mode in ("1", "L", "LA", "La", "I") or im.mode.startswith("I;16")
        grey = grey or _packing(im).startswith("LA;") or (im.mode in ("P", "PA") and _is_grey_palette(im.palette))
        return PictureHeader((height, width), grey)


@contextlib.contextmanager
def open_picture(path: str | os.PathLike[str], name: str) -> Iterator[io.BufferedIOBase]:
    """Opens a file that is a regular one; others, which might never end, are not touched.

    Args:
        path: of the file.
        name: for the messages.

    Raises:
        PictureError: if it is none, or cannot be opened.
    """
    with _named(name):
        mode = os.stat(path).st_mode  # before it is opened: a pipe would wait for a writer
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise _Refusal(f"it is {kind}, not a file")
        file = open(path, "rb")  # noqa: SIM115, its errors are told apart from those of the with
    with file:
        yield file


def kind_unread(name: str, begin: bytes = b"") -> str | None:
    """What a file is, by its ending, that Pillow cannot open: "a film"; `None` for all others.

    A plugin that registers an ending with Pillow, as those for HEIF do, makes it one that can be opened. So does what
    it begins with, such as a JPEG that is called .heic; many raw files begin like a TIFF, which is a small preview.
    """
    from PIL import Image

    ending = PurePath(name).suffix.lower()
    kind = _KIND_OF.get(ending[1:])
    if kind is None or (kind != "a film" and ending in Image.registered_extensions()):
        return None
    return f"{kind} ({ending})" if _begins_like(begin) in (None, "TIFF") else None


def _begins_like(begin: bytes) -> str | None:
    return next((known for known, pattern in _BEGINNINGS.items() if re.match(pattern, begin, re.DOTALL)), None)


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path as text on one line: bytes that are no UTF-8 and control characters are written as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Refusal(Exception):
    """Why a picture is not read; `_named` puts the name in front."""


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except PictureError:
        raise
    except Exception as error:  # damaged files end in any of about twenty classes
        raise PictureError(f"{name} cannot be read: {_why(error)}.") from error


def _why(error: Exception) -> str:
    from PIL import Image

    if isinstance(error, _Refusal):
        return str(error)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it has more pixels than PIL.Image.MAX_IMAGE_PIXELS allows ({error})"
    if isinstance(error, MemoryError):
        return "it does not fit into memory"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.strerror} ({type(error).__name__})"
    said = " ".join(str(error).split()).rstrip(".")[:200]
    said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if isinstance(error, EOFError) or "truncated" in said.lower():
        return f"it is truncated ({said})"
    return f"it is damaged, or of a kind that Pillow cannot decode ({said})"


def _check_pillow() -> None:
    files = imported("PIL.ImageFile", "reading pictures", "pillow")
    if files.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES must be False, got True: with it Pillow fills up what is missing of a "
            "damaged picture, and nobody is told. Some code in this process has set it; set it back."
        )


@contextlib.contextmanager
def _opened(file: io.BufferedIOBase, name: str) -> Iterator[Any]:
    """A picture before its pixels are decoded, if it is of a kind that can be read rightly."""
    from PIL import Image, UnidentifiedImageError

    begin = file.read(12)
    if not begin:
        raise _Refusal("it is empty")
    if kind := kind_unread(name, begin):
        raise _Refusal(f"it is {kind}, which Pillow cannot open")
    file.seek(0)
    try:
        opened = Image.open(file)  # type: ignore[arg-type]
    except UnidentifiedImageError:
        if like := _begins_like(begin):
            raise _Refusal(f"it begins like a {like}, and is damaged or truncated") from None
        raise _Refusal("it is no picture of a format that Pillow opens") from None
    with opened as im:
        if im.format in _NO_PIXELS:
            raise _Refusal(f"{_NO_PIXELS[im.format]}; convert it to PNG")
        if 0 in im.size:
            raise _Refusal(f"it has no pixels: its size is {im.width} x {im.height}")
        _refuse_numbers(im)
        if im.format == "TIFF":
            _refuse_tiff(im)
            if _is_cut_tiff(file):
                raise _Refusal("it is truncated (its tags reach beyond its end)")
        yield im


def _refuse_numbers(im: Any) -> None:
    mode = im.mode
    signed = im.format == "TIFF" and any(sample == 2 for sample in im.tag_v2.get(339, (1,)))
    if mode == "F":
        numbers = "floating point numbers"
    elif signed:
        numbers = "signed integers"
    elif mode == "I" and im.format not in ("PNG", "PPM"):
        numbers = "integers of 32 bits"
    elif mode.startswith("I;") and im.format not in _SIXTEEN_BITS:
        numbers = "integers of 16 bits, perhaps signed"
    else:
        return
    raise _Refusal(
        f"its pixels are {numbers}, of no known range; fm_jax.data.arrays.make_dataset takes such numbers, with a "
        "value_range"
    )


def _refuse_tiff(im: Any) -> None:
    tags = im.tag_v2
    if 50706 in tags:
        raise _Refusal("it is a camera's raw file (DNG), of which Pillow would read the preview; convert it to PNG")
    if tags.get(254, 0) & 1:
        raise _Refusal("its first page is a preview of another one; convert it to PNG")
    plain = tags.get(262) == 6 and tags.get(259, 1) == 1 and im.mode != "L"
    # Older versions of Pillow open them as RGB, with bytes that are not there.
    if plain and (im.mode != "YCbCr" or tags.get(530, (2, 2)) != (1, 1)):
        raise _Refusal("its colours are YCbCr, not compressed, which Pillow may read wrongly; convert it to PNG")


def _is_cut_tiff(file: io.BufferedIOBase) -> bool:
    """Whether tags of the first page lie beyond the end of the file; Pillow would do without them, and misread it."""
    place = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    big = int.from_bytes(head[2:4], order) == 43
    width, start = (8, 8) if big else (4, 4)
    file.seek(int.from_bytes(head[start : start + width], order))
    num = int.from_bytes(file.read(8 if big else 2), order)
    entries = file.read(num * (4 + 2 * width))
    cut = len(entries) < num * (4 + 2 * width)
    for first in range(0, len(entries), 4 + 2 * width):
        kind, count, value = (
            int.from_bytes(entries[first + a : first + b], order)
            for a, b in ((2, 4), (4, 4 + width), (4 + width, 4 + 2 * width))
        )
        size = count * _TAG_SIZES.get(kind, 0)
        cut = cut or (size > width and value + size > end)
    file.seek(place)
    return cut


def _packing(im: Any) -> str:
    """How the file holds its pixels, as Pillow writes it: "RGB;16B"."""
    if not im.tile:
        return ""
    args = im.tile[0][3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _bits(im: Any) -> int:
    if im.format == "TIFF":
        return int(max(im.tag_v2.get(258, (1,))))
    if im.format == "PPM" and im.tile and isinstance(im.tile[0][3], tuple) and len(im.tile[0][3]) == 2:
        most = im.tile[0][3][1]
        return 16 if isinstance(most, int) and most > 255 else 8
    return 16 if im.mode == "I" or ";16" in im.mode or ";16" in _packing(im) else 8


def _has_end(data: bytes) -> bool:
    """Whether a JPEG's pixels are followed by the mark of its end; what is missing may have been filled up by zeros."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        if data[place + 1] == 0xDA:  # the pixels begin, in which an FF is never followed by D9
            return data.find(b"\xff\xd9", place) >= 0
        place += 1 if data[place + 1] == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return True  # of another build, which the decoder judges


def _of_frames(im: Any, data: bytes) -> bool:
    if im.format not in _OF_FRAMES:
        return False
    from PIL import Image

    try:
        if im.format != "GIF":
            return bool(getattr(im, "is_animated", False))
        with Image.open(io.BytesIO(data)) as other:  # it reads on to the second frame, and would not always come back
            return bool(getattr(other, "is_animated", False))
    except Exception:  # damage behind the first frame, which alone is wanted
        return True


def _orientation(im: Any, notes: set[str]) -> int:
    from PIL import Image

    try:
        value = Image.Image.getexif(im).get(_ORIENTATION, 1)  # that of PNG would decode the picture
    except Exception:
        value = None
    if not isinstance(value, int) or not 0 <= value <= 8:
        notes.add("with EXIF that cannot be read")
        return 1
    return max(value, 1)  # 0: unknown


def _tells_late(file: io.BufferedIOBase) -> bool:
    """Whether a PNG has text or EXIF behind its pixels."""
    place, late, kind = file.tell(), False, b""
    file.seek(8)
    pixels = False
    while not late and len(head := file.read(8)) == 8 and kind != b"IEND":
        kind = head[4:]
        pixels = pixels or kind == b"IDAT"
        late = pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)
    return late


def _is_grey_palette(palette: Any) -> bool:
    if palette is None:
        return False
    packing = palette.rawmode or palette.mode
    values = np.frombuffer(bytes(palette.palette), dtype=np.uint8)
    if packing == "RGB;L":  # all reds, all greens, all blues
        channels = values.reshape(3, -1)
    elif packing in ("RGB", "BGR", "RGBA", "RGBX", "BGRA", "BGRX"):
        channels = values[: len(values) // len(packing) * len(packing)].reshape(-1, len(packing)).T
    else:
        return False
    return bool((channels[0] == channels[1]).all() and (channels[1] == channels[2]).all())


def _split(im: Any, packing: str, bits: int) -> tuple[Image, Image | None]:
    """The colours of a loaded picture, in the mode L, RGB or CMYK and of 8 bits, and its alpha."""
    from PIL import Image

    key = im.info.get("transparency")
    if im.mode.startswith("I"):
        values = np.asarray(im).astype(np.int64)
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        most = 4095 if bits == 12 else 65535
        if values.size and not 0 <= values.min() <= values.max() <= most:
            raise _Refusal(f"its pixels reach from {values.min()} to {values.max()}, beyond {most}")
        dark = most == 65535 and im.format != "PPM" and values.size and 0 < values.max() <= 4095
        if dark and not (im.format == "TIFF" and im.tag_v2.get(262, 0) == 0):
            raise _Refusal(
                f"it has 16 bits, and its pixels reach to {values.max()} only, so that its range is not known; "
                "fm_jax.data.arrays.make_dataset takes such numbers, with a value_range"
            )
        if im.format == "TIFF" and im.tag_v2.get(262, 0) == 0:  # white is 0, which Pillow minds for 8 bits alone
            values = most - values
        return Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8)), alpha
    if im.mode in ("P", "PA", "RGBa", "La"):
        im = im.convert("LA" if im.mode == "La" else "RGBA")
    if im.mode in ("LA", "RGBA"):
        *bands, alpha = im.split()
        return (bands[0] if im.mode == "LA" else Image.merge("RGB", bands)), alpha
    if im.mode in ("1", "L") and isinstance(key, int):
        key *= {"L;2": 85, "L;4": 17}.get(packing, 1)  # Pillow scales the pixels, not the key
        grey = im.convert("L")
        return grey, Image.fromarray(np.where(np.asarray(grey) == key, 0, 255).astype(np.uint8))
    if im.mode == "RGB" and isinstance(key, tuple) and len(key) == 3:
        key = [value >> 8 for value in key] if bits == 16 else list(key)
        return _plain(im), Image.fromarray(np.where((np.asarray(im) == key).all(axis=-1), 0, 255).astype(np.uint8))
    if im.mode == "LAB":
        return _from_lab(im), None
    return (im.convert("L") if im.mode == "1" else im if im.mode in ("L", "RGB", "CMYK") else im.convert("RGB")), None


def _plain(im: Any) -> Image:
    """Without the key of what is transparent, which `convert` would make use of."""
    im = im.copy()
    im.info.pop("transparency", None)
    return im


def _from_lab(im: Image) -> Image:
    from PIL import ImageCms

    exact: Any = 0x0100  # without it lcms interpolates in a grid, and dark colours are off by several levels
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, exact)
    return _applied(im, transform)


def _applied(im: Image, transform: Any) -> Image:
    from PIL import ImageCms

    converted = ImageCms.applyTransform(im, transform)
    assert converted is not None  # that is for what it does in place
    return converted


def _to_srgb(im: Image, profile: Any, notes: set[str]) -> Image:
    if not profile:
        return im
    conversion = _conversion(bytes(profile), im.mode)
    if conversion == "none":
        notes.add("with a colour profile that cannot be used")
    elif callable(conversion):
        notes.add("converted from another colour profile to sRGB")
        return conversion(im)
    return im


@functools.lru_cache(maxsize=32)
def _conversion(profile: bytes, mode: str) -> Callable[[Image], Image] | Literal["same", "none"]:
    """From the colours of an ICC profile to sRGB; "same" if that changes less than can be seen, "none" if it cannot."""
    from PIL import Image, ImageCms

    try:
        read = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        space = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(read.profile.xcolor_space.strip(), "")
        if space != mode and not (space == "RGB" and mode == "L"):
            return "none"
        transform = ImageCms.buildTransform(read, srgb, space, "RGB")
        if mode == "L":
            ramp = Image.frombytes("L", (256, 1), bytes(range(256)))
            table = _applied(ramp.convert(space), transform).convert("L").tobytes()
            same = max(abs(new - old) for old, new in enumerate(table)) <= 2
            return "same" if same else lambda im: im.point(table)
        if mode == "RGB":
            levels = np.linspace(0, 255, 9).round().astype(np.uint8)
            grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(81, 9, 3)
            changed = np.asarray(_applied(Image.fromarray(grid), transform), dtype=np.int64)
            if np.abs(changed - grid).max() <= 2:
                return "same"
        return lambda im: _applied(im, transform)
    except Exception:  # not a profile, one without what lcms needs, a Pillow without lcms
        return "none"


def _scale(fit: str, size: tuple[float, float], wanted: tuple[int, int]) -> float:
    """How many pixels of a picture (width, height) make one of what is wanted."""
    ratios = size[0] / wanted[0], size[1] / wanted[1]
    return min(ratios) if fit == "crop" else max(ratios)


def _clipped(side: float, most: int) -> int:
    return max(1, min(most, round(side)))


def _turned(region: tuple[float, float], orientation: int, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Where the picture lies in one that was turned: a draft ends within its last column and row."""
    width, height = region if orientation < 5 else region[::-1]
    left = size[0] - width if orientation in (2, 3, 6, 7) else 0.0
    top = size[1] - height if orientation in (3, 4, 7, 8) else 0.0
    return left, top, left + width, top + height
