"""Decodes an image file's bytes to an upright RGB picture, or says in a few words what is wrong with them.

Runs in the sandbox (`images/sandbox.py`): never call it on a stranger's bytes in a process that has rights. The limits
are the product's: five formats (Pillow would hand others to Ghostscript), and a bound on the pixels that the header
declares.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from llava_cli import limits
from llava_cli.errors import BadImage
from llava_cli.images import formats, metadata, unsupported
from llava_cli.images.unsupported import Unsupported

if TYPE_CHECKING:
    from PIL.Image import Image

PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ALLOW_TRUNCATED = "--allow-truncated takes what is there"
FEWER_PIXELS = f"the limit is {limits.PICTURE_PIXELS // 1_000_000} megapixels"
HEIC_EXTRA = "pip install 'llava-cli[heic]'"
TRUNCATED = "truncated"
OPAQUE = "magick {name}'[0]' -alpha off {name}.png"
HINTS = tuple(dict.fromkeys(("", ALLOW_TRUNCATED, FEWER_PIXELS, HEIC_EXTRA, OPAQUE, *unsupported.HINTS)))
"""Every hint that a `BadImage` from this module may have."""


class Decoded(NamedTuple):
    """A decoded image file."""

    image: Image
    """The first frame: upright, RGB."""
    frames: int
    truncated: bool
    """Whether the end of the file was missing."""
    format: str
    """Pillow's name for the format."""
    plain: bool
    """Whether every decoder sees the same in this file: no transparency, no orientation, no rare mode."""


