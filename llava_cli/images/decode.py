"""Decodes an image file's bytes to an upright RGB picture, or says in a few words what is wrong with them.

Runs in the sandbox (`images/sandbox.py`): never call it on a stranger's bytes in a process that has rights. The limits
are the product's: a list of formats (Pillow would hand others to Ghostscript), and a bound on the pixels that the
header declares.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

from llava_cli import limits
from llava_cli.errors import BadImage
from llava_cli.images import animation, formats, metadata, tiff, unsupported
from llava_cli.images.unsupported import Unsupported
from llava_cli.parts import Content

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
ALLOW_TRUNCATED = "--allow-truncated takes what is there"
FEWER_PIXELS = f"the limit is {limits.PICTURE_PIXELS // 1_000_000} megapixels"
TOO_NARROW = "too narrow to see anything ({} x {})"
HEIC_EXTRA, JPEG_XL_PLUGIN = "pip install 'llava-cli[heic]'", "pip install pillow-jxl-plugin"
TRUNCATED = "truncated"
OPAQUE = "magick {name}'[0]' -alpha off {name}.png"
ALL_PAGES = "--pages all takes what there is"
HINTS = (ALLOW_TRUNCATED, FEWER_PIXELS, HEIC_EXTRA, JPEG_XL_PLUGIN, OPAQUE, ALL_PAGES)
"""Hints that a `BadImage` from this module may have, beside those of `unsupported`."""
_T = TypeVar("_T")


class Decoded(NamedTuple):
    """A decoded image file."""

    image: Image
    """Upright, RGB."""
    frames: int
    """How many pages or frames the file has."""
    truncated: bool
    """Whether the end of the file was missing."""
    format: str
    """Pillow's name for the format."""
    plain: bool
    """Whether every decoder sees the same in this file: no transparency, no orientation, no rare mode."""
    size: tuple[int, int]
    """Of the picture: of `image`, unless that has been resized."""


def decode(data: bytes, name: str, allow_truncated: bool = False) -> Decoded:
    """The first or only picture of an image file; raises as `PictureFile`."""
    return PictureFile(data, name).picture(allow_truncated=allow_truncated)


class PictureFile:
    """An image file with one or more frames or pages.

    What Pillow has open is kept between frames: those of an animation are each made from the one before. Everything
    raises `BadImage`; its hint has {name} where the file's name is to be typed.
    """

    def __init__(self, data: bytes, name: str = "") -> None:
        self._data, self._name = data, name
        self._formats = _pillow_formats(data, name)
        self._opened: _Opened | None = None
        self._page = 0
        """At which page or frame it is."""

    def content(self) -> Content:
        """What the file contains; whether it can be decoded is not known yet."""
        return self._of_first_readable(lambda content: _open(content, self._name, self._formats).content())

    def picture(self, page: int | None = None, dpi: int = 0, allow_truncated: bool = False) -> Decoded:
        """A page or frame, from 1, as a viewer shows it; without a number the one that stands for the file."""

        def load(content: bytes) -> Decoded:
            opened, image = self._load(content, page)
            is_whole = content is self._data and page is None
            return _finish(image, content, self._name, len(opened.frames), is_whole)

        def salvage(content: bytes) -> Decoded:
            opened = _open(content, self._name, self._formats, is_truncated=True)
            opened.seek(page, self._name)
            return _finish(_salvaged(opened.image, self._name), content, self._name, len(opened.frames), truncated=True)

        return self._of_first_readable(load, salvage if allow_truncated else None)

    def close(self) -> None:
        self._opened = None

    def _load(self, content: bytes, page: int | None) -> tuple[_Opened, Image]:
        """What Pillow has open, and a page or frame as stored, in an image that may be changed."""
        if page is None:
            opened = _open(content, self._name, self._formats)
            opened.seek(None, self._name)
            return opened, _loaded(opened.image, self._name)
        if self._opened is None or self._opened.data != content or page < self._page:  # Pillow goes back to few frames
            self._opened = _open(content, self._name, self._formats)
        opened, self._page = self._opened, page
        opened.seek(page, self._name)
        with _canvas_kept(opened.image):
            frame = _loaded(opened.image, self._name).copy()  # the next frame is drawn over this one
        frame.format = opened.image.format
        return opened, frame

    def _of_first_readable(self, do: Callable[[bytes], _T], do_truncated: Callable[[bytes], _T] | None = None) -> _T:
        """What `do` returns for the first variant of the file that Pillow can read, or `do_truncated` for a cut one."""
        failures: list[tuple[_Undecodable, bytes]] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow would warn about is checked here
            for content in _variants(self._data):
                try:
                    return do(content)
                except _Undecodable as error:
                    self.close()  # Pillow leaves a failed image half decoded, and a second load() of it returns black
                    failures.append((error, content))
            failure, content = next((pair for pair in failures if pair[0].reason == TRUNCATED), failures[0])
            if kind := _unsupported(self._data, failure.reason):
                raise BadImage(self._name, kind.description, kind.hint)
            if failure.reason == TRUNCATED and do_truncated:
                return do_truncated(content)
            raise failure


