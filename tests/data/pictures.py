"""Over a hundred small picture files, each with what must be read of it: every mode, container and fault in turn."""

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
import pytest

Image, ImageCms, TiffImagePlugin = (
    pytest.importorskip(f"PIL.{name}", reason="needs the extra fm_jax[data]")
    for name in ("Image", "ImageCms", "TiffImagePlugin")
)
WHITE = 255
TIFF_MODES = {mode for mode, _ in TiffImagePlugin.OPEN_INFO.values()}
"""That this version of Pillow opens."""


class Case(NamedTuple):
    """A file, and its right pixels [h, w, 3] on white, or the pattern of the reason for which it is refused."""

    name: str
    data: bytes
    right: np.ndarray | str
    notes: tuple[str, ...] = ()
    grey: bool = False
    within: int = 0


TURNED = "turned as their EXIF says"
LAID = "transparent, laid on white"
FRAMES = "of several frames or pages, of which the first is taken"
SIXTEEN = "brought from 16 bits to 8"
CONVERTED = "converted from another colour profile to sRGB"

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
DEEP[0, :4] = 0, 65535, 255, 32768
BITS = GREY > 127
LEVELS = GREY % 4


def three(grey):
    return np.repeat(np.asarray(grey, dtype=np.uint8)[..., None], 3, axis=-1)


def laid(colours, alpha, ground=WHITE):
    colours, alpha = np.asarray(colours, dtype=np.float64), np.asarray(alpha, dtype=np.float64)[..., None]
    return np.rint((colours * alpha + ground * (255 - alpha)) / 255).astype(np.uint8)


def by_257(deep):
    return np.rint(np.asarray(deep, dtype=np.float64) / 257).astype(np.uint8)


