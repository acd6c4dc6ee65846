"""Any picture in, an upright RGB picture out, or an error that says in a few words what is wrong.

The limits are the product's: five formats (Pillow would hand others to Ghostscript), 50 megapixels
read off the header, regular files only. Everything is decoded from the very bytes that are hashed.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import shlex
import stat
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing, printable

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 50_000_000
MAX_BYTES = 100_000_000
MAX_ASPECT = 200  # a strip that no vision tower can see; some processors would blow it up to gigabytes
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".heic", ".heif", ".tif", ".tiff", ".avif", ".svg")


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def looks_like_picture(text: str) -> bool:
    """Whether an argument was meant as a picture: it exists, is "-" or a URL, or ends like one."""
    return text == "-" or is_url(text) or os.path.lexists(text) or text.lower().endswith(SUFFIXES)


def open_picture(source: str, allow_truncated: bool = False, public: bool = False) -> Picture:
    """Opens a path, an http(s) URL that the user typed, or "-" for stdin; with `public` no URL of a private network.

    Raises `InputMissing` where there is nothing to read and `BadImage` where it is no picture for us.
    """
    name = printable(source) or "''"
    if source == "-":
        data = _read_stdin(name)
    elif is_url(source):
        from llava_cli.fetch import fetch

        data = fetch(source, public)
    else:
        data = _read_file(source, name)
    return picture_of(data, source, allow_truncated)


def picture_of(data: bytes, source: str, allow_truncated: bool = False) -> Picture:
    """The picture that a file's bytes are. Raises `BadImage` where they are none for us."""
    name = printable(source) or "''"
    if len(data) > MAX_BYTES:
        raise BadImage(name, f"larger than {MAX_BYTES // 1_000_000} MB")
    image, frames, truncated = decode(data, name, allow_truncated)
    return Picture(source, image, hashlib.sha256(data).hexdigest(), frames, truncated, data)


