"""The sandboxed job that decodes pictures and draws pages.

A request is `REQUEST` and a file's bytes, or is about the file before, which is kept open for this where the reply told
of several pages or frames. A reply is one of three, by its first byte:

- `PICTURE` and the pixels, RGB, 3 bytes each;
- `CONTENT`, for a request that asks what the file contains;
- `REFUSAL` and the reason as UTF-8.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from importlib import import_module
from typing import Protocol

from llava_cli.errors import BadImage
from llava_cli.images import decode, formats, pdf, unsupported
from llava_cli.images.decode import Decoded, PictureFile
from llava_cli.images.pdf import PdfFile
from llava_cli.images.resize import PACKED_BYTES, resized
from llava_cli.parts import Content

REQUEST = struct.Struct(f"<???IH{PACKED_BYTES}s")
"""Whether it is about the file before; whether its content is asked for; whether a truncated picture is allowed; which
page or frame, 0 for the one that stands for the file; dots an inch of a page; a `Resize`."""
PICTURE = struct.Struct("<BIIIII?B?")
"""`IS_PICTURE`; width and height of the pixels; those of the picture before it was resized; the number of pages or
frames; whether the end of the file was missing; the index of its format in `FORMATS`; whether it is plain (see
`Decoded`)."""
CONTENT = struct.Struct("<BBId")
"""`IS_CONTENT`; the index of its kind in `KINDS`; the number of pages or frames; seconds."""
REFUSAL = struct.Struct("<BI")
"""`IS_REFUSAL`; the index of a hint in `HINTS`."""
IS_REFUSAL, IS_PICTURE, IS_CONTENT = range(3)
FORMATS = ("", "JPEG", "PNG")
"""The formats that callers distinguish."""
KINDS = ("picture", "document", "animation")
HINTS = tuple(dict.fromkeys(("", *decode.HINTS, *pdf.HINTS, *unsupported.HINTS)))
"""Every hint that a refusal may have: one that was taken over can say no other."""
_MOST = 2**32 - 1
_IMPORTS = (
    *("encodings.utf_16", "encodings.utf_16_le", "PIL.ImageFile", "PIL.ImageOps", "PIL.ImagePalette"),
    *(f"PIL.{name}ImagePlugin" for name in ("Avif", "Bmp", "Gif", "Jpeg", "Mpo", "Png", "Tiff", "WebP")),
)


class _File(Protocol):
    """A file that is open."""

    def content(self) -> Content: ...

    def picture(self, page: int | None, dpi: int, allow_truncated: bool) -> Decoded: ...

    def close(self) -> None: ...


_kept: _File | None = None


def prepare(package: str = "") -> None:
    """Imports everything that decoding may need: after this no file can be opened."""
    for name in _IMPORTS:
        import_module(name)
    if package:
        with suppress(ImportError):  # it is not installed, which opening a file says
            import_module(package)


def answer(request: bytes) -> tuple[bytes, ...]:
    """The parts of a reply."""
    global _kept
    is_same, *asked = REQUEST.unpack_from(request)
    try:
        file = _kept if is_same and _kept else None
        if file is None:
            _close()
            file = _kept = _opened(request[REQUEST.size :])
        reply, count = _reply(file, *asked)
        if count == 1:
            _close()
    except MemoryError:
        return refusal("takes too much memory to decode")
    except BadImage as error:
        return refusal(error.reason, error.hint)
    return reply


def _close() -> None:
    global _kept
    if _kept:
        _kept.close()
    _kept = None


def _opened(data: bytes) -> _File:
    return PdfFile(data) if formats.is_pdf(data) else PictureFile(data)


def _reply(
    file: _File, is_inspected: bool, allow_truncated: bool, page: int, dpi: int, packed: bytes
) -> tuple[tuple[bytes, ...], int]:
    """The reply about an open file, and its number of pages or frames."""
    if is_inspected:
        content = file.content()
        header = CONTENT.pack(IS_CONTENT, KINDS.index(content.kind), min(content.count, _MOST), content.seconds)
        return (header,), content.count
    decoded = file.picture(page or None, dpi, allow_truncated)
    image = resized(decoded.image, packed)  # here, because sending a large picture takes long
    format_index = FORMATS.index(decoded.format) if decoded.format in FORMATS else 0
    facts = min(decoded.frames, _MOST), decoded.truncated, format_index, decoded.plain
    return (PICTURE.pack(IS_PICTURE, *image.size, *decoded.size, *facts), image.tobytes()), decoded.frames


def refusal(reason: str, hint: str = "") -> tuple[bytes, ...]:
    return REFUSAL.pack(IS_REFUSAL, HINTS.index(hint)), reason.encode()
