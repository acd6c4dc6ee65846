"""Lines from a person: prompt_toolkit, or bare `input` where nothing may be redrawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output

from llava_cli import files
from llava_cli.chat.commands import COMMANDS
from llava_cli.chat.repl import Read
from llava_cli.errors import OutputError
from llava_cli.images.reader import SUFFIXES
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import printable


class Words(Completer):
    """Commands, pictures after `/image`, files after `/save` and `/export`, settings after `/set`."""

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


def keyboard(history: Path | None) -> Read:
    """Reads with editing, completion and history; Alt-Enter begins a new line. None: no history is kept.

    Raises `OutputError` where it cannot be.
    """
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    kept: History = InMemoryHistory()
    if history:
        try:
            files.make_own_file(history)  # in a folder that is its owner's alone
        except OSError as error:
            raise OutputError(str(history), printable(str(error.strerror)), "--no-save keeps nothing") from None
        kept = FileHistory(history)
    # The terminal is asked nothing: where it does not answer a warning would be drawn, and a slow answer is typed text.
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")
    # Where stdout goes to a file, the person is on the other stream.
    output = create_output(sys.stdout if sys.stdout.isatty() else sys.stderr)
    session: PromptSession[str] = PromptSession(
        history=kept,
        completer=Words(),
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
                session.default_buffer.reset()  # Ctrl-C takes back what was typed before it leaves

    return read


def plain_keyboard() -> Read:
    """Reads with nothing drawn: what is printed stays, in order, as a screen reader wants it."""

    def read() -> str:
        try:
            print("Question: ", end="", file=sys.stderr, flush=True)
            return input()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise

    return read
