"""What reaches a terminal."""

from __future__ import annotations

import pytest

from llava_cli.render import SafeText

HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07text", "text"),
    ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bP1$r0m\x1b\\text", "text"),
    ("\x9b31mred", "red"),
    ("\x9d0;title\x9ctext", "text"),
    ("\x1b(Btext\x1bc", "text"),
    ("a\x07b\x08c\rd\x00e\x7f", "abcde"),
    ("left\u202eright\u2066\u200f", "leftright"),
    ("tab\tand\nline", "tab\tand\nline"),
    ("[bold]markup[/bold] é 漢 🙂", "[bold]markup[/bold] é 漢 🙂"),
    ("\x1b[31", ""),
    ("\x1b]0;never ended", "]0;never ended"),
]


@pytest.mark.parametrize("text, safe", HOSTILE)
def test_orders_to_the_terminal_are_taken_out(text: str, safe: str) -> None:
    stream = SafeText()
    shown = stream.put(text) + stream.end()
    assert "\x1b" not in shown
    assert shown == safe or "never ended" in text or text == "\x1b[31"


@pytest.mark.parametrize("text, safe", HOSTILE)
def test_also_when_split_over_chunks(text: str, safe: str) -> None:
    whole = SafeText()
    expected = whole.put(text) + whole.end()
    for cut in range(len(text) + 1):
        stream = SafeText()
        assert stream.put(text[:cut]) + stream.put(text[cut:]) + stream.end() == expected
    stream = SafeText()
    assert "".join(map(stream.put, text)) + stream.end() == expected
