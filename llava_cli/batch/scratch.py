"""Temporary files on disk, for what may be more than fits in memory."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import IO, Any

from llava_cli import files
from llava_cli.errors import OutputError, os_reason
from llava_cli.paths import scratch_folder

_ELSEWHERE = "TMPDIR=FOLDER llava … puts it elsewhere"


@contextmanager
def scratch_database() -> Iterator[sqlite3.Connection]:
    """A temporary database that keeps at most 8 MB in memory. Raises `OutputError`."""
    with scratch_folder() as folder:
        try:
            with closing(sqlite3.connect(folder / "scratch.db", check_same_thread=False)) as database:
                database.executescript("pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -8000")
                yield database
        except sqlite3.Error as error:
            raise scratch_error(error) from None


@contextmanager
def scratch_file() -> Iterator[IO[bytes]]:
    """A temporary file, open to be written and read. Raises `OutputError`, also where the block cannot write it."""
    with scratch_folder() as folder, _os_errors(), open(folder / "scratch", "w+b") as file:
        yield file


class Spool:
    """Lists of what JSON can hold, in a temporary file; for any number of threads. Methods raise `OutputError`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._lock = file, threading.Lock()

    def add(self, items: Sequence[Any]) -> tuple[int, int]:
        """Writes a list; returns where it is."""
        data = json.dumps(items).encode()
        with self._lock, _os_errors():
            begin = self._file.seek(0, os.SEEK_END)
            files.write_all(self._file.fileno(), data)  # a buffer would fail again when it is closed
        return begin, len(data)

    def read(self, place: tuple[int, int]) -> list[Any]:
        begin, size = place
        with self._lock, _os_errors():
            self._file.seek(begin)
            return list(json.loads(self._file.read(size)))


@contextmanager
def scratch_spool() -> Iterator[Spool]:
    """A temporary file of lists. Raises `OutputError`."""
    with scratch_file() as file:
        yield Spool(file)


@contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(tempfile.gettempdir(), os_reason(error), _ELSEWHERE) from None


def scratch_error(error: sqlite3.Error) -> OutputError:
    """The user's error for one of the database: mostly a full disk."""
    return OutputError(tempfile.gettempdir(), str(error), _ELSEWHERE)
