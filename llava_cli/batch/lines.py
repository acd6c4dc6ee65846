"""JSON lines from anybody: no line takes more memory than `limits` allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from llava_cli import bounded_json, limits


def bounded_lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, with their ends. After a line that `is_too_long`, of which only a part is read, it stops."""
    while line := file.readline(limits.ROW_BYTES + 1):
        yield line
        if is_too_long(line):
            return


def is_too_long(line: bytes | bytearray) -> bool:
    return len(line) > limits.ROW_BYTES


def parse_line(line: bytes) -> Any:
    """A line's JSON value. Raises `bounded_json.TooMuch` if it exceeds the limits, or another `ValueError`."""
    bounds = bounded_json.Bounds(limits.ROW_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
    return bounded_json.loads(line, bounds)
