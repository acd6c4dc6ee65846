"""JSON of strangers: its bounds are seen before it is parsed, however it comes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from helpers.tables import for_each

from llava_cli.bounded_json import Bounds, Scanner, TooMuch, loads

WIDE = 10**9


def random_value(rng: random.Random, depth: int = 0) -> Any:
    text = "".join(rng.choices('a"\\[]{},:\n\u00e9', k=rng.randrange(6)))
    kind = rng.randrange(7 if depth < 6 else 3)
    if kind < 3:
        return (rng.randrange(99), text, None)[kind]
    if kind < 5:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {text + str(i): random_value(rng, depth + 1) for i in range(rng.randrange(4))}


def depth_of(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def items_of(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 1
    return 1 + sum(map(items_of, value.values() if isinstance(value, dict) else value))


def test_depth_and_items_are_those_of_the_parsed_document() -> None:
    rng = random.Random(1)
    for _ in range(5000):
        value = random_value(rng)
        data = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
        depth, items = depth_of(value), items_of(value)
        assert loads(data, Bounds(len(data), depth, 2 * items)) == value
        cut = rng.randrange(len(data) + 1)
        for bounds in [Bounds(WIDE, depth - 1, WIDE)] * (depth > 0) + [Bounds(WIDE, WIDE, items // 2 - 1)] * (
            items > 3
        ):
            scanner = Scanner(bounds)
            with pytest.raises(TooMuch):
                scanner.feed(data[:cut])
                scanner.feed(data[cut:])


@for_each(
    "data, words",
    [
        (b"[" * 1_000_000, "more than 1,000 values"),
        (b"[" * 900, "nested deeper than 16 levels"),
        (b'{"a":' * 900, "nested deeper than 16 levels"),
        (b"[" + b"0," * 1_000_000 + b"0]", "more than 1,000 values"),
        (b'[{"a":0},' * 1_000_000, "more than 1,000 values"),
        (b'"' + b'\\"' * 8_000_000 + b'"', "larger than 10 MB"),
        (b'["\\\\",' + b"[" * 20, "nested deeper than 16 levels"),
        (b'["\\\\\\"",' + b"[" * 20, "nested deeper than 16 levels"),
        (b" " * 20_000_000, "larger than 10 MB"),
    ],
)
def test_what_exceeds_a_bound_is_not_parsed(data: bytes, words: str) -> None:
    with pytest.raises(TooMuch, match=words):
        loads(data, Bounds(10_000_000, 16, 1000))


@for_each("data", [b"", b"[", b"\xff", b"nul", b"[1 2]", "[1]".encode("utf-16"), "[1]".encode("utf-32")])
def test_what_is_no_json_in_utf_8(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        loads(data, Bounds(WIDE, WIDE, WIDE))
    assert not isinstance(raised.value, TooMuch)


def test_brackets_within_texts_are_none() -> None:
    data = json.dumps(["[" * 100, "{" * 100, '\\"[', "\\"]).encode()
    assert loads(data, Bounds(WIDE, 1, 10))[0] == "[" * 100


def test_a_byte_order_mark_is_taken() -> None:
    assert loads(b"\xef\xbb\xbf[1]", Bounds(WIDE, WIDE, WIDE)) == [1]
