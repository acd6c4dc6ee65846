"""A file, a pipe or stdin that lists pictures or questions: its kind is known by its first bytes."""

from __future__ import annotations

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
from llava_cli.batch.lines import is_too_long
from llava_cli.batch.sources import foreign_files
from llava_cli.batch.sources.text_stream import (
    READ_BYTES,
    Filter,
    FilteredStream,
    cr_to_lf,
    decode_head,
    recode,
    skip_bytes,
    split,
)
from llava_cli.errors import BadData, InputMissing, UsageError, os_reason
from llava_cli.untrusted_text import printable

STDIN = "-"
_OBJECT = re.compile(rb'\s*\{\s*(["}]|$)')
_ARRAY = re.compile(rb'\s*\[\s*([\[{"\]]|$)')
_NESTED_ROWS = re.compile(rb'"(\w+)"\s*:\s*\[\s*\{')
_DELIMITERS = ",;\t|"


class Layout(Enum):
    """What a SOURCE that is not a folder contains."""

    PICTURE = auto()
    PATHS = auto()
    JSON_LINES = auto()
    JSON_ARRAY = auto()
    TABLE = auto()
    """CSV or the like, with column names in its first line."""


class Listing:
    """A SOURCE that is not a folder; with `null` its paths end in NUL.

    Its first bytes are read when they are needed. A file can be read any number of times, a pipe only once.
    """

    def __init__(self, source: str, null: bool = False) -> None:
        self.source, self.null = source, null
        self.name = printable(source)
        self.typed = "FILE" if source == STDIN else files.quoted(source)
        """How to write it in the commands that errors suggest."""

    def __getstate__(self) -> dict[str, Any]:
        """What another process can use: not what is open, or was read from a pipe."""
        return {name: value for name, value in vars(self).items() if name not in ("_stream", "_head", "_first_line")}

    @cached_property
    def is_stream(self) -> bool:
        """Whether it is a pipe or stdin. Raises `InputMissing` for a device, or if it does not exist."""
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
        """What it contains. Raises `BadData`, with a hint for the conversion, if that is something else."""
        if self.is_stream and foreign_files.is_picture(b"", self.source):
            return Layout.PICTURE  # not read, since that might never end; opening it fails with the right error
        if foreign_files.is_picture(self._head, self.source):
            return Layout.PICTURE
        mark, _, text = decode_head(self._head)
        if not mark and (problem := foreign_files.foreign(self._head, self.source, self.null)):
            raise BadData(self.name, *problem)
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
    def nested_rows_hint(self) -> str:
        """The command that extracts rows from a single JSON value; empty if its beginning shows no rows."""
        text = self._text
        nested = _NESTED_ROWS.search(text)
        rows = ".[]" if _ARRAY.match(text) else f".{nested[1].decode()}[]" if nested else ""
        return f"jq -c '{rows}' {self.typed} | llava batch - …" if rows else ""

    @property
    def delimiter(self) -> str:
        """What separates the columns of a table: most frequent in its first line, outside of quotes."""
        names = re.sub(r'"(?:[^"]|"")*"', "", self._first_line)
        return "\t" if self.source.lower().endswith(".tsv") else max(_DELIMITERS, key=names.count)

    def paths(self) -> Iterator[str]:
        """The paths of a list, as they arrive. Raises `BadData` for one that is too long."""
        with self.open_text() as file:
            for path in split(file, b"\0" if self.null else b"\n"):
                if is_too_long(path):
                    reason = f"a path in it is longer than {limits.ROW_BYTES:,} bytes"
                    raise BadData(self.name, reason, "-0 says that paths end in NUL")
                if path := path if self.null else path.rstrip(b"\r"):
                    yield os.fsdecode(path)

    @contextmanager
    def open_text(self) -> Iterator[IO[bytes]]:
        """The whole file without its byte-order mark, in UTF-8, with lines that end in LF.

        Reading raises `BadData` if the file is not in the encoding of its mark.
        """
        mark, encoding, text = decode_head(self._head)
        filters = [skip_bytes(len(mark))]
        if encoding != "utf-8":
            filters.append(self._checked_recode(encoding))
        if b"\r" in text and b"\n" not in text and not self.null:
            filters.append(cr_to_lf)
        head, rest = self._stream if self.is_stream else (b"", self._open())
        closing: AbstractContextManager[Any] = nullcontext() if self.source == STDIN else rest
        with closing, io.BufferedReader(FilteredStream(head, self._reader(rest), filters), READ_BYTES) as file:
            yield file

    @cached_property
    def _head(self) -> bytes:
        """The first bytes, at most `foreign_files.HEAD_BYTES`."""
        if self.is_stream:
            return self._stream[0]
        with self._open() as file:
            return file.read(foreign_files.HEAD_BYTES)

    @cached_property
    def _stream(self) -> tuple[bytes, IO[bytes]]:
        """The head of a pipe, no longer than its kind needs, and the pipe behind it."""
        file = self._open()
        read = self._reader(file)
        head = b""
        while len(head) < foreign_files.HEAD_BYTES and not self._has_first_item(head) and (data := read()):
            head += data
        return head, file

    def _has_first_item(self, head: bytes) -> bool:
        text = decode_head(head)[2].lstrip()
        return b"\0" in text or (b"\n" in text and not self.null)

    @property
    def _text(self) -> bytes:
        """The head in UTF-8."""
        return decode_head(self._head)[2]

    @cached_property
    def _first_line(self) -> str:
        return re.split(rb"[\r\n]", self._text.lstrip(), maxsplit=1)[0].decode("utf-8", "replace")

    def _check_nulls(self) -> None:
        """Raises `UsageError` for a list whose paths end in line ends, not in NUL."""
        head = self._head
        if b"\n" in head.strip() and b"\0" not in head and not os.path.lexists(os.fsdecode(head)):
            raise UsageError("-0", f"the paths of {self.name} end in line ends, not in NUL", "leave out -0")

    def _check_object(self, text: bytes) -> None:
        """Raises `BadData` for an object that spans several lines."""
        line, end, _ = text.lstrip().partition(b"\n")
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            if end:
                reason = "JSON over several lines, not one object a line"
                hint = self.nested_rows_hint or f"jq -c . {self.typed} | llava batch - …"
                raise BadData(self.name, reason, hint) from None

    def _has_columns(self) -> bool:
        """Whether the first line has several column names, among them "image"."""
        names = {name.strip(' "').lower() for name in self._first_line.split(self.delimiter)}
        return "image" in names and len(names) > 1

    def _open(self) -> IO[bytes]:
        if self.source == STDIN:
            return sys.stdin.buffer
        try:
            return open(self.source, "rb")
        except OSError as error:
            raise self._missing(error) from None

    def _reader(self, file: IO[bytes]) -> Callable[[], bytes]:
        """A function that returns the bytes that have arrived, without waiting for more."""
        read = getattr(file, "read1", file.read)

        def read_available() -> bytes:
            try:
                return bytes(read(READ_BYTES))
            except OSError as error:  # stdin may be a folder
                raise self._missing(error) from None

        return read_available

    def _checked_recode(self, encoding: str) -> Filter:
        to_utf8 = recode(encoding)

        def checked(data: bytes, is_last: bool) -> bytes:
            try:
                return to_utf8(data, is_last)
            except UnicodeError:
                raise BadData(self.name, f"damaged: it is not in {encoding.upper()}, as its mark says") from None

        return checked

    def _missing(self, error: Exception) -> InputMissing:
        return InputMissing(self.name, os_reason(error))
