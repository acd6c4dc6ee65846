"""Encoded pictures, whole and damaged, and files that are not pictures."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import pillow_heif
from helpers import films
from PIL import Image

from llava_cli.images.decode import decode

Pixel = tuple[int, int, int]
TAKE_IT = "--allow-truncated takes what is there"
LIMIT = "the limit is 50 megapixels"


def noise(width: int = 40, height: int = 30) -> Image.Image:
    """A picture that does not compress and has no two equal rows."""
    state, data = 1, bytearray()
    for _ in range(width * height * 3):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        data.append(state >> 16 & 255)
    return Image.frombytes("RGB", (width, height), bytes(data))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    if kind == "HEIF":
        pillow_heif.from_pillow(image).save(file, **options)
    else:
        image.save(file, kind, **options)
    return file.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks, with valid checksums."""
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int, depth: int = 8, color: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)


def idat(*rows: bytes) -> tuple[bytes, bytes]:
    return b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))


END = (b"IEND", b"")


def frames(kind: str) -> bytes:
    first, *others = (Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue"))
    return encoded(first, kind, save_all=True, append_images=others, duration=100)


def pixels(image: Image.Image) -> list[list[Pixel]]:
    assert image.mode == "RGB"
    flat = list(image.get_flattened_data())
    return [flat[y * image.width : (y + 1) * image.width] for y in range(image.height)]


def opened(data: bytes, **options: bool) -> Image.Image:
    return decode(data, "x", **options).image


def first_frame(name: str) -> str:
    """The command, as a hint has it, that converts the first frame to PNG."""
    return f"magick {name}'[0]' {name}.png"


CUT = encoded(noise(), "JPEG")[:-300]
PROGRESSIVE_CUT = encoded(noise(), "JPEG", progressive=True)[:-4]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD_BYTES = {
    "empty.jpg": (b"", "empty file", ""),
    "page.jpg": (
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "a web page, not an image",
        "less page.jpg shows what came in its place",
    ),
    "blank.png": (b" \n" * 400, "not an image", ""),
    "text.bmp": (b"BMW 320d, 2011, one owner", "not an image", ""),
    "cut.jpg": (CUT, "truncated", TAKE_IT),
    "cut.progressive.jpg": (PROGRESSIVE_CUT, "truncated", TAKE_IT),
    "cut.png": (encoded(noise(), "PNG")[:1000], "truncated", TAKE_IT),
    "cut.gif": (encoded(noise(), "GIF")[:1500], "truncated", TAKE_IT),
    "cut.bmp": (encoded(noise(), "BMP")[:-1], "truncated", TAKE_IT),
    "cut.webp": (encoded(noise(), "WEBP")[:-1], "truncated or damaged", ""),
    "header.jpg": (encoded(noise(), "JPEG")[:200], "truncated or damaged", ""),
    "header.png": (encoded(noise(), "PNG")[:20], "truncated or damaged", ""),
    "few.png": (png(header(3, 2), idat(bytes(4)), END), "truncated", TAKE_IT),
    "nodata.png": (png(header(3, 2), END), "damaged", ""),
    "garbage.png": (png(header(3, 2), (b"IDAT", b"garbage" * 9), END), "damaged", ""),
    "nocolors.png": (png(header(3, 1, color=3), idat(b"\0\1\2"), END), "its palette is missing", ""),
    "zerocolors.png": (png(header(3, 1, color=3), (b"PLTE", b""), idat(b"\0\1\2"), END), "its palette is missing", ""),
    "huge.png": (png(header(65500, 65500), (b"IDAT", b""), END), "too many pixels", LIMIT),
    "big.png": (png(header(8000, 7000), (b"IDAT", b""), END), "too many pixels (8000 x 7000)", LIMIT),
    "zero.png": (png(header(0, 7000), (b"IDAT", b""), END), "truncated or damaged", ""),
    "tall.png": (encoded(Image.new("L", (1, 60000)), "PNG"), "too narrow to see anything (1 x 60000)", ""),
    "wide.png": (encoded(Image.new("L", (201, 1)), "PNG"), "too narrow to see anything (201 x 1)", ""),
    "drawing.svg": (
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "SVG is not a supported image",
        "rsvg-convert -o drawing.svg.png drawing.svg",
    ),
    "xml.svg": (
        b'<?xml version="1.0"?>\n<!-- by hand -->\n<svg/>',
        "SVG is not a supported image",
        "rsvg-convert -o xml.svg.png xml.svg",
    ),
    "paper.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a damaged PDF", "mutool clean paper.pdf paper.pdf.pdf"),
    "eps.png": (EPS, "PostScript is not a supported image", "magick -density 150 eps.png eps.png.png"),
    "cut.tiff": (encoded(noise(), "TIFF")[:-300], "truncated", TAKE_IT),
    "bigendian.png": (b"MM\0*" + bytes(40), "truncated or damaged", ""),
    "lab.tiff": (
        encoded(Image.new("LAB", (9, 9)), "TIFF"),
        "its colors (LAB) are not supported",
        first_frame("lab.tiff"),
    ),
    "float.tiff": (
        encoded(Image.new("F", (9, 9)), "TIFF"),
        "its colors (F) are not supported",
        first_frame("float.tiff"),
    ),
    "ppm.png": (encoded(noise(), "PPM"), "PNM is not a supported image", first_frame("ppm.png")),
    "ico.png": (encoded(noise(), "ICO"), "an icon (ICO) is not a supported image", first_frame("ico.png")),
    "photo.avif": (
        b"\0\0\0 ftypavif\0\0\0\0avifmif1miaf" + bytes(40),
        "truncated or damaged",
        "",
    ),
    "mif1.avif": (
        b"\0\0\0 ftypmif1\0\0\0\0mif1avifmiaf" + bytes(40),
        "truncated or damaged",
        "",
    ),
    "film.jpg": (
        b"\0\0\0 ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(40),
        "truncated or damaged" if films.AVAILABLE else "films need Python 3.11 or later",
        "copy it again, or: ffmpeg -i film.jpg -c copy REPAIRED.mkv" if films.AVAILABLE else "",
    ),
    "cut.heic": (encoded(noise(), "HEIF")[:200], "truncated or damaged", ""),
}


def make_names(folder: Path) -> None:
    (folder / "photos").mkdir()
    (folder / "my photos").mkdir()
    (folder / "link").symlink_to("photos")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling.png").symlink_to("gone")
    os.mkfifo(folder / "fifo.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "kitten.png").write_bytes(encoded(noise(), "PNG"))


def tiff_exif(*entries: bytes, count: int | None = None) -> bytes:
    number = struct.pack(">H", len(entries) if count is None else count)
    return b"Exif\0\0MM\0*\0\0\0\x08" + number + b"".join(entries) + bytes(4)


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    return struct.pack(">HHI", tag, kind, count) + value


TURN = entry(0x112, 3, 1, b"\0\6\0\0")
