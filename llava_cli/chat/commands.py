"""What is obeyed instead of asked: a table of small functions."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_cli import files, render
from llava_cli.chat.export import export, save
from llava_cli.chat.session import Chat
from llava_cli.conversation import Picture
from llava_cli.engine import Chunk
from llava_cli.errors import InputMissing, UsageError
from llava_cli.images.reader import SUFFIXES, is_url, local_path, open_picture
from llava_cli.settings import Sampling
from llava_cli.untrusted_text import printable

Result = str | Generator[Chunk, None, None] | None
"""Lines to print, an answer to show, or nothing where a note says it all."""


class Leave(Exception):
    """Ends the chat."""


@dataclass(frozen=True)
class Command:
    run: Callable[[Chat, str], Result]
    takes: str
    help: str


_ALIASES = {
    **dict.fromkeys(("exit", "exit()", "quit", "quit()", "bye", ":q", ":q!", ":wq", ":quit", "\\q"), "/exit"),
    **dict.fromkeys(("/bye", "/quit", "/q"), "/exit"),
    **dict.fromkeys(("help", "help()", "?", ":help", ":h", "\\?", "/?", "/h"), "/help"),
}
"""What people type to leave, or for help, in other programs. None of it is asked of the model."""


def command_of(line: str) -> str | None:
    """The command that a line is, if it is none of the questions."""
    return _ALIASES.get(line.strip().lower()) or (line if line.startswith("/") else None)


def obey(chat: Chat, line: str) -> Result:
    """Runs `/NAME REST`. Raises `UsageError` for a name that there is not, with the nearest that there is."""
    name, _, rest = line[1:].partition(" ")
    if name not in COMMANDS:
        if os.path.isfile(path := _path(line)):
            raise UsageError(printable(path), "a picture is attached by a command", f"/image {files.quoted(path)}")
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        raise UsageError(f"/{printable(name)}", "there is no such command", f"/{near[0]}" if near else "/help")
    return COMMANDS[name].run(chat, rest.strip())


def unattached(chat: Chat, question: str) -> str | None:
    """The path of a picture in a question that the model is not shown, quoted: attaching is for commands."""
    shown = {os.path.abspath(picture.name) for picture in (*chat.conversation.pictures, *chat.attached)}
    for word in (question, *question.split()):
        path = _path(word.strip("\"'`,;:?!()<> ").rstrip("."))
        full = os.path.abspath(path)
        if path.lower().endswith(SUFFIXES) and full not in shown and os.path.isfile(full):
            return files.quoted(path)
    return None


def _path(typed: str) -> str:
    """A path as it was typed, as a terminal or a file manager writes one that is dropped, or as a hint quotes it."""
    path = os.path.expanduser(typed)
    if os.path.lexists(path):
        return path
    if _ANSI_C.fullmatch(typed):
        plain = typed[2:-1].encode()
        return os.fsdecode(re.sub(rb"\\x([0-9a-f]{2})", lambda code: bytes([int(code[1], 16)]), plain))
    with suppress(ValueError):
        words = shlex.split(typed)
        path = os.path.expanduser(words[0]) if len(words) == 1 else path
    with suppress(InputMissing):  # of another machine, which opening it says
        path = local_path(path)
    return path


_ANSI_C = re.compile(r"\$'(?:[ -&(-\[\]-~]|\\x[0-9a-f]{2})*'")
"""A name as `files.quoted` writes what is not printable."""
_WORD = re.compile(r"""(?:\$'[^']*'|"(?:[^"\\]|\\.)*"|'[^']*'|\\.|\S)+""")
_LONGEST = 4096
"""Characters in which a path ends: Linux takes none that is longer."""


def _pictures_and_question(typed: str) -> tuple[list[str], str]:
    """What is typed behind `/image`: paths or URLs, and perhaps a question about them."""
    pictures: list[str] = []
    while typed and (length := _length_of_picture(typed, not pictures)):
        pictures.append(_path(typed[:length]))
        typed = typed[length:].lstrip()
    return pictures, typed


def _length_of_picture(typed: str, is_first: bool) -> int:
    """Of the longest beginning that is a file, which may have spaces in it, or of a word meant as a picture."""
    word = _WORD.match(typed, 0, _LONGEST)
    ends = [found.start() for found in re.finditer(r"(?<=\S)(?=\s|$)", typed[:_LONGEST])]
    for end in reversed(ends):
        is_word = word is not None and end == word.end()
        if os.path.isfile(_path(typed[:end]) if is_word else os.path.expanduser(typed[:end])):
            return end
    if not word:
        return len(typed) if is_first else 0
    path = _path(word[0])
    if is_url(path) or path.lower().endswith(SUFFIXES) or path[:5].lower() == "file:":
        return word.end()
    return len(typed) if is_first else 0


def _image(chat: Chat, typed: str) -> Result:
    paths, question = _pictures_and_question(typed)
    if not paths or "-" in paths:
        raise UsageError("/image", "which one?", "/image PATH")
    pictures = [open_picture(path) for path in paths]  # all of them, or none is attached
    for picture in pictures:
        chat.attach(picture)
        if not question:
            chat.note(f"{_named(picture)} goes with the next question")
    return chat.ask(question) if question else None


def _images(chat: Chat, _: str) -> Result:
    held = [(p, f"question {n}") for n, turn in enumerate(chat.conversation.turns, 1) for p in turn.pictures]
    held += [(p, "the next question") for p in chat.attached]
    return "\n".join(f"{_named(picture)} with {where}" for picture, where in held) or "none; /image PATH attaches one"


def _named(picture: Picture) -> str:
    return f"{printable(picture.name)} ({picture.image.width}x{picture.image.height})"


def _clear(chat: Chat, _: str) -> Result:
    chat.clear()
    chat.note("a new conversation, without pictures")
    return None


def _undo(chat: Chat, _: str) -> Result:
    chat.note(f"taken back: {chat.undo()}")
    return None


def _retry(chat: Chat, _: str) -> Result:
    return chat.retry()


def _set(chat: Chat, rest: str) -> Result:
    name, *values = re.split("[ =]", rest, maxsplit=1)
    names = Sampling.names()
    if not name:
        return "\n".join(f"{name} {getattr(chat.settings, name)}" for name in names)
    name = name.replace("-", "_")
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise UsageError(f"/set {printable(name)}", f"not one of {', '.join(names)}", f"/set {near[0]}" if near else "")
    if value := "".join(values).strip():
        unset, is_default = chat.settings.unset - {name}, value == "default"
        change: dict[str, Any] = {name: getattr(Sampling(), name) if is_default else value}
        chat.settings = replace(chat.settings, **change, unset=unset | {name} if is_default else unset)
        chat.note(f"{name} {getattr(chat.settings, name)}")
        return None
    return f"{name} {getattr(chat.settings, name)}"


def _system(chat: Chat, text: str) -> Result:
    if not text:
        return chat.conversation.system or "none"
    chat.set_system(None if text == "none" else text)
    chat.note(f"system text: {chat.conversation.system or 'none'}")
    return None


def _prompt(chat: Chat, _: str) -> Result:
    return chat.prompt()


def _save(chat: Chat, path: str) -> Result:
    return _written(chat, path, "/save", save)


def _export(chat: Chat, path: str) -> Result:
    return _written(chat, path, "/export", export)


def _written(chat: Chat, path: str, command: str, write: Callable[..., None]) -> Result:
    if not path:
        raise UsageError(command, "to which file?", f"{command} FILE")
    write(chat.conversation, chat.engine.model, Path(os.path.expanduser(path)))
    chat.note(f"written: {printable(path)}")
    return None


def _stats(chat: Chat, _: str) -> Result:
    if chat.last is None:
        return "no answer yet"
    used = chat.last.prompt_tokens + chat.last.answer_tokens
    context = f"{used} of {chat.engine.context} tokens of context" if chat.engine.context else f"{used} tokens"
    return f"{render.stats(chat.last, chat.engine)}\n{context}; {chat.last.cached_tokens} of them were read before"


def _help(chat: Chat, _: str) -> Result:
    wide = max(len(f"{name} {command.takes}") for name, command in COMMANDS.items())
    return "\n".join(f"/{f'{name} {command.takes}':{wide}}  {command.help}" for name, command in COMMANDS.items())


def _exit(chat: Chat, _: str) -> Result:
    raise Leave


COMMANDS = {
    "image": Command(_image, "PATH... [QUESTION]", "Attach pictures to the next question, or to this one."),
    "images": Command(_images, "", "List the pictures of this conversation."),
    "clear": Command(_clear, "", "Begin a new conversation."),
    "undo": Command(_undo, "", "Take back the last question and its answer."),
    "retry": Command(_retry, "", "Ask the last question again."),
    "set": Command(_set, "[NAME [VALUE]]", "Show or change how answers are made: /set temperature 0.7"),
    "system": Command(_system, "[TEXT]", "Show or change the instructions before the conversation; /system none."),
    "prompt": Command(_prompt, "", "Print the conversation exactly as the model reads it."),
    "stats": Command(_stats, "", "Print what the last answer took."),
    "save": Command(_save, "FILE", "Write the conversation as text, or as JSON to a .json file."),
    "export": Command(_export, "FILE.md", "Write the conversation as Markdown with its pictures."),
    "help": Command(_help, "", "List these commands."),
    "exit": Command(_exit, "", "Leave; Ctrl-D does too."),
}
