"""Any picture in, an upright RGB picture out, or an error that says in a few words what is wrong.

The limits are the product's: five formats (Pillow would hand others to Ghostscript), 50 megapixels
read off the header, regular files only. Everything is decoded from the very bytes that are hashed.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import os
import stat
import sys
import warnings
from typing import TYPE_CHECKING, Literal

from llava_cli.conversation import Picture
from llava_cli.errors import BadImage, InputMissing

if TYPE_CHECKING:
    from PIL.Image import Image

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


def open_picture(source: str, allow_truncated: bool = False) -> Picture:
    """Opens a path, an http(s) URL that the user typed, or "-" for stdin.

    Raises `InputMissing` where there is nothing to read and `BadImage` where it is no picture for us.
    """
    name = printable(source)
    if source == "-":
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
    elif is_url(source):
        from llava_cli.fetch import fetch

        data = fetch(source)
    else:
        data = _read_file(source, name)
    if len(data) > MAX_BYTES:
        raise BadImage(name, f"larger than {MAX_BYTES // 1_000_000} MB")
    image, frames, truncated = decode(data, name, allow_truncated)
    return Picture(source, image, hashlib.sha256(data).hexdigest(), frames, truncated)


def printable(name: str) -> str:
    """A file's name as it may be printed: control and undecodable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def _read_file(path: str, name: str) -> bytes:
    try:
        # Not blocking: opening a FIFO would otherwise wait for a writer that may never come.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            kind = os.fstat(descriptor)
            if stat.S_ISDIR(kind.st_mode):
                raise InputMissing(name, "is a directory", f"llava batch {name} QUESTION")
            if not stat.S_ISREG(kind.st_mode):
                raise InputMissing(name, "not a regular file")
            return file.read(MAX_BYTES + 1)
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
    from PIL import Image, ImageFile

    formats: tuple[str, ...] = FORMATS
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"heim", b"hevc"):
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
            if not allow_truncated or "truncated" not in str(error):
                hint = "--allow-truncated takes what is there" if "truncated" in str(error) else ""
                raise BadImage(name, "truncated" if hint else "damaged", hint) from None
            truncated = True
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                image = Image.open(io.BytesIO(data), formats=formats)
                image.load()
            except Exception:
                raise BadImage(name, "truncated, and what is there cannot be read") from None
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False
        return _upright_rgb(image), _frames(image), truncated


def _upright_rgb(image: Image) -> Image:
    from PIL import Image, ImageOps

    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # malformed EXIF turns nothing
        image = image.copy()
    if image.mode.startswith("I"):
        # 16-bit grey: convert("RGB") would clip all but the darkest of 256 levels to white.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
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
    from PIL import ImageOps

    image = reduce(image)
    side = max(image.size) if how == "pad" else min(image.size)
    return ImageOps.pad(image, (side, side), color=fill) if how == "pad" else ImageOps.fit(image, (side, side))


def _frames(image: Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is damaged; the first was fine
        return 1


def _what(data: bytes) -> str:
    """What bytes are that Pillow does not know."""
    if not data:
        return "empty file"
    head = data[:512].lstrip().lower()
    known = [(b"%pdf", "PDF"), (b"%!ps", "PostScript"), (b"ii*\0", "TIFF"), (b"mm\0*", "TIFF")]
    for magic, kind in [*known, (b"<svg", "SVG")]:
        if head.startswith(magic) or (kind == "SVG" and magic in head):
            return f"{kind} is not a supported image"
    return "not an image"


def _register_heif(name: str) -> str:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise BadImage(name, "HEIC needs an extra", "pip install 'llava-cli[heic]'") from None
    register_heif_opener()
    return "HEIF"
