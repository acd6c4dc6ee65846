"""Lines from the keyboard: with prompt_toolkit, or with bare `input` for screen readers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from llava_cli import files, render
from llava_cli.chat.commands import COMMANDS
from llava_cli.chat.repl import Read
from llava_cli.errors import LlavaError, OutputError, os_reason
from llava_cli.images.reader import SUFFIXES
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import for_terminal


class CommandCompleter(Completer):
    """Completes commands, pictures after /image, files after /save and /export, and options after /set."""

    def __init__(self) -> None:
        self._pictures = PathCompleter(file_filter=_folder_or_picture, expanduser=True)
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, space, rest = document.text_before_cursor.partition(" ")
        if not command.startswith("/") or "\n" in document.text:
            return
        if not space:
            for name in COMMANDS:
                if name.startswith(command[1:]):
                    yield Completion(f"/{name}", -len(command), display_meta=COMMANDS[name].help)
        elif command == "/set":
            yield from (Completion(name, -len(rest)) for name in Sampling.names() if name.startswith(rest))
        elif command in ("/image", "/save", "/export"):
            paths = self._pictures if command == "/image" else self._files
            yield from paths.get_completions(Document(rest), complete_event)


def _folder_or_picture(path: str) -> bool:
    return os.path.isdir(path) or path.lower().endswith(SUFFIXES)


def keyboard(history: Path | None, paste: Callable[[], str]) -> Read:
    """Reads lines with editing, completion and history; Alt-Enter inserts a line break, and Ctrl-V calls `paste`.

    `history` is the file that lines are saved in, None for none. `paste` returns text to insert, or takes a picture
    and returns none. Raises `OutputError` if `history` cannot be written.
    """
    keys = KeyBindings()

    @keys.add("c-v")
    async def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text(await run_in_terminal(lambda: _pasted(paste)))

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    saved: History = InMemoryHistory()
    if history:
        try:
            files.make_own_file(history)  # the store has made its folder private
        except OSError as error:
            raise OutputError(str(history), os_reason(error), "--no-save keeps nothing") from None
        saved = FileHistory(history)
    # No cursor position requests: a terminal that does not answer gets a warning, and a late answer becomes typed text.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    # If stdout is a file, the terminal is on stderr.
    output = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)
    session: PromptSession[str] = PromptSession(
        history=saved,
        completer=CommandCompleter(),
        complete_while_typing=False,
        enable_history_search=True,
        key_bindings=keys,
        output=output,
        prompt_continuation="  ",
    )

    def read() -> str:
        while True:
            try:
                return session.prompt("> ")
            except KeyboardInterrupt:
                if not session.default_buffer.text:
                    raise
                session.default_buffer.reset()  # Ctrl-C first clears the line, then leaves

    return read


def _pasted(paste: Callable[[], str]) -> str:
    """What `paste` returns as text that can be edited; its error is shown, and leaves the line as it is."""
    try:
        text = paste()
    except LlavaError as error:
        render.show_error(error)
        return ""
    return for_terminal(text.replace("\r\n", "\n").replace("\r", "\n"))


def plain_keyboard() -> Read:
    """Reads lines without redrawing anything, so that a screen reader hears everything once and in order."""

    def read() -> str:
        try:
            print("Question: ", end="", file=sys.stderr, flush=True)
            return input()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise

    return read