def decode(data: bytes, name: str, allow_truncated: bool = False) -> Decoded:
    """Decodes the bytes of an image file.

    Raises `BadImage`; its hint has {name} where the file's name is to be typed.
    """
    pillow_formats: tuple[str, ...] = PILLOW_FORMATS
    if formats.is_heif(data):
        pillow_formats = (*PILLOW_FORMATS, _register_heif(name))
    failures: list[tuple[_Undecodable, bytes]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow would warn about is checked here
        for content in _variants(data):
            try:
                return _finish(_load(content, name, pillow_formats), content, name, is_whole=content is data)
            except _Undecodable as error:
                failures.append((error, content))
        failure, content = next((pair for pair in failures if pair[0].reason == TRUNCATED), failures[0])
        if kind := _unsupported(data, failure.reason):
            raise BadImage(name, kind.description, kind.hint)
        if failure.reason == TRUNCATED and allow_truncated:
            return _finish(_salvage(content, name, pillow_formats), content, name, truncated=True)
        raise failure


class _Undecodable(BadImage):
    """The pixels cannot be read, perhaps because of something else in the file."""


def _variants(data: bytes) -> Iterator[bytes]:
    """The file, then versions of it without metadata, which may be what Pillow cannot read."""
    yield data
    yield from {content: None for content in metadata.strip_metadata(data) if content != data}


def _load(data: bytes, name: str, pillow_formats: tuple[str, ...]) -> Image:
    """The first frame as stored. Raises `_Undecodable`, or `BadImage` for an image that is over the limits."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=pillow_formats)
    except Image.DecompressionBombError:
        raise BadImage(name, "too many pixels", FEWER_PIXELS) from None
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own exceptions
        if str(error).startswith("Unsupported BMP"):
            raise BadImage(name, *unsupported.UNUSUAL_BMP) from None
        raise _Undecodable(name, "truncated or damaged" if _is_supported(data) else "not an image") from None
    width, height = image.size
    if width * height > limits.PICTURE_PIXELS:
        raise BadImage(name, f"too many pixels ({width} x {height})", FEWER_PIXELS)
    if max(width, height) > limits.PICTURE_ASPECT * min(width, height):
        raise BadImage(name, f"too narrow to see anything ({width} x {height})")
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        # Pillow leaves a failed image half decoded, and a second load() of it would return black.
        if "truncated" in str(error).lower():
            raise _Undecodable(name, TRUNCATED, ALLOW_TRUNCATED) from None
        raise _Undecodable(name, "damaged") from None
    return image


def _finish(image: Image, data: bytes, name: str, is_whole: bool = False, truncated: bool = False) -> Decoded:
    """Makes a loaded image upright and RGB; `is_whole` says that `data` is the unchanged file."""
    if image.mode == "P" and not (image.palette and image.palette.palette):
        raise BadImage(name, "its palette is missing")  # Pillow would take all colors for black
    transparency = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(transparency, int):
        # Pillow scales grey of 2 or 4 bits to 8, but leaves the transparent level unscaled.
        bit_depth = data[24]
        image.info["transparency"] = transparency * {2: 85, 4: 17}.get(bit_depth, 1)
    plain = is_whole and image.mode in ("RGB", "L") and "transparency" not in image.info and not _is_rotated(image)
    upright = _upright_rgb(image, name)
    return Decoded(upright, _frame_count(image), truncated, image.format or "", plain)


def _salvage(data: bytes, name: str, pillow_formats: tuple[str, ...]) -> Image:
    """What can be decoded of an image whose end is missing.

    Pillow's LOAD_TRUNCATED_IMAGES is one switch for all threads: while it is on, truncated images that other threads
    decode would pass as whole.
    """
    from PIL import Image

    image = Image.open(io.BytesIO(data), formats=pillow_formats)
    if image.format in ("JPEG", "MPO"):  # an end-of-image marker makes the decoder hand over the rows that it holds
        image = Image.open(io.BytesIO(data + b"\xff\xd9"), formats=pillow_formats)
    try:
        image.load()
    except Exception:
        image.tile = []  # nothing more to decode; what was decoded stays
    if image.getbbox() is None:
        raise BadImage(name, "truncated, and nothing of it can be seen")
    return image


def _is_rotated(image: Image) -> bool:
    """Whether an image has an orientation tag, which some decoders ignore."""
    from PIL import ExifTags

    has_exif = bool({"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"} & image.info.keys())
    try:
        return has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # malformed: decoders will differ
        return True


def _upright_rgb(image: Image, name: str) -> Image:
    """The image upright, in RGB, on white. Raises `BadImage` if nothing of it can be seen."""
    from PIL import ImageOps

    with suppress(Exception):  # malformed EXIF: in place, pixels are transposed before the EXIF is rewritten
        ImageOps.exif_transpose(image, in_place=True)
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
        return image.convert("RGB")  # programs that ignore a bitmap's alpha leave it at zero
    try:
        return _on_white(image, name)
    except (BadImage, MemoryError):
        raise
    except Exception:  # the transparency entry does not fit the pixels
        image.info.pop("transparency", None)
    try:
        return _on_white(image, name)
    except (BadImage, MemoryError):
        raise
    except Exception:
        raise BadImage(name, f"its colors ({image.mode}) are not supported", unsupported.UNUSUAL_BMP.hint) from None


def _on_white(image: Image, name: str) -> Image:
    from PIL import Image

    transparency = image.info.get("transparency")
    if isinstance(transparency, bytes):  # of a palette; it may have more entries than a palette has colors
        image.info["transparency"] = transparency[:256]
    if isinstance(transparency, tuple) and max(transparency) > 255:  # Pillow scales 16-bit pixels, but not this color
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    if image.mode.startswith("I"):
        # 16-bit grey: convert("RGB") would clip all but the darkest of 256 levels to white.
        levels = image.convert("I")
        image = levels.point([level // 257 for level in range(65536)], "L")
        if isinstance(transparency, int):  # one level of 65536, not all those that round to the same one of 256
            image.putalpha(levels.point([255 * (level != transparency) for level in range(65536)], "L"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getbbox() is None:
            raise BadImage(name, "wholly transparent: nothing of it can be seen", OPAQUE)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _frame_count(image: Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is damaged; the first was fine
        return 1


def _unsupported(data: bytes, reason: str) -> Unsupported | None:
    """What a file that failed is: another format, or a rare variant of a supported one that Pillow does not read."""
    if not data:
        return Unsupported("empty file")
    if not _is_supported(data):
        return unsupported.identify(data)
    if data[12:16] == b"CgBI":
        return unsupported.IPHONE_PNG
    if formats.format_of(data, ("jpeg",)) and reason != TRUNCATED:
        return unsupported.unusual_jpeg(metadata.jpeg_frame_header(data))
    return None


def _is_supported(data: bytes) -> bool:
    """Whether a file begins like one of a format that we open."""
    known = {*formats.SUPPORTED, "jpeg-ls"}  # JPEG-LS begins like JPEG
    return formats.format_of(data, known) in formats.SUPPORTED or formats.is_bmp(data) or formats.is_heif(data)


def _register_heif(name: str) -> str:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise BadImage(name, "HEIC needs an extra", HEIC_EXTRA) from None
    register_heif_opener()
    return "HEIF"
