"""The words of a command line, and what is piped in with them."""

from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.command import Run
from helpers.tables import for_each

from llava_cli import limits
from llava_cli.cli.arguments import conversation_from
from llava_cli.errors import PromptTooLong
from llava_cli.settings import Settings


class Endless(io.RawIOBase):
    """What `yes | llava ask img.png` reads; counts how much that is."""

    def __init__(self) -> None:
        self.read_so_far = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.read_so_far += len(buffer)
        buffer[:] = bytes(itertools.islice(itertools.cycle(b"y\n"), len(buffer)))
        return len(buffer)


def test_a_question_without_end(drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Endless()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BufferedReader(source)))
    with pytest.raises(PromptTooLong, match=r"^QUESTION: longer than 1,000,000 characters$"):
        conversation_from([str(drawing)], Settings())
    assert source.read_so_far < 5 * limits.TEXT_CHARACTERS


@for_each("letter", ["x", "é", "漢", "🙂"])
def test_a_question_as_long_as_it_may_be(letter: str, drawing: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TEXT_CHARACTERS", 100)
    data = io.BytesIO((letter * 100).encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=data))
    assert conversation_from([str(drawing)], Settings()).turns[-1].question == letter * 100
    asked = run("ask", drawing, input=letter * 101)
    assert (asked.exit_code, asked.stdout) == (65, "")
    assert asked.stderr == "llava: QUESTION: longer than 100 characters\n"
