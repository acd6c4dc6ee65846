"""What the words of a command line mean: which are pictures, which is the question."""

from __future__ import annotations

import os
import sys

from llava_cli import render
from llava_cli.conversation import Conversation, Picture
from llava_cli.errors import UsageError, printable
from llava_cli.images import looks_like_picture, open_picture
from llava_cli.registry import BUILTIN, default_name
from llava_cli.settings import Settings

USAGE = 'llava ask img.jpg "what is this?"'


def conversation_from(
    args: list[str] | None, settings: Settings, allow_truncated: bool = False, quiet: bool = False
) -> Conversation:
    """`[IMAGE]... QUESTION` -> a conversation with one question, its pictures opened.

    Where all words are pictures the question is read from stdin. Raises `UsageError` without one.
    """
    *sources, question = args or [""]
    if args and looks_like_picture(question):
        sources, question = args, "" if "-" in args else _stdin()
    # Arguments are bytes; in a locale that is not UTF-8 Python could not read them all as text.
    question = os.fsencode(question).decode("utf-8", "replace")
    pictures = [_open(source, allow_truncated, quiet) for source in sources]
    if not question.strip():
        raise UsageError("QUESTION", "there is none", USAGE)
    return Conversation(system=settings.system).ask(question, pictures)


def _stdin() -> str:
    """What was piped in; nothing where that is a terminal, or closed."""
    return "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read().strip()


def _open(source: str, allow_truncated: bool, quiet: bool) -> Picture:
    picture = open_picture(source, allow_truncated)
    if picture.truncated and not quiet:
        render.note(f"llava: {printable(source)}: truncated; the answer is about what is there")
    return picture


def say_demo(settings: Settings, quiet: bool) -> None:
    """Where nobody chose a model, says that the built-in one is for demonstration."""
    if not quiet and settings.model is None and default_name(settings) == BUILTIN:
        render.note(
            "demonstration model: knows only drawings of colored shapes. A real one: llava models pull llava-1.5-7b"
        )
