"""Files of which each line is a JSON value, whoever wrote them: no line takes more memory than `limits` allows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from llava_cli import bounded_json, limits


def bounded(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, with their ends. One that is too long for `parse` is the last, and not all of it."""
    while line := file.readline(limits.ROW_BYTES + 1):
        yield line
        if is_too_long(line):
            return


def is_too_long(line: bytes | bytearray) -> bool:
    return len(line) > limits.ROW_BYTES


def parse(line: bytes) -> Any:
    """A line's value. Raises `bounded_json.TooMuch` where it exceeds the limits, another `ValueError` for no JSON."""
    bounds = bounded_json.Bounds(limits.ROW_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
    return bounded_json.loads(line, bounds)
