"""The pictures of a bucket or a data set, or of a folder in one."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain

from llava_cli.batch.scratch import scratch_database, scratch_error, scratch_spool
from llava_cli.batch.sources.containers.bucket_listing import list_objects
from llava_cli.batch.sources.containers.container import Entry
from llava_cli.batch.sources.containers.member_index import safe_name
from llava_cli.batch.sources.folders import Selection
from llava_cli.images.cloud import Cloud
from llava_cli.images.reader import is_url
from llava_cli.images.remote_names import shown

_WILD = re.compile(r"\*\*/?|\*|\?")
_WILD_PATTERNS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
_PAGE = 1000
"""Names that are in memory at a time."""


class Bucket:
    """Objects below a URL, `s3://bucket/photos/`, or those that a pattern matches, `s3://bucket/2024-*/*.jpg`.

    They are taken by their names, as in a folder. Those without a picture's suffix are passed over and counted: to read
    their first bytes, as in a folder, would take a request for each.
    """

    readers = 16
    has_questions = has_paths = False

    def __init__(self, url: str, include: Sequence[str] = ()) -> None:
        """Raises `UsageError` if the package for the URL's scheme is not installed."""
        self._url, self._pattern = split_pattern(url)
        self._selection = Selection(include)
        self._cloud = Cloud(url)
        self._names: SortedNames | None = None

    def entries(self) -> Iterator[Entry]:
        """As they are at the first call: the list stays the same for the rest of the run."""
        if self._names is None:
            names = SortedNames()
            names.fill(self._listed())
            self._names = names
        return map(Entry, self._names.all())

    def _listed(self) -> Iterator[str]:
        for name, size in list_objects(self._cloud, self._url):
            is_folder = name == "" or (name.endswith("/") and not size)  # which consoles make
            if is_folder or (self._pattern and not self._pattern.fullmatch(name)):
                continue
            if self._selection.takes(name, bytes):
                yield safe_name(name)

    def read(self, name: str) -> bytes:
        key = name[2:] if is_url(name[2:]) else name  # see `safe_name`
        return self._cloud.read(self._url + key, shown(name))

    def note(self) -> str:
        return self._selection.skipped.note()

    def close(self) -> None:
        self._cloud.end()
        if self._names:
            self._names.close()


class SortedNames:
    """Names in the order of their bytes, each once. They are on disk: a bucket may have millions of objects.

    They are in a file while they come in that order, as from S3, and in a database as soon as one does not.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._spool = self._stack.enter_context(scratch_spool())
        self._places: list[tuple[int, int]] = []
        self._database: sqlite3.Connection | None = None
        self._lock = threading.Lock()

    def fill(self, names: Iterable[str]) -> None:
        """Raises `OutputError`, or what reading them raises."""
        try:
            rest = iter(names)
            if stray := self._take_ordered(rest):
                self._sort(chain(self.all(), stray, rest))
        except BaseException:
            self.close()
            raise

    def _take_ordered(self, names: Iterator[str]) -> list[str]:
        """Takes names until one does not come in order, which it returns."""
        page: list[str] = []
        stray: list[str] = []
        last = b""
        for name in names:
            key = os.fsencode(name)
            if key < last:
                stray = [name]
                break
            if key > last:
                page.append(name)
                last = key
            if len(page) == _PAGE:
                self._places.append(self._spool.add(page))
                page = []
        self._places.append(self._spool.add(page))
        return stray

    def _sort(self, names: Iterable[str]) -> None:
        database = self._stack.enter_context(scratch_database())
        try:
            database.execute("create table name (name blob primary key) without rowid")
            rows = ((os.fsencode(name),) for name in names)
            database.executemany("insert or ignore into name values (?)", rows)
        except sqlite3.Error as error:
            raise scratch_error(error) from None
        self._database = database

    def all(self) -> Iterator[str]:
        if self._database is None:
            for place in self._places:
                yield from self._spool.read(place)
            return
        page: list[tuple[bytes]] = [(b"",)]
        while page:
            with self._lock:
                query = "select name from name where name > ? order by name limit ?"
                page = self._database.execute(query, (page[-1][0], _PAGE)).fetchall()
            yield from (os.fsdecode(name) for (name,) in page)

    def close(self) -> None:
        self._stack.close()


def split_pattern(url: str) -> tuple[str, re.Pattern[str] | None]:
    """The folder that a URL names, or that all matches of its pattern are below; and the pattern of names in it.

    `*` and `?` stay within a name, `**` does not.
    """
    wild = _WILD.search(url)
    if not wild:
        return url.rstrip("/") + "/", None
    start = url[: wild.start()].rpartition("/")[0] + "/"
    parts = re.split(f"({_WILD.pattern})", url[len(start) :])
    return start, re.compile("".join(_WILD_PATTERNS.get(part) or re.escape(part) for part in parts), re.DOTALL)
