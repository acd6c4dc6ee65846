"""Text from outside, as it is shown: no order reaches a terminal, no line or direction is forged, in linear time."""

from __future__ import annotations

import itertools
import re
import time
import unicodedata
from collections.abc import Callable
from random import Random

import pytest
from helpers.tables import for_each

from llava_cli import limits
from llava_cli.errors import message_line, plain_message
from llava_cli.untrusted_text import TerminalText, for_json_line, for_page, for_terminal, one_line, printable

OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f]")
SEQUENCES = [
    "\x1b[31m",
    "\x1b[0m",
    "\x9b2J",
    "\x1b[?1049h",
    "\x1b[1;2 q",
    "\x1b]0;title\x07",
    "\x1b]52;c;bGwK\x9c",
    "\x1b]8;;http://evil.example\x1b\\",
    "\x9d0;title\x9c",
    "\x1bP1$r0m\x1b\\",
    "\x90q#0~\x9c",
    "\x1b_Gi=1;AAAA\x1b\\",
    "\x1b^private\x1b\\",
    "\x98start\x9c",
    "\x1b]0;called off\x18",
    "\x1b(B",
    "\x1bc",
    "\x1b#8",
    "\x07",
    "\x08",
    "\r",
    "\x00",
    "\x7f",
    "\x84",
    "\u202e",
    "\u2066",
    "\u200f",
    "\u206e",
]
"""Each whole in itself."""
TEXTS = ["red", " ", "\n", "\t", "é", "漢字", "[31m", "]0;", "مرحبا", "שלום", "👩\u200d👧", "❤\ufe0f", "می\u200cبینم"]
FRAGMENTS = [
    "\x1b",
    "\x1b[",
    "\x9b",
    "\x1b]",
    "\x9d",
    "\x1bP",
    "\x90",
    "\x1b\\",
    "\x9c",
    "\x07",
    "\x18",
    "1;",
    "m",
    " ",
]
EXAMPLES = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("a\x07b\x08c\rd\x00e\x7f", "abcde"),
    ("left\u202eright\u2066\u200f", "leftright"),
    ("tab\tand\nline", "tab\tand\nline"),
    ("[bold]markup[/bold] é 漢 🙂", "[bold]markup[/bold] é 漢 🙂"),
    ("\x1b[31", "31"),
    ("\x1b]0;never ended", "0;never ended"),
    ("\x1b]0;interrupted\x1b[31mred", "0;interruptedred"),
    ("\x1b\x1b[31mred", "red"),
    ("\x1bé", "é"),
]


def streamed(*chunks: str) -> str:
    stream = TerminalText()
    return "".join(map(stream.push, chunks)) + stream.end()


@for_each(("text", "shown"), EXAMPLES)
def test_orders_to_the_terminal_are_taken_out(text: str, shown: str) -> None:
    assert for_terminal(text) == streamed(text) == streamed(*text) == shown


def test_all_but_orders_stays() -> None:
    """Whole sequences between texts vanish; the texts are as they were, in any script."""
    rng = Random(1)
    for _ in range(1000):
        parts = [(rng.choice(TEXTS), True) if rng.random() < 0.5 else (rng.choice(SEQUENCES), False) for _ in range(20)]
        text = "".join(part for part, _ in parts)
        assert for_terminal(text) == "".join(part for part, is_text in parts if is_text), ascii(text)


def test_the_same_however_it_is_split() -> None:
    rng = Random(2)
    for _ in range(5000):
        text = "".join(rng.choice([*SEQUENCES, *TEXTS, *FRAGMENTS, *FRAGMENTS]) for _ in range(rng.randrange(1, 12)))
        whole = for_terminal(text)
        assert not OBEYED.search(whole)
        assert for_terminal(whole) == whole
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(4)))
        chunks = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert streamed(*chunks) == streamed(*text) == whole, ascii(chunks)


@for_each(
    "begin, longer", itertools.product(["\x1b[", "\x9b", "\x1b]", "\x9d", "\x1bP", "\x1b_", "\x1b"], [-1, 0, 1, 500])
)
def test_a_sequence_without_end_is_text(begin: str, longer: int) -> None:
    """What is held back is bounded, and where it is cut makes no difference."""
    length = limits.SEQUENCE_CHARACTERS + longer
    content = "1" * length if begin in ("\x1b[", "\x9b") else " " * length if begin == "\x1b" else "x" * length
    assert streamed(begin + content) == streamed(begin, *content) == content
    stream = TerminalText()
    shown = stream.push(begin + content)
    assert len(content) - len(shown) <= limits.SEQUENCE_CHARACTERS
    ended = begin + content + "\x07m"
    assert streamed(*ended) == for_terminal(ended)
    assert (content in for_terminal(ended)) == (longer > 0 or begin in ("\x1b[", "\x9b", "\x1b"))


ATTACKS = [
    *[
        "\x1b]",
        "\x9d",
        "\x1b ",
        "\x1b",
        "\x9b1;",
        "\x9b",
        "\x1b[",
        "\x1bP\x1b",
        "\x9d\x1b",
        "\x9d\x9b",
        "\x9b ",
        "\x1b_\x07",
    ],
    *["\x00a", "\u202ea", "\x07", "\ud800", "\u2028", "\n", " \n", "\xa0", "[a", "[", "\x9d" * 4095 + "\x1b", "a"],
]


@for_each(
    "clean",
    [
        for_terminal,
        lambda text: streamed(*(text[at : at + 1000] for at in range(0, len(text), 1000))),
        lambda text: streamed(*text[: len(text) // 10]),
        printable,
        one_line,
        for_page,
        for_json_line,
        lambda text: message_line(Exception(text)),
        lambda text: plain_message(Exception(text)),
    ],
    ids=[
        *("whole", "chunks", "characters", "printable", "one_line"),
        *("for_page", "for_json_line", "message_line", "plain_message"),
    ],
)
def test_hostile_text_takes_no_longer_than_other(clean: Callable[[str], str]) -> None:
    """The bound is generous: what is quadratic takes far longer."""
    for attack in ATTACKS:
        begin = time.process_time()
        clean(attack * (60_000 // len(attack)))
        assert time.process_time() - begin < 3, ascii(attack[:8])


def test_one_line() -> None:
    assert one_line("  first \x1b[2J\nsecond") == "first \\x1b[2J"
    assert one_line("first\u2028second\x85third") == "first"
    assert one_line(" \n\t ") == ""
    assert one_line("x" * limits.NAME_CHARACTERS) == "x" * limits.NAME_CHARACTERS
    assert one_line("x" * 10**6) == "x" * (limits.NAME_CHARACTERS - 1) + "…"
    assert len(one_line("\u202e" * 10**6)) == limits.NAME_CHARACTERS


def test_a_name_has_no_character_that_is_not_seen() -> None:
    """Whatever Unicode calls a control, a format, a separator other than a space, or nothing at all is escaped."""
    unseen = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    shown = printable("".join(c for c in map(chr, range(0x110000)) if unicodedata.category(c) in unseen))
    assert shown.isascii() and shown.isprintable()


@pytest.mark.parametrize("escape", [for_page, for_json_line])
def test_what_is_escaped_for_pages_and_lines(escape: Callable[[str], str]) -> None:
    text = "".join(map(chr, range(0x80, 0x3000))) + "\ud800\udfff"
    shown = escape(text)
    assert not OBEYED.search(shown)
    assert shown.splitlines() == [shown]
    assert re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), shown) == text
