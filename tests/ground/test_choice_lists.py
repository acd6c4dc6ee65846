"""What a user gives as choices, and how models may spell them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tables import for_each

from llava_cli import limits
from llava_cli.choices import check_choices, parse_choices, spellings
from llava_cli.errors import InputMissing, UsageError
from llava_cli.settings import Sampling


@for_each(
    "choice, expected",
    [
        ("sunny", {"sunny", "Sunny", "sunny.", "Sunny."}),
        ("New York", {"New York", "new york", "New york", "New York.", "new york.", "New york."}),
        ("USA.", {"USA", "usa", "Usa", "USA.", "usa.", "Usa."}),
        ("what?", {"what?", "What?"}),
        ("3", {"3", "3."}),
        ("日本", {"日本", "日本."}),
    ],
)
def test_spellings(choice: str, expected: set[str]) -> None:
    found = spellings(choice)
    assert set(found) == expected
    assert len(found) == len(expected)


@for_each(
    "given, choices",
    [
        ("a, b,c", ("a", "b", "c")),
        (["a, b,c"], ("a", "b", "c")),
        (["red, white", "blue"], ("red, white", "blue")),
        (("a", "b"), ("a", "b")),
    ],
)
def test_lists(given: Any, choices: tuple[str, ...]) -> None:
    assert parse_choices("--choices", given) == choices


def test_a_file_has_one_in_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "breeds.txt"
    file.write_bytes("\ufeffdachshund\r\n\r\nbasset, blue\n".encode())
    assert parse_choices("--choices", str(file)) == ("dachshund", "basset, blue")
    file.write_bytes(b"\xff\xff")
    with pytest.raises(UsageError, match="not UTF-8"):
        parse_choices("--choices", [str(file)])
    monkeypatch.setattr(limits, "SETTINGS_BYTES", 1)
    with pytest.raises(InputMissing, match="larger than 1 bytes"):
        parse_choices("--choices", str(file))


@for_each(
    "choices, reason",
    [
        (["a"], "more than one choice"),
        ([""], "one of the choices is empty"),
        (["a", ""], "one of the choices is empty"),
        (["a", "."], "one of the choices is empty"),
        (["a", "a"], "'a' is there twice"),
        (["yes", "Yes."], "'yes' and 'Yes.' may be spelled alike"),
        (["a", "b" * (limits.CHOICE_CHARACTERS + 1)], "a choice has more than 1000 characters"),
        ([str(i) for i in range(limits.CHOICES + 1)], "257 choices; at most 256 are compared"),
    ],
)
def test_no_choice_at_all(choices: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        check_choices("--choices", choices)


def test_choices_that_begin_alike_are_different() -> None:
    check_choices("--choices", ["no", "not sure", "nothing", "no, thanks"])


@for_each(
    "options, reason",
    [
        ({"choices": ["a", "b"], "schema": "x"}, "--schema: --choices says already what an answer is"),
        ({"regex": "a", "schema": "x"}, "--regex: --schema says already what an answer is"),
        ({"otherwise": "unsure"}, "--or: there are no choices"),
        ({"at_least": 0.5}, "--at-least: there are no choices"),
        ({"choices": ["a", "b"], "otherwise": "unsure"}, "one is there without the other"),
        ({"choices": ["a", "b"], "otherwise": "a", "at_least": 0.5}, "--or: 'a' is one of the choices"),
        ({"choices": 3}, "choices: not a list of texts"),
    ],
)
def test_options_that_exclude_or_need_each_other(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as error:
        Sampling(**options)
    assert reason in str(error.value)