def saved(image, file_format, **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, file_format, **options)
    return file.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def png(pixels, depth, kind, *, before=(), after=()):
    """A PNG byte by byte: `pixels` are its rows, already packed."""
    height, width, rows = pixels
    raw = b"".join(b"\0" + row for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [(b"IHDR", head), *before, (b"IDAT", zlib.compress(raw)), *after, (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def rows_of(array):
    array = np.asarray(array)
    big = array.astype(array.dtype.newbyteorder(">"))
    return array.shape[0], array.shape[1], [row.tobytes() for row in big]


def tiff(size, data, *, bits=(8,), photometric=1, order="<", tags=()):
    """An uncompressed TIFF of one strip, byte by byte; `tags` are (number, type, values) with small values."""
    height, width = size
    entries = {
        256: (4, (width,)),
        257: (4, (height,)),
        258: (3, bits),
        259: (3, (1,)),
        262: (3, (photometric,)),
        277: (3, (len(bits),)),
        278: (4, (height,)),
        279: (4, (len(data),)),
        **{number: (kind, values) for number, kind, values in tags},
    }
    entries[273] = (4, (8,))
    place = 8 + len(data) + len(data) % 2
    far = place + 2 + 12 * len(entries) + 4
    directory, tail = struct.pack(order + "H", len(entries)), b""
    for number, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{ {3: 'H', 4: 'I', 7: 'B'}[kind] }", *values)
        if len(packed) > 4:
            field, tail = struct.pack(order + "I", far + len(tail)), tail + packed
        else:
            field = packed.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", number, kind, len(values)) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, place)
    return head + data + b"\0" * (len(data) % 2) + directory + b"\0\0\0\0" + tail


def twelve(values):
    """Pairs of 12-bit values in 3 bytes, each row on its own."""
    packed = b""
    for row in values:
        bits = "".join(f"{v:012b}" for v in row)
        bits += "0" * (-len(bits) % 8)
        packed += int(bits, 2).to_bytes(len(bits) // 8, "big")
    return packed


def blocks(mode, colours):
    """A 2 x 2 of blocks of 16 x 16 pixels, which a JPEG keeps nearly as they are."""
    small = Image.new(mode, (2, 2))
    small.putdata(colours)
    return small.resize((32, 32), Image.Resampling.NEAREST)


PRIMARIES = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
"""Of sRGB, in XYZ for the white D50."""
D50 = (0.9642, 1.0, 0.8249)


def profile(gamma, *, space=b"RGB "):
    """An ICC profile of a pure power, and of the primaries of sRGB."""

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
    tags = {b"desc": text + b"\0" * (-len(text) % 4), b"wtpt": xyz(D50)}
    if space == b"RGB ":
        tags |= dict(zip((b"rXYZ", b"gXYZ", b"bXYZ"), map(xyz, PRIMARIES), strict=True))
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    else:
        tags[b"kTRC"] = curve
    return packed_profile(tags, space, b"XYZ ")


def packed_profile(tags, space, connection):
    """An ICC profile of these tags."""
    place = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    size = place + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", space, connection)
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + body


def profile_of_inks(corners):
    """An ICC profile of CMYK by a table of its 16 corners, the L*a*b* of none or all of each ink."""
    stored = np.dstack([np.rint(corners[..., 0] * 2.55), corners[..., 1:] + 128]).astype(np.uint8)
    straight = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + (np.eye(3) * 65536).astype(">i4").tobytes()
    lut += 4 * straight + stored.tobytes() + 3 * straight
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"inks\0" + b"\0" * 78
    white = b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in D50)
    return packed_profile({b"desc": text, b"wtpt": white, b"A2B0": lut}, b"CMYK", b"Lab ")


def to_srgb(values, gamma):
    """Of a grey, or of colours with the primaries of sRGB: out of the power, into the curve of sRGB."""
    return encoded((np.asarray(values, dtype=np.float64) / 255) ** gamma)


def of_lab(lab):
    """CIE 1976 L*a*b* for D50, to sRGB."""
    high = (lab[..., 0] + 16) / 116
    roots = np.stack([high + lab[..., 1] / 500, high, high - lab[..., 2] / 200], axis=-1)
    xyz = np.where(roots > 6 / 29, roots**3, 3 * (6 / 29) ** 2 * (roots - 4 / 29)) * D50
    return encoded(np.clip(xyz @ np.linalg.inv(PRIMARIES), 0, 1))


def encoded(light):
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 1e-9) ** (1 / 2.4) - 0.055)
    return np.rint(255 * curved).astype(np.uint8)


def palette_picture(colours, indices):
    image = Image.fromarray(np.asarray(indices, dtype=np.uint8)).convert("P")
    image.putdata(np.asarray(indices).ravel().tolist())
    image.putpalette(np.asarray(colours, dtype=np.uint8).ravel().tolist())
    return image


COLOURS = np.array([[250, 10, 20], [0, 200, 30], [40, 50, 240], [9, 8, 7]], dtype=np.uint8)
GREYS = three(np.array([0, 90, 180, 255]))


def orientations():
    """The same upright picture under each orientation: what is stored is turned the other way."""
    stored = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.swapaxes(0, 1),
        6: np.rot90(RGB),
        7: RGB[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(RGB, -1),
    }
    for number, pixels in stored.items():
        notes = (TURNED,) if number > 1 else ()
        pixels = np.ascontiguousarray(pixels)
        yield Case(f"turned-{number}.png", saved(pixels, "PNG", exif=exif(number)), RGB, notes)
        tags = ((274, 3, (number,)),)
        data = tiff(pixels.shape[:2], pixels.tobytes(), bits=(8, 8, 8), photometric=2, tags=tags)
        yield Case(f"turned-{number}.tif", data, RGB, notes)
    lossless = {"lossless": True, "exact": True}
    yield Case("turned-6.webp", saved(np.rot90(RGB).copy(), "WEBP", exif=exif(6), **lossless), RGB, (TURNED,))
    late = ((b"eXIf", exif(6).removeprefix(b"Exif\0\0")),)
    yield Case("turned-late.png", png(rows_of(np.rot90(RGB).copy()), 8, 2, after=late), RGB, (TURNED,))
    four = blocks("RGB", [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 200)])
    stored_four = four.transpose(Image.Transpose.ROTATE_90)
    data = saved(stored_four, "JPEG", quality=100, subsampling=0, exif=exif(6))
    yield Case("turned-6.jpg", data, np.asarray(four), (TURNED,), within=3)
    wrong = saved(RGB, "PNG", exif=b"Exif\0\0no such thing")
    yield Case("exif-wrong.png", wrong, RGB, ("with EXIF that cannot be read",))


