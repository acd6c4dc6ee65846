"""What a user gives as the form of an answer, a JSON schema, a regular expression or a grammar, as text.

A schema may be a JSON schema, or fields in one line:

    shop, total float, date, paid? bool, items [name, price float], size small|medium|large

    fields  a field, or several with commas between them
    field   NAME, then `?` where it may be left out, then its type; without one it is a text
    NAME    a word, or any text in double quotes
    type    str, int, float, number, bool, date (2026-11-28) or time (14:30)
            A|B|C: one of these values; numbers, true, false and null are what they are in JSON, all others are texts
            [type] or [fields]: a list of values or of objects
            {fields}: an object

An object has its fields in this order and no others.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llava_cli import bounded_json, limits, regular_files
from llava_cli.errors import InputMissing, UsageError, os_reason, plain_message, printable

_EXAMPLE = '--schema "shop, total float, items [name, price float]"'
_GRAMMAR_EXAMPLE = """a grammar is at least: start: "yes" | "no\""""
_TYPES: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "number": {"type": "number"},
    "bool": {"type": "boolean"},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?$"},
}
_BOUNDS = bounded_json.Bounds(limits.SCHEMA_BYTES, limits.SCHEMA_DEPTH, limits.SCHEMA_ITEMS)
_WORD = re.compile(r'[^\s,|\[\]{}"]+')
_START_RULE = re.compile(r"^[ \t]*[!?]?start\b[^:\n]*:", re.M)
_TOKEN = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|([,?|\[\]{}])|([^\s,?|\[\]{}"]+))')
"""A text in quotes, a mark, or a word."""


def parse_schema(source: str, value: Any) -> str:
    """The JSON schema that a user gives: a file's name, JSON, fields, or an object in Python.

    Raises `UsageError` or `InputMissing`, about `source`, for what is no such thing.
    """
    is_name = isinstance(value, str) and not value.lstrip().startswith("{")
    if is_name and (data := _content(source, value, limits.SCHEMA_BYTES)) is not None:
        return _canonical(f"{source} {printable(value)}", _from_json(f"{source} {printable(value)}", data))
    return written_schema(source, value)


def written_schema(source: str, value: Any) -> str:
    """As `parse_schema`, where it is not the user who gives it: never a file's name."""
    if isinstance(value, Mapping):
        return _canonical(source, value)
    if callable(as_schema := getattr(value, "model_json_schema", None)):  # a class of pydantic
        return _canonical(source, as_schema())
    if not isinstance(value, str) or not value.strip():
        raise UsageError(source, "neither a JSON schema nor fields", _EXAMPLE)
    if value.lstrip().startswith("{"):
        return _canonical(source, _from_json(source, _encoded(source, value)))
    return _canonical(source, _Fields(source, value).schema())


def parse_regex(source: str, value: Any) -> str:
    """A regular expression; whether it is one is found out where it is compiled."""
    if not isinstance(value, str) or not value:
        raise UsageError(source, "there is no regular expression", "--regex '[0-9]+ (cats|dogs)'")
    if len(value) > limits.REGEX_CHARACTERS:
        raise UsageError(source, f"longer than {limits.REGEX_CHARACTERS:,} characters")
    _encoded(source, value)
    return value


def parse_grammar(source: str, value: Any) -> str:
    """The text of a Lark grammar: the file's with this name, or the value, if that has a rule `start`."""
    if isinstance(value, str) and not _has_start_rule(source, value):
        data = _content(source, value, limits.GRAMMAR_BYTES)
        if data is None:
            raise InputMissing(f"{source} {printable(value)}", "there is no such file", _GRAMMAR_EXAMPLE)
        return written_grammar(f"{source} {printable(value)}", _decoded(source, data))
    return written_grammar(source, value)


def written_grammar(source: str, value: Any) -> str:
    """As `parse_grammar`, where it is not the user who gives it: never a file's name."""
    if not isinstance(value, str) or not _has_start_rule(source, value):
        raise UsageError(source, "no Lark grammar with a rule `start`", _GRAMMAR_EXAMPLE)
    return value


def _has_start_rule(source: str, text: str) -> bool:
    """Raises `UsageError` for a text that is larger than a grammar may be, before it is searched."""
    if len(text) > limits.GRAMMAR_BYTES or len(_encoded(source, text)) > limits.GRAMMAR_BYTES:
        raise UsageError(source, f"larger than {limits.GRAMMAR_BYTES:,} bytes")
    return bool(_START_RULE.search(text))


def _content(source: str, name: str, most: int) -> bytes | None:
    """What the file with this name has; None if it is the name of none."""
    try:
        if not os.path.exists(name):
            if _WORD.fullmatch(name) and ("/" in name or name.endswith((".json", ".lark"))):
                raise InputMissing(f"{source} {printable(name)}", "there is no such file")
            return None
        return regular_files.read(name, most)
    except ValueError:  # no name of a file has a null byte
        return None
    except OSError as error:
        raise InputMissing(f"{source} {printable(name)}", os_reason(error)) from None


def _encoded(source: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UsageError(source, "not UTF-8") from None


def _decoded(source: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(source, "not UTF-8") from None


def _from_json(source: str, data: bytes) -> Any:
    try:
        return bounded_json.loads(data, _BOUNDS)
    except (ValueError, RecursionError) as error:
        raise UsageError(source, f"not JSON ({plain_message(error)})", _EXAMPLE) from None


def _canonical(source: str, schema: Any) -> str:
    """A schema as text, the same for each way in which it can be given."""
    if not isinstance(schema, Mapping):
        raise UsageError(source, "not a JSON schema, which is an object", _EXAMPLE)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(source, f"not JSON ({plain_message(error)})", _EXAMPLE) from None
    if not isinstance(schema, dict) or _from_json(source, _encoded(source, text)) != schema:
        return _canonical(source, json.loads(text))  # of keys that were numbers, tuples, …
    return text


class _Token(NamedTuple):
    """A part of a line of fields, and the number of its first character, from 1."""

    text: str
    place: int

    @property
    def is_mark(self) -> bool:
        return len(self.text) == 1 and self.text in ",?|[]{}"

    @property
    def value(self) -> str:
        """What it says, without quotes."""
        return str(json.loads(self.text)) if self.text.startswith('"') else self.text


class _Fields:
    """A parser of fields, by recursive descent."""

    def __init__(self, source: str, line: str) -> None:
        self._source = source
        self._tokens = self._split(line)
        self._next = 0
        self._depth = 0

    def schema(self) -> dict[str, Any]:
        """The schema of the whole line: of an object or, in brackets, of a list."""
        schema = self._list() if self._peek() == "[" else self._object("")
        if self._peek():
            raise self._error(f"{self._peek()!r} is one too many")
        return schema

    def _split(self, line: str) -> list[_Token]:
        if len(line) > limits.SCHEMA_FIELDS_CHARACTERS:
            raise UsageError(self._source, f"longer than {limits.SCHEMA_FIELDS_CHARACTERS:,} characters")
        tokens, place, end = [], 0, len(line.rstrip())
        while place < end:
            match = _TOKEN.match(line, place)
            if not match:
                raise UsageError(self._source, f"a quote without an end (character {place + 1})", _EXAMPLE)
            tokens.append(_Token(match[match.lastindex or 0], match.start(match.lastindex or 0) + 1))
            place = match.end()
        return [*tokens, _Token("", end + 1)]

    def _peek(self) -> str:
        return self._tokens[self._next].text

    def _take(self) -> _Token:
        token = self._tokens[self._next]
        self._next += bool(token.text)
        return token

    def _error(self, reason: str, place: int | None = None) -> UsageError:
        place = place or self._tokens[self._next].place
        return UsageError(self._source, f"{printable(reason)} (character {place})", _EXAMPLE)

    def _expect(self, *marks: str) -> None:
        """Takes one of the marks."""
        if self._peek() not in marks:
            raise self._unexpected(self._tokens[self._next], " or ".join(repr(mark) for mark in marks if mark))
        self._take()

    def _unexpected(self, found: _Token, expected: str) -> UsageError:
        words = f"{found.text!r} stands" if found.text else "the line ends"
        return self._error(f"{words} where {expected} should", found.place)

    def _object(self, end: str) -> dict[str, Any]:
        """Fields up to the mark `end`, or to the end of the line."""
        properties: dict[str, Any] = {}
        required = []
        while True:
            name = self._take()
            if name.is_mark or not name.text:
                raise self._error("there is no name for a field", name.place)
            key = self._text(name)
            if key in properties:
                raise self._error(f"{key!r} is there twice", name.place)
            is_optional = self._peek() == "?"
            if is_optional:
                self._take()
            else:
                required.append(key)
            properties[key] = _TYPES["str"] if self._peek() in (",", end) else self._type()
            if self._peek() == end:
                break
            self._expect(",", end)
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def _type(self) -> dict[str, Any]:
        if self._peek() == "[":
            return self._list()
        if self._peek() == "{":
            return self._nested("{", "}")
        first = self._take()
        if first.is_mark or not first.text:
            raise self._unexpected(first, "a type")
        if self._peek() != "|" and not first.text.startswith('"'):
            if first.text not in _TYPES:
                words = f"{first.text!r} is no type; there are {', '.join(_TYPES)}, A|B|C, [a list] and {{an object}}"
                raise self._error(words, first.place)
            return _TYPES[first.text]
        values = [self._value(first)]
        while self._peek() == "|":
            self._take()
            values.append(self._value(self._take()))
        return {"enum": values}

    def _value(self, token: _Token) -> Any:
        """One of several values: what it is in JSON, or a text."""
        if token.is_mark or not token.text:
            raise self._error("there is no value", token.place)
        if re.fullmatch(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?|true|false|null", token.text):
            return json.loads(token.text)
        return self._text(token)

    def _list(self) -> dict[str, Any]:
        """A list of values of one type or, of what is no type, of objects with these fields."""
        first, second = self._tokens[self._next + 1], self._tokens[min(self._next + 2, len(self._tokens) - 1)]
        is_type = first.text in ("[", "{") or second.text == "|" or (first.text in _TYPES and second.text == "]")
        return {"type": "array", "items": self._nested("[", "]", self._type if is_type else None)}

    def _nested(self, begin: str, end: str, inner: Any = None) -> dict[str, Any]:
        self._depth += 1
        if self._depth > limits.SCHEMA_DEPTH // 4:  # a level of fields is up to four of JSON
            raise self._error("nested too deep")
        self._expect(begin)
        schema: dict[str, Any] = inner() if inner else self._object(end)
        self._expect(end)
        self._depth -= 1
        return schema

    def _text(self, token: _Token) -> str:
        try:
            return token.value
        except ValueError:
            raise self._error(f"{token.text} is not a text as JSON writes it", token.place) from None
