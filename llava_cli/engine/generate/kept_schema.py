"""JSON schemas of which llguidance keeps everything: what it would accept and not keep is replaced or refused here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from typing import Any
from urllib.parse import unquote

from llava_cli import limits
from llava_cli.errors import UsageError

SCHEMA_HINT = "what is kept: type, enum, const, properties, items, anyOf, allOf, $ref, pattern, format and bounds"

_DAY = (
    r"([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-"  # 0000 is no year
    r"((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP_DAY = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][48]|[13579][26]|[2468]0)00)-02-29"
_CLOCK = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_HOST = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,59}[a-zA-Z0-9])?(\.[a-zA-Z0-9]([a-zA-Z0-9-]{0,59}[a-zA-Z0-9])?){0,3}"
_MAILBOX = r"[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,15}(\.[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]{1,15}){0,3}"
_NO_PUNYCODE = r"^([^-]|-[^-])*$"
_FORMATS: dict[str, tuple[str, ...]] = {
    "date": (f"^({_DAY}|{_LEAP_DAY})$",),
    "time": (f"^{_CLOCK}$",),
    "date-time": (f"^({_DAY}|{_LEAP_DAY})T{_CLOCK}$",),
    "hostname": (f"^{_HOST}$", _NO_PUNYCODE),
    "email": (f"^{_MAILBOX}@{_HOST}$", r"@([^-]|-[^-])*$"),
}
"""Patterns for what llguidance's own are too generous about: leap days and seconds, lengths, labels like `xn--`."""
_OWN_FORMATS = ("duration", "ipv4", "ipv6", "uuid", "uri")
"""Formats that it keeps."""
_OTHER_FORMATS = (
    *("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template"),
    *("json-pointer", "relative-json-pointer", "regex"),
)
"""Other formats that JSON Schema defines; of any that it does not, nothing is asked."""
_DATA = ("const", "enum", "default", "examples", "example")
"""Keywords with values of which none is a schema."""
_OTHER_NAMES = {"additionalProperties", "patternProperties", "minProperties", "anyOf", "oneOf", "$ref"}
"""Keywords that speak of names besides those in `properties`."""
_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions", "$comment"}
"""Keywords to which no value is held."""
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords with schemas by name."""


def kept_schema(flag: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of which everything is kept, and whose values all fit the given one. Raises `UsageError` for others.

    An object has the names in its `properties`, and others only where the schema speaks of them: else a model that does
    not know when to end adds names for ever. Where a value has to fit several schemas, each may name some of its own.
    """
    if _is_too_deep(schema, schema, 0, {}, set()):
        raise UsageError(flag, f"its $refs nest more than {limits.SCHEMA_REF_DEPTH} levels", SCHEMA_HINT)
    if not _Endings(schema).has_one(schema):
        raise UsageError(flag, "no answer can satisfy it: what it asks for never ends", SCHEMA_HINT)
    _check_sizes(flag, schema)
    kept: dict[str, Any] = _kept(flag, schema, is_open=_is_combined(schema))
    return kept


def _check_sizes(flag: str, schema: dict[str, Any]) -> None:
    """Raises `UsageError` for what would be compiled for minutes."""
    if prod({_digits_of(number) for number in _values_of(schema, "multipleOf", (int, float))}) > limits.SCHEMA_MULTIPLE:
        raise UsageError(flag, "multipleOf has too many digits", "a multiple of 10 or 0.01 has one")
    if sum(map(len, _values_of(schema, "patternProperties", (dict,)))) > limits.SCHEMA_PATTERNS:
        raise UsageError(flag, f"more than {limits.SCHEMA_PATTERNS} patternProperties", SCHEMA_HINT)
    if any(len(names) > limits.SCHEMA_PROPERTIES for names in _values_of(schema, "properties", (dict,))):
        raise UsageError(flag, f"an object with more than {limits.SCHEMA_PROPERTIES:,} properties", SCHEMA_HINT)


def _is_too_deep(schema: Any, root: Any, depth: int, reached: dict[str, int], path: set[str]) -> bool:
    """Whether a part of `root` at this depth has others too far below it, and below what it refers to.

    `reached` has how deep each reference has been met, `path` those that this part is below.
    """
    if depth > limits.SCHEMA_REF_DEPTH:
        return True
    if isinstance(schema, list):
        return any(_is_too_deep(part, root, depth + 1, reached, path) for part in schema)
    if not isinstance(schema, dict):
        return False
    name = schema.get("$ref")
    if isinstance(name, str) and name not in path and reached.get(name, -1) < depth:
        reached[name] = depth
        if _is_too_deep(_resolved(root, name), root, depth + 1, reached, path | {name}):
            return True
    return any(_is_too_deep(part, root, depth + 1, reached, path) for part in schema.values())


