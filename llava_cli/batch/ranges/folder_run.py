"""A shared run beside a file: in a folder of this machine, or of a file system that several machines have.

Besides what `Journal` keeps there, the folder `out.jsonl.run` has `shared`, a marker; `shard-3-of-8` for each shard
that was begun; `manifest.index`; `part-N.jsonl`, the rows of range N; and `attempts` with `attempt-N-….jsonl`, rows of
ranges that are being answered, or were when their process ended: they have a folder of their own because there may be
100,000 parts, and each new attempt looks for earlier ones. All this goes with the merge.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from llava_cli import files
from llava_cli.batch.journal import SHARED_MARKER, Journal, count_lines, lines_of, open_rows
from llava_cli.batch.lines import bounded_lines
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
from llava_cli.batch.ranges.words import damaged, damaged_rows, missing_rows
from llava_cli.batch.row_file import RowFile
from llava_cli.batch.rows import to_line
from llava_cli.batch.tasks import Task
from llava_cli.errors import OutputError, OutputLocked, os_reason
from llava_cli.untrusted_text import printable

_ATTEMPTS = "attempts"
_WAIT_SECONDS = 0.2
_TRIES = 10
"""To take an output that another shard may have taken before it could say so."""
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What `link` fails with on a file system that has none."""


class FolderRun:
    """Ranges are committed by hard links, which never replace a file."""

    grid: Grid

    def __init__(self, output: Path) -> None:
        self.output = Path(os.path.abspath(output))  # the same for a worker, which has another current folder
        self.name = printable(str(output))
        self._folder = Journal(self.output).folder
        self._counted = 0, 0
        """Bytes and rows of the output that `answered` has counted."""

    def saved_precision(self) -> str | None:
        return Journal(self.output).saved_precision()

    def begin(self, settings: dict[str, Any], tasks: Callable[[], Iterable[Task]], shard: Shard | None) -> None:
        journal = Journal(self.output)
        with closing(journal), self._output_errors():
            if self._lock(journal):
                self._begin_locked(journal, settings, tasks)
            else:
                journal.refuse_changes(settings)
            self.grid = self._index().grid
            if shard and self._is_shared:
                self._mark(shard_name(shard))

    def _lock(self, journal: Journal) -> bool:
        """Takes the output, unless somebody has it who shares the run, and it is begun; waits while it is not."""
        tries = 0
        while True:
            try:
                journal.lock()
                return True
            except OutputLocked:
                tries += 1
                if not self._is_shared and tries > _TRIES:
                    raise
                if self._is_shared and journal.is_begun:
                    return False
            time.sleep(_WAIT_SECONDS)  # another shard is listing SOURCE, or has just come

    def _lock_to_join(self, journal: Journal) -> None:
        """Takes the output, which a shard that begins has for a moment. Raises `OutputLocked` if another one joins."""
        for _ in range(_TRIES):
            with suppress(OutputLocked):
                return journal.lock()
            time.sleep(_WAIT_SECONDS)
        return journal.lock()

    def _begin_locked(self, journal: Journal, settings: dict[str, Any], tasks: Callable[[], Iterable[Task]]) -> None:
        if journal.is_begun:
            journal.refuse_changes(settings)
        if not self._is_shared:
            self._unmark()  # what stragglers of an earlier shared run may have left
            self._mark(SHARED_MARKER)  # first, so that other shards wait
        if not journal.is_begun:
            try:
                journal.start(settings, tasks())
            except BaseException:
                self._unmark()
                journal.withdraw()
                raise
        index = self._index()
        if self._answered_now() < index.grid.total:
            files.atomic_write(self._folder / ManifestIndex.NAME, [index.to_bytes()])
        else:
            self._unmark()

    def _index(self) -> ManifestIndex:
        return ManifestIndex.of(self._folder)

    def leave_token(self) -> str:
        token = new_token()
        with self._output_errors():
            self._mark(token)
        return token

    def sees(self, token: str) -> bool:
        return (self._folder / token).exists()

    @property
    def is_merged(self) -> bool:
        return not self._is_shared

    @property
    def _is_shared(self) -> bool:
        return (self._folder / SHARED_MARKER).exists()

    def _mark(self, name: str) -> None:
        with suppress(FileExistsError):
            files.write_new(self._folder / name, b"")

    def _unmark(self) -> None:
        """Removes what the folder of a single run does not have."""
        # Attempts before what they may be committed to, and the marker last: until then a merge goes on.
        for pattern in (f"{_ATTEMPTS}/*.jsonl", "part-*.jsonl", "shard-*-of-*", "token-*", ManifestIndex.NAME):
            for path in self._folder.glob(pattern):
                _unlink(path)
        files.remove_folder(self._folder / _ATTEMPTS)
        _unlink(self._folder / SHARED_MARKER)

    def answered(self) -> int:
        return self._answered_now() if self._is_shared else self.grid.total

    def _answered_now(self) -> int:
        """The output's whole lines; those that were counted before are not read again."""
        size, rows = self._counted
        if self.output.exists() and self.output.stat().st_size > size:
            self._counted = size, rows = count_lines(self.output, size, rows)
        return rows

    def has(self, rows: RowRange) -> bool:
        return (self._folder / rows.file_name).exists() or rows.end <= self.answered()

    def missing(self, ranges: Iterable[RowRange]) -> Iterator[RowRange]:
        there, answered = self._committed(), self.answered()
        return (rows for rows in ranges if rows.number not in there and rows.end > answered)

    def _committed(self) -> set[int]:
        with os.scandir(self._folder) as entries:
            return committed(entry.name for entry in entries)

    def tasks(self, rows: RowRange) -> Iterator[Task]:
        with open_rows(self._folder / "manifest") as file:
            file.seek(self._index().span(rows)[0])
            yield from map(Task.from_line, islice(bounded_lines(file), len(rows)))

    def attempt(self, rows: RowRange) -> FolderAttempt:
        with self._output_errors():
            return FolderAttempt(self._folder, rows, self.name, self._best_attempt(rows))

    def _best_attempt(self, rows: RowRange) -> list[bytes]:
        """The most rows that earlier attempts, or a run that was not shared, have left of a range."""
        left = [_lines_left(path) for path in (self._folder / _ATTEMPTS).glob(f"{attempts_start(rows)}*.jsonl")]
        if rows.begin < self.answered() and self.output.exists():
            left.append(islice(lines_of(self.output), rows.begin, rows.end))
        return max((leading_rows(self.tasks(rows), lines) for lines in left), key=len, default=[])

    def merge(self, on_row: OnRow) -> bool:
        journal = Journal(self.output)
        if not journal.is_begun:
            raise no_run(self.name)
        with closing(journal), self._output_errors():
            self._lock_to_join(journal)
            self.grid = self._index().grid
            # A damaged row is one that --repair has answered again, once this is a single run; more rows are refused.
            journal.check(on_row, repair=self._answered_now() <= self.grid.total)
            there = self._committed() if self._is_shared else set()
            if missing := [rows for rows in self.grid.all() if rows.end > journal.done and rows.number not in there]:
                shards = shard_counts(path.name for path in self._folder.glob("shard-*-of-*"))
                raise missing_rows(self.name, self.grid, missing, journal.done, shards)
            tasks = journal.tasks()
            for rows in self.grid.all():
                if rows.end > journal.done:
                    self._append(journal, rows, tasks, on_row)
                _unlink(self._folder / rows.file_name)
            self._unmark()
            if journal.to_redo:
                raise damaged_rows(self.name, journal.to_redo)
        return True

    def _append(self, journal: Journal, rows: RowRange, tasks: Iterator[Task], on_row: OnRow) -> None:
        """Appends what the output lacks of a range. Raises `BadData` for a file that has other rows."""
        path = self._folder / rows.file_name
        lines = list(islice(lines_of(path), len(rows) + 1))
        lacking = range(journal.done - rows.begin, len(rows))
        for number in lacking:
            task, line = next(tasks), lines[number] if number < len(lines) else b""
            if (row := whole_row(task, line)) is None:
                raise damaged(path, number)
            on_row(task, row)
        if len(lines) > len(rows):
            raise damaged(path, len(rows))
        journal.append_lines(lines[lacking.start :])

    @contextmanager
    def _output_errors(self) -> Iterator[None]:
        with output_errors(self.name):
            yield


