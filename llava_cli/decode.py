"""A picture file's bytes -> an upright RGB picture, or what is wrong with them in a few words.

Runs in the sandbox (`sandbox/pictures.py`): nothing of it may be called on a stranger's bytes in a process that has
rights. The limits are the product's: five formats (Pillow would hand others to Ghostscript), and pixels are counted
off the header.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from llava_cli import limits
from llava_cli.errors import BadImage

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ALLOW_TRUNCATED = "--allow-truncated takes what is there"
FEWER_PIXELS = f"the limit is {limits.PICTURE_PIXELS // 1_000_000} megapixels"
HEIC_EXTRA = "pip install 'llava-cli[heic]'"
HINTS = ("", ALLOW_TRUNCATED, FEWER_PIXELS, HEIC_EXTRA)
"""All that a `BadImage` from here may propose to type."""


class Decoded(NamedTuple):
    """What a file's bytes are."""

    image: Image
    """Upright, RGB."""
    frames: int
    """How many the file has; the image is the first."""
    truncated: bool
    """Whether its end was missing."""
    format: str
    """Pillow's name of it."""
    plain: bool
    """Whether any decoder sees in the file what ours does: nothing transparent, nothing turned, no rare mode."""


def decode(data: bytes, name: str, allow_truncated: bool = False) -> Decoded:
    """The picture that a file's bytes are. Raises `BadImage`."""
    from PIL import Image

    formats: tuple[str, ...] = FORMATS
    if is_heif(data):
        formats = (*FORMATS, _register_heif(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow would warn of is checked here
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except Image.DecompressionBombError:
            raise BadImage(name, "too many pixels", FEWER_PIXELS) from None
        except MemoryError:
            raise
        except Exception:  # every decoder has its own ways to say that this is not for it
            raise BadImage(name, _what(data)) from None
        width, height = image.size
        if width * height > limits.PICTURE_PIXELS:
            raise BadImage(name, f"too many pixels ({width} x {height})", FEWER_PIXELS)
        if max(width, height) > limits.PICTURE_ASPECT * min(width, height):
            raise BadImage(name, f"too narrow to see anything ({width} x {height})")
        truncated = False
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            # Pillow leaves a failed picture half done, and a second load() of it would return black.
            truncated = "truncated" in str(error).lower()
            if not truncated:
                raise BadImage(name, "damaged") from None
            if not allow_truncated:
                raise BadImage(name, "truncated", ALLOW_TRUNCATED) from None
            image = _salvage(data, name, formats)
        if image.mode == "P" and not (image.palette and image.palette.palette):
            raise BadImage(name, "damaged")  # its colors are missing; Pillow would take all of them for black
        key = image.info.get("transparency")
        if image.format == "PNG" and image.mode == "L" and isinstance(key, int):
            # Pillow takes grey of 2 or 4 bits to 8, but leaves the transparent level as it was.
            image.info["transparency"] = key * {2: 85, 4: 17}.get(data[24], 1)  # by the depth
        plain = image.mode in ("RGB", "L") and "transparency" not in image.info and not (truncated or _is_turned(image))
        kind = image.format or ""
        try:
            upright = _upright_rgb(image)
        except MemoryError:
            raise
        except Exception:
            raise BadImage(name, "damaged") from None
        return Decoded(upright, _frames(image), truncated, kind, plain)


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


def _is_turned(image: Image) -> bool:
    """Whether a picture has an orientation that not everybody looks at."""
    from PIL import ExifTags

    noted = {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys()
    try:
        return bool(noted) and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # malformed: who knows what others make of it
        return True


def _upright_rgb(image: Image) -> Image:
    from PIL import Image, ImageOps

    with suppress(Exception):  # malformed EXIF: in place, the picture is turned before its EXIF is rewritten
        ImageOps.exif_transpose(image, in_place=True)
    key = image.info.get("transparency")  # Pillow leaves a transparent color at 16 bits where it takes pixels to 8
    if isinstance(key, bytes):  # of a palette, and it may have more levels than a palette has colors
        image.info["transparency"] = key[:256]
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
    return "truncated or damaged" if ours or is_heif(data) else "not an image"


def is_heif(data: bytes) -> bool:
    """Whether these bytes say that they are a HEIF file, which has a decoder of its own."""
    brands = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
    return data[4:8] == b"ftyp" and data[8:12] in brands and b"avif" not in data[8:40]


def _register_heif(name: str) -> str:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise BadImage(name, "HEIC needs an extra", HEIC_EXTRA) from None
    register_heif_opener()
    return "HEIF"
