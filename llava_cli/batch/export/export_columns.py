"""Rows -> the columns of a table: their names, and what kind of values each of them has.

Objects of a fixed shape, such as the error, become columns with dotted names, as `pandas.json_normalize` names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llava_cli import limits
from llava_cli.batch.rows import KEYS
from llava_cli.untrusted_text import one_line

_OBJECTS: dict[str, tuple[str, ...]] = {
    "error": ("type", "message"),
    "confidence": ("mean", "lowest", "lowest_token"),
    "escalated": ("model", "answer"),
}
"""The objects whose members are columns, and those that are there in any case."""
_EXACT = 2**53
"""Integers beyond it are no longer exact as numbers with a fraction."""

# Kinds of columns.
TEXT, TEXTS, BOOLEAN, INTEGER, NUMBER, SHARES = "text", "texts", "boolean", "integer", "number", "shares"
_LONG, _JSON = "long", "json"
_MERGED: dict[frozenset[str], str] = {
    frozenset(): TEXT,
    frozenset({_LONG}): INTEGER,
    frozenset({INTEGER, _LONG}): INTEGER,
    frozenset({INTEGER, NUMBER}): NUMBER,
    frozenset({TEXT, TEXTS}): TEXTS,
}
"""The kind of a column whose values have several kinds, or one that is no column's; all others are text."""


def cells(row: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """The names of the columns that a row has values for, and these."""
    for key, value in row.items():
        name = f"{start}{key}"
        members = _OBJECTS.get(key)
        if members and isinstance(value, dict):
            yield from cells({**dict.fromkeys(members), **value}, f"{name}.")
        elif members and value is None:
            yield from ((f"{name}.{member}", None) for member in members)
        else:
            yield name, value


@dataclass
class Columns:
    """The columns that rows have, in the order in which they come; first of all those that every row has."""

    rows: int = 0
    kinds: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name, _ in cells(dict.fromkeys(KEYS))})

    def add(self, row: dict[str, Any]) -> None:
        """Takes the columns of a row in. Raises `ValueError`."""
        self.rows += 1
        names = set()
        for name, value in cells(row):
            if name in names:
                raise ValueError(f"has {one_line(name)!r} twice: as a key, and in an object")
            names.add(name)
            if name not in self.kinds and len(self.kinds) == limits.EXPORT_COLUMNS:
                raise ValueError(f"has keys beyond {limits.EXPORT_COLUMNS:,}, the most that a table may have")
            self.kinds.setdefault(name, set()).update(_kinds(name, value))

    @property
    def names(self) -> list[str]:
        return list(self.kinds)

    def kind(self, name: str) -> str:
        found = self.kinds[name]
        return _MERGED.get(frozenset(found), TEXT) if len(found) != 1 or found & {_LONG, _JSON} else min(found)


def _kinds(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return (TEXTS,)
    if isinstance(value, dict) and name.rpartition(".")[2] == "probabilities" and all(map(_is_share, value.values())):
        return (SHARES,)
    if isinstance(value, int) and not isinstance(value, bool):
        return (INTEGER if abs(value) <= _EXACT else _LONG if -(2**63) <= value < 2**63 else _JSON,)
    return ({bool: BOOLEAN, float: NUMBER, str: TEXT}.get(type(value), _JSON),)


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _EXACT


def as_text(value: Any) -> str:
    """A value in a column of texts: texts as they are, all else as JSON. Lone surrogates become JSON's escapes."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def converted(value: Any, kind: str) -> Any:
    """A value as its column has it; None stays None."""
    if value is None:
        return None
    if kind == TEXTS:
        return [as_text(item) for item in (value if isinstance(value, list) else [value])]
    if kind == SHARES:
        return [(as_text(choice), float(share)) for choice, share in value.items()]
    return as_text(value) if kind == TEXT else value