def depths():
    yield Case("16.png", saved(Image.fromarray(DEEP), "PNG"), three(by_257(DEEP)), (SIXTEEN,), grey=True)
    yield Case("16.pgm", b"P5 7 5 65535\n" + DEEP.astype(">u2").tobytes(), three(by_257(DEEP)), (SIXTEEN,), grey=True)
    for order in "<>":
        data = DEEP.astype(f"{order}u2").tobytes()
        name = {"<": "little", ">": "big"}[order]
        right = three(by_257(DEEP))
        yield Case(f"16-{name}.tif", tiff(DEEP.shape, data, bits=(16,), order=order), right, (SIXTEEN,), grey=True)
    data = tiff(DEEP.shape, DEEP.astype("<u2").tobytes(), bits=(16,), photometric=0)
    yield Case("16-white-is-zero.tif", data, three(by_257(65535 - DEEP)), (SIXTEEN,), grey=True)
    for order in "<>":
        image = Image.frombytes({"<": "I;16", ">": "I;16B"}[order], (7, 5), DEEP.astype(f"{order}u2").tobytes())
        data = saved(image, "TIFF", compression="tiff_adobe_deflate", tiffinfo={262: 0 if order == "<" else 1})
        right = three(by_257(65535 - DEEP if order == "<" else DEEP))
        name = "16-white-is-zero" if order == "<" else "16-big"
        yield Case(f"{name}-packed.tif", data, right, (SIXTEEN,), grey=True)
    yield Case("8-white-is-zero.tif", tiff(GREY.shape, GREY.tobytes(), photometric=0), three(255 - GREY), grey=True)
    values = DEEP[:, :6] >> 4
    data = tiff(values.shape, twelve(values), bits=(12,))
    right = three(np.rint(values / 4095 * 255))
    yield Case("12.tif", data, right, ("brought from 12 bits to 8",), grey=True)
    wide = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    yield Case("16-colour.png", png(rows_of(wide), 16, 2), by_257(wide), (SIXTEEN,), within=1)
    data = tiff((5, 7), wide.astype("<u2").tobytes(), bits=(16,) * 3, photometric=2)
    yield Case("16-colour.tif", data, by_257(wide), (SIXTEEN,), within=1)
    data = np.dstack([DEEP, np.full_like(DEEP, 65535)])
    yield Case("16-grey-alpha.png", png(rows_of(data), 16, 4), three(by_257(DEEP)), (SIXTEEN,), grey=True, within=1)
    yield Case("10.pgm", b"P5 2 1 1023\n" + struct.pack(">HH", 1023, 512), three([[255, 128]]), (SIXTEEN,), grey=True)
    yield Case("1.png", saved(Image.fromarray(BITS), "PNG"), three(BITS * 255), grey=True)
    yield Case("1.tif", saved(Image.fromarray(BITS), "TIFF", compression="group4"), three(BITS * 255), grey=True)
    packed = [bytes([sum(int(v) << 2 * (3 - i) for i, v in enumerate(row[:4]))]) for row in LEVELS]
    yield Case("2.png", png((5, 4, packed), 2, 0), three(LEVELS[:, :4] * 85), grey=True)
    key = ((b"tRNS", struct.pack(">H", 2)),)
    right = three(np.where(LEVELS[:, :4] == 2, 255, LEVELS[:, :4] * 85))
    yield Case("2-key.png", png((5, 4, packed), 2, 0, before=key), right, (LAID,), grey=True)


