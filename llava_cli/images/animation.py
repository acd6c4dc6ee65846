"""How long an animation takes, from what its file says of each frame: no frame is decoded.

Formats: GIF89a, the PNG specification (fcTL), WebP's container (ANMF), and ISO/IEC 14496-12 (mdhd) for AVIF and HEIF.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

_PNG, _GIF = b"\x89PNG\r\n\x1a\n", b"GIF8"
_BOXES_OF_BOXES = (b"moov", b"trak", b"mdia")


def seconds_of(data: bytes) -> float:
    """Seconds from its first frame to the end of its last one; 0 for what is no animation, or does not say."""
    for magic, offset, frames in _FORMATS:
        if data.startswith(magic, offset):
            try:
                return float(sum(frames(data)))
            except (struct.error, IndexError):  # cut off, which decoding will say
                return 0.0
    return 0.0


def _gif(data: bytes) -> Iterator[float]:
    """The delays of graphic control extensions, in hundredths of a second."""
    at = 13 + _colors(data[10])
    while at < len(data) and data[at] in (0x21, 0x2C):
        if data[at] == 0x2C:
            at += 11 + _colors(data[at + 9])
        else:
            if data[at + 1 : at + 3] == b"\xf9\4":
                yield int(struct.unpack_from("<H", data, at + 4)[0]) / 100
            at += 2
        while data[at]:
            at += 1 + data[at]
        at += 1


def _colors(flags: int) -> int:
    """The size in bytes of a color table."""
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _png(data: bytes) -> Iterator[float]:
    """The delays of frame control chunks: a fraction whose denominator 0 stands for 100."""
    at = len(_PNG)
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"fcTL":
            number, parts = struct.unpack_from(">HH", data, at + 8 + 20)
            yield number / (parts or 100)
        at += 12 + size


def _webp(data: bytes) -> Iterator[float]:
    """The durations of frames, in milliseconds."""
    at = 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        if kind == b"ANMF":
            yield int.from_bytes(data[at + 8 + 12 : at + 8 + 15], "little") / 1000
        at += 8 + size + size % 2


def _iso(data: bytes) -> Iterator[float]:
    """The duration of the first track, which is that of the pictures; others are of their transparency."""
    inside = [(0, len(data))]
    while inside:
        at, end = inside.pop()
        while at + 8 <= end:
            size, kind = struct.unpack_from(">I4s", data, at)
            if size == 1:
                size = int(struct.unpack_from(">Q", data, at + 8)[0])
            size = size or end - at
            if size < 8:
                break
            if kind == b"mdhd":
                layout = ">16xIQ" if data[at + 8] else ">8xII"  # behind the version: times, time scale, duration
                scale, duration = struct.unpack_from(layout, data, at + 12)
                yield duration / scale if scale else 0.0
                return
            if kind in _BOXES_OF_BOXES:
                inside.append((at + size, end))
                end = min(at + size, end)
                size = 8
            at += size


_FORMATS: tuple[tuple[bytes, int, Callable[[bytes], Iterator[float]]], ...] = (
    (_GIF, 0, _gif),
    (_PNG, 0, _png),
    (b"WEBP", 8, _webp),
    (b"ftyp", 4, _iso),
)