def no_such_part(kind: str, number: int, count: int, name: str = "") -> BadImage:
    """The error for a page or frame that a file does not have."""
    return BadImage(name, f"no {kind} {number}: it has {count:,} {kind}{'s' * (count != 1)}", ALL_PAGES)


class _Undecodable(BadImage):
    """The pixels cannot be read, perhaps because of something else in the file."""


def _variants(data: bytes) -> Iterator[bytes]:
    """The file, then versions of it without metadata, which may be what Pillow cannot read."""
    yield data
    yield from {content: None for content in metadata.strip_metadata(data) if content != data}


def _pillow_formats(data: bytes, name: str) -> tuple[str, ...]:
    """The formats that a file may have, by its first bytes. Raises `BadImage` if their package is not installed."""
    package = formats.package_for(data)
    if package == formats.HEIF:
        return (_register_heif(name),)
    if package == formats.JPEG_XL:
        return (_register_jpeg_xl(name),)
    return (_one_threaded_avif(),) if formats.is_avif(data) else PILLOW_FORMATS


class _Opened(NamedTuple):
    """A file whose header Pillow has read."""

    data: bytes
    image: ImageFile
    """At any of its frames."""
    frames: Sequence[int]
    """Pillow's numbers, from 0, of what a viewer shows as pages or frames."""

    def content(self) -> Content:
        count = len(self.frames)
        if count == 1 or self.image.format in ("JPEG", "MPO"):
            return Content("picture", count)
        if self.image.format == "TIFF":
            return Content("document", count)
        return Content("animation", count, animation.seconds_of(self.data))

    def seek(self, page: int | None, name: str) -> None:
        """Goes to a page or frame, from 1, or to the one that stands for the file.

        Raises `_Undecodable`, or `BadImage` if there is none.
        """
        is_document = self.image.format == "TIFF"
        if page is None and not (is_document and self.frames[0]):  # which is where Pillow has opened it
            return
        if page is not None and page > len(self.frames):
            raise no_such_part("page" if is_document else "frame", page, len(self.frames), name)
        try:
            self.image.seek(self.frames[(page or 1) - 1])
        except MemoryError:
            raise
        except Exception as error:
            raise _undecodable(error, name) from None


def _open(data: bytes, name: str, pillow_formats: tuple[str, ...], is_truncated: bool = False) -> _Opened:
    """A file, by its header. Raises `_Undecodable`, or `BadImage` for one that is over the limits."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data), formats=pillow_formats)
        if is_truncated and image.format in ("JPEG", "MPO"):
            # An end-of-image marker makes the decoder hand over the rows that it holds.
            image = Image.open(io.BytesIO(data + b"\xff\xd9"), formats=pillow_formats)
    except Image.DecompressionBombError:
        raise BadImage(name, "too many pixels", FEWER_PIXELS) from None
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own exceptions
        if str(error).startswith("Unsupported BMP"):
            raise BadImage(name, *unsupported.UNUSUAL_BMP) from None
        raise _Undecodable(name, "truncated or damaged" if _is_supported(data) else "not an image") from None
    _check_size(image, name)
    return _Opened(data, image, _frames(image, data, name))


def _frames(image: Image, data: bytes, name: str) -> Sequence[int]:
    """Pillow's numbers of a file's pages or frames. Raises `BadImage` for a camera's RAW in the form of a TIFF."""
    if image.format == "TIFF":
        if formats.format_of(data, ("raw",)) or tiff.is_raw(data):
            raise BadImage(name, *unsupported.RAW)
        return tiff.page_indexes(data) or range(1)
    try:
        count = int(getattr(image, "n_frames", 1))
    except Exception:  # a later frame is damaged; the first was fine
        return range(1)
    return range(int(bool(getattr(image, "default_image", False))), count) or range(1)  # which no viewer animates


def _check_size(image: Image, name: str) -> None:
    """Raises `BadImage` if an image has too many pixels, or too few in one direction."""
    width, height = image.size
    if width * height > limits.PICTURE_PIXELS:
        raise BadImage(name, f"too many pixels ({width} x {height})", FEWER_PIXELS)
    if max(width, height) > limits.PICTURE_ASPECT * min(width, height):
        raise BadImage(name, TOO_NARROW.format(width, height))


def _loaded(image: Image, name: str) -> Image:
    """The image with its pixels. Raises `_Undecodable`, or `BadImage` for one that is over the limits."""
    _check_size(image, name)
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise _undecodable(error, name) from None
    return image


