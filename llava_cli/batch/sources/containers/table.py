"""Pictures in a column of a Parquet or Arrow table; its other columns are what is said of them.

pyarrow is C++ on a stranger's bytes, so it runs in a sandboxed process (`table_job.py`), which gets the file's bytes
from here.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava_cli import limits
from llava_cli.batch.roots import resolve_below
from llava_cli.batch.sources.containers import table_job as job
from llava_cli.batch.sources.containers.archive_file import ArchiveFile
from llava_cli.batch.sources.containers.container import Entry, OpenFile
from llava_cli.batch.sources.question_keys import meant_key, shown
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import BadData, BadImage, InputMissing, LlavaError
from llava_cli.images.local_file import shown_name, too_large
from llava_cli.sandbox.process import Worker, WorkerDied, WorkerLate
from llava_cli.untrusted_text import one_line, printable

_JOB = "llava_cli.batch.sources.containers.table_job"
_REPLY = Bounds(2 * job.LISTED_ROWS * limits.CONTEXT_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
_ATTEMPTS = 2
"""Of a request: a process may have been at the end of its computing time."""
_MAX_NAMES = 8
"""Columns that a message lists."""
_PICTURE_NAMES = ("jpg", "jpeg", "png", "webp", "image_bytes", "img_bytes", "photo_bytes", "image_data")
"""What columns of pictures are called besides the synonyms of a questions file."""
_NO_ROW = "has no such row"


class Table:
    """Pictures in a table, named by the numbers of their rows from 0, or by their paths where it has only those."""

    readers = 1

    def __init__(self, name: str, open_file: OpenFile, format_: str, folder: str | None) -> None:
        """`folder` is where the paths in it begin and stay below; None where it may name none.

        Raises `BadData` if it has no column of pictures, or cannot be read.
        """
        if find_spec("pyarrow") is None:
            raise BadData(printable(name), "a table in columns, which pyarrow reads", "pip install 'llava-cli[tables]'")
        self._name, self._folder = printable(name), folder
        self._file, self._format = ArchiveFile(self._name, open_file), format_
        self._worker = Worker(_JOB, limits.TABLE_MEMORY, has_threads=True)
        self._lock = threading.Lock()
        self._opened = 0
        """The process that has opened it, by `Worker.starts`."""
        self._columns = self._named_columns()
        self._picture = self._column_of_pictures()
        self.has_paths = self._columns[self._picture] == job.TEXT
        self.has_questions = self._columns.get("question") == job.TEXT
        self._nothing = 0

    def entries(self) -> Iterator[Entry]:
        """A row without a picture is counted and left out only where it is named by its path."""
        columns = [
            name for name, kind in self._columns.items() if kind in (job.TEXT, job.SCALAR) and name != self._picture
        ]
        request = {"do": "list", "columns": columns, "path": self._picture if self.has_paths else None}
        number = nothing = 0
        while rows := self._ask_json(request | {"first": number}):
            for path, row in rows:
                if self.has_paths and (not path or "\0" in path):
                    nothing += 1
                else:
                    yield Entry(path if self.has_paths else str(number), row)
                number += 1
        self._nothing = nothing

    def read(self, name: str) -> bytes | Path:
        if self.has_paths:
            return self._path(name)
        if not (name.isascii() and name.isdecimal() and len(name) < 19):
            raise InputMissing(shown_name(name), f"is no row of {self._name}")
        try:
            reply = self._ask({"do": "picture", "row": int(name), "column": self._picture}, limits.PICTURE_BYTES)
        except BadData as error:
            if error.reason == "too large":
                raise too_large(f"{self._name}, row {name}") from None
            if error.reason == _NO_ROW:
                raise InputMissing(shown_name(name), f"is no row of {self._name}") from None
            raise BadImage(shown_name(name), f"damaged in {self._name}: {error.reason}") from None
        if reply[:1] == job.BYTES_REPLY:
            return bytes(reply[1:])
        path = self._parsed(reply)
        if isinstance(path, str) and path:
            return self._path(path)
        raise InputMissing(shown_name(name), f"has no picture in {self._name}")

    def note(self) -> str:
        return f"rows without a picture: {self._nothing:,}" if self._nothing else ""

    def close(self) -> None:
        self._worker.end()
        self._file.close()

    def _path(self, path: str) -> Path:
        """A picture's file below the folder. Raises `InputMissing`."""
        if self._folder is None:
            raise InputMissing(shown_name(path), f"is not in {self._name}, which has only its path")
        if (real := resolve_below(os.path.join(self._folder, path), self._folder or os.curdir)) is None:
            reason = f"is outside {printable(self._folder) or 'the current folder'}"
            raise InputMissing(shown_name(path), reason, "--root FOLDER names another root")
        return Path(real)

    def _named_columns(self) -> dict[str, str]:
        with self._lock:
            columns = self._open()
        is_right = isinstance(columns, list) and all(
            isinstance(column, list) and len(column) == 2 and all(isinstance(word, str) for word in column)
            for column in columns
        )
        if not is_right:
            raise self._damaged("it is read as nothing")
        if len(columns) > limits.TABLE_COLUMNS:
            raise self._damaged(f"it has more than {limits.TABLE_COLUMNS:,} columns")
        return dict(columns)

    def _column_of_pictures(self) -> str:
        """The column with the pictures. Raises `BadData` if there is none, or more than one that it may be."""
        for kinds, must_be_called_so in (((job.BYTES, job.STRUCT), False), ((job.TEXT,), True)):
            fitting = [name for name, kind in self._columns.items() if kind in kinds]
            called_so = [name for name in fitting if meant_key(name) == "image" or name in _PICTURE_NAMES]
            for found in (called_so if must_be_called_so else fitting, called_so, [n for n in fitting if n == "image"]):
                if len(found) == 1:
                    return found[0]
            if fitting and (called_so or not must_be_called_so):
                raise self._unclear("it is not clear which column has the pictures", called_so or fitting)
        raise self._unclear("none of its columns has pictures", list(self._columns))

    def _unclear(self, reason: str, names: list[str]) -> BadData:
        columns = ", ".join(shown(name) for name in names[:_MAX_NAMES]) + (" …" if len(names) > _MAX_NAMES else "")
        hint = f"call it image: duckdb -c \"COPY (SELECT NAME AS image, * FROM '{self._name}') TO 'named.parquet'\""
        return BadData(self._name, f"{reason}: {columns}", hint)

    def _damaged(self, reason: str) -> BadData:
        sentence = one_line(reason, 200).partition(". ")[0].rstrip(".")
        return BadData(self._name, f"damaged: {sentence[:1].lower()}{sentence[1:]}", "load it again")

    def _ask_json(self, request: dict[str, Any]) -> Any:
        try:
            rows = self._parsed(self._ask(request, _REPLY.bytes))
        except BadData as error:
            raise self._damaged(error.reason) from None
        is_right = isinstance(rows, list) and all(
            isinstance(row, list)
            and len(row) == 2
            and isinstance(row[0], (str, type(None)))
            and isinstance(row[1], (dict, type(None)))
            for row in rows
        )
        if not is_right:
            raise self._damaged("it is read as nothing")
        return rows

    def _parsed(self, reply: bytes) -> Any:
        try:
            return loads(bytes(reply[1:]), _REPLY)
        except ValueError:
            raise self._damaged("it is read as nothing") from None

    def _ask(self, request: dict[str, Any], most: int) -> bytes:
        """The reply to a request. Raises `BadData` with pyarrow's reason, or if its process crashes."""
        with self._lock:
            for attempt in range(_ATTEMPTS):
                try:
                    if self._opened != self._worker.starts or not self._worker.is_running:
                        self._open()
                    return self._exchange(request, most)
                except WorkerDied:
                    if attempt + 1 == _ATTEMPTS:
                        raise BadData(self._name, "crashes its reader") from None
                except WorkerLate:
                    raise BadData(self._name, f"takes longer than {limits.TABLE_SECONDS:.0f} s to read") from None
        raise AssertionError("unreachable")

    def _open(self) -> Any:
        try:
            reply = self._exchange({"do": "open", "format": self._format, "size": self._file.size()}, _REPLY.bytes)
        except BadData as error:
            raise self._damaged(error.reason) from None
        except (WorkerDied, WorkerLate):
            raise self._damaged("it crashes its reader") from None
        self._opened = self._worker.starts
        return self._parsed(reply)

    def _exchange(self, request: dict[str, Any], most: int) -> bytes:
        """Sends a request, and the parts of the file that the process asks for until it has the answer."""
        message, deadline = json.dumps(request).encode(), time.monotonic() + limits.TABLE_SECONDS
        process = None
        while (left := deadline - time.monotonic()) > 0:
            reply = bytes(self._worker.ask((message,), most + 1, left))
            if process not in (None, self._worker.starts):  # another one, which took the bytes for a request
                raise WorkerDied
            process = self._worker.starts
            if reply[:1] == job.ERROR:
                raise BadData(self._name, one_line(reply[1:].decode("utf-8", "replace"), 200))
            if reply[:1] != job.READ:
                return reply
            message = self._bytes_for(reply[1:])
        self._worker.end()  # it waits for bytes
        raise WorkerLate(f"{limits.TABLE_SECONDS:.0f}")

    def _bytes_for(self, span: bytes) -> bytes:
        """The bytes that the process asks for. If they cannot be read, it is ended, since it would wait for them."""
        try:
            offset, count = job.SPAN.unpack(span)
            return self._file.read_at(min(offset, 1 << 62), min(count, limits.TABLE_READ_BYTES))
        except LlavaError:
            self._worker.end()
            raise
        except struct.error:
            self._worker.end()
            raise WorkerDied from None
