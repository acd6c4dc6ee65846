"""The output of a run and what stands beside it: a run that was killed goes on, and no row is lost or doubled.

Beside `out.jsonl` is the folder `out.jsonl.run`: `settings.json`, which rows of one run have in common; `manifest`,
the tasks, in the order of the rows; `lock`; and `torn-N`, what was cut off or taken out of the output. A row is a
line, appended whole, and row N is about line N of the manifest: to go on means to count.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

from llava_cli import files, limits, regular_files
from llava_cli.batch.lines import bounded, is_too_long, parse
from llava_cli.batch.roots import signature
from llava_cli.batch.rows import is_whole, to_line
from llava_cli.batch.tasks import Task, merged
from llava_cli.bounded_json import Bounds, loads
from llava_cli.errors import BadData, OutputError, OutputTaken
from llava_cli.untrusted_text import one_line, printable

SYNC_ROWS, SYNC_SECONDS = 64, 1.0
_PIECE = 1 << 20
_SIGNED = "signed"
"""What is said of the run's root in its settings, and is not one of them."""
_CHANGES = 20
"""Of settings, that are told of: more than there are, but not than a damaged file may have."""
See = Callable[[Task, dict[str, Any]], None]


class Journal:
    """The rows of one run, for one writer at a time."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = Path(f"{output}.run")
        self.done = 0
        """How many rows are written."""
        self.total = 0
        """How many there will be."""
        self.again = array("q")
        """The numbers of rows that are to be answered once more."""
        self._name = printable(str(output))
        self._manifest, self._settings = self.folder / "manifest", self.folder / "settings.json"
        self._lock = self._file = -1
        self._size, self._unsynced, self._synced = 0, 0, time.monotonic()

    def lock(self) -> None:
        """Takes the output for this process. Raises `OutputTaken` where another one has it, or nobody can write it."""
        from filelock import lock_descriptor  # where rows go to stdout, nobody waits for its import

        try:
            if self.output.is_dir():
                hint = f"-o {files.quoted(self.output / 'out.jsonl')} writes into it"
                raise OutputTaken(self._name, "a folder", hint)
            if self.output.exists() and not self.output.is_file():
                raise OutputTaken(self._name, "not a regular file", "without -o rows go to stdout")
            files.refuse_link(self.output)
            files.make_folder(self.folder, parents=False)
            self._lock = files.open_for_writing(self.folder / "lock", os.O_RDWR, files.SHARED)
            if not lock_descriptor(self._lock, blocking=False):
                raise OutputTaken(self._name, "another run is writing it", "wait for it, or give another file to -o")
            for path in (self._manifest, self._settings):
                files.refuse_irregular(path)
            files.clear(self.folder)
            files.clear(self.output.parent, self.output.name)
            self._file = files.open_for_writing(self.output, os.O_RDWR | os.O_APPEND, files.SHARED)
        except OSError as error:
            raise self._taken(error) from None

    def _taken(self, error: OSError) -> OutputTaken:
        hint = "give another file to -o"
        if isinstance(error, files.IsLink) and error.filename == str(self.output):
            hint = f"-o {files.quoted(error.target)} writes there"
        reason = printable(error.strerror or str(error))
        return OutputTaken(printable(str(error.filename or self.output)), reason[:1].lower() + reason[1:], hint)

    def close(self) -> None:
        """Brings what was written to the disk and lets others have the output."""
        descriptors = [descriptor for descriptor in (self._file, self._lock) if descriptor >= 0]
        try:
            if self._file >= 0:
                with self._writing():
                    self.sync()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            self._file = self._lock = -1

    def begin(self, settings: dict[str, Any], tasks: Iterable[Task], extend: bool = False) -> tuple[int, int]:
        """Starts the run, or goes on with it: how many tasks were added to the source since, and how many are gone.

        Raises `BadData` where the output is not this run's, or other settings made it. With `extend` the added ones
        are taken in.
        """
        if not self._settings.exists() or not self._manifest.exists() or not self._manifest.stat().st_size:
            if os.fstat(self._file).st_size:
                reason = "it has rows already, and no folder .run beside it that says what made them"
                raise BadData(self._name, reason, "give another file to -o")
            settings = {**settings, _SIGNED: signature(self.output, str(settings.get("root")))}
            # What is no UTF-8 in it becomes an escape of JSON's.
            text = json.dumps(settings, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
            with self._writing():
                files.put(self._manifest, (line for line, _ in merged((), tasks)))
                files.put(self._settings, [text + b"\n"])
                files.sync_folder(self.folder.parent)
            self.total = _count(self._manifest)
            return 0, 0
        self._compare(_settings(self._settings), json.loads(json.dumps(settings)))
        before, kept, after = _count(self._manifest), 0, 0

        def counted() -> Iterator[bytes]:
            nonlocal kept, after
            for line, found in merged(_lines(self._manifest), tasks):
                kept += found and after < before
                after += 1
                yield line

        if extend:
            with self._writing():
                files.put(self._manifest, counted())
        else:
            deque(counted(), maxlen=0)
        self.total = after if extend else before
        return after - before, before - kept

    def check(self, see: See, retry: bool = False, repair: bool = False) -> None:
        """Reads the rows that are there, each beside its task, and finds those to be answered `again`.

        `see` is told of each that stays. A last line without its end is torn: it is kept in `torn-N` and cut off.
        Raises `BadData` for other damage; with `repair` such rows are answered again, with `retry` those with errors.
        """
        size = os.fstat(self._file).st_size
        end, damaged = 0, array("q")
        with _open(self.output) as rows, _open(self._manifest) as manifest:
            tasks = bounded(manifest)
            for number, line in enumerate(bounded(rows)):
                if is_too_long(line):
                    reason = f"longer than {limits.ROW_BYTES:,} bytes"
                    raise BadData(f"{self._name}, line {number + 1}", reason, "give another file to -o")
                if not line.endswith(b"\n"):
                    break
                task = next(tasks, None)
                row = _row(line, Task.from_line(task)) if task else None
                if row is None and not repair:
                    hint = "--repair keeps that line aside and answers again" if task else "give another file to -o"
                    reason = "damaged, or not about what it should be" if task else "more rows than tasks"
                    raise BadData(f"{self._name}, line {number + 1}", reason, hint)
                if task is None:
                    break
                begin, end = end, end + len(line)
                self.done = number + 1
                if row is None and damaged and damaged[-1] == begin:
                    damaged[-1] = end
                elif row is None:
                    damaged.extend((begin, end))
                if row is None or (retry and row["status"] == "error"):
                    self.again.append(number)
                else:
                    see(Task.from_line(task), row)
        with self._writing():
            if damaged or end < size:
                self._keep([*zip(damaged[::2], damaged[1::2], strict=True), (end, size)])
            if end < size:
                files.cut(self._file, end)
        self._size = end

    def tasks(self) -> Iterator[Task]:
        """Those that have no row yet."""
        with _open(self._manifest) as file:
            yield from map(Task.from_line, islice(bounded(file), self.done, None))

    def tasks_again(self) -> Iterator[Task]:
        """Those whose rows are to be replaced."""
        with _open(self._manifest) as file:
            wanted = iter(self.again)
            number = next(wanted, None)
            for at, line in enumerate(bounded(file)):
                if number is None:
                    return
                if at == number:
                    yield Task.from_line(line)
                    number = next(wanted, None)

    def append(self, row: dict[str, Any]) -> None:
        """Writes one row, whole or not at all. Raises `OutputError`, or `OutputTaken` where somebody else wrote."""
        self._check_alone()
        line = to_line(row)
        with self._writing():
            files.write(self._file, line)
            self._size += len(line)
            self.done += 1
            self._unsynced += 1
            if self._unsynced >= SYNC_ROWS or time.monotonic() - self._synced > SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        os.fsync(self._file)
        self._unsynced, self._synced = 0, time.monotonic()

    def replace(self, rows: Iterator[dict[str, Any]]) -> None:
        """Puts rows, which are about `tasks_again` in order, in the places of those that were; all or none of them."""
        wanted = iter(self.again)

        def lines() -> Iterator[bytes]:
            number = next(wanted, None)
            with _open(self.output) as file:
                for at, line in enumerate(bounded(file)):
                    if at == number:
                        row = next(rows, None)
                        if row is None:  # stopped: what is left stays as it is
                            number = None
                            yield line
                            continue
                        yield to_line(row)
                        number = next(wanted, None)
                    else:
                        yield line
            self._check_alone()

        with self._writing():
            files.put(self.output, lines())
            before, self._file = self._file, files.open_existing(self.output, os.O_RDWR | os.O_APPEND)
            os.close(before)
            self._size = os.fstat(self._file).st_size

    def _check_alone(self) -> None:
        """Raises `OutputTaken` where the file is not what this run has made of it."""
        ours = os.fstat(self._file)
        with self._writing():
            there = os.path.lexists(self.output) and os.path.samestat(os.lstat(self.output), ours)
        if not there or ours.st_size != self._size:
            raise OutputTaken(self._name, "somebody else has written to it, or taken it away")

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        names = [name for name in {**now, **before} if before.get(name) != now.get(name) and name != _SIGNED]
        if names:
            changes = (f"{one_line(name)} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in names)
            more = f"; and {len(names) - _CHANGES:,} more" if len(names) > _CHANGES else ""
            reason = f"other settings made its rows: {'; '.join(islice(changes, _CHANGES))}{more}"
            raise BadData(self._name, reason, "give another file to -o")

    def _keep(self, spans: list[tuple[int, int]]) -> None:
        """Puts what is taken out of the output, from and to which bytes, in a file of its own."""
        number = 1
        while os.path.lexists(torn := self.folder / f"torn-{number}"):
            number += 1

        def pieces() -> Iterator[bytes]:
            with _open(self.output) as file:
                for begin, end in spans:
                    file.seek(begin)
                    for at in range(begin, end, _PIECE):
                        yield file.read(min(_PIECE, end - at))

        files.put(torn, pieces())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Translates what a disk says."""
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(self._name, reason, "the same command goes on") from None


def _row(line: bytes, task: Task) -> dict[str, Any] | None:
    """A line's row; None where it is none, or about something else."""
    try:
        row = parse(line)
        same = (row["image"], row["question"], row.get("id")) == task.key and is_whole(row)
    except (ValueError, KeyError, TypeError):
        return None
    return row if same else None


def _settings(path: Path) -> dict[str, Any]:
    bounds = Bounds(limits.SETTINGS_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
    try:
        with _open(path) as file:
            settings = loads(file.read(bounds.bytes + 1), bounds)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise BadData(printable(str(path)), "damaged", "give another file to -o")
    return settings


def _open(path: Path) -> BufferedReader:
    return regular_files.open_regular(path, follow=False)


def _lines(path: Path) -> Iterator[bytes]:
    with _open(path) as file:
        yield from bounded(file)


def _count(path: Path) -> int:
    with _open(path) as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_PIECE), b""))


def _short(value: Any) -> str:
    text = printable(json.dumps(value, ensure_ascii=False)[:61])
    return text if len(text) <= 60 else text[:57] + "…"
