"""Random JSON schemas with everything that is kept, and whether an object fits one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema_rs

Schema = dict[str, Any]

NAMES = (
    "a",
    "name",
    "total price",
    'a "quoted" one',
    "größe",
    "名前",
    "back\\slash",
    "tab\t",
    "",
    "$ref",
    "enum",
    "🙂",
)
PATTERNS = ("^[a-z]{1,4}$", "^\\d{2}-\\d{2}$", "b", "^(yes|no)$", "^[^x]*$", "^\\w+ \\w+$", "é|\\\\")
FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unheard-of")
WORDS = ("red", 'a "b"', "ü", "", "two words", "\\", "\n", "/")


def random_schema(dice: random.Random, depth: int = 3) -> Schema:
    """A schema with others nested up to `depth` times; it may have `$defs` that refer to themselves."""
    schema = _any(dice, depth)
    if dice.random() < 0.15:
        tree = {
            "type": "object",
            "properties": {"value": _any(dice, 1), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        return {"$defs": {"tree": tree}, "anyOf": [schema, {"$ref": "#/$defs/tree"}]}
    return schema


def _any(dice: random.Random, depth: int) -> Schema:
    simple = (_string, _number, _integer, _enum, _const, _boolean)
    nested = (_object, _object, _object, _array, _any_of, _all_of, _map)
    return dice.choice(simple if depth == 0 else simple + nested)(dice, depth - 1)


def _string(dice: random.Random, depth: int) -> Schema:
    least = dice.randint(0, 4)
    limits: list[Schema] = [
        {"maxLength": dice.randint(0, 9)},
        {"minLength": least, "maxLength": least + dice.randint(0, 5)},
        {"pattern": dice.choice(PATTERNS)},
        {"format": dice.choice(FORMATS)},
        {"format": "date", "pattern": "^20"},
        {},
    ]
    return {"type": "string", **dice.choice(limits)}


def _number(dice: random.Random, depth: int) -> Schema:
    low = dice.choice((-3.5, 0, 0.25, 17, -1e6))
    limits: list[Schema] = [
        {"minimum": low, "maximum": low + dice.choice((0.5, 3, 1000))},
        {"exclusiveMinimum": low},
        {"maximum": low},
        {"multipleOf": dice.choice((0.5, 0.25, 3))},
        {},
    ]
    return {"type": "number", **dice.choice(limits)}


def _integer(dice: random.Random, depth: int) -> Schema:
    low = dice.randint(-20, 100)
    limits: list[Schema] = [
        {"minimum": low, "maximum": low + dice.choice((1, 8, 1000))},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + 40},
        {"multipleOf": dice.choice((2, 5, 12))},
        {"format": "int32"},
        {},
    ]
    return {"type": "integer", **dice.choice(limits)}


def _boolean(dice: random.Random, depth: int) -> Schema:
    return dice.choice(
        ({"type": "boolean"}, {"type": ["boolean", "null"]}, {"type": "null"}, {"type": ["integer", "string"]})
    )


def _enum(dice: random.Random, depth: int) -> Schema:
    return {"enum": dice.sample([*WORDS, 1, 2.5, None, True, [1, "x"], {"k": []}], dice.randint(1, 4))}


def _const(dice: random.Random, depth: int) -> Schema:
    return {"const": dice.choice([*WORDS, 0, {"a": 1, "b": [2]}])}


def _object(dice: random.Random, depth: int) -> Schema:
    names = dice.sample(NAMES, dice.randint(0, 4))
    schema: Schema = {
        "type": "object",
        "properties": {name: _any(dice, depth) for name in names},
        "required": [name for name in names if dice.random() < 0.7],
    }
    more: list[Schema] = [{"additionalProperties": False}] * 4 + [{}, {"additionalProperties": _any(dice, 0)}]
    if dice.random() < 0.2:
        schema["patternProperties"] = {"^x_": _any(dice, 0)}
    return schema | dice.choice(more)


def _map(dice: random.Random, depth: int) -> Schema:
    return {"type": "object", "additionalProperties": _any(dice, depth), "maxProperties": dice.randint(1, 3)}


def _array(dice: random.Random, depth: int) -> Schema:
    least = dice.randint(0, 2)
    limits: list[Schema] = [
        {"minItems": least, "maxItems": least + dice.randint(0, 3)},
        {"maxItems": 2},
        {"prefixItems": [_any(dice, 0), _any(dice, 0)], "items": False},
        {"prefixItems": [_any(dice, 0)], "minItems": 2, "maxItems": 3},
    ]
    return {"type": "array", "items": _any(dice, depth), **dice.choice(limits)}


def _any_of(dice: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(dice, depth) for _ in range(dice.randint(1, 3))]}


def _all_of(dice: random.Random, depth: int) -> Schema:
    first = {"type": "object", "properties": {"a": _any(dice, depth)}, "required": ["a"]}
    second = {"properties": {"b": _any(dice, 0)}, "required": ["b"]}
    return {"allOf": [first, second]}


def validator(schema: str) -> Callable[[Any], bool]:
    """Whether an object fits a schema, formats too, by another implementation than the one that constrains."""
    is_valid: Callable[[Any], bool] = jsonschema_rs.validator_for(json.loads(schema), validate_formats=True).is_valid
    return is_valid
