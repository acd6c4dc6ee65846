"""What is to be asked: SOURCE -> tasks, a picture and a question each, in an order that stays the same."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from llava_cli import limits
from llava_cli.batch.lines import bounded, is_too_long, parse
from llava_cli.batch.roots import is_below, resolved
from llava_cli.bounded_json import TooMuch
from llava_cli.errors import BadData, InputMissing, OutputError, UsageError
from llava_cli.images import SUFFIXES
from llava_cli.untrusted_text import printable

STDIN = "-"
_USAGE = 'llava batch photos/ "describe the photo" -o out.jsonl'


@dataclass(frozen=True)
class Task:
    """One row to be. `image` is a path, as its source has it, or a URL; the rest is what the row asks and says."""

    image: str
    question: str
    id: str | int | float | None = None
    system: str | None = None
    max_tokens: int | None = None
    answer: str | tuple[str, ...] | None = None
    """The right answer, or several of them, where the source tells."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What no two rows of a run have in common."""
        return self.image, self.question, self.id

    def to_line(self) -> bytes:
        return (json.dumps({k: v for k, v in asdict(self).items() if v is not None}) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Task:
        """Raises `BadData` for what is no line of a manifest."""
        try:
            values = parse(line)
            if isinstance(values.get("answer"), list):
                values["answer"] = tuple(values["answer"])
            task = cls(**values)
            values = [(field, getattr(task, field.name)) for field in fields(cls)]
            if all(value is field.default or _FITS[field.name](value) for field, value in values):
                return task
        except (ValueError, TypeError, AttributeError):
            pass
        raise BadData("manifest", "damaged", "give another file to -o")


@dataclass(frozen=True)
class Source:
    """Where tasks come from.

    `name` is a folder, a file of paths, a questions `.jsonl` or "-"; `questions` are asked about each picture,
    in a questions file about those that have none of their own. `include` are patterns of file names in a folder;
    `null` says that paths end in NUL; `root` is where relative paths begin (None: by the kind of source), and for a
    questions file also what all of its pictures are below.
    """

    name: str
    questions: Sequence[str] = ()
    include: Sequence[str] = ()
    null: bool = False
    root: str | None = None

    @cached_property
    def is_folder(self) -> bool:
        return self.name != STDIN and os.path.isdir(self.name)

    @property
    def is_questions(self) -> bool:
        return self.name.lower().endswith(".jsonl") and not self.is_folder

    @property
    def folder(self) -> str:
        """Where relative paths begin: the folder itself, a questions file's own, else the current one."""
        if self.root is not None:
            return self.root
        if self.is_folder:
            return self.name
        return os.path.dirname(self.name) if self.is_questions else ""

    @cached_property
    def _real_folder(self) -> str:
        """Where `folder` leads; looked up once, for it is asked of each picture."""
        return os.path.realpath(self.folder)

    def locate(self, image: str) -> str:
        """Where the path of a task's picture leads. Raises `InputMissing` for one that its source may not name.

        Whoever wrote a questions file is often a stranger: what it names is below its folder, or the one that the user
        names, wherever links lead. In a folder of pictures links to files are followed, as other programs do it. The
        paths of a list are the user's own.
        """
        path = os.path.join(self.folder, image)
        found = resolved(path)
        is_inside = True
        if self.is_questions:
            is_inside = is_below(found, self._real_folder)
        elif self.is_folder:  # what leads out is said by a manifest, no folder
            is_inside = is_below(os.path.abspath(path), os.path.abspath(self.folder))
        if not is_inside:
            reason = f"is outside {printable(self.folder) or 'the current folder'}"
            raise InputMissing(printable(image), reason, "--root FOLDER names another root")
        return found

    def check(self) -> None:
        """Raises what would go wrong, before anything is loaded or written."""
        if not self.name:
            raise UsageError("SOURCE", "there is none", _USAGE)
        if self.name == STDIN:
            if sys.stdin is None or sys.stdin.isatty():
                raise UsageError(STDIN, "no paths on stdin", 'find . -name "*.jpg" | llava batch - "what is this?"')
        elif not os.path.exists(self.name):
            raise InputMissing(printable(self.name), "no such file or folder")
        if not self.is_questions and not any(self.questions):
            raise UsageError("QUESTION", "there is none", _USAGE)
        if any(not question.strip() for question in self.questions):
            raise UsageError("QUESTION", "it is empty", _USAGE)

    def tasks(self) -> Iterator[Task]:
        """In the source's order, a folder's by path; raises `BadData` for a line of questions that is none."""
        if self.is_questions:
            yield from self._asked()
            return
        for image in in_order(walk(self.name, self.include)) if self.is_folder else self._listed():
            for question in self.questions:
                yield Task(image, question)

    def _listed(self) -> Iterator[str]:
        with _opened(self.name) as file:
            for path in _split(file, b"\0" if self.null else b"\n"):
                if is_too_long(path):
                    reason = f"a path in it is longer than {limits.ROW_BYTES:,} bytes"
                    raise BadData(printable(self.name), reason, "-0 says that paths end in NUL")
                if path := path if self.null else path.rstrip(b"\r"):
                    yield os.fsdecode(path)

    def _asked(self) -> Iterator[Task]:
        with _opened(self.name) as file:
            for number, line in enumerate(bounded(file), 1):
                if line.strip():
                    yield from self._row(line, f"{printable(self.name)}, line {number}")

    def _row(self, line: bytes, where: str) -> Iterator[Task]:
        try:
            row = parse(line)
        except TooMuch as error:
            raise BadData(where, str(error), _EXAMPLE) from None
        except ValueError:
            raise BadData(where, "not JSON", _EXAMPLE) from None
        if not isinstance(row, dict):
            raise BadData(where, "not a JSON object", _EXAMPLE)
        known = {field.name: row[field.name] for field in fields(Task) if row.get(field.name) is not None}
        known["answer"] = _gold(known.get("answer"))
        wrong = [name for name, value in known.items() if value is not None and not _is_fit(name, value)]
        if wrong or "image" not in known:
            name = wrong[0] if wrong else "image"
            raise BadData(where, f"{name!r} is {'not what it should be' if wrong else 'missing'}", _EXAMPLE)
        questions = [known.pop("question")] if "question" in known else self.questions
        if not questions:
            raise BadData(where, "'question' is missing", _EXAMPLE)
        for question in questions:
            yield Task(question=question, **known)


_EXAMPLE = '{"image": "a.jpg", "question": "what is this?"}'
_FITS: dict[str, Callable[[Any], bool]] = {
    "image": lambda value: isinstance(value, str) and value != "" and "\0" not in value,
    "question": lambda value: isinstance(value, str) and value.strip() != "",
    "id": lambda value: isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)),
    "system": lambda value: isinstance(value, str),
    "max_tokens": lambda value: type(value) is int and 1 <= value <= 1_000_000,
    "answer": lambda value: isinstance(value, (str, tuple)) and all(isinstance(one, str) for one in value),
}


