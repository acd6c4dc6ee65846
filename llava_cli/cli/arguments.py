"""Arguments of a command line: which are pictures, which is the question."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from llava_cli import limits, render
from llava_cli.conversation import Conversation, Picture
from llava_cli.errors import PromptTooLong, UsageError, printable
from llava_cli.images.reader import CLIPBOARD, SCREEN, Opened, looks_like_picture, open_chosen
from llava_cli.parts import WHOLE
from llava_cli.settings import PictureOptions, Settings
from llava_cli.untrusted_text import decoded

USAGE = 'llava ask img.jpg "what is this?"'


def conversation_from(
    args: list[str] | None,
    settings: Settings,
    allow_truncated: bool = False,
    quiet: bool = False,
    words: str = "QUESTION",
    usage: str = USAGE,
    clipboard: bool = False,
    screen: bool = False,
) -> Conversation:
    """Turns `[IMAGE]... QUESTION` into a conversation with one question, its pictures opened.

    The pictures on the clipboard and of the screen, if they are asked for, come after those that are named. If all
    arguments are pictures, the question is read from stdin. Raises `UsageError` without a question,
    `PromptTooLong` for one without an end; `words` and `usage` say what is missing and how it is given.
    """
    taken = [name for name, is_taken in ((CLIPBOARD, clipboard), (SCREEN, screen)) if is_taken]
    *sources, question = args or [""]
    if _is_picture(question, [*sources, *taken]) if args else taken:
        sources, question = args or [], "" if "-" in sources else piped_text(words)
    pictures = open_named(sources, settings.pictures, allow_truncated, quiet, taken)
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


def open_named(
    sources: list[str], options: PictureOptions, allow_truncated: bool, quiet: bool, taken: Sequence[str] = ()
) -> list[Picture]:
    """Opens the pictures that are named on the command line, then those `taken` from the clipboard or the screen.

    Prints a note for each of which only a part is there or is taken, and one for an option that chooses nothing.
    """
    opened = [open_chosen(source, options, allow_truncated) for source in sources]
    opened += [_take(name, options, allow_truncated) for name in taken]
    pictures = [picture for one in opened for picture in one.pictures]
    notes = [note for one in opened for note in one.notes]
    for picture in pictures:
        if picture.truncated:
            notes.append(f"{printable(picture.label)}: truncated; the answer is about what is there")
    has_parts = any(picture.part != WHOLE for picture in pictures)
    for option in ("pages", "frames", "every"):
        if getattr(options, option) and not has_parts:
            notes.append(f"--{option}: none of the pictures has pages or frames")
    if not quiet:
        for note in notes:
            render.note(f"llava: {note}")
    return pictures


def _take(name: str, options: PictureOptions, allow_truncated: bool) -> Opened:
    """The picture on the clipboard or of the screen."""
    if name == CLIPBOARD:
        from llava_cli.images.clipboard import open_clipboard

        return open_clipboard(options, allow_truncated)
    from llava_cli.images.screen import open_screen

    return open_screen(options, allow_truncated)
