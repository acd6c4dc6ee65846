"""Whether JSON can be what a schema asks for, as far as that shows in types, names and values.

A server that ignores schemas may have a model that writes JSON all the same, of another shape. What is refused here
fits no reading of the schema; patterns, bounds and combinations of schemas are left to the server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MAX_REFS = 64
"""References that are followed one behind the other before it is taken for granted that a value fits."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": _is_number,
    "integer": lambda value: _is_number(value) and value % 1 == 0,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def misfit(schema: Any, value: Any) -> str:
    """Where a value is none of the schema's, such as `items.0.price`; empty where none is seen, `.` for all of it."""
    place = _misfit(schema, value, schema)
    return "" if place is None else ".".join(place) or "."


def _misfit(schema: Any, value: Any, root: Any) -> list[str] | None:
    """The way to what does not fit; None if all of it may."""
    schema = _resolved(schema, root)
    if not isinstance(schema, dict):
        return [] if schema is False else None
    types = schema.get("type", list(_TYPES))
    names = [name for name in (types if isinstance(types, list) else [types]) if isinstance(name, str)]
    if names and not any(_TYPES[name](value) for name in names if name in _TYPES):
        return []
    if ("const" in schema and not _equal(value, schema["const"])) or not _is_listed(value, schema.get("enum")):
        return []
    return next((way for way in (_misfit_in(part, root) for part in _parts(schema, value)) if way), None)


def _misfit_in(part: tuple[str, Any, Any], root: Any) -> list[str] | None:
    name, schema, value = part
    way = _misfit(schema, value, root)
    return None if way is None else [name, *way]


def _parts(schema: dict[str, Any], value: Any) -> list[tuple[str, Any, Any]]:
    """The parts of a value, each with its name and its schema; False is the schema of what must not be there, or has to
    be and is not."""
    if isinstance(value, list):
        first = schema.get("prefixItems")
        first = first if isinstance(first, list) else []
        schemas = [*first, *[schema.get("items", True)] * len(value)]
        return [(str(number), *pair) for number, pair in enumerate(zip(schemas, value, strict=False))]
    if not isinstance(value, dict):
        return []
    properties, required = schema.get("properties"), schema.get("required")
    properties = properties if isinstance(properties, dict) else {}
    missing = [name for name in (required if isinstance(required, list) else []) if name not in value]
    is_open = "patternProperties" in schema
    others = True if is_open else schema.get("additionalProperties", True)
    named = [(name, properties.get(name, others), one) for name, one in value.items()]
    return [(str(name), False, None) for name in missing] + named


def _resolved(schema: Any, root: Any) -> Any:
    """What a schema refers to; True, which fits everything, where that is not within it or takes too long to find."""
    for _ in range(_MAX_REFS):
        if not isinstance(schema, dict) or not isinstance(reference := schema.get("$ref"), str):
            return schema
        whole, *names = reference.split("/")
        if whole != "#":  # elsewhere, or an anchor
            return True
        schema = root
        for name in names:
            schema = schema.get(name, True) if isinstance(schema, dict) else True
    return True


def _equal(value: Any, other: Any) -> bool:
    """Whether two values are the same in JSON, where 1 is 1.0 and not true."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _is_listed(value: Any, values: Any) -> bool:
    return not isinstance(values, list) or any(_equal(value, one) for one in values)
