"""JSON from untrusted sources, with bounds on bytes, depth and number of values that are checked before parsing.

Without them 2 MB of zeros would become a million objects, and 10 kB of brackets would overflow the stack.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_cli import limits

_SLICE = 1 << 20
_STRUCTURAL = b'"[]{},'
_OTHERS = bytes(byte for byte in range(256) if byte not in _STRUCTURAL)


@dataclass(frozen=True)
class Bounds:
    """The largest document that is accepted."""

    bytes: int
    depth: int
    items: int
    """The number of values; names of an object's members do not count."""


class TooMuch(ValueError):
    """A document exceeds its bounds; the message continues a sentence that begins with its name."""


class Scanner:
    """Counts values and depth while a document arrives, at 1 GB/s, without parsing it.

    Counts are wrong for what is not JSON, which the parser refuses anyway.
    """

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.bytes, self._items, self._depth = 0, 1, 0
        self._in_string, self._pending = False, b""

    def feed(self, data: bytes) -> None:
        """Counts the next bytes of the document. Raises `TooMuch`."""
        self.bytes += len(data)
        if self.bytes > self.bounds.bytes:
            raise TooMuch(f"larger than {_megabytes(self.bounds.bytes)}")
        marks = self._unescaped(data).translate(None, _OTHERS)
        parts = marks.split(b'"')
        outside = b"".join(parts[1 if self._in_string else 0 :: 2])
        self._in_string ^= len(parts) % 2 == 0
        opened = outside.count(b"[") + outside.count(b"{")
        self._items += outside.count(b",") + opened
        if self._items > self.bounds.items:
            raise TooMuch(f"more than {self.bounds.items:,} values")
        if self._depth + opened <= self.bounds.depth:
            self._depth += 2 * opened - len(outside.translate(None, b","))
            return
        for mark in outside.translate(None, b","):
            self._depth += 1 if mark in b"[{" else -1
            if self._depth > self.bounds.depth:
                raise TooMuch(f"nested deeper than {self.bounds.depth} levels")

    def _unescaped(self, data: bytes) -> bytes:
        """Removes escaped quotes and backslashes; keeps a backslash at the end until the next bytes arrive."""
        data, self._pending = self._pending + data, b""
        if b"\\" not in data:
            return data
        data = data.replace(b"\\\\", b"")
        if data.endswith(b"\\"):
            data, self._pending = data[:-1], b"\\"
        return data.replace(b'\\"', b"")


def loads(data: bytes, bounds: Bounds, parse: Callable[[str], Any] = json.loads) -> Any:
    """Parses a document. Raises `TooMuch` if it exceeds its bounds, another `ValueError` if it is not JSON in UTF-8."""
    scanner = Scanner(bounds)
    for start in range(0, len(data), _SLICE):
        scanner.feed(data[start : start + _SLICE])
    return parse(data.decode("utf-8-sig"))  # the parser would also take UTF-16, which was not counted


def parse_finite(text: str) -> Any:
    """JSON -> Python that JSON can be written of: a number beyond a double's range is the nearest one within it.

    Raises `ValueError` also for NaN and Infinity, which `json.loads` takes.
    """
    return json.loads(text, parse_float=_real, parse_int=_whole, parse_constant=_refused)


def _real(digits: str) -> float:
    return max(-sys.float_info.max, min(sys.float_info.max, float(digits)))


def _whole(digits: str) -> int:
    return int(digits) if len(digits) <= limits.NUMBER_CHARACTERS else int(_real(digits))


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _megabytes(size: int) -> str:
    return f"{size // 1_000_000} MB" if size >= 1_000_000 else f"{size:,} bytes"