@contextmanager
def _canvas_kept(image: ImageFile) -> Iterator[None]:
    """Lets the next frame of an APNG begin with what was there before this one, where this one says so.

    Pillow reads that off a picture over which it has drawn, if the frame is loaded before it goes on.
    """
    canvas = getattr(image, "_prev_im", None) if image.format == "PNG" else None
    before = canvas.copy() if canvas else None
    yield
    if before:
        image._prev_im = before  # type: ignore[attr-defined]


def _salvaged(image: ImageFile, name: str) -> Image:
    """What can be decoded of an image whose end is missing.

    Pillow's LOAD_TRUNCATED_IMAGES is one switch for all threads: while it is on, truncated images that other threads
    decode would pass as whole.
    """
    _check_size(image, name)
    try:
        image.load()
    except Exception:
        image.tile = []  # nothing more to decode; what was decoded stays
    if image.getbbox() is None:
        raise BadImage(name, "truncated, and nothing of it can be seen")
    return image


def _undecodable(error: Exception, name: str) -> _Undecodable:
    """What a decoder's exception means."""
    is_truncated = "truncated" in str(error).lower()
    return _Undecodable(name, TRUNCATED, ALLOW_TRUNCATED) if is_truncated else _Undecodable(name, "damaged")


def _finish(
    image: Image, data: bytes, name: str, frames: int, is_whole: bool = False, truncated: bool = False
) -> Decoded:
    """Makes a loaded image upright and RGB; `is_whole` says that it is all of `data`, the unchanged file."""
    if image.mode == "P" and not (image.palette and image.palette.palette):
        raise BadImage(name, "its palette is missing")  # Pillow would take all colors for black
    transparency = image.info.get("transparency")
    if image.format == "PNG" and image.mode == "L" and isinstance(transparency, int):
        # Pillow scales grey of 2 or 4 bits to 8, but leaves the transparent level unscaled.
        bit_depth = data[24]
        image.info["transparency"] = transparency * {2: 85, 4: 17}.get(bit_depth, 1)
    plain = is_whole and image.mode in ("RGB", "L") and "transparency" not in image.info and not _is_rotated(image)
    upright = _upright_rgb(image, name)
    return Decoded(upright, frames, truncated, image.format or "", plain, upright.size)


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
    if image.mode == "F" or (image.mode == "I" and not _has_16_bits(image)):
        raise ValueError("no range of values that anybody agrees on")
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


def _has_16_bits(image: Image) -> bool:
    """Whether all values of an image of one channel are from 0 to 65535."""
    lowest, highest = cast("tuple[float, float]", image.getextrema())
    return lowest >= 0 and highest < 65536


def _unsupported(data: bytes, reason: str) -> Unsupported | None:
    """What a file that failed is: another format, or a rare variant of a supported one that Pillow does not read."""
    if not data:
        return Unsupported("empty file")
    if not _is_supported(data):
        return unsupported.identify(data)
    if formats.is_avif(data) and not _is_avif_built_in():
        return unsupported.AVIF
    if formats.format_of(data, ("tiff",)) and reason != TRUNCATED and tiff.page_indexes(data):
        return unsupported.UNUSUAL_TIFF
    if data[12:16] == b"CgBI":
        return unsupported.IPHONE_PNG
    if formats.format_of(data, ("jpeg",)) and reason != TRUNCATED:
        return unsupported.unusual_jpeg(metadata.jpeg_frame_header(data))
    return None


def _is_supported(data: bytes) -> bool:
    """Whether a file begins like one of a format that we open."""
    known = {*formats.SUPPORTED, "jpeg-ls", "raw"}  # which begin like JPEG and TIFF
    if formats.is_bmp(data) or formats.is_heif(data) or formats.is_avif(data) or formats.is_jpeg_xl(data):
        return True
    return formats.format_of(data, known) in formats.SUPPORTED


def _one_threaded_avif() -> str:
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # more of them would need more of the sandbox's memory
    return "AVIF"


def _is_avif_built_in() -> bool:
    """Whether this Pillow was built with AVIF."""
    from PIL import AvifImagePlugin

    return AvifImagePlugin.SUPPORTED


def _register_heif(name: str) -> str:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise BadImage(name, "HEIC needs the extra llava-cli[heic]", HEIC_EXTRA) from None
    register_heif_opener()
    return "HEIF"


def _register_jpeg_xl(name: str) -> str:
    try:
        from pillow_jxl import JpegXLImagePlugin
    except ImportError:
        raise BadImage(name, "JPEG XL needs pillow-jxl-plugin", JPEG_XL_PLUGIN) from None
    JpegXLImagePlugin.DECODE_THREADS = 0  # as in `_one_threaded_avif`
    return "JXL"
