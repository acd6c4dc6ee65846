"""A shared run beside an object of a bucket, `s3://bucket/out.jsonl`: the same files as in a folder, as objects.

No object can be locked or appended to: each is put whole, and what must be written once is put only where there is
nothing. Each process that begins the run puts a manifest of its own; that of the first one to put the settings, which
name it, is the run's. The output is written at the end, from all ranges.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, TypeVar

from llava_cli.batch import run_settings
from llava_cli.batch.ranges.bucket_files import BucketFiles
from llava_cli.batch.ranges.manifest_index import ManifestIndex
from llava_cli.batch.ranges.row_range import Grid, RowRange, Shard
from llava_cli.batch.ranges.run_files import (
    attempts_start,
    committed,
    leading_rows,
    new_attempt,
    new_token,
    no_run,
    shard_counts,
    shard_name,
    whole_row,
)
from llava_cli.batch.ranges.shared_run import OnRow
from llava_cli.batch.ranges.words import damaged_object, missing_rows
from llava_cli.batch.rows import to_line
from llava_cli.batch.scratch import scratch_file
from llava_cli.batch.tasks import Task
from llava_cli.errors import BadData, LlavaError, UsageError
from llava_cli.images.remote_names import path_of, shown

_SETTINGS, _MANIFEST = "settings.json", "manifest"
_READERS = 8
"""Ranges that are read at a time to be joined."""
T = TypeVar("T")


class BucketRun:
    """Ranges are committed by puts that never replace an object."""

    grid: Grid

    def __init__(self, url: str) -> None:
        self.name = shown(url)
        self._url = url
        folder, _, self._object = url.rpartition("/")
        if not self._object or "/" not in path_of(url):
            raise UsageError("-o", f"{self.name} names no object", f"-o {self.name.rstrip('/')}/out.jsonl")
        self._output = BucketFiles(f"{folder}/", self.name)
        self._files = BucketFiles(f"{url}.run/", self.name)
        self._manifest = ""
        """The name of the run's; known once it is begun."""
        self._index_found: ManifestIndex | None = None
        self._is_merged = False

    def _saved_settings(self) -> dict[str, Any] | None:
        """And finds which manifest is the run's."""
        if self._files.size(_SETTINGS) is None:
            return None
        name = f"{self.name}.run/{_SETTINGS}"
        saved = run_settings.parse(self._files.read(_SETTINGS), name)
        self._manifest = str(saved.pop(_MANIFEST, ""))
        if not re.fullmatch(f"{_MANIFEST}-[0-9a-f]{{8}}", self._manifest):
            raise BadData(name, "damaged", "give another object to -o")
        return saved

    def saved_precision(self) -> str | None:
        saved = self._saved_settings()
        return None if saved is None else run_settings.precision_of(saved)

    def begin(self, settings: dict[str, Any], tasks: Callable[[], Iterable[Task]], shard: Shard | None) -> None:
        saved = self._saved_settings()
        if saved is None:
            if self._output.size(self._object) is not None:
                raise run_settings.rows_of_no_run(self.name)
            if not self._put_manifest(tasks()):
                self.grid = Grid(0)
                return
            own = self._manifest
            if not self._files.create(_SETTINGS, run_settings.dumps({**settings, _MANIFEST: own})):
                self._files.remove([own, _index_of(own)])
            saved = self._saved_settings() or settings
        run_settings.refuse_changes(self.name, saved, settings)
        self.grid = self._index().grid
        if shard and not self.is_merged:
            self._files.create(shard_name(shard), b"")

    def _put_manifest(self, tasks: Iterable[Task]) -> bool:
        """False if there are no tasks."""
        self._manifest = f"{_MANIFEST}-{os.urandom(4).hex()}"
        with scratch_file() as manifest:
            manifest.writelines(task.to_line() for task in tasks)
            manifest.seek(0)
            index = ManifestIndex.made(manifest)
            if index.grid.total:
                manifest.seek(0)
                self._files.write(self._manifest, iter(lambda: manifest.read(1 << 20), b""))
                self._files.create(_index_of(self._manifest), index.to_bytes())
        return index.grid.total > 0

    def _index(self) -> ManifestIndex:
        if self._index_found is None:
            size = self._files.size(self._manifest) or 0
            index, name = None, _index_of(self._manifest)
            if size and self._files.size(name) is not None:
                index = ManifestIndex.parse(self._files.read(name), size)
            self._index_found = index or self._made_index(size)
        return self._index_found

    def _made_index(self, size: int) -> ManifestIndex:
        with scratch_file() as manifest:
            for begin in range(0, size, 1 << 24):
                manifest.write(self._files.read(self._manifest, begin, min(begin + (1 << 24), size)))
            manifest.seek(0)
            return ManifestIndex.made(manifest)

    def leave_token(self) -> str:
        token = new_token()
        self._files.create(token, b"")
        return token

    def sees(self, token: str) -> bool:
        return self._files.size(token) is not None

    @property
    def is_merged(self) -> bool:
        self._is_merged = self._is_merged or self._output.size(self._object) is not None
        return self._is_merged

    def answered(self) -> int:
        return self.grid.total if self.is_merged else 0

    def has(self, rows: RowRange) -> bool:
        return self._files.size(rows.file_name) is not None or self.is_merged

    def missing(self, ranges: Iterable[RowRange]) -> Iterator[RowRange]:
        there = self._committed()
        return (rows for rows in ranges if rows.number not in there and not self._is_merged)

    def _committed(self) -> set[int]:
        if self.is_merged:
            return set()
        return committed(self._files.names("part-"))

    def tasks(self, rows: RowRange) -> Iterator[Task]:
        begin, end = self._index().span(rows)
        return map(Task.from_line, self._files.read(self._manifest, begin, end).splitlines(keepends=True))

    def attempt(self, rows: RowRange) -> BucketAttempt:
        attempts = (self._files.lines(name) for name in self._files.names(attempts_start(rows)))
        left = (leading_rows(self.tasks(rows), lines) for lines in attempts)
        return BucketAttempt(self._files, rows, max(left, key=len, default=[]))

    def merge(self, on_row: OnRow) -> bool:
        if self._saved_settings() is None:
            raise no_run(self.name)
        self.grid = self._index().grid
        if was_merged := self.is_merged:
            self._read_output(on_row)
        is_ours = not was_merged and self._write_output(on_row)
        self._remove_what_is_left()
        return is_ours

    def _read_output(self, on_row: OnRow) -> None:
        """Calls `on_row` for the rows of the output. Raises `BadData` for one that has others."""
        tasks = (task for rows in self.grid.all() for task in self.tasks(rows))
        lines = self._output.all_lines(self._object)
        for number, (task, line) in enumerate(zip_longest(tasks, lines)):
            if task is None or line is None or (row := whole_row(task, line)) is None:
                reason = "damaged, or not about what it should be"
                raise BadData(f"{self.name}, line {number + 1:,}", reason, "give another object to -o")
            on_row(task, row)

    def _write_output(self, on_row: OnRow) -> bool:
        """Writes the rows of all ranges; False if another process has done so meanwhile, and removes them."""
        there = self._committed()
        if missing := [rows for rows in self.grid.all() if rows.number not in there and not self.is_merged]:
            raise missing_rows(self.name, self.grid, missing, 0, shard_counts(self._files.names("shard-")))
        try:
            return self._output.write(self._object, self._joined(on_row))
        except LlavaError:
            if self.is_merged:
                return False
            raise

    def _joined(self, on_row: OnRow) -> Iterator[bytes]:
        """The rows of all ranges. Raises `BadData` for an object that has other rows."""
        for rows, (tasks, lines) in _ahead(self._tasks_and_lines, self.grid.all()):
            for number, task in enumerate(tasks):
                line = lines[number] if number < len(lines) else b""
                if (row := whole_row(task, line)) is None:
                    raise damaged_object(f"{self._url}.run/{rows.file_name}", number)
                on_row(task, row)
            if len(lines) > len(rows):
                raise damaged_object(f"{self._url}.run/{rows.file_name}", len(rows))
            yield b"".join(lines)

    def _tasks_and_lines(self, rows: RowRange) -> tuple[Iterator[Task], list[bytes]]:
        return self.tasks(rows), self._files.lines(rows.file_name)

    def _remove_what_is_left(self) -> None:
        """Attempts before parts, and also manifests of processes that began the run too late."""
        for start in ("attempt-", "part-", "shard-", "token-", _MANIFEST):
            self._files.remove([name for name in self._files.names(start) if name != self._manifest])


