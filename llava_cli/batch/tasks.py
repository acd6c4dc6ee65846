"""A task is a row to be made: a picture and a question. Large numbers of them are sorted and merged on disk."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from llava_cli.batch.lines import parse_line
from llava_cli.batch.scratch import scratch_database
from llava_cli.choices import check_choices, written_choices
from llava_cli.errors import BadData, UsageError
from llava_cli.parts import Part, parse_region
from llava_cli.schemas import parse_regex, written_grammar, written_schema


@dataclass(frozen=True)
class Task:
    """One question about one picture. `image` is a path, as the source has it, or a URL."""

    image: str
    question: str
    id: str | int | float | None = None
    system: str | None = None
    max_tokens: int | None = None
    answer: str | tuple[str, ...] | None = None
    """The right answer, or several that are right, if the source has one."""
    choices: tuple[str, ...] | None = None
    schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    page: int | None = None
    """Of a document or an animation, from 1."""
    time: float | None = None
    """Of a film's frame, in seconds."""
    region: str | None = None
    """What of the picture is looked at (see `parts.parse_region`)."""
    row: dict[str, Any] | None = None
    """What else the source says of the picture, for the fields of a question."""
    sight: bool | None = None
    """Whether it is in the sample of which the sight is told; no source says so."""
    asked: str | None = None
    """The question with its fields filled in; no source says so."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What the row is about. A source may have the same key more than once, and gets a row for each."""
        return self.image, self.question, self.id, self.page, self.time, self.region

    def about(self, image: str) -> Task:
        """The same of a picture of this name."""
        return self if image == self.image else replace(self, image=image)

    @property
    def wording(self) -> str:
        """The question as the model gets it."""
        return self.question if self.asked is None else self.asked

    @property
    def part(self) -> Part:
        return Part(self.page, self.time)

    def to_line(self) -> bytes:
        return (json.dumps({name: value for name, value in vars(self).items() if value is not None}) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> Task:
        """A task from a line of a manifest. Raises `BadData`."""
        try:
            values = parse_line(line)
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            if all(_VALIDATORS[name](value) for name, value in values.items()):
                return cls(**values)
        except (ValueError, TypeError, AttributeError, KeyError):
            pass
        raise BadData("manifest", "damaged", "give another file to -o")


def _choices(source: str, value: Any) -> tuple[str, ...]:
    check_choices(source, choices := written_choices(source, value))
    return choices


FORMS: dict[str, Callable[[str, Any], Any]] = {
    "choices": _choices,
    "schema": written_schema,
    "regex": parse_regex,
    "grammar": written_grammar,
}
"""Makes an answer's form, as an option has it, of what a source of questions says; none of them opens a file."""


def _is_parsed(parse: Callable[[str, Any], Any], value: Any) -> bool:
    """Whether a form is what a source's becomes: it must not be the name of a file, which an option may be."""
    try:
        return bool(value == parse("", value))
    except UsageError:
        return False


_VALIDATORS: dict[str, Callable[[Any], bool]] = {
    "image": lambda value: isinstance(value, str) and value != "" and "\0" not in value,
    "question": lambda value: isinstance(value, str) and value.strip() != "",
    "id": lambda value: isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)),
    "system": lambda value: isinstance(value, str),
    "max_tokens": lambda value: type(value) is int and 1 <= value <= 1_000_000,
    "answer": lambda value: isinstance(value, (str, tuple)) and all(isinstance(text, str) for text in value),
    **{name: partial(_is_parsed, parse) for name, parse in FORMS.items()},
    "page": lambda value: type(value) is int and value >= 1,
    "time": lambda value: isinstance(value, (int, float)) and math.isfinite(value) and value >= 0,
    "region": partial(_is_parsed, parse_region),
    "row": lambda value: isinstance(value, dict),
    "sight": lambda value: isinstance(value, bool),
    "asked": lambda value: isinstance(value, str),
}


def is_valid(name: str, value: Any) -> bool:
    """Whether a questions file may have this value for a field. Its texts, unlike file names, must be valid Unicode."""
    is_text = name in ("image", "question", "system")
    return _VALIDATORS[name](value) and not (is_text and value != value.encode("utf-8", "ignore").decode())


def expected_answer(value: Any) -> Any:
    """A right answer as text; numbers and booleans as JSON writes them."""
    if isinstance(value, list):
        return tuple(str(expected_answer(item)) for item in value)
    return json.dumps(value) if isinstance(value, (int, float)) else value


def sort_paths(paths: Iterable[str]) -> Iterator[str]:
    """Sorts paths by their bytes, on disk: there may be more of them than fit in memory. Raises `OutputError`."""
    with scratch_database() as database:
        database.execute("create table path (name blob)")
        database.executemany("insert into path values (?)", ((os.fsencode(path),) for path in paths))
        for (name,) in database.execute("select name from path order by name"):
            yield os.fsdecode(name)


def merge_tasks(manifest: Iterable[bytes], tasks: Iterable[Task]) -> Iterator[tuple[bytes, bool]]:
    """The lines of a manifest, then those of tasks that it lacks: (line, whether the task is among `tasks`).

    If a key occurs three times in `tasks`, it occurs at least three times in the result. Raises `OutputError`.
    """
    with scratch_database() as database:
        database.execute("create table task (place integer primary key, key text, nth int, line blob, found int)")
        database.execute("create unique index once on task (key, nth)")
        insert = "insert into task (key, nth, line, found) values (?, ?, ?, {}) on conflict (key, nth) do "
        old_lines = ((repr(Task.from_line(line).key), line) for line in manifest)
        _insert(database, "old", insert.format(0) + "nothing", old_lines)
        new_lines = ((repr(task.key), task.to_line()) for task in tasks)
        _insert(database, "new", insert.format(1) + "update set found = 1 where found = 0", new_lines)
        for line, is_in_tasks in database.execute("select line, found from task order by place"):
            yield line, bool(is_in_tasks)


def _insert(database: sqlite3.Connection, name: str, insert: str, keyed_lines: Iterable[tuple[str, bytes]]) -> None:
    """Runs `insert` with each key, line and the number of times that the key has occurred.

    `insert` must change no row if this key and number are there already. To save time, only keys that occur more than
    once are counted, in a table called `name`.
    """
    database.execute(f"create table {name} (key text primary key, count int) without rowid")
    count = f"insert into {name} values (?, 2) on conflict (key) do update set count = count + 1"
    for key, line in keyed_lines:
        if database.execute(insert, (key, 1, line)).rowcount == 0:
            database.execute(count, (key,))
            (nth,) = database.execute(f"select count from {name} where key = ?", (key,)).fetchone()
            database.execute(insert, (key, nth, line))