class FolderAttempt:
    """Rows of a range in a file of their own (see `Attempt`)."""

    def __init__(self, folder: Path, rows: RowRange, name: str, left: list[bytes]) -> None:
        """`left` are the rows to begin with. Raises `OSError`."""
        self._part, self._marker, self._name = folder / rows.file_name, folder / SHARED_MARKER, name
        self._path = folder / _ATTEMPTS / new_attempt(rows)
        try:
            descriptor = self._create()
        except FileNotFoundError:  # its folder went with a merge as it was made
            descriptor = self._create()
        self._file: RowFile | None = RowFile(descriptor)
        self.done = 0
        for line in left:
            self._append(line)

    def _create(self) -> int:
        files.make_folder(self._path.parent, parents=False)
        return files.open_for_writing(self._path, os.O_RDWR | os.O_APPEND | os.O_EXCL, files.SHARED)

    def append(self, row: dict[str, Any]) -> None:
        with output_errors(self._name):
            self._append(to_line(row))

    def _append(self, line: bytes) -> None:
        assert self._file
        self._file.append(line)
        self.done += 1

    def commit(self) -> bool:
        self.close()
        with output_errors(self._name):
            # Without the marker all rows have been joined, and a range of this number may be one of the next run.
            is_first = self._marker.exists() and _link(self._path, self._part)
            files.sync_folder(self._part.parent)
            _unlink(self._path)
            if not self._marker.exists():
                files.remove_folder(self._path.parent)
        return is_first

    def close(self) -> None:
        file, self._file = self._file, None
        with output_errors(self._name):
            if file:
                file.close()


def _lines_left(path: Path) -> Iterator[bytes]:
    """The lines of an attempt; no more of them once it is committed, or all rows are joined."""
    with suppress(FileNotFoundError):
        yield from lines_of(path)


def _link(path: Path, name: Path) -> bool:
    """Gives a file one more name; False if there is a file of that name. Raises `OSError`."""
    try:
        os.link(path, name)
    except FileExistsError:
        return False
    except FileNotFoundError:  # all rows have been joined meanwhile
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if name.exists():
            return False
        os.rename(path, name)  # which might replace a file that has come meanwhile, of the same rows
    return True


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


@contextmanager
def output_errors(name: str) -> Iterator[None]:
    """Translates `OSError` into `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(name, os_reason(error), "the same command resumes") from None