def _index_of(manifest: str) -> str:
    return f"{manifest}.index"


def _ahead(function: Callable[[RowRange], T], ranges: Iterable[RowRange]) -> Iterator[tuple[RowRange, T]]:
    """What a function returns of each range, in their order; some are read ahead, in threads."""
    begun = deque[tuple[RowRange, Future[T]]]()
    with ThreadPoolExecutor(_READERS) as pool:
        for rows in ranges:
            begun.append((rows, pool.submit(function, rows)))
            if len(begun) > _READERS:
                first, result = begun.popleft()
                yield first, result.result()
        for rows, result in begun:
            yield rows, result.result()


class BucketAttempt:
    """Rows of a range in memory (see `Attempt`): they are at most those of one range."""

    def __init__(self, files: BucketFiles, rows: RowRange, left: list[bytes]) -> None:
        """`left` are the rows to begin with."""
        self._files, self._rows, self._lines = files, rows, list(left)
        self._left, self._is_committed = len(left), False

    @property
    def done(self) -> int:
        return len(self._lines)

    def append(self, row: dict[str, Any]) -> None:
        self._lines.append(to_line(row))

    def commit(self) -> bool:
        is_first = self._files.create(self._rows.file_name, b"".join(self._lines))
        self._is_committed = True
        return is_first

    def close(self) -> None:
        if not self._is_committed and self.done > self._left:
            self._files.create(new_attempt(self._rows), b"".join(self._lines))
            self._left = self.done
