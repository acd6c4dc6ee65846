"""What a camera or program wrote of a picture into its file (EXIF), read in a sandboxed process of its own.

A request is the file's bytes. A reply is JSON: an object of values by their names in `PIL.ExifTags`.
"""

from __future__ import annotations

import io
import json
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

from llava_cli import limits
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import BadImage
from llava_cli.images import formats
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import printable

Value = str | int | float | list[int | float]
"""Text, a number, or several numbers; rational numbers are floats."""
_BOUNDS = Bounds(limits.EXIF_BYTES, 3, 10_000)
_JPEG_HEAD_BYTES = 1 << 20
"""Of a JPEG, whose EXIF comes before its pixels; in other formats it may be anywhere."""


class ExifReader:
    """A process that reads EXIF; threads take turns. HEIF's decoder has a second process."""

    def __init__(self) -> None:
        self._workers = [Worker(__name__, limits.SANDBOX_MEMORY), Worker(__name__, limits.SANDBOX_MEMORY, formats.HEIF)]
        self._lock = threading.Lock()

    def read(self, name: str, data: bytes) -> dict[str, Value]:
        """The values of a picture's file, called `name`; none if it has none, or if they cannot be understood.

        Raises `BadImage` if its reader crashes or takes too long.
        """
        worker = self._workers[formats.is_heif(data)]
        if formats.format_of(data, ("jpeg",)):
            data = data[:_JPEG_HEAD_BYTES]
        try:
            with self._lock:
                values = loads(bytes(worker.ask((data,), limits.EXIF_BYTES, limits.EXIF_SECONDS)), _BOUNDS)
        except WorkerLate as error:
            raise BadImage(printable(name), f"its EXIF takes longer than {error} s to read") from None
        except (WorkerDied, ValueError) as error:
            raise BadImage(printable(name), str(error) or "its EXIF crashes what reads it") from None
        found = values.items() if isinstance(values, dict) else ()
        return {key: value for key, value in found if key in names() and _is_value(value)}

    def close(self) -> None:
        """Kills the processes."""
        for worker in self._workers:
            worker.end()


@cache
def names() -> frozenset[str]:
    """What EXIF's values are called."""
    from PIL import ExifTags

    return frozenset(ExifTags.TAGS.values()) | frozenset(ExifTags.GPSTAGS.values())


def _is_value(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, (int, float)) for item in value)
    return isinstance(value, (str, int, float))


# Below: inside the sandbox.

_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF", "HEIF")
_MOST_NUMBERS = 16
"""Of one value; longer lists are tables for programs."""
_CHARACTER_CODE = re.compile(rb"(ASCII|UNICODE|JIS)?\0+")
"""What stands before the text of a user's comment (Exif 3.0, 4.6.6)."""


def prepare(extra: str = "") -> None:
    """Imports everything that may be needed: after this no file can be opened."""
    from PIL import Image

    Image.preinit()
    import_module("PIL.ExifTags")
    for name in ("Mpo", "WebP", "Tiff", "Avif"):
        with suppress(ImportError):
            import_module(f"PIL.{name}ImagePlugin")
    import_module("encodings.utf_16_le")
    if extra:
        with suppress(ImportError):  # the extra is not installed: such a picture cannot be opened at all
            import_module(extra).register_heif_opener()


def answer(request: bytes) -> tuple[bytes, ...]:
    """The parts of a reply."""
    values: dict[str, Value] = {}
    with suppress(Exception), warnings.catch_warnings():  # a malformed part ends the reading
        warnings.simplefilter("ignore")
        for tags, tag_names in _tables(request):
            found = ((tag_names.get(tag, ""), value) for tag, value in tags.items())
            values |= {name: plain for name, value in found if name and (plain := _plain(name, value)) is not None}
    return (json.dumps(_with_degrees(values)).encode()[: limits.EXIF_BYTES],)


def _tables(data: bytes) -> Iterator[tuple[Mapping[int, Any], Mapping[int, str]]]:
    """The file's tables of values, each with the names of its keys."""
    from PIL import ExifTags, Image

    known = [name for name in _FORMATS if name in Image.OPEN]
    exif = Image.open(io.BytesIO(data), formats=known).getexif()
    yield exif, ExifTags.TAGS
    yield exif.get_ifd(ExifTags.IFD.Exif), ExifTags.TAGS
    yield exif.get_ifd(ExifTags.IFD.GPSInfo), ExifTags.GPSTAGS


def _plain(name: str, value: Any) -> Value | None:
    """A value as text, a number or numbers; None for what is neither, such as a maker's own bytes."""
    if isinstance(value, bytes):
        encoding = "utf-16-le" if name.startswith("XP") else "utf-8"
        value = _CHARACTER_CODE.sub(b"", value, count=1) if name == "UserComment" else value
        try:
            value = value.decode(encoding)
        except UnicodeDecodeError:
            return None
    if isinstance(value, str):
        text = value.strip("\0 \r\n")[: limits.EXIF_CHARACTERS]
        return text if text and "\0" not in text else None
    if isinstance(value, tuple):
        numbers = [_number(item) for item in value[: _MOST_NUMBERS + 1]]
        return None if len(numbers) > _MOST_NUMBERS or None in numbers else [n for n in numbers if n is not None]
    return _number(value)


def _number(value: Any) -> int | float | None:
    """A number, also a rational one; None for infinity and for what is no number."""
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() else round(number, 9)


def _with_degrees(values: dict[str, Value]) -> dict[str, Value]:
    """The values with latitude and longitude in degrees: negative ones are south and west."""
    for name in ("GPSLatitude", "GPSLongitude"):
        if isinstance(parts := values.get(name), list) and len(parts) == 3:
            degrees = sum(part / 60**power for power, part in enumerate(parts))
            values[name] = round(-degrees if values.get(f"{name}Ref") in ("S", "W") else degrees, 6)
    return values
