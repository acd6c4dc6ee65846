"""The output of a run and what stands beside it: a run that was killed goes on, and no row is lost or doubled.

Beside `out.jsonl` is the folder `out.jsonl.run`: `settings.json`, which rows of one run have in common; `manifest`,
the tasks, in the order of the rows; `lock`; and `torn-N`, what was cut off or taken out of the output. A row is a
line, appended whole, and row N is about line N of the manifest: to go on means to count.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from llava_cli.batch import files
from llava_cli.batch.rows import is_whole, to_line
from llava_cli.batch.tasks import Task, merged
from llava_cli.errors import BadData, OutputError, OutputTaken

SYNC_ROWS, SYNC_SECONDS = 64, 1.0
See = Callable[[Task, dict[str, Any]], None]


class Journal:
    """The rows of one run, for one writer at a time."""

    def __init__(self, output: Path) -> None:
        self.output = output
        real = os.path.realpath(output)  # who comes by a link, too, has to find the lock
        self.folder = Path(real + ".run")
        self.done = 0
        """How many rows are written."""
        self.total = 0
        """How many there will be."""
        self.again = array("q")
        """The numbers of rows that are to be answered once more."""
        self._manifest = self.folder / "manifest"
        self._lock = self._file = -1
        self._size, self._unsynced, self._synced = 0, 0, time.monotonic()

    def lock(self) -> None:
        """Takes the output for this process. Raises `OutputTaken` where another one has it, or nobody can write it."""
        try:
            if self.output.exists() and not self.output.is_file():
                raise OutputTaken(str(self.output), "not a regular file", "without -o rows go to stdout")
            self.folder.mkdir(exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file = os.open(self.output, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except BlockingIOError:
            raise OutputTaken(
                str(self.output), "another run is writing it", "wait for it, or give another file to -o"
            ) from None
        except OSError as error:
            raise OutputTaken(str(self.output), (error.strerror or str(error)).lower()) from None

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
        path = self.folder / "settings.json"
        if not path.exists() or not self._manifest.exists() or not self._manifest.stat().st_size:
            if os.fstat(self._file).st_size:
                reason = "it has rows already, and no folder .run beside it that says what made them"
                raise BadData(str(self.output), reason, "give another file to -o")
            # What is no UTF-8 in it becomes an escape of JSON's.
            text = json.dumps(settings, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
            with self._writing():
                files.put(self._manifest, (line for line, _ in merged((), tasks)))
                files.put(path, [text + b"\n"])
                files.sync_folder(self.folder.parent)
            self.total = _count(self._manifest)
            return 0, 0
        self._compare(_settings(path), json.loads(json.dumps(settings)))
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
        end, damaged = 0, bytearray()
        with open(self.output, "rb") as rows, open(self._manifest, "rb") as manifest:
            for number, line in enumerate(rows):
                if not line.endswith(b"\n"):
                    break
                task = next(manifest, None)
                row = _row(line, Task.from_line(task)) if task else None
                if row is None and not repair:
                    hint = "--repair keeps that line aside and answers again" if task else "give another file to -o"
                    reason = "damaged, or not about what it should be" if task else "more rows than tasks"
                    raise BadData(f"{self.output}, line {number + 1}", reason, hint)
                if task is None:
                    break
                self.done, end = number + 1, end + len(line)
                damaged += b"" if row else line
                if row is None or (retry and row["status"] == "error"):
                    self.again.append(number)
                else:
                    see(Task.from_line(task), row)
        with self._writing():
            if damaged or end < size:
                self._keep(bytes(damaged) + os.pread(self._file, size - end, end))
            if end < size:
                files.cut(self._file, end)
        self._size = end

    def tasks(self) -> Iterator[Task]:
        """Those that have no row yet."""
        with open(self._manifest, "rb") as lines:
            yield from map(Task.from_line, islice(lines, self.done, None))

    def tasks_again(self) -> Iterator[Task]:
        """Those whose rows are to be replaced."""
        with open(self._manifest, "rb") as lines:
            wanted = iter(self.again)
            number = next(wanted, None)
            for at, line in enumerate(lines):
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
            with open(self.output, "rb") as old:
                for at, line in enumerate(old):
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
            before, self._file = self._file, os.open(self.output, os.O_RDWR | os.O_APPEND)
            os.close(before)
            self._size = os.fstat(self._file).st_size

    def _check_alone(self) -> None:
        """Raises `OutputTaken` where the file is not what this run has made of it."""
        ours = os.fstat(self._file)
        with self._writing():
            there = self.output.exists() and os.path.samestat(os.stat(self.output), ours)
        if not there or ours.st_size != self._size:
            raise OutputTaken(str(self.output), "somebody else has written to it, or taken it away")

    def _compare(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            changes = "; ".join(f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}" for name in names)
            raise BadData(str(self.output), f"other settings made its rows: {changes}", "give another file to -o")

    def _keep(self, data: bytes) -> None:
        """Puts what is taken out of the output in a file of its own."""
        number = 1
        while (torn := self.folder / f"torn-{number}").exists():
            number += 1
        files.put(torn, [data])

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Translates what a disk says."""
        try:
            yield
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise OutputError(str(self.output), reason, "the same command goes on") from None


def _row(line: bytes, task: Task) -> dict[str, Any] | None:
    """A line's row; None where it is none, or about something else."""
    try:
        row = json.loads(line)
        same = (row["image"], row["question"], row.get("id")) == task.key and is_whole(row)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if same else None


def _settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise BadData(str(path), "damaged", "give another file to -o")
    return settings


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file


def _count(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
