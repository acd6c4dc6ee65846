"""Bytes of any encoding that has a byte-order mark, with any line ends, as UTF-8 with LF, while they are read."""

from __future__ import annotations

import codecs
import io
from collections.abc import Callable, Iterator
from typing import IO, Any

from llava_cli.batch.lines import is_too_long

READ_BYTES = 65_536
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16-LE, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
Filter = Callable[[bytes, bool], bytes]
"""Transforms the next bytes of a stream; the second argument says whether these are the last."""


def decode_head(head: bytes) -> tuple[bytes, str, bytes]:
    """The byte-order mark at the beginning of a file (or none), its encoding, and the rest of `head` as UTF-8."""
    mark, encoding = next(((mark, encoding) for mark, encoding in _MARKS if head.startswith(mark)), (b"", "utf-8"))
    text = head[len(mark) :]
    return mark, encoding, text if encoding == "utf-8" else text.decode(encoding, "ignore").encode("utf-8", "ignore")


class FilteredStream(io.RawIOBase):
    """A `head` and what `read` returns after it, passed through filters."""

    def __init__(self, head: bytes, read: Callable[[], bytes], filters: list[Filter]) -> None:
        self._head, self._read, self._filters = head, read, filters
        self._buffer, self._is_at_end = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._buffer and not self._is_at_end:
            data, self._head = self._head or self._read(), b""
            self._is_at_end = not data
            for apply in self._filters:
                data = apply(data, self._is_at_end)
            self._buffer = data
        data, self._buffer = self._buffer[: len(buffer)], self._buffer[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def skip_bytes(count: int) -> Filter:
    """Removes the first bytes of a stream, such as a mark."""

    def skip(data: bytes, is_last: bool) -> bytes:
        nonlocal count
        count, data = max(count - len(data), 0), data[count:]
        return data

    return skip


def recode(encoding: str) -> Filter:
    """From an encoding to UTF-8. Raises `UnicodeError`."""
    decoder = codecs.getincrementaldecoder(encoding)()
    return lambda data, is_last: decoder.decode(data, is_last).encode()


def cr_to_lf(data: bytes, is_last: bool) -> bytes:
    """Line ends of classic Mac OS."""
    return data.replace(b"\r", b"\n")


def split(file: IO[bytes], separator: bytes) -> Iterator[bytes]:
    """What is between separators, as soon as it is read. After an item that `is_too_long`, which is cut, it stops."""
    rest = bytearray()
    read = getattr(file, "read1", file.read)
    while (chunk := read(READ_BYTES)) and not is_too_long(rest):
        first, *others = chunk.split(separator)
        rest += first
        if others:
            yield bytes(rest)
            yield from others[:-1]
            rest = bytearray(others[-1])
    if rest:
        yield bytes(rest)
