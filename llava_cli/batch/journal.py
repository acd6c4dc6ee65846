"""The output of a run and the state beside it: a run that was killed is resumed without losing or repeating a row.

Beside `out.jsonl` is the folder `out.jsonl.run` with `settings.json`, what all rows of the run have in common;
`manifest`, the tasks in the order of the rows; `lock`; and `torn-N`, bytes that were cut off or removed from the
output. A row is a line, appended whole, and row N is about line N of the manifest, so resuming only means counting.
While several machines share the run, the marker `shared` is there, too (see `ranges.folder_run`).
"""

from __future__ import annotations

import errno
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

from llava_cli import files, limits, regular_files
from llava_cli.batch import run_settings
from llava_cli.batch.lines import bounded_lines, is_too_long
from llava_cli.batch.row_file import RowFile
from llava_cli.batch.rows import is_complete, key_of, parse_row, to_ask_again, to_line
from llava_cli.batch.tasks import Task, merge_tasks
from llava_cli.errors import BadData, OutputError, OutputLocked, OutputTaken, os_reason
from llava_cli.untrusted_text import printable

SHARED_MARKER = "shared"
"""The file that is there while several writers share the run; only they may go on with it."""
_BLOCK = 1 << 20
OnRow = Callable[[Task, dict[str, Any]], None]


