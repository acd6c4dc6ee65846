"""JSON of another shape than the schema that was asked for: what is seen here, and what is left to the server."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema_rs
from helpers.command import Run
from helpers.peer import answer, serving
from helpers.tables import for_each

from llava_cli.engine.remote.schema_check import misfit
from llava_cli.schemas import parse_schema

RECEIPT = 'shop, total float, date, paid? bool, items [name, price float], stars 1|2|3, by {name "a b"|c}'
GOOD = {
    "shop": "Kiosk",
    "total": 3,
    "date": "2026-11-28",
    "items": [{"name": "tea", "price": 1.5}, {"name": "roll", "price": 1.5}],
    "stars": 2.0,
    "by": {"name": "a b"},
}


@for_each(
    ("change", "place"),
    [
        ({}, ""),
        ({"paid": True}, ""),
        ({"paid": 1}, "paid"),
        ({"shop": None}, "shop"),
        ({"total": True}, "total"),
        ({"total": "3"}, "total"),
        ({"items": []}, ""),
        ({"items": {}}, "items"),
        ({"items": [{"name": "tea", "price": "1.5"}]}, "items.0.price"),
        ({"items": [{"name": "tea", "price": 1}, {"name": "tea"}]}, "items.1.price"),
        ({"stars": 4}, "stars"),
        ({"stars": True}, "stars"),
        ({"by": {"name": "b"}}, "by.name"),
        ({"more": 1}, "more"),
    ],
)
def test_fields(change: dict[str, Any], place: str) -> None:
    assert misfit(json.loads(parse_schema("--schema", RECEIPT)), {**GOOD, **change}) == place


@for_each(
    ("schema", "value", "place"),
    [
        ({"type": "object"}, [], "."),
        ({"type": ["integer", "null"]}, 7.0, ""),
        ({"type": ["integer", "null"]}, 7.5, "."),
        ({"const": 1}, True, "."),
        ({"prefixItems": [{"type": "string"}], "items": False}, ["a"], ""),
        ({"prefixItems": [{"type": "string"}], "items": False}, ["a", "b"], "1"),
        ({"$defs": {"n": {"type": "null"}}, "items": {"$ref": "#/$defs/n"}}, [None, 1], "1"),
        ({"$ref": "#"}, 1, ""),
        ({"$ref": "http://elsewhere/x"}, 1, ""),
        ({"patternProperties": {"a": {}}, "additionalProperties": False}, {"a": 1}, ""),
        ({"$ref": "#item", "$defs": {"n": {"$anchor": "item"}}, "type": "object"}, 1, ""),
        ({"items": {"$ref": "#item"}, "type": "array", "$defs": {"n": {"$anchor": "item"}}}, [1], ""),
        ({"type": {}}, 1, ""),
        ({"type": [{}, "string"]}, 1, "."),
        # left to the server
        ({"anyOf": [{"type": "string"}], "type": "integer"}, 7, ""),
        ({"type": "string", "pattern": "a"}, "b", ""),
        ({"type": "strange", "required": 1, "properties": [], "enum": {}, "prefixItems": 3}, 7, "."),
    ],
)
def test_schemas(schema: Any, value: Any, place: str) -> None:
    assert misfit(schema, value) == place


def test_nothing_that_fits_is_refused() -> None:
    """Against another implementation, with random schemas and values."""
    rng = random.Random(0)

    def schema(depth: int = 3) -> Any:
        plain = ["string", "integer", "number", "boolean", "null", ["integer", "null"]]
        kind = rng.choice([*plain, *["array", "object"] * (depth > 0)])
        if kind == "object":
            names = rng.sample("abc", rng.randrange(3))
            some = {"properties": {name: schema(depth - 1) for name in names}, "required": names[:1]}
            return {"type": kind, **some, "additionalProperties": rng.choice([True, False])}
        if kind == "array":
            return {"type": kind, "items": schema(depth - 1)}
        return rng.choice([{"type": kind}, {"enum": [value(0), value(0)]}, {"const": value(0)}])

    def value(depth: int = 3) -> Any:
        kinds = [lambda: "a", lambda: 1, lambda: 1.5, lambda: 2.0, lambda: True, lambda: None]
        if depth:
            kinds += [lambda: [value(depth - 1)], lambda: {n: value(depth - 1) for n in rng.sample("abc", 2)}] * 3
        return rng.choice(kinds)()

    found = 0
    for _ in range(3000):
        asked, told = schema(), value()
        fits = jsonschema_rs.is_valid(asked, told)
        assert bool(misfit(asked, told)) != fits, (asked, told)
        found += fits
    assert found > 100


def test_an_answer_of_another_shape_is_an_error(run: Run, drawing: Path) -> None:
    with serving() as peer:
        peer.usual = answer('{"shop": "Kiosk", "total": "3"}')
        asked = run("ask", "--server", peer.url, drawing, "which?", "--schema", "shop, total float", "--json")
    assert (asked.exit_code, asked.stdout) == (65, "")
    assert "its answer does not fit --schema at total: " in asked.stderr
