"""The rows of a questions file -> tasks: JSON lines, an array of objects, or a table.

A row names its picture, its question and what else `Task` has. Other people's files call these otherwise: what is
missing is named beside what was probably meant, and what nobody reads is counted.
"""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import IO, Any

from llava_cli import files, limits
from llava_cli.batch import foreign_files
from llava_cli.batch.lines import bounded, is_too_long, parse
from llava_cli.batch.listing import STDIN, Layout, Listing
from llava_cli.batch.tasks import Task, gold, is_fit
from llava_cli.bounded_json import Bounds, TooMuch, loads
from llava_cli.errors import BadData
from llava_cli.untrusted_text import one_line

EXAMPLE = '{"image": "a.jpg", "question": "what is this?"}'
_LONGEST = 100
"""Characters of a key that tell what it is."""
_FIELDS = tuple(field.name for field in fields(Task))


def _plain_name(key: str) -> str:
    """A name without its case and the signs between its words."""
    return re.sub(r"[\W_]", "", key[:_LONGEST]).lower()


_OTHERS = {
    "image": "img pic picture photo file filename filepath path imagepath imagefile imagename imageurl imgpath imgurl"
    " imgname url uri images imageid",
    "question": "text prompt query instruction q input caption userprompt conversations messages conversation",
    "id": "questionid qid uid uuid",
    "answer": "answers label gold goldanswer groundtruth gt expected target reference",
    "system": "systemprompt systemmessage",
    "max_tokens": "maxnewtokens maxlength maxcompletiontokens",
}
"""Other names of our fields, as `_plain_name` makes them."""
_MEANT = {other: name for name, others in _OTHERS.items() for other in (_plain_name(name), *others.split())}
_JQ = {
    "conversations": '({path}[0].value | sub("\\\\s*<image>\\\\s*"; ""))',
    "conversation": '({path}[0].value | sub("\\\\s*<image>\\\\s*"; ""))',
    "messages": "{path}[0].content",
    "images": "{path}[0]",
    "imageid": '"\\({path}).jpg"',
}
"""How jq takes a question or picture out of what is no plain text."""
_SAID = 6
"""Keys or columns that are told of."""


def meant_by(key: str) -> str | None:
    """Our name of what a column or key is probably about."""
    return _MEANT.get(_plain_name(key))


class Questions:
    """What a listing asks. `common` is asked about pictures whose row has no question of its own."""

    def __init__(self, listing: Listing, common: Sequence[str]) -> None:
        self.listing, self.common = listing, common
        self.unread: Counter[str] = Counter()
        """Keys of rows that nobody reads, counted the first time that all rows are gone through."""
        self._is_counted = False

    def tasks(self) -> Iterator[Task]:
        """Those of each row, in order. Raises `BadData` for a row that is none."""
        readers = {Layout.JSON_LINES: _json_lines, Layout.JSON_ARRAY: _json_array, Layout.TABLE: _table}
        with self.listing.lines() as file:
            for where, row in readers[self.listing.layout](self.listing, file):
                yield from self._asked(where, row)
        self._is_counted = True

    def _asked(self, where: str, row: Any) -> Iterator[Task]:
        if not isinstance(row, dict):
            raise BadData(where, "not a JSON object", EXAMPLE)
        known = {name: row[name] for name in _FIELDS if row.get(name) is not None}
        self._count_unread(row)
        known["answer"] = gold(known.get("answer"))
        wrong = [name for name, value in known.items() if value is not None and not is_fit(name, value)]
        if wrong:
            raise BadData(where, f"{wrong[0]!r} is not what it should be", EXAMPLE)
        questions = [known.pop("question")] if "question" in known else self.common
        missing = [name for name, there in (("image", "image" in known), ("question", questions)) if not there]
        if missing:
            raise self._missing(where, row, missing)
        for question in questions:
            yield Task(question=question, **known)

    def _count_unread(self, row: dict[str, Any]) -> None:
        for key, value in () if self._is_counted else row.items():
            if key in _FIELDS or value is None:
                continue
            name = key[:_LONGEST]
            if name in self.unread or len(self.unread) < limits.COUNTED_NAMES:
                self.unread[name] += 1

    def note(self) -> str:
        """Which keys nobody reads, in one line; nothing where there are none."""
        parts = [_said(key, count) for key, count in self.unread.most_common(_SAID)]
        if not parts:
            return ""
        more = len(self.unread) - _SAID
        others = f" and {more:,} others" if more > 0 else ""
        return f"nobody reads {', '.join(parts)}{others}"

    def _missing(self, where: str, row: dict[str, Any], missing: list[str]) -> BadData:
        """A row without something that it needs; what was probably meant, and how to say so."""
        meant = {}
        for name in missing:
            if key := next((key for key in row if key != name and meant_by(key) == name), None):
                meant[name] = key
        reason = f"{missing[0]!r} is missing"
        if missing[0] in meant:
            reason += f"; nobody reads {_shown(meant[missing[0]])}"
        if meant:
            filters = " | ".join(f".{name} = {_jq(key)}" for name, key in meant.items())
            return BadData(where, reason, self._piped(filters))
        inside = next((key for key, value in row.items() if _has_rows(value)), "")
        return BadData(where, reason, self._piped(f"{_jq_path(inside)}[]") if inside else EXAMPLE)

    def _piped(self, filters: str) -> str:
        """The command that asks the same file's rows after a change of them."""
        source, layout = self.listing.source, self.listing.layout
        each = ".[] | " if layout is Layout.JSON_ARRAY else ""
        folder = os.path.dirname(source) if source != STDIN else ""
        root = f" --root {files.quoted(folder)}" if folder and not self.listing.is_stream else ""
        return f"jq -c {files.quoted(each + filters)} {self.listing.typed} | llava batch -{root} …"


