"""A picture file's bytes -> an upright RGB picture, or what is wrong with them in a few words.

Runs in the sandbox (`images/sandbox.py`): nothing of it may be called on a stranger's bytes in a process that has
rights. The limits are the product's: five formats (Pillow would hand others to Ghostscript), and pixels are counted
off the header.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from llava_cli import limits
from llava_cli.errors import BadImage
from llava_cli.images import formats as picture_formats
from llava_cli.images import metadata
from llava_cli.images.formats import Foreign

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
ALLOW_TRUNCATED = "--allow-truncated takes what is there"
FEWER_PIXELS = f"the limit is {limits.PICTURE_PIXELS // 1_000_000} megapixels"
HEIC_EXTRA = "pip install 'llava-cli[heic]'"
TRUNCATED = "truncated"
OPAQUE = "magick {name}'[0]' -alpha off {name}.png"
HINTS = tuple(dict.fromkeys(("", ALLOW_TRUNCATED, FEWER_PIXELS, HEIC_EXTRA, OPAQUE, *picture_formats.HINTS)))
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
    """The picture that a file's bytes are. Raises `BadImage`, whose hint has {name} where the file's is to be typed."""
    formats: tuple[str, ...] = FORMATS
    if is_heif(data):
        formats = (*FORMATS, _register_heif(name))
    failures: list[tuple[_Unreadable, bytes]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow would warn of is checked here
        for content in _tries(data):
            try:
                return _decoded(_loaded(content, name, formats), content, name, is_whole=content is data)
            except _Unreadable as error:
                failures.append((error, content))
        failure, content = next((one for one in failures if one[0].reason == TRUNCATED), failures[0])
        if kind := _foreign(data, failure.reason):
            raise BadImage(name, kind.what, kind.hint)
        if failure.reason == TRUNCATED and allow_truncated:
            return _decoded(_salvage(content, name, formats), content, name, truncated=True)
        raise failure


class _Unreadable(BadImage):
    """Pixels cannot be read, and something else in the file may be why."""


def _tries(data: bytes) -> Iterator[bytes]:
    """A file, and where that cannot be read what its pixels are made of."""
    yield data
    yield from {content: None for content in metadata.without(data) if content != data}


def _loaded(data: bytes, name: str, formats: tuple[str, ...]) -> Image:
    """The first frame as the file has it. Raises `_Unreadable`, or `BadImage` for one that is not looked at."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise BadImage(name, "too many pixels", FEWER_PIXELS) from None
    except MemoryError:
        raise
    except Exception as error:  # every decoder has its own ways to say that this is not for it
        if str(error).startswith("Unsupported BMP"):
            raise BadImage(name, *picture_formats.UNUSUAL_BMP) from None
        raise _Unreadable(name, "truncated or damaged" if _is_ours(data) else "not an image") from None
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
        # Pillow leaves a failed picture half done, and a second load() of it would return black.
        if "truncated" in str(error).lower():
            raise _Unreadable(name, TRUNCATED, ALLOW_TRUNCATED) from None
        raise _Unreadable(name, "damaged") from None
    return image


def _decoded(image: Image, data: bytes, name: str, is_whole: bool = False, truncated: bool = False) -> Decoded:
    """What comes of a picture whose pixels are there; `is_whole` says that `data` is all of its file."""
    if image.mode == "P" and not (image.palette and image.palette.palette):
        raise BadImage(name, "its palette is missing")  # Pillow would take all colors for black
    key = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(key, int):
        # Pillow takes grey of 2 or 4 bits to 8, but leaves the transparent level as it was.
        image.info["transparency"] = key * {2: 85, 4: 17}.get(data[24], 1)  # by the depth
    plain = is_whole and image.mode in ("RGB", "L") and "transparency" not in image.info and not _is_turned(image)
    upright = _upright_rgb(image, name)
    return Decoded(upright, _frames(image), truncated, image.format or "", plain)


def _salvage(data: bytes, name: str, formats: tuple[str, ...]) -> Image:
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


def _upright_rgb(image: Image, name: str) -> Image:
    """Raises `BadImage` where nothing of it can be seen."""
    from PIL import ImageOps

    with suppress(Exception):  # malformed EXIF: in place, the picture is turned before its EXIF is rewritten
        ImageOps.exif_transpose(image, in_place=True)
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getbbox() is None:
        return image.convert("RGB")  # what the alpha of a bitmap is where nobody has thought of it
    try:
        return _on_white(image, name)
    except (BadImage, MemoryError):
        raise
    except Exception:  # what is said of its transparency does not fit its pixels
        image.info.pop("transparency", None)
    try:
        return _on_white(image, name)
    except (BadImage, MemoryError):
        raise
    except Exception:
        raise BadImage(name, f"its colors ({image.mode}) are not supported", picture_formats.UNUSUAL_BMP.hint) from None


def _on_white(image: Image, name: str) -> Image:
    from PIL import Image

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
        if image.getchannel("A").getbbox() is None:
            raise BadImage(name, "wholly transparent: nothing of it can be seen", OPAQUE)
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _frames(image: Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is damaged; the first was fine
        return 1


def _foreign(data: bytes, reason: str) -> Foreign | None:
    """What a file is that is no picture of ours, or one of a rare kind that Pillow does not read."""
    if not data:
        return Foreign("empty file")
    if not _is_ours(data):
        return picture_formats.foreign(data)
    if data[12:16] == b"CgBI":
        return picture_formats.IPHONE_PNG
    if data.startswith(_JPEG) and reason != TRUNCATED:
        return picture_formats.unusual_jpeg(metadata.frame_header(data))
    return None


_JPEG = b"\xff\xd8\xff"


def _is_ours(data: bytes) -> bool:
    """Whether bytes begin like a picture of a format that we take."""
    if data.startswith(_JPEG):
        return data[3:4] != b"\xf7"  # JPEG-LS
    ours = data.startswith((b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")) or data[8:12] == b"WEBP"
    return ours or (data[:2] == b"BM" and data[6:10] == bytes(4)) or is_heif(data)


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