class Journal:
    """The rows of one run, for one writer at a time."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = Path(f"{output}.run")
        self.done = 0
        """How many rows are written."""
        self.total = 0
        """How many rows there will be."""
        self.to_redo = array("q")
        """The numbers of rows to be answered again, counted from 0."""
        self._gone = array("q")
        """The numbers of rows about what the source no longer has, which are not answered again."""
        self.added = self.removed = 0
        """Tasks that the source has gained and lost since the run was begun, as `look` finds."""
        self._name = printable(str(output))
        self.manifest, self._settings = self.folder / "manifest", self.folder / "settings.json"
        self._lock = -1
        self._file: RowFile | None = None
        self._is_new = False
        """Whether nothing was there before `lock`."""

    def lock(self) -> None:
        """Takes the output for this process. Raises `OutputTaken` if another run has it, or it cannot be written."""
        from filelock import lock_descriptor  # only here: rows on stdout need no lock

        try:
            self._refuse_output()
            self._is_new = not (self.output.exists() or self.folder.exists())
            files.make_folder(self.folder, parents=False)
            lock = files.open_for_writing(self.folder / "lock", os.O_RDWR, files.SHARED)
            if not lock_descriptor(lock, blocking=False):
                os.close(lock)
                raise OutputLocked(self._name, "another run is writing it", "wait for it, or give another file to -o")
            self._lock = lock
            for path in (self.manifest, self._settings):
                files.refuse_irregular(path)
            files.remove_leftovers(self.folder)
            files.remove_leftovers(self.output.parent, self.output.name)
            self._file = RowFile(files.open_for_writing(self.output, os.O_RDWR | os.O_APPEND, files.SHARED))
        except OSError as error:
            raise self._taken(error) from None

    def _refuse_output(self) -> None:
        """Raises `OutputTaken` or `OSError` for what can never be an output."""
        if self.output.is_dir():
            hint = f"-o {files.quoted(self.output / 'out.jsonl')} writes into it"
            raise OutputTaken(self._name, "a folder", hint)
        if self.output.exists() and not self.output.is_file():
            raise OutputTaken(self._name, "not a regular file", "without -o rows go to stdout")
        files.refuse_link(self.output)

    def _taken(self, error: OSError) -> OutputTaken:
        hint = "give another file to -o"
        if isinstance(error, files.IsLink) and error.filename == str(self.output):
            hint = f"-o {files.quoted(error.target)} writes there"
        return OutputTaken(printable(str(error.filename or self.output)), os_reason(error), hint)

    def close(self) -> None:
        """Flushes the rows to the disk and releases the output. Raises `OutputError`."""
        file, lock, self._file, self._lock = self._file, self._lock, None, -1
        try:
            if file:
                with self._output_errors():
                    file.close()
        finally:
            if lock >= 0:
                os.close(lock)

    def withdraw(self) -> None:
        """Removes what `lock` has made for a run that cannot begin."""
        if self._is_new and not self.is_begun:
            for path in (self.output, self.folder / "lock"):
                files.remove(path)
            files.remove_folder(self.folder)

    @property
    def is_begun(self) -> bool:
        """Whether there is a run, which can be resumed."""
        return self._settings.exists() and self.manifest.exists() and self.manifest.stat().st_size > 0

    def saved_precision(self) -> str | None:
        """The precision of the run that is resumed; None of a new one. Raises `BadData`."""
        if not self.is_begun:
            return None
        return run_settings.precision_of(run_settings.read(self._settings))

    def begin(self, settings: dict[str, Any], tasks: Iterable[Task], extend: bool = False) -> tuple[int, int]:
        """Starts or resumes the run; returns how many tasks its source has gained and lost since it was started.

        With `extend` the new ones become part of the run. Raises `BadData` if the output has rows that are not this
        run's, or that other settings made.
        """
        self._refuse_shared()
        if not self.is_begun:
            if self._is_shared:  # of a shard that was killed as it listed SOURCE
                files.remove(self.folder / SHARED_MARKER)
            self.start(settings, tasks)
            return 0, 0
        self.refuse_changes(settings)
        before, remaining, after = count_lines(self.manifest)[1], 0, 0

        def merged_lines() -> Iterator[bytes]:
            nonlocal remaining, after
            for line, is_in_source in merge_tasks(lines_of(self.manifest), tasks):
                if not is_in_source:
                    self._gone.append(after)
                remaining += is_in_source and after < before
                after += 1
                yield line

        if extend:
            with self._output_errors():
                files.atomic_write(self.manifest, merged_lines())
        else:
            deque(merged_lines(), maxlen=0)
        self.total = after if extend else before
        return after - before, before - remaining

    def start(self, settings: dict[str, Any], tasks: Iterable[Task]) -> None:
        """Starts a new run. Raises `BadData` if the output has rows that are not this run's."""
        self._refuse_rows(self._open_file.size)
        data = run_settings.to_json(settings, self.output)
        with self._output_errors():
            files.atomic_write(self.manifest, (task.to_line() for task in tasks))
            files.atomic_write(self._settings, [data])
            files.sync_folder(self.folder.parent)
        self.total = count_lines(self.manifest)[1]

    @property
    def _open_file(self) -> RowFile:
        assert self._file, "the journal is not locked"
        return self._file

    @property
    def _is_shared(self) -> bool:
        return (self.folder / SHARED_MARKER).exists()

    def _refuse_shared(self) -> None:
        """Raises `BadData` if only shards, or a cluster, may go on with the run."""
        if self._is_shared and self.is_begun:
            reason = "several writers share this run, and some of its rows are beside it"
            raise BadData(self._name, reason, f"llava batch --merge {files.quoted(self.output)} joins them")

    def _refuse_rows(self, size: int) -> None:
        """Raises `BadData` if an output of `size` bytes has rows that are no run's."""
        if size:
            raise run_settings.rows_of_no_run(self._name)

    def refuse_changes(self, settings: dict[str, Any]) -> None:
        """Raises `BadData` if the run that is resumed had other settings."""
        run_settings.refuse_changes(self._name, run_settings.read(self._settings), settings)

    def look(
        self,
        settings: dict[str, Any],
        tasks: Iterable[Task],
        on_row: OnRow,
        extend: bool = False,
        retry: bool = False,
        repair: bool = False,
    ) -> Iterator[tuple[int, Task]]:
        """The tasks that a run would answer, with the numbers of their rows; writes nothing and takes no lock.

        What the source has gained and lost is in `added` and `removed` once all were read. Raises what `lock`, `begin`
        and `check` would, except where another run has the output.
        """
        self.refuse_unwritable()
        self._refuse_shared()
        if not self.is_begun:
            self._refuse_rows(self.output.stat().st_size if self.output.exists() else 0)
            for number, task in enumerate(tasks):
                self.total = number + 1
                yield number, task
            return
        self.refuse_changes(settings)
        if self.output.exists():
            self._read(on_row, retry, repair)
        before, redo = count_lines(self.manifest)[1], set(self.to_redo)
        self.removed = before
        for number, (line, is_in_source) in enumerate(merge_tasks(lines_of(self.manifest), tasks)):
            is_new = number >= before
            self.added += is_new
            self.removed -= is_in_source and not is_new
            if (number >= self.done or number in redo) and (extend or not is_new):
                yield number, Task.from_line(line)
        self.total = before + (self.added if extend else 0)

    def refuse_unwritable(self) -> None:
        """Raises `OutputTaken` if the output could not be written; tries it with nothing."""
        try:
            self._refuse_output()
            folder = self.output.parent
            folder.stat()
            for path in (folder, self.output):
                if path.exists() and not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        except OSError as error:
            raise self._taken(error) from None

    def check(self, on_row: OnRow, retry: bool = False, repair: bool = False) -> None:
        """Reads the existing rows, each with its task, and finds those `to_redo`; calls `on_row` for all others.

        A last line without an end is torn: it is cut off and kept in `torn-N`. With `retry`, rows with errors are to be
        answered again, with `repair` damaged ones, too. Raises `BadData` for damage without `repair`.
        """
        size, end, damaged = self._read(on_row, retry, repair)
        with self._output_errors():
            if damaged or end < size:
                self._set_aside([*zip(damaged[::2], damaged[1::2], strict=True), (end, size)])
            self._open_file.cut_off(end)

    def _read(self, on_row: OnRow, retry: bool, repair: bool) -> tuple[int, int, array[int]]:
        """`check` without writing -> the output's bytes, those in whole lines, and the spans of damaged lines."""
        size = self.output.stat().st_size
        end, damaged, gone = 0, array("q"), iter(self._gone)
        next_gone = next(gone, -1)
        with open_rows(self.output) as rows, open_rows(self.manifest) as manifest:
            tasks = bounded_lines(manifest)
            for number, line in enumerate(bounded_lines(rows)):
                if is_too_long(line):
                    reason = f"longer than {limits.ROW_BYTES:,} bytes"
                    raise BadData(f"{self._name}, line {number + 1}", reason, "give another file to -o")
                if not line.endswith(b"\n"):
                    break
                task = next(tasks, None)
                row = row_of(Task.from_line(task), line) if task else None
                if row is None and not repair:
                    hint = "--repair keeps that line aside and answers again" if task else "give another file to -o"
                    reason = "damaged, or not about what it should be" if task else "more rows than tasks"
                    raise BadData(f"{self._name}, line {number + 1}", reason, hint)
                if task is None:
                    break
                next_gone = next(gone, -1) if 0 <= next_gone < number else next_gone
                begin, end = end, end + len(line)
                self.done = number + 1
                if row is None and damaged and damaged[-1] == begin:
                    damaged[-1] = end
                elif row is None:
                    damaged.extend((begin, end))
                if row is None or (retry and number != next_gone and to_ask_again(row)):
                    self.to_redo.append(number)
                else:
                    on_row(Task.from_line(task), row)
        return size, end, damaged

    def tasks(self) -> Iterator[Task]:
        """The tasks that have no row yet."""
        with open_rows(self.manifest) as file:
            yield from map(Task.from_line, islice(bounded_lines(file), self.done, None))

    def tasks_to_redo(self) -> Iterator[Task]:
        """The tasks whose rows are to be answered again."""
        with open_rows(self.manifest) as file:
            numbers = iter(self.to_redo)
            next_number = next(numbers, None)
            for number, line in enumerate(bounded_lines(file)):
                if next_number is None:
                    return
                if number == next_number:
                    yield Task.from_line(line)
                    next_number = next(numbers, None)

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row, whole or not at all. Raises `OutputError`, or `OutputTaken` if another program wrote."""
        self._check_unchanged()
        with self._output_errors():
            self._open_file.append(to_line(row))
            self.done += 1

    def append_lines(self, lines: Sequence[bytes]) -> None:
        """As `append`, of many rows as `to_line` writes them, which are on the disk then."""
        self._check_unchanged()
        with self._output_errors():
            self._open_file.append(b"".join(lines))
            self._open_file.sync()
            self.done += len(lines)

    def replace(self, rows: Iterator[dict[str, Any]]) -> None:
        """Replaces the rows `to_redo` by new ones, in the order of `tasks_to_redo`; the file changes all at once.

        If there are fewer new rows, because the run was stopped, the other old ones stay.
        """
        numbers = iter(self.to_redo)

        def lines() -> Iterator[bytes]:
            next_number = next(numbers, None)
            with open_rows(self.output) as file:
                for number, line in enumerate(bounded_lines(file)):
                    row = next(rows, None) if number == next_number else None
                    yield line if row is None else to_line(row)
                    if number == next_number:
                        next_number = None if row is None else next(numbers, None)
            self._check_unchanged()

        with self._output_errors():
            files.atomic_write(self.output, lines())
            os.close(self._open_file.descriptor)
            self._file = RowFile(files.open_existing(self.output, os.O_RDWR | os.O_APPEND))

    def _check_unchanged(self) -> None:
        """Raises `OutputTaken` if the output is another file, or has another size, than this run has left."""
        status = os.fstat(self._open_file.descriptor)
        with self._output_errors():
            is_same_file = os.path.lexists(self.output) and os.path.samestat(os.lstat(self.output), status)
        if not is_same_file or status.st_size != self._open_file.size:
            raise OutputTaken(self._name, "somebody else has written to it, or taken it away")

    def _set_aside(self, spans: list[tuple[int, int]]) -> None:
        """Copies (begin, end) spans of the output's bytes to the next `torn-N`."""
        number = 1
        while os.path.lexists(torn := self.folder / f"torn-{number}"):
            number += 1

        def blocks() -> Iterator[bytes]:
            with open_rows(self.output) as file:
                for begin, end in spans:
                    file.seek(begin)
                    for start in range(begin, end, _BLOCK):
                        yield file.read(min(_BLOCK, end - start))

        files.atomic_write(torn, blocks())

    @contextmanager
    def _output_errors(self) -> Iterator[None]:
        """Translates `OSError` into `OutputError`."""
        try:
            yield
        except OSError as error:
            raise OutputError(self._name, os_reason(error), "the same command resumes") from None


def row_of(task: Task, line: bytes) -> dict[str, Any] | None:
    """The task's row from a line; None if the line is not a complete row, or about something else."""
    row = parse_row(line)
    if row and key_of(row) == task.key and is_complete(row):
        return row
    return None


def open_rows(path: Path) -> BufferedReader:
    """Opens a file of rows or tasks. Raises `OSError`, also if its name is a link or it is no regular file."""
    return regular_files.open_regular(path, follow=False)


def lines_of(path: Path) -> Iterator[bytes]:
    """The lines of a file of rows or tasks, with their ends. Raises as `open_rows`."""
    with open_rows(path) as file:
        yield from bounded_lines(file)


def count_lines(path: Path, size: int = 0, lines: int = 0) -> tuple[int, int]:
    """The bytes and the number of a file's whole lines, of which the first `lines` are `size` bytes.

    Raises as `open_rows`.
    """
    with open_rows(path) as file:
        file.seek(size)
        end = size
        for block in iter(lambda: file.read(_BLOCK), b""):
            lines += block.count(b"\n")
            size = end + block.rfind(b"\n") + 1 if b"\n" in block else size
            end += len(block)
    return size, lines
