"""The form that a request's answer has to have: OpenAI's `response_format`, and what other servers have beside it.

https://platform.openai.com/docs/guides/structured-outputs; vLLM's `structured_outputs` and, before 0.12, `guided_…`;
SGLang's `regex` and `json_schema`, llama.cpp's `json_schema`. A client never names a file of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llava_cli import limits
from llava_cli.choices import check_choices
from llava_cli.errors import LlavaError, UsageError
from llava_cli.schemas import parse_regex, written_grammar, written_schema
from llava_cli.server.api_error import ApiError
from llava_cli.server.content_parts import check_unknown
from llava_cli.settings import FORM_OPTIONS, OPTIONS

OptionValue = tuple[str, Any]
"""The key of one of `Sampling`'s options, and its value as the request has it."""

OVERRIDDEN = (*FORM_OPTIONS, "otherwise", "at_least")
"""The options of a server that do not count for a request that says what its answer is."""


class AnswerForm:
    """The options that a request's fields are; `places` has the field of each, for errors. Raises `ApiError`."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.options: dict[str, Any] = {}
        self.places: dict[str, str] = {}
        for place, value in fields.items():
            for key, option in FIELDS[place](value, place):
                self._add(key, option, f"{place}.{key}" if place == "llava" else place)
        self.is_said = self.form is not None or is_text(fields.get("response_format"))
        """Whether the request says what an answer is, were it just text."""

    def _add(self, key: str, value: Any, place: str) -> None:
        if key in _PARSERS:
            if self.form:
                raise ApiError(400, f"{place}: {self.places[self.form]} says already what an answer is", place)
            try:
                value = _PARSERS[key](place, value)
            except UsageError as error:
                raise ApiError(400, str(error), place) from None
        self.options[key], self.places[key] = value, place

    @property
    def form(self) -> str | None:
        """The option that says what an answer is, if one does."""
        return next((key for key in _PARSERS if key in self.options), None)

    def check_size(self) -> None:
        """Raises `ApiError` for what takes longer than another request should wait."""
        if len(self.options.get("schema", "")) > limits.REQUEST_SCHEMA_CHARACTERS:
            reason = f"a schema of more than {limits.REQUEST_SCHEMA_CHARACTERS:,} characters"
        elif sum(map(len, self.options.get("choices", ()))) > limits.REQUEST_CHOICES_CHARACTERS:
            reason = f"choices of more than {limits.REQUEST_CHOICES_CHARACTERS:,} characters together"
        else:
            return
        place = self.places[self.form or ""]
        raise ApiError(400, f"{place}: {reason}", place)

    def error(self, error: LlavaError) -> ApiError:
        """What is wrong with an option, as the client knows it: by the field of the request."""
        things = error.thing.split(", ")
        keys = [key for key, option in OPTIONS.items() if key in things or option.flag in things]
        key = next((key for key in keys if key in self.places), keys[0] if keys else self.form or "")
        place = self.places.get(key, key)
        return ApiError(400, f"{place}: {error.reason}", place)


def is_text(response_format: Any) -> bool:
    """Whether a request's `response_format` asks for an answer without a form."""
    return isinstance(response_format, Mapping) and response_format.get("type") == "text"


def _response_format(value: Any, place: str) -> Iterator[OptionValue]:
    members = _members(value, place)
    kind = members.pop("type", None)
    if not isinstance(kind, str) or kind not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise ApiError(400, f"{place}.type: has to be one of {known}", place, "unsupported_parameter")
    default = _FORMATS[kind]
    if kind != "text":
        inner = _members(members.pop("json_schema", {}), f"{place}.json_schema")
        schema = members.pop("schema", default)  # llama.cpp's has it beside the type
        schema = inner.pop("schema", schema)
        check_unknown(inner, {"name", "strict", "description"}, f"{place}.json_schema.")
        if schema is None:
            raise ApiError(400, f"{place}.json_schema.schema: is missing", place)
        yield "schema", schema
    check_unknown(members, (), f"{place}.")


def _structured_outputs(value: Any, place: str) -> Iterator[OptionValue]:
    members = _members(value, place)
    if members.pop("json_object", False):
        yield "schema", _ANY_OBJECT
    for name, key in _STRUCTURED_OUTPUTS.items():
        if name in members:
            yield key, members.pop(name)
    check_unknown(members, (), f"{place}.")


def _llava(value: Any, place: str) -> Iterator[OptionValue]:
    """What OpenAI's API has no field for."""
    members = _members(value, place)
    for key in ("otherwise", "at_least", "confidence", "sight"):
        if key in members:
            yield key, members.pop(key)
    check_unknown(members, (), f"{place}.")


def _only(key: str) -> Callable[[Any, str], Iterator[OptionValue]]:
    """A field that is one option."""
    return lambda value, place: iter([(key, value)])


def _members(value: Any, place: str) -> dict[str, Any]:
    """An object's members that are not null."""
    if not isinstance(value, Mapping):
        raise ApiError(400, f"{place}: has to be an object", place)
    return {name: member for name, member in value.items() if member is not None}


def _choices(place: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        raise UsageError(place, "has to be a list of texts")
    "".join(value).encode()  # raises UnicodeError, which is answered as in other texts
    if any(choice != choice.strip() for choice in value):
        raise UsageError(place, "a choice begins or ends with a space")
    check_choices(place, value)
    return tuple(value)


def _schema(place: str, value: Any) -> str:
    """A schema as an object, or as the text of one."""
    if not isinstance(value, Mapping) and not (isinstance(value, str) and value.lstrip().startswith("{")):
        raise UsageError(place, "has to be a JSON schema, which is an object")
    return written_schema(place, value)


_ANY_OBJECT = {"type": "object"}
_FORMATS: dict[str, Any] = {"text": None, "json_object": _ANY_OBJECT, "json_schema": None}
"""The types of `response_format`, with the schema that needs not be said."""
_STRUCTURED_OUTPUTS = {"choice": "choices", "regex": "regex", "json": "schema", "grammar": "grammar"}
_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "choices": _choices,
    "schema": _schema,
    "regex": parse_regex,
    "grammar": written_grammar,
}
"""The options of which an answer can have one; each has a value checked as far as that needs no model."""
FIELDS: dict[str, Callable[[Any, str], Iterator[OptionValue]]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_choice": _only("choices"),
    "guided_regex": _only("regex"),
    "guided_json": _only("schema"),
    "guided_grammar": _only("grammar"),
    "json_schema": _only("schema"),
    "regex": _only("regex"),
    "llava": _llava,
}
"""The fields of a request, each with what makes options of it."""
