"""Reads lines, asks or obeys, shows what comes; at a terminal it survives errors and Ctrl-C, in a pipe it does not."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator
from contextlib import closing

from llava_cli import limits, render
from llava_cli.chat.commands import Leave, command_of, obey, unattached
from llava_cli.chat.session import Chat
from llava_cli.errors import BadData, LlavaError
from llava_cli.untrusted_text import decoded

Read = Callable[[], str]
"""Gives the next line. Raises `EOFError` at the end, and `KeyboardInterrupt` for Ctrl-C where nothing is typed."""


def converse(chat: Chat, read: Read, quiet: bool = False, stats: bool = False) -> None:
    """A person's chat: until Ctrl-D, `/exit` or a second Ctrl-C at an empty prompt."""
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
            turn(chat, line, quiet, stats)
        except Leave:
            return
        except KeyboardInterrupt:
            chat.note("stopped")
        except LlavaError as error:
            render.show_error(error)


def answer_lines(chat: Chat, lines: Iterator[str], quiet: bool = False, stats: bool = False) -> None:
    """A pipe's chat: one question or command a line. Ends at the first error, lest what follows be about nothing."""
    for line in lines:
        try:
            turn(chat, line, quiet, stats)
        except Leave:
            return


def turn(chat: Chat, line: str, quiet: bool = False, stats: bool = False) -> None:
    """Asks or obeys one line."""
    line = line.rstrip()
    if not line:
        return
    if command := command_of(line):
        result = obey(chat, command)
    else:
        if not quiet and (path := unattached(chat, line)):
            chat.note(f"the model does not see {path}; to show it: /image {path}")
        result = chat.ask(line)
    if isinstance(result, str):
        render.say(result)
    elif result is not None:
        with closing(result):
            answer = render.show(result)
        if stats:
            render.note(render.stats(answer, chat.engine))


def piped_lines() -> Iterator[str]:
    """The lines of stdin, in UTF-8 or what its mark says. Raises `BadData` for one that no model could read."""
    if not sys.stdin:
        return
    most, stdin = limits.TEXT_CHARACTERS, sys.stdin.buffer
    line = stdin.readline(most + 1)
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # in which a line ends in two bytes
        whole = line + stdin.read(4 * most)
        if len(whole) > 4 * most:
            raise BadData("stdin", f"more than {4 * most:,} bytes of UTF-16", "iconv -f UTF-16 -t UTF-8 makes it UTF-8")
        yield from decoded(whole).splitlines()
        return
    line = line.removeprefix(codecs.BOM_UTF8)
    while line:
        if len(line) > most:
            raise BadData("stdin", f"a line of more than {most:,} bytes")
        yield line.decode("utf-8", "surrogateescape")  # a path may be no text
        line = stdin.readline(most + 1)
