"""Strips metadata from image files: text, times, color profiles, thumbnails.

Pillow refuses an image in which such a part is damaged or too large; browsers skip the part. What remains keeps its
order, and whatever the pixels need is copied unchanged, damaged or not.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_TRNS_SIZES = {0: (2,), 2: (6,), 3: range(1, 257)}
"""Valid sizes of a PNG's tRNS chunk in bytes, by color type."""


def strip_metadata(data: bytes) -> Iterator[bytes]:
    """The file without metadata: first with its orientation and animation, then without those too."""
    for magic, parts in _FORMATS:
        if data.startswith(magic):
            for optional in (True, False):
                yield b"".join(parts(data, optional))


def jpeg_frame_header(data: bytes) -> bytes:
    """A JPEG's start-of-frame segment with its marker; empty if there is none."""
    return next((part for part in _segments(data) if _is_frame(part[1])), b"")


def _png(data: bytes, optional: bool) -> Iterator[bytes]:
    """The chunks that pixels are made of. A chunk that cuts the file off before its pixels is copied as it is."""
    yield _PNG
    at, color, has_pixels = len(_PNG), -1, False
    while at + 8 <= len(data):
        size, chunk_type = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        is_whole = end <= len(data) and chunk_type.isalpha()
        body = data[at + 8 : end - 4]
        is_sound = is_whole and zlib.crc32(chunk_type + body) == int.from_bytes(data[end - 4 : end], "big")
        if not is_whole and (chunk_type == b"IDAT" or not has_pixels):
            yield data[at:]
            return
        if not is_whole or chunk_type == b"IEND":
            break
        if chunk_type == b"IHDR" and size >= 13:
            color = body[9]
        has_pixels = has_pixels or chunk_type == b"IDAT"
        if chunk_type in (b"IHDR", b"PLTE", b"IDAT") or (
            chunk_type == b"tRNS" and is_sound and size in _TRNS_SIZES.get(color, ())
        ):
            yield data[at:end]
        elif optional and (chunk_type == b"eXIf" or chunk_type in _ANIMATION):
            yield data[at : at + 8] + body + struct.pack(">I", zlib.crc32(chunk_type + body))
        at = end
    if has_pixels:
        yield bytes(4) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))


def _jpeg(data: bytes, optional: bool) -> Iterator[bytes]:
    """The tables, the frame, the application segments that define color storage, and all scans."""
    yield b"\xff\xd8"
    for part in _segments(data):
        marker, body = part[1], part[4:]
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            is_jfif = marker == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 14
            is_adobe = marker == 0xEE and body.startswith(b"Adobe") and len(body) >= 12
            is_exif = marker == 0xE1 and body.startswith(b"Exif\0\0")
            if not (is_jfif or is_adobe or (is_exif and optional)):
                continue
        yield part


def _segments(data: bytes) -> Iterator[bytes]:
    """A JPEG's segments, each with its marker; the last one is the first scan and everything after it."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0, 0xFF, 1) or 0xD0 <= marker <= 0xD8:  # padding, and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
        if marker == 0xDA or end > len(data) or marker == 0xD9:
            yield data[at:]
            return
        yield data[at:end]
        at = end


def _is_frame(marker: int) -> bool:
    return 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)


def _webp(data: bytes, optional: bool) -> Iterator[bytes]:
    """The chunks that pixels are made of, and a VP8X header without flags for the others."""
    pixels = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
    chunks, at = [], 12
    while at + 8 <= len(data):
        fourcc, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + size + size % 2
        is_whole = at + 8 + size <= len(data)
        if fourcc == b"VP8X" and size >= 10 and is_whole:
            flags = data[at + 8] & (0b11010 if optional else 0b10010)  # alpha and animation, optionally EXIF
            chunks.append(data[at : at + 8] + bytes([flags]) + data[at + 9 : end])
        elif fourcc in pixels or (optional and fourcc == b"EXIF" and is_whole):
            chunks.append(data[at:end])
        if is_whole and end > len(data) and chunks:  # padding that some encoders forget
            chunks[-1] += b"\0" * (len(chunks[-1]) % 2)
        at = end
    content = b"WEBP" + b"".join(chunks)
    yield b"RIFF" + struct.pack("<I", len(content)) + content


def _gif(data: bytes, optional: bool) -> Iterator[bytes]:
    """The frames with their graphic control extensions; whatever follows the last whole frame is copied as it is."""
    at = 13 + _colors(data[10:11])
    yield data[:at]
    while at < len(data):
        if data[at] == 0x21:
            end = _blocks_end(data, at + 2)
            if data[at + 1 : at + 2] == b"\xf9" and data[at + 2 : at + 3] == b"\4":
                yield data[at:end]
        elif data[at] == 0x2C:
            end = _blocks_end(data, at + 11 + _colors(data[at + 9 : at + 10]))
            yield data[at:end]
        else:
            break
        at = end
    yield data[at:]


def _colors(flags: bytes) -> int:
    """The size in bytes of a GIF's color table."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 128 else 0


def _blocks_end(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += 1 + data[at]
    return at + 1


_FORMATS: tuple[tuple[bytes, Callable[[bytes, bool], Iterator[bytes]]], ...] = (
    (_PNG, _png),
    (b"\xff\xd8\xff", _jpeg),
    (b"RIFF", _webp),
    (b"GIF8", _gif),
)
