"""Temporary files on disk, for what may be more than fits in memory."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import IO

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
    with scratch_folder() as folder, open(folder / "scratch", "w+b") as file:
        try:
            yield file
        except OSError as error:
            raise OutputError(tempfile.gettempdir(), os_reason(error), _ELSEWHERE) from None


def scratch_error(error: sqlite3.Error) -> OutputError:
    """The user's error for one of the database: mostly a full disk."""
    return OutputError(tempfile.gettempdir(), str(error), _ELSEWHERE)
