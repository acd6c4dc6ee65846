"""A temporary database on disk, for what may be more than fits in memory."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager

from llava_cli.errors import OutputError
from llava_cli.paths import scratch_folder


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


def scratch_error(error: sqlite3.Error) -> OutputError:
    """The user's error for one of the database: mostly a full disk."""
    return OutputError(tempfile.gettempdir(), str(error), "TMPDIR=FOLDER llava … puts it elsewhere")
