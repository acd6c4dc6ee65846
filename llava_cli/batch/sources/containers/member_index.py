"""Where the members of an archive are. The index is on disk: an archive may have millions of them."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from llava_cli import limits
from llava_cli.batch.lines import parse_line
from llava_cli.batch.scratch import scratch_database, scratch_error
from llava_cli.batch.sources.containers.container import Entry
from llava_cli.errors import BadData, InputMissing
from llava_cli.images.local_file import shown_name
from llava_cli.images.reader import is_url

MORE_THAN_ONCE = "members of the same name, of which the last one counts"
_PAGE = 1000
"""Entries that are in memory at a time."""


class Member(NamedTuple):
    """A picture in an archive: `stored` bytes at `offset`, which become `size` bytes."""

    name: str
    offset: int
    size: int
    stored: int
    method: int = 0
    """How it is compressed, in ZIP's numbers."""
    checksum: int | None = None
    """CRC-32 of its bytes."""
    is_encrypted: bool = False
    row: dict[str, Any] | None = None


class MemberIndex:
    """The members of one archive by name, in its order; of members with one name the last counts, as in unpacking."""

    def __init__(self, archive: str) -> None:
        self._archive = archive
        self._stack = ExitStack()
        self._database = self._stack.enter_context(scratch_database())
        self._lock = threading.Lock()
        self._database.execute(
            "create table member (place integer primary key, name blob unique, offset int, size int, stored int,"
            " method int, checksum int, encrypted int, row text)"
        )
        self.doubles = 0
        """How many members another one of the same name has replaced."""

    def fill(self, members: Iterable[Member]) -> None:
        """Takes in all members. Raises `BadData` if there are too many, `OutputError`, or what reading them raises."""
        insert = "insert or replace into member values (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        place = -1
        try:
            for place, member in enumerate(members):
                if place >= limits.ARCHIVE_MEMBERS:
                    raise BadData(self._archive, f"more than {limits.ARCHIVE_MEMBERS:,} pictures", "split it")
                name, *numbers, row = member
                text = None if row is None else json.dumps(row)
                self._database.execute(insert, (place, os.fsencode(safe_name(name)), *numbers, text))
        except sqlite3.Error as error:
            raise scratch_error(error) from None
        (count,) = self._database.execute("select count(*) from member").fetchone()
        self.doubles = place + 1 - count

    def entries(self) -> Iterator[Entry]:
        """All members, in their order."""
        query = "select place, name, row from member where place > ? order by place limit ?"
        after = -1
        while True:
            with self._lock:
                rows = self._database.execute(query, (after, _PAGE)).fetchall()
            for _, name, row in rows:
                yield Entry(os.fsdecode(name), None if row is None else parse_line(row.encode()))
            if not rows:
                return
            after = rows[-1][0]

    def find(self, name: str) -> Member:
        """The member of this name, without its row. Raises `InputMissing` if there is none."""
        query = "select offset, size, stored, method, checksum, encrypted from member where name = ?"
        with self._lock:
            found = self._database.execute(query, (os.fsencode(name),)).fetchone()
        if not found:
            raise InputMissing(shown_name(name), f"is not in {self._archive}")
        return Member(name, *found)

    def close(self) -> None:
        self._stack.close()


def safe_name(name: str) -> str:
    """A member's name as a path in its archive: without `./` before it, and never a URL, which would be fetched."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return f"./{name}" if is_url(name) else name