def _is_fit(name: str, value: Any) -> bool:
    """Whether a value of a questions file is one for its field; texts have a UTF-8 form, unlike names of files."""
    is_text = name in ("image", "question", "system")
    return _FITS[name](value) and not (is_text and value != value.encode("utf-8", "ignore").decode())


def _gold(value: Any) -> Any:
    """A right answer as text: numbers and booleans as they are written in JSON."""
    if isinstance(value, list):
        return tuple(str(_gold(one)) for one in value)
    return json.dumps(value) if isinstance(value, (int, float)) else value


def _opened(name: str) -> AbstractContextManager[IO[bytes]]:
    if name == STDIN:
        return nullcontext(sys.stdin.buffer)
    try:
        return open(name, "rb")
    except OSError as error:
        raise InputMissing(printable(name), (error.strerror or str(error)).lower()) from None


def _split(file: IO[bytes], end: bytes) -> Iterator[bytes]:
    """What stands between the ends, without them, as soon as it is there. What is too long is the last, in part."""
    rest = bytearray()
    read = getattr(file, "read1", file.read)
    while (chunk := read(65_536)) and not is_too_long(rest):
        first, *more = chunk.split(end)
        rest += first
        if more:
            yield bytes(rest)
            yield from more[:-1]
            rest = bytearray(more[-1])
    if rest:
        yield bytes(rest)


def walk(folder: str, include: Sequence[str] = ()) -> Iterator[str]:
    """The pictures in a folder and those below it, as paths from it; in no order.

    Hidden names are skipped. Links to files are followed, those to folders are not. What is a picture is told by
    `include`, patterns of names or paths, else by its ending.
    """
    folders = [""]
    while folders:
        inside = folders.pop()
        try:
            entries = os.scandir(os.path.join(folder, inside))
        except OSError as error:
            raise InputMissing(
                printable(os.path.join(folder, inside)), (error.strerror or str(error)).lower()
            ) from None
        with entries:
            for entry in entries:
                path = os.path.join(inside, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                elif _included(path, include) and not os.path.isdir(entry.path):  # is_dir() raises for a link to itself
                    yield path


def _included(path: str, include: Sequence[str]) -> bool:
    if not include:
        return path.lower().endswith(SUFFIXES)
    return any(fnmatch(path, pattern) or fnmatch(os.path.basename(path), pattern) for pattern in include)


def in_order(paths: Iterable[str]) -> Iterator[str]:
    """Sorted by their bytes, on disk: there may be more than memory holds."""
    with _scratch() as base:
        base.execute("create table path (name blob)")
        base.executemany("insert into path values (?)", ((os.fsencode(path),) for path in paths))
        for (name,) in base.execute("select name from path order by name"):
            yield os.fsdecode(name)


def merged(old: Iterable[bytes], new: Iterable[Task]) -> Iterator[tuple[bytes, bool]]:
    """Lines of a manifest, then the tasks that are not among them, no task twice: (line, whether it is in `new`).

    With an empty `old` these are the tasks without repetitions.
    """
    with _scratch() as base:
        base.execute("create table task (place integer primary key, key text unique, line blob, found int)")
        insert = "insert into task (key, line, found) values (?, ?, ?) on conflict (key) do update set found = 1"
        base.executemany(insert, ((repr(Task.from_line(line).key), line, 0) for line in old))
        base.executemany(insert, ((repr(task.key), task.to_line(), 1) for task in new))
        for line, found in base.execute("select line, found from task order by place"):
            yield line, bool(found)


def distinct(tasks: Iterable[Task]) -> Iterator[Task]:
    """No task twice, as they come."""
    with _scratch() as base:
        base.execute("create table task (key text primary key) without rowid")
        for task in tasks:
            if base.execute("insert or ignore into task values (?)", (repr(task.key),)).rowcount:
                yield task


@contextmanager
def _scratch() -> Iterator[sqlite3.Connection]:
    """A database of which no more than a few MB are in memory, gone in the end."""
    with tempfile.TemporaryDirectory(prefix="llava-") as folder:
        try:
            with closing(sqlite3.connect(Path(folder) / "scratch.db", check_same_thread=False)) as base:
                base.executescript("pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -8000")
                yield base
        except sqlite3.Error as error:
            raise OutputError(folder, str(error), "TMPDIR=FOLDER llava … puts it elsewhere") from None