def _json_lines(listing: Listing, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(bounded(file), 1):
        if line.strip():
            where = f"{listing.name}, line {number}"
            yield where, _parsed(listing, where, parse, line)


def _json_array(listing: Listing, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    bounds = Bounds(limits.ROW_BYTES, limits.ROW_DEPTH, limits.ROW_ITEMS)
    rows = _parsed(listing, listing.name, partial(loads, bounds=bounds), file.read(bounds.bytes + 1))
    if not isinstance(rows, list):
        raise BadData(listing.name, "JSON, but no array of objects", EXAMPLE)
    for number, row in enumerate(rows, 1):
        yield f"{listing.name}, item {number}", {"image": row} if isinstance(row, str) else row


def _table(listing: Listing, file: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(_texts(listing, file), delimiter=listing.delimiter)
    try:
        names = [name.strip() for name in next(reader, [])]
        columns = [name.lower() if name.lower() in _FIELDS else name for name in names]
        if names and "image" not in columns:
            raise _no_column(listing, names)
        for values in reader:
            row: dict[str, Any] = {name: value for name, value in zip(columns, values, strict=False) if value.strip()}
            length = row.get("max_tokens", "")
            if re.fullmatch("[0-9]{1,9}", length):
                row["max_tokens"] = int(length)
            if row:
                yield f"{listing.name}, line {reader.line_num}", row
    except csv.Error as error:
        raise BadData(f"{listing.name}, line {reader.line_num}", str(error)) from None


def _texts(listing: Listing, file: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(bounded(file), 1):
        where = f"{listing.name}, line {number}"
        if is_too_long(line):
            raise BadData(where, f"longer than {limits.ROW_BYTES:,} bytes")
        yield _parsed(listing, where, bytes.decode, line)


def _no_column(listing: Listing, names: list[str]) -> BadData:
    """A table whose first line does not say where its pictures are."""
    meant = next((name for name in names if meant_by(name) == "image"), "")
    folder = os.path.dirname(listing.source) if listing.source != STDIN else ""
    rest = f"{listing.typed} | llava batch -{f' --root {files.quoted(folder)}' if folder else ''} …"
    hint = "its first line names its columns: image,question"
    if meant:
        hint = f"sed {files.quoted(f'1s/{re.escape(meant)}/image/')} {rest}"
    elif names and foreign_files.is_picture(b"", names[0]):
        hint = f"cut -d {files.quoted(listing.delimiter)} -f 1 {rest}"
    columns = ", ".join(_shown(name) for name in names[:_SAID])
    return BadData(f"{listing.name}, line 1", f"none of its columns is 'image': {columns}", hint)


def _parsed(listing: Listing, where: str, parse: Callable[[bytes], Any], data: bytes) -> Any:
    """What is in a line, or in all lines together. Raises `BadData`."""
    try:
        return parse(data)
    except TooMuch as error:
        raise BadData(where, str(error), listing.rows_inside or EXAMPLE) from None
    except UnicodeDecodeError:
        raise BadData(where, "not UTF-8", f"iconv -f latin1 -t utf-8 {listing.typed} | llava batch - …") from None
    except ValueError:
        raise BadData(where, "not JSON", EXAMPLE) from None


def _said(key: str, count: int) -> str:
    meant = meant_by(key)
    rows = f"{count:,} row{'s' * (count > 1)}"
    return f"{_shown(key)} ({rows}; {meant!r} is read)" if meant else f"{_shown(key)} ({rows})"


def _shown(key: str) -> str:
    return repr(one_line(key, 40))


def _jq(key: str) -> str:
    """What jq takes for a row's question or picture."""
    return _JQ.get(_plain_name(key), "{path}").format(path=_jq_path(key))


def _jq_path(key: str) -> str:
    return f".{key}" if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key) else f'.["{one_line(key, 40)}"]'


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
