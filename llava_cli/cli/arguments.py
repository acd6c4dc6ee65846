"""Arguments of a command line: which are pictures, which is the question."""

from __future__ import annotations

import os
import sys

from llava_cli import limits, render
from llava_cli.conversation import Conversation, Picture
from llava_cli.errors import PromptTooLong, UsageError, printable
from llava_cli.images.reader import looks_like_picture, open_picture
from llava_cli.settings import Settings
from llava_cli.untrusted_text import decoded

USAGE = 'llava ask img.jpg "what is this?"'


def conversation_from(
    args: list[str] | None,
    settings: Settings,
    allow_truncated: bool = False,
    quiet: bool = False,
    words: str = "QUESTION",
    usage: str = USAGE,
) -> Conversation:
    """Turns `[IMAGE]... QUESTION` into a conversation with one question, its pictures opened.

    If all arguments are pictures, the question is read from stdin. Raises `UsageError` without a question,
    `PromptTooLong` for one without an end; `words` and `usage` say what is missing and how it is given.
    """
    *sources, question = args or [""]
    if args and _is_picture(question, sources):
        sources, question = args, "" if "-" in args else piped_text(words)
    pictures = [open_named(source, allow_truncated, quiet) for source in sources]
    if not question.strip():
        raise UsageError(words, "there is none", usage)
    return Conversation(system=settings.system).ask(question, pictures)


def piped_text(words: str) -> str:
    """What was piped in; empty if stdin is a terminal, or closed. Raises `PromptTooLong`, about `words`."""
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    most = limits.TEXT_CHARACTERS
    text = decoded(sys.stdin.buffer.read(4 * most + 1))  # a character has 4 bytes at most
    if len(text) > most:
        raise PromptTooLong(words, f"longer than {most:,} characters")
    return text.strip()


def _is_picture(argument: str, before: list[str]) -> bool:
    """Whether the last argument is one more picture; a sentence that ends in a file's name is not."""
    return looks_like_picture(argument) and not (before and (" " in argument or os.path.isdir(argument)))


def open_named(source: str, allow_truncated: bool, quiet: bool) -> Picture:
    """Opens a picture named on the command line; prints a note if only a part of it is there."""
    picture = open_picture(source, allow_truncated)
    if picture.truncated and not quiet:
        render.note(f"llava: {printable(source)}: truncated; the answer is about what is there")
    return picture
