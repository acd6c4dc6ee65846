"""One row to be: a picture and a question. Many of them are put in order on disk."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from llava_cli.batch.lines import parse
from llava_cli.errors import BadData, OutputError
from llava_cli.paths import scratch_folder


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
        """What a row is about. A source may ask the same more than once: each has its row."""
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


_FITS: dict[str, Callable[[Any], bool]] = {
    "image": lambda value: isinstance(value, str) and value != "" and "\0" not in value,
    "question": lambda value: isinstance(value, str) and value.strip() != "",
    "id": lambda value: isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)),
    "system": lambda value: isinstance(value, str),
    "max_tokens": lambda value: type(value) is int and 1 <= value <= 1_000_000,
    "answer": lambda value: isinstance(value, (str, tuple)) and all(isinstance(one, str) for one in value),
}


def is_fit(name: str, value: Any) -> bool:
    """Whether a value of a questions file is one for its field; texts have a UTF-8 form, unlike names of files."""
    is_text = name in ("image", "question", "system")
    return _FITS[name](value) and not (is_text and value != value.encode("utf-8", "ignore").decode())


def gold(value: Any) -> Any:
    """A right answer as text: numbers and booleans as they are written in JSON."""
    if isinstance(value, list):
        return tuple(str(gold(one)) for one in value)
    return json.dumps(value) if isinstance(value, (int, float)) else value


def in_order(paths: Iterable[str]) -> Iterator[str]:
    """Sorted by their bytes, on disk: there may be more than memory holds."""
    with _scratch() as base:
        base.execute("create table path (name blob)")
        base.executemany("insert into path values (?)", ((os.fsencode(path),) for path in paths))
        for (name,) in base.execute("select name from path order by name"):
            yield os.fsdecode(name)


def merged(old: Iterable[bytes], new: Iterable[Task]) -> Iterator[tuple[bytes, bool]]:
    """Lines of a manifest, then the tasks that are not among them: (line, whether it is in `new`).

    A task that is in `new` three times is in the result three times, however many of them `old` has.
    """
    with _scratch() as base:
        base.execute("create table task (place integer primary key, key text, nth int, line blob, found int)")
        base.execute("create unique index once on task (key, nth)")
        insert = "insert into task (key, nth, line, found) values (?, ?, ?, {}) on conflict (key, nth) do "
        keyed = ((repr(Task.from_line(line).key), line) for line in old)
        _insert(base, "old", insert.format(0) + "nothing", keyed)
        keyed = ((repr(task.key), task.to_line()) for task in new)
        _insert(base, "new", insert.format(1) + "update set found = 1 where found = 0", keyed)
        for line, found in base.execute("select line, found from task order by place"):
            yield line, bool(found)


def _insert(base: sqlite3.Connection, name: str, insert: str, keyed: Iterable[tuple[str, bytes]]) -> None:
    """Inserts lines, a key's first one as its first, and so on; `insert` changes no row for one that was there."""
    base.execute(f"create table {name} (key text primary key, count int) without rowid")
    count = f"insert into {name} values (?, 2) on conflict (key) do update set count = count + 1"
    for key, line in keyed:
        if base.execute(insert, (key, 1, line)).rowcount == 0:
            base.execute(count, (key,))
            (nth,) = base.execute(f"select count from {name} where key = ?", (key,)).fetchone()
            base.execute(insert, (key, nth, line))


@contextmanager
def _scratch() -> Iterator[sqlite3.Connection]:
    """A database of which no more than a few MB are in memory, gone in the end."""
    with scratch_folder() as folder:
        try:
            with closing(sqlite3.connect(folder / "scratch.db", check_same_thread=False)) as base:
                base.executescript("pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -8000")
                yield base
        except sqlite3.Error as error:
            raise OutputError(str(folder), str(error), "TMPDIR=FOLDER llava … puts it elsewhere") from None
