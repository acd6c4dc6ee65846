"""Some hostile input at each boundary: results, or the product's own errors. `benchmarks/fuzz.py` tries thousands."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import NoReturn

import pytest
from helpers.fuzzing import (
    BOUNDARIES,
    Boundary,
    Checkpoints,
    Documents,
    Footprint,
    Heads,
    Pictures,
    Requests,
    Rows,
    Texts,
    attempt,
    inputs,
    mutate_json,
)
from helpers.tables import for_each

COUNTS: dict[type[Boundary], int] = {Checkpoints: 12, Documents: 80, Heads: 20, Requests: 30, Rows: 12, Texts: 30}
USUAL = 30


@for_each("kind", BOUNDARIES)
def test_hostile_input(kind: type[Boundary], tmp_path: Path) -> None:
    boundary = kind(tmp_path)
    try:
        count = COUNTS.get(kind, USUAL)
        for number, data in inputs(boundary, "test", range(count)):
            if number == count // 10:
                before = Footprint.of(os.getpid())
            attempt(boundary, data)
        grown = before.growth(Footprint.of(os.getpid()))
        assert [words for words in grown if not words.startswith("memory")] == []  # which a few inputs do not tell
        boundary.notes()
    finally:
        boundary.close()


def test_inputs_are_the_same_each_time_and_no_two_alike(tmp_path: Path) -> None:
    first, again = (list(inputs(Pictures(tmp_path), 7, range(50))) for _ in range(2))
    assert first == again
    assert len({data for _, data in first}) == 50
    assert first != list(inputs(Pictures(tmp_path), 8, range(50)))


def test_json_is_changed_in_a_copy() -> None:
    value = {"a": [1, {"b": "c"}], "d": None}
    changed = [mutate_json(Random(seed), value) for seed in range(100)]
    assert value == {"a": [1, {"b": "c"}], "d": None}
    assert sum(one != value for one in changed) > 90


def test_what_must_not_come_is_told(tmp_path: Path) -> None:
    class Broken(Pictures):
        def check(self, data: bytes) -> NoReturn:
            raise SystemExit(data.decode())

    with pytest.raises(AssertionError, match=r"SystemExit \('words'\) at b'words'"):
        attempt(Broken(tmp_path), b"words")