def _read_stdin(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    except (AttributeError, OSError):  # there is no sys.stdin where it was closed
        raise InputMissing(name, "stdin cannot be read") from None


def _read_file(path: str, name: str) -> bytes:
    try:
        # Not blocking: opening a FIFO would otherwise wait for a writer that may never come.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            kind = os.fstat(descriptor).st_mode
            if stat.S_ISDIR(kind):
                raise InputMissing(name, "is a directory", f"llava ask {shlex.quote(name)}/PICTURE QUESTION")
            if not stat.S_ISREG(kind):
                raise InputMissing(name, "not a regular file")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(MAX_BYTES + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputMissing(name, reason[:1].lower() + reason[1:], _neighbour(path)) from None


def _neighbour(path: str) -> str:
    """A hint with the name that was probably meant."""
    folder, file = os.path.split(path)
    try:
        close = difflib.get_close_matches(file, os.listdir(folder or "."), 1, 0.6)
    except (OSError, ValueError):
        return ""
    return f"did you mean {printable(os.path.join(folder, close[0]))}?" if close and close[0] != file else ""


def decode(data: bytes, name: str, allow_truncated: bool = False) -> tuple[Image, int, bool]:
    """Bytes -> (upright RGB image, number of frames, whether its end was missing)."""
    from PIL import Image

    formats: tuple[str, ...] = FORMATS
    if _is_heif(data):
        formats = (*FORMATS, _register_heif(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow would warn of is checked here
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError:
            raise BadImage(name, "too many pixels", f"the limit is {MAX_PIXELS // 1_000_000} megapixels") from None
        except Exception:  # every decoder has its own ways to say that this is not for it
            raise BadImage(name, _what(data)) from None
        width, height = image.size
        if width * height > MAX_PIXELS:
            hint = f"the limit is {MAX_PIXELS // 1_000_000} megapixels"
            raise BadImage(name, f"too many pixels ({width} x {height})", hint)
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BadImage(name, f"too narrow to see anything ({width} x {height})")
        truncated = False
        try:
            image.load()
        except Exception as error:
            # Pillow leaves a failed picture half done, and a second load() of it would return black.
            truncated = "truncated" in str(error).lower()
            if not truncated:
                raise BadImage(name, "damaged") from None
            if not allow_truncated:
                raise BadImage(name, "truncated", "--allow-truncated takes what is there") from None
            image = _salvage(data, name, formats)
        if image.mode == "P" and not (image.palette and image.palette.palette):
            raise BadImage(name, "damaged")  # its colors are missing; Pillow would take all of them for black
        key = image.info.get("transparency")
        if image.format == "PNG" and image.mode == "L" and isinstance(key, int):
            # Pillow takes grey of 2 or 4 bits to 8, but leaves the transparent level as it was.
            image.info["transparency"] = key * {2: 85, 4: 17}.get(data[24], 1)  # by the depth
        return _upright_rgb(image), _frames(image), truncated


def _salvage(data: bytes, name: str, formats: tuple[str, ...]) -> ImageFile:
    """What there is of a picture whose end is missing.

    Without Pillow's LOAD_TRUNCATED_IMAGES: that is one switch for all threads, and while it is on,
    what other threads decode is taken for whole.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(data), formats=formats)
    if image.format in ("JPEG", "MPO"):  # with an end marker the decoder hands over the rows that it still holds
        image = Image.open(io.BytesIO(data + b"\xff\xd9"), formats=formats)
    try:
        image.load()
    except Exception:
        image.tile = []  # nothing more to decode; what was decoded stays
    if image.getbbox() is None:
        raise BadImage(name, "truncated, and nothing of it can be seen")
    return image


def _upright_rgb(image: Image) -> Image:
    from PIL import Image, ImageOps

    with suppress(Exception):  # malformed EXIF: in place, the picture is turned before its EXIF is rewritten
        ImageOps.exif_transpose(image, in_place=True)
    key = image.info.get("transparency")  # Pillow leaves a transparent color at 16 bits where it takes pixels to 8
    if isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode.startswith("I"):
        # 16-bit grey: convert("RGB") would clip all but the darkest of 256 levels to white.
        levels = image.convert("I")
        image = levels.point([level // 257 for level in range(65536)], "L")
        if isinstance(key, int):  # one level of 65536, and not all those that become the same of 256
            image.putalpha(levels.point([255 * (level != key) for level in range(65536)], "L"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def reduce(image: Image) -> Image:
    """The picture itself, or one small enough that padding it to a square stays within the limit."""
    if max(image.size) ** 2 <= MAX_PIXELS:
        return image
    image = image.copy()
    side = int(MAX_PIXELS**0.5)
    image.thumbnail((side, side))
    return image


def square(image: Image, how: Literal["pad", "crop"], fill: tuple[int, int, int]) -> Image:
    """A square of the longer side, padded with `fill` all around, or the middle square."""
    from PIL import Image

    # Whole pixels and rounding down, as LLaVA does; ImageOps.pad and .fit round and resample.
    image = reduce(image)
    width, height = image.size
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    padded = Image.new("RGB", (side, side), fill)
    padded.paste(image, ((side - width) // 2, (side - height) // 2))
    return padded


def _frames(image: Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is damaged; the first was fine
        return 1


def _what(data: bytes) -> str:
    """What bytes are that Pillow cannot open."""
    if not data:
        return "empty file"
    head = data[:512].lstrip().lower()
    known = [(b"%pdf", "PDF"), (b"%!ps", "PostScript"), (b"ii*\0", "TIFF"), (b"mm\0*", "TIFF")]
    for magic, kind in [*known, (b"<svg", "SVG")]:
        if head.startswith(magic) or (kind == "SVG" and magic in head):
            return f"{kind} is not a supported image"
    if data[4:8] == b"ftyp" and b"avif" in data[8:40]:
        return "AVIF is not a supported image"
    ours = data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"))
    ours = ours or data[8:12] == b"WEBP" or (data[:2] == b"BM" and data[6:10] == bytes(4))
    return "truncated or damaged" if ours or _is_heif(data) else "not an image"


def _is_heif(data: bytes) -> bool:
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return data[4:8] == b"ftyp" and data[8:12] in brands and b"avif" not in data[8:40]


def _register_heif(name: str) -> str:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise BadImage(name, "HEIC needs an extra", "pip install 'llava-cli[heic]'") from None
    register_heif_opener()
    return "HEIF"