class _Endings:
    """Whether a schema has any finite answer: one that has to have itself as a part has none."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open: set[str] = set()
        self._finite: set[str] = set()
        self._steps = self._depth = 0

    def has_one(self, schema: Any) -> bool:
        """True too for what is no schema, which others find out, and for what takes long to find out."""
        self._steps += 1
        if not isinstance(schema, dict) or self._steps > limits.SCHEMA_ITEMS or self._depth > limits.SCHEMA_REF_DEPTH:
            return True
        self._depth += 1
        has_one = self._has_one(schema)
        self._depth -= 1
        return has_one

    def _has_one(self, schema: dict[str, Any]) -> bool:
        is_object, is_list = (schema.get("type") == kind for kind in ("object", "array"))
        parts = [*_listed(schema, "allOf"), *([schema] if isinstance(schema.get("$ref"), str) else [])]
        if is_object and isinstance(properties := schema.get("properties"), dict):
            parts += [properties.get(name) for name in _listed(schema, "required") if isinstance(name, str)]
        if is_list and isinstance(least := schema.get("minItems"), int):
            items = [*_listed(schema, "prefixItems"), *([schema.get("items")] * (least > 0))]
            parts += items[:least]
        if not all(self._ends(part) if part is schema else self.has_one(part) for part in parts):
            return False
        return all(any(map(self.has_one, one)) for key in ("anyOf", "oneOf") if (one := _listed(schema, key)))

    def _ends(self, schema: dict[str, Any]) -> bool:
        """Whether what it refers to has a finite answer, in which it does not occur again."""
        name = schema["$ref"]
        if name in self._finite or name in self._open:
            return name in self._finite
        self._open.add(name)
        if is_finite := self.has_one(_resolved(self._root, name)):
            self._finite.add(name)
        self._open.discard(name)
        return is_finite


def _listed(schema: dict[str, Any], key: str) -> list[Any]:
    return value if isinstance(value := schema.get(key), list) else []


def _resolved(root: Any, reference: str) -> Any:
    """What a reference within a schema points to (RFC 6901); None for any other."""
    if not reference.startswith("#"):
        return None
    found = root
    for part in unquote(reference[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


def _values_of(schema: Any, key: str, kind: tuple[type, ...]) -> Iterator[Any]:
    """All values of this name and kind within a schema."""
    if isinstance(schema, dict):
        if type(schema.get(key)) in kind:
            yield schema[key]
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _values_of(part, key, kind)


def _digits_of(number: float) -> int:
    """The significant digits of a number, as a whole one."""
    return int(re.sub(r"[eE].*|[-.]", "", repr(number)).strip("0") or 1)


def _kept(flag: str, schema: Any, is_open: bool) -> Any:
    """`is_open`: an object that says nothing about other names than its own may have them."""
    if isinstance(schema, list):
        return [_kept(flag, item, is_open) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            kept[key] = {name: _kept(flag, one, is_open) for name, one in value.items()}
        else:
            kept[key] = value if key in _DATA else _kept(flag, value, is_open)
    required, least = _listed(schema, "required"), schema.get("minProperties")
    if isinstance(least, int) and least > max(1, len(required)):
        raise UsageError(flag, "minProperties can only be kept by names that are required", SCHEMA_HINT)
    if isinstance(schema.get("format"), str):
        _keep_format(flag, kept)
    if not is_open and _has_own_names(schema):
        kept["additionalProperties"] = False
    return kept


def _has_own_names(schema: dict[str, Any]) -> bool:
    """Whether a schema is that of an object, and speaks of no other names than those of its properties."""
    names, required = schema.get("properties"), _listed(schema, "required")
    if schema.get("type") != "object" or not isinstance(names, dict) or _OTHER_NAMES & schema.keys():
        return False
    return all(isinstance(name, str) and name in names for name in required)


def _is_combined(schema: Any) -> bool:
    """Whether a schema holds a value to several schemas at once."""
    if isinstance(schema, list):
        return any(map(_is_combined, schema))
    if not isinstance(schema, dict):
        return False
    asserted = schema.keys() - _NOTES
    return (
        "allOf" in asserted
        or (len(asserted) > 1 and not asserted.isdisjoint(("anyOf", "oneOf", "$ref")))
        or any(map(_is_combined, schema.values()))
    )


def _keep_format(flag: str, schema: dict[str, Any]) -> None:
    name = schema["format"]
    if name in _OTHER_FORMATS:
        known = ", ".join(sorted((*_FORMATS, *_OWN_FORMATS)))
        raise UsageError(flag, f"the format {name!r} cannot be kept; those that can are {known}", "give a pattern")
    if name not in _OWN_FORMATS:
        del schema["format"]
    if name in _FORMATS and isinstance(others := schema.get("allOf", []), list):
        schema["allOf"] = [*others, *({"pattern": pattern} for pattern in _FORMATS[name])]
