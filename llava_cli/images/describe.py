"""The sandboxed job that writes a description into a picture's file, for programs that read no file beside it.

A request is `_REQUEST`, the description as UTF-8 and the file's bytes. A reply is one byte, its `Reply`, and for
`WRITTEN` the new file. pyexiv2 parses what strangers have made, so it runs nowhere else.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

from llava_cli import limits
from llava_cli.conversation import Picture
from llava_cli.images import formats
from llava_cli.images.metadata import strip_metadata
from llava_cli.images.sandbox import SandboxPool
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate

FORMATS = ("jpeg", "png", "webp")
"""In which pyexiv2 moves no pixels."""
_REQUEST = struct.Struct("<?I")
"""Whether another description may be replaced; the bytes of the description."""
_XMP, _EXIF = "Xmp.dc.description", "Exif.Image.ImageDescription"
_IPTC, _IPTC_CHARSET, _UTF_8 = "Iptc.Application2.Caption", "Iptc.Envelope.CharacterSet", "\x1b%G"
_IPTC_BYTES = 2000
"""The most that IPTC-IIM 4.2 has room for."""
_LANGUAGE = 'lang="x-default"'


class Reply(IntEnum):
    WRITTEN = 0
    SAME = 1
    """The file has this description already."""
    OTHER = 2
    """The file has another description."""
    UNSUITABLE = 3
    """The file cannot be written without changing something else in it."""


class Describer:
    """Writes descriptions into files, one at a time, in a process that is started when needed."""

    def __init__(self) -> None:
        self._worker = Worker(__name__, limits.SANDBOX_MEMORY)
        self._decoders = SandboxPool()

    def describe(self, name: str, data: bytes, text: str, replace: bool = False) -> bytes | Reply:
        """The file with a description, or why there is none; its compressed pixels are the same byte for byte."""
        if formats.format_of(data, (*FORMATS, "jpeg-ls")) not in FORMATS:
            return Reply.UNSUITABLE
        encoded = text.encode()
        try:
            request = _REQUEST.pack(replace, len(encoded)), encoded, data
            reply = self._worker.ask(request, 2 * limits.PICTURE_BYTES, limits.DECODE_SECONDS)
            kind = Reply(reply[0])
        except (WorkerDied, WorkerLate, ValueError, IndexError):
            self._worker.end()
            return Reply.UNSUITABLE
        if kind is not Reply.WRITTEN:
            return kind
        new = bytes(reply[1:])
        return new if self._same_pixels(name, data, new) else Reply.UNSUITABLE

    def _same_pixels(self, name: str, old: bytes, new: bytes) -> bool:
        """Whether two files have the same compressed pixels, and decode to the same ones."""
        if _pixel_bytes(old) != _pixel_bytes(new):
            return False
        first, second = (self._decoders.open(name, data, allow_truncated=True) for data in (old, new))
        if not isinstance(first, Picture) or not isinstance(second, Picture):
            return False
        return first.image.size == second.image.size and first.image.tobytes() == second.image.tobytes()

    def close(self) -> None:
        self._worker.end()
        self._decoders.close()


def _pixel_bytes(data: bytes) -> bytes:
    """What pixels are made of; without the header of WebP, which says what else is in the file."""
    stripped = list(strip_metadata(data))[-1]
    if stripped[8:12] != b"WEBP":
        return stripped
    return stripped[30:] if stripped[12:16] == b"VP8X" else stripped[12:]


# Below: inside the sandbox.


def prepare() -> None:
    """Imports everything that is needed: after this no file can be opened."""
    import pyexiv2

    pyexiv2.set_log_level(4)
    pyexiv2.enableBMFF(False)


def answer(request: bytes) -> tuple[bytes, ...]:
    """The parts of a reply."""
    replace, size = _REQUEST.unpack_from(request)
    at = _REQUEST.size + size
    text = request[_REQUEST.size : at].decode()
    try:
        kind, data = _described(request[at:], text, replace)
    except (RuntimeError, UnicodeError, MemoryError):  # RuntimeError: whatever exiv2 throws
        kind, data = Reply.UNSUITABLE, b""
    return bytes([kind]), data


def _described(data: bytes, text: str, replace: bool) -> tuple[Reply, bytes]:
    import pyexiv2

    with pyexiv2.ImageData(data) as image:
        before = _metadata(image)
        xmp = before["xmp"].get(_XMP, {})
        xmp = xmp if isinstance(xmp, dict) else {_LANGUAGE: str(xmp)}
        there = {xmp.get(_LANGUAGE, ""), before["exif"].get(_EXIF, ""), before["iptc"].get(_IPTC, "")}
        there = {other for other in there if other.strip()}
        has_iptc = bool(before["iptc"]) and _takes(before["iptc"], text)
        wanted = {_XMP: {**xmp, _LANGUAGE: text}, _EXIF: text} | ({_IPTC: text} if has_iptc else {})
        if all({**before["xmp"], **before["exif"], **before["iptc"]}.get(key) == wanted[key] for key in wanted):
            return Reply.SAME, b""
        if there - {text} and not replace:
            return Reply.OTHER, b""
        image.modify_xmp({_XMP: wanted[_XMP]})
        image.modify_exif({_EXIF: text})
        if has_iptc:
            image.modify_iptc({_IPTC: text, _IPTC_CHARSET: _UTF_8})
        new = image.get_bytes()
    with pyexiv2.ImageData(new) as image:
        after = _metadata(image)
    return (Reply.WRITTEN, new) if _others(before) == _others(after) else (Reply.UNSUITABLE, b"")


def _metadata(image: Any) -> dict[str, Any]:
    return {
        "exif": image.read_exif(),
        "iptc": image.read_iptc(),
        "xmp": image.read_xmp(),
        "icc": image.read_icc(),
        "comment": image.read_comment(),
    }


def _takes(iptc: dict[str, Any], text: str) -> bool:
    """Whether a text can be put among others of IPTC without changing what they mean."""
    return len(text.encode()) <= _IPTC_BYTES and (iptc.get(_IPTC_CHARSET) == _UTF_8 or str(iptc).isascii())


def _others(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata without descriptions, and without what is a place in the file."""
    kept = {name: value for name, value in metadata.items() if not isinstance(value, dict)}
    for name in ("exif", "iptc", "xmp"):
        ours = (_XMP, _EXIF, _IPTC, _IPTC_CHARSET)
        kept[name] = {key: v for key, v in metadata[name].items() if key not in ours and not key.endswith(_PLACES)}
    return kept


_PLACES = (".ExifTag", ".GPSTag", ".InteroperabilityTag", ".JPEGInterchangeFormat", ".Offset")
"""Offsets in the file, which move with what is before them."""
