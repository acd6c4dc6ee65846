"""The loop of a chat: read a line, ask it or run it as a command, show the result.

At a terminal the loop survives errors and Ctrl-C; in a pipe it ends at the first error.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing

from llava_cli import limits, render
from llava_cli.chat.commands import Leave, parse_command, run_command, unattached_picture
from llava_cli.chat.session import Chat
from llava_cli.engine import Chunk
from llava_cli.errors import BadData, DeviceLost, LlavaError
from llava_cli.untrusted_text import decoded

Read = Callable[[], str]
"""Returns the next line. Raises `EOFError` at the end, and `KeyboardInterrupt` for Ctrl-C on an empty line."""


def converse(chat: Chat, read: Read, quiet: bool = False, stats: bool = False) -> None:
    """A chat at a terminal, until Ctrl-D, /exit, or a second Ctrl-C on an empty line. Raises `DeviceLost`."""
    interrupts = 0
    while True:
        try:
            line = read()
            interrupts = 0
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts == 2:
                return
            chat.note("Ctrl-C again leaves; so does Ctrl-D")
            continue
        except EOFError:
            return
        try:
            process_line(chat, line, quiet, stats)
        except Leave:
            return
        except KeyboardInterrupt:
            chat.note("stopped")
        except DeviceLost:
            raise
        except LlavaError as error:
            render.show_error(error)


def ask_first(chat: Chat, question: str, quiet: bool = False, stats: bool = False) -> None:
    """Asks what was given on the command line, if anything was: a question in any case, also where it begins like a
    command. Ctrl-C stops the answer."""
    if question:
        try:
            _show(chat, chat.ask(question), quiet, stats)
        except KeyboardInterrupt:
            chat.note("stopped")


def answer_lines(chat: Chat, lines: Iterator[str], quiet: bool = False, stats: bool = False) -> None:
    """A chat in a pipe: each line is a question or a command. Raises at the first error, since the questions that
    follow may depend on the one that failed."""
    for line in lines:
        try:
            process_line(chat, line, quiet, stats)
        except Leave:
            return


def process_line(chat: Chat, line: str, quiet: bool = False, stats: bool = False) -> None:
    """Asks a question or runs a command, and shows the result."""
    line = line.rstrip()
    if not line:
        return
    if command := parse_command(line):
        result = run_command(chat, command)
    else:
        if not quiet and (path := unattached_picture(chat, line)):
            chat.note(f"the model does not see {path}; to show it: /image {path}")
        result = chat.ask(line)
    if isinstance(result, str):
        render.say(result)
    elif result is not None:
        _show(chat, result, quiet, stats)


def _show(chat: Chat, answer: Generator[Chunk, None, None], quiet: bool, stats: bool) -> None:
    with closing(answer):
        last = render.show(answer)
    render.note_details(last, quiet)
    if stats:
        render.note(render.stats(last, chat.engine))


def piped_lines() -> Iterator[str]:
    """The lines of stdin, in UTF-8, or in UTF-16 with a byte-order mark. Raises `BadData` for one that is too long."""
    if not sys.stdin:
        return
    limit, stdin = limits.TEXT_CHARACTERS, sys.stdin.buffer
    line = stdin.readline(limit + 1)
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # `readline` would split its two-byte characters
        text = line + stdin.read(4 * limit)
        if len(text) > 4 * limit:
            hint = "iconv -f UTF-16 -t UTF-8 makes it UTF-8"
            raise BadData("stdin", f"more than {4 * limit:,} bytes of UTF-16", hint)
        yield from decoded(text).splitlines()
        return
    line = line.removeprefix(codecs.BOM_UTF8)
    while line:
        if len(line) > limit:
            raise BadData("stdin", f"a line of more than {limit:,} bytes")
        yield line.decode("utf-8", "surrogateescape")  # a file's name may be no valid UTF-8
        line = stdin.readline(limit + 1)
