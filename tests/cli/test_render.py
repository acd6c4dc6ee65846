"""What reaches a terminal, and what a pipe."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any

import pytest
from helpers.faults import Told
from helpers.screen import Screen

from llava_cli import render
from llava_cli.cli.prompt import show_difference
from llava_cli.engine import Answer, Chunk
from llava_cli.engine.base import Confidence
from llava_cli.errors import LlavaError, ModelUnusable

HOSTILE = "\x1b]0;owned\x07\x1b[2Ja\tb\nc\u202ed\x9b31m\r"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
ANSWER = Answer("red", "stop", 7, 0, 3, 0.1, 0.2)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """Both streams are a screen."""
    monkeypatch.setenv("TERM", "dumb")  # rich draws without orders of its own
    monkeypatch.setenv("COLUMNS", "200")
    with redirect_stdout(Screen()) as screen, redirect_stderr(screen):
        yield screen


def test_an_answer_on_a_terminal_gives_no_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        assert render.show(iter([Chunk(character) for character in HOSTILE] + [Chunk("", ANSWER)])) is ANSWER
    assert screen.getvalue() == "a\tb\ncd\n"


def test_an_answer_in_a_pipe_is_as_it_is() -> None:
    with redirect_stdout(io.StringIO(newline="")) as pipe:
        render.show(iter([Chunk(HOSTILE, ANSWER)]))
    assert pipe.getvalue() == HOSTILE + "\n"


def test_no_line_on_a_terminal_gives_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen:
        render.say(HOSTILE)
        render.note(HOSTILE)
        render.note(render.confidence_line(replace(ANSWER, confidence=Confidence(0.9, 0.4, HOSTILE), sight=0.0)))
        render.show_error(ModelUnusable(HOSTILE, HOSTILE, HOSTILE))
        render.table(["", ""], [[HOSTILE, HOSTILE]])
        render.show_json({HOSTILE: HOSTILE})
        render.show_checks(iter([("weights", True, HOSTILE), ("template", False, HOSTILE)]), as_json=False)
        show_difference({"first": HOSTILE, "second": HOSTILE + HOSTILE}, as_json=False)
    said = screen.getvalue()
    assert not OBEYED.search(said), ascii(said)
    assert "owned" in said  # as text


def test_a_cell_forges_neither_column_nor_row(capsys: pytest.CaptureFixture[str]) -> None:
    render.table(["name", "size"], [[HOSTILE, "1 MB"], ["a\x85b\u2028c\x0bd", "2\t3\n4"]])
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("\t") for line in lines] == [1, 1]
    assert all(cell.isprintable() for line in lines for cell in line.split("\t"))


def test_checks_in_a_pipe_are_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert render.show_checks(iter([("weights", True, HOSTILE)]), as_json=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("ok\tweights\t")
    assert line.count("\t") == 2


def test_json_in_a_pipe_is_one_line_to_every_reader(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"answer": HOSTILE + "\x85\u2028\u2029é漢"}
    render.show_json(value)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == value
    assert not OBEYED.search(line)
    assert "é漢" in line


@pytest.mark.parametrize("error", [LlavaError(HOSTILE, "x"), LlavaError("x", HOSTILE), LlavaError("x", "y", HOSTILE)])
def test_an_error_is_one_line_and_a_hint(error: LlavaError, capsys: pytest.CaptureFixture[str]) -> None:
    render.show_error(error)
    first, *hint = capsys.readouterr().err.splitlines()
    assert first.startswith("llava: ")
    assert len(hint) == bool(error.hint)
    assert all(line.isprintable() for line in (first, *hint))


def test_what_an_answer_took_is_one_line() -> None:
    engine: Any = Told()
    for name in ("model", "precision", "device", "where"):
        setattr(engine, name, HOSTILE)
    assert render.stats(ANSWER, engine).isprintable()


def test_a_bar_takes_a_name_for_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as screen, render.progress("[bold]a[/bold] {task.id}" + HOSTILE) as meter:
        meter(1, 2)
    said = screen.getvalue()
    assert "[bold]a[/bold] {task.id}" in said
    assert not OBEYED.search(said.replace("\r", ""))
