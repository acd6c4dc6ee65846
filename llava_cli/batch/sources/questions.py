"""A file of questions -> tasks: JSON lines, a JSON array of objects, or a table.

A row has the keys of `Task`. Data sets often have other names for them: an error about a missing key names the one
that was probably meant, and keys that are ignored are counted.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import IO, Any

from llava_cli import files, limits
from llava_cli.batch.lines import bounded_lines, is_too_long, parse_line
from llava_cli.batch.sources import foreign_files
from llava_cli.batch.sources.context import bounded_context
from llava_cli.batch.sources.listing import STDIN, Layout, Listing
from llava_cli.batch.sources.question_keys import KEY_CHARACTERS, has_rows, jq_path, jq_value, meant_key, shown
from llava_cli.batch.tasks import FORMS, Task, expected_answer, is_valid
from llava_cli.bounded_json import Bounds, TooMuch, loads
from llava_cli.errors import BadData, UsageError
from llava_cli.parts import parse_region
from llava_cli.settings import OPTIONS

Check = Callable[[Task], None]
EXAMPLE = '{"image": "a.jpg", "question": "what is this?"}'
_FORM_EXAMPLES = {
    "choices": '"choices": ["sunny", "rain"]',
    "schema": '"schema": "shop, total float, items [name, price float]"',
    "regex": '"regex": "[0-9]+ (cats|dogs)"',
}
_NUMBERS: dict[str, tuple[str, Callable[[str], float]]] = {
    "max_tokens": ("[0-9]{1,9}", int),
    "page": ("[0-9]{1,9}", int),
    "time": (r"[0-9]{1,9}(\.[0-9]{1,9})?", float),
}
"""Columns of a table that are numbers: how they are written, and what reads them."""
_MAX_NAMES = 6
"""Keys or columns that a message lists."""
_FIELDS = tuple(field.name for field in fields(Task) if field.name not in ("row", "sight", "asked"))
_EXAMPLES = {"page": '"page": 2', "time": '"time": 12.5 is in seconds', "region": '"region": "60%,0,100%,30%"'}


class Questions:
    """The tasks in a listing; `default_questions` are for rows without a question of their own.

    `check` raises `UsageError` for a task that cannot be asked. `used` are columns of which the questions have fields.
    """

    def __init__(
        self, listing: Listing, default_questions: Sequence[str], check: Check, used: Container[str] = ()
    ) -> None:
        self.listing, self.default_questions, self._check, self._used = listing, default_questions, check, used
        self.ignored: Counter[str] = Counter()
        """How many rows have a key that is ignored; counted when all rows are read for the first time."""
        self._is_counted = False

    def __getstate__(self) -> dict[str, Any]:
        """Without what holds rows against their forms, which is done as they are listed."""
        return {**vars(self), "_check": None, "_used": ()}

    def tasks(self) -> Iterator[Task]:
        """The tasks of each row, in order. Raises `BadData` for an invalid row."""
        readers = {Layout.JSON_LINES: _read_json_lines, Layout.JSON_ARRAY: _read_json_array, Layout.TABLE: _read_table}
        with self.listing.open_text() as file:
            for place, row in readers[self.listing.layout](self.listing, file):
                yield from self._tasks_of(place, row)
        self._is_counted = True

    def _tasks_of(self, place: str, row: Any) -> Iterator[Task]:
        if not isinstance(row, dict):
            raise BadData(place, "not a JSON object", EXAMPLE)
        values = {name: row[name] for name in _FIELDS if row.get(name) is not None}
        self._count_ignored(row)
        values["answer"] = expected_answer(values.get("answer"))
        if "region" in values:
            with _errors_at(place):
                values["region"] = parse_region("'region'", values["region"])
        for name in FORMS.keys() & values.keys():
            with _errors_at(place):
                values[name] = FORMS[name](OPTIONS[name].flag, values[name])
        invalid = [name for name, value in values.items() if value is not None and not is_valid(name, value)]
        if invalid:
            hint = _EXAMPLES.get(invalid[0], EXAMPLE)
            raise BadData(place, f"{invalid[0]!r} is not what it should be", hint)
        questions = [values.pop("question")] if "question" in values else self.default_questions
        missing = [name for name, exists in (("image", "image" in values), ("question", questions)) if not exists]
        if missing:
            raise self._missing(place, row, missing)
        context = bounded_context({key: value for key, value in row.items() if key not in _FIELDS})
        for question in questions:
            task = Task(question=question, row=context, **values)
            with _errors_at(place):
                self._check(task)
            yield task

    def _count_ignored(self, row: dict[str, Any]) -> None:
        for key, value in () if self._is_counted else row.items():
            if key in _FIELDS or value is None:
                continue
            name = key[:KEY_CHARACTERS]
            if name in self.ignored or len(self.ignored) < limits.COUNTED_NAMES:
                self.ignored[name] += 1

    def note(self) -> str:
        """The ignored keys in one line; empty if there are none."""
        ignored = Counter({key: count for key, count in self.ignored.items() if key not in self._used})
        parts = [_count_note(key, count) for key, count in ignored.most_common(_MAX_NAMES)]
        if not parts:
            return ""
        more = len(ignored) - _MAX_NAMES
        others = f" and {more:,} others" if more > 0 else ""
        return f"ignored keys: {', '.join(parts)}{others}"

    def _missing(self, place: str, row: dict[str, Any], missing: list[str]) -> BadData:
        """The error for a row without these keys, with the keys that were probably meant and a command that helps."""
        meant = {}
        for name in missing:
            if key := next((key for key in row if key != name and meant_key(key) == name), None):
                meant[name] = key
        reason = f"{missing[0]!r} is missing"
        if missing[0] in meant:
            reason += f"; {shown(meant[missing[0]])} is ignored"
        if meant:
            filters = " | ".join(f".{name} = {jq_value(key)}" for name, key in meant.items())
            return BadData(place, reason, self._jq_command(filters))
        nested = next((key for key, value in row.items() if has_rows(value)), "")
        return BadData(place, reason, self._jq_command(f"{jq_path(nested)}[]") if nested else EXAMPLE)

    def _jq_command(self, filters: str) -> str:
        """The command that runs the file's rows through jq filters and asks the result."""
        source, layout = self.listing.source, self.listing.layout
        each = ".[] | " if layout is Layout.JSON_ARRAY else ""
        folder = os.path.dirname(source) if source != STDIN else ""
        root = f" --root {files.quoted(folder)}" if folder and not self.listing.is_stream else ""
        return f"jq -c {files.quoted(each + filters)} {self.listing.typed} | llava batch -{root} …"


