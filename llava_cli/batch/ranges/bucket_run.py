"""A shared run beside an object of a bucket, `s3://bucket/out.jsonl`: the same files as in a folder, as objects.

No object can be locked or appended to: each is put whole, and what must be written once is put only where there is
nothing. The output is written at the end, from all ranges; settings come last of what a run begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

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
from llava_cli.errors import LlavaError, UsageError
from llava_cli.images.remote_names import path_of, shown

_SETTINGS, _MANIFEST = "settings.json", "manifest"


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
        self._index_found: ManifestIndex | None = None
        self._is_merged = False

    def _saved_settings(self) -> dict[str, Any] | None:
        if self._files.size(_SETTINGS) is None:
            return None
        return run_settings.parse(self._files.read(_SETTINGS), f"{self.name}.run/{_SETTINGS}")

    def saved_precision(self) -> str | None:
        saved = self._saved_settings()
        return None if saved is None else run_settings.precision_of(saved)

    def begin(self, settings: dict[str, Any], tasks: Callable[[], Iterable[Task]], shard: Shard | None) -> None:
        saved = self._saved_settings()
        if saved is None:
            if self._output.size(self._object) is not None:
                raise run_settings.rows_of_no_run(self.name)
            if not self._start(tasks()):
                self.grid = Grid(0)
                return
            self._files.create(_SETTINGS, run_settings.dumps(settings))
            saved = self._saved_settings() or settings
        run_settings.refuse_changes(self.name, saved, settings)
        self.grid = self._index().grid
        if shard and not self.is_merged:
            self._files.create(shard_name(shard), b"")

    def _start(self, tasks: Iterable[Task]) -> bool:
        """Puts the manifest, unless another process has been first; False if there are no tasks."""
        with scratch_file() as manifest:
            manifest.writelines(task.to_line() for task in tasks)
            manifest.seek(0)
            index = ManifestIndex.made(manifest)
            if self._files.size(_MANIFEST) is None and index.grid.total:
                manifest.seek(0)
                if self._files.write(_MANIFEST, iter(lambda: manifest.read(1 << 20), b"")):
                    self._files.create(ManifestIndex.NAME, index.to_bytes())
        return index.grid.total > 0

    def _index(self) -> ManifestIndex:
        if self._index_found is None:
            size = self._files.size(_MANIFEST) or 0
            index = None
            if size and self._files.size(ManifestIndex.NAME) is not None:
                index = ManifestIndex.parse(self._files.read(ManifestIndex.NAME), size)
            self._index_found = index or self._made_index(size)
        return self._index_found

    def _made_index(self, size: int) -> ManifestIndex:
        with scratch_file() as manifest:
            for begin in range(0, size, 1 << 24):
                manifest.write(self._files.read(_MANIFEST, begin, min(begin + (1 << 24), size)))
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
        return map(Task.from_line, self._files.read(_MANIFEST, begin, end).splitlines(keepends=True))

    def attempt(self, rows: RowRange) -> BucketAttempt:
        attempts = (self._files.lines(name) for name in self._files.names(attempts_start(rows)))
        left = (leading_rows(self.tasks(rows), lines) for lines in attempts)
        return BucketAttempt(self._files, rows, max(left, key=len, default=[]))

    def merge(self, on_row: OnRow) -> bool:
        if self._saved_settings() is None:
            raise no_run(self.name)
        self.grid = self._index().grid
        is_ours = not self.is_merged and self._write_output(on_row)
        self._remove_what_is_left()
        return is_ours

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
        for rows in self.grid.all():
            lines = self._files.lines(rows.file_name)
            for number, task in enumerate(self.tasks(rows)):
                line = lines[number] if number < len(lines) else b""
                if (row := whole_row(task, line)) is None:
                    raise damaged_object(f"{self._url}.run/{rows.file_name}", number)
                on_row(task, row)
            if len(lines) > len(rows):
                raise damaged_object(f"{self._url}.run/{rows.file_name}", len(rows))
            yield b"".join(lines)

    def _remove_what_is_left(self) -> None:
        for start in ("part-", "attempt-", "shard-", "token-", ManifestIndex.NAME):
            self._files.remove(self._files.names(start))


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