def refused_numbers():
    yield Case("float.tif", saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "floating point .*make_dataset")
    yield Case("integer.tif", saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "signed integers.*make_dataset")
    data = tiff((5, 7), DEEP.tobytes(), bits=(16,), tags=((339, 3, (2,)),))
    yield Case("signed-16.tif", data, "signed integers")
    data = tiff((5, 7), GREY.tobytes(), tags=((339, 3, (2,)),))
    yield Case("signed-8.tif", data, "signed integers")
    data = tiff((5, 7), DEEP.astype("<u4").tobytes(), bits=(32,))
    yield Case("unsigned-32.tif", data, "integers of 32 bits")
    yield Case("float.pfm", b"Pf\n2 1\n-1.0\n" + struct.pack("<ff", 0.5, 2.0), "floating point|no picture")
    cards = ["SIMPLE  =                    T", "BITPIX  =                   16", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    2", "NAXIS2  =                    1", "END"]
    head = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    yield Case("signed.fits", head + struct.pack(">hh", -5, 7).ljust(2880, b"\0"), "of no known range")


def transparent():
    yield Case("rgba.png", saved(np.dstack([RGB, ALPHA]), "PNG"), laid(RGB, ALPHA), (LAID,))
    yield Case("opaque.png", saved(np.dstack([RGB, np.full_like(ALPHA, 255)]), "PNG"), RGB)
    everywhere = ("transparent everywhere, laid on white",)
    yield Case("nothing.png", saved(np.dstack([RGB, 0 * ALPHA]), "PNG"), np.full_like(RGB, 255), everywhere)
    right = laid(three(GREY), ALPHA)
    yield Case("la.png", saved(Image.fromarray(np.dstack([GREY, ALPHA])), "PNG"), right, (LAID,), grey=True)
    indexed = palette_picture(COLOURS, LEVELS)
    yield Case("palette.png", saved(indexed, "PNG"), COLOURS[LEVELS])
    yield Case("palette-grey.png", saved(palette_picture(GREYS, LEVELS), "PNG"), GREYS[LEVELS], grey=True)
    yield Case("palette-grey.gif", saved(palette_picture(GREYS, LEVELS), "GIF"), GREYS[LEVELS], grey=True)
    yield Case("palette-grey.bmp", saved(palette_picture(GREYS, LEVELS), "BMP"), GREYS[LEVELS], grey=True)
    right = laid(COLOURS[LEVELS], np.where(LEVELS == 1, 0, 255))
    yield Case("palette-index.png", saved(indexed, "PNG", transparency=1), right, (LAID,))
    yield Case("palette-index.gif", saved(indexed, "GIF", transparency=1), right, (LAID,))
    alphas = np.array([255, 0, 77, 200])
    right = laid(COLOURS[LEVELS], alphas[LEVELS])
    yield Case("palette-alphas.png", saved(indexed, "PNG", transparency=bytes(alphas.tolist())), right, (LAID,))
    key = GREY[2, 3]
    right = three(np.where(key == GREY, 255, GREY))
    yield Case("grey-key.png", saved(GREY, "PNG", transparency=int(key)), right, (LAID,), grey=True)
    right = np.where((RGB[1, 1] == RGB).all(-1, keepdims=True), 255, RGB).astype(np.uint8)
    yield Case("colour-key.png", saved(RGB, "PNG", transparency=tuple(RGB[1, 1].tolist())), right, (LAID,))
    key = ((b"tRNS", struct.pack(">H", DEEP[2, 2])),)
    right = three(np.where(DEEP[2, 2] == DEEP, 255, by_257(DEEP)))
    yield Case("16-key.png", png(rows_of(DEEP), 16, 0, before=key), right, (LAID, SIXTEEN), grey=True)
    wide = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    key = ((b"tRNS", struct.pack(">HHH", *wide[1, 2])),)
    right = np.where((wide[1, 2] == wide).all(-1, keepdims=True), 255, by_257(wide)).astype(np.uint8)
    yield Case("16-colour-key.png", png(rows_of(wide), 16, 2, before=key), right, (LAID, SIXTEEN), within=1)
    # Premultiplied, as "associated alpha" is: what is stored is laid on white by adding what is missing.
    stored = (RGB.astype(np.int64) * ALPHA[..., None] // 255).astype(np.uint8)
    four = np.dstack([stored, ALPHA])
    data = tiff((5, 7), four.tobytes(), bits=(8,) * 4, photometric=2, tags=((338, 3, (1,)),))
    yield Case("premultiplied.tif", data, stored + (255 - ALPHA[..., None]), (LAID,), within=2)
    grey = (GREY.astype(np.int64) * ALPHA // 255).astype(np.uint8)
    data = tiff((5, 7), np.dstack([grey, ALPHA]).tobytes(), bits=(8, 8), tags=((338, 3, (1,)),))
    if "La" in TIFF_MODES:
        yield Case("premultiplied-grey.tif", data, three(grey + (255 - ALPHA)), (LAID,), grey=True, within=2)
    if "PA" in TIFF_MODES:
        table = (np.resize(COLOURS, (256, 3)).T.astype(int) * 257).ravel().tolist()
        data = np.dstack([LEVELS, ALPHA]).tobytes()
        data = tiff((5, 7), data, bits=(8, 8), photometric=3, tags=((338, 3, (2,)), (320, 3, table)))
        yield Case("palette-alpha.tif", data, laid(COLOURS[LEVELS], ALPHA), (LAID,))
    yield Case("rgba.tga", saved(np.dstack([RGB, ALPHA]), "TGA"), laid(RGB, ALPHA), (LAID,))
    ignored = ("with an alpha of 0 everywhere, which was ignored",)
    yield Case("no-alpha.tga", saved(np.dstack([RGB, 0 * ALPHA]), "TGA"), RGB, ignored)
    options = {"lossless": True, "exact": True}
    yield Case("rgba.webp", saved(np.dstack([RGB, ALPHA]), "WEBP", **options), laid(RGB, ALPHA), (LAID,))
    yield Case("rgba.ico", saved(np.dstack([RGB, ALPHA]), "ICO", sizes=[(7, 5)]), laid(RGB, ALPHA), (LAID,))


def colours():
    inks = [(0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (0, 0, 0, 128)]
    four = blocks("CMYK", inks)
    right = np.asarray(blocks("RGB", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (127, 127, 127)]))
    yield Case("cmyk.jpg", saved(four, "JPEG", quality=100), right, within=4)
    yield Case("cmyk.tif", saved(four, "TIFF"), right)
    lab = np.array([[[60, 30, 20], [40, -20, -5]], [[80, 0, 40], [100, 0, 0]]])
    stored = np.dstack([np.rint(lab[..., 0] * 2.55), lab[..., 1:] % 256]).astype(np.uint8)
    data = tiff((2, 2), stored.tobytes(), bits=(8, 8, 8), photometric=8)
    yield Case("lab.tif", data, of_lab(lab), within=2)
    luma = Image.fromarray(RGB).convert("YCbCr")
    right = np.asarray(luma.convert("RGB"))
    if "YCbCr" in TIFF_MODES:
        yield Case("ycbcr.tif", saved(luma, "TIFF"), right)
    half = tiff((2, 2), b"\x80" * 6, bits=(8, 8, 8), photometric=6, tags=((530, 3, (2, 2)),))
    yield Case("ycbcr-half.tif", half, "its colours are YCbCr, not compressed")
    yield Case("gamma-1.8.png", saved(RGB, "PNG", icc_profile=profile(1.8)), to_srgb(RGB, 1.8), (CONVERTED,), within=2)
    data = saved(GREY, "PNG", icc_profile=profile(1.8, space=b"GRAY"))
    yield Case("grey-1.8.png", data, three(to_srgb(GREY, 1.8)), (CONVERTED,), grey=True, within=2)
    data = saved(GREY, "PNG", icc_profile=profile(1.8))
    yield Case("grey-of-rgb.png", data, three(to_srgb(GREY, 1.8)), (CONVERTED,), grey=True, within=2)
    # Each ink darkens, cyan and magenta to the sides: what the naive conversion knows nothing of.
    inks = np.array(list(np.ndindex(2, 2, 2, 2)))
    corners = np.array([100, 0, 0]) + inks @ np.array([[-20, -10, 0], [-20, 20, 0], [-5, 0, 20], [-55, 0, 0]])
    pairs = np.array([[0, 8, 4], [2, 1, 12]])  # none, each alone, cyan with magenta
    image = Image.frombytes("CMYK", (3, 2), (inks[pairs] * 255).astype(np.uint8).tobytes())
    data = saved(image, "TIFF", icc_profile=profile_of_inks(corners.reshape(16, 1, 3)))
    yield Case("cmyk-profile.tif", data, of_lab(corners[pairs]), (CONVERTED,), within=6)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield Case("srgb.png", saved(RGB, "PNG", icc_profile=srgb), RGB)
    unused = ("with a colour profile that cannot be used",)
    yield Case("profile-wrong.png", saved(RGB, "PNG", icc_profile=b"no profile"), RGB, unused)
    yield Case("profile-grey.png", saved(RGB, "PNG", icc_profile=profile(1.8, space=b"GRAY")), RGB, unused)
    gamma = ((b"gAMA", struct.pack(">I", 100000)),)
    both = ((b"sRGB", b"\0"), *gamma)
    yield Case("gamma-srgb.png", png(rows_of(RGB), 8, 2, before=both), RGB)
    note = ("with a gamma other than that of sRGB, which was not applied",)
    yield Case("gamma-chunk.png", png(rows_of(RGB), 8, 2, before=gamma), RGB, note)


def bilevel():
    """Of 8 black and 8 white pixels, in the formats in which a bit may mean either."""
    right = three(np.repeat([[0, 255]], 8, axis=1))
    yield Case("black.pbm", b"P4 16 1\n\xff\0", right, grey=True)
    yield Case("black.ras", struct.pack(">8I", 0x59A66A95, 16, 1, 1, 2, 1, 0, 0) + b"\xff\0", right, grey=True)
    for photometric, stored in ((0, b"\xff\0"), (1, b"\0\xff")):
        data = tiff((1, 16), stored, bits=(1,), photometric=photometric)
        yield Case(f"black-{photometric}.tif", data, right, grey=True)


def frames():
    two = [palette_picture(COLOURS, LEVELS), palette_picture(COLOURS, 3 - LEVELS)]
    more = {"save_all": True, "append_images": two[1:]}
    yield Case("two.gif", saved(two[0], "GIF", **more), COLOURS[LEVELS], (FRAMES,))
    pair = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    more = {"save_all": True, "append_images": pair[1:]}
    yield Case("two.png", saved(pair[0], "PNG", **more), RGB, (FRAMES,))
    yield Case("two.webp", saved(pair[0], "WEBP", lossless=True, exact=True, **more), RGB, (FRAMES,))
    yield Case("two.tif", saved(pair[0], "TIFF", **more), RGB, (FRAMES,))
    four = blocks("RGB", [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 200)])
    more = {"save_all": True, "append_images": [four.transpose(Image.Transpose.ROTATE_90)]}
    data = saved(four, "MPO", quality=100, subsampling=0, **more)
    yield Case("two.mpo", data, np.asarray(four), (FRAMES,), within=3)
    yield Case("preview.tif", tiff((5, 7), GREY.tobytes(), tags=((254, 4, (1,)),)), "preview")
    yield Case("raw.tif", tiff((5, 7), GREY.tobytes(), tags=((50706, 4, (0x401,)),)), "DNG")


def damaged():
    noise = RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for ending, options in {"jpg": {}, "png": {}, "gif": {}, "tif": {}, "webp": {}, "bmp": {}, "ppm": {}}.items():
        file_format = {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper())
        whole = saved(noise, file_format, **options)
        yield Case(f"truncated.{ending}", whole[: len(whole) * 2 // 3], "cannot be read: it is (truncated|damaged|no)")
    whole = tiff((5, 7), np.dstack([GREY, ALPHA]).tobytes(), bits=(8, 8), tags=((338, 3, (1,)),))
    yield Case("cut-tags.tif", whole[:-45], "it is truncated")  # before the tag that tells what the second channel is
    whole = tiff((5, 7), GREY.tobytes(), tags=((34675, 7, profile(1.8, space=b"GRAY")),))
    yield Case("cut-profile.tif", whole[:-10], "it is truncated")
    packed = saved(noise, "TIFF", compression="tiff_lzw")
    yield Case("truncated-lzw.tif", packed[:-500], "cannot be read")
    progressive = saved(noise, "JPEG", progressive=True)
    yield Case("truncated-progressive.jpg", progressive[: len(progressive) // 2], "it is truncated")
    whole = saved(noise, "PNG")
    yield Case("no-end.png", whole[:-12], "it is truncated|damaged")
    place = len(whole) // 2
    yield Case("bit.png", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], "damaged")
    yield Case("empty.png", b"", "it is empty")
    yield Case("text.jpg", b"<html>404 Not Found</html>", "no picture of a format that Pillow opens")
    yield Case("head.jpg", saved(noise, "JPEG")[:20], "begins like a JPEG")
    yield Case("bomb.png", png((30000, 30000, []), 1, 0), "MAX_IMAGE_PIXELS")
    yield Case("zero.ppm", b"P6 0 4 255\n", "begins like a PPM")
    yield Case("zero.png", png((0, 4, []), 8, 2), "begins like a PNG")
    yield Case("photo.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"a HEIF picture \(\.heic\), which Pillow cannot")
    yield Case("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a vector drawing")
    yield Case("photo.nef", tiff((5, 7), GREY.tobytes()), "a camera's raw file")
    yield Case("film.mp4", b"\0\0\0\x18ftypmp42", "a film")
    yield Case(
        "drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n%%EndComments\n%%EOF\n", "vector drawing"
    )
    bits = b"#define im_width 8\n#define im_height 1\nstatic char im_bits[] = {\n0xff };\n"
    yield Case("black.xbm", bits, "takes black for white")
    yield Case("film.png", b"\x00\x00\x01\xb3\x00\x50\x05" + b"\0" * 60, "it is a film|no picture")


def others():
    yield Case("png.jpg", saved(RGB, "PNG"), RGB)
    yield Case("png.HEIC", saved(RGB, "PNG"), RGB)
    yield Case("no-ending", saved(RGB, "BMP"), RGB)
    four = blocks("L", [10, 90, 170, 250])
    yield Case("grey.jpg", saved(four, "JPEG", quality=100), three(four), grey=True, within=2)
    yield Case("one.png", saved(RGB[:1, :1], "PNG"), RGB[:1, :1])
    large = np.kron(RGB, np.ones((8, 8, 1), dtype=np.uint8))
    yield Case("rgb.jp2", saved(large, "JPEG2000"), large)
    yield Case("rgb.pcx", saved(RGB, "PCX"), RGB)
    four = np.dstack([RGB, ALPHA]).tobytes()
    data = tiff((5, 7), four, bits=(8,) * 4, photometric=2, tags=((338, 3, (0,)),))
    yield Case("rgbx.tif", data, RGB)


def cases():
    """All of them, in the order of their kinds."""
    kinds = (orientations, depths, refused_numbers, transparent, colours, bilevel, frames, damaged, others)
    return [case for kind in kinds for case in kind()]