def _read_json_lines(listing: Listing, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(bounded_lines(file), 1):
        if line.strip():
            place = f"{listing.name}, line {number}"
            yield place, _parse(listing, place, parse_line, line)


def _read_json_array(listing: Listing, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    bounds = Bounds(limits.ROW_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
    rows = _parse(listing, listing.name, partial(loads, bounds=bounds), file.read(bounds.bytes + 1))
    if not isinstance(rows, list):
        raise BadData(listing.name, "JSON, but no array of objects", EXAMPLE)
    for number, row in enumerate(rows, 1):
        yield f"{listing.name}, item {number}", {"image": row} if isinstance(row, str) else row


def _read_table(listing: Listing, file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(_decoded_lines(listing, file), delimiter=listing.delimiter)
    try:
        names = [name.strip() for name in next(reader, [])]
        columns = [name.lower() if name.lower() in _FIELDS else name for name in names]
        if names and "image" not in columns:
            raise _no_image_column(listing, names)
        for values in reader:
            row: dict[str, Any] = {name: value for name, value in zip(columns, values, strict=False) if value.strip()}
            for name, (pattern, parse) in _NUMBERS.items():
                if re.fullmatch(pattern, row.get(name, "").strip()):
                    row[name] = parse(row[name])
            if row:
                yield f"{listing.name}, line {reader.line_num}", row
    except csv.Error as error:
        raise BadData(f"{listing.name}, line {reader.line_num}", str(error)) from None


def _decoded_lines(listing: Listing, file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(bounded_lines(file), 1):
        place = f"{listing.name}, line {number}"
        if is_too_long(line):
            raise BadData(place, f"longer than {limits.ROW_BYTES:,} bytes")
        yield _parse(listing, place, bytes.decode, line)


def _no_image_column(listing: Listing, names: list[str]) -> BadData:
    """The error for a table without an "image" column, with a command that renames or adds one."""
    meant = next((name for name in names if meant_key(name) == "image"), "")
    folder = os.path.dirname(listing.source) if listing.source != STDIN else ""
    rest = f"{listing.typed} | llava batch -{f' --root {files.quoted(folder)}' if folder else ''} …"
    hint = "its first line names its columns: image,question"
    if meant:
        hint = f"sed {files.quoted(f'1s/{re.escape(meant)}/image/')} {rest}"
    elif names and foreign_files.is_picture(b"", names[0]):
        hint = f"cut -d {files.quoted(listing.delimiter)} -f 1 {rest}"
    columns = ", ".join(shown(name) for name in names[:_MAX_NAMES])
    return BadData(f"{listing.name}, line 1", f"none of its columns is 'image': {columns}", hint)


def _parse(listing: Listing, place: str, parse: Callable[[bytes], Any], data: bytes) -> Any:
    """What `parse` makes of the data; its `ValueError` becomes `BadData`."""
    try:
        return parse(data)
    except TooMuch as error:
        raise BadData(place, str(error), listing.nested_rows_hint or EXAMPLE) from None
    except UnicodeDecodeError:
        raise BadData(place, "not UTF-8", f"iconv -f latin1 -t utf-8 {listing.typed} | llava batch - …") from None
    except ValueError:
        raise BadData(place, "not JSON", EXAMPLE) from None


@contextmanager
def _errors_at(place: str) -> Iterator[None]:
    """Makes an error about options one about a row, which has keys in their place."""
    try:
        yield
    except UsageError as error:
        thing, reason = error.thing, error.reason
        for name in FORMS:
            thing, reason = (text.replace(OPTIONS[name].flag, repr(name)) for text in (thing, reason))
        by_flag = {OPTIONS[name].flag: example for name, example in _FORM_EXAMPLES.items()}
        hint = by_flag.get(error.hint.partition(" ")[0], error.hint)
        raise BadData(f"{place}: {thing}", reason, hint) from None


def _count_note(key: str, count: int) -> str:
    meant = meant_key(key)
    rows = f"{count:,} row{'s' * (count > 1)}"
    return f"{shown(key)} ({rows}; {meant!r} is read)" if meant else f"{shown(key)} ({rows})"
