"""The documentation: generated parts are up to date, and every command and file that it names exists."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from helpers.tables import for_each

from llava_cli.cli import app

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs"))

import draw_imports  # noqa: E402
import generate  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SEPARATORS = {"|", "||", "&&", ";"}


def test_generated_parts_are_up_to_date() -> None:
    stale = [str(page.relative_to(ROOT)) for page, text in generate.pages() if page.read_text("utf-8") != text]
    assert stale == [], "run: python docs/generate.py"


def test_picture_of_imports_is_up_to_date() -> None:
    assert draw_imports.PICTURE.read_text("utf-8") == draw_imports.draw(), "run: python docs/draw_imports.py"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@for_each("page", [*PAGES, ROOT / "SECURITY.md"])
def test_files_that_the_docs_name_are_there(page: Path) -> None:
    paths = re.findall(r"`((?:benchmarks|docs|examples|llava_cli|tests)/[\w./-]+)`", page.read_text("utf-8"))
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each `llava …` command in the code blocks and code spans of a page."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^    (\S.*)", text, re.M)
    spans = re.findall(r"`(llava [^`…|\[]+)`", text)
    for line in [*"\n".join(blocks).splitlines(), *indented, *spans]:
        if "llava " not in line:
            continue
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # what a command prints
            continue
        while words:
            end = next((i for i, word in enumerate(words) if word in SEPARATORS), len(words))
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                del command[0]
            redirected = next((i for i, word in enumerate(command) if word in ("<", ">")), len(command))
            if command and command[0] == "llava":
                yield command[1:redirected]


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """Raises what Typer raises for words that no command takes; arguments may be missing, as in `llava report`."""
    command = root_command()
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"):  # its options act at once, so they are not parsed
        assert set(words) <= {"--help", *(name for option in command.params for name in option.opts)}, words
    elif words != ["--help"]:
        try:
            command.make_context(command.name, list(words))
        except Exception as error:
            if type(error).__name__ != "MissingParameter":
                raise


@for_each("page", PAGES)
def test_every_command_in_the_docs_can_be_typed(page: Path) -> None:
    for words in commands_in(page.read_text("utf-8")):
        try:
            parse(words)
        except Exception as error:
            pytest.fail(f"llava {shlex.join(words)}: {getattr(error, 'message', error)}")


def test_commands_that_cannot_be_typed_are_found() -> None:
    found = list(
        commands_in("    $ echo a | X=1 llava ask -q --nonsense img.jpg < b\n\nIn text: `llava chats list`.\n")
    )
    assert found == [["ask", "-q", "--nonsense", "img.jpg"], ["chats", "list"]]
    with pytest.raises(Exception, match="--nonsense"):
        parse(found[0])
