"""A file, a pipe or stdin that lists pictures or questions: judged by how it begins, read as lines of UTF-8.

Lists come from everywhere: with a mark of their encoding or without one, with the ends of lines of any system.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum, auto
from functools import cached_property
from typing import IO, Any

from llava_cli import files, limits
from llava_cli.batch import foreign_files
from llava_cli.batch.lines import is_too_long
from llava_cli.errors import BadData, InputMissing, UsageError
from llava_cli.untrusted_text import printable

STDIN = "-"
_PIECE = 65_536
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which is its beginning
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_OBJECT = re.compile(rb'\s*\{\s*(["}]|$)')
_ARRAY = re.compile(rb'\s*\[\s*([\[{"\]]|$)')
_ROWS_INSIDE = re.compile(rb'"(\w+)"\s*:\s*\[\s*\{')
_DELIMITERS = ",;\t|"


class Layout(Enum):
    """What there is behind a SOURCE that is no folder."""

    PICTURE = auto()
    PATHS = auto()
    JSON_LINES = auto()
    JSON_ARRAY = auto()
    TABLE = auto()
    """CSV, or its like, with a line of names at its top."""


class Listing:
    """What is behind a SOURCE that is no folder. `null` says that paths end in NUL.

    Its first bytes are read once something is asked of it. A pipe can be read once only, a file more than once.
    """

    def __init__(self, source: str, null: bool = False) -> None:
        self.source, self.null = source, null
        self.name = printable(source)
        self.typed = "FILE" if source == STDIN else files.quoted(source)
        """As it stands in the commands that errors propose."""

    @cached_property
    def is_stream(self) -> bool:
        """Whether it comes through a pipe, or stdin. Raises `InputMissing` for a device, or what is not there."""
        if self.source == STDIN:
            return True
        try:
            mode = os.stat(self.source).st_mode
        except (OSError, ValueError) as error:
            raise self._missing(error) from None
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise InputMissing(self.name, "neither a file nor a folder or a pipe")
        return stat.S_ISFIFO(mode)

    @cached_property
    def layout(self) -> Layout:
        """What there is in it. Raises `BadData` where that is nothing of ours, and says what to do with it."""
        if self.is_stream and foreign_files.is_picture(b"", self.source):
            return Layout.PICTURE  # whoever opens it says that it is no file; to read it might never end
        if foreign_files.is_picture(self._raw, self.source):
            return Layout.PICTURE
        mark, text = _decoded(self._raw)
        if not mark and (found := foreign_files.foreign(self._raw, self.source, self.null)):
            raise BadData(self.name, *found)
        name = self.source.lower()
        if name.endswith(foreign_files.JSON_LINES):
            return Layout.JSON_LINES
        if self.null:
            self._check_nulls()
            return Layout.PATHS
        if _OBJECT.match(text):
            self._check_object(text)
            return Layout.JSON_LINES
        if name.endswith(".json") or _ARRAY.match(text):
            return Layout.JSON_ARRAY
        return Layout.TABLE if name.endswith((".csv", ".tsv")) or self._has_columns() else Layout.PATHS

    @property
    def is_questions(self) -> bool:
        return self.layout in (Layout.JSON_LINES, Layout.JSON_ARRAY, Layout.TABLE)

    @property
    def rows_inside(self) -> str:
        """The command that takes rows out of one JSON value, as far as its beginning tells that there are any."""
        text = _decoded(self._raw)[1]
        inside = _ROWS_INSIDE.search(text)
        rows = ".[]" if _ARRAY.match(text) else f".{inside[1].decode()}[]" if inside else ""
        return f"jq -c '{rows}' {self.typed} | llava batch - …" if rows else ""

    @property
    def delimiter(self) -> str:
        """What is between the columns of a table."""
        return max(_DELIMITERS, key=self._first_line.count)

    def paths(self) -> Iterator[str]:
        """The paths of a list, as soon as they are there. Raises `BadData` for one that is too long."""
        with self.lines() as file:
            for path in _split(file, b"\0" if self.null else b"\n"):
                if is_too_long(path):
                    reason = f"a path in it is longer than {limits.ROW_BYTES:,} bytes"
                    raise BadData(self.name, reason, "-0 says that paths end in NUL")
                if path := path if self.null else path.rstrip(b"\r"):
                    yield os.fsdecode(path)

    @contextmanager
    def lines(self) -> Iterator[IO[bytes]]:
        """All of it, without a mark, in UTF-8 where a mark names another encoding, in lines that end in LF.

        Reading raises `BadData` for what is not in the encoding that its mark names.
        """
        mark, text = _decoded(self._raw)
        steps: list[_Step] = [_without(mark)]
        if mark and (encoding := dict(_MARKS)[mark]) != "utf-8":
            steps.append(self._recoder(encoding))
        if b"\r" in text and b"\n" not in text and not self.null:
            steps.append(lambda data, end: data.replace(b"\r", b"\n"))
        head, rest = self._opened if self.is_stream else (b"", self._open())
        closing: AbstractContextManager[Any] = nullcontext() if self.source == STDIN else rest
        with closing, io.BufferedReader(_Stream(head, self._reader(rest), steps), _PIECE) as file:
            yield file

    # How it begins.

    @cached_property
    def _raw(self) -> bytes:
        if self.is_stream:
            return self._opened[0]
        with self._open() as file:
            return file.read(foreign_files.HEAD_BYTES)

    @cached_property
    def _opened(self) -> tuple[bytes, IO[bytes]]:
        """What a stream begins with, as far as it takes to judge it, and the rest."""
        file = self._open()
        read = self._reader(file)
        head = b""
        while len(head) < foreign_files.HEAD_BYTES and not self._is_enough(head) and (data := read()):
            head += data
        return head, file

    def _is_enough(self, head: bytes) -> bool:
        text = _decoded(head)[1].lstrip()
        return b"\0" in text or (b"\n" in text and not self.null)

    @cached_property
    def _first_line(self) -> str:
        return re.split(rb"[\r\n]", _decoded(self._raw)[1].lstrip(), maxsplit=1)[0].decode("utf-8", "replace")

    def _check_nulls(self) -> None:
        """Raises `UsageError` for a list whose paths end in line ends, not in NUL."""
        head = self._raw
        if b"\n" in head.strip() and b"\0" not in head and not os.path.lexists(os.fsdecode(head)):
            raise UsageError("-0", f"the paths of {self.name} end in line ends, not in NUL", "leave out -0")

    def _check_object(self, text: bytes) -> None:
        """Raises `BadData` for JSON that takes several lines."""
        line, end, _ = text.lstrip().partition(b"\n")
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            if end:
                reason = "JSON over several lines, not one object a line"
                hint = self.rows_inside or f"jq -c . {self.typed} | llava batch - …"
                raise BadData(self.name, reason, hint) from None

    def _has_columns(self) -> bool:
        """Whether the first line names columns, and one of them is what each table of ours has."""
        names = {name.strip(' "').lower() for name in self._first_line.split(self.delimiter)}
        return "image" in names and len(names) > 1

    # Its bytes.

    def _open(self) -> IO[bytes]:
        if self.source == STDIN:
            return sys.stdin.buffer
        try:
            return open(self.source, "rb")
        except OSError as error:
            raise self._missing(error) from None

    def _reader(self, file: IO[bytes]) -> Callable[[], bytes]:
        """Reads what is there, at once, of a file."""
        read = getattr(file, "read1", file.read)

        def some() -> bytes:
            try:
                return bytes(read(_PIECE))
            except OSError as error:  # stdin may be a folder
                raise self._missing(error) from None

        return some

    def _recoder(self, encoding: str) -> _Step:
        decoder = codecs.getincrementaldecoder(encoding)()

        def recode(data: bytes, end: bool) -> bytes:
            try:
                return decoder.decode(data, end).encode()
            except UnicodeError:
                raise BadData(self.name, f"damaged: it is not in {encoding.upper()}, as its mark says") from None

        return recode

    def _missing(self, error: Exception) -> InputMissing:
        return InputMissing(self.name, (getattr(error, "strerror", None) or str(error)).lower())


_Step = Callable[[bytes, bool], bytes]
"""Takes the next bytes, and whether they are the last; gives what becomes of them."""


class _Stream(io.RawIOBase):
    """A head and what is read after it, as some steps make it."""

    def __init__(self, head: bytes, read: Callable[[], bytes], steps: list[_Step]) -> None:
        self._head, self._read, self._steps = head, read, steps
        self._ready, self._ended = b"", False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._ended:
            data, self._head = self._head or self._read(), b""
            self._ended = not data
            for step in self._steps:
                data = step(data, self._ended)
            self._ready = data
        data, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)


def _without(mark: bytes) -> _Step:
    """Leaves out a mark, however it comes in pieces."""
    left = len(mark)

    def skip(data: bytes, end: bool) -> bytes:
        nonlocal left
        left, data = max(left - len(data), 0), data[left:]
        return data

    return skip


def _decoded(head: bytes) -> tuple[bytes, bytes]:
    """The mark that a file begins with, if there is one, and what follows it, in UTF-8."""
    mark, encoding = next(((mark, encoding) for mark, encoding in _MARKS if head.startswith(mark)), (b"", "utf-8"))
    text = head[len(mark) :]
    return mark, text if encoding == "utf-8" else text.decode(encoding, "ignore").encode("utf-8", "ignore")


def _split(file: IO[bytes], end: bytes) -> Iterator[bytes]:
    """What stands between the ends, without them, as soon as it is there. What is too long is the last, in part."""
    rest = bytearray()
    read = getattr(file, "read1", file.read)
    while (chunk := read(_PIECE)) and not is_too_long(rest):
        first, *more = chunk.split(end)
        rest += first
        if more:
            yield bytes(rest)
            yield from more[:-1]
            rest = bytearray(more[-1])
    if rest:
        yield bytes(rest)
